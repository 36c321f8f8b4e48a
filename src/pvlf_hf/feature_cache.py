"""Tokens of encoders that do not train, computed once and kept on disk: most of a training step is already known.

A frozen ViT gives the same tokens for a picture in every epoch, run and row of a table. They are found again by what
they were made of: a *fingerprint* of weights, configuration and preprocessing names a folder, and the digest of a
picture's file (or of a caption) a row in it. Whatever changes, changes the name, so that nothing stale is ever read.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
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

from .benchmark import check_columns
from .data import TRIPLET_COLUMNS, id_number
from .image_processing_pvlf import opened
from .modeling_pvlf import PVLFModel
from .processing_pvlf import PVLFProcessor
from .whole_files import locked, whole

logger = logging.get_logger(__name__)

SHARD_BYTES = 64 * 2**20
"""A shard is written when it holds so much (ours): what an interruption can lose, and about 220 pictures of BLIP."""


class FeatureCache:
    """Token sequences on disk, memory-mapped, found by digest. Several runs and processes may fill one folder.

    Args:
        folder: where caches live; each fingerprint has its own folder in it.
        fingerprint: of everything but the sample that the tokens depend on, see [`fingerprint`].

    Raises:
        ValueError: if a file in the folder cannot be read.
    """

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        self.folder = Path(folder) / fingerprint
        self.place_of: dict[str, tuple[str, int]] = {}  # digest -> shard and row
        self.shards: dict[str, dict[str, Tensor]] = {}
        self.read_new_shards()

    def __contains__(self, digest: str) -> bool:
        return digest in self.place_of

    def __getitem__(self, digest: str) -> Tensor:
        """Tokens float16 `(length, d)`, a view of the file."""
        name, row = self.place_of[digest]
        start, end = self.shards[name]["starts"][row : row + 2].tolist()
        return self.shards[name]["tokens"][start:end]

    def position(self, digest: str) -> int:
        """Where the global token of a sequence stands."""
        name, row = self.place_of[digest]
        return int(self.shards[name]["positions"][row])

    def read_new_shards(self) -> None:
        """Takes up what this or another process has written meanwhile."""
        for file in sorted(self.folder.glob("*.safetensors")):
            if file.name in self.shards:
                continue
            try:
                with safe_open(file, framework="pt") as opened:  # tensors are views of the mapped file
                    shard = {name: opened.get_tensor(name) for name in opened.keys()}
                    digests = json.loads(opened.metadata()["digests"])
            except (SafetensorError, OSError, KeyError, TypeError) as error:
                raise ValueError(f"{file} is damaged ({error}): delete it, its part is encoded anew") from error
            self.shards[file.name] = shard
            self.place_of |= {digest: (file.name, row) for row, digest in enumerate(digests)}

    def fill(
        self,
        digests: Sequence[str],
        encode: Callable[[list[int]], tuple[list[Tensor], list[int]]],
        batch_size: int,
        what: str,
        progress: bool = True,
    ) -> None:
        """Encodes what is missing, each process a share; interrupted, the next call goes on.

        Args:
            digests: of all samples needed; repeated ones are encoded once.
            encode: takes positions in `digests`; returns their tokens, `(length, d)` each, and the positions of their
                global tokens.
            batch_size: samples encoded at once.
            what: names the samples in messages.
            progress: show a progress bar.

        Raises:
            OSError: if the disk is full; everything written before can be used.
            ValueError: if tokens do not fit float16.
        """
        state = PartialState()
        # A second run waits for the first and then finds everything there.
        with locked(self.folder) if state.is_main_process else nullcontext():
            self.read_new_shards()
            first_of = {digest: place for place, digest in reversed(list(enumerate(digests))) if digest not in self}
            # One process says what is missing: another may read the folder when there is more in it already.
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
        for batch in tqdm(batches, f"caching {what}", disable=not (progress and PartialState().is_main_process)):
            tokens, positions = encode(batch)
            if batch is batches[0]:
                self._announce(tokens, len(share), what)
            kept = [t.to("cpu", torch.float16) for t in tokens]
            shard |= {digests[b]: entry for b, entry in zip(batch, zip(kept, positions, strict=True), strict=True)}
            if batch is batches[-1] or sum(t.nbytes for t, _ in shard.values()) >= SHARD_BYTES:
                self._write(shard)
                shard = {}

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
    """Makes training batches of cached features: what [`PVLFModel.forward`] takes instead of pixels.

    Args:
        processor: tokenizes captions where the text encoder trains.
        images: of the pictures.
        texts: of the captions, or None where the text encoder trains.

    Returns (when called with rows whose `reference` and `target` are digests):
        `image_tokens` `(batch, 1 + m, d)`; `target_features` `(batch, d)`; `input_ids`, or `text_tokens`
        `(batch, n, d)` and `text_position` `(batch,)`; `attention_mask` `(batch, n)`; `target_ids` int64 `(batch,)`.
    """

    def __init__(self, processor: PVLFProcessor, images: FeatureCache, texts: FeatureCache | None) -> None:
        self.processor, self.images, self.texts = processor, images, texts

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """See the class."""
        return {
            "image_tokens": torch.stack([self.images[row["reference"]] for row in rows]),
            "target_features": torch.stack([self.images[row["target"]][0] for row in rows]),
            "target_ids": torch.tensor([id_number(str(row["target_id"])) for row in rows]),
            **self._text([row["caption"] for row in rows]),
        }

    def _text(self, captions: list[str]) -> dict[str, Tensor]:
        if self.texts is None:
            return dict(self.processor(text=captions))
        digests = [digest(caption) for caption in captions]
        tokens = [self.texts[d] for d in digests]
        return {
            "text_tokens": pad_sequence(tokens, batch_first=True),
            "attention_mask": pad_sequence([torch.ones(len(t), dtype=torch.int64) for t in tokens], batch_first=True),
            "text_position": torch.tensor([self.texts.position(d) for d in digests]),
        }


def cache_features(
    model: PVLFModel,
    processor: PVLFProcessor,
    triplets: Dataset,
    folder: str | Path,
    batch_size: int = 64,
    progress: bool = True,
) -> tuple[Dataset, FeatureCollator]:
    """Encodes the pictures of triplets, and the captions where the text encoder is frozen too.

    Args:
        model: on the device it trains on; its image encoder must be frozen (`model.set_finetuning`).
        processor: of the model.
        triplets: with `pvlf_hf.data.TRIPLET_COLUMNS`.
        folder: where caches live; may be shared by runs, processes and models.
        batch_size: pictures encoded at once.
        progress: show progress bars.

    Returns:
        the triplets with digests for pictures, and the collator that makes batches of them.

    Raises:
        ValueError: if the image encoder trains, or the triplets are transformed when read.
        OSError: if the disk is full.
    """
    image_side, text_side = ([getattr(model.backbone, n) for n in names] for names in _sides(model))
    if any(p.requires_grad for module in image_side for p in module.parameters()):
        raise ValueError("the image encoder trains, so its features change: cache with finetuning 'frozen' or 'text'")
    if triplets.format["type"] == "custom":
        raise ValueError(
            "train_dataset transforms its pictures when they are read (with_transform), so that their features cannot "
            "be cached: apply fixed changes with dataset.map(), or train without feature_cache"
        )
    check_columns(triplets, TRIPLET_COLUMNS, "triplets")
    columns = {column: triplets.select_columns(column) for column in ("reference", "target")}
    digests = {column: picture_digests(dataset, column) for column, dataset in columns.items()}
    pictures = {column: opened(dataset) for column, dataset in columns.items()}

    def decode(place: int) -> Any:
        column, row = ("reference", place) if place < len(triplets) else ("target", place - len(triplets))
        try:
            return pictures[column][row][column]
        except ValueError as error:
            raise ValueError(
                f"the {column} picture of row {row} cannot be read, replace it or drop the row: {error}"
            ) from error

    def encode_images(places: list[int]) -> tuple[list[Tensor], list[int]]:
        pixels = processor.process_targets([decode(place) for place in places])
        tokens = model.get_image_features(pixels["pixel_values"].to(model.device)).last_hidden_state
        return list(tokens), [0] * len(places)

    captions = list(triplets["caption"])

    def encode_texts(places: list[int]) -> tuple[list[Tensor], list[int]]:
        inputs = processor(text=[captions[p] for p in places]).to(model.device)
        tokens, positions = model.backbone.text_tokens(inputs["input_ids"], inputs["attention_mask"])
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        return [t[:length] for t, length in zip(tokens, lengths, strict=True)], positions.tolist()

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            images = FeatureCache(folder, fingerprint(image_side, model, image_settings(processor)))
            images.fill([*digests["reference"], *digests["target"]], encode_images, batch_size, "pictures", progress)
            texts = None
            if not any(p.requires_grad for module in text_side for p in module.parameters()):
                texts = FeatureCache(folder, fingerprint(text_side, model, text_settings(processor)))
                texts.fill([digest(c) for c in captions], encode_texts, batch_size, "captions", progress)
    finally:
        model.train(was_training)
    known = triplets.remove_columns(["reference", "target"])
    for column, values in digests.items():
        known = known.add_column(column, values)
    return known, FeatureCollator(processor, images, texts)


def _sides(model: PVLFModel) -> tuple[tuple[str, str], tuple[str, str]]:
    return model.backbone.vision_modules, model.backbone.text_modules


def picture_digests(dataset: Dataset, column: str) -> list[str]:
    """Digests of a column's picture files, undecoded, and of how the column decodes them."""
    mode = str(getattr(dataset.features[column], "mode", None))
    known: dict[str, str] = {}  # a picture occurs in several triplets

    def of(cell: dict[str, Any]) -> str:
        if cell["bytes"] is not None:
            return digest(mode, cell["bytes"])
        if cell["path"] not in known:
            known[cell["path"]] = digest(mode, Path(cell["path"]).read_bytes())
        return known[cell["path"]]

    return [of(cell) for cell in dataset.cast_column(column, Image(decode=False))[column]]


def fingerprint(modules: Sequence[nn.Module], model: PVLFModel, preprocessing: str) -> str:
    """Digest of everything but the sample that tokens depend on.

    Args:
        modules: the encoder and its projection.
        model: gives the encoder's configuration, its dtype and whether autocast is on.
        preprocessing: the settings of the image processor or tokenizer, as text.
    """
    device = model.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    # A config loses and gains these on the way through a file; the weights below tell their dtype themselves.
    config = json.loads(model.config.vl_config.to_json_string(use_diff=False))
    for part in (config, config["vision_config"], config["text_config"]):
        for name in ("dtype", "transformers_version", "_name_or_path"):
            part.pop(name, None)
    parts: list[bytes | str] = [json.dumps(config, sort_keys=True), str(autocast), preprocessing]
    for module in modules:
        for name, tensor in module.state_dict().items():
            parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)}", _raw_bytes(tensor)]
    return digest(*parts)


def image_settings(processor: PVLFProcessor) -> str:
    """Everything of the processor that pixels depend on."""
    settings = processor.image_processor.to_dict()
    settings.pop("auto_map", None)  # where its code is found; saving adds it
    return json.dumps(settings, sort_keys=True, default=str)


def text_settings(processor: PVLFProcessor) -> str:
    """Everything of the processor that token ids depend on."""
    # The tokenizer keeps truncation and padding of its last call.
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return json.dumps([tokenizer, processor.max_text_length, processor.padding])


def _raw_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def digest(*parts: bytes | str) -> str:
    """Hexadecimal digest of a sequence of parts."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        hasher.update(len(raw).to_bytes(8, "big") + raw)
    return hasher.hexdigest()


__all__ = ["FeatureCache", "FeatureCollator", "cache_features"]
