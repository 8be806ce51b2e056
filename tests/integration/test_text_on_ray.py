"""Captions embedded by actors on a real Ray: the bytes of one process, whoever is killed on the way."""

from __future__ import annotations

import secrets
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path

import encoders
import pytest
from integration.jobs_under_test import ROOT, Outcome, RunningJob, data_digests, ray_cluster
from latents import output, record
from servers import free_ports

from jobs.encode_text import main

SCRIPT = (str(ROOT / "jobs" / "encode_text.py"),)
NUM_SHARDS = 24
COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output without embeddings, of shards with distinct captions and some that are in all of them."""
    root = tmp_path_factory.mktemp("latents") / "out"
    shards = [
        [record(f"k{shard}-{n}", caption=f"{COLOURS[n % 3]} number {n} of {shard if n else ''}") for n in range(24)]
        for shard in range(NUM_SHARDS)
    ]
    output(root, shards)
    return root


@pytest.fixture(scope="module")
def wanted(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """SHA-256 of every file that one process makes, by its key."""
    encoders.quiet()
    alone = tmp_path_factory.mktemp("alone") / "out"
    shutil.copytree(latents, alone)
    assert main(["--latents", str(alone), "--text-encoder", str(encoders.minilm()), "--device", "cpu"]) == 0
    return data_digests(str(alone / "columns" / "text"))


@pytest.fixture
def root(latents: Path, tmp_path: Path) -> Path:
    """The output without embeddings, of one test's own."""
    return Path(shutil.copytree(latents, tmp_path / "out"))


def _flags(root: Path) -> list[str]:
    return ["--latents", str(root), "--text-encoder", str(encoders.minilm()), "--device", "cpu"]


def _covered(root: Path) -> int:
    return sum(1 for path in (root / "columns" / "text" / "commits").rglob("*.json"))


def _run(flags: list[str], env: Mapping[str, str], folder: Path) -> Outcome:
    with RunningJob(flags, env, folder, script=SCRIPT) as job:
        return job.end()


@pytest.mark.timeout(600)
def test_an_actor_that_is_killed_loses_nothing_and_the_bytes_are_those_of_one_process(
    root: Path, wanted: dict[str, str], ray_home: Mapping[str, str], tmp_path: Path
) -> None:
    with RunningJob([*_flags(root), "--num-actors", "2"], ray_home, tmp_path, script=SCRIPT) as job:
        job.wait_until(lambda: _covered(root) > 0, "the first record of the set", 250)
        first, *_ = job.find("ray::TextActor")
        first.send_signal(signal.SIGKILL)
        num_covered = _covered(root)
        outcome = job.end()
    assert num_covered < NUM_SHARDS, "the actor was killed too late"
    assert outcome.code == 0, outcome.said
    assert (outcome.result["num_records"], outcome.result["num_records_done"]) == (NUM_SHARDS, NUM_SHARDS)
    assert data_digests(str(root / "columns" / "text")) == wanted


@pytest.mark.slow
def test_a_run_on_ray_with_nothing_to_do_changes_nothing_and_refuses_another_encoder(
    root: Path, wanted: dict[str, str], ray_home: Mapping[str, str], tmp_path: Path
) -> None:
    assert main(_flags(root)) == 0
    done = _run([*_flags(root), "--num-actors", "2"], ray_home, tmp_path)
    assert (done.code, done.result["num_records_done"]) == (0, 0), done.said
    other = str(encoders.t5(tmp_path / "t5"))
    refused = _run([*_flags(root), "--text-encoder", other, "--num-actors", "1"], ray_home, tmp_path)
    assert (refused.code, "weights_sha256" in refused.result["differences"]) == (3, True), refused.said
    nowhere = _run([*_flags(root), "--text-encoder", str(tmp_path / "no"), "--num-actors", "1"], ray_home, tmp_path)
    assert (nowhere.code, nowhere.result["error"]) == (2, "UsageError"), nowhere.said
    no_gpu = _run([*_flags(root), "--device", "cuda", "--num-actors", "1"], ray_home, tmp_path)
    assert (no_gpu.code, no_gpu.result["error"]) == (2, "UsageError"), no_gpu.said
    assert data_digests(str(root / "columns" / "text")) == wanted


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_on_ray_that_is_interrupted_says_so_and_one_process_ends_what_is_left(
    root: Path, wanted: dict[str, str], ray_home: Mapping[str, str], tmp_path: Path
) -> None:
    with RunningJob([*_flags(root), "--num-actors", "1"], ray_home, tmp_path, script=SCRIPT) as job:
        job.wait_until(lambda: _covered(root) > 0, "the first record of the set", 250)
        job.process.send_signal(signal.SIGTERM)
        outcome = job.end()
    assert (outcome.code, outcome.result["exit_code"]) == (130, 130), outcome.said
    assert 0 < _covered(root) < NUM_SHARDS
    assert main(_flags(root)) == 0
    assert data_digests(str(root / "columns" / "text")) == wanted


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_actors_on_two_nodes_of_a_cluster_write_the_same_bytes(
    root: Path, wanted: dict[str, str], ray_home: Mapping[str, str], tmp_path: Path
) -> None:
    port = free_ports(4)
    env = {**ray_home, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    with ray_cluster(env, num_cpus=(1, 1), first_port=port, folder=tmp_path):
        # As `ray job submit` tells it.
        outcome = _run([*_flags(root), "--num-actors", "2"], {**env, "RAY_ADDRESS": f"127.0.0.1:{port}"}, tmp_path)
    assert outcome.code == 0, outcome.said
    assert outcome.result["num_records_done"] == NUM_SHARDS
    assert data_digests(str(root / "columns" / "text")) == wanted
