"""Parses the command line of `pvlf-hf train` and `pvlf-hf evaluate`, and ends a run of several processes."""

import time
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any

from accelerate import PartialState
from transformers import HfArgumentParser


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions, and names defaults where there are."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parse(parser: HfArgumentParser, command_line: Sequence[str] | None) -> tuple[Any, ...]:
    """An instance of each of the parser's dataclasses.

    Raises:
        ValueError: if an argument is unknown.
    """
    *parsed, unknown = parser.parse_args_into_dataclasses(command_line, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"unknown arguments: {' '.join(unknown)}; see {parser.prog} --help")
    return tuple(parsed)


def leave() -> None:
    """What a process of several does at its end: waits for the others, and for the threads that they talked through.

    Otherwise the launcher, told that one has failed, would end those that still write. On CPUs (gloo) a process can
    fail so late: a thread lets go of the last message when Python is already taken down, which aborts (until 3.14).
    """
    state = PartialState()
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()
        time.sleep(0.5)  # those threads cannot be waited for
