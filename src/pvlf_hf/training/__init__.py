"""Training: the trainer, its arguments, batches of triplets, and cached features of frozen encoders.

Imports every folder but `commands`.
"""

from ..lazy_names import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "batches": "PVLFCollator",
        "feature_cache": "FeatureCache cache_features",
        "trainer": "PVLFTrainer",
        "training_args": "PVLFTrainingArguments",
    },
)
