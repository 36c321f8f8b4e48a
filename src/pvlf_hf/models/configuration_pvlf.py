"""Configuration of PVLF. Saved with checkpoints, so it imports only files that are saved too."""

from copy import deepcopy
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.pipelines import PIPELINE_REGISTRY

from .pipeline_pvlf import CUSTOM_PIPELINES


@dataclass(frozen=True)
class BackboneSpec:
    """Facts of a family of pretrained dual encoders that its own configuration does not hold.

    Args:
        loader: name of the class of Transformers that loads its checkpoints.
        width_field: path in its configuration to the joint width `d`.
        text_length: tokens that captions are truncated to, special tokens included.
        padding: `"longest"` of the batch, or `"max_length"` for text encoders trained with all positions filled.
        image_mean: mean of each channel of an image whose values are in [0, 1].
        image_std: standard deviation, likewise.
        text_settings: settings of its text configuration that are set in every model.
        tokenizers: class of a checkpoint's tokenizer to the class that is loaded in its place.
    """

    loader: str
    width_field: str
    text_length: int
    padding: str = "longest"
    image_mean: tuple[float, ...] = tuple(OPENAI_CLIP_MEAN)
    image_std: tuple[float, ...] = tuple(OPENAI_CLIP_STD)
    text_settings: tuple[tuple[str, Any], ...] = ()
    tokenizers: tuple[tuple[str, str], ...] = ()


BACKBONES = {
    # Without cross-attention, which composed retrieval does not use: as a decoder it would carry 28 M idle weights.
    "blip": BackboneSpec(
        "BlipForImageTextRetrieval", "image_text_hidden_size", text_length=35, text_settings=(("is_decoder", False),)
    ),  # 35 tokens: TransAgg
    "clip": BackboneSpec("CLIPModel", "projection_dim", text_length=77),
    "metaclip_2": BackboneSpec("MetaClip2Model", "projection_dim", text_length=77),
    "altclip": BackboneSpec("AltCLIPModel", "projection_dim", text_length=77),  # the length of its training
    # SigLIP, and SigLIP 2 of fixed resolution. The text encoder has no mask: it was trained on 64 filled positions.
    "siglip": BackboneSpec(
        "SiglipModel",
        "vision_config.hidden_size",
        text_length=64,
        padding="max_length",
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        # SigLIP's own class is not one of the tokenizers library. SigLIP 2 was trained on lower case, its checkpoints
        # name Gemma's, which keeps the case.
        tokenizers=(("SiglipTokenizer", "PreTrainedTokenizerFast"), ("GemmaTokenizer", "Siglip2Tokenizer")),
    ),
}
"""Supported families of dual encoders, by `model_type`."""

# Settings under which PVLF equals its baseline TransAgg: one shallow prompt (its separator token), cross-entropy.
TRANSAGG = {"num_prompts": 1, "prompt_depth": 1, "gamma": 0.0}

BUDGET = 2 * 25
"""Prompts of PVLF-Deep in all, each as wide as the joint space: other places get as many weights (Figure 2)."""

PROMPTED_ENCODERS = ("blip", "clip", "metaclip_2")
"""Families whose encoders take prompts; SigLIP's text has a fixed length and no first token to put them behind."""

CHOICES = {
    "prompt_location": ("none", "text", "vision", "both", "fusion"),
    "prompt_coupling": ("independent", "tied", "linear"),
    "composition": ("transagg", "sum"),
    "residual": ("pre_norm", "paper"),
    "aggregation_mlp_input": ("fused", "encoder"),
    "aggregation_sum_input": ("encoder", "fused"),
    "text_padding": ("masked", "transagg"),
}

# BLIP base as released (`Salesforce/blip-itm-base-coco`). `BlipConfig()` alone is something else: 8 text heads
# instead of 12, and a vision tower that starts at zero.
BLIP_BASE = {
    "model_type": "blip",
    "text_config": {"num_attention_heads": 12},
    "vision_config": {"layer_norm_eps": 1e-6, "initializer_range": 0.02},
}


@strict
class DualEncoderConfig(PreTrainedConfig):
    """Base class of the configurations of models on a pretrained dual encoder.

    Args:
        vl_config (`PreTrainedConfig` or `dict`, *optional*, defaults to BLIP base): the dual encoder. Its joint width
            is the width `d` of embeddings.
    """

    sub_configs_defaults = {"vl_config": SubConfigSpec(config_class=AutoConfig, model_type="blip")}

    vl_config: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vl_config is None:
            self.vl_config = BLIP_BASE
        elif not isinstance(self.vl_config, dict | PreTrainedConfig):
            raise ValueError(f"vl_config={self.vl_config!r}: pass a BlipConfig, a CLIPConfig or a dict of one")
        self.vl_config = deepcopy(self.vl_config)  # it is changed below, and belongs to the caller
        # Where the package has registered the pipeline, naming it again would ask the user to trust remote code.
        registered = CUSTOM_PIPELINES.keys() <= PIPELINE_REGISTRY.supported_tasks.keys()
        kwargs["custom_pipelines"] = {} if registered else deepcopy(CUSTOM_PIPELINES)
        super().__post_init__(**kwargs)
        if self.vl_config.model_type in BACKBONES:
            for name, value in BACKBONES[self.vl_config.model_type].text_settings:
                setattr(self.vl_config.text_config, name, value)

    @property
    def joint_width(self) -> int:
        """Width `d` of every projected token, prompt and embedding."""
        return joint_width(self.vl_config)

    @property
    def hidden_size(self) -> int:
        """Width `d`, under the name that Transformers and Accelerate look for."""
        return self.joint_width

    @property
    def text_positions(self) -> int:
        """Longest caption that the text encoder has positions for, special tokens included."""
        return self.vl_config.text_config.max_position_embeddings

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """Return the text encoder's configuration, which has the vocabulary and the special tokens."""
        return self.vl_config.get_text_config(*args, **kwargs)

    def validate_architecture(self) -> None:
        """Refuse settings that cannot go together (also called by `@strict` when saved)."""
        if self.vl_config.model_type not in BACKBONES:
            raise ValueError(
                f"vl_config has model_type {self.vl_config.model_type!r}; PVLF is built on one of "
                f"{[*BACKBONES]}. Pass a BlipConfig or a CLIPConfig."
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration from a dictionary, see the library.

        Raises:
            ValueError: if it is that of another family, whose weights would not be found and be made anew.
        """
        refuse_other_family(cls, config_dict)
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dictionary, always with the pipeline that is saved with a checkpoint."""
        return {**super().to_dict(), "custom_pipelines": deepcopy(CUSTOM_PIPELINES)}


@strict
class PVLFConfig(DualEncoderConfig):
    """Configuration of a [`PVLFModel`].

    Sections and equations are those of "Prompting Vision-Language Fusion for Zero-Shot Composed Image Retrieval"
    (ACML 2024); "TransAgg" is its baseline, whose code settles what the paper leaves open.

    Args:
        vl_config (`BlipConfig`, `CLIPConfig` or `dict`, *optional*, defaults to BLIP base):
            The dual encoder. Its joint width is the width `d` of everything below.
        num_prompts (`int`, *optional*, defaults to 25): learnable context prompts per layer, `p` (Table 4); in
            encoders by default as many as have the weights of PVLF-Deep's 2 x 25.
        prompt_depth (`int`, *optional*, defaults to `fusion_layers`):
            How many fusion layers get prompts of their own. 1 is PVLF-Shallow (eq. 8-9: prompts enter the first
            layer and are carried on); `fusion_layers` is PVLF-Deep (eq. 12: every layer gets fresh ones). In
            encoders 2 by default; 1 is CoOp or VPT-Shallow.
        prompt_init_std (`float`, *optional*, defaults to 1.0, in encoders to 0.02):
            Prompts start from a normal of this width. The paper says "random"; 1 is TransAgg's separator token,
            0.02 CoOp's and MaPLe's.
        fusion_layers (`int`, *optional*, defaults to 2): fusion Transformer layers, `J` (Table 5).
        fusion_heads (`int`, *optional*, defaults to 8): attention heads of a fusion layer (TransAgg).
        fusion_ffn_size (`int`, *optional*, defaults to 2048): feed-forward width of a fusion layer (TransAgg).
        dropout (`float`, *optional*, defaults to 0.5): in fusion layers and the aggregation MLP (TransAgg).
        layer_norm_eps (`float`, *optional*, defaults to 1e-5): of the fusion layers (TransAgg).
        residual (`"pre_norm"` or `"paper"`, *optional*, defaults to `"pre_norm"`):
            `"pre_norm"`: `U + MSA(LN(U))`, then `U + FFN(LN(U))` (TransAgg). `"paper"`: equations 10-11 to the
            letter, `U' = MSA(U) + LN(U)`, then `FFN(LN(U')) + LN(U')`.
        aggregation_mlp_input (`"fused"` or `"encoder"`, *optional*, defaults to `"fused"`):
            Which global image and text features the aggregation MLP reads (eq. 13): those that left the fusion
            Transformer (TransAgg) or the encoders' own.
        aggregation_sum_input (`"encoder"` or `"fused"`, *optional*, defaults to `"encoder"`):
            Which global features the weighted sum of eq. 13 mixes with the MLP's output.
        text_padding (`"masked"` or `"transagg"`, *optional*, defaults to `"masked"`):
            `"masked"`: fusion never attends to text padding. `"transagg"`: padding is attended to, with 1.0 added to
            its attention scores, as in TransAgg's training; only for reproducing that, with captions padded to the
            maximum length.
        alpha (`float`, *optional*, defaults to 1.0): factor of the focal InfoNCE loss (eq. 15).
        gamma (`float`, *optional*, defaults to 2.0): focusing exponent (eq. 15); 0 is cross-entropy.
        temperature (`float`, *optional*, defaults to 0.01): `τ` of eq. 14.
        prompt_location (`str`, *optional*, defaults to `"fusion"`):
            Where the prompts sit (Figure 2): `"fusion"` (PVLF), `"text"` (CoOp), `"vision"` (VPT), `"both"` (IVLP,
            MaPLe) or `"none"`.
        prompt_coupling (`str`, *optional*, defaults to `"independent"`):
            With `"both"`: vision prompts of their own (IVLP), `"tied"` (the text prompts themselves, where widths
            agree) or `"linear"` (MaPLe: a Linear of the text prompts in each layer, whose weights come on top).
        prompt_gallery (`bool`, *optional*, defaults to `False`):
            Whether gallery images pass the image encoder with its prompts, too. Their index is then this model's.
        num_vision_prompts (`int`, *optional*): with `"both"` and independent prompts those of the image encoder, by
            default half of the budget, or `num_prompts` where that is given.
        composition (`"transagg"` or `"sum"`, *optional*, defaults to `"transagg"`):
            `"transagg"`: fusion and aggregation as above. `"sum"`: the normalised sum of the normalised features,
            without weights of its own, so that only prompts train.

    Raises:
        ValueError: if the settings cannot go together; the message says what to change.

    Example:
        >>> from pvlf_hf import PVLFConfig
        >>> PVLFConfig().joint_width  # BLIP base
        256
        >>> PVLFConfig(prompt_depth=1).num_prompts  # PVLF-Shallow
        25
    """

    model_type = "pvlf"
    added_settings = ("prompt_location", "prompt_coupling", "prompt_gallery", "num_vision_prompts", "composition")
    attribute_map = {"num_hidden_layers": "fusion_layers", "num_attention_heads": "fusion_heads"}

    num_prompts: int | None = None
    prompt_depth: int | None = None
    prompt_init_std: float | int | None = None
    fusion_layers: int = 2
    fusion_heads: int = 8
    fusion_ffn_size: int = 2048
    dropout: float | int = 0.5
    layer_norm_eps: float | int = 1e-5
    residual: str = "pre_norm"
    aggregation_mlp_input: str = "fused"
    aggregation_sum_input: str = "encoder"
    text_padding: str = "masked"
    alpha: float | int = 1.0
    gamma: float | int = 2.0
    temperature: float | int = 0.01
    prompt_location: str = "fusion"
    prompt_coupling: str = "independent"
    prompt_gallery: bool = False
    num_vision_prompts: int | None = None
    composition: str = "transagg"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._choose_prompts()
        # `@strict` validates once more after this, and when saving, but wraps what it catches in an exception that is
        # no ValueError.
        self.validate_architecture()

    def _choose_prompts(self) -> None:
        """Set the settings of prompts that are not given."""
        in_fusion = self.prompt_location == "fusion"
        if self.prompt_depth is None:
            self.prompt_depth = self.fusion_layers if in_fusion else 0 if self.prompt_location == "none" else 2
        if self.prompt_init_std is None:
            self.prompt_init_std = 1.0 if in_fusion else 0.02
        independent = self.prompt_location == "both" and self.prompt_coupling == "independent"
        if independent and self.num_vision_prompts is None:
            self.num_vision_prompts = self.num_prompts or self._within_budget("vision_config", 0.5)
        if self.num_prompts is None:
            tower = "vision_config" if self.prompt_location == "vision" else "text_config"
            encoders = self.prompt_location in ("text", "vision", "both")
            budget = self._within_budget(tower, 0.5 if independent else 1.0) if encoders else 0
            self.num_prompts = 25 if in_fusion else budget

    def _within_budget(self, tower: str, share: float) -> int:
        """Return how many prompts a layer of an encoder gets for a share of PVLF-Deep's weights."""
        width = getattr(self.vl_config, tower).hidden_size
        return max(1, round(share * BUDGET * self.joint_width / width / max(1, self.prompt_depth or 0)))

    @property
    def fusion_prompts(self) -> int:
        """Prompts per layer in the fusion."""
        return (self.num_prompts or 0) if self.prompt_location == "fusion" else 0

    @property
    def text_prompts(self) -> int:
        """Prompts per layer in the text encoder."""
        return (self.num_prompts or 0) if self.prompt_location in ("text", "both") else 0

    @property
    def vision_prompts(self) -> int:
        """Prompts per layer in the image encoder."""
        if self.prompt_location not in ("vision", "both"):
            return 0
        return self.num_vision_prompts or self.num_prompts or 0

    @property
    def text_positions(self) -> int:
        """Longest caption that the text encoder has positions for beside its prompts, special tokens included."""
        return super().text_positions - self.text_prompts

    def validate_architecture(self) -> None:
        """Refuse settings that cannot go together (also called by `@strict` when saved)."""
        super().validate_architecture()
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {choices}")
        for name in ("num_prompts", "fusion_layers", "fusion_heads", "fusion_ffn_size"):
            fewest = int(name != "num_prompts" or self.prompt_location != "none")
            if getattr(self, name) < fewest:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        self._validate_prompts()
        if self.joint_width % self.fusion_heads:
            fitting = [h for h in range(1, self.joint_width + 1) if self.joint_width % h == 0 and h <= 16]
            raise ValueError(
                f"fusion_heads={self.fusion_heads} does not divide the joint width {self.joint_width} of vl_config: "
                f"choose one of {fitting}"
            )
        if self.aggregation_mlp_input == "encoder" and self.aggregation_sum_input == "encoder":
            raise ValueError(
                "aggregation_mlp_input='encoder' and aggregation_sum_input='encoder' leave the fusion Transformer "
                "without effect: set one of them to 'fused'"
            )
        for name, allowed in (("dropout", 0 <= self.dropout < 1), ("temperature", self.temperature > 0)):
            if not allowed:
                raise ValueError(f"{name}={getattr(self, name)} is out of range: dropout in [0, 1), temperature > 0")
        if self.gamma < 0 or self.alpha <= 0 or (self.prompt_init_std or 0) < 0:
            raise ValueError(
                f"need gamma >= 0, alpha > 0 and prompt_init_std >= 0, got gamma={self.gamma}, alpha={self.alpha}, "
                f"prompt_init_std={self.prompt_init_std}"
            )

    def _validate_prompts(self) -> None:
        """Refuse settings of prompts that cannot go together."""
        location, family = self.prompt_location, self.vl_config.model_type
        text, vision = self.vl_config.text_config, self.vl_config.vision_config
        towers = {"text": [text], "vision": [vision], "both": [text, vision]}.get(location, [])
        deepest = min((tower.num_hidden_layers for tower in towers), default=self.fusion_layers)
        where = "the encoder's layers" if towers else "fusion_layers"
        both, independent = location == "both", self.prompt_coupling == "independent"
        if location == "none" and (self.num_prompts or self.prompt_depth):
            raise ValueError("prompt_location='none' has no prompts: leave num_prompts and prompt_depth out")
        if location != "none" and not 1 <= (self.prompt_depth or 0) <= deepest:
            raise ValueError(
                f"prompt_depth={self.prompt_depth} must lie between 1 and {where}={deepest}: lower prompt_depth"
                + ("" if towers else " or raise fusion_layers")
            )
        if towers and family not in PROMPTED_ENCODERS:
            raise ValueError(
                f"prompt_location={location!r} is defined on {PROMPTED_ENCODERS}, not on {family!r}: choose 'fusion'"
            )
        if not independent and not both:
            raise ValueError(f"prompt_coupling={self.prompt_coupling!r} is for prompt_location='both'")
        if self.num_vision_prompts is not None and not (both and independent and self.num_vision_prompts > 0):
            raise ValueError(
                f"num_vision_prompts={self.num_vision_prompts} is for prompt_location='both' with independent "
                "prompts, and must be at least 1; num_prompts counts all others"
            )
        if self.prompt_gallery and location not in ("vision", "both"):
            raise ValueError(f"prompt_gallery=True needs prompts in the image encoder, not {location!r}")
        if self.prompt_coupling == "tied" and text.hidden_size != vision.hidden_size:
            raise ValueError(
                f"prompt_coupling='tied' needs encoders of one width, as in BLIP base, not {text.hidden_size} and "
                f"{vision.hidden_size}: choose 'linear' or 'independent'"
            )
        if self.text_positions < 3:
            raise ValueError(
                f"num_prompts={self.num_prompts} leave {self.text_positions} of {super().text_positions} positions, "
                "not enough for a word and its two special tokens: lower it"
            )
        if self.composition == "sum" and location == "fusion":
            raise ValueError(
                "composition='sum' has no fusion: choose prompt_location 'none', 'text', 'vision' or 'both'"
            )

    @classmethod
    def transagg(cls, **kwargs: Any) -> "PVLFConfig":
        """Configure the TransAgg baseline: one shallow prompt (its separator token) and plain cross-entropy.

        Args:
            kwargs: any argument of [`PVLFConfig`], `vl_config` for instance.
        """
        return cls(**{**TRANSAGG, **kwargs})


def refuse_other_family(kind: type[PreTrainedConfig], config_dict: dict[str, Any]) -> None:
    """Raise a `ValueError` if a saved configuration is of another `model_type` than a class of configurations."""
    if (saved := config_dict.get("model_type", kind.model_type)) != kind.model_type:
        raise ValueError(
            f"this checkpoint is of model_type {saved!r}, not {kind.model_type!r}: load it by "
            "AutoModel.from_pretrained, or, if it is a pretrained dual encoder, build on it with from_vl_pretrained"
        )


def load_vl_config(name_or_path: str, **kwargs: Any) -> Any:
    """Load the configuration of a pretrained dual encoder.

    Args:
        name_or_path: Hub name or local folder.
        **kwargs: passed to `from_pretrained` (`revision`, `token`, `cache_dir`, ...).

    Raises:
        ValueError: if it is that of a model that was built on one.
    """
    config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    if hasattr(config, "vl_config"):
        raise ValueError(
            f"{name_or_path} is a composed retrieval model (model_type {config.model_type!r}), and from_vl_pretrained "
            "builds on a pretrained dual encoder: load it by AutoModel.from_pretrained and "
            "AutoProcessor.from_pretrained, or pass the dual encoder that it was built on"
        )
    return config


def joint_width(vl_config: PreTrainedConfig) -> int:
    """Return the width `d` of the joint space of a dual encoder's configuration."""
    return attrgetter(BACKBONES[vl_config.model_type].width_field)(vl_config)


PVLFConfig.register_for_auto_class()

__all__ = ["BACKBONES", "BackboneSpec", "DualEncoderConfig", "PVLFConfig", "load_vl_config"]
