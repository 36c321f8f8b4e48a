"""Encodes images as a job of Ray: decoded on CPU workers, encoded in a pool of actors, written as shards.

Each part (`parts.py`) is handed to one of the actors, which have the model and a GPU each. Ray starts an actor again
that was killed. Parts that are there are left out, so that a repeated call goes on where one ended.

Ray Data, which is made for such jobs, has no blocks whose names and contents are the same in the next run: without
them a finished part could not be told from one that changed. Actors and tasks, on which it is built, are used instead.
"""

import json
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from ..checkpoints.loading import load_model
from ..embeddings.embedding_store import images_made_by
from .gallery_files import is_gallery
from .indexing import DecodeOptions, least_side
from .locations import files_of, open_location
from .part_encoder import Decoded, PartEncoder, decode_cells
from .parts import Cell, PlannedPart, Sources, find_parts
from .query import check_positive
from .shard_sets import ROWS_PER_PART, repeated_rows
from .shards import EmbeddingShards, write_broken
from .vectors import Vectors, check_vectors

CELLS_PER_TASK = 16
"""Images that a CPU worker decodes at a time (our choice): 28 MB of pixels at 384 px."""

RETRIES = 10
"""Times that a part, or the decoding of some images, is begun again after its worker was killed (our choice)."""

ANSWERS_WITHIN = 10
"""Seconds in which a cluster's machine must answer (our choice)."""


GOES_ON = "Parts that were written stay: a repeated call goes on from there"


class JobReport(NamedTuple):
    """Outcome of a job."""

    shards: EmbeddingShards
    encoded: int
    """Parts that this call encoded."""
    found: int
    """Parts that were there."""
    broken: int
    """Images that this call could not read; `read_broken` lists all."""
    repeated: int
    """Images that repeat the id of another with the same content; `merge_shards` drops them."""
    left_out: dict[str, int]
    """Numbers of files that are no images, by ending, which this call found in stores and archives; of hidden images
    in archives as `hidden .jpg`."""


def index_by_ray(
    source: str | Path,
    location: str | Path,
    model: str,
    *,
    address: str | None = None,
    workers: int | None = None,
    composition: str | None = None,
    dtype: str = "auto",
    vectors: Vectors = "float16",
    batch_size: int = 64,
    draft: bool = False,
    rows: int = ROWS_PER_PART,
    image_column: str = "image",
    id_column: str = "image_id",
    progress: bool = True,
) -> JobReport:
    """Embed images on the workers of a Ray cluster, and write them as shards.

    A repeated call encodes what is missing, and deletes the parts of images that have changed or are gone.

    Args:
        source: images, see [`find_parts`]; every worker must see them at this path or URL.
        location: folder or fsspec URL of the shards, likewise.
        model: folder or name on the Hub, see [`load_model`], also for `composition` and `dtype`. It is loaded here,
            and sent to the workers.
        address: of a cluster (`"auto"` on one of its machines, `"host:6379"`), whose machines have this package
            installed; None takes this process's connection, if it has one, or starts Ray on this machine for the job.
        workers: actors that encode; by default one for each GPU, or one for two CPUs where there is no GPU.
        composition: how a plain dual encoder composes queries.
        dtype: precision of the model.
        vectors: how embeddings are stored, see `pvlf_hf.search.vectors`.
        batch_size: images encoded at once.
        draft: decode large JPEGs at reduced size.
        rows: images of a part, the most that an actor encodes again after a kill.
        image_column: see [`find_parts`].
        id_column: see [`find_parts`].
        progress: show a progress bar.

    Raises:
        ImportError: if Ray is not installed.
        OSError: if a store refuses, shards cannot be written, or workers are killed again and again. What was written
            stays, and a repeated call goes on from there.
        ValueError: if there are no images, none can be read, one id names two, the cluster does not answer, or the
            location holds shards of another model.
    """
    if find_spec("ray") is None:
        raise ImportError("--engine ray needs Ray: pip install 'pvlf-hf[ray]'")
    source, location, vectors = _everywhere(source), _everywhere(location), check_vectors(vectors)
    if f"{location}/".startswith(f"{source}/"):
        raise ValueError(f"{location} lies in {source}, where images are read: choose a location outside")
    if is_gallery(Path(location)):
        raise ValueError(f"{location} holds a gallery, not shards: choose another location")
    batch_size, rows = check_positive("batch_size", batch_size), check_positive("rows", rows)
    workers = None if workers is None else check_positive("workers", workers)
    loaded, processor = load_model(model, composition, dtype)
    made_by = images_made_by(loaded, processor)
    options = DecodeOptions(None, least_side(processor) if draft else None)
    settings = [json.dumps(made_by, sort_keys=True), vectors, str(options)]
    sources = find_parts(source, rows, settings, image_column, id_column)
    missing = _missing(location, sources.parts, made_by, vectors)
    broken, left_out = len(sources.skipped), sources.left_out
    if missing:
        encoder = (made_by, options, location, vectors, batch_size)
        with _connected(address), tqdm(total=len(missing), unit="part", disable=not progress) as bar:
            for found in _encode_on_actors(missing, (loaded, processor), encoder, workers):
                broken += found.broken
                left_out += found.left_out
                bar.update()
    shards = _finished(source, location, sources)
    repeated = len(repeated_rows([shards]))
    return JobReport(shards, len(missing), len(sources.parts) - len(missing), broken, repeated, dict(left_out))


def _everywhere(place: str | Path) -> str:
    """Return a path or URL as processes in other folders find it."""
    return str(place).rstrip("/") if "://" in str(place) else str(Path(place).absolute())


def _missing(location: str, parts: list[PlannedPart], made_by: dict[str, str], vectors: Vectors) -> list[PlannedPart]:
    """Return the parts that are not there; raise a `ValueError` if those that are there are of another model.

    A part's name tells what made it, so that one of the others is looked at: a job leaves those of one model.
    """
    there = {*files_of(location, "part-*.parquet")}
    if others := sorted(there - {part.name for part in parts}):
        kept = EmbeddingShards(location, others[:1])
        if kept.made_by != made_by or kept.vectors != vectors:
            raise ValueError(
                f"{location} holds {kept.vectors} vectors in {kept.made_by['dtype']} by the model "
                f"{kept.made_by['fingerprint'][:8]}, not {vectors} in {made_by['dtype']} by "
                f"{made_by['fingerprint'][:8]}: choose another location, or delete its part-*.parquet"
            )
    return [part for part in parts if part.name not in there]


def _finished(source: str, location: str, sources: Sources) -> EmbeddingShards:
    """Open the shards of a job, after deleting parts of images that have changed or are gone."""
    parts, there = {part.name for part in sources.parts}, files_of(location, "part-*.parquet")
    if unseen := sorted(parts - {*there}):
        raise OSError(
            f"workers have written {len(unseen)} parts that are not at {location} here, first: {unseen[0]}: choose a "
            "location that all machines share"
        )
    named = parts | {part.broken_name for part in sources.parts}
    files, root = open_location(location)
    for name in [*there, *files_of(location, "broken-*.parquet"), *files_of(location, "*.parquet.*.partial")]:
        if name not in named:
            files.rm_file(f"{root}/{name}")
    if sources.skipped:
        write_broken(location, "broken-files.parquet", [(name, None, why) for name, why in sources.skipped.items()])
    shards = EmbeddingShards(location)
    if not len(shards):
        raise ValueError(f"none of the images of {source} can be read: broken-*.parquet in {location} says why")
    return shards


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Connect to a cluster, or start Ray here, within the block."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if address is None and ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            ray.init("local", include_dashboard=False, **options)
        else:
            _check_answers(address)
            ray.init(address, **options)
    except Exception as error:  # of several kinds
        where = "be started on this machine" if address is None else f"be reached at {address}"
        raise ValueError(
            f"Ray cannot {where} ({str(error).splitlines()[0]}): check the address, that its versions of Ray and "
            "Python are the same as here, and, where it asks for tokens, RAY_AUTH_MODE=token"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise an `OSError` unless something answers at an address with a port; Ray itself would wait for minutes."""
    parsed = urlsplit(address if "://" in address else f"//{address}")
    if parsed.port is not None:
        socket.create_connection((parsed.hostname, parsed.port), timeout=ANSWERS_WITHIN).close()


def _encode_on_actors(
    parts: list[PlannedPart], model: tuple[Any, Any], encoder: tuple[Any, ...], workers: int | None
) -> Iterator["Done"]:
    """Yield the outcome of each part, as it is done.

    Raises:
        OSError: if a part cannot be encoded.
    """
    import ray
    from ray.util.actor_pool import ActorPool

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    if gpus and workers is not None and workers > gpus:
        raise ValueError(f"workers={workers}: the cluster has {gpus} GPUs, one for each: pass no more")
    workers = workers or gpus or max(1, int(resources["CPU"]) // 2)
    kept = [ray.put(one) for one in model]
    # CPUs are left to the tasks that decode: actors, which wait for those, hold none.
    actor = ray.remote(num_cpus=0, num_gpus=min(1, gpus), max_restarts=-1, max_task_retries=RETRIES)(EncoderActor)
    pool = ActorPool([actor.remote(*encoder) for _ in range(min(workers, len(parts)))])
    try:
        for done in pool.map_unordered(lambda one, part: one.encode.remote(part, kept), parts):
            if done.error:
                raise OSError(f"{done.error.rstrip('.')}. {GOES_ON}")
            yield done
    except ray.exceptions.RayError as error:
        raise OSError(f"Ray's workers failed ({' '.join(str(error).split())}). {GOES_ON}") from error


class Done(NamedTuple):
    """Outcome of a part."""

    broken: int
    """Images that cannot be read."""
    left_out: Counter[str]
    """Numbers of other files by ending."""
    error: str
    """Reason that it could not be encoded, or an empty text."""


class EncoderActor:
    """Actor that encodes parts.

    Args:
        made_by: see [`PartEncoder`].
        options: how images are decoded.
        location: see [`PartEncoder`].
        vectors: see [`PartEncoder`].
        batch_size: see [`PartEncoder`].
    """

    def __init__(
        self, made_by: dict[str, str], options: DecodeOptions, location: str, vectors: Vectors, batch_size: int
    ) -> None:
        self.made_by, self.options, self.writes = made_by, options, (location, vectors, batch_size)
        self.encoder: PartEncoder | None = None

    def encode(self, part: PlannedPart, model: list[Any]) -> Done:
        """Encode a part by a model and a processor, both references to what Ray keeps.

        An error that its user can remedy is returned, as Ray would bury the sentence in its own.
        """
        self.encoder = self.encoder or self._load(*model)
        try:
            report = self.encoder.encode(part)
            return Done(report.broken, report.left_out, "")
        except (OSError, ValueError) as error:
            return Done(0, Counter(), str(getattr(error, "cause", error)))  # of a task that decodes

    def _load(self, model: Any, processor: Any) -> PartEncoder:
        import ray

        decode = ray.remote(num_cpus=1, max_retries=RETRIES)(decode_cells)

        def decoder(cells: list[Cell]) -> Callable[[], list[Decoded]]:
            starts = range(0, len(cells), CELLS_PER_TASK)
            tasks = [decode.remote(cells[start : start + CELLS_PER_TASK], self.options, processor) for start in starts]
            return lambda: [one for task in tasks for one in ray.get(task)]

        placed = ray.get(model).to("cuda" if ray.get_gpu_ids() else "cpu")
        return PartEncoder(placed, ray.get(processor), self.made_by, decoder, *self.writes)


__all__ = ["JobReport", "index_by_ray"]
