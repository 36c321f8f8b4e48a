"""Fill the table of `tests/RELIABILITY.md`: each row is a test, so that the suite fails if a claim no longer holds.

    python tests/reliability.py           # the quick rows, part of the suite
    python tests/reliability.py --long    # the long ones, `tests/long_*.py`, which the suite leaves out
    python tests/reliability.py --break   # applies each row's edit in a copy, and records how its test fails;
                                          # with --long the edits of the long rows

A test's marker declares its row: chapter, claim, and one edit of a file that must make the test fail, all as
literals. `figure` records the row's figure: counts or errors, not seconds, so that two runs write the same:

    @pytest.mark.reliability(4, "PDF is not read as an image", broken=("src/pvlf_hf/x.py", "old text", "new text"))
    def test_pdf_is_refused(figure):
        ...
        figure("12 files, 12 refused")

`-k` selects tests by a part of their name. Results are stored in `tests/reliability.json`; rows that are not run keep
theirs, and rows whose test was deleted are removed.
"""

import argparse
import ast
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
ROOT = TESTS.parent
DOCUMENT, FOUND = TESTS / "RELIABILITY.md", TESTS / "reliability.json"
START, END = "<!-- table: written by tests/reliability.py -->", "<!-- end of table -->"


def declared() -> dict[str, tuple[int, str, tuple[str, str, str]]]:
    """Return chapter, claim and edit of each marked test by node id, read from the sources without importing them."""
    rows = {}
    for file in sorted([*TESTS.glob("test_*.py"), *TESTS.glob("long_*.py")]):
        for node in ast.parse(file.read_text()).body:
            for mark in getattr(node, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.reliability":
                    edit = {word.arg: ast.literal_eval(word.value) for word in mark.keywords}["broken"]
                    rows[f"tests/{file.name}::{node.name}"] = (*map(ast.literal_eval, mark.args), edit)
    return rows


class Figures:
    """Pytest plugin that records the figure of each marked test."""

    def __init__(self):
        self.of = {}

    def pytest_runtest_logreport(self, report):
        row = report.nodeid.split("[")[0]
        if report.failed:
            self.of[row] = ["**failed**"]
        elif report.skipped:
            self.of[row] = [f"not run: {report.longrepr[2]}"]
        elif report.when == "call" and self.of.get(row) != ["**failed**"]:
            self.of.setdefault(row, []).extend(value for name, value in report.user_properties if name == "figure")


def measure(files: list[str], options: list[str]) -> tuple[int, dict[str, str]]:
    """Run marked tests; return pytest's exit code and the figures by node id."""
    figures = Figures()
    code = pytest.main(["-m", "reliability", "--durations=0", *options, *files], plugins=[figures])
    return int(code), {row: "; ".join(found) for row, found in figures.of.items()}


def break_on_purpose(row: str, edit: tuple[str, str, str]) -> str:
    """Run a test in a copy of the repository with one edit; return its failure message."""
    name, old, new = edit
    with tempfile.TemporaryDirectory() as copy:
        for part in ("src", "tests", "train_scripts", "model_cards", *(p.name for p in ROOT.iterdir() if p.is_file())):
            into = Path(copy, part)
            shutil.copytree(ROOT / part, into) if (ROOT / part).is_dir() else shutil.copy(ROOT / part, into)
        file = Path(copy, name)
        text = file.read_text()
        if text.count(old) != 1:
            raise ValueError(f"{row}: {old!r} is {text.count(old)} times in {name}, expected once")
        file.write_text(text.replace(old, new))
        environment = {**os.environ, "PYTHONPATH": str(Path(copy, "src")), "COLUMNS": "400"}
        command = [sys.executable, "-m", "pytest", "-n0", "-x", "-rfE", "--durations=0", row]
        run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if run.returncode == 0:
        return "**still passes**"
    failure = [line.partition(" - ")[2] for line in run.stdout.splitlines() if re.match(f"(FAILED|ERROR) {row}", line)]
    if not failure:
        raise RuntimeError(f"{row} did not run after the edit of {name}:\n{run.stdout}{run.stderr}")
    failure = re.sub(r"(/[\w.+-]+)+/", "", failure[0])  # no paths of this machine
    return failure if len(failure) <= 120 else failure[:117] + "..."


def render(found: dict[str, dict[str, str]]) -> str:
    """Render the table, by chapter and test."""
    rows = [
        "| | claim | figure | deliberate break: how the test failed | test |",
        "| --- | --- | --- | --- | --- |",
    ]
    for test, (chapter, claim, (file, old, new)) in sorted(declared().items(), key=lambda row: (row[1][0], row[0])):
        cells = found.get(test, {})
        edit = f"`{Path(file).name}`: {_code(old)} → {_code(new) if new else 'nothing'}: "
        seen = edit + _cell(cells.get("seen", "not broken yet"))
        rows.append(
            f"| {chapter} | {_cell(claim)} | {_cell(cells.get('figure', 'not run yet'))} | {seen} | `{test}` |"
        )
    return "\n".join([*rows, "", f"Last run of the long rows: {found.get('long', 'none')}.", ""])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{_cell(text)}`".replace("``", "`")


def machine() -> str:
    """Describe the machine, without names or dates."""
    return (
        f"{os.cpu_count()} {platform.machine()} cores, {platform.system()}, Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}"
    )


def write(found: dict[str, dict[str, str]]) -> None:
    """Write both files, without rows of deleted tests."""
    kept = {*declared(), "long"}
    found = {row: cells for row, cells in sorted(found.items()) if row in kept}
    FOUND.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    before, rest = DOCUMENT.read_text().split(START)
    DOCUMENT.write_text(f"{before}{START}\n{render(found)}{END}{rest.split(END)[1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--long", action="store_true", help="the long rows instead of the quick ones")
    parser.add_argument("--break", action="store_true", dest="broken", help="break what rows guard, in a copy")
    parser.add_argument("-k", default="", help="only tests with this in their name")
    args = parser.parse_args()
    code, rows, new = 0, declared(), {}
    if args.broken:
        for row, (_, _, edit) in rows.items():
            if args.k in row and row.startswith("tests/long_") == args.long:
                seen = break_on_purpose(row, edit)
                print(f"{row}: {seen}", flush=True)
                new[row] = {"seen": seen}
                code |= seen == "**still passes**"
    else:
        files = sorted(map(str, TESTS.glob("long_*.py"))) if args.long else []
        code, figures = measure(files, ["-n0"] * args.long + ["-k", args.k] * bool(args.k))
        new = {row: {"figure": figure} for row, figure in figures.items()}
    # read as late as possible: another run may have written it meanwhile
    found = json.loads(FOUND.read_text()) if FOUND.exists() else {}
    for row, cells in new.items():
        found.setdefault(row, {}).update(cells)
    if args.long and not args.broken:
        found["long"] = f"`python tests/reliability.py --long`, {machine()}"
    write(found)
    return code


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
