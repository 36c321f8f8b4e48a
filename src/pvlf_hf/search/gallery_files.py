"""Files of a gallery, in a folder and on the Hub: embeddings, and a table that says what each row embeds."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import CommitInfo, HfApi, snapshot_download
from torch import Tensor

from ..atomic_files import whole
from ..embeddings.embedding_store import read_rows, write_rows
from .indexing import EMBEDDINGS

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


def write_gallery(
    folder: Path, table: GalleryTable, embeds: Tensor, made_by: dict[str, str], gallery_id: str | None = None
) -> None:
    """Write embeddings and table, each file atomically."""
    write_rows(folder / EMBEDDINGS, [(digest,) for digest in table.digest], embeds, made_by)
    columns = {name: pa.array(values, pa.string()) for name, values in table._asdict().items()}
    metadata = {GALLERY_ID: gallery_id} if gallery_id else None
    with whole(folder / TABLE) as partial:
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), partial)


def read_gallery(folder: Path) -> tuple[GalleryTable, Tensor]:
    """Read table and embeddings; these stay on disk until they are used.

    Raises:
        ValueError: if a file is missing, or the two do not belong together.
    """
    if missing := [name for name in (EMBEDDINGS, TABLE) if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {missing}: make it with Gallery.from_folder(..., path={str(folder)!r})")
    table = GalleryTable(**pq.read_table(folder / TABLE, columns=[*GalleryTable._fields]).to_pydict())
    keys, embeds = read_rows(folder / EMBEDDINGS)
    if [digest for (digest,) in keys] != table.digest:
        raise ValueError(
            f"{folder}: {EMBEDDINGS} and {TABLE} were not written together: build the gallery again with this path; "
            "images that are embedded are not encoded again"
        )
    return table, embeds


def gallery_id_of(folder: Path) -> str | None:
    """Return the id of the gallery kept in a folder, None if there is none."""
    if not is_gallery(folder):
        return None
    gallery_id = (pq.read_schema(folder / TABLE).metadata or {}).get(GALLERY_ID)
    return gallery_id.decode() if gallery_id else None


def new_gallery_id() -> str:
    """Return an id for a gallery that has none yet."""
    return uuid4().hex


def upload_gallery(
    repo_id: str,
    table: GalleryTable,
    embeds: Tensor,
    made_by: dict[str, str],
    private: bool | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Upload embeddings and table as a dataset, paths of files left out."""
    table = table._replace(path=[path if path and path.startswith(WEB) else None for path in table.path])
    with TemporaryDirectory() as folder:
        write_gallery(Path(folder), table, embeds, made_by)
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
    paths = pq.read_table(folder / TABLE, columns=["path"])["path"].to_pylist() if is_gallery(folder) else []
    if local := [path for path in paths if path and not path.startswith(WEB)]:
        raise ValueError(
            f"{repo_id} names {len(local)} files of this machine, first: {local[:3]}; a gallery on the Hub has "
            "URLs or none, as push_to_hub leaves them"
        )
    return folder


__all__ = ["GalleryTable", "download_gallery", "gallery_id_of", "is_gallery", "read_gallery", "upload_gallery"]
