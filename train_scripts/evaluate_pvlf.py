r"""Measures a model on named protocols: numbers with intervals, how each was measured, and files for the test servers.

    python train_scripts/evaluate_pvlf.py --model outputs/mine --output_dir outputs/mine/evaluation \
        --data_root data --protocols cirr-val fashioniq circo-val

    # the paper's baselines, by a pretrained dual encoder alone
    python train_scripts/evaluate_pvlf.py --model Salesforce/blip-itm-base-coco --methods image text image+text ...

    # several GPUs, each a share of the images
    torchrun --nproc_per_node 4 train_scripts/evaluate_pvlf.py ...

Writes `results.json`, `results_per_query.json`, `results.md`, and for test splits `submissions/`. Embeddings are kept:
with `--embeddings` of an earlier run, another protocol over the same pictures and captions takes seconds. The data
root has a folder for each data set, `cirr/`, `fashioniq/`, `circo/`.
"""

import json
import sys
from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModel, AutoProcessor, HfArgumentParser, set_seed

from pvlf_hf.benchmark import CIRBenchmark
from pvlf_hf.embedding_store import EmbeddingStore
from pvlf_hf.encoding import QUERY_METHODS, embed
from pvlf_hf.evaluation import Evaluation, average, evaluate, write_results
from pvlf_hf.model_card import results_tables
from pvlf_hf.modeling_pvlf import PVLFModel
from pvlf_hf.processing_pvlf import PVLFProcessor
from pvlf_hf.protocols import describe_protocols, load_protocol, protocol_card
from pvlf_hf.submission import write_circo_submission, write_cirr_submission
from pvlf_hf.whole_files import whole


@dataclass
class EvaluationArguments:
    """What is measured on what."""

    model: str = field(metadata={"help": "PVLF checkpoint, or BLIP or CLIP for baselines; Hub name or folder."})
    protocols: list[str] = field(metadata={"help": "One or several of the names below."})
    output_dir: str = field(metadata={"help": "Where results go; those of an earlier run are overwritten."})
    data_root: str = field(default="data", metadata={"help": "Has a folder for each data set."})
    methods: list[str] = field(
        default_factory=lambda: ["pvlf"],
        metadata={"help": "How queries are embedded: by the model, or a baseline.", "choices": [*QUERY_METHODS]},
    )
    embeddings: str | None = field(
        default=None, metadata={"help": "Folder that keeps embeddings (default: embeddings in --output_dir)."}
    )
    batch_size: int = field(default=64, metadata={"help": "Images encoded at once in each process."})
    allow_missing: bool = field(
        default=False, metadata={"help": "Leave out pictures without a file, and say so in the results."}
    )
    check_counts: bool = field(default=True, metadata={"help": "Insist on the published numbers of queries."})
    submissions: bool = field(
        default=False, metadata={"help": "Write files as for the servers for validation splits, too."}
    )


def main(command_line: list[str] | None = None) -> None:
    """Loads, encodes, ranks, writes."""
    parser = HfArgumentParser(
        EvaluationArguments,
        description=__doc__,
        epilog="protocols:\n" + describe_protocols(),
        formatter_class=RawDescriptionHelpFormatter,
    )
    (args,) = parser.parse_args_into_dataclasses(command_line)
    state = PartialState(cpu=not torch.accelerator.is_available())
    model, processor = load_model(args)
    model.to(state.device)
    settings = {"allow_missing": args.allow_missing, "check_counts": args.check_counts}
    protocols = [load_protocol(name, args.data_root, **settings) for name in args.protocols]
    store = EmbeddingStore(args.embeddings or Path(args.output_dir) / "embeddings")
    evaluations = []
    for method in args.methods:
        options = {"method": method, "batch_size": args.batch_size, "store": store}
        for benchmarks in protocols:
            for benchmark in benchmarks:
                if args.submissions or not benchmark.has_targets:
                    write_submission(args, benchmark, *embed(model, processor, benchmark, **options), method)
            measured = [evaluate(model, processor, b, **options) for b in benchmarks if b.has_targets]
            evaluations += measured
            if len(measured) > 1 and measured[0].protocol["metrics"] == "fashioniq":
                evaluations.append(average(measured))
    if state.is_main_process:  # also without labels: files for a server are of these arguments and this environment
        write(Path(args.output_dir), evaluations, vars(args))
    state.destroy_process_group()


def load_model(args: EvaluationArguments) -> tuple[PVLFModel, PVLFProcessor]:
    """A PVLF model with its processor, or a dual encoder dressed as one for the baselines."""
    if AutoConfig.from_pretrained(args.model).model_type == "pvlf":
        return AutoModel.from_pretrained(args.model), AutoProcessor.from_pretrained(args.model)
    if "pvlf" in args.methods:
        raise ValueError(f"{args.model} is no PVLF checkpoint; measure it with --methods image text image+text")
    set_seed(0)  # kept embeddings are of one model: its fusion, random and unused here, must be the same every time
    return PVLFModel.from_vl_pretrained(args.model), PVLFProcessor.from_vl_pretrained(args.model)


def write_submission(
    args: EvaluationArguments, benchmark: CIRBenchmark, queries: torch.Tensor, gallery: torch.Tensor, method: str
) -> None:
    """Writes the server's files for one benchmark, if it has a server."""
    writers = {"cirr": write_cirr_submission, "circo": write_circo_submission}
    if PartialState().is_main_process and benchmark.protocol.metrics in writers:
        folder = Path(args.output_dir) / "submissions" / method / benchmark.protocol.name
        writers[benchmark.protocol.metrics](folder, benchmark, queries, gallery)
        print(f"check with `python -m pvlf_hf.submission lint {folder}/*.json`, then upload")


def write(folder: Path, evaluations: list[Evaluation], arguments: dict[str, Any]) -> None:
    """`results.json`, the values of every query beside it, and `results.md`."""
    write_results(folder / "results.json", evaluations, arguments=arguments)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    cards = {e.benchmark + e.protocol["name"]: protocol_card(e, results["environment"]) for e in evaluations}
    parts = [
        f"# {arguments['model']}",
        results_tables(results["evaluations"]),
        "## How it was measured",
        *cards.values(),
    ]
    with whole(folder / "results.md") as partial:
        partial.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print("\n\n".join(parts[: -len(cards) - 1]))
    print(f"\nSee {folder / 'results.md'} for how it was measured.")


if __name__ == "__main__":
    main(sys.argv[1:])
