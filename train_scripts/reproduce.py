"""Trains and evaluates the rows of the paper's Tables 1-5, and renders the results beside the published figures.

    python train_scripts/reproduce.py --table 2 --dry_run
    python train_scripts/reproduce.py --table 2 --data_root data --rows "PVLF (Laion-CIR-Combined)" --seeds 0 1 2
    python train_scripts/reproduce.py --table 5 --data_root data \
        --accelerate_config train_scripts/accelerate/multi_gpu.yaml

    python train_scripts/reproduce.py --table 2 --data_root data --rows Pic2Word

Writes `table2.md` and `table2.json` after every row. Tables share their trainings, and the same command resumes after
an interruption. Rows quoted from other papers run only if `--rows` names them, on training data of their own
(`paper_methods.py`; `--dry_run` lists what is missing). CIRR's test labels are on a server: our figures are of the
validation split, and the two submission files for the server are written beside them.
Flags after `--` are passed to train_pvlf.py, for instance `-- --num_train_epochs 20`; the tables report them.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils.memory import clear_device_cache
from gpu_hours import ASSUMPTIONS, gpu_hours
from paper_methods import Published
from paper_tables import RECIPES as ALL_RECIPES
from paper_tables import WEIGHTS, Row, Table, joins, load_tables, write_table

from pvlf_hf import InversionModel, InversionProcessor
from pvlf_hf.atomic_files import whole
from pvlf_hf.commands import evaluate as measurement
from pvlf_hf.commands.train import ModelArguments, parse_arguments

SCRIPTS = Path(__file__).resolve().parent
RECIPES = ALL_RECIPES / "paper"
FOLDERS = {
    "laion-cir": "the training triplets",
    "cirr": "validation while training, the CIRR columns and the submission files",
    "fashioniq": "the FashionIQ columns",
}


@dataclass(frozen=True)
class Run:
    """A training of a recipe, or an untrained baseline, and its folder.

    Args:
        row: a row of the table that the run belongs to.
        folder: holds the run's files.
        arguments: arguments of train_pvlf.py.
        overrides: the arguments that depart from the recipe.
        launcher: command that runs train_pvlf.py.
        processes: number of processes that the launcher starts.
    """

    row: Row
    folder: Path
    arguments: tuple[str, ...]
    overrides: tuple[str, ...]
    launcher: tuple[str, ...] = (sys.executable,)
    processes: int = 1

    @property
    def is_trained(self) -> bool:
        """Whether the training is complete."""
        return (self.folder / "results.json").exists()

    def command(self) -> list[str]:
        """Return the command line of the training."""
        return [*self.launcher, str(SCRIPTS / "train_pvlf.py"), *self.arguments]

    def settings(self) -> dict[str, Any]:
        """Return the settings that identify the run: a run with others must not continue in its folder."""
        model_args, data_args, args = parse_arguments(list(self.arguments))
        names = ("dataset", "train_file", "train_shards", "validation", "allow_missing")
        data = {name: getattr(data_args, name) for name in names}
        training = {**args.settings(), "processes": self.processes}
        return json.loads(json.dumps({"model": vars(model_args), "data": data, "training": training}))


def main(command_line: Sequence[str] | None = None) -> None:
    """Plan, train, evaluate and render one table."""
    command_line = list(sys.argv[1:] if command_line is None else command_line)
    split = command_line.index("--") if "--" in command_line else len(command_line)
    own, overrides = command_line[:split], command_line[split + 1 :]
    tables = load_tables()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=int, required=True, choices=list(tables), help="table of the paper")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="rows to run (default: all but the quoted)")
    parser.add_argument("--data_root", type=Path, help="folder with laion-cir/, cirr/ and fashioniq/")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/reproduce"), help="folder of runs and tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds, each a training of every recipe")
    parser.add_argument("--accelerate_config", type=Path, help="topology for `accelerate launch`: several GPUs")
    parser.add_argument(
        "--dry_run", action="store_true", help="only print the planned runs and their expected GPU hours"
    )
    args = parser.parse_args(own)
    table = tables[args.table]
    try:
        rows = chosen_rows(table, args.rows)
        if not args.dry_run:
            check_data_root(table, rows, args.data_root)
    except ValueError as error:
        parser.error(str(error))
    output_dir = args.output_dir.resolve()
    runs = [run for row in rows for run in runs_of(row, args, overrides, output_dir)]
    if args.dry_run:
        print_plan(table, rows if args.rows else table.rows, runs, args.data_root)
        return
    for run in runs:
        claim(run)
        if run.row.recipe_file:
            train(run)
        measure(run, table.protocols)
        write_table(table, output_dir, args.seeds)
    write_table(table, output_dir, args.seeds)
    print((output_dir / f"table{table.number}.md").read_text(encoding="utf-8"))


def chosen_rows(table: Table, names: Sequence[str] | None) -> list[Row]:
    """Return the named rows, or all that are not quoted; a `ValueError` lists the names of the table."""
    if unknown := sorted(set(names or ()) - {row.name for row in table.rows}):
        known = "\n  ".join(row.name + " (quoted)" * row.quoted for row in table.rows)
        raise ValueError(f"Table {table.number} has no row {unknown[0]!r}; its rows are\n  {known}")
    return [row for row in table.rows if (not row.quoted if names is None else row.name in names)]


def check_data_root(table: Table, rows: Sequence[Row], data_root: Path | None) -> None:
    """Raise a `ValueError` that lists the folders the rows need and the data root lacks."""
    needed = {protocol.partition("-")[0] for protocol in table.protocols}
    if any(row.recipe for row in rows):
        needed |= {"laion-cir", "cirr"}
    missing = [name for name in FOLDERS if name in needed and not (data_root and (data_root / name).is_dir())]
    lines = "".join(f"\n  {name}/: {FOLDERS[name]}" for name in missing)
    lines += "".join(f"\n  {its.data}: {its.needs}" for its in lacking(rows, data_root))
    if lines:
        where = f"{data_root} lacks" if data_root else "pass --data_root, a folder with"
        raise ValueError(f"{where}{lines}\nLink or move the data sets there; --dry_run needs none.")


def lacking(rows: Sequence[Row], data_root: Path | None) -> list[Published]:
    """Return the quoted methods among the rows whose training data the data root lacks."""
    methods = [row.published for row in rows if row.published and row.published.data]
    return [its for its in methods if not (data_root and (data_root / str(its.data)).exists())]


def runs_of(row: Row, args: argparse.Namespace, overrides: Sequence[str], output_dir: Path) -> Iterator[Run]:
    """Yield a training of the row's recipe for each seed, or what it evaluates without training."""
    root = args.data_root.resolve() if args.data_root else None
    own_data = row.published.data_flags(root or Path("DATA_ROOT")) if row.published else []
    common = (*own_data, *overrides, *([f"--data_root={root}"] if root else []))
    folders = row.folders(output_dir, args.seeds)
    if not row.recipe_file:
        model = row.published.model if row.published else row.model
        yield Run(row, folders[0], (f"--model={model}", *common), tuple(overrides))
        return
    for seed, folder in zip(args.seeds, folders, strict=True):
        flags = (str(row.recipe_file), *common, f"--seed={seed}", f"--output_dir={folder}")
        if not args.accelerate_config:
            yield Run(row, folder, flags, tuple(overrides))
            continue
        processes = int(yaml.safe_load(args.accelerate_config.read_text(encoding="utf-8"))["num_processes"])
        launcher = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(args.accelerate_config))
        share = f"--per_device_train_batch_size={share_of_batch(flags, processes)}"
        yield Run(row, folder, (*flags, share), tuple(overrides), launcher, processes)


def share_of_batch(flags: Sequence[str], processes: int) -> int:
    """Return the batch size of each process, so that together they have the recipe's batch and negatives."""
    batch = parse_arguments(list(flags))[2].per_device_train_batch_size
    if batch % processes:
        raise ValueError(f"a batch of {batch} cannot be shared by {processes} processes: choose a divisor of it")
    return batch // processes


def claim(run: Run) -> None:
    """Record the run's settings in its folder; raise a `ValueError` if the folder holds a run with other settings."""
    settings, file = run.settings(), run.folder / "arguments.json"
    if file.exists():
        recorded = json.loads(file.read_text(encoding="utf-8"))
        for part, name in ((part, name) for part, values in settings.items() for name in values):
            old, new = recorded[part].get(name), settings[part][name]
            if old != new:
                raise ValueError(
                    f"{run.folder} holds a run with {name}={old}, not {new}: delete it or choose another --output_dir"
                )
    with whole(file) as partial:
        partial.write_text(json.dumps({**settings, "overrides": run.overrides}, indent=2) + "\n", encoding="utf-8")


def train(run: Run) -> None:
    """Train in a separate process, unless the run is trained; an interrupted training resumes from its checkpoint.

    Raises:
        RuntimeError: if the training fails.
    """
    if run.is_trained:
        return
    log_file = run.folder / "log.txt"
    print(f"training {run.row.name}; progress in {log_file}", flush=True)
    with log_file.open("a") as log:
        done = subprocess.run(run.command(), stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"training {run.row.name} failed; the reason is at the end of {log_file}")


def measure(run: Run, protocols: Sequence[str]) -> None:
    """Evaluate a run in float32, unless it is evaluated; write the submission files for CIRR's test split."""
    model_args, data_args, _ = parse_arguments(list(run.arguments))
    if run.row.recipe_file:
        weights = trained_weights(run.folder)
    else:
        weights = {"untrained": Path(model_args.model) if run.row.baseline else inversion(run, model_args)}
    for (name, source), protocol in product(weights.items(), map(run.row.protocol, protocols)):
        folder = run.folder / name / protocol
        if (folder / "results.json").exists():  # written last
            continue
        print(f"evaluating {run.row.name}, {WEIGHTS[name]}, on {protocol}", flush=True)
        flags = {
            "model": source,
            "methods": run.row.baseline or "composed",
            "protocols": protocol,
            "output_dir": folder,
            "embeddings": run.folder / name / "embeddings",
            "data_root": data_args.data_root,
            "allow_missing": data_args.allow_missing,
            "check_counts": data_args.check_counts,
        }
        measurement.main([f"--{flag}={value}" for flag, value in flags.items()])
        clear_device_cache(garbage_collection=True)  # the next training may need all memory


def inversion(run: Run, model_args: ModelArguments) -> Path:
    """Save a model of SEARLE-OTI, the only quoted method that trains nothing, and return its folder."""
    settings = model_args.given()
    own = {name: settings.pop(name) for name in ("template", "placeholder") if name in settings}
    processor = InversionProcessor.from_vl_pretrained(model_args.model, "searle_oti", **own)
    settings = {"placeholder_id": processor.placeholder_id, **settings}
    folder = run.folder / "model"
    for part in (InversionModel.from_vl_pretrained(model_args.model, "searle_oti", **settings), processor):
        part.save_pretrained(folder)
    return folder


def trained_weights(folder: Path) -> dict[str, Path]:
    """Return the weights to evaluate, by key of `WEIGHTS`; the best epoch only if the training chose one."""
    best = json.loads((folder / "results.json").read_text(encoding="utf-8")).get("best")
    return {"last": folder} | ({"best": folder / best["checkpoint"]} if best else {})


def print_plan(table: Table, rows: Sequence[Row], runs: Sequence[Run], data_root: Path | None) -> None:
    """Print what a run of the table does, what it lacks, and the GPU hours it is expected to take."""
    hours, plan = 0.0, [f"Table {table.number}: {table.title}; measured on {', '.join(table.protocols)}"]
    for row in rows:
        runs_of_row = [run for run in runs if run.row == row]
        if row.published:
            plan += ["", *plan_of_quoted(table, row, row.published, runs_of_row, data_root)]
            continue
        left = [run for run in runs_of_row if row.recipe and not run.is_trained]
        cost = sum(gpu_hours(*parse_arguments(list(run.arguments)), run.processes) for run in left)
        hours += cost
        if row.baseline:
            plan.append(f"\n{row.name}: no training, {row.model} measured")
        else:
            trained = f"{len(runs_of_row) - len(left)} of {len(runs_of_row)} trained"
            plan.append(f"\n{row.name}: {trained}, {cost:.1f} GPU hours to go")
            plan += ["  " + shlex.join(run.command()) for run in left]
    plan.append(f"\n{hours:.1f} GPU hours of training expected.\n{ASSUMPTIONS}")
    print("\n".join(plan))


def plan_of_quoted(
    table: Table, row: Row, published: Published, runs: Sequence[Run], data_root: Path | None
) -> list[str]:
    """Return what a run of a quoted row does, or would do if it were named."""
    left = [run for run in runs if row.recipe_file and not run.is_trained]
    if not runs:
        plan = [f"{row.name}: quoted, not run; --rows {shlex.quote(row.name)} runs it"]
    elif row.recipe_file:
        plan = [f"{row.name}: {len(runs) - len(left)} of {len(runs)} trained, GPU hours not estimated"]
    else:
        plan = [f"{row.name}: no training, {published.model} measured"]
    plan += [f"  lacks {published.data}: {published.needs}"] if lacking([row], data_root) else []
    plan += [f"  evaluated on {join}" for join in joins(table, published)]
    plan += [f"  {published.differs}"] + [f"  or: {published.weights}"] * bool(published.weights)
    return plan + ["  " + shlex.join(run.command()) for run in left]


if __name__ == "__main__":
    main()
