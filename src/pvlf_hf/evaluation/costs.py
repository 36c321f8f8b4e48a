"""Measures the cost of a method, its size and the time of one query, for the cost columns of comparisons."""

import time
from statistics import median
from typing import Any

import torch
from datasets import Dataset

from ..embeddings.encoding import device_of
from ..models.image_processing_pvlf import opened
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor, unwrap

TIMED_QUERIES = 20
"""Queries that are timed (our choice); the first warms up and does not count."""


@torch.inference_mode()
def query_milliseconds(
    model: ComposedRetrievalModel, processor: ComposedRetrievalProcessor, queries: Dataset, number: int = TIMED_QUERIES
) -> float:
    """Return the median time of one query, from pixels and token ids to its embedding.

    Args:
        model: the model; it is put in eval mode and back.
        processor: its processor.
        queries: queries of a benchmark, of which the first are timed.
        number: how many, at least two.
    """
    training = model.training
    model.eval()
    times = []
    for row in opened(queries.select_columns(["reference", "caption"]).select(range(min(number, len(queries))))):
        caption = row["caption"] if isinstance(row["caption"], str) else row["caption"][0]
        inputs = processor.process_queries([row["reference"]], [caption]).to(device_of(model))
        getattr(model, "inverted_words", {}).clear()  # of SEARLE-OTI and PALAVRA, whose cost is the optimisation
        start = time.perf_counter()
        embeds: Any = unwrap(model).get_query_features(**inputs).pooler_output
        embeds.sum().item()  # waits for an accelerator
        times.append(time.perf_counter() - start)
    model.train(training)
    return 1000 * median(times[1:] or times)


def costs(model: ComposedRetrievalModel, processor: ComposedRetrievalProcessor, queries: Dataset) -> dict[str, Any]:
    """Return `parameters`, `query_ms` and `device` of a model, measured now."""
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "query_ms": round(query_milliseconds(model, processor, queries), 2),
        "device": str(device_of(model)),
    }


__all__ = ["costs", "query_milliseconds"]
