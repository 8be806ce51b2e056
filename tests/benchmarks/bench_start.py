"""Cold start: from `python jobs/encode_laion.py` to the first commit, beside the least that Ray and the model cost.

    python tests/benchmarks/bench_start.py [--rounds 3] [--videos 10] [--results FOLDER]

The bare script does only what cannot be left out: it starts Ray with the same settings, one actor on one core imports
torch, loads the same weights, opens each video of the same shard with decord, takes the same frames, encodes them and
returns. No sandbox, no checks of input, output or store, nothing written. Job and bare script take turns; both are
processes of their own with one thread, on a local disk, with files in the page cache. Clock and processor's time (of
all processes that were started) are from the start of the interpreter to the first commit record, or to the answer of
the bare actor. The job's parts are told apart by the messages that it prints.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

IMPORTS = ("pipeline", "cvvae", "pipeline.LatentDataset", "pipeline.run", "pipeline.actors", "ray", "torch")
PARTS = {
    # The message with which a part ends, in the order in which they come.
    "plan": "interpreter, imports, listing and plan",
    "ray": "the store tried, ray.init",
    "start": "actor: process, imports, model, decode child",
    "commit": "first shard: decode, encode, write, commit",
}
BARE_PARTS = {
    "imports": "interpreter, import of Ray",
    "ray": "ray.init",
    "model": "actor: process, import of torch, model",
    "shard": "decord, encode",
}


def main() -> None:
    from results import add_results_option, report

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--videos", type=int, default=10, help="videos of the shard, of 2.5 s")
    add_results_option(parser)
    parser.add_argument("--bare", help="internal: the bare script, with a tar")
    options = parser.parse_args()
    if options.bare:
        bare(options.bare)
        return
    from servers import ray_folders

    runs: dict[str, list[dict[str, float]]] = {"bare": [], "job": []}
    imports: dict[str, list[dict[str, float]]] = {name: [] for name in IMPORTS}
    with tempfile.TemporaryDirectory(prefix="bench-start-") as folder, ray_folders() as env:
        env = {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        tar = write_tar(Path(folder) / "in", options.videos)
        for turn in range(options.rounds + 1):
            found = {"bare": run_bare(tar, env), "job": run_job(tar, Path(folder) / f"out-{turn}", env)}
            # The first round fills the page cache.
            for name, figures in found.items() if turn else ():
                runs[name].append(figures)
            for name in IMPORTS if turn else ():
                imports[name].append(timed_import(name, env))
    rows = [
        {"part": label, f"{name}, s": middle(runs[name], part)}
        for name, parts in (("bare", BARE_PARTS), ("job", PARTS))
        for part, label in parts.items()
    ]
    for what in ("clock", "cpu"):
        label = {"clock": "all of it", "cpu": "processor's time of it"}[what]
        values = {f"{name}, s": middle(runs[name], what) for name in runs}
        rows.append({"part": label, **values, "job / bare": values["job, s"] / values["bare, s"]})
    report(
        "start", rows, configuration=vars(options), title="From the command to the first commit", more={"runs": runs}
    )
    print()
    rows = [
        {"import": name, "clock, s": middle(found, "clock"), "processor, s": middle(found, "cpu")}
        for name, found in imports.items()
    ]
    report("imports", rows, configuration=vars(options), title="Imports, each in a process of its own")


def middle(runs: list[dict[str, float]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def write_tar(folder: Path, num_videos: int) -> Path:
    from builders import CLIP_VIDEOS, clip_members, tar_bytes

    folder.mkdir()
    media = [CLIP_VIDEOS[number % len(CLIP_VIDEOS)] for number in range(num_videos)]
    tar = folder / "00000.tar"
    tar.write_bytes(tar_bytes([m for i, path in enumerate(media) for m in clip_members(path, f"00000{i:04d}")]))
    return tar


def timed_import(name: str, env: dict[str, str]) -> dict[str, float]:
    package, _, attribute = name.partition(".")
    # The package gives its public names on first use.
    statement = f"from {package} import {attribute}" if attribute == "LatentDataset" else f"import {name}"
    code = f"import time; a, b = time.perf_counter(), time.process_time(); {statement}; "
    code += "print(time.perf_counter() - a, time.process_time() - b)"
    said = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    ).stdout.split()
    return {"clock": float(said[0]), "cpu": float(said[1])}


def run_job(tar: Path, output: Path, env: dict[str, str]) -> dict[str, float]:
    flags = ["--input", str(tar), "--output", str(output), "--model", "small", "--progress", "json"]
    command = [sys.executable, str(REPOSITORY / "jobs" / "encode_laion.py"), *flags, "--num-actors", "1"]
    return followed(command, env, list(PARTS), lambda: any(output.glob("commits/*/*.json")))


def run_bare(tar: Path, env: dict[str, str]) -> dict[str, float]:
    return followed([sys.executable, __file__, "--bare", str(tar)], env, list(BARE_PARTS))


def followed(
    command: list[str], env: dict[str, str], parts: list[str], is_over: Callable[[], bool] | None = None
) -> dict[str, float]:
    """Seconds of each part of a command, which says on standard error when one is over; of the last `is_over` may."""
    import selectors

    begun, marks, cpu_s = time.perf_counter(), {}, 0.0
    last, buffer, said = parts[-1], b"", b""
    process = subprocess.Popen(
        command, env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=tempfile.gettempdir()
    )
    assert process.stderr is not None
    with process, selectors.DefaultSelector() as selector:
        selector.register(process.stderr, selectors.EVENT_READ)
        is_open = True
        while is_open:
            if selector.select(0.02):
                data = os.read(process.stderr.fileno(), 1 << 16)
                is_open = bool(data)
                buffer, said = buffer + data, said + data
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    event = json.loads(line).get("event") if line.startswith(b"{") else None
                    if event in parts:
                        marks.setdefault(event, time.perf_counter() - begun)
            if last not in marks and is_over is not None and is_over():
                marks[last] = time.perf_counter() - begun
            if last in marks and not cpu_s:
                cpu_s = tree_cpu_s(process.pid)
    assert process.returncode == 0, f"{command} ended with {process.returncode}: {said.decode()}"
    ends = [marks[part] for part in parts]
    times = [end - start for start, end in zip([0.0, *ends[:-1]], ends, strict=True)]
    return {
        **dict(zip(parts, times, strict=True)),
        "clock": marks[last],
        "cpu": cpu_s,
        "to the end": time.perf_counter() - begun,
    }


def tree_cpu_s(pid: int) -> float:
    """Of a process and all below it, and of those that ended and were waited for."""
    import psutil

    me = psutil.Process(pid)
    times = [process.cpu_times() for process in [me, *me.children(recursive=True)]]
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)


def bare(tar: str) -> None:
    """The bare script."""
    import ray

    def tell(event: str) -> None:
        print(json.dumps({"event": event}), file=sys.stderr, flush=True)

    class Bare:
        def load(self) -> None:
            import torch

            torch.set_num_threads(1)
            import cvvae

            self.vae = cvvae.load("small").eval().requires_grad_(False)

        def encode(self, path: str) -> int:
            import tarfile

            import decord
            import torch

            num_values = 0
            with tarfile.open(path) as opened, torch.inference_mode():
                for member in opened:
                    if not member.name.endswith(".mp4"):
                        continue
                    with tempfile.NamedTemporaryFile(suffix=".mp4") as video:
                        video.write(opened.extractfile(member).read())
                        video.flush()
                        reader = decord.VideoReader(video.name, width=456, height=256, num_threads=1)
                        rate = reader.get_avg_fps()
                        wanted = [int(number * rate / 8) for number in range(17)]
                        frames = torch.from_numpy(reader.get_batch(wanted).asnumpy()[:, :, 100:356])
                    pixels = frames.permute(3, 0, 1, 2).float().div_(127.5).sub_(1)[None]
                    num_values += self.vae.encode(pixels).latent_dist.mean.numel()
            return num_values

    tell("imports")
    ray.init(address="local", include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    tell("ray")
    actor = ray.remote(Bare).options(num_cpus=1).remote()
    ray.get(actor.load.remote())
    tell("model")
    assert ray.get(actor.encode.remote(tar)) > 0
    tell("shard")
    ray.shutdown()


if __name__ == "__main__":
    main()
