r"""Trains PVLF or another method from flags or a recipe, saves the model and evaluates it.

    # your own folder of images, a table of triplets, and the BLIP checkpoint that the paper uses
    pvlf-hf train --model Salesforce/blip-itm-base-coco --output_dir outputs/mine \
        --train_file triplets.csv --image_folder photos/ --validation_file held_out.csv

    # a recipe; flags after it override its lines
    pvlf-hf train train_scripts/configs/emoji.yaml --seed 1

    # a row of the paper's tables (train_scripts/reproduce.py does whole tables), on data sets kept in data/
    pvlf-hf train train_scripts/configs/paper/pvlf-blip-both-combined.yaml --data_root data \
        --evaluate_on cirr-val fashioniq

    # several GPUs
    accelerate launch --config_file train_scripts/accelerate/multi_gpu.yaml -m pvlf_hf.commands.train RECIPE

    # a method that needs no triplets, on your own images
    pvlf-hf train train_scripts/configs/methods/pic2word.yaml --train_file images.csv --image_folder photos/

The table (CSV, JSON Lines or Parquet) has the columns `reference`, `caption`, `target`; for textual inversion some of
`image`, `caption` and `concept`. After an interruption the same
command resumes from the last checkpoint in `--output_dir`. At the end this folder holds model, processor and
`results.json`, all of the last step. With `--metric_for_best_model`, `results.json` also names the checkpoint that is
best by this metric. Defaults are the paper's, or name their source.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, IterableDataset
from transformers import HfArgumentParser, set_seed

from ..checkpoints.golden import write_golden
from ..checkpoints.model_card import hub_name
from ..data.benchmark import CIRBenchmark
from ..data.emoji_cir.dataset import TIERS, load_emoji_cir, load_emoji_cir_train, load_emoji_samples
from ..data.laion_cir import SUBSETS, load_laion_cir
from ..data.protocols import load_protocol
from ..data.samples import load_samples
from ..data.streaming import load_hub_triplets, stream_triplets
from ..data.triplets import benchmark_from_triplets, load_triplets, triplets_digest
from ..evaluation.results import Evaluation, write_results
from ..evaluation.scoring import evaluate_all
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from ..training.atomic_checkpoints import last_checkpoint
from ..training.hub import has_adapter
from ..training.methods import METHODS
from ..training.objectives import SAMPLES, TEXT_ANCHORED, Samples
from ..training.trainer import PVLFTrainer
from ..training.training_args import PVLFTrainingArguments
from .arguments import HelpFormatter, leave, parse

LAION_CIR = {f"laion-cir-{subset}": subset for subset in SUBSETS}


@dataclass
class ModelArguments:
    """Arguments of the model. Settings that are not given keep the defaults of its configuration, the paper's."""

    model: str = field(
        default="Salesforce/blip-itm-base-coco",
        metadata={"help": "BLIP or CLIP checkpoint to build on: a name on the Hub or a folder."},
    )
    method: str = field(
        default="pvlf",
        metadata={
            "help": "pvlf, its baseline transagg (one shallow prompt, cross-entropy), case (BLIP alone), compodiff, "
            "tat (captions alone, for a plain dual encoder), or a method of textual inversion.",
            "choices": [*METHODS],
        },
    )
    num_prompts: int | None = field(default=None, metadata={"help": "Prompts per layer (paper: 25)."})
    prompt_depth: int | None = field(
        default=None, metadata={"help": "Layers with prompts of their own; 1 is PVLF-Shallow."}
    )
    prompt_init_std: float | None = field(
        default=None, metadata={"help": "Standard deviation of the initial prompts."}
    )
    prompt_location: str | None = field(
        default=None, metadata={"help": "Where prompts sit: fusion (PVLF), text (CoOp), vision (VPT), both or none."}
    )
    prompt_coupling: str | None = field(
        default=None, metadata={"help": "Of prompts in both encoders: independent, tied, or linear (MaPLe)."}
    )
    prompt_gallery: bool | None = field(
        default=None, metadata={"help": "Whether gallery images pass the image encoder with its prompts."}
    )
    num_vision_prompts: int | None = field(
        default=None, metadata={"help": "Prompts per layer of the image encoder, of independent prompts in both."}
    )
    composition: str | None = field(
        default=None, metadata={"help": "transagg, or sum: only prompts train (not in the fusion)."}
    )
    fusion_layers: int | None = field(default=None, metadata={"help": "Fusion Transformer layers (paper: 2)."})
    fusion_heads: int | None = field(
        default=None, metadata={"help": "Attention heads of a fusion layer (TransAgg: 8)."}
    )
    fusion_ffn_size: int | None = field(
        default=None, metadata={"help": "Feed-forward width of a fusion layer (TransAgg: 2048)."}
    )
    dropout: float | None = field(
        default=None, metadata={"help": "Dropout in fusion and aggregation (TransAgg: 0.5)."}
    )
    residual: str | None = field(
        default=None, metadata={"help": "pre_norm, or paper for equations 10-11 to the letter."}
    )
    gamma: float | None = field(
        default=None, metadata={"help": "Focusing exponent of the loss (paper: 2; 0: cross-entropy)."}
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Softmax temperature of the loss (paper: 0.01)."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of the fusion: sdpa, eager or flash_attention_2."}
    )
    settings: list[str] | None = field(
        default=None, metadata={"help": "Further settings of the method's configuration, such as mapping_width=1024."}
    )

    def build(self) -> tuple[ComposedRetrievalModel, ComposedRetrievalProcessor]:
        """Build the model on its pretrained dual encoder, with new weights beside it, and its processor.

        Raises:
            ValueError: if the method has no such setting.
        """
        return METHODS[self.method].make(self.method, self.model, self.given())

    def given(self) -> dict[str, Any]:
        """Return the settings that were given, under their names in the method's configuration."""
        flags = {k: v for k, v in vars(self).items() if k not in ("model", "method", "settings") and v is not None}
        return flags | read_settings(self.settings or [])


def read_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Read settings of the form `name=value`, values as in YAML where they are YAML (`placeholder=*` is not).

    Raises:
        ValueError: for one of another form.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--settings {setting!r}: write name=value, such as mapping_width=1024")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            values[name] = value
    return values


@dataclass
class DataArguments:
    """Arguments of the data that the model is trained and evaluated on."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "emoji-cir, or laion-cir-... in --data_root; leave it out to train on your own files.",
            "choices": ["emoji-cir", *LAION_CIR],
        },
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Table of your triplets: CSV, JSON Lines or Parquet."}
    )
    train_shards: str | None = field(
        default=None, metadata={"help": "Parquet or tar shards to stream: folder, pattern or URL (write_shards)."}
    )
    hub_dataset: str | None = field(
        default=None, metadata={"help": "Dataset on the Hub with the columns reference, caption and target."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Table of held-out triplets, evaluated during training."}
    )
    image_folder: str | None = field(default=None, metadata={"help": "Folder of the images that the tables name."})
    allow_links: bool = field(default=False, metadata={"help": "Follow links that lead out of --image_folder."})
    data_root: str | None = field(
        default=None, metadata={"help": "Folder of the published data sets: laion-cir/, cirr/, fashioniq/, circo/."}
    )
    validation: str | None = field(
        default=None,
        metadata={"help": "Protocol evaluated during training, such as cirr-val (pvlf_hf.data.protocols)."},
    )
    evaluate_on: list[str] | None = field(
        default=None, metadata={"help": "Protocols of the final evaluation (default: --validation)."}
    )
    allow_missing: bool = field(
        default=False,
        metadata={"help": "Leave out rows whose images are missing, with a message, instead of stopping."},
    )
    check_counts: bool = field(
        default=True, metadata={"help": "Stop if a data set does not have its published number of rows."}
    )

    def load(
        self, method: str = "pvlf"
    ) -> tuple[Dataset | IterableDataset, CIRBenchmark | dict[str, CIRBenchmark] | None]:
        """Load the training set, and the validation benchmark, or benchmarks by name if the protocol has several.

        Args:
            method: a method that has an objective of its own trains on samples, all others on triplets.

        Raises:
            ValueError: if arguments exclude each other, or none names triplets.
        """
        sources = [n for n in ("dataset", "train_file", "train_shards", "hub_dataset") if getattr(self, n)]
        if len(sources) > 1:
            raise ValueError(" and ".join(f"--{name}" for name in sources) + " exclude each other")
        if self.validation_file and (self.dataset or self.validation):
            raise ValueError("--validation_file excludes --dataset and --validation")
        samples = samples_of(method)
        rows = self._samples(samples.columns) if samples else self._training_triplets()
        return rows, self._validation()

    def _samples(self, columns: tuple[str, ...]) -> Dataset:
        if self.dataset == "emoji-cir":
            return load_emoji_samples()
        if self.train_file is None:
            raise ValueError(
                f"pass --train_file, a table with the columns {', '.join(columns)}, or --dataset emoji-cir: this "
                "method trains on no triplets"
            )
        return load_samples(self.train_file, columns, self.image_folder, allow_links=self.allow_links)

    def _training_triplets(self) -> Dataset | IterableDataset:
        if self.train_shards:
            return stream_triplets(self.train_shards)
        if self.hub_dataset:
            return load_hub_triplets(self.hub_dataset)
        if self.dataset == "emoji-cir":
            return load_emoji_cir_train()
        if self.dataset:
            if not self.data_root:
                raise ValueError(f"--dataset {self.dataset} needs --data_root, the folder that holds laion-cir/")
            root = Path(self.data_root) / "laion-cir"
            return load_laion_cir(root, LAION_CIR[self.dataset], self.allow_missing, self.check_counts)
        if not (self.train_file and self.image_folder):
            raise ValueError(
                "pass --train_file and --image_folder, or --dataset emoji-cir (or laion-cir-...), --train_shards or "
                "--hub_dataset"
            )
        return load_triplets(self.train_file, self.image_folder, allow_links=self.allow_links)

    def _validation(self) -> CIRBenchmark | dict[str, CIRBenchmark] | None:
        if self.validation:
            benchmarks = self.load_protocols([self.validation])
            return benchmarks[0] if len(benchmarks) == 1 else {b.name: b for b in benchmarks}
        if self.dataset == "emoji-cir":
            return load_emoji_cir("validation")
        if self.validation_file and self.image_folder:
            held_out = load_triplets(self.validation_file, self.image_folder, allow_links=self.allow_links)
            return benchmark_from_triplets(Path(self.validation_file).stem, held_out)
        return None

    def load_protocols(self, names: Sequence[str]) -> list[CIRBenchmark]:
        """Load the benchmarks of protocols from `data_root`."""
        return [
            benchmark
            for name in names
            for benchmark in load_protocol(
                name, self.data_root or ".", allow_missing=self.allow_missing, check_counts=self.check_counts
            )
        ]

    def final_benchmarks(self, validation: CIRBenchmark | dict[str, CIRBenchmark] | None) -> list[CIRBenchmark]:
        """Return the benchmarks of the final evaluation: `evaluate_on`, EmojiCIR's test tiers, or validation."""
        if self.evaluate_on:
            return self.load_protocols(self.evaluate_on)
        if self.dataset == "emoji-cir":
            return [load_emoji_cir("test", tier) for tier in TIERS]
        if isinstance(validation, dict):
            return list(validation.values())
        return [validation] if validation else []


def samples_of(method: str) -> Samples | None:
    """Return what a method trains on in place of triplets, or None."""
    return TEXT_ANCHORED if method == "tat" else SAMPLES.get(method)


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: PVLFTrainingArguments,
    benchmarks: list[CIRBenchmark] | None = None,
) -> list[Evaluation]:
    """Train from the last checkpoint or from scratch, save model and processor, evaluate, write `results.json`.

    Args:
        model_args: arguments of the model.
        data_args: arguments of the data.
        args: arguments of the training.
        benchmarks: benchmarks of the final evaluation; by default `data_args.final_benchmarks()`.

    Returns:
        The final evaluations.
    """
    folder = Path(str(args.output_dir))
    # First: an error in the data is raised before a model is downloaded.
    triplets, validation = data_args.load(model_args.method)
    set_seed(args.seed)
    model, processor = model_args.build()
    trainer = PVLFTrainer(model, args, triplets, validation, processing_class=processor)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or last_checkpoint(folder))
    adapted: Any = trainer.model
    if has_adapter(adapted):  # merged, so that a checkpoint is a model like any other
        trainer.model = adapted.merge_and_unload()
    trainer.save_model()
    benchmarks = data_args.final_benchmarks(validation) if benchmarks is None else benchmarks
    measured = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # in float32, as stored
    evaluations = evaluate_all(measured, processor, benchmarks)
    if trainer.is_world_process_zero():
        facts: dict[str, Any] = {"model": vars(model_args), "data": vars(data_args), "training": args.settings()}
        facts["base_model"] = hub_name(model_args.model)  # only here is it known whether the name is that of a folder
        if isinstance(triplets, Dataset) and samples_of(model_args.method) is None:
            facts["triplets"] = {"rows": len(triplets), "digest": triplets_digest(triplets)}
        if best := trainer.state.best_model_checkpoint:
            name, value = args.metric_for_best_model, trainer.state.best_metric
            facts["best"] = {"checkpoint": Path(best).name, "metric": name, "value": value}
        write_golden(folder)
        write_results(folder / "results.json", evaluations, **facts)  # last: it marks a finished run
    if args.push_to_hub:
        trainer.push_to_hub(results=folder / "results.json")
    return evaluations


def parse_arguments(command_line: list[str]) -> tuple[ModelArguments, DataArguments, PVLFTrainingArguments]:
    """Parse flags, or a YAML recipe and the flags after it, which override it.

    Raises:
        ValueError: if a flag or a line of the recipe is unknown; names file, line and key.
    """
    kinds: list[Any] = [ModelArguments, DataArguments, PVLFTrainingArguments]
    if command_line and command_line[0].endswith((".yaml", ".yml")):
        recipe = read_recipe(Path(command_line[0]), {f.name for kind in kinds for f in fields(kind) if f.init})
        command_line = [*recipe, *command_line[1:]]
    usage = "pvlf-hf train [RECIPE.yaml] [--FLAG VALUE ...]"  # all flags fill two screens
    parser = HfArgumentParser(
        kinds, prog="pvlf-hf train", usage=usage, description=__doc__, formatter_class=HelpFormatter
    )
    model_args, data_args, args = parse(parser, command_line)
    return model_args, data_args, args


def read_recipe(file: Path, known: set[str]) -> list[str]:
    """Return the lines of a YAML recipe as flags.

    A relative folder as `model` may be relative to any folder above the recipe.

    Args:
        file: the recipe.
        known: names of all flags.

    Raises:
        ValueError: if the file is no mapping, or a key is unknown.
    """
    text = file.read_text(encoding="utf-8")
    node = yaml.compose(text)
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{file}: a recipe has lines of the form `name: value`")
    for key, _ in node.value if node else []:
        if key.value not in known:
            close = get_close_matches(str(key.value), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ", see pvlf-hf train --help"
            raise ValueError(f"{file}, line {key.start_mark.line + 1}: unknown setting {key.value!r}{hint}")
    settings = yaml.safe_load(text) or {}
    if (model := settings.get("model")) and not Path(model).exists():
        folders = [folder / model for folder in file.resolve().parents if (folder / model).is_dir()]
        settings["model"] = str(folders[0]) if folders else model
    flags = []
    for name, value in settings.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
    return flags


def main(command_line: list[str] | None = None) -> None:
    """Run the command line of `pvlf-hf train`."""
    train(*parse_arguments(sys.argv[1:] if command_line is None else command_line))
    leave()


if __name__ == "__main__":
    main()
