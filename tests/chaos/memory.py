"""Whether driver and actor grow while they work: one long run on many shards, their memory written down.

    PYTHONPATH=.:tests python -m chaos.memory --minutes 120 --output memory.json

The shards are small, --videos-per-shard short clips and stills (usual are hundreds): with fewer of them there are more
shards in the time, and what grows with shards shows sooner.

Prints a table: memory at the start and at the end of --minutes, and the slopes per hour and per shard in them. Counting
begins after the 25 minutes in which caches fill; their samples are in the output too. A slope is the median of those
between all pairs of samples (Theil and Sen), so that single peaks do not count. Memory is what a process has written
and holds alone, swapped out or not. Pages of libraries are left out: of these the kernel counts as a process's own what
no other maps at that moment (98 MB of torch's), so that an actor seems to grow when another process with torch ends.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import combinations, cycle, islice
from pathlib import Path

from builders import CLIP_STILLS, CLIP_VIDEOS, pack_clips
from integration.jobs_under_test import SMALL, RunningJob
from servers import ray_folders

_WARM_UP_S = 25 * 60.0
_MOST_SHARDS = 60_000  # Links to one file: ext4 allows 65,000.
_SECONDS_BETWEEN = 5.0


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Median slope of (x, value) over all pairs of samples, by what x grows."""
    pairs = combinations(samples, 2)
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs if b[0] > a[0])


def written_mib(pid: int) -> float:
    """Memory that a process has written and shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return (kib["Private_Dirty"] + kib["Swap"]) / 1024


def watch(seconds: float, videos_per_shard: int, output_json: Path | None) -> dict[str, list[tuple[float, int, float]]]:
    """Runs the job for so long on such shards; process -> (seconds since the first sample, shards committed, MiB).

    The JSON is written anew with each sample, so that a run that is cut off leaves what it saw.
    """
    samples: dict[str, list[tuple[float, int, float]]] = {"driver": [], "actor": []}
    with tempfile.TemporaryDirectory(prefix="lm-memory-") as room, ray_folders() as env:
        tars, output = Path(room, "in"), Path(room, "latents")
        (tar,) = pack_clips(tars, 1, islice(cycle((*CLIP_VIDEOS, *CLIP_STILLS)), videos_per_shard))
        for number in range(1, _MOST_SHARDS):
            os.link(tar, tars / f"{number:05d}.tar")
        flags = ["--input", str(tars), "--output", str(output), "--num-actors", "1", *SMALL]
        with RunningJob(flags, env) as job:
            job.wait_until(lambda: any(output.glob("commits/*/*.json")), "the first commit was there", 600)
            (actor,) = job.find("ray::EncodeActor")
            began = time.monotonic()
            while time.monotonic() - began < seconds:
                assert job.process.poll() is None, f"the job ended:\n{job.said()[-2000:]}"
                num_shards = sum(len(os.listdir(folder)) for folder in output.glob("commits/*"))
                for name, process in (("driver", job.process), ("actor", actor)):
                    samples[name].append((time.monotonic() - began, num_shards, written_mib(process.pid)))
                if output_json is not None:
                    output_json.write_text(json.dumps(samples))
                time.sleep(_SECONDS_BETWEEN)
            assert actor.is_running(), "the actor was replaced, so its memory says nothing"
            job.process.send_signal(signal.SIGTERM)
            outcome = job.end(600)
        assert outcome.code == 130, outcome.said[-2000:]
        print(f"{outcome.result.get('num_shards_done')} shards in {seconds / 60:.0f} minutes", file=sys.stderr)
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120, help="after the warm-up")
    parser.add_argument("--videos-per-shard", type=int, default=64)
    parser.add_argument("--output", type=Path, default=None, help="the samples as JSON")
    flags = parser.parse_args()
    samples = watch(_WARM_UP_S + 60 * flags.minutes, flags.videos_per_shard, flags.output)
    print("| process | MiB, caches full | MiB at the end | MiB per hour | bytes per shard |\n|---|---|---|---|---|")
    for name, values in samples.items():
        steady = [value for value in values if value[0] >= _WARM_UP_S]
        per_hour = slope([(seconds, mib) for seconds, _, mib in steady]) * 3600
        per_shard = slope([(num_shards, mib) for _, num_shards, mib in steady]) * 2**20
        print(f"| {name} | {steady[0][2]:.1f} | {steady[-1][2]:.1f} | {per_hour:+.2f} | {per_shard:+.0f} |")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
