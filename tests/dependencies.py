"""Write the table of users' dependencies in `tests/RELIABILITY.md`: purpose, reason, licence and size.

python tests/dependencies.py
"""

import re
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

TESTS = Path(__file__).parent
DOCUMENT = TESTS / "RELIABILITY.md"
START, END = "<!-- dependencies: written by tests/dependencies.py -->", "<!-- end of dependencies -->"

PURPOSES = {
    "torch": ("tensors, autograd, DDP and FSDP", "what Transformers models are made of"),
    "transformers": ("BLIP, CLIP, tokenizers, Trainer, Auto classes", "the ecosystem that this package is for"),
    "accelerate": ("processes, mixed precision, sharding", "the Trainer needs it"),
    "datasets": (
        "tables with lazy images, streams, the Hub's data",
        "memory-mapped; the ecosystem's form of data",
    ),
    "huggingface_hub": ("uploads, downloads, model cards", "Transformers needs it"),
    "safetensors": ("weights, embeddings and caches on disk", "runs no code, is memory-mapped; Transformers needs it"),
    "filelock": ("one writer of a cache at a time", "pure Python; datasets and huggingface_hub need it"),
    "pillow": ("decoding, resizing and drawing images", "the reference pixels are Pillow's, to the bit"),
    "numpy": ("pixels between Pillow and PyTorch", "Transformers needs it"),
    "typer": ("the command line", "Transformers needs it"),
}

ALLOWED = {"Apache-2.0", "MIT", "MIT-CMU", "BSD", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "ISC", "Zlib", "BSL-1.0"}
ALLOWED |= {"PSF-2.0", "CNRI-Python", "CC0-1.0", "MPL-2.0"}
"""Licences that require attribution at most, and MPL-2.0 (tqdm), under which changes to its files stay open."""

NAMES = {
    "Apache Software License": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "BSD License": "BSD",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
"""What packages without an SPDX expression call them."""


def dependencies() -> list[str]:
    """Return the names of the packages that every user installs directly."""
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]
    return [Requirement(requirement).name for requirement in project["dependencies"]]


def closure(*names: str) -> dict[str, Distribution]:
    """Return the installed packages among these and their requirements, by normalised name."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name not in found:
            try:
                found[name] = distribution(name)
            except PackageNotFoundError:  # of another platform's build, such as CUDA's
                continue
            needs = map(Requirement, found[name].requires or [])
            waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def licences(package: Distribution) -> set[str]:
    """Return the SPDX names of a package's licences; a name that is not SPDX is returned as given."""
    metadata = package.metadata
    named = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier", []) if c.startswith("License ::")]
    if not named or metadata.get("License-Expression"):
        expression = metadata.get("License-Expression") or metadata.get("License") or "none"
        named = re.split(r" AND | OR |[()]", re.sub(r" WITH [\w-]+", "", expression.split("\n")[0]))
    return {NAMES.get(name.strip(), name.strip()) for name in named if name.strip()}


def size(packages: dict[str, Distribution]) -> float:
    """Return the size of packages on disk, in MB."""
    files = [package.locate_file(file) for package in packages.values() for file in package.files or []]
    return sum(Path(str(file)).stat().st_size for file in files if Path(str(file)).is_file()) / 1e6


def table() -> str:
    rows = ["| | purpose | reason | licence | MB alone | MB with its requirements |", "| --- " * 6 + "|"]
    for name in dependencies():
        whole = closure(name)
        (own,) = (package for key, package in whole.items() if key == re.sub(r"[-_.]+", "-", name).lower())
        purpose, why = PURPOSES[name]
        alone, together = size({name: own}), size(whole)
        licence = ", ".join(sorted(licences(own)))
        rows.append(f"| {name} | {purpose} | {why} | {licence} | {alone:.0f} | {together:.0f} |")
    everything = closure(*dependencies())
    kinds = sorted(set().union(*map(licences, everything.values())))
    rows += ["", f"Together {len(everything)} packages, {size(everything):.0f} MB, under {', '.join(kinds)}."]
    return "\n".join(rows) + "\n"


def main():
    before, rest = DOCUMENT.read_text().split(START)
    DOCUMENT.write_text(f"{before}{START}\n{table()}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
