"""An actor that is broken costs its own time, never the attempts of all shards and never the run's end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from builders import CLIP_VIDEOS, pack_clips
from integration.jobs_under_test import SMALL, RunningJob

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


def test_no_attempt_is_spent_on_an_actor_that_is_coming_back(flags: list[str], ray_home: Mapping[str, str]) -> None:
    # Both shards that it held when it died have spent one attempt; a second death of an attempt would be the last.
    more = ["--num-actors", "1", "--max-attempts", "2"]
    with RunningJob([*flags, *more], ray_home, script=[str(SCRIPT), "SlowToReturn"]) as job:
        outcome = job.end()
    assert outcome.code == 0, outcome.said
    assert outcome.result["num_records"] == len(CLIP_VIDEOS)
