"""An output goes on with the configuration that it was made with, option by option, and with no other."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import latents
import pytest
from builders import CLIP_STILLS

from pipeline.commit import fingerprint_of, open_dataset, read_manifest
from pipeline.config import DecodeLimits, EncodingConfig, RunConfig, SourceConfig, parse_arguments
from pipeline.errors import ConfigMismatchError
from pipeline.metrics import RunMetrics
from pipeline.progress import Progress
from pipeline.run import RunSummary, run
from pipeline.storage import open_store

# Another value for every option that changes bytes, and what it is compared as.
RESULT_CHANGING = {
    "format": ["--format", "webdataset"],
    "buckets": ["--buckets", "32x32x1"],
    "fps": ["--fps", "native"],
    "clips_per_video": ["--clips-per-video", "1"],
    "clip_stride": ["--clip-stride", "4"],
    "caption_column": ["--caption-column", "text"],
    "upscale": ["--upscale"],
    "store": ["--store", "moments"],
    "store_dtype": ["--store-dtype", "float32"],
    "compute_dtype": ["--compute-dtype", "float16"],
    "chunk_frames": ["--chunk-frames", "8"],
    "tile_px": ["--tile-px", "64"],
    "compile": ["--compile"],
}
ON_A_CPU = {"cpus_per_actor": ["--cpus-per-actor", "2"]}
ON_A_GPU = {"batch_frames": ["--batch-frames", "17"]}
# The weights are compared instead, wherever they come from.
BY_WEIGHTS = {"model", "subfolder", "revision", "model_sha256"}
# Of the source, of limits and of how the run is carried out: the bytes are the same.
OTHER_VALUES = {
    "samples_per_shard": ["--samples-per-shard", "1"],
    "limit": ["--limit", "1"],
    "max_picture_px": ["--max-picture-px", "1000000"],
    "max_duration_s": ["--max-duration-s", "60"],
    "decode_timeout_s": ["--decode-timeout-s", "5"],
    "videos_per_child": ["--videos-per-child", "1"],
    "decode_processes": ["--decode-processes", "2"],
    "num_actors": ["--num-actors", "3"],
    "gpus_per_actor": ["--gpus-per-actor", "0"],
    "max_attempts": ["--max-attempts", "1"],
    "max_rejected_share": ["--max-rejected-share", "0"],
    "single_writer": ["--single-writer"],
    "retry_failed": ["--retry-failed", "timeout,not_found"],
}


def flags(tmp_path: Path) -> list[str]:
    (tmp_path / "in").mkdir(exist_ok=True)
    shutil.copyfile(CLIP_STILLS[0], tmp_path / "in" / "a.jpg")
    job = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--model", "small"]
    return [*job, "--dry-run", "--dry-run-seconds", "0"]


def made_on(device_type: str, tmp_path: Path) -> list[str]:
    """The flags of an output that a run on this kind of device has opened."""
    given = flags(tmp_path)
    held = parse_arguments(given).encoding.fingerprint_fields(device_type) | {"weights_sha256": "ab" * 32}
    manifest = replace(latents.manifest(), fingerprint=fingerprint_of(held), fingerprint_fields=held)
    open_dataset(open_store(str(tmp_path / "out")), manifest)
    return given


def dry_run(argv: list[str]) -> RunSummary:
    with Progress("plain") as progress:
        return run(parse_arguments(argv), progress, RunMetrics())


@pytest.mark.parametrize("option", [*RESULT_CHANGING, *ON_A_CPU, *ON_A_GPU])
def test_each_option_that_changes_bytes_is_refused_with_the_difference(option: str, tmp_path: Path) -> None:
    given = made_on("cuda" if option in ON_A_GPU else "cpu", tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert dry_run(given).exit_code == 0
    with pytest.raises(ConfigMismatchError) as refused:
        dry_run([*given, *(RESULT_CHANGING | ON_A_CPU | ON_A_GPU)[option]])
    assert list(refused.value.differences) == [option]
    held, asked = refused.value.differences[option]
    assert held != asked
    assert f"{option}: {held!r} there, {asked!r} asked for" in str(refused.value)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("device_type", "inert"), [("cpu", ON_A_GPU), ("cuda", ON_A_CPU)], ids=["batch on a CPU", "cores beside a GPU"]
)
def test_an_option_that_changes_nothing_on_this_device_goes_on(
    device_type: str, inert: dict[str, list[str]], tmp_path: Path
) -> None:
    given = made_on(device_type, tmp_path)
    assert dry_run([*given, *next(iter(inert.values()))]).exit_code == 0


def test_every_other_option_goes_on(tmp_path: Path) -> None:
    given = made_on("cpu", tmp_path)
    for option, argv in OTHER_VALUES.items():
        summary = dry_run([*given, *argv])
        assert (summary.exit_code, summary.num_shards) == (0, 1), option


def test_no_option_is_forgotten_here() -> None:
    compared = RESULT_CHANGING.keys() | ON_A_CPU.keys() | ON_A_GPU.keys()
    assert compared | BY_WEIGHTS == {field.name for field in fields(EncodingConfig)}
    others: set[Any] = {f.name for part in (SourceConfig, DecodeLimits, RunConfig) for f in fields(part)}
    assert OTHER_VALUES.keys() <= others


def test_a_retry_of_an_output_that_nobody_opened_finds_nothing_to_retry(tmp_path: Path) -> None:
    summary = dry_run([*flags(tmp_path), "--retry-failed", "timeout"])
    assert (summary.exit_code, summary.num_shards, summary.num_videos_retried) == (0, 1, 0)
    assert read_manifest(open_store(str(tmp_path / "out"))) is None
