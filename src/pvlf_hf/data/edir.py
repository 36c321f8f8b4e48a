"""EDIR: 5,000 queries in 15 subcategories, whose targets were made by editing the reference image (ACL 2026).

Annotations and images: <https://huggingface.co/datasets/EDIR-BENCH/EDIR>. The archive is in parts:
`cat imgs_mc.tar.part* | tar -x`.
"""

import json
from pathlib import Path
from typing import Any

from ..digests import annotations_digest
from .annotations import check_counts_of, check_records, check_unique, find_file, make_benchmark, numbered
from .benchmark import CIRBenchmark, NamedProtocol, Protocol
from .checks import as_path
from .examination import Tree
from .tables import object_of

HUB_ID = "EDIR-BENCH/EDIR"

SPLITS = ("test",)

EXPECTED_COUNTS = {"queries": 5000, "gallery images": 28645, "subcategories": 15}
"""Queries and subcategories are the paper's. The corpus is that of the public files, as mteb's task
`EDIRIT2IRetrieval` counts it. According to that task the paper's corpus has further distractors, so figures of the
paper do not compare."""

FILES = ("queries.jsonl", "corpus.jsonl", "instances.jsonl")

IMAGE_FOLDERS = ("imgs_mc", "media", "images", ".")


def load_edir(root: str | Path, allow_missing: bool = False, check_counts: bool = True) -> CIRBenchmark:
    """Load the benchmark.

    Args:
        root: has `queries.jsonl`, `corpus.jsonl`, `instances.jsonl` and the images, unpacked to `imgs_mc/` (also in
            `media/`, `images/` or directly).
        allow_missing: leave out images without a file and the queries that name them, with a warning and a note in
            the protocol, instead of raising.
        check_counts: raise unless there are the published numbers of queries, images of the corpus and subcategories.

    Returns:
        The benchmark. `target_id` is the one positive of the query's instance, `category` its subcategory. The gallery
        is the corpus, to which references do not belong.

    Raises:
        ValueError: if a file is absent or not as published, or images are absent.
    """
    root = as_path("root", root)
    files = [find_file(root, [name]) for name in FILES]
    rows, images = read_queries(*files)
    if check_counts:
        actual = {"queries": len(rows), **_counted(rows, images)}
        check_counts_of("edir/test", **{what: (actual[what], n) for what, n in EXPECTED_COUNTS.items()})
    protocol = Protocol(
        name="edir",
        gallery="every image of the corpus",
        reference="outside",
        metrics="edir",
        revision=annotations_digest(*files),
    )
    references = {row["reference_id"]: [row["reference_id"]] for row in rows}
    folders = [root / folder for folder in IMAGE_FOLDERS]
    return make_benchmark("edir/test", rows, images, folders, protocol, allow_missing, references)


def read_queries(queries: Path, corpus: Path, instances: Path) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Return the columns of the queries except the images, and file names by image id."""
    asked = _read_lines(queries, {"id": int | str, "image": str, "text": str, "metadata": dict})
    listed = _read_lines(corpus, {"id": int | str, "image": str})
    answers = _read_lines(instances, {"qid": int | str, "pos": list})
    for file, what, records in ((queries, "id", asked), (corpus, "id", listed), (instances, "qid", answers)):
        check_unique(file, what, (str(record[what]) for record in records))
    check_records(queries, numbered([record["metadata"] for record in asked], "metadata of row"), {"subcategory": str})
    positive_of = {str(record["qid"]): record["pos"] for record in answers}
    ids = {str(record["id"]) for record in asked}
    if unknown := [qid for qid in positive_of if qid not in ids]:
        raise ValueError(
            f"{instances}: {len(unknown)} qid are not in {queries.name}, first: {unknown[:3]}; download both again"
        )
    rows = []
    for record in asked:
        positives = positive_of.get(str(record["id"]), [])
        if len(positives) != 1:
            raise ValueError(f"{instances}: query {record['id']} has {len(positives)} positives, expected one")
        rows.append(
            {
                "query_id": str(record["id"]),
                "reference_id": record["image"],
                "caption": record["text"],
                "target_id": str(positives[0]),
                "category": record["metadata"]["subcategory"],
            }
        )
    return rows, {str(record["id"]): [record["image"]] for record in listed}


def _read_lines(file: Path, fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Read JSON lines, objects with some keys."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
        records = [json.loads(line, object_pairs_hook=object_of) for line in lines if line.strip()]
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: a line is not JSON, or cut off ({error}); download it again") from error
    check_records(file, numbered(records), fields)
    return records


def _counted(rows: list[dict[str, Any]], images: dict[str, list[str]]) -> dict[str, int]:
    return {"gallery images": len(images), "subcategories": len({row["category"] for row in rows})}


def read_trees(root: Path, split: str) -> list[Tree]:
    """Read what the doctor examines."""
    rows, images = read_queries(*(find_file(root, [name]) for name in FILES))
    return [
        Tree(
            "edir/test",
            rows,
            {**{row["reference_id"]: [row["reference_id"]] for row in rows}, **images},
            [root / folder for folder in IMAGE_FOLDERS],
            lambda: load_edir(root, allow_missing=True, check_counts=False),
            EXPECTED_COUNTS,
            counted=_counted(rows, images),
        )
    ]


PROTOCOLS = {
    "edir": NamedProtocol("EDIR, by subcategory", "edir", lambda root, **settings: [load_edir(root, **settings)]),
}
