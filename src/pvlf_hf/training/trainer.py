"""Trainer of PVLF: focal InfoNCE over the targets of all processes, the paper's optimiser, retrieval metrics."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import speed_metrics
from transformers.utils import logging

from ..data.benchmark import CIRBenchmark, check_columns
from ..data.streaming import triplet_batches
from ..data.triplets import TRIPLET_COLUMNS
from ..evaluation.scoring import evaluate
from ..models.image_processing_pvlf import opened
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalOutput, check_adapter
from .argument_contract import check_arguments, check_trainer_arguments
from .atomic_checkpoints import AtomicCheckpointsMixin, checkpoint_to_resume, holds_optimizer
from .batches import DistinctBatchSampler, OneValueBatchSampler, PVLFCollator
from .cpu_dropout import fast_cpu_dropout
from .cpu_memory import kept_memory
from .data_checks import check_batch_size, check_eval_dataset, check_train_dataset, describe_nonfinite_loss
from .feature_cache import FeatureCollator, accept_cached_features, cache_features
from .gather import GatherWithGradient
from .gradient_cache import embed_in_chunks
from .hub import HubMixin, has_adapter
from .negatives import MineNegatives, RowsWithNegatives, negative_columns, used_negatives
from .objectives import TEXT_ANCHORED, SampleCollator, keep_features, own_samples, sample_rows
from .optimization import METRIC_SCHEDULES, advance, check_optimizers, make_schedule, parameter_groups
from .text_anchored import accept_pairs
from .training_args import PVLFTrainingArguments

logger = logging.get_logger(__name__)


class PVLFTrainer(AtomicCheckpointsMixin, HubMixin, Trainer):
    """Trainer of a [`ComposedRetrievalModel`] on triplets.

    Args:
        model: the model; `args.finetuning` decides which of its encoders train. With an adapter (PEFT's
            `get_peft_model`) the adapter's configuration decides instead, and checkpoints hold the adapter alone.
        args: [`PVLFTrainingArguments`].
        train_dataset: rows with the columns of `pvlf_hf.data.triplets.TRIPLET_COLUMNS`, a `datasets.Dataset` or,
            for sets that do not fit on a disk, what [`stream_triplets`] returns (set `max_steps`). Or, without the
            images of triplets, what the model's own objective trains on, see `pvlf_hf.training.objectives.SAMPLES`:
            images, captions, or both.
        eval_dataset: a [`CIRBenchmark`], or a dictionary of them by name. Each evaluation ranks the real gallery; its
            metrics (`eval_recall@1`, ..., `eval_mean`) can select the best checkpoint (`metric_for_best_model`).
        processing_class: the [`PVLFProcessor`]; saved with every checkpoint.
        data_collator: makes a batch of rows; by default a [`PVLFCollator`].
        model_init: makes the model, in place of `model`: at every [`~PVLFTrainer.train`], from the seed, and for every
            trial of [`~PVLFTrainer.hyperparameter_search`].
        optimizers: an optimiser of the model's weights, and a schedule of it; either replaces the paper's.
        optimizer_cls_and_kwargs: class and further arguments of the optimiser, in place of `args.optim`; learning
            rates and weight decay come from `args`.
        kwargs: passed to [`~transformers.Trainer`]. `compute_loss_func`, `compute_metrics` and
            `preprocess_logits_for_metrics` are refused, see `pvlf_hf.training.argument_contract`.

    Raises:
        ValueError: if an argument is missing, of the wrong type, or would have no effect, the adapter is prompt
            learning, or a row of the training set has no caption or image.

    Gradient accumulation divides the mean loss as usual, but does not enlarge the set of negatives;
    `args.gradient_cache_chunk_size` lets a batch be as large as it should.
    """

    args: PVLFTrainingArguments
    loss_is_scaled_for_ga = False  # a mean over the batch: the Trainer divides it under accumulation

    def __init__(
        self,
        model: ComposedRetrievalModel | None = None,
        args: PVLFTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: CIRBenchmark | dict[str, CIRBenchmark] | None = None,
        processing_class: Any = None,
        data_collator: Callable | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, PVLFTrainingArguments):
            raise ValueError(
                f"args is {type(args).__name__}: pass PVLFTrainingArguments, which has the paper's settings as "
                "defaults, such as learning_rate 1e-4 and 100 epochs"
            )
        if processing_class is None:
            raise ValueError(
                "pass processing_class=processor: it makes batches of triplets and is saved with the model"
            )
        check_arguments(args)
        check_trainer_arguments(kwargs)
        samples = own_samples(model, train_dataset, args)
        check_train_dataset(train_dataset, args, samples.columns if samples else TRIPLET_COLUMNS)
        if samples:
            train_dataset = sample_rows(train_dataset, samples, args.batch_by)
            data_collator = data_collator or SampleCollator(processing_class, args.crop_scale, samples)
        train_dataset = used_negatives(model, train_dataset, args)
        self.rows_with_negatives: RowsWithNegatives | None = None
        if eval_dataset is not None:
            check_eval_dataset(eval_dataset, args.metric_for_best_model)
        if model is not None:
            set_finetuning(model, args)
        self._rate_names: list[str] = []
        self._rates: dict[str, float] = {}
        self._lacks_optimizer = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator or PVLFCollator(processing_class),
            **kwargs,
        )
        if self.is_fsdp_enabled:
            self._shard_by_layer()
        check_optimizers(self.model, args, self.optimizer, self.lr_scheduler, self.optimizer_cls_and_kwargs)
        if args.mine_every:
            self.add_callback(MineNegatives(self))

    def _shard_by_layer(self) -> None:
        """Make every layer a unit of FSDP, unless the configuration names units; Accelerate adds embeddings."""
        plugin, model = self.accelerator.state.fsdp_plugin, self.model
        if plugin.transformer_cls_names_to_wrap is None and model is not None:
            layers = {type(m).__name__ for m in model.modules() if isinstance(m, GradientCheckpointingLayer)}
            plugin.transformer_cls_names_to_wrap = sorted(layers)

    # ---- training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train the model, see the base class; first fill `args.feature_cache`, if one is named.

        A checkpoint of `save_only_model=True` has no optimiser: a run resumed from it warns, restarts the optimiser
        and continues the schedule at the checkpoint's step.

        Raises:
            OSError: if checkpoints or features cannot be written. Those written before are complete; the next run
                resumes from them.
        """
        if isinstance(self.data_collator, SampleCollator):
            self._keep_features()
        elif self.args.feature_cache and not isinstance(self.data_collator, FeatureCollator):
            self._cache_features()
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, Path(str(self.args.output_dir)))
        self._lacks_optimizer = checkpoint is not None and not holds_optimizer(Path(checkpoint))
        if self._lacks_optimizer and self.args.lr_scheduler_type in METRIC_SCHEDULES:
            raise ValueError(
                f"{checkpoint} holds no schedule (save_only_model), and one that follows a metric cannot be taken up "
                "without its history: train without resume_from_checkpoint"
            )
        if self._lacks_optimizer:
            logger.warning(
                f"{checkpoint} holds no optimiser (save_only_model): its moments start at zero again, so that the "
                "run differs from one that was not interrupted; the learning rate goes on at the checkpoint's step"
            )
        return super().train(checkpoint, *args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Train the final model, which `model_init` has made by now; on a CPU with faster dropout and kept memory."""
        model: Any = self.model
        if isinstance(self.data_collator, FeatureCollator):
            accept_cached_features(model)
        elif getattr(self.data_collator, "samples", None) is TEXT_ANCHORED:
            accept_pairs(model)
        cpu = self.args.device.type == "cpu"
        with fast_cpu_dropout(model) if cpu else nullcontext(), kept_memory(cpu and self.args.keeps_memory):
            return super()._inner_training_loop(*args, **kwargs)

    def _cache_features(self) -> None:
        """Replace images and captions by the features of the encoders that do not train."""
        if not isinstance(self.data_collator, PVLFCollator) or not isinstance(self.train_dataset, Dataset):
            raise ValueError(
                "feature_cache makes batches of a datasets.Dataset by itself: pass no data_collator and no other "
                "kind of dataset, or train without it"
            )
        model: Any = self.model
        processor: Any = self.processing_class
        folder: Any = self.args.feature_cache
        with self.compute_loss_context_manager():  # features as this run's own forward would give them
            self.train_dataset, self.data_collator = cache_features(
                model,
                processor,
                self.train_dataset,
                folder,
                self.args.per_device_eval_batch_size,
                progress=not self.args.disable_tqdm,
            )

    def _keep_features(self) -> None:
        """Compute what the model's own objective reads of frozen encoders, if an argument or the method wants it."""
        collator: Any = self.data_collator
        model: Any = self.model
        args, dataset = self.args, self.train_dataset
        if collator.features is None and (args.feature_cache or collator.samples.distils):
            folder = args.feature_cache or Path(str(args.output_dir)) / "features"
            with self.compute_loss_context_manager():
                self.train_dataset = keep_features(
                    model, collator, dataset, folder, args.per_device_eval_batch_size, not args.disable_tqdm
                )

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a model by `model_init` and choose which of its weights train."""
        model = super().call_model_init(trial)
        set_finetuning(model, self.args)
        return model

    def hyperparameter_search(
        self,
        hp_space: Callable | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Search for the arguments that give the best metric, see the base class; needs `model_init`.

        Args:
            hp_space: see the base class. Without it the library's, whose rates and epochs are not the paper's.
            compute_objective: the objective of a trial's metrics; by default `args.metric_for_best_model`.
            n_trials: number of trials.
            direction: `"maximize"` or `"minimize"`; by default as `args.greater_is_better` says.
            args: see the base class.
            kwargs: see the base class.

        Raises:
            ValueError: if there is neither `compute_objective` nor a metric, or no direction for an own objective.
        """
        metric = self.args.metric_for_best_model
        if compute_objective is None and metric is None:
            raise ValueError(
                "hyperparameter_search has no objective: name a metric in the arguments (metric_for_best_model="
                "'eval_recall@1') or pass compute_objective"
            )
        if compute_objective is None:
            name = f"eval_{str(metric).removeprefix('eval_')}"

            def compute_objective(metrics: dict[str, float]) -> float:
                return metrics[name]

            direction = direction or ("maximize" if self.args.greater_is_better else "minimize")
        if direction is None:
            raise ValueError("direction is missing: say whether compute_objective is to 'maximize' or 'minimize'")
        return super().hyperparameter_search(hp_space, compute_objective, n_trials, direction, *args, **kwargs)

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """Return the batches; a stream is read without Accelerate, which would split its shares once more."""
        check_arguments(self.args)  # again: a trial of hyperparameter_search changes them after __init__
        check_batch_size(self.train_dataset, self.args)
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        args = self.args
        return triplet_batches(
            self.train_dataset,
            self._train_batch_size,
            self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
        )

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader:
        """Build a data loader whose images are opened by [`opened`], with only the columns that our collator reads."""
        if type(self.data_collator) is PVLFCollator and isinstance(dataset, Dataset):
            kept = [*TRIPLET_COLUMNS, *(negative_columns(dataset) if self.args.hard_negatives else ())]
            dataset = dataset.select_columns(kept) if dataset.format["type"] != "custom" else dataset
        if self.args.hard_negatives:
            dataset = self.rows_with_negatives = RowsWithNegatives(dataset, self.args.hard_negatives)
        return super()._get_dataloader(opened(dataset), *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        column = self.args.batch_by or self.args.distinct_by
        if column is None:
            return super()._get_train_sampler(train_dataset)
        dataset: Any = self.train_dataset  # not the one whose images are opened: reading a column would open them all
        check_columns(dataset, (column,), f"train_dataset ({'batch_by' if self.args.batch_by else 'distinct_by'})")
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        rows_of_all_processes = self._train_batch_size * self.args.world_size
        sampler = OneValueBatchSampler if self.args.batch_by else DistinctBatchSampler
        return sampler(list(dataset[column]), rows_of_all_processes, seed)

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, ComposedRetrievalOutput]:
        """Return the loss of this process's queries against the targets of all processes, or the model's own loss.

        Averaged over processes, as DDP averages gradients, this is the loss of one process with the whole batch.
        """
        embedded = {k: v for k, v in inputs.items() if k != "target_ids"}
        if (size := self.args.gradient_cache_chunk_size) and model.training:
            outputs = embed_in_chunks(model, embedded, size, partial(self.accelerator.no_sync, model))
        else:
            outputs = model(**embedded, return_loss=isinstance(self.data_collator, SampleCollator))
        loss: Any = outputs.loss if outputs.target_embeds is None else self._contrast(model, outputs, inputs)
        if model.training and not loss.isfinite():
            problem = describe_nonfinite_loss(loss, outputs, inputs.get("target_ids"), self.train_dataset)
            raise ValueError(f"the loss of step {self.state.global_step + 1} is {problem}")
        return (loss, outputs) if return_outputs else loss

    def _contrast(self, model: nn.Module, outputs: Any, inputs: dict[str, Tensor]) -> Tensor:
        unwrapped: Any = self.accelerator.unwrap_model(model)
        queries, targets = unwrapped.loss_inputs(outputs)
        targets, options = self._gather_targets(len(queries), targets, inputs.get("target_ids"))
        if unwrapped.ranks_queries and options["positives"] is not None:
            options["all_query_embeds"] = GatherWithGradient.apply(queries)
        return unwrapped.loss(queries, targets, **options, chunk_size=self.args.loss_chunk_size)

    def _gather_targets(
        self, queries: int, targets: Tensor, target_ids: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Return the targets that queries are ranked against, their ids, and the positions of the positives.

        Args:
            queries: number of queries; their targets come first.
            targets: float32 `(targets, d)`, this process's.
            target_ids: int64 `(targets,)`, or None.
        """
        if not self.args.gather_negatives or self.accelerator.num_processes == 1:
            return targets, {"target_ids": target_ids, "positives": None}
        first = len(targets) * self.accelerator.process_index
        positives = torch.arange(first, first + queries, device=targets.device)
        target_ids = None if target_ids is None else self.accelerator.gather(target_ids)
        return GatherWithGradient.apply(targets), {"target_ids": target_ids, "positives": positives}

    # ---- optimisation ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimiser: encoders at `encoder_learning_rate`, all that is new at `learning_rate`."""
        if self.model_init is not None:  # a trial of hyperparameter_search may have changed args.finetuning
            set_finetuning(self.model, self.args)
        if self.optimizer is None:
            opt_model: Any = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(opt_model))
            groups, self._rate_names = parameter_groups(opt_model, self.args, decayed)
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, opt_model)
            if self.optimizer_cls_and_kwargs is not None:
                kind, settings = self.optimizer_cls_and_kwargs
            self.optimizer = kind(groups, **{"lr": self.args.learning_rate, **settings})
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Make the schedule of `lr_scheduler_type`, see [`~pvlf_hf.training.optimization.make_schedule`]."""
        if self.lr_scheduler is None:
            its_optimizer: Any = optimizer or self.optimizer
            self.lr_scheduler = make_schedule(its_optimizer, self.args, num_training_steps)
            self._created_lr_scheduler = True
            if self._lacks_optimizer:
                advance(self.lr_scheduler, self.state.global_step)
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take one training step, see the base class, and remember its learning rates for the log."""
        groups: Any = getattr(self.optimizer, "param_groups", [])
        self._rates = {name: group["lr"] for name, group in zip(self._rate_names, groups, strict=False)}
        return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log values, with the learning rates of fusion and encoders; the library logs that of an arbitrary group."""
        if "learning_rate" in logs and self._rates:
            del logs["learning_rate"]
            logs |= self._rates
        super().log(logs, start_time)

    # ---- evaluation ----

    def evaluate(  # type: ignore[override]  # ranks a benchmark, which is no Dataset
        self,
        eval_dataset: CIRBenchmark | dict[str, CIRBenchmark] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Rank the gallery of a benchmark for its queries.

        Args:
            eval_dataset: a benchmark, a dictionary of them, or the name of one of the trainer's own.
            ignore_keys: None; there are no outputs to ignore.
            metric_key_prefix: first part of the metrics' names.

        Returns:
            Fractions `{prefix}_recall@1` and so on, `{prefix}_runtime` in seconds and `{prefix}_samples_per_second`
            in queries; several benchmarks give `{prefix}_{name}_recall@1`.

        Raises:
            ValueError: if the benchmark does not exist, or it has no targets.
        """
        if ignore_keys is not None:
            raise ValueError("ignore_keys names outputs of a prediction loop, and evaluate() has none: leave it out")
        if isinstance(eval_dataset, str):
            own: Any = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if eval_dataset not in own:
                raise ValueError(f"eval_dataset={eval_dataset!r} is none of this trainer's benchmarks {list(own)}")
            eval_dataset = own[eval_dataset]
        benchmark: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        check_eval_dataset(benchmark)
        if isinstance(benchmark, dict):
            by_name = (self.evaluate(one, None, f"{metric_key_prefix}_{name}") for name, one in benchmark.items())
            return {name: value for metrics in by_name for name, value in metrics.items()}
        self._memory_tracker.start()
        metrics = self._evaluate_benchmark(benchmark, metric_key_prefix)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def _evaluate_benchmark(self, benchmark: CIRBenchmark, prefix: str) -> dict[str, float]:
        start = time.time()
        model: Any = self.model_wrapped if self.is_fsdp_enabled else self.model
        processor: Any = self.processing_class
        batch_size = self.args.per_device_eval_batch_size
        outcome = evaluate(model, processor, benchmark, batch_size=batch_size, progress=not self.args.disable_tqdm)
        metrics = {f"{prefix}_{name}": value for name, value in outcome.metrics.items()}
        metrics |= speed_metrics(prefix, start, num_samples=len(benchmark.queries))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Raise a `NotImplementedError`: a triplet has no label to predict."""
        raise NotImplementedError(
            "predict() has nothing to predict for triplets: rank a benchmark with evaluate(), or search with a Gallery"
        )


def set_finetuning(model: Any, args: PVLFTrainingArguments) -> None:
    """Choose which encoders of a model train, unless an adapter has chosen; refuse one that is prompt learning."""
    check_adapter(model)
    if not has_adapter(model):
        model.set_finetuning(args.finetuning)


__all__ = ["PVLFTrainer"]
