"""Checks arguments, data sets and captions; each error names what was passed and how to fix it."""

import errno
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset
from huggingface_hub.constants import HF_HUB_CACHE

from ..atomic_files import cannot_write

_ROWS_AT_ONCE = 10_000
"""Rows of a text column that are read at once (our choice)."""

_FORMATS_OF_ROWS = (None, "python", "custom", "numpy", "torch", "jax", "tensorflow")
"""Formats of `datasets` whose rows are dictionaries."""

_HOW_TO_ADD = {
    "image_id": 'Number the images with `dataset.add_column("image_id", [str(row) for row in range(len(dataset))])`.',
    "target_id": 'Add it with `dataset.add_column("target_id", [...])`, equal for targets that are the same thing; '
    "`load_hub_triplets` makes it of the target images.",
    "reference_id": 'Add the ids of reference images with `dataset.add_column("reference_id", [...])`; '
    "`load_triplets` makes them of file names.",
    "target_image_id": 'Add the ids of target images with `dataset.add_column("target_image_id", [...])`; '
    "`load_triplets` makes them of file names.",
}
"""How to add a column of ids, which most data sets lack."""


def as_path(argument: str, value: object) -> Path:
    """Return a path.

    Raises:
        TypeError: if the value is not a path; names the argument.
    """
    if not isinstance(value, str | PathLike):
        raise TypeError(f"{argument} is {value!r:.80} ({type(value).__name__}), but it takes a path: str or Path")
    return Path(value)


def check_integer(argument: str, value: object) -> None:
    """Raise a `TypeError` unless the value is an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} is {value!r:.80} ({type(value).__name__}), but it takes an integer")


def check_choice(what: str, choice: object, choices: Collection[str]) -> None:
    """Raise a `ValueError` unless the choice is one of the choices."""
    if choice not in list(choices):
        raise ValueError(f"unknown {what} {choice!r}; choose from {list(choices)}")


def check_list(argument: str, value: object) -> None:
    """Raise a `TypeError` for a single string where several are expected: it would be read letter by letter."""
    if isinstance(value, str):
        raise TypeError(f"{argument} is the string {value!r}, but it takes a list: [{value!r}]")


def check_columns(dataset: Any, required: Sequence[str], what: str, streams: bool = False) -> None:
    """Check that a data set is one, and has some columns.

    Args:
        dataset: a `datasets.Dataset`; anything else is refused.
        required: names of the columns it must have.
        what: names the data set in errors.
        streams: take a `datasets.IterableDataset` too.

    Raises:
        ValueError: if it is no data set, a dictionary of splits, a stream, or in a format without rows, or columns are
            missing; names them, those that it has, and the remedy.
    """
    _check_type(dataset, what, streams)
    names = dataset.column_names
    if names is None:  # a stream that does not know its columns before it is read
        return
    if missing := [name for name in required if name not in names]:
        raise ValueError(f"{what}: missing column(s) {missing}; it has {names}. {_remedy(missing, names)}")


def _check_type(dataset: Any, what: str, streams: bool) -> None:
    takes = "a datasets.Dataset" + (" or IterableDataset" if streams else "")
    name = type(dataset).__name__
    if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        splits = list(dataset)
        example = f', e.g. dataset["{splits[0]}"]' if splits else ""
        raise ValueError(f"{what}: is a {name} of the splits {splits}, but it takes {takes}: pass one split{example}")
    if isinstance(dataset, IterableDataset):
        if not streams:
            raise ValueError(
                f"{what}: is a stream ({name}), but it takes {takes}, whose rows can be counted and read again: load "
                "it without streaming, or collect the rows with Dataset.from_list(list(stream))"
            )
    elif not isinstance(dataset, Dataset):
        raise ValueError(
            f"{what}: is {dataset!r:.80} ({name}), but it takes {takes}; see Dataset.from_list and .from_dict"
        )
    elif dataset.format["type"] not in _FORMATS_OF_ROWS:
        raise ValueError(
            f"{what}: is in {dataset.format['type']!r} format, in which rows are no dictionaries: "
            "pass dataset.with_format(None)"
        )


def _remedy(missing: Sequence[str], names: Sequence[str]) -> str:
    """Return the remedy for missing columns."""
    alike = names_alike(missing, names)
    if alike:
        renames = ", ".join(f'("{name}", "{wanted}")' for wanted, name in alike.items())
        return f"Names are case-sensitive: rename with `dataset.rename_column`, {renames}."
    added = [_HOW_TO_ADD[name] for name in missing if name in _HOW_TO_ADD]
    renamed = ["Rename with `dataset.rename_column(old, new)`."] if len(added) < len(missing) else []
    return " ".join(added + renamed)


def names_alike(wanted: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Return, by wanted name, a name that differs from it only in case or outer blanks, if there is one."""
    plain = {name.strip().casefold(): name for name in names}
    return {name: plain[name.casefold()] for name in wanted if name.casefold() in plain}


def caption_problem(caption: object) -> str | None:
    """Return what is wrong with a caption (`"is None, not text"`), or None if it is text that can be tokenized."""
    if not isinstance(caption, str):
        return f"is {caption!r:.80}, not text"
    if not caption.strip():
        return "is empty"
    return surrogate_problem(caption)


def surrogate_problem(text: str) -> str | None:
    """Return what is wrong with text that contains a lone surrogate, which no encoding can hold; else None."""
    half = next((letter for letter in text if "\ud800" <= letter <= "\udfff"), None)
    return half and f"contains {half!r}, a lone surrogate, which is not a valid character: fix the text's encoding"


def check_rows(dataset: Dataset, what: str, first_row: int = 0) -> None:
    """Check captions and, where there is such a column, target ids of all rows; images are not read.

    Args:
        dataset: with the column `caption`.
        what: names the data set in errors.
        first_row: number of its first row in errors.

    Raises:
        ValueError: if a caption is empty or no text, or a target id is missing; names the row and its target id.
    """
    names = [name for name in ("caption", "target_id") if name in dataset.column_names]
    count, first = 0, ""
    texts = dataset.select_columns(names).with_format(None)
    row = first_row
    for batch in texts.iter(_ROWS_AT_ONCE):
        for cells in zip(*(batch[name] for name in names), strict=True):
            if problem := row_problem(dict(zip(names, cells, strict=True))):
                first = first or f"row {row} (counted from 0), {problem}"
                count += 1
            row += 1
    if count:
        raise ValueError(f"{what}: {count} rows cannot be used, first: {first}. Fix them or drop them.")


def row_problem(row: dict[str, Any]) -> str | None:
    """Return what is wrong with the caption or target id of a triplet, or None."""
    problem = caption_problem(row.get("caption"))
    if "target_id" not in row:
        return problem and f"caption {problem}"
    target_id = row["target_id"]
    if problem:
        return f"target_id {target_id!r:.80}: caption {problem}"
    if isinstance(target_id, str):
        problem = surrogate_problem(target_id)
        return problem and f"target_id {problem}"
    is_number = isinstance(target_id, int) or (isinstance(target_id, float) and isfinite(target_id))
    return None if is_number else f"target_id is {target_id!r:.80}, but it must be text or a number"


@contextmanager
def naming_the_cache() -> Iterator[None]:
    """Name the cache folder of `datasets`, and how to choose another, if it cannot be written.

    Raises:
        OSError: in place of the error of `datasets` if that is about the cache; others pass.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not _is_about_the_cache(cause):
            cause = cause.__cause__
        if not isinstance(cause, OSError):
            raise
        folder = datasets.config.HF_DATASETS_CACHE
        raise cannot_write(f"the cache of datasets, {folder} (see HF_HOME and HF_DATASETS_CACHE)", cause) from error


def _is_about_the_cache(error: BaseException) -> bool:
    if not isinstance(error, OSError) or error.filename is None:
        return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    path = Path(error.filename)
    caches = (Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE))
    return any(path.is_relative_to(cache) or cache.is_relative_to(path) for cache in caches)


__all__ = [
    "as_path",
    "caption_problem",
    "check_choice",
    "check_columns",
    "check_integer",
    "check_list",
    "check_rows",
    "names_alike",
    "naming_the_cache",
    "row_problem",
    "surrogate_problem",
]
