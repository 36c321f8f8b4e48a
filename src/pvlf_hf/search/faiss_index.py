"""FAISS's graph of neighbours (HNSW): built once, kept beside the gallery, and memory-mapped when it is loaded."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from ..atomic_files import whole

logger = logging.get_logger(__name__)

NEIGHBOURS = 32
"""Neighbours of a node of the graph, FAISS's `M` (its default)."""

SEARCH_WIDTH = 128
"""Length of the candidate list of FAISS's graph search, its `efSearch` (our choice). Of the ten best of 20,000 random
vectors of width 64, the worst case, this finds 97 %; FAISS's default of 16 finds half."""

ROWS_AT_ONCE = 4096
"""Embeddings added at a time (our choice), between two steps of the progress bar."""

LONG = 20_000
"""Images from which building takes long enough for a progress bar: seconds on two cores."""


class FaissIndex:
    """HNSW graph, which holds a copy of the embeddings; building takes a minute per 100,000 images.

    Args:
        embeds: float32 `(gallery, d)`, L2-normalised.
        file: keeps the graph; where it exists, it is memory-mapped and nothing is built. None keeps it in memory.

    Attributes:
        graph: the `faiss.IndexHNSWFlat`.

    Raises:
        ImportError: if FAISS is not installed.
    """

    def __init__(self, embeds: Tensor, file: Path | None = None) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ImportError("index='faiss' needs FAISS: pip install faiss-cpu") from error
        graph = None if file is None else kept_graph(file, embeds)
        if graph is None:
            graph = faiss.IndexHNSWFlat(embeds.shape[1], NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
            parts = embeds.split(ROWS_AT_ONCE)
            for part in tqdm(parts, "building FAISS's graph", disable=len(embeds) < LONG):
                graph.add(part.numpy())
            if file is not None:
                keep_graph(graph, file)
        graph.hnsw.efSearch = SEARCH_WIDTH
        self.graph = graph

    def candidates(self, query: Tensor, k: int) -> Tensor:
        """Return candidates, see [`VectorIndex`]; fewer than k where a search does not reach a part of the graph."""
        rows = torch.from_numpy(self.graph.search(query[None].numpy(), k)[1][0])
        return rows[rows >= 0]


def kept_graph(file: Path, embeds: Tensor) -> Any:
    """Return the graph of a file, memory-mapped; None if there is none, or it is not one of these embeddings."""
    import faiss

    if not file.exists():
        return None
    try:
        graph = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        logger.warning(f"{file} cannot be read ({str(error).splitlines()[0]}): it is built again")
        return None
    if (graph.ntotal, graph.d) != tuple(embeds.shape):
        logger.warning(f"{file} holds {graph.ntotal} images, not {len(embeds)}: it is built again")
        return None
    return graph


def keep_graph(graph: Any, file: Path) -> None:
    """Write a graph, and remove those of earlier contents of the gallery; warn where the folder cannot be written."""
    import faiss

    try:
        with whole(file) as partial:
            faiss.write_index(graph, str(partial))
    except (OSError, RuntimeError) as error:
        logger.warning(f"FAISS's graph cannot be kept ({error}): it is built again at the next load")
        return
    for other in file.parent.glob("faiss-*.index"):
        if other != file:
            other.unlink()


__all__ = ["FaissIndex"]
