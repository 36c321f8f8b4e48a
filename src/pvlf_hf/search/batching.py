"""Computes for many threads on one: what waits together for a model runs as one batch.

Each request has a thread of its own, which decodes its images and searches as any caller of a gallery does. Only what
it asks of the model goes to the thread that computes ([`BatchedModel`]), and so does the ranking, so that requests do
not compete for cores and an accelerator sees one caller.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from queue import Empty, SimpleQueue
from threading import Condition, Event, Lock, Thread, local
from time import monotonic, perf_counter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ..embeddings.model_views import inference_view
from ..models.interface_pvlf import ComposedRetrievalModel, QueryOutput

MOST_ROWS, WINDOW = 64, 0.003
"""Rows of a batch, and seconds that a batch waits for requests that are still being decoded (our choice)."""

PADDED = ("input_ids", "attention_mask")
"""Inputs whose last dimension is as long as the longest text of their batch."""

T = TypeVar("T")


class Abandoned(Exception):
    """Raised in the thread of a request whose client has gone."""


class Call(NamedTuple):
    """Something to compute.

    Args:
        compute: computes it; for inputs of the model, computes a list of such inputs together.
        inputs: of the model, with their rows in the first dimension; None for anything else, which runs alone.
        kind: calls of equal kind run together.
        gone: set when nobody waits for the result any more.
        future: the result.
    """

    compute: Callable[..., Any]
    inputs: dict[str, Tensor] | None
    kind: Any
    gone: Event
    future: Future

    @property
    def rows(self) -> int:
        """Rows that the model computes for it."""
        return len(next(iter(self.inputs.values()))) if self.inputs else 0


class ComputeThread:
    """One thread that computes for all others, within a `with` block.

    Attributes:
        batches, rows, seconds: forward passes of the model so far, their rows, and the time that they took.
    """

    def __init__(self) -> None:
        self.batches, self.rows, self.seconds = 0, 0, 0.0
        self._waiting: SimpleQueue[Call | None] = SimpleQueue()
        self._present, self._open, self._lock, self._own = 0, False, Lock(), local()
        self._thread = Thread(target=self._compute_all, name="compute")

    def __enter__(self) -> "ComputeThread":
        self._open = True
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._open = False
            self._waiting.put(None)  # after everything that waits
        self._thread.join()

    @contextmanager
    def present(self, gone: Event) -> Iterator[None]:
        """Announce within the block that this thread will ask: batches wait for it for a moment.

        Args:
            gone: set when nobody waits for the thread's answer any more; what it asks is then [`Abandoned`].
        """
        with self._lock:
            self._present += 1
        self._own.gone = gone
        try:
            yield
        finally:
            del self._own.gone
            with self._lock:
                self._present -= 1

    def run(self, work: Callable[[], T]) -> T:
        """Return the result of a function that runs on the thread alone."""
        return self._ask(work, None, None)

    def run_together(self, compute: Callable[[list[dict[str, Tensor]]], list[T]], inputs: dict[str, Tensor]) -> T:
        """Return the result of inputs, which may run with others of the same function and of equal shapes."""
        shapes = tuple(
            (name, value.shape[1:-1] if name in PADDED else value.shape[1:]) for name, value in inputs.items()
        )
        return self._ask(compute, inputs, (compute, shapes))

    def _ask(self, compute: Callable[..., Any], inputs: dict[str, Tensor] | None, kind: Any) -> Any:
        call = Call(compute, inputs, kind, getattr(self._own, "gone", Event()), Future())
        with self._lock:
            if not self._open:
                raise RuntimeError("the thread that computes is not running")
            self._waiting.put(call)
        return call.future.result()

    def _compute_all(self) -> None:
        while (first := self._waiting.get()) is not None:
            groups: dict[Any, list[Call]] = {}
            for call in self._gather(first):
                groups.setdefault(id(call) if call.inputs is None else call.kind, []).append(call)
            for group in groups.values():
                self._answer(group)

    def _gather(self, first: Call) -> list[Call]:
        """Return the calls of a batch: all that wait, and those that come while the others are being decoded."""
        calls, end = [first], monotonic() + WINDOW
        while first.inputs is not None and sum(call.rows for call in calls) < MOST_ROWS:
            try:
                call = self._waiting.get(timeout=max(0, end - monotonic()) if len(calls) < self._present else 0)
            except Empty:
                break
            if call is None:  # to be seen again, after these
                self._waiting.put(None)
                break
            calls.append(call)
        return calls

    def _answer(self, calls: list[Call]) -> None:
        """Compute calls of one kind; if that fails, each alone, so that no request fails for another."""
        wanted = [call for call in calls if not call.gone.is_set()]
        for call in calls:
            if call.gone.is_set():
                call.future.set_exception(Abandoned())
        try:
            results = self._results(wanted) if wanted else []
        except Exception as error:
            if len(wanted) > 1:
                for call in wanted:
                    self._answer([call])
            else:
                wanted[0].future.set_exception(error)
        else:
            for call, result in zip(wanted, results, strict=True):
                call.future.set_result(result)

    def _results(self, calls: list[Call]) -> list[Any]:
        if calls[0].inputs is None:
            return [call.compute() for call in calls]
        start = perf_counter()
        results = calls[0].compute([call.inputs for call in calls])
        self.seconds += perf_counter() - start
        self.batches, self.rows = self.batches + 1, self.rows + sum(call.rows for call in calls)
        return results


class BatchedModel:
    """A model that many threads may call; it computes on one, and their calls in batches.

    It stands for the model in a [`QueryEncoder`]. In a batch texts are padded to the longest, so that embeddings equal
    those of the model up to rounding.

    Args:
        model: the model.
        thread: computes.
        padding: token that pads texts on the right, as processors do.
    """

    def __init__(self, model: ComposedRetrievalModel, thread: ComputeThread, padding: int) -> None:
        self._model, self._thread, self._padding = inference_view(model), thread, padding
        methods = (self._model.get_image_features, self._model.get_text_features, self._model.get_query_features)
        self._images, self._texts, self._queries = (partial(self._together, method) for method in methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_image_features(self, pixel_values: Tensor, **options: Any) -> Any:
        """Embed images, see [`ComposedRetrievalModel.get_image_features`]."""
        return self._call(self._images, {"pixel_values": pixel_values}, options)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """Embed texts, see [`ComposedRetrievalModel.get_text_features`]."""
        return self._call(self._texts, {"input_ids": input_ids, "attention_mask": attention_mask}, options)

    def get_query_features(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, **options: Any
    ) -> Any:
        """Embed queries, see [`ComposedRetrievalModel.get_query_features`]."""
        inputs = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        return self._call(self._queries, inputs, options)

    def _call(self, together: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> Any:
        if options:  # such as attentions, whose shape depends on the batch
            return self._thread.run(torch.inference_mode()(partial(together.args[0], **inputs, **options)))
        return self._thread.run_together(together, inputs)

    @torch.inference_mode()
    def _together(self, method: Callable[..., Any], inputs: list[dict[str, Tensor]]) -> list[QueryOutput]:
        """Compute inputs in one batch, and return the output of each."""
        output = method(**{name: self._stacked(name, [one[name] for one in inputs]) for name in inputs[0]})
        sizes = [len(next(iter(one.values()))) for one in inputs]
        parts = {name: getattr(output, name, None) for name in ("pooler_output", "image_embeds", "text_embeds")}
        split = {name: part.split(sizes) for name, part in parts.items() if part is not None}
        return [QueryOutput(**{name: rows[i] for name, rows in split.items()}) for i in range(len(sizes))]

    def _stacked(self, name: str, values: list[Tensor]) -> Tensor:
        if name in PADDED:
            longest, fill = max(value.shape[-1] for value in values), self._padding if name == "input_ids" else 0
            values = [F.pad(value, (0, longest - value.shape[-1]), value=fill) for value in values]
        return torch.cat(values)


class LockedTokenizer:
    """A tokenizer that one thread calls at a time: a call sets the tokenizer's own padding and truncation.

    Args:
        tokenizer: the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._lock = tokenizer, Lock()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Tokenize, see `PreTrainedTokenizerBase`."""
        with self._lock:
            return self._tokenizer(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class Budget:
    """A number of which many threads take parts, each waiting until there is enough.

    Args:
        total: the most that is taken at the same time, and by one thread.
    """

    def __init__(self, total: int) -> None:
        self._free, self._changed = total, Condition()

    @contextmanager
    def taking(self, amount: int) -> Iterator[None]:
        """Take an amount within the block."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._changed.notify_all()


__all__ = ["Abandoned", "BatchedModel", "Budget", "ComputeThread", "LockedTokenizer"]
