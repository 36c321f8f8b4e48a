"""Loads any model that composes queries: a checkpoint of a registered family, or a plain dual encoder."""

from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoProcessor
from transformers.utils import logging

from ..dtypes import warn_if_slow
from ..embeddings.fastest import fastest_dtype
from ..models.compositions_training_free import COMPOSITIONS
from ..models.configuration_pvlf import BACKBONES
from ..models.configuration_training_free import TrainingFreeConfig
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from ..models.modeling_training_free import TrainingFreeModel
from ..models.processing_pvlf import PVLFProcessor

logger = logging.get_logger(__name__)


def load_model(
    name: str, composition: str | None = None, dtype: str = "auto"
) -> tuple[ComposedRetrievalModel, ComposedRetrievalProcessor]:
    """Load a model with its processor, in eval mode.

    Args:
        name: name on the Hub or folder of a PVLF checkpoint, a training-free model, another registered composed
            retrieval model, or a plain dual encoder of one of `BACKBONES`, which becomes a [`TrainingFreeModel`].
        composition: one of `COMPOSITIONS`, for a dual encoder (Slerp by default) or in place of a training-free
            model's own.
        dtype: one of `DTYPES`.

    Raises:
        ValueError: if the model does not exist, it composes no queries, its tokenizer is missing, or the composition
            is unknown or not for this model.
    """
    if composition is not None and composition not in COMPOSITIONS:
        raise ValueError(f"composition={composition!r}: choose one of {sorted(COMPOSITIONS)}")
    if dtype == "fastest":
        dtype = fastest_dtype()
        logger.warning(f"the model is loaded in {dtype}, measured to be the fastest here")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        where = "in this folder" if Path(name).is_dir() else "neither a folder here nor on the Hub"
        raise ValueError(f"no model {name!r}, {where}: {' '.join(str(error).split())}") from error
    kind = MODEL_MAPPING.get(type(config), None)
    model: ComposedRetrievalModel
    processor: ComposedRetrievalProcessor
    if isinstance(kind, type) and issubclass(kind, ComposedRetrievalModel):
        settings: dict[str, Any] = {}
        if composition is not None:
            if not isinstance(config, TrainingFreeConfig):
                raise ValueError(f"{name} composes queries as it has learnt to: leave composition={composition!r} out")
            weight = COMPOSITIONS[composition].default_weight
            settings = {"composition": composition, "composition_weight": weight}
        model = AutoModel.from_pretrained(name, dtype=dtype, **settings)
        processor = AutoProcessor.from_pretrained(name)
    elif config.model_type in BACKBONES:
        processor = PVLFProcessor.from_vl_pretrained(name)
        settings = {} if composition is None else {"composition": composition}
        model = TrainingFreeModel.from_vl_pretrained(name, dtype=dtype, **settings)
        logger.warning(
            f"{name} is a plain {config.model_type} encoder: queries are composed by {model.config.composition!r}, "
            "without training. Fine-tuning PVLF on it (pvlf-hf train --finetuning text) retrieves better, "
            "and keeps the embeddings of images"
        )
    elif config.model_type == "siglip2":
        raise ValueError(
            f"{name} is a SigLIP 2 of variable resolution (NaFlex), which is not supported: pass one of fixed "
            "resolution, such as google/siglip2-base-patch16-256"
        )
    else:
        raise ValueError(
            f"{name} is a {config.model_type!r} model, which does not embed images and texts in one space: pass a "
            f"PVLF checkpoint, or a dual encoder, one of {[*BACKBONES]}"
        )
    if not torch.accelerator.is_available():
        warn_if_slow(model.dtype)
    return model, processor


__all__ = ["load_model"]
