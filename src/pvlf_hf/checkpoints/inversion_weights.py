"""Converts released mapping networks of textual inversion: Pic2Word, SEARLE, LinCIR, Context-I2W.

A file is read as tensors only. What it holds must be exactly the mapping network of the method, or nothing is
written. The encoders come from a CLIP checkpoint; where the file carries a CLIP of its own, the two are compared.

Example:
    ```python
    convert_inversion("lincir_large.pt", "lincir", "openai/clip-vit-large-patch14", "lincir-large")
    model = AutoModel.from_pretrained("lincir-large")
    ```
"""

import re
from math import exp
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..models.configuration_inversion import METHODS, InversionConfig
from ..models.mapping_inversion import build_mapping
from ..models.modeling_inversion import InversionModel
from ..models.processing_inversion import InversionProcessor
from .convert import File, check_empty, load_plainly, naming, write
from .weight_names import CLIP_NAMES, Tensors, rename, translate

logger = logging.get_logger(__name__)

WRAPPERS = {"pic2word": "state_dict_img2text", "context_i2w": "state_dict_img2text", "searle": "Phi", "lincir": "Phi"}
"""Key under which the files of each method hold the mapping network."""

LICENCES = {
    "pic2word": "Apache-2.0 (google-research/composed_image_retrieval)",
    "searle": "CC BY-NC 4.0: no commercial use (miccunifi/SEARLE)",
    "lincir": "CC BY-NC 4.0: no commercial use (navervision/lincir)",
    "context_i2w": "Apache-2.0 by its LICENSE file, MIT by its README (Pter61/context-i2w)",
}
"""Licence of each method's repository, which is taken to be that of its weights: none is stated for them."""

# (theirs, ours), applied in this order.
MLP_NAMES = ((r"^layers\.(\d+)\.0\.", r"layers.\1."), (r"^fc_out\.", "output."))
PHI_NAMES = ((r"^layers\.3\.", "layers.1."), (r"^layers\.6\.", "output."))
CONTEXT_NAMES = (
    (r"^layers(_local)?\.(\d+)\.0\.", r"whole\1.mlp.layers.\2."),
    (r"^fc_out(_local)?\.", r"whole\1.mlp.output."),
    (r"^ln_post(_local)?\.", r"whole\1.norm."),
    (r"^proj(_local)?$", r"whole\1.projection.weight"),
    (r"^whole_local\.", "local."),
    (r"^to_c\.", "context."),
    (r"^W_R\.weight_g$", "rotation.gain"),
    (r"^W_R\.weight_v$", "rotation.direction"),
    (r"^VT_Extractor\.", ""),
    (r"^(layers\.\d+)\.0\.norm_media\.", r"\1.norm_tokens."),
    (r"^(layers\.\d+)\.0\.norm_latents\.", r"\1.norm_latents."),
    (r"^(layers\.\d+)\.0\.to_q\.", r"\1.query."),
    (r"^(layers\.\d+)\.0\.to_kv\.", r"\1.key_value."),
    (r"^(layers\.\d+)\.0\.to_out\.", r"\1.output."),
    (r"^(layers\.\d+)\.1\.0\.", r"\1.norm."),
    (r"^(layers\.\d+)\.1\.1\.", r"\1.fc1."),
    (r"^(layers\.\d+)\.1\.3\.", r"\1.fc2."),
)
NAMES = {"mlp": MLP_NAMES, "phi": PHI_NAMES, "context": CONTEXT_NAMES}


def convert_inversion(
    checkpoint: File, method: str, backbone: str, output_dir: File, extractor_heads: int | None = None
) -> None:
    """Write a released mapping network with its CLIP as an [`InversionModel`] folder, processor included.

    Args:
        checkpoint: file of the mapping network, `.pt` or `.safetensors`.
        method: `"pic2word"`, `"searle"`, `"lincir"` or `"context_i2w"`.
        backbone: Hub name or folder of the CLIP that the network was trained on, tokenizer included, such as
            `openai/clip-vit-large-patch14`.
        output_dir: a new or empty folder.
        extractor_heads: attention heads of Context-I2W's extractor, which shapes do not show; needed where they are
            not 64 wide.

    Raises:
        ValueError: if the file is damaged, holds more than tensors, is of another method, lacks or has unknown
            weights, does not fit the backbone, or the folder is not empty.
    """
    check_empty(output_dir)
    check_method(method)
    with naming(checkpoint):  # first: an error in the file is raised before a CLIP is downloaded
        weights, clip = read_mapping(checkpoint, method)
    processor = InversionProcessor.from_vl_pretrained(backbone, method)
    word: dict[str, Any] = {"placeholder_id": processor.placeholder_id}
    plain = InversionModel.from_vl_pretrained(backbone, "searle_oti", **word)  # the encoders alone
    with naming(checkpoint):
        settings, weights = translate_mapping(weights, plain.config.vl_config, method, extractor_heads)
        if clip:
            settings["temperature"] = compare_clip(clip, plain)
    model = InversionModel._from_config(
        InversionConfig(vl_config=plain.config.vl_config, method=method, **word, **settings)
    )
    model.backbone = plain.backbone
    model.mapping.load_state_dict(weights)
    logger.warning(f"the licence of these weights is that of their repository: {LICENCES[method]}")
    write(output_dir, model.eval(), processor)


def check_method(method: str) -> str:
    """Return the method; raise a `ValueError` if no weights of it were released."""
    if method not in WRAPPERS:
        raise ValueError(f"method={method!r}: weights were released for {sorted(WRAPPERS)} only")
    return method


def read_mapping(file: File, method: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read the mapping network in a file, and the CLIP beside it, without running anything in the file.

    Args:
        file: what the method's code saved (a dict that holds the network's state dict), or the state dict alone.
        method: a name in `WRAPPERS`.

    Returns:
        the state dicts of network and CLIP; the second is empty where the file has none.

    Raises:
        ValueError: if the file does not exist, it is damaged, holds objects, or is another method's.
    """
    loaded = load_plainly(file)
    if not isinstance(loaded, dict):
        raise ValueError(f"holds a {type(loaded).__name__}, not a state dict (names and tensors)")
    wrapper = WRAPPERS[method]
    if others := sorted({*WRAPPERS.values()} - {wrapper} & loaded.keys()) if wrapper not in loaded else []:
        of = sorted(name for name, key in WRAPPERS.items() if key == others[0])
        raise ValueError(f"holds {others[0]!r}, so it is a file of {' or '.join(of)}, not of {method}")
    state = loaded.get(wrapper, loaded)
    clip = loaded.get("state_dict", {}) if wrapper in loaded else {}
    for part in (state, clip):
        if not isinstance(part, dict):
            raise ValueError(f"holds a {type(part).__name__} where a state dict (names and tensors) belongs")
        if odd := [name for name, tensor in part.items() if not isinstance(tensor, Tensor)]:
            raise ValueError(f"{odd[:3]} are no tensors, and there is no {wrapper!r}: not a file of {method}")
    return state, clip


def translate_mapping(
    tensors: Tensors, vl_config: PreTrainedConfig, method: str, extractor_heads: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Rename the weights of a released mapping network and infer its configuration from their shapes.

    Args:
        tensors: the whole state dict, in the names of the method's own code; may be on the meta device.
        vl_config: configuration of the CLIP that it belongs to.
        method: a name in `WRAPPERS`.
        extractor_heads: see [`convert_inversion`].

    Returns:
        settings of [`InversionConfig`], and the weights of `InversionModel.mapping`, float32.

    Raises:
        ValueError: if they are not exactly those of the method's network, or of another CLIP.
    """
    kind = METHODS[method].mapping
    weights = {  # the original computes x @ W with matrices named projection
        name: (tensor.T if name.endswith("projection.weight") else tensor).float().contiguous()
        for name, tensor in rename(tensors, NAMES[kind]).items()  # type: ignore[index]  # every released method has one
    }
    settings = _settings(weights, kind, extractor_heads)
    theirs = dict(zip(weights, tensors, strict=True))
    _check_widths(weights, vl_config, kind)
    with torch.device("meta"):
        mapping: Any = build_mapping(InversionConfig(vl_config=vl_config, method=method, placeholder_id=0, **settings))
    expected = mapping.state_dict()
    missing = sorted(expected.keys() - weights.keys())
    unknown = sorted(theirs[name] for name in weights.keys() - expected.keys())
    for what, names, whose in (("lacks", missing, "InversionModel's"), ("has unknown", unknown, "its own")):
        if names:
            raise ValueError(
                f"it {what} {len(names)} weights: {names[:5]} ({whose} names); not a whole mapping network of {method}"
            )
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise ValueError(
                f"{theirs[name]} is {tuple(weight.shape)} but the other weights and the backbone call for "
                f"{tuple(expected[name].shape)}"
            )
    return settings, weights


def _settings(weights: Tensors, kind: str | None, extractor_heads: int | None) -> dict[str, Any]:
    """Infer settings from shapes; absent weights are reported when names are compared."""
    mlp = "whole.mlp." if kind == "context" else ""
    settings: dict[str, Any] = {}
    if f"{mlp}output.weight" in weights:
        settings["mapping_width"] = weights[f"{mlp}output.weight"].shape[-1]
    settings["mapping_layers"] = _count(weights, f"{mlp}layers.")
    if kind == "context" and {"latents", "layers.0.query.weight"} <= weights.keys():
        inner = weights["layers.0.query.weight"].shape[0]
        heads = extractor_heads or inner // 64
        if not heads or inner % heads:
            raise ValueError(f"attention of width {inner} cannot have {heads} heads: pass extractor_heads")
        settings |= {
            "latents": weights["latents"].shape[0],
            "extractor_layers": _count(weights, "layers."),
            "extractor_heads": heads,
            "extractor_head_width": inner // heads,
        }
    return settings


def _count(weights: Tensors, prefix: str) -> int:
    numbers = [re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in weights]
    return max((1 + int(match[1]) for match in numbers if match), default=1)


def _check_widths(weights: Tensors, vl_config: PreTrainedConfig, kind: str | None) -> None:
    """Raise a `ValueError` naming both widths where the network belongs to another CLIP."""
    config = InversionConfig(vl_config=vl_config, method="searle_oti", placeholder_id=0)
    ends = ("context.weight", "whole.mlp.output.weight") if kind == "context" else ("layers.0.weight", "output.weight")
    for name, axis, width, what in (
        (ends[0], -1, config.joint_width, "reads image features"),
        (ends[1], 0, config.word_width, "writes token embeddings"),
    ):
        if name in weights and weights[name].shape[axis] != width:
            raise ValueError(
                f"its mapping network {what} of width {weights[name].shape[axis]}, but those of the backbone have "
                f"{width}: pass the CLIP that it was trained on (512 is ViT-B/32, 768 ViT-L/14)"
            )


def compare_clip(tensors: Tensors, model: InversionModel) -> float:
    """Compare the CLIP beside a mapping network with the backbone, and log how they differ.

    Args:
        tensors: CLIP's state dict in OpenAI's names.
        model: the model whose backbone is compared.

    Returns:
        the temperature of its logit scale.
    """
    theirs = translate(tensors, CLIP_NAMES)
    scale = theirs.pop("logit_scale", None)
    ours = model.backbone.state_dict()
    if theirs.keys() != ours.keys() or any(theirs[name].shape != ours[name].shape for name in ours):
        missing, unknown = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
        other = sorted(name for name in ours.keys() & theirs.keys() if theirs[name].shape != ours[name].shape)
        raise ValueError(
            f"the CLIP in it has other weights than the backbone (missing {missing[:3]}, unknown {unknown[:3]}, of "
            f"another shape {other[:3]}): pass the CLIP that it was trained on"
        )
    different = [name for name, tensor in ours.items() if not torch.allclose(tensor.float(), theirs[name], atol=1e-3)]
    if different:
        logger.warning(
            f"the CLIP in the file differs from the backbone in {len(different)} of {len(ours)} weights, first "
            f"{different[:3]}; the backbone's are kept, so embeddings will not be the authors'"
        )
    return exp(-scale.item()) if scale is not None else model.config.temperature


__all__ = ["convert_inversion"]
