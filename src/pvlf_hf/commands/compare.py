"""The command `pvlf-hf compare`: reads results and submission files, and writes the table."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import typer

from ..atomic_files import whole
from ..data.benchmark import CIRBenchmark
from ..data.circo import load_circo
from ..data.cirr import load_cirr
from ..evaluation.comparison import Comparison, Run, compare, informative_name, read_runs
from ..evaluation.comparison_page import render_html, render_markdown
from ..evaluation.submission import evaluate_submissions
from .output import print_json

SERVERS: dict[str, Callable[..., CIRBenchmark]] = {"cirr": load_cirr, "circo": load_circo}
"""Loader of the split that a submission file for a server is scored on, where the labels are public: validation."""


def read_all(files: Sequence[str], data_root: Path | None) -> list[Run]:
    """Read files of results and of submissions; those of one given name are runs of one row.

    Args:
        files: paths, or `NAME=PATH`.
        data_root: folder of the data sets, for the labels of submission files. Their annotations suffice: those of
            CIRR, or those of CIRCO and COCO's list `image_info_unlabeled2017.json`.

    Raises:
        ValueError: if a file is neither, two files without a name are called the same, or labels are needed.

    A file without a name is called as [`informative_name`] says. Submission files of one folder are of one method.
    """
    runs: list[Run] = []
    submissions: dict[tuple[str, str], list[Path]] = {}
    derived: dict[str, Path] = {}

    def derive(name: str, source: Path, path: Path) -> None:
        if (other := derived.setdefault(name, source)) != source:
            raise ValueError(f"{other} and {source} are both called {name!r}: name them, NAME={path} ...")

    for given in files:
        name, equals, rest = given.partition("=")
        path = Path(rest if equals and not Path(given).exists() else given)
        own = name if path != Path(given) else None
        if server := _server_of(path):
            if own is None:
                own, source = _of_submission(path)
                derive(own, source, path)
            submissions.setdefault((own, server), []).append(path)
            continue
        found = read_runs(path, own)
        for run in found if own is None else ():
            derive(run.name, path, path)
        runs += found
    for (name, server), paths in submissions.items():
        if data_root is None:
            raise ValueError(f"{paths[0]} is a submission file: pass --data-root, whose {server}/ has the labels")
        benchmark = SERVERS[server](data_root / server, check_counts=False, with_images=False)
        runs.append(Run(name, {benchmark.name: evaluate_submissions(paths, benchmark)}))
    return runs


def _of_submission(file: Path) -> tuple[str, Path]:
    """Return the row that a submission file belongs to, and the folder that all files of the row are in.

    `pvlf-hf evaluate` writes `NAME/evaluation/submissions/METHOD/PROTOCOL/FILE`; others usually `NAME/FILE`.
    """
    folder = file.parent
    if len(folder.parts) > 2 and folder.parts[-3] == "submissions":
        method, folder = folder.parts[-2], folder.parent.parent
        name = informative_name(folder, folder.resolve())
        return name if method == "composed" else f"{name}: {method}", folder / method
    return informative_name(folder) or file.stem, folder if folder.name else file


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
