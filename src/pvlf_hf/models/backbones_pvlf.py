"""The pretrained dual encoders behind one small interface. Travels with checkpoints.

A further dual encoder is one more subclass of [`DualEncoder`], an entry in `DUAL_ENCODERS`, and the name of its width
in `JOINT_WIDTH_FIELD` of the configuration.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BlipForImageTextRetrieval,
    BlipTextModel,
    BlipVisionModel,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.blip.modeling_blip import BlipAttention


class DualEncoder(nn.Module):
    """A pretrained image encoder and text encoder that project *every* token to one joint width `d`.

    Subclasses build the modules that `vision_modules` and `text_modules` name, and define the two `*_tokens` methods.

    Attributes:
        pretrained_class: the Transformers class whose checkpoints hold these weights.
        vision_modules, text_modules: names of the submodules of each side, projection included.
    """

    pretrained_class: type[PreTrainedModel]
    vision_modules: tuple[str, str]
    text_modules: tuple[str, str]

    def image_tokens(self, pixel_values: Tensor) -> Tensor:
        """All projected image tokens (V_0 of section 3.1).

        Args:
            pixel_values: `(batch, 3, height, width)` at the resolution of the vision config.

        Returns:
            `(batch, 1 + patches, d)`, not normalised; row 0 is the global image feature.
        """
        raise NotImplementedError

    def text_tokens(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """All projected text tokens (W_0 of section 3.1) and where the global one stands.

        Args:
            input_ids: int64 `(batch, length)`, padded on the right.
            attention_mask: `(batch, length)`, 1 for tokens and 0 for padding; None when nothing is padded.

        Returns:
            `(batch, length, d)`, not normalised, and int64 `(batch,)`, the position of the global text feature.
        """
        raise NotImplementedError

    def fuse_attention(self) -> None:
        """Puts a fused kernel where Transformers only has attention written out; the weights stay as they are."""


class FusedBlipAttention(BlipAttention):
    """The ViT's attention without its 577 x 577 weights, which in training are most of what an image keeps."""

    def forward(  # type: ignore[override]  # it has no weights to return
        self, hidden_states: Tensor, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """`(batch, length, width)` to the same shape."""
        batch, length, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, length, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (batch, heads, length, head_dim) each
        dropout = self.dropout.p if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=self.scale)
        return self.projection(out.transpose(1, 2).reshape(batch, length, width)), None


class BlipDualEncoder(DualEncoder):
    """BLIP's ViT and its BERT in unimodal mode, with the projections of the retrieval checkpoints."""

    pretrained_class = BlipForImageTextRetrieval
    vision_modules = ("vision_model", "vision_proj")
    text_modules = ("text_encoder", "text_proj")

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        # Transformers has eager attention only for BLIP, and refuses the whole model when asked for another: what the
        # fusion layers use is set for them alone, and the ViT's is replaced here. Captions are short.
        config.vision_config._attn_implementation = config.text_config._attn_implementation = "eager"
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.vision_proj = nn.Linear(config.vision_config.hidden_size, config.image_text_hidden_size)
        self.text_proj = nn.Linear(config.text_config.hidden_size, config.image_text_hidden_size)
        self.fuse_attention()

    def fuse_attention(self) -> None:
        """See [`DualEncoder.fuse_attention`]."""
        for layer in self.vision_model.encoder.layers:
            layer.self_attn.__class__ = FusedBlipAttention

    def image_tokens(self, pixel_values: Tensor) -> Tensor:
        """See [`DualEncoder.image_tokens`]."""
        # last_hidden_state has passed post_layernorm; pooler_output would pass it twice.
        return self.vision_proj(self.vision_model(pixel_values=pixel_values).last_hidden_state)

    def text_tokens(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """See [`DualEncoder.text_tokens`]."""
        hidden = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.text_proj(hidden), input_ids.new_zeros(input_ids.shape[0])  # [CLS] stands first


class ClipDualEncoder(DualEncoder):
    """CLIP's two towers."""

    pretrained_class = CLIPModel
    vision_modules = ("vision_model", "visual_projection")
    text_modules = ("text_model", "text_projection")

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.text_model = CLIPTextModel(config.text_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.eos_token_id = config.text_config.eos_token_id

    def image_tokens(self, pixel_values: Tensor) -> Tensor:
        """See [`DualEncoder.image_tokens`]."""
        hidden = self.vision_model(pixel_values=pixel_values).last_hidden_state
        # Unlike BLIP's, these tokens have not passed the final norm; CLIP itself norms and projects only row 0.
        return self.visual_projection(self.vision_model.post_layernorm(hidden))

    def text_tokens(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """See [`DualEncoder.text_tokens`]."""
        # The tower is causal and padding stands on the right, so no token sees it: it needs no mask.
        tokens = self.text_projection(self.text_model(input_ids=input_ids).last_hidden_state)
        # Configs older than Transformers 4.31 say 2 for the end token, which has the largest id of the vocabulary.
        is_end = input_ids if self.eos_token_id == 2 else (input_ids == self.eos_token_id).int()
        return tokens, is_end.argmax(dim=-1)


DUAL_ENCODERS: dict[str, type[DualEncoder]] = {"blip": BlipDualEncoder, "clip": ClipDualEncoder}


def load_pretrained_dual_encoder(name_or_path: str, config: PreTrainedConfig, **kwargs: Any) -> DualEncoder:
    """Loads the towers and projections of an existing BLIP or CLIP checkpoint, and nothing else of it.

    Args:
        name_or_path: Hub name or local folder.
        config: the checkpoint's own configuration.
        kwargs: passed to `from_pretrained` (`revision`, `token`, `dtype`, ...).

    Raises:
        ValueError: if the checkpoint lacks weights that the encoder needs.
    """
    encoder_class = DUAL_ENCODERS[config.model_type]
    text = config.text_config
    if config.model_type == "blip" and text.hidden_size == 768 and text.num_attention_heads == 8:
        raise ValueError(
            f"{name_or_path}: its config says 8 text heads, but BLIP base has 12; the weights would load and give "
            "wrong embeddings. Set text_config.num_attention_heads to 12 in its config.json."
        )
    loaded: Any = encoder_class.pretrained_class.from_pretrained(
        name_or_path, config=config, output_loading_info=True, **kwargs
    )
    pretrained, info = loaded
    with torch.device("meta"):
        encoder = encoder_class(config)
    wanted = (*encoder.vision_modules, *encoder.text_modules)
    missing = sorted(k for k in info["missing_keys"] if k.startswith(wanted) and "position_ids" not in k)
    if missing:
        raise ValueError(
            f"{name_or_path} lacks {len(missing)} weights of {encoder_class.pretrained_class.__name__}, first: "
            f"{missing[:3]}. PVLF needs a retrieval checkpoint such as Salesforce/blip-itm-base-coco, or a CLIP one."
        )
    for name in wanted:
        setattr(encoder, name, getattr(pretrained, name))
    encoder.fuse_attention()
    return encoder


__all__ = ["DUAL_ENCODERS", "BlipDualEncoder", "ClipDualEncoder", "DualEncoder", "load_pretrained_dual_encoder"]
