"""What a composed-retrieval benchmark is: queries, the gallery they are ranked against, and the protocol.

Every benchmark of this package, and a user's own, is brought to this shape; evaluation knows no other.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

QUERY_COLUMNS = ("reference", "reference_id", "caption")
"""`reference`: `datasets.Image`; `reference_id` names a gallery image; `caption`: the relative caption, or a list of
wordings whose embeddings are averaged. Optional: `target_id`, the right answer (missing where a server keeps the
labels); `target_ids`, all right answers where there are several (CIRCO); `subset_ids`, gallery ids (CIRR's
`img_set.members`, reference and target included); `query_id`, what a submission file calls the query."""

GALLERY_COLUMNS = ("image", "image_id")

_ID_COLUMNS = ("reference_id", "target_id", "target_ids", "subset_ids")


@dataclass(frozen=True)
class Protocol:
    """How a benchmark is measured. Numbers measured under different protocols do not compare.

    Args:
        name: names the protocol, e.g. `"fashioniq-val-split"`.
        gallery: which images are ranked, in words.
        reference: whether a query's reference image is `"removed"` from its ranking or `"kept"`.
        captions: how a query's text is made of the annotation.
        metrics: whose metrics are reported: CIRR's, FashionIQ's or CIRCO's (`pvlf_hf.evaluation.metrics`).
        missing: images and queries that were left out because the user allowed it, in words.
        revision: what identifies the annotations: a digest of the files, or versions of packages.
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
        name: names the benchmark and split in results, e.g. `"emoji-cir/test"`.
        queries: one row a query, columns `QUERY_COLUMNS`.
        gallery: one row an image, columns `GALLERY_COLUMNS`; ids are unique.
        protocol: how the numbers are to be read, copied into results.

    Raises:
        ValueError: if there are no queries or no gallery, a column is missing, an id is not in the gallery, gallery
            ids repeat, a caption is empty, a target is its own removed reference, or a subset lacks its target.
    """

    name: str
    queries: Dataset
    gallery: Dataset
    protocol: Protocol = Protocol(name="own", gallery="as given")

    @property
    def has_targets(self) -> bool:
        """False where a server keeps the labels (CIRR test1, CIRCO test): such queries can be ranked, not scored."""
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
        self._check_rows([not _has_words(c) for c in self.queries["caption"][:]], "have an empty caption")
        if not self.has_targets:
            return
        targets = columns["target_id"]
        for column in {"subset_ids", "target_ids"} & columns.keys():
            lack = [target not in members for target, members in zip(targets, columns[column], strict=True)]
            self._check_rows(lack, f"lack the target in {column}")
        if self.protocol.reference == "removed":
            same = [r == t for r, t in zip(columns["reference_id"], targets, strict=True)]
            self._check_rows(same, "have their reference as target, which is removed from the ranking")

    def _check_rows(self, bad: list[bool], what: str) -> None:
        if rows := [row for row, is_bad in enumerate(bad) if is_bad]:
            raise ValueError(f"queries of {self.name}: {len(rows)} {what}, first rows: {rows[:3]}; mend or drop them")


def _has_words(caption: str | list[str] | None) -> bool:
    captions = caption if isinstance(caption, list) else [caption or ""]
    return bool(captions) and all(c.strip() for c in captions)


def check_columns(dataset: Dataset, required: tuple[str, ...], what: str) -> None:
    """Raises a `ValueError` that names the missing columns, those there are, and how to rename."""
    missing = [c for c in required if c not in dataset.column_names]
    if missing:
        raise ValueError(
            f"{what}: missing column(s) {missing}; it has {dataset.column_names}. "
            "Rename with `dataset.rename_column(old, new)`."
        )


def query_ids(benchmark: CIRBenchmark) -> list[str]:
    """What results and submission files call the queries: `query_id`, or else the row."""
    if "query_id" in benchmark.queries.column_names:
        return list(benchmark.queries["query_id"])
    return [str(row) for row in range(len(benchmark.queries))]


def excluded_rows(benchmark: CIRBenchmark) -> Tensor | None:
    """int64 `(queries,)`, the gallery row that each query's ranking leaves out; None if it leaves out nothing."""
    return gallery_rows(benchmark, "reference_id") if benchmark.protocol.reference == "removed" else None


def gallery_rows(benchmark: CIRBenchmark, column: str) -> Tensor:
    """Gallery rows of the ids in a column: int64 `(queries,)`, or `(queries, most)` filled up with -1 for lists."""
    row_of = {image_id: row for row, image_id in enumerate(benchmark.gallery["image_id"])}
    if column in ("target_ids", "subset_ids"):
        if column not in benchmark.queries.column_names:
            raise ValueError(f"{benchmark.name}: its protocol's metrics need the column {column}")
        rows = [torch.tensor([row_of[i] for i in ids]) for ids in benchmark.queries[column]]
        return pad_sequence(rows, batch_first=True, padding_value=-1)
    return torch.tensor([row_of[i] for i in benchmark.queries[column]])
