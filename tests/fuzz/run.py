"""Fuzzes videos and tars for as long as one likes, by seed, in parts that add up.

    python tests/fuzz/run.py --seed 1 --videos 10000 --tars 5000 --state fuzz.json

Prints a table; exit code 1 with any violation. The state is written after every batch, and the same command goes on
from it. `--only N` judges the one video of that number and says what it was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fuzz.judges import Tally, VideoJudge, judge_tars, judge_videos  # noqa: E402
from fuzz.mutants import video_mutant  # noqa: E402

_BATCH = 60


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--videos", type=int, default=10_000)
    parser.add_argument("--tars", type=int, default=5_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--state", type=Path, default=None)
    parser.add_argument("--only", type=int, default=None)
    flags = parser.parse_args()
    tally, done_videos, done_tars, elapsed_s = Tally(), 0, 0, 0.0
    if flags.state is not None and flags.state.exists():
        stored = json.loads(flags.state.read_text())
        if stored["seed"] != flags.seed:
            parser.error(f"{flags.state} is of seed {stored['seed']}")
        tally = Tally.from_json(stored["tally"])
        done_videos, done_tars, elapsed_s = stored["videos"], stored["tars"], stored["elapsed_s"]
    if flags.only is not None:
        mutant = video_mutant(flags.seed, flags.only)
        print(mutant.name, len(mutant.data), "bytes")
        done_videos, flags.videos, flags.tars, flags.state = flags.only, flags.only + 1, done_tars, None
    judge = VideoJudge(flags.processes)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        while done_videos < flags.videos or done_tars < flags.tars:
            videos, tars = min(_BATCH, flags.videos - done_videos), min(_BATCH, flags.tars - done_tars)
            if videos > 0:
                judge_videos(judge, flags.seed, done_videos, videos, tally)
            if tars > 0:
                judge_tars(flags.seed, done_tars, tars, Path(folder), tally)
            done_videos, done_tars = done_videos + max(0, videos), done_tars + max(0, tars)
            if flags.state is not None:
                state = {
                    "seed": flags.seed,
                    "videos": done_videos,
                    "tars": done_tars,
                    "elapsed_s": elapsed_s + time.monotonic() - started,
                    "tally": tally.to_json(),
                }
                new = flags.state.with_name(flags.state.name + ".new")
                new.write_text(json.dumps(state, indent=1))
                os.replace(new, flags.state)
    judge.close()
    print(
        f"seed {flags.seed}, {done_videos} videos, {done_tars} tars, {elapsed_s + time.monotonic() - started:.0f} s\n"
    )
    print("| what | number |\n|---|---|")
    for name, number in [*sorted(tally.counts.items()), *sorted(tally.reasons.items())]:
        print(f"| {name} | {number} |")
    print(f"| **violations** | **{len(tally.violations)}** |")
    if flags.only is not None:
        print(*tally.notes, sep="\n")
    print(*tally.violations, sep="\n")
    return 1 if tally.violations else 0


if __name__ == "__main__":
    sys.exit(main())
