"""The metrics: one table, closed label sets, an exporter that Prometheus clients can parse."""

from __future__ import annotations

from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.actors import ShardReport
from pipeline.config import parse_arguments
from pipeline.metrics import METRICS, STAGES, RunMetrics
from pipeline.records import REASONS, ShardCounts, ShardSpec
from pipeline.redo import Retries
from pipeline.run import _Again, _Ledger


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


def test_many_failures_of_many_inputs_make_no_new_series() -> None:
    metrics = RunMetrics()
    config = parse_arguments(["--input", "in", "--output", "out", "--model", "small"])
    specs = [_spec(f"{number}\n{number * 'x'}") for number in range(300)]
    again = _Again(before={}, changes=(), retried=Retries(specs=(), num_videos=0, num_spent=0, refused={}), repaired=())
    ledger = _Ledger([spec.shard_id for spec in specs], specs, again, 0.0, config, metrics)
    before = _scrape(metrics).keys()
    reasons = list(REASONS)
    for number, spec in enumerate(specs):
        if number % 3:
            metrics.add("latentmill_shard_attempts_failed_total")
            ledger.undone[spec.shard_id] = f"s3://bucket/{number} failed: {number}"
        else:
            ledger.add(_report(spec, reasons[number % len(reasons)]), actor=number % 2)
        ledger.standing(num_running=number % 2)
    after = _scrape(metrics)
    # One of each actor that worked, however much it was given; all others stand from the beginning.
    assert [name for name, _ in after.keys() - before] == ["latentmill_encoder_busy_ratio"] * 2
    assert len(after) < 2000
    assert not any("s3://" in value for _, labels in after for _, value in labels)


def _spec(name: str) -> ShardSpec:
    return ShardSpec(
        shard_id=name,
        kind="tar",
        source_uri=f"s3://bucket/{name}.tar",
        source_size_bytes=1,
        source_etag=None,
        num_videos=None,
        plan_key=None,
    )


def _report(spec: ShardSpec, reason: str) -> ShardReport:
    counts = ShardCounts(
        num_videos=1,
        num_videos_ok=0,
        num_videos_rejected=1,
        num_clips=0,
        num_records=0,
        num_clips_rejected=0,
        num_frames=0,
        reasons={reason: 1},
    )
    return ShardReport(
        shard_id=spec.shard_id,
        outcome="committed",
        counts=counts,
        num_bytes_in=1,
        num_bytes_out=1,
        timings_s=dict.fromkeys(STAGES, 1.0),
        busy_share=0.5,
    )


def test_a_label_outside_its_closed_set_is_refused() -> None:
    with pytest.raises(AssertionError, match="closed set"):
        RunMetrics().add("latentmill_rejections_total", reason="s3://bucket/secret.mp4")
