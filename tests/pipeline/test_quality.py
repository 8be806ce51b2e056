"""The quality gate: real clips and the real model are looked at while they are encoded, and nothing else changes.

Actors are used without Ray, as in test_actors.py.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import CLIP_STILLS, CLIP_VIDEOS, pack_clips
from latents import manifest_of_worker

import cvvae
import pipeline.actors
from pipeline.actors import EncodeActor, ShardReport
from pipeline.codec import LatentDecoder
from pipeline.commit import open_dataset
from pipeline.config import JobConfig, parse_arguments
from pipeline.decode import DecodePool
from pipeline.inputs import FoundVersions
from pipeline.metrics import RunMetrics
from pipeline.packed import Names
from pipeline.plan import plan_shards
from pipeline.progress import Crew, Progress, Quality
from pipeline.quality import ClipQuality, Inspection, RunQuality, ShardQuality, floor_db, is_chosen, psnr_db
from pipeline.records import Clip, DatasetManifest, ModelFacts, ShardSpec
from pipeline.redo import Retries
from pipeline.run import _Again, _Ledger
from pipeline.source import iterate_videos
from pipeline.storage import open_store
from pipeline.stored import open_records

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of real clips and stills."""
    folder = tmp_path_factory.mktemp("shards")
    pack_clips(folder, 2, [*CLIP_VIDEOS, *CLIP_STILLS])
    return folder


def _config(inputs: Path, output: Path, *flags: str) -> JobConfig:
    few = () if "--clips-per-video" in flags else ("--clips-per-video", "1")
    model = () if "--model" in flags else ("--model", "small")
    paths = ["--input", str(inputs), "--output", str(output)]
    return parse_arguments([*paths, "--buckets", "64x64x9", *model, *few, *flags])


def _specs(config: JobConfig) -> list[ShardSpec]:
    return sorted(plan_shards(config.source, open_store(config.run.output)), key=lambda spec: spec.shard_id)


def _manifest(config: JobConfig, actor: EncodeActor) -> DatasetManifest:
    return open_dataset(open_store(config.run.output), manifest_of_worker(config, actor.start()))


def _encode(config: JobConfig, *numbers: int, name: str = "0") -> tuple[ModelFacts, list[ShardReport]]:
    """What an actor says of the shards with these numbers, in this order."""
    actor = EncodeActor(config, name, "cpu")
    try:
        manifest = _manifest(config, actor)
        return manifest.model, [actor.process(_specs(config)[number], manifest) for number in numbers]
    finally:
        actor.stop()


def _looked_at(reports: list[ShardReport]) -> list[ShardQuality]:
    return [report.quality for report in reports if report.quality is not None]


def _judged(model: ModelFacts, found: list[ShardQuality]) -> tuple[dict[str, object], str]:
    """The facts of a run that saw these shards, and what it said."""
    said = io.StringIO()
    run = RunQuality(model, RunMetrics(), Progress("plain", said))
    for number, quality in enumerate(found):
        run.add(f"shard{number}", quality, actor=0)
    return run.facts(), said.getvalue()


def _data(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.glob("data/**/*") if path.is_file()}


def _sabotaged(folder: Path, spoil: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """`small` with other weights."""
    vae = cvvae.load("small")
    with torch.no_grad():
        spoil(dict(vae.named_parameters()))
    vae.save_pretrained(folder)
    return folder


def _no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("something was looked at or decoded")

    for owner, name in (
        (LatentDecoder, "__init__"),
        (LatentDecoder, "decode_counted"),
        (cvvae.CVVAE, "decode"),
        (cvvae.CVVAE, "decode_stream"),
        (Inspection, "__init__"),
        (pipeline.actors, "Inspection"),
    ):
        monkeypatch.setattr(owner, name, fail)


def test_psnr_and_channels_are_those_of_a_direct_decode_of_what_was_stored(inputs: Path, tmp_path: Path) -> None:
    config = _config(inputs, tmp_path / "out", "--quality-share", "1")
    _, (report,) = _encode(config, 0)
    (found,) = _looked_at([report])
    (spec,) = _specs(config)[:1]
    pool = DecodePool(config.encoding, config.decode, 1)
    try:
        store = open_store(config.run.output)
        videos = iterate_videos(spec, store, config.encoding, config.decode, FoundVersions())
        pixels = {(clip.key, clip.clip_index): clip.frames for clip in pool.decode(videos) if isinstance(clip, Clip)}
    finally:
        pool.close()
    decoder = LatentDecoder(config.encoding, CPU)
    expected, latents = {}, []
    (path,) = (tmp_path / "out" / "data").rglob("*.parquet")
    records = open_records(path, "parquet")
    for group in range(len(records.group_rows)):
        for record in records.read_group(group):
            name = record.key, record.clip_index
            error = decoder.decode(record.mean).astype(np.float64) - pixels[name]
            expected[name] = 10 * math.log10(255**2 / np.mean(error**2))
            latents.append(record.mean.reshape(32, -1).astype(np.float64))
    assert found.num_clips == report.counts.num_records == len(expected) == 6
    assert found.psnr_sum_db == pytest.approx(sum(expected.values()), rel=1e-6)
    assert found.worst is not None
    assert (found.worst.key, found.worst.clip_index) == min(expected, key=lambda name: expected[name])
    assert found.worst.psnr_db == pytest.approx(min(expected.values()), rel=1e-6)
    values = np.concatenate(latents, axis=1)
    assert found.num_values == values.shape[1]
    np.testing.assert_allclose(found.sums, values.sum(axis=1), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.squares, (values**2).sum(axis=1), rtol=1e-9)
    assert report.timings_s["check"] > 0


def test_the_same_clips_are_looked_at_whoever_encodes_and_in_whatever_company(inputs: Path, tmp_path: Path) -> None:
    flags = ("--quality-share", "0.5")
    _, (first, second) = _encode(_config(inputs, tmp_path / "a", *flags), 0, 1)
    _, (alone,) = _encode(_config(inputs, tmp_path / "b", *flags), 1, name="7")
    assert second.quality is not None
    assert first.quality is not None
    assert 0 < first.quality.num_clips + second.quality.num_clips < 12
    assert alone.quality == second.quality


def test_a_share_is_kept_and_a_larger_one_looks_at_the_same_clips_and_more() -> None:
    names = [(f"shard{number % 7}", f"key{number}", number % 3) for number in range(20_000)]
    chosen = [{name for name in names if is_chosen(*name, share)} for share in (0.01, 0.1, 1.0)]
    assert 150 < len(chosen[0]) < 250
    assert 1850 < len(chosen[1]) < 2150
    assert chosen[0] < chosen[1] < chosen[2] == set(names)


def test_the_bytes_are_the_same_with_and_without(inputs: Path, tmp_path: Path) -> None:
    outcomes = []
    for number, share in enumerate(("0", "1", "0.3")):
        output = tmp_path / str(number)
        config = _config(inputs, output, "--format", "both", "--quality-share", share, "--quality-min-psnr-db", "50")
        _, reports = _encode(config, 0, 1)
        manifest = json.loads((output / "_dataset.json").read_text())
        outcomes.append((_data(output), manifest, [report.counts for report in reports]))
    assert len(outcomes[0][0]) == 4
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_off_no_decoder_is_made_or_called(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _no_decoding(monkeypatch)
    _, (report,) = _encode(_config(inputs, tmp_path / "out"), 0)
    assert (report.outcome, report.counts.num_records, report.quality) == ("committed", 6, None)
    assert report.timings_s["check"] == 0


def test_a_search_for_a_video_that_kills_looks_at_nothing(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _no_decoding(monkeypatch)
    config = _config(inputs, tmp_path / "out", "--quality-share", "1")
    actor = EncodeActor(config, "0", "cpu")
    try:
        assert actor.probe(_specs(config)[0], _manifest(config, actor), range(2), frozenset()) == 6
    finally:
        actor.stop()


def test_the_right_model_rings_no_alarm(inputs: Path, tmp_path: Path) -> None:
    flags = ("--quality-share", "1", "--fps", "native", "--clips-per-video", "4")
    model, reports = _encode(_config(inputs, tmp_path / "out", *flags), 0, 1)
    facts, said = _judged(model, [*_looked_at(reports), *_looked_at(reports)])
    assert facts["num_clips"] == 2 * sum(report.counts.num_records for report in reports) > 64
    assert (facts["alarms"], said) == ({}, "")
    assert facts["psnr_db"]["mean"] > 24  # type: ignore[index]
    assert 0.7 < facts["channels"]["deviation_of_all"] < 1  # type: ignore[index]
    assert facts["non_finite"] == {"clips_rejected": 0, "decoded_values": 0}


def test_a_decoder_whose_weights_are_noisy_is_found_by_psnr(inputs: Path, tmp_path: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        noise = torch.Generator().manual_seed(0)
        for name, weight in weights.items():
            if name.startswith("decoder.") and weight.ndim > 1:
                weight += 0.5 * weight.std() * torch.randn(weight.shape, generator=noise)

    model = _sabotaged(tmp_path / "model", spoil)
    config = _config(inputs, tmp_path / "out", "--quality-share", "1", "--model", str(model))
    facts, said = _judged(*_judgeable(config))
    assert facts["alarms"] == {"psnr": 1}
    assert facts["psnr_db"]["num_low"] > 0  # type: ignore[index]
    assert "comes back with" in said


def _judgeable(config: JobConfig) -> tuple[ModelFacts, list[ShardQuality]]:
    model, reports = _encode(config, 0, 1)
    return model, _looked_at(reports)


def test_latents_of_another_scale_are_found_although_they_decode_well(inputs: Path, tmp_path: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        # The decoder holds latents within bounds, so that smaller ones suit it better than larger ones.
        weights["encoder.conv_out.weight"] /= 5
        weights["encoder.conv_out.bias"] /= 5
        weights["decoder.conv_in.conv.weight"] *= 5

    model = _sabotaged(tmp_path / "model", spoil)
    flags = ("--quality-share", "1", "--model", str(model), "--fps", "native", "--clips-per-video", "4")
    facts, said = _judged(*_judgeable(_config(inputs, tmp_path / "out", *flags)))
    assert facts["alarms"] == {"channels": 1}
    assert facts["psnr_db"]["num_low"] == 0  # type: ignore[index]
    assert "deviation of 0.1" in said


def test_frames_that_are_not_finite_ring_and_latents_that_are_not_are_rejected_and_ring(
    inputs: Path, tmp_path: Path
) -> None:
    for half, expected in (("decoder", "decoded_values"), ("encoder", "clips_rejected")):

        def spoil(weights: dict[str, torch.Tensor], half: str = half) -> None:
            next(weight for name, weight in weights.items() if name.startswith(f"{half}.")).fill_(math.inf)

        model = _sabotaged(tmp_path / half, spoil)
        config = _config(inputs, tmp_path / f"{half}-out", "--quality-share", "0.5", "--model", str(model))
        facts, reports = _judgeable(config)
        found, said = _judged(facts, reports)
        assert found["alarms"]["nonfinite"] == 1  # type: ignore[index]
        assert found["non_finite"][expected] > 0  # type: ignore[index]
        assert "infinite" in said
    # Of latents that are not finite every clip is counted, not a share.
    assert found["non_finite"] == {"clips_rejected": 12, "decoded_values": 0}
    assert (found["num_clips"], found["psnr_db"], found["channels"]) == (0, None, None)


def test_a_decoder_that_fails_costs_no_sample(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _encode(_config(inputs, tmp_path / "off"), 0)

    def fail(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("no room")  # memory cannot be taken away from one call of a real decoder

    monkeypatch.setattr(LatentDecoder, "decode_counted", fail)
    model, reports = _encode(_config(inputs, tmp_path / "on", "--quality-share", "1"), 0)
    facts, said = _judged(model, _looked_at(reports))
    assert (facts["num_undecoded"], facts["alarms"]) == (6, {"undecoded": 1})
    assert "OutOfMemoryError: no room" in said
    assert _data(tmp_path / "on") == _data(tmp_path / "off")


def test_reports_cross_between_processes(inputs: Path, tmp_path: Path) -> None:
    _, (report,) = _encode(_config(inputs, tmp_path / "out", "--quality-share", "1"), 0)
    assert pickle.loads(pickle.dumps(report)) == report


def test_psnr_is_that_of_its_definition() -> None:
    black, grey = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 51, np.uint8)
    assert psnr_db(black, grey) == pytest.approx(20 * np.log10(255 / 51))


def test_the_floor_follows_the_clip_and_is_never_above_twenty_decibels() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (9, 64, 64, 3), np.uint8)
    assert floor_db(np.zeros_like(noise), 4, 8) == 20
    means = np.full(noise.shape, 127.5)  # nearly: each block of 4 x 8 x 8 pixels has its own
    assert floor_db(noise, 4, 8) == pytest.approx(10 * math.log10(255**2 / np.mean((noise - means) ** 2)) - 1, abs=0.1)
    # Blocks of one colour over 4 frames are shown by their mean; those that change within it are not.
    moving = np.repeat(rng.integers(0, 256, (9, 8, 8, 3), np.uint8), 8, axis=1).repeat(8, axis=2)
    still = np.concatenate([moving[:1], moving[1:3].repeat(4, axis=0)])
    assert floor_db(still, 4, 8) == 20 > floor_db(moving, 4, 8)
    assert psnr_db(noise, noise) == 100


_MODEL = ModelFacts(
    model="m",
    revision=None,
    weights_sha256="0" * 64,
    is_trained=True,
    scaling_factor=0.5,
    shift_factor=1.0,
    latent_channels=2,
    temporal_compression=4,
    spatial_compression=8,
)


def _seen(num_clips: int, mean: float = 1.0, deviation: float = 2.0, psnr: float = 30.0) -> ShardQuality:
    """A shard whose latents have this mean and deviation in both channels, unscaled."""
    clip = ClipQuality(key="key", clip_index=0, psnr_db=psnr, floor_db=20.0)
    num_values = 100 * num_clips
    return ShardQuality(
        num_clips=num_clips,
        num_undecoded=0,
        why_undecoded=None,
        psnr_sum_db=psnr * num_clips,
        worst=clip,
        num_low=num_clips * (psnr < 20),
        low=clip if psnr < 20 else None,
        num_nonfinite_clips=0,
        num_nonfinite_values=0,
        num_values=num_values,
        sums=(mean * num_values,) * 2,
        squares=((mean**2 + deviation**2) * num_values,) * 2,
    )


def test_totals_are_those_of_all_clips_and_channels_are_scaled() -> None:
    facts, _ = _judged(_MODEL, [_seen(10, mean=1.0, psnr=30), _seen(30, mean=3.0, psnr=26)])
    assert facts["num_clips"] == 40
    assert facts["psnr_db"] == {
        "mean": 27.0,
        "worst": 26.0,
        "worst_clip": {"shard_id": "shard1", "key": "key", "clip_index": 0},
        "num_low": 0,
    }
    # Unscaled: a mean of 2.5; a variance of 4 within and 0.75 between.
    assert facts["channels"]["mean"] == pytest.approx([0.75] * 2)  # type: ignore[index]
    assert facts["channels"]["deviation"] == pytest.approx([0.5 * math.sqrt(4.75)] * 2, abs=1e-4)  # type: ignore[index]
    json.dumps(facts)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"deviation": 6.0}, "they have a deviation of 3,"),
        ({"deviation": 0.5}, "they have a deviation of 0.25,"),
        ({"mean": 6.0}, "channel 0 has a mean of 2.5,"),
    ],
)
def test_channels_ring_from_32_clips_on_and_name_what_is_wrong(wrong: dict[str, float], why: str) -> None:
    facts, said = _judged(_MODEL, [_seen(16, **wrong), _seen(15, **wrong)])
    assert (facts["alarms"], said) == ({}, "")
    facts, said = _judged(_MODEL, [_seen(16, **wrong), _seen(16, **wrong)])
    assert facts["alarms"] == {"channels": 1}
    assert f"of the last 32 clips {why}" in said


def test_one_dead_channel_rings_although_all_together_look_right() -> None:
    seen = _seen(32)
    dead = replace(seen, squares=(seen.squares[0], seen.sums[1] + 1e-6))
    assert _judged(_MODEL, [dead])[0]["alarms"] == {"channels": 1}


def test_a_bad_stretch_in_a_long_good_run_rings() -> None:
    facts, said = _judged(_MODEL, [_seen(32)] * 50 + [_seen(32, deviation=9.0)] + [_seen(32)] * 50)
    assert facts["alarms"] == {"channels": 1}
    assert len(said.splitlines()) == 1


def test_a_kind_rings_once_in_a_group_and_is_told_ever_more_rarely() -> None:
    facts, said = _judged(_MODEL, [_seen(8, psnr=10.0)] * 4)
    assert facts["alarms"] == {"psnr": 1}
    facts, said = _judged(_MODEL, [_seen(8, psnr=10.0)] * 4 * 20)
    assert facts["alarms"] == {"psnr": 20}
    assert [line.partition(" number ")[2].partition(":")[0] for line in said.splitlines()] == ["1", "2", "4", "8", "16"]


def test_of_an_untrained_model_only_values_that_are_not_finite_ring() -> None:
    untrained = replace(_MODEL, is_trained=False)
    bad = _seen(40, deviation=100.0, psnr=5.0)
    assert _judged(untrained, [bad])[0]["alarms"] == {}
    assert _judged(untrained, [replace(bad, num_nonfinite_values=1)])[0]["alarms"] == {"nonfinite": 1}


@pytest.fixture
def ledger() -> tuple[_Ledger, ShardSpec, io.StringIO]:
    config = parse_arguments(["--input", "in", "--output", "out", "--model", "small", "--quality-share", "1"])
    spec = ShardSpec(
        shard_id="00000-1234abcd",
        kind="tar",
        source_uri="s3://bucket/00000.tar",
        source_size_bytes=1,
        source_etag=None,
        num_videos=None,
        plan_key=None,
    )
    again = _Again(
        num_videos_ok={}, changes=(), retried=Retries(specs=(), num_videos=0, num_spent=0, refused={}), repaired=()
    )
    metrics, said = RunMetrics(), io.StringIO()
    ledger = _Ledger(Names([spec.shard_id]), [spec], again, time.monotonic(), config, metrics)
    ledger.quality = RunQuality(_MODEL, metrics, Progress("plain", said))
    return ledger, spec, said


def test_the_summary_of_a_run_and_its_metrics_say_what_was_seen(
    ledger: tuple[_Ledger, ShardSpec, io.StringIO], inputs: Path, tmp_path: Path
) -> None:
    run, spec, said = ledger
    _, (report,) = _encode(_config(inputs, tmp_path / "out"), 0)
    run.add(spec, replace(report, quality=_seen(40, deviation=6.0, psnr=12.0)), actor=3)
    quality = run.summary(0, run.accounts(tuple), None, True).quality
    assert quality is not None
    assert quality["alarms"] == {"psnr": 1, "channels": 1}
    assert "shard 00000-1234abcd (encoder 3): clip 0 of key comes back with 12.0 dB, allowed is 20.0" in said.getvalue()

    def value(name: str, **labels: str) -> float | None:
        return run.metrics.registry.get_sample_value(f"latentmill_quality_{name}", labels)

    assert value("clips_total") == 40
    assert value("alarms_total", kind="psnr") == value("alarms_total", kind="channels") == 1
    assert value("alarms_total", kind="undecoded") == 0
    assert value("psnr_mean_db") == value("psnr_worst_db") == 12
    assert value("latent_deviation") == pytest.approx(3)
    assert value("latent_mean") == pytest.approx(0)
    shown = run.standing(0, Crew()).quality
    assert shown == Quality(
        num_clips=40, psnr_mean_db=12.0, psnr_worst_db=12.0, latent_deviation=3.0, alarms={"psnr": 1, "channels": 1}
    )


def test_a_run_that_looks_at_nothing_says_nothing_of_quality(
    ledger: tuple[_Ledger, ShardSpec, io.StringIO], inputs: Path, tmp_path: Path
) -> None:
    run, spec, _ = ledger
    run.quality = None
    _, (report,) = _encode(_config(inputs, tmp_path / "out"), 0)
    run.add(spec, report, actor=0)
    assert run.summary(0, run.accounts(tuple), None, True).quality is None
    assert run.standing(0, Crew()).quality is None
    assert run.metrics.registry.get_sample_value("latentmill_quality_psnr_mean_db") is None
