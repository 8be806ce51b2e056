"""What a process gives back."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from pipeline import memory


def test_memory_freed_in_holes_goes_back_to_the_system() -> None:
    script = textwrap.dedent("""
        import psutil
        from pipeline.memory import give_memory_back

        pieces = [b"x" * (100_000 + number) for number in range(1_000)]
        kept = pieces[::50]
        del pieces
        before = psutil.Process().memory_full_info().uss
        give_memory_back()
        print((before - psutil.Process().memory_full_info().uss) >> 20, len(kept))
    """)
    # Without mapping each piece by itself, as encoders work on a CPU.
    tunables = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184"}
    ended = subprocess.run([sys.executable, "-c", script], env=tunables, capture_output=True, text=True, check=True)
    assert int(ended.stdout.split()[0]) > 80


def test_memory_is_given_back_once_a_minute_and_not_after_every_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    now_s = 1000.0
    monkeypatch.setattr(memory.time, "monotonic", lambda: now_s)
    monkeypatch.setattr(memory, "give_memory_back", lambda: given.append(now_s))
    trimmer = memory.MemoryTrimmer()
    for _ in range(12 * 60):
        now_s += 1.0
        trimmer.trim_if_due()
    assert given == [1000.0 + 60.0 * turn for turn in range(1, 13)]
