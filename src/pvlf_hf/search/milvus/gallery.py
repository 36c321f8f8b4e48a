"""Galleries that live in Milvus: searched, filled and emptied there; this process keeps nothing of an image.

Example:
    ```python
    gallery = Gallery.from_folder("photos/", model, processor, index="milvus", uri="photos.db", name="photos")
    gallery = Gallery.from_milvus("photos.db", "photos", model, processor)  # later, without the folder
    gallery.search(text="without sleeves", filter="price < 50")
    ```
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from threading import local
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from PIL import Image as PILImage
from torch import Tensor

from ...embeddings.embedding_store import images_made_by
from ...models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from ..filters import Filter
from ..gallery_files import prepared_as
from ..image_search import ImageSearch
from ..indexing import DecodeOptions, as_dataset, open_cell, report
from ..metadata import EXIF, align, read_metadata
from ..pages import Ranked
from ..query import Query, Weights
from .filling import Batches, EmbeddedImages, Filled, bring_in_line, fill_store
from .filters import milvus_filter
from .indexing import StoreIndexer
from .nearest import Found, nearest_in_store
from .schema import StoreSchema, embeddings_of
from .store import MilvusStore, StoreAddress, check_maker, create_store, names_of_stores, open_store

if TYPE_CHECKING:
    from datasets import Dataset


class MilvusGallery(ImageSearch):
    """Images in a [`MilvusStore`], and a model that searches them; made by [`Gallery`]'s methods or those below.

    What is read of all images (`ids`, `metadata`) is read from the store each time, in the order of the ids.

    Attributes:
        index: the store.
        skipped: id of every image that could not be read when this gallery was filled, and why.
        left_out: names of images in hidden and system folders, which were not requested.
        encoded: number of images that were encoded when this gallery was filled.
        made_by: provenance of the embeddings.
    """

    index_name = "milvus"

    def __init__(
        self, store: MilvusStore, model: ComposedRetrievalModel, processor: ComposedRetrievalProcessor
    ) -> None:
        self.index, self.model, self.processor = store, model, processor
        self.made_by, self.uri = store.made_by, store.database.uri
        self.skipped: dict[str, str] = {}
        self.left_out: list[str] = []
        self.encoded = 0
        self._answer = local()  # what the last ranking of each thread found, which its rows refer to

    @classmethod
    def open(
        cls, address: StoreAddress, model: ComposedRetrievalModel, processor: ComposedRetrievalProcessor
    ) -> "MilvusGallery":
        """Open a gallery that was filled before.

        Raises:
            ValueError: if there is none, another model made it, or the database cannot be opened.
        """
        found = cls.existing(address, model, processor)
        if found is None:
            raise ValueError(
                f"there is no gallery {address}, which holds {names_of_stores(address)}: fill it with "
                f"Gallery.from_folder(..., index='milvus', uri=..., name={address.name!r}), or check the name"
            )
        return found

    @classmethod
    def of_dataset(
        cls,
        dataset: "Dataset",
        address: StoreAddress,
        model: ComposedRetrievalModel,
        processor: ComposedRetrievalProcessor,
        skipped: dict[str, str] | None = None,
        metadata: str | Path | pa.Table | None = None,
        exif: bool = False,
        **options: Any,
    ) -> "MilvusGallery":
        """Bring a gallery in line with `image` of a dataset, named by `image_id`; it is made where there is none.

        Arguments and errors are those of [`Gallery.from_folder`].
        """
        ids, unread = [str(image_id) for image_id in dataset["image_id"][:]], skipped or {}
        given = None if metadata is None else align(read_metadata(metadata), ids, [*unread])
        gallery = cls.existing(address, model, processor)
        if gallery is None:
            columns = pa.schema([*(() if given is None else given.schema), *(EXIF if exif else ())])
            made_by = images_made_by(model, processor)
            gallery = cls(create_store(address, model.embedding_width, columns, made_by), model, processor)
        gallery._index(dataset, ids, given, exif, remove_others=True, **options)
        gallery.skipped = {**unread, **gallery.skipped}
        report(gallery.skipped, len(ids) + len(unread))
        return gallery

    @classmethod
    def of_embedded(
        cls,
        images: EmbeddedImages,
        address: StoreAddress,
        model: ComposedRetrievalModel,
        processor: ComposedRetrievalProcessor,
        progress: bool = True,
    ) -> "MilvusGallery":
        """Bring a gallery in line with embedded images (`from_shards`, `from_table`); it is made where there is none.

        Images that the store holds beside them are removed.

        Raises:
            ValueError: if they are of another model, or do not fit the store.
        """
        processor, provenance = prepared_as(images.made_by, str(address), model, processor)
        if provenance != images.made_by:
            raise ValueError(
                "the embeddings were made by another model or processor, or in another dtype: open them with the one "
                f"that made them ({images.made_by})"
            )
        store, _ = bring_in_line(images, address, progress)
        return cls(store, model, processor)

    @classmethod
    def existing(
        cls, address: StoreAddress, model: ComposedRetrievalModel, processor: ComposedRetrievalProcessor
    ) -> "MilvusGallery | None":
        """Open a gallery, None where there is none; errors as [`~MilvusGallery.open`]."""
        store = open_store(address)
        if store is None:
            return None
        processor, provenance = prepared_as(store.made_by, str(address), model, processor)
        check_maker(store, provenance)
        return cls(store, model, processor)

    def add(
        self,
        images: Iterable[str | Path],
        ids: Sequence[str] | None = None,
        metadata: str | Path | pa.Table | None = None,
        **options: Any,
    ) -> dict[str, str]:
        """Embed files and URLs, and add them, or replace those of the same ids; others stay.

        Args:
            images: files, and `http(s):` or `data:` URLs.
            ids: names of the images; by default what `images` says.
            metadata: as in [`Gallery.from_folder`].
            **options: `batch_size`, `progress` and `draft`, as in [`Gallery.from_folder`].

        Returns:
            id of every image that cannot be read, and the reason.
        """
        files = list(map(str, images))
        ids = files if ids is None else list(ids)
        if not len(set(ids)) == len(ids) == len(files):
            raise ValueError(f"{len(files)} images have {len(set(ids))} different ids: pass one for each")
        given = None if metadata is None else align(read_metadata(metadata), ids)
        self._index(as_dataset(files, ids), ids, given, False, remove_others=False, **options)
        return self.skipped

    def remove(self, ids: Sequence[str]) -> None:
        """Remove images.

        Raises:
            ValueError: if the gallery does not have one of them; then none is removed.
        """
        self._check_known("ids", ids)
        self.index.remove(ids)
        self.__dict__.pop("_mean", None)

    def fill(self, batches: Batches, remove_others: bool = False) -> Filled:
        """Add embedded images, see [`fill_store`]."""
        self.__dict__.pop("_mean", None)
        return fill_store(self.index, batches, remove_others)

    def image(self, image_id: str) -> PILImage.Image:
        """Open an image of the gallery, RGB.

        Raises:
            ValueError: if the gallery does not have it, or its file cannot be opened.
        """
        found = self.index.look_up([image_id])
        if not len(found):
            raise ValueError(f"{image_id!r} is not in the gallery; pass one of its ids")
        path = found["path"][0].as_py()
        try:
            return open_cell({"bytes": None, "path": path}, DecodeOptions(None))
        except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged files
            reason = str(error).replace(str(path), image_id)
            raise ValueError(
                f"the image {image_id!r} cannot be opened ({reason}): index the folder that holds its images now into "
                "the same store; images that are embedded are not encoded again"
            ) from error

    def values_of(self, ids: Sequence[str]) -> list[dict[str, Any]] | None:
        """Return the metadata of images, None if there is no metadata."""
        names = self.metadata_names
        if not names:
            return None
        found = self.index.look_up(ids)
        rows = dict(zip(found["id"].to_pylist(), found.select(names).to_pylist(), strict=True))
        return [rows.get(image_id, dict.fromkeys(names)) for image_id in ids]

    @property
    def metadata_names(self) -> list[str]:
        """Names of the columns of metadata."""
        return self.index.schema.columns.names

    def known(self, ids: Sequence[str]) -> list[str]:
        """Return those of some ids that the store has."""
        found = set(self.index.look_up(ids)["id"].to_pylist()) if ids else set()
        return [image_id for image_id in ids if image_id in found]

    def some_ids(self, number: int) -> list[str]:
        """Return the ids of random images."""
        return self.index.some_ids(number)

    @property
    def ids(self) -> list[str]:
        """Names of all images, sorted."""
        return sorted(row["id"] for rows in self.index.stream(["id"]) for row in rows)

    @property
    def metadata(self) -> pa.Table | None:
        """Metadata of all images, None if there is none."""
        names = self.metadata_names
        return self.index.read().select(names) if names else None

    def close(self) -> None:
        """Close the connection to the database."""
        self.index.database.close()

    def _choice(self, exclude: Sequence[str], filter: Filter | None) -> tuple[set[str], str | bool]:
        """Return the ids that are left out, and the filter as an expression of Milvus."""
        self._check_known("exclude", exclude)
        if exclude and len(set(exclude)) == len(self):
            raise ValueError(f"exclude leaves none of the gallery's {len(self)} images; exclude fewer")
        return set(exclude), milvus_filter(filter, self.index.schema)

    def _ranking(self, query: Query, weights: Weights, choice: tuple[set[str], str | bool]) -> Ranked:
        excluded, condition = choice
        self._check_known("ids", query.ids)
        left_out = excluded | set(query.ids)
        mean = self._mean if query.combine is not None and weights[1] != 0 else None
        expression = condition if isinstance(condition, str) else ""

        def ranked(number: int) -> tuple[Tensor, Tensor]:
            found = Found(torch.empty(0), [], [], torch.empty(0, self.index.schema.width))
            if condition is not False:
                found = nearest_in_store(
                    self.index,
                    lambda embeds: query.scored_by(weights, embeds, mean),
                    number + len(left_out),
                    expression,
                )
            self._answer.found = found
            kept = [row for row, image_id in enumerate(found.ids) if image_id not in left_out]
            rows = torch.tensor(kept[:number], dtype=torch.int64)
            return found.scores[rows], rows

        return ranked

    def _embeddings(self, rows: Tensor) -> Tensor:
        return self._answer.found.embeds[rows]

    def _names(self, rows: Sequence[int]) -> dict[int, tuple[str, str | None]]:
        return {row: (self._answer.found.ids[row], self._answer.found.paths[row]) for row in rows}

    def _embeddings_of(self, name: str, ids: Sequence[str]) -> dict[str, Tensor]:
        self._check_known(name, ids)
        if not ids:
            return {}
        found = self.index.look_up(ids, embeddings=True)
        return dict(zip(found["id"].to_pylist(), embeddings_of(found, self.index.schema.width), strict=True))

    def _check_known(self, name: str, ids: Sequence[str]) -> None:
        if isinstance(ids, str):
            raise ValueError(f"{name}={ids!r}: pass a list of ids")
        known = set(self.known(ids))
        if unknown := [image_id for image_id in ids if image_id not in known]:
            raise ValueError(f"{name} names {unknown[:3]}, which are not in the gallery; pass ids of its images")

    def _index(
        self,
        dataset: "Dataset",
        ids: Sequence[str],
        metadata: pa.Table | None,
        exif: bool,
        remove_others: bool,
        **options: Any,
    ) -> None:
        if "int8" in self.made_by:
            raise ValueError(
                f"the images of {self.index.name} were embedded in int8, by an encoder in a gallery's folder: add "
                "images by indexing into that folder, with this database (pvlf-hf index PHOTOS --path FOLDER "
                "--milvus URI)"
            )
        columns = self.index.schema.columns
        if exif and not {*EXIF.names} <= {*columns.names}:
            raise ValueError(
                f"the store {self.index.name} has no columns of EXIF: choose another name for a new store"
            )
        if metadata is not None:
            own = pa.schema([column for column in columns if column.name not in EXIF.names])
            metadata = StoreSchema.of(self.index.schema.width, own).cast(metadata)
        indexer = StoreIndexer(self.index, self.model, self.processor, dataset, ids, metadata, **options)
        indexer.run(remove_others)
        self.skipped, self.encoded = indexer.skipped, indexer.encoded
        self.__dict__.pop("_mean", None)

    @cached_property
    def _mean(self) -> Tensor:
        """Float64 mean of the embeddings; read once, and again after this gallery has changed the store."""
        return self.index.mean()

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return f"MilvusGallery({len(self)} images, {len(self.skipped)} skipped, in {self.index.name})"


__all__ = ["MilvusGallery"]
