"""The command `pvlf-hf compare`: reads results and submission files, and writes the table."""

import json
from collections.abc import Sequence
from pathlib import Path

import typer

from ..atomic_files import whole
from ..data.protocols import load_protocol
from ..evaluation.comparison import Comparison, Run, compare, read_runs
from ..evaluation.comparison_page import render_html, render_markdown
from ..evaluation.submission import evaluate_submissions
from .output import print_json

SERVERS = {"cirr": "cirr-val", "circo": "circo-val"}
"""Protocol that a submission file for a server is scored by, where the labels are public."""


def read_all(files: Sequence[str], data_root: Path | None) -> list[Run]:
    """Read files of results and of submissions; those of one given name are runs of one row.

    Args:
        files: paths, or `NAME=PATH`.
        data_root: folder of the data sets, for the labels of submission files.

    Raises:
        ValueError: if a file is neither, two files without a name are called the same, or labels are needed.
    """
    runs: list[Run] = []
    submissions: dict[tuple[str, str], list[Path]] = {}
    derived: dict[str, Path] = {}
    for given in files:
        name, equals, rest = given.partition("=")
        path = Path(rest if equals and not Path(given).exists() else given)
        own = name if path != Path(given) else None
        if server := _server_of(path):
            submissions.setdefault((own or path.parent.name or path.stem, server), []).append(path)
            continue
        found = read_runs(path, own)
        for run in found if own is None else ():
            if (other := derived.setdefault(run.name, path)) != path:
                raise ValueError(f"{other} and {path} are both called {run.name!r}: name them, NAME={other} ...")
        runs += found
    for (name, server), paths in submissions.items():
        if data_root is None:
            raise ValueError(f"{paths[0]} is a submission file: pass --data-root, whose {server}/ has the labels")
        (benchmark,) = load_protocol(SERVERS[server], data_root, check_counts=False)
        runs.append(Run(name, {benchmark.name: evaluate_submissions(paths, benchmark)}))
    return runs


def _server_of(file: Path) -> str | None:
    """Return the server that a file is for, None for a file of results."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or "evaluations" in content:
        return None
    if content.get("metric") in ("recall", "recall_subset"):
        return "cirr"
    return "circo" if content and all(isinstance(ids, list) for ids in content.values()) else None


def run(
    files: Sequence[str],
    against: str | None,
    metrics: Sequence[str] | None,
    data_root: Path | None,
    output_dir: Path | None,
    as_json: bool,
) -> None:
    """Compare and print; with a folder, also write `comparison.md`, `comparison.html` and `comparison.json` there."""
    comparison = compare(read_all(files, data_root), against, metrics)
    if output_dir is not None:
        write(comparison, output_dir)
    if as_json:
        print_json(**comparison.as_dict())
    else:
        typer.echo(render_markdown(comparison))


def write(comparison: Comparison, folder: Path) -> None:
    """Write a comparison in all three forms."""
    texts = {
        "md": render_markdown(comparison),
        "html": render_html(comparison),
        "json": json.dumps(comparison.as_dict(), indent=1) + "\n",
    }
    for ending, text in texts.items():
        with whole(folder / f"comparison.{ending}") as partial:
            partial.write_text(text, encoding="utf-8")


__all__ = ["read_all", "run", "write"]
