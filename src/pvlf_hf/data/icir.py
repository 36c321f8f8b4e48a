"""i-CIR: 1,883 queries for 202 objects, each ranked against the images of its own object alone (NeurIPS 2025).

Annotations and images: <https://huggingface.co/datasets/billpsomas/icir>, CC-BY-NC-SA-4.0.
"""

import csv
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..atomic_files import whole
from ..digests import annotations_digest
from ..models.image_processing_pvlf import check_bytes
from .annotations import check_counts_of, find_file, make_benchmark
from .benchmark import CIRBenchmark, NamedProtocol, Protocol
from .checks import as_path
from .examination import Finding, Tree, other_count
from .image_files import escapes_folder

HUB_ID = "billpsomas/icir"

SPLITS = ("test",)

EXPECTED_COUNTS = {"queries": 1883, "instances": 202}
"""Numbers of the data set's card."""

ABOUT_IMAGES = 750_000
"""Images as the card rounds them. A number that is more than `TOLERANCE` away is of a table that is cut off."""

TOLERANCE = 0.05
"""Share of `ABOUT_IMAGES` (our choice)."""

FOLDERS = ("", "annotations/")
"""Folders of the annotations: of the archive, and of the data set on the Hub."""

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def load_icir(root: str | Path, allow_missing: bool = False, check_counts: bool = True) -> CIRBenchmark:
    """Load the benchmark.

    Args:
        root: has `query_files.csv` and `database_files.csv` (also in `annotations/`), and the images in `query/` and
            `database/`. Where these are absent and the WebDataset shards of the Hub, `webdataset/*/*.tar`, are there,
            the images are unpacked once, see [`unpack_shards`].
        allow_missing: leave out images without a file and the queries that name them as reference or as one of the
            positives, with a warning and a note in the protocol, instead of raising.
        check_counts: raise unless there are the published numbers of queries and instances, and about that of images.

    Returns:
        The benchmark. Ids are the paths of the annotations; `group_id` the instance; `target_ids` the instance's
        images that are annotated with the query's text.

    Raises:
        ValueError: if a file is absent or not as published, or images are absent.
    """
    root = as_path("root", root)
    found = read_annotations(root)
    if check_counts:
        instances = {row["group_id"] for row in found.rows}
        actual = {"queries": len(found.rows), "instances": len(instances)}
        check_counts_of("icir/test", **{what: (actual[what], n) for what, n in EXPECTED_COUNTS.items()})
        if problem := _size_problem(found):
            raise ValueError(f"icir/test: {problem}. Pass check_counts=False if the data is meant to be partial.")
    if is_packed(root):
        unpack_shards(root)
    protocol = Protocol(
        name="icir",
        gallery="the images of the query's instance",
        reference="outside",
        metrics="icir",
        revision=annotations_digest(*found.files),
    )
    return make_benchmark(
        "icir/test", found.rows, found.images, [root], protocol, allow_missing, found.references, found.groups
    )


class Annotations(NamedTuple):
    """Content of the two tables.

    Args:
        files: of the queries, and of the database.
        rows: columns of the queries but the images.
        references: possible file names by id of a query image.
        images: possible file names by id of a database image.
        groups: by id of a database image, the instance in a list.
    """

    files: tuple[Path, Path]
    rows: list[dict[str, Any]]
    references: dict[str, list[str]]
    images: dict[str, list[str]]
    groups: dict[str, list[str]]


def read_annotations(root: Path) -> Annotations:
    """Read the two tables."""
    files = [find_file(root, [f"{folder}{name}_files.csv" for folder in FOLDERS]) for name in ("query", "database")]
    queries, database = map(_read_table, files)
    positives: dict[tuple[str, str], list[str]] = {}
    groups: dict[str, list[str]] = {}
    for path, text, instance in database:
        if path in groups:
            raise ValueError(f"{files[1]}: {path} is given more than once")
        groups[path] = [instance]
        positives.setdefault((instance, text), []).append(path)
    rows = []
    for number, (path, text, instance) in enumerate(queries):
        if not text.strip():
            raise ValueError(f"{files[0]}: row {number}: the text is empty")
        if (instance, text) not in positives:
            raise ValueError(f"{files[0]}: row {number}: no database image of {instance!r} has the text {text!r}")
        targets = positives[instance, text]
        labels = {"target_id": targets[0], "target_ids": targets}
        rows.append({"reference_id": path, "caption": text, "group_id": instance, **labels})
    references = {path: _names(path) for path, _, _ in queries}
    return Annotations((files[0], files[1]), rows, references, {path: _names(path) for path in groups}, groups)


def _size_problem(found: Annotations) -> str | None:
    """Return what is wrong with the number of images, or None."""
    images = len({**found.references, **found.images})
    if abs(images - ABOUT_IMAGES) <= TOLERANCE * ABOUT_IMAGES:
        return None
    return (
        f"{found.files[1].name} and {found.files[0].name} list {images:,} images, but the data set's card states "
        f"about {ABOUT_IMAGES:,}; download them again"
    )


def _read_table(file: Path) -> list[list[str]]:
    """Read rows of image path, text and instance; there is no header."""
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            rows = [row for row in csv.reader(stream, strict=True) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: cannot be read as CSV ({error}); download it again") from error
    if not rows:
        raise ValueError(f"{file}: has no rows")
    for number, row in enumerate(rows):
        if len(row) != 3 or not row[0] or not row[2]:
            raise ValueError(f"{file}: row {number} is {row!r:.80}, expected image path, text and instance")
    return rows


def _names(path: str) -> list[str]:
    """Return the names of an image: its path, which may begin with the name of the data set's folder."""
    return [path.partition("/")[2], path] if path.count("/") > 1 else [path]


def is_packed(root: Path) -> bool:
    """Return whether the images are in shards and not yet unpacked."""
    return not (root / "database").is_dir() and any(root.glob("webdataset/*/*.tar"))


def unpack_shards(root: Path) -> None:
    """Write the images of the shards to `query/` and `database/`, as the archive of the data set has them.

    A sample is an image and a JSON object with its `img_path`. Shards may be deleted afterwards.

    Raises:
        ValueError: if a shard is damaged, or a path leads out of the folder.
    """
    for shard in sorted(root.glob("webdataset/*/*.tar"), key=lambda file: (file.parent.name != "query", file.name)):
        try:
            for path, content in _samples(shard):
                if escapes_folder(root, path):
                    raise ValueError(f"{path} leaves the folder")
                with whole(root / path) as partial:
                    partial.write_bytes(content)
        except (tarfile.TarError, ValueError, RecursionError) as error:
            raise ValueError(f"{shard}: {error}; download it again") from error


def _samples(shard: Path) -> Iterator[tuple[str, bytes]]:
    """Yield path below `query/` or `database/`, and content of each image of a shard."""
    parts: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as archive:
        for member in archive:
            key, dot, ending = member.name.rpartition(".")
            stream = archive.extractfile(member) if dot else None
            if stream is None:
                continue
            check_bytes(member.size)
            sample = parts.setdefault(key, {})
            sample["json" if ending == "json" else "image"] = stream.read()
            if len(sample) == 2:
                yield _own_path(parts.pop(key)["json"]), sample["image"]
    if parts:
        raise ValueError(f"{len(parts)} samples lack their image or their JSON, first: {next(iter(parts))}")


def _own_path(sample: bytes) -> str:
    """Return the path of a sample below `query/` or `database/`."""
    content = json.loads(sample)
    path = content.get("img_path") if isinstance(content, dict) else None
    if not isinstance(path, str):
        raise ValueError(f"a sample is {content!r:.80}, expected an object with its 'img_path'")
    for folder in ("query/", "database/"):
        path = path[path.index(folder) :] if f"/{folder}" in f"/{path}" else path
    return path


def read_trees(root: Path, split: str) -> list[Tree]:
    """Read what the doctor examines."""
    found = read_annotations(root)
    packed = Finding(
        *("note", "packed", "icir/test", "the images are in shards, which load_icir unpacks when it is first called"),
        "the images below are reported as missing until then",
    )
    return [
        Tree(
            "icir/test",
            found.rows,
            {**found.references, **found.images},
            [root],
            lambda: load_icir(root, allow_missing=True, check_counts=False),
            EXPECTED_COUNTS,
            findings=(packed,) if is_packed(root) else (),
            counted={"instances": len({row["group_id"] for row in found.rows})},
            count_findings=(other_count("error", "icir/test", problem),) if (problem := _size_problem(found)) else (),
        )
    ]


PROTOCOLS = {
    "icir": NamedProtocol(
        "i-CIR, a gallery for each instance", "icir", lambda root, **settings: [load_icir(root, **settings)]
    ),
}
