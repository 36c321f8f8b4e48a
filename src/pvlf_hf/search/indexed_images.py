"""Holds the embedded images of a gallery: names, files, embeddings, index and metadata."""

import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from PIL import Image as PILImage
from torch import Tensor

from ..digests import sequence_digest
from ..embeddings.combined import gallery_mean
from ..embeddings.similarity import top_k
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from .filters import Filter, passing_rows
from .gallery_files import GalleryTable
from .image_search import ImageSearch
from .indexing import DecodeOptions, open_cell
from .nearest import nearest
from .pages import Ranked, ranking_without
from .query import Query, Weights
from .vector_index import Copy, ExactIndex, LocalIndex, VectorIndex, check_copy, check_index, make_index

if TYPE_CHECKING:
    from datasets import Dataset

FEWEST_AT_ONCE = 16
"""Queries from which one product with the float32 embeddings is faster than a pass of the index for each.

Measured on one core: the times are equal at 3 queries among 10,000 images, and at 12 among 1,000,000.
"""


class IndexedImages(ImageSearch):
    """Embedded images, the model that embedded them, and the index by which they are found.

    Attributes:
        ids: names of the images.
        paths: their files or URLs, None where the dataset holds them itself.
        digests: digests of the files; for a URL, of its string only: it is not fetched again to detect changes.
        embeds: float32 `(images, d)`, L2-normalised, in the order of ids.
        skipped: id of every image that could not be read or is in a format that is not decoded, and why.
        left_out: names of images in hidden and system folders, which were not requested.
        metadata: columns that came with the images, a row an image, or None; what filters refer to.
        made_by: provenance of the embeddings ([`images_made_by`]): the image side of the model alone, so that every
            model on the same image encoder, projection and preprocessing searches the gallery.
    """

    def __init__(
        self,
        table: GalleryTable,
        embeds: Tensor,
        made_by: dict[str, str],
        model: ComposedRetrievalModel,
        processor: ComposedRetrievalProcessor,
        index: LocalIndex = "exact",
        sources: "Dataset | None" = None,
        skipped: dict[str, str] | None = None,
        metadata: pa.Table | None = None,
        folder: Path | None = None,
        vectors: Copy | None = None,
    ) -> None:
        check_index(index)
        check_copy(vectors, index)
        self.ids, self.paths, self.digests = table
        self.embeds, self.made_by, self.model, self.processor = embeds, made_by, model, processor
        self.index_name, self.skipped, self._sources, self.metadata = index, skipped or {}, sources, metadata
        self.left_out: list[str] = []
        self._vectors, self._folder = (
            vectors,
            folder,
        )  # the folder keeps the gallery, and an index that takes long to build

    def row_of(self, image_id: str) -> int:
        """Return the row of an image, an id of the gallery."""
        return self._row_of[image_id]

    def values_of(self, ids: Sequence[str]) -> list[dict[str, Any]] | None:
        """Return the metadata of images, None if there is no metadata."""
        if self.metadata is None:
            return None
        rows = pa.array([self._row_of[image_id] for image_id in ids], pa.int64())  # none has no type
        return self.metadata.take(rows).to_pylist()

    @property
    def metadata_names(self) -> list[str]:
        """Names of the columns of metadata."""
        return [] if self.metadata is None else self.metadata.column_names

    def known(self, ids: Sequence[str]) -> list[str]:
        """Return those of some ids that the gallery has."""
        return [image_id for image_id in ids if image_id in self._row_of]

    def some_ids(self, number: int) -> list[str]:
        """Return the ids of random images."""
        return random.sample(self.ids, min(number, len(self)))

    def prepare(self) -> None:
        """Build or load the index, and list the rows of the ids."""
        self.index, self._row_of  # noqa: B018  # cached

    def _choice(self, exclude: Sequence[str], filter: Filter | None) -> tuple[list[int], Tensor | None]:
        """Return the rows that are left out, and those that pass the filter, if there is one."""
        excluded = self._rows_of("exclude", exclude)
        if len(set(excluded)) == len(self):
            raise ValueError(f"exclude leaves none of the gallery's {len(self)} images; exclude fewer")
        return excluded, None if filter is None else torch.from_numpy(passing_rows(filter, self.metadata))

    def _ranking(self, query: Query, weights: Weights, choice: tuple[list[int], Tensor | None]) -> Ranked:
        excluded, passing = choice
        scored = query.scored_by(weights, self.embeds, self._mean if query.combine else None)
        left_out = [*excluded, *self._rows_of("ids", query.ids)]

        def ranked(number: int) -> tuple[Tensor, Tensor]:
            scores, rows = nearest(self.index, self.embeds, scored, number + len(left_out), passing)
            return ranking_without(scores, rows, left_out)(number)

        return ranked

    def _rankings(
        self, queries: Sequence[Query], weights: Weights, choice: tuple[list[int], Tensor | None], number: int
    ) -> list[Ranked]:
        """Return the rankings of several queries, by one product with the embeddings of all images where that pays."""
        excluded, passing = choice
        plain = passing is None and not any(query.is_combined(weights) for query in queries)
        if not plain or not isinstance(self.index, ExactIndex) or len(queries) < FEWEST_AT_ONCE:
            return super()._rankings(queries, weights, choice, number)
        left_out = [[*excluded, *self._rows_of("ids", query.ids)] for query in queries]
        embeds = torch.stack([query.embed(weights) for query in queries])
        best = top_k(embeds, self.embeds, min(len(self), number + max(map(len, left_out))))
        return [ranking_without(*one) for one in zip(*best, left_out, strict=True)]

    def _embeddings(self, rows: Tensor) -> Tensor:
        return self.embeds[rows]

    def _names(self, rows: Sequence[int]) -> dict[int, tuple[str, str | None]]:
        return {row: (self.ids[row], self.paths[row]) for row in rows}

    def _embeddings_of(self, name: str, ids: Sequence[str]) -> dict[str, Tensor]:
        return {image_id: self.embeds[row] for image_id, row in zip(ids, self._rows_of(name, ids), strict=True)}

    def _rows_of(self, name: str, ids: Sequence[str]) -> list[int]:
        """Return the rows of ids that an argument names."""
        if isinstance(ids, str):
            raise ValueError(f"{name}={ids!r}: pass a list of ids")
        if unknown := [image_id for image_id in ids if image_id not in self._row_of]:
            raise ValueError(f"{name} names {unknown[:3]}, which are not in the gallery; pass ids of its images")
        return [self._row_of[image_id] for image_id in ids]

    def image(self, image_id: str) -> PILImage.Image:
        """Open an image of the gallery, RGB.

        Raises:
            ValueError: if the gallery does not have it, or its file cannot be opened.
        """
        if image_id not in self._row_of:
            raise ValueError(f"{image_id!r} is not in the gallery; pass one of its ids")
        row, sources = self._row_of[image_id], self._sources
        try:
            if sources is None:
                return open_cell({"bytes": None, "path": self.paths[row]}, DecodeOptions(None))
            return open_cell(sources[row]["image"], DecodeOptions(sources.features["image"].mode))
        except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged files
            # The id names the file; its path would tell clients of a server where this machine keeps it.
            reason = str(error).replace(str(self.paths[row]), image_id)
            raise ValueError(
                f"the image {image_id!r} cannot be opened ({reason}): build the gallery again from the folder that "
                "holds its images now, with the same path; images that are embedded are not encoded again"
            ) from error

    picture = image  # its name in version 0.1

    @cached_property
    def index(self) -> VectorIndex:
        """Index of the embeddings, built or loaded at the first search."""
        content = sequence_digest(self.made_by["fingerprint"], *self.digests)
        file = None if self._folder is None else self._folder / f"{self.index_name}-{content}.index"
        return make_index(self.index_name, self.embeds, file, self._vectors)

    @cached_property
    def _mean(self) -> Tensor:
        """Float64 mean of the embeddings, which centres the similarities of a composition without an embedding."""
        return gallery_mean(self.embeds)

    @property
    def _table(self) -> GalleryTable:
        return GalleryTable(self.ids, self.paths, self.digests)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {image_id: row for row, image_id in enumerate(self.ids)}

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        left_out = f"{len(self.left_out)} left out, " if self.left_out else ""
        return f"Gallery({len(self)} images, {len(self.skipped)} skipped, {left_out}index={self.index_name!r})"


__all__ = ["IndexedImages"]
