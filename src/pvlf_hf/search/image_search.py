"""Searches embedded images, wherever they are kept: in memory, in shards or in a database.

A subclass holds them. It says which may be found, ranks them for a query, and gives the names of those that were.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image as PILImage
from torch import Tensor
from transformers.utils import logging

from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from .filters import Filter
from .pages import Ranked, page_of
from .previews import blank
from .query import FUSION, Query, Weights, check_offset, check_positive, check_score
from .query_encoding import QueryEncoder
from .result import SearchResult
from .terms import WeightedImages, collect_terms

logger = logging.get_logger(__name__)


class ImageSearch(ABC):
    """Images that are searched by queries. Each has an id, and a row: a number by which the subclass finds it.

    Attributes:
        model: embeds images and queries.
        processor: the model's processor.
        made_by: provenance of the embeddings ([`images_made_by`]).
    """

    model: ComposedRetrievalModel
    processor: ComposedRetrievalProcessor
    made_by: dict[str, str]

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def metadata_names(self) -> list[str]:
        """Names of the columns of metadata, which filters refer to."""

    @abstractmethod
    def known(self, ids: Sequence[str]) -> list[str]:
        """Return those of some ids that there are, in the same order."""

    @abstractmethod
    def some_ids(self, number: int) -> list[str]:
        """Return the ids of random images, all different; fewer where there are fewer."""

    @abstractmethod
    def image(self, image_id: str) -> PILImage.Image:
        """Open an image, RGB.

        Raises:
            ValueError: if there is none of this id, or its file cannot be opened.
        """

    @abstractmethod
    def values_of(self, ids: Sequence[str]) -> list[dict[str, Any]] | None:
        """Return the metadata of images, None if there is no metadata."""

    @abstractmethod
    def _choice(self, exclude: Sequence[str], filter: Filter | None) -> Any:
        """Return which images may be found, for `_ranking`.

        Raises:
            ValueError: if an id is unknown, nothing is left, or the filter cannot be applied.
        """

    @abstractmethod
    def _ranking(self, query: Query, weights: Weights, choice: Any) -> Ranked:
        """Return the ranking of a query: of the images that may be found, without those of `query.ids`."""

    def _rankings(self, queries: Sequence[Query], weights: Weights, choice: Any, number: int) -> list[Ranked]:
        """Return the rankings of several queries, at least one; no more than `number` results of each are read."""
        return [self._ranking(query, weights, choice) for query in queries]

    @abstractmethod
    def _embeddings(self, rows: Tensor) -> Tensor:
        """Return the embeddings of rows that a ranking named: float32 `(rows, d)`."""

    @abstractmethod
    def _names(self, rows: Sequence[int]) -> dict[int, tuple[str, str | None]]:
        """Return id and path of rows that a ranking named."""

    @abstractmethod
    def _embeddings_of(self, name: str, ids: Sequence[str]) -> dict[str, Tensor]:
        """Return the embeddings float32 `(d,)` of ids that the argument `name` names.

        Raises:
            ValueError: if one is unknown.
        """

    def prepare(self) -> None:  # noqa: B027  # most have nothing to do
        """Do now what the first search would have to wait for, such as building an index; by default nothing."""

    def __contains__(self, image_id: str) -> bool:
        return bool(self.known([image_id]))

    def search(
        self,
        image: WeightedImages | None = None,
        text: str | None = None,
        k: int = 10,
        *,
        texts: Mapping[str, float] | None = None,
        ids: Mapping[str, float] | Sequence[str] | None = None,
        box: Sequence[float] | None = None,
        query: Query | None = None,
        weights: Weights = FUSION,
        exclude: Sequence[str] = (),
        filter: Filter | None = None,
        offset: int = 0,
        min_score: float | None = None,
        fold: float | None = None,
        explain: bool = False,
    ) -> SearchResult:
        """Find the k best images by cosine, or by the score of the model's composition; ties keep the gallery's order.

        Images, texts and ids may be weighted (1 by default). Every text of positive weight is composed with every
        image of positive weight, and the weighted mean is the query; one of negative weight leads away from it: weight
        times its own embedding is added.

        Args:
            image: one reference image or several, each alone or as `(image, weight)`.
            text: what should be different; without an image, what to look for.
            k: number of results; a smaller gallery returns all its images.
            texts: further texts with their weights, `{"red": 1, "stripes": -0.5}`.
            ids: indexed images to search by, as a list or with weights, `{"a.jpg": 1, "b.jpg": -0.5}`; they are left
                out. Their files are opened only where the model composes a text with more than their embedding.
            box: left, top, right and bottom of the part of the one image that is searched by, in pixels.
            query: an encoded query (`result.query`), instead of image and text.
            weights: weights of image, fusion and text: normalize(w_image image + w_fused fused + w_text text). No
                encoder runs again, see [`Query.embed`]. By default the model's composition.
            exclude: ids that are left out.
            filter: condition on columns of `metadata`, see `pvlf_hf.search.filters`: the k best of those that pass,
                exactly, with every index but an approximate one in Milvus.
            offset: results to pass over, those of earlier pages.
            min_score: least score of a result.
            fold: cosine, such as 0.98, from which an image is a near-duplicate of a better result, to which it is
                folded (`result.folded`).
            explain: also explain the query in `result.why`; needs an image and a text.

        Raises:
            ValueError: if there is nothing to search by, an image cannot be read, the text is empty, the query is of
                another model, k is below 1, an id is unknown or nothing is left, a filter cannot be applied, and as
                [`Query.embed`].
        """
        k, offset = check_positive("k", k), check_offset(offset)
        choice = self._choice(exclude, filter)
        if query is None:
            query = self.query(image, text, explain, texts=texts, ids=ids, box=box)
        elif explain or any(part is not None for part in (image, text, texts, ids, box)):
            raise ValueError("a query is encoded already: pass it without image, text and explain")
        self._check_made_by(query)
        settings = {"filter": filter, "min_score": min_score, "fold": fold}
        return self._result(query, self._ranking(query, weights, choice), k, offset, settings)

    def search_many(
        self,
        queries: Sequence[Query],
        k: int = 10,
        *,
        weights: Weights = FUSION,
        exclude: Sequence[str] = (),
        filter: Filter | None = None,
        offset: int = 0,
        min_score: float | None = None,
    ) -> list[SearchResult]:
        """Search by several encoded queries, each as by [`~ImageSearch.search`], reading images once if possible.

        Images in shards are read once for all queries, and those in memory compared in one matrix product by the exact
        index. Arguments and errors are those of [`~ImageSearch.search`].
        """
        k, offset, choice = check_positive("k", k), check_offset(offset), self._choice(exclude, filter)
        settings = {"filter": filter, "min_score": check_score("min_score", min_score), "fold": None}
        for query in queries:
            self._check_made_by(query)
        rankings = self._rankings(queries, weights, choice, k + offset) if queries else []
        found = zip(queries, rankings, strict=True)
        return [self._result(query, ranked, k, offset, settings) for query, ranked in found]

    def _check_made_by(self, query: Query) -> None:
        if query.made_by != self.made_by:
            raise ValueError("the query was encoded by another model: make it with gallery.query(...)")

    def _result(self, query: Query, ranked: Ranked, k: int, offset: int, settings: dict[str, Any]) -> SearchResult:
        """Return a page of a ranking."""
        least, fold = (check_score(name, settings[name]) for name in ("min_score", "fold"))
        hits = page_of(ranked, self._embeddings, k, offset, least, fold)
        names = self._names([row for hit in hits for row in (hit.row, *hit.folded)])
        return SearchResult(
            ids=[names[hit.row][0] for hit in hits],
            scores=[hit.score for hit in hits],
            paths=[names[hit.row][1] for hit in hits],
            query=query,
            gallery=self,
            folded={names[hit.row][0]: [names[row][0] for row in hit.folded] for hit in hits if hit.folded},
            settings=settings,
        )

    def query(
        self,
        image: WeightedImages | None = None,
        text: str | None = None,
        explain: bool = False,
        *,
        texts: Mapping[str, float] | None = None,
        ids: Mapping[str, float] | Sequence[str] | None = None,
        box: Sequence[float] | None = None,
    ) -> Query:
        """Encode a query, for searches with several weights; arguments and errors as [`~Gallery.search`]."""
        terms = collect_terms(self.processor, image, text, texts, ids, box)
        embeddings = self._embeddings_of("ids", [image_id for image_id, _ in terms.ids])
        encoder = QueryEncoder(self.model, self.processor, self.made_by, embeddings.__getitem__, self.image)
        return encoder.encode(terms, explain)

    def references(self, query: Query) -> list[PILImage.Image]:
        """Return the reference images of a query for display, indexed ones by [`~ImageSearch.preview`]."""
        return [*query.images, *map(self.preview, query.ids)]

    def preview(self, image_id: str) -> PILImage.Image:
        """Open an image for display; for one that cannot be opened, warn and return a blank with its id.

        Raises:
            ValueError: if there is none of this id.
        """
        try:
            return self.image(image_id)
        except ValueError as error:
            if image_id not in self:
                raise
            logger.warning(f"a blank is shown instead: {error}")
            return blank(image_id)


__all__ = ["ImageSearch"]
