"""That every benchmark of `make bench` still runs, each with its smallest settings.

No measurement: nothing is said of times. Benchmarks are read by nobody's types and called by no job, so that a change
of what they use would break them unseen.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import ray_folders

HERE = Path(__file__).parent
_LEAST = {
    "bench_codec.py": "--model small --rounds 1 --threads 1",
    "bench_memory.py": "--memory-gb 0.5 --side 64 --batches 1 --tiles 0 --rounds 1 --threads 1",
    "roofline.py": "--model small --side 64",
    "bench_decode.py": "--rounds 1",
    "bench_pipeline.py": "--rounds 1 --shards 1 --videos 2 --rates 16",
    "bench_commit.py": "--rounds 1 --videos 2 --writers 1,2 --commits 8",
    "bench_start.py": "--rounds 1 --videos 1",
    "bench_estimate.py": "--tars 20 --rounds 1 --inputs 1 --seconds 8",
    "bench_peers.py": "--clips 12",
    "bench_layout.py": "--mib 32",
    "bench_scale.py": "--shards 200,400 --actors 20 --plan 200,400",
    "bench_reader.py": "--rounds 1 --shards 2 --parts rates,plan --plan-shards 200",
}


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with ray_folders() as folders:
        yield {**os.environ, "OMP_NUM_THREADS": "1", **folders}


def _is_told(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def test_every_benchmark_of_make_bench_is_tried_here() -> None:
    makefile = (HERE.parents[1] / "Makefile").read_text()
    called = re.search(r"^bench:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert called is not None
    assert set(re.findall(r"benchmarks/(\w+\.py)", called[1])) == set(_LEAST)


@pytest.mark.slow
@pytest.mark.parametrize("script", _LEAST)
def test_a_benchmark_prints_its_table_and_writes_the_same_numbers(
    script: str, environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, str(HERE / script), *_LEAST[script].split(), "--results", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    files = sorted(tmp_path.glob("*.json"))
    assert files, done.stdout
    for file in files:
        content = json.loads(file.read_text())
        assert content["rows"], file.name
        for row in content["rows"]:
            assert all(map(_is_told, row.values())), row
            assert any(all(name in line for name in row) for line in done.stdout.splitlines()), done.stdout
