"""Fills a Milvus store by bulk import: files in the object storage of a cluster, which its servers read themselves.

An import adds rows and replaces none. Images whose id the store has already are therefore written by upserts, and only
new ones are imported: at no time does the store lack an image that it had. Jobs that an interrupted run has left are
waited for before images are compared with the store, and then the files that it has left are deleted. One process at a
time imports into a store.

Milvus Lite has no such import; [`fill_store`] writes to it by upserts. The files are those of `pymilvus.bulk_writer`
and are tested up to that boundary: read back, and their import requested over HTTP. A cluster was not at hand.

Example:
    ```python
    images = from_shards("s3://bucket/photos")
    store = create_store(StoreAddress(uri, "photos"), images.width, images.columns, images.made_by)
    import_into(store, images.batches(), bucket="s3://milvus-bucket/imports", url=uri, api_key="user:password")
    ```
"""

import logging
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from transformers.utils import logging as transformers_logging

from ...atomic_files import cannot_write
from ..locations import files_of, open_location
from .filling import Batches, Filled, fill_store
from .store import MilvusStore

logger = transformers_logging.get_logger(__name__)

FILE_BYTES = 128 * 2**20
"""Bytes of a file, before it is compressed (our choice, as pymilvus's)."""

MOST_FILES = 1000
"""Files of a job (our choice); Milvus takes 1,024."""

POLL = 1.0
"""Seconds between two looks at a job (our choice)."""


JOBS = 1000
"""Most jobs that a cluster is asked to list (our choice)."""

ENDED = ("Completed", "Failed")
"""States of a job that does nothing any more."""


def import_into(store: MilvusStore, batches: Batches, remove_others: bool = False, **options: Any) -> Filled:
    """Bring a store on a cluster in line with images by bulk import; errors as [`fill_store`] and [`BulkImport`].

    Args:
        store: to fill.
        batches: as in [`fill_store`]; of shards `from_shards(location).batches()`.
        remove_others: remove the images that no batch has.
        **options: of [`BulkImport`].
    """
    importer = BulkImport(store, **options)
    importer.wait_for_jobs()
    return fill_store(store, batches, remove_others, importer.write, importer.finish)


class BulkImport:
    """Writer of files that Milvus imports.

    Args:
        store: to fill, on a cluster.
        bucket: fsspec URL of a folder in the bucket that Milvus stores its own files in (`s3://a-bucket/imports`).
        url: of the cluster's HTTP interface, `http://host:19530`.
        api_key: login, `user:password` or a token.
        file_bytes: bytes of a file.
        timeout: seconds in which a job has to get on.

    Raises:
        ImportError: if the bulk writer is not installed.
        ValueError: if the store is a file, or the bucket cannot be opened.
    """

    def __init__(
        self,
        store: MilvusStore,
        bucket: str,
        url: str,
        api_key: str = "",
        file_bytes: int = FILE_BYTES,
        timeout: float = 600,
    ) -> None:
        try:
            import pymilvus.bulk_writer  # noqa: F401
        except ImportError as error:
            raise ImportError('bulk import needs its writer: pip install "pymilvus[bulk_writer]"') from error
        if store.database.is_file:
            raise ValueError(
                f"{store.database.name} is a file of Milvus Lite, which imports no files: fill it by fill_store"
            )
        self.store, self.bucket, self.url, self.api_key = store, bucket.rstrip("/"), url.rstrip("/"), api_key
        self.file_bytes, self.timeout = file_bytes, timeout
        self.files, root = open_location(self.bucket)
        self.root = f"{root}/{self._database or 'default'}.{store.name}"  # a folder of the store's own
        self._waiting: list[pa.Table] = []
        self._uploaded: list[str] = []

    def wait_for_jobs(self) -> None:
        """Wait for the jobs of this store that earlier runs requested; delete the files that these runs have left.

        Raises:
            OSError: if a job does not get on.
            ValueError: if the bucket refuses to list or delete files.
        """
        from pymilvus.bulk_writer import list_import_jobs

        with self.store.database.doing(f"list the import jobs of {self.store.name}"):
            found = list_import_jobs(collection_name=self.store.name, page_size=JOBS, **self._login)
        for job in found.json()["data"].get("records") or []:
            if job["state"] not in ENDED:
                logger.warning(f"waiting for the import job {job['jobId']}, which an earlier run requested")
                self._wait_for(job["jobId"])
        left = [f"{self.root}/{name}" for name in files_of(self.folder, "*.parquet")]
        if left:
            logger.warning(f"deleting {len(left)} files in {self.folder}, which an earlier run has left")
            self._delete(left)

    def write(self, table: pa.Table) -> None:
        """Take rows: upsert those whose id the store has, and upload a file of the others when there are enough."""
        known = self.store.look_up(table["id"].to_pylist())["id"]
        replaced = pc.is_in(table["id"], known.combine_chunks())
        self.store.write(table.filter(replaced))
        self._waiting.append(table.filter(pc.invert(replaced)))
        if sum(part.nbytes for part in self._waiting) >= self.file_bytes:
            self._upload()
        if len(self._uploaded) == MOST_FILES:
            self._import()

    def finish(self) -> None:
        """Import what is left.

        Raises:
            OSError: if a file cannot be written, or the job does not get on.
            ValueError: if Milvus refuses a file.
        """
        if sum(map(len, self._waiting)):
            self._upload()
        if self._uploaded:
            self._import()

    def _upload(self) -> None:
        name = f"{uuid4().hex}.parquet"
        with TemporaryDirectory() as folder:
            file = write_import_file(self.store, pa.concat_tables(self._waiting).combine_chunks(), Path(folder))
            try:
                self.files.makedirs(self.root, exist_ok=True)
                self.files.put_file(str(file), f"{self.root}/{name}")
            except Exception as error:  # each kind of store raises its own
                raise cannot_write(f"{name} in {self.folder}", error) from error
        self._waiting = []
        self._uploaded.append(f"{self.root}/{name}")

    def _import(self) -> None:
        """Have the cluster import what was uploaded, wait for it, and delete the files."""
        from pymilvus.bulk_writer import bulk_import

        # Milvus names files by their path in the bucket.
        in_place = isinstance(self.files, LocalFileSystem)
        keys = [[file if in_place else file.lstrip("/").partition("/")[2]] for file in self._uploaded]
        with self.store.database.doing(f"import files of {self.bucket}"):
            answer = bulk_import(collection_name=self.store.name, files=keys, **self._login)
        job = answer.json()["data"]["jobId"]
        state = self._wait_for(job)
        self._delete(self._uploaded)
        self._uploaded = []
        if state["state"] == "Failed":
            raise ValueError(
                f"Milvus cannot import files of {self.bucket} (job {job}: {state.get('reason')}): remove what it "
                "names, and fill again; what is imported is not imported again"
            )

    def _wait_for(self, job: str) -> dict[str, Any]:
        """Return the last state of a job, completed or failed; raise an `OSError` where it does not get on."""
        from pymilvus.bulk_writer import get_import_progress

        end = time.monotonic() + self.timeout
        state: dict[str, Any] = {}
        while True:
            before = state
            with self.store.database.doing(f"say how far the import {job} is"):
                state = get_import_progress(job_id=job, **self._login).json()["data"]
            if state["state"] in ENDED:
                return state
            if state != before:
                end = time.monotonic() + self.timeout
            elif time.monotonic() > end:
                raise ConnectionError(
                    f"the import of files of {self.bucket} (job {job}) has not got on for {self.timeout:g} s: look at "
                    "the cluster's data nodes, and fill again; what is imported is not imported again"
                )
            time.sleep(POLL)

    def _delete(self, files: list[str]) -> None:
        for file in files:
            try:
                self.files.rm_file(file)
            except Exception as error:  # each kind of store raises its own
                raise ValueError(
                    f"{file} cannot be deleted ({error}): give the login the right to, and delete it by hand once no "
                    "import runs"
                ) from error

    @property
    def folder(self) -> str:
        """URL of the folder that holds this store's files until they are imported."""
        return f"{self.bucket}/{self.root.rpartition('/')[2]}"

    @property
    def _database(self) -> str:
        return urlsplit(self.store.database.uri).path.strip("/")

    @property
    def _login(self) -> dict[str, str]:
        return {"url": self.url, "api_key": self.api_key, "db_name": self._database}


def write_import_file(store: MilvusStore, table: pa.Table, folder: Path) -> Path:
    """Write rows as a file that Milvus imports into a store.

    Raises:
        OSError: if not all rows are in the file: pymilvus's writer reports no error of its own.
    """
    from pymilvus.bulk_writer import BulkFileType, LocalBulkWriter

    logging.getLogger("pymilvus.bulk_writer").setLevel(logging.WARNING)
    writer = LocalBulkWriter(store.schema.milvus(store.client), str(folder), 2**40, BulkFileType.PARQUET)
    for row in store.schema.rows(table):
        writer.append_row(row)
    writer.commit()
    files = [Path(file) for batch in writer.batch_files for file in batch]
    written = sum(pq.read_metadata(file).num_rows for file in files)
    if len(files) != 1 or written != len(table):
        raise cannot_write(f"{len(table)} rows in {folder}", OSError(f"{written} are there"))
    return files[0]


__all__ = ["BulkImport", "import_into", "write_import_file"]
