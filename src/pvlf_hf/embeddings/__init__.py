"""Embeddings: encoding of galleries and queries, exact similarity, fingerprints, and embeddings kept on disk.

Imports `models` and `data`.
"""

from ..lazy_names import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "embedding_store": "EmbeddingStore",
        "openvino_encoder": "encode_by_openvino",
    },
)
