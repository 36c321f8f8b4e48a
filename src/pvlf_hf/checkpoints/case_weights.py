"""Converts checkpoints of CoVR's BLIP, whose query encoder is CASE's; CASE itself released none.

Example:
    ```python
    convert_case("ckpt_5.ckpt", "case-large", tokenizer="bert-base-uncased")
    model = AutoModel.from_pretrained("case-large")
    ```
"""

from transformers.utils import logging

from ..models.configuration_case import CASEConfig
from ..models.modeling_case import CASEModel
from ..models.processing_case import CASEProcessor
from .convert import File, blip_config, check_empty, fill, load_tokenizer, naming, read_checkpoint, write
from .weight_names import BLIP_NAMES, LEFT_OUT, Tensors, leave_out, translate

logger = logging.get_logger(__name__)

LEFT_OUT_OF_CASE = {**LEFT_OUT, "image-text matching": r"^itm_head\."}
"""Weights that CASE does not use; it keeps cross-attention."""

LICENCE = "MIT (lucas-ventura/CoVR), on weights of Salesforce's BLIP, BSD-3-Clause"


def convert_case(
    checkpoint: File,
    output_dir: File,
    tokenizer: File | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> None:
    """Write a checkpoint of CoVR's BLIP, or a BLIP retrieval checkpoint of Salesforce, as a [`CASEModel`] folder.

    `AutoModel.from_pretrained` and, with a tokenizer, `AutoProcessor.from_pretrained` load that folder. CoVR's
    objective is written to the configuration: HN-NCE, and no way back.

    Args:
        checkpoint: `ckpt_5.ckpt` or a similar file, or its state dict as `.safetensors`.
        output_dir: a new or empty folder.
        tokenizer: BERT's uncased tokenizer: `vocab.txt`, a folder or a Hub name. A processor is then written too.
        vision_heads: attention heads of the ViT, which shapes do not show; needed for other widths than ViT-B, ViT-L.
        text_heads: attention heads of the text encoder; needed for a width other than BERT base's.

    Raises:
        ValueError: if the file is damaged or holds more than tensors (nothing in it is run), lacks weights or has
            unknown ones, their widths differ, or the folder is not empty.
    """
    check_empty(output_dir)
    tensors = read_checkpoint(checkpoint)
    with naming(checkpoint):
        model = case_from_covr(tensors, vision_heads, text_heads)
    processor = None
    if tokenizer is not None:
        vl_config = model.config.vl_config
        processor = CASEProcessor.for_backbone(vl_config, load_tokenizer(tokenizer, vl_config))
    logger.warning(f"the licence of these weights is that of their repository: {LICENCE}")
    write(output_dir, model, processor)


def case_from_covr(tensors: Tensors, vision_heads: int | None = None, text_heads: int | None = None) -> CASEModel:
    """Make a model of CoVR's tensors, to be saved; buffers that are not saved have no values.

    Args:
        tensors: the whole state dict; tensors on the meta device give a model there.
        vision_heads: see [`convert_case`].
        text_heads: see there.

    Raises:
        ValueError: if the tensors are not exactly those of a BLIP retrieval model with cross-attention.
    """
    weights = translate(leave_out(tensors, LEFT_OUT_OF_CASE), BLIP_NAMES)
    vocab_size = len(weights.get("text_encoder.embeddings.word_embeddings.weight", ()))
    config = CASEConfig(
        vl_config=blip_config(weights, vision_heads, text_heads),
        enc_token_id=vocab_size - 1,  # BERT's tokens, [DEC], [ENC]
        reverse_token_id=vocab_size - 2,
        reverse_weight=0.0,
        objective="hn_nce",
    )
    return fill(CASEModel, config, {f"backbone.{name}": tensor for name, tensor in weights.items()})


__all__ = ["convert_case"]
