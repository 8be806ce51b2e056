"""A network that loses what passes between a node, Ray's head and the store, one way or both: no split brain."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from builders import CLIP_STILLS, CLIP_VIDEOS, pack_clips
from chaos.checker import check, plan_of_tars, read_output
from chaos.network import SecondHost, commands_below, second_host
from chaos.process_faults import make_shards, undisturbed
from integration import failing_actors
from integration.jobs_under_test import SMALL, RunningJob, ray_cluster
from servers import free_ports, ray_folders, s3_client, seaweed

NUM_SHARDS = 24
# A node that is silent for so long is dead to Ray; by default it takes a minute.
QUICK_DEATH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}
SHORT_S, LONG_S = 4, 30


@pytest.fixture(scope="module")
def other_host() -> Iterator[SecondHost]:
    with second_host() as host:
        yield host


@pytest.fixture(scope="module")
def store(other_host: SecondHost) -> Iterator[dict[str, str]]:
    with seaweed(("latents",), address=other_host.store) as (_, env):
        yield env


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("partitions") / "shards"
    pack_clips(folder, NUM_SHARDS, (*CLIP_VIDEOS, *CLIP_STILLS) * 3)
    return folder


@pytest.fixture(scope="module")
def expected(shards: Path, ray_home: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of a run that nothing disturbs: "<record> <content>" -> SHA-256."""
    output = tmp_path_factory.mktemp("undisturbed") / "latents"
    with RunningJob(["--input", str(shards), "--output", str(output), *SMALL, "--num-actors", "1"], ray_home) as job:
        outcome = job.end(600)
    assert outcome.code == 0, outcome.said
    return check(read_output(str(output)), plan_of_tars(shards)).files


@pytest.fixture
def far_home() -> Iterator[dict[str, str]]:
    """Ray's folders on the second host: nodes that share them take each other's address for their own."""
    with ray_folders() as env:
        yield env


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("lines", "for_s"),
    [
        (("to_head", "from_head"), SHORT_S),
        (("to_head", "from_head"), LONG_S),
        (("to_head",), LONG_S),
        (("from_head",), LONG_S),
        (("to_store", "from_store"), LONG_S),
        (("to_store",), LONG_S),
        (("from_store",), LONG_S),
    ],
    ids=["ray-short", "ray", "to-head", "from-head", "store", "to-store", "from-store"],
)
def test_what_the_network_loses_costs_no_sample_and_no_byte(
    lines: tuple[str, ...],
    for_s: int,
    other_host: SecondHost,
    store: Mapping[str, str],
    shards: Path,
    expected: Mapping[str, str],
    ray_home: Mapping[str, str],
    far_home: Mapping[str, str],
    tmp_path: Path,
) -> None:
    output = f"s3://latents/{secrets.token_hex(6)}"
    env = {**ray_home, **store, **QUICK_DEATH, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    port = free_ports(4)
    head = f"{other_host.head}:{port}"
    flags = ["--input", str(shards), "--output", output, *SMALL, "--num-actors", "2", "--cpus-per-actor", "1"]
    flags += ["--silence-timeout-s", "10", "--max-attempts", "10", "--ray-address", head]
    seen: dict[str, str] = {}
    with (
        ray_cluster(env, num_cpus=(1,), first_port=port, folder=tmp_path, address=other_host.head),
        other_host.ray_node(head, {**env, **far_home}, num_cpus=1, log=tmp_path / "far.log") as far,
    ):

        def is_at_work() -> bool:
            return any("EncodeActor" in name for name in commands_below(far)) and _num_records(output, store) > 0

        with RunningJob(flags, env) as job:
            job.wait_until(is_at_work, "the second node was at work", 400)
            other_host.cut(*lines)
            try:
                cut_at = time.monotonic()
                while time.monotonic() - cut_at < for_s and job.process.poll() is None:
                    time.sleep(0.5)
                num_meanwhile = _num_records(output, store)
                check(read_output(output, store), plan_of_tars(shards), seen)
            finally:
                other_host.mend(*lines)
            outcome = job.end(900)
        # What the other side still had in hand is let land.
        time.sleep(5)
    assert outcome.code == 0, outcome.said
    print(f"{'+'.join(lines)} for {for_s} s: {num_meanwhile} of {NUM_SHARDS} records by its end; {outcome.result}")
    verdict = check(read_output(output, store), plan_of_tars(shards), seen)
    assert verdict.problems == []
    assert (verdict.num_lost, verdict.num_duplicated) == (0, 0)
    assert verdict.num_recorded == verdict.num_planned > 0
    assert verdict.files == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nodes_that_join_and_leave_during_a_run_get_work_and_lose_none(
    other_host: SecondHost,
    store: Mapping[str, str],
    ray_home: Mapping[str, str],
    far_home: Mapping[str, str],
    tmp_path: Path,
) -> None:
    many = make_shards(tmp_path / "many")
    wanted = undisturbed(many, tmp_path, ray_home)
    output = f"s3://latents/{secrets.token_hex(6)}"
    env = {**ray_home, **store, **QUICK_DEATH, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    port = free_ports(4)
    head = f"{other_host.head}:{port}"
    flags = ["--input", str(many), "--output", output, *SMALL, "--cpus-per-actor", "1", "--silence-timeout-s", "10"]
    leisurely = (failing_actors.__file__, "Leisurely")
    with (
        ray_cluster(env, num_cpus=(1,), first_port=port, folder=tmp_path, address=other_host.head),
        RunningJob([*flags, "--ray-address", head], env, script=leisurely) as job,
    ):
        job.wait_until(lambda: _num_records(output, store) > 0, "the first node was at work", 400)
        for visit in (1, 2):
            log = tmp_path / f"far{visit}.log"
            with other_host.ray_node(head, {**env, **far_home}, num_cpus=1, log=log) as far:
                job.wait_until(
                    lambda far=far: any(
                        "Leisurely" in name or "EncodeActor.process" in name for name in commands_below(far)
                    ),  # type: ignore[misc]
                    f"the pool had grown for the {visit}. time",
                    200,
                )
                num_then = _num_records(output, store)
                job.wait_until(
                    lambda num=num_then: _num_records(output, store) > num + 2,  # type: ignore[misc]
                    "both were at work",
                    200,
                )
            job.wait_until(
                lambda visit=visit: job.said().count("its node is gone") == visit,  # type: ignore[misc]
                f"the pool had shrunk for the {visit}. time",
                200,
            )
        outcome = job.end(600)
    assert outcome.code == 0, outcome.said
    verdict = check(read_output(output, store), plan_of_tars(many))
    assert verdict.problems == []
    assert (verdict.num_lost, verdict.num_duplicated) == (0, 0)
    assert verdict.num_recorded == verdict.num_planned > 0
    assert verdict.files == wanted


def _num_records(output: str, store: Mapping[str, str]) -> int:
    prefix = output.removeprefix("s3://latents/")
    pages = s3_client(store).list_objects_v2(Bucket="latents", Prefix=f"{prefix}/commits/")
    return int(pages["KeyCount"])
