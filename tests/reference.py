"""The reference implementation of the baseline (TransAgg), as tensors: its tiny checkpoints under our names.

`tests/fixtures/*.safetensors` were computed with the public reference code at tiny random sizes, in float32. "slow"
names the path its training takes (text padding gains 1.0 on attention scores), "bool" the one with padding masked.
"""

import re
from functools import cache
from pathlib import Path

from safetensors.torch import load_file

from pvlf_hf import PVLFConfig, PVLFModel

FIXTURES = Path(__file__).parent / "fixtures"

CONFIGS = {
    "blip": {
        "model_type": "blip",
        "image_text_hidden_size": 32,
        "text_config": {
            "vocab_size": 99,
            "hidden_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 60,
            "max_position_embeddings": 40,
            "bos_token_id": 2,
            "sep_token_id": 3,
            "eos_token_id": 3,
        },
        "vision_config": {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "image_size": 32,
            "patch_size": 8,
            "layer_norm_eps": 1e-6,
            # For random models of these sizes: BLIP's own default, 1e-10, would make all images alike.
            "initializer_range": 0.1,
        },
    },
    "clip": {
        "model_type": "clip",
        "projection_dim": 32,
        "text_config": {
            "vocab_size": 80,
            "hidden_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 512,
            "max_position_embeddings": 77,
            "bos_token_id": 78,
            "eos_token_id": 79,
            "pad_token_id": 0,
        },
        "vision_config": {
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 256,
            "image_size": 32,
            "patch_size": 8,
        },
    },
}

# Ours <- theirs. Attention matrices that they keep as one (3d, d) are split below.
RENAMES = {
    "fusion": [
        (r"^fusion\.layers\.(\d+)\.", r"fusion.layers.\1."),
        (r"^sep_token$", "fusion.prompts"),
        (r"^combiner_layer\.", "aggregation.combiner."),
        (r"^output_layer\.", "aggregation.output."),
        (r"^weighted_layer\.", "aggregation.weights."),
    ],
    "blip": [
        (r"^visual_encoder\.patch_embed\.proj\.", "backbone.vision_model.embeddings.patch_embedding."),
        (r"^visual_encoder\.pos_embed$", "backbone.vision_model.embeddings.position_embedding"),
        (r"^visual_encoder\.cls_token$", "backbone.vision_model.embeddings.class_embedding"),
        (r"^visual_encoder\.norm\.", "backbone.vision_model.post_layernorm."),
        (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"backbone.vision_model.encoder.layers.\1.self_attn.qkv."),
        (
            r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.",
            r"backbone.vision_model.encoder.layers.\1.self_attn.projection.",
        ),
        (r"^visual_encoder\.blocks\.(\d+)\.norm(\d)\.", r"backbone.vision_model.encoder.layers.\1.layer_norm\2."),
        (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"backbone.vision_model.encoder.layers.\1.mlp."),
        (r"^(text_encoder|vision_proj|text_proj)\.", r"backbone.\1."),
    ],
    "clip": [
        (r"^visual\.class_embedding$", "backbone.vision_model.embeddings.class_embedding"),
        (r"^visual\.conv1\.", "backbone.vision_model.embeddings.patch_embedding."),
        (r"^visual\.positional_embedding$", "backbone.vision_model.embeddings.position_embedding.weight"),
        (r"^visual\.ln_pre\.", "backbone.vision_model.pre_layrnorm."),
        (r"^visual\.ln_post\.", "backbone.vision_model.post_layernorm."),
        (r"^visual\.proj$", "backbone.visual_projection.weight"),
        (r"^visual\.transformer\.resblocks\.", "backbone.vision_model.encoder.layers."),
        (r"^transformer\.resblocks\.", "backbone.text_model.encoder.layers."),
        (r"^token_embedding\.", "backbone.text_model.embeddings.token_embedding."),
        (r"^positional_embedding$", "backbone.text_model.embeddings.position_embedding.weight"),
        (r"^ln_final\.", "backbone.text_model.final_layer_norm."),
        (r"^text_projection$", "backbone.text_projection.weight"),
        (r"\.attn\.", ".self_attn."),
        (r"\.ln_(\d)\.", r".layer_norm\1."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    ],
}
UNUSED = re.compile(r"_m\.|crossattention|itm_head|queue|^temp$|ptr_|position_ids|logit_scale|pooler|cls\.")


def to_ours(tensors, backbone):
    """Renames, splits and permutes tensors (or their gradients) of the reference."""
    ours = {}
    for theirs, tensor in tensors.items():
        part = backbone if theirs.startswith("pretrained_model.") else "fusion"
        name = theirs.removeprefix("pretrained_model.")
        if UNUSED.search(name):
            continue
        for pattern, replacement in RENAMES[part]:
            name = re.sub(pattern, replacement, name)
        if part == "clip" and theirs.endswith((".proj", "text_projection")):
            tensor = tensor.T
        if name.startswith("aggregation.weights."):
            tensor = tensor[[2, 1, 0]]  # their rows: text, fused, image
        if ".in_proj_" in name:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                ours[name.replace("in_proj_", f"{letter}_proj.")] = third
        else:
            ours[name] = tensor
    return {name: tensor.float() for name, tensor in ours.items()}


@cache
def reference_io(backbone):
    return load_file(FIXTURES / f"transagg_{backbone}_io.safetensors")


def reference_model(backbone, text_padding="transagg"):
    """Our model with the reference's weights, in eval mode."""
    config = PVLFConfig.transagg(vl_config=CONFIGS[backbone], fusion_ffn_size=64, text_padding=text_padding)
    model = PVLFModel(config)
    weights = to_ours(load_file(FIXTURES / f"transagg_{backbone}_tiny.safetensors"), backbone)
    parameters = {name for name, _ in model.named_parameters()}
    assert set(weights) == parameters, (set(weights) - parameters, parameters - set(weights))
    model.load_state_dict(weights, strict=False)  # buffers of positions are not theirs
    return model.eval()


def reference_inputs(backbone):
    io = reference_io(backbone)
    if backbone == "blip":
        text = {"input_ids": io["input_ids"], "attention_mask": io["attention_mask"]}
    else:
        ids = io["tokenized"].long()
        text = {"input_ids": ids, "attention_mask": (ids != 0).long()}  # theirs counts every id 0 as padding
    return {"pixel_values": io["pixel_values_ref"], "target_pixel_values": io["pixel_values_tgt"], **text}
