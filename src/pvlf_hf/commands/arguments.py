"""Command lines of `pvlf-hf train` and `pvlf-hf evaluate`, and the end of a run in several processes."""

import time
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any

from accelerate import PartialState
from transformers import HfArgumentParser


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Help formatter that keeps the lines of descriptions and states defaults, except for None."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parse(parser: HfArgumentParser, command_line: Sequence[str] | None) -> tuple[Any, ...]:
    """Parse a command line into an instance of each of the parser's dataclasses.

    Args:
        parser: the parser.
        command_line: the arguments; None for those of this process.

    Raises:
        ValueError: if an argument is unknown.
    """
    *parsed, unknown = parser.parse_args_into_dataclasses(command_line, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"unknown arguments: {' '.join(unknown)}; see {parser.prog} --help")
    return tuple(parsed)


def leave() -> None:
    """Wait for all processes and destroy the process group, so that the launcher ends none that still writes.

    On CPUs (gloo) a process can fail as late as at its exit: a thread of gloo that frees the last message while Python
    shuts down aborts the process (until Python 3.14), and the launcher then ends the others.
    """
    state = PartialState()
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()
        time.sleep(0.5)  # gloo's threads cannot be joined
