"""PVLF: prompting vision-language fusion for composed image retrieval. Travels with checkpoints.

The story of a query (section 3 of the paper): the reference image and the relative caption pass the dual encoder;
text tokens, learnable prompts and image tokens meet in a small fusion Transformer (`PVLFFusion`); the aggregation
(`PVLFAggregation`) mixes its result with the encoders' own global features into one embedding, which is compared
with gallery images by cosine.

Shapes: `batch` queries, `n` text tokens, `p` prompts, `m` image patches, `d` the joint width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple, logging

from .backbones_pvlf import DUAL_ENCODERS, load_pretrained_dual_encoder
from .configuration_pvlf import PVLFConfig
from .loss_pvlf import cosine_similarity, focal_info_nce

logger = logging.get_logger(__name__)


@dataclass
class PVLFQueryOutput(ModelOutput):
    """What [`PVLFModel.get_query_features`] returns.

    Args:
        pooler_output (float32 `(batch, d)`): the query embedding f_q, L2-normalised.
        aggregation_weights (`(batch, 3)`): w of eq. 13, for the image feature, the fused feature and the text feature.
        hidden_states (`tuple`, with `output_hidden_states=True`): the input of the first fusion layer, and every
            layer's output, each `(batch, n + p + 1 + m, d)` in the order text, prompts, image.
        attentions (`tuple`, with `output_attentions=True`): one `(batch, heads, length, length)` a fusion layer.
    """

    pooler_output: Tensor | None = None
    aggregation_weights: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class PVLFOutput(ModelOutput):
    """What [`PVLFModel`] returns.

    Args:
        loss (float32 scalar, with targets unless `return_loss=False`): focal InfoNCE over the batch (eq. 15).
        query_embeds (float32 `(batch, d)`): query embeddings, L2-normalised.
        target_embeds (float32 `(targets, d)`, with targets): target image embeddings, L2-normalised.
        similarity (float32 `(batch, targets)`, as the loss): their cosines, not divided by the temperature.
        aggregation_weights (`(batch, 3)`): w of eq. 13, for image, fused and text feature.
        hidden_states (`tuple`, with `output_hidden_states=True`): of the fusion layers, input first.
        attentions (`tuple`, with `output_attentions=True`): of the fusion layers.
    """

    loss: Tensor | None = None
    query_embeds: Tensor | None = None
    target_embeds: Tensor | None = None
    similarity: Tensor | None = None
    aggregation_weights: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def drop(states: Tensor, p: float, training: bool) -> Tensor:
    """`F.dropout`; on a CPU with p in steps of 2^-16, because PyTorch draws a number for each element there.

    Here a draw serves four, each with sixteen of its bits, which takes a sixth of the time.
    """
    if not (training and 0 < p < 1 and states.device.type == "cpu"):
        return F.dropout(states, p, training)
    draws = torch.randint(-(2**63), 2**63 - 1, (-(-states.numel() // 4),))
    bits = draws.view(torch.int16)[: states.numel()].view(states.shape)
    return states * (bits >= int(p * 2**16) - 2**15).to(states.dtype).div_(1 - p)


class Dropout(nn.Dropout):
    """`nn.Dropout` by [`drop`]."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape to the same."""
        return drop(input, self.p, self.training)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out; the only one of the library's implementations that also returns the weights."""
    scores = query * scaling @ key.transpose(-1, -2)  # (batch, heads, length, length)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    out = drop(weights, dropout, module.training) @ value
    return out.transpose(1, 2).contiguous(), weights


class PVLFFusionAttention(nn.Module):
    """Multi-head self-attention over text, prompts and image."""

    def __init__(self, config: PVLFConfig) -> None:
        super().__init__()
        self.config = config
        width = config.joint_width
        self.head_dim = width // config.fusion_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.dropout
        self.is_causal = False  # the library's SDPA is causal unless told otherwise
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, asking: Tensor, hidden_states: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What `(batch, k, d)` find in `(batch, length, d)`, and the weights where the implementation has them."""
        query, key, value = (
            projection(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, states in (
                (self.q_proj, asking),
                (self.k_proj, hidden_states),
                (self.v_proj, hidden_states),
            )
        )  # (batch, heads, length, head_dim)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        if dropout and query.device.type == "cpu":
            attend = eager_attention_forward  # PyTorch's fused kernel for CPUs has no dropout
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout)
        return self.out_proj(out.flatten(-2)), weights


class PVLFFusionLayer(GradientCheckpointingLayer):
    """One layer of the fusion Transformer; `config.residual` says what the residuals add (eq. 10-11)."""

    def __init__(self, config: PVLFConfig) -> None:
        super().__init__()
        width = config.joint_width
        self.literal_residual = config.residual == "paper"
        self.self_attn = PVLFFusionAttention(config)
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.linear1 = nn.Linear(width, config.fusion_ffn_size)
        self.linear2 = nn.Linear(config.fusion_ffn_size, width)
        self.dropout = Dropout(config.dropout)

    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        """`(batch, length, d)` to the same shape."""
        return self.dropout(self.linear2(self.dropout(F.gelu(self.linear1(hidden_states)))))

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, read: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`(batch, length, d)` to the same shape, or at k positions each to `(batch, k, d)`; the attention weights."""
        normed = self.norm1(hidden_states)
        # eq. 10 feeds the attention U itself and adds LN(U); pre-norm feeds it LN(U) and adds U.
        attention_input, residual = (hidden_states, normed) if self.literal_residual else (normed, hidden_states)
        asking = attention_input
        if read is not None:
            asking, residual = pick(asking, read), pick(residual, read)
        attended, weights = self.self_attn(asking, attention_input, attention_mask)
        hidden_states = residual + self.dropout(attended)
        normed = self.norm2(hidden_states)
        residual = normed if self.literal_residual else hidden_states
        return residual + self.feed_forward(normed), weights


class PVLFFusion(nn.Module):
    """The fusion Transformer with its context prompts (section 3.2): no positions, no final norm (TransAgg)."""

    def __init__(self, config: PVLFConfig) -> None:
        super().__init__()
        self.config = config
        self.prompts = nn.Parameter(torch.empty(config.prompt_depth or 1, config.num_prompts, config.joint_width))
        self.layers = nn.ModuleList([PVLFFusionLayer(config) for _ in range(config.fusion_layers)])

    def _attention_mask(self, hidden_states: Tensor, text_mask: Tensor | None, num_image_tokens: int) -> Any:
        if text_mask is None:
            return None
        seen = text_mask.new_ones(text_mask.shape[0], self.config.num_prompts + num_image_tokens)
        seen = torch.cat([text_mask, seen], dim=1)
        if self.config.text_padding == "transagg":
            if self.config._attn_implementation not in ("eager", "sdpa"):
                raise ValueError("text_padding='transagg' adds to attention scores: use eager or sdpa attention")
            return (seen == 0).to(hidden_states.dtype)[:, None, None, :]  # added to the scores: padding gains 1.0
        mask: Any = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=seen)
        # (batch, 1, length, length) with equal rows: one will do for however many ask. Flash attention's has no rows.
        return mask if mask is None or mask.ndim < 4 else mask[:, :, :1]

    def forward(
        self, text_tokens: Tensor, image_tokens: Tensor, text_mask: Tensor | None, read: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Runs the layers over [text, prompts, image] (eq. 8-12).

        Args:
            text_tokens: `(batch, n, d)`.
            image_tokens: `(batch, 1 + m, d)`.
            text_mask: `(batch, n)`, 0 for padding, or None.
            read: int64 `(batch, k)`, the positions of the output that are wanted, which spares the last layer the
                others; all of them by default.

        Returns:
            the last layer's output `(batch, k, d)` and two empty tuples; without `read` `(batch, n + p + 1 + m, d)`
            and the tuples of hidden states (input first) and attention weights.
        """
        batch, n, _ = text_tokens.shape
        after_prompts = n + self.config.num_prompts
        prompts = self.prompts.to(text_tokens.dtype)[:, None].expand(-1, batch, -1, -1)  # (depth, batch, p, d)
        hidden_states = torch.cat([text_tokens, prompts[0], image_tokens], dim=1)
        attention_mask = self._attention_mask(hidden_states, text_mask, image_tokens.shape[1])
        states, attentions = [hidden_states], []
        for depth, layer in enumerate(self.layers):
            if 0 < depth < len(prompts):  # eq. 12: fresh prompts, the outputs at their places dropped
                text, image = hidden_states[:, :n], hidden_states[:, after_prompts:]
                hidden_states = torch.cat([text, prompts[depth], image], dim=1)
            is_last = depth == len(self.layers) - 1
            hidden_states, weights = layer(hidden_states, attention_mask, read if is_last else None)
            if read is None:
                states.append(hidden_states)
                attentions.append(weights)
        return (hidden_states, tuple(states), tuple(attentions)) if read is None else (hidden_states, (), ())


class PVLFAggregation(nn.Module):
    """Adaptive aggregation (eq. 13): f_u = MLP([image; text]), f_q = w1 image + w2 f_u + w3 text, w linear in f_u."""

    def __init__(self, config: PVLFConfig) -> None:
        super().__init__()
        width = config.joint_width
        self.combiner = nn.Linear(2 * width, 8 * width)  # 8 d: TransAgg
        self.dropout = Dropout(config.dropout)
        self.output = nn.Linear(8 * width, width)
        self.weights = nn.Linear(width, 3)  # rows: image, fused, text; free, no softmax

    def forward(
        self, mlp_image: Tensor, mlp_text: Tensor, sum_image: Tensor, sum_text: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Four times `(batch, d)` to f_q `(batch, d)` and w `(batch, 3)`."""
        hidden = F.relu(self.combiner(torch.cat([mlp_image, mlp_text], dim=-1)))
        fused = self.output(self.dropout(hidden))  # (batch, d)
        weights = self.weights(fused)  # (batch, 3)
        w_image, w_fused, w_text = weights.unsqueeze(-1).unbind(dim=1)
        return w_image * sum_image + w_fused * fused + w_text * sum_text, weights


class PVLFPreTrainedModel(PreTrainedModel):
    """Class-level facts of PVLF and the initialisation of its own weights."""

    config_class = PVLFConfig
    base_model_prefix = "pvlf"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over the batch; the Trainer divides under accumulation
    _no_split_modules = ["PVLFFusionLayer"]  # the encoders add their own
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: of custom code the library initialises only modules that hold weights themselves.

        Ours are set by the module around them; they use `transformers.initialization`, which spares loaded weights.
        """
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialises as TransAgg's modules do: PyTorch's defaults, unlike the base class's normal(0, 0.02)."""
        super()._init_weights(module)
        if isinstance(module, PVLFFusion):
            init.normal_(module.prompts, std=self.config.prompt_init_std)
        elif isinstance(module, PVLFFusionAttention):
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                # nn.MultiheadAttention draws q, k and v as one (3d, d) matrix: its Xavier gain, for a (d, d) one.
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
    """`nn.Linear`'s own default, through the library's functions, which leave loaded weights alone."""
    bound = linear.in_features**-0.5
    init.uniform_(linear.weight, -bound, bound)
    init.uniform_(linear.bias, -bound, bound)


class PVLFModel(PVLFPreTrainedModel):
    """Composed image retrieval: embeds "this picture, but ..." and gallery pictures into one space.

    Example:
        >>> from PIL import Image
        >>> from transformers import AutoModel, AutoProcessor
        >>> import pvlf_hf

        >>> model = AutoModel.from_pretrained("model_cards/pvlf-emoji-tiny")
        >>> processor = AutoProcessor.from_pretrained("model_cards/pvlf-emoji-tiny")
        >>> picture = Image.new("RGB", (72, 72), "gold")
        >>> query = model.get_query_features(**processor.process_queries(picture, "make it blue"))
        >>> query.pooler_output.shape
        torch.Size([1, 128])
    """

    def __init__(self, config: PVLFConfig) -> None:
        super().__init__(config)
        self.backbone = DUAL_ENCODERS[config.vl_config.model_type](config.vl_config)
        self.fusion = PVLFFusion(config)
        self.aggregation = PVLFAggregation(config)
        self.post_init()

    @classmethod
    def from_vl_pretrained(cls, name_or_path: str, **kwargs: Any) -> "PVLFModel":
        """Builds PVLF on a pretrained BLIP or CLIP, with fresh fusion weights.

        Args:
            name_or_path: Hub name or local folder of a `BlipForImageTextRetrieval`
                (`Salesforce/blip-itm-base-coco` is the paper's) or `CLIPModel` checkpoint.
            kwargs: settings of [`PVLFConfig`] (`num_prompts=10`); the rest is passed to `from_pretrained`
                (`revision`, `token`, `cache_dir`, ...). `attn_implementation` is that of the fusion Transformer,
                which writes its attention out ("eager") on a CPU where dropout acts.

        Returns:
            the model in eval mode. A log message says which weights are new.

        Raises:
            ValueError: if the checkpoint is not one of a supported dual encoder.
        """
        # Annotations are the fields of this class alone: dtype, which is inherited, goes to from_pretrained.
        settings = {k: kwargs.pop(k) for k in PVLFConfig.__annotations__ if k in kwargs}
        if refused := {"vl_config", "device_map"} & {*settings, *kwargs}:
            raise ValueError(
                f"{sorted(refused)}: the checkpoint is its own vl_config, and a device is set by model.to()"
            )
        attention = {"": kwargs.pop("attn_implementation", None)}  # of the fusion: Transformers' BLIP has eager only
        vl_config = AutoConfig.from_pretrained(name_or_path, **{k: v for k, v in kwargs.items() if k != "dtype"})
        config = PVLFConfig(vl_config=vl_config, **settings)
        encoder = load_pretrained_dual_encoder(name_or_path, config.vl_config, **kwargs)
        model = cls._from_config(config, attn_implementation=attention)
        model.backbone = encoder
        model.to(dtype=next(encoder.parameters()).dtype)
        new = sorted(n for n, _ in model.named_parameters() if not n.startswith("backbone."))
        logger.warning(
            f"{cls.__name__}: the dual encoder comes from {name_or_path}; {len(new)} weights of the fusion "
            f"Transformer and the aggregation are new and must be trained before use: {new}"
        )
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        """The text tower's token embeddings."""
        return getattr(self.backbone, self.backbone.text_modules[0]).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the text tower's token embeddings."""
        getattr(self.backbone, self.backbone.text_modules[0]).set_input_embeddings(value)

    def resize_token_embeddings(  # type: ignore[override]  # the rest of the signature is passed on
        self, new_num_tokens: int | None = None, **kwargs: Any
    ) -> nn.Module:
        """Resizes the text tower's vocabulary, and records it where the tower is built from."""
        embeddings = super().resize_token_embeddings(new_num_tokens, **kwargs)
        self.config.vl_config.text_config.vocab_size = embeddings.num_embeddings
        return embeddings

    def set_finetuning(self, finetuning: str) -> None:
        """Chooses which weights train (Table 3); fusion and aggregation always do.

        Args:
            finetuning: `"frozen"` trains no encoder, `"text"` the text encoder and its projection, `"both"` all.
                A frozen side stays in eval mode when the model is put in train mode, so that its features do not
                depend on the step (TransAgg leaves its dropout on).

        Raises:
            ValueError: for another name.
        """
        trained = {"frozen": (False, False), "text": (False, True), "both": (True, True)}
        if finetuning not in trained:
            raise ValueError(f"finetuning={finetuning!r}: choose one of {sorted(trained)}")
        self.requires_grad_(True)  # also what PEFT froze and left so when its adapter was merged
        sides = (self.backbone.vision_modules, self.backbone.text_modules)
        for names, trains in zip(sides, trained[finetuning], strict=True):
            for name in names:
                getattr(self.backbone, name).requires_grad_(trains)
        self.train(self.training)

    def train(self, mode: bool = True) -> "PVLFModel":
        """Sets train mode, except for encoders that [`~PVLFModel.set_finetuning`] froze."""
        super().train(mode)
        for name in (*self.backbone.vision_modules, *self.backbone.text_modules):
            tower = getattr(self.backbone, name)
            if not any(p.requires_grad for p in tower.parameters()):
                tower.eval()
        return self

    def _image_tokens(self, pixel_values: Tensor) -> Tensor:
        size = self.config.vl_config.vision_config.image_size
        expected = (size, size) if isinstance(size, int) else tuple(size)
        if tuple(pixel_values.shape[-2:]) != expected:
            raise ValueError(
                f"pixel_values are {tuple(pixel_values.shape[-2:])} pixels, the image encoder was built for "
                f"{expected}: use the processor saved with this checkpoint, or set its size and crop_size"
            )
        return self.backbone.image_tokens(pixel_values.to(self.dtype))

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Embeds images: what a gallery is indexed by, and a training target.

        Args:
            pixel_values: `(batch, 3, height, width)`, from [`PVLFProcessor.process_targets`].
            **kwargs: `return_dict=False` for a tuple.

        Returns:
            `pooler_output`: float32 `(batch, d)`, L2-normalised; `last_hidden_state`: `(batch, 1 + m, d)`, all
            projected tokens, not normalised.
        """
        tokens = self._image_tokens(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=normalize(tokens[:, 0]))

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Embeds captions alone, in the same space as [`~PVLFModel.get_image_features`].

        Args:
            input_ids: int64 `(batch, n)`.
            attention_mask: `(batch, n)`, 0 for padding; None when nothing is padded.
            **kwargs: `return_dict=False` for a tuple.

        Returns:
            `pooler_output`: float32 `(batch, d)`, L2-normalised; `last_hidden_state`: `(batch, n, d)`, all projected
            tokens, not normalised.
        """
        tokens, position = self.backbone.text_tokens(input_ids, attention_mask)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=normalize(pick(tokens, position)))

    @can_return_tuple
    def get_query_features(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> PVLFQueryOutput:
        """Embeds queries: a reference image each and what should be different.

        Args:
            pixel_values: `(batch, 3, height, width)`, reference images.
            input_ids: int64 `(batch, n)`, relative captions; all from [`PVLFProcessor.process_queries`].
            attention_mask: `(batch, n)`, 0 for padding; None when nothing is padded.
            output_attentions: return the fusion layers' attention weights (needs eager attention).
            output_hidden_states: return the fusion layers' states.
            **kwargs: `return_dict=False` for a tuple.

        Raises:
            ValueError: if attentions are asked of an implementation that does not compute them, or the numbers of
                images and captions differ.
        """
        image_tokens = self._image_tokens(pixel_values)
        text_tokens, text_position = self.backbone.text_tokens(input_ids, attention_mask)
        return self.compose(
            image_tokens, text_tokens, text_position, attention_mask, output_attentions, output_hidden_states
        )

    def compose(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        text_position: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> PVLFQueryOutput:
        """Fusion and aggregation of tokens that are encoded already (eq. 8-13).

        Args:
            image_tokens: `(batch, 1 + m, d)`, `last_hidden_state` of [`~PVLFModel.get_image_features`].
            text_tokens: `(batch, n, d)`, `last_hidden_state` of [`~PVLFModel.get_text_features`].
            text_position: int64 `(batch,)`, where each caption's global feature stands.
            attention_mask: `(batch, n)`, 0 for padding; None when nothing is padded.
            output_attentions: return attention weights.
            output_hidden_states: return hidden states.

        Raises:
            ValueError: as [`~PVLFModel.get_query_features`].
        """
        if image_tokens.shape[0] != text_tokens.shape[0]:
            raise ValueError(f"{image_tokens.shape[0]} reference images but {text_tokens.shape[0]} relative captions")
        # Autocast leaves half precision behind, and so does the feature cache (TransAgg casts here, too).
        image_tokens, text_tokens = image_tokens.to(self.dtype), text_tokens.to(self.dtype)
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"{self.config._attn_implementation!r} attention does not return its weights: call "
                "model.set_attn_implementation('eager') first"
            )
        image_position = torch.full_like(text_position, text_tokens.shape[1] + self.config.num_prompts)
        read = torch.stack([image_position, text_position], dim=1)
        keep_all = output_attentions or output_hidden_states
        hidden, states, attentions = self.fusion(text_tokens, image_tokens, attention_mask, None if keep_all else read)
        encoder = (image_tokens[:, 0], pick(text_tokens, text_position))
        fused = (pick(hidden, read) if keep_all else hidden).unbind(1)
        mlp_input = fused if self.config.aggregation_mlp_input == "fused" else encoder
        sum_input = fused if self.config.aggregation_sum_input == "fused" else encoder
        query, weights = self.aggregation(*mlp_input, *sum_input)
        return PVLFQueryOutput(
            pooler_output=normalize(query),
            aggregation_weights=weights,
            hidden_states=states if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        target_pixel_values: Tensor | None = None,
        target_ids: Tensor | None = None,
        image_tokens: Tensor | None = None,
        text_tokens: Tensor | None = None,
        text_position: Tensor | None = None,
        target_features: Tensor | None = None,
        return_loss: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> PVLFOutput:
        """Embeds queries, target images, or both.

        Cached features of a frozen encoder (`pvlf_hf.training.feature_cache`) can stand for its input.

        Args:
            pixel_values: `(batch, 3, height, width)`, reference images.
            input_ids: int64 `(batch, n)`, relative captions.
            attention_mask: `(batch, n)`, 0 for padding.
            target_pixel_values: `(targets, 3, height, width)`; for a loss the target of each query, in order.
            target_ids: int64 `(targets,)`, equal for equal targets, which are then no negatives of each other.
            image_tokens: `(batch, 1 + m, d)`, any float dtype, instead of `pixel_values`.
            text_tokens: `(batch, n, d)`, instead of `input_ids`; with it `attention_mask` and
            text_position: int64 `(batch,)`, where each caption's global feature stands.
            target_features: `(targets, d)`, row 0 of their tokens, instead of `target_pixel_values`.
            return_loss: compare queries with targets; by default whenever there are both. With False the output has
                no loss and no similarity.
            output_attentions: return the fusion layers' attention weights (needs eager attention).
            output_hidden_states: return the fusion layers' states.
            chunk_size: embed so many rows at once and keep nothing else of them for backward, which embeds each chunk
                again; see [`embed_in_chunks`].
            **kwargs: `return_dict=False` for a tuple.

        Raises:
            ValueError: if there is nothing to embed, half a query, or a loss is asked for without queries or targets.
        """
        if chunk_size is not None:
            if output_attentions or output_hidden_states:
                raise ValueError("chunk_size keeps only embeddings: ask for attentions or hidden states without it")
            rows = {
                "pixel_values": pixel_values,
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "target_pixel_values": target_pixel_values,
                "image_tokens": image_tokens,
                "text_tokens": text_tokens,
                "text_position": text_position,
                "target_features": target_features,
            }
            # Not self.forward: Accelerate puts autocast around that, which, entered twice, would stay on.
            embed = partial(PVLFModel.forward, self, return_loss=False, return_dict=True)
            return self._compare(embed_in_chunks(embed, rows, chunk_size), target_ids, return_loss)
        if pixel_values is not None:
            image_tokens = self._image_tokens(pixel_values)
        if input_ids is not None:
            text_tokens, text_position = self.backbone.text_tokens(input_ids, attention_mask)
        if target_pixel_values is not None:
            target_features = self._image_tokens(target_pixel_values)[:, 0]
        if (image_tokens is None) != (text_tokens is None):
            raise ValueError(
                "a query is pixel_values and input_ids together; for one of them alone use get_image_features or "
                "get_text_features"
            )
        if image_tokens is None and target_features is None:
            raise ValueError("nothing to embed: pass pixel_values with input_ids, target_pixel_values, or all three")
        output = PVLFOutput()
        if image_tokens is not None:
            query = self.compose(
                image_tokens,
                text_tokens,  # type: ignore[arg-type]  # checked above
                text_position,  # type: ignore[arg-type]  # comes with text_tokens
                attention_mask,
                output_attentions,
                output_hidden_states,
            )
            output.query_embeds = query.pooler_output
            output.aggregation_weights = query.aggregation_weights
            output.hidden_states, output.attentions = query.hidden_states, query.attentions
        if target_features is not None:
            output.target_embeds = normalize(target_features)
        return self._compare(output, target_ids, return_loss)

    def _compare(self, output: PVLFOutput, target_ids: Tensor | None, return_loss: bool | None) -> PVLFOutput:
        if output.query_embeds is not None and output.target_embeds is not None:
            if return_loss is not False:
                output.similarity = cosine_similarity(output.query_embeds, output.target_embeds)
                output.loss = self.loss(output.query_embeds, output.target_embeds, target_ids=target_ids)
        elif return_loss:
            raise ValueError("return_loss=True needs queries and target_pixel_values, one target image for each query")
        return output

    def loss(self, query_embeds: Tensor, target_embeds: Tensor, **kwargs: Any) -> Tensor:
        """[`focal_info_nce`] with this configuration's temperature, alpha and gamma."""
        c = self.config
        return focal_info_nce(query_embeds, target_embeds, c.temperature, c.alpha, c.gamma, **kwargs)


def embed_in_chunks(embed: Callable[..., PVLFOutput], rows: dict[str, Tensor | None], chunk_size: int) -> PVLFOutput:
    """Gradient caching (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup").

    A contrastive loss needs the embeddings of all rows; their activations are only needed chunk by chunk, once it has
    given the embeddings' gradients. So nothing but embeddings is kept, and backward embeds each chunk again, with the
    same dropout: activation checkpointing around whole chunks, for one more forward, with exact gradients.

    Args:
        embed: from a chunk of `rows` to embeddings `(chunk, ...)`.
        rows: `(batch, ...)` each, or None.
        chunk_size: rows embedded at once.

    Raises:
        ValueError: if there are not as many targets as queries.
    """
    given = {name: tensor for name, tensor in rows.items() if tensor is not None}
    if len(counts := {len(tensor) for tensor in given.values()}) > 1:
        raise ValueError(f"chunk_size needs a target for each query, but got {sorted(counts)} rows")
    outputs = [
        checkpoint(embed, use_reentrant=False, **dict(zip(given, chunk, strict=True)))
        for chunk in zip(*(tensor.split(chunk_size) for tensor in given.values()), strict=True)
    ]
    joined: dict[str, Any] = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
    return PVLFOutput(**joined)


def normalize(features: Tensor) -> Tensor:
    """L2-normalises `(batch, d)` in float32, whatever the model's dtype: cosines are compared to many digits."""
    return F.normalize(features.float(), dim=-1)


def pick(tokens: Tensor, position: Tensor) -> Tensor:
    """`(batch, length, d)` at int64 `(batch,)` -> `(batch, d)`; at `(batch, k)` -> `(batch, k, d)`."""
    rows = torch.arange(tokens.shape[0], device=tokens.device)
    return tokens[rows if position.ndim == 1 else rows[:, None], position]


PVLFModel.register_for_auto_class("AutoModel")

__all__ = ["PVLFModel", "PVLFOutput", "PVLFPreTrainedModel", "PVLFQueryOutput"]
