"""Files of a gallery, in a folder and on the Hub: embeddings, and a table that says what each row embeds."""

from copy import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import CommitInfo, HfApi, snapshot_download
from torch import Tensor
from transformers.utils import logging

from ..atomic_files import whole
from ..embeddings.embedding_store import images_made_by, made_by, read_provenance, read_rows, write_rows
from ..embeddings.int8_encoder import int8_made_by
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from .indexing import EMBEDDINGS

logger = logging.get_logger(__name__)

TABLE = "gallery.parquet"

GALLERY_ID = b"gallery_id"
"""Key of the gallery's id in the table's metadata: a vector database recognises a gallery after its folder moved."""

WEB = ("http://", "https://")


class GalleryTable(NamedTuple):
    """Columns of `gallery.parquet`: id, path and digest of each embedded image."""

    id: list[str]
    path: list[str | None]
    digest: list[str]


def is_gallery(folder: Path) -> bool:
    """Return whether a folder holds the files of a gallery."""
    return (folder / TABLE).is_file()


def as_indexed(
    folder: Path, model: ComposedRetrievalModel, processor: ComposedRetrievalProcessor
) -> tuple[ComposedRetrievalProcessor, dict[str, str]]:
    """Return a processor that pads images as those that a folder holds were padded, and the provenance by it.

    Methods pad images, or do not, as their authors did. One index of their image encoder serves all of them, so its
    padding is that of their queries, too: an image finds itself, by its file as by its id.

    Args:
        folder: of a gallery, or of one that is to be.
        model: the model.
        processor: of the model; returned as it is where the padding is the same, or more than that differs.
    """
    return prepared_as(kept_provenance(folder), str(folder), model, processor)


def prepared_as(
    kept: dict[str, str] | None, where: str, model: ComposedRetrievalModel, processor: ComposedRetrievalProcessor
) -> tuple[ComposedRetrievalProcessor, dict[str, str]]:
    """Return what [`as_indexed`] does, for images of the provenance `kept` that are `where` the warning says."""
    provenance, images = _searching(kept, images_made_by(model, processor)), processor.image_processor
    if kept in (None, provenance) or not hasattr(images, "do_target_pad"):
        return processor, provenance
    other = copy(processor)
    other.image_processor = copy(images)
    other.image_processor.do_target_pad = not images.do_target_pad
    if kept != (by_other := _searching(kept, images_made_by(model, other))):
        return processor, provenance
    padded = other.image_processor.do_target_pad
    logger.warning(
        f"the images of {where} were {'' if padded else 'not '}padded towards a square, and this model "
        f"{'does not pad' if padded else 'pads'} them: its queries are prepared as the images of the index were. To "
        "search images prepared by the model's own processor, index them into another folder"
    )
    return other, by_other


def _searching(kept: dict[str, str] | None, provenance: dict[str, str]) -> dict[str, str]:
    """Return the provenance of embeddings in int8 by the encoder of the kept ones, where that was made of this model.

    Its queries, unquantised, search them.
    """
    if kept is None or "int8" not in kept or provenance["dtype"] != "float32":
        return provenance
    quantised = int8_made_by(provenance, kept["int8"])
    return quantised if quantised == kept else provenance


def check_encoder(
    folder: Path,
    model: ComposedRetrievalModel,
    processor: ComposedRetrievalProcessor,
    provenance: dict[str, str] | None = None,
) -> dict[str, str]:
    """Check that what a folder holds was embedded by the image encoder of a model, and return its provenance.

    Args:
        folder: of a gallery, or of one that is to be.
        model: any model on the image encoder, projection and preprocessing that made the embeddings.
        processor: of the model.
        provenance: of the model ([`images_made_by`]), where it is known.

    Raises:
        ValueError: if another image encoder or preprocessing made them, or the model has another dtype.
    """
    provenance = provenance or images_made_by(model, processor)
    others = [kept for kept in read_provenance(folder).values() if kept != provenance]
    if any("covers" not in kept for kept in others):  # version 0.1 wrote the fingerprint of the whole model
        whole = made_by(model, processor)
        others = [kept for kept in others if kept != whole]
    if not others:
        return provenance
    kept, now = others[0]["dtype"], provenance["dtype"]
    same = f", or of it in {kept} (it is in {now} now: try --dtype {kept})" if kept != now else ""
    early = (
        "; an index of version 0.1 is opened to all models on its image encoder by `pvlf-hf index` with the model "
        "that made it, which encodes nothing again"
    )
    raise ValueError(
        f"{folder} holds embeddings of another model or processor{same}, which must not be mixed: its image encoder, "
        "projection or preprocessing is another, and what composes the queries makes no difference. Index the images "
        f"again by `pvlf-hf index PHOTOS --model NEW --path {folder}`, which builds the new index beside this one "
        "while it serves and then replaces it (replace=True in Python), or choose another folder"
        f"{'' if 'covers' in others[0] else early}"
    )


def kept_provenance(folder: Path) -> dict[str, str] | None:
    """Return the provenance of the embeddings of a gallery, None where there is none yet."""
    return next(iter(read_provenance(folder).values()), None)


def write_gallery(
    folder: Path,
    table: GalleryTable,
    embeds: Tensor,
    provenance: dict[str, str],
    gallery_id: str | None = None,
    metadata: pa.Table | None = None,
) -> None:
    """Write embeddings and table, with the columns of metadata beside its own, each file atomically."""
    write_rows(folder / EMBEDDINGS, [(digest,) for digest in table.digest], embeds, provenance)
    columns = {name: pa.array(values, pa.string()) for name, values in table._asdict().items()}
    columns |= {name: metadata[name] for name in metadata.column_names} if metadata is not None else {}
    kept = {GALLERY_ID: gallery_id} if gallery_id else None
    with whole(folder / TABLE) as partial:
        pq.write_table(pa.table(columns).replace_schema_metadata(kept), partial)


def read_gallery(folder: Path) -> tuple[GalleryTable, Tensor]:
    """Read table and embeddings; these stay on disk until they are used.

    Raises:
        ValueError: if a file is missing, or the two do not belong together.
    """
    if missing := [name for name in (EMBEDDINGS, TABLE) if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {missing}: make it with Gallery.from_folder(..., path={str(folder)!r})")
    table = GalleryTable(**_read(folder / TABLE, [*GalleryTable._fields]).to_pydict())
    keys, embeds = read_rows(folder / EMBEDDINGS)
    if [digest for (digest,) in keys] != table.digest:
        raise ValueError(
            f"{folder}: {EMBEDDINGS} and {TABLE} were not written together: build the gallery again with this path; "
            "images that are embedded are not encoded again"
        )
    return table, embeds


def read_columns(folder: Path) -> pa.Table | None:
    """Read the table of a gallery with its columns of metadata, None where there is no gallery."""
    return _read(folder / TABLE) if is_gallery(folder) else None


def _read(file: Path, columns: list[str] | None = None) -> pa.Table:
    with pq.ParquetFile(file) as opened:  # pq.read_table imports pandas, for which a search would wait
        return opened.read(columns)


def gallery_id_of(folder: Path) -> str | None:
    """Return the id of the gallery kept in a folder, None if there is none."""
    if not is_gallery(folder):
        return None
    gallery_id = (pq.read_schema(folder / TABLE).metadata or {}).get(GALLERY_ID)
    return gallery_id.decode() if gallery_id else None


def store_name_of(folder: Path) -> str | None:
    """Return the name that a gallery's store in a database has by default; None for a folder without an id."""
    gallery_id = gallery_id_of(folder)
    return f"gallery_{gallery_id}" if gallery_id else None


def new_gallery_id() -> str:
    """Return an id for a gallery that has none yet."""
    return uuid4().hex


def upload_gallery(
    repo_id: str,
    table: GalleryTable,
    embeds: Tensor,
    provenance: dict[str, str],
    private: bool | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Upload embeddings and table as a dataset, paths of files left out."""
    table = table._replace(path=[path if path and path.startswith(WEB) else None for path in table.path])
    with TemporaryDirectory() as folder:
        write_gallery(Path(folder), table, embeds, provenance)
        api = HfApi(token=token)
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        message = f"Gallery of {len(table.id)} images"
        return api.upload_folder(repo_id=repo_id, folder_path=folder, repo_type="dataset", commit_message=message)


def download_gallery(repo_id: str, revision: str | None = None, token: str | None = None) -> Path:
    """Download what [`upload_gallery`] uploaded, and return the folder.

    Raises:
        ValueError: if it names local files, which a downloaded gallery must not open.
    """
    files: dict[str, Any] = {"allow_patterns": [EMBEDDINGS, TABLE]}
    folder = Path(snapshot_download(repo_id, repo_type="dataset", revision=revision, token=token, **files))
    paths = _read(folder / TABLE, ["path"])["path"].to_pylist() if is_gallery(folder) else []
    if local := [path for path in paths if path and not path.startswith(WEB)]:
        raise ValueError(
            f"{repo_id} names {len(local)} files of this machine, first: {local[:3]}; a gallery on the Hub has "
            "URLs or none, as push_to_hub leaves them"
        )
    return folder


__all__ = [
    "GalleryTable",
    "check_encoder",
    "download_gallery",
    "gallery_id_of",
    "is_gallery",
    "kept_provenance",
    "prepared_as",
    "read_columns",
    "read_gallery",
    "store_name_of",
    "upload_gallery",
]
