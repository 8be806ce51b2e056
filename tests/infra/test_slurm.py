"""The job on a real Slurm of two nodes, as `sbatch infra/slurm.sbatch` starts it; GPUs it has none."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from builders import CLIP_VIDEOS, pack_clips
from integration.jobs_under_test import ROOT, SMALL, commits_of
from operations import INFRA
from servers import BIN
from slurm import processes_of, slurm

from pipeline.config import parse_arguments

FILE = INFRA / "slurm.sbatch"
# Of what the file asks for, as much as there is here.
HERE = ("--nodes=2", "--cpus-per-task=1", "--gpus-per-node=0", "--time=20", str(FILE))


def test_the_file_is_valid_to_bash_and_its_commands_to_the_job() -> None:
    done = subprocess.run(["bash", "-n", str(FILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    text = FILE.read_text(encoding="utf-8")
    (shown,) = re.findall(r"^#\s+sbatch .*?slurm\.sbatch (.*)$", text, re.MULTILINE)
    parse_arguments(shlex.split(shown))
    (started,) = re.findall(r'^python -m jobs\.encode_laion (.*) "\$@" &$', text, re.MULTILINE)
    given = parse_arguments([*shlex.split(started), *shlex.split(shown)])
    (notice_s,) = map(float, re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.MULTILINE))
    assert given.run.grace_s + 30 <= notice_s


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_is_queued_again_when_its_time_is_up_and_goes_on_with_all_nodes_that_slurm_gives(
    ray_home: Mapping[str, str], tmp_path: Path
) -> None:
    path = f"{BIN}:{os.environ['PATH']}"
    env = {**os.environ, **ray_home, "PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1"}
    pack_clips(tmp_path / "shards", 60, CLIP_VIDEOS * 24)
    output = tmp_path / "latents"
    flags = ["--input", str(tmp_path / "shards"), "--output", str(output), *SMALL]

    def num_done() -> int:
        return sum(1 for _ in output.glob("commits/*/*.json"))

    with slurm(["one", "two"], env) as run:
        job = run("sbatch", "--parsable", *HERE, *flags, cwd=tmp_path)
        log = tmp_path / f"latentmill-{job}.log"
        run.wait_until(job, lambda _: num_done() > 0, 300)
        # What Slurm sends three minutes before the time is up.
        run("scancel", "--batch", "--signal=USR1", job)
        run.wait_until(job, lambda facts: (facts["Restarts"], facts["JobState"]) == ("1", "PENDING"), 120)
        assert '"exit_code": 130' in log.read_text(encoding="utf-8")
        assert 0 < num_done() < 60
        before = log.stat().st_size

        def said_since() -> str:
            return log.read_bytes()[before:].decode()

        # Slurm lets a job wait for two minutes before it starts again.
        run("scontrol", "update", f"JobId={job}", "StartTime=now")
        run.wait_until(job, lambda _: "shards planned" in said_since(), 120)
        run.wait_until(job, lambda _: bool(processes_of(job, "ray::EncodeActor")), 120)
        # The first stands still until the second node is there: on a busy machine all shards were done before.
        first = processes_of(job, "ray::EncodeActor")[0]
        first.suspend()
        run.wait_until(job, lambda _: bool(re.search("on 2 nodes|the cluster has room for 2", said_since())), 120)
        first.resume()
        over = ("PENDING", "RUNNING", "COMPLETING")
        facts = run.wait_until(job, lambda facts: facts["JobState"] not in over, 300)
        said = said_since()
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), said
    assert len(commits_of(str(output))) == 60
