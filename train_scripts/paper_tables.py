"""The tables of the paper: published figures from `paper_tables.json`, our results beside them, and Markdown."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from paper_methods import PUBLISHED, Published

from pvlf_hf.atomic_files import whole
from pvlf_hf.embeddings.encoding import QueryMethod
from pvlf_hf.evaluation.results import environment

PAPER = Path(__file__).with_name("paper_tables.json")
RECIPES = Path(__file__).with_name("configs")
WEIGHTS = {"last": "last epoch", "best": "best epoch by validation", "untrained": "no training"}
"""Weights of a run that are evaluated: name of their folder, and description."""


@dataclass(frozen=True)
class Row:
    """A row of the paper: with a `recipe` it is trained, with a `baseline` only evaluated, else `quoted`.

    Args:
        name: name of the row for `--rows`.
        labels: cells before the figures.
        paper: published figures in percent, None where a cell is empty.
        recipe: name of a file in `configs/paper`.
        baseline: query method of an untrained baseline.
        model: dual encoder of the baseline.
        quoted: from another paper; run by `PUBLISHED`, and only if it is named.
    """

    name: str
    labels: tuple[str, ...]
    paper: tuple[float | None, ...]
    recipe: str | None = None
    baseline: QueryMethod | None = None
    model: str | None = None
    quoted: bool = False

    @property
    def published(self) -> Published | None:
        """How a quoted row is run here."""
        return PUBLISHED[self.name] if self.quoted else None

    @property
    def recipe_file(self) -> Path | None:
        """The recipe that it is trained by; None if nothing is trained."""
        if self.published is None:
            return RECIPES / "paper" / f"{self.recipe}.yaml" if self.recipe else None
        return RECIPES / "methods" / f"{self.published.recipe}.yaml" if self.published.recipe else None

    def folders(self, output_dir: Path, seeds: Sequence[int]) -> list[Path]:
        """Return the folders of its runs: one a seed, or one if nothing is trained; rows of one recipe share them."""
        if self.recipe_file:
            home = output_dir / "methods" if self.quoted else output_dir
            return [home / self.recipe_file.stem / f"seed{seed}" for seed in seeds]
        if self.baseline:
            return [output_dir / "baselines" / self.baseline]
        return [output_dir / "methods" / self.name.casefold()]

    def protocol(self, name: str) -> str:
        """Return the protocol that it is evaluated under where its table has one of this name."""
        return self.published.protocols.get(name, name) if self.published else name


def _row(labels: list[str], paper: list[float | None], **rest: Any) -> Row:
    return Row(labels=tuple(labels), paper=tuple(paper), **rest)


@dataclass(frozen=True)
class Table:
    """A table of the paper; `columns` maps a heading to the protocol, benchmark and metric of our figure."""

    number: int
    title: str
    labels: tuple[str, ...]
    columns: dict[str, tuple[str, str, str]]
    rows: tuple[Row, ...]
    footnotes: tuple[dict[str, Any], ...]

    @property
    def protocols(self) -> list[str]:
        """Protocols that a row is evaluated under; CIRR adds its test split, for the submission files."""
        names = list(dict.fromkeys(protocol for protocol, _, _ in self.columns.values()))
        return [*names, "cirr-test1"] if "cirr-val" in names else names

    def marks(self, row: str | None = None, column: str | None = None) -> str:
        """Render the footnote marks of the table, of a row, or of a cell."""
        scope = ({"rows"} if row else set()) | ({"columns"} if column else set())
        ids = [
            note["id"]
            for note in self.footnotes
            if {"rows", "columns"} & note.keys() == scope
            and (not row or row in note["rows"])
            and (not column or column in note["columns"])
        ]
        return "".join(f"[^{i}]" for i in ids)


def load_tables() -> dict[int, Table]:
    """Load the tables of the paper by number, from `paper_tables.json`."""
    tables: dict[str, Any] = json.loads(PAPER.read_text(encoding="utf-8"))["tables"]
    return {
        int(number): Table(
            int(number),
            table["title"],
            tuple(table["labels"]),
            {name: tuple(source) for name, source in table["columns"].items()},
            tuple(_row(**row) for row in table["rows"]),
            tuple(table["footnotes"]),
        )
        for number, table in tables.items()
    }


def write_table(table: Table, output_dir: Path, seeds: Sequence[int]) -> None:
    """Write `table{N}.json` and `table{N}.md` from the results so far."""
    rows = [entry(table, row, output_dir, seeds) for row in table.rows]
    content = {
        "table": table.number,
        "title": table.title,
        "splits": {"CIRR": {"paper": "test1", "ours": "val"}, "FashionIQ": {"paper": "val", "ours": "val"}},
        "rows": rows,
        "footnotes": table.footnotes,
        "environment": environment(),
    }
    for ending, text in (("json", json.dumps(content, indent=2, ensure_ascii=False)), ("md", render(table, rows))):
        with whole(output_dir / f"table{table.number}.{ending}") as partial:
            partial.write_text(text + "\n", encoding="utf-8")


def entry(table: Table, row: Row, output_dir: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Return a row: published figures, ours (mean and deviation over seeds, by weights), differences, caveats."""
    paper = dict(zip(table.columns, row.paper, strict=True))
    ours, caveats, folders = {}, set(), row.folders(output_dir, seeds)
    for name in WEIGHTS:
        measured = [dict(measurements(table, row, folder / name)) for folder in folders]
        by_seed = [figures(table, its) for its in measured if its]
        if by_seed:
            ours[name] = {c: spread([its[c] for its in by_seed if c in its]) for c in table.columns}
            caveats |= {f"{len(by_seed)} of {len(folders)} seeds so far"} if len(by_seed) < len(folders) else set()
            caveats |= {
                text for folder, its in zip(folders, measured, strict=True) for text in caveats_of(folder, its)
            }
    if ours and row.published:
        caveats |= {row.published.differs, *joins(table, row.published)}
    return {
        "name": row.name,
        "labels": row.labels,
        **({"quoted": True} if row.quoted else {"recipe": row.recipe} if row.recipe else {"model": row.model}),
        "paper": paper,
        "ours": ours,
        "difference": {
            name: {c: round(its["mean"] - paper[c], 2) for c, its in columns.items() if its and paper[c] is not None}
            for name, columns in ours.items()
        },
        "caveats": sorted(caveats),
    }


def joins(table: Table, published: Published) -> list[str]:
    """Return which protocols of the table a quoted method replaces, with those of its authors."""
    return [f"{new} in place of {old}" for old, new in published.protocols.items() if old in table.protocols]


def measurements(table: Table, row: Row, folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield each protocol of the table that the folder has a row's results of, with its evaluations."""
    for protocol in dict.fromkeys(protocol for protocol, _, _ in table.columns.values()):
        file = folder / row.protocol(protocol) / "results.json"
        if file.exists():
            yield protocol, json.loads(file.read_text(encoding="utf-8"))["evaluations"]


def figures(table: Table, measured: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Return our figures in percent, by column."""
    metrics = {(protocol, e["benchmark"]): e["metrics"] for protocol, its in measured.items() for e in its}
    return {
        column: 100 * metrics[protocol, benchmark][metric]
        for column, (protocol, benchmark, metric) in table.columns.items()
        if (protocol, benchmark) in metrics
    }


def caveats_of(run: Path, measured: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Yield why figures are not those of the recipe on the full benchmark: overrides and missing files."""
    if measured and (overrides := json.loads((run / "arguments.json").read_text(encoding="utf-8"))["overrides"]):
        yield f"run with `{' '.join(overrides)}`"
    for evaluation in (e for its in measured.values() for e in its):
        if (missing := evaluation["protocol"]["missing"]) != "none":
            yield f"{evaluation['benchmark']} lacks files: {missing}"


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Return mean and sample standard deviation in percent, None without values."""
    if not values:
        return None
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "seeds": len(values)}


def render(table: Table, rows: Sequence[dict[str, Any]]) -> str:
    """Render the table in Markdown, with footnotes."""
    heads = [*table.labels, "figures", *table.columns]
    parts = [f"# Table {table.number}: {table.title}{table.marks()}", "Percent; ± standard deviation over seeds."]
    if "cirr-val" in table.protocols:
        parts.append(
            "**CIRR: the paper's figures are of the test server, ours of val**, so their difference is only an "
            "indication. The files to upload for test figures are `cirr_test1_recall.json` and "
            "`cirr_test1_recall_subset.json` below `cirr-test1` in the folder of each run."
        )
    lines = [line(heads), "|" + " --- |" * len(heads), *(text for row in rows for text in lines_of(table, row))]
    caveats = [f"- {row['name']}: {'; '.join(row['caveats'])}" for row in rows if row["caveats"]]
    footnotes = [f"[^{note['id']}]: {note['text']}" for note in table.footnotes]
    if caveats:
        caveats = ["Caveats of our figures:", *caveats]
    return "\n\n".join([*parts, "\n".join(lines), *(["\n".join(caveats)] if caveats else []), *footnotes])


def lines_of(table: Table, row: dict[str, Any]) -> Iterator[str]:
    """Yield the line of the paper's figures, then one of ours and one of the difference for each of our weights."""
    paper, ours, difference = "paper", "ours", "difference"
    if "cirr-val" in table.protocols:
        paper, ours, difference = "paper (CIRR: test)", "ours (CIRR: val)", "difference (CIRR: val - test)"
    status = "" if row["ours"] else "; quoted, not run" if row.get("quoted") else "; ours not run yet"
    first, *others = row["labels"]
    printed = [number(row["paper"][column]) + table.marks(row["name"], column) for column in table.columns]
    yield line([first + table.marks(row["name"]), *others, paper + status, *printed])
    blank = [""] * len(table.labels)
    for weights, figures_of in row["ours"].items():
        yield line([*blank, f"{ours}, {WEIGHTS[weights]}", *map(cell, figures_of.values())])
        yield line([*blank, difference, *(number(row["difference"][weights].get(c), "+") for c in table.columns)])


def line(cells: Sequence[str]) -> str:
    """Render a line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def number(value: float | None, sign: str = "") -> str:
    """Render two decimals, or a dash where there is no figure."""
    return "-" if value is None else f"{value:{sign}.2f}"


def cell(figure: dict[str, Any] | None) -> str:
    """Render the mean, with the deviation if there are several seeds."""
    if figure is None:
        return "-"
    return number(figure["mean"]) + (f" ± {figure['std']:.2f}" if figure["std"] is not None else "")
