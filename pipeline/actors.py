"""The Ray actor that holds an encoder: one shard in, one committed shard out, the next one decoding meanwhile.

Not where shards are chosen or attempts counted (that is `run`), and not where bytes are decided (`decode`, `codec`,
`format`). Only small messages cross Ray: a ShardSpec in, a ShardReport out; no pixels, no latents.

Two calls of `process` may run in one actor. Each starts to decode at once, into a bounded queue; an encoder that is
free takes the shards in the order in which they came. So while one shard is encoded the next is fetched and decoded,
and while one is uploaded and committed the next is encoded: the encoder does not wait at a border between shards.

Ray tells nobody of an actor that is frozen or hangs, so an actor counts its steps, and the driver watches the number.
"""

from __future__ import annotations

import errno
import os
import platform
import queue
import resource
import shutil
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pipeline
from pipeline.columns import ColumnsManifest, SetName
from pipeline.commit import commit_shard, put_written_file, read_commit
from pipeline.committed import FileCache
from pipeline.conditions import ConditionEncoders, ShardConditions, fingerprint_fields
from pipeline.config import JobConfig
from pipeline.decode import DecodePool, decoder_versions
from pipeline.errors import DecodeChildError, StorageError, UsageError
from pipeline.format import FORMAT_VERSION, ShardWriter, WrittenFile
from pipeline.inputs import FoundVersions
from pipeline.memory import MemoryTrimmer
from pipeline.quality import Inspection, ShardQuality
from pipeline.records import (
    Clip,
    ClipFailure,
    Commit,
    DatasetManifest,
    FileStat,
    LatentRecord,
    ModelFacts,
    ShardCounts,
    ShardSpec,
    SourceVideo,
)
from pipeline.redo import Begun, begin, finish
from pipeline.scratch import Scratch
from pipeline.source import iterate_videos
from pipeline.storage import ObjectStore, allow_web_inputs, open_store
from pipeline.store import Steps, StoreErrors

if TYPE_CHECKING:  # the driver, which knows the class by its name, has no use for torch
    from pipeline.codec import ClipEncoder

# Clips decoded ahead of the encoder, per shard in flight: enough to hide a slow video, bounded whatever the bucket.
_CLIPS_AHEAD_BYTES = 256 << 20
# Files of earlier generations that are read when a shard is encoded again.
_COMMITTED_BYTES = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFacts:
    """What an actor says of itself once its model is loaded."""

    model: ModelFacts
    columns: Mapping[SetName, ColumnsManifest]  # of the encoders of captions and first frames
    device_type: str
    device_name: str
    decoders: Mapping[str, str]
    sandbox: Mapping[str, object]
    versions: Mapping[str, str]
    node: str
    pid: int
    is_compiled: bool = False
    compile_error: str | None = None  # why not, where it was asked for
    cuda_graphs_error: str | None = None  # likewise

    @property
    def decides_bytes(self) -> dict[str, object]:
        """What must be the same on every node, in words: with anything else a clip gets other bytes."""
        return {
            "model weights": self.model.weights_sha256,
            "device": self.device_type,
            "torch.compile": self.is_compiled,
            "decoders": dict(self.decoders),
            **fingerprint_fields(self.columns),
        }


def wanted_of_workers(manifest: DatasetManifest) -> dict[str, object]:
    """What the workers of an output must have, by the words of `WorkerFacts.decides_bytes`."""
    fixed = manifest.fingerprint_fields
    return {
        **fixed,
        "model weights": manifest.model.weights_sha256,
        "device": fixed["device_type"],
        "torch.compile": fixed.get("compile", False),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """A sign of life of an actor, with what its process counts besides."""

    num_steps: int
    num_store_errors_repeated: int
    num_store_errors_given_up: int
    num_clips_waiting: int = 0  # decoded, and not yet taken by the encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    """What became of a shard: the outcome at the commit point and what the driver counts."""

    shard_id: str
    outcome: str  # metrics.COMMIT_OUTCOMES
    counts: ShardCounts
    num_bytes_in: int
    num_bytes_out: int
    timings_s: Mapping[str, float]  # by metrics.STAGES
    busy_share: float  # of the time from the first clip asked for to the last record written
    num_inputs_changed: int = 0  # files of a slice that were not as planned
    num_texts_truncated: int = 0  # texts with more tokens than the encoder takes
    quality: ShardQuality | None = None  # None: nothing was decoded back


class _Account:
    """Counts a shard while it streams past, by the rule of the accounts.

    A failure without a clip index is one rejected video. Every other video is known by its clips, and is ok when at
    least one of them became a record.
    """

    def __init__(self) -> None:
        self.num_videos_rejected = 0
        self.num_records: Counter[str] = Counter()
        self.num_clips_rejected: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.num_frames = 0

    def reject(self, failure: ClipFailure) -> None:
        self.reasons[failure.reason] += 1
        if failure.clip_index is None:
            self.num_videos_rejected += 1
        else:
            self.num_clips_rejected[failure.key] += 1

    def accept(self, record: LatentRecord) -> None:
        self.num_records[record.key] += 1
        self.num_frames += record.bucket.num_frames

    def counts(self) -> ShardCounts:
        cut = self.num_records.keys() | self.num_clips_rejected.keys()
        num_without_record = len(cut - self.num_records.keys())
        num_records, num_rejected = self.num_records.total(), self.num_clips_rejected.total()
        return ShardCounts(
            num_videos=self.num_videos_rejected + len(cut),
            num_videos_ok=len(self.num_records),
            num_videos_rejected=self.num_videos_rejected + num_without_record,
            num_clips=num_records + num_rejected,
            num_records=num_records,
            num_clips_rejected=num_rejected,
            num_frames=self.num_frames,
            reasons=dict(sorted(self.reasons.items())),
        )


class _DecodeAhead:
    """Runs a decode iterator in a thread, at most `_CLIPS_AHEAD_BYTES` of clips ahead of whoever iterates."""

    def __init__(self, clips: Iterator[Clip | ClipFailure], clip_bytes: int) -> None:
        self.decode_s = 0.0
        self.wait_s = 0.0
        self._clips = clips
        self._queue: queue.Queue[Clip | ClipFailure | BaseException | None] = queue.Queue(
            max(2, _CLIPS_AHEAD_BYTES // clip_bytes)
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="decode-ahead", daemon=True)
        self._thread.start()

    def _put(self, entry: Clip | ClipFailure | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(entry, timeout=0.2)
            except queue.Full:
                continue

    def _fill(self) -> None:
        end: BaseException | None = None
        try:
            while not self._stop.is_set():
                started = time.perf_counter()
                clip = next(self._clips, None)
                self.decode_s += time.perf_counter() - started
                Steps.note()
                if clip is None:
                    break
                self._put(clip)
        except BaseException as error:
            end = error
        self._put(end)

    def __iter__(self) -> Iterator[Clip | ClipFailure]:
        while True:
            started = time.perf_counter()
            entry = self._queue.get()
            self.wait_s += time.perf_counter() - started
            if entry is None:
                return
            if isinstance(entry, BaseException):
                raise entry
            yield entry

    @property
    def num_waiting(self) -> int:
        """Clips and failures that are decoded and not taken yet, about."""
        return self._queue.qsize()

    def close(self) -> None:
        """Stops the thread and drops what is decoded; safe after the end and after an error."""
        self._stop.set()
        self._thread.join()
        close = getattr(self._clips, "close", None)
        if close is not None:
            close()


class _Turns:
    """A lock that is granted in the order in which turns were drawn."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._drawn = 0
        self._serving = 0
        self._given_up: set[int] = set()

    def draw(self) -> int:
        with self._condition:
            self._drawn += 1
            return self._drawn - 1

    def wait_for(self, turn: int) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._serving == turn)

    def end(self, turn: int) -> None:
        """Passes the lock on; also for a turn that was never taken."""
        with self._condition:
            if turn >= self._serving:
                self._given_up.add(turn)
            while self._serving in self._given_up:
                self._given_up.remove(self._serving)
                self._serving += 1
            self._condition.notify_all()


class EncodeActor:
    """One encoder on one GPU, a fraction of one, or a group of CPU cores. Wrapped by `ray.remote` in `run`."""

    def __init__(self, config: JobConfig, name: str, device_type: str) -> None:
        allow_web_inputs(config.decode.max_file_bytes if config.source.allow_http else None)
        self._config = config
        self._device_type = device_type
        self._name = name
        self._lock = threading.Lock()
        self._turns = _Turns()
        self._encoder: ClipEncoder | None = None
        self._conditions: ConditionEncoders | None = None
        self._decode_pool: DecodePool | None = None
        self._store: ObjectStore = open_store(config.run.output)
        self._is_stopping = False
        self._ahead: set[_DecodeAhead] = set()
        self._room = _Room()
        self._trimmer = MemoryTrimmer()
        # A core dump would hold credentials, and what others have in their videos.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))

    def __repr__(self) -> str:
        return f"encoder[{self._name}]"

    def start(self) -> WorkerFacts:
        """Loads the models and starts the decode children, once; cheap after that.

        Raises:
            UsageError: a model cannot be loaded, or there is no GPU for an actor that was given one.
            DecodeChildError: decode children cannot be started here.
        """
        with self._lock:
            if self._encoder is None:
                encoding, limits = self._config.encoding, self._config.decode
                num_processes = limits.decode_processes or encoding.cpus_on(self._device_type)
                # Decode children load their libraries while this process loads torch and the models.
                with ThreadPoolExecutor(1) as beside:
                    pool = beside.submit(DecodePool, encoding, limits, num_processes)
                    try:
                        encoder = self._load_models()
                    finally:
                        self._decode_pool = pool.result()
                self._encoder = encoder
        return self._facts()

    def _load_models(self) -> ClipEncoder:
        import torch

        from pipeline.codec import ClipEncoder

        if self._device_type == "cuda" and not torch.cuda.is_available():
            raise UsageError(
                f"Ray gave {self!r} a GPU on {platform.node()}, but torch {torch.__version__} sees none: "
                "install a CUDA build of torch and a driver, or pass --gpus-per-actor 0 to encode on CPU cores"
            )
        encoding, device = self._config.encoding, torch.device(self._device_type)
        cores = encoding.cpus_on(device.type)
        torch.set_num_threads(cores)
        self._conditions = ConditionEncoders(
            self._config.text, self._config.image, self._store, device, encoding.compute_dtype_on(device.type), cores
        )
        return ClipEncoder(encoding, device, cuda_graphs=self._config.run.cuda_graphs)

    def _facts(self) -> WorkerFacts:
        import torch

        assert self._encoder is not None, "start() has not run"
        assert self._decode_pool is not None, "start() has not run"
        assert self._conditions is not None, "start() has not run"
        device = self._encoder.device
        return WorkerFacts(
            model=self._encoder.facts,
            columns=self._conditions.manifests,
            device_type=device.type,
            device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            decoders=decoder_versions(),
            sandbox=self._decode_pool.sandbox_report(),
            # torch gives a string of a type of its own, for which the driver would load torch.
            versions={"latentmill": pipeline.__version__, "torch": str(torch.__version__)},
            node=platform.node(),
            pid=os.getpid(),
            is_compiled=self._config.encoding.compile and self._encoder.compile_error is None,
            compile_error=self._encoder.compile_error,
            cuda_graphs_error=self._encoder.cuda_graphs_error,
        )

    def beat(self) -> Beat:
        """Steps grow with every block, video, clip, record and part of a file, and the pauses of retries.

        Shards in work that never move them hang; an actor that does not even answer is frozen. Store errors come along
        here, because a shard that waits for its store for minutes has no report yet.
        """
        return Beat(
            num_steps=Steps.num_of_process,
            num_store_errors_repeated=StoreErrors.num_repeated,
            num_store_errors_given_up=StoreErrors.num_given_up,
            num_clips_waiting=sum(ahead.num_waiting for ahead in tuple(self._ahead)),
        )

    def process(self, spec: ShardSpec, manifest: DatasetManifest, poison: frozenset[int] = frozenset()) -> ShardReport:
        """Encodes one shard and commits it, or finds that it is committed.

        Args:
            poison: places in the shard, from 0, of videos that kill this process; they are rejected untouched.

        Raises:
            StorageError: input or output could not be read or written, or the temporary folder is full; the shard is
                undecided and may be tried again.
            UsageError: the model cannot be loaded, or this worker differs from the one that opened the dataset.
        """
        turn = self._turns.draw()
        try:
            begun = None
            if spec.redo is not None:
                begun = begin(self._store, spec.redo, self._room.cache)
                if begun is None:
                    return _done_already(spec, _NOTHING)
            else:
                done = read_commit(self._store, spec.shard_id)
                if done is not None:
                    return _done_already(spec, done.counts)
            self._refuse_other_worker(self.start(), manifest)
            return self._attempt(spec, manifest, turn, poison, begun)
        finally:
            self._turns.end(turn)
            self._trimmer.trim_if_due()

    def probe(self, spec: ShardSpec, manifest: DatasetManifest, part: range, poison: frozenset[int]) -> int:
        """Takes the videos at some places of a shard all the way to local files, and keeps nothing.

        The driver looks so for the one video that kills this process.

        Returns:
            the number of videos in the whole shard.

        Raises:
            StorageError: as `process`.
        """
        turn = self._turns.draw()
        try:
            self._refuse_other_worker(self.start(), manifest)
            videos = self._videos(spec, poison, part)
            with self._encoded(spec, manifest, turn, videos):
                return videos.num_videos
        finally:
            self._turns.end(turn)

    def _refuse_other_worker(self, facts: WorkerFacts, manifest: DatasetManifest) -> None:
        """A node with other model files, decoders or device would write other bytes than its neighbours."""
        wanted = wanted_of_workers(manifest)
        for what, found in facts.decides_bytes.items():
            if wanted.get(what) != found:
                raise UsageError(
                    f"the {what} of node {facts.node} are {found!r}, those of the dataset {wanted.get(what)!r}: give "
                    "every node the same installation and model, and a dataset one kind of device"
                )

    def _videos(self, spec: ShardSpec, poison: frozenset[int], part: range | None = None) -> _Videos:
        found = FoundVersions()
        read = iterate_videos(spec, self._store, self._config.encoding, self._config.decode, found)
        return _Videos(read, poison, part, found)

    @contextmanager
    def _encoded(
        self,
        spec: ShardSpec,
        manifest: DatasetManifest,
        turn: int,
        videos: _Videos,
        elsewhere: Set[tuple[str, int]] = frozenset(),
        inspection: Inspection | None = None,
    ) -> Iterator[_Encoded]:
        """A shard as local files, which are gone afterwards; without the samples that stand elsewhere."""
        assert self._decode_pool is not None, "start() has not run"
        largest = max(bucket.num_bytes for bucket in self._config.encoding.buckets)
        with self._room.folder(spec.shard_id) as directory:
            ahead = _DecodeAhead(self._decode_pool.decode(videos), largest)
            self._ahead.add(ahead)
            try:
                self._turns.wait_for(turn)
                encoded = self._encode(spec, manifest, ahead, directory, elsewhere, inspection)
                self._turns.end(turn)
                yield encoded
            finally:
                self._ahead.discard(ahead)
                ahead.close()

    def _attempt(
        self, spec: ShardSpec, manifest: DatasetManifest, turn: int, poison: frozenset[int], begun: Begun | None
    ) -> ShardReport:
        elsewhere: Set[tuple[str, int]] = frozenset()
        if begun is not None:
            spec, elsewhere = replace(spec, redo=replace(begun.redo, keys=begun.keys)), begun.elsewhere
        videos = self._videos(spec, poison)
        inspection = self._inspection(spec)
        with self._encoded(spec, manifest, turn, videos, elsewhere, inspection) as encoded:
            started = time.perf_counter()
            files = () if begun is not None else tuple(self._stored(spec, file) for file in encoded.files)
            uploaded = time.perf_counter()
            if self._is_stopping:
                # Children that this actor itself killed may stand as rejections in what is about to be committed.
                raise DecodeChildError(f"shard {spec.shard_id} was given up because its actor is being stopped")
            commit = _new_commit(spec, manifest, files, encoded.counts, videos.found)
            # The sets first: a shard that is done has its embeddings.
            if begun is None:
                encoded.conditions.commit(files)
                outcome: str = commit_shard(self._store, commit)
            else:
                before_commit = encoded.conditions.commit
                outcome = finish(self._store, begun, commit, encoded.files, self._room.cache, before_commit)
            timings_s = {**encoded.timings_s, "upload": uploaded - started, "commit": time.perf_counter() - uploaded}
            num_bytes_out = sum(file.path.stat().st_size for file in encoded.files)
        return ShardReport(
            shard_id=spec.shard_id,
            outcome=outcome,
            counts=commit.counts,
            num_bytes_in=videos.num_bytes,
            num_bytes_out=num_bytes_out,
            num_inputs_changed=len(videos.found.changes),
            num_texts_truncated=encoded.conditions.num_truncated,
            timings_s=timings_s,
            busy_share=encoded.busy_share,
            quality=None if inspection is None else inspection.found(),
        )

    def _inspection(self, spec: ShardSpec) -> Inspection | None:
        """For attempts alone: a probe looks for a video that kills this process, and a check must never be blamed."""
        if not self._config.run.quality_share:
            return None
        assert self._encoder is not None, "start() has not run"
        return Inspection(self._encoder.decoder(), self._config.run, spec.base_id)

    def _stored(self, spec: ShardSpec, file: WrittenFile) -> FileStat:
        stat = put_written_file(self._store, file, spec.shard_id)
        Steps.note()
        return stat

    def _encode(
        self,
        spec: ShardSpec,
        manifest: DatasetManifest,
        ahead: _DecodeAhead,
        directory: Path,
        elsewhere: Set[tuple[str, int]],
        inspection: Inspection | None,
    ) -> _Encoded:
        assert self._encoder is not None, "start() has not run"
        assert self._conditions is not None, "start() has not run"
        account = _Account()
        conditions = self._conditions.shard(spec.base_id)
        write_s = 0.0
        busy_before_s = self._encoder.busy_s
        encode = self._encoder.encode if inspection is None else inspection.around(self._encoder.encode)
        started = time.perf_counter()
        with ShardWriter(directory, spec.shard_id, manifest, self._config.encoding.format) as writer:
            for entry in encode(conditions.watched(ahead)):
                write_started = time.perf_counter()
                Steps.note()
                if isinstance(entry, ClipFailure):
                    account.reject(entry)
                    writer.reject(entry)
                elif (entry.key, entry.clip_index) not in elsewhere:
                    account.accept(entry)
                    writer.write(entry)
                write_s += time.perf_counter() - write_started
            write_started = time.perf_counter()
            files = writer.finish()
            write_s += time.perf_counter() - write_started
        conditions.write(directory, files)
        encode_s = self._encoder.busy_s - busy_before_s
        check_s = 0.0 if inspection is None else inspection.check_s
        return _Encoded(
            files=files,
            counts=account.counts(),
            conditions=conditions,
            timings_s={
                "decode": ahead.decode_s,
                "wait": ahead.wait_s,
                "encode": encode_s,
                "check": check_s,
                "embed": conditions.embed_s,
                "write": write_s,
            },
            busy_share=(encode_s + check_s) / max(1e-9, time.perf_counter() - started),
        )

    def stop(self) -> None:
        """Ends the decode children and removes the temporary files of this actor."""
        self._is_stopping = True
        if self._decode_pool is not None:
            self._decode_pool.close()
        self._room.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoded:
    """A shard on local disk, before the first byte of it is uploaded."""

    files: tuple[WrittenFile, ...]
    counts: ShardCounts
    conditions: ShardConditions
    timings_s: Mapping[str, float]
    busy_share: float


class _Videos:
    """Passes the videos of a shard on: those of a part, or all but the poison, which becomes rejections. Counts them.

    Args:
        poison: places in the shard of videos that must not be touched.
        part: the places that are asked for; None: all.
    """

    def __init__(
        self,
        videos: Iterator[SourceVideo | ClipFailure],
        poison: frozenset[int],
        part: range | None,
        found: FoundVersions,
    ) -> None:
        self.found = found
        self.num_videos = 0
        self.num_bytes = 0
        self._videos = videos
        self._poison = poison
        self._part = part

    def __iter__(self) -> Iterator[SourceVideo | ClipFailure]:
        for place, video in enumerate(self._videos):
            self.num_videos = place + 1
            Steps.note()
            is_asked_for = self._part is None or place in self._part
            if isinstance(video, ClipFailure):
                if is_asked_for:
                    yield video
            elif not is_asked_for or place in self._poison:
                os.close(video.media_fd)
                if is_asked_for:
                    yield _poisoned(video)
            else:
                self.num_bytes += video.num_bytes
                yield video


def _poisoned(video: SourceVideo) -> ClipFailure:
    return ClipFailure(
        key=video.key,
        clip_index=None,
        step="encode",
        reason="poison",
        message="the worker process died on this video every time, also when it had no other",
        source_uri=video.source_uri,
    )


def _new_commit(
    spec: ShardSpec,
    manifest: DatasetManifest,
    files: tuple[FileStat, ...],
    counts: ShardCounts,
    found: FoundVersions,
) -> Commit:
    return Commit(
        shard_id=spec.base_id,
        generation=0,
        nonce=uuid.uuid4().hex,
        fingerprint=manifest.fingerprint,
        source_uri=spec.source_uri,
        source_size_bytes=spec.source_size_bytes,
        source_etag=spec.source_etag if spec.kind == "tar" else found.digest,
        files=files,
        counts=counts,
        format_version=FORMAT_VERSION,
        code_version=pipeline.__version__,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        source_changes=dict(sorted(found.changes.items())),
    )


_NOTHING = ShardCounts(
    num_videos=0,
    num_videos_ok=0,
    num_videos_rejected=0,
    num_clips=0,
    num_records=0,
    num_clips_rejected=0,
    num_frames=0,
)


def _done_already(spec: ShardSpec, counts: ShardCounts) -> ShardReport:
    return ShardReport(
        shard_id=spec.shard_id,
        outcome="already_done",
        counts=counts,
        num_bytes_in=0,
        num_bytes_out=0,
        timings_s={},
        busy_share=0.0,
    )


class _Room:
    """The temporary files of this process."""

    def __init__(self) -> None:
        self._scratch = Scratch("actor")
        self.path = self._scratch.path
        self.cache = FileCache(self.path / "committed", _COMMITTED_BYTES)

    @contextmanager
    def folder(self, shard_id: str) -> Iterator[Path]:
        """A folder for the files of a shard, gone afterwards.

        Raises:
            StorageError: the disk is full.
        """
        directory: Path | None = None
        try:
            directory = Path(tempfile.mkdtemp(dir=self.path))
            yield directory
        except OSError as error:
            if _is_full(error):
                raise StorageError(
                    f"shard {shard_id}: no space is left in the temporary folder {self.path.parent} of "
                    f"{platform.node()} ({shutil.disk_usage(self.path).free:,} bytes free); make room there, or set "
                    "TMPDIR to a larger disk"
                ) from error
            raise
        finally:
            if directory is not None:
                shutil.rmtree(directory, ignore_errors=True)

    def close(self) -> None:
        """Removes the room."""
        self._scratch.close()


def _is_full(error: OSError) -> bool:
    # pyarrow gives the number in its text alone.
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)
