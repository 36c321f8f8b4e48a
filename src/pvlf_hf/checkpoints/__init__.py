"""Checkpoints: loading, conversion of released weights, golden embeddings beside a checkpoint, and model cards.

Imports `models`, `data`, `embeddings` and `evaluation`.
"""

from ..lazy_names import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "convert": "convert_salesforce_blip convert_transagg",
        "case_weights": "convert_case",
        "compodiff_weights": "convert_compodiff",
        "inversion_weights": "convert_inversion",
        "golden": "check_golden write_golden",
        "loading": "load_model",
        "model_card": "render_card write_card",
        "pushing": "push_checkpoint",
    },
)
