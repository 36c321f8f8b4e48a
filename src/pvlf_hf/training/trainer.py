"""HF Trainer for PVLF: focal InfoNCE over the batch of all processes, the paper's optimiser, retrieval metrics."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset, IterableDataset
from huggingface_hub import auth_check
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from ..atomic_files import cannot_write
from ..checkpoints.model_card import write_card
from ..data.benchmark import CIRBenchmark, check_columns
from ..data.streaming import triplet_batches
from ..data.triplets import TRIPLET_COLUMNS
from ..digests import id_number
from ..evaluation.results import environment
from ..evaluation.scoring import evaluate
from ..models.image_processing_pvlf import opened
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalOutput
from .batches import OneValueBatchSampler, PVLFCollator
from .cpu_dropout import fast_cpu_dropout
from .feature_cache import FeatureCollator, cache_features
from .gradient_cache import embed_in_chunks
from .training_args import PVLFTrainingArguments

UNFINISHED = "_unfinished"
"""What is being written to a run's folder; the Trainer pushes no file whose name begins so."""


class PVLFTrainer(Trainer):
    """Trains a [`ComposedRetrievalModel`] on triplets.

    Args:
        model: the model; `args.finetuning` decides which of its encoders train. With an adapter (PEFT's
            `get_peft_model`) the adapter's configuration decides instead, and checkpoints hold the adapter alone.
        args: [`PVLFTrainingArguments`].
        train_dataset: rows with the columns of `pvlf_hf.data.triplets.TRIPLET_COLUMNS`, a `datasets.Dataset` or,
            for sets that do not fit, what [`stream_triplets`] returns (set `max_steps`).
        eval_dataset: a [`CIRBenchmark`], or a dictionary of them by name. Each evaluation ranks the real gallery; its
            metrics (`eval_recall@1`, ..., `eval_mean`) can select the best checkpoint (`metric_for_best_model`).
        processing_class: the [`PVLFProcessor`]; saved with every checkpoint.
        kwargs: passed to [`~transformers.Trainer`].

    Raises:
        ValueError: if the processor or a column is missing.

    Gradient accumulation divides the mean loss as usual, but does not enlarge the set of negatives;
    `args.gradient_cache_chunk_size` lets a batch be as large as it should.
    """

    args: PVLFTrainingArguments
    loss_is_scaled_for_ga = False  # a mean over the batch: the Trainer divides it under accumulation
    _is_saving_checkpoint = False

    def __init__(
        self,
        model: ComposedRetrievalModel,
        args: PVLFTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: CIRBenchmark | dict[str, CIRBenchmark] | None = None,
        processing_class: Any = None,
        data_collator: Callable | None = None,
        **kwargs: Any,
    ) -> None:
        if processing_class is None:
            raise ValueError(
                "pass processing_class=processor: it makes batches of triplets and is saved with the model"
            )
        if getattr(train_dataset, "column_names", None) is not None:
            check_columns(train_dataset, TRIPLET_COLUMNS, "train_dataset")
            rows = args.train_batch_size * args.world_size
            is_stream = isinstance(train_dataset, IterableDataset)
            if is_stream and args.batch_by is not None:
                raise ValueError(f"batch_by={args.batch_by!r} needs all rows at once, but train_dataset is a stream")
            if not is_stream and args.dataloader_drop_last and len(train_dataset) < rows:
                raise ValueError(
                    f"train_dataset has {len(train_dataset)} rows, a step takes {rows} and shorter batches are "
                    "dropped: lower per_device_train_batch_size"
                )
        if not has_adapter(model):
            model.set_finetuning(args.finetuning)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator or PVLFCollator(processing_class),
            **kwargs,
        )
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap is None:
            # Every layer is a unit. Embeddings, which a device map must not cut either, Accelerate wraps by itself.
            layers = {
                type(module).__name__ for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
            }
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(layers)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains, see the base class; first fills `args.feature_cache` where one is named.

        Raises:
            OSError: if checkpoints or features cannot be written; those that were are whole, and the next run goes on.
        """
        if self.args.feature_cache and not isinstance(self.data_collator, FeatureCollator):
            if not isinstance(self.data_collator, PVLFCollator) or not isinstance(self.train_dataset, Dataset):
                raise ValueError(
                    "feature_cache makes batches of a datasets.Dataset by itself: pass no data_collator and no other "
                    "kind of dataset, or train without it"
                )
            model: Any = self.model
            processor: Any = self.processing_class
            with self.compute_loss_context_manager():  # features as this run's own forward would give them
                self.train_dataset, self.data_collator = cache_features(
                    model,
                    processor,
                    self.train_dataset,
                    self.args.feature_cache,
                    self.args.per_device_eval_batch_size,
                    progress=not self.args.disable_tqdm,
                )
        if self.args.save_strategy != "no":
            with self._unfinished(Path(str(self.args.output_dir))):
                pass  # a folder that cannot be written to is said now, not at the first checkpoint
        on_cpu = self.args.device.type == "cpu"
        trained: Any = self.model
        with fast_cpu_dropout(trained) if on_cpu else nullcontext():
            return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Streams (`datasets.IterableDataset`) are read without Accelerate, which would split the shares once more."""
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        workers = self.args.dataloader_num_workers
        return triplet_batches(self.train_dataset, self._train_batch_size, self.data_collator, num_workers=workers)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader:
        """Opens images by this package's own opener, see [`opened`]; only those that a collator of ours reads."""
        if type(self.data_collator) is PVLFCollator and isinstance(dataset, Dataset):
            dataset = dataset.select_columns(list(TRIPLET_COLUMNS)) if dataset.format["type"] != "custom" else dataset
        return super()._get_dataloader(opened(dataset), *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.batch_by is None:
            return super()._get_train_sampler(train_dataset)
        dataset: Any = self.train_dataset  # not the one with opened images: all of them would be opened for a column
        check_columns(dataset, (self.args.batch_by,), "train_dataset (batch_by)")
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        rows_of_all_processes = self._train_batch_size * self.args.world_size
        return OneValueBatchSampler(list(dataset[self.args.batch_by]), rows_of_all_processes, seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, ComposedRetrievalOutput]:
        """Focal InfoNCE of this process's queries against the targets of all processes.

        Averaged over processes, as DDP averages gradients, this is the loss of one process with the whole batch.
        """
        target_ids = inputs.get("target_ids")
        embedded = {k: v for k, v in inputs.items() if k != "target_ids"}
        if (size := self.args.gradient_cache_chunk_size) and model.training:
            outputs = embed_in_chunks(model, embedded, size, partial(self.accelerator.no_sync, model))
        else:
            outputs = model(**embedded, return_loss=False)
        queries: Any = outputs.query_embeds
        targets: Any = outputs.target_embeds
        positives = None
        if self.args.gather_negatives and self.accelerator.num_processes > 1:
            positives = (
                torch.arange(len(queries), device=queries.device) + len(queries) * self.accelerator.process_index
            )
            targets = GatherWithGradient.apply(targets)
            target_ids = None if target_ids is None else self.accelerator.gather(target_ids)
        unwrapped: Any = self.accelerator.unwrap_model(model)
        loss = unwrapped.loss(
            queries, targets, positives=positives, target_ids=target_ids, chunk_size=self.args.loss_chunk_size
        )
        if model.training and not loss.isfinite():
            self._refuse(loss, outputs, inputs.get("target_ids"))
        return (loss, outputs) if return_outputs else loss

    def _refuse(self, loss: Tensor, outputs: ComposedRetrievalOutput, target_ids: Tensor | None) -> None:
        """Raises a `ValueError` with the triplets that a loss that is not finite comes from."""
        embeds: list[Any] = [outputs.query_embeds, outputs.target_embeds]
        bad = ~torch.stack([rows.isfinite().all(dim=1) for rows in embeds]).all(dim=0)
        names: dict[int, str] = {}
        if isinstance(self.train_dataset, Dataset):  # a stream cannot be asked for its ids again
            names = {id_number(str(name)): str(name) for name in self.train_dataset["target_id"][:]}
        numbers = [] if target_ids is None else target_ids[bad].tolist()
        ids = [names.get(number, number) for number in numbers]
        found = int(bad.sum())
        if found == len(bad):
            advice = (
                "all of them, so the weights are to blame: go on from the last checkpoint, with a lower learning rate"
            )
        elif found:
            advice = "look at their pictures and captions"
        else:
            advice = "they come from another process, which names them, or from the temperature"
        raise ValueError(
            f"the loss of step {self.state.global_step + 1} is {loss.item()}: {found} of {len(bad)} triplets of the "
            f"batch have embeddings that are not finite, with target_id {ids}; {advice}"
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing where all steps are done: the library makes one more when a complete run is started again."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial: Any = None) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder, UNFINISHED)) if self._is_saving_checkpoint else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Writes `checkpoint-N` elsewhere and renames it when all processes have written their part of it.

        The library writes it in place: killed on the way, it leaves a checkpoint that lacks something, and takes it
        for the last one when it resumes.
        """
        run, name = Path(super()._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._is_saving_checkpoint = True
        try:
            with self._unfinished(run) as folder:
                self.accelerator.wait_for_everyone()  # now it is empty
                super()._save_checkpoint(model, trial)
                best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
                if best.name == name or best.exists():
                    self.state.best_model_checkpoint = str(best)  # where it will be, not where it is being written
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self.state.save_to_json(str(folder / name / TRAINER_STATE_NAME))
                    if (run / name).exists():
                        (run / name).replace(folder / "replaced")
                    (folder / name).replace(run / name)
                    for old in self._superfluous_checkpoints(run):
                        old.replace(folder / old.name)  # deleted with it: a kill leaves no half of one either
                self.accelerator.wait_for_everyone()
        finally:
            self._is_saving_checkpoint = False
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        """Deletes what the library would, all checkpoints but the best if one may stay; a kill leaves no half."""
        best, run = self.state.best_model_checkpoint, Path(self._get_output_dir(trial))
        if best is not None and self.args.save_total_limit == 1:
            with self._unfinished(run) as folder:
                for old in map(Path, sort_checkpoints(str(run)) if self.args.should_save else []):
                    if not old.samefile(best):
                        old.replace(folder / old.name)
        return super()._finalize_training(trial, *args, **kwargs)

    def _superfluous_checkpoints(self, run: Path) -> list[Path]:
        """All but the last `save_total_limit`, the best and the last."""
        limit, best = self.args.save_total_limit or 0, self.state.best_model_checkpoint
        if limit <= 0:
            return []
        oldest_first = sort_checkpoints(str(run), use_mtime=True, best_model_checkpoint=best)
        protected = {oldest_first[-1], best or oldest_first[-1]}
        return list(map(Path, oldest_first[: -max(limit, len(protected))]))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._is_saving_checkpoint:  # only what is whole is pushed
            return
        if self.args.hub_always_push:  # a push that is under way reads the files that this one is about to replace
            self._finish_current_push()
        super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Writes elsewhere and moves file by file, weights last: a folder with weights is a whole model."""
        if self._is_saving_checkpoint or not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        final = Path(output_dir or str(self.args.output_dir))
        with self._unfinished(final) as folder:
            super()._save(str(folder), state_dict)
            for file in sorted(folder.iterdir(), key=lambda file: file.suffix == ".safetensors"):
                if file.name != "README.md" or not (final / file.name).exists():  # PEFT's; ours is its author's
                    file.replace(final / file.name)

    @contextmanager
    def _unfinished(self, folder: Path) -> Iterator[Path]:
        """A folder inside `folder` to write in, empty at first and gone at the end."""
        place = folder / UNFINISHED
        try:
            if self.args.should_save:
                shutil.rmtree(place, ignore_errors=True)  # what a kill left
                place.mkdir(parents=True)
            yield place
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            raise cannot_write(f"in {folder}", error) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(place, ignore_errors=True)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Groups: the encoders' own weights at `encoder_learning_rate`, all that is new at `learning_rate`."""
        if self.optimizer is None:
            opt_model: Any = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(opt_model))
            groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
            for name, parameter in opt_model.named_parameters():
                if parameter.requires_grad:
                    decays = self.args.decay_norms_and_biases or (name in decayed and not name.endswith("prompts"))
                    is_encoder = "backbone." in name and "lora_" not in name  # LoRA starts from nothing, as the fusion
                    groups.setdefault((is_encoder, decays), []).append(parameter)
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, opt_model)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": self.args.encoder_learning_rate if encoder else self.args.learning_rate,
                        "weight_decay": self.args.weight_decay if decays else 0.0,
                    }
                    for (encoder, decays), parameters in groups.items()
                ],
                **settings,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """A cosine for every group, down to `min_lr_ratio * learning_rate` or its own rate if that is lower."""
        if self.lr_scheduler is None:
            its_optimizer: Any = optimizer or self.optimizer
            floor = self.args.min_lr_ratio * self.args.learning_rate
            warmup = self.args.get_warmup_steps(num_training_steps)
            factors: list[Callable[[int], float]] = [
                partial(_cosine_factor, warmup=warmup, total=num_training_steps, floor=min(1.0, floor / group["lr"]))
                for group in its_optimizer.param_groups
            ]
            self.lr_scheduler = LambdaLR(its_optimizer, factors)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def evaluate(  # type: ignore[override]  # ranks a benchmark, which is no Dataset
        self,
        eval_dataset: CIRBenchmark | dict[str, CIRBenchmark] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Ranks the gallery of a benchmark for its queries.

        Returns:
            fractions, `{prefix}_recall@1` and so on; several benchmarks give `{prefix}_{name}_recall@1`.
        """
        benchmark: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(benchmark, dict):
            metrics: dict[str, float] = {}
            for name, one in benchmark.items():
                metrics |= self.evaluate(one, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if not isinstance(benchmark, CIRBenchmark):
            raise ValueError(f"eval_dataset must be a CIRBenchmark or a dict of them, got {type(benchmark).__name__}")
        model: Any = self.model_wrapped if self.is_fsdp_enabled else self.model
        processor: Any = self.processing_class
        batch_size = self.args.per_device_eval_batch_size
        outcome = evaluate(model, processor, benchmark, batch_size=batch_size, progress=not self.args.disable_tqdm)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in outcome.metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes sure of the Hub repository before the first step; pushes in training would fail unseen.

        Raises:
            ValueError: if the token may not write there.
        """
        try:
            super().init_hf_repo(token, private)
            if self.is_world_process_zero():
                repository: Any = self.hub_model_id
                auth_check(repository, token=token or self.args.hub_token, write=True)
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403):
                raise
            name = self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).name
            raise ValueError(
                f"this token may not write to {name} on the Hub: log in with one that may (`hf auth login`) or name a "
                f"repository of yours as hub_model_id. The Hub says: {error.server_message}"
            ) from error

    def create_model_card(  # type: ignore[override]  # of the library's arguments, those that are metadata
        self, results: str | Path | Mapping[str, Any] | None = None, model_name: str | None = None, **metadata: Any
    ) -> None:
        """Writes `README.md` in the output folder, see [`~pvlf_hf.checkpoints.model_card.write_card`].

        [`~transformers.Trainer.push_to_hub`] calls it with its own further arguments:
        `trainer.push_to_hub(results="results.json", license="apache-2.0")`.

        Args:
            results: what was measured, a file of [`write_results`] or its content. Nothing is looked for elsewhere: a
                file of an earlier run is not about these weights. Without it the card says that nothing was measured.
            model_name: name of the model where it has none on the Hub.
            metadata: more of [`~huggingface_hub.ModelCardData`].
        """
        if self.is_world_process_zero():
            training = self.args.settings() | ({"finetuning": "adapter"} if has_adapter(self.model) else {})
            run = {"training": training, "environment": environment()}
            write_card(str(self.args.output_dir), self.hub_model_id or model_name, results or run, **metadata)


class GatherWithGradient(torch.autograd.Function):
    """All processes' rows in rank order; the gradient of a row returns to the process it came from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """`(rows, d)` to `(processes * rows, d)`."""
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Sums the gradients that all processes have for this one's rows."""
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def has_adapter(model: Any) -> bool:
    """Whether PEFT has put adapters into a model and chosen which weights train."""
    return bool(getattr(model, "peft_config", None))


def _cosine_factor(step: int, warmup: int, total: int, floor: float) -> float:
    """Learning rate at a step as a share of the group's own, from 1 down to `floor`."""
    if step < warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * (1 + cos(pi * progress)) / 2


__all__ = ["GatherWithGradient", "PVLFTrainer"]
