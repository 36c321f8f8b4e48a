"""Data: triplets, benchmarks, the loaders of the public data sets, and the examination of a data set before use.

Imports `models` (images are opened by its image processor) and no folder that comes after it.
"""

from .benchmark import CIRBenchmark, Protocol
from .circo import load_circo
from .cirr import load_cirr, load_cirr_train
from .emoji_cir import load_emoji_cir, load_emoji_cir_train, load_emoji_pictures, load_emoji_samples
from .fashioniq import load_fashioniq, load_fashioniq_train
from .laion_cir import load_laion_cir
from .protocols import load_protocol
from .samples import load_samples
from .streaming import load_hub_triplets, stream_triplets, write_shards
from .triplets import benchmark_from_triplets, load_triplets

__all__ = [
    "CIRBenchmark",
    "Protocol",
    "benchmark_from_triplets",
    "load_circo",
    "load_cirr",
    "load_cirr_train",
    "load_emoji_cir",
    "load_emoji_cir_train",
    "load_emoji_pictures",
    "load_emoji_samples",
    "load_fashioniq",
    "load_fashioniq_train",
    "load_hub_triplets",
    "load_laion_cir",
    "load_protocol",
    "load_samples",
    "load_triplets",
    "stream_triplets",
    "write_shards",
]
