"""Compares PVLF-Deep and TransAgg on EmojiCIR over several seeds, beside the untrained baselines.

    python train_scripts/compare_emoji.py --seeds 0 1 2

Writes all numbers to `model_cards/pvlf-emoji-tiny/results.json`, renders them into the tables of that card and of
README.md, and makes the first seed's PVLF-Deep, or the run that `--publish` names, the card's checkpoint. Interrupted,
the same command goes on with the runs that are missing; runs of another recipe are refused. `--render_only` renders
the committed numbers and renews the checkpoint's copy of the code.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from demo import draw_sheet
from train_pvlf import baselines, evaluate_all, parse_arguments, run_settings
from transformers import AutoModel, AutoProcessor

from pvlf_hf import load_emoji_cir
from pvlf_hf.emoji_cir import TIERS

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "train_scripts" / "configs" / "emoji.yaml"
CARD = ROOT / "model_cards" / "pvlf-emoji-tiny"
METHODS = {"PVLF-Deep": [], "TransAgg": ["--method=transagg"]}
BASELINES = {"Image-only": "image", "Text-only": "text", "Image+Text (sum)": "image+text"}
START, END = "<!-- emoji-cir results: written by train_scripts/compare_emoji.py -->", "<!-- end of results -->"


def main() -> None:
    """Trains what is missing, collects, renders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="at least three for a deviation")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare"), help="where the runs are kept")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; they share the cores")
    parser.add_argument("--max_steps", type=int, help="training steps, by default the recipe's")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast: twice as fast where the CPU has it")
    parser.add_argument("--publish", type=Path, help="run to make the checkpoint of, by default the first PVLF-Deep")
    parser.add_argument("--render_only", action="store_true", help="render the committed results.json anew")
    args = parser.parse_args()
    args.output_dir = args.output_dir.resolve()
    if not args.render_only:
        flags = [f"--max_steps={args.max_steps}"] * bool(args.max_steps) + ["--bf16=true"] * args.bf16
        runs = [(m, s, args.output_dir / f"{m}-seed{s}", args.jobs, flags) for m, s in product(METHODS, args.seeds)]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda run: train_one(*run), runs))
        results = {"runs": [collect(m, s, folder) for m, s, folder, *_ in runs], "baselines": baseline_entries()}
        results["checkpoint"] = publish(args.publish or args.output_dir / f"PVLF-Deep-seed{args.seeds[0]}")
        (CARD / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for source in sorted((ROOT / "src" / "pvlf_hf").glob("*_pvlf.py")):
        shutil.copyfile(source, CARD / source.name)  # the code that travels with the checkpoint
    table = render(json.loads((CARD / "results.json").read_text()))
    for file in (CARD / "README.md", ROOT / "README.md"):
        file.write_text(filled(file.read_text(encoding="utf-8"), table), encoding="utf-8")
    print(table)


def train_one(method: str, seed: int, folder: Path, jobs: int, flags: list[str]) -> None:
    """One run of train_pvlf.py in its own process, unless its results are there."""
    arguments = [str(RECIPE), f"--output_dir={folder}", f"--seed={seed}", *METHODS[method], *flags]
    if (folder / "results.json").exists():
        model_args, _, training_args = parse_arguments(arguments)
        wanted = {"model": vars(model_args), "training": run_settings(training_args)}
        recorded = json.loads((folder / "results.json").read_text())
        if {name: recorded[name] for name in wanted} != json.loads(json.dumps(wanted)):
            raise ValueError(f"{folder} holds a run of another recipe; delete it or choose another --output_dir")
        return
    folder.mkdir(parents=True, exist_ok=True)
    print(f"training {method}, seed {seed}; progress in {folder / 'log.txt'}", flush=True)
    command = [sys.executable, str(ROOT / "train_scripts" / "train_pvlf.py"), *arguments]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{method}, seed {seed} failed; the reason is at the end of {folder / 'log.txt'}")


def collect(method: str, seed: int, folder: Path) -> dict[str, Any]:
    """What a run reported, under its method's name."""
    return {"method": method, "seed": seed, **json.loads((folder / "results.json").read_text())}


def baseline_entries() -> list[dict[str, Any]]:
    """The untrained ways to compose, by the dual encoder alone; they have no seed."""
    evaluations = baselines(str(ROOT / "model_cards" / "blip-emoji-tiny"), [load_emoji_cir("test", t) for t in TIERS])
    labels = {method: label for label, method in BASELINES.items()}
    return [{"method": labels[e.method], "benchmark": e.benchmark, "metrics": e.metrics} for e in evaluations]


def publish(folder: Path) -> dict[str, Any]:
    """Makes the model card's checkpoint of a finished run: weights in float16, which load as float32, and a sheet.

    Returns:
        what the stored weights reach on plain captions; rounding moves a few queries against the run itself.
    """
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    model.half().save_pretrained(CARD)
    model.config.dtype = "float32"
    model.config.save_pretrained(CARD)
    processor.save_pretrained(CARD)
    stored, benchmark = AutoModel.from_pretrained(CARD), load_emoji_cir("test", "plain")
    draw_sheet(stored, processor, benchmark).save(CARD / "retrievals.png", optimize=True)
    (evaluation,) = evaluate_all(stored, processor, [benchmark])
    training = json.loads((folder / "results.json").read_text())["training"]
    return {"training": training, "benchmark": evaluation.benchmark, "metrics": evaluation.metrics}


def render(results: dict[str, Any]) -> str:
    """A Markdown table for each tier, and a sentence on PVLF against TransAgg."""
    scores: dict[tuple[str, str], list[dict[str, float]]] = {}
    for entry in results["baselines"]:
        scores.setdefault((entry["method"], entry["benchmark"]), []).append(entry["metrics"])
    for run in results["runs"]:
        for evaluation in run["evaluations"]:
            scores.setdefault((run["method"], evaluation["benchmark"]), []).append(evaluation["metrics"])
    columns = [
        "recall@1",
        "recall@5",
        "recall@10",
        "recall@50",
        "recall_subset@1",
        "recall_subset@2",
        "recall_subset@3",
    ]
    heads = [c.replace("recall_subset", "Rs").replace("recall", "R") for c in columns]
    lines = ["| captions | method | " + " | ".join(heads) + " |", "|" + " --- |" * (len(heads) + 2)]
    for tier, method in product(TIERS, [*BASELINES, *METHODS]):
        runs = scores[method, f"emoji-cir/test/{tier}"]
        lines.append(f"| {tier} | {method} | " + " | ".join(percent([r[c] for r in runs]) for c in columns) + " |")
    seeds = sorted({run["seed"] for run in results["runs"]})
    counts = results["runs"][0]["evaluations"][0]["counts"]
    (steps,) = {run["training"]["max_steps"] for run in results["runs"]}
    return (
        f"Percent; trained methods: mean ± standard deviation over seeds {', '.join(map(str, seeds))}, {steps} steps "
        f"each; {counts['queries']} queries against {counts['gallery']} pictures.\n\n"
        + "\n".join(lines)
        + "\n\n"
        + who_is_ahead(scores)
        + "\n\n"
        + the_checkpoint(results["checkpoint"], steps)
    )


def who_is_ahead(scores: dict[tuple[str, str], list[dict[str, float]]]) -> str:
    """Differences of PVLF-Deep to TransAgg in mean R@1, each beside the larger deviation over seeds."""
    parts = []
    for tier in TIERS:
        deep, its = ([r["recall@1"] for r in scores[m, f"emoji-cir/test/{tier}"]] for m in METHODS)
        spread = max(stdev(deep), stdev(its)) if min(len(deep), len(its)) > 1 else 0.0
        parts.append(f"{100 * (mean(deep) - mean(its)):+.1f} points on {tier} captions (± {100 * spread:.1f})")
    return f"PVLF-Deep minus TransAgg, mean R@1: {', '.join(parts)}."


def the_checkpoint(checkpoint: dict[str, Any], steps: int) -> str:
    """What the committed weights reach, and that they stand outside the table if they were trained longer or less."""
    training, metrics = checkpoint["training"], checkpoint["metrics"]
    recalls = ", ".join(f"R@{k} {percent([metrics[f'recall@{k}']])}" for k in (1, 5, 10, 50))
    outside = (
        "" if training["max_steps"] == steps else f", unlike the {steps} of the table: compare methods there only"
    )
    return (
        f"The committed checkpoint is one PVLF-Deep run (seed {training['seed']}) of {training['max_steps']} steps"
        f"{outside}. On plain captions it reaches {recalls}."
    )


def percent(values: list[float]) -> str:
    """Mean of fractions in percent, with the sample standard deviation where there are several."""
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


def filled(text: str, table: str) -> str:
    """The text with the table between the markers."""
    before, rest = text.split(START)
    return f"{before}{START}\n{table}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    main()
