"""Training sets that do not fit one machine: writes shards of triplets, and streams them.

A shard is a Parquet or a tar file (WebDataset's layout) that holds the encoded images themselves. Streams are
`datasets.IterableDataset` with the columns of `TRIPLET_COLUMNS`, and the Trainer counts their steps (`max_steps`).

Under several processes a stream is one process's share of the rows from the start. It must not go through
`Accelerator.prepare`, which splits whatever it is given: with its defaults only the share of the first process would
be trained on. [`PVLFTrainer`] reads streams through [`triplet_batches`]; custom training loops need it too.
"""

import io
import json
import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import datasets
import fsspec
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from datasets import Dataset, Features, Image, IterableDataset, Value, load_dataset
from datasets.distributed import split_dataset_by_node
from datasets.utils import tqdm  # obeys datasets.disable_progress_bars()
from fsspec.implementations.local import LocalFileSystem
from torch.utils.data import DataLoader

from ..atomic_files import whole
from ..digests import content_digest, folder_digest, sequence_digest
from ..models.image_processing_pvlf import open_image, opened
from .checks import as_path, check_integer, check_rows, naming_the_cache, row_problem
from .triplets import TRIPLET_COLUMNS, check_triplets, triplets_digest

logger = logging.getLogger(__name__)

BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
"""Builder of `datasets` that reads shards, by their file ending."""

_FEATURES = Features(
    {"reference": Image(), "caption": Value("string"), "target": Image(), "target_id": Value("string")}
)


def write_shards(
    triplets: Dataset, folder: str | Path, rows_per_shard: int = 1000, format: Literal["parquet", "tar"] = "parquet"
) -> list[Path]:
    """Write triplets as shards with the encoded images inside, byte for byte as they are.

    An interrupted call resumes after the last finished shard.

    Args:
        triplets: with the columns of `TRIPLET_COLUMNS`; other columns are left out.
        folder: output folder, created if it does not exist.
        rows_per_shard: rows of a shard; files of a few hundred MB read well. For training there should be at least as
            many shards as processes times data loader workers.
        format: `"parquet"`, or `"tar"` with the members `{key}.reference.png`, `{key}.target.png` (so called whatever
            their encoding: readers look at the content), and `{key}.json` (`caption` and `target_id`) of each row.

    Returns:
        The files, `triplets-00000-of-00012.parquet` and so on.

    Raises:
        ValueError: if a column is missing, a caption or target id is not usable, an image cannot be read, or the
            folder holds shards of other triplets.
    """
    folder = as_path("folder", folder)
    check_triplets(triplets)
    check_integer("rows_per_shard", rows_per_shard)
    if format not in ("parquet", "tar") or rows_per_shard < 1 or not len(triplets):
        raise ValueError(
            f"cannot write {len(triplets)} triplets in {format!r} shards of {rows_per_shard}: "
            "choose 'parquet' or 'tar', and at least one row"
        )
    rows = triplets.select_columns(list(TRIPLET_COLUMNS)).with_format(None)
    for column in ("reference", "target"):
        rows = rows.cast_column(column, Image(decode=False))
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"rows": len(rows), "rows_per_shard": rows_per_shard, "format": format, "digest": triplets_digest(rows)}
    written = _claim(folder, facts)
    starts = range(0, len(rows), rows_per_shard)
    files = [folder / f"triplets-{n:05d}-of-{len(starts):05d}.{format}" for n in range(len(starts))]
    write = _write_tar if format == "tar" else _write_parquet
    for start, file in zip(tqdm(starts, desc="writing shards", unit="shard"), files, strict=True):
        part = rows.select(range(start, min(start + rows_per_shard, len(rows))))
        if file.exists() and file.name in written:
            if _digest(_embedded(part, start)) != written[file.name]:
                raise ValueError(
                    f"{file} holds other images than these triplets, which have changed since: take an empty folder, "
                    "or delete the shard"
                )
            continue
        digests: list[str] = []
        with whole(file) as partial:
            write(partial, _noting(_embedded(part, start), digests))
        written[file.name] = sequence_digest(*digests)
        _write_note(folder, facts, written)
    return files


def _claim(folder: Path, facts: dict[str, Any]) -> dict[str, str]:
    """Record the settings of a folder's shards, and return digests of the images in those that are written, by file.

    Raises:
        ValueError: if it holds shards of other triplets.
    """
    note = folder / "shards.json"
    known = json.loads(note.read_text(encoding="utf-8")) if note.exists() else dict(facts)
    written = known.pop("images", {})
    if known != facts:
        raise ValueError(f"{folder} holds shards of other triplets or another size or format: take an empty folder")
    _write_note(folder, facts, written)
    return written


def _write_note(folder: Path, facts: dict[str, Any], written: dict[str, str]) -> None:
    with whole(folder / "shards.json") as partial:
        partial.write_text(json.dumps({**facts, "images": written}), encoding="utf-8")


def _noting(rows: Iterable[tuple[int, dict[str, Any]]], digests: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield rows of [`_embedded`], and add a digest of each row's images to a list."""
    for number, row in rows:
        digests.append(sequence_digest(row["reference"], row["target"]))
        yield number, row


def _digest(rows: Iterable[tuple[int, dict[str, Any]]]) -> str:
    """Return the digest of the images of a shard's rows."""
    digests: list[str] = []
    for _ in _noting(rows, digests):
        pass
    return sequence_digest(*digests)


def _embedded(rows: Dataset, first: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and columns of each row, images as encoded bytes."""
    for number, row in enumerate(rows, first):
        try:
            images = {column: encoded_bytes(row[column]) for column in ("reference", "target")}
            for content in images.values():
                open_image(content).close()  # raises for formats that readers refuse, without decoding
            yield number, {**row, **images}
        except (OSError, ValueError) as error:
            raise ValueError(f"an image of row {number} cannot be read: {error}") from error


def encoded_bytes(image: dict[str, Any]) -> bytes:
    """Return the bytes of a cell of an `Image(decode=False)` column, or those of the file or URL that it names."""
    if image["bytes"] is not None:
        return image["bytes"]
    with fsspec.open(image["path"], "rb") as stream:
        return stream.read()


def _write_parquet(file: Path, rows: Iterable[tuple[int, dict[str, Any]]]) -> None:
    table = [{**row, "target_id": str(row["target_id"])} for _, row in rows]
    # Row groups are read at once: small ones keep the memory of a reader small.
    pq.write_table(Dataset.from_list(table, features=_FEATURES).with_format("arrow")[:], file, row_group_size=100)


def _write_tar(file: Path, rows: Iterable[tuple[int, dict[str, Any]]]) -> None:
    with tarfile.open(file, "w") as tar:
        for number, row in rows:
            text = json.dumps({"caption": row["caption"], "target_id": str(row["target_id"])})
            members = {"reference.png": row["reference"], "target.png": row["target"], "json": text.encode()}
            for ending, content in members.items():
                member = tarfile.TarInfo(f"{number:09d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def stream_triplets(shards: str | Path | list[str], shuffle_buffer: int = 1000, seed: int = 0) -> IterableDataset:
    """Stream triplets from shards on disk or anywhere that `fsspec` reaches.

    Args:
        shards: Parquet or tar files with the contents that [`write_shards`] describes: a file, a URL (`https://...`,
            for which `pip install "fsspec[http]"`, or `hf://datasets/...`), a pattern (`"shards/*.tar"`), a folder, or
            a list of these.
        shuffle_buffer: the order of the shards is shuffled, and rows within a buffer of this many encoded rows; 0
            leaves both as they are (in the first pass: later ones begin with another shard).
        seed: seed of the order, the same in every process.

    Returns:
        A stream with `TRIPLET_COLUMNS`, images decoded as they are read; this process's share, see [`own_share`].

    Raises:
        ValueError: if there is no shard; here or while reading, if a shard cannot be read, lacks a column, or has a
            row whose caption or target id is not usable.
    """
    check_integer("shuffle_buffer", shuffle_buffer)
    check_integer("seed", seed)
    files = find_shards(shards)
    _open_shard(files[0])  # a wrong column is reported now, not by a worker
    stream = IterableDataset.from_generator(_rows_of, features=_FEATURES, gen_kwargs={"shards": files})
    if shuffle_buffer:
        stream = stream.shuffle(seed=seed, buffer_size=shuffle_buffer)
    return own_share(stream)


def find_shards(shards: str | Path | list[str]) -> list[str]:
    """Return the files and URLs of the shards that a file, URL, pattern, folder or list of these names, each once.

    Raises:
        TypeError: if something is neither a path nor a URL.
        ValueError: if something names no shard, or a folder holds both Parquet and tar.
    """
    files: list[str] = []
    for name in shards if isinstance(shards, list | tuple) else [shards]:
        if not isinstance(name, str | Path):
            raise TypeError(
                f"shards: {name!r:.80} ({type(name).__name__}), but it takes paths, URLs or patterns, one or a list"
            )
        name = str(name)
        filesystem, path = fsspec.core.url_to_fs(name)
        if "*" in name:
            matches = [match for match in filesystem.glob(path) if _ending(match) in BUILDERS]
        elif _ending(name) in BUILDERS:
            # A URL is not checked: servers need not support it without sending the file.
            matches = [path] if name.startswith("http") or filesystem.isfile(path) else []
        else:
            matches = [match for ending in BUILDERS for match in filesystem.glob(f"{path.rstrip('/')}/*{ending}")]
            if len({_ending(match) for match in matches}) > 1:
                raise ValueError(f"{name} holds .parquet and .tar shards, maybe of the same rows: pass a pattern")
        if not matches:
            raise ValueError(f"no shards: {name!r} names no {' or '.join(BUILDERS)} file, folder or pattern of them")
        local = isinstance(filesystem, LocalFileSystem)
        # Old versions of fsspec put https:// before http:// too.
        full = [match if local or "://" in match else filesystem.unstrip_protocol(match) for match in matches]
        files += sorted(full)
    return list(dict.fromkeys(files))


def _ending(name: str) -> str:
    return os.path.splitext(urlparse(name).path)[1]  # noqa: PTH122  # a URL is not a path


def _rows_of(shards: list[str]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        stream, name_of = _open_shard(shard)
        try:
            # `iter` leaves it to the outer stream to split the shards among data loader workers.
            for number, batch in enumerate(stream.iter(batch_size=1)):
                row = {column: batch[member][0] for column, member in name_of.items()}
                text = row.pop("text", {})
                row |= {column: text.get(column) for column in TRIPLET_COLUMNS if column not in row}
                if lacking := [column for column, cell in row.items() if cell is None]:
                    raise ValueError(f"row {number} has no {' and no '.join(lacking)}")
                if problem := row_problem(row):
                    raise ValueError(f"row {number}: {problem}")
                for column in ("reference", "target"):
                    if row[column]["bytes"] is None:  # a file of this machine, or a URL
                        raise ValueError(f"the {column} of row {number} is a name, not the image itself")
                    open_image(row[column]["bytes"]).close()  # `datasets` would also decode formats that we refuse
                yield {**row, "target_id": str(row["target_id"])}
        except Exception as error:  # pyarrow, tarfile and networks raise many errors, none of which names the file
            raise ValueError(f"shard {shard} cannot be read to its end: {error}; write or fetch it again") from error


def _open_shard(shard: str) -> tuple[IterableDataset, dict[str, str]]:
    """Return a shard with images still encoded, and its names of the columns, `text` for a tar's JSON members."""
    try:
        stream = load_dataset(BUILDERS[_ending(shard)], data_files=shard, split="train", streaming=True)
    except Exception as error:  # see `_rows_of`
        raise ValueError(f"shard {shard} cannot be read: {error.__cause__ or error}") from error
    names, wanted = {name: name for name in stream.column_names}, [*TRIPLET_COLUMNS]
    if _ending(shard) == ".tar":
        wanted = ["reference", "target", "json"]
        names = {name.split(".")[0]: name for name in names}  # images may end in .png, .jpg ...
    if missing := [name for name in wanted if name not in names]:
        raise ValueError(f"shard {shard} has no {missing}; it has {sorted(names.values())}, see `write_shards`")
    for column in ("reference", "target"):
        stream = stream.cast_column(names[column], Image(decode=False))
    return stream, {("text" if name == "json" else name): names[name] for name in wanted}


def load_hub_triplets(
    name: str, split: str = "train", columns: dict[str, str] | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """Load triplets from a dataset of the Hub, or from a folder that `datasets.load_dataset` reads.

    Args:
        name: `"user/dataset"`, or a folder.
        split: name of the split.
        columns: the dataset's names of `reference`, `caption`, `target` or `target_id` where they differ, e.g.
            `{"reference": "source_image", "caption": "instruction"}`.
        streaming: read it during training instead of downloading it first; see [`stream_triplets`].

    Returns:
        `TRIPLET_COLUMNS`. Without a `target_id` column it is a digest of the encoded target image, so that the same
        file is the same target.

    Raises:
        OSError: if the cache of `datasets` cannot be written.
        ValueError: if a column is missing or is not of images or text, or (without `streaming`) a caption or target id
            is not usable.
    """
    name = str(as_path("name", name)) if not isinstance(name, str) else name
    if not isinstance(split, str):
        raise TypeError(f"split is {split!r:.80} ({type(split).__name__}), but it takes the name of one, e.g. 'train'")
    if not isinstance(columns or {}, dict):
        raise TypeError(f"columns is {columns!r:.80} ({type(columns).__name__}), but it takes a dict of names")
    columns = {column: column for column in TRIPLET_COLUMNS} | (columns or {})
    if unknown := sorted(columns.keys() - set(TRIPLET_COLUMNS)):
        raise ValueError(f"columns={unknown}: keys are {TRIPLET_COLUMNS}, values the names in the dataset")
    with naming_the_cache():
        # `datasets` knows what it has read of a folder by the times of its files; by content, each has its own cache.
        is_kept = Path(name).is_dir() and not streaming
        cache = Path(datasets.config.HF_DATASETS_CACHE, folder_digest(Path(name))) if is_kept else None
        dataset: Any = load_dataset(name, split=split, streaming=streaming, cache_dir=cache)
    features = dataset.features or Features()
    if columns["target_id"] == "target_id" and "target_id" not in features:
        del columns["target_id"]
    if missing := [their for their in columns.values() if their not in features]:
        raise ValueError(
            f"{name}: missing column(s) {missing}; it has {list(features)}. "
            'Say what it calls them, e.g. columns={"reference": "source_image"}'
        )
    for column, their in columns.items():
        is_right = isinstance(features[their], Image) == (column in ("reference", "target"))
        if not is_right or (column == "caption" and features[their] != Value("string")):
            kind = "images (datasets.Image)" if column in ("reference", "target") else "text"
            raise ValueError(f"{name}: column {their!r} is {features[their]}, but {column} must be {kind}")
    images = {column: features[columns[column]] for column in ("reference", "target")}
    for column, feature in images.items():  # a stream decodes what it renames
        dataset = dataset.cast_column(columns[column], Image(mode=feature.mode, decode=False))
    dataset = dataset.select_columns(list(columns.values()))
    dataset = dataset.rename_columns({their: our for our, their in columns.items() if our != their})
    if not streaming:
        check_rows(dataset, name)
    if "target_id" in columns:
        dataset = dataset.cast_column("target_id", Value("string"))
    else:
        dataset = _with_target_ids(dataset)
    for column, feature in images.items():
        dataset = dataset.cast_column(column, feature)
    return own_share(dataset) if streaming else dataset


def _with_target_ids(dataset: Any) -> Any:
    """Add digests of undecoded targets."""

    def target_id(row: dict[str, Any]) -> dict[str, str]:
        return {"target_id": content_digest([encoded_bytes(row["target"])])}

    if isinstance(dataset, IterableDataset):
        return dataset.map(target_id).cast(_FEATURES)  # with `features=`, `map` would keep images from being decoded
    # Not `map`, which would write all images once more.
    targets = tqdm(dataset.select_columns("target"), desc="naming targets", unit="image")
    return dataset.add_column("target_id", [target_id(row)["target_id"] for row in targets])


def own_share(stream: IterableDataset) -> IterableDataset:
    """Return this process's share of a stream: no row is in two processes' shares, and none is left out.

    Whole shards if their number is a multiple of the number of processes. Otherwise every process reads all shards
    and keeps each n-th row, with a warning. A stream that is a share already stays as it is.
    """
    rank, processes = _process()
    # No public function tells whether a stream is a share already; splitting it again would lose rows.
    if processes == 1 or stream._distributed is not None:
        return stream
    if rank == 0 and stream.num_shards % processes:
        logger.warning(
            "%d shards for %d processes: every process reads all of them and keeps a part of the rows; "
            "write a multiple of %d shards, so that each is read once",
            *(stream.num_shards, processes, processes),
        )
    return split_dataset_by_node(stream, rank=rank, world_size=processes)


def _process() -> tuple[int, int]:
    """Return rank and number of processes, as torchrun and `accelerate launch` set them."""
    # Not accelerate's `PartialState`: until the Trainer's arguments select the CPU, it reports one process.
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class EndlessTriplets(torch.utils.data.IterableDataset):
    """Stream that repeats without end, shuffled again in each pass.

    Shares differ in length: if passes ended, one process would start the next while another still waits for its
    targets in the last batch. And the Trainer resumes by counting batches from the very first pass.
    """

    def __init__(self, stream: IterableDataset) -> None:
        self.stream = opened(stream)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        stream = deepcopy(self.stream)  # workers would share the pass number, but each is in its own pass
        for number in count():
            stream.set_epoch(number)
            row = None
            for index, row in enumerate(stream):
                if problem := row_problem(row):
                    raise ValueError(f"row {index} of the stream in pass {number}: {problem}. Fix it or drop it.")
                yield row
            if row is None:  # more workers than shards with rows, or nothing at all
                if torch.utils.data.get_worker_info() is None:
                    raise ValueError(f"process {_process()[0]} has no row to train on: there are too few")
                return


def triplet_batches(
    stream: IterableDataset, batch_size: int, collate: Callable[[list[dict[str, Any]]], Any], **settings: Any
) -> DataLoader:
    """Return full batches of this process's share of a stream, without end; not to be prepared by Accelerate.

    Args:
        stream: with `TRIPLET_COLUMNS`, e.g. of [`stream_triplets`]; [`own_share`] of it is taken.
        batch_size: rows of a batch.
        collate: usually a [`PVLFCollator`].
        settings: further arguments of `DataLoader`, e.g. `num_workers`.
    """
    return DataLoader(EndlessTriplets(own_share(stream)), batch_size, collate_fn=collate, **settings)


__all__ = [
    "EndlessTriplets",
    "encoded_bytes",
    "find_shards",
    "load_hub_triplets",
    "own_share",
    "stream_triplets",
    "triplet_batches",
    "write_shards",
]
