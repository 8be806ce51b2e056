"""Gives memory that a process has freed back to the system; the C library keeps it otherwise.

Not a bound on what a process may need. Called by the driver (`run`) and by encoder actors, which both run for days:
what is freed in small holes is used again only in part, and what a process holds would creep up with each shard.
"""

from __future__ import annotations

import ctypes
import time
from contextlib import suppress

# 42 ms of encoding on a CPU each time (`small`, 256x256x17: 8 for the call, 34 to take pages again): 0.07 %.
_EVERY_S = 60.0


def give_memory_back() -> None:
    """Returns freed pages now: tens of milliseconds, and as much again when they are needed once more.

    When a snapshot still held the records of an output whole, a driver of 8,000 shards grew by 15 MiB without this,
    with it by 3.
    """
    with suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


class MemoryTrimmer:
    """Gives memory back from time to time: often enough that it does not creep, rarely enough to cost nothing."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()

    def trim_if_due(self) -> None:
        """For the end of a piece of work; does nothing where the last time was less than a minute ago."""
        now_s = time.monotonic()
        if now_s - self._last_s >= _EVERY_S:
            self._last_s = now_s
            give_memory_back()
