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
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from huggingface_hub import CommitInfo
from transformers.utils import logging

from ..digests import sequence_digest
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from .building import build_gallery, checked_dataset, checked_ids, process_state, save_gallery
from .gallery_files import (
    as_indexed,
    check_encoder,
    download_gallery,
    read_gallery,
    store_name_of,
    upload_gallery,
)
from .image_folder import find_images
from .indexed_images import IndexedImages
from .indexing import as_dataset
from .metadata import dataset_metadata, metadata_of
from .milvus.connection import MilvusDatabase
from .milvus.filling import from_table
from .milvus.gallery import MilvusGallery
from .milvus.store import MilvusOptions, StoreAddress
from .replacement import finish_replacement
from .vector_index import Copy, IndexName, check_copy, check_index

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
                `"exact"` (default), `"faiss"` (approximate; its graph is kept in `path`) or `"milvus"`, which makes a
                [`MilvusGallery`] with its `uri` (a file ending in .db, or a cluster's URL), `name` (of the gallery in
                that database; by default one made from the folder, or from the ids) and `options`
                ([`MilvusOptions`]). Without `path` images are encoded into the store; with it they are kept there,
                too; `vectors`, that of [`~Gallery.load`]; `int8` (False), encode in int8 by OpenVINO, calibrated on
                these images, for which the model is in float32 and `path` keeps the encoder (`int8_index.py`):
                repeated calls and images that are added use the same.

        Raises:
            ImportError: if OpenVINO or NNCF is not installed, with `int8`.
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
        if options.get("index") == "milvus" and path is None:
            options.setdefault("name", f"folder_{sequence_digest(str(folder.absolute()))[:16]}")
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
    def _build(
        cls,
        dataset: "Dataset",
        model: ComposedRetrievalModel,
        processor: ComposedRetrievalProcessor,
        path: str | Path | None = None,
        skipped: dict[str, str] | None = None,
        index: IndexName = "exact",
        uri: str | None = None,
        name: str | None = None,
        options: MilvusOptions | None = None,
        vectors: Copy | None = None,
        **further: Any,
    ) -> Any:
        """Embed `image` of a dataset, named by `image_id`; other arguments as [`build_gallery`]."""
        _check_place(index, uri, name, options)
        check_copy(vectors, index)
        if further.get("int8") and path is None:
            raise ValueError("int8=True: pass path, a folder that keeps the calibrated encoder with the embeddings")
        ids, is_main = checked_ids(dataset), process_state().is_main_process
        if index == "milvus" and path is None and process_state().num_processes == 1:
            further.pop("int8", None)
            if further.pop("replace", False):
                raise ValueError(
                    "replace=True replaces the gallery of a folder: without path, index under another name, search "
                    "that one, and drop the old collection"
                )
            address = _address(uri, name, options, None, ids)
            return MilvusGallery.of_dataset(dataset, address, model, processor, skipped, **further)
        if index == "milvus" and is_main:
            MilvusDatabase(str(uri)).close()  # fails before any image is encoded
        made = build_gallery(dataset, model, processor, path, skipped, **further)
        if index != "milvus" or not is_main:  # the main process searches
            kind: Any = "exact" if index == "milvus" else index
            home = None if path is None else Path(path)
            return cls(made.table, made.embeds, made.made_by, model, made.processor, kind, *made[4:], home, vectors)
        images, address = from_table(*made[:2], made.metadata, made.made_by), _address(uri, name, options, path, ids)
        progress = further.get("progress", True)
        gallery = MilvusGallery.of_embedded(images, address, model, made.processor, progress)
        gallery.skipped = made.skipped
        return gallery

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: ComposedRetrievalModel,
        processor: ComposedRetrievalProcessor,
        index: IndexName = "exact",
        uri: str | None = None,
        name: str | None = None,
        options: MilvusOptions | None = None,
        vectors: Copy | None = None,
    ) -> Any:
        """Load a saved gallery; embeddings stay on disk until they are used.

        The exact index compares queries with a copy in memory, and ranks the embeddings on disk of all images that the
        copy's rounding could hide: `vectors` (`"float32"`, `"float16"`, `"bfloat16"` or `"int8"`, 4, 2, 2 or 1 bytes a
        number) changes memory and time, and no result. By default it is the fastest that takes 2 bytes or more.

        With `index="milvus"` the store of that `name` in the database `uri` is brought in line with the gallery, and
        returned ([`MilvusGallery`]): images that others have added to the store are removed from it.
        [`~Gallery.from_milvus`] opens a store as it is.

        Raises:
            ValueError: if there is no gallery in the folder, its two files do not belong together, another model made
                it, or the index is unknown or cannot be opened.
        """
        path = Path(path)
        _check_place(index, uri, name, options)
        check_copy(vectors, index)
        finish_replacement(path)
        table, embeds = read_gallery(path)
        processor, provenance = as_indexed(path, model, processor)
        check_encoder(path, model, processor, provenance)
        columns = metadata_of(path)
        if index == "milvus":
            images = from_table(table, embeds, columns, provenance)
            return MilvusGallery.of_embedded(images, _address(uri, name, options, path, table.id), model, processor)
        further: dict[str, Any] = {"metadata": columns, "folder": path, "vectors": vectors}
        return cls(table, embeds, provenance, model, processor, index, **further)

    @classmethod
    def from_milvus(
        cls,
        uri: str,
        name: str,
        model: ComposedRetrievalModel,
        processor: ComposedRetrievalProcessor,
        options: MilvusOptions | None = None,
    ) -> MilvusGallery:
        """Open a gallery that lives in Milvus, without a folder.

        Args:
            uri: a file ending in .db, or a server's URL.
            name: of the gallery in that database.
            model: embeds queries; any model on the image encoder that made the embeddings.
            processor: the model's processor.
            options: of the store.

        Raises:
            ValueError: if there is none, another model made it, or the database cannot be opened.
        """
        return MilvusGallery.open(StoreAddress(uri, name, options or MilvusOptions()), model, processor)

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
        vectors: Copy | None = None,
    ) -> "Gallery":
        """Load what [`~Gallery.push_to_hub`] uploaded; arguments and errors as [`~Gallery.load`].

        Raises:
            ValueError: if it names local files, which a downloaded gallery must not open. Web URLs are accepted; they
                are fetched when their images are opened.
        """
        folder = download_gallery(repo_id, revision, token)
        return cls.load(folder, model, processor, index, uri, vectors=vectors)


def _address(
    uri: str | None, name: str | None, options: MilvusOptions | None, path: str | Path | None, ids: Sequence[str]
) -> StoreAddress:
    """Return the address of a gallery's store; without a name it is the id that the folder keeps, or made from ids."""
    own = store_name_of(Path(path)) if path else None
    name = name or own or f"images_{sequence_digest(*sorted(ids))[:16]}"
    return StoreAddress(str(uri), name, options or MilvusOptions())


def _check_place(index: str, uri: str | None, name: str | None, options: MilvusOptions | None) -> None:
    check_index(index, uri, milvus=True)
    if index != "milvus" and (name is not None or options is not None):
        raise ValueError("name and options are those of a store in Milvus: pass index='milvus' and its uri with them")


__all__ = ["Gallery"]
