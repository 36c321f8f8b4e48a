"""Search: a gallery of your own images, its queries and vector indices, and the web demo.

Imports `models`, `data`, `embeddings`, `evaluation` and `checkpoints`.
"""

from .gallery import Gallery
from .query import Explanation, Query
from .result import SearchResult

__all__ = ["Explanation", "Gallery", "Query", "SearchResult"]
