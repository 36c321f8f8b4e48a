"""Embeddings: encoding of galleries and queries, exact similarity, fingerprints, and embeddings kept on disk.

Imports `models` and `data`.
"""

from .embedding_store import EmbeddingStore
from .openvino_encoder import encode_by_openvino

__all__ = ["EmbeddingStore", "encode_by_openvino"]
