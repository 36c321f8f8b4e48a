"""Training triplets: a user's own, and how rows become batches.

Triplets are a `datasets.Dataset` with the columns of `TRIPLET_COLUMNS`; every training set of this package, and a
user's own folder of images, is brought to this shape.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, concatenate_datasets, load_dataset
from datasets.utils import tqdm  # obeys datasets.disable_progress_bars()
from torch import Tensor
from torch.utils.data import Sampler
from transformers import ProcessorMixin

from .benchmark import CIRBenchmark, Protocol, check_columns
from .image_processing_pvlf import open_rgb

TRIPLET_COLUMNS = ("reference", "caption", "target", "target_id")
"""`reference` and `target`: `datasets.Image`; `caption`: the relative caption; `target_id`: str, equal for targets
that are the same thing, so that they are never each other's negatives."""


def load_triplets(
    file: str | Path, image_folder: str | Path, check_images: bool = True, allow_links: bool = False
) -> Dataset:
    """Loads a user's own triplets: a table beside a folder of images.

    Args:
        file: CSV, JSON Lines or Parquet with columns `reference`, `caption`, `target` (file names inside
            `image_folder`), and optionally `target_id`, equal for targets that must not be each other's negatives (by
            default the target's file name).
        image_folder: where the images are.
        check_images: open every image once, so that a broken one is named now and not hours into training.
        allow_links: follow links that lead out of `image_folder`. Those of the Hub's cache are always followed.

    Returns:
        A dataset with `TRIPLET_COLUMNS`, `reference_id` and `target_image_id` (the file names), images decoded lazily.

    Raises:
        ValueError: if the file type or a column is wrong, a cell is empty, a file name or a link leaves the
            folder, or images are missing or broken; nothing is dropped silently.
    """
    file, image_folder = Path(file), Path(image_folder).resolve()
    cells = read_triplet_table(file)
    for column, values in cells.items():
        if empty := [row for row, cell in enumerate(values) if not cell.strip()]:
            raise ValueError(
                f"{file}: {column} is empty in {len(empty)} rows, first in data rows {empty[:3]} (counted from 0)"
            )
    references, targets = cells["reference"], cells["target"]
    check_image_files(image_folder, sorted({*references, *targets}), check_images, allow_links)
    columns = {
        "reference": [str(image_folder / name) for name in references],
        "reference_id": references,
        "caption": cells["caption"],
        "target": [str(image_folder / name) for name in targets],
        "target_id": cells.get("target_id", targets),
        "target_image_id": targets,
    }
    return Dataset.from_dict(columns).cast_column("reference", Image()).cast_column("target", Image())


def read_triplet_table(file: Path) -> dict[str, list[str]]:
    """Reads the cells of a table of triplets as they are, blank ones too.

    Args:
        file: see [`load_triplets`].

    Returns:
        The columns `reference`, `caption`, `target` and, if there, `target_id`; what is no text is turned into it.

    Raises:
        ValueError: if the file cannot be read or lacks a column.
    """
    readers = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    if file.suffix not in readers:
        raise ValueError(f"{file}: cannot read {file.suffix or 'a file without ending'}; use one of {list(readers)}")
    if not file.is_file():
        raise ValueError(f"{file}: no such file; it should list reference, caption and target of each triplet")
    # Left alone, pandas reads names made of digits as numbers, and the caption "None" as no caption.
    as_text = {"converters": dict.fromkeys(TRIPLET_COLUMNS, str), "keep_default_na": False, "index_col": False}
    options = as_text if file.suffix == ".csv" else {}
    try:
        table = load_dataset(readers[file.suffix], data_files=str(file), split="train", **options)
    except Exception as error:  # the readers wrap whatever they meet in an error that does not say what
        reason = error.__cause__ or error
        raise ValueError(
            f"{file}: cannot be read ({reason}). It must be UTF-8, have a header and at least one row, and captions "
            "with commas must be quoted."
        ) from error
    check_columns(table, ("reference", "caption", "target"), str(file))
    if pictures := [name for name in TRIPLET_COLUMNS if isinstance(table.features.get(name), Image)]:
        raise ValueError(f"{file}: {pictures} hold images, not file names: pass its folder to load_hub_triplets")
    return {
        column: ["" if cell is None else str(cell) for cell in table[column]]
        for column in TRIPLET_COLUMNS
        if column in table.column_names
    }


def benchmark_from_triplets(name: str, triplets: Dataset) -> CIRBenchmark:
    """A benchmark whose gallery is every picture that occurs in the triplets, references included.

    Args:
        name: names the benchmark in results.
        triplets: as [`load_triplets`] returns them.
    """
    check_columns(triplets, (*TRIPLET_COLUMNS, "reference_id", "target_image_id"), name)
    ids = [*triplets["reference_id"], *triplets["target_image_id"]]
    first_row = {image_id: row for row, image_id in reversed(list(enumerate(ids)))}
    pictures = concatenate_datasets(
        [triplets.select_columns(c).rename_column(c, "image") for c in ("reference", "target")]
    )
    gallery = pictures.select(first_row.values()).add_column("image_id", list(first_row))
    queries = triplets.select_columns(["reference", "reference_id", "caption", "target_image_id"])
    return CIRBenchmark(
        name=name,
        queries=queries.rename_column("target_image_id", "target_id"),
        gallery=gallery,
        protocol=Protocol(name="own", gallery="every picture of the triplets"),
    )


def check_image_files(folder: Path, names: list[str], open_them: bool = True, allow_links: bool = False) -> None:
    """Raises a `ValueError` that lists images outside the folder, missing, or (with `open_them`) broken."""
    if outside := [name for name in names if leaves(folder, name)]:
        raise ValueError(f"{len(outside)} image names leave {folder}, first: {outside[:3]}")
    if not allow_links:
        check_links(folder, names)
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} images are not in {folder}, first: {missing[:3]}. "
            "Names must be given with their ending, relative to the image folder."
        )
    broken = []
    for name in tqdm(names, desc="checking images", unit="image", disable=not open_them):
        if open_them and (reason := unreadable(folder / name)):
            broken.append(f"{name} ({reason})")
    if broken:
        raise ValueError(f"{len(broken)} images cannot be read, first: {broken[:3]}. Replace them or drop their rows.")


def leaves(folder: Path, name: str) -> bool:
    """Whether a file name leads out of the folder by `..` or as an absolute path."""
    folder = folder.absolute()
    return not Path(os.path.normpath(folder / name)).is_relative_to(os.path.normpath(folder))


def check_links(folder: Path, names: Iterable[str]) -> None:
    """Raises a `ValueError` that lists names that are, or lie behind, links out of the folder."""
    folder = folder.resolve()
    # A snapshot in the Hub's cache is made of links to the blobs beside it.
    snapshots = [place for place in (folder, *folder.parents) if place.parent.name == "snapshots"]
    within = [folder, *(place.parent.parent / "blobs" for place in snapshots)]
    outside = [name for name in names if not any(map((folder / name).resolve().is_relative_to, within))]
    if outside:
        raise ValueError(
            f"{len(outside)} names in {folder} are links that lead out of it, first: {outside[:3]}; pass "
            "allow_links=True if you know where they lead"
        )


def files_below(folder: Path, allow_links: bool) -> list[Path]:
    """Whatever is in a folder and its subfolders and is no folder, sorted.

    Args:
        folder: where.
        allow_links: follow links out of it, into other folders too.

    Raises:
        ValueError: without `allow_links`, if a link leads out of the folder.
    """
    files, links, seen = [], [], {os.path.realpath(folder)}
    for place, below, names in os.walk(folder, followlinks=allow_links):
        files += [Path(place, name) for name in names]
        links += [path for path in (Path(place, name) for name in (*below, *names)) if path.is_symlink()]
        real = {name: os.path.realpath(Path(place, name)) for name in below}
        below[:] = [name for name in below if real[name] not in seen]  # a link may lead back
        seen.update(real.values())
    if not allow_links:
        check_links(folder, [str(link.relative_to(folder)) for link in links])
    return sorted(files)


def unreadable(file: Path) -> str | None:
    """Why the image processor cannot decode the file, or None if it can."""
    try:
        open_rgb(file)
    except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged files
        return str(error) or type(error).__name__
    return None


class OneValueBatchSampler(Sampler[int]):
    """Row numbers in random order, in blocks that agree in a column; give it a column whose values are frequent.

    Args:
        values: the column.
        batch_size: rows of a block. Rows that do not fill one are left out of the epoch, others in each.
        seed: of the order, together with the epoch.

    Raises:
        ValueError: if no value has enough rows for a batch.
    """

    def __init__(self, values: Sequence[Hashable], batch_size: int, seed: int) -> None:
        self.rows_of: dict[Hashable, list[int]] = defaultdict(list)
        for row, value in enumerate(values):
            self.rows_of[value].append(row)
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        if not len(self):
            most = max(map(len, self.rows_of.values()), default=0)
            raise ValueError(
                f"no value of the batch_by column has the {batch_size} rows of a batch, but {most} at most"
            )

    def __len__(self) -> int:
        return sum(len(rows) // self.batch_size * self.batch_size for rows in self.rows_of.values())

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer, so that every epoch differs and a resumed one is the same."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = torch.Generator().manual_seed(self.seed + self.epoch)
        batches = []
        for rows in self.rows_of.values():
            order = torch.tensor(rows)[torch.randperm(len(rows), generator=random)]
            batches += [batch for batch in order.split(self.batch_size) if len(batch) == self.batch_size]
        for number in torch.randperm(len(batches), generator=random).tolist():
            yield from batches[number].tolist()


class PVLFCollator:
    """Makes a training batch of triplets: what [`PVLFModel.forward`] takes.

    Args:
        processor: the [`PVLFProcessor`] of the model.

    Returns (when called with a list of rows with `TRIPLET_COLUMNS`):
        `pixel_values`, `target_pixel_values` `(batch, 3, height, width)`; `input_ids`, `attention_mask`
        `(batch, n)`; `target_ids` int64 `(batch,)`, equal where the `target_id` strings are.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """See the class."""
        missing = [c for c in TRIPLET_COLUMNS if c not in rows[0]]
        if missing:
            raise ValueError(f"triplets lack column(s) {missing}; they have {list(rows[0])}")
        batch = self.processor(
            images=[row["reference"] for row in rows],
            text=[row["caption"] for row in rows],
            target_images=[row["target"] for row in rows],
            return_tensors="pt",
        )
        return {**batch, "target_ids": torch.tensor([id_number(str(row["target_id"])) for row in rows])}


def triplets_digest(triplets: Dataset) -> str:
    """Which triplets, by their captions and target ids; pictures are not read."""
    digest = hashlib.blake2b(digest_size=16)
    for column in ("caption", "target_id"):
        digest.update(json.dumps(list(triplets[column])).encode())
    return digest.hexdigest()


def id_number(name: str) -> int:
    """The same int64 for the same id in every process, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)
