"""What the driver and the commit protocol cost with a thousand actors and up to a million shards.

Run as a script (`make bench` does, up to 100,000); prints one Markdown table with a line for each number of shards.

Real are `pipeline.run.run`, everything that it calls, and the commits of the actors (`commit_shard`). Simulated are:

* Ray, by `StandIn`: no process and no message; its calls answer at once. Ray's own time is not in the numbers.
* actors: each shard that is handed out is committed when the driver next waits, by as many as `--answers` says at once.
  Nothing is encoded and no data file is written; beats are answered.
* the store, by `TableStore`: a table on the disk that counts requests as S3 does (a page of a list for 1,000 keys).
  Neither its memory nor its time is in the numbers.
* the listing of the input, but for its packing. Tables are read from a real file.

Times are CPU seconds of the process without those of the simulated actors and store, memory is what the process has for
itself, at most, beyond what it had before: until the first shard is handed out, while shards are worked on, and from
the last one to the end. Each line is measured in processes of its own. A run leaves ten shards over, which a second run
on the same output does: that is the resume. Of more than 300,000 shards the first are there already when the run
begins: what is worked on and what is held for it is in the numbers, how long all of it would take is not.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import io
import json
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

# The root comes first in the path: there are folders of tests named as the packages are.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import latents
import psutil
from commits import make_commit
from results import add_results_option, report

import pipeline.cluster
import pipeline.plan
import pipeline.run
from pipeline.actors import Beat, ShardReport, WorkerFacts
from pipeline.commit import commit_shard, publish_snapshot, read_commit
from pipeline.config import SourceConfig, parse_arguments
from pipeline.errors import ObjectExistsError
from pipeline.metrics import STAGES, RunMetrics
from pipeline.packed import Packed, PackedSort
from pipeline.progress import Progress
from pipeline.records import Commit, FileStat, ShardCounts, ShardSpec
from pipeline.storage import InputFile, ObjectStore
from pipeline.store import ObjectInfo

_NUM_LEFT = 10
_MOST_WORKED = 300_000
_KEYS_PER_PAGE = 1000
_FACTS = WorkerFacts(
    model=latents.MODEL,
    columns={},
    device_type="cpu",
    device_name="none",
    decoders={"decord": "0.6"},
    sandbox={},
    versions={},
    node="simulated",
    pid=1,
)
# As of a shard of a thousand clips with some rejections.
_COUNTS = ShardCounts(
    num_videos=260,
    num_videos_ok=250,
    num_videos_rejected=10,
    num_clips=1000,
    num_records=1000,
    num_clips_rejected=0,
    num_frames=17_000,
    reasons={"too_short": 7, "unreadable": 3},
)


class TableStore(ObjectStore):
    """Objects in a table on the disk.

    Attributes:
        sent: requests by kind, as S3 would have counted them.
        spent_s: CPU seconds in here.
    """

    root_uri = "table://output"

    def __init__(self, path: Path) -> None:
        self.sent: Counter[str] = Counter()
        self.spent_s = 0.0
        self._lock = threading.Lock()
        self._table = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        for statement in ("journal_mode = off", "synchronous = off", "locking_mode = exclusive"):
            self._table.execute(f"PRAGMA {statement}").fetchall()
        self._table.execute("CREATE TABLE IF NOT EXISTS objects (key TEXT PRIMARY KEY, data BLOB) WITHOUT ROWID")

    def _ask(self, statement: str, *values: object) -> list[Any]:
        with self._lock:
            began_s = time.thread_time()
            found = self._table.execute(statement, values).fetchall()
            self.spent_s += time.thread_time() - began_s
        return found

    def find(self, key: str) -> bytes | None:
        self.sent["get"] += 1
        found = self._ask("SELECT data FROM objects WHERE key = ?", key)
        return found[0][0] if found else None

    def put_if_absent(self, key: str, data: bytes) -> None:
        self.sent["put"] += 1
        if not self._ask("INSERT OR IGNORE INTO objects VALUES (?, ?) RETURNING 1", key, data):
            raise ObjectExistsError(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        page = [(prefix,)]
        comparison = ">="
        while page:
            self.sent["list"] += 1
            page = self._ask(
                f"SELECT key, length(data) FROM objects WHERE key {comparison} ? AND key < ? ORDER BY key LIMIT ?",
                page[-1][0],
                prefix + "\U0010ffff",
                _KEYS_PER_PAGE,
            )
            comparison = ">"
            for key, num_bytes in page:
                yield ObjectInfo(key=key, num_bytes=num_bytes, etag=None)
            if len(page) < _KEYS_PER_PAGE:
                return

    def delete(self, key: str) -> None:
        self.sent["delete"] += 1
        self._ask("DELETE FROM objects WHERE key = ?", key)

    def url(self, key: str) -> str:
        return f"{self.root_uri}/{key}"

    def get_range(self, key: str, start: int, length: int) -> bytes:
        raise NotImplementedError

    def fetch_file(self, key: str, path: Path) -> None:
        raise NotImplementedError

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        raise NotImplementedError

    def head(self, key: str) -> ObjectInfo | None:
        raise NotImplementedError


class _Reference:
    """What a call to an actor gives; `shard` until that is committed."""

    __slots__ = ("answer", "shard")

    def __init__(self, answer: object = None, shard: ShardSpec | None = None) -> None:
        self.answer, self.shard = answer, shard


@dataclass(frozen=True)
class _Method:
    call: Callable[..., _Reference]

    def options(self, **_: object) -> _Method:
        return self

    def remote(self, *arguments: object) -> _Reference:
        return self.call(*arguments)


class _Actor:
    def __init__(self, stand_in: StandIn) -> None:
        self.start = _Method(lambda: _Reference(_FACTS))
        self.stop = _Method(_Reference)
        self.beat = _Method(stand_in.beat)
        self.process = _Method(stand_in.process)


class StandIn:
    """What `pipeline.run` asks of the module `ray`, answered by as many simulated actors as are asked for.

    Attributes:
        actors_s: CPU seconds of the simulated actors.
        num_calls: of each kind.
        on_first: called before the first shard is worked on.
    """

    def __init__(self, num_actors: int, num_answers: int, store: TableStore) -> None:
        self._num_actors = num_actors
        self._num_answers = num_answers
        self._store = store
        self._queue: deque[_Reference] = deque()
        self.actors_s = 0.0
        self.num_calls: Counter[str] = Counter()
        self.on_first: Callable[[], None] = lambda: None

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self._num_actors)}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": self.cluster_resources()}]

    def remote(self, _: object) -> StandIn:
        return self

    def options(self, **_: object) -> Any:
        return _Method(lambda *_: _Actor(self))  # type: ignore[arg-type, return-value]

    def kill(self, *_: object, **__: object) -> None:
        return None

    def get(self, reference: _Reference) -> object:
        return reference.answer

    def wait(
        self, references: list[_Reference], num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[_Reference], list[_Reference]]:
        """As Ray's; a call that may wait lets actors work first, one that asks for all that is there does not."""
        began_s = time.thread_time()
        self.num_calls["wait"] += 1
        for _ in range(min(self._num_answers, len(self._queue)) if num_returns > 1 else 0):
            self._work(self._queue.popleft())
        ready = [reference for reference in references if reference.shard is None]
        self.actors_s += time.thread_time() - began_s
        return ready[:num_returns], []

    def beat(self) -> _Reference:
        self.num_calls["beat"] += 1
        return _Reference(
            Beat(num_steps=self.num_calls["beat"], num_store_errors_repeated=0, num_store_errors_given_up=0)
        )

    def process(self, spec: ShardSpec, *_: object) -> _Reference:
        if not self.num_calls["process"]:
            self.on_first()
        self.num_calls["process"] += 1
        reference = _Reference(shard=spec)
        self._queue.append(reference)
        return reference

    def _work(self, reference: _Reference) -> None:
        spec = reference.shard
        assert spec is not None
        assert read_commit(self._store, spec.shard_id) is None
        self._store.sent["put"] += 2  # the files that the record names
        record = _record(spec)
        reference.answer = ShardReport(
            shard_id=spec.shard_id,
            outcome=commit_shard(self._store, record),
            counts=_COUNTS,
            num_bytes_in=100_000_000,
            num_bytes_out=41_000_000,
            timings_s=dict.fromkeys(STAGES, 1.0),
            busy_share=0.9,
        )
        reference.shard = None


def _record(spec: ShardSpec) -> Commit:
    return replace(
        make_commit(spec.shard_id),
        source_uri=spec.source_uri,
        source_size_bytes=spec.source_size_bytes,
        source_etag=spec.source_etag,
        files=(_file(spec, "parquet", {"256x256x17": 990, "256x256x1": 10}), _file(spec, "rejected", {})),
        counts=_COUNTS,
    )


def _file(spec: ShardSpec, content: Any, bucket_rows: dict[str, int]) -> FileStat:
    sha256 = uuid.uuid4().hex * 2
    key = f"data/{sha256[:2]}/{spec.shard_id}-{sha256[:16]}.{content}"
    return FileStat(
        key=key, num_bytes=41_000_000, sha256=sha256, num_rows=1000, content=content, bucket_rows=bucket_rows
    )


def listed(folder: Path, num_files: int, extension: str) -> Packed[InputFile]:
    """A listing; of tars the first is there, because a run looks at the fields of its samples."""
    if extension == "tar":
        tarfile.open(folder / "000000000.tar", "w").close()
    random = Random(0)
    files = (
        InputFile(
            uri=f"{folder}/{number:09d}.{extension}",
            num_bytes=tarfile.RECORDSIZE,
            etag=random.randbytes(16).hex(),
        )
        for number in range(num_files)
    )
    return PackedSort(files, key=lambda file: file.uri).packed()


def _memory_mb() -> float:
    """What this process has for itself."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_full_info().uss / 1e6


def _peak_mb() -> float:
    """What this process had at most since it was last asked."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def fill(state: Path, num_shards: int, num_done: int) -> dict[str, Any]:
    """Puts the records of the first shards into an output that is new, and a snapshot of them."""
    store = TableStore(state / "store")
    for file in islice(listed(state, num_shards, "tar"), num_done):
        commit_shard(store, _record(pipeline.plan._tar_spec(file)))
    publish_snapshot(store)
    return {}


def measure_run(state: Path, num_shards: int, num_actors: int, num_answers: int, limit: int | None) -> dict[str, Any]:
    """One run of the driver; the store is taken from `state` where there is one, and left there."""
    store = TableStore(state / "store")
    stand_in = StandIn(num_actors, num_answers, store)
    flags = ["--input", str(state), "--output", str(state / "unused"), "--model", "small", "--cpus-per-actor", "1"]
    flags += ["--num-actors", str(num_actors), *([] if limit is None else ["--limit", str(limit)])]
    found: dict[str, Any] = {}
    snapshots: list[tuple[float, Counter[str]]] = []
    before_mb, before_peak_mb = _memory_mb(), (_peak_mb(), _peak_mb())[1]

    def now_s() -> float:
        return time.process_time() - stand_in.actors_s - store.spent_s

    began_s = now_s()

    def first() -> None:
        found["start_s"] = now_s() - began_s
        found["start_requests"] = dict(store.sent)
        found["start_peak_mb"] = _peak_mb() - before_peak_mb
        found["start_mb"] = _memory_mb() - before_mb

    publish = pipeline.run._publish
    decide = pipeline.run._Dispatch.until_decided

    def timed_publish(*arguments: Any) -> int:
        sent, at_s = store.sent.copy(), now_s()
        number = publish(*arguments)
        snapshots.append((now_s() - at_s, store.sent - sent))
        return number

    def watched_decide(dispatch: Any) -> None:
        decide(dispatch)
        found["work_peak_mb"] = _peak_mb() - before_peak_mb
        found["worked_mb"] = _memory_mb() - before_mb

    stand_in.on_first = first
    with (
        patch.object(pipeline.run, "ray", stand_in),
        patch.object(pipeline.cluster, "ray", stand_in),
        patch.object(pipeline.run, "open_store", lambda _: store),
        patch.object(pipeline.run, "_publish", timed_publish),
        patch.object(pipeline.run._Dispatch, "until_decided", watched_decide),
        patch.object(pipeline.plan, "list_inputs", lambda _: listed(state, num_shards, "tar")),
    ):
        summary = pipeline.run.run(parse_arguments(flags), Progress("plain", io.StringIO()), RunMetrics())
    whole_s = now_s() - began_s
    assert summary.num_shards_done == (limit or _NUM_LEFT), summary
    snapshots_s = sum(seconds for seconds, _ in snapshots)
    return found | {
        "whole_s": whole_s,
        "loop_s": whole_s - found["start_s"] - snapshots_s,
        "num_snapshots": len(snapshots),
        "snapshots_s": snapshots_s,
        "last_snapshot_s": max(seconds for seconds, _ in snapshots[-2:]),
        "last_snapshot_requests": dict(snapshots[-1][1]),
        "end_peak_mb": _peak_mb() - before_peak_mb,
        "end_mb": _memory_mb() - before_mb,
        "requests": dict(store.sent),
        "calls": dict(stand_in.num_calls),
    }


def measure_plan(state: Path, num_inputs: int, kind: str) -> dict[str, Any]:
    """Planning alone, the first time and once more: of `num_inputs` tars, files of a folder, or rows of a table."""
    store = TableStore(state / "store")
    table = state / "table.jsonl"
    if kind == "rows":
        with table.open("w") as file:
            for number in range(num_inputs):
                file.write(
                    json.dumps({"url": f"s3://bucket/videos/{number:09d}.mp4", "caption": "a boat " * 12}) + "\n"
                )
    source = SourceConfig(input=str(table if kind == "rows" else state))
    real = pipeline.plan.list_inputs
    found: dict[str, Any] = {}
    before_mb = (_peak_mb(), _peak_mb())[1]
    with patch.object(
        pipeline.plan,
        "list_inputs",
        real if kind == "rows" else lambda _: listed(state, num_inputs, "tar" if kind == "tars" else "mp4"),
    ):
        for time_name, memory_name in (("plan_s", "peak_mb"), ("again_s", "again_peak_mb")):
            began_s = time.process_time() - store.spent_s
            found["num_shards"] = len(pipeline.plan.plan_shards(source, store))
            found[time_name] = time.process_time() - store.spent_s - began_s
            found[memory_name] = _peak_mb() - before_mb
            _memory_mb()
    return found | {"requests": dict(store.sent)}


def measured(what: str, state: Path, *arguments: object) -> dict[str, Any]:
    """A measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", json.dumps([what, str(state), *arguments])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{what} {arguments} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def driver_row(num_shards: int, num_actors: int, num_answers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A line of the table, and everything that was measured for it."""
    with tempfile.TemporaryDirectory(prefix="lm-scale-") as folder:
        done = min(num_shards, _MOST_WORKED) - _NUM_LEFT
        if num_shards > _MOST_WORKED:
            measured("fill", Path(folder), num_shards, num_shards - _MOST_WORKED)
        run = measured("run", Path(folder), num_shards, num_actors, num_answers, done)
        resume = measured("run", Path(folder), num_shards, num_actors, num_answers, None)
    sent = run["requests"]
    return {
        "shards": num_shards,
        "worked on": done,
        "start, s": run["start_s"],
        "loop, ms a shard": run["loop_s"] / done * 1e3,
        "shards a CPU second": done / (run["loop_s"] + run["snapshots_s"]),
        "snapshots": run["num_snapshots"],
        "all, s": run["snapshots_s"],
        "last, s": run["last_snapshot_s"],
        "put a shard": sent["put"] / done,
        "get a shard": sent["get"] / done,
        "list pages": sent["list"],
        "start at most, MB": run["start_peak_mb"],
        "held then, MB": run["start_mb"],
        "at work at most, MB": run["work_peak_mb"],
        "held after it, MB": run["worked_mb"],
        "in the end at most, MB": run["end_peak_mb"],
        "resume, s": resume["start_s"],
        "resume at most, MB": resume["start_peak_mb"],
    }, {"run": run, "resume": resume}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shards", type=_numbers, default=_numbers("10000,30000,100000"), metavar="N,N")
    parser.add_argument("--actors", type=int, default=1000)
    parser.add_argument("--answers", type=int, default=20, help="shards that are ready each time the driver looks")
    parser.add_argument("--plan", type=_numbers, default=_numbers("10000,100000"), metavar="N,N", help="inputs")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    add_results_option(parser)
    options = parser.parse_args()
    if options.measure:
        what, state, *arguments = json.loads(options.measure)
        measures = {"run": measure_run, "plan": measure_plan, "fill": fill}
        print(json.dumps(measures[what](Path(state), *arguments)))
        return
    rows, more = [], {}
    for num_shards in options.shards:
        row, more[f"run of {num_shards}"] = driver_row(num_shards, options.actors, options.answers)
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    notes = []
    for kind in ("tars", "files", "rows"):
        told = []
        for num_inputs in options.plan:
            with tempfile.TemporaryDirectory(prefix="lm-scale-") as folder:
                plan = more[f"plan of {num_inputs} {kind}"] = measured("plan", Path(folder), num_inputs, kind)
            told.append(
                f"{num_inputs:,}: {plan['num_shards']:,} shards, {plan['plan_s']:.1f} s, {plan['peak_mb']:.0f} MB, "
                f"once more {plan['again_s']:.1f} s, {plan['again_peak_mb']:.0f} MB"
            )
        notes.append(f"Planning of {kind}: " + "; ".join(told))
    title = f"Driver and protocol, {options.actors:,} simulated actors, CPU seconds"
    report("scale", rows, configuration=vars(options), title=title, notes=notes, more=more)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
