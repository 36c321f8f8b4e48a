"""The paper's tables at small scale, on EmojiCIR: methods, fine-tuning modes, prompt length, depth and loss.

    python train_scripts/emoji_tables.py                               # all tables, five seeds
    python train_scripts/emoji_tables.py --tables methods --seeds 0 1 2

Every run is `train_pvlf.py` with the recipe `configs/emoji.yaml`, as short as in `make demo` (`demo.SHORT`), and the
flags of `CONFIGURATIONS`. All numbers are written to `model_cards/emoji-cir/results.json` and rendered as tables and a
plot into that card, and as a summary into README.md. `--publish FOLDER` makes the model in a folder the checkpoint in
`model_cards/pvlf-emoji-tiny`.
After an interruption the same command does the runs that `results.json` lacks. A run of another recipe, or on another
backbone, raises an error.
`--render_only` renders the committed numbers, with what the Hub indexes (`shipped_cards.py`), and updates the
checkpoint's copy of the code.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from hashlib import sha256
from itertools import combinations, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from demo import SHORT, draw_sheet
from shipped_cards import write_shipped_cards
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

from pvlf_hf import CIRBenchmark, Evaluation, evaluate, load_emoji_cir, load_emoji_cir_train, write_golden
from pvlf_hf.atomic_files import whole
from pvlf_hf.commands.evaluate import baselines
from pvlf_hf.commands.train import parse_arguments
from pvlf_hf.data.emoji_cir.dataset import TIERS
from pvlf_hf.embeddings.encoding import encode_gallery
from pvlf_hf.evaluation.results import read_results, write_results
from pvlf_hf.evaluation.significance import crossed_interval, detectable_difference

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "train_scripts" / "configs" / "emoji.yaml"
CARD = ROOT / "model_cards" / "emoji-cir"
RESULTS = CARD / "results.json"
BACKBONE = ROOT / "model_cards" / "blip-emoji-tiny"
CHECKPOINT = ROOT / "model_cards" / "pvlf-emoji-tiny"
BASELINES = {"Image-only": "image", "Text-only": "text", "Image+Text (sum)": "image+text"}
BOTH = ["--finetuning=both", "--feature_cache="]  # features of an encoder that trains cannot be cached
CONFIGURATIONS = {
    "PVLF-Deep": [],  # the recipe: text encoder trained, 25 prompts in each of two layers, gamma 2
    "PVLF-Shallow": ["--prompt_depth=1"],
    "TransAgg": ["--method=transagg"],
    "PVLF-Deep, frozen": ["--finetuning=frozen"],
    "TransAgg, frozen": ["--method=transagg", "--finetuning=frozen"],
    **{f"{length} prompts": [f"--num_prompts={length}"] for length in (5, 10, 15, 20, 30, 35)},
    **{f"J = {depth}": [f"--fusion_layers={depth}", f"--prompt_depth={depth}"] for depth in (1, 3)},
    "cross-entropy": ["--gamma=0"],
    "PVLF-Deep, both": BOTH,
    "TransAgg, both": ["--method=transagg", *BOTH],
}
TABLES = {  # title, rows (label -> configuration), and the row that differences refer to
    "methods": ("Methods (as Tables 1-2)", {m: m for m in ("TransAgg", "PVLF-Shallow", "PVLF-Deep")}, "TransAgg"),
    "finetuning": (
        "Which encoders train (as Table 3)",
        {
            "TransAgg, none": "TransAgg, frozen",
            "PVLF-Deep, none": "PVLF-Deep, frozen",
            "TransAgg, text": "TransAgg",
            "PVLF-Deep, text": "PVLF-Deep",
            "TransAgg, both": "TransAgg, both",
            "PVLF-Deep, both": "PVLF-Deep, both",
        },
        "PVLF-Deep, text",
    ),
    "prompts": (
        "Prompt length (as Table 4)",
        {str(n): "PVLF-Deep" if n == 25 else f"{n} prompts" for n in range(5, 36, 5)},
        "25",
    ),
    "depth": (
        "Depth J of prompts and fusion (as Table 5)",
        {"TransAgg": "TransAgg", "J = 1": "J = 1", "J = 2": "PVLF-Deep", "J = 3": "J = 3"},
        "J = 2",
    ),
    "loss": (
        "Loss (eq. 15)",
        {"cross-entropy, γ = 0": "cross-entropy", "focal, γ = 2": "PVLF-Deep"},
        "cross-entropy, γ = 0",
    ),
}
COLUMNS = {f"recall@{k}": f"R@{k}" for k in (1, 5, 10, 50)} | {f"recall_subset@{k}": f"Rs@{k}" for k in (1, 2, 3)}
START, END = "<!-- emoji-cir results: written by train_scripts/emoji_tables.py -->", "<!-- end of results -->"

Scores = dict[tuple[str, str], dict[int | None, dict[str, float]]]
"""(configuration or baseline, tier) -> seed -> metrics as fractions."""

Hits = dict[tuple[str, str], dict[int, list[int]]]
"""(configuration, tier) -> seed -> for each query 1 if its target is among the first ten, else 0."""


def main() -> None:
    """Train the missing runs, collect their metrics, render the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="tables to measure")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="at least three for an interval")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/emoji-tables"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, which share the cores")
    parser.add_argument("--max_steps", type=int, help="training steps, by default 200, as in the demo")
    parser.add_argument("--publish", type=Path, metavar="FOLDER", help="make this model the committed checkpoint")
    parser.add_argument("--render_only", action="store_true", help="render the committed results.json again")
    args = parser.parse_args()
    if args.publish:
        publish(args.publish)
    elif not args.render_only:
        flags = [f"--max_steps={args.max_steps}"] * bool(args.max_steps)
        measure(args.tables, args.seeds, args.output_dir.resolve(), args.jobs, flags)
    for source in sorted((ROOT / "src" / "pvlf_hf" / "models").glob("*_pvlf.py")):
        shutil.copyfile(source, CHECKPOINT / source.name)  # the code that is saved with the checkpoint
    results = json.loads(RESULTS.read_text())
    plot(results, CARD / "tables.png")
    for file, text in renderings(results).items():
        file.write_text(filled(file.read_text(encoding="utf-8"), text), encoding="utf-8")
        print(text)
    write_shipped_cards()


def measure(tables: list[str], seeds: list[int], folder: Path, jobs: int, flags: list[str]) -> None:
    """Train the runs of some tables that the results lack, configuration by configuration; add each as it ends."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}
    backbone = sha256((BACKBONE / "model.safetensors").read_bytes()).hexdigest()
    if results.setdefault("backbone", backbone) != backbone:
        raise ValueError(f"{RESULTS} holds runs on another backbone; delete it to measure all of them again")
    if "baselines" not in results:
        results["baselines"] = baseline_entries()
    wanted = {name for table in tables for name in TABLES[table][1].values()}
    names = sorted((name for name in CONFIGURATIONS if name in wanted), key=lambda name: "both" in name)  # slow last
    runs = {(name, seed): arguments_of(name, seed, folder, flags) for name, seed in product(names, seeds)}
    for run in results["runs"]:
        arguments = runs.pop((run["configuration"], run["seed"]), None)
        if arguments is not None and not is_run_of(run, arguments):
            where = f"{run['configuration']}, seed {run['seed']}"
            raise ValueError(f"{RESULTS} holds a run of another recipe ({where}); delete it there to measure it again")
    pool = ThreadPoolExecutor(jobs)
    try:
        done = [pool.submit(train_one, *key, arguments, jobs) for key, arguments in runs.items()]
        for future in tqdm(as_completed(done), "runs", len(done)):
            results["runs"].append(future.result())
            with whole(RESULTS) as partial:
                partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    finally:
        pool.shutdown(cancel_futures=True)


def arguments_of(name: str, seed: int, folder: Path, flags: list[str]) -> list[str]:
    """Return the arguments of `train_pvlf.py` for a run; the second is its folder."""
    output = folder / f"{name}-seed{seed}".replace(" ", "")
    return [str(RECIPE), f"--output_dir={output}", f"--seed={seed}", *SHORT, *CONFIGURATIONS[name], *flags]


def is_run_of(run: dict[str, Any], arguments: list[str]) -> bool:
    """Return whether a recorded run has the settings of these arguments; one that it does not name has its default."""
    model_args, _, training_args = parse_arguments(arguments)
    wanted = json.loads(json.dumps({"model": vars(model_args), "training": training_args.settings()}))
    return all(run[part].get(name) == value for part in wanted for name, value in wanted[part].items())


def train_one(name: str, seed: int, arguments: list[str], jobs: int) -> dict[str, Any]:
    """Run train_pvlf.py in its own process, unless the folder holds its results; return these."""
    folder = Path(arguments[1].removeprefix("--output_dir="))
    if not (folder / "results.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        tqdm.write(f"training {name}, seed {seed}; progress in {folder / 'log.txt'}")
        command = [sys.executable, str(ROOT / "train_scripts" / "train_pvlf.py"), *arguments]
        threads = max(1, (os.cpu_count() or 1) // jobs)
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with (folder / "log.txt").open("w") as log:
            done = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}, seed {seed} failed; the reason is at the end of {folder / 'log.txt'}")
    run = collect(name, seed, folder)
    if not is_run_of(run, arguments):
        raise ValueError(f"{folder} holds a run of another recipe; delete it or choose another --output_dir")
    return run


def collect(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Collect the metrics, hits and settings of a run."""
    results = json.loads((folder / "results.json").read_text())
    evaluations = read_results(folder / "results.json")
    facts = {key: results[key] for key in ("model", "training", "environment")}
    return {
        "configuration": name,
        "seed": seed,
        "metrics": {tier_of(e.benchmark): e.metrics for e in evaluations},
        "hits": {
            tier_of(e.benchmark): "".join(str(int(rank < 10)) for rank in e.per_query["rank"]) for e in evaluations
        },
        "counts": evaluations[0].counts,
        **facts,
    }


def baseline_entries() -> list[dict[str, Any]]:
    """Evaluate the untrained baselines, which use the dual encoder alone and have no seed."""
    evaluations = baselines(str(BACKBONE), [load_emoji_cir("test", t) for t in TIERS])
    return [
        {"method": name, "metrics": {tier_of(e.benchmark): e.metrics for e in evaluations if e.method == method}}
        for name, method in BASELINES.items()
    ]


def tier_of(benchmark: str) -> str:
    """Return the tier in the name of a benchmark: `emoji-cir/test/plain` -> `plain`."""
    return benchmark.rsplit("/", 1)[-1]


def publish(folder: Path) -> None:
    """Publish a finished run as the committed checkpoint: weights in float16, loaded as float32, sheet and results.

    Results are measured on the stored weights; rounding moves the ranks of a few queries from those of the run.
    """
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    model.half().save_pretrained(CHECKPOINT)
    model.config.dtype = "float32"
    model.config.save_pretrained(CHECKPOINT)
    processor.save_pretrained(CHECKPOINT)
    write_golden(CHECKPOINT)
    stored, benchmarks = AutoModel.from_pretrained(CHECKPOINT), [load_emoji_cir("test", tier) for tier in TIERS]
    gallery = encode_gallery(stored, processor, benchmarks[0].gallery)  # which all tiers share
    sheet = draw_sheet(stored, processor, benchmarks[0], gallery)
    sheet.save(CHECKPOINT / "retrievals.png", optimize=True)
    evaluations = [evaluate(stored, processor, benchmark, gallery_embeds=gallery) for benchmark in benchmarks]
    results = {
        "training": json.loads((folder / "results.json").read_text())["training"],
        "metrics": {tier_of(e.benchmark): e.metrics for e in evaluations},
        "by_overlap": recall_by_overlap(evaluations, benchmarks),
    }
    write_results(CHECKPOINT / "results.json", evaluations, **results)


def recall_by_overlap(evaluations: list[Evaluation], benchmarks: list[CIRBenchmark]) -> dict[str, dict[str, float]]:
    """Group the queries of all tiers by the most words in a row that their caption shares with a training caption.

    Returns:
        Number of words -> `queries` and their `recall@10`, a fraction.
    """
    known = {run for caption in set(load_emoji_cir_train()["caption"]) for run in runs_of_words(caption)}
    found: dict[int, list[bool]] = defaultdict(list)
    for evaluation, benchmark in zip(evaluations, benchmarks, strict=True):
        for caption, rank in zip(benchmark.queries["caption"], evaluation.per_query["rank"], strict=True):
            found[max((len(run) for run in runs_of_words(caption) & known), default=0)].append(rank < 10)
    return {str(words): {"queries": len(hits), "recall@10": mean(hits)} for words, hits in sorted(found.items())}


def runs_of_words(caption: str) -> set[tuple[str, ...]]:
    """Return all words of a caption that follow each other, in every number."""
    words = re.findall(r"[\w'-]+", caption.lower())
    return {tuple(words[i:j]) for i, j in combinations(range(len(words) + 1), 2)}


def scores_of(results: dict[str, Any]) -> Scores:
    """Index all metrics by configuration or baseline, tier and seed."""
    scores: Scores = {}
    for entry in [*results["baselines"], *results["runs"]]:
        for tier, metrics in entry["metrics"].items():
            name = entry.get("configuration") or entry["method"]
            scores.setdefault((name, tier), {})[entry.get("seed")] = metrics
    return scores


def hits_of(results: dict[str, Any]) -> Hits:
    """Index the hits of all runs by configuration, tier and seed."""
    hits: Hits = defaultdict(dict)
    for run in results["runs"]:
        for tier, digits in run["hits"].items():
            hits[run["configuration"], tier][run["seed"]] = [int(digit) for digit in digits]
    return hits


def renderings(results: dict[str, Any]) -> dict[Path, str]:
    """Render the text between the markers of each file."""
    scores, hits = scores_of(results), hits_of(results)
    checkpoint = json.loads((CHECKPOINT / "results.json").read_text())
    measured = [n for n, (_, rows, _) in TABLES.items() if all((c, "plain") in scores for c in rows.values())]
    tables = [f"### {TABLES[name][0]}\n\n{table(scores, hits, name)}" for name in measured]
    return {
        ROOT / "README.md": f"{summary(scores, hits)}\n{caption(results)}",
        CARD / "README.md": f"{caption(results)}\n\n### By tier\n\n{methods_by_tier(scores, hits)}\n\n"
        + "\n\n".join(tables),
        CHECKPOINT / "README.md": checkpoint_table(checkpoint, scores),
    }


def caption(results: dict[str, Any]) -> str:
    """Describe the numbers: unit, seeds, steps, size of the benchmark."""
    seeds = ", ".join(str(s) for s in sorted({run["seed"] for run in results["runs"]}))
    (steps,) = {run["training"]["max_steps"] for run in results["runs"]}
    counts = results["runs"][0]["counts"]
    return (
        f"Percent; trained rows: mean ± standard deviation over seeds {seeds}, {steps} steps each; "
        f"{counts['queries']} queries against {counts['gallery']} images."
    )


def summary(scores: Scores, hits: Hits) -> str:
    """Render one row a method: R@1 on plain captions, and R@10 on every tier."""
    columns = [("plain", "recall@1"), *((tier, "recall@10") for tier in TIERS)]
    heads = ["method", *(f"{tier} {COLUMNS[metric]}" for tier, metric in columns)]
    names = [*BASELINES, *TABLES["methods"][1]]
    rows = [[name, *(cell(scores[name, tier], metric) for tier, metric in columns)] for name in names]
    ahead = difference(hits, "plain", "PVLF-Deep", "TransAgg")[0]
    return (
        f"{markdown(heads, rows)}\n\nPVLF-Deep minus TransAgg, plain R@10: {ahead} points "
        "[95 % interval over seeds and queries]."
    )


def methods_by_tier(scores: Scores, hits: Hits) -> str:
    """Render baselines and methods on all tiers, and the differences between PVLF, Image-only and TransAgg."""
    names = [*BASELINES, *TABLES["methods"][1]]
    rows = [[tier, name, *cells(scores[name, tier])] for tier, name in product(TIERS, names)]
    differences = {tier: difference(hits, tier, "PVLF-Deep", "TransAgg") for tier in TIERS}
    ahead = "; ".join(f"{tier} {points}" for tier, (points, _) in differences.items())
    seen = ", ".join(f"{tier} {size}" for tier, (_, size) in differences.items())
    ratios = ", ".join(
        f"R@{k} {average(scores['PVLF-Deep', 'plain'], k) / average(scores['Image-only', 'plain'], k):.1f}x"
        for k in (1, 5, 10)
    )
    return (
        markdown(["captions", "method", *COLUMNS.values()], rows)
        + f"\n\nPVLF-Deep over Image-only, plain captions, mean over seeds: {ratios}. PVLF-Deep minus TransAgg in "
        f"R@10, points [95 % interval over seeds and queries]: {ahead}. A true difference of this size would "
        f"have been seen four times in five: {seen}."
    )


def table(scores: Scores, hits: Hits, name: str) -> str:
    """Render one of `TABLES` on plain captions, each row beside its difference to a reference row."""
    _, rows, reference = TABLES[name]
    lines = [
        [
            label,
            *cells(scores[c, "plain"]),
            *(("-", "-") if label == reference else difference(hits, "plain", c, rows[reference])),
        ]
        for label, c in rows.items()
    ]
    return markdown(["", *COLUMNS.values(), f"R@10 minus that of {reference} [95 %]", "seen in 4 of 5"], lines)


def checkpoint_table(checkpoint: dict[str, Any], scores: Scores) -> str:
    """Render the metrics of the committed checkpoint."""
    training = checkpoint["training"]
    rows = [[tier, "this checkpoint", *cells({None: checkpoint["metrics"][tier]})] for tier in TIERS]
    rows += [["any", "Image-only", *cells(scores["Image-only", "plain"])]]
    overlap = [
        [words, str(group["queries"]), f"{group['recall@10']:.1%}"]
        for words, group in checkpoint["by_overlap"].items()
    ]
    return (
        f"Percent; seed {training['seed']}, {training['max_steps']} steps.\n\n"
        + markdown(["captions", "", *COLUMNS.values()], rows)
        + "\n\nAll tiers, by the most words in a row that a caption shares with any training caption:\n\n"
        + markdown(["shared words", "queries", "R@10"], overlap)
    )


def average(runs: dict[int | None, dict[str, float]], k: int) -> float:
    """Return the mean recall@k over seeds, a fraction."""
    return mean(metrics[f"recall@{k}"] for metrics in runs.values())


def difference(hits: Hits, tier: str, name: str, other: str) -> tuple[str, str]:
    """Render the mean difference in R@10 between runs of the same seed, in points.

    Returns:
        the difference with its interval over seeds and queries, and the true difference that the interval would have
        told from zero with a probability of 0.8; with one seed, the difference alone.
    """
    a, b = hits[name, tier], hits[other, tier]
    matrix = [[100 * (x - y) for x, y in zip(a[seed], b[seed], strict=True)] for seed in sorted(a.keys() & b.keys())]
    if len(matrix) == 1:
        return f"{mean(matrix[0]):+.1f}", "-"
    low, high = crossed_interval(matrix)
    return f"{(low + high) / 2:+.1f} [{low:+.1f}, {high:+.1f}]", f"{detectable_difference(matrix):.1f}"


def cells(runs: dict[int | None, dict[str, float]]) -> list[str]:
    """Render every metric of `COLUMNS`, see [`cell`]."""
    return [cell(runs, metric) for metric in COLUMNS]


def cell(runs: dict[int | None, dict[str, float]], metric: str) -> str:
    """Render the mean of a metric in percent, with the sample standard deviation if there are several seeds."""
    values = [100 * metrics[metric] for metrics in runs.values()]
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """Render a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(results: dict[str, Any], file: Path) -> None:
    """Plot R@10 on plain captions, one panel a table: dots are seeds, bars their means."""
    from matplotlib.figure import Figure  # imported here: the extra [plots] has it

    scores = scores_of(results)
    image_only = 100 * average(scores["Image-only", "plain"], 10)
    shown = [(title, rows) for title, rows, _ in TABLES.values() if all((c, "plain") in scores for c in rows.values())]
    columns = min(2, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(5.5 * columns, 2.9 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for ax, (title, rows) in zip(axes, shown, strict=False):
        for position, label in enumerate(rows):
            values = [100 * metrics["recall@10"] for metrics in scores[rows[label], "plain"].values()]
            ax.bar(position, mean(values), color="#9ecae1" if "TransAgg" in label else "#3182bd", width=0.7)
            ax.plot([position] * len(values), values, "o", color="black", markersize=3)
        ax.axhline(image_only, color="grey", linestyle="--", linewidth=1)
        ax.set_xticks(range(len(rows)), [label.replace(", ", "\n") for label in rows], fontsize=8)
        ax.set_title(title, fontsize=10)
        ax.set_ylabel("R@10, plain captions [%]", fontsize=8)
    for ax in list(figure.axes)[len(shown) :]:
        ax.remove()
    figure.savefig(file, dpi=110)


def filled(text: str, between: str) -> str:
    """Replace the text between the markers."""
    before, rest = text.split(START)
    return f"{before}{START}\n{between}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    main()
