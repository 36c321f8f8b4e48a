"""Runs `pvlf-hf triplets` and `report`: training triplets of one's own captions, and what they are worth."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from accelerate import PartialState

from ..checkpoints.loading import load_model
from ..data.making.instruct import load_writer
from ..data.making.measures import read_rows
from ..data.making.pipeline import Making, make_triplets
from ..data.making.triplet_report import TripletReport, opener, report_on
from ..data.making.vocabulary import load_vocabulary
from ..search.mining import TripletMiner
from .output import print_json


def make(
    table: Path,
    images: Path,
    output: Path,
    settings: dict[str, Any],
    rejected: Path | None,
    model: str | None,
    writer: str | None,
    paraphrase: bool,
    as_json: bool,
) -> None:
    """Make triplets, and print their report."""
    store = output.with_name(output.name + ".embeddings")
    miner = miner_of(model, images, store) if model else None
    author = None
    if writer is not None:
        answers = output.with_name(output.name + ".answers")
        options: dict[str, Any] = {"mode": "paraphrase" if paraphrase else "write", "seed": settings["seed"]}
        author = load_writer(writer, load_vocabulary(settings["language"]), answers=answers, **options)
    elif paraphrase:
        raise ValueError("--paraphrase is a way to use a chat model: name one by --writer")
    made = make_triplets(table, images, output, Making(**settings), miner, author, rejected)
    _show(made, as_json, output)


def miner_of(model: str, images: Path, store: Path | None = None) -> TripletMiner:
    """Load the dual encoder of a miner, on the accelerator if there is one."""
    encoder, processor = load_model(model)
    return TripletMiner(encoder.to(PartialState().device), processor, images, store)


def report(
    file: Path, images: Path | None, output: Path | None, language: str, model: str | None, as_json: bool
) -> None:
    """Report on triplets, print the report and write it."""
    if model is not None and images is None:
        raise ValueError("--model measures images: pass their folder by --images")
    modality = miner_of(model, images).modality(read_rows(file)) if model and images else {}
    found = report_on(file, load_vocabulary(language), modality=modality)
    found.write(output or file.with_name(file.name + ".report"), opener(images))
    _show(found, as_json, file)


def _show(found: TripletReport, as_json: bool, file: Path) -> None:
    if as_json:
        print_json(file=str(file), **{name: part for name, part in asdict(found).items() if name != "sheet"})
    else:
        typer.echo(str(found))


__all__ = ["make", "miner_of", "report"]
