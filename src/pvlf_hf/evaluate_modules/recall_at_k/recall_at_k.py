"""Recall at k as a metric for Hugging Face Evaluate: `evaluate.load("<this folder>").compute(...)`."""

from collections.abc import Sequence
from typing import Any

# Evaluate finds the packages that must be installed by these lines; it reads one module a line.
import datasets
import evaluate

from pvlf_hf.evaluation.metrics import recall_at_k
from pvlf_hf.evaluation.ranking import NOT_RETRIEVED, ranks_from_lists

_DESCRIPTION = """
Fraction of queries whose target is among the first k of a ranked list: the recall of composed image retrieval, where
each query has one target (CIRR, FashionIQ).
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each query the ranked ids of gallery images (strings), best first. A list may be shorter than the
        gallery; a target that is not in it counts as missed.
    references: for each query the id of its target.
    ks: cut-offs, by default CIRR's 1, 5, 10 and 50. FashionIQ reports 10 and 50.
    exclude: for each query an id to take out of its list first, if it is in it: CIRR leaves out the reference image,
        FashionIQ nothing.
    per_query: also return the ranks.
Returns:
    `recall@k` for each k, a fraction; with `per_query` also `ranks`, 0-based, None where the target is not in the
    list.
Raises:
    ValueError: naming the query, if a list is empty or repeats an id, or a target is excluded.
Examples:
    >>> metric = evaluate.load("src/pvlf_hf/evaluate_modules/recall_at_k")
    >>> metric.compute(predictions=[["dress", "shirt"], ["shirt", "dress"]], references=["dress", "dress"], ks=[1, 2])
    {'recall@1': 0.5, 'recall@2': 1.0}
"""

_CITATION = """
@inproceedings{liu2021image,
  title = {Image Retrieval on Real-life Images with Pre-trained Vision-and-Language Models},
  author = {Liu, Zheyuan and Rodriguez-Opazo, Cristian and Teney, Damien and Gould, Stephen},
  booktitle = {ICCV},
  year = {2021}
}
"""


class RecallAtK(evaluate.Metric):
    """Computes recall at k, see `_KWARGS_DESCRIPTION`."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.List(datasets.Value("string")), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(features),
        )

    def _compute(
        self,
        predictions: list[list[str]],
        references: list[str],
        ks: Sequence[int] = (1, 5, 10, 50),
        exclude: Sequence[str] | None = None,
        per_query: bool = False,
    ) -> dict[str, Any]:
        ranks = ranks_from_lists(predictions, [[target] for target in references], exclude)[:, 0]
        results: dict[str, Any] = {f"recall@{k}": recall for k, recall in recall_at_k(ranks, ks).items()}
        if per_query:
            results["ranks"] = [None if rank == NOT_RETRIEVED else rank for rank in ranks.tolist()]
        return results
