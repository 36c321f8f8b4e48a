"""Opens locations: folders, and URLs of object stores that fsspec knows."""

import tarfile
from pathlib import Path, PurePosixPath

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem


class Unreadable(OSError, ValueError):
    """Raised where stored images cannot be read, whatever was asked for: a file is damaged, gone or replaced."""


def open_location(location: str | Path) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a folder or an fsspec URL, and the path in it.

    Raises:
        ImportError: if the store needs a package that is not installed.
        ValueError: if there is no such kind of store, or it cannot be opened.
    """
    try:
        files, root = url_to_fs(str(location))
    except ImportError as error:
        raise ImportError(f"{location} needs a package that is not installed: {error}") from error
    except Exception as error:  # each kind of store raises its own
        raise ValueError(f"{location} cannot be opened ({error}): check the URL and the login") from error
    return files, root.rstrip("/")


def files_of(location: str | Path, pattern: str) -> list[str]:
    """Return the sorted names of a location's files that match a pattern, none where it does not exist yet.

    Raises:
        ValueError: if the store refuses to list it.
    """
    files, root = open_location(location)
    files.invalidate_cache()  # another process may be writing there
    try:
        found = files.ls(root, detail=False)
    except FileNotFoundError:
        return []
    except Exception as error:  # each kind of store raises its own
        raise ValueError(
            f"{location} cannot be listed ({error}): check the URL, the login and its rights; if it is busy, try later"
        ) from error
    return sorted(path.name for path in map(PurePosixPath, found) if path.match(pattern))


def stamp_of(files: AbstractFileSystem, path: str) -> str:
    """Return what tells a file from one that has replaced it.

    Raises:
        FileNotFoundError: if there is none. Each kind of store raises its own errors, too.
    """
    if not isinstance(files, LocalFileSystem):
        return files.ukey(path)
    facts = Path(path).stat()  # fsspec's key also tells of hard links that were made
    return f"{facts.st_size} {facts.st_mtime_ns}"


def is_damage(error: Exception) -> bool:
    """Return whether an error is of a file's content, and not of reaching the file.

    Those of Arrow and of archives are; for some content Arrow raises a plain `OSError` without a number. Each kind of
    store raises its own errors where it cannot be reached.
    """
    of_content = isinstance(error, pa.ArrowException | tarfile.TarError)
    return of_content or (type(error) is OSError and error.errno is None)


REACHABLE = "check that it is there and may be read, and of a store that it answers, and the login; then try again"
"""Remedy where a file cannot be reached, whose content may be good."""


__all__ = ["REACHABLE", "Unreadable", "files_of", "is_damage", "open_location", "stamp_of"]
