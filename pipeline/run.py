"""The driver of a run: plans shards, hands them to actors, counts attempts, publishes, and says how it ended.

Not where anything is encoded. Nothing that it holds is needed to go on after it dies: what is done stands in the commit
records of the output, and the same command again does the rest. `jobs/encode_laion.py` calls `run`.

Ray reports an actor that died. It reports none that is frozen or hangs, so the driver asks each for its steps, ends
those that stay silent or make none, and gives their shards to others; what they may still commit later is harmless.
A shard that kills its worker every time is searched for the video that does it (`_Search`).
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from heapq import nsmallest
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError, RayTaskError

import cvvae
from pipeline import sandbox
from pipeline.actors import Beat, EncodeActor, ShardReport, WorkerFacts, wanted_of_workers
from pipeline.cluster import connected, gpus_per_actor, in_short, num_places, resources_in_words
from pipeline.columns import refuse_unknown_columns
from pipeline.commit import (
    Accounts,
    DecidedShard,
    KnownCommits,
    accounts,
    check_store,
    decided_shards,
    fingerprint_of,
    load_commits,
    name_of,
    open_dataset,
    parse_record_name,
    publish_snapshot,
    read_manifest,
    record_names,
    refuse_differences,
    snapshot_commits,
)
from pipeline.committed import FileCache
from pipeline.conditions import (
    configured_fields,
    fingerprint_fields,
    open_sets,
    publish_sets,
    records_of_ordered_repairs,
    shards_in_repair,
)
from pipeline.config import CPU_ENVIRONMENT, JobConfig
from pipeline.decode import decoder_versions
from pipeline.errors import ConfigMismatchError, LatentmillError, StorageError, UsageError
from pipeline.format import FORMAT_VERSION
from pipeline.memory import MemoryTrimmer, give_memory_back
from pipeline.metrics import RunMetrics
from pipeline.packed import Names, Packed
from pipeline.plan import InputChange, UnwrittenSlices, changed_inputs, infer_passthrough, plan_shards
from pipeline.progress import Crew, Progress, RateMeter, Standing, counted, crew_in_words
from pipeline.quality import RunQuality
from pipeline.records import Commit, DatasetManifest, ShardSpec
from pipeline.redo import Retries, ordered_repairs, repair_orders, repairs, retries
from pipeline.scratch import Scratch
from pipeline.storage import ObjectStore, allow_web_inputs, open_store
from pipeline.store import StoreErrors

EXIT_OK, EXIT_USAGE, EXIT_MISMATCH, EXIT_UNDONE, EXIT_REJECTED, EXIT_INTERRUPTED = 0, 2, 3, 4, 5, 130
# Raised when the meaning of stored bytes changes with the code and not with the configuration.
RESULT_VERSION = 1
# One shard is encoded while the next decodes; a third would only hold memory.
_SHARDS_PER_ACTOR = 2
_LOOK_AHEAD = 100
_POLL_S = 0.5
_LOOK_S = 0.2
_STOP_S = 5.0
_BEAT_S = 2.0
_FIT_S = 5.0
# Of the time between two looks at the actors, no more than this counts: a driver that was frozen itself, or waited for
# the store, must not blame the actors.
_LONGEST_LOOK_S = 5.0
# A snapshot costs a list of every record, so that one every hundred shards would cost their number squared. The first
# comes soon: readers see the output grow, and what a first one takes in memory once is not taken after hours.
_SNAPSHOT_EVERY = 100
_SNAPSHOT_GROWTH = 0.1
_MAX_TOLD = 20
# Committed files that are read to see what is left to retry.
_COMMITTED_BYTES = 4 << 30
_MAX_FAILED_STARTS = 3
# Calls to an actor that Ray is starting again fail after about two seconds: for minutes it may wait for a new node.
_MAX_FAILED_RETURNS = 150
_TOLD_RETURNS = 15
# An actor that fails at every shard (a lost GPU context, a full disk) must not spend the attempts of all of them.
_MAX_FAILED_SHARDS = 2
# Shards that fail one after the other, none of them by a death, with none decided in between: a full disk, credentials
# that expired. Going on would spend the attempts of every shard.
_MAX_FAILED_IN_A_ROW = 12
# Deaths likewise, and for each actor a few more: a search ends in fewer, and all machines may be taken away at once.
_MAX_DEATHS_IN_A_ROW = 30
_MAX_DEATHS_PER_ACTOR = 4
# One video alone must kill its worker so often before it is held for poison.
_NUM_CONFIRMATIONS = 2
_MAX_POISON = 10
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
    sandbox: str | None = None  # what keeps decode children in, in words; None where none was started
    undone: Mapping[str, str] = field(default_factory=dict)  # shard id -> last error, at most 20 of them
    # What was done once more, and what became of it.
    num_shards_retried: int = 0
    num_videos_retried: int = 0
    num_videos_recovered: int = 0  # of these, now ok
    num_videos_spent: int = 0  # rejections of the asked reasons that had all their attempts
    num_records_repaired: int = 0
    # Inputs that changed after they were encoded (the output keeps what it has), and between planning and encoding (the
    # output has what was found then).
    num_inputs_changed: int = 0
    num_inputs_changed_on_the_way: int = 0
    num_texts_truncated: int = 0  # of the texts that this run embedded
    inputs_changed: Mapping[str, Sequence[str]] = field(default_factory=dict)  # URI -> version then and now, at most 20
    quality: Mapping[str, Any] | None = None  # of the clips that were decoded back: `RunQuality.facts`
    estimate: Mapping[str, object] | None = None  # of a dry run, `estimate.Estimate`


class _HopelessError(LatentmillError):
    """The run cannot go on; what is committed stays."""


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
    started = time.monotonic()
    allow_web_inputs(config.decode.max_file_bytes if config.source.allow_http else None)
    store = open_store(config.run.output)
    stored = read_manifest(store)
    if stored is not None:
        _refuse_other_encoding(store, stored, config)
    unwritten = UnwrittenSlices()
    specs = plan_shards(config.source, store, write=not config.run.dry_run, unwritten=unwritten)
    before = _before(store, specs, config)
    again = _again(store, specs, before.shards, config, progress)
    limit = len(specs) if config.source.limit is None else config.source.limit
    todo, planned, num_before = Packed[ShardSpec](), Names(), 0
    for spec in specs:
        if spec.shard_id in before.decided:
            num_before += 1
        elif len(todo) < limit:
            todo.append(spec)
        else:
            continue
        planned.add(spec.shard_id)
    todo.extend(again.specs[: None if config.source.limit is None else limit - len(todo)])
    ledger = _Ledger(planned, todo, again, started, config, metrics)
    progress.say(
        "plan",
        f"{counted(len(specs), 'shard')} planned, {num_before} decided before, "
        f"{len(todo)} to do in this run" + (f", of these {len(again.specs)} once more" if again.specs else ""),
    )
    if config.run.dry_run:
        summary = ledger.summary(EXIT_OK, ledger.accounts(partial(iter, KnownCommits(store))), None, None)
        if not config.run.dry_run_seconds:
            return summary
        from pipeline.estimate import estimate
        from pipeline.estimate_text import lines_of

        estimated = estimate(
            config,
            specs,
            todo,
            store,
            stored,
            before.decided,
            before.num_records,
            unwritten,
            snapshot_every=_SNAPSHOT_EVERY,
            snapshot_growth=_SNAPSHOT_GROWTH,
        )
        progress.lines(lines_of(estimated))
        return replace(summary, estimate=asdict(estimated))
    # What a run of days need not hold; of the plan the first shard tells which columns there are.
    first_spec = specs[:1]
    del specs, before
    give_memory_back()
    if not todo:
        if stored is not None:
            _refuse_other_model(store, stored, config)
        number = _publish(store, config)
        is_trained = None if stored is None else stored.model.is_trained
        return ledger.close(ledger.accounts(partial(snapshot_commits, store, number)), number, is_trained)
    check_store(store, config.run.single_writer)
    environment = CPU_ENVIRONMENT if _will_encode_on_cpu(config) else {}
    with _interrupts() as interrupt, connected(config.run.ray_address, environment, progress) as inherited:
        interrupt.install()  # ray.init puts a handler of its own in the place of ours
        pool = _Pool(config, len(todo), inherited, progress, metrics)
        try:
            facts = pool.start(interrupt, _wanted(stored, config))
            if facts is None:
                return ledger.summary(EXIT_INTERRUPTED, ledger.accounts(partial(iter, KnownCommits(store))), None, None)
            ledger.sandbox = sandbox.in_words(facts.sandbox)
            progress.say("sandbox", f"decode children are kept in by: {ledger.sandbox}")
            manifest = _open_output(store, stored, config, facts, first_spec)
            if config.run.quality_share:
                ledger.quality = RunQuality(manifest.model, metrics, progress)
            if not manifest.model.is_trained:
                progress.say("untrained", f"the model {manifest.model.model!r} is untrained: its latents mean nothing")
            _Dispatch(pool, manifest, ledger, interrupt, progress, store, config).until_decided()
        finally:
            pool.stop()
    number = _publish(store, config)
    found = ledger.accounts(partial(snapshot_commits, store, number))
    if interrupt.is_set:
        return ledger.summary(EXIT_INTERRUPTED, found, number, manifest.model.is_trained)
    return ledger.close(found, number, manifest.model.is_trained)


def _publish(store: ObjectStore, config: JobConfig) -> int:
    """The number of a snapshot that holds every commit of now."""
    publish_sets(store, config.column_sets)
    return publish_snapshot(store).number


@dataclass(frozen=True, slots=True, kw_only=True)
class _Before:
    """What stood in the output when a run began.

    Attributes:
        decided: ids of all shards that were.
        shards: those of them that the run may have to say or do something about, by id, in 2.5 kB each.
        num_records: commit records of all of them.
    """

    decided: Names
    shards: Mapping[str, DecidedShard]
    num_records: int


def _before(store: ObjectStore, specs: Iterable[ShardSpec], config: JobConfig) -> _Before:
    """Reads all records and keeps those that matter: of inputs that changed, rejections to retry, files to repair."""
    matters = {parse_record_name(record)[0] for record in repair_orders(store)}
    matters |= shards_in_repair(store, config.column_sets)
    tars, as_encoded = Names(), Names()
    for spec in specs:
        if spec.changed:
            matters.add(spec.shard_id)
        if spec.kind == "tar":
            tars.add(spec.shard_id)
            as_encoded.add(_tar_version(spec))
    decided = Names()
    kept: dict[str, Commit] = {}
    known = KnownCommits(store)
    for commit in known:
        decided.add(commit.shard_id)
        counts = commit.shard_counts or commit.counts
        if not counts.reasons.keys().isdisjoint(config.run.retry_failed) or (
            commit.shard_id in tars and _tar_version(commit) not in as_encoded
        ):
            matters.add(commit.shard_id)
        if commit.shard_id in matters:
            kept[name_of(commit)] = commit
    # Of a shard that matters for a later generation the first one may have gone by.
    missing = [name for name in known.names if name not in kept and parse_record_name(name)[0] in matters]
    shards = decided_shards([*kept.values(), *(load_commits(store, missing) if missing else ())])
    return _Before(decided=decided, shards={shard.shard_id: shard for shard in shards}, num_records=len(known.names))


def _tar_version(of: ShardSpec | Commit) -> str:
    return f"{of.shard_id} {of.source_size_bytes} {of.source_etag}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Again:
    """What of the decided shards concerns this run: inputs that changed, rejections to retry, records to repair.

    Attributes:
        num_videos_ok: of each shard with rejections to retry, before that.
    """

    num_videos_ok: Mapping[str, int]
    changes: Sequence[InputChange]
    retried: Retries
    repaired: Sequence[ShardSpec]

    @property
    def specs(self) -> list[ShardSpec]:
        return [*self.repaired, *self.retried.specs]


def _again(
    store: ObjectStore,
    specs: Iterable[ShardSpec],
    before: Mapping[str, DecidedShard],
    config: JobConfig,
    progress: Progress,
) -> _Again:
    """
    Args:
        specs: as planned.
        before: of the decided shards at least those that `_Before` keeps.
    """
    specs = [spec for spec in specs if spec.shard_id in before]
    changes = changed_inputs(specs, before)
    for change in changes[:_MAX_TOLD]:
        progress.say(
            "changed",
            f"shard {change.shard_id} keeps what it has of {change.uri}, which changed since it was encoded (size and "
            f"etag or time of change {change.encoded}, now {change.found}); give it another name to encode it as well",
        )
    if len(changes) > _MAX_TOLD:
        progress.say("changed", f"{len(changes)} inputs changed since they were encoded, {_MAX_TOLD} are named above")
    ordered = ordered_repairs(store, before)
    for name in config.column_sets:
        # What a set lost comes back when the record that it is about is encoded again.
        about = records_of_ordered_repairs(store, before, name).values()
        ordered += sorted({record for record in about if record is not None} - set(ordered))
    repaired = repairs({spec.shard_id: spec for spec in specs}, before, ordered)
    in_repair = {spec.base_id for spec in repaired}
    changed: dict[str, list[str]] = {}
    for change in changes:
        changed.setdefault(change.shard_id, []).append(change.uri)
    with Scratch("driver") as folder:
        retried = retries(
            store,
            [spec for spec in specs if spec.shard_id not in in_repair],
            before,
            config.run.retry_failed,
            max_attempts=config.run.max_attempts,
            changed=changed,
            cache=FileCache(folder, _COMMITTED_BYTES),
        )
    for shard_id, why in list(retried.refused.items())[:_MAX_TOLD]:
        progress.say("retry", f"shard {shard_id} is not retried: {why}")
    if config.run.retry_failed:
        progress.say(
            "retry",
            f"{retried.num_videos} rejected videos of {len(retried.specs)} shards are tried again; {retried.num_spent} "
            f"had their {config.run.max_attempts} attempts before (--max-attempts)",
        )
    return _Again(
        num_videos_ok={spec.base_id: before[spec.base_id].counts.num_videos_ok for spec in retried.specs},
        changes=changes,
        retried=retried,
        repaired=repaired,
    )


def _refuse_other_encoding(store: ObjectStore, stored: DatasetManifest, config: JobConfig) -> None:
    """Compares what the configuration alone decides, before anything is planned or started."""
    held = stored.fingerprint_fields
    sets_held, sets_asked = held.get("column_sets") or [], sorted(config.column_sets)
    if sets_held != sets_asked:
        raise ConfigMismatchError(
            f"{store.root_uri} was begun with embeddings of {sets_held or 'nothing'}, asked for is "
            f"{sets_asked or 'none'}: give --text-encoder and --image-encoder as at first, or another --output; "
            "captions can be embedded by themselves at any time: jobs/encode_text.py",
            {"column_sets": (sets_held, sets_asked)},
        )
    asked = config.encoding.fingerprint_fields(str(held.get("device_type", "cpu")))
    asked["compile"] = config.encoding.compile
    refuse_differences(store, {"compile": False, **{key: held[key] for key in asked if key in held}}, asked)


def _refuse_other_model(store: ObjectStore, stored: DatasetManifest, config: JobConfig) -> None:
    """For a run with nothing to do, which starts no actor that would compare the weights."""
    import torch

    from pipeline.codec import load_model

    weights_sha256 = load_model(config.encoding, torch.device("cpu")).weights_sha256
    asked = {"weights_sha256": weights_sha256, **configured_fields(config.text, config.image)}
    refuse_differences(store, {key: stored.fingerprint_fields.get(key) for key in asked}, asked)


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
        **replace(config.encoding, compile=facts.is_compiled).fingerprint_fields(facts.device_type),
        **fingerprint_fields(facts.columns),
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
    manifest = DatasetManifest(
        format_version=FORMAT_VERSION,
        fingerprint=fingerprint_of(fields),
        fingerprint_fields=fields,
        model=facts.model,
        kind=config.encoding.kind,
        latent_dtype=config.encoding.latent_dtype,
        passthrough=passthrough,
    )
    if "text" in facts.columns:
        refuse_unknown_columns(manifest, config.text.text_columns, store.root_uri)
    standing = open_dataset(store, manifest)
    open_sets(store, facts.columns)
    return standing


class _Ledger:
    """What was to be done, what was done and what it gave; every number that a run shows comes from here."""

    def __init__(
        self,
        planned: Names,
        todo: Sequence[ShardSpec],
        again: _Again,
        started: float,
        config: JobConfig,
        metrics: RunMetrics,
    ) -> None:
        self.todo = todo
        self._again = again
        self._redone_ids = {spec.shard_id: spec for spec in todo if spec.redo is not None}
        self._num_changed_on_the_way = 0
        self._num_texts_truncated = 0
        self.metrics = metrics
        self.undone: dict[str, str] = {}
        self._given_up: str | None = None
        self._done = Names()
        self._planned = planned
        self._started = started
        self._config = config
        self.max_attempts = config.run.max_attempts
        self.sandbox: str | None = None
        self.quality: RunQuality | None = None
        self._num_records = 0
        self._num_rejected = 0
        self._reasons: Counter[str] = Counter()
        self._num_retries = 0
        self._rate = RateMeter()
        self.note_states(0)

    @property
    def _num_done_before(self) -> int:
        return len(self._planned) - (len(self.todo) - len(self._redone_ids))

    @property
    def num_done(self) -> int:
        """Of the shards to do, those that are decided or encoded once more."""
        return len(self._done)

    @property
    def num_decided(self) -> int:
        """Of all planned shards, those that are decided, by whichever run."""
        return self._num_done_before + len(self._done)

    @property
    def num_undone(self) -> int:
        """Of the shards to do, those that nobody tries any more."""
        return len(self.undone) if self._given_up is None else len(self.todo) - len(self._done)

    @property
    def num_left(self) -> int:
        return len(self.todo) - len(self._done) - self.num_undone

    def unseen(self, names: Iterable[str]) -> list[str]:
        """The shards that were decided for the first time in this run and are not among the names of all records."""
        seen = Names(names)
        first = (spec.shard_id for spec in self.todo if spec.redo is None)
        return [shard_id for shard_id in first if shard_id in self._done and shard_id not in seen]

    def accounts(self, commits: Callable[[], Iterable[Commit]]) -> Accounts:
        """Of the planned shards; `commits` gives all records of the output, as often as it is called."""
        return accounts(commits, self._planned, {spec.base_id for spec in self._redone_ids.values()})

    def add(self, spec: ShardSpec, report: ShardReport, actor: int) -> None:
        """Counts a shard that is decided."""
        self._done.add(spec.shard_id)
        self._num_changed_on_the_way += report.num_inputs_changed
        self._num_texts_truncated += report.num_texts_truncated
        if self.quality is not None and report.quality is not None:
            self.quality.add(spec.shard_id, report.quality, actor)
        counts = report.counts
        metrics = self.metrics
        metrics.add("latentmill_shard_commit_total", outcome=report.outcome)
        if report.outcome == "committed":
            self._num_records += counts.num_records
            self._num_rejected += counts.num_videos_rejected
            self._reasons.update(counts.reasons)
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
        self._rate.add(len(self._done), self._num_records)

    def note_failed_attempt(self) -> None:
        """Counts an attempt at a shard that ended in an error or a death."""
        self._num_retries += 1
        self.metrics.add("latentmill_shard_attempts_failed_total")

    def give_up(self, message: str) -> None:
        """Leaves every shard undone that is neither done nor undone for a reason of its own."""
        self._given_up = message

    def _some_undone(self) -> dict[str, str]:
        """The first of the shards that are undone, each with the reason."""
        if self._given_up is None:
            return dict(sorted(self.undone.items())[:_MAX_TOLD])
        undone = (spec.shard_id for spec in self.todo if spec.shard_id not in self._done)
        return {shard_id: self.undone.get(shard_id, self._given_up) for shard_id in nsmallest(_MAX_TOLD, undone)}

    def note_states(self, num_running: int) -> None:
        """Sets the gauges of shards by state, and counts the store errors of this process."""
        _follow_store_errors(self.metrics, "driver", StoreErrors.num_repeated, StoreErrors.num_given_up)
        for state, number in (
            ("pending", self.num_left - num_running),
            ("running", num_running),
            ("done", self.num_decided),
            ("undone", self.num_undone),
        ):
            self.metrics.set("latentmill_shards", number, state=state)

    def begin(self) -> None:
        """Work can be done from now on; the start of Ray and of the encoders is no part of a rate."""
        self._rate = RateMeter()

    def standing(self, num_running: int, crew: Crew) -> Standing:
        """How far the run is."""
        self.note_states(num_running)
        shards_per_s, clips_per_s = self._rate.rates()
        eta_s = self.num_left / shards_per_s if shards_per_s > 0 else None
        if eta_s is not None:
            self.metrics.set("latentmill_eta_seconds", eta_s)
        return Standing(
            num_shards=len(self.todo),
            num_shards_done=len(self._done),
            num_shards_running=num_running,
            num_shards_undone=self.num_undone,
            num_records=self._num_records,
            num_rejected=self._num_rejected,
            reasons=dict(self._reasons),
            num_retries=self._num_retries,
            clips_per_s=clips_per_s,
            eta_s=eta_s,
            elapsed_s=time.monotonic() - self._started,
            crew=crew,
            quality=None if self.quality is None else self.quality.standing(),
        )

    def close(self, found: Accounts, snapshot: int, is_trained: bool | None) -> RunSummary:
        """The summary of a run that came to its end, with the exit code that follows from the accounts."""
        summary = self.summary(EXIT_OK, found, snapshot, is_trained)
        # The last attempt may have died just after its commit, or another job may have been faster.
        num_undone = len(self._planned) - found.num_shards
        summary = replace(summary, num_shards_undone=num_undone)
        if num_undone or any(name not in self._done for name in self._redone_ids):
            return replace(summary, exit_code=EXIT_UNDONE)
        if summary.num_videos_rejected > self._config.run.max_rejected_share * summary.num_videos:
            return replace(summary, exit_code=EXIT_REJECTED)
        return summary

    def summary(self, exit_code: int, found: Accounts, snapshot: int | None, is_trained: bool | None) -> RunSummary:
        """The accounts of every planned shard that has some.

        Args:
            found: by `accounts`.
            snapshot: the number of the one that holds them.
        """
        totals, counts = found.counts, found.of_shards
        elapsed_s = time.monotonic() - self._started
        redone = [spec for name, spec in self._redone_ids.items() if name in self._done]
        retried = [spec.redo for spec in redone if spec.redo is not None and spec.redo.replaces is None]
        changes = self._again.changes
        num_first = len(self.todo) - len(self._redone_ids)
        return RunSummary(
            exit_code=exit_code,
            num_shards=len(self._planned),
            num_shards_done_before=self._num_done_before,
            num_shards_done=len(self._done) - len(redone),
            num_shards_undone=num_first - (len(self._done) - len(redone)),
            num_shards_retried=len(retried),
            num_videos_retried=sum(1 if redo.keys is None else len(redo.keys) for redo in retried),
            num_videos_recovered=sum(
                counts[redo.shard_id].num_videos_ok - self._again.num_videos_ok[redo.shard_id]
                for redo in retried
                if redo.shard_id in counts
            ),
            num_videos_spent=self._again.retried.num_spent,
            num_records_repaired=len(redone) - len(retried),
            num_inputs_changed=len(changes),
            num_inputs_changed_on_the_way=self._num_changed_on_the_way,
            num_texts_truncated=self._num_texts_truncated,
            inputs_changed={change.uri: [change.encoded, change.found] for change in changes[:_MAX_TOLD]},
            num_videos=totals.num_videos,
            num_videos_ok=totals.num_videos_ok,
            num_videos_rejected=totals.num_videos_rejected,
            num_clips=totals.num_clips,
            num_records=totals.num_records,
            num_clips_rejected=totals.num_clips_rejected,
            num_frames=totals.num_frames,
            reasons=totals.reasons,
            snapshot=snapshot,
            elapsed_s=round(elapsed_s, 3),
            clips_per_s=round(self._num_records / elapsed_s, 4),
            is_trained=is_trained,
            sandbox=self.sandbox,
            undone=self._some_undone(),
            quality=None if self.quality is None else self.quality.facts(),
        )


def _will_encode_on_cpu(config: JobConfig) -> bool:
    """Whether no actor of an embedded Ray will have a GPU, as far as that can be told before it has started."""
    if config.run.gpus_per_actor is not None:
        return config.run.gpus_per_actor == 0
    return not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists()


@dataclass(slots=True)
class _Slot:
    """One actor and the shards that it holds."""

    index: int
    handle: Any
    is_ready: bool = False
    has_been_ready: bool = False
    has_been_killed: bool = False  # while it started
    held: set[str] = field(default_factory=set)
    num_failed_starts: int = 0  # since it was last ready
    num_start_errors: int = 0  # of these, by an error of a process that lives
    num_failed_shards: int = 0  # since it last decided one
    beat: Any = None  # the question that is not answered yet
    has_been_heard: bool = False  # since its process was started
    num_steps: int = -1
    node: str = ""
    busy_share: float | None = None  # of its last shard
    num_clips_waiting: int = 0
    # In the driver's waking time:
    asked_s: float = 0.0
    heard_s: float = 0.0
    stepped_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What actors must have, as far as it is known: of `WorkerFacts.decides_bytes`, and whose it is.

    `is_binding` is False of what they should have, and need not where none of them has it.
    """

    whose: str
    facts: Mapping[str, object]
    is_binding: bool

    def differing(self, facts: WorkerFacts) -> list[str]:
        """What of an actor is not as wanted, in words."""
        return [what for what, found in facts.decides_bytes.items() if self.facts.get(what, found) != found]


def _wanted(stored: DatasetManifest | None, config: JobConfig) -> _Wanted:
    """What the first actor must have: what the output was begun with, else it should have what the driver has."""
    if stored is not None:
        return _Wanted("the output", wanted_of_workers(stored), is_binding=True)
    here: dict[str, object] = {"decoders": decoder_versions()}
    weights_sha256 = cvvae.weights_sha256_here(config.encoding.model, config.encoding.subfolder)
    return _Wanted(
        "the driver", here | ({} if weights_sha256 is None else {"model weights": weights_sha256}), is_binding=False
    )


class _Pool:
    """The encoder actors of a run."""

    def __init__(
        self,
        config: JobConfig,
        num_shards: int,
        inherited: Mapping[str, str],
        progress: Progress,
        metrics: RunMetrics,
    ) -> None:
        num_gpus = gpus_per_actor(config.run.gpus_per_actor)
        device_type = "cuda" if num_gpus else "cpu"
        num_cpus = config.encoding.cpus_on(device_type)
        fitting = num_places(num_cpus, num_gpus)
        if fitting == 0:
            progress.say(
                "wait", f"no node has {num_cpus} CPUs and {num_gpus:g} GPUs free for an actor; waiting for one"
            )
        num_actors = min(config.run.num_actors or max(1, fitting), num_shards)
        self._place = num_cpus, num_gpus
        self._options: dict[str, Any] = {
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "max_restarts": -1,
            "max_task_retries": 0,
            # Beside shards: start or stop, beats, and shards that the driver took for lost with an actor that lived.
            "max_concurrency": 2 * _SHARDS_PER_ACTOR + 2,
            # The workers that Ray starts beforehand serve only actors without an environment of their own.
            "runtime_env": {}
            if num_gpus or CPU_ENVIRONMENT.items() <= inherited.items()
            else {"env_vars": CPU_ENVIRONMENT},
        }
        self._crew = crew_in_words(num_actors, num_cpus, num_gpus)
        self._progress = progress
        self._metrics = metrics
        self._run = config.run
        self._has_been_ready = False
        self._wanted = _Wanted("nobody", {}, is_binding=False)
        self._odd: list[tuple[_Slot, WorkerFacts]] = []
        self._awake_s = 0.0
        self._looked_s = self._fitted_s = time.monotonic()
        self._config = config
        self._device_type = device_type
        # Names are shown by Ray's dashboard, and must differ from those of other runs there.
        self._name = f"latentmill {config.run.output.rstrip('/').rpartition('/')[2]} {uuid4().hex[:6]}"
        self._num_made = self._num_unusable = 0
        self.slots: list[_Slot] = []
        self.starting: dict[Any, _Slot] = {}
        for _ in range(num_actors):
            self._add()

    def _add(self) -> _Slot:
        index = self._num_made
        self._num_made += 1
        actor = ray.remote(EncodeActor).options(name=f"{self._name} encoder {index}", **self._options)
        handle = actor.remote(self._config, str(index), self._device_type)
        slot = _Slot(index, handle)
        self.slots.append(slot)
        self._start(slot)
        return slot

    def fit(self, num_waiting: int) -> None:
        """Follows the cluster where the number of actors is "auto": new nodes get actors, lost ones are given up.

        Args:
            num_waiting: shards that nobody holds.
        """
        if self._run.num_actors is not None or time.monotonic() - self._fitted_s < _FIT_S:
            return
        self._fitted_s = time.monotonic()
        try:
            fitting = max(1, num_places(*self._place))
        except RayError:
            return  # Ray's head does not answer: its clients end the run when it stays away
        for slot in [
            slot for slot in self.slots if not slot.is_ready and (slot.has_been_ready or slot.num_failed_starts)
        ]:
            if len(self.slots) > fitting:
                self._progress.say("actor", f"encoder {slot.index} has no place any more: its node is gone")
                self._drop(slot)
        # A place whose actor was given up is still free, and the next actor would fail there too.
        for _ in range(min(fitting - self._num_unusable - len(self.slots), num_waiting)):
            slot = self._add()
            self._progress.say("actor", f"encoder {slot.index} joins: the cluster has room for {fitting}")

    def crew(self) -> Crew:
        """The encoders of now."""
        ready = [slot for slot in self.slots if slot.is_ready]
        shares = [slot.busy_share for slot in ready if slot.busy_share is not None]
        return Crew(
            num_encoders=len(self.slots),
            num_encoders_ready=len(ready),
            num_nodes=len({slot.node for slot in ready}),
            encoder_busy_share=sum(shares) / len(shares) if shares else None,
            num_clips_waiting=sum(slot.num_clips_waiting for slot in ready),
        )

    def start(self, interrupt: _Interrupt, wanted: _Wanted) -> WorkerFacts | None:
        """Waits for the first actor that is as wanted; the others join as they come up. None after an interrupt.

        Where none can be what binds, the facts of the last, for `_open_output` to refuse. Where none is as it should
        be, those are used of which there are most.

        Raises:
            UsageError: the model cannot be loaded.
            LatentmillError: the actor cannot work on this installation.
        """
        self._wanted = wanted
        began = time.monotonic()
        odd_since: float | None = None
        is_late = False
        while not interrupt.is_set:
            for slot, why in self.hanging():
                self._progress.say("hanging", f"encoder {slot.index} {why} and is started anew")
                self.end_hanging(slot)
            ready, _ = ray.wait(list(self.starting), timeout=_POLL_S)
            facts = self.admit(ready[0]) if ready else None
            if self._odd:
                odd_since = odd_since or time.monotonic()
                if not self.starting or time.monotonic() - odd_since > _PATIENCE_S:
                    facts = self._admit_most()
            if facts is not None:
                self._progress.say("start", f"{self._crew} each, {facts.device_name}, model {facts.model.model}")
                return facts
            if not is_late and time.monotonic() - began > _PATIENCE_S:
                is_late = True
                self._progress.say("wait", f"still waiting for {self._crew}; the cluster has {resources_in_words()}")
        return None

    def admit(self, started: Any) -> WorkerFacts | None:
        """Takes an actor whose start has ended into service; None if that failed, and it is started anew or given up.

        Raises:
            LatentmillError: the first start of all failed, or no actor is left.
        """
        slot = self.starting.pop(started)
        try:
            facts: WorkerFacts = ray.get(started)
        except RayTaskError as error:
            if not self._has_been_ready:
                raise error.cause from error
            # A lost GPU, a node without the model: no reason to end what others do well.
            slot.num_failed_starts += 1
            slot.num_start_errors += 1
            if slot.num_start_errors >= _MAX_FAILED_STARTS:
                self._give_up(slot, _no_start(slot, error.cause))
            else:
                self._progress.say("actor", f"encoder {slot.index} cannot start: {_message(error.cause)}")
                ray.kill(slot.handle, no_restart=False)
                self._start(slot)
            return None
        except RayActorError as error:
            slot.num_failed_starts += 1
            # Dead for good is an actor whose constructor failed; one that Ray starts again answers so for a while. So
            # does one whose node went before it was ready, until Ray knows of that and `fit` drops it.
            is_returning = slot.has_been_ready or slot.has_been_killed or slot.num_start_errors
            is_returning = is_returning or (self._has_been_ready and isinstance(error, ActorUnavailableError))
            limit = _MAX_FAILED_RETURNS if is_returning else _MAX_FAILED_STARTS
            if isinstance(error, ActorDiedError) or slot.num_failed_starts >= limit:
                self._give_up(slot, _no_start(slot, error))
            else:
                if slot.num_failed_starts % _TOLD_RETURNS == 1:
                    self._progress.say("actor", f"encoder {slot.index} does not answer yet: {in_short(error)}")
                self._start(slot)
            return None
        # A sign of life: one that freezes before its first beat must not be taken for one that waits for a place.
        slot.has_been_heard, slot.heard_s = True, self._awake_s
        slot.num_failed_starts = slot.num_start_errors = 0
        differing = self._wanted.differing(facts)
        if not differing:
            return self._take_in(slot, facts)
        if not self._wanted.is_binding:
            self._odd.append((slot, facts))
        elif not self._has_been_ready and (len(self.slots) == 1 or "device" in differing):
            return facts  # no other will do: they are gone, or of the same device
        else:
            self._leave_out(slot, facts)
        return None

    def _take_in(self, slot: _Slot, facts: WorkerFacts) -> WorkerFacts:
        """Takes an actor into service; from the first one on all must be like it."""
        if not self._has_been_ready:
            self._wanted = _Wanted(f"node {facts.node}", facts.decides_bytes, is_binding=True)
        slot.is_ready = slot.has_been_ready = self._has_been_ready = True
        slot.node = facts.node
        if facts.compile_error is not None:
            self._progress.say("actor", f"encoder {slot.index} is not compiled (--compile): {facts.compile_error}")
        if facts.cuda_graphs_error is not None:
            self._progress.say(
                "actor", f"encoder {slot.index} runs without CUDA graphs (--cuda-graphs): {facts.cuda_graphs_error}"
            )
        odd, self._odd = self._odd, []
        for other, found in odd:
            if self._wanted.differing(found):
                self._leave_out(other, found)
            else:
                self._take_in(other, found)
        return facts

    def _admit_most(self) -> WorkerFacts:
        """Takes those odd actors into service that most are like."""
        kinds = [fingerprint_of(facts.decides_bytes) for _, facts in self._odd]
        slot, facts = self._odd.pop(kinds.index(Counter(kinds).most_common(1)[0][0]))
        differing = " and ".join(self._wanted.differing(facts))
        self._progress.say(
            "actor", f"no encoder has the {differing} of {self._wanted.whose}; used are those of node {facts.node}"
        )
        return self._take_in(slot, facts)

    def _leave_out(self, slot: _Slot, facts: WorkerFacts) -> None:
        self._give_up(
            slot,
            f"encoder {slot.index} on node {facts.node} is not used: its {' and '.join(self._wanted.differing(facts))} "
            f"differ from those of {self._wanted.whose}; give every node the same installation and model",
        )

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
        slot.beat, slot.has_been_heard = None, False
        slot.asked_s = slot.heard_s = slot.stepped_s = self._awake_s

    def hanging(self) -> list[tuple[_Slot, str]]:
        """Actors that do not answer any more, or hold shards and make no step, each with what is to be said of it."""
        now = time.monotonic()
        self._awake_s += min(now - self._looked_s, _LONGEST_LOOK_S)
        self._looked_s = now
        for slot in self.slots:
            self._listen(slot)
        return [(slot, why) for slot in self.slots if (why := self._why_hanging(slot)) is not None]

    def _listen(self, slot: _Slot) -> None:
        if slot.beat is not None and ray.wait([slot.beat], timeout=0)[0]:
            with suppress(RayError):  # of a death its shards, or its start, will tell
                beat: Beat = ray.get(slot.beat)
                slot.has_been_heard, slot.heard_s = True, self._awake_s
                if beat.num_steps != slot.num_steps or not slot.held:
                    slot.num_steps, slot.stepped_s = beat.num_steps, self._awake_s
                slot.num_clips_waiting = beat.num_clips_waiting
                self._metrics.set("latentmill_decode_backlog_clips", beat.num_clips_waiting, actor=str(slot.index))
                _follow_store_errors(
                    self._metrics, str(slot.index), beat.num_store_errors_repeated, beat.num_store_errors_given_up
                )
            slot.beat = None
        if slot.beat is None and self._awake_s - slot.asked_s >= _BEAT_S:
            slot.asked_s = self._awake_s
            slot.beat = slot.handle.beat.remote()

    def _why_hanging(self, slot: _Slot) -> str | None:
        silent_s, idle_s = self._awake_s - slot.heard_s, self._awake_s - slot.stepped_s
        # An actor that was never heard may wait for a place on a node, or for the start of its process.
        silence_s = self._run.silence_timeout_s if slot.has_been_heard else self._run.stall_timeout_s
        if silent_s > silence_s:
            return f"did not answer for {silent_s:.0f} s (--silence-timeout-s {silence_s:g})"
        if slot.held and idle_s > self._run.stall_timeout_s:
            return f"made no step for {idle_s:.0f} s (--stall-timeout-s {self._run.stall_timeout_s:g})"
        return None

    def end_hanging(self, slot: _Slot) -> None:
        """Kills an actor that hangs, and starts it anew; Ray kills by SIGKILL where asking does not help."""
        if slot.is_ready:
            self.restart(slot, kill=True)
        else:
            slot.has_been_killed = True
            ray.kill(slot.handle, no_restart=False)
            slot.beat, slot.has_been_heard, slot.heard_s = None, False, self._awake_s

    def _give_up(self, slot: _Slot, message: str) -> None:
        self._progress.say("actor", f"{message}; going on without it")
        self._num_unusable += 1
        self._drop(slot)
        if not self.slots:
            raise _HopelessError(f"{message}. No encoder is left; what is committed stays, the same command goes on")

    def _drop(self, slot: _Slot) -> None:
        self.slots.remove(slot)
        self.starting = {start: other for start, other in self.starting.items() if other is not slot}
        ray.kill(slot.handle)

    def stop(self) -> None:
        """Lets every actor clean up, then ends it."""
        ray.wait([slot.handle.stop.remote() for slot in self.slots], num_returns=len(self.slots), timeout=_STOP_S)
        for slot in self.slots:
            ray.kill(slot.handle)


def _no_start(slot: _Slot, error: BaseException) -> str:
    return f"encoder {slot.index} could not be started {slot.num_failed_starts} times: {in_short(error)}"


def _follow_store_errors(metrics: RunMetrics, source: str, num_repeated: int, num_given_up: int) -> None:
    metrics.follow("latentmill_store_errors_total", source, num_repeated, outcome="repeated")
    metrics.follow("latentmill_store_errors_total", source, num_given_up, outcome="given_up")


class _Search:
    """Finds the one video of a shard that kills its worker: halves are tried, then that video alone.

    Deaths that have other causes lead it astray. Then the last video does not kill, or, where everything kills, nothing
    ever survives: no video is blamed.

    Attributes:
        has_survived: a part in which a video was touched killed nobody.
    """

    def __init__(self) -> None:
        self.num_errors = 0
        self.has_survived = False
        self._num_videos = 0
        self._low = 0
        self._high: int | None = None
        self._num_deaths_alone = 0

    def next_part(self) -> range:
        """The places of the videos to try next; the first time none, to learn how many there are."""
        if self._high is None:
            return range(0)
        if self.suspect is not None:
            return range(self._low + 1, self._num_videos)
        return range(self._low, max(self._low + 1, (self._low + self._high) // 2))

    @property
    def suspect(self) -> int | None:
        """The place of the video that killed alone, often enough; the next part is then the rest of the shard."""
        return self._low if self._num_deaths_alone == _NUM_CONFIRMATIONS else None

    def note_death(self) -> None:
        """The last part killed its worker.

        Raises:
            _NotFoundError: the shard cannot even be read without a death, or every part of it kills.
        """
        part = self.next_part()
        if self._high is None or self.suspect is not None:
            raise _NotFoundError
        if self._high - self._low > 1:
            self._high = part.stop
        else:
            self._num_deaths_alone += 1

    def note_survival(self, num_videos: int, untouched: Set[int] = frozenset()) -> None:
        """The last part killed nobody; the shard has so many videos, of which some are not touched any more.

        Raises:
            _NotFoundError: no video is left that could be the one.
        """
        part = self.next_part()
        self.has_survived = self.has_survived or bool(set(part) - untouched)
        if self.suspect is not None:
            return
        if self._high is None:
            self._num_videos = self._high = num_videos
        elif self._high - self._low > 1:
            self._low = part.stop
        else:
            raise _NotFoundError
        if self._low == self._high:
            raise _NotFoundError


class _NotFoundError(Exception):
    """No single video of a shard kills its worker."""


@dataclass(frozen=True, slots=True)
class _Task:
    """A call that an actor has been given; `part` for a probe, None for an attempt at the whole shard."""

    spec: ShardSpec
    slot: _Slot
    part: range | None


class _Waiting:
    """The shards that nobody holds, in the order in which they are handed out: first come those that never were."""

    def __init__(self, todo: Sequence[ShardSpec]) -> None:
        self._todo = todo
        self._fresh = deque([range(len(todo))])  # places in it
        self._first: deque[ShardSpec] = deque()
        self._back: deque[ShardSpec] = deque()

    def __len__(self) -> int:
        return len(self._first) + sum(map(len, self._fresh)) + len(self._back)

    def first(self) -> Sequence[ShardSpec]:
        """Those that an actor may choose from."""
        while len(self._first) < _LOOK_AHEAD and self._fresh:
            places = self._fresh.popleft()
            if places:
                self._first.append(self._todo[places[0]])
                self._fresh.appendleft(places[1:])
        while len(self._first) < _LOOK_AHEAD and self._back:
            self._first.append(self._back.popleft())
        return self._first

    def take(self, spec: ShardSpec) -> None:
        """Somebody holds one of the first."""
        self._first.remove(spec)

    def put_back(self, spec: ShardSpec) -> None:
        """Nobody holds it any more."""
        self._back.append(spec)

    def turn(self) -> None:
        """Brings those to the front that stand half the way from here."""
        self._back.extendleft(reversed(self._first))
        self._first.clear()
        num_left = sum(map(len, self._fresh)) // 2
        while num_left:
            places = self._fresh.popleft()
            self._fresh.append(places[:num_left])
            if places[num_left:]:
                self._fresh.appendleft(places[num_left:])
            num_left -= len(places[:num_left])
        if not self._fresh:
            self._back.rotate(-(len(self._back) // 2))


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
        config: JobConfig,
    ) -> None:
        self._config = config
        self._pool = pool
        self._manifest = manifest
        self._ledger = ledger
        self._interrupt = interrupt
        self._progress = progress
        self._store = store
        self._trimmer = MemoryTrimmer()
        self._max_attempts = ledger.max_attempts
        self._waiting = _Waiting(ledger.todo)
        self._running: dict[Any, _Task] = {}
        self._attempts: Counter[str] = Counter()
        # Shards that were held by an actor when it died. Each goes alone from then on: of two that were held only one
        # killed it, and the other must not spend its attempts in that company.
        self._suspects: set[str] = set()
        self._failed_on: dict[str, int] = {}  # shard id -> actor of its last attempt
        self._searches: dict[str, _Search] = {}
        self._poison: dict[str, frozenset[int]] = {}
        self._failed_in_a_row: set[str] = set()
        self._num_deaths_in_a_row = 0
        self._last_failure = ""
        # Shards of which a video was encoded, all of them and before the first death of a shard: workers that encode
        # others are sound.
        self._num_encoded = 0
        self._num_encoded_before: dict[str, int] = {}

    def until_decided(self) -> None:
        """Runs to the end, or until going on makes no sense; then the shards that are left are undone.

        Raises:
            UsageError: the model or the configuration is wrong.
            StorageError: an actor committed where this process cannot see it.
        """
        self._ledger.begin()
        try:
            self._work()
        except _HopelessError as error:
            self._progress.say("stop", str(error))
            self._ledger.give_up(str(error))
        self._progress.show(self._ledger.standing(len(self._running), self._pool.crew()), is_last=True)
        # What was put back in place has no record of its own.
        unseen = self._ledger.unseen(record_names(self._store))
        if unseen:
            raise StorageError(
                f"{len(unseen)} shards (such as {min(unseen)}) were committed by an actor but are not seen from the "
                f"driver at {self._store.root_uri}: every node must reach the same storage; use s3:// or a shared disk"
            )

    def _work(self) -> None:
        last_snapshot = 0
        looked_s = float("-inf")
        while not self._interrupt.is_set and self._ledger.num_left:
            why_hopeless = self._why_hopeless()
            if why_hopeless is None:
                self._hand_out()
            elif not self._running:
                raise _HopelessError(why_hopeless)
            self._take_back(_POLL_S)
            num_new = self._ledger.num_done - last_snapshot
            if num_new >= max(_SNAPSHOT_EVERY, _SNAPSHOT_GROWTH * self._ledger.num_decided):
                _publish(self._store, self._config)
                last_snapshot = self._ledger.num_done
                give_memory_back()
            self._trimmer.trim_if_due()
            # All actors are looked at, so not for every shard that one of a thousand returns.
            if time.monotonic() - looked_s < _LOOK_S:
                continue
            for slot, why in self._pool.hanging():
                self._end_hanging(slot, why)
            self._pool.fit(len(self._waiting))
            self._progress.show(self._ledger.standing(len(self._running), self._pool.crew()))
            looked_s = time.monotonic()
        if self._interrupt.is_set:
            self._progress.say("interrupt", "interrupted: ending what is about to be committed; again to stop at once")
            deadline = time.monotonic() + self._config.run.grace_s
            while self._running and time.monotonic() < deadline:
                self._take_back(_POLL_S)

    def _why_hopeless(self) -> str | None:
        if len(self._failed_in_a_row) >= _MAX_FAILED_IN_A_ROW:
            what = f"{len(self._failed_in_a_row)} shards in a row failed"
        elif self._num_deaths_in_a_row >= _MAX_DEATHS_IN_A_ROW + _MAX_DEATHS_PER_ACTOR * len(self._pool.slots):
            what = f"{self._num_deaths_in_a_row} attempts in a row killed their worker"
        else:
            return None
        return (
            f"{what} and none succeeded, so the run stops; what is committed stays, the same command goes on. The last "
            f"error: {self._last_failure}"
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
        self._waiting.take(spec)
        slot.held.add(spec.shard_id)
        poison = self._poison.get(spec.shard_id, frozenset())
        search = self._searches.get(spec.shard_id)
        if search is None:
            # Without a name of its own: Ray keeps metrics of each name in driver and actor for as long as they live.
            self._running[slot.handle.process.remote(spec, self._manifest, poison)] = _Task(spec, slot, None)
        else:
            part = search.next_part()
            reference = slot.handle.probe.remote(spec, self._manifest, part, poison)
            self._running[reference] = _Task(spec, slot, part)
        self._note_depth(slot)

    def _next_for(self, slot: _Slot) -> ShardSpec | None:
        """The first waiting shard that this actor may take; one that failed there goes elsewhere if it can."""
        for spec in self._waiting.first():
            if self._failed_on.get(spec.shard_id) == slot.index and self._has_others(slot):
                continue
            if slot.held and self._suspects & {spec.shard_id, *slot.held}:
                continue
            return spec
        return None

    def _has_others(self, slot: _Slot) -> bool:
        return any(other.is_ready for other in self._pool.slots if other is not slot)

    def _note_depth(self, slot: _Slot) -> None:
        self._ledger.metrics.set("latentmill_queue_depth", len(slot.held), actor=str(slot.index))

    def _take_back(self, timeout_s: float) -> None:
        pending = [*self._running, *self._pool.starting]
        # All that are there, or else the first that comes.
        ready = ray.wait(pending, num_returns=len(pending), timeout=0)[0] or ray.wait(pending, timeout=timeout_s)[0]
        for reference in ready:
            self._take(reference)

    def _take(self, reference: Any) -> None:
        if reference in self._pool.starting:
            self._pool.admit(reference)
            return
        task = self._running.pop(reference)
        spec, slot = task.spec, task.slot
        slot.held.discard(spec.shard_id)
        self._note_depth(slot)
        try:
            found = ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, UsageError | ConfigMismatchError):
                raise error.cause from error
            slot.num_failed_shards += 1
            if slot.num_failed_shards >= _MAX_FAILED_SHARDS:
                self._pool.restart(slot, kill=True)
            self._note_error(task, _message(error.cause))
        except RayActorError as error:
            # One that is only out of reach would go on with what it holds, beside what it is given next.
            self._pool.restart(slot, kill=isinstance(error, ActorUnavailableError))
            self._note_death(task, f"the worker process died: {in_short(error)}")
        else:
            slot.num_failed_shards = 0
            self._failed_in_a_row.clear()
            if task.part is None or task.part:
                self._num_deaths_in_a_row = 0
            if task.part is None:
                self._num_encoded += found.counts.num_records > 0
                slot.busy_share = found.busy_share
                self._ledger.add(spec, found, slot.index)
            else:
                self._note_survival(task, found)

    def _end_hanging(self, slot: _Slot, why: str) -> None:
        """Gives the shards of an actor that hangs to others; what it may still commit is decided at the store."""
        message = f"encoder {slot.index} {why} and was killed"
        self._progress.say("hanging", message)
        self._ledger.metrics.add("latentmill_actors_hanging_total")
        self._pool.end_hanging(slot)
        for reference in [reference for reference, task in self._running.items() if task.slot is slot]:
            task = self._running.pop(reference)
            slot.held.discard(task.spec.shard_id)
            self._suspects.add(task.spec.shard_id)
            self._note_error(task, message)
        self._note_depth(slot)

    def _note_error(self, task: _Task, message: str) -> None:
        """An attempt ended without a death by itself: in an error, or in a deadline, which no video is blamed for."""
        self._last_failure = message
        if task.spec.shard_id not in self._failed_in_a_row:
            self._failed_in_a_row.add(task.spec.shard_id)
            if len(self._failed_in_a_row) == _MAX_FAILED_IN_A_ROW // 2:
                # Bad shards may stand side by side in the plan: others are asked before all is held for hopeless.
                self._waiting.turn()
        search = self._searches.get(task.spec.shard_id)
        if search is None:
            self._try_again(task, message, is_death=False)
        else:
            search.num_errors += 1
            self._failed_on[task.spec.shard_id] = task.slot.index
            if search.num_errors < self._max_attempts:
                self._waiting.put_back(task.spec)
            else:
                self._leave_undone(task.spec, f"the search for the video that kills the worker failed: {message}")

    def _note_death(self, task: _Task, message: str) -> None:
        shard_id = task.spec.shard_id
        self._suspects.add(shard_id)
        self._num_encoded_before.setdefault(shard_id, self._num_encoded)
        self._num_deaths_in_a_row += 1
        self._last_failure = message
        search = self._searches.get(shard_id)
        if search is None or task.part is None:
            self._try_again(task, message, is_death=True)
            return
        self._ledger.note_failed_attempt()
        self._failed_on[shard_id] = task.slot.index
        try:
            search.note_death()
        except _NotFoundError:
            self._give_up_search(task.spec, message)
        else:
            self._search_on(task.spec, search, message)

    def _note_survival(self, task: _Task, num_videos: int) -> None:
        search = self._searches[task.spec.shard_id]
        search.num_errors = 0
        message = f"the worker process died {self._max_attempts} times"
        try:
            search.note_survival(num_videos, self._poison.get(task.spec.shard_id, frozenset()))
        except _NotFoundError:
            self._give_up_search(task.spec, message)
        else:
            self._search_on(task.spec, search, message)

    def _search_on(self, spec: ShardSpec, search: _Search, message: str) -> None:
        """Rejects the video that is found, once other videos have been encoded: a broken worker dies of every one."""
        shard_id, place = spec.shard_id, search.suspect
        if place is None:
            self._waiting.put_back(spec)
        elif search.has_survived or self._num_encoded > self._num_encoded_before[shard_id]:
            del self._searches[shard_id]
            self._poison[shard_id] = self._poison.get(shard_id, frozenset()) | {place}
            self._attempts[shard_id] = 0
            self._progress.say(
                "poison", f"shard {shard_id}: video {place} (from 0) kills the worker every time, rejected"
            )
            self._waiting.put_back(spec)
        elif not self._poison.get(shard_id, frozenset()).issuperset(search.next_part()):
            self._waiting.put_back(spec)
        else:
            self._give_up_search(spec, message)

    def _give_up_search(self, spec: ShardSpec, message: str) -> None:
        del self._searches[spec.shard_id]
        self._leave_undone(spec, f"{message}; it is not certain that a single video of the shard does it")

    def _try_again(self, task: _Task, message: str, *, is_death: bool) -> None:
        shard_id = task.spec.shard_id
        self._failed_on[shard_id] = task.slot.index
        self._attempts[shard_id] += 1
        self._ledger.note_failed_attempt()
        attempt = f"attempt {self._attempts[shard_id]} of {self._max_attempts}"
        if self._attempts[shard_id] < self._max_attempts:
            self._progress.say("retry", f"shard {shard_id}: {attempt} failed and is repeated: {message}")
            self._waiting.put_back(task.spec)
        elif is_death and task.spec.redo is None and len(self._poison.get(shard_id, ())) < _MAX_POISON:
            self._progress.say("search", f"shard {shard_id}: {attempt} failed; looking for the video: {message}")
            self._searches[shard_id] = _Search()
            self._waiting.put_back(task.spec)
        else:
            self._leave_undone(task.spec, f"{attempt} failed: {message}")

    def _leave_undone(self, spec: ShardSpec, message: str) -> None:
        self._progress.say("undone", f"shard {spec.shard_id} is left undone: {message}")
        self._ledger.undone[spec.shard_id] = message


def _message(error: BaseException) -> str:
    return str(error) if isinstance(error, LatentmillError) else f"{type(error).__name__}: {error}"
