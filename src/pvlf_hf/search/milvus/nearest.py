"""Ranks the images of a Milvus store: its index proposes candidates, which are scored by their embeddings.

The scores are exact. Which images are among the candidates is up to the index; by `index_type="FLAT"` all that belong
there are. [`store_recall`] measures it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ...embeddings.combined import CombinedScores
from ...embeddings.similarity import TopK, error_bound, top_k
from .schema import embeddings_of
from .store import MilvusStore

FEWEST = 64
"""Candidates that are requested at least (our choice): more than a page, so that scoring mends the index's order."""

Scorer = Callable[[Tensor], Tensor | CombinedScores]
"""Returns what images `(n, d)` are scored by: the query's embedding, or combined scores of them."""


class Found(NamedTuple):
    """Images that were found, best first."""

    scores: Tensor
    ids: list[str]
    paths: list[str | None]
    embeds: Tensor


def nearest_in_store(store: MilvusStore, scorer: Scorer, number: int, condition: str = "") -> Found:
    """Find the best images, equal ones in the order of their ids.

    Candidates are requested until the last of the best scores more than any image that the server ranks below them
    can (Fagin's threshold, where a query combines two similarities), or there are no more. Where that takes more than
    Milvus returns, a combined ranking is refused; of an embedding, images that tie with the last are left out.

    Args:
        store: that is searched.
        scorer: of the query.
        number: at least 1; fewer are returned where there are fewer.
        condition: expression of Milvus that they meet.

    Raises:
        ValueError: if it takes more candidates than Milvus returns.
    """
    whole = scorer(torch.ones(1, store.schema.width))
    vectors = [whole] if isinstance(whole, Tensor) else [(v / v.norm()).float() for v in whole.parts(0)[0]]
    rounding = [store.schema.asked(vector)[1] for vector in vectors]
    width = min(store.most_results, max(FEWEST, number + number // 4))
    while True:
        sides = [store.nearest(vector, width, condition) for vector in vectors]
        table = _merged(sides)
        embeds = embeddings_of(table, store.schema.width)
        scores, order, most = _scored(scorer, embeds, table, sides, rounding)
        exhausted = all(len(side) < width for side in sides)
        settled = len(scores) >= number and bool(scores[number - 1] > most)
        if not (exhausted or settled) and width == store.most_results:
            _check_enough(store, number, len(scores), combined=len(sides) > 1)
        if exhausted or settled or width == store.most_results:
            taken = table.take(pa.array(order[:number].numpy()))
            ids, paths = taken["id"].to_pylist(), taken["path"].to_pylist()
            return Found(scores[:number], ids, paths, embeds[order[:number]])
        width = min(4 * width, store.most_results)


def store_recall(store: MilvusStore, queries: Tensor, k: int = 10, condition: str = "") -> float:
    """Measure the share of the k nearest images that searches find; all embeddings are read once to compare.

    Args:
        store: that is searched; its options hold the parameters of the index and of the search.
        queries: float32 `(queries, d)`, such as embeddings of other images.
        k: number of results.
        condition: expression of Milvus that they meet; the exact ranking asks the server for it, too.
    """
    best = TopK(queries, k)
    for rows in store.stream(["embedding"], condition):
        embeds = torch.from_numpy(store.schema.embeddings(rows).astype(np.float32))
        best.add(embeds, torch.zeros(len(rows), dtype=torch.int64))
    shares = []
    for query, wanted in zip(queries, best.scores, strict=True):
        found = nearest_in_store(store, lambda _, query=query: query, k, condition)  # type: ignore[misc]
        wanted = wanted[wanted > -torch.inf]  # an image that ties with the last of them is as good as that
        shares.append(float((found.scores >= wanted.min()).sum()) / len(wanted) if len(wanted) else 1.0)
    return float(np.mean(shares))


def _check_enough(store: MilvusStore, number: int, found: int, combined: bool) -> None:
    """Refuse what takes more candidates than Milvus returns."""
    if found < number:
        raise ValueError(
            f"{number:,} results were requested, with those of earlier pages and left-out ones, and a Milvus store "
            f"of this width returns at most {store.most_results:,}: narrow the search by a filter"
        )
    if combined:
        raise ValueError(
            f"the best {number:,} images by two similarities are not settled by the {store.most_results:,} nearest to "
            "each, which is all that Milvus returns: request fewer, narrow the search by a filter, or compose by slerp"
        )


def _merged(sides: list[pa.Table]) -> pa.Table:
    """Return the images of all sides once, in the order of their ids."""
    first = sides[0]
    for side in sides[1:]:
        known = set(first["id"].to_pylist())
        new = pa.array([image_id not in known for image_id in side["id"].to_pylist()], pa.bool_())
        first = pa.concat_tables([first, side.filter(new)])
    return first.sort_by("id") if len(first) else first


def _scored(
    scorer: Scorer, embeds: Tensor, table: pa.Table, sides: list[pa.Table], rounding: list[float]
) -> tuple[Tensor, Tensor, float]:
    """Return scores and rows of the table, best first, and the most that an image that was not found can score.

    The server's order errs twice: in the last image found, and in one that it ranks below.
    """
    if not len(embeds):
        return torch.empty(0), torch.empty(0, dtype=torch.int64), -torch.inf
    scored = scorer(embeds)
    error = 2 * error_bound(embeds.shape[1]) + 2.0**-22  # of the server's order: it computes 1 - cosine in float32
    if isinstance(scored, Tensor):
        scores, order = top_k(scored[None], embeds, len(embeds))
        return scores[0], order[0], float(scores.min()) + error + 2 * rounding[0]
    best = scored.of_images(0, torch.arange(len(embeds))).sort(descending=True, stable=True)
    row_of = {image_id: row for row, image_id in enumerate(table["id"].to_pylist())}
    most = []
    for half, side in enumerate(sides):
        rows = torch.tensor([row_of[image_id] for image_id in side["id"].to_pylist()])
        length = float(scored.parts(0)[0][half].norm())
        most.append(scored.similarities(0, rows)[half].min() + length * (error + 2 * rounding[half]))
    return best.values, best.indices, float(scored.combine(*most))


__all__ = ["Found", "nearest_in_store", "store_recall"]
