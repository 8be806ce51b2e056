"""What the long run about memory measures."""

from __future__ import annotations

import mmap
import os

from chaos.memory import slope, written_mib


def test_memory_that_is_written_counts_and_what_is_only_reserved_does_not() -> None:
    mib = bytes(1 << 20)
    # A mapping of its own: an array of this size may lie where the process has written before.
    with mmap.mmap(-1, 40 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as data:
        reserved = written_mib(os.getpid())
        for _ in range(20):
            data.write(mib)
        half = written_mib(os.getpid())
        for _ in range(20):
            data.write(mib)
        whole = written_mib(os.getpid())
    assert 19 < half - reserved < 23
    assert 19 < whole - half < 23


def test_a_slope_does_not_follow_single_peaks() -> None:
    assert slope([(float(x), 3.0 * x + (1000 if x in (5, 40) else 0)) for x in range(60)]) == 3.0
