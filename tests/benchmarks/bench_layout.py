"""Which byte layout of the Parquet files: row-group size, zstd level, plain bytes or byte-stream-split.

Run as a script (`make bench` does); prints one Markdown table. The figures beside the constants of `pipeline.format`
come from here. Every layout holds the same rows; sizes are of whole files, times are of one thread and the fastest of
three, files are read from the page cache.

The latents are those of the real clips of the tests, encoded by the model "small" (float16, 4 channels). They are few,
so each is written again under a random gain and offset per channel: the fields stay smooth, the mantissas do not
repeat. A table of smooth Gaussian fields stands in where the model does not load; the head of the output says which.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from results import add_results_option, report
from torch.nn import functional as F

import cvvae

CLIPS = Path(__file__).parents[1] / "data" / "clips"
SIDE_PX, NUM_FRAMES = 256, 17
Latents = list[npt.NDArray[np.float16]]


@dataclass(frozen=True)
class Layout:
    """One way to store the column: a binary value per row, or a list of half floats that Parquet may split."""

    row_group_mib: int
    zstd_level: int | None
    is_split: bool = False

    @property
    def columns(self) -> dict[str, str]:
        codec = "none" if self.zstd_level is None else f"zstd {self.zstd_level}"
        return {
            "row group": f"{self.row_group_mib} MiB",
            "codec": codec,
            "encoding": "byte-stream-split" if self.is_split else "plain",
        }


LAYOUTS = (
    *(Layout(mib, 1) for mib in (1, 4, 16, 32, 64)),
    *(Layout(16, level) for level in (None, 3, 9)),
    *(Layout(16, level, is_split=True) for level in (None, 1, 3)),
)


def real_latents() -> Latents:
    """Latents (4, 5, 32, 32) of clips of 17 frames at 256x256 from the test videos."""
    import decord

    vae = cvvae.load("small").eval()
    latents = []
    for path in sorted(CLIPS.glob("*.mp4")):
        reader = decord.VideoReader(str(path), width=SIDE_PX, height=SIDE_PX, num_threads=1)
        for start in range(0, len(reader) - NUM_FRAMES + 1, NUM_FRAMES):
            frames = torch.from_numpy(reader.get_batch(range(start, start + NUM_FRAMES)).asnumpy())
            pixels = frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            with torch.inference_mode():
                latents.append(vae.encode(pixels).latent_dist.mean[0].numpy())
    return latents


def gaussian_latents(num: int) -> Latents:
    """Smooth Gaussian fields (4, 5, 32, 32) of unit variance."""
    noise = torch.randn(num, 4, 5, 32, 32, generator=torch.Generator().manual_seed(0))
    smooth = F.avg_pool3d(noise, 3, stride=1, padding=1)
    return list((smooth / smooth.std()).numpy())


def multiply(latents: Latents, num: int) -> Latents:
    """`num` latents in float16, each under its own gain and offset per channel."""
    rng = np.random.default_rng(0)
    many = []
    for number in range(num):
        latent = latents[number % len(latents)]
        gain, offset = rng.uniform(0.7, 1.3, (len(latent), 1, 1, 1)), rng.normal(0, 0.1, (len(latent), 1, 1, 1))
        many.append((latent * gain + offset).astype(np.float16))
    return many


def write(path: Path, latents: Latents, layout: Layout) -> None:
    kind = pa.list_(pa.field("element", pa.float16(), nullable=False)) if layout.is_split else pa.binary()
    schema = pa.schema([pa.field("latent", kind, nullable=False)])
    rows = max(1, (layout.row_group_mib << 20) // latents[0].nbytes)
    with pq.ParquetWriter(
        path,
        schema,
        compression="none" if layout.zstd_level is None else "zstd",
        compression_level=layout.zstd_level,
        use_dictionary=False,
        write_statistics=False,
        use_byte_stream_split=["latent.list.element"] if layout.is_split else False,
    ) as writer:
        for start in range(0, len(latents), rows):
            group = latents[start : start + rows]
            if layout.is_split:
                values = pa.array(np.concatenate([latent.ravel() for latent in group]))
                offsets = np.arange(len(group) + 1, dtype=np.int32) * group[0].size
                column = pa.ListArray.from_arrays(pa.array(offsets), values, type=kind)
            else:
                column = pa.array([latent.tobytes() for latent in group], pa.binary())
            writer.write_table(pa.table([column], schema=schema), row_group_size=len(group))


def read_all(path: Path) -> None:
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        file.read_row_group(group, use_threads=False)


def read_one(path: Path, row: int, rows_per_group: int) -> None:
    """What a cold reader pays for one clip: the footer and one row group."""
    table = pq.ParquetFile(path).read_row_group(row // rows_per_group, use_threads=False)
    table.column("latent")[row % rows_per_group].as_py()


def fastest_s(call: Callable[[], None], times: int = 3) -> float:
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mib", type=int, default=64, help="raw bytes of the latents")
    add_results_option(parser)
    options = parser.parse_args()
    raw_bytes = options.mib << 20
    pa.set_cpu_count(1)
    torch.set_num_threads(1)
    try:
        few = real_latents()
        trained = "trained" if cvvae.load("small").is_trained else "untrained"
        source = f"model small ({trained}) on the test clips, multiplied"
    except cvvae.CheckpointError as error:
        few, source = gaussian_latents(64), f"smooth Gaussian fields (small does not load: {error})"
    row_bytes = few[0].size * 2
    latents = multiply(few, raw_bytes // row_bytes)
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layout.parquet"
        chosen = np.random.default_rng(1).integers(0, len(latents), 8)
        for layout in LAYOUTS:
            rows = max(1, (layout.row_group_mib << 20) // row_bytes)
            write_s = fastest_s(lambda layout=layout: write(path, latents, layout))  # type: ignore[misc]
            share = path.stat().st_size / (len(latents) * row_bytes)
            scan_s = fastest_s(lambda: read_all(path))
            one_s = fastest_s(lambda rows=rows: [read_one(path, int(row), rows) for row in chosen])  # type: ignore[misc]
            mib = len(latents) * row_bytes / (1 << 20)
            figures = {
                "size / raw": round(share, 3),
                "write MiB/s": round(mib / write_s),
                "read MiB/s": round(mib / scan_s),
                "one random row ms": round(one_s / len(chosen) * 1000, 1),
            }
            table.append({**layout.columns, **figures})
    title = f"{source}: {len(few)} distinct, {len(latents)} rows of {few[0].shape} float16, {options.mib} MiB raw"
    report("layout", table, configuration=vars(options), title=title)


if __name__ == "__main__":
    main()
