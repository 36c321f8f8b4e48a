"""Models: dual encoders, PVLF, CASE, CompoDiff, training-free compositions, textual inversion, processors, pipeline.

The files are saved with checkpoints (`trust_remote_code`), so the folder is flat, and each file imports only its
neighbours, as `from .name import x`. This folder imports no other of the package.
"""

from typing import NamedTuple

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, PreTrainedConfig
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_case import CASEConfig
from .configuration_compodiff import CompoDiffConfig
from .configuration_inversion import InversionConfig
from .configuration_pvlf import PVLFConfig
from .configuration_training_free import TrainingFreeConfig
from .image_processing_pvlf import PVLFImageProcessor
from .interface_pvlf import (
    ComposedRetrievalModel,
    ComposedRetrievalOutput,
    ComposedRetrievalProcessor,
    QueryOutput,
)
from .loss_pvlf import focal_info_nce
from .modeling_case import CASEModel, CASEOutput
from .modeling_compodiff import CompoDiffModel
from .modeling_inversion import InversionModel, InversionQueryOutput
from .modeling_pvlf import PVLFModel, PVLFOutput, PVLFQueryOutput
from .modeling_training_free import TrainingFreeModel
from .pipeline_pvlf import TASK, ComposedImageRetrievalPipeline
from .pipeline_training_free import AutoComposedRetrievalModel, DualEncoderPipeline
from .processing_case import CASEProcessor
from .processing_compodiff import CompoDiffProcessor
from .processing_inversion import InversionProcessor
from .processing_pvlf import PVLFProcessor


class Family(NamedTuple):
    """The classes of a model family, which `AutoConfig`, `AutoModel` and `AutoProcessor` find by its `model_type`."""

    config: type[PreTrainedConfig]
    model: type[ComposedRetrievalModel]
    processor: type[ComposedRetrievalProcessor]


FAMILIES = (
    Family(PVLFConfig, PVLFModel, PVLFProcessor),
    Family(InversionConfig, InversionModel, InversionProcessor),
    Family(CASEConfig, CASEModel, CASEProcessor),
    Family(CompoDiffConfig, CompoDiffModel, CompoDiffProcessor),
    Family(TrainingFreeConfig, TrainingFreeModel, PVLFProcessor),
)
"""Every model family of the package; a new one is one more entry."""

for family in FAMILIES:
    AutoConfig.register(family.config.model_type, family.config, exist_ok=True)
    AutoModel.register(family.config, family.model, exist_ok=True)
    AutoImageProcessor.register(family.config, image_processor_classes={"pil": PVLFImageProcessor}, exist_ok=True)
    AutoProcessor.register(family.config, family.processor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=DualEncoderPipeline, pt_model=AutoComposedRetrievalModel, type="multimodal"
)

__all__ = [
    "CASEConfig",
    "CASEModel",
    "CASEOutput",
    "CASEProcessor",
    "CompoDiffConfig",
    "CompoDiffModel",
    "CompoDiffProcessor",
    "ComposedImageRetrievalPipeline",
    "ComposedRetrievalModel",
    "ComposedRetrievalOutput",
    "ComposedRetrievalProcessor",
    "InversionConfig",
    "InversionModel",
    "InversionProcessor",
    "InversionQueryOutput",
    "PVLFConfig",
    "PVLFImageProcessor",
    "PVLFModel",
    "PVLFOutput",
    "PVLFProcessor",
    "PVLFQueryOutput",
    "QueryOutput",
    "TrainingFreeConfig",
    "TrainingFreeModel",
    "focal_info_nce",
]
