"""CIRCO's mAP at k as a metric for Hugging Face Evaluate: `evaluate.load("<this folder>").compute(...)`."""

from collections.abc import Sequence
from typing import Any

# Evaluate finds the packages that must be installed by these lines; it reads one module a line.
import datasets
import evaluate

from pvlf_hf.evaluation.metrics import average_precision_at_k
from pvlf_hf.evaluation.ranking import ranks_from_lists

_DESCRIPTION = """
Mean average precision over the first k of a ranked list, for queries with several positives, as CIRCO defines it: the
sum of precision@j over the ranks j <= k that hold a positive, divided by min(positives, k).
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each query the ranked ids of gallery images (strings), best first. A list may be shorter than the
        gallery; positives that are not in it count as missed.
    references: for each query the ids of all its positives.
    ks: cut-offs, by default CIRCO's 5, 10, 25 and 50.
    exclude: for each query an id to take out of its list first, if it is in it. CIRCO's server leaves nothing out.
    per_query: also return the average precision of each query.
Returns:
    `map@k` for each k, a fraction; with `per_query` also `average_precision@k`, one per query.
Raises:
    ValueError: naming the query, if a list or its positives are empty or repeat an id, or a positive is excluded.
Examples:
    >>> metric = evaluate.load("src/pvlf_hf/evaluate_modules/map_at_k")
    >>> metric.compute(predictions=[["hat", "dress", "shirt"]], references=[["shirt", "hat"]], ks=[1, 2])
    {'map@1': 1.0, 'map@2': 0.5}
"""

_CITATION = """
@inproceedings{baldrati2023zero,
  title = {Zero-Shot Composed Image Retrieval with Textual Inversion},
  author = {Baldrati, Alberto and Agnolucci, Lorenzo and Bertini, Marco and Del Bimbo, Alberto},
  booktitle = {ICCV},
  year = {2023}
}
"""


class MapAtK(evaluate.Metric):
    """Computes mean average precision at k, see `_KWARGS_DESCRIPTION`."""

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": ids, "references": ids}),
        )

    def _compute(
        self,
        predictions: list[list[str]],
        references: list[list[str]],
        ks: Sequence[int] = (5, 10, 25, 50),
        exclude: Sequence[str] | None = None,
        per_query: bool = False,
    ) -> dict[str, Any]:
        precision = average_precision_at_k(ranks_from_lists(predictions, references, exclude), ks)
        results: dict[str, Any] = {f"map@{k}": float(values.mean()) for k, values in precision.items()}
        if per_query:
            results |= {f"average_precision@{k}": values.tolist() for k, values in precision.items()}
        return results
