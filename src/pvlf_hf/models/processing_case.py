"""Processor of CASE. Saved with checkpoints."""

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from .configuration_case import CASEConfig
from .processing_pvlf import Padding, PVLFProcessor


class CASEProcessor(PVLFProcessor):
    """Bundles the image processor and the tokenizer of a [`CASEModel`].

    Captions start with `[CLS]`; the model puts `[ENC]` and the token of the way back where they belong.

    Args:
        image_processor: [`PVLFImageProcessor`] with the image size of BLIP.
        tokenizer: BLIP's.
        max_text_length: captions are truncated to this many tokens, special tokens included. Source: CoVR, 64.
        padding: see [`PVLFProcessor`].
        train_text_length: the same in training. Source: CoVR, 35.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        max_text_length: int = 64,
        padding: Padding = "longest",
        train_text_length: int = 35,
    ) -> None:
        super().__init__(image_processor, tokenizer, max_text_length, padding)
        if train_text_length <= tokenizer.num_special_tokens_to_add():
            raise ValueError(f"train_text_length {train_text_length} leaves no room for a word; CoVR's is 35")
        self.train_text_length = train_text_length

    @classmethod
    def for_backbone(cls, vl_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> "CASEProcessor":
        """Build the processor of a BLIP from its configuration and its tokenizer."""
        CASEConfig(vl_config=vl_config, first_token="cls", reverse_weight=0)  # raises unless it is a BLIP
        plain = PVLFProcessor.for_backbone(vl_config, tokenizer)
        positions = vl_config.text_config.max_position_embeddings
        # One position fewer in training: the way back has one more token.
        return cls(
            plain.image_processor,
            tokenizer,
            max_text_length=min(64, positions),
            train_text_length=min(35, positions - 1),
        )


CASEProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["CASEProcessor"]
