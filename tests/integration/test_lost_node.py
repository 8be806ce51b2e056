"""A second node that dies or freezes costs time, and no sample. Part of `make chaos`: Ray takes its time to notice."""

from __future__ import annotations

import secrets
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from builders import CLIP_STILLS, CLIP_VIDEOS, pack_clips
from chaos.checker import check, plan_of_tars, read_output
from chaos.network import commands_below
from integration.jobs_under_test import SMALL, RunningJob, ray_cluster
from servers import free_ports

NUM_SHARDS = 8


def _signal_node(node: psutil.Process, number: int) -> None:
    """All processes of a node but the `ray start` that waits for them, and that reaps a dead raylet."""
    with suppress(psutil.NoSuchProcess):
        for process in node.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_the_shards_of_a_lost_node_are_done_by_the_others(
    number: signal.Signals, ray_home: Mapping[str, str], tmp_path: Path
) -> None:
    pack_clips(tmp_path / "in", NUM_SHARDS, (*CLIP_VIDEOS, *CLIP_STILLS))
    output = tmp_path / "latents"
    env = {**ray_home, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    port = free_ports(4)
    flags = ["--input", str(tmp_path / "in"), "--output", str(output), *SMALL, "--num-actors", "2"]
    flags += ["--cpus-per-actor", "1", "--silence-timeout-s", "10", "--ray-address", f"127.0.0.1:{port}"]
    nodes: list[psutil.Process] = []
    with ray_cluster(env, num_cpus=(1, 1), first_port=port, folder=tmp_path, nodes=nodes):

        def is_at_work() -> bool:
            return any("EncodeActor" in name for name in commands_below(nodes[1])) and bool(
                list(output.glob("commits/*/*.json"))
            )

        with RunningJob(flags, env) as job:
            job.wait_until(is_at_work, "the second node was at work")
            _signal_node(nodes[1], number)
            outcome = job.end(400)
        _signal_node(nodes[1], signal.SIGCONT)
    assert outcome.code == 0, outcome.said
    verdict = check(read_output(str(output)), plan_of_tars(tmp_path / "in"))
    assert verdict.problems == []
    assert verdict.num_recorded == verdict.num_planned == len(CLIP_VIDEOS) + len(CLIP_STILLS)
