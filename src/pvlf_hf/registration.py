"""Registers the models with Transformers when both are imported, in whichever order."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def import_after(library: str, module: str) -> None:
    """Import a module now, if a library is imported already, otherwise directly after it is first imported.

    Args:
        library: top-level name of the library.
        module: full name of the module.
    """
    if library in sys.modules:
        import_module(module)
    else:
        sys.meta_path.insert(0, _Awaiting(library, module))


class _Awaiting(MetaPathFinder):
    """Finder of one library, through the finders behind it, that has a module imported after the library."""

    def __init__(self, library: str, module: str) -> None:
        self.library, self.module = library, module

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find the library; whether it is imported then is not known, for others only ask whether it is there."""
        if name != self.library:
            return None
        behind = [finder for finder in sys.meta_path if not isinstance(finder, _Awaiting)]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in behind)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenImport(spec.loader, self)
        return spec


class _ThenImport(Loader):
    """Loader that executes a library by its own loader, to which it leaves the library, then imports the module."""

    def __init__(self, loader: Loader, awaiting: _Awaiting) -> None:
        self.loader, self.awaiting = loader, awaiting

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the library's module as its loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the library, then import the awaited module, which finds the library complete."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.awaiting in sys.meta_path:
            sys.meta_path.remove(self.awaiting)
        import_module(self.awaiting.module)


__all__ = ["import_after"]
