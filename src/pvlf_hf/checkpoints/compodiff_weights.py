"""Converts the released denoiser of CompoDiff.

A file is read as tensors only. What it holds must be exactly the denoiser, its noise schedule and its rotary
frequencies, or nothing is written. The encoders come from two CLIP checkpoints.

Example:
    ```python
    towers = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
    convert_compodiff("model.safetensors", *towers, "compodiff")
    model = AutoModel.from_pretrained("compodiff")
    ```
"""

import re
from math import isqrt

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..models.configuration_compodiff import CompoDiffConfig
from ..models.denoiser_compodiff import Denoiser, rotary_frequencies
from ..models.modeling_compodiff import CompoDiffModel
from ..models.processing_compodiff import CompoDiffProcessor
from ..models.sampler_compodiff import cumulative_alphas
from .convert import File, check_empty, count_layers, load_plainly, naming, write
from .weight_names import Tensors

logger = logging.get_logger(__name__)

LICENCE = "Apache-2.0 (navervision/CompoDiff)"
"""Licence of the repository, which is taken to be that of its weights."""

SCHEDULE = """betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance
posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 p2_loss_weight""".split()
"""Buffers of the noise schedule, all of which follow from its length."""

PREFIX = re.compile(r"^(module\.)?(model\.)?(?=net\.|noise_scheduler\.)")

# (theirs, ours), applied in this order.
NAMES = (
    (r"^net\.to_text_embeds\.0\.", "text_embed."),
    (r"^net\.to_(time|mask)_embeds\.[01]\.(1\.)?net\.", r"\1_embed."),
    (r"^(time|mask)_embed\.2\.", r"\1_embed.4."),
    (r"^(time|mask)_embed\.1\.0\.", r"\1_embed.2."),
    (r"^(time|mask)_embed\.0\.0\.", r"\1_embed.0."),
    (r"^net\.transformer\.rel_pos_bias\.relative_attention_bias\.", "relative_bias."),
    (r"^net\.transformer\.norm\.g$", "norm.weight"),
    (r"^net\.transformer\.project_out\.", "output."),
    (r"^net\.transformer\.(layers\.\d+)\.0\.", r"\1.self_attention."),
    (r"^net\.transformer\.(layers\.\d+)\.1\.", r"\1.cross_attention."),
    (r"^net\.transformer\.(layers\.\d+)\.2\.", r"\1.feed_forward."),
    (r"\.feed_forward\.0\.g$", ".feed_forward.norm.weight"),
    (r"\.feed_forward\.1\.", ".feed_forward.input."),
    (r"\.feed_forward\.5\.", ".feed_forward.output."),
    (r"attention\.norm\.g$", "attention.norm.weight"),
    (r"\.cross_attention\.(null_kv$|to_kv\.)", r".cross_attention.memory.\1"),
    (r"\.null_kv$", ".null_key_value"),
    (r"\.to_q\.", ".query."),
    (r"\.to_kv\.", ".key_value."),
    (r"\.to_out\.0\.", ".output."),
    (r"\.to_out\.1\.g$", ".output_norm.weight"),
)


def convert_compodiff(checkpoint: File, image_encoder: str, text_encoder: str, output_dir: File) -> None:
    """Write a released denoiser with its two encoders as a [`CompoDiffModel`] folder, processor included.

    Args:
        checkpoint: file of the denoiser, `.safetensors` or `.bin`.
        image_encoder: Hub name or folder of the CLIP whose image side it was trained on, usually
            `openai/clip-vit-large-patch14`.
        text_encoder: Hub name or folder of the CLIP whose text encoder it was trained on, tokenizer included, usually
            `laion/CLIP-ViT-bigG-14-laion2B-39B-b160k`.
        output_dir: a new or empty folder.

    Raises:
        ValueError: if the file is damaged, holds more than tensors, lacks or has unknown weights, does not fit the
            encoders, or the folder is not empty.
    """
    check_empty(output_dir)
    with naming(checkpoint):
        tensors = read_denoiser(checkpoint)
        settings = settings_of(tensors)
    processor = CompoDiffProcessor.from_vl_pretrained(image_encoder, text_encoder)
    model = CompoDiffModel.from_vl_pretrained(image_encoder, text_encoder, **settings, **processor.negative)
    with naming(checkpoint):
        model.denoiser.load_state_dict(translate_denoiser(tensors, model.config.vl_config))
    logger.warning(f"the licence of these weights is that of their repository: {LICENCE}")
    write(output_dir, model.eval(), processor)


def read_denoiser(file: File) -> dict[str, Tensor]:
    """Read a state dict without running anything in the file; names lose their prefix.

    Raises:
        ValueError: if the file does not exist, it is damaged, or holds objects.
    """
    loaded = load_plainly(file)
    if not isinstance(loaded, dict):
        raise ValueError(f"holds a {type(loaded).__name__}, not a state dict (names and tensors)")
    if odd := [name for name, tensor in loaded.items() if not isinstance(tensor, Tensor)]:
        raise ValueError(f"{odd[:3]} are no tensors: pass the state dict of the denoiser alone")
    return {PREFIX.sub("", name): tensor for name, tensor in loaded.items()}


def settings_of(tensors: Tensors) -> dict[str, int]:
    """Infer settings of [`CompoDiffConfig`] from the shapes of a denoiser, in names without prefix.

    Raises:
        ValueError: if the weights that show them are missing.
    """
    attention = "net.transformer.layers.0.{}.{}"
    names = [
        "net.to_mask_embeds.1.net.0.0.weight",
        attention.format(0, "null_kv"),
        attention.format(0, "to_q.weight"),
        attention.format(1, "to_q.weight"),
        "noise_scheduler.alphas_cumprod",
    ]
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"it lacks {missing}: not a denoiser of CompoDiff")
    mask, null, query, cross_query, schedule = (tensors[name] for name in names)
    head = null.shape[-1]
    return {
        "mask_size": isqrt(mask.shape[-1]),
        "head_width": head,
        "denoiser_heads": query.shape[0] // head,
        "cross_heads": cross_query.shape[0] // head,
        "denoiser_layers": count_layers(tensors, "net.transformer.layers."),
        "timesteps": len(schedule),
    }


def translate_denoiser(tensors: Tensors, vl_config: PreTrainedConfig) -> dict[str, Tensor]:
    """Rename the weights of a released denoiser; schedule and rotary frequencies are checked and left out.

    Args:
        tensors: the whole state dict without prefix; may be on the meta device.
        vl_config: configuration of the encoders that it belongs to.

    Returns:
        the weights of `CompoDiffModel.denoiser`, float32.

    Raises:
        ValueError: if they are not exactly those of the denoiser, or of one for other encoders.
    """
    config = CompoDiffConfig(vl_config=vl_config, **settings_of(tensors))  # type: ignore[arg-type]
    tensors = dict(tensors)
    _take_constants(tensors, config)
    with torch.device("meta"):
        expected = Denoiser(config).state_dict()
    theirs = {renamed(name): name for name in tensors}
    missing, unknown = sorted(expected.keys() - theirs.keys()), sorted(theirs[n] for n in theirs.keys() - expected)
    for what, names, whose in (("lacks", missing, "CompoDiffModel's"), ("has unknown", unknown, "its own")):
        if names:
            raise ValueError(
                f"it {what} {len(names)} weights: {names[:5]} ({whose} names); not a whole denoiser of CompoDiff"
            )
    _check_widths(tensors, config)
    for name, original in theirs.items():
        if tensors[original].shape != expected[name].shape:
            raise ValueError(
                f"{original} is {tuple(tensors[original].shape)} but the other weights and the encoders call for "
                f"{tuple(expected[name].shape)}"
            )
    return {name: tensors[original].float().contiguous() for name, original in theirs.items()}


def renamed(name: str) -> str:
    """Return our name of a weight of the released code, both without prefix."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _take_constants(tensors: dict[str, Tensor], config: CompoDiffConfig) -> None:
    """Remove schedule and rotary frequencies; raise a `ValueError` if they are not the model's."""
    layers = (f"net.transformer.layers.{i}.0.rotary_emb.freqs" for i in range(config.denoiser_layers))
    names = [*(f"noise_scheduler.{name}" for name in SCHEDULE), *layers]
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"it lacks {missing[:5]}: not a whole denoiser of CompoDiff")
    constants = {name: tensors.pop(name) for name in names}
    frequencies = rotary_frequencies(config.head_width)
    alphas = cumulative_alphas(config.timesteps).float()
    for name, tensor in constants.items():
        ours = frequencies if name.endswith("freqs") else alphas if name.endswith(".alphas_cumprod") else None
        if ours is None or tensor.is_meta:
            continue
        if tensor.shape != ours.shape or not torch.allclose(tensor.float(), ours, rtol=0, atol=1e-3):
            raise ValueError(
                f"{name} is not what this model computes: a denoiser of another schedule or position code"
            )


def _check_widths(tensors: Tensors, config: CompoDiffConfig) -> None:
    """Raise a `ValueError` naming both widths where the denoiser belongs to other encoders."""
    embed = tensors["net.to_text_embeds.0.weight"]
    for theirs, ours, what, usual in (
        (embed.shape[0], config.joint_width, "image embeddings", "image_encoder: 768 is ViT-L/14"),
        (embed.shape[1], config.text_width, "text tokens", "text_encoder: 1280 is ViT-bigG/14"),
    ):
        if theirs != ours:
            raise ValueError(
                f"its denoiser reads {what} of width {theirs}, but those of the encoder have {ours}: pass the {usual}"
            )


__all__ = ["convert_compodiff"]
