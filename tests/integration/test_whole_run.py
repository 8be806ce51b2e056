"""The promises of a run, kept with real clips, real Ray, real decoders and a real S3 store.

- Every sample of the input is decided: a committed record or a recorded rejection; the accounts balance.
- The same command again does nothing; another configuration is refused.
- The bytes depend on input and configuration alone: not on the number of actors, not on who was killed on the way.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import psutil
import pytest
import torch
from builders import CLIP_STILLS, CLIP_VIDEOS, pack_clips
from conftest import SeaweedFS
from integration.jobs_under_test import (
    ROOT,
    SMALL,
    Outcome,
    RunningJob,
    commits_of,
    data_digests,
    ray_cluster,
    run_job,
    tree_of,
)
from prometheus_client.parser import text_string_to_metric_families
from servers import free_ports

import cvvae
from pipeline import LatentDataset

NUM_SHARDS = 4
DECODE_CHILD = "import main; main(sys.argv"
MEDIA = (*CLIP_VIDEOS, *CLIP_STILLS)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real clips and stills in four tars."""
    folder = tmp_path_factory.mktemp("shards")
    pack_clips(folder, NUM_SHARDS, MEDIA)
    return folder


@pytest.fixture(scope="module")
def undisturbed(
    shards: Path, ray_home: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Outcome]:
    """An output of one actor that nothing disturbed, and how that run ended."""
    output = tmp_path_factory.mktemp("undisturbed") / "latents"
    outcome = run_job([*_flags(shards, output), "--num-actors", "1"], ray_home)
    assert outcome.code == 0, outcome.said
    return output, outcome


def _flags(shards: Path, output: Path | str) -> list[str]:
    return ["--input", str(shards), "--output", str(output), *SMALL]


def test_every_sample_is_decided_and_the_accounts_balance(undisturbed: tuple[Path, Outcome]) -> None:
    output, outcome = undisturbed
    result = outcome.result
    assert result["num_shards"] == result["num_shards_done"] == NUM_SHARDS
    assert result["num_videos"] == result["num_videos_ok"] == result["num_records"] == len(MEDIA)
    assert (result["num_videos_rejected"], result["num_shards_undone"], result["snapshot"]) == (0, 0, 1)
    commits = commits_of(str(output))
    assert [shard_id.split("-")[0] for shard_id in sorted(commits)] == ["00000", "00001", "00002", "00003"]
    assert sum(commit.counts.num_frames for commit in commits.values()) == 17 * len(CLIP_VIDEOS) + len(CLIP_STILLS)
    contents = {file.content for commit in commits.values() for file in commit.files}
    assert contents == {"parquet", "webdataset"}


def test_a_training_loop_reads_every_record_with_its_caption(undisturbed: tuple[Path, Outcome]) -> None:
    output, _ = undisturbed
    captions = {path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in MEDIA}
    read = {}
    for batch in LatentDataset(str(output), batch_size=4):
        assert batch["latents"].shape[1:] in {(32, 5, 8, 8), (32, 1, 8, 8)}
        read.update(dict(zip(batch["key"], batch["caption"], strict=True)))
    assert len(read) == len(MEDIA)
    assert {caption.strip() for caption in read.values()} == captions


def test_the_same_command_again_changes_nothing(
    undisturbed: tuple[Path, Outcome], shards: Path, ray_home: Mapping[str, str]
) -> None:
    output, _ = undisturbed
    before = tree_of(output)
    again = run_job(_flags(shards, output), ray_home)
    assert again.code == 0
    assert (again.result["num_shards_done"], again.result["num_shards_done_before"]) == (0, NUM_SHARDS)
    assert again.result["num_records"] == len(MEDIA)
    assert tree_of(output) == before


def test_another_configuration_is_refused_with_the_differing_keys(
    undisturbed: tuple[Path, Outcome], shards: Path, ray_home: Mapping[str, str]
) -> None:
    output, _ = undisturbed
    before = tree_of(output)
    other = run_job([*_flags(shards, output), "--fps", "4", "--store", "moments"], ray_home)
    assert other.code == 3
    assert other.result["differences"] == {"fps": [8.0, 4.0], "store": ["mean", "moments"]}
    assert tree_of(output) == before


def test_other_weights_under_any_name_are_refused_though_nothing_is_left_to_do(
    undisturbed: tuple[Path, Outcome], shards: Path, ray_home: Mapping[str, str], tmp_path: Path
) -> None:
    output, _ = undisturbed
    vae = cvvae.load("small")
    with torch.no_grad():
        next(vae.parameters()).add_(1e-3)
    vae.save_pretrained(tmp_path / "model")
    other = run_job([*_flags(shards, output), "--model", str(tmp_path / "model")], ray_home)
    assert other.code == 3, other.said
    assert list(other.result["differences"]) == ["weights_sha256"]


def test_a_dry_run_says_what_there_is_to_do_and_writes_nothing(
    shards: Path, ray_home: Mapping[str, str], tmp_path: Path
) -> None:
    outcome = run_job([*_flags(shards, tmp_path / "latents"), "--dry-run"], ray_home)
    assert (outcome.code, outcome.result["num_shards"], outcome.result["num_shards_undone"]) == (0, 4, 4)
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_driver_that_is_told_to_stop_goes_on_with_the_same_bytes(
    number: int,
    undisturbed: tuple[Path, Outcome],
    shards: Path,
    ray_home: Mapping[str, str],
    tmp_path: Path,
) -> None:
    output = tmp_path / "latents"
    flags = [*_flags(shards, output), "--num-actors", "1"]
    with RunningJob(flags, ray_home) as job:
        job.wait_until(lambda: bool(job.find("ray::EncodeActor")), "an encoder was there")
        (encoder,) = job.find("ray::EncodeActor")
        job.wait_until(lambda: bool(list(output.glob("commits/*/*.json"))), "the first commit was there")
        # It stands still until the driver has heard: on a busy machine all shards were done before.
        encoder.suspend()
        actors = [encoder, *job.find(DECODE_CHILD)]
        job.process.send_signal(number)
        job.wait_until(lambda: "interrupted: ending" in job.said(), "the driver had heard")
        encoder.resume()
        stopped = job.end()
        assert stopped.code == 130, stopped.said
        deadline = time.monotonic() + 60
        while any(_is_alive(actor) for actor in actors) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not [actor for actor in actors if _is_alive(actor)], "an actor or a decode child outlived its driver"
    num_before = len(commits_of(str(output)))
    assert 1 <= num_before < NUM_SHARDS
    outcome = run_job(flags, ray_home)
    assert outcome.code == 0, outcome.said
    assert outcome.result["num_shards_done_before"] == num_before
    assert data_digests(str(output)) == data_digests(str(undisturbed[0]))


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def test_metrics_of_a_run_are_served_while_it_runs(shards: Path, ray_home: Mapping[str, str], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    seen: dict[tuple[str, str], float] = {}

    def scrape() -> bool:
        with suppress(URLError, ConnectionError), urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
            for family in text_string_to_metric_families(response.read().decode()):
                for sample in family.samples:
                    assert sample.labels.pop("run") == "latents"
                    assert sample.labels.pop("job") == "latentmill"
                    assert sample.labels.pop("cluster") == "default"
                    seen[sample.name, ",".join(sample.labels.values())] = sample.value
        return seen.get(("latentmill_shards", "done"), 0) >= 2

    flags = [*_flags(shards, tmp_path / "latents"), "--num-actors", "1", "--metrics-port", str(port)]
    with RunningJob(flags, ray_home) as job:
        job.wait_until(scrape, "two shards were done")
    assert seen["latentmill_videos_total", "ok"] >= 2
    assert seen["latentmill_shard_commit_total", "committed"] >= 2
    assert seen["latentmill_bytes_total", "in"] > seen["latentmill_bytes_total", "out"] > 0
    assert 0 < seen["latentmill_encoder_busy_ratio", "0"] <= 1


def test_a_job_submitted_to_two_nodes_writes_the_same_bytes_to_s3_with_four_actors(
    undisturbed: tuple[Path, Outcome],
    shards: Path,
    ray_home: Mapping[str, str],
    s3_env: SeaweedFS,
    tmp_path: Path,
) -> None:
    output = s3_env.root()
    env = {**ray_home, **s3_env.env, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    job = [*_flags(shards, output), "--num-actors", "4", "--cpus-per-actor", "1", "--progress", "json"]
    with ray_cluster(env, num_cpus=(2, 2), first_port=free_ports(4), folder=tmp_path) as address:
        _wait_for(address, env["RAY_AUTH_TOKEN"], num_nodes=2)
        assert [_answer(address, token) for token in (None, "another")] == [401, 403]
        first, said = _submit(address, env, job)
        shown = _actors_on_the_dashboard(address, env["RAY_AUTH_TOKEN"])
        second, _ = _submit(address, env, job)
    assert '"event": "ray"' in said
    assert "4 CPUs, 0 GPUs on 2 nodes" in said
    assert first["exit_code"] == second["exit_code"] == 0
    assert (first["num_shards_done"], first["num_records"]) == (NUM_SHARDS, len(MEDIA))
    assert (second["num_shards_done"], second["num_shards_done_before"]) == (0, NUM_SHARDS)
    assert data_digests(output) == data_digests(str(undisturbed[0]))
    run = f"latentmill {output.rpartition('/')[2]} [0-9a-f]{{6}} encoder"
    assert sorted(re.sub(run, "encoder", name) for name in shown) == [f"encoder {number}" for number in range(4)]
    read = [key for batch in LatentDataset(output, batch_size=3) for key in batch["key"]]
    assert len(read) == len(set(read)) == len(MEDIA)


def _wait_for(address: str, token: str, num_nodes: int) -> None:
    """Until the server is up and so many nodes have joined."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(URLError, ConnectionError):
            if [node["state"] for node in _listed(address, token, "nodes")].count("ALIVE") == num_nodes:
                return
        time.sleep(0.3)
    raise AssertionError(f"no Ray of {num_nodes} nodes at {address}")


def _answer(address: str, token: str | None) -> int:
    """The status of an attempt to have a command run by the cluster."""
    headers = {"Content-Type": "application/json"} | ({} if token is None else {"Authorization": f"Bearer {token}"})
    try:
        with urlopen(Request(f"{address}/api/jobs/", b'{"entrypoint": "true"}', headers), timeout=60) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


def _actors_on_the_dashboard(address: str, token: str) -> list[str]:
    """Their names, as a person reads them there."""
    return [row["name"] for row in _listed(address, token, "actors") if row["class_name"] == "EncodeActor"]


def _listed(address: str, token: str, what: str) -> list[dict[str, Any]]:
    """A list of the dashboard's, of "actors" or "nodes"."""
    asked = Request(f"{address}/api/v0/{what}", headers={"Authorization": f"Bearer {token}"})
    with urlopen(asked, timeout=60) as answer:
        rows: list[dict[str, Any]] = json.load(answer)["data"]["result"]["result"]
    return rows


def _submit(address: str, env: Mapping[str, str], job: list[str]) -> tuple[dict[str, object], str]:
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "job", "submit", "--address", address, "--working-dir", ".", "--", sys.executable]
    done = subprocess.run(
        [*command, "jobs/encode_laion.py", *job],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith('{"exit_code"')]
    assert results, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(results[-1]), done.stdout + done.stderr
