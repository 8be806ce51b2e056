"""The command line and the YAML file: the same keys, clear refusals, and what enters the fingerprint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.config import argument_parser, parse_arguments, parse_buckets
from pipeline.errors import UsageError
from pipeline.records import Bucket

_REQUIRED = ["--input", "in", "--output", "out", "--model", "small"]


def test_the_defaults_are_those_of_the_documentation() -> None:
    config = parse_arguments(_REQUIRED)
    assert [str(bucket) for bucket in config.encoding.buckets] == ["256x256x1", "256x256x17"]
    assert config.encoding.fps == 8.0
    assert (config.encoding.format, config.encoding.store, config.encoding.store_dtype) == (
        "parquet",
        "mean",
        "float16",
    )
    assert config.run.max_rejected_share == 0.5
    assert config.run.num_actors is None


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("fps: 4\nformat: both\nmax-attempts: 7\nbuckets: [256x256x17, 64x64x9]\n", encoding="utf-8")
    config = parse_arguments([*_REQUIRED, "--config", str(file), "--fps", "native"])
    assert config.encoding.fps is None
    assert config.encoding.format == "both"
    assert config.run.max_attempts == 7
    assert len(config.encoding.buckets) == 4


def test_every_required_key_may_come_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("input: a\noutput: b\nmodel: small\n", encoding="utf-8")
    config = parse_arguments(["--config", str(file)])
    assert (config.source.input, config.run.output, config.encoding.model) == ("a", "b", "small")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--buckets", "100x100x16"], "width 100 of 100x100x16 is not a positive multiple of 8"),
        (["--buckets", "104x104x16"], "use 13 or 17"),
        (["--buckets", "256x256"], "WIDTHxHEIGHTxFRAMES"),
        (["--buckets", ";"], "names no bucket"),
        (["--fps", "0"], "neither 'native' nor a number"),
        (["--fps", "nan"], "neither 'native' nor a number"),
        (["--format", "csv"], "not one of parquet, webdataset, both"),
        (["--num-actors", "0"], "whole number of 1 or more"),
        (["--chunk-frames", "6"], "not a multiple of 4"),
        (["--tile-px", "100"], "not a multiple of 8"),
        (["--retry-failed", "bad_luck"], "bad_luck is no reason code"),
        (["--max-rejected-share", "2"], "number from 0 to 1"),
        (["--no-such-flag", "1"], "no-such-flag"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_what_is_allowed(flags: list[str], said: str) -> None:
    with pytest.raises(UsageError, match="--") as caught:
        parse_arguments([*_REQUIRED, *flags])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fpss: 8\n", "unknown key 'fpss'"),
        ("- fps\n", "not a mapping"),
        ("fps: [\n", "cannot be read as YAML"),
        ("fps: {a: 1}\n", "not a text, number or true/false"),
    ],
)
def test_a_wrong_file_is_refused_by_key(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        parse_arguments([*_REQUIRED, "--config", str(file)])
    assert said in str(caught.value)


def test_missing_flags_are_named() -> None:
    with pytest.raises(UsageError, match="--model, --output must be given"):
        parse_arguments(["--input", "in"])


def test_buckets_do_not_depend_on_the_order_in_which_they_are_given() -> None:
    assert parse_buckets("64x64x9;256x256x17") == parse_buckets("256x256x17; 64x64x9;64x64x9")


def test_a_bucket_of_one_frame_replaces_the_ones_made_for_images() -> None:
    assert parse_buckets("256x256x17;64x64x1") == (
        Bucket(width_px=64, height_px=64, num_frames=1),
        Bucket(width_px=256, height_px=256, num_frames=17),
    )


def test_what_changes_bytes_enters_the_fingerprint_and_nothing_else_does() -> None:
    plain = parse_arguments(_REQUIRED).encoding.fingerprint_fields("cpu")
    other = parse_arguments([*_REQUIRED, "--upscale", "--num-actors", "3"]).encoding.fingerprint_fields("cpu")
    assert {key for key in plain if plain[key] != other[key]} == {"upscale"}
    on_gpu = parse_arguments(_REQUIRED).encoding.fingerprint_fields("cuda")
    assert {key for key in plain if plain[key] != on_gpu[key]} == {
        "batch_frames",
        "compute_dtype",
        "cpus_per_actor",
        "device_type",
    }


def test_help_says_what_is_required_and_what_each_flag_is_by_default() -> None:
    text = re.sub(r"\s+", " ", argument_parser().format_help())
    assert "--input VALUE --model VALUE --output VALUE [--FLAG VALUE ...]" in text
    for said in ("(default: 8)", "(default: 256x256x1;256x256x17)", "(default: parquet)", "(default: 20000000000)"):
        assert said in text


def test_a_misspelt_flag_is_answered_with_the_one_that_was_meant() -> None:
    with pytest.raises(UsageError, match="is --buckets meant"):
        parse_arguments([*_REQUIRED, "--buket", "8x8x1"])
