"""Text-anchored tuning (TAT): adapts the image encoder to the texts that describe its images, without triplets.

A dual encoder places images and texts apart, and a composition such as Slerp passes between them through nothing.
Captions alone close the gap: each text, whose encoder stays as it is, ranks the images of the batch, and LoRA in the
image encoder's attention moves them (arXiv 2405.00571, written anew from the paper). The adapter is merged at the end,
so that a tuned model is an ordinary [`TrainingFreeModel`], and a start for PVLF.
"""

from typing import Any

from torch import Tensor, nn

from ..models.dual_encoder_pvlf import DualEncoderModel
from ..models.interface_pvlf import ComposedRetrievalOutput
from .own_forward import replace_forward

RANK = 16
"""Rank of the adapter (arXiv 2405.00571)."""


def tune_image_encoder(model: DualEncoderModel, rank: int = RANK) -> Any:
    """Put LoRA into the attention of a model's image encoder; everything else stays as it is.

    Args:
        model: the model, a [`TrainingFreeModel`].
        rank: rank of the adapter.

    Returns:
        A `peft.PeftModel`, for [`PVLFTrainer`] and pairs of images and captions; `merge_and_unload()` ends it.

    Raises:
        ImportError: if PEFT is not installed.
        ValueError: if the image encoder has no attention that LoRA knows.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('text-anchored tuning needs PEFT: `pip install "pvlf-hf[lora]"`') from error
    sides = {id(module) for module in model.image_side.values()}
    roots = [name for name, module in model.named_modules() if id(module) in sides]
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and "attn" in name.lower().replace("attention", "attn")
        and any(name.startswith(f"{root}.") for root in roots)
    ]
    if not names:
        raise ValueError(f"the image encoder of {type(model).__name__} has no linear layer in an attention to adapt")
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=names))


def accept_pairs(model: nn.Module) -> None:
    """Let a model's `forward` take pairs of images and captions beside its own inputs.

    Args:
        model: a [`TrainingFreeModel`] in an adapter; before DDP or FSDP wraps it.
    """
    replace_forward(model, _forward_of_pairs)


def _forward_of_pairs(
    self: Any,
    *args: Any,
    caption_ids: Tensor | None = None,
    caption_attention_mask: Tensor | None = None,
    return_loss: bool | None = None,
    **inputs: Any,
) -> ComposedRetrievalOutput:
    """Embed captions as queries and images as targets; without captions, compute what the model's `forward` does."""
    if caption_ids is None:
        return type(self).forward(self, *args, return_loss=return_loss, **inputs)
    texts = self.get_text_features(caption_ids, caption_attention_mask).pooler_output
    images = self.get_image_features(inputs["target_pixel_values"]).pooler_output
    return ComposedRetrievalOutput(query_embeds=texts, target_embeds=images)


__all__ = ["RANK", "accept_pairs", "tune_image_encoder"]
