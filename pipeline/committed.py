"""Rows of committed files, checked, wherever the store is.

Not where rows are chosen (`epoch`) or become batches (`dataset`, the caller). A file is only ever reached through the
commit that names it, and every process checks size and SHA-256 when it opens one. Files of a local folder are mapped
where they are; those of a remote store are kept in a cache folder that all processes of a machine share. What several
generations of a shard say of one sample is merged here.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeVar
from uuid import uuid4

import pyarrow as pa

from pipeline.commit import DecidedShard, decided_shards, fetch_data_file, read_data_file
from pipeline.errors import DamagedObjectError, StorageNotFoundError
from pipeline.records import ClipFailure, Commit, FileStat, ShardCounts
from pipeline.storage import ObjectStore
from pipeline.stored import RecordFile, StoredRecord, open_records, read_rejections

_READ_COLUMNS = ("caption", "fps", "bucket")
_MAX_FETCHES = 10
_KEPT = re.compile(r"[0-9a-f]{64}\.(parquet|webdataset)")
_PARTIAL = re.compile(_KEPT.pattern + r"\.[0-9a-f]{32}\.partial")
# Longer than any fetch of one file takes; what a killed process left behind may go then.
_ABANDONED_AFTER_S = 86_400.0
_V = TypeVar("_V")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """A committed file and the rows of it that count.

    Attributes:
        bucket_rows: rows that count, per bucket.
        dropped: row numbers that an earlier generation of the shard has already.
    """

    shard_id: str
    stat: FileStat
    bucket_rows: Mapping[str, int]
    dropped: frozenset[int] = field(default_factory=frozenset)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardOutcome:
    """What the records of a shard that count say of its samples: ok beats rejected, the lowest ok generation is read.

    Attributes:
        generations: (key, clip index) of every sample that is ok -> the generation whose row is read.
        rejections: those that still stand. Of a video that several generations reject, the latest says why.
        counts: the accounts that follow.
    """

    generations: Mapping[tuple[str, int], int]
    rejections: tuple[ClipFailure, ...]
    counts: ShardCounts


def shard_outcome(shard: DecidedShard, store: ObjectStore, cache: FileCache) -> ShardOutcome:
    """Reads the files of a shard's records that count and merges what they say, sample by sample.

    Raises:
        DamagedObjectError: the bytes of a file are not those that its record states.
        StorageNotFoundError: a file is gone.
    """
    generations: dict[tuple[str, int], int] = {}
    num_frames = 0
    standing: list[tuple[int, ClipFailure]] = []
    for commit in shard.commits:
        failures = rejections_in(commit, store)
        # A video that could not be read this time keeps the clips that it had, and what was said of the others.
        unread = {f.key for f in failures if f.clip_index is None} & {key for key, _ in generations}
        spoken_of = None if commit.keys is None else frozenset(commit.keys)
        standing = [
            (generation, failure)
            for generation, failure in standing
            if failure.key in unread or (spoken_of is not None and failure.key not in spoken_of)
        ]
        standing += [(commit.generation, failure) for failure in failures]
        stat = _file_with_latents(commit)
        rows = [] if stat is None else _open(stat, store, cache).read_columns(("key", "clip_index", "num_frames"))
        for key, clip_index, frames in rows:
            if (key, clip_index) not in generations:
                generations[key, clip_index] = commit.generation
                num_frames += frames
    ok: dict[str, set[int]] = {}
    for (key, _), generation in generations.items():
        ok.setdefault(key, set()).add(generation)

    def stands(generation: int, failure: ClipFailure) -> bool:
        if failure.clip_index is not None:
            return (failure.key, failure.clip_index) not in generations
        # A second video of the same key is rejected beside the first; else a video with a record is not rejected.
        return failure.reason == "duplicate_key" or not ok.get(failure.key, set()) - {generation}

    rejections = tuple(failure for generation, failure in standing if stands(generation, failure))
    return ShardOutcome(
        generations=generations, rejections=rejections, counts=_counts(generations, rejections, num_frames)
    )


def rejections_in(commit: Commit, store: ObjectStore) -> list[ClipFailure]:
    """The rejections that one record's files hold, whether or not they still stand.

    Raises:
        DamagedObjectError: the bytes of a file are not those that its record states.
        StorageNotFoundError: a file is gone.
    """
    files = [file for file in commit.files if file.content == "rejected"]
    return [failure for file in files for failure in read_rejections(read_data_file(store, file))]


def _counts(ok: Iterable[tuple[str, int]], rejections: Sequence[ClipFailure], num_frames: int) -> ShardCounts:
    with_record = [key for key, _ in ok]
    clips_rejected = [failure.key for failure in rejections if failure.clip_index is not None]
    num_videos_ok = len(set(with_record))
    num_videos_rejected = len(rejections) - len(clips_rejected) + len(set(clips_rejected) - set(with_record))
    return ShardCounts(
        num_videos=num_videos_ok + num_videos_rejected,
        num_videos_ok=num_videos_ok,
        num_videos_rejected=num_videos_rejected,
        num_clips=len(with_record) + len(clips_rejected),
        num_records=len(with_record),
        num_clips_rejected=len(clips_rejected),
        num_frames=num_frames,
        reasons=dict(sorted(Counter(failure.reason for failure in rejections).items())),
    )


def with_shard_counts(commit: Commit, before: Sequence[Commit], store: ObjectStore, cache: FileCache) -> Commit:
    """A later generation that states the accounts of its whole shard; its files are stored, it is not committed yet.

    Args:
        before: the generations before it that count; those whose files cannot be read are left out.

    Raises:
        DamagedObjectError: the bytes of a file are not those that its record states.
        StorageNotFoundError: a file is gone.
    """
    (shard,) = decided_shards([*before, commit])
    return replace(commit, shard_counts=shard_outcome(shard, store, cache).counts)


def data_files(commits: Sequence[Commit], store: ObjectStore, cache: FileCache) -> tuple[DataFile, ...]:
    """The files with latents in the order of their shards; rows that an earlier generation has are dropped."""
    files: list[DataFile] = []
    for shard in decided_shards(commits):
        stats = [stat for commit in shard.commits if (stat := _file_with_latents(commit)) is not None]
        if len(stats) == 1 and sum(stats[0].bucket_rows.values()) == stats[0].num_rows:
            files.append(DataFile(shard_id=shard.shard_id, stat=stats[0], bucket_rows=stats[0].bucket_rows))
        else:
            files.extend(_merged_generations(shard.shard_id, stats, store, cache))
    return tuple(files)


def _file_with_latents(commit: Commit) -> FileStat | None:
    """The Parquet file of a commit, else its tar; both hold the same rows."""
    by_content = {stat.content: stat for stat in commit.files}
    return by_content.get("parquet") or by_content.get("webdataset")


def _merged_generations(
    shard_id: str, stats: Sequence[FileStat], store: ObjectStore, cache: FileCache
) -> Iterator[DataFile]:
    seen: set[tuple[str, int]] = set()
    for stat in stats:
        rows = _open(stat, store, cache).read_columns(("key", "clip_index", "bucket"))
        dropped = frozenset(number for number, (key, clip_index, _) in enumerate(rows) if (key, clip_index) in seen)
        seen.update((key, clip_index) for key, clip_index, _ in rows)
        bucket_rows: dict[str, int] = {}
        for number, (_, _, bucket) in enumerate(rows):
            if number not in dropped:
                bucket_rows[bucket] = bucket_rows.get(bucket, 0) + 1
        if bucket_rows:
            yield DataFile(shard_id=shard_id, stat=stat, bucket_rows=bucket_rows, dropped=dropped)


def _open(stat: FileStat, store: ObjectStore, cache: FileCache) -> RecordFile:
    """A committed file, checked and open for reading.

    Raises:
        DamagedObjectError: its bytes are not those that the commit states.
        StorageNotFoundError: it is gone.
    """
    buffer = cache.checked_bytes(store, stat)
    try:
        return open_records(buffer, stat.content)
    except DamagedObjectError as error:
        raise DamagedObjectError(f"{store.url(stat.key)}: {error}") from error


class RowReader:
    """Rows of committed files for one process; keeps recently used files open and their row groups decoded."""

    def __init__(
        self,
        store: ObjectStore,
        files: Sequence[DataFile],
        cache: FileCache,
        columns: Sequence[str],
        max_open_files: int,
        max_bytes: int,
    ) -> None:
        self.pid = os.getpid()
        self._store = store
        self.data_files = files
        self._cache = cache
        self._columns = tuple(dict.fromkeys([*_READ_COLUMNS, *columns]))
        self._files: _Recent[_OpenFile] = _Recent(max_open_files)
        self._groups: _Recent[list[StoredRecord]] = _Recent(max_bytes)

    def record(self, file: int, bucket: str, number: int) -> StoredRecord:
        """The row with this number among the rows of the bucket that count in the file."""
        opened = self._files.get(file, lambda: self._opened(file), lambda _: 1)
        group, index = opened.places[bucket][number]
        return self._groups.get(
            (file, group),
            lambda: opened.records.read_group(group, self._columns),
            lambda records: sum(record.latent.nbytes + _text_bytes(record.columns) for record in records),
        )[index]

    def _opened(self, file: int) -> _OpenFile:
        data_file = self.data_files[file]
        records = _open(data_file.stat, self._store, self._cache)
        places: dict[str, list[tuple[int, int]]] = {}
        rows = ((group, index) for group, num_rows in enumerate(records.group_rows) for index in range(num_rows))
        for number, ((bucket,), place) in enumerate(zip(records.read_columns(("bucket",)), rows, strict=True)):
            if number not in data_file.dropped:
                places.setdefault(bucket, []).append(place)
        found = {bucket: len(rows) for bucket, rows in places.items()}
        if found != {bucket: rows for bucket, rows in data_file.bucket_rows.items() if rows}:
            raise DamagedObjectError(
                f"{self._store.url(data_file.stat.key)} has the rows {found} per bucket, its commit states "
                f"{dict(data_file.bucket_rows)}"
            )
        return _OpenFile(records, places)


@dataclass(frozen=True, slots=True)
class _OpenFile:
    """An open file with the (group, index in it) of each row that counts, per bucket."""

    records: RecordFile
    places: Mapping[str, Sequence[tuple[int, int]]]


class _Recent(Generic[_V]):
    """Values by key, the least recently used dropped while their weights are over a limit (one always stays)."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._weight = 0
        self._entries: OrderedDict[Hashable, tuple[_V, int]] = OrderedDict()

    def get(self, key: Hashable, load: Callable[[], _V], weigh: Callable[[_V], int]) -> _V:
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key][0]
        value = load()
        self._entries[key] = value, weigh(value)
        self._weight += self._entries[key][1]
        while self._weight > self._limit and len(self._entries) > 1:
            self._weight -= self._entries.popitem(last=False)[1][1]
        return value


class FileCache:
    """Verified bytes of committed files: mapped in place where the store is a local folder, else kept in a folder.

    Kept files are named by their SHA-256, so datasets and processes share the folder; one appears under its name
    complete, and a file that is removed while it is mapped stays readable. Other files in the folder are left alone.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes

    def checked_bytes(self, store: ObjectStore, stat: FileStat) -> pa.Buffer:
        """The bytes of a file, checked against its commit now.

        Raises:
            DamagedObjectError: the store holds other bytes.
            StorageNotFoundError: the store does not hold the file.
        """
        url = store.url(stat.key)
        if "://" not in url:
            if not os.path.exists(url):
                raise StorageNotFoundError(f"{url} is committed but does not exist; restore it, or encode again")
            buffer = _mapped(Path(url))
            if not _is_as_stated(buffer, stat):
                raise DamagedObjectError(
                    f"{url} does not have the {stat.num_bytes} bytes with SHA-256 {stat.sha256} that its commit "
                    "states; the file is damaged: restore it, or have its shard encoded again: latentmill verify "
                    "--requeue"
                )
            return buffer
        path = self._folder / f"{stat.sha256}.{stat.content}"
        for _ in range(_MAX_FETCHES):
            # Another process may make room by removing the file between any two of these steps.
            try:
                os.utime(path)
                buffer = _mapped(path)
            except FileNotFoundError:
                self._fetch(store, stat, path)
                continue
            if _is_as_stated(buffer, stat):
                return buffer
            path.unlink(missing_ok=True)
        raise DamagedObjectError(
            f"{path} was fetched from {url} again and again, and was removed or damaged each time before it could be "
            "read; give a cache_dir on another disk or a larger cache_bytes"
        )

    def _fetch(self, store: ObjectStore, stat: FileStat, path: Path) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
        try:
            fetch_data_file(store, stat, partial)
            with suppress(FileNotFoundError):  # somebody emptied the folder; the caller fetches again
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        self._make_room(path)

    def _make_room(self, newest: Path) -> None:
        kept: list[tuple[float, int, Path]] = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):
                status = path.stat()
                if _KEPT.fullmatch(path.name) or (_PARTIAL.fullmatch(path.name) and _is_abandoned(status.st_mtime)):
                    kept.append((status.st_mtime, status.st_size, path))
        num_bytes = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if num_bytes <= self._limit_bytes:
                break
            if path != newest:
                path.unlink(missing_ok=True)
                num_bytes -= size


def _text_bytes(columns: Mapping[str, object]) -> int:
    return sum(len(value) for value in columns.values() if isinstance(value, str))


def _is_abandoned(changed_at: float) -> bool:
    return time.time() - changed_at > _ABANDONED_AFTER_S


def _mapped(path: Path) -> pa.Buffer:
    return pa.memory_map(str(path)).read_buffer() if path.stat().st_size else pa.py_buffer(b"")


def _is_as_stated(buffer: pa.Buffer, stat: FileStat) -> bool:
    return buffer.size == stat.num_bytes and hashlib.sha256(buffer).hexdigest() == stat.sha256
