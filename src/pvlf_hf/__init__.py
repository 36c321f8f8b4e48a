"""Composed image retrieval with PVLF for Hugging Face Transformers.

Importing this package registers PVLF with `AutoConfig`, `AutoModel`, `AutoProcessor`, `AutoImageProcessor` and
`pipeline("composed-image-retrieval")`, at once if Transformers is imported already, otherwise as soon as it is.
Everything else is imported when first used.
"""

from importlib import import_module
from typing import Any

from .registration import import_after

import_after("transformers", f"{__name__}.models")  # which registers them

__version__ = "0.1.0"

_NAMES_OF = {
    "models": """
        CASEConfig CASEModel CASEOutput CASEProcessor
        CompoDiffConfig CompoDiffModel CompoDiffProcessor
        ComposedImageRetrievalPipeline ComposedRetrievalModel ComposedRetrievalOutput ComposedRetrievalProcessor
        InversionConfig InversionModel InversionProcessor InversionQueryOutput
        PVLFConfig PVLFImageProcessor PVLFModel PVLFOutput PVLFProcessor PVLFQueryOutput QueryOutput
        TrainingFreeConfig TrainingFreeModel focal_info_nce
    """,
    "data": """
        CIRBenchmark InstructWriter Making Protocol benchmark_from_triplets load_circled load_circo
        load_cirr load_cirr_train load_edir load_genecis load_icir load_l_cirr load_pinpoint load_refined_cirr
        load_refined_fashioniq load_emoji_cir load_emoji_cir_train load_emoji_pictures load_emoji_samples
        load_fashioniq load_fashioniq_train load_hub_triplets load_laion_cir load_protocol load_samples
        load_triplets make_triplets stream_triplets write_shards
    """,
    "embeddings": """
        EmbeddingStore encode_by_openvino
    """,
    "evaluation": """
        Evaluation bootstrap_interval crossed_interval detectable_difference evaluate lint_submission paired_test
        retrieval_sheet seed_interval sheet_rows write_circo_submission write_cirr_submission write_results
    """,
    "checkpoints": """
        check_golden convert_case convert_compodiff convert_inversion convert_salesforce_blip convert_transagg
        load_model push_checkpoint render_card write_card write_golden
    """,
    "search": """
        EmbeddingShards Explanation Gallery MilvusGallery MilvusOptions Query SearchResult ShardedGallery TripletMiner
    """,
    "training": """
        FeatureCache PVLFCollator PVLFTrainer PVLFTrainingArguments cache_features
    """,
}
"""Public names of the package by the folder that hands them on; each is imported when first used."""

_FOLDER_OF = {name: folder for folder, names in _NAMES_OF.items() for name in names.split()}

__all__ = sorted(_FOLDER_OF)


def __getattr__(name: str) -> Any:
    """Import a folder, or the folder of a public name, on first use; most of them import PyTorch."""
    if name in _NAMES_OF:
        return import_module(f".{name}", __name__)
    if name not in _FOLDER_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_FOLDER_OF[name]}", __name__), name)
