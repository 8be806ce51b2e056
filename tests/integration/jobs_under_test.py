"""Runs jobs as users do, as processes of their own, and looks at what they left behind.

Not fixtures and not tests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.commit import load_commits
from pipeline.records import Commit
from pipeline.storage import open_store

ROOT = Path(__file__).resolve().parent.parent.parent
ENCODE = ROOT / "jobs" / "encode_laion.py"
# Small pictures: these tests are about what is kept and what is lost, not about pixels.
SMALL = ["--model", "small", "--buckets", "64x64x17", "--format", "both"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended: exit code, the JSON object of its last line, and what it said meanwhile."""

    code: int
    result: dict[str, Any]
    said: str


class RunningJob:
    """A job started and not yet ended; its whole process tree ends with the `with` block."""

    def __init__(
        self,
        flags: Sequence[str],
        env: Mapping[str, str],
        cwd: Path | None = None,
        script: Sequence[str] = (str(ENCODE),),
    ) -> None:
        self._stdout = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by __exit__
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = psutil.Popen(
            [sys.executable, *script, "--progress", "plain", *flags],
            env={**os.environ, **env},
            cwd=cwd or tempfile.gettempdir(),
            stdout=self._stdout,
            stderr=self._stderr,
            start_new_session=True,
        )
        self._tree: dict[int, psutil.Process] = {}

    def __enter__(self) -> RunningJob:
        return self

    def __exit__(self, *_: object) -> None:
        self._note_tree()
        for process in [self.process, *self._tree.values()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(30)
        psutil.wait_procs(list(self._tree.values()), timeout=30)
        self._stdout.close()
        self._stderr.close()

    def _note_tree(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self._tree.update({p.pid: p for p in self.process.children(recursive=True)})

    def find(self, *parts_of_command: str) -> list[psutil.Process]:
        """Living descendants whose command line holds one of these texts."""
        self._note_tree()
        found = []
        for process in self._tree.values():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                command = " ".join(process.cmdline())
                if any(part in command for part in parts_of_command):
                    found.append(process)
        return found

    def forget(self, process: psutil.Process) -> None:
        """Leaves a descendant alive when the block ends; whoever calls this ends it."""
        self._tree.pop(process.pid, None)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
        """Polls a condition while the job runs."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"the job ended before {what}:\n{self.said()}"
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}\n{self.said()}"
            self._note_tree()
            time.sleep(0.05)

    def said(self) -> str:
        """Standard error up to now."""
        self._stderr.seek(0)
        return self._stderr.read()

    def end(self, timeout_s: float = 200) -> Outcome:
        """Waits for the job."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"the job did not end within {timeout_s} s:\n{self.said()}"
            self._note_tree()
            time.sleep(0.1)
        self._stdout.seek(0)
        # A driver that was killed, or that Ray took down with its raylet, leaves no result.
        results = [line for line in self._stdout.read().splitlines() if line.startswith("{")]
        result = json.loads(results[-1]) if results else {}
        return Outcome(self.process.returncode, result, self.said())


def run_job(flags: Sequence[str], env: Mapping[str, str], cwd: Path | None = None) -> Outcome:
    """Runs `python jobs/encode_laion.py FLAGS` to its end."""
    with RunningJob(flags, env, cwd) as job:
        return job.end()


def data_digests(uri: str) -> dict[str, str]:
    """SHA-256 of every committed data file by its key, read back from the store; checks what the commits state."""
    store = open_store(uri)
    digests = {}
    for commit in load_commits(store):
        for file in commit.files:
            data = store.get(file.key)
            digests[file.key] = hashlib.sha256(data).hexdigest()
            assert (len(data), digests[file.key]) == (file.num_bytes, file.sha256), f"{file.key} is not as committed"
    return digests


def commits_of(uri: str) -> dict[str, Commit]:
    """Every commit record by shard id."""
    return {commit.shard_id: commit for commit in load_commits(open_store(uri))}


def tree_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file under a folder with its size and time of change."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextlib.contextmanager
def ray_cluster(
    env: Mapping[str, str],
    num_cpus: Sequence[int],
    first_port: int,
    folder: Path,
    nodes: list[psutil.Process] | None = None,
    address: str = "127.0.0.1",
) -> Iterator[str]:
    """A Ray head with a job server and further nodes, started as users start them; gives the job server's address.

    Args:
        num_cpus: CPUs of each node, the head's first.
        first_port: of four; this first one is Ray's own.
        nodes: gets the `ray start` process of each node, the head's first.
        address: of every node.
    """
    gcs, dashboard, client, agent = range(first_port, first_port + 4)
    common = [str(Path(sys.executable).parent / "ray"), "start", "--block", f"--node-ip-address={address}"]
    common += ["--object-store-memory=100000000", "--disable-usage-stats"]
    head = ["--head", f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    head += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    nodes = [] if nodes is None else nodes
    with (folder / "ray.log").open("w+") as log:

        def start(*flags: str) -> None:
            command = [*common, *flags]
            environment = {**os.environ, **env}
            node = psutil.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            nodes.append(node)

        try:
            start(*head, f"--num-cpus={num_cpus[0]}")
            _wait_for_port(gcs, address)
            # A node that joins before the head's own has registered gives up.
            _wait_for_text(folder / "ray.log", "will now block")
            for count in num_cpus[1:]:
                start(f"--address={address}:{gcs}", f"--num-cpus={count}")
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            processes: list[psutil.Process] = list(nodes)
            for node in nodes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    processes += node.children(recursive=True)
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=30)


def _wait_for_text(log: Path, text: str, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while text not in log.read_text(errors="replace"):
        assert time.monotonic() < deadline, f"no {text!r} in {log} after {timeout_s} s"
        time.sleep(0.2)


def _wait_for_port(port: int, address: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
            return
        time.sleep(0.1)
    raise AssertionError(f"nothing listens on port {port} after {timeout_s} s")
