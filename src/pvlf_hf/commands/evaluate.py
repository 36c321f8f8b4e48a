r"""Evaluates a model on named protocols: metrics with intervals, how each was measured, files for test servers.

    pvlf-hf evaluate --model outputs/mine --output_dir outputs/mine/evaluation \
        --data_root data --protocols cirr-val fashioniq circo-val

    # the paper's baselines, by a pretrained dual encoder alone
    pvlf-hf evaluate --model Salesforce/blip-itm-base-coco --methods image text image+text ...

    # the same encoder, composing queries by a formula
    pvlf-hf evaluate --model openai/clip-vit-base-patch32 --composition slerp ...

    # several GPUs, each a share of the images
    torchrun --nproc_per_node 4 -m pvlf_hf.commands.evaluate ...

Writes `results.json`, `results_per_query.json`, `results.md`, and for test splits `submissions/`; `pvlf-hf compare`
makes a table of several such files. Embeddings are kept:
with `--embeddings` of an earlier run, another protocol over the same images and captions takes seconds. The data
root has a folder for each data set: `cirr/`, `fashioniq/`, `circo/`, `icir/`, ...
"""

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import HfArgumentParser

from ..atomic_files import whole
from ..checkpoints.loading import load_model
from ..checkpoints.model_card import protocol_cards, results_tables
from ..data.benchmark import CIRBenchmark
from ..data.protocols import describe_protocols, load_protocol
from ..dtypes import DTYPES
from ..embeddings.embedding_store import EmbeddingStore, made_by
from ..embeddings.encoding import FORMER_NAME, QUERY_METHODS, embed, method_named
from ..evaluation.costs import costs
from ..evaluation.metrics import metrics_named
from ..evaluation.results import Evaluation, write_results
from ..evaluation.scoring import average, evaluate, evaluate_all
from ..evaluation.submission import write_submissions
from ..models.compositions_training_free import COMPOSITIONS
from .arguments import HelpFormatter, leave, parse


@dataclass
class EvaluationArguments:
    """Arguments of `pvlf-hf evaluate`."""

    model: str = field(metadata={"help": "PVLF checkpoint, or a plain dual encoder: a name on the Hub or a folder."})
    protocols: list[str] = field(metadata={"help": "One or more of the protocols below."})
    output_dir: str = field(metadata={"help": "Folder for results; overwrites those of an earlier run."})
    data_root: str = field(default="data", metadata={"help": "Folder that holds a folder for each data set."})
    methods: list[str] = field(
        default_factory=lambda: ["composed"],
        metadata={
            "help": "How queries are embedded: by the model, or by a baseline.",
            "choices": [*QUERY_METHODS, FORMER_NAME],
        },
    )
    composition: str | None = field(
        default=None,
        metadata={"help": "How a plain dual encoder composes queries (default: slerp).", "choices": [*COMPOSITIONS]},
    )
    embeddings: str | None = field(
        default=None, metadata={"help": "Folder that keeps embeddings (default: embeddings in --output_dir)."}
    )
    batch_size: int = field(default=64, metadata={"help": "Images encoded at once in each process, at most."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "dtype of the model: auto is the checkpoint's; fastest measures float32 and bfloat16 here.",
            "choices": [*DTYPES],
        },
    )
    allow_missing: bool = field(
        default=False, metadata={"help": "Leave out images without a file, and state it in the results."}
    )
    check_counts: bool = field(
        default=True, metadata={"help": "Stop if a data set does not have its published number of queries."}
    )
    submissions: bool = field(
        default=False, metadata={"help": "Write the servers' files for validation splits as well."}
    )
    json: bool = field(default=False, metadata={"help": "Print the content of results.json and the servers' files."})


def measure(args: EvaluationArguments) -> tuple[list[Evaluation], list[Path]]:
    """Encode the data of the protocols, rank it and write the results; several processes each encode a share.

    Returns:
        The evaluations, and the files written for test servers.

    Raises:
        ValueError: if the model, the protocol or the data do not exist, or the model does not support a method.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())
    methods = list(dict.fromkeys(map(method_named, args.methods)))
    model, processor = load_model(args.model, args.composition, args.dtype)
    model.to(state.device)
    settings = {"allow_missing": args.allow_missing, "check_counts": args.check_counts}
    protocols = [load_protocol(name, args.data_root, **settings) for name in args.protocols]
    store = EmbeddingStore(args.embeddings or Path(args.output_dir) / "embeddings")
    evaluations: list[Evaluation] = []
    submissions: list[Path] = []
    for method in methods:
        for benchmarks in protocols:
            for benchmark in benchmarks:
                if args.submissions or not benchmark.has_targets:
                    embeds = embed(model, processor, benchmark, method, args.batch_size, store=store)
                    folder = Path(args.output_dir) / "submissions" / method / benchmark.protocol.name
                    if state.is_main_process:
                        submissions += write_submissions(folder, benchmark, *embeds)
            measured = [
                evaluate(model, processor, b, method, args.batch_size, store=store)
                for b in benchmarks
                if b.has_targets
            ]
            evaluations += measured
            if len(measured) > 1 and metrics_named(measured[0].protocol["metrics"]).reports_average:
                evaluations.append(average(measured))
    if state.is_main_process:  # also without evaluations: states how the servers' files were made
        folder, digest = Path(args.output_dir), made_by(model, processor)["fingerprint"]
        cost = measured_costs(folder, digest) or costs(model, processor, protocols[0][0].queries)
        write(folder, evaluations, args, fingerprint=digest, cost=cost)
    return evaluations, submissions


def measured_costs(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return the costs in a folder's `results.json` if they are of the same model; None without."""
    with suppress(OSError, json.JSONDecodeError):
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return results.get("cost") if results.get("fingerprint") == fingerprint else None
    return None


def baselines(name: str, benchmarks: Sequence[CIRBenchmark]) -> list[Evaluation]:
    """Evaluate Image-only, Text-only and Image+Text by the pretrained dual encoder alone (paper, Tables 1-2)."""
    model, processor = load_model(name)
    return evaluate_all(model.to(PartialState().device), processor, benchmarks, ("image", "text", "image+text"))


def write(folder: Path, evaluations: list[Evaluation], args: EvaluationArguments, **facts: Any) -> None:
    """Write `results.json`, the values of every query beside it, and `results.md`."""
    arguments = {name: value for name, value in vars(args).items() if name != "json"}
    write_results(folder / "results.json", evaluations, arguments=arguments, **facts)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    cards = protocol_cards(evaluations, results["environment"])
    parts = [f"# {args.model}", results_tables(results["evaluations"]), "## How it was measured", cards]
    with whole(folder / "results.md") as partial:
        partial.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def summary(args: EvaluationArguments, evaluations: list[Evaluation], submissions: list[Path]) -> str:
    """Return the output of the command: tables, or the content of `results.json`."""
    folder = Path(args.output_dir)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    if args.json:
        return json.dumps({**results, "submissions": [str(file) for file in submissions]}, indent=2)
    parts = []
    if evaluations:
        tables = results_tables(results["evaluations"])
        parts += [f"# {args.model}", tables, f"See {folder / 'results.md'} for how it was measured."]
    if submissions:
        parts.append("\n".join(["check, then upload:", f"pvlf-hf submit lint {' '.join(map(str, submissions))}"]))
    return "\n\n".join(parts)


def main(command_line: Sequence[str] | None = None) -> None:
    """Run the command line of `pvlf-hf evaluate`."""
    kind: Any = EvaluationArguments
    parser = HfArgumentParser(
        kind,
        prog="pvlf-hf evaluate",
        description=__doc__,
        epilog="protocols:\n" + describe_protocols(),
        formatter_class=HelpFormatter,
    )
    (args,) = parse(parser, command_line)
    evaluations, submissions = measure(args)
    if PartialState().is_main_process:
        sys.stdout.write(summary(args, evaluations, submissions) + "\n")
    leave()


if __name__ == "__main__":
    main()
