"""PVLF: prompting vision-language fusion for composed image retrieval. Saved with checkpoints.

The story of a query (section 3 of the paper): the reference image and the relative caption pass the dual encoder;
text tokens, learnable prompts and image tokens meet in a small fusion Transformer (`PVLFFusion`); the aggregation
(`PVLFAggregation`) mixes its result with the encoders' own global features into one embedding, which is compared
with gallery images by cosine.

Shapes: `batch` queries, `n` text tokens, `p` prompts, `m` image patches, `d` the joint width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import can_return_tuple

from .backbones_pvlf import gather_tokens
from .configuration_pvlf import PVLFConfig
from .dual_encoder_pvlf import DualEncoderModel
from .fusion_pvlf import PVLFAggregation, PVLFFusion, PVLFFusionAttention, PVLFFusionLayer
from .interface_pvlf import ComposedRetrievalOutput, QueryOutput, normalize
from .loss_pvlf import focal_info_nce
from .prompts_pvlf import TowerPrompts


@dataclass
class PVLFQueryOutput(QueryOutput):
    """Query embeddings with the values that explain them, as [`PVLFModel.get_query_features`] returns them.

    Args:
        aggregation_weights (`(batch, 3)`): w of eq. 13, for the image feature, the fused feature and the text feature.
        hidden_states (`tuple`, with `output_hidden_states=True`): the input of the first fusion layer, and every
            layer's output, each `(batch, n + p + 1 + m, d)` in the order text, prompts, image.
        attentions (`tuple`, with `output_attentions=True`): one `(batch, heads, length, length)` per fusion layer.
    """

    aggregation_weights: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class PVLFOutput(ComposedRetrievalOutput):
    """Embeddings of queries and targets, the focal InfoNCE loss (eq. 15), and the values that explain queries.

    Args:
        aggregation_weights (`(batch, 3)`): w of eq. 13, for image, fused and text feature.
        hidden_states (`tuple`, with `output_hidden_states=True`): states of the fusion layers, input first.
        attentions (`tuple`, with `output_attentions=True`): attention weights of the fusion layers.
    """

    aggregation_weights: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class PVLFPreTrainedModel(DualEncoderModel):
    """Class attributes of PVLF and the initialisation of its own weights."""

    config_class = PVLFConfig
    base_model_prefix = "pvlf"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as TransAgg's modules do: PyTorch's defaults, unlike the base class's normal(0, 0.02)."""
        super()._init_weights(module)
        if isinstance(module, PVLFFusion | TowerPrompts):
            for prompts in module.parameters(recurse=False):
                init.normal_(prompts, std=self.config.prompt_init_std)
        if isinstance(module, TowerPrompts):
            for coupling in module.couplings or ():
                init_linear(coupling)  # type: ignore[arg-type]  # a ModuleList has no element type
        elif isinstance(module, PVLFFusionAttention):
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                # nn.MultiheadAttention initialises q, k and v as one (3d, d) matrix: this gain gives the same bound.
                init.xavier_uniform_(projection.weight, gain=0.5**0.5)
            init_linear(module.out_proj)
            init.zeros_(module.out_proj.bias)
        elif isinstance(module, PVLFFusionLayer):
            init_linear(module.linear1)
            init_linear(module.linear2)
        elif isinstance(module, PVLFAggregation):
            for linear in (module.combiner, module.output, module.weights):
                init_linear(linear)


def init_linear(linear: nn.Linear) -> None:
    """Initialise as `nn.Linear` does, through the library's functions, which leave loaded weights alone."""
    bound = linear.in_features**-0.5
    init.uniform_(linear.weight, -bound, bound)
    init.uniform_(linear.bias, -bound, bound)


class PVLFModel(PVLFPreTrainedModel):
    """Composed image retrieval: embeds "this image, but ..." and gallery images into one space.

    Example:
        >>> from PIL import Image
        >>> from transformers import AutoModel, AutoProcessor
        >>> import pvlf_hf

        >>> model = AutoModel.from_pretrained("model_cards/pvlf-emoji-tiny")
        >>> processor = AutoProcessor.from_pretrained("model_cards/pvlf-emoji-tiny")
        >>> image = Image.new("RGB", (72, 72), "gold")
        >>> query = model.get_query_features(**processor.process_queries(image, "make it blue"))
        >>> query.pooler_output.shape
        torch.Size([1, 128])
    """

    def __init__(self, config: PVLFConfig) -> None:
        super().__init__(config)
        self.explains = config.composition == "transagg"
        self.fusion = PVLFFusion(config) if self.explains else None
        self.aggregation = PVLFAggregation(config) if self.explains else None
        self.prompts = TowerPrompts(config) if config.text_prompts or config.vision_prompts else None
        self.post_init()

    @classmethod
    def from_vl_pretrained(cls, name_or_path: str, **kwargs: Any) -> "PVLFModel":
        """Build PVLF on a pretrained dual encoder, with fresh fusion weights.

        Args:
            name_or_path: Hub name or local folder of a checkpoint of one of `BACKBONES`
                (`Salesforce/blip-itm-base-coco` is the paper's).
            kwargs: settings of [`PVLFConfig`] (`num_prompts=10`); the rest is passed to `from_pretrained`
                (`revision`, `token`, `cache_dir`, ...). `attn_implementation` is that of the fusion Transformer.

        Returns:
            the model in eval mode. A log message says which weights are new.

        Raises:
            ValueError: if the checkpoint is not one of a supported dual encoder.
        """
        return super().from_vl_pretrained(name_or_path, **kwargs)  # type: ignore[return-value]

    @property
    def gallery_prompts(self) -> nn.Module | None:
        """Prompts that gallery images pass with, see [`ComposedRetrievalModel.gallery_prompts`]."""
        return self.prompts if self.config.prompt_gallery else None

    def encode_image_tokens(self, pixel_values: Tensor, as_query: bool = False) -> Tensor:
        """Encode images as tokens; reference images of queries by the encoder with its prompts, if it has any."""
        if self.prompts is None or not (as_query or self.config.prompt_gallery):
            return self.backbone.image_tokens(pixel_values)
        _, prompts = self.prompts()
        return self.backbone.image_tokens(pixel_values, prompts)

    def encode_text_tokens(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Encode captions as tokens by the text encoder with its prompts, if it has any.

        Raises:
            ValueError: if captions and prompts are longer than the text encoder's positions.
        """
        if self.prompts is None:
            return self.backbone.text_tokens(input_ids, attention_mask)
        if input_ids.shape[1] > self.config.text_positions:
            raise ValueError(
                f"captions of {input_ids.shape[1]} tokens and {self.config.text_prompts} prompts are more than the "
                f"text encoder's positions: set the processor's max_text_length to {self.config.text_positions}"
            )
        prompts, _ = self.prompts()
        return self.backbone.text_tokens(input_ids, attention_mask, prompts)

    @can_return_tuple
    def get_query_features(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> PVLFQueryOutput:
        """Embed queries, each a reference image and a relative caption.

        Args:
            pixel_values: `(batch, 3, height, width)`, reference images.
            input_ids: int64 `(batch, n)`, relative captions; all from [`PVLFProcessor.process_queries`].
            attention_mask: `(batch, n)`, 0 for padding; None when nothing is padded.
            output_attentions: return the fusion layers' attention weights, which this call then computes eagerly;
                by default as the configuration says.
            output_hidden_states: return the fusion layers' states; by default as the configuration says.
            **kwargs: `return_dict=False` for a tuple.

        Raises:
            ValueError: if the numbers of images and captions differ.
        """
        image_tokens = self._image_tokens(pixel_values, as_query=True)
        text_tokens, text_position = self.encode_text_tokens(input_ids, attention_mask)
        return self.compose(
            image_tokens, text_tokens, text_position, attention_mask, output_attentions, output_hidden_states
        )

    def compose(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        text_position: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> PVLFQueryOutput:
        """Fuse and aggregate tokens that are encoded already (eq. 8-13).

        Args:
            image_tokens: `(batch, 1 + m, d)`, `last_hidden_state` of [`~PVLFModel.get_image_features`].
            text_tokens: `(batch, n, d)`, `last_hidden_state` of [`~PVLFModel.get_text_features`].
            text_position: int64 `(batch,)`, position of each caption's global feature.
            attention_mask: `(batch, n)`, 0 for padding; None when nothing is padded.
            output_attentions: return attention weights, see [`~PVLFModel.get_query_features`].
            output_hidden_states: return hidden states, likewise.

        Raises:
            ValueError: as [`~PVLFModel.get_query_features`]; if attentions of a plain sum are requested.
        """
        if image_tokens.shape[0] != text_tokens.shape[0]:
            raise ValueError(f"{image_tokens.shape[0]} reference images but {text_tokens.shape[0]} relative captions")
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        # Autocast leaves half precision behind, and so does the feature cache (TransAgg casts here, too).
        image_tokens, text_tokens = image_tokens.to(self.dtype), text_tokens.to(self.dtype)
        encoder = (image_tokens[:, 0], gather_tokens(text_tokens, text_position))
        image_embeds, text_embeds = map(normalize, encoder)
        # The reference image alone is embedded as the gallery is, which may be without prompts.
        alone = image_embeds if self.config.prompt_gallery or not self.config.vision_prompts else None
        if self.fusion is None or self.aggregation is None:
            if output_attentions or output_hidden_states:
                raise ValueError("composition='sum' has neither attentions nor hidden states")
            query = normalize(image_embeds + text_embeds)
            return PVLFQueryOutput(pooler_output=query, image_embeds=alone, text_embeds=text_embeds)
        if attention_mask is not None:  # the global text feature takes part, even at a padded position (SigLIP)
            attention_mask = attention_mask.scatter(1, text_position[:, None], 1)
        image_position = torch.full_like(text_position, text_tokens.shape[1] + self.config.fusion_prompts)
        pooled_positions = torch.stack([image_position, text_position], dim=1)
        keep_all = output_attentions or output_hidden_states
        hidden, states, attentions = self.fusion(
            text_tokens, image_tokens, attention_mask, None if keep_all else pooled_positions, bool(output_attentions)
        )
        fused = (gather_tokens(hidden, pooled_positions) if keep_all else hidden).unbind(1)
        mlp_input = fused if self.config.aggregation_mlp_input == "fused" else encoder
        sum_input = fused if self.config.aggregation_sum_input == "fused" else encoder
        query, weights = self.aggregation(*mlp_input, *sum_input)
        return PVLFQueryOutput(
            pooler_output=normalize(query),
            image_embeds=alone,
            text_embeds=text_embeds,
            aggregation_weights=weights,
            hidden_states=states if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )

    def compose_embeds(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor | None:
        """Compose queries from embeddings, see [`ComposedRetrievalModel.compose_embeds`].

        Returns:
            their normalised sum where the composition is one and the gallery's embeddings are those of a query.
        """
        if self.fusion is not None or (self.config.vision_prompts and not self.config.prompt_gallery):
            return None
        return normalize(image_embeds + text_embeds)

    def start_output(self, query: QueryOutput | None) -> PVLFOutput:
        """Start the output of `forward` from that of `get_query_features`."""
        if not isinstance(query, PVLFQueryOutput):
            return PVLFOutput()
        return PVLFOutput(
            query_embeds=query.pooler_output,
            aggregation_weights=query.aggregation_weights,
            hidden_states=query.hidden_states,
            attentions=query.attentions,
        )

    def loss(self, query_embeds: Tensor, target_embeds: Tensor, **kwargs: Any) -> Tensor:
        """Compute [`focal_info_nce`] with this configuration's temperature, alpha and gamma."""
        c = self.config
        return focal_info_nce(query_embeds, target_embeds, c.temperature, c.alpha, c.gamma, **kwargs)


PVLFModel.register_for_auto_class("AutoModel")

__all__ = ["PVLFModel", "PVLFOutput", "PVLFPreTrainedModel", "PVLFQueryOutput"]
