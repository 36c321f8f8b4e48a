"""Configuration of training-free models. Saved with checkpoints."""

from typing import Any

from huggingface_hub.dataclasses import strict

from .compositions_training_free import COMPOSITIONS
from .configuration_pvlf import DualEncoderConfig


@strict
class TrainingFreeConfig(DualEncoderConfig):
    """Configuration of a [`TrainingFreeModel`].

    Args:
        vl_config (`PreTrainedConfig` or `dict`, *optional*, defaults to BLIP base): the dual encoder. Its joint width
            is the width `d` of embeddings.
        composition (`"sum"`, `"slerp"` or `"product"`, *optional*, defaults to `"slerp"`):
            How the image feature v and the text feature t become a query. `"sum"`: norm(a t + (1 - a) v).
            `"slerp"`: the point that lies the fraction a of the way from v to t on the sphere (arXiv 2405.00571).
            `"product"`: no vector; an image scores max(0, s_v)^(1 - a) max(0, s_t)^a by its similarities with v and
            t, centred by the gallery's mean (i-CIR, NeurIPS 2025). It is not fine-tuned.
        composition_weight (`float`, *optional*, defaults to that of `COMPOSITIONS`):
            a, the weight of the text: 0 is the image alone, 1 the text alone. Sum and Slerp were published with
            0.8, the product corresponds to 0.5; it is worth choosing on validation data.
        temperature (`float`, *optional*, defaults to 0.07): of InfoNCE, for fine-tuning (arXiv 2405.00571).

    Raises:
        ValueError: if a setting is invalid; the message says what to change.

    Example:
        >>> from pvlf_hf import TrainingFreeConfig
        >>> TrainingFreeConfig(composition="sum").composition_weight
        0.8
    """

    model_type = "training_free_cir"

    composition: str = "slerp"
    composition_weight: float | int | None = None
    temperature: float | int = 0.07

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.composition_weight is None and self.composition in COMPOSITIONS:
            self.composition_weight = COMPOSITIONS[self.composition].default_weight
        self.validate_architecture()  # raises a ValueError, which @strict would wrap, see PVLFConfig

    def validate_architecture(self) -> None:
        """Raise a `ValueError` for invalid settings (also called by `@strict` when saved)."""
        super().validate_architecture()
        if self.composition not in COMPOSITIONS:
            raise ValueError(f"composition={self.composition!r}: choose one of {sorted(COMPOSITIONS)}")
        if not 0 <= (self.composition_weight or 0) <= 1:
            raise ValueError(
                f"composition_weight={self.composition_weight} is the weight of the text beside the image's: choose "
                "one from 0 (the image alone) to 1 (the text alone)"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")


TrainingFreeConfig.register_for_auto_class()

__all__ = ["TrainingFreeConfig"]
