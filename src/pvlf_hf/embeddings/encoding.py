"""Embeds gallery images and queries, by the model or by the paper's baselines."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import BatchFeature

from ..data.benchmark import CIRBenchmark
from ..models.image_processing_pvlf import opened
from ..models.modeling_pvlf import PVLFModel
from ..models.processing_pvlf import PVLFProcessor
from .embedding_store import EmbeddingStore, Key

QueryMethod = Literal["composed", "image", "text", "image+text"]

QUERY_METHODS: tuple[QueryMethod, ...] = ("composed", "image", "text", "image+text")
"""Ways to embed a query: as the model composes it, or as one of the paper's baselines (Tables 1-2): the reference
image's embedding alone, the caption's alone, or the normalised sum of the two."""

FORMER_NAME = "pvlf"
"""Name of the method `"composed"` in results, stores and commands of versions before 0.2."""

MOST_THREADS = 8
"""Batches prepared ahead in each process, where an accelerator encodes (ours); 64 pictures of 384 px take 110 MB."""

T = TypeVar("T")
U = TypeVar("U")


class Embeddings(NamedTuple):
    """What is ranked: float32 `(queries, d)` and `(gallery, d)`, L2-normalised, on the CPU, in the order of rows."""

    queries: Tensor
    gallery: Tensor


def embed(
    model: PVLFModel | None,
    processor: PVLFProcessor | None,
    benchmark: CIRBenchmark,
    method: QueryMethod = "composed",
    batch_size: int = 64,
    gallery_embeds: Tensor | None = None,
    progress: bool = True,
    store: EmbeddingStore | None = None,
) -> Embeddings:
    """Embeds queries and gallery of a benchmark, with targets or without; arguments and errors as [`evaluate`]."""
    method = method_named(method)
    if store is None:
        if model is None or processor is None:
            raise ValueError("pass a model and its processor, or a store that holds the embeddings")
        if gallery_embeds is None:
            gallery_embeds = encode_gallery(model, processor, benchmark.gallery, batch_size, progress)
        queries = encode_queries(model, processor, benchmark.queries, method, batch_size, progress)
        return Embeddings(queries, gallery_embeds)
    if model is not None and processor is not None:
        store.claim(model, processor)
    data_set, wordings = benchmark.name.partition("/")[0], _wordings(benchmark.queries)

    def encode_images(rows: list[int]) -> Tensor:
        return _encode_images(model, processor, benchmark.gallery, rows, batch_size, progress)  # type: ignore[arg-type]

    def encode_wordings(places: list[int]) -> Tensor:
        chosen = [wordings[p] for p in places]
        return _encode_wordings(model, processor, benchmark.queries, chosen, method, batch_size, progress)  # type: ignore[arg-type]

    if gallery_embeds is None:
        images = [(image_id,) for image_id in benchmark.gallery["image_id"]]
        gallery_embeds = store.fetch(f"{data_set} gallery", images, encode_images if model else None)
    references = list(benchmark.queries["reference_id"])
    halves = {"image": lambda key: key[:1], "text": lambda key: key[1:]}  # the other half makes no difference
    keys: list[Key] = [(references[row], wording) for row, wording in wordings]
    keys = list(map(halves.get(method, tuple), keys))
    former_name = f"{data_set} {FORMER_NAME}" if method == "composed" else None
    embeds = store.fetch(f"{data_set} {method}", keys, encode_wordings if model else None, former_name)
    return Embeddings(_mean_over_wordings(embeds, wordings), gallery_embeds)


def encode_gallery(
    model: PVLFModel, processor: PVLFProcessor, gallery: Dataset, batch_size: int = 64, progress: bool = True
) -> Tensor:
    """Embeds the images of a gallery.

    Returns:
        float32 `(gallery, d)` on the CPU, L2-normalised, in the order of the rows.
    """
    return _encode_images(model, processor, gallery, range(len(gallery)), batch_size, progress)


def encode_queries(
    model: PVLFModel,
    processor: PVLFProcessor,
    queries: Dataset,
    method: QueryMethod = "composed",
    batch_size: int = 64,
    progress: bool = True,
) -> Tensor:
    """Embeds queries by one of `QUERY_METHODS`; of a caption in several wordings the mean, normalised.

    Returns:
        float32 `(queries, d)` on the CPU, L2-normalised, in the order of the rows.

    Raises:
        ValueError: for an unknown method.
    """
    method = method_named(method)
    wordings = _wordings(queries)
    embeds = _encode_wordings(model, processor, queries, wordings, method, batch_size, progress)
    return _mean_over_wordings(embeds, wordings)


def method_named(name: str) -> QueryMethod:
    """Returns one of `QUERY_METHODS`; versions before 0.2 called `"composed"` `"pvlf"`, in results and stores too.

    Raises:
        ValueError: for an unknown name.
    """
    method = "composed" if name == FORMER_NAME else name
    if method not in QUERY_METHODS:
        raise ValueError(f"method={name!r}: choose one of {QUERY_METHODS}")
    return method


def _wordings(queries: Dataset) -> list[tuple[int, str]]:
    """Row and text of every wording of every caption."""
    captions = [[c] if isinstance(c, str) else c for c in queries["caption"]]
    return [(row, wording) for row, wordings in enumerate(captions) for wording in wordings]


def _mean_over_wordings(embeds: Tensor, wordings: list[tuple[int, str]]) -> Tensor:
    """`(wordings, d)` -> `(queries, d)`."""
    rows = torch.tensor([row for row, _ in wordings])
    if len(rows) == rows[-1] + 1:
        return embeds
    sums = torch.zeros(int(rows[-1]) + 1, embeds.shape[1]).index_add(0, rows, embeds)
    return F.normalize(sums, dim=-1)  # a sum has the direction of the mean


def _encode_images(
    model: PVLFModel,
    processor: PVLFProcessor,
    gallery: Dataset,
    rows: Sequence[int],
    batch_size: int,
    progress: bool,
) -> Tensor:
    pictures = opened(gallery.select_columns("image"))

    def prepare(batch: list[int]) -> Tensor:
        return processor.process_targets(_decode(pictures, batch))["pixel_values"]

    def encode(pixels: Tensor) -> Tensor:
        return model(target_pixel_values=pixels.to(device_of(model))).target_embeds

    return _encode(model, prepare, encode, rows, batch_size, "gallery", progress)


def _encode_wordings(
    model: PVLFModel,
    processor: PVLFProcessor,
    queries: Dataset,
    wordings: list[tuple[int, str]],
    method: QueryMethod,
    batch_size: int,
    progress: bool,
) -> Tensor:
    """float32 `(wordings, d)`: queries with one wording each."""
    pictures = opened(queries.select_columns("reference"))

    def prepare(batch: list[tuple[int, str]]) -> dict[str, BatchFeature]:
        texts = [text for _, text in batch]
        images = [] if method == "text" else _decode(pictures, [row for row, _ in batch])
        if method == "composed":
            return {method: processor.process_queries(images, texts)}
        inputs = {}
        if "image" in method:
            inputs["image"] = processor(images=images)
        if "text" in method:
            inputs["text"] = processor(text=texts)
        return inputs

    def encode(inputs: dict[str, BatchFeature]) -> Tensor:
        features = {"image": model.get_image_features, "text": model.get_text_features}
        on_device = {kind: batch.to(device_of(model)) for kind, batch in inputs.items()}
        if method == "composed":
            return model(**on_device[method]).query_embeds
        return F.normalize(sum(features[kind](**batch).pooler_output for kind, batch in on_device.items()), dim=-1)

    return _encode(model, prepare, encode, wordings, batch_size, "queries", progress)


@torch.inference_mode()
def _encode(
    model: PVLFModel,
    prepare: Callable[[list[T]], U],
    encode: Callable[[U], Tensor],
    samples: Sequence[T],
    batch_size: int,
    what: str,
    progress: bool,
) -> Tensor:
    """Embeds samples in batches, each process a share; all return float32 `(samples, d)`."""
    state = PartialState()
    everything = list(range(len(samples)))
    # Padded to equal shares: a sharded model needs every process in every forward.
    with _as_saved(model), state.split_between_processes(everything, apply_padding=True) as share:
        batches = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
        tasks = ([samples[place] for place in batch] for batch in batches)
        show = progress and state.is_main_process
        try:
            with closing(work_ahead(prepare, tasks, _threads(device_of(model)))) as inputs:
                bar = tqdm(inputs, desc=f"encoding {what}", total=len(batches), disable=not show)
                embeds = torch.cat([encode(batch).float().cpu() for batch in bar])
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
    if state.num_processes == 1:
        return embeds
    by_place = dict(zip(gather_object(list(share)), torch.cat(gather_object([embeds])), strict=True))
    return torch.stack([by_place[place] for place in range(len(samples))])


def work_ahead(work: Callable[[T], U], tasks: Iterable[T], threads: int) -> Generator[U]:
    """What work makes of each task, in their order, while threads are at most one task each ahead.

    Threads suit decoding and resizing, which release Python's lock, and start at once, whatever they work on.
    """
    ahead: deque[Future[U]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for task in tasks:
                ahead.append(pool.submit(work, task))
                if len(ahead) > threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _threads(device: torch.device) -> int:
    """How many prepare batches while others are encoded: on a CPU, which is needed for that too, one."""
    if device.type == "cpu":
        return 1
    return max(1, min(MOST_THREADS, (os.cpu_count() or 1) // PartialState().num_processes))


@contextmanager
def _as_saved(model: PVLFModel) -> Iterator[None]:
    """For the time being, the model as it will be reloaded: in eval mode and in the precision of its weights.

    Accelerate puts autocast around the `forward` of a model that it prepares for training in bf16 or fp16.
    """
    was_training, prepared = model.training, model.__dict__.get("forward")
    model.eval()
    if "_original_forward" in model.__dict__:
        model.__dict__["forward"] = model.__dict__["_original_forward"]
    try:
        yield
    finally:
        model.train(was_training)
        if prepared is not None:
            model.__dict__["forward"] = prepared


def _decode(pictures: Dataset, rows: list[int]) -> list[Any]:
    """Pictures of some rows; names the first that does not decode, which the error of a whole batch does not."""
    (column,) = pictures.column_names
    try:
        return pictures[rows][column]
    except ValueError:
        for row in rows:
            try:
                pictures[row]
            except ValueError as error:
                raise ValueError(
                    f"the picture of row {row} cannot be read, replace it or drop the row: {error}"
                ) from error
        raise


def device_of(model: torch.nn.Module) -> torch.device:
    """The device that a model's inputs belong on."""
    return next(model.parameters()).device


__all__ = ["QUERY_METHODS", "Embeddings", "QueryMethod", "embed", "encode_gallery", "encode_queries"]
