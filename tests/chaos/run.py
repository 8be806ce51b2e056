"""The long fault runs, by seed, in parts that add up; prints a table of what was done and what came of it.

    PYTHONPATH=.:tests python -m chaos.run --state FOLDER                  all of it, some hours on two cores
    PYTHONPATH=.:tests python -m chaos.run --state FOLDER --part 30        thirty minutes of it, then the table so far
    PYTHONPATH=.:tests python -m chaos.run --state FOLDER --part 30 --resume    the next thirty minutes

Without --resume the folder must be new. A step is one seed of one suite: an episode of process faults on Ray
(`process_faults`), or racing drivers behind the fault proxy (`store_faults`); the last is a restart among many shards
(`restart`). Each is a line of FOLDER/steps.jsonl
once it is done; a step that was cut off is done again. Ends with 1 if anything was lost, doubled or wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos.process_faults import KINDS, episode, make_shards, undisturbed
from chaos.proxy import possible_pairs
from chaos.restart import restart_s
from chaos.store_faults import strike
from servers import ray_folders, seaweed

_FAULTS_PER_EPISODE = 8
_STORE_FAULTS_PER_STEP = 250
_MANY_SHARDS = 10_000
_COUNTED = ("num_faults", "num_races", "planned", "recorded", "rejected", "lost", "duplicated", "wrong")


@dataclass(frozen=True, slots=True)
class Goals:
    """How much is to be done in all."""

    process_faults: int
    store_faults: int
    races: int


class State:
    """The folder with what is done: steps.jsonl, the input and the bytes of the undisturbed run."""

    def __init__(self, folder: Path, *, is_resumed: bool) -> None:
        self.folder = folder
        self._log = folder / "steps.jsonl"
        if folder.exists() and any(folder.iterdir()) and not is_resumed:
            raise SystemExit(f"{folder} holds an earlier run; --resume goes on with it, another --state begins anew")
        folder.mkdir(parents=True, exist_ok=True)
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        self.steps: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def add(self, step: dict[str, Any]) -> None:
        """Writes down a step that is done."""
        self.steps.append(step)
        with self._log.open("a") as log:
            log.write(json.dumps(step) + "\n")

    def next_seed(self, suite: str, first: int) -> int:
        """The seed after the last one of a suite."""
        return max((step["seed"] + 1 for step in self.steps if step["suite"] == suite), default=first)

    def total(self, suite: str, name: str) -> int:
        """The sum of a number over the steps of a suite."""
        return sum(step[name] for step in self.steps if step["suite"] == suite)


def _process_step(state: State, seed: int, env: dict[str, str]) -> dict[str, Any]:
    shards = make_shards(state.folder / "shards")
    clean = state.folder / "undisturbed.json"
    if not clean.exists():
        with tempfile.TemporaryDirectory() as folder:
            clean.write_text(json.dumps(undisturbed(shards, Path(folder), env)))
    # Every kind comes up as often as any other; the seed shuffles.
    kinds = [KINDS[(seed * _FAULTS_PER_EPISODE + number) % len(KINDS)] for number in range(_FAULTS_PER_EPISODE)]
    random.Random(seed).shuffle(kinds)
    result = episode(shards, json.loads(clean.read_text()), env, seed, kinds)
    return {
        "suite": "process",
        "seed": seed,
        "faults": dict(result.faults),
        "num_faults": result.faults.total(),
        "num_races": 0,
        "planned": result.verdict.num_planned,
        "recorded": result.verdict.num_recorded,
        "rejected": result.verdict.num_rejected,
        "lost": result.verdict.num_lost,
        "duplicated": result.verdict.num_duplicated,
        "wrong": result.num_wrong,
        "recovery_s": result.recovery_s,
        "ending_s": result.ending_s,
        "problems": result.problems,
    }


def _store_step(seed: int, until_s: float) -> dict[str, Any]:
    with seaweed(("shards", "latents")) as (endpoint, env):
        result = strike(endpoint, env, seed, _STORE_FAULTS_PER_STEP, every_pair=False, until_s=until_s)
    return {
        "suite": "store",
        "seed": seed,
        "faults": {f"{kind} on {name}": number for (kind, name), number in sorted(result.faults.items())},
        "process_faults": dict(result.process_faults),
        "num_faults": result.faults.total(),
        "num_races": result.num_races,
        "planned": result.num_planned,
        "recorded": result.num_recorded,
        "rejected": result.num_rejected,
        "lost": result.num_lost,
        "duplicated": result.num_duplicated,
        "wrong": result.num_wrong,
        "recovery_s": {},
        "ending_s": {},
        "problems": result.problems,
    }


def _restart_step(env: dict[str, str]) -> dict[str, Any]:
    nothing = dict.fromkeys(
        ("num_faults", "num_races", "planned", "recorded", "rejected", "lost", "duplicated", "wrong"), 0
    )
    took_s = restart_s(env, _MANY_SHARDS)
    return {"suite": "restart", "seed": 1, "problems": [], "restart_s": took_s, **nothing}


def table(steps: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The lines of the table in Markdown."""
    processes = [step for step in steps if step["suite"] == "process"]
    stores = [step for step in steps if step["suite"] == "store"]
    yield "| | process faults | store faults |"
    yield "|---|---|---|"
    names = ("faults", "races of 3 drivers", "samples planned", "recorded", "rejected", "lost", "duplicated")
    for key, name in zip(_COUNTED, (*names, "files with other bytes than the clean run"), strict=True):
        yield f"| {name} | {sum(s[key] for s in processes):,} | {sum(s[key] for s in stores):,} |"
    yield f"| other violations | {_num_problems(processes)} | {_num_problems(stores)} |"
    yield ""
    yield "| process fault | number | s until the next commit, median (worst) | s until the driver ended (worst) |"
    yield "|---|---|---|---|"
    faults = sum((Counter(step["faults"]) for step in processes), Counter[str]())
    for kind in KINDS:
        recovery = _times(processes, "recovery_s", kind)
        ending = _times(processes, "ending_s", kind)
        yield f"| {kind} | {faults[kind]} | {_spread(recovery)} | {_spread(ending)} |"
    for kind in ("driver", "zombie"):
        number = sum(step["process_faults"].get(kind, 0) for step in stores)
        yield f"| {kind}, without encoder, behind the proxy | {number} | | |"
    for step in steps:
        if step["suite"] == "restart":
            yield f"| driver started anew, {_MANY_SHARDS:,} shards decided | 1 | {step['restart_s']:.1f} | |"
    yield ""
    faults = sum((Counter(step["faults"]) for step in stores), Counter[str]())
    classes = sorted({name for _, name in possible_pairs()})
    yield f"| store fault | {' | '.join(classes)} |"
    yield "|---" * (len(classes) + 1) + "|"
    for kind in sorted({kind for kind, _ in possible_pairs()}):
        numbers = (str(faults[f"{kind} on {name}"]) if (kind, name) in possible_pairs() else "-" for name in classes)
        yield f"| {kind} | {' | '.join(numbers)} |"


def _num_problems(steps: Sequence[dict[str, Any]]) -> int:
    return sum(len(step["problems"]) for step in steps)


def _times(steps: Sequence[dict[str, Any]], name: str, kind: str) -> list[float]:
    return [seconds for step in steps for seconds in step[name].get(kind, [])]


def _spread(times_s: list[float]) -> str:
    return f"{statistics.median(times_s):.1f} ({max(times_s):.1f})" if times_s else ""


def main() -> int:
    """Does steps until the goals are reached or the part is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state", type=Path, default=Path("chaos-state"))
    parser.add_argument("--seed", type=int, default=1, help="the first seed of each suite")
    parser.add_argument("--part", type=float, default=None, metavar="MINUTES", help="stop after about so long")
    parser.add_argument("--resume", action="store_true", help="go on with what --state holds")
    parser.add_argument("--process-faults", type=int, default=300)
    parser.add_argument("--store-faults", type=int, default=10_000)
    parser.add_argument("--races", type=int, default=60)
    flags = parser.parse_args()
    goals = Goals(flags.process_faults, flags.store_faults, flags.races)
    state = State(flags.state, is_resumed=flags.resume)
    until_s = time.monotonic() + (60 * flags.part if flags.part is not None else 1e9)
    with ray_folders() as env:
        while time.monotonic() < until_s:
            is_process_done = state.total("process", "num_faults") >= goals.process_faults
            is_store_done = (
                state.total("store", "num_faults") >= goals.store_faults
                and state.total("store", "num_races") >= goals.races
            )
            if is_process_done and is_store_done:
                if not any(step["suite"] == "restart" for step in state.steps):
                    state.add(_restart_step(env))
                break
            # By turns, so that every part has some of both.
            shares = (
                (state.total("process", "num_faults") / max(1, goals.process_faults), is_process_done, "process"),
                (state.total("store", "num_faults") / max(1, goals.store_faults), is_store_done, "store"),
            )
            suite = min((share, name) for share, is_done, name in shares if not is_done)[1]
            seed = state.next_seed(suite, flags.seed)
            print(f"{time.strftime('%H:%M:%S')} {suite} faults, seed {seed}", file=sys.stderr, flush=True)
            try:
                step = _process_step(state, seed, env) if suite == "process" else _store_step(seed, until_s)
            except AssertionError as error:
                # A job that hung, or a driver that failed: a violation like any other, and the next seed goes on.
                step = {
                    "suite": suite,
                    "seed": seed,
                    "faults": {},
                    "process_faults": {},
                    "recovery_s": {},
                    "ending_s": {},
                }
                step |= {"problems": [str(error)[:4000]], **dict.fromkeys(_COUNTED, 0)}
            state.add(step)
            for problem in step["problems"]:
                print(f"{suite} faults, seed {seed}: {problem}", file=sys.stderr, flush=True)
    text = "\n".join(table(state.steps)) + "\n"
    (state.folder / "table.md").write_text(text)
    print(text, end="")
    bad = sum(s["lost"] + s["duplicated"] + s["wrong"] + len(s["problems"]) for s in state.steps)
    return 1 if bad else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
