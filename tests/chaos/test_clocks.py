"""Clocks that are wrong by days, differ between writers or step back change nothing that is written."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from chaos.checker import check, plan_of_slices, read_output

ROOT = Path(__file__).resolve().parent.parent.parent

# Everything in the pipeline that asks what time it is, and why no harm can come of the answer.
MAY_ASK = {
    "pipeline/actors.py: datetime.now": "created_at of a record, for people: nothing reads it",
    "pipeline/calibration.py: time.time": "how long a process took to start, for the estimate of a dry run",
    "pipeline/columns.py: datetime.now": "created_at of a record, for people: nothing reads it",
    "pipeline/committed.py: st_atime_ns": "which copy in a cache makes room first",
    "pipeline/committed.py: st_mtime": "which half-fetched copy in a cache is nobody's any more",
    "pipeline/committed.py: st_mtime_ns": "whether a copy in a cache is the one that was checked: equal or not",
    "pipeline/committed.py: time.time": "which half-fetched copy in a cache is nobody's any more",
    "pipeline/committed.py: time.time_ns": "which copy in a cache makes room first",
    "pipeline/storage.py: st_mtime_ns": "the version of a local input: equal or not, never earlier or later",
    "pipeline/report.py: datetime.now": "reported_at of a report, for people: nothing reads it",
}
_ASKED_OF = {"time": ("time", "time_ns", "ctime", "localtime", "gmtime", "strftime"), "uuid": ("uuid1",)}
_ALONE = ("st_mtime", "st_mtime_ns", "st_ctime", "st_ctime_ns", "st_atime", "st_atime_ns", "set_to_current_time")
_OF_DATES = ("now", "utcnow", "today")


def _questions(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            base = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr in _ALONE:
                found.add(node.attr)
            elif node.attr in _ASKED_OF.get(base, ()) or node.attr in _OF_DATES:
                found.add(f"{base}.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and node.module in _ASKED_OF:
            asked = _ASKED_OF[node.module]
            found |= {f"{node.module}.{alias.name}" for alias in node.names if alias.name in asked}
    return {f"{path.relative_to(ROOT)}: {name}" for name in found}


def test_only_these_places_of_the_pipeline_ask_what_time_it_is() -> None:
    asking = set().union(*(_questions(path) for path in (ROOT / "pipeline").glob("*.py")))
    assert asking - MAY_ASK.keys() == set(), "give the reason in MAY_ASK, or use time.monotonic()"


def _faketime() -> str:
    """The library that changes the clock of a process: of the Debian package, or as LIBFAKETIME says."""
    at_hand = [os.environ.get("LIBFAKETIME", ""), *map(str, Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))]
    found = next((path for path in at_hand if path and Path(path).is_file()), None)
    if found is None:
        say = "libfaketime is not here: apt-get install libfaketime, or set LIBFAKETIME to its .so file"
        if os.environ.get("LATENTMILL_REQUIRE_TOOLS") == "1":
            pytest.fail(say)
        pytest.skip(say)
    return found


def _clock(clock: Path, shift: str) -> dict[str, str]:
    """The environment of a process whose wall clock is shifted as this file says, and goes on doing so."""
    clock.write_text(shift)
    wall_only = {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}
    return {"LD_PRELOAD": _faketime(), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1", **wall_only}


def _start(source: Path, output: Path, name: str, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    flags = ["--input", str(source), "--output", str(output), "--name", name]
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    return subprocess.Popen(
        [sys.executable, "-m", "chaos.writer", *flags], env={**os.environ, "PYTHONPATH": path, **env}
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_writers_whose_clocks_differ_by_days_and_step_back_write_what_one_with_a_right_clock_does(
    tmp_path: Path,
) -> None:
    source, output = tmp_path / "in", tmp_path / "latents"
    source.mkdir()
    for number in range(40):
        (source / f"{number:03d}.mp4").write_bytes(f"video {number}".encode() * 1000)
        (source / f"{number:03d}.txt").write_text(f"caption {number}")
    clean = tmp_path / "clean"
    assert _start(source, clean, "clean", {}).wait(300) == 0
    shown = "import time; print(time.time(), time.monotonic())"
    env = {**os.environ, **_clock(tmp_path / "clock", "-1d")}
    said = subprocess.run([sys.executable, "-c", shown], env=env, capture_output=True, text=True, check=True).stdout
    wall, monotonic = map(float, said.split())
    assert 80_000 < time.time() - wall < 90_000, "the clock is changed"
    assert abs(time.monotonic() - monotonic) < 1000
    writers = [
        _start(source, output, f"at {shift}", _clock(tmp_path / f"clock{shift}", shift))
        for shift in ("+1d", "-1d", "+0")
    ]
    try:
        # The third one's clock jumps forth and back by days while it works.
        jumping, number = tmp_path / "clock+0", 0
        while any(writer.poll() is None for writer in writers) and number < 3000:
            number += 1
            (tmp_path / "next").write_text(f"{'+-'[number % 2]}{number % 5}d")
            (tmp_path / "next").replace(jumping)
            time.sleep(0.1)
        assert [writer.wait(1) for writer in writers] == [0, 0, 0]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    objects = read_output(str(output))
    verdict = check(objects, plan_of_slices(objects))
    assert verdict.problems == []
    assert verdict.num_recorded == verdict.num_planned == 40
    assert verdict.files == check(read_output(str(clean)), plan_of_slices(objects)).files
