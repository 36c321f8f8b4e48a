"""The arguments of a PVLF training run, with the paper's settings as defaults."""

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
    """[`~transformers.TrainingArguments`] for [`PVLFTrainer`].

    Sources: "paper" is PVLF (ACML 2024), "TransAgg" the released code of its baseline, which the paper follows where
    it is silent.

    > New here

    Args:
        finetuning (`str`, *optional*, defaults to `"both"`):
            Which encoders train besides fusion and aggregation (paper, Table 3): `"frozen"` none, `"text"` the text
            encoder, `"both"`. The paper's headline row is `"both"`. Of a model with a PEFT adapter only that trains.
        encoder_learning_rate (`float`, *optional*, defaults to 1e-6):
            Learning rate of the encoders' weights (TransAgg), but not of LoRA's, which start anew.
        min_lr_ratio (`float`, *optional*, defaults to 0.01):
            The cosine schedule of every group ends at this share of `learning_rate` (TransAgg's `eta_min`), but never
            above the group's own rate. With the defaults that floor is the encoders' rate, which stays constant.
        gather_negatives (`bool`, *optional*, defaults to `True`):
            With several processes, rank every query against the targets of all of them.
        batch_by (`str`, *optional*):
            A column of the training set, such as the category of a garment. Every batch then holds rows of one value
            of it, so that negatives are as alike as in a gallery of that kind (ours; the paper shuffles all rows).
        decay_norms_and_biases (`bool`, *optional*, defaults to `True`):
            Apply weight decay to every weight (TransAgg), instead of sparing norms, biases and prompts.
        feature_cache (`str`, *optional*):
            Folder where the outputs of encoders that do not train are computed once and kept, in float16, for all
            epochs and runs. Needs `finetuning` `"frozen"` or `"text"`; pictures must not be augmented.
        gradient_cache_chunk_size (`int`, *optional*):
            Rows encoded at once with what backward needs (gradient caching, ours): a batch of any size, with all its
            negatives and exact gradients, trains in about the memory of so many rows, for one more forward.
        loss_chunk_size (`int`, *optional*):
            Queries compared with all targets at once, where even the similarities of a batch are too many (ours).

    > Of the library's, for several processes and for repeating a run

    `ddp_timeout` (1800 s): a process that hangs ends the job after so long; one that dies ends it at once.
    `full_determinism` (False): the same bits again on the same GPUs, where they otherwise differ in rounding; slower.

    > Defaults that differ from `TrainingArguments`

    `learning_rate` 1e-4 (paper; was 5e-5), `weight_decay` 0.05 (paper's "decay rate"; was 0), `max_grad_norm` 5
    (TransAgg; was 1), `per_device_train_batch_size` 64 (paper; was 8), `num_train_epochs` 100 (TransAgg; was 3),
    `dataloader_drop_last` True (TransAgg: a short batch has fewer negatives), `remove_unused_columns` False (the
    collator makes the model's inputs from the dataset's columns), `per_device_eval_batch_size` 64,
    `lr_scheduler_type` cosine, the only one (TransAgg; was linear), `logging_steps` 10.
    """

    finetuning: str = field(
        default="both",
        metadata={
            "help": "Which encoders train: frozen, text or both (Table 3).",
            "choices": ["frozen", "text", "both"],
        },
    )
    encoder_learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate of the encoders (TransAgg)."})
    min_lr_ratio: float = field(
        default=0.01, metadata={"help": "Floor of the cosine schedule, as a share of learning_rate (TransAgg)."}
    )
    gather_negatives: bool = field(default=True, metadata={"help": "Use the targets of all processes as negatives."})
    batch_by: str | None = field(
        default=None, metadata={"help": "Column of which a batch holds one value, so that negatives are alike."}
    )
    decay_norms_and_biases: bool = field(
        default=True, metadata={"help": "Weight decay on every weight, as TransAgg, instead of matrices only."}
    )
    feature_cache: str | None = field(
        default=None, metadata={"help": "Folder to keep the outputs of frozen encoders in, shared between runs."}
    )
    gradient_cache_chunk_size: int | None = field(
        default=None, metadata={"help": "Rows encoded at once; the batch, its negatives and gradients stay whole."}
    )
    loss_chunk_size: int | None = field(
        default=None, metadata={"help": "Queries whose similarities with all targets are held at once."}
    )

    learning_rate: float = field(default=1e-4, metadata={"help": "Of fusion and aggregation (paper)."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay (paper)."})
    max_grad_norm: float = field(default=5.0, metadata={"help": "Gradient clipping (TransAgg)."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Triplets a step and device (paper)."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Queries or images encoded at once."})
    num_train_epochs: float = field(default=100, metadata={"help": "Epochs (TransAgg)."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Drop the last, shorter batch (TransAgg)."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep False: the collator reads the columns."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Only cosine, which ends at min_lr_ratio."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})

    def __post_init__(self, *args: Any, **kwargs: Any) -> None:
        refuse_unsupported(self)
        if not torch.accelerator.is_available():
            self.use_cpu = True  # the library refuses bf16 on a machine without accelerator until use_cpu is set
        super().__post_init__(*args, **kwargs)
        if self.use_cpu and dist.is_initialized():  # the library passes the timeout on for GPUs only
            _set_pg_timeout(timedelta(seconds=self.ddp_timeout))
        check_arguments(self)
        if self.use_cpu and self.mixed_precision == "bf16":
            warn_if_slow(torch.bfloat16)

    def settings(self) -> dict[str, Any]:
        """What matters for the outcome of a run, as `results.json` and the model card have it.

        The names are flags, all but `processes`; what is not among them had its default.
        """
        names = (
            "seed finetuning learning_rate encoder_learning_rate min_lr_ratio weight_decay max_grad_norm "
            "num_train_epochs max_steps batch_by per_device_train_batch_size gradient_accumulation_steps warmup_steps "
            "bf16 fp16 gather_negatives"
        )
        seldom = (
            "data_seed full_determinism decay_norms_and_biases dataloader_drop_last train_sampling_strategy "
            "feature_cache optim optim_args adam_beta1 adam_beta2 adam_epsilon tf32 torch_compile neftune_noise_alpha"
        )
        defaults = {f.name: f.default for f in fields(self)}
        changed = [name for name in seldom.split() if getattr(self, name) != defaults[name]]
        return {**{name: getattr(self, name) for name in (*names.split(), *changed)}, "processes": self.world_size}


__all__ = ["PVLFTrainingArguments"]
