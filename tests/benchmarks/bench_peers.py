"""Whole jobs on the same files on the same machine: this pipeline, plain loops, Ray Data, the published script's way.

    python tests/benchmarks/bench_peers.py [--clips 100] [--only WAY ...] [--results FOLDER]

Each way runs as a process of its own on a small folder and on one ten times as large, both made of the demo's ten
videos, and writes its latents to a local folder. The difference of the two runs is what a clip costs once everything
has started; the small run's rest is the start. One thread for each process that computes; where decoding and encoding
are apart they may overlap on two cores.

CPU seconds are those of all processes that a way starts, as `/proc` shows them four times a second: the kernel's own
sum over descendants was seen to miss Ray's workers. Of them *main* is the loop or the driver,
*actors* encode (in Ray Data some decode), *children* decode, and *Ray* are its daemons and idle workers. These compute
by the clock and not by the clip: the longer a clip waits for other work of the machine, the more they add to it.

What the ways write is not the same. `decord + CVVAE`, Ray Data and this pipeline encode clips of 256x256x17 at 8
frames/s with `small`. The image VAEs of diffusers (`AutoencoderTiny` in its default shape, which is TAESD's, and
`AutoencoderKL` in the shape of SD 2.1; made weights, as values do not change the speed) encode the same frames one by
one and give 17 latents a clip, not 5; AutoencoderKL encodes three frames of each clip here, which are scaled to 17. The
published script's way, written from its description, takes whole videos at
their native rate, resized without regard to their shape, cut to 1 + 4 n frames and encoded in chunks of 17 frames that
overlap by one, and saves drawn latents: 65 frames of a video of 66, of which the others make one clip.
Only this pipeline checks files for damage, decodes in a sandbox, goes on after a crash and commits exactly once.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))

import results

ROOT = Path(__file__).parents[2]
CLIPS = sorted((ROOT / "tests" / "data" / "clips").glob("*.mp4"))
SIZE_PX, NUM_FRAMES, FPS = 256, 17, 8.0
NUM_FRAMES_OF_KL = 3
_PR_SET_CHILD_SUBREAPER = 36
_WATCH_EVERY_S = 0.25

# --- the ways, each in a process of its own: they are given a folder of videos and one to write to -------------------


def decoded_clip(path: Path) -> Any:
    """The video's one clip at 8 frames/s, uint8 `(17, 256, 256, 3)`, resized to cover and cropped."""
    import decord
    import numpy as np

    height_px, width_px, _ = decord.VideoReader(str(path), num_threads=1)[0].shape
    scale = SIZE_PX / min(width_px, height_px)
    width_px, height_px = round(width_px * scale), round(height_px * scale)
    reader = decord.VideoReader(str(path), width=width_px, height=height_px, num_threads=1)
    starts_s = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0]
    indices = np.searchsorted(starts_s, np.arange(NUM_FRAMES) / FPS + 1e-6, side="right") - 1
    top, left = (height_px - SIZE_PX) // 2, (width_px - SIZE_PX) // 2
    return reader.get_batch(indices).asnumpy()[:, top : top + SIZE_PX, left : left + SIZE_PX]


def to_input(clip: Any) -> Any:
    """uint8 `(T, H, W, 3)` -> float32 `(1, 3, T, H, W)` in [-1, 1]."""
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(clip)).permute(3, 0, 1, 2)[None]
    return pixels.float().div_(127.5).sub_(1)


def small() -> Any:
    import torch

    import cvvae

    torch.set_num_threads(1)
    return cvvae.load("small").eval().requires_grad_(False)


def write_table(rows: list[tuple[str, Any]], output: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "key": [key for key, _ in rows],
        "shape": [list(latent.shape) for _, latent in rows],
        "latent": [latent.tobytes() for _, latent in rows],
    }
    pq.write_table(pa.table(columns), output / "latents.parquet")


def plain_cvvae(folder: Path, output: Path) -> None:
    import torch

    vae = small()
    rows = []
    with torch.inference_mode():
        for path in sorted(folder.glob("*.mp4")):
            mean = vae.encode(to_input(decoded_clip(path))).latent_dist.mean
            rows.append((path.stem, mean[0].half().numpy()))
    write_table(rows, output)


def frame_by_frame(folder: Path, output: Path, encode: Callable[[Any], Any], num_frames: int = NUM_FRAMES) -> None:
    import torch

    rows = []
    with torch.inference_mode():
        for path in sorted(folder.glob("*.mp4")):
            frames = to_input(decoded_clip(path))
            latents = torch.cat([encode(frames[:, :, number]) for number in range(num_frames)])
            rows.append((path.stem, latents.half().numpy()))
    write_table(rows, output)


def plain_tiny(folder: Path, output: Path) -> None:
    import torch
    from diffusers import AutoencoderTiny

    torch.set_num_threads(1)
    vae = AutoencoderTiny().eval().requires_grad_(False)
    frame_by_frame(folder, output, lambda frame: vae.encode(frame).latents)


def plain_kl(folder: Path, output: Path) -> None:
    import torch
    from diffusers import AutoencoderKL

    torch.set_num_threads(1)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=768,
    )
    vae = vae.eval().requires_grad_(False)
    frame_by_frame(folder, output, lambda frame: vae.encode(frame).latent_dist.mean, NUM_FRAMES_OF_KL)


class Encoder:
    """For Ray Data's pool of actors."""

    def __init__(self) -> None:
        self._vae = small()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import numpy as np
        import torch

        with torch.inference_mode():
            means = [self._vae.encode(to_input(clip)).latent_dist.mean[0].half().numpy() for clip in batch["clip"]]
        return {"key": batch["key"], "latent": np.stack(means)}


def ray_data(folder: Path, output: Path) -> None:
    import ray

    paths = [{"path": str(path)} for path in sorted(folder.glob("*.mp4"))]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    clips = ray.data.from_items(paths).map(
        lambda row: {"key": Path(row["path"]).stem, "clip": decoded_clip(Path(row["path"]))}
    )
    latents = clips.map_batches(Encoder, batch_size=8, num_cpus=1, compute=ray.data.ActorPoolStrategy(size=1))
    latents.write_parquet(str(output / "latents"))
    ray.shutdown()


def published_script(folder: Path, output: Path) -> None:
    import decord
    import torch

    vae = small()
    for path in sorted(folder.glob("*.mp4")):
        reader = decord.VideoReader(str(path), width=SIZE_PX, height=SIZE_PX)
        video = to_input(reader.get_batch(range(len(reader) - (len(reader) - 1) % 4)).asnumpy())
        with torch.inference_mode():
            chunks = []
            for start in range(0, video.shape[2] - 1, 16):
                latent = vae.encode(video[:, :, start : start + NUM_FRAMES]).latent_dist.sample()
                chunks.append(latent if start == 0 else latent[:, :, 1:])
        torch.save(torch.cat(chunks, dim=2), output / f"{path.stem}.pt")


def this_pipeline(folder: Path, output: Path) -> None:
    flags = ["--input", str(folder), "--output", str(output / "latents"), "--model", "small"]
    flags += ["--buckets", f"{SIZE_PX}x{SIZE_PX}x{NUM_FRAMES}", "--num-actors", "1", "--cpus-per-actor", "1"]
    flags += ["--samples-per-shard", "50"]
    program = str(ROOT / "jobs" / "encode_laion.py")
    os.execv(sys.executable, [sys.executable, program, *flags])


@dataclass(frozen=True)
class Way:
    """How a way is run, on how many files (slow ones on fewer), and how often a clip holds what is measured of it."""

    run: Callable[[Path, Path], None]
    share: float = 1.0
    what: str = "clip of 17 frames"
    scale: float = 1.0


WAYS = {
    "decord + CVVAE": Way(plain_cvvae),
    "Ray Data + CVVAE": Way(ray_data),
    "this pipeline": Way(this_pipeline),
    "published script + CVVAE": Way(published_script, 0.2, "video of 65 frames"),
    "decord + AutoencoderTiny": Way(plain_tiny, 0.06),
    "decord + AutoencoderKL": Way(plain_kl, 0.03, scale=NUM_FRAMES / NUM_FRAMES_OF_KL),
}

# --- measuring ------------------------------------------------------------------------------------------------------


def folder_of(num_files: int, folder: Path) -> Path:
    """A folder of the demo's videos, again and again, with their captions."""
    folder.mkdir()
    for number in range(num_files):
        source = CLIPS[number % len(CLIPS)]
        for suffix in (".mp4", ".txt"):
            shutil.copyfile(source.with_suffix(suffix), folder / f"{number:05d}{suffix}")
    return folder


def environment(scratch: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # By default Ray's workers stand behind everything else on the machine.
    ray = {"RAY_TMPDIR": str(scratch), "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HOME": str(scratch), **ray}


ROLES = ("main", "actors", "children", "Ray")


def role_of(process: psutil.Process, main_pid: int) -> str:
    command = " ".join(process.cmdline())
    if process.pid == main_pid:
        return "main"
    if "pipeline.decode_child" in command:
        return "children"
    return "actors" if command.startswith("ray::") and not command.startswith("ray::IDLE") else "Ray"


def watch(main_pid: int, seen: dict[int, tuple[str, float]]) -> None:
    """Notes what each process is and has computed until now; a worker of Ray is what it was before it became idle."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            times, role = process.cpu_times(), role_of(process, main_pid)
            before, _ = seen.get(process.pid, (role, 0.0))
            seen[process.pid] = (before if role == "Ray" else role, times.user + times.system)


def measure(way: str, folder: Path, output: Path, scratch: Path) -> dict[str, float]:
    """Seconds of clock and of CPU, and the latter by role. Ray's daemons outlive who started them, and come here."""
    output.mkdir()
    started_s = time.monotonic()
    command = [sys.executable, __file__, "--run", way, "--input", str(folder), "--output", str(output)]
    log = output / "log"
    seen: dict[int, tuple[str, float]] = {}
    with log.open("w") as text:
        job = subprocess.Popen(command, env=environment(scratch), stdout=text, stderr=text)
        while job.poll() is None:
            watch(job.pid, seen)
            with suppress(subprocess.TimeoutExpired):
                job.wait(_WATCH_EVERY_S)
    clock_s = time.monotonic() - started_s
    if job.returncode:
        raise SystemExit(f"{way} ended with exit code {job.returncode}:\n{log.read_text()[-3000:]}")
    await_orphans()
    by_role = {role: sum(cpu_s for its, cpu_s in seen.values() if its == role) for role in ROLES}
    return {"clock": clock_s, "cpu": sum(by_role.values()), **by_role}


def await_orphans() -> None:
    """Waits for all that is left of a job; what does not end by itself within 30 s is ended."""
    patience_s = time.monotonic() + 30
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid:
            continue
        if time.monotonic() > patience_s:
            for process in psutil.Process().children(recursive=True):
                process.kill()
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clips", type=int, default=100, help="files of the large folder; the small one has ten")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--input", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    results.add_results_option(parser)
    options = parser.parse_args()
    if options.run:
        WAYS[options.run].run(options.input, options.output)
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "this process cannot take in what its children leave behind")
    rows = []
    # Ray's sockets have names of at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="lm", dir="/tmp") as name:
        scratch = Path(name)
        for number, way in enumerate(options.only):
            many = max(2, round(options.clips * WAYS[way].share))
            few = max(1, many // 10)
            small, large = (
                measure(
                    way,
                    folder_of(count, scratch / f"in{number}-{count}"),
                    scratch / f"out{number}-{count}",
                    scratch,
                )
                for count in (few, many)
            )
            each = {name: (large[name] - small[name]) / (many - few) for name in small}
            scale = WAYS[way].scale
            rows.append(
                {
                    "way": way,
                    "encodes": WAYS[way].what,
                    "num_files": many,
                    "per_s": 1 / each["clock"] / scale,
                    "cpu_s_each": each["cpu"] * scale,
                    **{f"{role}_cpu_s_each": each[role] * scale for role in ROLES},
                    "start_s": small["clock"] - few * each["clock"],
                    "start_cpu_s": small["cpu"] - few * each["cpu"],
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    title = "Whole jobs: each line by itself, on the same files"
    results.report("peers", rows, configuration=vars(options), title=title)


if __name__ == "__main__":
    main()
