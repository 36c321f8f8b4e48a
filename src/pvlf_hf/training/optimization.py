"""Optimisation of a run: two learning rates, and a schedule that the paper's defaults or the library define."""

import warnings
from collections.abc import Callable
from functools import partial
from inspect import signature
from math import cos, pi
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, TrainingArguments, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_optimizer import is_optimizer_factory

from ..models.interface_pvlf import unwrap

METRIC_SCHEDULES = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
"""Schedules that follow the metric of each evaluation instead of the step."""


def parameter_groups(model: nn.Module, args: Any, decayed: set[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Group the weights that train: the encoders' own at `encoder_learning_rate`, all new ones at `learning_rate`.

    Args:
        model: the model; `requires_grad` says which weights train. LoRA's weights count as new wherever they are,
            because they are not pretrained, like the fusion's.
        args: [`PVLFTrainingArguments`].
        decayed: names of the weights that decay where `decay_norms_and_biases` is False; prompts never do then.

    Returns:
        The optimiser's groups, and for each the argument that holds its learning rate.

    Raises:
        ValueError: if no weight trains.
    """
    sides = unwrap(model)
    encoders = {p for module in (*sides.image_side.values(), *sides.text_side.values()) for p in module.parameters()}
    weights: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = args.decay_norms_and_biases or (name in decayed and not name.endswith("prompts"))
            is_encoder = parameter in encoders and "lora_" not in name
            rate = "encoder_learning_rate" if is_encoder else "learning_rate"
            weights.setdefault((rate, decays), []).append(parameter)
    if not weights:
        raise ValueError(
            f"nothing trains: {type(sides).__name__} has no weights beside its encoders, and finetuning="
            f"{args.finetuning!r} freezes them; choose 'text' or 'both'"
        )
    groups = [
        {"params": parameters, "lr": getattr(args, rate), "weight_decay": args.weight_decay if decays else 0.0}
        for (rate, decays), parameters in weights.items()
    ]
    return groups, [rate for rate, _ in weights]


def make_schedule(optimizer: torch.optim.Optimizer, args: Any, num_training_steps: int) -> Any:
    """Make the learning rate schedule that `lr_scheduler_type` names.

    `"cosine"` is TransAgg's: every group falls to `min_lr_ratio * learning_rate`, or keeps its own rate where that is
    lower. Every other type is the library's and scales all groups alike.

    Raises:
        ValueError: if `lr_scheduler_kwargs`, `warmup_steps` or `min_lr_ratio` do not fit the type.
    """
    warmup = args.get_warmup_steps(num_training_steps)
    kwargs = dict(args.lr_scheduler_kwargs or {})
    check_schedule(args, warmup, kwargs)
    if args.lr_scheduler_type == SchedulerType.COSINE:
        floor = args.min_lr_ratio * args.learning_rate
        settings = {"warmup": warmup, "total": num_training_steps, **kwargs}
        factors: list[Callable[[int], float]] = [
            partial(cosine_factor, floor=min(1.0, floor / group["lr"]), **settings) for group in optimizer.param_groups
        ]
        return LambdaLR(optimizer, factors)
    if args.lr_scheduler_type in METRIC_SCHEDULES:  # the library's default, "min", would take a recall for a loss
        kwargs = {"mode": "max" if args.greater_is_better else "min", **kwargs}
    try:
        return get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=num_training_steps,
            scheduler_specific_kwargs=kwargs,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_type={str(args.lr_scheduler_type.value)!r} cannot be made with lr_scheduler_kwargs="
            f"{args.lr_scheduler_kwargs}: {error}"
        ) from error


def check_schedule(args: Any, warmup: int, kwargs: dict[str, Any]) -> None:
    """Raise a `ValueError` for settings that the chosen type would ignore."""
    name = str(args.lr_scheduler_type.value)
    if args.lr_scheduler_type == SchedulerType.COSINE:
        if ignored := sorted(kwargs.keys() - {"num_cycles"}):
            raise ValueError(f"lr_scheduler_kwargs: 'cosine' takes only 'num_cycles', not {ignored}")
        return
    if args.min_lr_ratio != type(args).min_lr_ratio:
        raise ValueError(
            f"min_lr_ratio={args.min_lr_ratio} is the floor of 'cosine' alone: leave it out with lr_scheduler_type="
            f"{name!r}, or choose a type with a floor of its own, such as 'cosine_with_min_lr'"
        )
    make: Any = TYPE_TO_SCHEDULER_FUNCTION[args.lr_scheduler_type]
    takes = signature(make).parameters
    if warmup and "num_warmup_steps" not in takes:
        raise ValueError(
            f"warmup_steps={args.warmup_steps}: {name!r} has no warm-up, leave it out or choose 'constant_with_warmup'"
        )
    if kwargs and args.lr_scheduler_type in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP):
        raise ValueError(f"lr_scheduler_kwargs={kwargs}: {name!r} takes none, leave it out")


def try_schedule(args: TrainingArguments) -> None:
    """Raise a `ValueError` if the schedule cannot be made, before there is a model or an optimiser."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    make_schedule(optimizer, args, args.max_steps if args.max_steps > 0 else 10**9)


def cosine_factor(step: int, warmup: int, total: int, floor: float, num_cycles: float = 0.5) -> float:
    """Return the learning rate at a step as a share of the group's own, from 1 down to `floor`.

    `num_cycles` counts whole periods, as in the library: half of one falls once. The first step of a warm-up trains at
    `1 / warmup` and the last one at 1, as in Pic2Word's code; in the library's schedules the first one does nothing.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * (1 + cos(2 * pi * num_cycles * progress)) / 2


def check_optimizers(model: Any, args: Any, optimizer: Any, schedule: Any, class_and_kwargs: Any) -> None:
    """Check the optimiser, schedule, and optimiser class that a Trainer was given.

    Raises:
        ValueError: if they would not train this model as the arguments say.
    """
    if schedule is not None and optimizer is None:
        raise ValueError("optimizers=(None, scheduler): pass the optimiser that the scheduler changes, too")
    if optimizer is not None:
        weights = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in weights for p in model.parameters() if p.requires_grad):
            raise ValueError(
                "optimizers: the optimiser holds no weight of this model that trains; make it of model.parameters()"
            )
    given: Any = class_and_kwargs or (torch.optim.Optimizer, {})
    kind, settings = given
    if is_optimizer_factory(kind):
        raise ValueError(f"optimizer_cls_and_kwargs: {kind} is not a subclass of torch.optim.Optimizer, pass one")
    for name, wanted in (("lr", args.learning_rate), ("weight_decay", args.weight_decay)):
        if settings.get(name, wanted) != wanted:
            raise ValueError(
                f"optimizer_cls_and_kwargs: {name}={settings[name]} has no effect; set learning_rate, "
                "encoder_learning_rate and weight_decay in the arguments"
            )


def advance(schedule: Any, steps: int) -> None:
    """Advance a new schedule by a number of steps."""
    with warnings.catch_warnings():  # PyTorch warns of a step of the schedule before one of the optimiser
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(steps):
            schedule.step()


__all__ = [
    "METRIC_SCHEDULES",
    "advance",
    "check_optimizers",
    "cosine_factor",
    "make_schedule",
    "parameter_groups",
    "try_schedule",
]
