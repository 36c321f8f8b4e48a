"""Converts checkpoints of the original code bases: Salesforce's BLIP, and TransAgg on BLIP or on OpenAI's CLIP.

A file is read as tensors only, weights that retrieval does not use are dropped, the rest is renamed
(`weight_names.py`), and the configuration is inferred from the shapes. The result must have exactly the names and
shapes of the model, or nothing is written.

Example:
    ```python
    convert_salesforce_blip("model_base_retrieval_coco.pth", "blip-itm-base-coco", tokenizer="vocab.txt")
    model = PVLFModel.from_vl_pretrained("blip-itm-base-coco")
    ```
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPConfig,
    CLIPTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..models.configuration_pvlf import PVLFConfig
from ..models.modeling_pvlf import PVLFModel
from ..models.processing_pvlf import PVLFProcessor
from .weight_names import BLIP_NAMES, LEFT_OUT, LEFT_OUT_OF_PVLF, Tensors, leave_out, to_pvlf, translate

ModelT = TypeVar("ModelT", bound=PreTrainedModel)
File = str | PathLike[str]

HEADS = {768: 12, 1024: 16}
"""Attention heads by width: BERT base and ViT-B, ViT-L."""


def convert_salesforce_blip(
    checkpoint: File,
    output_dir: File,
    tokenizer: File | None = None,
    image_size: int | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> None:
    """Write a Salesforce BLIP retrieval checkpoint as a `BlipForImageTextRetrieval` folder.

    [`PVLFModel.from_vl_pretrained`] and, with a tokenizer, [`PVLFProcessor.from_vl_pretrained`] load that folder.

    Args:
        checkpoint: `model_base_retrieval_coco.pth` or a similar file, or its state dict as `.safetensors`.
        output_dir: a new or empty folder.
        tokenizer: BERT's uncased tokenizer: `vocab.txt`, a folder or a Hub name. It and an image processor are written
            too.
        image_size: interpolate the position embeddings to this many pixels a side; by default they stay.
        vision_heads: attention heads of the ViT, which shapes do not show; needed for other widths than ViT-B, ViT-L.
        text_heads: attention heads of the text encoder; needed for a width other than BERT base's.

    Raises:
        ValueError: if the file is no such checkpoint, lacks weights or has unknown ones, or holds more than tensors
            (nothing in it is run), an argument does not fit it, or the folder is not empty.
    """
    check_empty(output_dir)
    tensors = read_checkpoint(checkpoint)
    with naming(checkpoint):
        model = blip_from_salesforce(tensors, image_size, vision_heads, text_heads)
    processor = None
    if tokenizer is not None:
        vision: Any = model.config.vision_config
        side = vision.image_size
        image_processor = BlipImageProcessorPil(size={"height": side, "width": side})
        processor = BlipProcessor(image_processor, load_tokenizer(tokenizer, model.config))
    write(output_dir, model, processor)


def convert_transagg(
    checkpoint: File,
    output_dir: File,
    tokenizer: File | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> None:
    """Write a TransAgg checkpoint, on BLIP or on CLIP, as a [`PVLFModel`] folder (`PVLFConfig.transagg`).

    `AutoModel.from_pretrained` and, with a tokenizer, `AutoProcessor.from_pretrained` load that folder. Text padding
    is masked, as in TransAgg's evaluation.

    Args:
        checkpoint: state dict of TransAgg, `.pt`, `.pth` or `.safetensors`.
        output_dir: a new or empty folder.
        tokenizer: for BLIP BERT's uncased tokenizer (`vocab.txt`, a folder or a Hub name), for CLIP its own (a folder
            or a Hub name). A processor is then written too.
        vision_heads: attention heads of the image encoder, which shapes do not show; needed for BLIP of other widths
            than ViT-B and ViT-L. CLIP's heads are 64 wide.
        text_heads: attention heads of the text encoder; see `vision_heads`.

    Raises:
        ValueError: as [`convert_salesforce_blip`].
    """
    check_empty(output_dir)
    tensors = read_checkpoint(checkpoint)
    with naming(checkpoint):
        model = pvlf_from_transagg(tensors, vision_heads, text_heads)
    processor = None
    if tokenizer is not None:
        vl_config = model.config.vl_config
        processor = PVLFProcessor.for_backbone(vl_config, load_tokenizer(tokenizer, vl_config))
    write(output_dir, model, processor)


def load_plainly(file: File) -> Any:
    """Load what a file of tensors holds, without running anything in it.

    Args:
        file: `.safetensors`, or a file of `torch.save`.

    Raises:
        ValueError: if the file does not exist, it is damaged, or it holds objects.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError("no such file; pass the weights that the authors released: .safetensors, .pth, .pt or .bin")
    try:
        return load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the readers raise almost anything
        raise ValueError(
            f"cannot be read as tensors alone ({type(error).__name__}); nothing else in it was run. If it is damaged, "
            "download it again. If it holds objects and you trust it, load it with the code it came from and store "
            "its state dict with safetensors.torch.save_file."
        ) from error


def read_checkpoint(file: File) -> dict[str, Tensor]:
    """Read a state dict without running anything in the file.

    Args:
        file: `.safetensors`, or a file of `torch.save`: the state dict, or a dict that has it as `"model"`, of which
            other entries are ignored.

    Raises:
        ValueError: if the file does not exist, it is damaged, or it holds anything but tensors.
    """
    with naming(file):
        loaded = load_plainly(file)
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{file}: holds a {type(state).__name__}, not a state dict (names and tensors)")
    if others := [n for n, tensor in state.items() if not (isinstance(n, str) and isinstance(tensor, Tensor))]:
        raise ValueError(f"{file}: {others[:3]} are not named tensors; store its state dict alone")
    return state


def blip_from_salesforce(
    tensors: Tensors,
    image_size: int | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> BlipForImageTextRetrieval:
    """Make a model of Salesforce's tensors, to be saved; buffers that are not saved have no values.

    Args:
        tensors: the whole state dict; tensors on the meta device give a model there.
        image_size: see [`convert_salesforce_blip`].
        vision_heads: see there.
        text_heads: see there.

    Raises:
        ValueError: if the tensors are not exactly those of a BLIP retrieval model.
    """
    weights = translate(leave_out(tensors, LEFT_OUT), BLIP_NAMES)
    config = blip_config(weights, vision_heads, text_heads)
    if image_size is not None:
        vision: Any = config.vision_config
        patch = vision.patch_size
        if image_size < patch or image_size % patch:
            raise ValueError(f"image_size={image_size} must be a multiple of the patch size {patch}")
        positions = "vision_model.embeddings.position_embedding"
        weights[positions] = resize_positions(weights[positions], image_size // patch)
        vision.image_size = image_size
    return fill(BlipForImageTextRetrieval, config, weights)


def pvlf_from_transagg(tensors: Tensors, vision_heads: int | None = None, text_heads: int | None = None) -> PVLFModel:
    """Make a model of TransAgg's tensors, to be saved; buffers that are not saved have no values.

    Args:
        tensors: the whole state dict; tensors on the meta device give a model there.
        vision_heads: see [`convert_transagg`].
        text_heads: see there.

    Raises:
        ValueError: if the tensors are not exactly those of a TransAgg model.
    """
    tensors = leave_out(tensors, LEFT_OUT_OF_PVLF)
    markers = {"blip": "visual_encoder.cls_token", "clip": "visual.class_embedding"}
    backbone = next((name for name, marker in markers.items() if marker in tensors), None)
    if backbone is None or "combiner_layer.weight" not in tensors:
        raise ValueError(
            "not a TransAgg checkpoint, which holds combiner_layer.weight and the image encoder of BLIP or of a CLIP "
            f"ViT; this holds {sorted(tensors)[:3]}, ... (a BLIP checkpoint is for convert_salesforce_blip)"
        )
    weights = to_pvlf(tensors, backbone)
    towers = {name.removeprefix("backbone."): tensor for name, tensor in weights.items()}
    config = PVLFConfig.transagg(
        vl_config=(blip_config if backbone == "blip" else clip_config)(towers, vision_heads, text_heads),
        fusion_layers=count_layers(weights, "fusion.layers."),
        fusion_ffn_size=size(weights, "fusion.layers.0.linear1.weight"),
    )
    return fill(PVLFModel, config, weights)


def blip_config(weights: Tensors, vision_heads: int | None = None, text_heads: int | None = None) -> BlipConfig:
    """Infer BLIP's configuration from weights in Transformers' names; LayerNorm's eps is Salesforce's."""
    vision_width = size(weights, "vision_model.embeddings.class_embedding", -1)
    patch = size(weights, "vision_model.embeddings.patch_embedding.weight", -1)
    vocab_size = size(weights, "text_encoder.embeddings.word_embeddings.weight")
    text_width = size(weights, "text_encoder.embeddings.word_embeddings.weight", 1)
    return BlipConfig(
        image_text_hidden_size=size(weights, "vision_proj.weight"),
        vision_config={
            "hidden_size": vision_width,
            "num_hidden_layers": count_layers(weights, "vision_model.encoder.layers."),
            "num_attention_heads": heads("vision_heads", vision_width, vision_heads, HEADS.get(vision_width)),
            "intermediate_size": size(weights, "vision_model.encoder.layers.0.mlp.fc1.weight"),
            "image_size": patch * grid_side(size(weights, "vision_model.embeddings.position_embedding", 1)),
            "patch_size": patch,
            "layer_norm_eps": 1e-6,
            "initializer_range": 0.02,
        },
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": text_width,
            "num_hidden_layers": count_layers(weights, "text_encoder.encoder.layer."),
            "num_attention_heads": heads("text_heads", text_width, text_heads, HEADS.get(text_width)),
            "intermediate_size": size(weights, "text_encoder.encoder.layer.0.intermediate.dense.weight"),
            "max_position_embeddings": size(weights, "text_encoder.embeddings.position_embeddings.weight"),
            "bos_token_id": vocab_size - 2,  # [DEC], after BERT's tokens; [ENC] is the last
        },
    )


def clip_config(weights: Tensors, vision_heads: int | None = None, text_heads: int | None = None) -> CLIPConfig:
    """Infer CLIP's configuration from weights in Transformers' names; OpenAI's heads are 64 wide at every size."""
    vision_width = size(weights, "vision_model.embeddings.class_embedding")
    patch = size(weights, "vision_model.embeddings.patch_embedding.weight", -1)
    vocab_size = size(weights, "text_model.embeddings.token_embedding.weight")
    text_width = size(weights, "text_model.embeddings.token_embedding.weight", 1)
    joint_width = size(weights, "visual_projection.weight")
    return CLIPConfig(
        projection_dim=joint_width,
        vision_config={
            "hidden_size": vision_width,
            "num_hidden_layers": count_layers(weights, "vision_model.encoder.layers."),
            "num_attention_heads": heads("vision_heads", vision_width, vision_heads, vision_width // 64),
            "intermediate_size": size(weights, "vision_model.encoder.layers.0.mlp.fc1.weight"),
            "image_size": patch * grid_side(size(weights, "vision_model.embeddings.position_embedding.weight")),
            "patch_size": patch,
            "projection_dim": joint_width,
        },
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": text_width,
            "num_hidden_layers": count_layers(weights, "text_model.encoder.layers."),
            "num_attention_heads": heads("text_heads", text_width, text_heads, text_width // 64),
            "intermediate_size": size(weights, "text_model.encoder.layers.0.mlp.fc1.weight"),
            "max_position_embeddings": size(weights, "text_model.embeddings.position_embedding.weight"),
            "projection_dim": joint_width,
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
            "pad_token_id": 0,
        },
    )


def size(weights: Tensors, name: str, axis: int = 0) -> int:
    """Return one side of a weight; raise a `ValueError` if it is absent."""
    if name not in weights or not weights[name].ndim:
        raise ValueError(
            f"it lacks {name} (in Transformers' names): not a checkpoint of this kind. BLIP must be a retrieval "
            "checkpoint, such as model_base_retrieval_coco.pth, not one for captions or questions; CLIP must be a ViT."
        )
    return weights[name].shape[axis]


def count_layers(weights: Tensors, prefix: str) -> int:
    """Return the number of layers `prefix0.`, `prefix1.`, ...; [`fill`] detects gaps."""
    numbered = (re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in weights)
    return 1 + max((int(match[1]) for match in numbered if match), default=0)


def heads(flag: str, width: int, given: int | None, usual: int | None) -> int:
    """Return the number of attention heads; a wrong number would load and give wrong embeddings.

    Raises:
        ValueError: if it is not known, or does not divide the width.
    """
    number = usual if given is None else given
    if not number:
        raise ValueError(f"its width {width} is not one of the released models': pass {flag}")
    if number < 1 or width % number:
        raise ValueError(f"{flag}={number} does not divide the width {width}")
    return number


def grid_side(positions: int) -> int:
    """Return the patches a side of a square image, from the number of positions, [CLS] included."""
    side = isqrt(max(positions - 1, 0))
    if side * side + 1 != positions:
        raise ValueError(f"{positions} image positions are not [CLS] and a square of patches")
    return side


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Interpolate BLIP's position embeddings as Salesforce's loader does; [CLS], the first, stays.

    Args:
        positions: float `(1, 1 + n * n, width)`.
        side: patches a side of the result.

    Returns:
        `(1, 1 + side * side, width)`.
    """
    cls, patches = positions[:, :1], positions[:, 1:]
    grid = patches.unflatten(1, (-1, grid_side(positions.shape[1]))).permute(0, 3, 1, 2)  # (1, width, n, n)
    resized = interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([cls, resized.flatten(2).transpose(1, 2)], dim=1)


def fill(model_class: type[ModelT], config: PreTrainedConfig, weights: Tensors) -> ModelT:
    """Make a model of weights.

    Raises:
        ValueError: if they are not exactly the model's: the same names and shapes.
    """
    with torch.device("meta"):
        model = model_class(config)
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    for what, names in (("lacks", missing), ("has unknown", unknown)):
        if names:
            raise ValueError(
                f"it {what} {len(names)} weights, first {names[:3]} (in names of {model_class.__name__}): not a "
                "checkpoint of this kind, or an incomplete one"
            )
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise ValueError(
                f"{name} is {tuple(weight.shape)} but the other weights call for {tuple(expected[name].shape)}"
            )
    model.load_state_dict(weights, assign=True)
    return model.eval()


TOKENIZERS: dict[str, tuple[type[BertTokenizer] | type[CLIPTokenizer], str, int]] = {
    # Salesforce adds [DEC] and [ENC] to BERT's tokens; queries do not use them.
    "blip": (BertTokenizer, "bert-base-uncased", 2),
    "clip": (CLIPTokenizer, "openai/clip-vit-base-patch32", 0),
}
"""Encoder of a converted file to its tokenizer's class, its usual checkpoint, and the tokens it may lack."""


def load_tokenizer(name_or_path: File, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a dual encoder and check that it has its vocabulary."""
    vocab_size = config.text_config.vocab_size
    tokenizer_class, usual, added = TOKENIZERS[config.model_type]
    fewest = vocab_size - added
    try:
        tokenizer = tokenizer_class.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer {name_or_path} cannot be loaded; usually it is {usual}") from error
    if not fewest <= len(tokenizer) <= vocab_size:  # the library makes an empty tokenizer of a folder without one
        raise ValueError(
            f"tokenizer {name_or_path} has {len(tokenizer)} tokens but the checkpoint {vocab_size}: pass the one it "
            f"was trained with, usually {usual}"
        )
    return tokenizer


def check_empty(output_dir: File) -> None:
    """Raise a `ValueError` unless the folder is new or empty: files of two checkpoints would mix."""
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: choose another output_dir")


def write(output_dir: File, model: PreTrainedModel, processor: ProcessorMixin | None) -> None:
    """Save a converted checkpoint."""
    model.save_pretrained(output_dir)
    if processor is not None:
        processor.save_pretrained(output_dir)


@contextmanager
def naming(checkpoint: File) -> Iterator[None]:
    """Add the file's name to errors."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error


__all__ = ["convert_salesforce_blip", "convert_transagg"]
