"""`training/cpu_memory.py`: memory of a training step is kept for the next one, and given back at the end."""

import resource
import sys
from pathlib import Path

import pytest
import torch
from test_trainer import arguments, squares  # noqa: F401  # the fixture
from transformers import TrainerCallback

from pvlf_hf import PVLFTrainer
from pvlf_hf.training.cpu_memory import kept_memory

BLOCKS, BYTES = 4, 2**26  # a block is more than glibc keeps by itself
PAGES = BLOCKS * BYTES // resource.getpagesize()

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other C libraries are left as they are")


def new_pages(steps=3):
    """Count the pages that the system hands out while some steps allocate and free the same blocks."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        [torch.ones(BYTES // 4) for _ in range(BLOCKS)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def held():
    """Return the pages that the process has."""
    return int(Path("/proc/self/statm").read_text().split()[1])


def test_freed_memory_is_kept_and_given_back_at_the_end():
    before = held()
    with kept_memory(False):
        assert new_pages() >= 3 * PAGES
    with kept_memory():
        new_pages(1)
        assert held() > before + PAGES / 2 and new_pages() < PAGES / 100
    assert held() < before + PAGES / 2 and new_pages() >= 3 * PAGES


@pytest.mark.parametrize("keep", [True, False])
def test_training_keeps_memory_unless_told_not_to(tiny_model, tiny_processor, squares, tmp_path, keep):  # noqa: F811
    class Allocating(TrainerCallback):
        pages = []

        def on_step_begin(self, *_, **__):
            self.pages.append(new_pages(1))

    args = arguments(tmp_path, keep_memory=keep)
    PVLFTrainer(tiny_model, args, squares, processing_class=tiny_processor, callbacks=[Allocating]).train()
    assert all(pages < PAGES / 10 if keep else pages >= PAGES for pages in Allocating.pages[1:])
    assert new_pages() >= 3 * PAGES
