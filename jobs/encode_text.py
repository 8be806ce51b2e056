"""Adds caption embeddings to an output that has its latents already, or to what came since the last time.

    python jobs/encode_text.py --latents s3://bucket/latents --text-encoder openai/clip-vit-large-patch14
    python jobs/encode_text.py ... --num-actors 8                                   eight encoders on an embedded Ray
    ray job submit --working-dir . -- python jobs/encode_text.py ...                as many as fit on a cluster

The same rows as `jobs/encode_laion.py --text-encoder` makes in one pass (with equal `--cpus-per-actor`, on equal
devices: the same bytes), under LATENTS/columns/text. The same command every night does what is new: every record of the
output gets one record of the set, retries and repairs like first ones. Of the output's Parquet files only keys and
texts are fetched. Killed at any moment it goes on with the same command, and several may run at once; repairs that
`latentmill verify --requeue LATENTS/columns/text` ordered are carried out.

One process, unless it is told of a Ray cluster or of a number of actors; the bytes are the same. The last line on
standard output is one JSON object with the counts, and the exit code is

    0 every committed record is covered       2 wrong use       3 the set was made with another encoder
    4 work is left undone                     130 interrupted
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_ROOT = str(Path(__file__).resolve().parent.parent)
if _ROOT not in sys.path:
    # Started by its path, the interpreter knows jobs/ only; Ray's workers inherit the environment, not sys.path.
    sys.path.insert(0, _ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))

from pipeline.columns import base_file, columns_store, refuse_unknown_columns, stored_captions_of
from pipeline.commit import check_store, decided_shards, known_commits, manifest_of_output, name_of, publish_snapshot
from pipeline.conditions import open_sets, records_of_ordered_repairs
from pipeline.config import (
    COMPUTE_DTYPES,
    PROGRESS,
    EncodingConfig,
    TextEncoderConfig,
    auto_or,
    choice,
    number,
    option,
    read_parts,
    whole,
    yes_no,
)
from pipeline.errors import (
    ConfigMismatchError,
    LatentmillError,
    StorageError,
    StorageUnavailableError,
    UsageError,
)
from pipeline.progress import Progress, crew_in_words
from pipeline.storage import ObjectStore, open_store
from pipeline.text_actors import Covered, TextActor, TextTask, cover, load_text_encoder

EXIT_OK, EXIT_USAGE, EXIT_MISMATCH, EXIT_UNDONE, EXIT_INTERRUPTED = 0, 2, 3, 4, 130
# A snapshot every so many records, so that readers of a long run see what is there.
_SNAPSHOT_EVERY = 1000
_TOLD_EVERY_S = 10.0
_MAX_TOLD = 20
# Records whose captions are on their way while others are embedded.
_FETCHED_AHEAD = 4
# Of an actor: one is embedded while another one comes or is committed.
_HELD_PER_ACTOR = 2
# What an actor has held for so long is given to another one as well that has nothing else to do.
_PATIENCE_S = 60.0
_POLL_S = 0.5
# Ray repeats a call when its actor dies; for actors that are lost for good it is given to others, so many times.
_MAX_TASK_RETRIES = 3
_MAX_RESTARTS = 10
_MAX_ACTORS_LOST = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPart:
    """What is covered, and how. Device, dtype and cores change the bytes and are part of the set's fingerprint."""

    latents: str = option("URI of the output: a local folder or s3://bucket/prefix", str)
    device: str = option(
        "auto (cuda where there is one), cpu or cuda", choice("device", ("auto", "cpu", "cuda")), "auto"
    )
    compute_dtype: str = option(
        "auto (float32 on CPU, bfloat16 on GPU), float32, bfloat16 or float16",
        choice("compute-dtype", COMPUTE_DTYPES),
        "auto",
    )
    cpus_per_actor: int | None = option(
        "CPU cores of the encoder; auto: 1 without a GPU, 4 with one", auto_or(whole("cpus-per-actor", 1)), None
    )
    num_actors: int | None = option(
        "encoders on Ray; auto: as many as a cluster holds, and without a cluster this process alone",
        auto_or(whole("num-actors", 1)),
        None,
    )
    gpus_per_actor: float | None = option(
        "GPUs of an actor on Ray, a fraction shares one; auto: 1 where there are GPUs, else 0",
        auto_or(number("gpus-per-actor", 0, 64)),
        None,
    )
    ray_address: str | None = option(
        "address of a running Ray cluster; default: the one of `ray job submit`", str, None
    )
    limit: int | None = option("cover at most this many records in this run", whole("limit", 1), None)
    single_writer: bool = option(
        "allow a store without conditional writes (then never run two jobs at once)",
        yes_no("single_writer"),
        False,
        is_switch=True,
    )
    progress: str = option("auto, plain or json", choice("progress", PROGRESS), "auto")


PARTS = {"run": RunPart, "text": TextEncoderConfig}
_Result = tuple[TextTask, Covered | LatentmillError]


@dataclass(slots=True, kw_only=True)
class Summary:
    """How a run ended; printed as the last line."""

    exit_code: int = EXIT_OK
    num_records: int = 0  # of the output, with samples
    num_records_done_before: int = 0
    num_records_done: int = 0
    num_records_repaired: int = 0
    num_texts: int = 0  # distinct in their shards, of this run
    num_texts_truncated: int = 0  # of these
    snapshot: int | None = None
    elapsed_s: float = 0.0
    undone: dict[str, str] = field(default_factory=dict)  # record -> why, at most 20 of them


def main(argv: Sequence[str]) -> int:
    """Runs the job; returns the exit code."""
    _take_signals()
    try:
        description = (__doc__ or "").split("\n")[0]
        parts = read_parts(argv, PARTS, "encode_text.py", description)
        with Progress(parts["run"].progress) as progress:
            summary = encode_texts(parts["run"], parts["text"], progress)
    except ConfigMismatchError as error:
        return _fail(EXIT_MISMATCH, error, differences={key: list(pair) for key, pair in error.differences.items()})
    except StorageUnavailableError as error:
        return _fail(EXIT_UNDONE, error)
    except (UsageError, StorageError) as error:
        return _fail(EXIT_USAGE, error)
    except KeyboardInterrupt:
        return _fail(
            EXIT_INTERRUPTED, LatentmillError("interrupted; what is committed stays, the same command goes on")
        )
    except Exception as error:
        traceback.print_exc()
        return _fail(EXIT_UNDONE, error)
    print(json.dumps(asdict(summary)), flush=True)
    return summary.exit_code


def encode_texts(run: RunPart, text: TextEncoderConfig, progress: Progress) -> Summary:
    """Covers every record of an output that the set does not cover yet.

    Raises:
        UsageError: there is no output, no such encoder, or a flag is wrong.
        ConfigMismatchError: the set was made with another encoder or configuration.
        StorageError: the store failed for good.
    """
    started = time.monotonic()
    if text.text_encoder is None:
        raise UsageError("--text-encoder must be given, as a flag or in --config; see --help")
    output = open_store(run.latents)
    refuse_unknown_columns(manifest_of_output(output), text.text_columns, output.root_uri)
    store = columns_store(output, "text")
    tasks, summary = _tasks(output, progress)
    todo = tasks[: run.limit]
    told_at_s = started
    is_on_ray = bool(run.num_actors or run.ray_address or os.environ.get("RAY_ADDRESS"))
    covered = _covered_on_ray if is_on_ray else _covered_here
    with closing(covered(run, text, output, todo, progress)) as results:
        for number_done, (task, found) in enumerate(results, start=1):
            _account(summary, task, found, progress)
            if number_done % _SNAPSHOT_EVERY == 0:
                publish_snapshot(store)
            if time.monotonic() - told_at_s >= _TOLD_EVERY_S:
                told_at_s = time.monotonic()
                progress.say("progress", f"records {number_done}/{len(todo)}  elapsed {told_at_s - started:.0f} s")
    summary.snapshot = publish_snapshot(store).number
    summary.elapsed_s = round(time.monotonic() - started, 3)
    return summary


def _tasks(output: ObjectStore, progress: Progress) -> tuple[list[TextTask], Summary]:
    store = columns_store(output, "text")
    shards = {shard.shard_id: shard for shard in decided_shards(known_commits(output))}
    covered: dict[str, list[object]] = {}
    for record in known_commits(store):
        covered.setdefault(record.shard_id, []).append(record.source_etag)
    bases: dict[str, TextTask] = {}
    for shard in shards.values():
        for commit in shard.commits:
            base = base_file(commit.files)
            if base is not None:
                bases[name_of(commit)] = TextTask(record=name_of(commit), shard_id=shard.shard_id, base=base)
    tasks = [task for task in bases.values() if task.base.sha256 not in covered.get(task.shard_id, ())]
    summary = Summary(num_records=len(bases), num_records_done_before=len(bases) - len(tasks))
    for damaged, about in sorted(records_of_ordered_repairs(output, shards, "text").items()):
        if about is None:
            progress.say("repair", f"{damaged} of the set is damaged and about no record that counts; nobody reads it")
        else:
            task = bases[about]
            tasks.append(TextTask(record=about, shard_id=task.shard_id, base=task.base, repairs=damaged))
    progress.say(
        "plan",
        f"{len(bases)} records with samples, {summary.num_records_done_before} covered before, {len(tasks)} to do",
    )
    return tasks, summary


def _covered_here(
    run: RunPart, text: TextEncoderConfig, output: ObjectStore, tasks: Sequence[TextTask], _progress: Progress
) -> Generator[_Result]:
    """Covers the tasks in this process, one after the other."""
    import torch

    device_type = run.device if run.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    encoders = load_text_encoder(text, output, device_type, run.compute_dtype, run.cpus_per_actor)
    check_store(columns_store(output, "text"), run.single_writer)
    open_sets(output, encoders.manifests)
    turn = threading.Lock()
    for task, captions in _with_captions(output, tasks, text.text_columns):
        found: Covered | LatentmillError
        try:
            found = cover(encoders, task, captions.result(), turn)
        except StorageError as error:
            if _may_pass(error):
                raise
            found = error
        yield task, found


def _with_captions(
    output: ObjectStore, tasks: Sequence[TextTask], columns: Sequence[str]
) -> Iterator[tuple[TextTask, Future[dict[str, list[str]]]]]:
    """The tasks with their captions, those of the next ones on their way meanwhile: an encoder waits for no store."""
    with ThreadPoolExecutor(_FETCHED_AHEAD) as pool:
        coming = deque[tuple[TextTask, Future[dict[str, list[str]]]]]()
        try:
            for task in tasks:
                coming.append((task, pool.submit(stored_captions_of, output, task.base, columns)))
                if len(coming) > _FETCHED_AHEAD:
                    yield coming.popleft()
            while coming:
                yield coming.popleft()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """What an actor was asked: its start, or to cover a task."""

    actor: Any
    task: TextTask | None
    began_s: float


class _Hands:
    """The actors of a run, and who holds what.

    Attributes:
        ready: actors that have started.
        calls: those that are not answered yet, by Ray's reference.
    """

    def __init__(self, actors: Sequence[Any], tasks: Sequence[TextTask]) -> None:
        self._actors = list(actors)
        self._waiting = deque(tasks)
        self._left = set(tasks)
        self._num_lost = Counter[TextTask]()
        self.ready: list[Any] = []
        self.calls: dict[Any, _Call] = {}
        for actor in actors:
            self.start(actor)

    def start(self, actor: Any) -> None:
        """Asks an actor to load its encoder."""
        self.calls[actor.start.remote()] = _Call(actor, None, time.monotonic())

    @property
    def has_work(self) -> bool:
        """Also without a task one actor starts, so that another encoder than before is refused."""
        return bool(self._left) or not self.ready

    def hand_out(self) -> None:
        """Gives tasks to actors: each its first before any its second."""
        for _ in range(_HELD_PER_ACTOR):
            for actor in self.ready:
                held = [call.task for call in self.calls.values() if call.actor is actor]
                if len(held) < _HELD_PER_ACTOR and (task := self._next(not held)) is not None:
                    self.calls[actor.cover.remote(task)] = _Call(actor, task, time.monotonic())

    def _next(self, is_idle: bool) -> TextTask | None:
        """What waits, or for an actor that holds nothing what another one holds for long."""
        if self._waiting:
            return self._waiting.popleft()
        if not is_idle:
            return None
        # Ray tells nobody of an actor that hangs, or waits for a node that never comes back.
        held = Counter(call.task for call in self.calls.values() if call.task in self._left)
        for call in self.calls.values():
            is_late = time.monotonic() - call.began_s > _PATIENCE_S
            if call.task is not None and held[call.task] == 1 and is_late:
                return call.task
        return None

    def ends(self, task: TextTask) -> bool:
        """Takes a task off; whether it was left."""
        is_left = task in self._left
        self._left.discard(task)
        return is_left

    def gives_again(self, task: TextTask) -> bool:
        """Whether a task whose actor died is given to another one, or was done by one."""
        self._num_lost[task] += 1
        if task in self._left and self._num_lost[task] < _MAX_ACTORS_LOST:
            self._waiting.append(task)
            return True
        return task not in self._left

    def lose(self, actor: Any) -> None:
        """Forgets an actor that will not come back.

        Raises:
            LatentmillError: it was the last one.
        """
        self._actors = [other for other in self._actors if other is not actor]
        self.ready = [other for other in self.ready if other is not actor]
        if not self._actors:
            raise LatentmillError("no encoder is left; what is committed stays, the same command goes on")


def _actors(
    run: RunPart, text: TextEncoderConfig, output: ObjectStore, num_tasks: int, progress: Progress
) -> list[Any]:
    import ray

    from pipeline.cluster import gpus_per_actor, num_places, resources_in_words

    num_gpus = 0.0 if run.device == "cpu" else gpus_per_actor(run.gpus_per_actor)
    if run.device == "cuda" and not num_gpus:
        raise UsageError(
            f"--device cuda: actors have no GPU ({resources_in_words()}); give --gpus-per-actor, or nodes with one"
        )
    device_type = "cuda" if num_gpus else "cpu"
    num_cpus = EncodingConfig(model="", cpus_per_actor=run.cpus_per_actor).cpus_on(device_type)
    num_actors = min(run.num_actors or max(1, num_places(num_cpus, num_gpus)), max(1, num_tasks))
    progress.say("start", f"{crew_in_words(num_actors, num_cpus, num_gpus)} each")
    actor = ray.remote(TextActor).options(
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        max_restarts=_MAX_RESTARTS,
        max_task_retries=_MAX_TASK_RETRIES,
        max_concurrency=_HELD_PER_ACTOR + 1,
    )
    how = output.root_uri, text, device_type, run.compute_dtype, run.cpus_per_actor
    return [actor.remote(*how) for _ in range(num_actors)]


def _covered_on_ray(
    run: RunPart, text: TextEncoderConfig, output: ObjectStore, tasks: Sequence[TextTask], progress: Progress
) -> Generator[_Result]:
    """Covers the tasks by actors. One that dies costs nothing: what it held is done again, and counts once.

    Raises:
        LatentmillError: no actor is left.
    """
    import ray
    from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

    from pipeline.cluster import connected, in_short

    check_store(columns_store(output, "text"), run.single_writer)
    with connected(run.ray_address, {}, progress):
        _take_signals()  # ray.init puts a handler of its own in the place of ours
        hands = _Hands(_actors(run, text, output, len(tasks), progress), tasks)
        while hands.has_work:
            hands.hand_out()
            for reference in ray.wait(list(hands.calls), timeout=_POLL_S)[0]:
                call = hands.calls.pop(reference)
                found: Covered | LatentmillError
                try:
                    found = ray.get(reference)
                except RayTaskError as error:
                    cause = error.cause
                    if call.task is None or not isinstance(cause, StorageError) or _may_pass(cause):
                        raise cause from error
                    found = cause
                except RayActorError as error:
                    if isinstance(error, ActorDiedError):
                        progress.say("actor", f"an encoder is lost for good: {in_short(error)}")
                        hands.lose(call.actor)
                    elif call.task is None:
                        hands.start(call.actor)
                    if call.task is None or hands.gives_again(call.task):
                        continue
                    found = LatentmillError(f"whoever embeds it dies: {in_short(error)}")
                if call.task is None:
                    hands.ready.append(call.actor)
                elif hands.ends(call.task):
                    yield call.task, found


def _may_pass(error: StorageError) -> bool:
    """Whether it is not damage of one file of the output, beside which the next record may be well."""
    return isinstance(error, StorageUnavailableError)


def _account(summary: Summary, task: TextTask, found: Covered | LatentmillError, progress: Progress) -> None:
    if isinstance(found, LatentmillError):
        _leave_undone(summary, task, str(found), progress)
        return
    summary.num_texts += found.num_texts
    summary.num_texts_truncated += found.num_truncated
    if task.repairs is None:
        summary.num_records_done += 1
    elif found.is_ours:
        summary.num_records_repaired += 1
    else:
        message = f"{task.repairs} of the set is damaged, and its texts give other bytes now: restore its file"
        _leave_undone(summary, task, message, progress)


def _leave_undone(summary: Summary, task: TextTask, message: str, progress: Progress) -> None:
    progress.say("undone", f"record {task.record} is left undone: {message}")
    summary.exit_code = EXIT_UNDONE
    if len(summary.undone) < _MAX_TOLD:
        summary.undone[task.record] = message


def _take_signals() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _fail(exit_code: int, error: Exception, **more: Mapping[str, object]) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    print(
        json.dumps({"exit_code": exit_code, "error": type(error).__name__, "message": str(error), **more}), flush=True
    )
    return exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
