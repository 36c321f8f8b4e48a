"""Composed image retrieval with PVLF for Hugging Face Transformers.

Importing this package registers PVLF with `AutoConfig`, `AutoModel`, `AutoProcessor` and `AutoImageProcessor`.
Data, training and evaluation are imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

from .configuration_pvlf import PVLFConfig
from .image_processing_pvlf import PVLFImageProcessor
from .loss_pvlf import focal_info_nce
from .modeling_pvlf import PVLFModel, PVLFOutput, PVLFQueryOutput
from .processing_pvlf import PVLFProcessor

if TYPE_CHECKING:
    from .data import CIRBenchmark, PVLFCollator, benchmark_from_triplets, load_triplets
    from .emoji_cir import load_emoji_cir, load_emoji_cir_train, load_emoji_pictures
    from .evaluation import Evaluation, evaluate, write_results
    from .sheet import retrieval_sheet, sheet_rows
    from .trainer import PVLFTrainer
    from .training_args import PVLFTrainingArguments

__version__ = "0.1.0"

AutoConfig.register(PVLFConfig.model_type, PVLFConfig, exist_ok=True)
AutoModel.register(PVLFConfig, PVLFModel, exist_ok=True)
AutoImageProcessor.register(PVLFConfig, image_processor_classes={"pil": PVLFImageProcessor}, exist_ok=True)
AutoProcessor.register(PVLFConfig, PVLFProcessor, exist_ok=True)

_MODULE_OF = {
    "CIRBenchmark": "data",
    "PVLFCollator": "data",
    "benchmark_from_triplets": "data",
    "load_triplets": "data",
    "load_emoji_cir": "emoji_cir",
    "load_emoji_cir_train": "emoji_cir",
    "load_emoji_pictures": "emoji_cir",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "write_results": "evaluation",
    "retrieval_sheet": "sheet",
    "sheet_rows": "sheet",
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
    "Evaluation",
    "PVLFCollator",
    "PVLFConfig",
    "PVLFImageProcessor",
    "PVLFModel",
    "PVLFOutput",
    "PVLFProcessor",
    "PVLFQueryOutput",
    "PVLFTrainer",
    "PVLFTrainingArguments",
    "benchmark_from_triplets",
    "evaluate",
    "focal_info_nce",
    "load_emoji_cir",
    "load_emoji_cir_train",
    "load_emoji_pictures",
    "load_triplets",
    "retrieval_sheet",
    "sheet_rows",
    "write_results",
]
