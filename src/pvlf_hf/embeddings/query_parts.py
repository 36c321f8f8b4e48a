"""Parts of a query: pairs of a reference image and a caption, whose embeddings are averaged."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from datasets import Dataset


class QueryParts(NamedTuple):
    """Pairs of a reference image and a caption; the embedding of a query is the mean over its own."""

    references: "Dataset"
    """One row per reference image, column `reference`: the first of every query, then the second ones."""

    reference_ids: list[str]

    texts: list[tuple[int, str]]
    """Row in `references` and caption of each pair."""

    owners: list[int]
    """Query of each pair, ascending."""


def query_parts(queries: "Dataset") -> QueryParts:
    """Return the pairs of a reference and a caption of all queries; most have one of each."""
    references, ids, rows_of = _references(queries)
    captions_of = [[c] if isinstance(c, str) else c for c in queries["caption"][:]]
    pairs = [
        (query, row, caption)
        for query, captions in enumerate(captions_of)
        for row in rows_of[query]
        for caption in captions
    ]
    return QueryParts(references, ids, [(row, caption) for _, row, caption in pairs], [query for query, _, _ in pairs])


def _references(queries: "Dataset") -> tuple["Dataset", list[str], list[list[int]]]:
    """Return all reference images, their ids, and the rows of each query's own."""
    references = queries.select_columns("reference")
    ids = list(queries["reference_id"][:]) if "reference_id" in queries.column_names else []
    rows_of = [[row] for row in range(len(queries))]
    if "reference_2_id" not in queries.column_names:
        return references, ids, rows_of
    from datasets import concatenate_datasets

    second = [(row, i) for row, i in enumerate(queries["reference_2_id"][:]) if i is not None]
    for number, (row, _) in enumerate(second, len(queries)):
        rows_of[row].append(number)
    others = queries.select_columns("reference_2").rename_column("reference_2", "reference")
    joined = concatenate_datasets([references, others.select([row for row, _ in second])])
    return joined, ids + [i for _, i in second], rows_of


def mean_over_parts(embeds: Tensor, owners: list[int]) -> Tensor:
    """Average `(pairs, d)` over the pairs of each query: `(queries, d)`."""
    if len(owners) == owners[-1] + 1:
        return embeds
    sums = torch.zeros(owners[-1] + 1, embeds.shape[1]).index_add(0, torch.tensor(owners), embeds)
    return F.normalize(sums, dim=-1)  # a sum has the direction of the mean


__all__ = ["QueryParts", "mean_over_parts", "query_parts"]
