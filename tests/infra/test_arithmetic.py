"""The figures behind the README's table of sizes: requests of a shard, pages of a list, bytes of a clip."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from commits import make_commit
from operations import INFRA
from servers import FaultProxy

from pipeline.commit import commit_shard, committed_ids, put_data_file, read_commit
from pipeline.config import parse_buckets
from pipeline.storage import ObjectStore

README = (INFRA.parent / "README.md").read_text()
GFLOP_OF_A_CLIP = 5675


def test_a_shard_of_one_format_takes_two_writes_and_three_reads_with_its_input(
    proxy: FaultProxy, far_store: ObjectStore, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"latents")
    before = {method: proxy.count(method) for method in ("GET", "HEAD", "PUT")}
    # What an actor asks of the store for a shard that is not decided; the input is read beside it, in one request.
    assert read_commit(far_store, "00000-1234abcd") is None
    file = put_data_file(
        far_store, tmp_path / "file", shard_id="00000-1234abcd", content="parquet", num_rows=1, bucket_rows={}
    )
    assert commit_shard(far_store, make_commit(files=(file,))) == "committed"
    asked = {method: proxy.count(method) - count for method, count in before.items()}
    assert asked == {"GET": 2, "HEAD": 0, "PUT": 2}
    assert committed_ids(far_store) == {"00000-1234abcd"}


def _row(name: str) -> list[float]:
    (line,) = re.findall(rf"^\| {re.escape(name)}[^|]*\|(.*)\|$", README, re.MULTILINE)
    return [_number(cell) for cell in line.split("|")]


def _number(cell: str) -> float:
    found = re.search(r"[\d,.]+", cell)
    assert found is not None, cell
    units = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "min": 1 / 60}
    unit = next((scale for name, scale in units.items() if f" {name}" in cell), 1.0)
    return float(found[0].rstrip(".,").replace(",", "")) * unit


def test_the_table_of_sizes_adds_up() -> None:
    (bucket, _image) = sorted(parse_buckets("256x256x17"), key=lambda b: -b.num_frames)
    latent_bytes = 4 * (1 + (bucket.num_frames - 1) // 4) * (bucket.height_px // 8) * (bucket.width_px // 8) * 2
    assert latent_bytes == 40_960
    clips = [1e4, 1e7, 1e9]
    shards = _row("shards")
    approximately: Any = lambda values: pytest.approx(values, rel=0.06)  # noqa: E731 - the table is rounded
    assert _row("clips a shard") == [number / of for number, of in zip(clips, shards, strict=True)]
    assert _row("files and records written") == [2 * number for number in shards]
    assert _row("requests that write") == [2 * number for number in shards]
    assert _row("requests that read") == [3 * number for number in shards]
    assert _row("pages of one list of all records") == [max(1, number / 1000) for number in shards]
    assert _row("latents") == approximately([latent_bytes * number for number in clips])
    for gpu, tflops in (("GPU hours, L4", 121), ("GPU hours, H100", 989)):
        assert _row(gpu) == approximately([GFLOP_OF_A_CLIP * n / (0.4 * tflops * 1e3) / 3600 for n in clips])
    assert _row("CPU hours of decoding") == approximately([bucket.num_frames / 220 * n / 3600 for n in clips])
    assert f"| {GFLOP_OF_A_CLIP:,} GFLOP |" in README, "the counted operations are measured elsewhere on the page"
