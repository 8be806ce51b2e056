"""Whole runs on a store that fails: throttled for a while, with errors of every kind, with credentials that expire."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from builders import CLIP_VIDEOS, pack_clips
from chaos.checker import check, plan_of_tars, read_output
from chaos.store_faults import fault_proxy, faults_of
from conftest import SeaweedFS
from integration.jobs_under_test import SMALL, RunningJob, run_job
from servers import FaultProxy

NUM_SHARDS = 4


def _flags(tmp_path: Path, output: str) -> list[str]:
    if not (tmp_path / "in").exists():
        pack_clips(tmp_path / "in", NUM_SHARDS, CLIP_VIDEOS)
    return ["--input", str(tmp_path / "in"), "--output", output, *SMALL, "--num-actors", "1"]


def _assert_whole(tmp_path: Path, output: str, store: SeaweedFS) -> None:
    verdict = check(read_output(output, store.env), plan_of_tars(tmp_path / "in"))
    assert verdict.problems == []
    assert verdict.num_recorded == verdict.num_planned == len(CLIP_VIDEOS)


@pytest.mark.slow
def test_a_run_behind_a_store_with_faults_of_every_kind_is_whole(
    seaweedfs: SeaweedFS, ray_home: Mapping[str, str], tmp_path: Path
) -> None:
    output = seaweedfs.root()
    with fault_proxy(seaweedfs.endpoint, seed=5, rate=0.15, most=1000) as proxy:
        env = {**ray_home, **seaweedfs.env, "AWS_ENDPOINT_URL": proxy}
        flags = [*_flags(tmp_path, output), "--max-attempts", "20"]
        codes = []
        # What passes is waited for; credentials that expired twice in a row end a driver, and the next goes on.
        while 0 not in codes and len(codes) < 10:
            codes.append(run_job(flags, env).code)
        assert faults_of(proxy).total() > 10
    assert codes[-1] == 0, codes
    _assert_whole(tmp_path, output, seaweedfs)


@pytest.mark.slow
def test_a_store_that_refuses_everything_for_a_while_is_waited_for(
    seaweedfs: SeaweedFS, ray_home: Mapping[str, str], tmp_path: Path
) -> None:
    output = seaweedfs.root()
    proxy = FaultProxy(seaweedfs.endpoint)
    try:
        with RunningJob(
            _flags(tmp_path, output), {**ray_home, **seaweedfs.env, "AWS_ENDPOINT_URL": proxy.endpoint}
        ) as job:
            job.wait_until(lambda: _num_commits(proxy) >= 1, "the first commit was there")
            num_before, until_s = len(proxy.requests), time.monotonic() + 30
            proxy.fault = lambda method, path: "503" if time.monotonic() < until_s else None
            outcome = job.end(250)
            num_during = len(proxy.requests) - num_before
    finally:
        proxy.close()
    assert outcome.code == 0, outcome.said
    assert "failed and is repeated" not in outcome.said
    assert num_during < 200
    _assert_whole(tmp_path, output, seaweedfs)


def _num_commits(proxy: FaultProxy) -> int:
    return sum(method == "PUT" and "/commits/" in path for method, path in proxy.requests)


@pytest.mark.slow
def test_credentials_that_expire_stop_the_run_soon_and_with_valid_ones_it_goes_on(
    seaweedfs: SeaweedFS, ray_home: Mapping[str, str], tmp_path: Path
) -> None:
    output = seaweedfs.root()
    proxy = FaultProxy(seaweedfs.endpoint)
    env = {**ray_home, **seaweedfs.env, "AWS_ENDPOINT_URL": proxy.endpoint}
    try:
        with RunningJob(_flags(tmp_path, output), env) as job:
            job.wait_until(lambda: _num_commits(proxy) >= 1, "the first commit was there")
            proxy.fault = lambda method, path: "400"
            stopped = job.end()
        proxy.fault = lambda method, path: None
        again = run_job(_flags(tmp_path, output), env)
    finally:
        proxy.close()
    assert stopped.code == 4, stopped.said
    assert "ExpiredToken" in stopped.result["message"]
    assert "AWS_SESSION_TOKEN" in stopped.result["message"]
    assert again.code == 0, again.said
    _assert_whole(tmp_path, output, seaweedfs)
