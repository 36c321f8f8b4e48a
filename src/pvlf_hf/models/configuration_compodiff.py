"""Configuration of CompoDiff. Saved with checkpoints."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_pvlf import BACKBONES, DualEncoderConfig

# Of the released model: the image side of CLIP ViT-L/14, the text encoder of ViT-bigG/14 (laion2B-39B-b160k).
TOWERS = {
    "model_type": "clip",
    "projection_dim": 768,
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "text_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "projection_dim": 1280,
    },
}


@strict
class CompoDiffConfig(DualEncoderConfig):
    """Configuration of a [`CompoDiffModel`].

    Defaults are those of the released model and of its demo, unless marked "ours".

    Args:
        vl_config (`CLIPConfig` or `dict`, *optional*, defaults to the image side of ViT-L/14, the text encoder of
            bigG/14): the frozen encoders. Their joint width is the width `d` of the denoiser, their text width may be
            any. Other families of `BACKBONES` than CLIP are ours, for comparison.
        denoiser_layers, denoiser_heads, head_width (`int`, *optional*, default to 12, 16, 64): of the denoiser.
        cross_heads (`int`, *optional*, defaults to 8): heads of its cross-attention.
        mask_size (`int`, *optional*, defaults to 64): side of the mask, in its own pixels.
        timesteps (`int`, *optional*, defaults to 1000): steps of the noise schedule in training.
        image_embed_scale (`float`, *optional*, defaults to 1.0): factor of embeddings while they are noised.
        negative_ids (`list[int]`, *optional*): tokens of the empty text, special tokens included, without padding;
            [`CompoDiffProcessor`] has them.
        pad_id (`int`, *optional*): token that pads captions, as the tokenizer does.
        negative_mask (`"own"` or `"caption"`, *optional*, defaults to `"own"`): padding of the negative text is its
            own, or that of the caption beside it, as in the released demo.
        steps (`int`, *optional*, defaults to 10): times of sampling, for one less steps of the denoiser.
        num_samples (`int`, *optional*, defaults to 2): samples whose mean is the query.
        image_guidance, text_guidance (`float`, *optional*, default to 1.5, 7.5): scales of guidance; 1 is none.
        source_weight (`float`, *optional*, defaults to 0.1): weight of the reference image in a query; the demo has
            0.05 where there is a mask.
        seed (`int`, *optional*, defaults to 0): seed of the noise of queries (ours).
        image_dropout, text_dropout (`float`, *optional*, default to 0.1): share of training queries whose image is
            zeros, or whose text is the empty one (ours: the paper's rates could not be read).

    Raises:
        ValueError: if the settings cannot go together; the message says what to change.

    Example:
        >>> from pvlf_hf import CompoDiffConfig
        >>> config = CompoDiffConfig()
        >>> config.hidden_size, config.text_width, config.text_length
        (768, 1280, 77)
    """

    model_type = "compodiff"
    sub_configs_defaults = {"vl_config": SubConfigSpec(config_class=AutoConfig, model_type="clip")}

    denoiser_layers: int = 12
    denoiser_heads: int = 16
    head_width: int = 64
    cross_heads: int = 8
    mask_size: int = 64
    timesteps: int = 1000
    image_embed_scale: float | int = 1.0
    negative_ids: list[int] | None = None
    pad_id: int | None = None
    negative_mask: str = "own"
    steps: int = 10
    num_samples: int = 2
    image_guidance: float | int = 1.5
    text_guidance: float | int = 7.5
    source_weight: float | int = 0.1
    seed: int = 0
    image_dropout: float | int = 0.1
    text_dropout: float | int = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vl_config is None:
            self.vl_config = TOWERS
        super().__post_init__(**kwargs)
        self.validate_architecture()  # raises a ValueError, which @strict would wrap, see PVLFConfig

    @property
    def text_width(self) -> int:
        """Width of text tokens, before any projection; SigLIP's projection is a part of its text encoder."""
        text: Any = self.vl_config.text_config
        return text.projection_size if self.vl_config.model_type == "siglip" else text.hidden_size

    @property
    def text_length(self) -> int:
        """Tokens of every caption, padding included: the denoiser reads them all."""
        longest = self.vl_config.text_config.max_position_embeddings
        return min(BACKBONES[self.vl_config.model_type].text_length, longest)

    def validate_architecture(self) -> None:
        """Refuse settings that cannot go together (also called by `@strict` when saved)."""
        super().validate_architecture()
        sizes = ("denoiser_layers", "denoiser_heads", "head_width", "cross_heads", "mask_size", "num_samples")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("joint_width", "head_width"):
            if getattr(self, name) % 2:
                raise ValueError(f"{name}={getattr(self, name)} must be even: sines and cosines fill it in pairs")
        if self.joint_width < 4:
            raise ValueError(f"the joint width {self.joint_width} of vl_config must be at least 4")
        if self.timesteps < 2 or not 2 <= self.steps <= self.timesteps:
            raise ValueError(
                f"steps={self.steps} must lie between 2 and timesteps={self.timesteps}: n steps are n - 1 calls of "
                "the denoiser; the released model offers 2, 3, 5 and 10"
            )
        if self.negative_mask not in ("own", "caption"):
            raise ValueError(f"negative_mask={self.negative_mask!r}: choose 'own' or 'caption'")
        for name in ("image_dropout", "text_dropout", "source_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")
        if self.image_embed_scale <= 0:
            raise ValueError(f"image_embed_scale={self.image_embed_scale} must be above 0")
        self._check_negative()

    def _check_negative(self) -> None:
        """Raise a `ValueError` unless the negative text can be tokens of the text encoder."""
        if (self.negative_ids is None) != (self.pad_id is None):
            raise ValueError("negative_ids and pad_id go together: pass both, as CompoDiffProcessor has them, or none")
        if self.negative_ids is None:
            return
        vocab_size = self.vl_config.text_config.vocab_size
        pad_id: Any = self.pad_id
        if unknown := [i for i in (*self.negative_ids, pad_id) if not 0 <= i < vocab_size]:
            raise ValueError(
                f"negative_ids and pad_id hold {unknown}, but the vocabulary of vl_config has {vocab_size} tokens: "
                "take them from the processor of this checkpoint"
            )
        if len(self.negative_ids) > self.text_length:
            raise ValueError(
                f"negative_ids has {len(self.negative_ids)} tokens: pass {self.text_length} at most, without padding"
            )


CompoDiffConfig.register_for_auto_class()

__all__ = ["CompoDiffConfig"]
