"""Long fault runs, part of `make chaos` only: whatever is killed whenever, the bytes are those of an undisturbed run.

Each seed kills a process of the run every few seconds: a decode child, an actor, the raylet or the driver. The same
command starts again after each death of the driver, until everything is decided. LATENTMILL_CHAOS_SEEDS says how many
seeds are run; a seed that failed is repeated with `-k "seed-7"`.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from builders import CLIP_STILLS, CLIP_VIDEOS, pack_clips
from integration.jobs_under_test import SMALL, RunningJob, data_digests, run_job

NUM_SEEDS = int(os.environ.get("LATENTMILL_CHAOS_SEEDS", "8"))
NUM_SHARDS = 6
# What a command line holds, and how often it is chosen.
VICTIMS = {"import main; main(sys.argv": 5, "ray::EncodeActor": 3, "raylet/raylet": 1, "jobs/encode_laion.py": 2}
MAX_STARTS = 20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    pack_clips(folder, NUM_SHARDS, (*CLIP_VIDEOS, *CLIP_STILLS))
    return folder


@pytest.fixture(scope="module")
def expected(shards: Path, ray_home: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = str(tmp_path_factory.mktemp("undisturbed") / "latents")
    outcome = run_job(["--input", str(shards), "--output", output, *SMALL], ray_home)
    assert outcome.code == 0, outcome.said
    return data_digests(output)


def _kill_something(job: RunningJob, chance: random.Random) -> str:
    part = chance.choices(list(VICTIMS), weights=list(VICTIMS.values()))[0]
    if part == "jobs/encode_laion.py":
        job.process.kill()
        return part
    for process in job.find(part):
        with suppress(psutil.NoSuchProcess):
            process.kill()
            return part
    return ""


@pytest.mark.parametrize("seed", range(NUM_SEEDS), ids=lambda seed: f"seed-{seed}")
def test_whatever_is_killed_the_bytes_are_those_of_an_undisturbed_run(
    seed: int, shards: Path, expected: dict[str, str], ray_home: Mapping[str, str], tmp_path: Path
) -> None:
    chance = random.Random(seed)
    output = str(tmp_path / "latents")
    # Kills come faster than a real shard takes, so the budget of attempts is not what is tested here.
    flags = ["--input", str(shards), "--output", output, *SMALL, "--max-attempts", "100"]
    killed: list[str] = []
    for _ in range(MAX_STARTS):
        with RunningJob(flags, ray_home) as job:
            while job.process.poll() is None:
                time.sleep(chance.uniform(0.5, 3))
                killed.append(_kill_something(job, chance))
            outcome = job.end()
        if outcome.code == 0:
            break
    print(f"seed {seed}: killed {[part for part in killed if part]}")
    assert outcome.code == 0, f"seed {seed}: {outcome.said}"
    assert data_digests(output) == expected
