"""What a dry run takes, and how near it comes: of many tars in a bucket, and beside runs of the demo's clips.

    python tests/benchmarks/bench_estimate.py [--tars 10000] [--rounds 2] [--inputs 3] [--results FOLDER]

First `--dry-run` of tars of one real clip each on a SeaweedFS, to see how long planning and looking take: with its
usual time, and with none, which is the plan alone. Then dry run and run in turns, each a process of its own on an
embedded Ray, of the clips that `make demo` encodes and of eight tars of them; with and without a real sentence encoder
and a small vision tower. What the run took is its own `elapsed_s`, from its plan to its last commit, and the clock of
the whole process. Nothing else should run: the estimate is of a machine that stays as busy as it was when it measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

JOB = str(REPOSITORY / "jobs" / "encode_laion.py")
BUCKETS = "320x192x17;192x320x17"


def main() -> None:
    from results import add_results_option

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tars", type=int, default=10_000, help="in the bucket; 0: none of this")
    parser.add_argument("--rounds", type=int, default=2, help="of a dry run and a run of each input; 0: none of this")
    parser.add_argument("--inputs", type=int, default=3, help="the first so many of the three")
    parser.add_argument("--seconds", type=float, default=20, help="--dry-run-seconds")
    add_results_option(parser)
    options = parser.parse_args()
    if options.tars:
        many_tars(options)
    if options.rounds:
        beside_runs(options)


def called(flags: Sequence[str], env: Mapping[str, str]) -> tuple[dict[str, Any], float, float]:
    """The result of a job, with its clock and the processor's time of all its processes."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    job = subprocess.run(
        [sys.executable, JOB, "--model", "small", "--progress", "plain", *flags],
        env={**os.environ, **env},
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
    )
    clock_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert job.returncode == 0, job.stderr
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(job.stdout.splitlines()[-1]), clock_s, cpu_s


def many_tars(options: argparse.Namespace) -> None:
    from builders import CLIP_VIDEOS, clip_members, tar_bytes
    from results import report
    from servers import s3_client, seaweed

    with seaweed(["shards", "latents"]) as (_, env):
        client = s3_client(env)

        def put(number: int) -> None:
            media = CLIP_VIDEOS[number % len(CLIP_VIDEOS)]
            body = tar_bytes(clip_members(media, f"{number:05d}0000"))
            client.put_object(Bucket="shards", Key=f"in/{number:05d}.tar", Body=body)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, range(options.tars)))
        rows: list[dict[str, Any]] = []
        # The first list after so many uploads waits for the store.
        for seconds in (0, 0, options.seconds, options.seconds):
            flags = ["--input", "s3://shards/in", "--output", "s3://latents/out", "--dry-run"]
            result, clock_s, cpu_s = called([*flags, "--dry-run-seconds", str(seconds)], env)
            # Without time there is a plan and no estimate.
            found = result["estimate"] or {"num_videos_seen": 0, "num_videos": None}
            rows.append(
                {
                    "--dry-run-seconds": seconds,
                    "shards": result["num_shards"],
                    "videos seen": found["num_videos_seen"],
                    "of about": found["num_videos"],
                    "clock, s": clock_s,
                    "processor, s": cpu_s,
                }
            )
    report("estimate-tars", rows, configuration=vars(options), title="Dry run of tars on SeaweedFS")
    print()


def beside_runs(options: argparse.Namespace) -> None:
    import encoders
    from builders import CLIP_STILLS, CLIP_VIDEOS, pack_clips
    from results import report
    from servers import ray_folders

    encoders.quiet()
    with tempfile.TemporaryDirectory(prefix="bench-estimate-") as name, ray_folders() as env:
        folder = Path(name)
        pack_clips(folder / "tars", 8, [*CLIP_VIDEOS, *CLIP_STILLS] * 7)
        tower = encoders.clip_vision(folder / "tower")
        embed = ["--text-encoder", str(encoders.minilm()), "--image-encoder", str(tower)]
        demo = ["--input", str(CLIP_VIDEOS[0].parent), "--samples-per-shard", "4"]
        inputs = {
            "the demo's 12 clips": demo,
            "84 clips in 8 tars": ["--input", str(folder / "tars")],
            "84 clips in 8 tars, embeddings": ["--input", str(folder / "tars"), *embed],
        }
        inputs = dict(list(inputs.items())[: options.inputs])
        runs: dict[str, list[dict[str, float | None]]] = {what: [] for what in inputs}
        for turn in range(options.rounds):
            for number, (what, flags) in enumerate(inputs.items()):
                output = ["--buckets", BUCKETS, "--output", str(folder / f"out-{number}-{turn}")]
                dry = ["--dry-run", "--dry-run-seconds", str(options.seconds)]
                foreseen = called([*flags, *output, *dry], env)[0]["estimate"]
                result, clock_s, _ = called([*flags, *output], env)
                # None where a busy machine left no time to measure.
                estimate_s, num_clips = foreseen["duration_s"], foreseen["num_clips"]
                runs[what].append(
                    {
                        "estimate, s": estimate_s,
                        "of it embedding, s": foreseen["embed_s"],
                        "run, s": result["elapsed_s"],
                        "process, s": clock_s,
                        "clips / run's": num_clips and num_clips / result["num_records"],
                        "estimate / run": estimate_s and estimate_s / result["elapsed_s"],
                    }
                )
                print(what, runs[what][-1], file=sys.stderr, flush=True)
    rows = []
    for what, found in runs.items():
        known = {name: [value for run in found if (value := run[name]) is not None] for name in found[0]}
        row: dict[str, Any] = {"input": what}
        row |= {name: statistics.median(values) if values else None for name, values in known.items()}
        ratios = known["estimate / run"] or [None]
        rows.append(row | {"least": min(ratios), "most": max(ratios)})
    report(
        "estimate-time",
        rows,
        configuration=vars(options),
        title=f"Time as estimated and as taken, medians of {options.rounds} rounds",
        more={"runs": runs},
    )


if __name__ == "__main__":
    main()
