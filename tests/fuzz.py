"""Coverage-guided fuzzing of the readers in `tests/fuzz_targets.py`.

    pip install atheris  # libFuzzer for Python; only this needs it
    python tests/fuzz.py image --runs 50000

A `ValueError` is a valid answer, and so are problems found by the linter. Anything else, an input of more than
`SECONDS` or a process of more than `MEMORY` ends the run with an exit code, and leaves the input in this folder.
"""

import argparse
import atexit
import random
import signal
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["PIL", "pvlf_hf"]):
    from fuzz_targets import TARGETS, edited, read
    from PIL import Image

    Image.init()  # imports the plug-ins of all formats

PIXELS = 2**22
"""Lower than Pillow's default, so that an image that gets past the limit shows in the memory."""

MEMORY = 1000
"""MiB, half of them for PyTorch and Transformers."""

SECONDS = 10


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--runs", type=int, default=10000)
    args = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = PIXELS
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)  # libFuzzer's clock, which would end the process at exit
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        for number, content in enumerate(TARGETS[args.target][1]()):
            (corpus / str(number)).write_bytes(content)

        def mutate(content, longest, seed):
            chance = random.Random(seed)
            new = edited(content, chance) if chance.random() < 0.7 else None
            return new[:longest] if new else atheris.Mutate(content, longest)

        limits = {"timeout": SECONDS, "rss_limit_mb": MEMORY, "max_len": 4096}
        options = {"atheris_runs": args.runs, "seed": 1, **limits}
        arguments = [sys.argv[0], *(f"-{name}={value}" for name, value in options.items()), str(corpus)]
        atheris.Setup(arguments, lambda content: read(args.target, content, folder), custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
