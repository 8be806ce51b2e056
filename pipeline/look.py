"""A look at some videos of an input before it is encoded: the beginning of some tars, some entries of some slices.

Not where anything is scaled up or said (`estimate`, which calls this), and nothing is kept. What is looked at is
decoded by the real decode children under the real limits, so that clips, buckets and rejections are those of the job.

The look ends, whatever comes first: when all shards that were drawn are seen, after `_MOST_VIDEOS` videos or
`_MOST_BYTES` bytes, or when its time is up; then what is in work is finished, for as long again and no longer. Of a tar
no more is read than that. Files of other machines above `_LARGEST_FILE_BYTES` are passed over.
"""

from __future__ import annotations

import io
import os
import random
import resource
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt
import psutil

from pipeline.config import DecodeLimits, JobConfig
from pipeline.decode import DecodePool, clip_spans
from pipeline.errors import DecodeChildError
from pipeline.inputs import SliceEntry, read_slice
from pipeline.records import Bucket, Clip, ClipFailure, MediaKind, Redo, ShardSpec, SourceVideo
from pipeline.source import iterate_videos
from pipeline.storage import ObjectStore, open_input, open_store
from pipeline.traffic import reads_of_file

_MOST_SHARDS = 32
_MOST_VIDEOS = 256
_FEWEST_OF_A_SHARD = 8
_MOST_BYTES = 1 << 30
_LARGEST_FILE_BYTES = 256 << 20
_MOST_CHILDREN = 4
# Frames that are kept for measuring the encoder.
_KEPT_CLIPS = 4
_KEPT_BYTES = 256 << 20
_TAR_HEADER_BYTES = 512


@dataclass(slots=True, kw_only=True)
class ShardLook:
    """What was seen of one shard; mutable, because it is seen bit by bit.

    Attributes:
        weight: of what was seen, in the unit of `weight_of`: bytes of a tar, videos of a slice.
        is_whole: all of the shard was seen.
        seconds: duration of the videos that gave clips.
        clips: as they came, with frames of no content.
    """

    spec: ShardSpec
    weight: float = 0.0
    is_whole: bool = False
    num_videos: int = 0
    num_videos_rejected: int = 0
    seconds: float = 0.0
    buckets: Counter[Bucket] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    clips: list[Clip] = field(default_factory=list)
    failures: list[ClipFailure] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """All that was seen.

    Attributes:
        cpu_s: computing time of the decode children for it.
        start_s: seconds that one of them took to start.
        frames: of each bucket some real clips `(T, H, W, 3)`.
        examples: reason -> what one rejection said.
        kinds: media kinds that gave clips.
        source_uris: of some videos.
        file_requests: requests to object stores that the files of slices cost, by kind; those of tars are not among
            them.
        num_passed_over: files that were too large to look at.
        ran_out: the time was up before all that was drawn had been seen.
    """

    shards: Sequence[ShardLook]
    cpu_s: float
    start_s: float
    num_bytes: int
    frames: Mapping[Bucket, Sequence[npt.NDArray[np.uint8]]]
    examples: Mapping[str, str]
    kinds: frozenset[MediaKind]
    source_uris: Sequence[str]
    file_requests: Mapping[str, int]
    num_passed_over: int
    ran_out: bool


def weight_of(spec: ShardSpec, weight_per_video: float = 1.0) -> float:
    """What a shard counts when the seen is scaled to the whole: bytes of a tar, videos of a slice or of a retry."""
    if spec.redo is not None and spec.redo.keys is not None:
        return len(spec.redo.keys) * weight_per_video
    if spec.kind == "slice":
        return float(spec.num_videos or 0)
    return 1.0 if spec.source_size_bytes is None else float(spec.source_size_bytes)


def look_at(
    config: JobConfig,
    specs: Sequence[ShardSpec],
    store: ObjectStore,
    unwritten: Mapping[str, bytes],
    folder: Path,
    seconds: float,
    other_child: int,
) -> Look:
    """Looks at some of these shards.

    Args:
        specs: as planned; only those whose slices can be read.
        unwritten: slices that do not stand in the output, by key.
        folder: for temporary files.
        seconds: after which no further video is begun.
        other_child: process id of a child of this process that computes something else meanwhile.

    Raises:
        StorageError: the input cannot be read.
        DecodeChildError: decode children cannot be started here.
    """
    for key, data in unwritten.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    looker = _Looker(config, _drawn(specs), store, open_store(str(folder)), frozenset(unwritten))
    return looker.look(seconds, other_child)


def _drawn(specs: Sequence[ShardSpec]) -> list[ShardSpec]:
    """One shard from each of as many equal parts of the plan, in an order of which every beginning is spread out."""
    if not specs:
        return []
    chance = random.Random(0)
    num_drawn = min(len(specs), _MOST_SHARDS)
    edges = [len(specs) * number // num_drawn for number in range(num_drawn + 1)]
    drawn = [specs[chance.randrange(low, high)] for low, high in pairwise(edges)]
    chance.shuffle(drawn)
    return drawn


class _EnoughError(Exception):
    """Nothing further is to be read."""


class _Tap(io.RawIOBase):
    """A stream that counts what was taken, and ends the reading when its owner has enough."""

    def __init__(self, raw: BinaryIO, looker: _Looker) -> None:
        self.num_bytes = 0
        self._raw = raw
        self._looker = looker

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        if self._looker.has_enough():
            raise _EnoughError
        block = self._raw.read(size)
        self.num_bytes += len(block)
        self._looker.num_bytes += len(block)
        return block

    def close(self) -> None:
        self._raw.close()
        super().close()


@dataclass(slots=True)
class _Begun:
    """A video on its way through the decode pool."""

    shard: ShardLook
    key: str
    source_uri: str
    weight_up_to_it: float
    num_clips: int = 0  # given or rejected
    last: Clip | None = None


class _Looker:
    def __init__(
        self,
        config: JobConfig,
        specs: Sequence[ShardSpec],
        store: ObjectStore,
        unwritten: ObjectStore,
        unwritten_keys: frozenset[str],
    ) -> None:
        self._config = config
        self._specs = specs
        self._store = store
        self._unwritten = unwritten
        self._unwritten_keys = unwritten_keys
        self._most_of_a_shard = max(_FEWEST_OF_A_SHARD, _MOST_VIDEOS // max(1, len(specs)))
        self._until = 0.0
        self._begun: deque[_Begun] = deque()
        self._num_begun = 0
        self._shards: list[ShardLook] = []
        self._frames: dict[Bucket, list[npt.NDArray[np.uint8]]] = {}
        self._examples: dict[str, str] = {}
        self._kinds: set[MediaKind] = set()
        self._requests: Counter[str] = Counter()
        self._num_passed_over = 0
        self._ran_out = False
        self.num_bytes = 0

    def has_enough(self) -> bool:
        """Whether a bound is reached."""
        if time.monotonic() > self._until:
            self._ran_out = True
            return True
        return self._num_begun >= _MOST_VIDEOS or self.num_bytes >= _MOST_BYTES

    def look(self, seconds: float, other_child: int) -> Look:
        num_children = min(_MOST_CHILDREN, os.cpu_count() or 1)
        began = time.monotonic()
        pool = DecodePool(self._config.encoding, self._config.decode, num_children)
        try:
            # Their start is no part of what decoding costs.
            for child in [pool.take_child() for _ in range(num_children)]:
                pool.give_back(child)
            start_s = (time.monotonic() - began) / num_children
            before_s = _cpu_s_of_children(other_child)
            self._until = time.monotonic() + seconds
            # A video in work may take for ever; killing its child ends it.
            is_killed = threading.Event()

            def kill() -> None:
                is_killed.set()
                pool.close()

            watch = threading.Timer(2 * seconds, kill)
            watch.start()
            try:
                for entry in pool.decode(self._videos()):
                    self._take(entry)
                while self._begun:
                    self._end(self._begun.popleft())
            except DecodeChildError:
                if not is_killed.is_set():
                    raise
                self._ran_out = True
                self._end_cut_off()
            finally:
                watch.cancel()
                watch.join()
            cpu_s = _cpu_s_of_children(other_child) - before_s
        finally:
            pool.close()
        for shard in self._shards:
            if shard.is_whole:
                shard.weight = weight_of(shard.spec)
        return Look(
            shards=[shard for shard in self._shards if shard.num_videos or shard.is_whole],
            cpu_s=cpu_s,
            start_s=start_s,
            num_bytes=self.num_bytes,
            frames=self._frames,
            examples=self._examples,
            kinds=frozenset(self._kinds),
            source_uris=[clip.source_uri for shard in self._shards for clip in shard.clips[:1]],
            file_requests=self._requests,
            num_passed_over=self._num_passed_over,
            ran_out=self._ran_out,
        )

    def _videos(self) -> Iterator[SourceVideo | ClipFailure]:
        for spec in self._specs:
            if self.has_enough():
                return
            shard = ShardLook(spec=spec)
            self._shards.append(shard)
            try:
                yield from self._tar(shard) if spec.kind == "tar" else self._slice(shard)
            except _EnoughError:
                return

    def _tar(self, shard: ShardLook) -> Iterator[SourceVideo | ClipFailure]:
        taps: list[_Tap] = []

        def open_tar(uri: str) -> BinaryIO:
            taps.append(_Tap(open_input(uri), self))
            return cast(BinaryIO, taps[0])

        limits = self._limits(is_here="://" not in shard.spec.source_uri)
        videos = iterate_videos(shard.spec, self._store, self._config.encoding, limits, open_tar=open_tar)
        num_bytes_passed_over = before = 0
        for place, video in enumerate(videos):
            if self._is_passed_over(video, limits):
                num_bytes_passed_over += taps[0].num_bytes - before
            else:
                # The header of the next sample has been read as well.
                num_bytes = taps[0].num_bytes - _TAR_HEADER_BYTES - num_bytes_passed_over
                yield self._begin(shard, video, _weight_of_part(shard.spec, place + 1, num_bytes))
            before = taps[0].num_bytes
            if place + 1 == self._most_of_a_shard or self.has_enough():
                videos.close()  # type: ignore[attr-defined] # it is a generator
                return
        shard.is_whole = not num_bytes_passed_over

    def _limits(self, is_here: bool) -> DecodeLimits:
        limits = self._config.decode
        return limits if is_here else replace(limits, max_file_bytes=min(limits.max_file_bytes, _LARGEST_FILE_BYTES))

    def _slice(self, shard: ShardLook) -> Iterator[SourceVideo | ClipFailure]:
        spec = shard.spec
        store = self._unwritten if spec.plan_key in self._unwritten_keys else self._store
        entries = read_slice(store, spec).entries
        asked = None if spec.redo is None else spec.redo.keys
        keys = [entry.key for entry in entries] if asked is None else list(asked)
        is_part = len(keys) > self._most_of_a_shard
        if is_part:
            # Seeded by the shard: the same places of every slice would see one half of what comes in turns.
            keys = sorted(random.Random(spec.shard_id).sample(keys, self._most_of_a_shard))
            redo = Redo(shard_id=spec.base_id, generation=1, replaces=None, keys=tuple(keys))
            spec = replace(spec, redo=redo)
        by_uri = {entry.uri: entry for entry in entries}
        is_here = all("://" not in entry.uri for entry in entries)
        limits = self._limits(is_here)
        videos = iterate_videos(spec, store, self._config.encoding, limits)
        num_begun = 0
        for video in videos:
            if self._is_passed_over(video, limits):
                is_part = True
                continue
            if isinstance(video, SourceVideo):
                self.num_bytes += video.num_bytes
            self._note_requests(by_uri.get(video.source_uri), video)
            num_begun += 1
            yield self._begin(shard, video, float(num_begun))
            if self.has_enough():
                videos.close()  # type: ignore[attr-defined] # it is a generator
                return
        shard.is_whole = not is_part

    def _note_requests(self, entry: SliceEntry | None, video: SourceVideo | ClipFailure) -> None:
        if entry is None or not entry.uri.startswith("s3://"):
            return
        # Each is asked for its size to know its version, and once more to be opened.
        beside = [uri for uri in (entry.txt_uri, entry.json_uri) if uri is not None]
        self._requests["head"] += 1 + 2 * len(beside)
        self._requests["get"] += len(beside)
        if isinstance(video, SourceVideo):
            self._requests["head"] += 1
            self._requests["get"] += reads_of_file(video.num_bytes)

    def _is_passed_over(self, video: SourceVideo | ClipFailure, limits: DecodeLimits) -> bool:
        """Whether a file is too large for this look, and perhaps not for the job."""
        is_too_large = isinstance(video, ClipFailure) and video.reason == "too_large"
        is_lowered = limits.max_file_bytes < self._config.decode.max_file_bytes
        self._num_passed_over += is_too_large and is_lowered
        return is_too_large and is_lowered

    def _begin(self, shard: ShardLook, video: SourceVideo | ClipFailure, weight: float) -> SourceVideo | ClipFailure:
        self._num_begun += 1
        self._begun.append(_Begun(shard, video.key, video.source_uri, weight))
        return video

    def _take(self, entry: Clip | ClipFailure) -> None:
        """An entry belongs to the first video that it can be of: videos come out in their order, each at least once."""
        is_of_video = isinstance(entry, ClipFailure) and entry.clip_index is None
        while True:
            begun = self._begun[0]
            if (begun.key, begun.source_uri) == (entry.key, entry.source_uri) and not (is_of_video and begun.num_clips):
                break
            self._end(self._begun.popleft())
        if isinstance(entry, ClipFailure):
            begun.shard.reasons[entry.reason] += 1
            begun.shard.failures.append(entry)
            self._examples.setdefault(entry.reason, f"{entry.source_uri}: {entry.message}")
        else:
            self._keep_frames(entry)
            begun.shard.buckets[entry.bucket] += 1
            begun.last = replace(entry, frames=np.broadcast_to(np.uint8(0), entry.frames.shape))
            begun.shard.clips.append(begun.last)
            self._kinds.add(entry.bucket.media_kind)
        begun.num_clips += 1
        if is_of_video:
            self._end(self._begun.popleft())

    def _keep_frames(self, clip: Clip) -> None:
        kept = self._frames.get(clip.bucket, [])
        num_bytes = sum(frames.nbytes for of_bucket in self._frames.values() for frames in of_bucket)
        # One is kept whatever its size: without any the encoder could not be measured.
        if not num_bytes or (len(kept) < _KEPT_CLIPS and num_bytes + clip.frames.nbytes <= _KEPT_BYTES):
            self._frames[clip.bucket] = [*kept, clip.frames]

    def _end(self, begun: _Begun) -> None:
        shard = begun.shard
        shard.weight = begun.weight_up_to_it
        shard.num_videos += 1
        if begun.last is None:
            shard.num_videos_rejected += 1
        else:
            shard.seconds += begun.last.facts.duration_s or 0.0

    def _end_cut_off(self) -> None:
        """Counts the video in work with the clips that were still to come, and leaves out those behind it."""
        for begun in self._begun:
            begun.shard.is_whole = False
        head = self._begun.popleft() if self._begun else None
        if head is None or head.last is None:
            return
        encoding, facts = self._config.encoding, head.last.facts
        num_instants = facts.num_frames if encoding.fps is None else int((facts.duration_s or 0.0) * encoding.fps)
        num_frames = head.last.bucket.num_frames
        spans = clip_spans(num_instants, num_frames, encoding.clip_stride, encoding.clips_per_video)
        head.shard.buckets[head.last.bucket] += max(0, len(spans) - head.num_clips)
        self._end(head)


def _weight_of_part(spec: ShardSpec, num_videos: int, num_bytes: int) -> float:
    """Of the beginning of a tar, in the unit of `weight_of`."""
    if spec.redo is not None and spec.redo.keys is not None:
        return float(num_videos)
    return 1.0 if spec.source_size_bytes is None else max(1.0, float(num_bytes))


def _cpu_s_of_children(besides: int) -> float:
    """Computing time of all children of this process up to now, those that ended included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total_s = ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.pid != besides:
                times = child.cpu_times()
                total_s += times.user + times.system
    return total_s
