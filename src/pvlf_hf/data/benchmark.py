"""A composed-retrieval benchmark: queries, the gallery they are ranked against, and the protocol.

Every benchmark of this package, and a user's own, has this form; evaluation takes no other.
"""

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, TypeVar

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .checks import caption_problem, check_columns

QUERY_COLUMNS = ("reference", "reference_id", "caption")
"""`reference`: `datasets.Image`; `reference_id` names a gallery image; `caption`: the relative caption, or a list of
captions whose embeddings are averaged. Optional: `target_id`, the positive (missing where a server keeps the labels);
`target_ids`, all positives where there are several (CIRCO); `subset_ids`, gallery ids (CIRR's `img_set.members`,
reference and target included); `query_id`, the query's id in a submission file."""

GALLERY_COLUMNS = ("image", "image_id")

_ID_COLUMNS = ("reference_id", "target_id", "target_ids", "subset_ids")

IdT = TypeVar("IdT", bound=Hashable)


@dataclass(frozen=True)
class Protocol:
    """Evaluation protocol of a benchmark. Numbers measured under different protocols do not compare.

    Args:
        name: name of the protocol, e.g. `"fashioniq-val-split"`.
        gallery: description of the images that are ranked.
        reference: whether a query's reference image is `"removed"` from its ranking or `"kept"`.
        captions: how a query's text is made of the annotation.
        metrics: the data set whose metrics are reported: CIRR, FashionIQ or CIRCO (`pvlf_hf.evaluation.metrics`).
        missing: description of images and queries that were left out because the user allowed it.
        revision: identifies the annotations: a digest of the files, or versions of packages.
        ties: the order of equal scores.
    """

    name: str
    gallery: str
    reference: Literal["removed", "kept"] = "removed"
    captions: str = "as annotated"
    metrics: Literal["cirr", "fashioniq", "circo"] = "cirr"
    missing: str = "none"
    revision: str = "unknown"
    ties: str = "gallery order"


@dataclass(frozen=True)
class CIRBenchmark:
    """Queries and the gallery they are ranked against.

    Args:
        name: name of the benchmark and split in results, e.g. `"emoji-cir/test"`.
        queries: one row per query, columns `QUERY_COLUMNS`.
        gallery: one row per image, columns `GALLERY_COLUMNS`; ids are unique.
        protocol: the evaluation protocol, copied into results.

    Raises:
        ValueError: if queries or gallery are no `datasets.Dataset` or empty, a column is missing, an id is not in the
            gallery, gallery ids repeat, a caption is empty or no text, a target is its own removed reference, or a
            subset lacks its target.
    """

    name: str
    queries: Dataset
    gallery: Dataset
    protocol: Protocol = Protocol(name="own", gallery="as given")

    @property
    def has_targets(self) -> bool:
        """Whether targets are known; where only a server has them (CIRR test1, CIRCO test) queries have no score."""
        return "target_id" in self.queries.column_names

    def __post_init__(self) -> None:
        check_columns(self.queries, QUERY_COLUMNS, f"queries of {self.name}")
        check_columns(self.gallery, GALLERY_COLUMNS, f"gallery of {self.name}")
        if not len(self.queries) or not len(self.gallery):
            raise ValueError(f"{self.name}: {len(self.queries)} queries and {len(self.gallery)} gallery images")
        ids = Counter(self.gallery["image_id"][:])  # whole columns: row by row takes a hundred times as long
        if repeated := [i for i, count in ids.items() if count > 1][:3]:
            raise ValueError(f"gallery of {self.name}: image_id must be unique, repeated: {repeated}")
        columns = {c: self.queries[c][:] for c in _ID_COLUMNS if c in self.queries.column_names}
        for column, values in columns.items():
            named = chain.from_iterable(values) if column in ("target_ids", "subset_ids") else values
            if missing := sorted(set(named) - ids.keys(), key=str):
                raise ValueError(
                    f"queries of {self.name}: {len(missing)} {column} not in the gallery, first: {missing[:3]}. "
                    "Add these images to the gallery or drop the queries."
                )
        self._check_captions()
        if not self.has_targets:
            return
        targets = columns["target_id"]
        for column in {"subset_ids", "target_ids"} & columns.keys():
            lack = [target not in members for target, members in zip(targets, columns[column], strict=True)]
            self._check_rows(lack, f"lack the target in {column}")
        if self.protocol.reference == "removed":
            same = [r == t for r, t in zip(columns["reference_id"], targets, strict=True)]
            self._check_rows(same, "have their reference as target, which is removed from the ranking")

    def _check_captions(self) -> None:
        problems = [_caption_problem(caption) for caption in self.queries["caption"][:]]
        self._check_rows([problem == "is empty" for problem in problems], "have an empty caption")
        if problem := next(filter(None, problems), None):
            self._check_rows([p is not None for p in problems], f"have a caption that {problem}")

    def _check_rows(self, bad: list[bool], what: str) -> None:
        if rows := [row for row, is_bad in enumerate(bad) if is_bad]:
            raise ValueError(f"queries of {self.name}: {len(rows)} {what}, first rows: {rows[:3]}; fix or drop them")


def _caption_problem(caption: Any) -> str | None:
    """Return what is wrong with a query's caption or the first bad one of several, or None."""
    if caption is None:
        return "is empty"
    if not isinstance(caption, list):
        return caption_problem(caption)
    return next(filter(None, map(caption_problem, caption)), None) if caption else "is empty"


def query_ids(benchmark: CIRBenchmark) -> list[str]:
    """Return the ids of queries in results and submission files: `query_id`, or else the row."""
    if "query_id" in benchmark.queries.column_names:
        return list(benchmark.queries["query_id"])
    return [str(row) for row in range(len(benchmark.queries))]


def excluded_rows(benchmark: CIRBenchmark) -> Tensor | None:
    """Return int64 `(queries,)`, the gallery row that is left out of each query's ranking; None if none is."""
    return gallery_rows(benchmark, "reference_id") if benchmark.protocol.reference == "removed" else None


def gallery_rows(benchmark: CIRBenchmark, column: str) -> Tensor:
    """Return gallery rows of the ids in a column: int64 `(queries,)`; for lists `(queries, most)`, padded with -1."""
    row_of = first_rows(benchmark.gallery["image_id"])
    if column in ("target_ids", "subset_ids"):
        if column not in benchmark.queries.column_names:
            raise ValueError(f"{benchmark.name}: its protocol's metrics need the column {column}")
        rows = [torch.tensor([row_of[i] for i in ids]) for ids in benchmark.queries[column]]
        return pad_sequence(rows, batch_first=True, padding_value=-1)
    return torch.tensor([row_of[i] for i in benchmark.queries[column]])


def first_rows(ids: Iterable[IdT]) -> dict[IdT, int]:
    """Return the row at which each id occurs first, in the order of these rows."""
    row_of: dict[IdT, int] = {}
    for row, value in enumerate(ids):
        row_of.setdefault(value, row)
    return row_of
