"""Models: configuration, dual encoders, PVLF, its loss, its processors and its pipeline.

The files travel with checkpoints (`trust_remote_code`), so the folder is flat, and each file imports only its
neighbours, as `from .name import x`. This folder imports no other of the package.
"""

from .configuration_pvlf import PVLFConfig
from .image_processing_pvlf import PVLFImageProcessor
from .loss_pvlf import focal_info_nce
from .modeling_pvlf import PVLFModel, PVLFOutput, PVLFQueryOutput
from .pipeline_pvlf import ComposedImageRetrievalPipeline
from .processing_pvlf import PVLFProcessor

__all__ = [
    "ComposedImageRetrievalPipeline",
    "PVLFConfig",
    "PVLFImageProcessor",
    "PVLFModel",
    "PVLFOutput",
    "PVLFProcessor",
    "PVLFQueryOutput",
    "focal_info_nce",
]
