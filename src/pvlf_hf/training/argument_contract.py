"""Contract with the library's Trainer: what [`PVLFTrainer`] honours of each argument, and what it refuses at once."""

from dataclasses import MISSING, fields
from enum import Enum
from typing import Any

from transformers import TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.trainer_utils import SaveStrategy

from ..models.interface_pvlf import FINETUNING
from .optimization import METRIC_SCHEDULES, try_schedule


class Status(Enum):
    """Treatment of an argument of the library."""

    HONOURED = "honoured"
    REFUSED = "refused unless it has its default"
    MEANINGLESS = "without meaning here"


HONOURED, REFUSED, MEANINGLESS = Status

_NO_PREDICTION_LOOP = "evaluate() ranks the gallery of a benchmark and has no loop over predictions and labels"
_NO_LABELS = "a triplet has no class labels"
_NO_PLAN = "is not supported: shard with fsdp and fsdp_config (train_scripts/accelerate/fsdp.yaml)"
_FOR_SCRIPTS = "the library's Trainer does not read it either; it is for scripts"

ARGUMENTS: dict[str, tuple[Status, str]] = {
    # The run
    "output_dir": (HONOURED, "the run's folder"),
    "num_train_epochs": (HONOURED, "length of the run"),
    "max_steps": (HONOURED, "length of the run"),
    "seed": (HONOURED, "seed of everything random"),
    "data_seed": (HONOURED, "seed of the order of rows"),
    "full_determinism": (HONOURED, "bitwise reproducible on the same device"),
    "use_cpu": (HONOURED, "set on machines without an accelerator"),
    "do_train": (MEANINGLESS, _FOR_SCRIPTS),
    "do_eval": (MEANINGLESS, _FOR_SCRIPTS),
    "do_predict": (MEANINGLESS, _FOR_SCRIPTS),
    "resume_from_checkpoint": (MEANINGLESS, f"{_FOR_SCRIPTS}: `pvlf-hf train` resumes from it"),
    "local_rank": (MEANINGLESS, "deprecated: the launcher's environment sets it"),
    # Batches
    "per_device_train_batch_size": (HONOURED, "triplets per step and device"),
    "gradient_accumulation_steps": (HONOURED, "batches per step; the negatives stay those of one batch"),
    "auto_find_batch_size": (
        REFUSED,
        "would silently halve the batch, and with it every query's negatives: set per_device_train_batch_size, "
        "with gradient_cache_chunk_size where memory is short",
    ),
    "train_sampling_strategy": (HONOURED, "'random' or 'sequential'"),
    "length_column_name": (MEANINGLESS, "read by the sampling strategies that are refused"),
    "remove_unused_columns": (REFUSED, "would drop the images before the collator reads them: leave it False"),
    "label_names": (REFUSED, f"names labels, but {_NO_LABELS}: leave it out"),
    "dataloader_drop_last": (HONOURED, "drops a shorter last batch"),
    "dataloader_num_workers": (HONOURED, "processes that load images"),
    "dataloader_pin_memory": (HONOURED, "by the data loader"),
    "dataloader_persistent_workers": (HONOURED, "by the data loader"),
    "dataloader_prefetch_factor": (HONOURED, "by the data loader"),
    "dataloader_multiprocessing_context": (HONOURED, "by the data loader"),
    "dataloader_in_order": (HONOURED, "by the data loader"),
    "accelerator_config": (HONOURED, "all but split_batches"),
    "ignore_data_skip": (HONOURED, "a resumed run starts its epoch again"),
    # Optimisation
    "learning_rate": (HONOURED, "rate of fusion and aggregation"),
    "lr_scheduler_type": (HONOURED, "'cosine' with a floor, or any type of the library"),
    "lr_scheduler_kwargs": (HONOURED, "where the type takes them"),
    "warmup_steps": (HONOURED, "where the type has a warm-up"),
    "optim": (HONOURED, "all but optimisers that group the weights themselves"),
    "optim_args": (HONOURED, "passed to the optimiser"),
    "optim_target_modules": (REFUSED, "is for GaLore and APOLLO, which are not supported: leave it out"),
    "weight_decay": (HONOURED, "of every weight, see decay_norms_and_biases"),
    "adam_beta1": (HONOURED, "by Adam's family"),
    "adam_beta2": (HONOURED, "by Adam's family"),
    "adam_epsilon": (HONOURED, "by Adam's family"),
    "max_grad_norm": (HONOURED, "gradient clipping"),
    "label_smoothing_factor": (
        REFUSED,
        f"smooths class labels, but {_NO_LABELS}: leave it at 0 (the model's gamma and temperature shape the loss)",
    ),
    "average_tokens_across_devices": (MEANINGLESS, "the loss is a mean over triplets, not over tokens"),
    "neftune_noise_alpha": (HONOURED, "where the text encoder trains"),
    # Precision, speed and memory
    "bf16": (HONOURED, "autocast"),
    "fp16": (HONOURED, "autocast, on GPUs"),
    "bf16_full_eval": (
        REFUSED,
        "is not supported: evaluate() embeds in the precision of training; measure bfloat16 with "
        "`pvlf-hf evaluate --dtype bfloat16`",
    ),
    "fp16_full_eval": (
        REFUSED,
        "is not supported: evaluate() embeds in the precision of training; measure float16 with "
        "`pvlf-hf evaluate --dtype float16`",
    ),
    "tf32": (HONOURED, "by PyTorch, on GPUs"),
    "activation_checkpointing": (HONOURED, "by encoders and fusion"),
    "activation_checkpointing_kwargs": (HONOURED, "by encoders and fusion"),
    "gradient_checkpointing": (HONOURED, "the old name of activation_checkpointing"),
    "gradient_checkpointing_kwargs": (HONOURED, "the old name of activation_checkpointing_kwargs"),
    "torch_compile": (HONOURED, "compiles the model's forward"),
    "torch_compile_backend": (HONOURED, "by torch.compile"),
    "torch_compile_mode": (HONOURED, "by torch.compile"),
    "torch_empty_cache_steps": (HONOURED, "steps between calls that empty the device's cache"),
    "use_liger_kernel": (REFUSED, "has no kernels for this model: leave it out"),
    "liger_kernel_config": (REFUSED, "has no kernels for this model: leave it out"),
    "use_cache": (MEANINGLESS, "the model does not generate"),
    # Logs
    "logging_strategy": (HONOURED, "when to log"),
    "logging_steps": (HONOURED, "when to log"),
    "logging_first_step": (HONOURED, "when to log"),
    "logging_nan_inf_filter": (MEANINGLESS, "a loss that is not finite ends the run with the triplets' names"),
    "log_on_each_node": (HONOURED, "which processes log"),
    "log_level": (HONOURED, "of the library's loggers"),
    "log_level_replica": (HONOURED, "of the library's loggers"),
    "disable_tqdm": (HONOURED, "of training and evaluation"),
    "report_to": (HONOURED, "integrations get losses and metrics"),
    "run_name": (HONOURED, "read by integrations"),
    "project": (HONOURED, "read by integrations"),
    "trackio_space_id": (HONOURED, "read by an integration"),
    "trackio_bucket_id": (HONOURED, "read by an integration"),
    "trackio_static_space_id": (HONOURED, "read by an integration"),
    "include_num_input_tokens_seen": (
        REFUSED,
        "would count pixels as tokens, because an image is this model's main input: leave it at 'no'",
    ),
    "skip_memory_metrics": (HONOURED, "memory of training and evaluation"),
    "debug": (HONOURED, "'underflow_overflow'"),
    # Evaluation
    "eval_strategy": (HONOURED, "when to evaluate"),
    "eval_steps": (HONOURED, "when to evaluate"),
    "eval_delay": (HONOURED, "when to evaluate"),
    "eval_on_start": (HONOURED, "when to evaluate"),
    "per_device_eval_batch_size": (HONOURED, "images or queries encoded at once"),
    "prediction_loss_only": (REFUSED, f"has no effect: {_NO_PREDICTION_LOOP}"),
    "eval_do_concat_batches": (REFUSED, f"has no effect: {_NO_PREDICTION_LOOP}"),
    "eval_use_gather_object": (REFUSED, f"has no effect: {_NO_PREDICTION_LOOP}"),
    "eval_accumulation_steps": (REFUSED, f"has no effect: {_NO_PREDICTION_LOOP}"),
    "include_for_metrics": (REFUSED, f"has no effect: {_NO_PREDICTION_LOOP}"),
    "batch_eval_metrics": (REFUSED, f"has no effect: {_NO_PREDICTION_LOOP}"),
    # Checkpoints
    "save_strategy": (HONOURED, "when to save"),
    "save_steps": (HONOURED, "when to save"),
    "save_total_limit": (HONOURED, "checkpoints that stay"),
    "save_only_model": (HONOURED, "a run resumed from it restarts the optimiser, with a warning"),
    "save_on_each_node": (
        REFUSED,
        "would save all but the weights on other nodes, because the library's save_pretrained writes on one process "
        "alone: give all nodes the same output_dir",
    ),
    "enable_jit_checkpoint": (HONOURED, "saves on SIGTERM"),
    "restore_callback_states_from_checkpoint": (HONOURED, "when a run is resumed"),
    "load_best_model_at_end": (HONOURED, "needs metric_for_best_model"),
    "metric_for_best_model": (HONOURED, "a metric of evaluate(), such as 'eval_recall@1'"),
    "greater_is_better": (HONOURED, "direction of metric_for_best_model"),
    # Hub
    "push_to_hub": (HONOURED, "after checking that the token may write"),
    "hub_token": (HONOURED, "token of every push"),
    "hub_private_repo": (HONOURED, "visibility of a new repository"),
    "hub_model_id": (HONOURED, "repository"),
    "hub_strategy": (HONOURED, "what is pushed, and when"),
    "hub_always_push": (HONOURED, "waits for a push under way"),
    "hub_revision": (HONOURED, "branch"),
    # Several devices
    "ddp_backend": (HONOURED, "by PyTorch"),
    "ddp_timeout": (HONOURED, "on CPUs as well as GPUs"),
    "ddp_find_unused_parameters": (HONOURED, "by PyTorch"),
    "ddp_bucket_cap_mb": (HONOURED, "by PyTorch"),
    "ddp_broadcast_buffers": (HONOURED, "by PyTorch"),
    "ddp_static_graph": (HONOURED, "by PyTorch"),
    "fsdp": (HONOURED, "by Accelerate, on GPUs"),
    "fsdp_config": (HONOURED, "by Accelerate, on GPUs"),
    "deepspeed": (REFUSED, _NO_PLAN),
    "parallelism_config": (REFUSED, _NO_PLAN),
}
"""Every field of [`~transformers.TrainingArguments`], its treatment, and the reason or the effect."""

TRAINER_ARGUMENTS: dict[str, str] = {
    "compute_loss_func": "the loss is the model's own (focal InfoNCE): override compute_loss in a subclass",
    "compute_metrics": f"{_NO_PREDICTION_LOOP}: add metrics in a callback's on_evaluate or override evaluate()",
    "preprocess_logits_for_metrics": f"{_NO_PREDICTION_LOOP}: leave it out",
}
"""Arguments of [`~transformers.Trainer`] that are refused, and why; the others are honoured."""


def refuse_unsupported(args: Any) -> None:
    """Raise a `ValueError` if an argument of the library that is refused differs from its default."""
    library = {f.name for f in fields(TrainingArguments)}
    for f in fields(args):
        status, reason = ARGUMENTS.get(f.name, (REFUSED, "is unknown to this version of pvlf_hf: leave it out"))
        if f.name not in library or status is not REFUSED:
            continue
        value, default = getattr(args, f.name), f.default if f.default_factory is MISSING else f.default_factory()
        if value != default and not (default == "no" and value is False):
            raise ValueError(f"{f.name}={value!r} {reason}")


def check_arguments(args: Any) -> None:
    """Check the arguments of a run, one by one and together.

    Args:
        args: [`PVLFTrainingArguments`], after `__post_init__`; the values may have changed since.

    Raises:
        ValueError: if an argument, or a combination of them, would have no effect or end the run later. The message
            names the argument and the fix.
    """
    refuse_unsupported(args)
    _check_own_arguments(args)
    _check_library_arguments(args)
    _check_combinations(args)
    try_schedule(args)


def check_trainer_arguments(given: dict[str, Any]) -> None:
    """Raise a `ValueError` if an argument of the library's Trainer is given that would have no effect."""
    for name, reason in TRAINER_ARGUMENTS.items():
        if given.get(name) is not None:
            raise ValueError(f"{name} is not supported: {reason}")


def _check_own_arguments(args: Any) -> None:
    if args.finetuning not in FINETUNING:
        raise ValueError(f"finetuning={args.finetuning!r}: choose 'frozen', 'text' or 'both'")
    if args.learning_rate <= 0 or args.encoder_learning_rate <= 0:
        raise ValueError(
            f"learning_rate={args.learning_rate} and encoder_learning_rate={args.encoder_learning_rate} must be "
            "positive; to leave encoders as they are, set finetuning='frozen' or 'text'"
        )
    if not 0 <= args.min_lr_ratio <= 1:
        raise ValueError(f"min_lr_ratio={args.min_lr_ratio} must be between 0 and 1, a share of learning_rate")
    if not 0 < args.crop_scale <= 1:
        raise ValueError(f"crop_scale={args.crop_scale} must be in (0, 1], a share of an image's area")
    if args.feature_cache and args.finetuning == "both":
        raise ValueError(
            "feature_cache keeps the outputs of encoders that do not train, but finetuning='both' trains them: choose "
            "'frozen' or 'text', or leave feature_cache out"
        )
    for name in ("gradient_cache_chunk_size", "loss_chunk_size"):
        if (size := getattr(args, name)) is not None and size < 1:
            raise ValueError(f"{name}={size} must be at least 1; leave it out to take a batch in one piece")


def _check_library_arguments(args: Any) -> None:
    if args.mixed_precision == "fp16" and args.device.type == "cpu":
        raise ValueError("fp16 has no effect on a CPU: use bf16, or train in float32")
    if args.deepspeed_plugin is not None:
        raise ValueError(f"deepspeed {_NO_PLAN}")
    if any(kind in args.optim.value for kind in ("galore", "apollo", "lomo")):
        raise ValueError(
            f"optim={args.optim.value!r} groups the weights itself, but encoders and fusion have learning rates of "
            "their own: choose another, such as 'adamw_torch'"
        )
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} groups rows by the length of a text, which "
            "triplets do not have: choose 'random' or 'sequential', or group rows by a column with batch_by"
        )
    if args.accelerator_config.split_batches:
        raise ValueError("accelerator_config: split_batches has no effect here, set per_device_train_batch_size")
    if DebugOption.TPU_METRICS_DEBUG in args.debug:
        raise ValueError("debug='tpu_metrics_debug' has no effect here: leave it out")


def _check_combinations(args: Any) -> None:
    needs_metric = args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST
    needs_metric |= args.lr_scheduler_type in METRIC_SCHEDULES
    metric = args.metric_for_best_model
    if metric in ("loss", "eval_loss") or (needs_metric and metric is None):
        raise ValueError(
            f"metric_for_best_model={metric!r}: evaluate() has no loss, name one of its metrics, such as "
            "'eval_recall@1'; load_best_model_at_end, save_strategy='best' and schedules that follow a metric need one"
        )
    if args.neftune_noise_alpha is not None and (args.finetuning == "frozen" or args.feature_cache):
        raise ValueError(
            "neftune_noise_alpha has no effect with finetuning='frozen' or feature_cache, where the text encoder does "
            "not run in train mode: leave it out, or set finetuning='text' without feature_cache"
        )
    _check_negatives(args)
    if args.batch_by is not None and args.train_sampling_strategy != "random":
        raise ValueError(
            f"batch_by={args.batch_by!r} draws batches at random: leave out train_sampling_strategy="
            f"{args.train_sampling_strategy!r} or batch_by"
        )


def _check_negatives(args: Any) -> None:
    if args.distinct_by is not None and (args.batch_by is not None or args.train_sampling_strategy != "random"):
        raise ValueError(
            f"distinct_by={args.distinct_by!r} draws batches at random: leave out batch_by and the strategy"
        )
    if args.hard_negatives < 0:
        raise ValueError(f"hard_negatives={args.hard_negatives}: set a number of images a triplet, or 0 for none")
    if args.mine_every is not None and (args.mine_every < 1 or not args.hard_negatives):
        raise ValueError(f"mine_every={args.mine_every} mines hard_negatives: set both to at least 1, or leave it out")
    if not 0 < args.mine_threshold <= 1:
        raise ValueError(f"mine_threshold={args.mine_threshold} must be above 0 and at most 1")
    if args.hard_negatives and args.gradient_cache_chunk_size:
        raise ValueError(
            "gradient_cache_chunk_size needs a target for each query: leave hard_negatives at 0, or it out"
        )
    if args.mine_every and args.dataloader_persistent_workers:
        raise ValueError("dataloader_persistent_workers would keep the negatives of the first epoch: leave it False")


__all__ = [
    "ARGUMENTS",
    "TRAINER_ARGUMENTS",
    "Status",
    "check_arguments",
    "check_trainer_arguments",
    "refuse_unsupported",
]
