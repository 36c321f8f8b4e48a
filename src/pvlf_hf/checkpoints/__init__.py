"""Checkpoints: loading, conversion of released weights, golden embeddings beside a checkpoint, and model cards.

Imports `models`, `data`, `embeddings` and `evaluation`.
"""

from .convert import convert_salesforce_blip, convert_transagg
from .convert_case import convert_case
from .convert_compodiff import convert_compodiff
from .convert_inversion import convert_inversion
from .golden import check_golden, write_golden
from .loading import load_model
from .model_card import render_card, write_card

__all__ = [
    "check_golden",
    "convert_case",
    "convert_compodiff",
    "convert_inversion",
    "convert_salesforce_blip",
    "convert_transagg",
    "load_model",
    "render_card",
    "write_card",
    "write_golden",
]
