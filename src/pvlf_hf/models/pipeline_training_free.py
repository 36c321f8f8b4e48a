"""Extends `pipeline("composed-image-retrieval")` to plain dual encoders by name, when `pvlf_hf` is imported."""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration_pvlf import BACKBONES
from .configuration_training_free import TrainingFreeConfig
from .modeling_training_free import TrainingFreeModel
from .pipeline_pvlf import ComposedImageRetrievalPipeline
from .processing_pvlf import PVLFProcessor

PLACE = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
"""Arguments of `from_pretrained` that say where to look."""


class AutoComposedRetrievalModel(AutoModel):
    """`AutoModel` that makes a [`TrainingFreeModel`] of a plain dual encoder."""

    @classmethod
    def from_pretrained(cls, name_or_path: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load a model, see `AutoModel`; settings of [`TrainingFreeConfig`] are for a plain dual encoder."""
        place = {name: kwargs[name] for name in PLACE if kwargs.get(name) is not None}
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=kwargs.get("trust_remote_code"), **place)
        if config.model_type not in BACKBONES:
            return AutoModel.from_pretrained(name_or_path, *args, **kwargs)
        names = ("dtype", "attn_implementation", *TrainingFreeConfig.__annotations__)
        settings = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        model = TrainingFreeModel.from_vl_pretrained(name_or_path, **settings, **place)
        model.name_or_path = name_or_path
        return model


class DualEncoderPipeline(ComposedImageRetrievalPipeline):
    """The pipeline, with the processor that goes with a plain dual encoder, which the library loads its own for.

    Example:
        ```python
        pipe = pipeline("composed-image-retrieval", model="openai/clip-vit-base-patch32", gallery=images)
        pipe = pipeline("composed-image-retrieval", model="...", model_kwargs={"composition": "product"})
        ```
    """

    _load_processor = None  # SigLIP 1's own needs a further package, and is not used

    def __init__(self, **kwargs: Any) -> None:
        model: Any = kwargs["model"]
        processor = kwargs.get("processor")
        if isinstance(model, TrainingFreeModel) and not hasattr(processor, "process_queries"):
            revision = getattr(model.config.vl_config, "_commit_hash", None)
            kwargs["processor"] = PVLFProcessor.from_vl_pretrained(str(model.name_or_path), revision=revision)
        elif processor is None and hasattr(model, "get_query_features"):
            kwargs["processor"] = AutoProcessor.from_pretrained(model.name_or_path)  # raises what the library hid
        super().__init__(**kwargs)


__all__ = ["AutoComposedRetrievalModel", "DualEncoderPipeline"]
