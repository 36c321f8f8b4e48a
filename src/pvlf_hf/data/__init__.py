"""Data: triplets, benchmarks, loaders of public data sets, the examination of a data set, triplets made of captions.

Imports `models` (images are opened by its image processor) and no folder that comes after it.
"""

from ..lazy_names import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "benchmark": "CIRBenchmark Protocol",
        "circled": "load_circled",
        "circo": "load_circo",
        "cirr": "load_cirr load_cirr_train",
        "edir": "load_edir",
        "emoji_cir": "load_emoji_cir load_emoji_cir_train load_emoji_pictures load_emoji_samples",
        "fashioniq": "load_fashioniq load_fashioniq_train",
        "genecis": "load_genecis",
        "icir": "load_icir",
        "l_cirr": "load_l_cirr",
        "laion_cir": "load_laion_cir",
        "making": "InstructWriter Making make_triplets",
        "pinpoint": "load_pinpoint",
        "protocols": "load_protocol",
        "refined_cirr": "load_refined_cirr",
        "refined_fashioniq": "load_refined_fashioniq",
        "samples": "load_samples",
        "streaming": "load_hub_triplets stream_triplets write_shards",
        "triplets": "benchmark_from_triplets load_triplets",
    },
)
