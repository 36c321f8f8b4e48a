"""Processor of CompoDiff: captions padded to the full length, and the negative text. Saved with checkpoints."""

from collections.abc import Iterable
from typing import Any

from transformers import BatchEncoding, BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from .configuration_compodiff import CompoDiffConfig
from .configuration_pvlf import load_vl_config
from .processing_pvlf import Padding, PVLFProcessor, all_tokens


class CompoDiffProcessor(PVLFProcessor):
    """Bundles the image processor and the tokenizer of a [`CompoDiffModel`].

    The denoiser reads all tokens, those of padding included, so every caption is padded to the same length.

    Args:
        image_processor: [`PVLFImageProcessor`] with the image size of the image encoder.
        tokenizer: that of the text encoder; its padding token matters.
        max_text_length: tokens of every caption, special tokens included.
        padding: see [`PVLFProcessor`]; the model takes `"max_length"` alone.
        truncation: cut captions that are longer, with a log message, instead of refusing them. On other families than
            CLIP (ours) they are cut where other models on that family cut them.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        max_text_length: int = 77,
        padding: Padding = "max_length",
        truncation: bool = False,
    ) -> None:
        super().__init__(image_processor, tokenizer, max_text_length, padding)
        self.truncation = truncation

    @classmethod
    def from_vl_pretrained(
        cls, name_or_path: str, text_encoder: str | None = None, **kwargs: Any
    ) -> "CompoDiffProcessor":
        """Build the processor that goes with [`CompoDiffModel.from_vl_pretrained`] of the same checkpoints.

        Args:
            name_or_path: Hub name or local folder of the dual encoder, whose image size is used.
            text_encoder: Hub name or local folder of another CLIP, whose tokenizer is used.
            **kwargs: passed to `from_pretrained` (`revision`, `token`, `cache_dir`, ...).

        Raises:
            ValueError: for a checkpoint of another kind, or without a tokenizer.
        """
        if text_encoder is None:
            return super().from_vl_pretrained(name_or_path, **kwargs)  # type: ignore[return-value]
        texts = super().from_vl_pretrained(text_encoder, **kwargs)
        vl_config = load_vl_config(name_or_path, **kwargs)
        images = cls.for_backbone(vl_config, texts.tokenizer).image_processor
        return cls(images, texts.tokenizer, texts.max_text_length)

    @classmethod
    def for_backbone(cls, vl_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> "CompoDiffProcessor":
        """Build the processor of a dual encoder from its configuration and its tokenizer."""
        plain = PVLFProcessor.for_backbone(vl_config, tokenizer)
        length = CompoDiffConfig(vl_config=vl_config).text_length
        return cls(plain.image_processor, tokenizer, length, truncation=vl_config.model_type != "clip")

    @property
    def negative(self) -> dict[str, Any]:
        """Settings `negative_ids` and `pad_id` of [`CompoDiffConfig`]: the empty text by this tokenizer."""
        return {"negative_ids": self.tokenizer("")["input_ids"], "pad_id": self.tokenizer.pad_token_id}

    def process_negative(self, text: str | Iterable[str], return_tensors: str = "pt") -> BatchFeature:
        """Prepare negative texts, what queries are to lead away from.

        Args:
            text: one for all queries, or as many as there are queries.
            return_tensors: "pt" or "np".

        Returns:
            `negative_input_ids` and `negative_attention_mask`, options of [`CompoDiffModel.get_query_features`].
        """
        return BatchFeature({f"negative_{k}": v for k, v in self._tokenize(text, return_tensors).items()})

    def _encode(self, captions: list[str], settings: dict[str, Any] | None = None) -> BatchEncoding:
        settings = settings or {}
        tokens = super()._encode(captions, {**settings, "truncation": True})
        longest = settings.get("max_length", self.max_text_length)
        if not settings.get("truncation", self.truncation):
            for row, encoding in enumerate(tokens.encodings or ()):
                length = len(all_tokens(encoding)) + self.tokenizer.num_special_tokens_to_add()
                if length > longest:
                    raise ValueError(
                        f"caption {row} has {length} tokens, {length - longest} more than the text encoder reads "
                        f"({longest}): shorten it, or pass truncation=True to cut it off"
                    )
        return tokens


CompoDiffProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["CompoDiffProcessor"]
