"""Finds the image files that names refer to, and checks names, links and images before they are used."""

import logging
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import PIL.Image

from ..models.image_processing_pvlf import open_rgb

logger = logging.getLogger(__name__)


def check_image_files(
    folder: Path, names: Collection[str], open_them: bool = True, allow_links: bool = False
) -> dict[str, str]:
    """Check that names refer to images in a folder.

    Args:
        folder: the images' folder.
        names: as [`find_files`] takes them.
        open_them: decode every image.
        allow_links: accept links that lead out of the folder.

    Returns:
        By name the file's own name, see [`find_files`].

    Raises:
        ValueError: if images are outside the folder, missing, or (with `open_them`) broken; names the first three and,
            for missing ones, files of similar names.
    """
    from datasets.utils import tqdm  # obeys datasets.disable_progress_bars()

    if outside := [name for name in names if escapes_folder(folder, name)]:
        raise ValueError(f"{len(outside)} image names leave {folder}, first: {outside[:3]}")
    files = find_files(folder, names)
    if not allow_links:
        check_links(folder, dict.fromkeys([*(name for name in names if "\0" not in name), *files.values()]))
    if missing := [name for name in names if name not in files]:
        raise ValueError(
            f"{len(missing)} of {len(names)} images are not in {folder}, first: {missing[:3]}. "
            + _what_is_there(folder, missing[:3], {str(folder / file) for file in files.values()})
        )
    if other := [name for name in names if is_respelled(folder, name)]:
        logger.warning("%d image names are taken for files %s, first: %r", len(other), RESPELLED, other[:3])
    broken = []
    for name in tqdm(sorted(set(files.values())), desc="checking images", unit="image", disable=not open_them):
        if open_them and (reason := unreadable(folder / name)):
            broken.append(f"{name} ({reason})")
    if broken:
        raise ValueError(f"{len(broken)} images cannot be read, first: {broken[:3]}. Replace them or drop their rows.")
    return files


def find_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Find the files of a folder that names refer to.

    A name that no file has exactly refers to the file that differs from it only in Unicode form, slashes or outer
    blanks, if there is exactly one.

    Args:
        folder: the images' folder.
        names: file names relative to it, or absolute in it.

    Returns:
        By name the file's own name: relative to the folder and the same for every spelling of a file and for links to
        it, so that it can be its id. Names that lead out of the folder or have no file are left out.

    Raises:
        ValueError: if the folder does not exist.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; pass the one that image names are relative to")

    @cache
    def listing(below: str) -> dict[str, list[str]]:
        """Return the names of files and folders by their form; each folder is listed once."""
        subfolder, by_form = folder / below, defaultdict(list)
        for entry in os.scandir(subfolder) if subfolder.is_dir() else ():
            by_form[_form(entry.name)].append(entry.name)
        return by_form

    def find(relative: str) -> str | None:
        parts: list[str] = []
        for part in relative.split("/"):
            alike = listing("/".join(parts)).get(_form(part), [])
            if part not in alike and len(alike) != 1:
                return None
            parts.append(part if part in alike else alike[0])
        return "/".join(parts) if folder.joinpath(*parts).is_file() else None

    found = {}
    for name in names:
        for spelling in (name, _with_slashes(name)):
            relative = _relative(folder, spelling)
            if name not in found and relative is not None and (file := find(relative)):
                found[name] = file
    return _one_name_each(folder, found)


def _one_name_each(folder: Path, found: dict[str, str]) -> dict[str, str]:
    """Give links and the files that they lead to one name: the file's, or the first where that is elsewhere."""
    top = os.path.realpath(folder)
    own: dict[str, str] = {}
    for name in sorted(set(found.values())):
        real = os.path.realpath(folder / name)
        inside = Path(real).is_relative_to(top)
        own.setdefault(real, Path(real).relative_to(top).as_posix() if inside else name)
    return {name: own[os.path.realpath(folder / file)] for name, file in found.items()}


RESPELLED = "that differ from them in Unicode form, slashes or outer blanks"


def is_respelled(folder: Path, name: str) -> bool:
    """Return whether no file has just this name."""
    return "\0" in name or not os.path.lexists(folder / name)


def _with_slashes(name: str) -> str:
    """Return a name with slashes for backslashes and without outer blanks."""
    return name.strip().replace("\\", "/")


def _form(name: str) -> str:
    """Return a name in the form in which names that differ in Unicode form, slashes or outer blanks are equal."""
    return unicodedata.normalize("NFC", _with_slashes(name))


def _relative(folder: Path, name: str) -> str | None:
    """Return a name relative to the folder, normalised; None if it leads out of it."""
    top = os.path.normpath(folder.absolute())
    path = Path(os.path.normpath(folder.absolute() / name))
    if path.is_relative_to(top):
        return path.relative_to(top).as_posix()
    if not Path(name).is_absolute() or "\0" in name:
        return None
    real, top = Path(os.path.realpath(path.parent), path.name), os.path.realpath(folder)  # one of them may be a link
    return real.relative_to(top).as_posix() if real.is_relative_to(top) else None


def escapes_folder(folder: Path, name: str) -> bool:
    """Return whether a name leads out of the folder, by `..` or as an absolute path, with slashes of any kind."""
    return _relative(folder, name) is None or _relative(folder, _with_slashes(name)) is None


def _plain(name: str) -> str:
    """Return a name without compatibility forms, escapes, quotes, blanks and control characters, all hard to see."""
    text = unicodedata.normalize("NFKC", unquote(name)).strip("'\"")
    return "".join(letter for letter in text if unicodedata.category(letter) not in ("Cc", "Cf", "Zs"))


_HARD_TO_SEE = "Unicode form, escapes, blanks or invisible characters"

_DIFFERENCES: tuple[tuple[str, bool, Callable[[str], str]], ...] = (
    ("folder", True, lambda name: name),
    (_HARD_TO_SEE, True, _plain),
    ("letter case", True, str.casefold),
    ("ending", False, lambda name: Path(name).stem),
    ("leading zeros", False, lambda name: name.lstrip("0")),
)
"""Differences between a file's name and a requested one: what differs, whether both still mean the same image, and the
function that removes the difference. Each is applied on top of those before it."""


def similar_files(
    folders: Sequence[Path], names: Iterable[str], taken: Collection[str] = ()
) -> dict[str, tuple[str, str]]:
    """Find files that may be meant by names that no file has.

    Args:
        folders: where the images may be, subfolders included.
        names: file names, of which folders do not count.
        taken: paths of files that other names refer to; for these, another extension or leading zeros mean another
            image.

    Returns:
        By name the path of the most similar file and how it differs; names with none are left out.
    """
    roots = [f for f in folders if f.is_dir() and not any(f != g and f.is_relative_to(g) for g in folders)]
    endings = PIL.Image.registered_extensions()
    files = [
        str(file)
        for root in roots
        for file in sorted(root.rglob("*"))
        if file.suffix.lower() in endings and file.is_file()
    ]
    similar: dict[str, tuple[str, str]] = {}
    keys = {name: Path(_with_slashes(name)).name for name in names}
    key_of_file = {file: Path(file).name for file in reversed(files)}  # of several the first
    for difference, is_same, remove in _DIFFERENCES:
        keys = {name: remove(key) for name, key in keys.items()}
        key_of_file = {file: remove(key) for file, key in key_of_file.items()}
        file_of_key = {key: file for file, key in key_of_file.items() if is_same or file not in taken}
        for name, key in keys.items():
            if name not in similar and key in file_of_key:
                similar[name] = (file_of_key[key], difference)
    return similar


def _what_is_there(folder: Path, missing: Sequence[str], taken: Collection[str]) -> str:
    """Describe which files are similar to missing names, and how they differ."""
    similar = similar_files([folder], missing, taken)
    if not similar:
        return "Names must be given with their ending, relative to the image folder."
    show = {True: ascii, False: repr}  # what looks the same is escaped
    pairs = [
        f"for {show[difference == _HARD_TO_SEE](name)} there is "
        f"{show[difference == _HARD_TO_SEE](Path(file).relative_to(folder).as_posix())}, which differs in {difference}"
        for name, (file, difference) in similar.items()
    ]
    return f"Rename the files or correct the names: {'; '.join(pairs)}."


def check_links(folder: Path, names: Iterable[str]) -> None:
    """Raise a `ValueError` that lists names that are, or lie behind, links out of the folder."""
    folder = folder.resolve()
    # A snapshot in the Hub's cache is made of links to the blobs beside it.
    snapshots = [parent for parent in (folder, *folder.parents) if parent.parent.name == "snapshots"]
    within = [folder, *(snapshot.parent.parent / "blobs" for snapshot in snapshots)]
    outside = [name for name in names if not any(map((folder / name).resolve().is_relative_to, within))]
    if outside:
        raise ValueError(
            f"{len(outside)} names in {folder} are links that lead out of it, first: {outside[:3]}; pass "
            "allow_links=True if you know where they lead"
        )


def files_below(folder: Path, allow_links: bool) -> list[Path]:
    """List all files of a folder and its subfolders, sorted.

    Args:
        folder: the folder.
        allow_links: follow links out of it, into other folders too.

    Raises:
        ValueError: without `allow_links`, if a link leads out of the folder.
    """
    files, links, seen = [], [], {os.path.realpath(folder)}
    for parent, below, names in os.walk(folder, followlinks=allow_links):
        files += [Path(parent, name) for name in names]
        links += [path for path in (Path(parent, name) for name in (*below, *names)) if path.is_symlink()]
        real = {name: os.path.realpath(Path(parent, name)) for name in below}
        below[:] = [name for name in below if real[name] not in seen]  # a link may lead back
        seen.update(real.values())
    if not allow_links:
        check_links(folder, [str(link.relative_to(folder)) for link in links])
    return sorted(files)


def unreadable(file: Path) -> str | None:
    """Return why the image processor cannot decode the file, or None if it can."""
    try:
        open_rgb(file)
    except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged files
        return str(error) or type(error).__name__
    return None
