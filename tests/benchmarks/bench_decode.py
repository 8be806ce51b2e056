"""Decoding speed: the pool of sandboxed children against decord alone in one process, on the real clips.

    python tests/benchmarks/bench_decode.py [--repeats 4]

Prints one JSON line for each: frames of clips per second of CPU (all processes together) and per second of clock, at
256x256x17 and 8 frames/s, and at native rate. The plain decoder knows the size of each picture beforehand, opens each
file once, decodes straight to the covering size and takes the same frames; it checks nothing. What it leaves out is
what the pool costs: looking through the file and at its first picture, checking what came out, handing it over.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import decord
import numpy as np
import psutil

from pipeline.config import DecodeLimits, EncodingConfig, parse_buckets
from pipeline.cutting import cover
from pipeline.decode import DecodePool
from pipeline.records import Bucket, Clip, SourceVideo

CLIPS = sorted((Path(__file__).parents[1] / "data" / "clips").glob("*.mp4"))
BUCKET = Bucket(width_px=256, height_px=256, num_frames=17)


def videos(paths: list[Path]) -> Iterator[SourceVideo]:
    for number, path in enumerate(paths):
        yield SourceVideo(
            key=f"{number:05d}",
            media_fd=os.open(path, os.O_RDONLY),
            num_bytes=path.stat().st_size,
            extension="mp4",
            media_kind="video",
            caption="",
            fields={},
            source_uri=str(path),
        )


def cpu_seconds() -> float:
    """Of this process and of its living children."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children())]
    return sum(t.user + t.system for t in times)


@functools.cache
def picture_size(path: Path) -> tuple[int, int]:
    with av.open(str(path)) as container:
        return container.streams.video[0].width, container.streams.video[0].height


def plain_decord(paths: list[Path], fps: float | None) -> int:
    num_frames = 0
    for path in paths:
        shape = cover(BUCKET, *picture_size(path))
        reader = decord.VideoReader(str(path), width=shape.width_px, height=shape.height_px, num_threads=1)
        times_s = reader.get_frame_timestamp(np.arange(len(reader)))
        instants_s = times_s[:, 0] if fps is None else np.arange(0, times_s[-1, 1] - 1e-6, 1 / fps)
        chosen = np.searchsorted(times_s[:, 0], instants_s + 1e-6, side="right") - 1
        for start in range(0, len(chosen) - BUCKET.num_frames + 1, BUCKET.num_frames):
            frames = reader.get_batch(chosen[start : start + BUCKET.num_frames]).asnumpy()
            top, left = shape.top_px, shape.left_px
            clip = np.ascontiguousarray(frames[:, top : top + BUCKET.height_px, left : left + BUCKET.width_px])
            num_frames += len(clip)
    return num_frames


def measure(name: str, fps: float | None, run: Callable[[], int]) -> None:
    cpu_before_s, clock_before_s = cpu_seconds(), time.perf_counter()
    num_frames = run()
    cpu_s, clock_s = cpu_seconds() - cpu_before_s, time.perf_counter() - clock_before_s
    figures = {
        "benchmark": "decode",
        "what": name,
        "bucket": str(BUCKET),
        "fps": fps or "native",
        "num_clip_frames": num_frames,
        "clip_frames_per_cpu_second": round(num_frames / cpu_s, 1),
        "clip_frames_per_second": round(num_frames / clock_s, 1),
    }
    print(json.dumps(figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=4, help="times that the ten clips are decoded")
    paths = CLIPS * parser.parse_args().repeats
    for fps in (8.0, None):
        encoding = EncodingConfig(model="small", buckets=parse_buckets(str(BUCKET)), fps=fps)
        plain_decord(CLIPS, fps)
        measure("decord in this process", fps, lambda fps=fps: plain_decord(paths, fps))
        for num_processes in (1, 2):
            pool = DecodePool(encoding, DecodeLimits(), num_processes)
            warm = [clip for _ in range(num_processes) for clip in pool.decode(videos(CLIPS))]
            assert all(isinstance(clip, Clip) for clip in warm), "the real clips decode"
            measure(
                f"pool of {num_processes}",
                fps,
                lambda pool=pool: sum(len(c.frames) for c in pool.decode(videos(paths)) if isinstance(c, Clip)),
            )
            pool.close()


if __name__ == "__main__":
    main()
