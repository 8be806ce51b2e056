"""What writing and committing cost: processor's time, requests of a shard, and the store under many writers.

    python tests/benchmarks/bench_commit.py [--writers 1,16,64] [--results FOLDER]

**A shard.** Real clips of a tar on SeaweedFS go through an actor with the model small, which is the hardest case for
the rest: a larger encoder makes every other share smaller. The processor's time of each step is that of the threads in
it (with one thread of torch and Arrow all that it costs), beside that of the whole actor and its decode child. Requests
are counted where botocore sends them.

**Many writers.** Writers are threads of a few processes; each stores a data file of 80 KB (one clip) and creates the
commit record of its shard, again and again. "Rivals" are two writers for every shard: one wins, the other learns it.
Store and writers share the cores of this machine, so that with many writers the times show how the store queues.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

BUCKET = "bench"
FILE_BYTES = 80_000
THREADS_OF_A_PROCESS = 16


def main() -> None:
    from results import add_results_option, report

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--videos", type=int, default=20, help="videos of a shard, of one clip each")
    parser.add_argument("--rounds", type=int, default=3, help="shards that are measured")
    parser.add_argument("--writers", default="1,16,64")
    parser.add_argument("--commits", type=int, default=640, help="shards that the writers commit together")
    add_results_option(parser)
    parser.add_argument("--child", help="internal: what to measure, as JSON")
    options = parser.parse_args()
    if options.child:
        task = json.loads(options.child)
        print(json.dumps({"shard": one_shard, "write": write_many}[task["what"]](task)))
        return
    from bench_pipeline import inputs

    with inputs(options.rounds + 1, options.videos) as env:
        found = children(env, [{"what": "shard", "rounds": options.rounds, "videos": options.videos}])[0]
        report(
            "commit_shard",
            shard_rows(found, options.videos),
            configuration=vars(options),
            title=f"A shard of {options.videos} clips: medians of {options.rounds}",
            notes=[
                f"processor, of actor and decode child: {found['total_cpu_s'] / options.videos * 1e3:.0f} ms a clip",
                "requests of a shard: "
                + ", ".join(f"{name} {number:g}" for name, number in found["requests"].items())
                + f"; together {sum(found['requests'].values()):g}",
            ],
            more={"measured": found},
        )
        print()
        rows = []
        for rivals in (False, True):
            for num_writers in map(int, options.writers.split(",")):
                if not rivals or num_writers > 1:
                    rows.append(many(env, num_writers, options.commits, rivals))
        report("commit_writers", rows, configuration=vars(options), title="Writers at one SeaweedFS")


def shard_rows(found: dict[str, Any], num_clips: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "processor, ms a shard": 1e3 * cpu_s,
            "ms a clip": 1e3 * cpu_s / num_clips,
            "of all, %": 100 * cpu_s / found["total_cpu_s"],
        }
        for step, cpu_s in [*found["steps"].items(), ("together", sum(found["steps"].values()))]
    ]


def children(env: dict[str, str], tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What processes answer that run at the same time."""
    from pipeline.config import CPU_ENVIRONMENT

    environment = {**os.environ, **CPU_ENVIRONMENT, **env, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--child", json.dumps(task)], stdout=subprocess.PIPE, env=environment
        )
        for task in tasks
    ]
    said = [process.communicate()[0] for process in started]
    assert not any(process.returncode for process in started), "a process failed"
    return [json.loads(text.splitlines()[-1]) for text in said]


# One shard


def one_shard(task: dict[str, Any]) -> dict[str, Any]:
    from bench_pipeline import children_cpu_s, configuration, described

    import pipeline.actors as actors
    from pipeline.format import ShardWriter
    from pipeline.plan import plan_shards
    from pipeline.s3 import _client

    steps: Counter[str] = Counter()
    requests: Counter[str] = Counter()

    def timed(step: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*arguments: Any, **named: Any) -> Any:
            started = time.thread_time()
            try:
                return call(*arguments, **named)
            finally:
                steps[step] += time.thread_time() - started

        return timed_call

    ShardWriter.write = timed("rows to Parquet", ShardWriter.write)  # type: ignore[method-assign]
    ShardWriter.finish = timed("rows to Parquet", ShardWriter.finish)  # type: ignore[method-assign]
    actors.put_written_file = timed("hash and upload", actors.put_written_file)
    actors.commit_shard = timed("commit", actors.commit_shard)
    actors.read_commit = timed("is it decided?", actors.read_commit)

    def count(request: Any, **_: Any) -> None:
        # Two are of the input, which lies beside the output here.
        side = "input" if f"/{BUCKET}/in/" in request.url else "output"
        requests[f"{side} {request.method}"] += 1

    _client().meta.events.register("before-send.s3", count)
    config = configuration({"fps": 8.0}, uuid.uuid4().hex[:8])
    actor = actors.EncodeActor(config, "0", "cpu")
    try:
        store, manifest = described(config, actor)
        runs = []
        for spec in plan_shards(config.source, store):
            steps.clear()
            requests.clear()
            before = time.process_time() + children_cpu_s()
            assert actor.process(spec, manifest).outcome == "committed"
            total_cpu_s = time.process_time() + children_cpu_s() - before
            runs.append({"steps": dict(steps), "requests": dict(sorted(requests.items())), "total": total_cpu_s})
    finally:
        actor.stop()
    measured = runs[1:]
    return {
        "steps": {step: statistics.median(run["steps"][step] for run in measured) for step in measured[0]["steps"]},
        "requests": {
            name: statistics.median(r["requests"][name] for r in measured) for name in measured[0]["requests"]
        },
        "total_cpu_s": statistics.median(run["total"] for run in measured),
    }


# Many writers


def many(env: dict[str, str], num_writers: int, num_commits: int, rivals: bool) -> dict[str, Any]:
    num_processes = max(1, num_writers // THREADS_OF_A_PROCESS)
    num_threads = num_writers // num_processes
    each = max(1, num_commits // num_writers) * (2 if rivals else 1)
    begin_at = time.time() + 3.0 + num_processes
    tasks = [
        {
            "what": "write",
            "root": f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}",
            # Rivals are writers of the same number; without them every writer has a number of its own.
            "writers": [(number // 2 if rivals else number) for number in range(first, first + num_threads)],
            "each": each,
            "begin_at": begin_at,
        }
        for first in range(0, num_writers, num_threads)
    ]
    for task in tasks:
        task["root"] = tasks[0]["root"]
    found = children(env, tasks)
    puts = sorted(s for part in found for s in part["puts_s"])
    commits = sorted(s for part in found for s in part["commits_s"])
    outcomes = Counter(outcome for part in found for outcome in part["outcomes"])
    num_shards = each * len({writer for task in tasks for writer in task["writers"]})
    assert outcomes["committed"] == num_shards, f"{outcomes} of {num_shards} shards"
    elapsed_s = max(part["ended_at"] for part in found) - begin_at
    return {
        "writers": f"{num_writers} rivals" if rivals else str(num_writers),
        "committed": outcomes["committed"],
        "lost": outcomes["lost_race"],
        "commits per second": len(commits) / elapsed_s,
        "file ms, median": 1e3 * statistics.median(puts),
        "file ms, p99": 1e3 * puts[int(0.99 * (len(puts) - 1))],
        "commit ms, median": 1e3 * statistics.median(commits),
        "commit ms, p99": 1e3 * commits[int(0.99 * (len(commits) - 1))],
        "requests repeated": sum(part["num_repeated"] for part in found),
        "CPU ms a commit": 1e3 * statistics.mean(part["cpu_s"] / len(part["commits_s"]) for part in found),
    }


def write_many(task: dict[str, Any]) -> dict[str, Any]:
    from commits import make_commit

    from pipeline.commit import commit_shard, put_data_file
    from pipeline.storage import open_store
    from pipeline.store import StoreErrors

    store = open_store(task["root"])
    store.find("connects")
    puts_s: list[float] = []
    commits_s: list[float] = []
    outcomes: list[str] = []

    def write(writer: int, folder: Path) -> None:
        for number in range(task["each"]):
            shard_id = f"{writer:03d}-{number:05d}"
            path = folder / f"{threading.get_ident()}"
            path.write_bytes(os.urandom(FILE_BYTES))
            started = time.perf_counter()
            file = put_data_file(store, path, shard_id=shard_id, content="parquet", num_rows=1)
            stored = time.perf_counter()
            outcomes.append(commit_shard(store, make_commit(shard_id, files=(file,))))
            puts_s.append(stored - started)
            commits_s.append(time.perf_counter() - stored)

    with tempfile.TemporaryDirectory() as folder:
        threads = [threading.Thread(target=write, args=(writer, Path(folder))) for writer in task["writers"]]
        time.sleep(max(0.0, task["begin_at"] - time.time()))
        computed = time.process_time()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return {
        "puts_s": puts_s,
        "commits_s": commits_s,
        "outcomes": outcomes,
        "num_repeated": StoreErrors.num_repeated,
        "cpu_s": time.process_time() - computed,
        "ended_at": time.time(),
    }


if __name__ == "__main__":
    main()
