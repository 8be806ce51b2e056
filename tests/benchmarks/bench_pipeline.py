"""How much of a job is its encoder: whole shards through an actor against the encoder alone, and where they stop.

    python tests/benchmarks/bench_pipeline.py [--rounds 3] [--shards 4] [--results FOLDER]

An actor in a process of its own (no Ray: nothing large crosses it, and `bench_start` has its cost) takes shards of real
clips from SeaweedFS, and decodes, encodes, writes, uploads and commits them there; two shards at a time, as the driver
gives them. Measured is its steady state, from one commit to a later one; start-up, model loading and the first shard
are outside.

**Efficiency.** Against the same encoder, in the same process, with the same clips in memory, in turns. The actor has
one core and its decode child another, as on a GPU node the decoders have cores of their own: so by the clock the job
should be as fast as the encoder alone. Where other work keeps the cores busy the clock says little; so there is also
the processor's time: of the encoder alone beside that of the whole actor process (encoder, reading, handing over,
writing, hashing, committing), and beside that of all processes, with bare decord added to the encoder's.

**A faster encoder.** A stub that sleeps stands for a GPU: it takes a clip after every 1/rate seconds and computes
nothing. Without the sleep the rest is what bounds; its rate per second of processor (all processes together) is beside
that of bare decord, which opens the same files and takes the same frames.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

BUCKET = "bench"
STAGES = ("decode", "wait", "encode", "write", "upload", "commit")


def main() -> None:
    from results import add_results_option, report

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=4, help="shards that are measured in a round")
    parser.add_argument("--videos", type=int, default=20, help="videos of a shard")
    parser.add_argument("--fps", type=float, default=8.0)
    parser.add_argument("--rates", default="4,8,16,32,64", help="clips per second of the stub")
    add_results_option(parser)
    parser.add_argument("--child", help="internal: what to measure, as JSON")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(json.loads(options.child))))
        return
    with inputs(options.shards + 2, options.videos) as env:
        task = {"rounds": options.rounds, "shards": options.shards, "videos": options.videos, "fps": options.fps}
        found = child(env, {**task, "rates": []})
        rows, notes = efficiency(found)
        report(
            "pipeline_efficiency",
            rows,
            configuration=vars(options),
            title="The job against its encoder alone, model small, 256x256x17, one core each for encoder and decoder",
            notes=notes,
            more={"measured": found},
        )
        rates = [float(rate) for rate in options.rates.split(",")]
        found = child(env, {**task, "rates": [*rates, None]})
        rows, notes = faster(found)
        report(
            "pipeline_stub",
            rows,
            configuration=vars(options),
            title="The pipeline around an encoder that only sleeps",
            notes=notes,
            more={"measured": found},
        )


def efficiency(found: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    alone, job, bare_s = found["alone"], found["job"], middle(found["decord"], "cpu_s")
    encoder_s = middle(alone, "cpu_s")
    actor_s, children_s = middle(job, "actor_cpu_s"), middle(job, "children_cpu_s")
    rows = [
        {"what": "encoder alone", "clips per second": middle(alone, "rate"), "CPU ms a clip": 1e3 * encoder_s},
        {
            "what": "job",
            "clips per second": middle(job, "rate"),
            "CPU ms a clip": 1e3 * (actor_s + children_s),
            "of it the actor": 1e3 * actor_s,
            "its encoder": 1e3 * middle(job, "encoder_cpu_s"),
            "decode child": 1e3 * children_s,
        },
        {"what": "bare decord", "CPU ms a clip": 1e3 * bare_s},
    ]
    notes = [
        f"by the clock: {middle(job, 'rate') / middle(alone, 'rate'):.3f} of the encoder alone",
        f"processor: encoder alone / actor process {encoder_s / actor_s:.3f}; "
        f"(encoder alone + bare decord) / all processes {(encoder_s + bare_s) / (actor_s + children_s):.3f}",
        f"seconds of a shard by stage: {', '.join(f'{stage} {middle(job, stage):.3f}' for stage in STAGES)}",
    ]
    return rows, notes


def faster(found: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    bare_s = middle(found["decord"], "cpu_s")
    rows = []
    for rate, runs in found["stub"]:
        cpu_s = middle(runs, "actor_cpu_s") + middle(runs, "children_cpu_s")
        rows.append(
            {
                "stub, clips per second": rate or "no sleep",
                "job, clips per second": middle(runs, "rate"),
                "of the stub": middle(runs, "rate") / rate if rate else None,
                "actor, CPU ms a clip": 1e3 * middle(runs, "actor_cpu_s"),
                "decode child, CPU ms a clip": 1e3 * middle(runs, "children_cpu_s"),
                "bare decord / all": bare_s / cpu_s,
            }
        )
    return rows, [f"bare decord: {1e3 * bare_s:.1f} CPU ms a clip, {1 / bare_s:.1f} clips per CPU second"]


def middle(runs: list[dict[str, float]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


@contextmanager
def inputs(num_shards: int, num_videos: int) -> Iterator[dict[str, str]]:
    """A SeaweedFS with tars of real clips; the environment to reach it."""
    from builders import CLIP_VIDEOS, clip_members, tar_bytes
    from servers import s3_client, seaweed

    with seaweed([BUCKET]) as (_, env):
        client = s3_client(env)
        for shard in range(num_shards):
            members = [
                member
                for number in range(num_videos)
                for member in clip_members(CLIP_VIDEOS[number % len(CLIP_VIDEOS)], f"{shard:05d}{number:04d}")
            ]
            client.put_object(Bucket=BUCKET, Key=f"in/{shard:05d}.tar", Body=tar_bytes(members))
        yield env


def child(env: dict[str, str], task: dict[str, Any]) -> dict[str, Any]:
    """The answer of a process that has the environment of an encoder actor on a CPU."""
    from pipeline.config import CPU_ENVIRONMENT

    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(task)],
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, **CPU_ENVIRONMENT, **env, "OMP_NUM_THREADS": "1"},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# In the child


def measure(task: dict[str, Any]) -> dict[str, Any]:
    import bench_decode

    from pipeline.actors import EncodeActor
    from pipeline.records import Clip

    actor = EncodeActor(configuration(task, "warm"), "0", "cpu")
    actor.start()
    try:
        assert actor._decode_pool is not None
        videos = bench_decode.CLIPS
        clips = [c for c in actor._decode_pool.decode(bench_decode.videos(videos)) if isinstance(c, Clip)]
        assert len(clips) >= len(videos), "the real clips decode"
        num_clips = len(clips) * task["videos"] / len(videos)
        found: dict[str, Any] = {"decord": [], "alone": [], "job": [], "stub": [(rate, []) for rate in task["rates"]]}
        with counted(actor) as encoder:
            for turn in range(task["rounds"]):
                found["decord"].append(decord(videos, task["fps"], len(clips)))
                if not task["rates"]:
                    found["alone"].append(alone(encoder, clips))
                    found["job"].append(job(actor, encoder, {**task, "turn": turn}, num_clips))
                for rate, runs in found["stub"]:
                    stub = Stub(encoder, clips[0], rate)
                    runs.append(job(actor, stub, {**task, "turn": f"{turn}-{rate}"}, num_clips))
        return found
    finally:
        actor.stop()


def configuration(task: dict[str, Any], name: str) -> Any:
    from pipeline.config import parse_arguments

    flags = {"input": f"s3://{BUCKET}/in/*.tar", "output": f"s3://{BUCKET}/out-{name}", "model": "small"}
    flags |= {"fps": str(task["fps"]), "cpus-per-actor": "1", "decode-processes": "1"}
    return parse_arguments([part for name, value in flags.items() for part in (f"--{name}", value)])


@contextmanager
def counted(actor: Any) -> Iterator[Any]:
    """The encoder of an actor, which counts the processor's time of its thread: with one thread that is all of it."""
    encoder = actor._encoder
    submit = encoder._submit
    encoder.cpu_s = 0.0

    def submit_counted(batch: Any) -> Any:
        started = time.thread_time()
        pending = submit(batch)
        encoder.cpu_s += time.thread_time() - started
        return pending

    encoder._submit = submit_counted
    yield encoder


class Stub:
    """Stands in the place of an encoder: sleeps, and gives every clip the latent of the first."""

    def __init__(self, encoder: Any, clip: Any, rate: float | None) -> None:
        (self._record,) = encoder.encode([clip])
        self.device, self.facts, self.busy_s, self.cpu_s = encoder.device, encoder.facts, 0.0, 0.0
        self.compile_error, self.cuda_graphs_error = encoder.compile_error, encoder.cuda_graphs_error
        self._pause_s = 0.0 if rate is None else 1 / rate

    def encode(self, clips: Iterable[Any]) -> Iterator[Any]:
        free_at = time.perf_counter()
        for clip in clips:
            # Sleeps end late; an encoder that is late would not wait for the next clip.
            free_at = max(free_at, time.perf_counter() - 0.01) + self._pause_s
            time.sleep(max(0.0, free_at - time.perf_counter()))
            self.busy_s += self._pause_s
            yield replace(self._record, key=clip.key, clip_index=clip.clip_index, caption=clip.caption)


def decord(videos: list[Path], fps: float, num_clips: int) -> dict[str, float]:
    from bench_decode import plain_decord

    started = time.process_time()
    plain_decord(videos, fps, None)
    return {"cpu_s": (time.process_time() - started) / num_clips}


def alone(encoder: Any, clips: list[Any]) -> dict[str, float]:
    started, computed = time.perf_counter(), time.process_time()
    assert all(record.key for record in encoder.encode(clips))
    elapsed_s, cpu_s = time.perf_counter() - started, time.process_time() - computed
    return {"rate": len(clips) / elapsed_s, "cpu_s": cpu_s / len(clips)}


def job(actor: Any, encoder: Any, task: dict[str, Any], num_clips: float) -> dict[str, float]:
    """Shards through the actor, two at a time; rates are from the commit of the first to that of the last but one."""
    from pipeline.plan import plan_shards

    config = configuration(task, f"{time.time_ns()}")
    store, about = described(config, actor)
    specs = plan_shards(config.source, store)
    whole, actor._encoder, actor._store = actor._encoder, encoder, store
    marks: list[tuple[float, float, float, float]] = []
    reports: list[Any] = []
    lock, left = threading.Lock(), list(reversed(specs))

    def mark() -> tuple[float, float, float, float]:
        return time.perf_counter(), time.process_time(), children_cpu_s(), encoder.cpu_s

    def take() -> None:
        while True:
            with lock:
                if not left:
                    return
                spec = left.pop()
            report = actor.process(spec, about)
            with lock:
                marks.append(mark())
                reports.append(report)

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    actor._encoder = whole
    assert len(reports) == len(specs), "a shard failed"
    assert all(report.counts.num_records == num_clips for report in reports), "every clip becomes a record"
    # The last is left out: while it is encoded nothing is decoded any more.
    total = num_clips * (len(specs) - 2)
    clock_s, actor_s, children_s, encoder_s = (b - a for a, b in zip(marks[0], marks[-2], strict=True))
    middle_reports = reports[1:-1]
    return {
        "rate": total / clock_s,
        "actor_cpu_s": actor_s / total,
        "children_cpu_s": children_s / total,
        "encoder_cpu_s": encoder_s / total,
        **{stage: statistics.median(r.timings_s[stage] for r in middle_reports) for stage in STAGES},
    }


def described(config: Any, actor: Any) -> tuple[Any, Any]:
    """The store of an output with its description, as the driver opens it."""
    from pipeline.commit import fingerprint_of, open_dataset
    from pipeline.records import DatasetManifest
    from pipeline.storage import open_store

    store, facts = open_store(config.run.output), actor.start()
    fields = {**config.encoding.fingerprint_fields("cpu"), "decoders": dict(facts.decoders)}
    about = DatasetManifest(
        format_version=1,
        fingerprint=fingerprint_of(fields),
        fingerprint_fields=fields,
        model=facts.model,
        kind="mean",
        latent_dtype="float16",
        passthrough={},
    )
    return store, open_dataset(store, about)


def children_cpu_s() -> float:
    import psutil

    times = [process.cpu_times() for process in psutil.Process().children()]
    return sum(time.user + time.system for time in times)


if __name__ == "__main__":
    main()
