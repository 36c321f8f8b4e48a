"""PinPoint: 7,635 queries with several positives, explicit negatives, paraphrases and pairs of references (CVPR 2026).

Annotations, CC-BY-4.0: <https://github.com/pinterest/pinpoint-dataset>; images: [`download_images`].
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub.utils import get_session

from ..atomic_files import whole
from ..digests import annotations_digest
from .annotations import check_counts_of, check_records, check_unique, find_file, make_benchmark, numbered, paths_in
from .benchmark import CIRBenchmark, NamedProtocol, Protocol
from .checks import as_path
from .examination import Tree

SPLITS = ("test",)

EXPECTED_COUNTS = {"pinpoint_licensed.parquet": 7635, "pinpoint_metadata.parquet": 7773}
"""Queries of the two published tables; the paper and the scorer measure the first."""

INDEX_LIST = "index_signatures.txt"

IMAGE_FOLDERS = ("images", ".")

IMAGE_URL = "https://i.pinimg.com/736x/{}"

_REFERENCES = ("query_image_signature", "query_image_signature2")


def load_pinpoint(root: str | Path, allow_missing: bool = False, check_counts: bool = True) -> CIRBenchmark:
    """Load the benchmark.

    Args:
        root: has `pinpoint_licensed.parquet` (or else `pinpoint_metadata.parquet`), `index_signatures.txt` and the
            images, `<signature>.jpg` (also in `images/`), or in folders as on the server, `ab/cd/ef/<signature>.jpg`.
        allow_missing: leave out images without a file and the queries that name them as reference or as one of the
            positives, with a warning and a note in the protocol, instead of raising; negatives without a file or
            outside of the index are taken off their lists.
        check_counts: raise unless there is the published number of queries.

    Returns:
        The benchmark. Ids are signatures. `target_ids` are `positive_candidates`, `negative_ids` those that are
        marked as wrong, `reference_2_id` the second image of a query; `paraphrase_group` is the same for the queries
        of the same images. As the scorer's, the gallery is the index alone, in which references are kept.

    Raises:
        ValueError: if a file is absent or not as published, or images are absent.
    """
    root = as_path("root", root)
    file, listing = find_files(root)
    rows, images = read_queries(file), read_index(listing)
    if check_counts:
        check_counts_of("pinpoint/test", queries=(len(rows), EXPECTED_COUNTS[file.name]))
    protocol = Protocol(
        name="pinpoint",
        gallery="every image of the index",
        reference="outside",
        metrics="pinpoint",
        revision=annotations_digest(file, listing),
    )
    listed = _in_index(rows, images) if allow_missing else rows
    folders = [root / folder for folder in IMAGE_FOLDERS]
    references = {i: _names(i) for row in rows for i in (row["reference_id"], row["reference_2_id"]) if i is not None}
    benchmark = make_benchmark("pinpoint/test", listed, images, folders, protocol, allow_missing, references)
    if len(listed) == len(rows):
        return benchmark
    missing = f"{benchmark.protocol.missing}; {len(rows) - len(listed)} queries with positives outside of the index"
    return replace(benchmark, protocol=replace(benchmark.protocol, missing=missing))


def _in_index(rows: list[dict[str, Any]], images: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Return the queries whose positives are in the index, without negatives that are not."""
    kept = [row for row in rows if all(i in images for i in row["target_ids"])]
    return [{**row, "negative_ids": [i for i in row["negative_ids"] if i in images]} for row in kept]


def find_files(root: Path) -> tuple[Path, Path]:
    """Return the table of queries and the list of the index."""
    return find_file(root, list(EXPECTED_COUNTS)), find_file(root, [INDEX_LIST])


def read_queries(file: Path) -> list[dict[str, Any]]:
    """Return the columns of the queries except the images, checked row by row."""
    columns = ["query_id", *_REFERENCES, "instruction", "positive_candidates", "negative_candidates"]
    try:
        records = pq.read_table(file, columns=columns).to_pylist()
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise ValueError(f"{file}: cannot be read, or lacks one of {columns} ({error}); download it again") from error
    lists = {"positive_candidates": list[str], "negative_candidates": list[str]}
    for record in records:
        record["negative_candidates"] = record["negative_candidates"] or []
    check_records(file, numbered(records), {"query_image_signature": str, "instruction": str, **lists})
    check_unique(file, "query_id", (record["query_id"] for record in records))
    rows = []
    for number, record in enumerate(records):
        if not record["positive_candidates"]:
            raise ValueError(f"{file}: row {number}: positive_candidates is empty")
        first, second = (record[name] or None for name in _REFERENCES)
        if not isinstance(second, str | None):
            raise ValueError(
                f"{file}: row {number}: query_image_signature2 is {second!r:.80}, expected text or nothing"
            )
        rows.append(
            {
                "query_id": str(record["query_id"]).removeprefix("query_").zfill(5),
                "reference_id": first,
                "reference_2_id": second,
                "caption": record["instruction"],
                "target_id": record["positive_candidates"][0],
                "target_ids": list(dict.fromkeys(record["positive_candidates"])),
                "negative_ids": list(dict.fromkeys(record["negative_candidates"])),
                "paraphrase_group": f"{first} {second or ''}".strip(),
            }
        )
    return rows


def read_index(file: Path) -> dict[str, list[str]]:
    """Return possible file names by signature."""
    signatures = file.read_text(encoding="utf-8").split()
    if not signatures:
        raise ValueError(f"{file}: has no rows")
    check_unique(file, "signatures", signatures)
    return {signature: _names(signature) for signature in signatures}


def _names(signature: str) -> list[str]:
    return [f"{signature}.jpg", f"{signature[:2]}/{signature[2:4]}/{signature[4:6]}/{signature}.jpg"]


def download_images(root: str | Path, threads: int = 16) -> list[str]:
    """Fetch the images that are not there yet from Pinterest's server into `images/`; repeat it to resume.

    Args:
        root: see [`load_pinpoint`].
        threads: images fetched at once (our choice).

    Returns:
        Signatures of the images that the server did not give.
    """
    root = as_path("root", root)
    file, listing = find_files(root)
    named = [row[column] for row in read_queries(file) for column in ("reference_id", "reference_2_id")]
    images = {**read_index(listing), **{i: _names(i) for i in named if i is not None}}
    present = max((paths_in(root / folder, images) for folder in IMAGE_FOLDERS), key=len)
    missing = [signature for signature in images if signature not in present]
    with ThreadPoolExecutor(threads) as pool:
        fetched = list(pool.map(lambda signature: _fetch(signature, root / "images"), missing))
    return [signature for signature, is_there in zip(missing, fetched, strict=True) if not is_there]


def _fetch(signature: str, folder: Path) -> bool:
    """Write an image, and return whether the server had it."""
    name, path = _names(signature)
    answer = get_session().get(IMAGE_URL.format(path))
    if answer.status_code == 200:
        with whole(folder / name) as partial:
            partial.write_bytes(answer.content)
    return answer.status_code == 200


def read_trees(root: Path, split: str) -> list[Tree]:
    """Read what the doctor examines."""
    file, listing = find_files(root)
    rows = read_queries(file)
    named = [row[column] for row in rows for column in ("reference_id", "reference_2_id")]
    return [
        Tree(
            "pinpoint/test",
            rows,
            {**{i: _names(i) for i in named if i is not None}, **read_index(listing)},
            [root / folder for folder in IMAGE_FOLDERS],
            lambda: load_pinpoint(root, allow_missing=True, check_counts=False),
            {"queries": EXPECTED_COUNTS[file.name]},
        )
    ]


PROTOCOLS = {
    "pinpoint": NamedProtocol(
        "PinPoint, gallery of its index", "pinpoint", lambda root, **settings: [load_pinpoint(root, **settings)]
    ),
}
