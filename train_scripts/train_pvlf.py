"""Trains PVLF (or its baseline TransAgg) on EmojiCIR or on your own triplets, and evaluates it.

    # your own folder of images, a table of triplets, and the BLIP checkpoint that the paper uses
    python train_scripts/train_pvlf.py --model Salesforce/blip-itm-base-coco --output_dir outputs/mine \
        --train_file triplets.csv --image_folder photos/ --validation_file held_out.csv

    # a recipe; flags after it override its lines
    python train_scripts/train_pvlf.py train_scripts/configs/emoji.yaml --seed 1

    # several GPUs
    accelerate launch --config_file train_scripts/accelerate/multi_gpu.yaml train_scripts/train_pvlf.py RECIPE

The table (CSV, JSON Lines or Parquet) has columns `reference`, `caption`, `target`. Interrupted, the same command
resumes from the last checkpoint in `--output_dir`. The folder then holds model, processor and `results.json`.
"""

import json
import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from transformers import HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint

from pvlf_hf import (
    CIRBenchmark,
    Evaluation,
    PVLFModel,
    PVLFProcessor,
    PVLFTrainer,
    PVLFTrainingArguments,
    benchmark_from_triplets,
    evaluate,
    load_emoji_cir,
    load_emoji_cir_train,
    load_triplets,
    write_results,
)
from pvlf_hf.configuration_pvlf import TRANSAGG
from pvlf_hf.emoji_cir import TIERS
from pvlf_hf.evaluation import QueryMethod, encode_gallery


@dataclass
class ModelArguments:
    """What is trained. Settings of the model that are not given keep PVLFConfig's defaults (the paper's)."""

    model: str = field(
        default="Salesforce/blip-itm-base-coco",
        metadata={"help": "BLIP or CLIP checkpoint to build on, Hub name or folder."},
    )
    method: str = field(
        default="pvlf",
        metadata={
            "help": "pvlf, or the baseline transagg (one shallow prompt, cross-entropy).",
            "choices": ["pvlf", "transagg"],
        },
    )
    num_prompts: int | None = field(default=None, metadata={"help": "Prompts a layer (paper: 25)."})
    prompt_depth: int | None = field(default=None, metadata={"help": "Layers with own prompts; 1 is PVLF-Shallow."})
    prompt_init_std: float | None = field(default=None, metadata={"help": "Spread of the prompts at the start."})
    fusion_layers: int | None = field(default=None, metadata={"help": "Fusion Transformer layers (paper: 2)."})
    fusion_heads: int | None = field(default=None, metadata={"help": "Heads of a fusion layer (TransAgg: 8)."})
    fusion_ffn_size: int | None = field(default=None, metadata={"help": "Feed-forward width (TransAgg: 2048)."})
    dropout: float | None = field(default=None, metadata={"help": "In fusion and aggregation (TransAgg: 0.5)."})
    residual: str | None = field(default=None, metadata={"help": "pre_norm, or paper for equations 10-11 literally."})
    gamma: float | None = field(default=None, metadata={"help": "Focusing exponent (paper: 2; 0: cross-entropy)."})
    temperature: float | None = field(default=None, metadata={"help": "Softmax temperature (paper: 0.01)."})

    def build(self) -> PVLFModel:
        """The model on its pretrained dual encoder, fusion and aggregation fresh."""
        baseline = TRANSAGG if self.method == "transagg" else {}
        given = {k: v for k, v in vars(self).items() if k not in ("model", "method") and v is not None}
        return PVLFModel.from_vl_pretrained(self.model, **{**baseline, **given})


@dataclass
class DataArguments:
    """What it is trained and evaluated on."""

    dataset: str | None = field(
        default=None, metadata={"help": "emoji-cir; leave out to train on your own files.", "choices": ["emoji-cir"]}
    )
    train_file: str | None = field(default=None, metadata={"help": "CSV, JSONL or Parquet of your triplets."})
    validation_file: str | None = field(default=None, metadata={"help": "Likewise; evaluated while training."})
    image_folder: str | None = field(default=None, metadata={"help": "Where the images named in the files are."})

    def load(self) -> tuple[Dataset, CIRBenchmark | None]:
        """Training triplets and validation benchmark."""
        if self.dataset and (self.train_file or self.validation_file):
            raise ValueError("--dataset and --train_file or --validation_file exclude each other")
        if self.dataset == "emoji-cir":
            return load_emoji_cir_train(), load_emoji_cir("validation")
        if not (self.train_file and self.image_folder):
            raise ValueError("pass --train_file and --image_folder, or --dataset emoji-cir")
        train = load_triplets(self.train_file, self.image_folder)
        if not self.validation_file:
            return train, None
        held_out = load_triplets(self.validation_file, self.image_folder)
        return train, benchmark_from_triplets(Path(self.validation_file).stem, held_out)

    def final_benchmarks(self, validation: CIRBenchmark | None) -> list[CIRBenchmark]:
        """What the trained model is measured on: EmojiCIR's three test tiers, or the validation file."""
        if self.dataset == "emoji-cir":
            return [load_emoji_cir("test", tier) for tier in TIERS]
        return [validation] if validation else []


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: PVLFTrainingArguments,
    benchmarks: list[CIRBenchmark] | None = None,
) -> list[Evaluation]:
    """Trains (resuming where a checkpoint is found), saves model and processor, evaluates, writes `results.json`.

    Args:
        model_args: what is trained.
        data_args: on what.
        args: how.
        benchmarks: what the result is measured on; by default `data_args.final_benchmarks()`.
    """
    set_seed(args.seed)
    processor = PVLFProcessor.from_vl_pretrained(model_args.model)
    model = model_args.build()
    triplets, validation = data_args.load()
    trainer = PVLFTrainer(model, args, triplets, validation, processing_class=processor)
    checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or checkpoint)
    trainer.save_model()
    benchmarks = data_args.final_benchmarks(validation) if benchmarks is None else benchmarks
    evaluations = evaluate_all(trainer.model, processor, benchmarks)
    if trainer.is_world_process_zero():
        facts = {"model": vars(model_args), "data": vars(data_args), "training": run_settings(args)}
        write_results(Path(args.output_dir) / "results.json", evaluations, **facts)
    return evaluations


def evaluate_all(
    model: Any,
    processor: PVLFProcessor,
    benchmarks: list[CIRBenchmark],
    methods: tuple[QueryMethod, ...] = ("pvlf",),
) -> list[Evaluation]:
    """Evaluates on benchmarks by one or several methods, encoding a gallery that they share only once."""
    galleries: dict[str, Any] = {}
    evaluations = []
    for method, benchmark in product(methods, benchmarks):
        key = benchmark.gallery._fingerprint
        if key not in galleries:
            galleries[key] = encode_gallery(model, processor, benchmark.gallery)
        evaluations.append(evaluate(model, processor, benchmark, method, gallery_embeds=galleries[key]))
    return evaluations


def baselines(name: str, benchmarks: list[CIRBenchmark]) -> list[Evaluation]:
    """Image-only, Text-only and Image+Text by the pretrained dual encoder alone (Tables 1-2 of the paper)."""
    model, processor = PVLFModel.from_vl_pretrained(name), PVLFProcessor.from_vl_pretrained(name)
    return evaluate_all(model, processor, benchmarks, ("image", "text", "image+text"))


def run_settings(args: PVLFTrainingArguments) -> dict[str, Any]:
    """The settings of the run that matter for its outcome."""
    names = (
        "seed finetuning learning_rate encoder_learning_rate min_lr_ratio weight_decay max_grad_norm num_train_epochs "
        "max_steps batch_by per_device_train_batch_size gradient_accumulation_steps warmup_steps bf16 fp16 "
        "gather_negatives"
    )
    return {**{name: getattr(args, name) for name in names.split()}, "processes": args.world_size}


def parse_arguments(command_line: list[str]) -> tuple[ModelArguments, DataArguments, PVLFTrainingArguments]:
    """Flags, or a YAML recipe followed by flags that override it; a recipe's model folder is relative to the clone."""
    parser = HfArgumentParser((ModelArguments, DataArguments, PVLFTrainingArguments), description=__doc__)
    if command_line and command_line[0].endswith((".yaml", ".yml")):
        recipe = yaml.safe_load(Path(command_line[0]).read_text()) or {}
        given = {name: value for name, value in recipe.items() if value is not None}
        flags = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in given.items()]
        command_line = [*flags, *command_line[1:]]
    model_args, data_args, args = parser.parse_args_into_dataclasses(command_line)
    in_clone = Path(__file__).resolve().parents[1] / model_args.model
    if in_clone.is_dir() and not Path(model_args.model).exists():
        model_args.model = str(in_clone)
    return model_args, data_args, args


if __name__ == "__main__":
    train(*parse_arguments(sys.argv[1:]))
