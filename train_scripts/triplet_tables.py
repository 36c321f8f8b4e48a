"""Measures how triplets are made: against known pairs, by training on them, and by speed.

    python train_scripts/triplet_tables.py pairs                 # precision and recall on EmojiCIR's names: minutes
    python train_scripts/triplet_tables.py train --dry_run       # the runs, and what is missing
    python train_scripts/triplet_tables.py train --bf16          # all of them, one after another; resumes
    python train_scripts/triplet_tables.py tat                   # text-anchored tuning, before and after; resumes
    python train_scripts/triplet_tables.py speed                 # captions a second and memory of level 0
    python train_scripts/triplet_tables.py speed --near          # with pairs of near captions

`pairs` gives the names of Google's emoji to the pipeline as captions. Which names differ in one attribute, or in two,
is known, so that the pairs that it finds can be scored. The names are as regular as no captions are; so they are also
given in 64 wordings, such as "a drawing of red apple as a sticker". `train` makes N triplets of the training artists'
drawings by each pipeline, leaves out the pairs of EmojiCIR's validation and test splits, trains PVLF by one small
recipe and tests it on EmojiCIR's three tiers, beside the hand-written triplets. Numbers go to
`model_cards/triplets/results.json`, tables into its README. `--render_only` renders the committed numbers.
"""

import argparse
import csv
import json
import resource
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset, Image

from pvlf_hf import (
    Making,
    TripletMiner,
    load_emoji_cir,
    load_emoji_cir_train,
    load_emoji_pictures,
    load_model,
    make_triplets,
)
from pvlf_hf.atomic_files import whole
from pvlf_hf.commands.train import parse_arguments, train
from pvlf_hf.data.emoji_cir import dataset as emoji_cir
from pvlf_hf.data.emoji_cir.dataset import TIERS, TRAINING_VENDORS, emoji_pairs
from pvlf_hf.data.making import load_vocabulary
from pvlf_hf.data.making import pairs as pairs_module
from pvlf_hf.data.making.edits import find_edit, find_swap, pick
from pvlf_hf.data.making.near_pairs import SOURCE, near_pairs
from pvlf_hf.data.making.pairs import CaptionIndex, Pair, find_pairs, index_captions
from pvlf_hf.data.making.pipeline import read_jsonl
from pvlf_hf.data.making.screening import Limits
from pvlf_hf.digests import id_number
from pvlf_hf.evaluation.scoring import evaluate_all
from pvlf_hf.evaluation.significance import seed_interval
from pvlf_hf.training.trainer import PVLFTrainer

ROOT = Path(__file__).resolve().parents[1]
BACKBONE = ROOT / "model_cards" / "blip-emoji-tiny"
CARD = ROOT / "model_cards" / "triplets"
RESULTS = CARD / "results.json"

NUMBERS, SEEDS = (1000, 4000, 16000), (0, 1, 2)

RECIPE, BATCH = "train_scripts/configs/emoji.yaml", 64
"""The recipe of every run, and its batch: 500 steps of 64 triplets, whatever their number."""

ARMS = {"hand-written": None, "level 0": False, "level 0 and 1": True}
"""Sources of triplets, and whether a dual encoder mines and verifies; None for EmojiCIR's own."""

HARDER = {"level 0, hard negatives": "--hard_negatives=1 --mine_every=1"}
"""Further arm: triplets of level 0, trained with the negatives that they name, and mined ones."""


def write_table(file: Path, vendors: Sequence[str], word: Callable[[str], str] = str) -> Path:
    """Write images, captions made of names, names and artists; return the folder that image names are relative to."""
    images = load_emoji_pictures(vendors).cast_column("image", Image(decode=False))
    paths = [Path(cell["path"]) for cell in images["image"]]
    root = paths[0].parents[1]
    names, files = images["name"][:], (path.relative_to(root) for path in paths)
    rows = zip(files, map(word, names), names, images["vendor"], strict=True)
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([("image", "caption", "name", "vendor"), *rows])
    return root


# ---- pairs ----


BEFORE = (
    "",
    "a drawing of",
    "an icon of",
    "a cartoon of",
    "a flat picture of",
    "here is",
    "an emoji of",
    "a symbol for",
)
AFTER = (
    "",
    "on a plain background",
    "in a simple style",
    "with soft shading",
    "for a chat message",
    "as a sticker",
    "seen up close",
    "without a border",
)
"""Words around a name in place of which an untidy caption has others; independent of what the name says."""

WORDED = "64 wordings: "
"""Before what found pairs of worded names."""


def worded(name: str) -> str:
    """Return a name in one of 64 wordings, drawn by its hash."""
    return f"{pick(BEFORE, f'before {name}')} {name} {pick(AFTER, f'after {name}')}".strip()


def measure_pairs() -> dict[str, Any]:
    """Return precision and recall of the pairs that levels 0 and 1 find among Google's names, by attribute."""
    names = sorted(set(load_emoji_pictures(["Goog"])["name"]))
    true: dict[frozenset[str], str] = {}
    for pair in emoji_cir._all_pairs(names):
        true.setdefault(frozenset((pair.first, pair.second)), "+".join(pair.slots))
    published = {frozenset((p.first, p.second)): "+".join(p.slots) for split in emoji_pairs().values() for p in split}
    english = load_vocabulary("en")
    found: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as folder:
        for head, word in (("", str), (WORDED, worded)):
            table, work = Path(folder) / f"{word.__name__}.csv", Path(folder) / word.__name__
            root = write_table(table, ["Goog"], word)
            index = index_captions(table, work, english, kept_columns=("name",), progress=False)
            cap, pairs_module.PAIRS_OF_KEY = pairs_module.PAIRS_OF_KEY, 10**9
            of = {"level 0, no cap on pairs of a key": edited_pairs(index, find_pairs(index), english)}
            pairs_module.PAIRS_OF_KEY = cap
            of["level 0"] = edited_pairs(index, find_pairs(index), english)
            near = edited_pairs(index, near_pairs(index, 0, english), english)
            of["near captions that no pair of level 0 has"] = {
                pair: kind for pair, kind in near.items() if pair not in of["level 0"]
            }
            of["level 0 with near captions"] = near | of["level 0"]
            if not head:
                miner = TripletMiner(*load_model(str(BACKBONE)), root)
                of["level 1, mined alone"] = edited_pairs(index, miner.pairs(index, english, 0), english)
            found |= {head + name: score_pairs(pairs, true, published) for name, pairs in of.items()}
            index.close()
    return {"names": len(names), "pairs": len(true), "published": len(published), "found": found}


def edited_pairs(index: CaptionIndex, pairs: Iterator[Pair], vocabulary: Any) -> dict[frozenset[str], str]:
    """Return the pairs of names that an edit can be written for, with its kind."""
    kept = {}
    for pair in pairs:
        a, b = index[pair.reference], index[pair.target]
        find = find_swap if pair.source == SOURCE else find_edit
        edit = find(vocabulary.read(a["caption"]), vocabulary.read(b["caption"]), vocabulary)
        if edit is not None and a["name"] != b["name"]:
            kept[frozenset((a["name"], b["name"]))] = edit.kind
    return kept


def score_pairs(
    found: dict[frozenset[str], str], true: dict[frozenset[str], str], published: dict[frozenset[str], str]
) -> dict[str, Any]:
    """Score pairs: precision among all true ones, by kind of edit; recall of the published ones, by attribute."""
    hits = [pair for pair in found if pair in true]
    kinds, right = Counter(found.values()), Counter(found[pair] for pair in hits)
    of, got = Counter(published.values()), Counter(value for pair, value in published.items() if pair in found)
    return {
        "pairs": len(found),
        "precision": len(hits) / max(len(found), 1),
        "recall": sum(pair in found for pair in published) / len(published),
        "precision_by_kind": {kind: [right[kind], number] for kind, number in kinds.most_common()},
        "recall_by_attribute": {kind: [got[kind], number] for kind, number in of.most_common()},
    }


# ---- training ----


def triplets_of(arm: str, number: int, work: Path) -> Dataset:
    """Return N training triplets of an arm, none of which is a pair of the validation or test split."""
    if ARMS.get(arm, False) is None:
        rows = load_emoji_cir_train()
        order = sorted(range(len(rows)), key=lambda row: id_number(f"triplets {row}"))
        return rows.select(order[:number])
    mines = bool(ARMS.get(arm, False))
    output = work / f"level-{int(mines)}.jsonl"
    root = write_table(work / "captions.csv", TRAINING_VENDORS)
    if not output.exists():
        miner = TripletMiner(*load_model(str(BACKBONE)), root, work / "embeddings") if mines else None
        settings = Making(group="vendor", kept_columns=("vendor",), limits=Limits(caption_uses=12, target_uses=12))
        make_triplets(work / "captions.csv", root, output, settings, miner)
    held_out = {(p.first, p.second) for split in ("validation", "test") for p in emoji_pairs()[split]}
    rows = [
        row
        for row in read_jsonl(output)
        if tuple(sorted((row["reference_caption"], row["target_caption"]))) not in held_out
    ]
    # Kinds and keys come in order: every number of rows is a random part of the same set.
    rows.sort(key=lambda row: id_number(f"{row['reference']} {row['target']}"))
    columns = {
        "reference": [str(root / row["reference"]) for row in rows],
        "target": [str(root / row["target"]) for row in rows],
        "caption": [row["caption"] for row in rows],
        "target_id": [row["target_caption"] for row in rows],  # as EmojiCIR: one emoji by two artists is one target
        "reference_id": [row["reference_caption"] for row in rows],
        "vendor": [row["reference_vendor"] for row in rows],
        "negatives": [[str(root / name) for name in row["negatives"]] for row in rows],
        "negative_ids": [row["negatives"] for row in rows],
    }
    data = Dataset.from_dict(columns)
    for side in ("reference", "target"):
        data = data.cast_column(side, Image(mode="RGBA"))
    return data.select(range(min(number, len(data))))


def run(arm: str, number: int, seed: int, work: Path, steps: int, bf16: bool = False) -> dict[str, Any]:
    """Train on N triplets of an arm and test; return metrics by tier, the rows trained on, and seconds."""
    folder = work / f"{arm.replace(' ', '-').replace(',', '')}-{number}-{seed}"
    words = f"{ROOT / RECIPE} --output_dir={folder} --seed={seed} --max_steps={steps} {HARDER.get(arm, '')}"
    words += f" --feature_cache={work / 'features'} --per_device_train_batch_size={BATCH} --bf16={bf16}"
    words += " --save_strategy=no --report_to=none"
    model_args, _, args = parse_arguments(shlex.split(words))
    rows = triplets_of(arm, number, work)
    start = time.monotonic()
    model, processor = model_args.build()
    trainer = PVLFTrainer(model, args, rows, processing_class=processor)
    trainer.train()
    seconds = time.monotonic() - start
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    return {"rows": len(rows), "seconds": round(seconds, 1), "steps": steps, **recalls(trained, processor)}


def recalls(*model: Any) -> dict[str, dict[str, float]]:
    """Return R@1 and R@10 of a model and its processor on each of EmojiCIR's tiers."""
    evaluations = evaluate_all(*model, [load_emoji_cir("test", tier) for tier in TIERS])
    return {
        tier: {k: one.metrics[k] for k in ("recall@1", "recall@10")}
        for tier, one in zip(TIERS, evaluations, strict=True)
    }


def run_tat(seed: int, work: Path) -> dict[str, Any]:
    """Tune the dual encoder to EmojiCIR's names; return R@1 and R@10 by composition and tier, before and after."""
    folder = work / f"tat-{seed}"
    recipe = ROOT / "train_scripts" / "configs" / "methods" / "tat-emoji.yaml"
    start = time.monotonic()
    if not (folder / "results.json").exists():
        train(*parse_arguments([str(recipe), f"--output_dir={folder}", f"--seed={seed}", "--report_to=none"]), [])
    found: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1)}
    for composition in ("slerp", "sum"):
        for when, name in (("before", BACKBONE), ("after", folder)):
            found[f"{composition}, {when}"] = recalls(*load_model(str(name), composition))
    return found


def tat_table(runs: dict[str, Any]) -> str:
    """Return the table of text-anchored tuning: R@10 by tier, mean over seeds with its 95 % interval."""
    lines = [f"| composition | {' | '.join(TIERS)} |", "| --- | --- | --- | --- |"]
    for name in next(iter(runs.values())):
        if name == "seconds":
            continue
        cells = []
        for tier in TIERS:
            values = [100 * one[name][tier]["recall@10"] for one in runs.values()]
            varies = len({*values}) > 1
            low, high = seed_interval(values) if varies else (values[0], values[0])
            cells.append(f"{mean(values):.1f}" + (f" [{low:.1f}, {high:.1f}]" if varies else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "Text-anchored tuning, R@10 on EmojiCIR's tiers:\n\n" + "\n".join(lines)


# ---- speed ----

THINGS = "dog cat car house woman man table chair dress bird tree boat bike horse shirt lamp".split()
LOOKS = "red blue green small large wooden old new striped white black".split()
PLACES = "street beach field park room kitchen garden bridge".split()


def measure_speed(captions: int, near: bool = False) -> dict[str, Any]:
    """Make a tenth as many triplets of random captions, without images; return captions a CPU second, and MiB.

    Args:
        captions: number of captions.
        near: pair near captions, too.
    """

    def draw(words: Sequence[str], row: int, slot: int) -> str:
        return words[id_number(f"{row} {slot}") % len(words)]

    with TemporaryDirectory() as folder:
        table = Path(folder) / "t.csv"
        with table.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(("image", "caption"))
            for row in range(captions):
                a, b, c = (draw(LOOKS, row, 0), draw(THINGS, row, 1), draw(LOOKS, row, 2))
                d, e = draw(THINGS, row, 3), draw(PLACES, row, 4)
                number = id_number(f"{row} 5") % max(captions // 300, 1)
                writer.writerow((f"{row}.jpg", f"a {a} {b} next to a {c} {d}{number} in the {e}"))
        load_vocabulary("en").grammar.plural("dog")  # inflect is slow to import, and so is scikit-learn
        if near:
            import sklearn.feature_extraction.text  # noqa: F401
        start = time.process_time()
        settings = Making(count=captions // 10, check_images=False, near=near)
        report = make_triplets(table, folder, Path(folder) / "out.jsonl", settings, progress=False)
        seconds = time.process_time() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rate = round(captions / seconds)
    found = {
        "captions": captions,
        "captions_a_second": rate,
        "MiB": round(memory),
        "triplets": report.measures["rows"],
    }
    return found | ({"near": report.measures["sources"].get(SOURCE, 0)} if near else {})


# ---- results ----


def read_results() -> dict[str, Any]:
    """Return the numbers that are there."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(**found: Any) -> None:
    """Add numbers to the results, and render them."""
    results = read_results()
    for name, value in found.items():
        results[name] = {**results.get(name, {}), **value}
    with whole(RESULTS) as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n")
    render(results)


def render(results: dict[str, Any]) -> None:
    """Write the tables of the card between its markers."""
    parts = []
    if pairs := results.get("pairs"):
        lines = ["| pairs | found | precision | recall |", "| --- | --- | --- | --- |"]
        for name, one in pairs["found"].items():
            lines.append(f"| {name} | {one['pairs']:,} | {one['precision']:.3f} | {one['recall']:.3f} |")
        head = (
            f"{pairs['names']:,} names, {pairs['pairs']:,} true pairs, of which EmojiCIR uses {pairs['published']:,}."
        )
        parts.append("\n".join([head, "", *lines]))
        one = pairs["found"]["level 0"]
        kinds = [f"{kind} {a}/{b}" for kind, (a, b) in one["precision_by_kind"].items()]
        worst = sorted(one["recall_by_attribute"].items(), key=lambda item: item[1][0] / item[1][1])
        parts.append(f"Level 0, right pairs by kind of edit: {', '.join(kinds)}.")
        parts.append("Level 0, recall by attribute: " + ", ".join(f"{k} {a}/{b}" for k, (a, b) in worst) + ".")
        parts.append(gains_of_near_captions(pairs["found"]))
    if runs := results.get("train"):
        parts.append(training_table(runs))
    if tuned := results.get("tat"):
        parts.append(tat_table(tuned))
    if speed := results.get("speed"):
        parts += [
            f"Level 0{' with near captions' if 'near' in one else ''}: "
            f"{one['captions_a_second']:,} captions a second of one core's time, {one['MiB']} MiB, "
            f"{one['triplets']:,} triplets of {one['captions']:,} captions."
            for one in speed.values()
        ]
    card = CARD / "README.md"
    head, _, rest = card.read_text().partition(START)
    with whole(card) as partial:
        partial.write_text(head + START + "\n\n" + "\n\n".join(parts) + "\n\n" + END + rest.partition(END)[2])


def gains_of_near_captions(found: dict[str, Any]) -> str:
    """Return where near captions raise the recall of an attribute, for names as they are and worded."""
    lines = []
    for head in ("", WORDED):
        without, with_near = (
            found[f"{head}level 0{name}"]["recall_by_attribute"] for name in ("", " with near captions")
        )
        gains = {kind: (without[kind][0], *with_near[kind]) for kind in without if with_near[kind] != without[kind]}
        order = sorted(gains, key=lambda kind: gains[kind][0] - gains[kind][1])
        named = ", ".join("{} {} to {} of {}".format(kind, *gains[kind]) for kind in order)
        lines.append(f"Near captions raise the recall, {head or 'names as they are: '}{named}.")
    return "\n\n".join(lines)


START, END = "<!-- results: written by train_scripts/triplet_tables.py -->", "<!-- end of results -->"


def training_table(runs: dict[str, Any]) -> str:
    """Return the table of trained arms: R@10 by tier, mean over seeds with its 95 % interval."""
    lines = [f"| triplets | N | {' | '.join(TIERS)} | seconds a run |", "| --- | --- | --- | --- | --- | --- |"]
    for arm in (*ARMS, *HARDER):
        for number in NUMBERS:
            found = [runs[key] for seed in SEEDS if (key := f"{arm}/{number}/{seed}") in runs]
            if not found:
                continue
            cells = []
            for tier in TIERS:
                values = [100 * one[tier]["recall@10"] for one in found]
                low, high = seed_interval(values) if len(values) > 1 else (float("nan"),) * 2
                cells.append(f"{mean(values):.1f} [{low:.1f}, {high:.1f}]")
            seconds = mean(one["seconds"] for one in found)
            lines.append(f"| {arm} | {found[0]['rows']:,} | {' | '.join(cells)} | {seconds:.0f} |")
    return "R@10 on EmojiCIR's tiers, mean and 95 % interval over seeds:\n\n" + "\n".join(lines)


def main(command_line: Sequence[str] | None = None) -> None:
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pairs", "train", "tat", "speed"])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/triplets"))
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *HARDER], default=[*ARMS, *HARDER])
    parser.add_argument("--numbers", nargs="+", type=int, default=NUMBERS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--bf16", action="store_true", help="train: in bfloat16 autocast")
    parser.add_argument("--captions", type=int, default=200_000)
    parser.add_argument("--near", action="store_true", help="speed: pair near captions, too")
    parser.add_argument("--dry_run", action="store_true", help="list the runs")
    parser.add_argument("--render_only", action="store_true", help="render the committed numbers")
    args = parser.parse_args(command_line)
    if args.render_only:
        render(read_results())
    elif args.what == "pairs":
        keep(pairs=measure_pairs())
    elif args.what == "tat":
        for seed in args.seeds:
            if args.dry_run or str(seed) in read_results().get("tat", {}):
                continue
            keep(tat={str(seed): run_tat(seed, args.output_dir)})
    elif args.what == "speed":
        keep(speed={f"{args.captions}{' near' * args.near}": measure_speed(args.captions, args.near)})
    else:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        keys = [(a, n, s) for n in args.numbers for a in args.arms for s in args.seeds]
        done = read_results().get("train", {})
        for arm, number, seed in keys:
            key = f"{arm}/{number}/{seed}"
            if args.dry_run or key in done:
                print(key, f"{done[key]['seconds']:.0f} s" if key in done else "to be run")
                continue
            keep(train={key: run(arm, number, seed, args.output_dir, args.steps, args.bf16)})


if __name__ == "__main__":
    main()
