"""Timing of the benchmarks in this folder: alternatives are timed in turn in one run and reported as ratios."""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import disable_progress_bars
from transformers.utils import logging

from pvlf_hf.dtypes import is_native, processor
from pvlf_hf.evaluation.results import environment

DOCUMENT = Path(__file__).parent / "PERFORMANCE.md"

PRODUCTS_LAST = 0.3
"""Seconds that matrix products last in a timing: what a processor sustains is less than a short burst reaches."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one alternative, one entry a round."""

    name: str
    seconds: list[float]

    @property
    def median(self) -> float:
        """Median of the rounds, in seconds."""
        return statistics.median(self.seconds)

    def speedup_over(self, other: "Timing") -> tuple[float, float, float]:
        """Return how many times faster it is than `other`: median, lowest and highest ratio over the rounds."""
        ratios = sorted(theirs / own for own, theirs in zip(self.seconds, other.seconds, strict=True))
        return statistics.median(ratios), ratios[0], ratios[-1]


def side_by_side(
    alternatives: dict[str, Callable[[], Any]], rounds: int = 5, warmup: int = 1, calls: int = 1
) -> dict[str, Timing]:
    """Time alternatives in turn, so that other load of the machine affects all of them alike.

    Args:
        alternatives: functions to call, by name; the others are compared with the first.
        rounds: timings of each.
        warmup: calls of each before the first round.
        calls: calls in a timing, for functions that take less than a millisecond; seconds are those of one call.
    """
    for _ in range(warmup):
        for call in alternatives.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, call in alternatives.items():
            start = time.perf_counter()
            for _ in range(calls):
                call()
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: Timing(name, times) for name, times in seconds.items()}


class Table(NamedTuple):
    """Timings of alternatives, compared with the first; further columns by heading."""

    title: str
    timings: dict[str, Timing]
    columns: dict[str, list[str]]


def markdown(table: Table) -> str:
    """Render the table in Markdown: medians, and ratios with [lowest, highest round]."""
    heads = ["", "seconds (median)", "times faster [rounds]", *table.columns]
    lines = [f"**{table.title}**", "", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    first = next(iter(table.timings.values()))
    for row, timing in enumerate(table.timings.values()):
        ratio, low, high = timing.speedup_over(first)
        cells = [timing.name, f"{timing.median:.3g}", f"{ratio:.2f} [{low:.2f}, {high:.2f}]"]
        lines.append(f"| {' | '.join(cells + [column[row] for column in table.columns.values()])} |")
    return "\n".join([*lines, ""])


def peak_memory(code: str) -> int:
    """Return the peak resident memory, in bytes, of a new Python process that runs `code` (Linux only).

    The maximum that `resource` reports is no substitute: it starts from the memory of the parent process.
    """
    program = f"{code}\nprint(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


class Products:
    """Square matrix products that together last tenths of a second.

    Args:
        dtype: of the matrices.
        size: of the models they are compared with; `"tiny"` makes them small and few.
        device: device that multiplies.
    """

    def __init__(self, dtype: torch.dtype, size: str, device: str = "cpu") -> None:
        side = 256 if size == "tiny" else 2048 if device == "cpu" else 8192
        self.device, self.number = device, 1
        self.matrix = torch.randn(side, side, dtype=dtype, device=device)
        one = min(side_by_side({"product": self}, rounds=3)["product"].seconds)
        self.number = math.ceil((0.01 if size == "tiny" else PRODUCTS_LAST) / one)
        self.operations = 2 * side**3 * self.number

    def __call__(self) -> None:
        """Compute them."""
        for _ in range(self.number):
            product = self.matrix @ self.matrix
        waited_for(product, self.device)


def matrix_rate(dtype: torch.dtype, size: str, device: str = "cpu") -> float:
    """Return the FLOP/s that this machine sustains in matrix products."""
    products = Products(dtype, size, device)
    return products.operations / side_by_side({"products": products}, rounds=3, warmup=0)["products"].median


class Pace(NamedTuple):
    """Timing of an alternative, and of its matrix operations at the rate of large products in the same round."""

    timing: Timing
    floor: Timing

    @property
    def share(self) -> float:
        """Share of the matrix rate that the alternative reaches: the median over the rounds."""
        return self.timing.speedup_over(self.floor)[0]


def paced(
    calls: dict[str, Callable[[], Any]],
    dtypes: dict[str, torch.dtype],
    operations: dict[str, float],
    size: str,
    rounds: int,
    warmup: int = 1,
    device: str = "cpu",
) -> dict[str, Pace]:
    """Time alternatives in turn with large matrix products in their dtypes, which give their floors.

    In turn, because a processor that has just computed for seconds, or shares its power with other work, multiplies
    more slowly than an idle one.

    Args:
        calls: alternatives by name, see [`side_by_side`].
        dtypes: dtype of each.
        operations: operations of the matrix products of each.
        size: of the models, see [`Products`].
        rounds: timings of each.
        warmup: calls of each before the first round.
        device: device that multiplies.
    """
    products = {str(dtype): Products(dtype, size, device) for dtype in dict.fromkeys(dtypes.values())}
    timings = side_by_side({**calls, **products}, rounds, warmup)
    paces = {}
    for name in calls:
        dtype = str(dtypes[name])
        share = operations[name] / products[dtype].operations
        floor = Timing(f"floor of {name}", [seconds * share for seconds in timings[dtype].seconds])
        paces[name] = Pace(timings[name], floor)
    return paces


def waited_for(result: Any, device: str) -> Any:
    """Wait for the result, because CUDA runs asynchronously, and return it."""
    if device != "cpu":
        torch.cuda.synchronize()
    return result


def machine(size: str, device: str = "cpu") -> dict[str, Any]:
    """Describe the machine: processor, threads, device, load, matrix rates."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "load": os.getloadavg()[0],
        "operations a second": {str(dtype): matrix_rate(dtype, size, device) for dtype in formats(device)},
    }


def formats(device: str = "cpu") -> list[torch.dtype]:
    """Return the dtypes to measure: bfloat16 takes minutes on a processor that emulates it."""
    emulated = device == "cpu" and not is_native(torch.bfloat16)
    return [torch.float32] if emulated else [torch.float32, torch.bfloat16]


def described(facts: dict[str, Any]) -> str:
    """Render the description of the machine in a line."""
    rates = [f"{rate / 1e9:.0f} in {name}" for name, rate in facts["operations a second"].items()]
    return (
        f"{facts['processor']}, {facts['threads']} threads, load {facts['load']:.1f} before; GFLOP/s of matrix "
        f"products: {', '.join(rates).replace('torch.', '')}."
    )


def parser_of(script: str, description: str, parts: dict[str, Any], rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the arguments that the benchmarks share."""
    parser = argparse.ArgumentParser(
        script, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["tiny", "base"], default="base")
    parser.add_argument(
        "--only", choices=parts, nargs="+", default=list(parts), help="parts to measure (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=rounds, help=f"timings of each alternative (default: {rounds})")
    parser.add_argument("--write", action="store_true", help=f"replace the tables of {DOCUMENT.name}")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs") / Path(script).stem)
    return parser


def measure(script: str, parts: dict[str, Callable[[], list[Table]]], args: argparse.Namespace) -> None:
    """Measure the chosen parts; print Markdown, write JSON and, with `--write`, the tables of PERFORMANCE.md."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    facts = machine(args.size)
    written: dict[str, Any] = {"size": args.size, "machine": facts, "environment": environment()}
    for part in args.only:
        tables = parts[part]()
        text = "\n".join(map(markdown, tables))
        print(f"## {part}\n\n{text}", flush=True)
        written[part] = [
            {"title": t.title, "seconds": {n: x.seconds for n, x in t.timings.items()}, **t.columns} for t in tables
        ]
        (args.output_dir / "results.json").write_text(json.dumps(written, indent=2) + "\n")
        if args.write:
            write_between(f"<!-- {part}: written by {script} -->", f"<!-- end of {part} -->", described(facts), text)
    print(described(facts))


def write_between(start: str, end: str, *paragraphs: str, document: Path | None = None) -> None:
    """Replace the text between two comments of a document, by default PERFORMANCE.md."""
    document = document or DOCUMENT
    before, rest = document.read_text().split(start)
    text = "\n\n".join(paragraphs)
    document.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}")


__all__ = [
    "Pace",
    "Products",
    "Table",
    "Timing",
    "formats",
    "markdown",
    "matrix_rate",
    "measure",
    "paced",
    "parser_of",
    "peak_memory",
    "side_by_side",
    "waited_for",
]
