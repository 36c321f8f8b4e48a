"""From a captioned folder to a searchable gallery: triplets, report, text-anchored tuning, PVLF, evaluation, index.

    python train_scripts/your_catalogue.py captions.csv photos/ --model openai/clip-vit-base-patch32
    python train_scripts/your_catalogue.py emoji --model model_cards/blip-emoji-tiny     # without data, on two cores

The table has the columns `image` and `caption`. A fifth of its images is held out: triplets of their own are made of
them, on which the plain encoder, the tuned one and PVLF are compared. Everything goes to `--output_dir`; the same
command resumes after an interruption. `notebooks/7_your_catalogue.ipynb` does this step by step.
"""

import argparse
import csv
import shlex
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from pvlf_hf import (
    Gallery,
    Making,
    benchmark_from_triplets,
    evaluate,
    load_emoji_pictures,
    load_model,
    load_triplets,
    make_triplets,
)
from pvlf_hf.atomic_files import whole
from pvlf_hf.commands.train import parse_arguments, train
from pvlf_hf.data.tables import read_table
from pvlf_hf.digests import id_number

HELD_OUT = 5
"""One of so many images is held out (our choice)."""

ARTIST = "Twtr"
"""Artist of EmojiCIR whose drawings stand in for a catalogue."""


def emoji_catalogue(folder: Path) -> tuple[Path, Path]:
    """Write drawings of one artist and their names as a catalogue; return the table and the folder of the images."""
    images = folder / "images"
    table = folder / "captions.csv"
    if not table.exists():
        images.mkdir(parents=True, exist_ok=True)
        emoji = load_emoji_pictures([ARTIST])
        names = [f"{name.replace('/', ' ')}.png" for name in emoji["name"]]
        for name, image in zip(names, emoji["image"], strict=True):
            image.save(images / name)
        with whole(table) as partial, partial.open("w", newline="") as stream:
            csv.writer(stream).writerows([("image", "caption"), *zip(names, emoji["name"], strict=True)])
    return table, images


def split(table: Path, folder: Path) -> tuple[Path, Path]:
    """Write the rows of a table as `train.csv` and `held_out.csv`; return both paths."""
    cells = read_table(table, ("image", "caption"))
    rows = list(zip(cells["image"], cells["caption"], strict=True))
    files = []
    for name, is_held_out in (("train", False), ("held_out", True)):
        chosen = [row for row in rows if (id_number(row[0]) % HELD_OUT == 0) == is_held_out]
        with whole(folder / f"{name}.csv") as partial, partial.open("w", newline="") as stream:
            csv.writer(stream).writerows([("image", "caption"), *chosen])
        files.append(folder / f"{name}.csv")
    return files[0], files[1]


def triplets_of(table: Path, images: Path, count: int | None, language: str) -> Path:
    """Make the triplets of a table, unless they are there, and print where their report is."""
    output = table.with_suffix(".triplets.jsonl")
    if not output.exists():
        report = make_triplets(table, images, output, Making(count=count, language=language))
        print(f"{report.measures['rows']} triplets: {output}.report.html")
    return output


def fine_tune(words: str, folder: Path) -> str:
    """Run `pvlf-hf train` unless its results are there; return the folder."""
    if not (folder / "results.json").exists():
        train(*parse_arguments([*shlex.split(words), f"--output_dir={folder}"]), benchmarks=[])
    return str(folder)


def compare(models: dict[str, str], triplets: Path, images: Path, file: Path) -> str:
    """Measure models on held-out triplets; write and return a table."""
    benchmark = benchmark_from_triplets("held-out", load_triplets(triplets, images, check_images=False))
    lines = ["| model | R@1 | R@10 |", "| --- | --- | --- |"]
    for name, folder in models.items():
        model, processor = load_model(folder)
        metrics = evaluate(model.to(PartialState().device), processor, benchmark).metrics
        lines.append(f"| {name} | {100 * metrics['recall@1']:.1f} | {100 * metrics['recall@10']:.1f} |")
    table = "\n".join([*lines, "", f"{len(benchmark.queries)} queries, {len(benchmark.gallery)} images", ""])
    with whole(file) as partial:
        partial.write_text(table)
    return table


def main(command_line: Sequence[str] | None = None) -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="table with the columns image and caption, or emoji")
    parser.add_argument("images", nargs="?", type=Path, help="folder of the images")
    parser.add_argument("--model", required=True, help="dual encoder: folder or Hub name")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/catalogue"))
    parser.add_argument("--language", default="en", help="language of the captions")
    parser.add_argument("--count", type=int, default=4000, help="training triplets")
    parser.add_argument("--tat_steps", type=int, default=100, help="steps of text-anchored tuning")
    parser.add_argument("--steps", type=int, default=200, help="steps of PVLF")
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args(command_line)
    out: Path = args.output_dir
    if args.table == "emoji":
        table, images = emoji_catalogue(out)
    elif args.images is None:
        parser.error("pass the folder of the images after the table")
    else:
        table, images = Path(args.table), args.images
    own, held_out = split(table, out)
    triplets = triplets_of(own, images, args.count, args.language)
    test = triplets_of(held_out, images, None, args.language)
    shared = f"--image_folder={images} --per_device_train_batch_size={args.batch_size} --save_steps=50"
    tat = fine_tune(
        f"--method=tat --model={args.model} --train_file={own} --max_steps={args.tat_steps} --weight_decay=0 {shared}",
        out / "tat",
    )
    pvlf = fine_tune(
        f"--model={tat} --train_file={triplets} --finetuning=text --feature_cache={out / 'features'} "
        f"--max_steps={args.steps} --learning_rate=0.002 --encoder_learning_rate=0.00005 --distinct_by=key {shared}",
        out / "pvlf",
    )
    print(compare({"as it is": args.model, "tuned": tat, "PVLF": pvlf}, test, images, out / "results.md"))
    Gallery.from_folder(images, *load_model(pvlf), path=out / "gallery")
    print(f'pvlf-hf search {out / "gallery"} --model {pvlf} --image IMAGE --text "what should be different"')


if __name__ == "__main__":
    main()
