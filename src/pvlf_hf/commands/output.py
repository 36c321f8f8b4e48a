"""Prints the results of commands as JSON."""

import json
from typing import Any

import typer


def print_json(**content: Any) -> None:
    """Print one JSON object, the only content of stdout under `--json`."""
    typer.echo(json.dumps(content, indent=2))
