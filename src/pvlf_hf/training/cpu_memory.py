"""Memory that the C library keeps for the next training step on a CPU, instead of handing it back each time.

A step releases its activations and allocates as many again in the next. glibc hands large blocks back to the operating
system at once and gets new, empty pages, which cost up to a third of a step.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Numbers of glibc's settings (`malloc.h`)."""

ALL = 2**31 - 1
"""Highest value that glibc takes: all that is free stays."""

GROWTH = 64 * 2**20
"""Bytes by which the heap grows at a time (our choice)."""

DEFAULTS = {M_MMAP_MAX: 65536, M_TRIM_THRESHOLD: 128 * 1024, M_TOP_PAD: 128 * 1024}
"""glibc's own values."""


@contextmanager
def kept_memory(wanted: bool = True) -> Iterator[None]:
    """Have the C library keep what is freed, and return it to the operating system at the end; only glibc can.

    The process stays as large as its largest step until then, and somewhat larger: blocks are not as close to each
    other as the system's pages would be.

    Args:
        wanted: whether to do so; other C libraries are left as they are.
    """
    library: Any = ctypes.CDLL(None) if wanted and sys.platform == "linux" else None
    if not (hasattr(library, "mallopt") and hasattr(library, "malloc_trim")):
        yield
        return
    try:
        for name, value in {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: ALL, M_TOP_PAD: GROWTH}.items():
            library.mallopt(name, value)
        yield
    finally:
        for name, value in DEFAULTS.items():
            library.mallopt(name, value)
        library.malloc_trim(0)


__all__ = ["kept_memory"]
