"""Ray's own messages that get lost, going or coming back: a shard may run twice, and counts once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import CLIP_STILLS, CLIP_VIDEOS, pack_clips
from chaos.checker import check, plan_of_tars, read_output
from integration.jobs_under_test import SMALL, RunningJob
from servers import ray_folders

NUM_SHARDS = 12
MOST_DRIVERS = 6
# Of all calls between Ray's processes, in percent: never sent; carried out but never answered; answered while the
# caller has already been told of a failure. Ray has changed the form of this several times, hence the first assertion.
LOSSES = {"*": {"num_failures": -1, "req_failure_prob": 4, "resp_failure_prob": 4, "in_flight_failure_prob": 2}}


@pytest.fixture
def own_home() -> Iterator[dict[str, str]]:
    with ray_folders() as env:
        yield env


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_messages_of_ray_that_get_lost_cost_no_sample_and_double_none(own_home: dict[str, str], tmp_path: Path) -> None:
    pack_clips(tmp_path / "in", NUM_SHARDS, (*CLIP_VIDEOS, *CLIP_STILLS) * 2)
    flags = ["--input", str(tmp_path / "in"), *SMALL, "--num-actors", "1", "--max-attempts", "50"]
    with RunningJob([*flags, "--output", str(tmp_path / "clean")], own_home) as job:
        assert job.end(600).code == 0
    output, seen, outcomes = tmp_path / "latents", dict[str, str](), []
    env = {**own_home, "RAY_testing_rpc_failure": json.dumps(LOSSES)}
    while [outcome.code for outcome in outcomes][-1:] != [0] and len(outcomes) < MOST_DRIVERS:
        with RunningJob([*flags, "--output", str(output)], env) as job:
            outcomes.append(job.end(900))
        check(read_output(str(output)), plan_of_tars(tmp_path / "in"), seen)
    assert _num_lost(Path(own_home["RAY_TMPDIR"])) > 10, "this Ray does not know RAY_testing_rpc_failure in this form"
    print(f"{_num_lost(Path(own_home['RAY_TMPDIR']))} lost, drivers ended with {[o.code for o in outcomes]}")
    assert outcomes[-1].code == 0, [outcome.said for outcome in outcomes]
    verdict = check(read_output(str(output)), plan_of_tars(tmp_path / "in"), seen)
    assert verdict.problems == []
    assert (verdict.num_lost, verdict.num_duplicated) == (0, 0)
    assert verdict.num_recorded == verdict.num_planned > 0
    assert verdict.files == check(read_output(str(tmp_path / "clean")), plan_of_tars(tmp_path / "in")).files


def _num_lost(sessions: Path) -> int:
    logs = [path for path in sessions.glob("ray/session_2*/logs/*") if path.is_file()]
    return sum(path.read_text(errors="replace").count("Inject RPC") for path in logs)
