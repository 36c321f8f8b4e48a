"""Writes the model cards of recipes that have not been trained yet: their settings, and no figure.

    python train_scripts/recipe_cards.py

Once a recipe is trained, `pvlf-hf card` writes the same card with its results.
"""

from pathlib import Path

from pvlf_hf import render_card
from pvlf_hf.commands.train import parse_arguments

SCRIPTS = Path(__file__).resolve().parent
CARDS = SCRIPTS.parent / "model_cards" / "recipes"
RECIPES = ("pvlf-blip-both-combined", "pvlf-clip-both-combined", "transagg-blip-text-combined")
"""The paper's headline row, the same on CLIP, and its baseline (Tables 2 and 3)."""


def recipe_card(name: str) -> str:
    """Render the card of a recipe in `configs/paper`."""
    recipe = str(SCRIPTS / "configs" / "paper" / f"{name}.yaml")
    model_args, data_args, args = parse_arguments([recipe, "--output_dir", name])
    facts = {"model": vars(model_args), "data": vars(data_args), "training": args.settings()}
    return render_card(facts, f"you/{name}")


if __name__ == "__main__":
    CARDS.mkdir(exist_ok=True)
    for recipe in RECIPES:
        (CARDS / f"{recipe}.md").write_text(recipe_card(recipe), encoding="utf-8")
