"""Evaluation: ranks and metrics, benchmarks scored by their protocol, intervals, results, submissions, contact sheets.

Imports `models`, `data` and `embeddings`.
"""

from .results import Evaluation, write_results
from .retrieval_sheet import retrieval_sheet, sheet_rows
from .scoring import evaluate
from .significance import bootstrap_interval, crossed_interval, detectable_difference, paired_test, seed_interval
from .submission import lint_submission, write_circo_submission, write_cirr_submission

__all__ = [
    "Evaluation",
    "bootstrap_interval",
    "crossed_interval",
    "detectable_difference",
    "evaluate",
    "lint_submission",
    "paired_test",
    "retrieval_sheet",
    "seed_interval",
    "sheet_rows",
    "write_circo_submission",
    "write_cirr_submission",
    "write_results",
]
