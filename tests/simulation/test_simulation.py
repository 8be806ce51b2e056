"""What the simulation promises: whatever the schedule, the protocol keeps its word, and mistakes in it would be seen.

Failing seeds are printed with the command that replays them.
"""

from __future__ import annotations

import pytest
from simulation.bugs import BUGS
from simulation.run import told
from simulation.schedule import run_schedule

SCHEDULES_PER_PART = 500
LONG_SCHEDULES_PER_PART = 10_000


def broken(first: int, count: int) -> list[str]:
    outcomes = (run_schedule(seed) for seed in range(first, first + count))
    return [told(outcome) for outcome in outcomes if outcome.violations]


@pytest.mark.parametrize("part", range(10))
def test_every_schedule_keeps_every_promise(part: int) -> None:
    failed = broken(part * SCHEDULES_PER_PART, SCHEDULES_PER_PART)
    assert not failed, "\n".join(failed[:3])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(30))
def test_every_schedule_of_the_long_form_keeps_every_promise(part: int) -> None:
    failed = broken(part * LONG_SCHEDULES_PER_PART, LONG_SCHEDULES_PER_PART)
    assert not failed, "\n".join(failed[:3])


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name: str) -> None:
    bug = BUGS[name]
    for seed in range(bug.num_seeds):
        if run_schedule(seed, bug.habits, bug.change).violations:
            return
    pytest.fail(f"{name}: no violation in {bug.num_seeds} schedules")


def test_a_seed_gives_the_same_schedule_to_the_last_request() -> None:
    first = run_schedule(7, is_traced=True)
    run_schedule(8)
    assert first.num_steps > 50
    assert run_schedule(7, is_traced=True) == first
    assert run_schedule(9, is_traced=True).trace != first.trace


def test_the_schedules_hold_what_they_are_for() -> None:
    text = "\n".join(line for seed in range(150) for line in run_schedule(seed, is_traced=True).trace)
    for fault in ("lost", "answer lost", "late", "repeated", "409", "500", "500 after", "503", "expired", "flip"):
        assert f"[{fault}]" in text, fault
    for event in ("killed", "rot of data/", "create commits/0e/s249.r1.json", "create commits/e5/s249.r2.json"):
        assert event in text, event
    for outcome in ("s249: committed", "s249: lost_race", "s249.r1: committed", "s249.r1: lost_race", "failed: "):
        assert outcome in text, outcome
    assert "delete data/" in text, "the collector found something to collect"
    assert text.count("create snapshots/") > 200
