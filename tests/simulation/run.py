"""Runs many schedules, or replays one.

    python tests/simulation/run.py --schedules 300000 --first-seed 0      the long form; parts add up by their seeds
    python tests/simulation/run.py --first-seed 123 --trace               one schedule, request by request
    python tests/simulation/run.py --bug collects_by_age                  the first seed that finds a planted bug

The last line is one JSON object; the exit code is 1 when a promise was broken (with --bug: when none was).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulation.bugs import BUGS, Bug
from simulation.schedule import Outcome, run_schedule


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs seeded schedules of the commit protocol.")
    parser.add_argument("--schedules", type=int, help="how many (1; with --bug as many as it may take)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--bug", choices=sorted(BUGS), help="plant this mistake, and stop at the first seed that shows it"
    )
    parser.add_argument("--trace", action="store_true", help="print every request")
    arguments = parser.parse_args()
    bug = BUGS[arguments.bug] if arguments.bug else Bug(num_seeds=1)
    num_schedules = arguments.schedules or bug.num_seeds
    started, num_steps, num_faults = time.monotonic(), 0, 0
    failed: list[int] = []
    num_done = 0
    for seed in range(arguments.first_seed, arguments.first_seed + num_schedules):
        outcome = run_schedule(seed, bug.habits, bug.change, is_traced=arguments.trace)
        num_done, num_steps, num_faults = num_done + 1, num_steps + outcome.num_steps, num_faults + outcome.num_faults
        print("\n".join(outcome.trace), end="\n" if outcome.trace else "")
        if outcome.violations:
            failed.append(seed)
            print(told(outcome, arguments.bug))
            if arguments.bug:
                break
    elapsed_s = time.monotonic() - started
    summary = {
        "first_seed": arguments.first_seed,
        "schedules": num_done,
        "violations": len(failed),
        "failing_seeds": failed[:20],
        "requests": num_steps,
        "faults": num_faults,
        "elapsed_s": round(elapsed_s, 1),
        "schedules_per_s": round(num_done / elapsed_s, 1),
    }
    print(json.dumps(summary))
    return int(bool(failed) != bool(arguments.bug))


def told(outcome: Outcome, bug: str | None = None) -> str:
    """What went wrong and how to see it again."""
    lines = [f"seed {outcome.seed}:", *(f"    {violation}" for violation in outcome.violations[:5])]
    replay = f"    again: python tests/simulation/run.py --first-seed {outcome.seed} --schedules 1 --trace"
    return "\n".join([*lines, replay + (f" --bug {bug}" if bug else "")])


if __name__ == "__main__":
    sys.exit(main())
