"""Builds a gallery: embeds images, keeps the work in a folder, and moves it to its final path at the end."""

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
from accelerate import PartialState
from torch import Tensor

from ..embeddings.embedding_store import images_made_by
from ..embeddings.encoding import image_encoder
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from .gallery_files import GalleryTable, as_indexed, gallery_id_of, new_gallery_id, read_columns, write_gallery
from .indexing import PART, DecodeOptions, IncrementalIndexer, least_side, report
from .int8_index import ImageRows, int8_place
from .metadata import gather_metadata, read_metadata
from .query import check_positive
from .replacement import locked_gallery, place_to_build, put_in_place

if TYPE_CHECKING:
    from datasets import Dataset

_FIRST_STATE = Lock()


class BuiltGallery(NamedTuple):
    """All that a [`Gallery`] is made of beside the model."""

    table: GalleryTable
    embeds: Tensor
    made_by: dict[str, str]
    processor: ComposedRetrievalProcessor
    sources: "Dataset"
    skipped: dict[str, str]
    metadata: pa.Table | None


def process_state() -> PartialState:
    """Return Accelerate's state of this process; threads that need it first at the same time would see half of it."""
    with _FIRST_STATE:
        return PartialState()


def build_gallery(
    dataset: "Dataset",
    model: ComposedRetrievalModel,
    processor: ComposedRetrievalProcessor,
    path: str | Path | None = None,
    skipped: dict[str, str] | None = None,
    batch_size: int = 64,
    progress: bool = True,
    draft: bool = False,
    replace: bool = False,
    metadata: str | Path | pa.Table | None = None,
    exif: bool = False,
    int8: bool = False,
) -> BuiltGallery:
    """Embed `image` of a dataset, named by `image_id`; `skipped` names other images that cannot be read.

    Other arguments and errors are those of [`Gallery.from_folder`].
    """
    from datasets import Image

    batch_size = check_positive("batch_size", batch_size)
    given = None if metadata is None else read_metadata(metadata)
    ids = checked_ids(dataset)
    mode = getattr(dataset.features["image"], "mode", None)
    sources = dataset.select_columns("image").cast_column("image", Image(mode=mode, decode=False))
    home, state = Path(path) if path else None, process_state()
    # Waits for another process that writes to the same folder, and then reuses its embeddings.
    with locked_gallery(home) if home and state.is_main_process else nullcontext():
        state.wait_for_everyone()
        if home:
            processor, provenance = as_indexed(home, model, processor)
        if not home or "int8" in provenance:  # a model searches what another encoder embedded, but does not add to it
            provenance = images_made_by(model, processor)
        options = DecodeOptions(mode, least_side(processor) if draft else None)
        place: Path | None
        if home and int8:
            images = ImageRows(sources, ids, options, processor)
            place, encoder, provenance = int8_place(home, model, images, provenance, replace, progress)
            encode = encoder.encoder_of(model)
        else:
            encode = image_encoder(model)
            place = home and place_to_build(home, model, processor, provenance, replace)
        indexer = IncrementalIndexer(sources, options, place, provenance)
        indexer.run(model, processor, batch_size, progress, encode)
        reasons = [indexer.bad.get(digest) for digest in indexer.digests]
        skipped = {**(skipped or {}), **{ids[row]: why for row, why in enumerate(reasons) if why is not None}}
        kept = [row for row, why in enumerate(reasons) if why is None]
        report(skipped, len(kept) + len(skipped))
        sources = sources.select(kept)
        paths = [cell["path"] if cell["bytes"] is None else None for cell in sources["image"]]
        table = GalleryTable([ids[row] for row in kept], paths, [indexer.digests[row] for row in kept])
        embeds = indexer.take(table.digest)
        kept_columns = home and read_columns(home)
        columns = gather_metadata(table.id, table.digest, sources["image"], kept_columns, given, exif, [*skipped])
        if home and place:
            save_gallery(place, table, embeds, provenance, columns)
            if place != home and state.is_main_process:
                put_in_place(home)
            state.wait_for_everyone()
    return BuiltGallery(table, embeds, provenance, processor, sources, skipped, columns)


def checked_ids(dataset: "Dataset") -> list[str]:
    """Return the ids of a dataset's images.

    Raises:
        ValueError: if one occurs twice.
    """
    ids = [str(image_id) for image_id in dataset["image_id"][:]]
    if repeated := [image_id for image_id, count in Counter(ids).items() if count > 1]:
        raise ValueError(f"gallery: image ids must be unique, repeated: {repeated[:3]}; rename or drop them")
    return ids


def checked_dataset(dataset: Any, image_column: str, id_column: str) -> "Dataset":
    """Return the columns `image` and `image_id` of a data set; errors as [`Gallery.from_dataset`]."""
    from datasets import Dataset, Image, Value

    from ..data.checks import check_columns

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
    return dataset


def save_gallery(
    folder: Path, table: GalleryTable, embeds: Tensor, provenance: dict[str, str], metadata: pa.Table | None = None
) -> None:
    """Write the two files of a gallery, and remove what an interruption left."""
    state = PartialState()
    if state.is_main_process:
        write_gallery(folder, table, embeds, provenance, gallery_id_of(folder) or new_gallery_id(), metadata)
        for part in folder.glob(f"*{PART}*"):  # half-written parts, too
            part.unlink()
    state.wait_for_everyone()


__all__ = ["BuiltGallery", "build_gallery", "checked_dataset", "checked_ids", "process_state", "save_gallery"]
