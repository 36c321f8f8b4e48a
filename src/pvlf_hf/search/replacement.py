"""Replaces a gallery by that of another image encoder: built beside it while it serves, then renamed to replace it.

Where a rename of a folder is one step, a reader sees the old gallery or the new one. A kill between the two renames
leaves the old one under another name and the new one complete: whoever opens the gallery next finishes the exchange.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from transformers.utils import logging

from ..atomic_files import cannot_write, locked
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from .gallery_files import check_encoder, kept_provenance

logger = logging.get_logger(__name__)

NEW, OLD = ".being-built", ".being-replaced"
"""Endings of the folders beside a gallery: the one that is being built, and the one that is being replaced. Both are
deleted when done, so the names are none that a person would give to a copy, as `.old` is."""


def beside(folder: Path) -> tuple[Path, Path]:
    """Return the folder that a replacement is built in, and the one that the replaced gallery is moved to."""
    folder = folder.resolve()
    return folder.with_name(folder.name + NEW), folder.with_name(folder.name + OLD)


def finish_replacement(folder: Path) -> None:
    """Finish what a kill left of [`put_in_place`], and nothing where it left nothing."""
    new, old = beside(folder)
    if not folder.exists() and old.is_dir() and new.is_dir():
        _move(new, folder)


@contextmanager
def locked_gallery(folder: Path) -> Iterator[None]:
    """Lock the folder of a gallery within the block, after waiting for others, and tidy what a kill left."""
    finish_replacement(folder)
    with locked(folder):
        shutil.rmtree(beside(folder)[1], ignore_errors=True)
        yield


def place_to_build(
    folder: Path,
    model: ComposedRetrievalModel,
    processor: ComposedRetrievalProcessor,
    provenance: dict[str, str],
    replacing: bool,
) -> Path:
    """Return the folder to embed images in: the gallery's own, or the one beside it where its encoder is another.

    Args:
        folder: of the gallery.
        model: embeds the images.
        processor: of the model.
        provenance: of the model, see [`images_made_by`].
        replacing: whether a gallery of another image encoder is to be replaced; one in another dtype is not.

    Raises:
        ValueError: if the gallery is of another image encoder and not to be replaced.
    """
    kept = kept_provenance(folder)
    try:
        check_encoder(folder, model, processor, provenance)
    except ValueError:
        if not replacing or kept is None or kept["dtype"] != provenance["dtype"]:
            raise
    else:
        return folder
    new, _ = beside(folder)
    state = PartialState()
    if state.is_main_process:
        logger.warning(f"{folder} is of another image encoder: its successor is built in {new} while it serves")
        if kept_provenance(new) not in (None, provenance):
            logger.warning(f"{new} was begun with a third image encoder: what it holds is deleted")
            shutil.rmtree(new)
    state.wait_for_everyone()
    return new


def put_in_place(folder: Path) -> None:
    """Replace a gallery by the finished folder that [`beside`] names, and delete the old one.

    Raises:
        OSError: if a folder cannot be renamed; the gallery is unchanged.
    """
    new, old = beside(folder)
    try:
        folder.resolve().rename(old)
        _move(new, folder)
    except OSError as error:
        raise cannot_write(f"{folder.name} in {folder.resolve().parent}", error) from error
    shutil.rmtree(old, ignore_errors=True)


def _move(new: Path, folder: Path) -> None:
    """Rename a finished folder; another process may have been quicker."""
    try:
        new.rename(folder.resolve())
    except FileNotFoundError:
        if not folder.exists():
            raise


__all__ = ["finish_replacement", "locked_gallery", "place_to_build", "put_in_place"]
