"""The pretrained dual encoders behind one small interface. Saved with checkpoints.

A further dual encoder takes one subclass of [`DualEncoder`] here, its entry in `DUAL_ENCODERS`, and its
[`BackboneSpec`] in the configuration.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AltCLIPTextModel,
    AltCLIPVisionModel,
    BlipTextModel,
    BlipVisionModel,
    CLIPTextModel,
    CLIPVisionModel,
    MetaClip2TextModel,
    MetaClip2VisionModel,
    PreTrainedConfig,
    SiglipTextModel,
    SiglipVisionModel,
)
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.utils import logging

from .configuration_pvlf import BACKBONES, joint_width
from .encoder_pvlf import DualEncoder, gather_tokens
from .prompts_pvlf import insert_prompts, pass_layers, widen_mask

logger = logging.get_logger(__name__)


class FusedBlipAttention(BlipAttention):
    """ViT attention by SDPA: the 577 x 577 weights, most of the activation memory in training, are never stored."""

    def forward(  # type: ignore[override]  # it has no weights to return
        self, hidden_states: Tensor, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Map `(batch, length, width)` to the same shape."""
        batch, length, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, length, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (batch, heads, length, head_dim) each
        dropout = self.dropout.p if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=self.scale)
        return self.projection(out.transpose(1, 2).reshape(batch, length, width)), None


class BlipDualEncoder(DualEncoder):
    """BLIP's ViT and its BERT in unimodal mode, with the projections of the retrieval checkpoints."""

    vision_modules = ("vision_model", "vision_proj")
    text_modules = ("text_encoder", "text_proj")

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        # Transformers has only eager attention for BLIP and refuses a whole model that asks for another. The ViT's is
        # replaced here; the text encoder's stays eager, because captions are short.
        config.vision_config._attn_implementation = config.text_config._attn_implementation = "eager"
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.vision_proj = nn.Linear(config.vision_config.hidden_size, joint_width(config))
        self.text_proj = nn.Linear(config.text_config.hidden_size, joint_width(config))
        self.fuse_attention()

    def fuse_attention(self) -> None:
        """Replace the ViT's attention by SDPA, see [`DualEncoder.fuse_attention`]."""
        for layer in self.vision_model.encoder.layers:
            layer.self_attn.__class__ = FusedBlipAttention

    def set_attn_implementation(self, name: str) -> None:
        """Leave both encoders as they are: Transformers' BLIP has eager attention only."""

    @classmethod
    def check_checkpoint(cls, name_or_path: str, config: PreTrainedConfig) -> None:
        """Refuse the head count of `BlipTextConfig`'s defaults, see [`DualEncoder.check_checkpoint`]."""
        text = config.text_config
        if text.hidden_size == 768 and text.num_attention_heads == 8:
            raise ValueError(
                f"{name_or_path}: its config says 8 text heads, but BLIP base has 12; the weights would load and give "
                "wrong embeddings. Set text_config.num_attention_heads to 12 in its config.json."
            )

    def image_tokens(self, pixel_values: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Embed images, see [`DualEncoder.image_tokens`]."""
        vision = self.vision_model
        if prompts is None:
            # last_hidden_state has passed post_layernorm; pooler_output would pass it twice.
            hidden = vision(pixel_values=pixel_values).last_hidden_state
        else:
            hidden = vision.embeddings(pixel_values)
            count = hidden.shape[1]
            hidden = insert_prompts(hidden, prompts[0], count)
            hidden = vision.post_layernorm(pass_layers(vision.encoder.layers, hidden, prompts, count))
        return self.vision_proj(hidden)

    def text_tokens(
        self, input_ids: Tensor, attention_mask: Tensor | None, prompts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embed captions, see [`DualEncoder.text_tokens`]."""
        text = self.text_encoder
        if prompts is None:
            hidden = text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        else:
            words = insert_prompts(text.get_input_embeddings()(input_ids), prompts[0], 1)
            hidden = text.embeddings(inputs_embeds=words)
            mask = create_bidirectional_mask(
                config=text.config, inputs_embeds=hidden, attention_mask=widen_mask(attention_mask, prompts.shape[1])
            )
            hidden = pass_layers(text.encoder.layer, hidden, prompts, 1, attention_mask=mask)
        return self.text_proj(hidden), input_ids.new_zeros(input_ids.shape[0])  # [CLS] comes first

    def image_features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images, see [`DualEncoder.image_features`]."""
        tokens = self.vision_model(pixel_values=pixel_values).last_hidden_state
        return tokens, self.vision_proj(tokens[:, 0])

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None, embeds: Tensor) -> Tensor:
        """Encode captions from embeddings, see [`DualEncoder.text_features`]."""
        # BLIP adds positions to the embeddings in place: they belong to the caller.
        hidden = self.text_encoder(inputs_embeds=embeds.clone(), attention_mask=attention_mask).last_hidden_state
        return self.text_proj(hidden[:, 0])

    def padding_mask(self, input_ids: Tensor) -> Tensor:
        """Return the attention mask that token ids imply, see [`DualEncoder.padding_mask`]."""
        padding: int = self.text_encoder.config.pad_token_id  # type: ignore[assignment]  # BERT has one
        return input_ids.ne(padding).long()


class ClipDualEncoder(DualEncoder):
    """CLIP's two encoders."""

    vision_modules = ("vision_model", "visual_projection")
    text_modules = ("text_model", "text_projection")
    vision_class: Any = CLIPVisionModel
    text_class: Any = CLIPTextModel
    misnamed_end_token = {
        2: 49407
    }  # configurations from before Transformers 4.31 say 2 where OpenAI's end token is meant

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.vision_model = self.vision_class(config.vision_config)
        self.text_model = self.text_class(config.text_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, joint_width(config), bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, joint_width(config), bias=False)
        end_token = config.text_config.eos_token_id
        self.end_token = self.misnamed_end_token.get(end_token, end_token)

    def image_tokens(self, pixel_values: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Embed images, see [`DualEncoder.image_tokens`]."""
        vision = self.vision_model
        if prompts is None:
            hidden = vision(pixel_values=pixel_values).last_hidden_state
        else:
            hidden = vision.embeddings(pixel_values)
            count = hidden.shape[1]
            hidden = vision.pre_layrnorm(insert_prompts(hidden, prompts[0], count))
            hidden = pass_layers(vision.encoder.layers, hidden, prompts, count, attention_mask=None)
        # Unlike BLIP's, these tokens have not passed the final norm; CLIP itself norms and projects only row 0.
        return self.visual_projection(vision.post_layernorm(hidden))

    def text_tokens(
        self, input_ids: Tensor, attention_mask: Tensor | None, prompts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embed captions, see [`DualEncoder.text_tokens`]."""
        # The encoder is causal and padding is on the right, so no token attends to it: it needs no mask.
        text = self.text_model
        if prompts is None:
            hidden = text(input_ids=input_ids).last_hidden_state
        else:
            words = insert_prompts(text.get_input_embeddings()(input_ids), prompts[0], 1)
            hidden = text.embeddings(inputs_embeds=words)
            causal = create_causal_mask(
                config=text.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None
            )
            hidden = pass_layers(text.encoder.layers, hidden, prompts, 1, attention_mask=causal, is_causal=True)
            hidden = text.final_layer_norm(hidden)
        return self.text_projection(hidden), self.end_position(input_ids, attention_mask)

    def image_features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images, see [`DualEncoder.image_features`]; tokens have not passed the final norm."""
        tokens = self.vision_model(pixel_values=pixel_values).last_hidden_state
        return tokens, self.visual_projection(self.vision_model.post_layernorm(tokens[:, 0]))

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None, embeds: Tensor) -> Tensor:
        """Encode captions from embeddings, see [`DualEncoder.text_features`]."""
        model = self.text_model
        hidden = model.embeddings(inputs_embeds=embeds)
        # Attention is causal and padding on the right, so no token attends to it.
        causal = create_causal_mask(
            config=model.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None
        )
        hidden = model.encoder(inputs_embeds=hidden, attention_mask=causal, is_causal=True).last_hidden_state
        last = gather_tokens(hidden, self.end_position(input_ids, attention_mask))
        return self.text_projection(model.final_layer_norm(last))

    def end_position(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return the position of each caption's end token, int64 `(batch,)`.

        The tokenizer writes the end token last, so a mask tells its position whatever its id is. Without a mask,
        captions may be padded with end tokens, and the first one counts; a caption without any ends in its last token.
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        if attention_mask is not None:
            return (attention_mask.long() * positions).argmax(dim=1)
        is_end = (input_ids == self.end_token).long()
        return torch.where(is_end.any(dim=1), is_end.argmax(dim=1), positions[-1])


class MetaClip2DualEncoder(ClipDualEncoder):
    """MetaCLIP 2's two encoders: CLIP's with a multilingual vocabulary."""

    vision_class = MetaClip2VisionModel
    text_class = MetaClip2TextModel
    misnamed_end_token: dict[int, int] = {}  # 2 is its end token


class AltClipDualEncoder(ClipDualEncoder):
    """AltCLIP's two encoders: CLIP's for images, a multilingual RoBERTa for text."""

    vision_class = AltCLIPVisionModel
    text_class = AltCLIPTextModel

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.text_projection = nn.Linear(config.text_config.project_dim, joint_width(config), bias=False)

    def text_tokens(
        self, input_ids: Tensor, attention_mask: Tensor | None, prompts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embed captions, see [`DualEncoder.text_tokens`]; the configuration refuses prompts."""
        hidden = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.text_projection(hidden), input_ids.new_zeros(input_ids.shape[0])  # <s> comes first


class SiglipDualEncoder(DualEncoder):
    """SigLIP's two encoders, and SigLIP 2's at a fixed resolution.

    SigLIP has neither a [CLS] token nor an image projection. A head pools the patches: a learnt probe attends to them,
    and a residual MLP follows, `head(X) = r + MLP(LN(r))` with `r = W_out (sum_j a_j W_value x_j)`. Attention weights
    `a` sum to 1. If the probe attended to patch j alone, the feature would be that of `r = W_out W_value x_j`; this
    projects each patch into the joint space (our choice). Row 0 is the image feature itself.

    Text: every token passes `head`, the linear layer after the encoder; the feature is that of the last position.
    """

    vision_modules = ("vision_model",)
    text_modules = ("text_model",)

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.vision_model = SiglipVisionModel(config.vision_config)
        self.text_model = SiglipTextModel(config.text_config)
        self.text_length = min(BACKBONES["siglip"].text_length, config.text_config.max_position_embeddings)

    @classmethod
    def check_checkpoint(cls, name_or_path: str, config: PreTrainedConfig) -> None:
        """Refuse encoders without a joint space, see [`DualEncoder.check_checkpoint`]."""
        if not config.vision_config.vision_use_head:
            raise ValueError(
                f"{name_or_path}: its config says vision_use_head=false, so it has no image feature to compare with "
                "text; pass a checkpoint trained on image-text pairs, such as google/siglip2-base-patch16-256"
            )
        if joint_width(config) != config.text_config.projection_size:
            raise ValueError(
                f"{name_or_path}: its image features have width {joint_width(config)}, its text features "
                f"{config.text_config.projection_size}; pass a checkpoint trained on image-text pairs"
            )

    def image_tokens(self, pixel_values: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Embed images, see [`DualEncoder.image_tokens`]; the configuration refuses prompts."""
        hidden = self.vision_model(pixel_values=pixel_values).last_hidden_state
        return torch.cat([self.vision_model.head(hidden)[:, None], self.attended_alone(hidden)], dim=1)

    def attended_alone(self, hidden_states: Tensor) -> Tensor:
        """Compute the head's output as if the probe attended to one patch alone, for each: `(batch, m, d)`."""
        # By the head's own forward, which is where weights that are offloaded come back.
        return self.vision_model.head(hidden_states.flatten(0, 1)[:, None]).unflatten(0, hidden_states.shape[:2])

    def text_tokens(
        self, input_ids: Tensor, attention_mask: Tensor | None, prompts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embed captions, see [`DualEncoder.text_tokens`]; the configuration refuses prompts.

        Raises:
            ValueError: if captions are not padded to the length that SigLIP was trained with.
        """
        batch, length = input_ids.shape
        if length != self.text_length:
            raise ValueError(
                f"captions are {length} tokens long, but SigLIP pools at position {self.text_length - 1}: pad them "
                f'to {self.text_length} with padding="max_length", as the processor saved with this checkpoint does'
            )
        # No mask: the encoder was trained to attend to padding.
        tokens = self.text_model.head(self.text_model(input_ids=input_ids).last_hidden_state)
        return tokens, input_ids.new_full((batch,), length - 1)


DUAL_ENCODERS: dict[str, type[DualEncoder]] = {
    "altclip": AltClipDualEncoder,
    "blip": BlipDualEncoder,
    "clip": ClipDualEncoder,
    "metaclip_2": MetaClip2DualEncoder,
    "siglip": SiglipDualEncoder,
}


def load_pretrained_dual_encoder(
    name_or_path: str, config: PreTrainedConfig, may_be_new: str | None = None, **kwargs: Any
) -> DualEncoder:
    """Load the encoders and projections of an existing checkpoint, and nothing else of it.

    Args:
        name_or_path: Hub name or local folder.
        config: the checkpoint's own configuration, of a family in `DUAL_ENCODERS`.
        may_be_new: part of the names of weights that the checkpoint may lack; a log message says so if it does.
        kwargs: passed to `from_pretrained` (`revision`, `token`, `dtype`, ...).

    Raises:
        ValueError: if the checkpoint lacks weights that the encoder needs.
    """
    encoder_class = DUAL_ENCODERS[config.model_type]
    encoder_class.check_checkpoint(name_or_path, config)
    loader = getattr(transformers, BACKBONES[config.model_type].loader)
    pretrained, info = loader.from_pretrained(name_or_path, config=config, output_loading_info=True, **kwargs)
    with torch.device("meta"):
        encoder = encoder_class(config)
    wanted = (*encoder.vision_modules, *encoder.text_modules)
    missing = sorted(k for k in info["missing_keys"] if k.startswith(wanted) and "position_ids" not in k)
    if new := [name for name in missing if may_be_new is not None and may_be_new in name]:
        missing = sorted({*missing} - {*new})
        logger.warning(
            f"{name_or_path} lacks {len(new)} weights named *{may_be_new}*, which are new and must be trained before "
            f"use, first: {new[:3]}"
        )
    if missing:
        raise ValueError(
            f"{name_or_path} lacks {len(missing)} weights of {loader.__name__}, first: "
            f"{missing[:3]}. PVLF needs a retrieval checkpoint such as Salesforce/blip-itm-base-coco, or a CLIP one."
        )
    for name in wanted:
        setattr(encoder, name, getattr(pretrained, name))
    encoder.fuse_attention()
    return encoder


__all__ = [
    "DUAL_ENCODERS",
    "BlipDualEncoder",
    "ClipDualEncoder",
    "DualEncoder",
    "MetaClip2DualEncoder",
    "SiglipDualEncoder",
    "gather_tokens",
    "load_pretrained_dual_encoder",
]
