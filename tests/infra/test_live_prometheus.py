"""A real run, scraped by a real Prometheus that also asks a real push gateway: every panel returns data."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml
from builders import CLIP_STILLS, CLIP_VIDEOS, pack_clips
from integration.jobs_under_test import SMALL, RunningJob
from operations import MONITORING, debian_tool, filled, panels
from servers import free_ports, wait_for_http

LABELS = {"cluster": "west", "job": "latentmill", "run": "nightly"}


@contextmanager
def _server(command: list[str], ready: str, log: Path) -> Iterator[None]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=log.parent)
    try:
        wait_for_http(ready, process, log)
        yield
    finally:
        process.kill()
        process.wait()


def _ask(address: str, path: str, **query: Any) -> Any:
    with urlopen(f"http://{address}/api/v1/{path}?{urlencode(query)}", timeout=60) as response:
        answer = json.load(response)
    assert answer["status"] == "success", answer
    return answer["data"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_panel_returns_data_of_a_real_run(ray_home: Mapping[str, str], tmp_path: Path) -> None:
    prometheus = debian_tool("prometheus", "prometheus")
    pushgateway = debian_tool("prometheus-pushgateway", "prometheus-pushgateway")
    first = free_ports(3)
    run, gateway, server = (f"127.0.0.1:{first + number}" for number in range(3))
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "5s"},
        "rule_files": [str(MONITORING / "alerts.yaml")],
        "scrape_configs": [
            {"job_name": name, "honor_labels": True, "static_configs": [{"targets": [target]}]}
            for name, target in (("runs", run), ("gateway", gateway))
        ],
    }
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    # Long enough that actors are asked how they are, which is every few seconds.
    for number in range(6):
        pack_clips(tmp_path / "shards" / str(number), 4, [*CLIP_VIDEOS, *CLIP_STILLS])
    flags = [
        "--input",
        str(tmp_path / "shards/**/*.tar"),
        "--output",
        str(tmp_path / "nightly"),
        *SMALL,
        "--num-actors",
        "1",
    ]
    flags += ["--metrics-port", run.rpartition(":")[2], "--metrics-cluster", "west", "--deadline-s", "36000"]
    flags += ["--quality-share", "1"]
    flags += ["--metrics-push", f"http://{gateway}"]
    watch = [f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/data"]
    started = time.time()
    with (
        _server(
            [pushgateway, f"--web.listen-address={gateway}"], f"http://{gateway}/-/ready", tmp_path / "gateway.log"
        ),
        _server([prometheus, *watch, f"--web.listen-address={server}"], f"http://{server}/-/ready", tmp_path / "log"),
    ):
        with RunningJob(flags, ray_home) as job:
            outcome = job.end(timeout_s=1200)
        assert outcome.code == 0, outcome.said
        deadline = time.monotonic() + 60
        while not _ask(server, "query", query="latentmill_last_run_exit_code")["result"]:
            assert time.monotonic() < deadline, "the gateway's values never came"
            time.sleep(0.5)
        empty = []
        for title, expressions in panels():
            for expression in expressions:
                query = filled(expression, {**LABELS, "__rate_interval": "30s"})
                # A step past now: the last values came within the step that is not over.
                span = {"start": started, "end": time.time() + 1, "step": 1}
                found = _ask(server, "query_range", query=query, **span)["result"]
                values = [float(value) for series in found for _, value in series["values"]]
                if not any(math.isfinite(value) for value in values):
                    empty.append(f"{title}: {expression}")
        assert not empty
        for name, label in (("latentmill_shards", "cluster"), ("latentmill_last_run_shards", "run")):
            values = _ask(server, f"label/{label}/values", **{"match[]": name})
            assert values == [LABELS[label]]
        rules = [rule for group in _ask(server, "rules")["groups"] for rule in group["rules"]]
        assert len(rules) == 10
        assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
        assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []
        clips = _ask(server, "query", query='sum(latentmill_last_run_clips{outcome="ok"})')["result"]
        assert float(clips[0]["value"][1]) == outcome.result["num_records"]
