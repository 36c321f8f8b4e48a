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

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from huggingface_hub import CommitInfo
from torch import Tensor
from transformers.utils import logging

from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from .building import build_gallery, checked_dataset, open_database, save_gallery
from .filters import Filter, passing_rows
from .gallery_files import (
    as_indexed,
    check_encoder,
    download_gallery,
    gallery_id_of,
    read_gallery,
    upload_gallery,
)
from .image_folder import find_images
from .indexed_images import IndexedImages
from .indexing import as_dataset
from .metadata import dataset_metadata, metadata_of
from .nearest import nearest
from .pages import page_of
from .query import FUSION, Query, Weights, check_offset, check_positive, check_score
from .query_encoding import QueryEncoder
from .replacement import finish_replacement
from .result import SearchResult
from .terms import WeightedImages, collect_terms
from .vector_index import IndexName, check_index

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)


class Gallery(IndexedImages):
    """Embedded images, to be searched. Made by `from_folder`, `from_images`, `from_dataset`, `load` or `from_hub`.

    Under `accelerate launch` all processes share the encoding; search in the main one. Several threads may search one
    gallery at the same time, and several galleries may share a model: a search changes nothing in it.

    Attributes are those of [`IndexedImages`].
    """

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
        """Embed the images of a folder and its subfolders, whatever their endings: content decides.

        Args:
            folder: folder of the images; the id of an image is its path relative to it (`"2024/dress.jpg"`).
            model: embeds images and queries.
            processor: the model's processor. Where `path` holds images that were padded otherwise, and nothing else
                differs, the gallery's `processor` pads as they were, with a warning.
            path: folder that keeps the embeddings. A repeated call, also after an interruption, encodes only new and
                changed images and drops deleted ones; it waits for another process that is writing to the folder.
                None keeps the embeddings in memory, see [`~Gallery.save`].
            allow_links: follow links that lead out of the folder, also to other folders.
            include_hidden: also embed images in hidden folders (`.thumbnails`) and system folders (`@eaDir`,
                `$RECYCLE.BIN`), which mostly hold thumbnails and deleted images; without it they are counted in a
                warning and named in `left_out`.
            **options: `batch_size` (64); `progress` (True), show progress bars; `draft` (False), decode JPEGs that are
                much larger than the model sees at reduced size: faster, for nearly the same embeddings; `replace`
                (False), where `path` holds a gallery of another image encoder, build the new one beside it, in
                `path + ".being-built"`, and move it to `path` at the end: until then that one serves, and a kill
                leaves it and what was built; `metadata`, a CSV, Parquet or JSON lines file, or a `pyarrow.Table`,
                whose column `file_name` holds ids, to be filtered by (a repeated call without it keeps it); `exif`
                (False), read date, size and location from the images' headers, too (`exif_date`, ...); `index`,
                `"exact"` (default), `"faiss"` (approximate, in memory) or `"milvus"` with its `uri` (a file ending in
                .db, or a cluster's URL), see `pvlf_hf.search.vector_index`.

        Raises:
            ValueError: if there is no image, or none that can be read; a link leads out of the folder; `path` holds
                embeddings of another model; or the index is unknown or cannot be opened. An image that cannot be read
                is skipped, counted in a warning and listed in `skipped`, and so is what looks like an image by its
                ending or first bytes but is in a format that is not decoded: HEIC without `pvlf-hf[heif]`, camera
                raw without `pvlf-hf[raw]`, JPEG XL without `pillow-jxl-plugin`.
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
        gallery = cls._build(dataset, model, processor, path, images.skipped, **options)
        gallery.left_out = images.hidden
        return gallery

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
        dataset: "Dataset",
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

        Other plain columns (numbers, texts, dates, classes) are its metadata, unless `metadata` is passed.
        """
        everything, dataset = dataset, checked_dataset(dataset, image_column, id_column)
        if "metadata" not in options:
            ids = list(map(str, dataset["image_id"]))
            if len(set(ids)) == len(ids):  # else refused below
                options["metadata"] = dataset_metadata(everything, ids, (image_column, id_column))
        return cls._build(dataset, model, processor, path, **options)

    @classmethod
    def _build(cls, dataset: "Dataset", *arguments: Any, **options: Any) -> "Gallery":
        """Embed `image` of a dataset, named by `image_id`; arguments as [`build_gallery`]."""
        index, uri = options.get("index", "exact"), options.get("uri")
        made = build_gallery(dataset, *arguments, **options)
        return cls(made.table, made.embeds, made.made_by, arguments[0], made.processor, index, uri, *made[4:])

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
        processor, provenance = as_indexed(path, model, processor)
        check_encoder(path, model, processor, provenance)
        client = open_database(index, uri, provenance)
        columns = metadata_of(path)
        known: dict[str, Any] = {"gallery_id": gallery_id_of(path), "client": client, "metadata": columns}
        return cls(table, embeds, provenance, model, processor, index, uri, **known)

    def save(self, path: str | Path) -> None:
        """Write the two files of a gallery, and remove parts that an interruption left.

        Raises:
            ValueError: if the folder holds embeddings of another model.
        """
        check_encoder(Path(path), self.model, self.processor, self.made_by)
        save_gallery(Path(path), self._table, self.embeds, self.made_by, self.metadata)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> CommitInfo:
        """Upload embeddings, ids, digests and web URLs as a dataset; images, paths of files and metadata stay here.

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
                exactly, with every index.
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
        excluded = self._rows_of("exclude", exclude)
        if len(set(excluded)) == len(self):
            raise ValueError(f"exclude leaves none of the gallery's {len(self)} images; exclude fewer")
        passing = None if filter is None else torch.from_numpy(passing_rows(filter, self.metadata))
        if query is None:
            query = self.query(image, text, explain, texts=texts, ids=ids, box=box)
        elif explain or any(part is not None for part in (image, text, texts, ids, box)):
            raise ValueError("a query is encoded already: pass it without image, text and explain")
        if query.made_by != self.made_by:
            raise ValueError("the query was encoded by another model: make it with gallery.query(...)")
        scored = query.scored_by(weights, self.embeds, self._mean if query.combine else None)
        left_out = torch.tensor([*excluded, *self._rows_of("ids", query.ids)], dtype=torch.int64)

        def ranked(number: int) -> tuple[Tensor, Tensor]:
            scores, rows = nearest(self.index, self.embeds, scored, number + len(left_out), passing)
            kept = (~torch.isin(rows, left_out)).nonzero()[:number, 0]
            return scores[kept], rows[kept]

        hits = page_of(ranked, self.embeds, k, offset, check_score("min_score", min_score), check_score("fold", fold))
        return SearchResult(
            ids=[self.ids[hit.row] for hit in hits],
            scores=[hit.score for hit in hits],
            paths=[self.paths[hit.row] for hit in hits],
            query=query,
            gallery=self,
            folded={self.ids[hit.row]: [self.ids[row] for row in hit.folded] for hit in hits if hit.folded},
            settings={"filter": filter, "min_score": min_score, "fold": fold},
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
        self._rows_of("ids", [image_id for image_id, _ in terms.ids])
        encoder = QueryEncoder(self.model, self.processor, self.made_by, self._embedding_of, self.image)
        return encoder.encode(terms, explain)


__all__ = ["Gallery"]
