"""Training: the trainer, its arguments, batches of triplets, and cached features of frozen encoders.

Imports every folder but `commands`.
"""

from .batches import PVLFCollator
from .feature_cache import FeatureCache, cache_features
from .trainer import PVLFTrainer
from .training_args import PVLFTrainingArguments

__all__ = ["FeatureCache", "PVLFCollator", "PVLFTrainer", "PVLFTrainingArguments", "cache_features"]
