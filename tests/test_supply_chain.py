"""Installed dependencies, their licences, and the effects of importing the package."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from dependencies import ALLOWED, DOCUMENT, PURPOSES, closure, dependencies, licences

ROOT = Path(__file__).parents[1]

IMPORT_ALL = """
import importlib, pkgutil, socket, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        raise SystemExit(f"{event} {arguments}")

sys.addaudithook(refuse)
import pvlf_hf
names = [module.name for module in pkgutil.walk_packages(pvlf_hf.__path__, "pvlf_hf.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


@pytest.mark.slow
@pytest.mark.reliability(
    6,
    "Importing any module of the package opens no connection and looks up no host, by Python's own audit events",
    broken=(
        "src/pvlf_hf/data/laion_cir.py",
        "SUBSETS = (",
        "import socket\nsocket.getaddrinfo('huggingface.co', 443)\nSUBSETS = (",
    ),
)
def test_importing_opens_no_connection(figure):
    run = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr.splitlines()[-1]
    figure(f"{int(run.stdout)} modules, 0 calls")


@pytest.mark.reliability(
    6,
    "Every user dependency has a reason in the table below; it and its requirements are pinned for `make demo`"
    " and `make test`",
    broken=("pyproject.toml", '    "typer>=0.15"', '    "emoji>=2",\n    "typer>=0.15"'),
)
def test_dependencies_are_justified_and_pinned(figure):
    direct = dependencies()
    assert sorted(PURPOSES) == sorted(direct), "give its reason in tests/dependencies.py and run that"
    table = DOCUMENT.read_text().split("<!-- dependencies")[1]
    assert re.findall(r"^\| (\w+) \|", table, re.MULTILINE) == direct, "run `python tests/dependencies.py`"
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    pinned = {re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins}
    needed = closure(*direct)
    assert not (loose := needed.keys() - pinned - {"setuptools"}), f"constraints.txt lacks {sorted(loose)}"
    figure(f"{len(direct)} dependencies, {len(needed)} packages with what they need")


@pytest.mark.reliability(
    6,
    "All packages that users install have a licence that requires attribution at most, or MPL-2.0",
    broken=("tests/dependencies.py", '"CNRI-Python", ', ""),
)
def test_licences_are_allowed(figure):
    found = {name: licences(package) for name, package in closure(*dependencies()).items()}
    others = {name: sorted(names - ALLOWED) for name, names in found.items() if not names or names - ALLOWED}
    assert not others, others
    figure(f"{len(set().union(*found.values()))} licences")
