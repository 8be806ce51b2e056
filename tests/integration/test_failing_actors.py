"""An actor that is broken costs its own time, never the attempts of all shards and never the run's end."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from builders import CLIP_VIDEOS, pack_clips
from integration.jobs_under_test import SMALL, RunningJob, commits_of, run_job

from pipeline.decode import decoder_versions

SCRIPT = Path(__file__).parent / "failing_actors.py"
NUM_SHARDS = 5


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    pack_clips(tmp_path / "in", NUM_SHARDS, CLIP_VIDEOS)
    return ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), *SMALL]


def test_an_actor_that_can_never_be_built_ends_the_run(flags: list[str], ray_home: Mapping[str, str]) -> None:
    with RunningJob([*flags, "--num-actors", "1"], ray_home, script=[str(SCRIPT), "NeverBuilt"]) as job:
        outcome = job.end()
    assert outcome.code == 4, outcome.said
    assert "No encoder is left" in outcome.result["message"]
    assert "no room for temporary files" in outcome.said


def test_one_broken_actor_does_not_spend_the_attempts_of_every_shard(
    flags: list[str], ray_home: Mapping[str, str]
) -> None:
    with RunningJob([*flags, "--num-actors", "2"], ray_home, script=[str(SCRIPT), "FirstFailsAlways"]) as job:
        outcome = job.end()
    assert outcome.code == 0, outcome.said
    assert outcome.result["num_records"] == len(CLIP_VIDEOS)
    assert "illegal memory access" in outcome.said


@pytest.mark.slow
def test_no_attempt_is_spent_on_an_actor_that_is_coming_back(flags: list[str], ray_home: Mapping[str, str]) -> None:
    # Both shards that it held when it died have spent one attempt; a second death of an attempt would be the last.
    more = ["--num-actors", "1", "--max-attempts", "2"]
    with RunningJob([*flags, *more], ray_home, script=[str(SCRIPT), "SlowToReturn"]) as job:
        outcome = job.end()
    assert outcome.code == 0, outcome.said
    assert outcome.result["num_records"] == len(CLIP_VIDEOS)


@pytest.mark.slow
def test_an_actor_that_cannot_start_again_does_not_end_what_others_do_well(
    flags: list[str], ray_home: Mapping[str, str]
) -> None:
    with RunningJob([*flags, "--num-actors", "2"], ray_home, script=[str(SCRIPT), "FirstNeverReturns"]) as job:
        outcome = job.end()
    assert outcome.code == 0, outcome.said
    assert outcome.result["num_records"] == len(CLIP_VIDEOS)


@pytest.mark.slow
def test_a_run_whose_last_actor_cannot_start_again_ends_undone_with_its_accounts(
    flags: list[str], ray_home: Mapping[str, str]
) -> None:
    with RunningJob([*flags, "--num-actors", "1"], ray_home, script=[str(SCRIPT), "FirstNeverReturns"]) as job:
        outcome = job.end()
    assert outcome.code == 4, outcome.said
    assert "no device is left" in outcome.said
    assert "Traceback" not in outcome.said
    assert (outcome.result["num_shards"], outcome.result["num_shards_undone"]) == (NUM_SHARDS, NUM_SHARDS)
    assert all("No encoder is left" in why for why in outcome.result["undone"].values())


@pytest.mark.slow
def test_an_odd_actor_is_left_out_though_it_is_the_first_and_alone_it_is_refused_with_what_differs(
    flags: list[str], ray_home: Mapping[str, str]
) -> None:
    script = [str(SCRIPT), "FirstIsOdd"]
    with RunningJob([*flags, "--num-actors", "2", "--limit", "4"], ray_home, script=script) as job:
        outcome = job.end()
    assert outcome.code == 0, outcome.said
    assert outcome.result["num_shards_done"] == 4
    assert "its decoders differ from those of" in outcome.said
    with RunningJob([*flags, "--num-actors", "1"], ray_home, script=script) as job:
        outcome = job.end()
    assert outcome.code == 3, outcome.said
    assert outcome.result["differences"] == {"decoders": [decoder_versions(), {"decord": "0.0"}]}


@pytest.mark.slow
def test_a_frozen_and_a_hanging_actor_are_replaced_and_their_shards_done(
    flags: list[str], ray_home: Mapping[str, str]
) -> None:
    patience = ["--silence-timeout-s", "4", "--stall-timeout-s", "12"]
    script = [str(SCRIPT), "FreezesOrHangs"]
    with RunningJob([*flags, *patience, "--num-actors", "2"], ray_home, script=script) as job:
        outcome = job.end()
    assert outcome.code == 0, outcome.said
    assert outcome.result["num_records"] == len(CLIP_VIDEOS)
    assert "encoder 0 did not answer for" in outcome.said
    assert "encoder 1 made no step for" in outcome.said


@pytest.mark.slow
def test_a_video_that_kills_its_worker_every_time_is_rejected_and_the_rest_of_its_shard_done(
    tmp_path: Path, ray_home: Mapping[str, str]
) -> None:
    pack_clips(tmp_path / "in", 1, CLIP_VIDEOS[:3])
    flags = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), *SMALL, "--max-attempts", "1"]
    with RunningJob(flags, ray_home, script=[str(SCRIPT), "Poisoned"]) as job:
        outcome = job.end()
    assert outcome.code == 0, outcome.said
    assert (outcome.result["num_videos"], outcome.result["num_videos_ok"]) == (3, 2)
    assert outcome.result["reasons"] == {"poison": 1}
    assert "video 1 (from 0) kills the worker every time" in outcome.said


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 300 KB, where this user may mount one."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "latentmill-test", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if mounted.returncode:
        pytest.skip(f"this user may not mount a small disk: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_temporary_disk_is_one_clear_error_and_nothing_half_done_is_committed(
    flags: list[str], tiny_disk: Path, ray_home: Mapping[str, str]
) -> None:
    (tiny_disk / "filler").write_bytes(bytes(250_000))
    few = ["--num-actors", "1", "--max-attempts", "1"]
    outcome = run_job([*flags, *few], {**ray_home, "TMPDIR": str(tiny_disk)})
    assert outcome.code == 4, outcome.said
    assert f"no space is left in the temporary folder {tiny_disk}" in outcome.said
    assert "Traceback" not in outcome.said
    # An actor that fails twice is killed. What it leaves is its room, which the next one that starts there removes.
    assert [p.name for p in tiny_disk.iterdir() if not p.name.startswith("latentmill-actor-")] == ["filler"]
    assert len(outcome.result["undone"]) == NUM_SHARDS - len(commits_of(flags[3]))
