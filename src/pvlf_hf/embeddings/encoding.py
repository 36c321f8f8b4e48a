"""Embeds gallery images and queries, by the model or by the paper's baselines."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import BatchFeature

from ..models.image_processing_pvlf import opened
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor, check_adapter, unwrap
from .combined import CombinedQueries
from .embedding_store import EmbeddingStore, Key
from .fastest import images_at_once
from .fingerprints import image_digests
from .query_parts import mean_over_parts, query_parts

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data.benchmark import CIRBenchmark

QueryMethod = Literal["composed", "image", "text", "image+text"]

QUERY_METHODS: tuple[QueryMethod, ...] = ("composed", "image", "text", "image+text")
"""Ways to embed a query: as the model composes it, or as one of the paper's baselines (Tables 1-2): the reference
image's embedding alone, the caption's alone, or the normalised sum of the two."""

FORMER_NAME = "pvlf"
"""Name of the method `"composed"` in results, stores and commands of versions before 0.2."""

MOST_THREADS = 8
"""Most batches prepared ahead in each process where an accelerator encodes (our choice); 64 images of 384 px take
110 MB."""

T = TypeVar("T")
U = TypeVar("U")


class Embeddings(NamedTuple):
    """Embeddings of a benchmark: float32 `(queries, d)` and `(gallery, d)`, L2-normalised, on the CPU, row by row.

    Queries that are no embeddings, as those of the composition `"product"`, come with the function that scores them.
    """

    queries: Tensor | CombinedQueries
    gallery: Tensor


def embed(
    model: ComposedRetrievalModel | None,
    processor: ComposedRetrievalProcessor | None,
    benchmark: "CIRBenchmark",
    method: QueryMethod = "composed",
    batch_size: int = 64,
    gallery_embeds: Tensor | None = None,
    progress: bool = True,
    store: EmbeddingStore | None = None,
) -> Embeddings:
    """Embed queries and gallery of a benchmark, with targets or without; arguments and errors as [`evaluate`]."""
    method = method_named(method)
    if store is None:
        if model is None or processor is None:
            raise ValueError("pass a model and its processor, or a store that holds the embeddings")
        if gallery_embeds is None:
            gallery_embeds = encode_gallery(model, processor, benchmark.gallery, batch_size, progress)
        queries = encode_queries(model, processor, benchmark.queries, method, batch_size, progress)
        return Embeddings(_as_scored(queries, model, method), gallery_embeds)
    if model is not None and processor is not None:
        store.claim(model, processor)
    data_set, parts = benchmark.name.partition("/")[0], query_parts(benchmark.queries)

    def encode_images(rows: list[int]) -> Tensor:
        return _encode_images(model, processor, benchmark.gallery, rows, batch_size, progress)  # type: ignore[arg-type]

    def encode_captions(positions: list[int]) -> Tensor:
        chosen = [parts.texts[position] for position in positions]
        return _encode_captions(model, processor, parts.references, chosen, method, batch_size, progress)  # type: ignore[arg-type]

    if gallery_embeds is None:
        images = [(image_id,) for image_id in benchmark.gallery["image_id"]]
        contents = image_digests(benchmark.gallery, "image") if model else None
        gallery_embeds = store.fetch(
            f"{data_set} gallery", images, encode_images if model else None, contents=contents
        )
    halves = {"image": lambda key: key[:1], "text": lambda key: key[1:]}  # the other half makes no difference
    keys: list[Key] = [(parts.reference_ids[row], text) for row, text in parts.texts]
    keys = list(map(halves.get(method, tuple), keys))
    former_name = f"{data_set} {FORMER_NAME}" if method == "composed" else None
    contents = None
    if model and method != "text":
        digests = image_digests(parts.references, "reference")
        contents = [digests[row] for row, _ in parts.texts]
    embeds = store.fetch(f"{data_set} {method}", keys, encode_captions if model else None, former_name, contents)
    return Embeddings(_as_scored(mean_over_parts(embeds, parts.owners), model, method), gallery_embeds)


def _as_scored(queries: Tensor, model: ComposedRetrievalModel | None, method: QueryMethod) -> Tensor | CombinedQueries:
    combine = getattr(unwrap(model), "combine", None) if model is not None and method == "composed" else None
    return queries if combine is None else CombinedQueries(queries, combine)


def encode_gallery(
    model: ComposedRetrievalModel,
    processor: ComposedRetrievalProcessor,
    gallery: "Dataset",
    batch_size: int = 64,
    progress: bool = True,
) -> Tensor:
    """Embed the images of a gallery.

    Returns:
        float32 `(gallery, d)` on the CPU, L2-normalised, in the order of the rows.
    """
    return _encode_images(model, processor, gallery, range(len(gallery)), batch_size, progress)


def encode_queries(
    model: ComposedRetrievalModel,
    processor: ComposedRetrievalProcessor,
    queries: "Dataset",
    method: QueryMethod = "composed",
    batch_size: int = 64,
    progress: bool = True,
) -> Tensor:
    """Embed queries by one of `QUERY_METHODS`; several captions or references by the normalised mean of all pairs.

    Returns:
        float32 `(queries, d)` on the CPU, L2-normalised, in the order of the rows.

    Raises:
        ValueError: for an unknown method.
    """
    method = method_named(method)
    parts = query_parts(queries)
    embeds = _encode_captions(model, processor, parts.references, parts.texts, method, batch_size, progress)
    return mean_over_parts(embeds, parts.owners)


def method_named(name: str) -> QueryMethod:
    """Return one of `QUERY_METHODS`; versions before 0.2 called `"composed"` `"pvlf"`, in results and stores too.

    Raises:
        ValueError: for an unknown name.
    """
    method = "composed" if name == FORMER_NAME else name
    if method not in QUERY_METHODS:
        raise ValueError(f"method={name!r}: choose one of {QUERY_METHODS}")
    return method


def _encode_images(
    model: ComposedRetrievalModel,
    processor: ComposedRetrievalProcessor,
    gallery: "Dataset",
    rows: Sequence[int],
    batch_size: int,
    progress: bool,
) -> Tensor:
    images = opened(gallery.select_columns("image"))

    def prepare(batch: list[int]) -> Tensor:
        return processor.process_targets(_decode(images, batch))["pixel_values"]

    return _encode(model, prepare, image_encoder(model), rows, batch_size, "gallery", progress)


def image_encoder(model: ComposedRetrievalModel) -> Callable[[Tensor], Tensor]:
    """Return a function from pixel values `(batch, 3, height, width)` to L2-normalised float32 `(batch, d)`."""

    def encode(pixel_values: Tensor) -> Tensor:
        return model(target_pixel_values=pixel_values.to(device_of(model))).target_embeds

    return encode


def _encode_captions(
    model: ComposedRetrievalModel,
    processor: ComposedRetrievalProcessor,
    references: "Dataset",
    captions: list[tuple[int, str]],
    method: QueryMethod,
    batch_size: int,
    progress: bool,
) -> Tensor:
    """Embed captions, each with the reference image of a row: float32 `(captions, d)`."""
    references = opened(references)
    # Captions of similar length share a batch, which is padded to the longest; each process has short and long ones.
    by_length = sorted(range(len(captions)), key=lambda position: len(captions[position][1]))
    processes = PartialState().num_processes
    order = [position for process in range(processes) for position in by_length[process::processes]]

    def prepare(batch: list[tuple[int, str]]) -> dict[str, BatchFeature]:
        texts = [text for _, text in batch]
        images = [] if method == "text" else _decode(references, [row for row, _ in batch])
        if method == "composed":
            return {method: processor.process_queries(images, texts)}
        inputs = {}
        if "image" in method:
            inputs["image"] = processor(images=images)
        if "text" in method:
            inputs["text"] = processor(text=texts)
        return inputs

    def encode(inputs: dict[str, BatchFeature]) -> Tensor:
        features: dict[str, Any] = {"image": model.get_image_features, "text": model.get_text_features}
        on_device = {kind: batch.to(device_of(model)) for kind, batch in inputs.items()}
        if method == "composed":
            return model(**on_device[method]).query_embeds
        total: Any = sum(features[kind](**batch).pooler_output for kind, batch in on_device.items())
        return F.normalize(total, dim=-1)

    embeds = _encode(model, prepare, encode, [captions[p] for p in order], batch_size, "queries", progress)
    return embeds[torch.tensor(order).argsort()]


@torch.inference_mode()
def _encode(
    model: ComposedRetrievalModel,
    prepare: Callable[[list[T]], U],
    encode: Callable[[U], Tensor],
    samples: Sequence[T],
    batch_size: int,
    what: str,
    progress: bool,
) -> Tensor:
    """Embed samples in batches, each process a share; return float32 `(samples, d)` in every process."""
    state, batch_size = PartialState(), fastest_batch(model, batch_size)
    everything = list(range(len(samples)))
    # Padded to equal shares: a sharded model needs every process in every forward.
    with _as_saved(model), state.split_between_processes(everything, apply_padding=True) as share:
        batches = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
        tasks = ([samples[position] for position in batch] for batch in batches)
        show = progress and state.is_main_process
        try:
            with closing(prefetch_map(prepare, tasks, _threads(device_of(model)))) as inputs:
                bar = tqdm(inputs, desc=f"encoding {what}", total=len(batches), disable=not show)
                embeds = torch.cat([encode(batch).float().cpu() for batch in bar])
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
    if state.num_processes == 1:
        return embeds
    row_at = dict(zip(gather_object(list(share)), torch.cat(gather_object([embeds])), strict=True))
    return torch.stack([row_at[position] for position in range(len(samples))])


@torch.inference_mode()
def encode_stream(
    model: ComposedRetrievalModel,
    prepare: Callable[[T], Tensor | None],
    encode: Callable[[Tensor], Tensor],
    samples: Sequence[T],
    batch_size: int,
    stand_in: Tensor,
    on_error: Callable[[T, Exception], None],
) -> Generator[tuple[list[T], Tensor]]:
    """Embed this process's samples as they are prepared; one that cannot be prepared does not stop the others.

    Several processes take their batches in step, because a sharded model needs every process in every forward.

    Args:
        model: computes the embeddings.
        prepare: makes the encoder's input `(1, ...)` of one sample, in a thread; None for nothing to encode.
        encode: embeds joined inputs `(batch, ...)`.
        samples: in any number, other processes have their own.
        batch_size: inputs encoded at once, at most: see [`fastest_batch`].
        stand_in: an input `(1, ...)` for a process that has run out of samples when another has not.
        on_error: is called, in a thread, with a sample that `prepare` raised an error for, and the error.

    Yields:
        the samples of a batch, none where the stand-in was encoded, and float32 `(samples, d)` on the CPU.
    """

    def prepare_all(batch: Sequence[T]) -> list[tuple[T, Tensor]]:
        prepared = []
        for sample in batch:
            try:
                inputs = prepare(sample)
            except (
                Exception
            ) as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged files
                on_error(sample, error)
            else:
                prepared += [] if inputs is None else [(sample, inputs)]
        return prepared

    batch_size = fastest_batch(model, batch_size)
    tasks = (samples[start : start + batch_size] for start in range(0, len(samples), batch_size))
    with _as_saved(model), closing(prefetch_map(prepare_all, tasks, _threads(device_of(model)))) as prepared:
        for batch in _in_step(_regroup(prepared, batch_size)):
            embeds = encode(torch.cat([inputs for _, inputs in batch] or [stand_in])).float().cpu()
            yield [sample for sample, _ in batch], embeds[: len(batch)]


def fastest_batch(model: nn.Module, batch_size: int) -> int:
    """Return the batch size to encode with: on a CPU a smaller one, if this processor is faster with it.

    Not in several processes, which must agree.
    """
    vision: Any = getattr(unwrap(model).encoder_config, "vision_config", None)
    sizes: list[Any] = [getattr(vision, name, None) for name in ("image_size", "patch_size", "intermediate_size")]
    if not all(isinstance(size, int) for size in sizes):
        return batch_size  # no ViT, or none of square images
    if device_of(model).type != "cpu" or PartialState().num_processes > 1:
        return batch_size
    pixels, patch, width = sizes
    return images_at_once(batch_size, (pixels // patch) ** 2 * width, next(model.parameters()).dtype)


def _regroup(groups: Iterable[list[T]], size: int) -> Iterator[list[T]]:
    """Yield the items of all groups in lists of one size, the last of what is left."""
    items: list[T] = []
    for group in groups:
        items += group
        while len(items) >= size:
            yield items[:size]
            items = items[size:]
    if items:
        yield items


def _in_step(batches: Iterator[list[T]]) -> Iterator[list[T]]:
    """Yield this process's batches, then empty ones until every process has run out of its own."""
    while True:
        batch = next(batches, [])
        if not any(gather_object([bool(batch)])):
            return
        yield batch


def prefetch_map(work: Callable[[T], U], tasks: Iterable[T], threads: int) -> Generator[U]:
    """Yield `work(task)` in the order of the tasks, computed ahead by as many threads, one task each.

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
    """Return how many threads prepare batches: one where the CPU encodes, which is needed for that too."""
    if device.type == "cpu":
        return 1
    return max(1, min(MOST_THREADS, (os.cpu_count() or 1) // PartialState().num_processes))


@dataclass
class _Use:
    """State of a model before the first of the threads that are encoding with it changed it."""

    was_training: bool
    forward: Any
    threads: int = 0


_IN_USE: WeakKeyDictionary[nn.Module, _Use] = WeakKeyDictionary()
_IN_USE_LOCK = Lock()


@contextmanager
def _as_saved(model: nn.Module) -> Iterator[None]:
    """Put the model, within the block, in the state it will be reloaded in: eval mode, the precision of its weights.

    Accelerate puts autocast around the `forward` of a model that it prepares for training in bf16 or fp16. If several
    threads encode with one model, the last to finish restores the state that the first one saved.
    """
    check_adapter(model)
    with _IN_USE_LOCK:
        use = _IN_USE.setdefault(model, _Use(model.training, model.__dict__.get("forward")))
        use.threads += 1
        model.eval()
        if "_original_forward" in model.__dict__:
            model.__dict__["forward"] = model.__dict__["_original_forward"]
    try:
        yield
    finally:
        with _IN_USE_LOCK:
            use.threads -= 1
            if not use.threads:
                del _IN_USE[model]
                model.train(use.was_training)
                if use.forward is not None:
                    model.__dict__["forward"] = use.forward


def _decode(images: "Dataset", rows: list[int]) -> list[Any]:
    """Decode the images of some rows; name the first that does not decode, unlike the error of a whole batch."""
    (column,) = images.column_names
    try:
        return images[rows][column]
    except ValueError:
        for row in rows:
            try:
                images[row]
            except ValueError as error:
                raise ValueError(
                    f"the image of row {row} cannot be read, replace it or drop the row: {error}"
                ) from error
        raise


def device_of(model: torch.nn.Module) -> torch.device:
    """Return the device that a model's inputs belong on."""
    return next(model.parameters()).device


__all__ = ["QUERY_METHODS", "Embeddings", "QueryMethod", "embed", "encode_gallery", "encode_queries"]
