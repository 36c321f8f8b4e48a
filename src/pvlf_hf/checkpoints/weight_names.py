"""Translates the weights of the original code bases: names, layouts, and weights that retrieval does not use."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

Tensors = Mapping[str, Tensor]

PREFIX = re.compile(r"^(module\.)?((pretrained|blip)_model\.)?")
"""Prefixes of DataParallel, and of TransAgg's dual encoder, which was `blip_model.` in its first releases."""

LEFT_OUT = {
    "momentum copies": r"^(visual_encoder|vision_proj|text_encoder|text_proj)_m\.",
    "queues and temperature of pre-training": r"^((image|text|idx|ptr)_queue|temp|logit_scale)$",
    "position numbers": r"\.position_ids$",
}
"""Weights that only training uses, as patterns of names without prefix."""

LEFT_OUT_OF_PVLF = {**LEFT_OUT, "image-text matching": r"^itm_head\.|\.crossattention\."}
"""Weights that PVLF does not use: its text encoder has no cross-attention."""

# (original name, name in Transformers or PVLF), applied in this order. BLIP's BERT and projections keep their names.
BLIP_NAMES = (
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm(\d)\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
)
CLIP_NAMES = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # Transformers' own spelling
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
TRANSAGG_NAMES = (
    (r"^(?!fusion\.|sep_token$|combiner_layer\.|output_layer\.|weighted_layer\.)", "backbone."),
    (r"^sep_token$", "fusion.prompts"),
    (r"^combiner_layer\.", "aggregation.combiner."),
    (r"^output_layer\.", "aggregation.output."),
    (r"^weighted_layer\.", "aggregation.weights."),
)


def to_pvlf(tensors: Tensors, backbone: str) -> dict[str, Tensor]:
    """Translate TransAgg's tensors, or their gradients, to names and layout of [`PVLFModel`].

    Args:
        tensors: all or some of its state dict, with or without prefixes; unknown names become `backbone.*`.
        backbone: `"blip"` or `"clip"`.

    Returns:
        The tensors by name, float32.
    """
    return translate(tensors, (*(BLIP_NAMES if backbone == "blip" else CLIP_NAMES), *TRANSAGG_NAMES))


def translate(tensors: Tensors, names: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Rename tensors by a table, change their layout to that of PVLF or Transformers, cast to float32."""
    weights: dict[str, Tensor] = {}
    for name, tensor in rename(tensors, names).items():
        tensor = tensor.float()  # OpenAI's CLIP is float16
        if name.endswith(("visual_projection.weight", "text_projection.weight")):
            weights[name] = tensor.T.contiguous()  # the original computes x @ W
        elif name.startswith("aggregation.weights."):
            weights[name] = tensor.flip(0)  # rows of the original: text, fused, image
        elif ".in_proj_" in name:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                weights[name.replace("in_proj_", f"{letter}_proj.")] = third
        else:
            weights[name] = tensor
    return weights


def rename(tensors: Tensors, names: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Remove prefixes and apply a table of names.

    Raises:
        ValueError: if two weights get the same name.
    """
    renamed: dict[str, Tensor] = {}
    for original, tensor in tensors.items():
        name = PREFIX.sub("", original)
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise ValueError(f"{original} and another weight both become {name}; keep one of them")
        renamed[name] = tensor
    return renamed


def leave_out(tensors: Tensors, kinds: Mapping[str, str]) -> dict[str, Tensor]:
    """Remove prefixes and drop weights that are known to be of no use, with a warning."""
    tensors = rename(tensors, ())
    kind_of = {name: next((k for k, p in kinds.items() if re.search(p, name)), None) for name in tensors}
    counts = Counter(kind for kind in kind_of.values() if kind)
    if counts:
        logger.warning(f"left out: {', '.join(f'{kind} ({count} tensors)' for kind, count in counts.items())}")
    return {name: tensor for name, tensor in tensors.items() if kind_of[name] is None}


__all__ = [
    "BLIP_NAMES",
    "LEFT_OUT",
    "LEFT_OUT_OF_PVLF",
    "leave_out",
    "to_pvlf",
    "translate",
]
