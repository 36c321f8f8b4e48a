"""Long run of the fuzzer; `python tests/reliability.py --long` runs it, the suite does not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

RUNS = {
    "laion-cir": 7_000,
    "cirr": 7_000,
    "cirr-gallery": 7_000,
    "fashioniq": 7_000,
    "circo": 7_000,
    "circo-gallery": 7_000,
    "submission": 20_000,
    "image": 40_000,
    "csv": 1_000,
    "jsonl": 1_000,
    "parquet": 1_000,
}


@pytest.mark.reliability(
    4,
    "Coverage-guided fuzzing of images, annotations, tables and submission files: only results or a "
    "`ValueError`, no input over 10 s, no process over 1000 MiB",
    broken=("src/pvlf_hf/data/annotations.py", "if key not in record:", "if False:"),
)
def test_guided_by_coverage(tmp_path, figure):
    lines, total = [], 0
    for target, runs in RUNS.items():
        command = [sys.executable, str(TESTS / "fuzz.py"), target, "--runs", str(runs)]
        run = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ)
        output = run.stdout.decode(errors="replace")
        assert run.returncode == 0 and f"Done {runs} in" in output, f"{target}: {output[-2000:]}"
        reached, peak = (max(map(int, re.findall(rf"{what}: (\d+)", output))) for what in ("cov", "rss"))
        lines.append(f"{target} {runs:,} ({reached} edges, {peak} MiB)")
        total += runs
    assert total >= 10**5
    figure(f"{total:,} inputs: {', '.join(lines)}")
