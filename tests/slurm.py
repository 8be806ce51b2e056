"""A Slurm of several nodes on this machine, from Debian's packages, installed or unpacked: controller, nodes and munge.

Not a fixture. Called by infra/test_slurm.py.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from operations import debian_tool
from servers import free_ports, stop

# The job takes its ports from its number; these lie between those of other servers here and those of the system.
_FIRST_JOB_ID = 1500


@dataclass(frozen=True, slots=True)
class Slurm:
    """How its commands are called."""

    programs: Path
    env: Mapping[str, str]

    def __call__(self, program: str, *arguments: str, cwd: Path | None = None) -> str:
        """What a command prints; fails the test where it fails."""
        done = subprocess.run(
            [self.programs / program, *arguments], env=self.env, cwd=cwd, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{program} {arguments}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ExitCode, ..."""
        said = self("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def wait_until(self, job: str, is_so: Callable[[dict[str, str]], bool], timeout_s: float) -> dict[str, str]:
        """What Slurm knows of a job once something is so."""
        until = time.monotonic() + timeout_s
        while not is_so(facts := self.facts(job)):
            assert time.monotonic() < until, facts
            time.sleep(0.5)
        return facts


def processes_of(job: str, part_of_command: str) -> list[psutil.Process]:
    """A job's living processes, those of Ray among them, whose command line holds this text."""
    found = []
    for step in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            # Slurm gives them this title; Debian's have a name of their own.
            if re.match(rf"slurmstepd(-wlm)?: \[{job}\.", " ".join(step.cmdline())):
                found += [p for p in step.children(recursive=True) if part_of_command in " ".join(p.cmdline())]
    return found


@contextmanager
def slurm(nodes: Sequence[str], env: Mapping[str, str]) -> Iterator[Slurm]:
    """A Slurm whose nodes have one core each; what is submitted gets this environment."""
    programs = Path(debian_tool("sbatch", "slurmd slurmctld slurm-client munge")).parent
    installed = programs.parent
    (plugins,) = installed.glob("lib/*/slurm-wlm")
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, ExitStack() as running:
        folder = Path(name)
        env = {**env, "SLURM_CONF": str(folder / "slurm.conf"), "LD_LIBRARY_PATH": f"{plugins.parent}:{plugins}"}

        def start(program: str, *arguments: str) -> None:
            command = [str(installed / "sbin" / program), *arguments]
            with (folder / f"{program}.log").open("ab") as log:
                process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
            running.callback(stop, process)

        (folder / "munge").mkdir(mode=0o700)
        key, at = folder / "munge" / "key", folder / "munge" / "socket"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        files = {"key": key, "socket": at} | {name: folder / "munge" / name for name in ("pid", "seed", "log")}
        names = {"pid": "pid-file", "key": "key-file", "log": "log-file", "seed": "seed-file"}
        start("munged", "--foreground", "--force", *(f"--{names.get(n, n)}={path}" for n, path in files.items()))
        (folder / "slurm.conf").write_text(_configuration(folder, at, plugins, nodes))
        start("slurmctld-wlm", "-D")
        for node in nodes:
            (folder / f"spool-{node}").mkdir()
            start("slurmd-wlm", "-D", "-N", node, "-d", str(installed / "sbin" / "slurmstepd-wlm"))
        ready = Slurm(programs, env)
        until = time.monotonic() + 60
        while ready("sinfo", "--noheader", "--format=%D %T") != f"{len(nodes)} idle":
            assert time.monotonic() < until, [log.read_text() for log in folder.glob("*.log")]
            time.sleep(0.5)
        try:
            yield ready
        finally:
            ready("scancel", "--user", getpass.getuser())
            until = time.monotonic() + 60
            while ready("squeue", "--noheader") and time.monotonic() < until:
                time.sleep(0.5)


def _configuration(folder: Path, munge: Path, plugins: Path, nodes: Sequence[str]) -> str:
    host, user = socket.gethostname().partition(".")[0], getpass.getuser()
    port = free_ports(1 + len(nodes))
    (folder / "state").mkdir()
    return f"""
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={munge}
CredType=cred/munge
PluginDir={plugins}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPort={port}
FirstJobId={_FIRST_JOB_ID + os.getpid() % 900}
NodeName=DEFAULT CPUs=1 RealMemory=4000
NodeName={",".join(nodes)} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{port + 1}-{port + len(nodes)}]
PartitionName=all Nodes=ALL Default=YES State=UP
"""
