"""Writes what the Hub indexes into the cards of the shipped checkpoints: metadata, `model-index`, the usage example.

    python train_scripts/shipped_cards.py

All of it comes from their `results.json`; the rest of a card is written by hand. What only the Hub knows is written
when a checkpoint is pushed, by `pvlf-hf card --push`: the commit that the example loads, `base_model` of
pvlf-emoji-tiny (the name under which blip-emoji-tiny was pushed), and `.eval_results/`, which names EmojiCIR by its id
there.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from pvlf_hf.checkpoints.model_card import render_card, short_name, with_metadata

CARDS = Path(__file__).resolve().parents[1] / "model_cards"

TEXT_ENCODER = "sentence-transformers/paraphrase-MiniLM-L3-v2"
"""Where the text tower of blip-emoji-tiny starts (`emoji_text_tower.py`)."""


def shipped_cards() -> dict[Path, str]:
    """Render the cards of both checkpoints, by file."""
    return {CARDS / name / "README.md": render(name) for name, render in RENDERERS.items()}


def _pvlf(name: str) -> str:
    return render_card(_results(name), f"model_cards/{name}", _card(name))


def _backbone(name: str) -> str:
    """Render the card of the dual encoder, which was measured by the names of images, not on composed queries."""
    results = _results(name)
    measured = [
        EvalResult(
            task_type="text-to-image-retrieval",
            task_name="Text-to-image retrieval",
            dataset_type="emoji-names",
            dataset_name=f"Google's drawings by their names ({results['counts']['gallery']:,} images)",
            metric_type=metric,
            metric_name=short_name(metric),
            metric_value=value,
        )
        for metric, value in results["metrics"].items()
    ]
    data = ModelCardData(base_model=TEXT_ENCODER, model_name=name, eval_results=measured)
    return with_metadata(_card(name), data.to_dict())


RENDERERS = {"pvlf-emoji-tiny": _pvlf, "blip-emoji-tiny": _backbone}


def _card(name: str) -> str:
    return (CARDS / name / "README.md").read_text(encoding="utf-8")


def _results(name: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((CARDS / name / "results.json").read_text(encoding="utf-8"))
    return results


def write_shipped_cards() -> None:
    """Write both cards."""
    for file, text in shipped_cards().items():
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_shipped_cards()
