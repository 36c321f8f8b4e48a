"""Composed image retrieval with PVLF for Hugging Face Transformers.

Importing this package registers PVLF with `AutoConfig`, `AutoModel`, `AutoProcessor`, `AutoImageProcessor` and
`pipeline("composed-image-retrieval")`. Data, training and evaluation are imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_pvlf import PVLFConfig
from .image_processing_pvlf import PVLFImageProcessor
from .loss_pvlf import focal_info_nce
from .modeling_pvlf import PVLFModel, PVLFOutput, PVLFQueryOutput
from .pipeline_pvlf import TASK, ComposedImageRetrievalPipeline
from .processing_pvlf import PVLFProcessor

if TYPE_CHECKING:
    from .benchmark import CIRBenchmark, Protocol
    from .circo import load_circo
    from .cirr import load_cirr, load_cirr_train
    from .convert import convert_salesforce_blip, convert_transagg
    from .data import PVLFCollator, benchmark_from_triplets, load_triplets
    from .embedding_store import EmbeddingStore
    from .emoji_cir import load_emoji_cir, load_emoji_cir_train, load_emoji_pictures
    from .evaluation import Evaluation, evaluate, write_results
    from .fashioniq import load_fashioniq, load_fashioniq_train
    from .feature_cache import FeatureCache, cache_features
    from .gallery import Explanation, Gallery, Query, SearchResult
    from .golden import check_golden, write_golden
    from .laion_cir import load_laion_cir
    from .model_card import render_card, write_card
    from .openvino_encoder import encode_by_openvino
    from .protocols import load_protocol
    from .sheet import retrieval_sheet, sheet_rows
    from .significance import bootstrap_interval, paired_test, seed_interval
    from .streaming import load_hub_triplets, stream_triplets, write_shards
    from .submission import lint_submission, write_circo_submission, write_cirr_submission
    from .trainer import PVLFTrainer
    from .training_args import PVLFTrainingArguments

__version__ = "0.1.0"

AutoConfig.register(PVLFConfig.model_type, PVLFConfig, exist_ok=True)
AutoModel.register(PVLFConfig, PVLFModel, exist_ok=True)
AutoImageProcessor.register(PVLFConfig, image_processor_classes={"pil": PVLFImageProcessor}, exist_ok=True)
AutoProcessor.register(PVLFConfig, PVLFProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=ComposedImageRetrievalPipeline, pt_model=AutoModel, type="multimodal"
)

_MODULE_OF = {
    "CIRBenchmark": "benchmark",
    "Protocol": "benchmark",
    "load_circo": "circo",
    "load_cirr": "cirr",
    "load_cirr_train": "cirr",
    "convert_salesforce_blip": "convert",
    "convert_transagg": "convert",
    "PVLFCollator": "data",
    "benchmark_from_triplets": "data",
    "load_triplets": "data",
    "EmbeddingStore": "embedding_store",
    "load_emoji_cir": "emoji_cir",
    "load_emoji_cir_train": "emoji_cir",
    "load_emoji_pictures": "emoji_cir",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "write_results": "evaluation",
    "load_fashioniq": "fashioniq",
    "load_fashioniq_train": "fashioniq",
    "FeatureCache": "feature_cache",
    "cache_features": "feature_cache",
    "Explanation": "gallery",
    "Gallery": "gallery",
    "Query": "gallery",
    "SearchResult": "gallery",
    "check_golden": "golden",
    "write_golden": "golden",
    "load_laion_cir": "laion_cir",
    "render_card": "model_card",
    "write_card": "model_card",
    "encode_by_openvino": "openvino_encoder",
    "load_protocol": "protocols",
    "retrieval_sheet": "sheet",
    "sheet_rows": "sheet",
    "bootstrap_interval": "significance",
    "paired_test": "significance",
    "seed_interval": "significance",
    "load_hub_triplets": "streaming",
    "stream_triplets": "streaming",
    "write_shards": "streaming",
    "lint_submission": "submission",
    "write_circo_submission": "submission",
    "write_cirr_submission": "submission",
    "PVLFTrainer": "trainer",
    "PVLFTrainingArguments": "training_args",
}


def __getattr__(name: str) -> Any:
    """Imports training, data and evaluation on first use; they need more than the model does."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


__all__ = [
    "CIRBenchmark",
    "ComposedImageRetrievalPipeline",
    "EmbeddingStore",
    "Evaluation",
    "Explanation",
    "FeatureCache",
    "Gallery",
    "PVLFCollator",
    "PVLFConfig",
    "PVLFImageProcessor",
    "PVLFModel",
    "PVLFOutput",
    "PVLFProcessor",
    "PVLFQueryOutput",
    "PVLFTrainer",
    "PVLFTrainingArguments",
    "Protocol",
    "Query",
    "SearchResult",
    "benchmark_from_triplets",
    "bootstrap_interval",
    "cache_features",
    "check_golden",
    "convert_salesforce_blip",
    "convert_transagg",
    "encode_by_openvino",
    "evaluate",
    "focal_info_nce",
    "lint_submission",
    "load_circo",
    "load_cirr",
    "load_cirr_train",
    "load_emoji_cir",
    "load_emoji_cir_train",
    "load_emoji_pictures",
    "load_fashioniq",
    "load_fashioniq_train",
    "load_hub_triplets",
    "load_laion_cir",
    "load_protocol",
    "load_triplets",
    "paired_test",
    "render_card",
    "retrieval_sheet",
    "seed_interval",
    "sheet_rows",
    "stream_triplets",
    "write_card",
    "write_circo_submission",
    "write_cirr_submission",
    "write_golden",
    "write_results",
    "write_shards",
]
