"""Search in one's own images: by an image, by a text, or by an image and what should be different.

A gallery embeds images once and identifies them by the digests of their files: only new ones are encoded again. Kept
in a folder, `embeddings.safetensors` holds float32 `(images, d)`, and row i of `gallery.parquet` (`id`, `path`,
`digest`) says what row i embeds, so that others can read both without this package.

Example:
    ```python
    gallery = Gallery.from_folder("photos/", model, processor, path="photos.gallery")
    result = gallery.search(image="dress.jpg", text="without sleeves", k=5)
    result = result.refine(text="and now in blue", pick=0)  # from the best of them
    result.sheet().save("session.png")
    ```
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, Image, Value
from huggingface_hub import CommitInfo
from PIL import Image as PILImage
from torch import Tensor
from transformers.utils import logging

from ..data.benchmark import check_columns
from ..digests import sequence_digest
from ..embeddings.combined import gallery_mean
from ..models.image_processing_pvlf import ImageInput
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from .building import build_gallery, open_database, save_gallery
from .gallery_files import (
    GalleryTable,
    check_encoder,
    download_gallery,
    gallery_id_of,
    read_gallery,
    upload_gallery,
)
from .image_folder import find_images
from .indexing import DecodeOptions, as_dataset, open_cell
from .nearest import nearest
from .previews import blank
from .query import FUSION, Query, Weights, check_positive, encode_query
from .replacement import finish_replacement
from .result import SearchResult
from .vector_index import IndexName, VectorIndex, check_index, collection_of, connect, make_index

logger = logging.get_logger(__name__)


class Gallery:
    """Embedded images, to be searched. Made by `from_folder`, `from_images`, `from_dataset`, `load` or `from_hub`.

    Under `accelerate launch` all processes share the encoding; search in the main one. Several threads may search one
    gallery at the same time, and several galleries may share a model: a search changes nothing in it.

    Attributes:
        ids: names of the images.
        paths: their files or URLs, None where the dataset holds them itself.
        digests: digests of the files; for a URL, of its string only: it is not fetched again to detect changes.
        embeds: float32 `(images, d)`, L2-normalised, in the order of ids.
        skipped: id of every image that could not be read, and why.
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
        index: IndexName = "exact",
        uri: str | None = None,
        sources: Dataset | None = None,
        skipped: dict[str, str] | None = None,
        gallery_id: str | None = None,
        client: Any = None,
    ) -> None:
        check_index(index, uri)
        self.ids, self.paths, self.digests = table
        self.embeds, self.made_by, self.model, self.processor = embeds, made_by, model, processor
        self.index_name, self.uri, self.skipped = index, uri, skipped or {}
        self._sources = sources or as_dataset(self.paths)
        self._gallery_id, self._client = gallery_id, client

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        model: ComposedRetrievalModel,
        processor: ComposedRetrievalProcessor,
        path: str | Path | None = None,
        allow_links: bool = False,
        include_hidden: bool = False,
        **options: Any,
    ) -> "Gallery":
        """Embed the images of a folder and its subfolders: every file whose ending Pillow can open.

        Args:
            folder: folder of the images; the id of an image is its path relative to it (`"2024/dress.jpg"`).
            model: embeds images and queries.
            processor: the model's processor.
            path: folder that keeps the embeddings. A repeated call, also after an interruption, encodes only new and
                changed images and drops deleted ones; it waits for another process that is writing to the folder.
                None keeps the embeddings in memory, see [`~Gallery.save`].
            allow_links: follow links that lead out of the folder, also to other folders.
            include_hidden: also embed images in hidden folders (`.thumbnails`) and system folders (`@eaDir`,
                `$RECYCLE.BIN`), which mostly hold thumbnails and deleted images; without it a warning counts them.
            **options: `batch_size` (64); `progress` (True), show progress bars; `draft` (False), decode JPEGs that are
                much larger than the model sees at reduced size: faster, for nearly the same embeddings; `replace`
                (False), where `path` holds a gallery of another image encoder, build the new one beside it, in
                `path + ".new"`, and put it in its place at the end: until then that one serves, and a kill leaves it
                and what was built; `index`,
                `"exact"` (default), `"faiss"` (approximate, in memory) or `"milvus"` with its `uri` (a file ending in
                .db, or a cluster's URL), see `pvlf_hf.search.vector_index`.

        Raises:
            ValueError: if there is no image, or none that can be read; a link leads out of the folder; `path` holds
                embeddings of another model; or the index is unknown or cannot be opened. An image that cannot be read
                is skipped, counted in a warning and listed in `skipped`, and so is what looks like an image by its
                ending or first bytes but is in a format that is not decoded (HEIC, JPEG XL, camera raw).
        """
        folder = Path(folder)
        images = find_images(folder, allow_links, include_hidden)
        if images.hidden and PartialState().is_main_process:
            logger.warning(
                f"left out {len(images.hidden)} images in hidden or system folders, first: {images.hidden[:3]}; pass "
                "include_hidden=True to index them"
            )
        ids = [file.relative_to(folder).as_posix() for file in images.files]
        dataset = as_dataset([str(file.absolute()) for file in images.files], ids)
        return cls._build(dataset, model, processor, path, images.skipped, **options)

    @classmethod
    def from_images(
        cls,
        images: Iterable[str | Path],
        model: ComposedRetrievalModel,
        processor: ComposedRetrievalProcessor,
        path: str | Path | None = None,
        **options: Any,
    ) -> "Gallery":
        """Embed files and `http(s):` or `data:` URLs, which are their own ids; otherwise as [`~Gallery.from_folder`].

        Raises:
            ValueError: also if `images` holds something else.
        """
        if isinstance(images, str | bytes | PathLike):
            raise ValueError(
                f"images={images!r:.80}: pass a list of files and URLs; for a folder use Gallery.from_folder"
            )
        given = list(images)
        if other := [one for one in given if not isinstance(one, str | PathLike)]:
            raise ValueError(
                f"images holds {other[0]!r:.80}, neither a file nor a URL: decoded images go to Gallery.from_dataset"
            )
        names = [str(image) for image in given]
        return cls._build(as_dataset(names, names), model, processor, path, **options)

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset,
        model: ComposedRetrievalModel,
        processor: ComposedRetrievalProcessor,
        path: str | Path | None = None,
        image_column: str = "image",
        id_column: str = "image_id",
        **options: Any,
    ) -> "Gallery":
        """Embed a column of images (`datasets.Image`); other arguments and errors as [`~Gallery.from_folder`].

        Raises:
            ValueError: also if it is no `datasets.Dataset` with such columns, or ids repeat.
        """
        if not isinstance(dataset, Dataset):
            splits = f", one of its splits {[*dataset]}" if isinstance(dataset, dict) else ""
            raise ValueError(
                f"dataset is of type {type(dataset).__name__}: pass a datasets.Dataset{splits}; for a stream, "
                "Dataset.from_list(list(stream.take(n)), features=stream.features)"
            )
        dataset = dataset.with_format(None)  # the caller's output format must not matter
        check_columns(dataset, (image_column, id_column), "gallery")
        dataset = dataset.select_columns([image_column, id_column])
        dataset = dataset.rename_columns({image_column: "image", id_column: "image_id"})
        feature = dataset.features["image"]
        if not (isinstance(feature, Image) or (isinstance(feature, Value) and feature.dtype in ("string", "binary"))):
            raise ValueError(
                f"gallery: column {image_column!r} is {feature}: it must hold one image a row (datasets.Image), its "
                "file or its bytes"
            )
        if missing := [row for row, image_id in enumerate(dataset["image_id"]) if image_id is None]:
            raise ValueError(f"gallery: {id_column} is missing in rows {missing[:3]}; name or drop them")
        return cls._build(dataset, model, processor, path, **options)

    @classmethod
    def _build(cls, dataset: Dataset, *arguments: Any, **options: Any) -> "Gallery":
        """Embed `image` of a dataset, named by `image_id`; arguments as [`build_gallery`]."""
        model, processor = arguments[:2]
        index, uri = options.get("index", "exact"), options.get("uri")
        made = build_gallery(dataset, *arguments, **options)
        return cls(made.table, made.embeds, made.made_by, model, processor, index, uri, *made[3:])

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: ComposedRetrievalModel,
        processor: ComposedRetrievalProcessor,
        index: IndexName = "exact",
        uri: str | None = None,
    ) -> "Gallery":
        """Load a saved gallery; embeddings stay on disk until they are used.

        Raises:
            ValueError: if there is no gallery in the folder, its two files do not belong together, another model made
                it, or the index is unknown or cannot be opened.
        """
        path = Path(path)
        check_index(index, uri)
        finish_replacement(path)
        table, embeds = read_gallery(path)
        provenance = check_encoder(path, model, processor)
        client = open_database(index, uri, provenance)
        gallery_id = gallery_id_of(path)
        return cls(table, embeds, provenance, model, processor, index, uri, gallery_id=gallery_id, client=client)

    def save(self, path: str | Path) -> None:
        """Write the two files of a gallery, and remove parts that an interruption left.

        Raises:
            ValueError: if the folder holds embeddings of another model.
        """
        check_encoder(Path(path), self.model, self.processor, self.made_by)
        save_gallery(Path(path), self._table, self.embeds, self.made_by)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> CommitInfo:
        """Upload embeddings, ids, digests and web URLs as a dataset; images and paths of files stay here.

        Args:
            repo_id: `"user/name"`, created if it does not exist.
            private: whether a new repository is private.
            token: Hub token; by default that of the login.
        """
        return upload_gallery(repo_id, self._table, self.embeds, self.made_by, private, token)

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        model: ComposedRetrievalModel,
        processor: ComposedRetrievalProcessor,
        index: IndexName = "exact",
        uri: str | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> "Gallery":
        """Load what [`~Gallery.push_to_hub`] uploaded; arguments and errors as [`~Gallery.load`].

        Raises:
            ValueError: if it names local files, which a downloaded gallery must not open. Web URLs are accepted; they
                are fetched when their images are opened.
        """
        return cls.load(download_gallery(repo_id, revision, token), model, processor, index, uri)

    def search(
        self,
        image: ImageInput | Sequence[ImageInput] | None = None,
        text: str | None = None,
        k: int = 10,
        *,
        query: Query | None = None,
        weights: Weights = FUSION,
        exclude: Sequence[str] = (),
        explain: bool = False,
    ) -> SearchResult:
        """Find the k best images by cosine, or by the score of the model's composition; ties keep the gallery's order.

        Args:
            image: one reference image or several, see [`~Gallery.query`].
            text: what should be different; without an image, what to look for.
            k: number of results; a smaller gallery returns all its images.
            query: an encoded query (`result.query`), instead of image and text.
            weights: weights of image, fusion and text: normalize(w_image image + w_fused fused + w_text text). No
                encoder runs again, see [`Query.embed`]. By default the model's composition.
            exclude: ids that are left out.
            explain: also explain the query in `result.why`; needs an image and a text.

        Raises:
            ValueError: if there is nothing to search by, an image cannot be read, the text is empty, the query is of
                another model, k is below 1, an id is unknown or nothing is left, and as [`Query.embed`].
        """
        k = check_positive("k", k)
        if isinstance(exclude, str):
            raise ValueError(f"exclude={exclude!r}: pass a list of ids")
        if unknown := [image_id for image_id in exclude if image_id not in self._row_of]:
            raise ValueError(f"exclude names {unknown[:3]}, which are not in the gallery; pass ids of its images")
        excluded = [self._row_of[image_id] for image_id in exclude]
        if len(set(excluded)) == len(self):
            raise ValueError(f"exclude leaves none of the gallery's {len(self)} images; exclude fewer")
        if query is None:
            query = self.query(image, text, explain)
        elif image is not None or text is not None or explain:
            raise ValueError("a query is encoded already: pass it without image, text and explain")
        if query.made_by != self.made_by:
            raise ValueError("the query was encoded by another model: make it with gallery.query(...)")
        asked = query.scored_by(weights, self.embeds, self._mean if query.combine else None)
        scores, rows = nearest(self.index, self.embeds, asked, min(k + len(excluded), len(self)))
        kept = (~torch.isin(rows, torch.tensor(excluded, dtype=torch.int64))).nonzero()[:k, 0]
        results = rows[kept].tolist()
        ids, paths = [self.ids[row] for row in results], [self.paths[row] for row in results]
        return SearchResult(ids, scores[kept].tolist(), paths, query, self)

    def query(
        self,
        image: ImageInput | Sequence[ImageInput] | None = None,
        text: str | None = None,
        explain: bool = False,
    ) -> Query:
        """Encode a query, for searches with several weights; arguments and errors as [`~Gallery.search`].

        Several images are each composed with the text; the query is the normalised mean of their embeddings.
        """
        return encode_query(self.model, self.processor, self.made_by, image, text, explain)

    def image(self, image_id: str) -> PILImage.Image:
        """Open an image of the gallery, RGB.

        Raises:
            ValueError: if the gallery does not have it, or its file cannot be opened.
        """
        if image_id not in self._row_of:
            raise ValueError(f"{image_id!r} is not in the gallery; pass one of its ids")
        try:
            options = DecodeOptions(self._sources.features["image"].mode)
            return open_cell(self._sources[self._row_of[image_id]]["image"], options)
        except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged files
            raise ValueError(
                f"the image {image_id!r} cannot be opened ({error}): build the gallery again from the folder that "
                "holds its images now, with the same path; images that are embedded are not encoded again"
            ) from error

    picture = image  # its name in version 0.1

    def preview(self, image_id: str) -> PILImage.Image:
        """Open an image for display; for one that cannot be opened, warn and return a blank with its id.

        Raises:
            ValueError: if the gallery does not have it.
        """
        try:
            return self.image(image_id)
        except ValueError as error:
            if image_id not in self._row_of:
                raise
            logger.warning(f"a blank is shown instead: {error}")
            return blank(image_id)

    @cached_property
    def index(self) -> VectorIndex:
        """Index of the embeddings, built at the first search."""
        if self.index_name != "milvus":
            return make_index(self.index_name, self.embeds, self.digests)
        fingerprint = self.made_by["fingerprint"]
        client = self._client or connect(str(self.uri), fingerprint)
        # A gallery in memory has no id: its content identifies it.
        gallery_id = self._gallery_id or sequence_digest(*sorted(set(self.digests)))
        return make_index(self.index_name, self.embeds, self.digests, client, collection_of(fingerprint, gallery_id))

    @cached_property
    def _mean(self) -> Tensor:
        """Float64 mean of the embeddings, which centres the similarities of a composition that is no embedding."""
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
        return f"Gallery({len(self)} images, {len(self.skipped)} skipped, index={self.index_name!r})"


__all__ = ["Gallery"]
