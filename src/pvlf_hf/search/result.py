"""Results of a search, and the session of refinements that led to them."""

from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image as PILImage

from .query import FUSION, Explanation, Query, Weights


@dataclass(frozen=True)
class SearchResult:
    """Images that a search found, best first, and the session that led to it.

    Args:
        ids: ids of the images.
        scores: cosines with the query, or what a composition without an embedding makes of two similarities.
        paths: files or URLs of the images, None where the gallery has none.
        query: the encoded query; reuse it with other weights: `gallery.search(query=result.query, weights=...)`.
        gallery: the [`Gallery`] that was searched.
        previous: the result that this one refines.
        pick: which result of `previous` it started from.
        folded: ids of near-duplicates by the id of the result that stands for them, if they were to be folded.
        settings: filter, least score and folding of the search, which a refinement keeps.
    """

    ids: list[str]
    scores: list[float]
    paths: list[str | None] = field(repr=False)
    query: Query
    gallery: Any = field(repr=False)
    previous: "SearchResult | None" = field(default=None, repr=False)
    pick: int | None = None
    folded: dict[str, list[str]] = field(default_factory=dict, repr=False)
    settings: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def why(self) -> tuple[Explanation, ...]:
        """Explanations, one per reference image, if the search was made with `explain=True`."""
        return self.query.why

    @property
    def session(self) -> list["SearchResult"]:
        """Results of a chain of refinements, from the first search to this one."""
        return [*(self.previous.session if self.previous else []), self]

    def refine(
        self,
        text: str | None = None,
        pick: int = 0,
        k: int | None = None,
        weights: Weights = FUSION,
        explain: bool = False,
    ) -> "SearchResult":
        """Search again from one of the results ("... and now in blue"), which is itself left out.

        Args:
            text: what should be different; None for more like it.
            pick: which result is the reference, counted from 0.
            k: number of results; as many as here by default.
            weights: see [`Query.embed`].
            explain: see [`Gallery.search`].

        Raises:
            ValueError: if the result does not exist, its image cannot be opened, and as [`Gallery.search`].
        """
        if not isinstance(pick, int) or not 0 <= pick < len(self.ids):
            raise ValueError(f"pick={pick!r}: there are {len(self.ids)} results, choose 0 to {len(self.ids) - 1}")
        picked = self.ids[pick]
        query = self.gallery.query(self.gallery.image(picked), text, explain)
        refined = self.gallery.search(
            query=query, k=len(self.ids) if k is None else k, weights=weights, exclude=[picked], **self.settings
        )
        return replace(refined, previous=self, pick=pick)

    def sheet(self, title: str = "", k: int = 5) -> PILImage.Image:
        """Draw the session, one row per search.

        The result that the next row refines is framed; in the last row, the best one. An image that cannot be opened
        is drawn as a blank with its id.

        Args:
            title: heading.
            k: results in a row.
        """
        from ..evaluation.retrieval_sheet import (  # a search that draws none does not wait for it
            SheetRow,
            retrieval_sheet,
        )

        if not all(result.ids for result in self.session):
            raise ValueError("a search of this session found nothing, so there is nothing to draw: widen its filter")
        picks = [result.pick or 0 for result in self.session[1:]] + [0]
        rows = []
        for result, pick in zip(self.session, picks, strict=True):
            number = len(result.query.images) + len(result.query.ids)
            more = f" (and {number - 1} more images)" if number > 1 else ""
            rows.append(
                SheetRow(
                    reference=(*self.gallery.references(result.query), PILImage.new("RGB", (8, 8), "white"))[0],
                    caption=(result.query.text or "") + more,
                    results=[self.gallery.preview(image_id) for image_id in result.ids[:k]],
                    target=self.gallery.preview(result.ids[pick]),
                    rank=pick,
                )
            )
        return retrieval_sheet(rows, title)


__all__ = ["SearchResult"]
