"""The values of a run outlive it: as a file for node_exporter, and at a real push gateway."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from operations import debian_tool, samples_of_metrics
from prometheus_client.parser import text_string_to_metric_families
from servers import free_ports, wait_for_http

from pipeline.metrics import RunMetrics

LABELS = {"job": "latentmill", "run": "nightly", "cluster": "west"}


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[str]:
    port = free_ports(1)
    program = debian_tool("prometheus-pushgateway", "prometheus-pushgateway")
    log = tmp_path / "gateway.log"
    with log.open("wb") as file:
        process = subprocess.Popen([program, f"--web.listen-address=127.0.0.1:{port}"], stdout=file, stderr=file)
    try:
        wait_for_http(f"http://127.0.0.1:{port}/-/ready", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _ended(exit_code: int, num_clips: int) -> RunMetrics:
    metrics = RunMetrics(LABELS)
    metrics.set("latentmill_run_start_timestamp_seconds", time.time())
    metrics.add("latentmill_clips_total", num_clips, outcome="ok")
    metrics.observe("latentmill_stage_seconds", 2.0, stage="encode")
    metrics.set("latentmill_encoder_busy_ratio", 0.5, actor="0")
    metrics.set("latentmill_run_end_timestamp_seconds", time.time())
    metrics.set("latentmill_run_exit_code", exit_code)
    if exit_code == 0:
        metrics.set("latentmill_run_success_timestamp_seconds", 1234.0)
    return metrics


def _at(url: str) -> dict[tuple[str, str | None], float]:
    with urlopen(f"{url}/metrics", timeout=10) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    samples = [sample for family in families for sample in family.samples if sample.name.startswith("latentmill")]
    assert all(LABELS.items() <= sample.labels.items() for sample in samples)
    assert {sample.name for sample in samples} <= samples_of_metrics()
    return {(sample.name, sample.labels.get("outcome")): sample.value for sample in samples}


def test_a_gateway_keeps_the_last_run_and_the_last_success(gateway: str) -> None:
    _ended(0, num_clips=7).push_final(gateway)
    first = _at(gateway)
    assert first["latentmill_last_run_clips", "ok"] == 7
    assert first["latentmill_last_run_exit_code", None] == 0
    _ended(4, num_clips=3).push_final(gateway)
    second = _at(gateway)
    assert second["latentmill_last_run_clips", "ok"] == 3
    assert second["latentmill_last_run_exit_code", None] == 4
    assert second["latentmill_last_run_success_timestamp_seconds", None] == 1234.0, "a failed night forgets no success"


def test_a_run_leaves_its_last_values_and_lives_without_a_gateway(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from jobs.encode_laion import main  # starts Ray's import, which the other tests here can do without

    path = tmp_path / "latentmill.prom"
    flags = ["--input", str(tmp_path / "absent"), "--output", str(tmp_path / "nightly"), "--model", "small"]
    flags += ["--metrics-file", str(path), "--metrics-push", "http://127.0.0.1:1", "--metrics-cluster", "west"]
    assert main(flags) == 2
    families = text_string_to_metric_families(path.read_text())
    values = {sample.name: (sample.labels, sample.value) for family in families for sample in family.samples}
    assert values["latentmill_last_run_exit_code"] == (LABELS, 2.0)
    assert "latentmill_last_run_success_timestamp_seconds" not in values
    said = capfd.readouterr()
    assert "--metrics-push http://127.0.0.1:1: the metrics of the run are lost" in said.err
    assert json.loads(said.out.splitlines()[-1])["exit_code"] == 2
