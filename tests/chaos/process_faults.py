"""Faults of processes: whole runs on Ray in which something is killed or frozen every few seconds.

Called by `run` and by test_process_faults.py. An episode is one output from nothing to done, by as many drivers, one
after the other, as the faults make necessary. It ends with the verdict of the independent checker and a comparison
with the bytes of an undisturbed run.

What is done, to whom:

- child, actor: kill -9 of a decode child, of an encoder actor;
- freeze: SIGSTOP of an actor; the driver must notice by itself;
- driver: kill -9 of the driver; raylet: kill -9 of the raylet, which takes the driver and all actors with it;
- gcs: kill -9 of Ray's head service; the driver must end by itself;
- zombie: an actor is stopped, its driver killed, the run started again, and the old actor goes on in its midst.
"""

from __future__ import annotations

import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from builders import CLIP_STILLS, CLIP_VIDEOS, pack_clips
from chaos.checker import Verdict, check, plan_of_tars, read_output
from integration import failing_actors
from integration.jobs_under_test import SMALL, RunningJob, run_job

_NUM_SHARDS = 60
# A raylet that is killed leaves its actors half a minute's work: the shards must outlast all faults.
_PACED = (str(Path(failing_actors.__file__)), "Paced")
_CHILD = ("import main; main(sys.argv",)
_COMMANDS = {
    "child": _CHILD,
    "actor": ("ray::Paced", "ray::EncodeActor."),  # between shards, at a shard
    "raylet": ("raylet/raylet",),
    "gcs": ("gcs_server",),
}
KINDS = ("child", "actor", "freeze", "driver", "raylet", "zombie", "gcs")
_ENDS_DRIVER = ("driver", "raylet", "gcs", "zombie")
# Faults come faster than real ones, so the budget of attempts is not what is tried here; deadlines are short for the
# same reason.
_FLAGS = [*SMALL, "--max-attempts", "100", "--silence-timeout-s", "10", "--stall-timeout-s", "120"]
_GCS_PATIENCE = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
_RUN_TIMEOUT_S = 600.0


@dataclass(slots=True)
class ProcessResult:
    """What an episode gave."""

    faults: Counter[str] = field(default_factory=Counter)
    # Seconds until the next record was committed after a fault; for faults that end the driver, from its new start.
    recovery_s: dict[str, list[float]] = field(default_factory=dict)
    # Seconds until the driver ended by itself.
    ending_s: dict[str, list[float]] = field(default_factory=dict)
    verdict: Verdict = field(default_factory=Verdict)
    num_wrong: int = 0
    problems: list[str] = field(default_factory=list)


def make_shards(folder: Path) -> Path:
    """Real clips and stills in a few tars."""
    if not folder.exists():
        pack_clips(folder, _NUM_SHARDS, (*CLIP_VIDEOS, *CLIP_STILLS) * 5)
    return folder


def undisturbed(shards: Path, folder: Path, env: Mapping[str, str]) -> dict[str, str]:
    """The files that a run gives which nothing disturbs: "<record> <content>" -> SHA-256."""
    output = folder / "undisturbed"
    outcome = run_job([*_flags(shards, output), "--num-actors", "1"], env)
    assert outcome.code == 0, outcome.said
    verdict = check(read_output(str(output)), plan_of_tars(shards))
    assert not verdict.problems, verdict.problems
    return verdict.files


def _flags(shards: Path, output: Path) -> list[str]:
    return ["--input", str(shards), "--output", str(output), *_FLAGS]


def episode(
    shards: Path, expected: Mapping[str, str], env: Mapping[str, str], seed: int, kinds: Sequence[str]
) -> ProcessResult:
    """Runs until everything is decided, striking with `kinds` one after the other on the way."""
    with tempfile.TemporaryDirectory(prefix="lm-chaos-") as folder:
        output = Path(folder, "latents")
        running = _Episode(shards, output, {**env, **_GCS_PATIENCE}, random.Random(seed), list(kinds))
        result = running.run()
        result.verdict = check(read_output(str(output)), plan_of_tars(shards), running.seen)
        files = result.verdict.files
        result.num_wrong = sum(expected.get(name) != files.get(name) for name in expected.keys() | files)
        result.problems += result.verdict.problems
        if result.num_wrong:
            said = result.verdict.rejections or "nothing"
            result.problems.append(f"{result.num_wrong} files differ from the undisturbed run's; rejected: {said}")
    return result


class _Episode:
    def __init__(
        self, shards: Path, output: Path, env: Mapping[str, str], chance: random.Random, kinds: list[str]
    ) -> None:
        self.seen: dict[str, str] = {}
        self._shards = shards
        self._output = output
        self._env = env
        self._chance = chance
        self._kinds = kinds
        self._result = ProcessResult()
        self._zombies: list[psutil.Process] = []  # stopped
        self._forgotten: list[psutil.Process] = []  # not ended by their job
        self._awaited: tuple[str, float, int] | None = None  # kind, since when, records then

    def run(self) -> ProcessResult:
        code = -1
        try:
            for _ in range(len(self._kinds) + 3):
                code = self._one_driver()
                if code == 0:
                    break
                check(read_output(str(self._output)), plan_of_tars(self._shards), self.seen)
        finally:
            for process in self._forgotten:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        if code != 0:
            self._result.problems.append(f"the last driver ended with {code}")
        return self._result

    def _one_driver(self) -> int:
        flags = [*_flags(self._shards, self._output), "--num-actors", "1"]
        with RunningJob(flags, self._env, script=_PACED) as job:
            started = time.monotonic()
            if self._awaited is not None:
                self._awaited = (self._awaited[0], started, self._num_records())
            next_fault_s = started + self._chance.uniform(1, 3)
            while job.process.poll() is None and time.monotonic() - started < _RUN_TIMEOUT_S:
                self._note_recovery()
                self._wake_zombies(job)
                if self._kinds and self._awaited is None and time.monotonic() > next_fault_s:
                    # At the work, not before it: a start that is killed again and again never comes to it.
                    has_struck = bool(job.find(*_CHILD)) and self._strike(job, self._kinds[0])
                    if has_struck and self._kinds.pop(0) in _ENDS_DRIVER:
                        return self._ended(job)
                    next_fault_s = time.monotonic() + self._chance.uniform(0, 0.5)
                time.sleep(0.05)
            if job.process.poll() is None:
                self._result.problems.append(f"a driver did not end within {_RUN_TIMEOUT_S} s: {job.said()[-2000:]}")
            self._note_recovery()
            return job.end(5).code if job.process.poll() is not None else -1

    def _strike(self, job: RunningJob, kind: str) -> bool:
        """One fault; False where its victim is not there."""
        if kind == "driver":
            job.process.kill()
        elif kind == "zombie":
            if not self._signal(job, "actor", signal.SIGSTOP, keep=True):
                return False
            job.process.kill()
        elif kind == "freeze":
            if not self._signal(job, "actor", signal.SIGSTOP):
                return False
        elif not self._signal(job, kind, signal.SIGKILL):
            return False
        self._result.faults[kind] += 1
        self._awaited = (kind, time.monotonic(), self._num_records())
        return True

    def _signal(self, job: RunningJob, kind: str, number: int, *, keep: bool = False) -> bool:
        for process in job.find(*_COMMANDS[kind]):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
                if keep:
                    job.forget(process)
                    self._zombies.append(process)
                    self._forgotten.append(process)
                return True
        return False

    def _ended(self, job: RunningJob) -> int:
        """Waits for a driver whose end was caused; it must come in bounded time, and not with success."""
        struck = time.monotonic()
        kind = self._awaited[0] if self._awaited else ""
        code = job.end(120).code
        self._result.ending_s.setdefault(kind, []).append(time.monotonic() - struck)
        if code == 0 and self._num_records() < _NUM_SHARDS:
            self._result.problems.append(f"a driver ended with 0 after {kind}, with work left")
        return code

    def _wake_zombies(self, job: RunningJob) -> None:
        """Lets stopped actors of dead drivers go on once the new run is at work."""
        if self._zombies and job.find(*_CHILD):
            for process in self._zombies:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)
            self._zombies.clear()

    def _note_recovery(self) -> None:
        if self._awaited is None:
            return
        kind, since, before = self._awaited
        if self._num_records() > before:
            self._result.recovery_s.setdefault(kind, []).append(time.monotonic() - since)
            self._awaited = None

    def _num_records(self) -> int:
        return len(list(self._output.glob("commits/*/*.json")))
