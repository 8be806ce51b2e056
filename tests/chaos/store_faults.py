"""Faults of the store: racing drivers without encoders on one output behind the fault proxy, some killed or frozen.

Called by `run` and by test_store_faults.py. A round is one output; rounds go on until enough faults were injected and,
where it is asked for, every kind has struck every key class that it can strike.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.checker import Verdict, check, plan_of_slices, read_output
from chaos.proxy import possible_pairs
from servers import free_ports, s3_client, stop, wait_for_http

_HERE = Path(__file__).parent
_NUM_VIDEOS = 12
_RATE = 0.35
_ROUND_TIMEOUT_S = 300.0
NUM_DRIVERS = 3


@dataclass(slots=True)
class StoreResult:
    """What rounds gave; sums up."""

    faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    process_faults: Counter[str] = field(default_factory=Counter)
    num_rounds: int = 0
    num_races: int = 0
    num_planned: int = 0
    num_recorded: int = 0
    num_rejected: int = 0
    num_lost: int = 0
    num_duplicated: int = 0
    num_wrong: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, verdict: Verdict, expected: Mapping[str, str]) -> None:
        """Takes in the verdict of one round."""
        self.num_rounds += 1
        self.num_races += 1
        self.num_planned += verdict.num_planned
        self.num_recorded += verdict.num_recorded
        self.num_rejected += verdict.num_rejected
        self.num_lost += verdict.num_lost
        self.num_duplicated += verdict.num_duplicated
        wrong = [name for name in expected.keys() | verdict.files if expected.get(name) != verdict.files.get(name)]
        self.num_wrong += len(wrong)
        self.problems += verdict.problems


@contextmanager
def proxy_process(endpoint: str, *flags: str) -> Iterator[str]:
    """The proxy as a process of its own; gives its endpoint."""
    port = free_ports(1)
    command = [sys.executable, "-m", "chaos.proxy", "--upstream", endpoint, "--port", str(port), *flags]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, cwd=_HERE.parent)
        try:
            wait_for_http(f"http://127.0.0.1:{port}/-/report", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            stop(process)


def fault_proxy(endpoint: str, seed: int, rate: float, most: int) -> AbstractContextManager[str]:
    """A proxy on which things go wrong."""
    return proxy_process(endpoint, "--seed", str(seed), "--rate", str(rate), "--most", str(most))


def report_of(proxy: str) -> dict[str, Any]:
    """What a proxy has done so far."""
    with urllib.request.urlopen(f"{proxy}/-/report", timeout=30) as answer:
        report: dict[str, Any] = json.load(answer)
    return report


def faults_of(proxy: str) -> Counter[tuple[str, str]]:
    """What a proxy has injected so far: (kind, key class) -> number."""
    return Counter({(kind, name): number for kind, name, number in report_of(proxy)["faults"]})


def put_inputs(env: Mapping[str, str]) -> str:
    """Small files with captions in the bucket of inputs; gives their URI."""
    client, folder = s3_client(env), uuid.uuid4().hex[:12]
    for number in range(_NUM_VIDEOS):
        data = random.Random(number).randbytes(20_000)
        client.put_object(Bucket="shards", Key=f"{folder}/{number:03d}.mp4", Body=data)
        client.put_object(Bucket="shards", Key=f"{folder}/{number:03d}.txt", Body=f"caption {number}".encode())
    return f"s3://shards/{folder}"


def strike(
    endpoint: str, env: Mapping[str, str], seed: int, num_faults: int, *, every_pair: bool, until_s: float = 1e9
) -> StoreResult:
    """Rounds until `num_faults` were injected and, if `every_pair`, each kind met each class; or until a time.

    Args:
        endpoint: the real store.
        env: how processes reach it.
        until_s: by time.monotonic().
    """
    chance = random.Random(seed)
    source = put_inputs(env)
    clean = _output()
    Driver(source, clean, "clean", env).end()
    expected = _verdict(source, clean, env, {}).files
    result = StoreResult()
    # Where coverage is what is asked for, what is frequent must not take all the time.
    most = -(-num_faults // len(possible_pairs())) if every_pair else num_faults
    with fault_proxy(endpoint, seed, _RATE, most) as proxy:
        spoiled = {**env, "AWS_ENDPOINT_URL": proxy}
        while time.monotonic() < until_s:
            _round(source, env, spoiled, chance, result, expected)
            result.faults = faults_of(proxy)
            if result.faults.total() >= num_faults and (not every_pair or result.faults.keys() >= possible_pairs()):
                break
    return result


def _round(
    source: str,
    env: Mapping[str, str],
    spoiled: Mapping[str, str],
    chance: random.Random,
    result: StoreResult,
    expected: Mapping[str, str],
) -> None:
    output, seen = _output(), dict[str, str]()
    names = [f"{chance.random()}" for _ in range(NUM_DRIVERS)]
    drivers = [Driver(source, output, name, spoiled) for name in names]
    time.sleep(chance.uniform(1.5, 4))
    # One driver dies and is started again; another stands still while the rest goes on, and then writes late.
    drivers[0].kill()
    result.process_faults["driver"] += 1
    drivers[0] = Driver(source, output, names[0], spoiled)
    frozen = drivers[1].process
    if frozen.poll() is None:
        frozen.send_signal(signal.SIGSTOP)
        _verdict(source, output, env, seen)
        time.sleep(chance.uniform(0.5, 3))
        frozen.send_signal(signal.SIGCONT)
        result.process_faults["zombie"] += 1
    _end(drivers)
    result.add(_verdict(source, output, env, seen, is_done=True), expected)


def _output() -> str:
    return f"s3://latents/{uuid.uuid4().hex[:12]}"


class Driver:
    """A running `writer` and what it says."""

    def __init__(self, source: str, output: str, name: str, env: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "chaos.writer", "--input", source, "--output", output, "--name", name]
        path = os.pathsep.join([str(_HERE.parent), str(_HERE.parent.parent)])
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        self.process = subprocess.Popen(command, env={**os.environ, **env, "PYTHONPATH": path}, stderr=self._log)

    def end(self) -> None:
        """Waits for it; it must have succeeded."""
        try:
            code = self.process.wait(_ROUND_TIMEOUT_S)
            self._log.seek(0)
            assert code == 0, f"a driver ended with {code}: {self._log.read()[-2000:].decode(errors='replace')}"
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends it at once."""
        self.process.kill()
        self.process.wait()
        self._log.close()


def _end(drivers: list[Driver]) -> None:
    try:
        for driver in drivers:
            driver.end()
    finally:
        for driver in drivers:
            driver.kill()


def _verdict(
    source: str, output: str, env: Mapping[str, str], seen: dict[str, str], *, is_done: bool = False
) -> Verdict:
    objects = read_output(output, env)
    plan = plan_of_slices(objects)
    verdict = check(objects, plan, seen)
    planned = sorted(key for keys in plan.values() for key in keys)
    if is_done and planned != [f"{number:03d}" for number in range(_NUM_VIDEOS)]:
        verdict.problems.append(f"the plan of {source} holds {planned}")
    return verdict
