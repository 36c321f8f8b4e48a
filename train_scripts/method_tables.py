"""Every method of the paper's tables on EmojiCIR, side by side, and Figure 2's places of prompts.

    python train_scripts/method_tables.py --bf16                  # all rows, three seeds
    python train_scripts/method_tables.py --rows Pic2Word CASE --seeds 0

All rows use the dual encoder `model_cards/blip-emoji-tiny`, on which nobody published most of them: the table says
what the methods do on these drawings, not what the published models do on photographs. A trained row is
`train_pvlf.py` with the recipe that `ROWS` names. Costs are measured by this script, one query at a time;
`--times` measures steps and queries of all rows again, in rounds, when nothing else runs. After an
interruption the same command does what is missing. Numbers go to `model_cards/methods/results.json`, and those of
memory, which need no finished training, to `memory.json` beside it (`--memory_only` counts them alone); tables and
the plot of recall against cost go into that folder. `--render_only` renders the committed numbers. From the values of
every query, in `outputs/method-tables/*/evaluation`, it also makes `comparison.md`, `.html` and `.json`, as
`pvlf-hf compare` does: intervals, and paired tests against PVLF-Deep.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from statistics import mean, median, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from demo import first_queries
from transformers import AutoModel, AutoProcessor, set_seed

from pvlf_hf import InversionModel, InversionProcessor, PVLFProcessor, PVLFTrainer, TrainingFreeModel, load_emoji_cir
from pvlf_hf.atomic_files import whole
from pvlf_hf.commands.compare import write as write_comparison
from pvlf_hf.commands.evaluate import baselines
from pvlf_hf.commands.train import parse_arguments
from pvlf_hf.data.emoji_cir.dataset import TIERS
from pvlf_hf.embeddings.embedding_store import images_made_by
from pvlf_hf.evaluation.comparison import compare, read_runs
from pvlf_hf.evaluation.costs import query_milliseconds
from pvlf_hf.evaluation.results import write_results
from pvlf_hf.evaluation.scoring import evaluate_all
from pvlf_hf.evaluation.significance import seed_interval
from pvlf_hf.search.gallery_files import prepared_as

ROOT = Path(__file__).resolve().parents[1]
BACKBONE = ROOT / "model_cards" / "blip-emoji-tiny"
CARD = ROOT / "model_cards" / "methods"
START, END = "<!-- methods on emoji-cir: written by train_scripts/method_tables.py -->", "<!-- end of methods -->"


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        recipe: recipe of a row that is trained, in `train_scripts/configs`; None for one that is not.
        flags: flags after the recipe.
        composition: composition of a training-free model.
        baseline: method of an untrained baseline that evaluates encoders alone.
    """

    recipe: str | None = None
    flags: tuple[str, ...] = ()
    composition: str | None = None
    baseline: str | None = None

    @property
    def seeds(self) -> bool:
        """Whether its numbers depend on a seed."""
        return self.recipe is not None


ROWS = {
    "Image-only": Row(baseline="image"),
    "Text-only": Row(baseline="text"),
    "Image+Text (sum)": Row(baseline="image+text"),
    "Sum, text 0.8": Row(composition="sum"),
    "Slerp, text 0.8": Row(composition="slerp"),
    "Product": Row(composition="product"),
    "Pic2Word": Row("methods/pic2word-emoji.yaml"),
    "SEARLE": Row("methods/searle-emoji.yaml"),
    "SEARLE-OTI": Row(),
    "LinCIR": Row("methods/lincir-emoji.yaml"),
    "Context-I2W": Row("methods/context_i2w-emoji.yaml"),
    "PALAVRA": Row("methods/palavra-emoji.yaml"),
    "CompoDiff": Row("methods/compodiff-emoji.yaml"),
    "CASE": Row("methods/case.yaml"),
    "TransAgg": Row("emoji.yaml", ("--method=transagg",)),
    "PVLF-Shallow": Row("emoji.yaml", ("--prompt_depth=1",)),
    "PVLF-Deep": Row("emoji.yaml"),
    "no prompts": Row("methods/prompts_none.yaml"),
    "text (CoOp)": Row("methods/coop.yaml"),
    "image (VPT)": Row("methods/vpt.yaml"),
    "image (VPT), gallery too": Row("methods/vpt.yaml", ("--prompt_gallery=true",)),
    "both, independent (IVLP)": Row("methods/ivlp.yaml"),
    "both, independent (IVLP), gallery too": Row("methods/ivlp.yaml", ("--prompt_gallery=true",)),
    "both, linear (MaPLe)": Row("methods/maple.yaml"),
    "both, linear (MaPLe), gallery too": Row("methods/maple.yaml", ("--prompt_gallery=true",)),
    "fusion (PVLF)": Row("methods/pvlf.yaml"),
}
PLACES = [*ROWS][[*ROWS].index("no prompts") :]
TABLES = {"Methods": [name for name in ROWS if name not in PLACES], "Places of prompts (Figure 2)": PLACES}
TIMED_STEPS = 8
"""Steps of a timing: as many batches as `enough_rows` takes."""

TIMED_ROUNDS = 3
"""Rounds of timings over all rows: the speed of a machine that is shared changes within minutes."""

COLUMNS = [(tier, k) for tier in TIERS for k in (1, 10)]


def main() -> None:
    """Train, evaluate and time the missing rows, and render the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="rows to measure")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="at least three for an interval")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/method-tables"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, each with one thread")
    parser.add_argument("--max_steps", type=int, help="training steps, by default those of each recipe")
    parser.add_argument("--queries", type=int, default=1500, help="test queries to rank; there are 1,500")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast: twice as fast where the CPU has it")
    parser.add_argument("--memory_only", action="store_true", help="measure the memory of the rows' steps alone")
    parser.add_argument(
        "--times", action="store_true", help="time steps and queries of measured rows again, in rounds over all rows"
    )
    parser.add_argument("--render_only", action="store_true", help="render the committed results.json again")
    args = parser.parse_args()
    file, memory = CARD / "results.json", CARD / "memory.json"
    if args.times:
        keep(timed_again(json.loads(file.read_text()), args.output_dir.resolve(), args.bf16), file)
    if not (args.render_only or args.times):
        known = json.loads(memory.read_text()) if memory.exists() else {}
        wanted = [name for name in args.rows if ROWS[name].recipe and (args.memory_only or name not in known)]
        known |= {name: step_megabytes(name) for name in wanted}
        if wanted:
            write_json(memory, {name: known[name] for name in ROWS if name in known})
    if not (args.render_only or args.memory_only or args.times):
        flags = [f"--max_steps={args.max_steps}"] * bool(args.max_steps) + ["--bf16=true"] * args.bf16
        folder = args.output_dir.resolve()
        for name in args.rows:
            runs = [(name, seed) for seed in (args.seeds if ROWS[name].seeds else [None])]
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(lambda run: train_row(*run, folder, flags), runs))
            keep([measure(*run, folder, args.queries) for run in runs], file)
    entries, known = json.loads(file.read_text()), json.loads(memory.read_text())
    if not (args.render_only or args.memory_only):
        compare_all(entries, args.output_dir.resolve())
    plot(entries, CARD / "recall_against_cost.png")
    card = CARD / "README.md"
    before, rest = card.read_text(encoding="utf-8").split(START)
    text = f"{before}{START}\n{rendered(entries, known)}\n{END}{rest.split(END, 1)[1]}"
    card.write_text(text, encoding="utf-8")
    print(rendered(entries, known))


def keep(measured: list[dict[str, Any]], file: Path) -> None:
    """Write runs into the file of all runs, in place of earlier ones."""
    kept = json.loads(file.read_text()) if file.exists() else []
    new = {(entry["row"], entry["seed"]) for entry in measured}
    entries = [entry for entry in kept if (entry["row"], entry["seed"]) not in new] + measured
    entries.sort(key=lambda entry: ([*ROWS].index(entry["row"]), entry["seed"] or 0))
    write_json(file, entries)


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    with whole(file) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def folder_of(name: str, seed: int | None, folder: Path) -> Path:
    """Return the folder of a run."""
    plain = "".join(letter if letter.isalnum() else "-" for letter in name.casefold())
    return folder / (plain if seed is None else f"{plain}-seed{seed}")


def train_row(name: str, seed: int | None, folder: Path, flags: list[str]) -> None:
    """Train a row by its recipe in a process of its own, of one thread, unless its folder holds a finished run."""
    row, home = ROWS[name], folder_of(name, seed, folder)
    if row.recipe is None or (home / "results.json").exists():
        return
    home.mkdir(parents=True, exist_ok=True)
    print(f"training {name}, seed {seed}; progress in {home / 'log.txt'}", flush=True)
    script, recipe = ROOT / "train_scripts" / "train_pvlf.py", ROOT / "train_scripts" / "configs" / row.recipe
    command = [sys.executable, str(script), str(recipe), f"--output_dir={home}", f"--seed={seed}", *row.flags, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (home / "log.txt").open("w") as log:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}, seed {seed} failed; the reason is at the end of {home / 'log.txt'}")


def load_row(name: str, seed: int | None, folder: Path) -> tuple[Any, Any]:
    """Return model and processor of a row that composes queries."""
    row = ROWS[name]
    if row.recipe is not None:
        home = folder_of(name, seed, folder)
        return AutoModel.from_pretrained(home), AutoProcessor.from_pretrained(home)
    if row.composition is not None:
        model = TrainingFreeModel.from_vl_pretrained(str(BACKBONE), composition=row.composition)
        return model, PVLFProcessor.from_vl_pretrained(str(BACKBONE))
    settings = {"unpublished_backbone": True}
    processor = InversionProcessor.from_vl_pretrained(str(BACKBONE), "searle_oti", placeholder="*", **settings)
    settings |= {"placeholder_id": processor.placeholder_id}
    return InversionModel.from_vl_pretrained(str(BACKBONE), "searle_oti", **settings), processor


def measure(name: str, seed: int | None, folder: Path, queries: int) -> dict[str, Any]:
    """Evaluate and time a row, unless its folder holds the outcome."""
    home = folder_of(name, seed, folder)
    file = home / f"measured-{queries}.json"
    if file.exists():
        return json.loads(file.read_text())
    print(f"measuring {name}, seed {seed}", flush=True)
    benchmarks = [first_queries(load_emoji_cir("test", tier), queries) for tier in TIERS]
    entry: dict[str, Any] = {"row": name, "seed": seed, "queries": queries}
    if (baseline := ROWS[name].baseline) is not None:
        found = [e for e in baselines(str(BACKBONE), benchmarks) if e.method == baseline]
        entry |= {"trained_weights": 0, "seconds_a_step": None, "query_ms": None, "own_gallery": False}
    else:
        model, processor = load_row(name, seed, folder)
        found = evaluate_all(model, processor, benchmarks)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in training
        cost = query_milliseconds(model, processor, benchmarks[0].queries)
        torch.set_num_threads(threads)
        entry |= {
            "trained_weights": trained_weights(home, model) if ROWS[name].recipe else 0,
            "seconds_a_step": seconds_a_step(home) if ROWS[name].recipe else None,
            "query_ms": cost,
            "own_gallery": has_own_gallery(model, processor),
        }
    entry["metrics"] = {tier: e.metrics for tier, e in zip(TIERS, found, strict=True)}
    write_results(home / "evaluation" / "results.json", found, cost=costs_of(entry))  # for the comparison
    file.write_text(json.dumps(entry), encoding="utf-8")
    return entry


def timed_again(entries: list[dict[str, Any]], folder: Path, bf16: bool) -> list[dict[str, Any]]:
    """Time steps and queries of each measured row, of its first run: the least of rounds over all rows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in training
    queries = load_emoji_cir("test", TIERS[0]).queries
    first = {entry["row"]: entry["seed"] for entry in reversed(entries) if entry["query_ms"] is not None}
    times: dict[str, list[tuple[float, float | None]]] = {name: [] for name in reversed(first)}
    for _, name in product(range(TIMED_ROUNDS), times):
        query = query_milliseconds(*load_row(name, first[name], folder), queries)
        step = brief_training(name, TIMED_STEPS, bf16).seconds_a_step if ROWS[name].recipe else None
        times[name].append((query, step))
        print(f"{name}: {query:.1f} ms a query", f"{step:.2f} s a step" if step else "", flush=True)
    torch.set_num_threads(threads)
    costs = {
        name: dict(zip(("query_ms", "seconds_a_step"), map(least, zip(*found, strict=True)), strict=True))
        for name, found in times.items()
    }
    return [entry | costs.get(entry["row"], {}) for entry in entries]


def compare_all(entries: list[dict[str, Any]], folder: Path) -> None:
    """Write the comparison of all runs, with the costs of the table, unless values of some are not in the folder."""
    files = [folder_of(entry["row"], entry["seed"], folder) / "evaluation" / "results.json" for entry in entries]
    if missing := [str(file) for file in files if not file.exists()]:
        print(f"comparison.* are as they were: {len(missing)} runs were not evaluated here, such as {missing[0]}")
        return
    runs = [
        replace(run, cost=costs_of(entry))
        for file, entry in zip(files, entries, strict=True)
        for run in read_runs(file, entry["row"])
    ]
    write_comparison(compare(runs, against="PVLF-Deep", metrics=[f"recall@{k}" for k in (1, 10)]), CARD)


def costs_of(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the costs of a run that are known."""
    return {key: entry[key] for key in ("trained_weights", "seconds_a_step", "query_ms") if entry[key] is not None}


def has_own_gallery(model: Any, processor: Any) -> bool:
    """Return whether a row searches other embeddings than the index of the plain encoder."""
    plain = TrainingFreeModel.from_vl_pretrained(str(BACKBONE)), PVLFProcessor.from_vl_pretrained(str(BACKBONE))
    index = images_made_by(*plain)
    return prepared_as(index, "the index", model, processor)[1] != index


def trained_weights(home: Path, model: Any) -> int:
    """Return how many weights of a model trained in its run."""
    model.set_finetuning(json.loads((home / "results.json").read_text())["training"]["finetuning"])
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def seconds_a_step(home: Path) -> float:
    """Return the seconds of a training step, as the run's log says."""
    rates = re.findall(r"'train_steps_per_second': '?([0-9.e-]+)", (home / "log.txt").read_text())
    return 1 / float(rates[-1])


@contextmanager
def kept_for_backward(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Collect what is kept for the backward pass: bytes of each storage by its address, without the model's weights.

    Kept storages are alive until the backward pass, so that no two of them have one address.
    """
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


class MeasuringTrainer(PVLFTrainer):
    """Trainer that knows how many bytes its first step kept for the backward pass, and when each step began."""

    kept_bytes = 0

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the loss, see the base class."""
        self.starts = [*getattr(self, "starts", ()), time.perf_counter()]
        if len(self.starts) > 1:
            return super().compute_loss(model, *args, **kwargs)
        with kept_for_backward(model) as kept:
            loss = super().compute_loss(model, *args, **kwargs)
        self.kept_bytes = sum(kept.values())
        return loss

    @property
    def seconds_a_step(self) -> float:
        """Median of the steps after the first, from start to start: with the batch, the optimiser and the log."""
        return median(after - before for before, after in pairwise(self.starts[1:]))


def step_megabytes(name: str) -> float:
    """Return the megabytes that a step of a row's recipe keeps for its backward pass, in float32 and for its batch.

    Weights, their gradients and the moments of AdamW come on top. It is counted, not timed: other work on the machine
    makes no difference.
    """
    print(f"counting the memory of a step of {name}", flush=True)
    return round(brief_training(name, 1).kept_bytes / 1e6, 1)


def brief_training(name: str, steps: int, bf16: bool = False) -> MeasuringTrainer:
    """Train some steps of a row's recipe, and return the trainer, which has measured them."""
    row = ROWS[name]
    with TemporaryDirectory() as folder:
        recipe = str(ROOT / "train_scripts" / "configs" / str(row.recipe))
        flags = [*row.flags, f"--output_dir={folder}", f"--max_steps={steps}", "--save_strategy=no"]
        flags += ["--report_to=none", "--disable_tqdm=true"] + ["--bf16=true"] * bf16
        model_args, data_args, args = parse_arguments([recipe, *flags])
        if args.feature_cache:
            args.feature_cache = folder
        if model_args.method == "searle":  # the words that are distilled need not be good ones
            model_args.settings = [*(model_args.settings or ()), "inversion_steps=1"]
        set_seed(0)
        model, processor = model_args.build()
        rows = enough_rows(data_args.load(model_args.method)[0], args)
        trainer = MeasuringTrainer(model, args, rows, processing_class=processor)
        trainer.train()
    return trainer


def enough_rows(rows: Any, args: Any) -> Any:
    """Return the rows of a few batches: of one value of `batch_by`, or images of the same concepts together."""
    order = range(len(rows))
    if args.batch_by:
        values = rows[args.batch_by][:]
        order = [row for row in order if values[row] == values[0]]
    elif "concept" in rows.column_names:
        order = sorted(order, key=rows["concept"][:].__getitem__)
    return rows.select(order[: 8 * args.per_device_train_batch_size])


def rendered(entries: list[dict[str, Any]], memory: dict[str, float]) -> str:
    """Render all tables in Markdown, rows that were not measured among them."""
    seeds = sorted({entry["seed"] for entry in entries if entry["seed"] is not None})
    (queries,) = {entry["queries"] for entry in entries}
    parts = [
        f"Percent; trained rows: mean ± standard deviation over seeds {', '.join(map(str, seeds))}. {queries} queries "
        "against 3,633 images by an artist that no training saw. Costs of one thread, the least of all runs: seconds "
        "of a training step of the recipe's batch; megabytes that such a step keeps for its backward pass in float32, "
        "beside weights, gradients and the optimiser's moments; milliseconds of one query without decoding its image; "
        "and whether the gallery is another than the encoder's own.",
        "![Plain R@10 against the time of a query](recall_against_cost.png)",
    ]
    for title, names in TABLES.items():
        parts.append(f"### {title}\n\n{table(entries, names, memory)}\n\n{differences(entries, names)}")
    return "\n\n".join(parts)


def table(entries: list[dict[str, Any]], names: list[str], memory: dict[str, float]) -> str:
    """Render rows with recalls and costs; a row without entries says that it was not measured."""
    costs_of_a_row = ["trained weights", "s a step", "MB a step", "ms a query", "own gallery"]
    heads = ["", *(f"{tier} R@{k}" for tier, k in COLUMNS), *costs_of_a_row]
    lines = [heads, ["---"] * len(heads)]
    for name in names:
        own = [entry for entry in entries if entry["row"] == name]
        kept = f"{memory[name]:,.0f}" if name in memory else "-"
        if not own:
            missing = ["not measured yet", *["-"] * (len(COLUMNS) - 1)]
            lines.append([name, *missing, "-", "-", kept, "-", "-"])
            continue
        recalls = [cell([100 * entry["metrics"][tier][f"recall@{k}"] for entry in own]) for tier, k in COLUMNS]
        costs = [least([entry[key] for entry in own]) for key in ("seconds_a_step", "query_ms")]
        step, query = ("-" if cost is None else f"{cost:.2f}" if cost < 10 else f"{cost:,.0f}" for cost in costs)
        trained = f"{own[0]['trained_weights']:,}" if own[0]["trained_weights"] else "-"
        lines.append([name, *recalls, trained, step, kept, query, "yes" if own[0]["own_gallery"] else "no"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def least(values: list[float | None]) -> float | None:
    """Return the least of the values that are known, which other work on the machine has disturbed least, or None."""
    return min((value for value in values if value is not None), default=None)


def cell(values: list[float]) -> str:
    """Render the mean of a metric, with the sample standard deviation if there are several seeds."""
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def differences(entries: list[dict[str, Any]], names: list[str]) -> str:
    """Say which differences in plain R@10 to the last row the intervals over seeds carry."""
    reference = names[-1]
    recalls = {
        name: {e["seed"]: 100 * e["metrics"]["plain"]["recall@10"] for e in entries if e["row"] == name}
        for name in names
    }
    carried, open_ones = [], []
    for name in names[:-1]:
        others = recalls[reference]
        pairs = [value - others[seed] for seed, value in recalls[name].items() if seed in others]
        if len(pairs) > 1:
            low, high = seed_interval(pairs)
            text = f"{name} {mean(pairs):+.1f} [{low:+.1f}, {high:+.1f}]"
            (carried if low * high > 0 else open_ones).append(text)
    return (
        f"Plain R@10 minus that of {reference}, points [95 % interval over seeds]. Carried by the interval: "
        f"{'; '.join(carried) or 'none'}. Not carried: {'; '.join(open_ones) or 'none'}."
    )


def plot(entries: list[dict[str, Any]], file: Path) -> None:
    """Plot plain R@10, with its standard deviation over seeds, against the milliseconds of a query."""
    from matplotlib.figure import Figure  # imported here: the extra [plots] has it
    from matplotlib.ticker import LogLocator, NullLocator

    shown = {entry["row"]: [e for e in entries if e["row"] == entry["row"]] for entry in entries if entry["query_ms"]}
    panels = {title: [name for name in names if name in shown] for title, names in TABLES.items()}
    panels = {title: names for title, names in panels.items() if names}
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, names) in zip(axes, panels.items(), strict=True):
        recalls = {name: [100 * e["metrics"]["plain"]["recall@10"] for e in shown[name]] for name in names}
        heights = {name: mean(values) for name, values in recalls.items()}
        spreads = {name: stdev(values) if len(values) > 1 else 0 for name, values in recalls.items()}
        ends = [heights[name] + sign * spreads[name] for name in names for sign in (-1, 1)]
        line = 0.035 * (max(ends) - min(ends))  # the height of a name
        labels: list[tuple[float, float]] = []
        for name in sorted(names, key=lambda name: -heights[name]):
            x, y = min(e["query_ms"] for e in shown[name]), heights[name]
            color = "#3182bd" if shown[name][0]["trained_weights"] else "#969696"
            ax.errorbar(x, y, spreads[name], fmt="o", color=color, elinewidth=1)
            for at, above in labels:  # names are pushed down, away from those above
                y = min(y, above - line) if 0.4 < x / at < 2.5 else y
            labels.append((x, y))
            ax.annotate(name, (x, y), textcoords="offset points", xytext=(6, -2), fontsize=7)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter("{x:g}")
        if times := [at for at, _ in labels]:
            ax.set_xlim(min(times) / 2, 4 * max(times))  # room for the names
        ax.tick_params(which="both", labelsize=7)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("one query [ms]", fontsize=8)
        ax.set_ylabel("R@10, plain captions [%]", fontsize=8)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
