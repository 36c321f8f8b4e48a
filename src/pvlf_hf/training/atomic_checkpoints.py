"""Atomic checkpoints: a run's folder holds only complete checkpoints, even after a kill or a full disk."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from ..atomic_files import cannot_write

STAGING = "_unfinished"
"""Folder for unfinished files inside a run's folder; the Trainer never pushes a name that begins with "_"."""


class AtomicCheckpointsMixin(Trainer):
    """Trainer mixin that writes to a staging folder and renames complete checkpoints; must be the first base class.

    The library writes `checkpoint-N` in place. A kill during the write leaves a checkpoint that lacks files, and the
    library resumes from it. Here a rename publishes the checkpoint once every process has written its part.
    """

    _is_saving_checkpoint = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train the model, see the base class; `resume_from_checkpoint=True` takes the last complete checkpoint.

        Raises:
            OSError: if a checkpoint cannot be written. Earlier ones are complete and can be resumed from.
            ValueError: if `resume_from_checkpoint` is not a complete checkpoint.
        """
        folder = Path(str(self.args.output_dir))
        if self.args.save_strategy != "no":
            with self._staging(folder):
                pass  # an unwritable folder raises now, not at the first checkpoint
        return super().train(checkpoint_to_resume(resume_from_checkpoint, folder), *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Skip the epoch if all steps are done: the library makes one step more when a complete run is resumed."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial: Any = None) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder, STAGING)) if self._is_saving_checkpoint else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write `checkpoint-N` to the staging folder and publish it when all processes are done."""
        run, name = Path(super()._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._is_saving_checkpoint = True
        try:
            with self._staging(run) as staging:
                self.accelerator.wait_for_everyone()  # the staging folder is empty now
                with writing(run):
                    super()._save_checkpoint(model, trial)
                self._record_best(run, name)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    with writing(run):
                        self._publish(staging, run, name)
                self.accelerator.wait_for_everyone()
        finally:
            self._is_saving_checkpoint = False
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))

    def _record_best(self, run: Path, name: str) -> None:
        """Record where the best checkpoint will be; the library has recorded its path in the staging folder."""
        best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best.name == name or best.exists():
            self.state.best_model_checkpoint = str(best)

    def _publish(self, staging: Path, run: Path, name: str) -> None:
        """Move the written checkpoint into the run's folder, and superfluous ones out of it, by renaming."""
        self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
        if (run / name).exists():
            (run / name).replace(staging / "replaced")
        (staging / name).replace(run / name)
        for old in self._superfluous_checkpoints(run):
            old.replace(staging / old.name)  # deleted with the staging folder, so a kill leaves none half deleted

    def _superfluous_checkpoints(self, run: Path) -> list[Path]:
        """Return all checkpoints but the last `save_total_limit`, the best and the last."""
        limit, best = self.args.save_total_limit or 0, self.state.best_model_checkpoint
        if limit <= 0:
            return []
        oldest_first = sort_checkpoints(str(run), use_mtime=True, best_model_checkpoint=best)
        protected = {oldest_first[-1], best or oldest_first[-1]}
        return list(map(Path, oldest_first[: -max(limit, len(protected))]))

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        """Delete all checkpoints but the best if only one may stay, as the library does, but atomically."""
        best, run = self.state.best_model_checkpoint, Path(self._get_output_dir(trial))
        if best is not None and self.args.save_total_limit == 1:
            with self._staging(run) as staging, writing(run):
                for old in map(Path, sort_checkpoints(str(run)) if self.args.should_save else []):
                    if not old.samefile(best):
                        old.replace(staging / old.name)
        return super()._finalize_training(trial, *args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a published checkpoint; the library's own call comes while it is still being written."""
        if self._is_saving_checkpoint:
            return
        if self.args.hub_always_push:  # a push under way reads the files that this one replaces
            self._finish_current_push()
        super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write a model to the staging folder and rename its files, weights last: they mark the model as complete."""
        if self._is_saving_checkpoint or not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        final = Path(output_dir or str(self.args.output_dir))
        with self._staging(final) as staging, writing(final):
            super()._save(str(staging), state_dict)
            for file in sorted(staging.iterdir(), key=lambda file: file.suffix == ".safetensors"):
                if file.name != "README.md" or not (final / file.name).exists():  # PEFT's card never replaces a card
                    file.replace(final / file.name)

    @contextmanager
    def _staging(self, folder: Path) -> Iterator[Path]:
        """Make an empty staging folder inside `folder` and delete it at the end."""
        staging = folder / STAGING
        try:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)  # left by a kill
                with writing(folder):
                    staging.mkdir(parents=True)
            yield staging
        finally:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise an `OSError` that names the folder and the remedy for any error of a block that only writes files.

    `torch.save` raises a plain `RuntimeError` when a disk is full, which its type does not distinguish from other
    failures. So the block must only write files. Gathering weights, which can fail for lack of GPU memory or a lost
    process, stays outside and keeps its own errors.
    """
    try:
        yield
    except (torch.OutOfMemoryError, dist.DistError):
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        raise cannot_write(f"in {folder}", error) from error


def last_checkpoint(folder: Path) -> str | None:
    """Return the last complete checkpoint in a run's folder: one with a state, which the Trainer writes last."""
    states = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    steps = {int(state.parent.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")): state.parent for state in states}
    return str(steps[max(steps)]) if steps else None


def holds_optimizer(checkpoint: Path) -> bool:
    """Return whether a checkpoint holds the states of optimiser and schedule, in the forms that the library reads."""
    return any(checkpoint.glob("optimizer*")) and (checkpoint / SCHEDULER_NAME).is_file()


def checkpoint_to_resume(resume_from_checkpoint: str | bool | None, folder: Path) -> str | None:
    """Return the checkpoint that the Trainer's argument refers to: none, the run's last complete one, or the named."""
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is True:
        checkpoint = last_checkpoint(folder)
        if checkpoint is None:
            raise ValueError(
                f"resume_from_checkpoint=True, but {folder} holds no complete checkpoint: train without it"
            )
        return checkpoint
    if not Path(resume_from_checkpoint, TRAINER_STATE_NAME).is_file():
        raise ValueError(
            f"resume_from_checkpoint={str(resume_from_checkpoint)!r} holds no {TRAINER_STATE_NAME}: name a folder "
            f"{PREFIX_CHECKPOINT_DIR}-N that training has written"
        )
    return resume_from_checkpoint


__all__ = [
    "STAGING",
    "AtomicCheckpointsMixin",
    "checkpoint_to_resume",
    "holds_optimizer",
    "last_checkpoint",
    "writing",
]
