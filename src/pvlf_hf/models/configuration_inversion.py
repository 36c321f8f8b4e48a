"""Configuration of textual inversion models, and the table of their methods. Saved with checkpoints."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_pvlf import joint_width, refuse_other_family
from .pipeline_pvlf import CUSTOM_PIPELINES

INVERTIBLE = ("clip", "blip")
"""Model types of dual encoders whose text encoder takes pseudo words."""


@dataclass(frozen=True)
class InversionMethod:
    """Facts of a textual inversion method.

    Args:
        mapping: kind of its mapping network, see `MAPPINGS`; None where a token is optimised for each image.
        placeholder: the word that stands for the reference image, one token of CLIP's vocabulary.
        placeholder_id: id of that token in OpenAI's vocabulary.
        template: sentence of a query.
        prompts: sentences of an image alone, by which a mapping network trains or a token is optimised.
        replace: `"first"` or `"all"` placeholders of a row become the pseudo word.
        mapping_width: width of the mapping network's hidden layers; None for four times its input width.
        dropout: dropout of the mapping network.
        normalize_features: whether the mapping network reads L2-normalised image features.
        target_pad: whether images are padded towards a square before they are resized.
        steps: optimisation steps of a token for an image; 0 where none is optimised.
    """

    mapping: str | None
    placeholder: str
    placeholder_id: int
    template: str
    prompts: tuple[str, ...]
    replace: str = "first"
    mapping_width: int | None = None
    dropout: float = 0.0
    normalize_features: bool = False
    target_pad: bool = False
    steps: int = 0


MEDIA = ("a photo", "an illustration", "a sketch", "a diagram")

# SEARLE-OTI's 24 sentences, "illustrations" among them.
OTI_PROMPTS = (
    *(f"This is {medium} of a $" for medium in MEDIA),
    *(f"This {medium.split()[1]} contains a $" for medium in MEDIA),
    *("A photo of a $", "An illustrations of a $", "A sketch of a $", "A diagram of a $"),
    *("A $", "We see a $", "$"),
    *(f"We see a $ in this {medium}" for medium in ("photo", "image", "illustration")),
    *(f"We see a $ {medium}" for medium in ("photo", "image", "illustration")),
    *(f"$ {medium}" for medium in ("photo", "image", "illustration")),
)

# Settings of each method's own code. PALAVRA's for composed retrieval is unpublished, so it uses SEARLE's template.
METHODS = {
    "pic2word": InversionMethod(
        "mlp", "*", 265, "a photo of * , {caption}", ("a photo of *",), mapping_width=512, dropout=0.1
    ),
    "searle": InversionMethod(
        "phi", "$", 259, "a photo of $ that {caption}", ("a photo of $",), dropout=0.5, target_pad=True
    ),
    "lincir": InversionMethod(
        "phi", "$", 259, "a photo of $ that {caption}", ("a photo of $",), replace="all", dropout=0.5
    ),
    # Its tokenizer gives the last entry of CLIP's vocabulary, the word "jekyll", to the placeholder.
    "context_i2w": InversionMethod(
        "context",
        "jekyll",
        49405,
        "a photo of jekyll , {caption}",
        ("a photo of jekyll",),
        mapping_width=512,
        dropout=0.1,
    ),
    "searle_oti": InversionMethod(
        None, "$", 259, "a photo of $ that {caption}", OTI_PROMPTS, target_pad=True, steps=350
    ),
    # Its prompts are the token alone, and the coarse word that it must differ from.
    "palavra": InversionMethod(
        "deep_set",
        "*",
        265,
        "a photo of * that {caption}",
        ("*", "item"),
        mapping_width=4096,
        dropout=0.25,
        normalize_features=True,
        steps=30,
    ),
}
"""Name of a textual inversion method to its facts."""


@strict
class InversionConfig(PreTrainedConfig):
    """Configuration of an [`InversionModel`].

    Defaults of None are those of the method, see `METHODS`.

    Args:
        vl_config (`CLIPConfig` or `dict`, *optional*, defaults to CLIP ViT-B/32): the dual encoder.
        method (`str`, *optional*, defaults to `"pic2word"`): a name in `METHODS`.
        placeholder_id (`int`, *optional*): token that the pseudo word replaces. The defaults are ids of
            OpenAI's vocabulary, which all released checkpoints have.
        replace (`"first"` or `"all"`, *optional*): which placeholders of a row become the pseudo word.
        mapping_width (`int`, *optional*): width of the mapping network's hidden layers.
        mapping_layers (`int`, *optional*, defaults to 2): hidden layers of the MLP of Pic2Word and Context-I2W.
        dropout (`float`, *optional*): dropout of the mapping network.
        normalize_features (`bool`, *optional*): whether the mapping network reads L2-normalised image features
            (`--l2_normalize` of LinCIR, off there by default).
        latents, extractor_layers, extractor_heads, extractor_head_width (`int`, *optional*, default to 4, 6, 8, 64):
            learned queries, layers, heads and width of a head of Context-I2W's extractor.
        temperature (`float`, *optional*, defaults to 0.01): temperature of the contrastive loss, `exp(-logit_scale)`
            of the dual encoder; 0.01 is that of OpenAI's checkpoints.
        unpublished_backbone (`bool`, *optional*, defaults to `False`): accept a BLIP, too, and for Context-I2W
            a joint width other than the text width. On these the methods are defined here by analogy; nobody has
            published figures.
        inversion_steps (`int`, *optional*): optimisation steps of a token, 350 for SEARLE-OTI and 30 for PALAVRA.

    Raises:
        ValueError: if the settings cannot go together; the message says what to change.

    Example:
        >>> from pvlf_hf import InversionConfig
        >>> config = InversionConfig(method="lincir")
        >>> config.replace, config.placeholder_id, config.mapping_width
        ('all', 259, 2048)
    """

    model_type = "textual_inversion"
    sub_configs_defaults = {"vl_config": SubConfigSpec(config_class=AutoConfig, model_type="clip")}

    vl_config: Any = None
    method: str = "pic2word"
    placeholder_id: int | None = None
    replace: str | None = None
    mapping_width: int | None = None
    mapping_layers: int = 2
    dropout: float | int | None = None
    normalize_features: bool | None = None
    latents: int = 4
    extractor_layers: int = 6
    extractor_heads: int = 8
    extractor_head_width: int = 64
    temperature: float | int = 0.01
    unpublished_backbone: bool = False
    inversion_steps: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vl_config is None:
            self.vl_config = {"model_type": "clip", "projection_dim": 512}
        elif not isinstance(self.vl_config, dict | PreTrainedConfig):
            raise ValueError(f"vl_config={self.vl_config!r}: pass a CLIPConfig or a dict of one")
        self.vl_config = deepcopy(self.vl_config)  # it belongs to the caller
        # Where the package has registered the pipeline, naming it again would ask the user to trust remote code.
        registered = CUSTOM_PIPELINES.keys() <= PIPELINE_REGISTRY.supported_tasks.keys()
        kwargs["custom_pipelines"] = {} if registered else deepcopy(CUSTOM_PIPELINES)
        super().__post_init__(**kwargs)
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: choose one of {sorted(METHODS)}")
        if self.vl_config.model_type != "clip" and not self.unpublished_backbone:
            raise ValueError(
                f"vl_config has model_type {self.vl_config.model_type!r}, but textual inversion is defined on CLIP "
                f"alone: no published {self.method} has another backbone. Pass a CLIPConfig, or "
                "unpublished_backbone=True for BLIP."
            )
        if self.vl_config.model_type not in INVERTIBLE:
            raise ValueError(
                f"vl_config has model_type {self.vl_config.model_type!r}, whose text encoder takes no pseudo words: "
                f"choose one of {INVERTIBLE}"
            )
        facts = METHODS[self.method]
        for name in ("placeholder_id", "replace", "dropout", "normalize_features"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(facts, name))
        if self.mapping_width is None:
            self.mapping_width = facts.mapping_width or 4 * self.joint_width
        if self.inversion_steps is None:
            self.inversion_steps = facts.steps
        self.validate_architecture()

    @property
    def joint_width(self) -> int:
        """Width `d` of embeddings."""
        return joint_width(self.vl_config)

    @property
    def hidden_size(self) -> int:
        """Width `d`, under the name that Transformers and Accelerate look for."""
        return self.joint_width

    @property
    def word_width(self) -> int:
        """Width of pseudo words, that of the text encoder's token embeddings."""
        return self.vl_config.text_config.hidden_size

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """Return the text encoder's configuration, which has the vocabulary and the special tokens."""
        return self.vl_config.get_text_config(*args, **kwargs)

    def validate_architecture(self) -> None:
        """Refuse settings that cannot go together (also called by `@strict` when saved)."""
        if self.replace not in ("first", "all"):
            raise ValueError(f"replace={self.replace!r}: choose 'first' or 'all'")
        vocab_size = self.vl_config.text_config.vocab_size
        if not 0 <= (self.placeholder_id or 0) < vocab_size:
            raise ValueError(
                f"placeholder_id={self.placeholder_id} is not a token of vl_config, whose vocabulary has {vocab_size}"
                ": pass the id that its tokenizer gives the placeholder"
            )
        sizes = ("mapping_width", "mapping_layers", "latents", "extractor_layers", "extractor_heads")
        for name in (*sizes, "extractor_head_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, allowed in (
            ("dropout", 0 <= (self.dropout or 0) < 1),
            ("temperature", self.temperature > 0),
            ("inversion_steps", (self.inversion_steps or 0) >= 0),
        ):
            if not allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)} is out of range: dropout in [0, 1), temperature > 0, "
                    "inversion_steps >= 0"
                )
        widths = self.joint_width, self.word_width
        if METHODS[self.method].mapping == "context" and widths[0] != widths[1] and not self.unpublished_backbone:
            raise ValueError(
                f"Context-I2W is published for a joint width that equals the text width, not {widths[0]} and "
                f"{widths[1]}: use ViT-B/32 or ViT-L/14, another method, or unpublished_backbone=True"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration from a dictionary, see [`DualEncoderConfig.from_dict`].

        Raises:
            ValueError: as there, and for another `method` than the dictionary's, whose weights would not fit it.
        """
        refuse_other_family(cls, config_dict)
        made, asked = config_dict.get("method", cls.method), kwargs.get("method")
        if asked not in (None, made):
            raise ValueError(f"method={asked!r}: this is a checkpoint of {made!r}; load it without method")
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dictionary, always with the pipeline that is saved with a checkpoint."""
        return {**super().to_dict(), "custom_pipelines": deepcopy(CUSTOM_PIPELINES)}


InversionConfig.register_for_auto_class()

__all__ = ["INVERTIBLE", "METHODS", "InversionConfig", "InversionMethod"]
