"""A composed-retrieval benchmark: queries, the gallery they are ranked against, and the protocol.

Every benchmark of this package, and a user's own, has this form; evaluation takes no other.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .checks import caption_problem, check_columns

QUERY_COLUMNS = ("reference", "reference_id", "caption")
"""`reference`: `datasets.Image`; `reference_id` names a gallery image; `caption`: the relative caption, or a list of
captions whose embeddings are averaged. Optional columns:

- `reference_2`, `reference_2_id`: a second reference image, None where a query has one; the embeddings of the caption
  with either are averaged.
- `target_id`: the positive (missing where a server keeps the labels); `target_ids`: all positives where there are
  several, and `target_grades`: their grades, above 0; `negative_ids`: images that are marked as wrong.
- `group_id`: the group of gallery images that the query is ranked against.
- `subset_ids`: gallery ids (CIRR's `img_set.members`, reference and target included).
- `paraphrase_group`: equal for queries that say the same in other words.
- `session_id`, `turn`: the session that the query is a turn of, and its number, from 1.
- `category`: a kind of query that is reported separately; `query_id`: the query's id in a submission file."""

GALLERY_COLUMNS = ("image", "image_id")
"""Optional: `group_ids`, the groups that an image is ranked in; without, every image is ranked for every query."""

_ID_COLUMNS = ("reference_id", "reference_2_id", "target_id", "target_ids", "negative_ids", "subset_ids")

LIST_COLUMNS = ("target_ids", "negative_ids", "subset_ids")
"""Columns that name several gallery images in each row."""

IdT = TypeVar("IdT", bound=Hashable)


@dataclass(frozen=True)
class Protocol:
    """Evaluation protocol of a benchmark. Numbers measured under different protocols do not compare.

    Args:
        name: name of the protocol, e.g. `"fashioniq-val-split"`.
        gallery: description of the images that are ranked.
        reference: whether a query's reference image is `"removed"` from its ranking or `"kept"`, or is an image
            `"outside"` of the gallery.
        captions: how a query's text is made of the annotation.
        metrics: the data set whose metrics are reported, a name in `pvlf_hf.evaluation.metrics.METRICS`.
        missing: description of images and queries that were left out because the user allowed it.
        revision: identifies the annotations: a digest of the files, or versions of packages.
        ties: the order of equal scores.
    """

    name: str
    gallery: str
    reference: Literal["removed", "kept", "outside"] = "removed"
    captions: str = "as annotated"
    metrics: str = "cirr"
    missing: str = "none"
    revision: str = "unknown"
    ties: str = "gallery order"


class NamedProtocol(NamedTuple):
    """Entry of a data set's `PROTOCOLS`.

    Args:
        summary: a line that describes it.
        folder: the data set's folder in the data root; empty where the data is a package.
        load: function of the folder, `allow_missing` and `check_counts` that returns the benchmarks.
    """

    summary: str
    folder: str
    load: Callable[..., list["CIRBenchmark"]]


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
            gallery, gallery ids repeat, a caption is empty or no text, a target is its own removed reference, a
            subset lacks its target, a grade is not above 0, or a label is not in the query's group.
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
            if column.startswith("reference") and self.protocol.reference == "outside":
                continue
            named = chain.from_iterable(values) if column in LIST_COLUMNS else (i for i in values if i is not None)
            if missing := sorted(set(named) - ids.keys(), key=str):
                raise ValueError(
                    f"queries of {self.name}: {len(missing)} {column} not in the gallery, first: {missing[:3]}. "
                    "Add these images to the gallery or drop the queries."
                )
        self._check_captions()
        self._check_references(columns)
        if self.has_targets:
            self._check_targets(columns)
        check_groups(self, columns)

    def _check_references(self, columns: dict[str, list[Any]]) -> None:
        if "reference_2_id" in columns:
            check_columns(self.queries, ("reference_2",), f"queries of {self.name}")
            if self.protocol.reference == "removed":
                several = [i is not None for i in columns["reference_2_id"]]
                self._check_rows(several, "have two references, and one can be removed: keep them in the ranking")

    def _check_targets(self, columns: dict[str, list[Any]]) -> None:
        targets = columns["target_id"]
        for column in {"subset_ids", "target_ids"} & columns.keys():
            lack = [target not in members for target, members in zip(targets, columns[column], strict=True)]
            self._check_rows(lack, f"lack the target in {column}")
        if self.protocol.reference == "removed":
            positives = columns.get("target_ids", [[target] for target in targets])
            same = [r in ids for r, ids in zip(columns["reference_id"], positives, strict=True)]
            self._check_rows(same, "have their reference as target, which is removed from the ranking")
        if "negative_ids" in columns:
            positives = columns.get("target_ids", [[target] for target in targets])
            both = [not set(p).isdisjoint(n) for p, n in zip(positives, columns["negative_ids"], strict=True)]
            self._check_rows(both, "name an image as positive and as negative")
        if "target_grades" in self.queries.column_names:
            graded = zip(columns["target_ids"], self.queries["target_grades"][:], strict=True)
            bad = [len(ids) != len(grades) or any(not grade > 0 for grade in grades) for ids, grades in graded]
            self._check_rows(bad, "have target_grades that are not one number above 0 for each of target_ids")

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


def check_groups(benchmark: CIRBenchmark, columns: dict[str, list[Any]]) -> None:
    """Raise a `ValueError` unless each label is in the group of its query."""
    given = "group_id" in benchmark.queries.column_names, "group_ids" in benchmark.gallery.column_names
    if len(set(given)) > 1:
        raise ValueError(f"{benchmark.name}: queries need a group_id and gallery images group_ids, one lacks them")
    if not any(given):
        return
    members: dict[str, set[str]] = {}
    for image_id, groups in zip(benchmark.gallery["image_id"][:], benchmark.gallery["group_ids"][:], strict=True):
        for group in groups:
            members.setdefault(group, set()).add(image_id)
    if benchmark.protocol.reference == "removed":
        raise ValueError(f"{benchmark.name}: groups rank their own images, pass a protocol with the reference kept")
    if unknown := sorted(set(benchmark.queries["group_id"][:]) - members.keys(), key=str):
        raise ValueError(f"{benchmark.name}: {len(unknown)} groups have no gallery image, first: {unknown[:3]}")
    for column in [c for c in columns if c == "target_id" or c in LIST_COLUMNS]:
        named = ([ids] if column == "target_id" else ids for ids in columns[column])
        own = (members.get(group, set()) for group in benchmark.queries["group_id"][:])
        outside = [not set(ids) <= images for ids, images in zip(named, own, strict=True)]
        if rows := [row for row, is_outside in enumerate(outside) if is_outside]:
            raise ValueError(
                f"queries of {benchmark.name}: {len(rows)} name {column} outside of their group, rows {rows[:3]}"
            )


def groups_of(benchmark: CIRBenchmark) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each group the rows of its queries and of its gallery images, int64, ascending.

    A benchmark without groups is a single one of all queries and images.
    """
    if "group_id" not in benchmark.queries.column_names:
        yield torch.arange(len(benchmark.queries)), torch.arange(len(benchmark.gallery))
        return
    images: dict[str, list[int]] = {}
    for row, groups in enumerate(benchmark.gallery["group_ids"][:]):
        for group in groups:
            images.setdefault(group, []).append(row)
    queries: dict[str, list[int]] = {}
    for row, group in enumerate(benchmark.queries["group_id"][:]):
        queries.setdefault(group, []).append(row)
    for group, rows in queries.items():
        yield torch.tensor(rows), torch.tensor(images[group])


def excluded_rows(benchmark: CIRBenchmark) -> Tensor | None:
    """Return int64 `(queries,)`, the gallery row that is left out of each query's ranking; None if none is."""
    return gallery_rows(benchmark, "reference_id") if benchmark.protocol.reference == "removed" else None


def gallery_rows(benchmark: CIRBenchmark, column: str) -> Tensor:
    """Return gallery rows of the ids in a column: int64 `(queries,)`; for lists `(queries, most)`, padded with -1."""
    row_of = first_rows(benchmark.gallery["image_id"])
    if column in LIST_COLUMNS:
        if column not in benchmark.queries.column_names:
            raise ValueError(f"{benchmark.name}: its protocol's metrics need the column {column}")
        rows = [torch.tensor([row_of[i] for i in ids], dtype=torch.int64) for ids in benchmark.queries[column]]
        return pad_sequence(rows, batch_first=True, padding_value=-1)
    return torch.tensor([row_of[i] for i in benchmark.queries[column]])


def first_rows(ids: Iterable[IdT]) -> dict[IdT, int]:
    """Return the row at which each id occurs first, in the order of these rows."""
    row_of: dict[IdT, int] = {}
    for row, value in enumerate(ids):
        row_of.setdefault(value, row)
    return row_of
