"""Lets a folder hand on names of its modules without importing these before a name is used."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(folder: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], list[str]]:
    """Return `__getattr__` and `__all__` of a folder.

    Args:
        folder: its name, `__name__`.
        names: names that it hands on, separated by blanks, by the module that defines them.
    """
    module_of = {name: module for module, its_names in names.items() for name in its_names.split()}

    def __getattr__(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {folder!r} has no attribute {name!r}")
        return getattr(import_module(f"{folder}.{module_of[name]}"), name)

    return __getattr__, sorted(module_of)


__all__ = ["lazy_names"]
