"""The metrics: one table, closed label sets, an exporter that Prometheus clients can parse."""

from __future__ import annotations

import io
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.actors import ShardReport
from pipeline.config import parse_arguments
from pipeline.metrics import METRICS, STAGES, RunMetrics, final_name
from pipeline.packed import Names
from pipeline.progress import Crew, Progress
from pipeline.quality import ClipQuality, RunQuality, ShardQuality
from pipeline.records import REASONS, ModelFacts, ShardCounts, ShardSpec
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
    again = _Again(
        num_videos_ok={}, changes=(), retried=Retries(specs=(), num_videos=0, num_spent=0, refused={}), repaired=()
    )
    ledger = _Ledger(Names(spec.shard_id for spec in specs), specs, again, 0.0, config, metrics)
    before = _scrape(metrics).keys()
    reasons = list(REASONS)
    for number, spec in enumerate(specs):
        if number % 3:
            metrics.add("latentmill_shard_attempts_failed_total")
            ledger.undone[spec.shard_id] = f"s3://bucket/{number} failed: {number}"
        else:
            ledger.add(spec, _report(spec, reasons[number % len(reasons)]), actor=number % 2)
        ledger.standing(number % 2, Crew())
    after = _scrape(metrics)
    # One of each actor that worked, however much it was given; all others stand from the beginning.
    assert [name for name, _ in after.keys() - before] == ["latentmill_encoder_busy_ratio"] * 2
    assert len(after) < 2000
    assert not any("s3://" in value for _, labels in after for _, value in labels)


def test_clips_that_are_looked_at_make_the_same_series_whatever_they_are_called() -> None:
    metrics = RunMetrics()
    model = ModelFacts(
        model="m",
        revision=None,
        weights_sha256="0" * 64,
        is_trained=True,
        scaling_factor=1.0,
        shift_factor=0.0,
        latent_channels=1,
        temporal_compression=4,
        spatial_compression=8,
    )
    quality = RunQuality(model, metrics, Progress("plain", io.StringIO()))
    before = _scrape(metrics)
    for number in range(300):
        clip = ClipQuality(key=f"s3://{number}", clip_index=number, psnr_db=15.0 - number / 100, floor_db=15.0)
        found = ShardQuality(
            num_clips=2,
            num_undecoded=number % 2,
            why_undecoded=f"s3://{number}",
            psnr_sum_db=2 * clip.psnr_db,
            worst=clip,
            num_low=1,
            low=clip,
            num_nonfinite_clips=0,
            num_nonfinite_values=number % 3,
            num_values=10,
            sums=(0.0,),
            squares=(10.0 * number,),
        )
        quality.add(f"shard{number}", found, actor=number)
    after = _scrape(metrics)
    assert sorted(name for name, _ in after.keys() - before.keys()) == [
        "latentmill_quality_latent_deviation",
        "latentmill_quality_latent_mean",
        "latentmill_quality_psnr_mean_db",
        "latentmill_quality_psnr_worst_db",
    ]
    assert after["latentmill_quality_clips_total", ()] == 600
    assert after["latentmill_quality_psnr_worst_db", ()] == pytest.approx(12.01)
    assert after["latentmill_quality_alarms_total", (("kind", "psnr"),)] == 300 // 16 + 1


def test_constant_labels_stand_on_every_series() -> None:
    constant = {"job": "latentmill", "run": "run1", "cluster": "west"}
    metrics = RunMetrics(constant)
    metrics.set("latentmill_run_start_timestamp_seconds", time.time())
    metrics.set("latentmill_queue_depth", 2, actor="0")
    seen = _scrape(metrics)
    assert all(constant.items() <= dict(labels).items() for _, labels in seen)
    assert {name for name, _ in seen} >= {"latentmill_frames_total", "latentmill_run_start_timestamp_seconds"}


def test_what_a_run_does_not_know_yet_is_absent_and_not_zero() -> None:
    metrics = RunMetrics()
    assert "latentmill_run_deadline_timestamp_seconds" not in {name for name, _ in _scrape(metrics)}
    metrics.set("latentmill_run_deadline_timestamp_seconds", 5.0)
    assert _scrape(metrics)["latentmill_run_deadline_timestamp_seconds", ()] == 5.0


def test_counts_of_other_processes_are_followed_also_when_a_process_is_replaced() -> None:
    metrics = RunMetrics()
    for source, total in (("0", 3), ("1", 1), ("0", 5), ("0", 2), ("0", 2)):  # the fourth: actor 0 has started anew
        metrics.follow("latentmill_store_errors_total", source, total, outcome="repeated")
    assert _scrape(metrics)["latentmill_store_errors_total", (("outcome", "repeated"),)] == 3 + 1 + 2 + 2


def test_last_values_are_gauges_under_names_of_their_own(tmp_path: Path) -> None:
    metrics = RunMetrics({"job": "latentmill", "run": "run1", "cluster": "west"})
    metrics.add("latentmill_videos_total", 7, outcome="ok")
    metrics.observe("latentmill_stage_seconds", 2.5, stage="encode")
    metrics.set("latentmill_run_exit_code", 4)
    path = tmp_path / "latentmill.prom"
    metrics.write_final(str(path))
    families = list(text_string_to_metric_families(path.read_text()))
    assert {family.type for family in families} == {"gauge"}
    values = {(s.name, s.labels.get("outcome", s.labels.get("stage"))): s.value for f in families for s in f.samples}
    assert values["latentmill_last_run_videos", "ok"] == 7
    assert values["latentmill_last_run_stage_seconds_sum", "encode"] == 2.5
    assert values["latentmill_last_run_exit_code", None] == 4
    assert all(sample.labels["run"] == "run1" for family in families for sample in family.samples)
    # Beside the live series of the next run nothing is counted twice, and two names never become one.
    assert not METRICS.keys() & {name for name, _ in values}
    assert len({final_name(name) for name in METRICS}) == len(METRICS)


def test_the_run_label_is_the_last_part_of_the_output_unless_it_is_given() -> None:
    flags = ["--input", "in", "--model", "small", "--output"]
    assert parse_arguments([*flags, "s3://bucket/a b/run 1/"]).metric_labels["run"] == "run-1"
    given = parse_arguments([*flags, "out", "--metrics-run", "nightly", "--metrics-cluster", "west"])
    assert given.metric_labels == {"job": "latentmill", "run": "nightly", "cluster": "west"}


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
