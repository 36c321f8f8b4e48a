"""Checks file names, links and images of a folder before they are used."""

import os
from collections.abc import Iterable
from pathlib import Path

from datasets.utils import tqdm

from ..models.image_processing_pvlf import open_rgb


def check_image_files(folder: Path, names: list[str], open_them: bool = True, allow_links: bool = False) -> None:
    """Raises a `ValueError` that lists images outside the folder, missing, or (with `open_them`) broken."""
    if outside := [name for name in names if leaves(folder, name)]:
        raise ValueError(f"{len(outside)} image names leave {folder}, first: {outside[:3]}")
    if not allow_links:
        check_links(folder, names)
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} images are not in {folder}, first: {missing[:3]}. "
            "Names must be given with their ending, relative to the image folder."
        )
    broken = []
    for name in tqdm(names, desc="checking images", unit="image", disable=not open_them):
        if open_them and (reason := unreadable(folder / name)):
            broken.append(f"{name} ({reason})")
    if broken:
        raise ValueError(f"{len(broken)} images cannot be read, first: {broken[:3]}. Replace them or drop their rows.")


def leaves(folder: Path, name: str) -> bool:
    """Whether a file name leads out of the folder by `..` or as an absolute path."""
    folder = folder.absolute()
    return not Path(os.path.normpath(folder / name)).is_relative_to(os.path.normpath(folder))


def check_links(folder: Path, names: Iterable[str]) -> None:
    """Raises a `ValueError` that lists names that are, or lie behind, links out of the folder."""
    folder = folder.resolve()
    # A snapshot in the Hub's cache is made of links to the blobs beside it.
    snapshots = [place for place in (folder, *folder.parents) if place.parent.name == "snapshots"]
    within = [folder, *(place.parent.parent / "blobs" for place in snapshots)]
    outside = [name for name in names if not any(map((folder / name).resolve().is_relative_to, within))]
    if outside:
        raise ValueError(
            f"{len(outside)} names in {folder} are links that lead out of it, first: {outside[:3]}; pass "
            "allow_links=True if you know where they lead"
        )


def files_below(folder: Path, allow_links: bool) -> list[Path]:
    """Whatever is in a folder and its subfolders and is no folder, sorted.

    Args:
        folder: where.
        allow_links: follow links out of it, into other folders too.

    Raises:
        ValueError: without `allow_links`, if a link leads out of the folder.
    """
    files, links, seen = [], [], {os.path.realpath(folder)}
    for place, below, names in os.walk(folder, followlinks=allow_links):
        files += [Path(place, name) for name in names]
        links += [path for path in (Path(place, name) for name in (*below, *names)) if path.is_symlink()]
        real = {name: os.path.realpath(Path(place, name)) for name in below}
        below[:] = [name for name in below if real[name] not in seen]  # a link may lead back
        seen.update(real.values())
    if not allow_links:
        check_links(folder, [str(link.relative_to(folder)) for link in links])
    return sorted(files)


def unreadable(file: Path) -> str | None:
    """Why the image processor cannot decode the file, or None if it can."""
    try:
        open_rgb(file)
    except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged files
        return str(error) or type(error).__name__
    return None
