"""Temporary files are private and do not outlive a kill by more than one start."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import scratch
from pipeline.scratch import Scratch

ROOT = Path(scratch.__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def _start(purpose: str, parent: Path) -> subprocess.Popen[str]:
    """A process that has a folder with files in it, and keeps it until it is killed."""
    code = (
        "import sys, time; from pipeline.scratch import Scratch; mine = Scratch(sys.argv[1]); folder = mine.path; "
        "(folder / 'large').write_bytes(bytes(1000)); (folder / 'below').mkdir(); print(folder, flush=True); "
        "time.sleep(1000)"
    )
    env = {**os.environ, "TMPDIR": str(parent), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code, purpose], env=env, stdout=subprocess.PIPE, text=True)


def test_nobody_else_may_look_into_a_folder_and_it_is_gone_at_the_end(parent: Path) -> None:
    before = os.umask(0)
    try:
        with Scratch("actor") as folder:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert folder.parent == parent
    finally:
        os.umask(before)
    assert list(parent.iterdir()) == []


def test_folders_of_killed_processes_are_removed_by_the_next_start_and_everything_else_is_kept(parent: Path) -> None:
    (parent / "latentmill-out" / "data").mkdir(parents=True)
    (parent / "latentmill-actor-mine" / "data").mkdir(parents=True)
    kept = {"latentmill-out", "latentmill-actor-mine"}
    processes = [_start(purpose, parent) for purpose in ("actor", "driver")]
    try:
        folders = [Path(process.stdout.readline().strip()) for process in processes if process.stdout is not None]
        with Scratch("audit") as mine:
            assert {path.name for path in parent.iterdir()} == {mine.name, *(f.name for f in folders), *kept}
        # Alive but frozen is not dead.
        processes[0].send_signal(signal.SIGSTOP)
        processes[1].kill()
        processes[1].wait()
        with Scratch("audit") as mine:
            assert {path.name for path in parent.iterdir()} == {mine.name, folders[0].name, *kept}
            assert (folders[0] / "large").exists()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    with Scratch("actor") as mine:
        assert {path.name for path in parent.iterdir()} == {mine.name, *kept}
