"""Gradient caching: batches of any size, with all their negatives and exact gradients, in the memory of one chunk.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup": a contrastive loss needs
the embeddings of all rows, but their activations only once it has given the gradients of the embeddings. So the first
pass keeps embeddings alone, and backward embeds each chunk again, with the same dropout, for one more forward pass.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from ..models.interface_pvlf import ComposedRetrievalOutput


def embed_in_chunks(
    model: nn.Module,
    inputs: Mapping[str, Any],
    chunk_size: int,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
) -> ComposedRetrievalOutput:
    """Embed a batch chunk by chunk, keeping nothing else for backward.

    Args:
        model: a [`ComposedRetrievalModel`], or its DDP or FSDP wrapper.
        inputs: inputs of its `forward`: tensors, or dictionaries of tensors, with the same number of rows each.
        chunk_size: rows embedded at once.
        no_sync: context in which gradients are not averaged over processes; entered for all chunks but the last.

    Returns:
        `query_embeds`, `target_embeds` and other outputs so named, whose gradients reach the model's parameters, and
        the model's other outputs for each row, detached.

    Raises:
        ValueError: if inputs differ in their number of rows, so that a query has no target.
    """
    if len(counts := {len(tensor) for tensor in _tensors(inputs)}) > 1:
        raise ValueError(f"chunks need a target for each query, but got {sorted(counts)} rows")
    chunks = [_rows(inputs, start, start + chunk_size) for start in range(0, counts.pop(), chunk_size)]
    with torch.no_grad():
        passes = [_first_pass(model, chunk) for chunk in chunks]
    joined = {name: torch.cat([each.output[name] for each in passes]) for name in passes[0].output}
    names = [name for name in joined if name.endswith("_embeds")]
    device_type = joined[names[0]].device.type
    autocast = torch.is_autocast_enabled(device_type)

    def backward(*gradients: Tensor) -> None:
        start = 0
        for number, (chunk, each) in enumerate(zip(chunks, passes, strict=True)):
            is_last = number == len(chunks) - 1
            with (
                nullcontext() if is_last else no_sync(),
                _restored(each.random),
                torch.enable_grad(),
                torch.autocast(device_type, enabled=autocast),
            ):
                output = model(**chunk, return_loss=False)
            end = start + len(output[names[0]])
            rows = [gradient[start:end] for gradient in gradients]
            # Targets do not train where the image side is frozen.
            trained = {name: row for name, row in zip(names, rows, strict=True) if output[name].requires_grad}
            with nullcontext() if is_last else no_sync():
                torch.autograd.backward([output[name] for name in trained], list(trained.values()))
            start = end

    anchor = torch.zeros((), requires_grad=True)  # autograd calls a function's backward only if an input needs it
    embeds = _CallOnBackward.apply(backward, anchor, *(joined[name] for name in names))
    return type(passes[0].output)(**joined | dict(zip(names, embeds, strict=True)))


def _first_pass(model: nn.Module, chunk: Mapping[str, Any]) -> "_Pass":
    random = (torch.get_rng_state(), *get_device_states(*_tensors(chunk)))
    return _Pass(random, model(**chunk, return_loss=False))


class _CallOnBackward(torch.autograd.Function):
    """Passes tensors through; backward passes their gradients to a function that accumulates the parameters' own."""

    @staticmethod
    def forward(ctx: Any, backward: Callable[..., None], anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors as they are."""
        ctx.call = backward
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        """Call the function."""
        ctx.call(*gradients)
        return (None, None, *(None for _ in gradients))


class _Pass(NamedTuple):
    """A chunk's first forward pass, and the state of the random generators before it: CPU, devices, their states."""

    random: tuple[Tensor, list[int], list[Tensor]]
    output: ComposedRetrievalOutput


@contextmanager
def _restored(random: tuple[Tensor, list[int], list[Tensor]]) -> Iterator[None]:
    """Restore a state of the random generators within a context."""
    cpu, devices, states = random
    with torch.random.fork_rng(devices):
        torch.set_rng_state(cpu)
        set_device_states(devices, states)
        yield


def _tensors(inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return all tensors of nested inputs; None stands for an input that is not given."""
    values = [_tensors(value) if isinstance(value, Mapping) else [value] for value in inputs.values()]
    return [tensor for tensors in values for tensor in tensors if tensor is not None]


def _rows(inputs: Mapping[str, Any], start: int, end: int) -> dict[str, Any]:
    """Return some rows of nested inputs."""
    return {
        name: _rows(value, start, end) if isinstance(value, Mapping) else value[start:end]
        for name, value in inputs.items()
        if value is not None
    }


__all__ = ["embed_in_chunks"]
