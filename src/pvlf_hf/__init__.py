"""Composed image retrieval with PVLF for Hugging Face Transformers.

Importing this package registers PVLF with `AutoConfig`, `AutoModel`, `AutoProcessor`, `AutoImageProcessor` and
`pipeline("composed-image-retrieval")`. Data, training and evaluation are imported when first used.
"""

from importlib import import_module
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .models.configuration_pvlf import PVLFConfig
from .models.image_processing_pvlf import PVLFImageProcessor
from .models.modeling_pvlf import PVLFModel
from .models.pipeline_pvlf import TASK, ComposedImageRetrievalPipeline
from .models.processing_pvlf import PVLFProcessor

__version__ = "0.1.0"

AutoConfig.register(PVLFConfig.model_type, PVLFConfig, exist_ok=True)
AutoModel.register(PVLFConfig, PVLFModel, exist_ok=True)
AutoImageProcessor.register(PVLFConfig, image_processor_classes={"pil": PVLFImageProcessor}, exist_ok=True)
AutoProcessor.register(PVLFConfig, PVLFProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=ComposedImageRetrievalPipeline, pt_model=AutoModel, type="multimodal"
)

_NAMES_OF = {
    "training.batches": "PVLFCollator",
    "data.benchmark": "CIRBenchmark Protocol",
    "data.circo": "load_circo",
    "data.cirr": "load_cirr load_cirr_train",
    "checkpoints.convert": "convert_salesforce_blip convert_transagg",
    "data.triplets": "benchmark_from_triplets load_triplets",
    "embeddings.embedding_store": "EmbeddingStore",
    "data.emoji_cir.dataset": "load_emoji_cir load_emoji_cir_train load_emoji_pictures",
    "evaluation.scoring": "evaluate",
    "data.fashioniq": "load_fashioniq load_fashioniq_train",
    "training.feature_cache": "FeatureCache cache_features",
    "search.gallery": "Gallery SearchResult",
    "checkpoints.golden": "check_golden write_golden",
    "data.laion_cir": "load_laion_cir",
    "models.loss_pvlf": "focal_info_nce",
    "checkpoints.model_card": "render_card write_card",
    "models.modeling_pvlf": "PVLFOutput PVLFQueryOutput",
    "embeddings.openvino_encoder": "encode_by_openvino",
    "data.protocols": "load_protocol",
    "search.query": "Explanation Query",
    "evaluation.results": "Evaluation write_results",
    "evaluation.retrieval_sheet": "retrieval_sheet sheet_rows",
    "evaluation.significance": "bootstrap_interval paired_test seed_interval",
    "data.streaming": "load_hub_triplets stream_triplets write_shards",
    "evaluation.submission": "lint_submission write_circo_submission write_cirr_submission",
    "training.trainer": "PVLFTrainer",
    "training.training_args": "PVLFTrainingArguments",
}
"""Module to its public names, which are imported when first used."""

_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Imports training, data and evaluation on first use; they need more than the model does."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


__all__ = sorted(
    ["ComposedImageRetrievalPipeline", "PVLFConfig", "PVLFImageProcessor", "PVLFModel", "PVLFProcessor", *_MODULE_OF]
)
