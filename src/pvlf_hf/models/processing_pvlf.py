"""Processor of PVLF: reference images and relative captions to query inputs, gallery images to target inputs."""

from collections.abc import Iterable
from os import PathLike
from typing import Any, Literal

import transformers
from transformers import (
    AutoTokenizer,
    BatchEncoding,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging

from .configuration_pvlf import BACKBONES, load_vl_config
from .image_processing_pvlf import PVLFImageProcessor
from .interface_pvlf import ComposedRetrievalProcessor

logger = logging.get_logger(__name__)

Padding = Literal["longest", "max_length"]


TEXT_SETTINGS = ("padding", "max_length", "truncation", "add_special_tokens")
"""Settings of the tokenizer that a call may override."""


class PVLFProcessor(ComposedRetrievalProcessor):
    """Bundles the image processor and the tokenizer of a PVLF model.

    Args:
        image_processor: [`PVLFImageProcessor`] with the image size of the backbone.
        tokenizer: the backbone's tokenizer: BERT for BLIP, CLIP's for CLIP.
        max_text_length: captions are truncated to this many tokens, special tokens included. Source: TransAgg, 35 for
            BLIP (default) and 77 for CLIP. The first caption that is cut is named by a warning, further ones by log
            messages of the level INFO; `truncation=True` in a call says that it is meant.
        padding: "longest" pads captions to the longest of the batch. "max_length" pads them to `max_text_length`, for
            a model that does not mask padding, such as the baseline in training; one that does gives the same result.

    Raises:
        ValueError: if the length leaves no room for a word or the padding is neither of the two.

    Example:
        >>> from PIL import Image
        >>> from transformers import AutoProcessor
        >>> import pvlf_hf

        >>> processor = AutoProcessor.from_pretrained("model_cards/pvlf-emoji-tiny")
        >>> inputs = processor.process_queries(Image.new("RGB", (200, 100)), "the same dress, but sleeveless")
        >>> inputs["pixel_values"].shape
        torch.Size([1, 3, 72, 72])
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        max_text_length: int = 35,
        padding: Padding = "longest",
    ) -> None:
        super().__init__(image_processor, tokenizer)
        if max_text_length <= tokenizer.num_special_tokens_to_add():
            raise ValueError(
                f"max_text_length {max_text_length} leaves no room for a word; use 35 (BLIP) or 77 (CLIP)"
            )
        if padding not in ("longest", "max_length"):
            raise ValueError(f"padding must be 'longest' or 'max_length', got {padding!r}")
        self.max_text_length = max_text_length
        self.padding = padding
        self._warned_of_cuts = False

    @classmethod
    def from_vl_pretrained(cls, name_or_path: str, **kwargs: Any) -> "PVLFProcessor":
        """Build the processor that goes with [`PVLFModel.from_vl_pretrained`] of the same checkpoint.

        Args:
            name_or_path: Hub name or local folder of a checkpoint of one of `BACKBONES`. Its tokenizer, its image size
                and its image processor's mean and std are used; the rest of that is not (BLIP's squeezes images into a
                square).
            **kwargs: passed to `from_pretrained` (`revision`, `token`, `cache_dir`, ...).

        Raises:
            ValueError: for a checkpoint of another kind, or without a tokenizer.
        """
        config = load_vl_config(name_or_path, **kwargs)
        if config.model_type not in BACKBONES:
            raise ValueError(f"{name_or_path} is a {config.model_type!r} checkpoint; PVLF needs one of {[*BACKBONES]}")
        advice = "save the original's tokenizer there: AutoTokenizer.from_pretrained(original).save_pretrained(folder)"
        try:
            tokenizer = _load_tokenizer(name_or_path, dict(BACKBONES[config.model_type].tokenizers), **kwargs)
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{name_or_path}: its tokenizer cannot be loaded ({reason}); {advice}") from error
        # Without its files, the library gives a tokenizer that has the special tokens alone.
        if tokenizer.get_vocab().keys() <= {*tokenizer.all_special_tokens}:
            raise ValueError(f"{name_or_path} has no tokenizer; {advice}")
        processor = cls.for_backbone(config, tokenizer)
        try:
            settings = PVLFImageProcessor.get_image_processor_dict(name_or_path, **kwargs)[0]
        except OSError:  # a checkpoint without an image processor has its family's
            settings = {}
        for name in ("image_mean", "image_std"):
            setattr(processor.image_processor, name, settings.get(name) or getattr(processor.image_processor, name))
        return processor

    @classmethod
    def for_backbone(cls, vl_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> "PVLFProcessor":
        """Build the processor of a dual encoder from its configuration and its tokenizer."""
        spec, side = BACKBONES[vl_config.model_type], vl_config.vision_config.image_size
        image_processor = PVLFImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=spec.image_mean,
            image_std=spec.image_std,
        )
        longest = min(spec.text_length, vl_config.text_config.max_position_embeddings)
        return cls(image_processor, tokenizer, max_text_length=longest, padding=spec.padding)  # type: ignore[arg-type]

    def __call__(
        self,
        images: Any = None,
        text: str | Iterable[str] | None = None,
        target_images: Any = None,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare reference images, relative captions and target images, or some of them.

        Args:
            images: one or a batch of reference images, see [`PVLFImageProcessor`].
            text: one or a batch of relative captions.
            target_images: one or a batch of target images.
            return_tensors: "pt" or "np".
            **kwargs: settings for this call, by the library's names: of the image processor (`size`), of the tokenizer
                (`padding`, `max_length`, `truncation`, `add_special_tokens`), or grouped as `images_kwargs`,
                `text_kwargs` and `common_kwargs`.

        Returns:
            `pixel_values` float32 (batch, 3, H, W), `input_ids` and `attention_mask` int64 (batch, length) and
            `target_pixel_values` float32 (batch, 3, H, W), each only where its input is given.

        Raises:
            ValueError: if nothing is given, their numbers differ, a caption is empty, an image cannot be read, or a
                setting is given twice.
            TypeError: for a setting that neither the image processor nor the tokenizer knows, or one of a part that is
                not given.
        """
        common, text_group, image_group = (
            kwargs.pop(name, None) or {} for name in ("common_kwargs", "text_kwargs", "images_kwargs")
        )
        if unknown := common.keys() - {"return_tensors"}:
            raise TypeError(f"common_kwargs: {sorted(unknown)} are no settings of both: it takes return_tensors alone")
        return_tensors = common.get("return_tensors", return_tensors)
        text_settings = {name: kwargs.pop(name) for name in TEXT_SETTINGS if name in kwargs}
        if twice := (text_settings.keys() & text_group.keys()) | (kwargs.keys() & image_group.keys()):
            raise ValueError(f"{sorted(twice)} given twice, alone and in text_kwargs or images_kwargs: leave one out")
        text_settings, image_settings = {**text_group, **text_settings}, {**image_group, **kwargs}
        if image_settings and images is None and target_images is None:
            raise TypeError(f"{sorted(image_settings)} are settings for images, but none are given")
        if text_settings and text is None:
            raise TypeError(f"{sorted(text_settings)} are settings for captions, but none are given")
        data: dict[str, Any] = {}
        if images is not None:
            data |= self.image_processor(images, return_tensors=return_tensors, **image_settings)
        if text is not None:
            data |= self._tokenize(text, return_tensors, text_settings)
        if target_images is not None:
            targets = self.image_processor(target_images, return_tensors=return_tensors, **image_settings)
            data["target_pixel_values"] = targets["pixel_values"]
        _check_counts(data)
        return BatchFeature(data)

    def process_queries(self, images: Any, text: str | Iterable[str], **kwargs: Any) -> BatchFeature:
        """Prepare composed queries: each reference image with its relative caption.

        Args:
            images: one or a batch of reference images.
            text: one or a batch of relative captions, as many as images.
            **kwargs: see `__call__`.

        Returns:
            `pixel_values`, `input_ids` and `attention_mask`, for [`PVLFModel.get_query_features`].

        Raises:
            ValueError: as `__call__`.
        """
        if images is None or text is None:
            raise ValueError(
                "a query is an image and a caption; for one of them alone call processor(images=...) or "
                "processor(text=...) and the model's get_image_features or get_text_features"
            )
        return self(images=images, text=text, **kwargs)

    def process_targets(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Prepare gallery images.

        Args:
            images: one or a batch of gallery images.
            **kwargs: see `__call__`.

        Returns:
            `pixel_values`, for [`PVLFModel.get_image_features`].

        Raises:
            ValueError: if there is no image or one cannot be read.
        """
        return self(images=images, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names of everything `__call__` can return."""
        return ["pixel_values", "input_ids", "attention_mask", "target_pixel_values"]

    def save_pretrained(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Save the processor, see the library; what is saved does not depend on earlier calls."""
        # The tokenizer keeps truncation and padding of its last call as state and would save them as its own settings.
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.backend_tokenizer.no_padding()
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _tokenize(
        self, text: str | Iterable[str], return_tensors: str, settings: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        settings = settings or {}
        if unknown := {*settings} - {*TEXT_SETTINGS, "return_tensors"}:
            raise TypeError(f"{sorted(unknown)} are no settings for captions: choose from {sorted(TEXT_SETTINGS)}")
        captions = as_captions(text)
        tokens = self._encode(captions, {"return_tensors": return_tensors, **settings})
        if not settings.get("truncation"):
            special = self.tokenizer.num_special_tokens_to_add() if settings.get("add_special_tokens", True) else 0
            lengths = {
                row: len(all_tokens(encoding)) + special
                for row, encoding in enumerate(tokens.encodings or ())
                if encoding.overflowing
            }
            self._report_cuts(captions, lengths, settings.get("max_length"))
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}

    def _report_cuts(self, captions: list[str], lengths: dict[int, int], max_length: int | None) -> None:
        """Log the captions that are cut, by their row and number of tokens."""
        longest = self.max_text_length if max_length is None else max_length
        for row, length in lengths.items():
            log = logger.info if self._warned_of_cuts else logger.warning
            self._warned_of_cuts = True
            log(
                f"caption {row}, {captions[row][:60]!r}, has {length} tokens and is cut to {longest}: what its end "
                "says has no effect. Shorten it, set max_text_length if the text encoder has more positions, or pass "
                "truncation=True if this is meant"
            )

    def _encode(self, captions: list[str], settings: dict[str, Any] | None = None) -> BatchEncoding:
        """Tokenize captions.

        Truncation and padding are a state of the tokenizer, which threads share: what is not by a caller's own
        settings is tokenized by those below alone, and [`all_tokens`] tells what was cut off.
        """
        defaults = {
            "padding": self.padding,
            "truncation": True,
            "max_length": self.max_text_length,
            "return_attention_mask": True,  # the fusion needs one also where the text encoder does not
        }
        # On the right whatever the tokenizer says: BLIP's text embedding is the token at position 0.
        return self.tokenizer(captions, **{**defaults, **(settings or {})}, padding_side="right")


def as_captions(text: str | Iterable[str]) -> list[str]:
    """Return captions as a list; raise a `ValueError` for an item that is none."""
    if not isinstance(text, str | Iterable):
        raise ValueError(f"text is {text!r}: pass a caption or a list of captions")
    captions = [text] if isinstance(text, str) else list(text)
    if not captions:
        raise ValueError("text is empty: pass at least one caption")
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(f"caption {index} is {caption!r}, not a string")
        if half := next((letter for letter in caption if "\ud800" <= letter <= "\udfff"), None):
            raise ValueError(
                f"caption {index} contains {half!r}, a lone surrogate, which is not a valid character: it was "
                "read with a wrong encoding, or a character was cut in two"
            )
        if not caption.strip():
            raise ValueError(
                f"caption {index} is empty: say what changes, or search by the image alone with "
                "processor(images=...) and the model's get_image_features"
            )
    return captions


def all_tokens(caption: Any) -> list[int]:
    """Return the ids of a caption's tokens, cut off or not, without padding and special tokens.

    Args:
        caption: one of a `BatchEncoding`'s encodings.
    """
    return [
        token
        for part in (caption, *caption.overflowing)
        for token, real, special in zip(part.ids, part.attention_mask, part.special_tokens_mask, strict=True)
        if real and not special
    ]


def _load_tokenizer(name_or_path: str, replacements: dict[str, str], **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer, by another class than it names where `replacements` has one."""
    named = get_tokenizer_config(name_or_path, **kwargs).get("tokenizer_class") or ""
    if replaced_by := replacements.get(named.removesuffix("Fast")):
        return getattr(transformers, replaced_by).from_pretrained(name_or_path, **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    replaced_by = replacements.get(type(tokenizer).__name__)
    return getattr(transformers, replaced_by).from_pretrained(name_or_path, **kwargs) if replaced_by else tokenizer


def _check_counts(data: dict[str, Any]) -> None:
    """Raise where the inputs of a batch are absent or differ in number."""
    names = {"pixel_values": "images", "input_ids": "captions", "target_pixel_values": "target images"}
    counts = {name: len(data[key]) for key, name in names.items() if key in data}
    if not counts:
        raise ValueError("nothing to process: pass images, text or target_images")
    if len(set(counts.values())) > 1:
        given = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"one of each makes a sample, but there are {given}")


PVLFProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["PVLFProcessor", "all_tokens", "as_captions"]
