"""Estimate of a training's GPU hours from the operations of one step, counted on shapes alone.

Assumptions, as opposed to counts, are the constants below.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from pvlf_hf import PVLFConfig, PVLFModel, PVLFTrainingArguments
from pvlf_hf.commands.train import DataArguments, ModelArguments
from pvlf_hf.data.cirr import EXPECTED_COUNTS
from pvlf_hf.models.configuration_pvlf import BLIP_BASE
from pvlf_hf.training.methods import METHODS

GPU = "NVIDIA A100 80 GB"  # the paper's
PEAK_FLOPS = 312e12  # FLOP/s, dense bfloat16, by its data sheet
UTILISATION = 0.3  # fraction of the peak, assumed; loading images must keep up with it
CAPTION_TOKENS = 16  # tokens per caption, assumed, including padding to the longest of a batch
TRIPLETS = {"laion-cir-template": 16_000, "laion-cir-llm": 16_000, "laion-cir-combined": 32_000}  # as the paper rounds

# Sizes of the released checkpoints, so that nothing needs to be downloaded for an estimate.
DUAL_ENCODERS = {
    "Salesforce/blip-itm-base-coco": BLIP_BASE,
    "openai/clip-vit-large-patch14": {
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
        },
    },
}

ASSUMPTIONS = (
    "Operations of one step are counted by PyTorch: encoders, fusion and aggregation, backward through what trains, "
    f"{CAPTION_TOKENS} tokens a caption, nothing cached; Laion-CIR counts {TRIPLETS['laion-cir-template']:,} or "
    f"{TRIPLETS['laion-cir-combined']:,} triplets, and CIRR val is ranked after each epoch. Assumed: {GPU}, "
    f"{PEAK_FLOPS / 1e12:.0f} TFLOP/s in bfloat16, {UTILISATION:.0%} of it used, and images loaded as fast."
)


def gpu_hours(
    model_args: ModelArguments, data_args: DataArguments, args: PVLFTrainingArguments, processes: int = 1
) -> float:
    """Estimate the hours that a training takes on `GPU`, summed over its processes.

    Raises:
        ValueError: if the training set is none of `TRIPLETS`.
    """
    if data_args.dataset not in TRIPLETS:
        raise ValueError(
            f"the number of triplets of {data_args.dataset!r} is not known; choose one of {sorted(TRIPLETS)}"
        )
    config = model_config(model_args)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    steps_an_epoch = TRIPLETS[data_args.dataset] // batch
    steps = args.max_steps if args.max_steps > 0 else steps_an_epoch * args.num_train_epochs
    query, image = encoding_flops(config.to_json_string())
    queries, gallery = EXPECTED_COUNTS["val"] if data_args.validation == "cirr-val" else (0, 0)
    flops = steps * batch * training_flops(config.to_json_string(), args.finetuning)
    flops += steps / steps_an_epoch * (queries * query + gallery * image)
    return flops / (PEAK_FLOPS * UTILISATION) / 3600


def model_config(model_args: ModelArguments) -> PVLFConfig:
    """Return the configuration of the model that `model_args.build()` would build."""
    vl_config: Any = DUAL_ENCODERS.get(model_args.model)
    settings = {**METHODS[model_args.method].fixed, **model_args.given()}
    return PVLFConfig(vl_config=vl_config or AutoConfig.from_pretrained(model_args.model), **settings)


@cache
def training_flops(config: str, finetuning: str) -> int:
    """Count the operations of a training step, forward and backward, for one triplet."""

    def of_layers(numbers: Sequence[int]) -> int:
        model, query, target = _without_data(config, numbers)
        model.set_finetuning(finetuning)
        model.train()
        with FlopCounterMode(display=False) as counter:
            (model(**query).query_embeds * model(**target).target_embeds).sum().backward()
        return counter.get_total_flops()

    return flops_of_layers(of_layers, _layers(PVLFConfig(**json.loads(config))))


@cache
def encoding_flops(config: str) -> tuple[int, int]:
    """Count the operations to embed a query and a gallery image."""

    @cache
    def of_layers(numbers: tuple[int, ...]) -> list[int]:
        model, *both = _without_data(config, numbers)
        counts = []
        for inputs in both:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model.eval()(**inputs)
            counts.append(counter.get_total_flops())
        return counts

    layers = _layers(PVLFConfig(**json.loads(config)))
    query, target = (
        flops_of_layers(lambda numbers, which=which: of_layers(tuple(numbers))[which], layers) for which in (0, 1)
    )
    return query, target


def flops_of_layers(count: Callable[[Sequence[int]], int], layers: Sequence[int]) -> int:
    """Return `count(layers)`, of encoders so deep, counted on encoders of one and two layers.

    The layers of an encoder have the same shapes, so that each but the first adds as many operations as the second.
    """
    if max(layers) <= 2:
        return count(layers)
    ones = [1] * len(layers)
    one = count(ones)
    return one + sum(
        (depth - 1) * (count([*ones[:at], 2, *ones[at + 1 :]]) - one) for at, depth in enumerate(layers) if depth > 1
    )


def _layers(config: PVLFConfig) -> list[int]:
    """Return the number of layers of the image encoder and of the text encoder."""
    return [part.num_hidden_layers for part in (config.vl_config.vision_config, config.vl_config.text_config)]


def _without_data(
    config_json: str, layers: Sequence[int]
) -> tuple[PVLFModel, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return a model, a query and a target on the meta device, which have shapes and no memory.

    Args:
        config_json: configuration of the model.
        layers: number of layers of its image encoder and its text encoder instead.
    """
    config = PVLFConfig(**json.loads(config_json))
    vision, text = config.vl_config.vision_config, config.vl_config.text_config
    vision.num_hidden_layers, text.num_hidden_layers = layers
    with torch.device("meta"):
        model = PVLFModel(config)
        images = torch.empty(1, 3, vision.image_size, vision.image_size)
        input_ids = torch.empty(1, CAPTION_TOKENS, dtype=torch.long)
    return model, {"pixel_values": images, "input_ids": input_ids}, {"target_pixel_values": images}
