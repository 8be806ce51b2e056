"""The driver of a run: plans shards, hands them to actors, counts attempts, publishes, and says how it ended.

Not where anything is encoded. Nothing that it holds is needed to go on after it dies: what is done stands in the commit
records of the output, and the same command again does the rest. `jobs/encode_laion.py` calls `run`.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from types import FrameType
from typing import Any

import ray
import torch
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from pipeline.actors import EncodeActor, ShardReport, WorkerFacts
from pipeline.codec import CPU_ENVIRONMENT, load_model
from pipeline.commit import (
    Snapshot,
    check_store,
    committed_ids,
    decided_shards,
    fingerprint_of,
    load_commits,
    open_dataset,
    publish_snapshot,
    read_manifest,
    refuse_differences,
)
from pipeline.config import JobConfig
from pipeline.errors import ConfigMismatchError, LatentmillError, StorageError, UsageError
from pipeline.format import FORMAT_VERSION
from pipeline.metrics import RunMetrics
from pipeline.plan import infer_passthrough, plan_shards
from pipeline.progress import Progress, RateMeter, Standing
from pipeline.records import Commit, DatasetManifest, ShardCounts, ShardSpec
from pipeline.storage import ObjectStore, open_store

EXIT_OK, EXIT_USAGE, EXIT_MISMATCH, EXIT_UNDONE, EXIT_REJECTED, EXIT_INTERRUPTED = 0, 2, 3, 4, 5, 130
# Raised when the meaning of stored bytes changes with the code and not with the configuration.
RESULT_VERSION = 1
# One shard is encoded while the next decodes; a third would only hold memory.
_SHARDS_PER_ACTOR = 2
_LOOK_AHEAD = 100
_POLL_S = 0.5
_GRACE_S = 10.0
_STOP_S = 5.0
_SNAPSHOT_EVERY = 1000
_MAX_FAILED_STARTS = 3
# Calls to an actor that Ray is starting again fail after about two seconds: for minutes it may wait for a new node.
_MAX_FAILED_RETURNS = 150
# An actor that fails at every shard (a lost GPU context, a full disk) must not spend the attempts of all of them.
_MAX_FAILED_SHARDS = 2
_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """How a run ended; the job prints it as its last line.

    The counts of videos, clips and records are those of every planned shard that is decided, by whichever run; what
    this run did is `num_shards_done`, `elapsed_s` and `clips_per_s`.
    """

    exit_code: int
    num_shards: int
    num_shards_done_before: int
    num_shards_done: int
    num_shards_undone: int
    num_videos: int
    num_videos_ok: int
    num_videos_rejected: int
    num_clips: int
    num_records: int
    num_clips_rejected: int
    num_frames: int
    reasons: Mapping[str, int]
    snapshot: int | None
    elapsed_s: float
    clips_per_s: float
    is_trained: bool | None = None
    undone: Mapping[str, str] = field(default_factory=dict)  # shard id -> last error, at most 20 of them


class _Interrupt:
    """Turns SIGINT and SIGTERM into a flag; the second signal raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.is_set = False

    def __call__(self, _signal: int, _frame: FrameType | None) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self)


@contextmanager
def _interrupts() -> Iterator[_Interrupt]:
    interrupt = _Interrupt()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    interrupt.install()
    try:
        yield interrupt
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def run(config: JobConfig, progress: Progress, metrics: RunMetrics) -> RunSummary:
    """Decides every planned shard that is not decided yet.

    Raises:
        UsageError: the input, the output, the model or a flag is wrong.
        ConfigMismatchError: the output holds another configuration.
        StorageError: the output or the listing of the input failed for good.
    """
    if config.run.retry_failed:
        raise UsageError("--retry-failed is not available in this version; rejections stay recorded as they are")
    if config.run.text_encoder is not None:
        raise UsageError("--text-encoder is not available in this version; captions are stored as text")
    started = time.monotonic()
    store = open_store(config.run.output)
    stored = read_manifest(store)
    if stored is not None:
        _refuse_other_encoding(store, stored, config)
    specs = plan_shards(config.source, store, write=not config.run.dry_run)
    decided = committed_ids(store)
    open_specs = [spec for spec in specs if spec.shard_id not in decided]
    todo = open_specs[: config.source.limit]
    planned = [spec.shard_id for spec in specs if spec.shard_id in decided] + [spec.shard_id for spec in todo]
    ledger = _Ledger(planned, todo, started, config, metrics)
    progress.say(
        "plan",
        f"{len(specs)} shards planned, {len(specs) - len(open_specs)} decided before, {len(todo)} to do in this run",
    )
    if config.run.dry_run:
        return ledger.summary(EXIT_OK, load_commits(store, decided), None, None)
    if not todo:
        if stored is not None:
            _refuse_other_model(store, stored, config)
        return ledger.close(publish_snapshot(store), None if stored is None else stored.model.is_trained)
    check_store(store, config.run.single_writer)
    with _interrupts() as interrupt, _ray(config, progress):
        interrupt.install()  # ray.init puts a handler of its own in the place of ours
        pool = _Pool(config, len(todo), progress)
        try:
            facts = pool.start(interrupt)
            if facts is None:
                return ledger.summary(EXIT_INTERRUPTED, load_commits(store, decided), None, None)
            manifest = _open_output(store, stored, config, facts, specs)
            if not manifest.model.is_trained:
                progress.say("untrained", f"the model {manifest.model.model!r} is untrained: its latents mean nothing")
            _Dispatch(pool, manifest, ledger, interrupt, progress, store).until_decided()
        finally:
            pool.stop()
    snapshot = publish_snapshot(store)
    if interrupt.is_set:
        return ledger.summary(EXIT_INTERRUPTED, snapshot.commits, snapshot, manifest.model.is_trained)
    return ledger.close(snapshot, manifest.model.is_trained)


def _refuse_other_encoding(store: ObjectStore, stored: DatasetManifest, config: JobConfig) -> None:
    """Compares what the configuration alone decides, before anything is planned or started."""
    held = stored.fingerprint_fields
    asked = config.encoding.fingerprint_fields(str(held.get("device_type", "cpu")))
    refuse_differences(store, {key: held.get(key) for key in asked}, asked)


def _refuse_other_model(store: ObjectStore, stored: DatasetManifest, config: JobConfig) -> None:
    """For a run with nothing to do, which starts no actor that would compare the weights."""
    weights_sha256 = load_model(config.encoding, torch.device("cpu")).weights_sha256
    refuse_differences(store, {"weights_sha256": stored.model.weights_sha256}, {"weights_sha256": weights_sha256})


def _open_output(
    store: ObjectStore,
    stored: DatasetManifest | None,
    config: JobConfig,
    facts: WorkerFacts,
    specs: Sequence[ShardSpec],
) -> DatasetManifest:
    """The manifest that stands in the output, ours or an equal one.

    Raises:
        ConfigMismatchError: what stands there differs.
    """
    fields: dict[str, object] = {
        **config.encoding.fingerprint_fields(facts.device_type),
        "weights_sha256": facts.model.weights_sha256,
        "decoders": dict(facts.decoders),
        "format_version": FORMAT_VERSION,
        "result_version": RESULT_VERSION,
    }
    if stored is not None:
        # Columns that pass through were fixed by the first run; inputs that came later must fit into them.
        passthrough = stored.passthrough
    else:
        passthrough = infer_passthrough(config.source, config.encoding.caption_column, specs, store)
    return open_dataset(
        store,
        DatasetManifest(
            format_version=FORMAT_VERSION,
            fingerprint=fingerprint_of(fields),
            fingerprint_fields=fields,
            model=facts.model,
            kind="mean" if config.encoding.store == "mean" else "moments",
            latent_dtype="float16" if config.encoding.store_dtype == "float16" else "float32",
            passthrough=passthrough,
        ),
    )


class _Ledger:
    """What was to be done, what was done and what it gave; every number that a run shows comes from here."""

    def __init__(
        self, planned: Sequence[str], todo: Sequence[ShardSpec], started: float, config: JobConfig, metrics: RunMetrics
    ) -> None:
        self.todo = tuple(todo)
        self.metrics = metrics
        self.undone: dict[str, str] = {}
        self.done: set[str] = set()
        self._planned = planned
        self._started = started
        self._config = config
        self.max_attempts = config.run.max_attempts
        self._num_records = 0
        self._num_rejected = 0
        self._rate = RateMeter()
        self.note_states(0)

    @property
    def num_left(self) -> int:
        return len(self.todo) - len(self.done) - len(self.undone)

    def add(self, report: ShardReport, actor: int) -> None:
        """Counts a shard that is decided."""
        self.done.add(report.shard_id)
        counts = report.counts
        metrics = self.metrics
        metrics.add("latentmill_shard_commit_total", outcome=report.outcome)
        if report.outcome == "committed":
            self._num_records += counts.num_records
            self._num_rejected += counts.num_videos_rejected
            metrics.add("latentmill_videos_total", counts.num_videos_ok, outcome="ok")
            metrics.add("latentmill_videos_total", counts.num_videos_rejected, outcome="rejected")
            metrics.add("latentmill_clips_total", counts.num_records, outcome="ok")
            metrics.add("latentmill_clips_total", counts.num_clips_rejected, outcome="rejected")
            metrics.add("latentmill_frames_total", counts.num_frames)
            metrics.add("latentmill_bytes_total", report.num_bytes_in, direction="in")
            metrics.add("latentmill_bytes_total", report.num_bytes_out, direction="out")
            for reason, number in counts.reasons.items():
                metrics.add("latentmill_rejections_total", number, reason=reason)
            for stage, seconds in report.timings_s.items():
                metrics.observe("latentmill_stage_seconds", seconds, stage=stage)
            metrics.set("latentmill_encoder_busy_ratio", report.busy_share, actor=str(actor))
        self._rate.add(len(self.done), self._num_records)

    def note_states(self, num_running: int) -> None:
        """Sets the gauges of shards by state."""
        for state, number in (
            ("pending", self.num_left - num_running),
            ("running", num_running),
            ("done", len(self._planned) - len(self.todo) + len(self.done)),
            ("undone", len(self.undone)),
        ):
            self.metrics.set("latentmill_shards", number, state=state)

    def standing(self, num_running: int) -> Standing:
        """How far the run is."""
        self.note_states(num_running)
        shards_per_s, clips_per_s = self._rate.rates()
        eta_s = self.num_left / shards_per_s if shards_per_s > 0 else None
        if eta_s is not None:
            self.metrics.set("latentmill_eta_seconds", eta_s)
        return Standing(
            num_shards=len(self.todo),
            num_shards_done=len(self.done),
            num_shards_running=num_running,
            num_shards_undone=len(self.undone),
            num_records=self._num_records,
            num_rejected=self._num_rejected,
            clips_per_s=clips_per_s,
            eta_s=eta_s,
            elapsed_s=time.monotonic() - self._started,
        )

    def close(self, snapshot: Snapshot | None, is_trained: bool | None) -> RunSummary:
        """The summary of a run that came to its end, with the exit code that follows from the accounts."""
        summary = self.summary(EXIT_OK, snapshot.commits if snapshot else (), snapshot, is_trained)
        decided = {commit.shard_id for commit in snapshot.commits} if snapshot else set()
        # The last attempt may have died just after its commit, or another job may have been faster.
        num_undone = len(set(self._planned) - decided)
        summary = replace(summary, num_shards_undone=num_undone)
        if num_undone:
            return replace(summary, exit_code=EXIT_UNDONE)
        if summary.num_videos_rejected > self._config.run.max_rejected_share * summary.num_videos:
            return replace(summary, exit_code=EXIT_REJECTED)
        return summary

    def summary(
        self, exit_code: int, commits: Iterable[Commit], snapshot: Snapshot | None, is_trained: bool | None
    ) -> RunSummary:
        """The accounts of every planned shard among the commits."""
        planned = set(self._planned)
        totals = _sum(shard.counts for shard in decided_shards(commits) if shard.shard_id in planned)
        elapsed_s = time.monotonic() - self._started
        return RunSummary(
            exit_code=exit_code,
            num_shards=len(self._planned),
            num_shards_done_before=len(self._planned) - len(self.todo),
            num_shards_done=len(self.done),
            num_shards_undone=len(self.todo) - len(self.done),
            num_videos=totals.num_videos,
            num_videos_ok=totals.num_videos_ok,
            num_videos_rejected=totals.num_videos_rejected,
            num_clips=totals.num_clips,
            num_records=totals.num_records,
            num_clips_rejected=totals.num_clips_rejected,
            num_frames=totals.num_frames,
            reasons=totals.reasons,
            snapshot=None if snapshot is None else snapshot.number,
            elapsed_s=round(elapsed_s, 3),
            clips_per_s=round(self._num_records / elapsed_s, 4),
            is_trained=is_trained,
            undone=dict(sorted(self.undone.items())[:20]),
        )


def _sum(all_counts: Iterable[ShardCounts]) -> ShardCounts:
    totals: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for counts in all_counts:
        reasons.update(counts.reasons)
        totals.update({name: getattr(counts, name) for name in _COUNTED})
    return ShardCounts(**{name: totals[name] for name in _COUNTED}, reasons=dict(sorted(reasons.items())))


_COUNTED = (
    "num_videos",
    "num_videos_ok",
    "num_videos_rejected",
    "num_clips",
    "num_records",
    "num_clips_rejected",
    "num_frames",
)


@contextmanager
def _ray(config: JobConfig, progress: Progress) -> Iterator[None]:
    """A connection to the cluster of `ray job submit` or --ray-address, else an embedded Ray that ends with the run.

    Never the address file that an earlier `ray start` left behind: a run on a forgotten cluster surprises.
    """
    if ray.is_initialized():
        yield
        return
    address = config.run.ray_address or os.environ.get("RAY_ADDRESS")
    # Errors come back with the results; the workers' own output would tear the progress line apart.
    if address is not None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (RayError, ConnectionError, RuntimeError) as error:
            raise UsageError(f"there is no Ray cluster at {address}: {error}") from error
    else:
        # Nothing large crosses Ray, so that the smallest object store will do.
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=80 << 20,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    progress.say("ray", f"Ray {ray.__version__}, {'cluster ' + address if address else 'embedded'}, {_resources()}")
    try:
        yield
    finally:
        ray.shutdown()


def _resources() -> str:
    total = ray.cluster_resources()
    return f"{total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs on {len(_nodes())} nodes"


def _nodes() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _num_places(num_cpus: int, num_gpus: float) -> int:
    """Actors of this size that fit on the nodes of now; a rest on one node does not help another."""
    return sum(
        int(min(node.get("CPU", 0) // num_cpus, node.get("GPU", 0) / num_gpus + 1e-6 if num_gpus else float("inf")))
        for node in _nodes()
    )


@dataclass(slots=True)
class _Slot:
    """One actor and the shards that it holds."""

    index: int
    handle: Any
    is_ready: bool = False
    has_been_ready: bool = False
    held: set[str] = field(default_factory=set)
    num_failed_starts: int = 0  # since it was last ready
    num_failed_shards: int = 0  # since it last decided one


class _Pool:
    """The encoder actors of a run."""

    def __init__(self, config: JobConfig, num_shards: int, progress: Progress) -> None:
        has_gpu = ray.cluster_resources().get("GPU", 0) > 0
        num_gpus = config.run.gpus_per_actor if config.run.gpus_per_actor is not None else float(has_gpu)
        device_type = "cuda" if num_gpus else "cpu"
        num_cpus = config.encoding.cpus_on(device_type)
        fitting = _num_places(num_cpus, num_gpus)
        if fitting == 0:
            progress.say(
                "wait", f"no node has {num_cpus} CPUs and {num_gpus:g} GPUs free for an actor; waiting for one"
            )
        num_actors = min(config.run.num_actors or max(1, fitting), num_shards)
        actor = ray.remote(EncodeActor).options(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=_SHARDS_PER_ACTOR + 1,
            runtime_env={} if num_gpus else {"env_vars": CPU_ENVIRONMENT},
        )
        self._wanted = f"{num_actors} actors of {num_cpus} CPUs and {num_gpus:g} GPUs each"
        self._progress = progress
        self.slots = [_Slot(index, actor.remote(config, str(index), device_type)) for index in range(num_actors)]
        self.starting: dict[Any, _Slot] = {}
        for slot in self.slots:
            self._start(slot)

    def start(self, interrupt: _Interrupt) -> WorkerFacts | None:
        """Waits for the first actor; the others join as they come up. None after an interrupt.

        Raises:
            UsageError: the model cannot be loaded.
            LatentmillError: the actor cannot work on this installation.
        """
        began = time.monotonic()
        is_late = False
        while not interrupt.is_set:
            ready, _ = ray.wait(list(self.starting), timeout=_POLL_S)
            if ready:
                facts = self.admit(ready[0])
                if facts is not None:
                    self._progress.say("start", f"{self._wanted}, {facts.device_name}, model {facts.model.model}")
                    return facts
            if not is_late and time.monotonic() - began > _PATIENCE_S:
                is_late = True
                self._progress.say("wait", f"still waiting for {self._wanted}; the cluster has {_resources()}")
        return None

    def admit(self, started: Any) -> WorkerFacts | None:
        """Takes an actor whose start has ended into service; None if it died on the way, and is started anew."""
        slot = self.starting.pop(started)
        try:
            facts: WorkerFacts = ray.get(started)
        except RayTaskError as error:
            raise error.cause from error
        except RayActorError as error:
            slot.num_failed_starts += 1
            # Dead for good is an actor whose constructor failed; one that Ray starts again answers so for a while.
            limit = _MAX_FAILED_RETURNS if slot.has_been_ready else _MAX_FAILED_STARTS
            if isinstance(error, ActorDiedError) or slot.num_failed_starts >= limit:
                self._give_up(slot, error)
            else:
                self._progress.say("actor", f"encoder {slot.index} does not answer yet: {_in_short(error)}")
                self._start(slot)
            return None
        slot.is_ready = slot.has_been_ready = True
        slot.num_failed_starts = 0
        return facts

    def restart(self, slot: _Slot, *, kill: bool) -> None:
        """Takes an actor out of service until it has started anew.

        Args:
            kill: end its process first; False where that has died already.
        """
        if slot.is_ready:
            slot.is_ready = False
            if kill:
                ray.kill(slot.handle, no_restart=False)
            self._start(slot)

    def _start(self, slot: _Slot) -> None:
        self.starting[slot.handle.start.remote()] = slot

    def _give_up(self, slot: _Slot, error: Exception) -> None:
        message = f"encoder {slot.index} could not be started {slot.num_failed_starts} times: {_in_short(error)}"
        self._progress.say("actor", f"{message}; going on without it")
        if not self.starting and not any(other.is_ready for other in self.slots):
            raise LatentmillError(f"{message}. No encoder is left; what is committed stays, the same command goes on")

    def stop(self) -> None:
        """Lets every actor clean up, then ends it."""
        ray.wait([slot.handle.stop.remote() for slot in self.slots], num_returns=len(self.slots), timeout=_STOP_S)
        for slot in self.slots:
            ray.kill(slot.handle)


class _Dispatch:
    """Hands shards to actors and takes reports back, until nothing is left or the run is interrupted."""

    def __init__(
        self,
        pool: _Pool,
        manifest: DatasetManifest,
        ledger: _Ledger,
        interrupt: _Interrupt,
        progress: Progress,
        store: ObjectStore,
    ) -> None:
        self._pool = pool
        self._manifest = manifest
        self._ledger = ledger
        self._interrupt = interrupt
        self._progress = progress
        self._store = store
        self._max_attempts = ledger.max_attempts
        self._waiting = deque(ledger.todo)
        self._running: dict[Any, tuple[ShardSpec, _Slot]] = {}
        self._attempts: Counter[str] = Counter()
        # Shards that were held by an actor when it died. Each goes alone from then on: of two that were held only one
        # killed it, and the other must not spend its attempts in that company.
        self._suspects: set[str] = set()
        self._failed_on: dict[str, int] = {}  # shard id -> actor of its last attempt

    def until_decided(self) -> None:
        """Runs to the end.

        Raises:
            UsageError: the model or the configuration is wrong.
            StorageError: an actor committed where this process cannot see it.
        """
        last_snapshot = 0
        while not self._interrupt.is_set and self._ledger.num_left:
            self._hand_out()
            self._take_back(_POLL_S)
            if len(self._ledger.done) - last_snapshot >= _SNAPSHOT_EVERY:
                publish_snapshot(self._store)
                last_snapshot = len(self._ledger.done)
            self._progress.show(self._ledger.standing(len(self._running)))
        if self._interrupt.is_set:
            self._progress.say("interrupt", "interrupted: ending what is about to be committed; again to stop at once")
            deadline = time.monotonic() + _GRACE_S
            while self._running and time.monotonic() < deadline:
                self._take_back(_POLL_S)
        self._progress.show(self._ledger.standing(len(self._running)), is_last=True)
        unseen = self._ledger.done - committed_ids(self._store)
        if unseen:
            raise StorageError(
                f"{len(unseen)} shards (such as {min(unseen)}) were committed by an actor but are not seen from the "
                f"driver at {self._store.root_uri}: every node must reach the same storage; use s3:// or a shared disk"
            )

    def _hand_out(self) -> None:
        # Every actor gets its first shard before any gets its second.
        for num_held in range(_SHARDS_PER_ACTOR):
            for slot in self._pool.slots:
                if slot.is_ready and len(slot.held) == num_held and self._waiting:
                    self._hand_to(slot)

    def _hand_to(self, slot: _Slot) -> None:
        spec = self._next_for(slot)
        if spec is None:
            return
        self._waiting.remove(spec)
        slot.held.add(spec.shard_id)
        self._running[slot.handle.process.remote(spec, self._manifest)] = (spec, slot)
        self._note_depth(slot)

    def _next_for(self, slot: _Slot) -> ShardSpec | None:
        """The first waiting shard that this actor may take; one that failed there goes elsewhere if it can."""
        has_others = sum(other.is_ready for other in self._pool.slots) > 1
        for spec in islice(self._waiting, _LOOK_AHEAD):
            if has_others and self._failed_on.get(spec.shard_id) == slot.index:
                continue
            if slot.held and self._suspects & {spec.shard_id, *slot.held}:
                continue
            return spec
        return None

    def _note_depth(self, slot: _Slot) -> None:
        self._ledger.metrics.set("latentmill_queue_depth", len(slot.held), actor=str(slot.index))

    def _take_back(self, timeout_s: float) -> None:
        pending = [*self._running, *self._pool.starting]
        if ray.wait(pending, timeout=timeout_s)[0]:
            # The first has come; all others that are there come along.
            for reference in ray.wait(pending, num_returns=len(pending), timeout=0)[0]:
                self._take(reference)

    def _take(self, reference: Any) -> None:
        if reference in self._pool.starting:
            self._pool.admit(reference)
            return
        spec, slot = self._running.pop(reference)
        slot.held.discard(spec.shard_id)
        self._note_depth(slot)
        try:
            self._ledger.add(ray.get(reference), slot.index)
            slot.num_failed_shards = 0
        except RayTaskError as error:
            if isinstance(error.cause, UsageError | ConfigMismatchError):
                raise error.cause from error
            slot.num_failed_shards += 1
            if slot.num_failed_shards >= _MAX_FAILED_SHARDS:
                self._pool.restart(slot, kill=True)
            self._try_again(spec, slot, _message(error.cause))
        except RayActorError as error:
            self._suspects.add(spec.shard_id)
            self._pool.restart(slot, kill=False)
            self._try_again(spec, slot, f"the worker process died: {_in_short(error)}")

    def _try_again(self, spec: ShardSpec, slot: _Slot, message: str) -> None:
        self._failed_on[spec.shard_id] = slot.index
        self._attempts[spec.shard_id] += 1
        self._ledger.metrics.add("latentmill_shard_attempts_failed_total")
        attempt = f"attempt {self._attempts[spec.shard_id]} of {self._max_attempts}"
        if self._attempts[spec.shard_id] < self._max_attempts:
            self._progress.say("retry", f"shard {spec.shard_id}: {attempt} failed and is repeated: {message}")
            self._waiting.append(spec)
        else:
            self._progress.say("undone", f"shard {spec.shard_id}: {attempt} failed; it is left undone: {message}")
            self._ledger.undone[spec.shard_id] = message


def _message(error: BaseException) -> str:
    return str(error) if isinstance(error, LatentmillError) else f"{type(error).__name__}: {error}"


def _in_short(error: BaseException) -> str:
    """The first line of an error of Ray, which says what happened, and the last, which says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join(dict.fromkeys([lines[0], lines[-1]])) if lines else type(error).__name__
