"""`training/cpu_memory.py`: memory of a training step is kept for the next one, and given back at the end.

In processes of their own: what glibc does depends on what a process has freed before.
"""

import json
import resource
import sys
from pathlib import Path

import pytest
from forked import run_python
from test_trainer import arguments

BLOCKS, BYTES = 4, 2**26  # a block is more than glibc keeps by itself
PAGES = BLOCKS * BYTES // resource.getpagesize()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="other C libraries are left as they are"),
]

START = f"""
import json
import sys
from pathlib import Path

import torch

from pvlf_hf.training.cpu_memory import kept_memory


def held():
    return int(Path("/proc/self/statm").read_text().split()[1])


def held_after_use():
    [torch.ones({BYTES} // 4) for _ in range({BLOCKS})]
    return held()
"""
"""Functions that count the pages that the process holds, and those after blocks were allocated and freed."""

ALONE = """
start = held()
with kept_memory(False):
    seen = {"as it is": held_after_use() - start}
with kept_memory():
    seen["kept"] = [held_after_use() - start for _ in range(20)]
seen["afterwards"] = held() - start
print(json.dumps(seen))
"""

TRAINING = """
from squares import square_triplets
from test_trainer import COLOURS, TOKENS, arguments
from tiny import make_model, make_processor
from transformers import TrainerCallback

from pvlf_hf import PVLFTrainer

folder = Path(sys.argv[1])
squares = square_triplets(folder, COLOURS, lambda _, target: f"make it {TOKENS[target]}")
seen = {}
for keep in (False, True):
    class Allocating(TrainerCallback):
        pages, start = [], held()

        def on_step_begin(self, *_, **__):
            self.pages.append(held_after_use() - self.start)

    args = arguments(folder, keep_memory=keep)
    PVLFTrainer(make_model(), args, squares, processing_class=make_processor(), callbacks=[Allocating]).train()
    seen[str(keep)] = Allocating.pages
print(json.dumps(seen))
"""


def run(program, *arguments):
    done = run_python(["-c", START + program, *arguments], cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_freed_memory_is_kept_and_given_back_at_the_end():
    seen = run(ALONE)
    assert seen["as it is"] < PAGES / 10 and seen["afterwards"] < PAGES / 10
    # Blocks that do not fit between others make it larger, but not without end.
    assert 0.9 * PAGES < min(seen["kept"]) and max(seen["kept"][-3:]) - min(seen["kept"][-3:]) < PAGES / 10


def test_training_keeps_memory_unless_told_not_to(tmp_path):
    seen = run(TRAINING, str(tmp_path))
    assert len(seen["False"]) == len(seen["True"]) == 4  # steps; what they hold themselves is small
    assert max(seen["False"]) < 0.5 * PAGES and min(seen["True"]) > 0.9 * PAGES


def test_memory_is_kept_by_default_with_cached_features(tmp_path):
    for given, kept in (({}, False), ({"feature_cache": str(tmp_path), "finetuning": "text"}, True)):
        assert arguments(tmp_path, **given).keeps_memory == kept
        assert [arguments(tmp_path, **given, keep_memory=asked).keeps_memory for asked in (True, False)] == [
            True,
            False,
        ]
