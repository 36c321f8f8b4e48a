"""Search: a gallery of your own images, its queries and vector indices, and the web demo.

Imports `models`, `data`, `embeddings`, `evaluation` and `checkpoints`.
"""

from ..lazy_names import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "gallery": "Gallery",
        "milvus.gallery": "MilvusGallery",
        "milvus.store": "MilvusOptions",
        "mining": "TripletMiner",
        "query": "Explanation Query",
        "result": "SearchResult",
        "sharded_gallery": "ShardedGallery",
        "shards": "EmbeddingShards",
    },
)
