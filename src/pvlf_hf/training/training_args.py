"""Arguments of a training run, with the paper's settings as defaults."""

from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from transformers import TrainingArguments

from ..dtypes import warn_if_slow
from .argument_contract import check_arguments, refuse_unsupported


@dataclass
class PVLFTrainingArguments(TrainingArguments):
    """Arguments of [`PVLFTrainer`]: [`~transformers.TrainingArguments`] with the paper's settings as defaults.

    "Paper" is PVLF (ACML 2024). "TransAgg" is the released code of its baseline, which the paper follows where it is
    silent. `pvlf_hf.training.argument_contract` says of every argument of the library whether it is honoured; one that
    would have no effect is refused.

    > New arguments

    Args:
        finetuning (`str`, *optional*, defaults to `"both"`):
            Encoders that train besides fusion and aggregation (paper, Table 3): `"frozen"` none, `"text"` the text
            encoder, `"both"`. The paper's headline row is `"both"`. With a PEFT adapter only the adapter trains.
        encoder_learning_rate (`float`, *optional*, defaults to 1e-6):
            Learning rate of the encoders' weights (TransAgg), but not of LoRA's, which are not pretrained.
        min_lr_ratio (`float`, *optional*, defaults to 0.01):
            The cosine schedule of every group ends at this share of `learning_rate` (TransAgg's `eta_min`), but never
            above the group's own rate. With the defaults this floor is the encoders' rate, which stays constant.
        gather_negatives (`bool`, *optional*, defaults to `True`):
            Rank every query against the targets of all processes, not only of its own.
        batch_by (`str`, *optional*):
            Column of the training set, such as the category of a garment. Every batch then holds rows of one value
            of it, so that negatives are as alike as in a gallery of that category (our choice; the paper shuffles all
            rows).
        distinct_by (`str`, *optional*):
            Column of the training set, such as `key` or `target_id`, no value of which comes twice in a batch, so that
            no row's target is a right answer to another's query (our choice).
        hard_negatives (`int`, *optional*, defaults to 0):
            Further images a triplet, which all queries of the batch are compared with: the reference, images of the
            column `negatives`, and mined ones (our choice, after MegaPairs). Needs the column `reference_id`.
        mine_every (`int`, *optional*):
            Epochs between passes that rank the training targets for each query, to find its hard negatives.
        mine_threshold (`float`, *optional*, defaults to 0.95):
            Share of the own target's score above which a target is no hard negative, but may be right, too
            (NV-Retriever).
        crop_scale (`float`, *optional*, defaults to 1.0):
            Least share of an image's area in random crops, for objectives that train on single images (Pic2Word: 0.9);
            1 for no crops.
        decay_norms_and_biases (`bool`, *optional*, defaults to `True`):
            Apply weight decay to every weight (TransAgg), instead of sparing norms, biases and prompts.
        feature_cache (`str`, *optional*):
            Folder for the outputs of encoders that do not train: computed once, kept in float16 for all epochs and
            runs. Needs `finetuning` `"frozen"` or `"text"` and images that are not augmented.
        gradient_cache_chunk_size (`int`, *optional*):
            Rows encoded at once with the activations for backward (gradient caching, our choice). A batch of any size
            then trains with all its negatives and exact gradients in the memory of so many rows, for one more forward.
        loss_chunk_size (`int`, *optional*):
            Queries compared with all targets at once, where the similarities of a whole batch do not fit (our choice).
        keep_memory (`bool`, *optional*):
            On a CPU under glibc: keep what a step frees for the next one, instead of handing it back to the operating
            system each time. By default with `feature_cache`, whose steps this holds up most; the process is then
            somewhat larger, and is so until the training ends (our choice).

    > Arguments of the library for several processes and repeatable runs

    `ddp_timeout` (1800 s): a process that hangs ends the job after this time; one that dies ends it at once.
    `full_determinism` (False): bitwise reproducible on the same GPUs, whose runs otherwise differ in rounding; slower.

    > Defaults that differ from `TrainingArguments`

    `learning_rate` 1e-4 (paper; was 5e-5), `weight_decay` 0.05 (paper's "decay rate"; was 0), `max_grad_norm` 5
    (TransAgg; was 1), `per_device_train_batch_size` 64 (paper; was 8), `num_train_epochs` 100 (TransAgg; was 3),
    `dataloader_drop_last` True (TransAgg: a short batch has fewer negatives), `remove_unused_columns` False (the
    collator makes the model's inputs from the dataset's columns), `per_device_eval_batch_size` 64,
    `lr_scheduler_type` cosine with the floor `min_lr_ratio` (TransAgg; was linear), `logging_steps` 10.

    Raises:
        ValueError: if an argument, or a combination of them, is wrong or would have no effect.
    """

    finetuning: str = field(
        default="both",
        metadata={
            "help": "Encoders that train: frozen (none), text or both (Table 3).",
            "choices": ["frozen", "text", "both"],
        },
    )
    encoder_learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate of the encoders (TransAgg)."})
    min_lr_ratio: float = field(
        default=0.01, metadata={"help": "Floor of the cosine schedule, a share of learning_rate (TransAgg)."}
    )
    gather_negatives: bool = field(
        default=True, metadata={"help": "Rank queries against the targets of all processes."}
    )
    batch_by: str | None = field(
        default=None, metadata={"help": "Column: each batch holds rows of one of its values."}
    )
    distinct_by: str | None = field(
        default=None, metadata={"help": "Column: no batch holds one of its values twice (key, target_id, caption)."}
    )
    hard_negatives: int = field(
        default=0, metadata={"help": "Further images a triplet, as negatives: its reference, its own, mined ones."}
    )
    mine_every: int | None = field(default=None, metadata={"help": "Epochs between passes that mine hard negatives."})
    mine_threshold: float = field(
        default=0.95, metadata={"help": "Share of the own target's score that a mined negative may have."}
    )
    decay_norms_and_biases: bool = field(
        default=True, metadata={"help": "Weight decay on every weight (TransAgg), not on matrices only."}
    )
    crop_scale: float = field(
        default=1.0,
        metadata={"help": "Least share of the area in random crops of single images (Pic2Word: 0.9); 1: no crops."},
    )
    feature_cache: str | None = field(
        default=None, metadata={"help": "Folder for the outputs of frozen encoders, shared between runs."}
    )
    gradient_cache_chunk_size: int | None = field(
        default=None, metadata={"help": "Rows encoded at once; negatives and gradients stay those of the batch."}
    )
    loss_chunk_size: int | None = field(default=None, metadata={"help": "Queries compared with all targets at once."})
    keep_memory: bool | None = field(
        default=None,
        metadata={
            "help": "On a CPU: keep what a step frees for the next: faster, larger; default: with feature_cache."
        },
    )

    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of fusion and aggregation (paper)."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay (paper)."})
    max_grad_norm: float = field(default=5.0, metadata={"help": "Gradient clipping (TransAgg)."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Triplets per step and device (paper)."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Queries or images encoded at once."})
    num_train_epochs: float = field(default=100, metadata={"help": "Epochs (TransAgg)."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Drop the last, shorter batch (TransAgg)."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep False: the collator reads the columns."}
    )
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "cosine ends at min_lr_ratio (TransAgg); others are the library's."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})

    @property
    def keeps_memory(self) -> bool:
        """Whether memory is kept on a CPU."""
        return bool(self.feature_cache) if self.keep_memory is None else self.keep_memory

    def __post_init__(self, *args: Any, **kwargs: Any) -> None:
        refuse_unsupported(self)
        if not torch.accelerator.is_available():
            self.use_cpu = True  # the library refuses bf16 on a machine without accelerator until use_cpu is set
        super().__post_init__(*args, **kwargs)
        if self.use_cpu and dist.is_initialized():  # the library passes the timeout on for GPUs only
            _set_pg_timeout(timedelta(seconds=self.ddp_timeout))
        if self.mixed_precision in ("bf16", "fp16"):  # also set by `accelerate launch --mixed_precision`
            setattr(self, self.mixed_precision, True)
        check_arguments(self)
        if self.use_cpu and self.mixed_precision == "bf16":
            warn_if_slow(torch.bfloat16)

    def settings(self) -> dict[str, Any]:
        """Return the settings that a run's outcome depends on, as `results.json` and the model card state them.

        All names but `processes` are flags of `pvlf-hf train`. A setting that is missing had its default.
        """
        names = (
            "seed finetuning learning_rate encoder_learning_rate min_lr_ratio weight_decay max_grad_norm "
            "num_train_epochs max_steps batch_by per_device_train_batch_size gradient_accumulation_steps warmup_steps "
            "bf16 fp16 gather_negatives"
        )
        if_changed = (
            "data_seed full_determinism decay_norms_and_biases dataloader_drop_last train_sampling_strategy "
            "distinct_by hard_negatives mine_every mine_threshold crop_scale feature_cache lr_scheduler_type "
            "lr_scheduler_kwargs optim optim_args adam_beta1 adam_beta2 adam_epsilon tf32 torch_compile "
            "neftune_noise_alpha"
        )
        defaults = {f.name: f.default for f in fields(self)}
        changed = [name for name in if_changed.split() if getattr(self, name) != defaults[name]]
        return {**{name: getattr(self, name) for name in (*names.split(), *changed)}, "processes": self.world_size}


__all__ = ["PVLFTrainingArguments"]
