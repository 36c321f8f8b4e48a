"""Atomic files: written under another name, and renamed when they are complete.

A rename replaces a file in one step, so that a killed process or a full disk leaves the previous content. Nothing is
flushed to the disk: the file system decides what a power cut leaves.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers.utils import logging

logger = logging.get_logger(__name__)

PARTIAL = ".partial"
"""Suffix of a file that is being written. The next write of the same file replaces one that a kill left behind."""


@contextmanager
def whole(file: str | Path, several: bool = False) -> Iterator[Path]:
    """Yield a path to write to, which replaces the file when the block ends; folders are made.

    Args:
        file: the file.
        several: several processes may write it at the same time, each under a name of its own; the last remains. What
            a kill leaves behind is not replaced by the next write.

    Raises:
        OSError: if it cannot be written; the previous content is unchanged.

    Example:
        >>> with whole("outputs/results.json") as partial:
        ...     written = partial.write_text("{}")
    """
    file = Path(file)
    partial = file.with_name(f"{file.name}.{uuid4().hex}{PARTIAL}" if several else file.name + PARTIAL)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        raise cannot_write(f"{file.name} in {file.parent}", error) from error
    finally:
        with suppress(OSError):  # usually gone: it was renamed to the file
            partial.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder within the block, after waiting for others, and remove partial files of killed processes.

    Raises:
        OSError: if nothing can be written there.
    """
    lock = FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=2)
        except Timeout:
            logger.warning(f"another process is at work in {folder}: waiting for it")
            lock.acquire()
    except OSError as error:
        raise cannot_write(f"in {folder}", error) from error
    try:
        for left in folder.glob(f"*{PARTIAL}"):
            left.unlink()
        yield
    finally:
        lock.release()


def cannot_write(what: str, error: Exception) -> OSError:
    """Return the error to raise from one that occurred while writing."""
    reason = str(error).partition("\n")[0]
    return OSError(
        f"cannot write {what} ({reason}): free disk space, get write permission, or choose another folder, and run "
        "again. Existing files are unchanged."
    )


__all__ = ["cannot_write", "locked", "whole"]
