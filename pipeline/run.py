"""The driver of a run: plans shards, hands them to actors, counts attempts, publishes, and says how it ended.

Not where anything is encoded. Nothing that it holds is needed to go on after it dies: what is done stands in the commit
records of the output, and the same command again does the rest. `jobs/encode_laion.py` calls `run`.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from types import FrameType
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from pipeline.actors import EncodeActor, ShardReport, WorkerFacts
from pipeline.commit import (
    check_store,
    committed_ids,
    fingerprint_of,
    open_dataset,
    publish_snapshot,
    read_manifest,
)
from pipeline.config import JobConfig
from pipeline.errors import ConfigMismatchError, DecodeChildError, LatentmillError, UsageError
from pipeline.format import FORMAT_VERSION
from pipeline.metrics import RunMetrics
from pipeline.plan import infer_passthrough, plan_shards
from pipeline.progress import Progress, RateMeter, Standing
from pipeline.records import DatasetManifest, ShardCounts, ShardSpec
from pipeline.storage import ObjectStore, open_store

EXIT_OK, EXIT_USAGE, EXIT_MISMATCH, EXIT_UNDONE, EXIT_REJECTED, EXIT_INTERRUPTED = 0, 2, 3, 4, 5, 130
# Raised when the meaning of stored bytes changes with the code and not with the configuration.
RESULT_VERSION = 1
_SHARDS_PER_ACTOR = 2
_POLL_S = 0.5
_GRACE_S = 10.0
_SNAPSHOT_EVERY = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """How a run ended; the job prints it as its last line."""

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


@contextmanager
def _interrupts() -> Iterator[_Interrupt]:
    interrupt = _Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
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
    if config.run.retry_failed:
        raise UsageError("--retry-failed is not available in this version; rejections stay recorded as they are")
    store = open_store(config.run.output)
    _refuse_other_configuration(store, config)
    specs = list(plan_shards(config.source, store)) if not config.run.dry_run else _dry_plan(config)
    decided = committed_ids(store)
    todo = [spec for spec in specs if spec.shard_id not in decided]
    if config.source.limit is not None:
        todo = todo[: config.source.limit]
    num_before = len(specs) - sum(spec.shard_id not in decided for spec in specs)
    progress.say("plan", f"{len(specs)} shards planned, {num_before} decided before, {len(todo)} to do")
    ledger = _Ledger(todo, num_before, started, config, metrics)
    if config.run.dry_run:
        return ledger.summary(EXIT_OK, None)
    if not todo:
        return ledger.summary(EXIT_OK, publish_snapshot(store).number if specs else None)
    check_store(store, config.run.single_writer)
    with _interrupts() as interrupt, _ray(config, progress):
        pool = _Pool(config, progress)
        try:
            manifest = _open_output(store, config, pool.start(), specs)
            if not manifest.model.is_trained:
                progress.say("untrained", f"the model {manifest.model.model!r} is untrained: latents carry no quality")
            _dispatch(pool, manifest, ledger, interrupt, progress, store)
        finally:
            pool.stop()
    snapshot = publish_snapshot(store).number
    code = EXIT_INTERRUPTED if interrupt.is_set else ledger.exit_code()
    progress.show(ledger.standing(0), is_last=True)
    return ledger.summary(code, snapshot, manifest.model.is_trained)
