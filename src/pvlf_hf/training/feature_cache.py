"""Feature cache: tokens of frozen encoders, computed once and kept on disk, which saves most of a training step.

A frozen ViT gives the same tokens for an image in every epoch, run and row of a table. A *fingerprint* of weights,
configuration and preprocessing names the folder of a cache, and the digest of an image file (or of a caption)
identifies a row in it. Any change yields another fingerprint or digest, so that stale tokens are never read.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers.utils import logging

from ..atomic_files import locked, whole
from ..data.benchmark import check_columns
from ..data.triplets import TRIPLET_COLUMNS
from ..digests import sequence_digest
from ..embeddings.encoding import fastest_batch
from ..embeddings.fingerprints import fingerprint, image_digests, image_settings, text_settings
from ..models.image_processing_pvlf import opened
from ..models.interface_pvlf import ComposedRetrievalOutput, ComposedRetrievalProcessor, normalize, unwrap
from ..models.modeling_case import CASEModel
from ..models.modeling_compodiff import CompoDiffModel
from ..models.modeling_pvlf import PVLFModel
from .batches import ids_of, negatives_of
from .own_forward import replace_forward
from .text_groups import encode_captions

logger = logging.get_logger(__name__)

SHARD_BYTES = 64 * 2**20
"""Bytes after which a shard is written (our choice): an interruption loses at most these, about 220 images of BLIP."""

SHARD_SECONDS = 60
"""Seconds after which one is written (our choice), for small features that take long, as optimised pseudo words."""


class FeatureCache:
    """Token sequences on disk, memory-mapped, found by digest. Several runs and processes may fill one folder.

    Args:
        folder: where caches live; each fingerprint has its own folder in it.
        fingerprint: digest of everything but the sample that the tokens depend on, see [`fingerprint`].

    Raises:
        ValueError: if a file in the folder cannot be read.
    """

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        self.folder = Path(folder) / fingerprint
        self.location_of: dict[str, tuple[str, int]] = {}  # digest -> shard and row
        self.shards: dict[str, dict[str, Tensor]] = {}
        self.read_new_shards()

    def __contains__(self, digest: str) -> bool:
        return digest in self.location_of

    def __getitem__(self, digest: str) -> Tensor:
        """Tokens float16 `(length, d)`, a view of the file."""
        name, row = self.location_of[digest]
        start, end = self.shards[name]["starts"][row : row + 2].tolist()
        return self.shards[name]["tokens"][start:end]

    def position(self, digest: str) -> int:
        """Return the position of a sequence's global token."""
        name, row = self.location_of[digest]
        return int(self.shards[name]["positions"][row])

    def read_new_shards(self) -> None:
        """Load the shards that this or another process has written since the last call."""
        for file in sorted(self.folder.glob("*.safetensors")):
            if file.name in self.shards:
                continue
            try:
                with safe_open(file, framework="pt") as opened:  # tensors are views of the mapped file
                    shard = {name: opened.get_tensor(name) for name in opened.keys()}
                    digests = json.loads(opened.metadata()["digests"])
            except (SafetensorError, OSError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file} is damaged ({error}): delete it, and its samples are encoded again"
                ) from error
            self.shards[file.name] = shard
            self.location_of |= {digest: (file.name, row) for row, digest in enumerate(digests)}

    def fill(
        self,
        digests: Sequence[str],
        encode: Callable[[list[int]], tuple[list[Tensor], list[int]]],
        batch_size: int,
        what: str,
        progress: bool = True,
    ) -> None:
        """Encode missing samples, each process a share; after an interruption the next call resumes.

        Args:
            digests: of all samples needed; repeated ones are encoded once.
            encode: takes positions in `digests`; returns their tokens, `(length, d)` each, and the positions of their
                global tokens.
            batch_size: samples encoded at once.
            what: names the samples in messages.
            progress: show a progress bar.

        Raises:
            OSError: if the disk is full; shards written before stay usable.
            ValueError: if tokens do not fit float16.
        """
        state = PartialState()
        # A second run waits for the first and then has nothing left to encode.
        with locked(self.folder) if state.is_main_process else nullcontext():
            self.read_new_shards()
            first_of = {digest: index for index, digest in reversed(list(enumerate(digests))) if digest not in self}
            # One process decides what is missing: another may read the folder later, when it holds more shards.
            (missing,) = broadcast_object_list([sorted(first_of.values())])
            with state.split_between_processes(missing) as share:
                self._encode_share(share, digests, encode, batch_size, f"{len(missing)} {what}", progress)
            state.wait_for_everyone()
        self.read_new_shards()

    def _encode_share(
        self,
        share: list[int],
        digests: Sequence[str],
        encode: Callable[[list[int]], tuple[list[Tensor], list[int]]],
        batch_size: int,
        what: str,
        progress: bool,
    ) -> None:
        batches = [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
        shard: dict[str, tuple[Tensor, int]] = {}
        written = time.monotonic()
        for batch in tqdm(batches, f"caching {what}", disable=not (progress and PartialState().is_main_process)):
            tokens, positions = encode(batch)
            if batch is batches[0]:
                self._announce(tokens, len(share), what)
            kept = [t.to("cpu", torch.float16) for t in tokens]
            shard |= {digests[b]: entry for b, entry in zip(batch, zip(kept, positions, strict=True), strict=True)}
            full = sum(t.nbytes for t, _ in shard.values()) >= SHARD_BYTES
            if full or batch is batches[-1] or time.monotonic() - written >= SHARD_SECONDS:
                self._write(shard)
                shard, written = {}, time.monotonic()

    def _announce(self, tokens: list[Tensor], samples: int, what: str) -> None:
        size = sum(t.numel() * 2 for t in tokens) / len(tokens) * samples
        free = shutil.disk_usage(self.folder).free
        logger.warning(f"caching the features of {what} in {self.folder}: about {size / 2**30:.2f} GiB a process")
        if size > free:
            raise OSError(
                f"{self.folder} needs about {size / 2**30:.2f} GiB and has {free / 2**30:.2f}: free some, choose "
                "another feature_cache, or train without"
            )

    def _write(self, shard: dict[str, tuple[Tensor, int]]) -> None:
        tokens = torch.cat([t for t, _ in shard.values()])
        if not tokens.isfinite().all():
            raise ValueError(
                "encoder outputs are not finite in float16: check the weights, or train without the cache"
            )
        lengths = torch.tensor([0, *(len(t) for t, _ in shard.values())])
        tensors = {
            "tokens": tokens,
            "starts": lengths.cumsum(0),
            "positions": torch.tensor([position for _, position in shard.values()]),
        }
        with whole(self.folder / f"{uuid4().hex}.safetensors") as partial:
            save_file(tensors, partial, {"digests": json.dumps(list(shard))})


class FeatureCollator:
    """Makes training batches of cached features, which a model takes after [`accept_cached_features`].

    Args:
        processor: tokenizes captions where the text encoder trains.
        images: features of the images.
        texts: features of the captions, or None where the text encoder trains.
        target_tokens: how many tokens of a target are read: the first, which is its global feature, or all by None.

    Returns (when called with rows whose `reference` and `target` are digests):
        `encoder_outputs`, a dictionary of `image_tokens` `(batch, 1 + m, w)`, `target_tokens` `(batch, k, w)` and, for
        a frozen text encoder, `text_tokens` `(batch, n, d)` and `text_position` `(batch,)`; `input_ids` for one that
        trains; `attention_mask` `(batch, n)`; `target_ids` int64 `(batch,)`.
    """

    def __init__(
        self,
        processor: ComposedRetrievalProcessor,
        images: FeatureCache,
        texts: FeatureCache | None,
        target_tokens: int | None = 1,
    ) -> None:
        self.processor, self.images, self.texts, self.target_tokens = processor, images, texts, target_tokens

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of rows."""
        targets = [row["target"] for row in rows] + negatives_of(rows, "negatives")
        features = {
            "image_tokens": torch.stack([self.images[row["reference"]] for row in rows]),
            "target_tokens": torch.stack([self.images[digest][: self.target_tokens] for digest in targets]),
        }
        batch: dict[str, Any] = {
            "encoder_outputs": features,
            "target_ids": ids_of(rows),
        }
        captions = [row["caption"] for row in rows]
        if self.texts is None:
            return batch | dict(self.processor(text=captions, **self.processor.training_settings))
        digests = [sequence_digest(caption) for caption in captions]
        tokens = [self.texts[d] for d in digests]
        features["text_tokens"] = pad_sequence(tokens, batch_first=True)
        features["text_position"] = torch.tensor([self.texts.position(d) for d in digests])
        mask = pad_sequence([torch.ones(len(t), dtype=torch.int64) for t in tokens], batch_first=True)
        return batch | {"attention_mask": mask}


def accept_cached_features(model: nn.Module) -> None:
    """Let a model's `forward` take batches of [`FeatureCollator`] beside its own inputs.

    Cached tokens belong to training, not to the model, whose class and checkpoints stay as they are.

    Args:
        model: one of the classes in `CACHED`, or one inside an adapter of PEFT; before DDP or FSDP wraps it.
    """
    replace_forward(model, _forward_of_cached_features)


def _forward_of_cached_features(
    self: Any, *args: Any, encoder_outputs: dict[str, Any] | None = None, **inputs: Any
) -> ComposedRetrievalOutput:
    """Compute what the model's `forward` does, with cached outputs of frozen encoders in place of their inputs."""
    if encoder_outputs is None:
        return type(self).forward(self, *args, **inputs)
    facts: Any = _facts_of(self)
    return facts.forward(self, encoder_outputs, **inputs)


def _forward_of_pvlf(model: Any, encoder_outputs: dict[str, Tensor], **inputs: Any) -> ComposedRetrievalOutput:
    mask = inputs.get("attention_mask")
    if "text_tokens" in encoder_outputs:
        text = (encoder_outputs["text_tokens"], encoder_outputs["text_position"])
    else:
        text = encode_captions(model, inputs["input_ids"], mask)
    output = model.start_output(model.compose(encoder_outputs["image_tokens"], *text, mask))
    output.target_embeds = normalize(encoder_outputs["target_tokens"][:, 0])
    return model.compare(output, inputs.get("target_ids"), inputs.get("return_loss"))


def _forward_of_case(model: Any, encoder_outputs: dict[str, Tensor], **inputs: Any) -> ComposedRetrievalOutput:
    return model.compare_tokens(**encoder_outputs, **inputs)


def _forward_of_compodiff(model: Any, encoder_outputs: dict[str, Tensor], **inputs: Any) -> ComposedRetrievalOutput:
    return model.denoise(encoder_outputs["image_tokens"][:, 0], encoder_outputs["target_tokens"][:, 0], **inputs)


@dataclass(frozen=True)
class Cached:
    """How a class of models trains on cached tokens.

    Args:
        forward: computes the output of `forward` from cached tokens, see [`FeatureCollator`], and other inputs.
        keeps_texts: whether tokens of captions can be kept where the text encoder is frozen.
        reads_target_tokens: whether it reads all tokens of a target, and not the first alone.
        kind: part of the fingerprint of tokens that differ from PVLF's of the same encoder.
    """

    forward: Callable[..., ComposedRetrievalOutput]
    keeps_texts: Callable[[Any], bool]
    reads_target_tokens: Callable[[Any], bool] = lambda model: False
    kind: str = ""


CACHED = {
    # Prompts in the text encoder train.
    PVLFModel: Cached(_forward_of_pvlf, lambda model: not model.config.text_prompts),
    # Its captions read the image, whose tokens are not projected.
    CASEModel: Cached(
        _forward_of_case, lambda model: False, lambda model: model.config.reverse_weight > 0, "not projected"
    ),
    # It reads the tokens of padding, too, so that captions are encoded as they come.
    CompoDiffModel: Cached(_forward_of_compodiff, lambda model: False),
}
"""Classes of models that train on cached tokens."""


def _facts_of(model: Any) -> Cached | None:
    return next((CACHED[kind] for kind in type(model).__mro__ if kind in CACHED), None)


def cache_features(
    model: Any,
    processor: ComposedRetrievalProcessor,
    triplets: Dataset,
    folder: str | Path,
    batch_size: int = 64,
    progress: bool = True,
) -> tuple[Dataset, FeatureCollator]:
    """Encode the images of triplets, and the captions where the text encoder is frozen too.

    Args:
        model: of a class in `CACHED`, on the device it trains on; its image encoder must be frozen.
        processor: of the model.
        triplets: with `pvlf_hf.data.triplets.TRIPLET_COLUMNS`.
        folder: where caches live; may be shared by runs, processes and models.
        batch_size: images encoded at once, fewer where a CPU is faster with them.
        progress: show progress bars.

    Returns:
        the triplets with digests for images, and the collator that makes batches of them.

    Raises:
        ValueError: if the image encoder trains, or the triplets are transformed when read.
        OSError: if the disk is full.
    """
    model = unwrap(model)
    facts = _facts_of(model)
    if facts is None:
        raise ValueError(f"{type(model).__name__} takes no cached encoder outputs: train it without feature_cache")
    image_side, text_side = list(model.image_side.values()), list(model.text_side.values())
    if any(p.requires_grad for module in image_side for p in module.parameters()):
        raise ValueError("the image encoder trains, so its features change: cache with finetuning 'frozen' or 'text'")
    if getattr(model.config, "vision_prompts", 0):
        raise ValueError(
            f"prompt_location={model.config.prompt_location!r} puts prompts into the image encoder, whose features "
            "change as they train: leave feature_cache out"
        )
    if triplets.format["type"] == "custom":
        raise ValueError(
            "train_dataset transforms its images when they are read (with_transform), so that their features cannot "
            "be cached: apply fixed changes with dataset.map(), or train without feature_cache"
        )
    check_columns(triplets, TRIPLET_COLUMNS, "triplets")
    columns = {column: triplets.select_columns(column) for column in ("reference", "target")}
    digests = {column: image_digests(dataset, column) for column, dataset in columns.items()}
    opened_images = {column: opened(dataset) for column, dataset in columns.items()}

    further = sorted({file for files in _negatives(triplets) for file in files})
    mode = getattr(triplets.features["target"], "mode", None)
    negatives = Dataset.from_dict({"image": further}).cast_column("image", Image(mode=mode))
    digest_of = dict(zip(further, image_digests(negatives, "image") if further else [], strict=True))

    def decode(index: int) -> Any:
        if index >= 2 * len(triplets):
            return opened(negatives)[index - 2 * len(triplets)]["image"]
        column, row = ("reference", index) if index < len(triplets) else ("target", index - len(triplets))
        try:
            return opened_images[column][row][column]
        except ValueError as error:
            raise ValueError(
                f"the {column} image of row {row} cannot be read, replace it or drop the row: {error}"
            ) from error

    def encode_images(indices: list[int]) -> tuple[list[Tensor], list[int]]:
        pixels = processor.process_targets([decode(index) for index in indices])
        tokens = model.get_image_features(pixels["pixel_values"].to(model.device)).last_hidden_state
        return list(tokens), [0] * len(indices)

    captions = list(triplets["caption"])

    def encode_texts(indices: list[int]) -> tuple[list[Tensor], list[int]]:
        texts = [captions[index] for index in indices]
        inputs = processor(text=texts, **processor.training_settings).to(model.device)
        tokens, positions = model.encode_text_tokens(inputs["input_ids"], inputs["attention_mask"])
        # Padding is left out, unless it has the global feature (SigLIP); the fusion has no positions to move.
        kept = inputs["attention_mask"].scatter(1, positions[:, None], 1).bool()
        kept_positions = (kept.cumsum(dim=1).gather(1, positions[:, None]).squeeze(1) - 1).tolist()
        return [t[k] for t, k in zip(tokens, kept, strict=True)], kept_positions

    text_trains = any(p.requires_grad for module in text_side for p in module.parameters())
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            images = FeatureCache(folder, fingerprint(image_side, model, image_settings(processor) + facts.kind))
            wanted = [*digests["reference"], *digests["target"], *digest_of.values()]
            images.fill(wanted, encode_images, fastest_batch(model, batch_size), "images", progress)
            texts = None
            if facts.keeps_texts(model) and not text_trains:
                texts = FeatureCache(folder, fingerprint(text_side, model, text_settings(processor)))
                texts.fill([sequence_digest(c) for c in captions], encode_texts, batch_size, "captions", progress)
    finally:
        model.train(was_training)
    known = triplets.remove_columns(["reference", "target"])
    for column, values in digests.items():
        known = known.add_column(column, values)
    if further:
        kept = [[digest_of[file] for file in files] for files in _negatives(triplets)]
        known = known.remove_columns("negatives").add_column("negatives", kept)
    return known, FeatureCollator(processor, images, texts, None if facts.reads_target_tokens(model) else 1)


def _negatives(triplets: Dataset) -> list[list[str]]:
    """Return the files of the column `negatives`, none where there is no such column."""
    return [files or [] for files in triplets["negatives"][:]] if "negatives" in triplets.column_names else []


__all__ = ["CACHED", "Cached", "FeatureCache", "FeatureCollator", "accept_cached_features", "cache_features"]
