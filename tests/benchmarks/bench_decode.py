"""Decoding speed: the pool of sandboxed children against bare loops of decord and PyAV that make the same clips.

    python tests/benchmarks/bench_decode.py [--rounds 3] [--repeats 1] [--results FOLDER]

One line of the table for each way and workload: frames of clips per second of CPU, all processes together, medians of
rounds in which the ways take turns; and their ratio to decord's. Workloads: the ten real clips of 2.5 s at 8 frames/s
and native, a video of 36 s made of one of them, and eight clips out of one of ten minutes and 66 MiB. The bare loops
know the size of each picture beforehand, decode straight to the covering size and crop. They check nothing: what the
pool adds is looking through the file and at its first picture, checking what came out, and handing it over. PyAV scales
with another FFmpeg, so that its pixels differ by rounding.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import av
import decord
import imageio_ffmpeg
import numpy as np
import psutil
from av.video.reformatter import Interpolation

from pipeline.config import DecodeLimits, EncodingConfig, parse_buckets
from pipeline.cutting import clip_spans, cover
from pipeline.decode import DecodePool
from pipeline.records import Bucket, Clip, SourceVideo

sys.path.insert(0, str(Path(__file__).parent))

import results

CLIPS = sorted((Path(__file__).parents[1] / "data" / "clips").glob("*.mp4"))
BUCKET = Bucket(width_px=256, height_px=256, num_frames=17)


def videos(paths: Sequence[Path]) -> Iterator[SourceVideo]:
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


def spans_of(starts_s: np.ndarray[Any, Any], end_s: float, fps: float | None, most: int | None) -> list[Any]:
    """The frames of each clip, by the rules of the pipeline."""
    instants_s = starts_s if fps is None else np.arange(0, end_s - 1e-6, 1 / fps)
    chosen = np.searchsorted(starts_s, instants_s + 1e-6, side="right") - 1
    starts = clip_spans(len(chosen), BUCKET.num_frames, None, most)
    return [chosen[start : start + BUCKET.num_frames] for start in starts]


def plain_decord(paths: Sequence[Path], fps: float | None, most: int | None) -> int:
    num_frames = 0
    for path in paths:
        shape = cover(BUCKET, *picture_size(path))
        reader = decord.VideoReader(str(path), width=shape.width_px, height=shape.height_px, num_threads=1)
        times_s = reader.get_frame_timestamp(np.arange(len(reader)))
        for indices in spans_of(times_s[:, 0], times_s[-1, 1], fps, most):
            frames = reader.get_batch(indices).asnumpy()
            top, left = shape.top_px, shape.left_px
            clip = np.ascontiguousarray(frames[:, top : top + BUCKET.height_px, left : left + BUCKET.width_px])
            num_frames += len(clip)
    return num_frames


def plain_pyav(paths: Sequence[Path], fps: float | None, most: int | None) -> int:
    """Reads on between clips; before the first, and where a clip is more than a group of pictures away, it jumps."""
    num_frames = 0
    for path in paths:
        shape = cover(BUCKET, *picture_size(path))
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            packets = [(p.pts, p.duration, p.is_keyframe) for p in container.demux(stream) if p.pts is not None]
            pts = np.array(sorted(p[0] for p in packets))
            keys = np.array(sorted(p[0] for p in packets if p[2]))
            tick_s = float(stream.time_base)
            end_s = float(pts[-1] - pts[0] + packets[-1][1]) * tick_s
            coming, here = iter(()), pts[-1]
            for indices in spans_of((pts - pts[0]) * tick_s, end_s, fps, most):
                key = keys[np.searchsorted(keys, pts[indices[0]], side="right") - 1]
                if not here <= pts[indices[0]] or here < key:
                    container.seek(int(key), stream=stream)
                    coming = container.decode(stream)
                clip = np.empty((BUCKET.num_frames, BUCKET.height_px, BUCKET.width_px, 3), dtype=np.uint8)
                for place, index in enumerate(indices):
                    frame = next(f for f in coming if f.pts >= pts[index])
                    here = frame.pts
                    pixels = frame.reformat(
                        width=shape.width_px,
                        height=shape.height_px,
                        format="rgb24",
                        interpolation=Interpolation.BILINEAR,
                    ).to_ndarray()
                    top, left = shape.top_px, shape.left_px
                    clip[place] = pixels[top : top + BUCKET.height_px, left : left + BUCKET.width_px]
                num_frames += len(clip)
    return num_frames


def by_pool(pool: DecodePool, paths: Sequence[Path]) -> int:
    num_frames = 0
    for clip in pool.decode(videos(paths)):
        assert isinstance(clip, Clip), "the real clips decode"
        num_frames += len(clip.frames)
    return num_frames


def repeated(path: Path, times: int, folder: Path) -> Path:
    """A video that shows another one several times, its packets as they are."""
    made = folder / f"{path.stem}-{times}.mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-stream_loop", str(times - 1), "-i", str(path)]
    subprocess.run([*command, "-c", "copy", str(made)], check=True, stdin=subprocess.DEVNULL)
    return made


def measure(
    workload: str, paths: Sequence[Path], fps: float | None, most: int | None, rounds: int
) -> list[dict[str, Any]]:
    encoding = EncodingConfig(model="small", buckets=parse_buckets(str(BUCKET)), fps=fps, clips_per_video=most)
    pool = DecodePool(encoding, DecodeLimits(), 1)
    ways: dict[str, Callable[[Sequence[Path]], int]] = {
        "decord alone": lambda some: plain_decord(some, fps, most),
        "PyAV alone": lambda some: plain_pyav(some, fps, most),
        "pool of 1": lambda some: by_pool(pool, some),
    }
    per_cpu_second: dict[str, list[float]] = {way: [] for way in ways}
    counts = set()
    try:
        for run in ways.values():
            run(paths[:1])
        for number in range(rounds):
            order = list(ways) if number % 2 == 0 else list(ways)[::-1]
            for way in order:
                before_s = cpu_seconds()
                num_frames = ways[way](paths)
                counts.add(num_frames)
                per_cpu_second[way].append(num_frames / (cpu_seconds() - before_s))
    finally:
        pool.close()
    assert len(counts) == 1, f"the ways made {counts} frames"
    return [
        {
            "workload": workload,
            "way": way,
            "num_frames": counts.copy().pop(),
            "frames_per_cpu_s": median(found),
            "to_decord": round(median(a / b for a, b in zip(found, per_cpu_second["decord alone"], strict=True)), 3),
        }
        for way, found in per_cpu_second.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1, help="times that a round decodes the ten clips")
    results.add_results_option(parser)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        waves = CLIPS[0].with_name("city_waves.mp4")
        medium, large = repeated(waves, 14, Path(name)), repeated(waves, 236, Path(name))
        for workload, paths, fps, most in (
            ("2.5 s, 8 fps", CLIPS * options.repeats, 8.0, None),
            ("2.5 s, native", CLIPS * options.repeats, None, None),
            ("36 s, 8 fps", [medium], 8.0, None),
            ("36 s, native", [medium], None, None),
            ("10 min, 8 clips", [large], 8.0, 8),
        ):
            rows += measure(workload, paths, fps, most, options.rounds)
            print(*rows[-3:], sep="\n", file=sys.stderr, flush=True)
    results.report("decode", rows, configuration=vars(options), title=f"Decoding to {BUCKET}")


if __name__ == "__main__":
    main()
