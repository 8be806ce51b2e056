"""The metrics: one table, closed label sets, an exporter that Prometheus clients can parse."""

from __future__ import annotations

from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.metrics import METRICS, RunMetrics


def _scrape(metrics: RunMetrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    port, server = metrics.serve("127.0.0.1", 0)
    try:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            text = response.read().decode()
    finally:
        server.shutdown()
        server.server_close()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_counters_end_in_total_and_names_carry_the_prefix() -> None:
    for name, row in METRICS.items():
        assert name.startswith("latentmill_")
        assert name.endswith("_total") == (row.kind == "counter")


def test_every_closed_series_is_there_before_anything_happens() -> None:
    seen = _scrape(RunMetrics())
    for name, row in METRICS.items():
        for label, values in row.labels.items():
            for value in values or ():
                suffix = "_count" if row.kind == "histogram" else ""
                assert seen[name + suffix, ((label, value),)] == 0


def test_what_is_counted_is_what_is_served() -> None:
    metrics = RunMetrics()
    metrics.add("latentmill_rejections_total", 3, reason="too_short")
    metrics.set("latentmill_encoder_busy_ratio", 0.5, actor="1")
    metrics.observe("latentmill_stage_seconds", 2.0, stage="encode")
    seen = _scrape(metrics)
    assert seen["latentmill_rejections_total", (("reason", "too_short"),)] == 3
    assert seen["latentmill_encoder_busy_ratio", (("actor", "1"),)] == 0.5
    assert seen["latentmill_stage_seconds_sum", (("stage", "encode"),)] == 2.0


def test_a_label_outside_its_closed_set_is_refused() -> None:
    with pytest.raises(AssertionError, match="closed set"):
        RunMetrics().add("latentmill_rejections_total", reason="s3://bucket/secret.mp4")
