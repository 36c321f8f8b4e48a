"""Tensors of the baseline's reference implementation (TransAgg): tiny checkpoints, renamed to our parameter names.

`tests/fixtures/*.safetensors` were computed with the public reference code at tiny random sizes, in float32. "slow"
names the path that its training takes (padding adds 1.0 to attention scores), "bool" the one with padding masked.
"""

from functools import cache
from pathlib import Path

from safetensors.torch import load_file

from pvlf_hf import PVLFConfig, PVLFModel
from pvlf_hf.checkpoints.weight_names import LEFT_OUT_OF_PVLF, leave_out, to_pvlf

FIXTURES = Path(__file__).parent / "fixtures"

TOLERANCES = {
    "image_tokens": 1e-5,
    "text_tokens": 1e-5,
    "fusion": 1e-4,
    "mix_weights": 1e-5,
    "query": 5e-6,
    "similarity": 5e-4 / 100,  # of logits, 100 times the cosines
    "loss": 1e-4,
    "gradient": 1e-4,  # relative, of the norms
    "training_loss": 1e-3,
    "training_norm": 1e-3,  # relative
    "pixels": 1e-6,
    "metrics": 1e-4,  # absolute, of percentages, which the reference rounds to float32
}
"""Those that the fixtures came with: 5 to 30 times what the reference in float32 differs from itself in float64.

The smallest wrong detail of a model that was tried, another GELU, changes a query by 2.4e-5 and a logit by 1.7e-3.
"""

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
            # Suits random models of these sizes: with BLIP's default, 1e-10, all images would be alike.
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


@cache
def reference_io(backbone):
    return load_file(FIXTURES / f"transagg_{backbone}_io.safetensors")


def reference_model(backbone, text_padding="transagg"):
    """Return our model with the reference's weights, in eval mode."""
    config = PVLFConfig.transagg(vl_config=CONFIGS[backbone], fusion_ffn_size=64, text_padding=text_padding)
    model = PVLFModel(config)
    theirs = load_file(FIXTURES / f"transagg_{backbone}_tiny.safetensors")
    weights = to_pvlf(leave_out(theirs, LEFT_OUT_OF_PVLF), backbone)
    parameters = {name for name, _ in model.named_parameters()}
    assert set(weights) == parameters, (set(weights) - parameters, parameters - set(weights))
    model.load_state_dict(weights, strict=False)  # the reference has no position buffers
    return model.eval()


def reference_inputs(backbone):
    io = reference_io(backbone)
    if backbone == "blip":
        text = {"input_ids": io["input_ids"], "attention_mask": io["attention_mask"]}
    else:
        ids = io["tokenized"].long()
        text = {"input_ids": ids, "attention_mask": (ids != 0).long()}  # the reference treats every id 0 as padding
    return {"pixel_values": io["pixel_values_ref"], "target_pixel_values": io["pixel_values_tgt"], **text}
