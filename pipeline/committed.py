"""Committed files, checked, wherever the store is: which rows of them count, and where their bytes are kept.

Not where rows are read (`rows`). A file is only ever reached through the commit that names it, and size and digest are
checked when it is opened. Files of a local folder are mapped where they are; those of a remote store are kept in a
cache folder that all processes of a machine share. What several generations of a shard say of one sample is merged
here. `rows` and `columns` read training data through the cache; `redo` and `audit` ask for the outcome of a shard.
"""

from __future__ import annotations

import fcntl
import io
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commit import (
    DecidedShard,
    decided_shards,
    fetch_data_file,
    has_stated_bytes,
    read_data_file,
    records_that_count,
)
from pipeline.errors import DamagedObjectError, StorageNotFoundError
from pipeline.records import ClipFailure, Commit, FileStat, ShardCounts
from pipeline.storage import ObjectStore
from pipeline.store import RangeReader
from pipeline.stored import RecordFile, open_records, read_rejections

_MAX_FETCHES = 10
_KEPT = re.compile(r"[0-9a-f]{64}\.(parquet|webdataset)")
_PARTIAL = re.compile(_KEPT.pattern + r"\.[0-9a-f]{32}\.partial")
# Longer than any fetch of one file takes; what a killed process left behind may go then.
_ABANDONED_AFTER_S = 86_400.0
# Columns of a few bytes a row are read in one or two requests.
_READ_BLOCK_BYTES = 1 << 20
_NUM_MERGERS = 16
# What is removed at once when the cache is full, so that not every fetch has to look through the folder.
_ROOM_SHARE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """A committed file and the rows of it that count.

    Attributes:
        bucket_rows: rows that count, per bucket.
        counted: a bit for each row (`np.packbits`), set where it counts; None: all do.
        num_matching: rows of the file that match the filter in use, whether or not they count; None without one.
    """

    shard_id: str
    stat: FileStat
    bucket_rows: Mapping[str, int]
    counted: bytes | None = None
    num_matching: int | None = None

    def mask(self) -> npt.NDArray[np.bool_]:
        """`(num_rows,)`, which rows count."""
        if self.counted is None:
            return np.ones(self.stat.num_rows, np.bool_)
        return np.unpackbits(np.frombuffer(self.counted, np.uint8), count=self.stat.num_rows).astype(np.bool_)

    def with_mask(self, mask: npt.NDArray[np.bool_], buckets: Sequence[str]) -> DataFile:
        """The same file with other rows that count; `buckets` has the bucket of each of them."""
        return replace(self, bucket_rows=dict(sorted(Counter(buckets).items())), counted=np.packbits(mask).tobytes())


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
        file = None if stat is None else open_checked(stat, store, cache)
        rows = [] if file is None else file.read_columns(("key", "clip_index", "num_frames"))
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _LatentsOfRecord:
    """What is needed of a commit record to find the latents: a tenth of it."""

    shard_id: str
    generation: int
    replaces: str | None
    stat: FileStat | None


def data_files(commits: Iterable[Commit], store: ObjectStore, cache: FileCache) -> tuple[DataFile, ...]:
    """The files with latents in the order of their shards; rows that an earlier generation has are dropped.

    Commits may come in any order, and nothing of them is kept but what finds the latents.
    """
    by_shard: dict[str, list[_LatentsOfRecord]] = {}
    for commit in commits:
        stat = _file_with_latents(commit)
        if stat is not None:
            stat = replace(stat, bucket_rows={sys.intern(bucket): rows for bucket, rows in stat.bucket_rows.items()})
        latents = _LatentsOfRecord(
            shard_id=commit.shard_id, generation=commit.generation, replaces=commit.replaces, stat=stat
        )
        by_shard.setdefault(commit.shard_id, []).append(latents)
    files: dict[str, tuple[DataFile, ...]] = {}
    to_merge: dict[str, list[FileStat]] = {}
    for shard_id in sorted(by_shard):
        stats = [latents.stat for latents in records_that_count(by_shard.pop(shard_id)) if latents.stat is not None]
        if len(stats) == 1 and sum(stats[0].bucket_rows.values()) == stats[0].num_rows:
            files[shard_id] = (DataFile(shard_id=shard_id, stat=stats[0], bucket_rows=stats[0].bucket_rows),)
        else:
            to_merge[shard_id] = stats

    def merge(shard_id: str) -> tuple[DataFile, ...]:
        return tuple(_merged_generations(shard_id, to_merge[shard_id], store, cache))

    with ThreadPoolExecutor(_NUM_MERGERS) as pool:
        files.update(zip(to_merge, pool.map(merge, to_merge), strict=True))
    return tuple(file for shard_id in sorted(files) for file in files[shard_id])


def _file_with_latents(commit: Commit) -> FileStat | None:
    """The Parquet file of a commit, else its tar; both hold the same rows."""
    by_content = {stat.content: stat for stat in commit.files}
    return by_content.get("parquet") or by_content.get("webdataset")


def _merged_generations(
    shard_id: str, stats: Sequence[FileStat], store: ObjectStore, cache: FileCache
) -> Iterator[DataFile]:
    seen: set[tuple[str, int]] = set()
    for stat in stats:
        rows = stored_columns(stat, store, cache, ("key", "clip_index", "bucket"))
        mask = np.array([(key, clip_index) not in seen for key, clip_index, _ in rows])
        seen.update((key, clip_index) for key, clip_index, _ in rows)
        if mask.any():
            file = DataFile(shard_id=shard_id, stat=stat, bucket_rows={})
            yield file.with_mask(mask, [rows[number][2] for number in np.flatnonzero(mask)])


def stored_columns(stat: FileStat, store: ObjectStore, cache: FileCache, names: Sequence[str]) -> list[tuple[Any, ...]]:
    """Some columns of every row of a committed file with latents, `latent` not among them.

    Of Parquet only these columns are fetched, by ranges, and page checksums stand for the check of the file; a tar has
    no columns and is fetched whole.

    Raises:
        DamagedObjectError: the file cannot be read, or has another number of rows than its record states.
        StorageNotFoundError: it is gone.
    """
    if stat.content == "parquet":
        rows = parquet_columns(stat, store, names)
    else:
        rows = open_checked(stat, store, cache).read_columns(names)
    if len(rows) != stat.num_rows:
        raise DamagedObjectError(f"{store.url(stat.key)} has {len(rows)} rows, its record states {stat.num_rows}")
    return rows


def parquet_columns(stat: FileStat, store: ObjectStore, names: Sequence[str]) -> list[tuple[Any, ...]]:
    """As `stored_columns`, of a Parquet file, whatever number of rows it has."""
    try:
        with io.BufferedReader(RangeReader(store, stat.key, stat.num_bytes), _READ_BLOCK_BYTES) as stream:
            table = pq.ParquetFile(stream, page_checksum_verification=True).read(columns=list(names))
        return list(zip(*(table.column(name).to_pylist() for name in names), strict=True))
    except (pa.ArrowException, ValueError, KeyError, OSError) as error:
        raise DamagedObjectError(
            f"{store.url(stat.key)} cannot be read: {error}; latentmill verify says more"
        ) from error


def open_checked(stat: FileStat, store: ObjectStore, cache: FileCache) -> RecordFile:
    """A committed file, checked and open for reading.

    Raises:
        DamagedObjectError: its bytes are not those that the commit states.
        StorageNotFoundError: it is gone.
    """
    return open_bytes(cache.checked_bytes(store, stat), stat, store)


def open_bytes(
    buffer: pa.Buffer, stat: FileStat, store: ObjectStore, *, with_page_checksums: bool = True
) -> RecordFile:
    """Checked bytes, open for reading; the check may be old, or `with_page_checksums` is False.

    Raises:
        DamagedObjectError: they are no file of their kind; the message names the file.
    """
    try:
        return open_records(buffer, stat.content, with_page_checksums=with_page_checksums)
    except DamagedObjectError as error:
        raise DamagedObjectError(f"{store.url(stat.key)}: {error}") from error


class FileCache:
    """Verified bytes of committed files: mapped in place where the store is a local folder, else kept in a folder.

    Kept files are named by their SHA-256, so datasets and processes share the folder; one appears under its name
    complete, and of several processes that want it one fetches. When the kept files reach the limit, those that were
    opened longest ago are removed; one that is removed while it is mapped stays readable. On the disk there are at most
    `limit_bytes`, and beside them what is being fetched and what was removed while it is mapped. Other files in the
    folder are left alone.
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
        return self.bytes_checked_once(store, stat, 0)[0]

    def bytes_checked_once(self, store: ObjectStore, stat: FileStat, checked: int) -> tuple[pa.Buffer, int]:
        """The bytes of a file and what stands for this check of it; the same bytes are not checked again.

        Args:
            checked: what came back when it was opened before, in any process of this machine; 0 for the first time.

        Raises:
            DamagedObjectError: the store holds other bytes.
            StorageNotFoundError: the store does not hold the file.
        """
        url = store.url(stat.key)
        if "://" not in url:
            return _local_bytes(url, stat, checked)
        path = self._folder / f"{stat.sha256}.{stat.content}"
        for _ in range(_MAX_FETCHES):
            # Another process may make room by removing the file between any two of these steps.
            try:
                changed_at = path.stat().st_mtime_ns
                # What was opened longest ago goes first; the time of change stays, which the check belongs to.
                os.utime(path, ns=(time.time_ns(), changed_at))
                buffer = _mapped(path)
            except FileNotFoundError:
                fetched = self._fetch(store, stat, path)
                if fetched is None:
                    continue
                return fetched
            if _is_as_stated(buffer, stat, is_checked=changed_at == checked):
                return buffer, changed_at
            path.unlink(missing_ok=True)
        raise DamagedObjectError(
            f"{path} was fetched from {url} again and again, and was removed or damaged each time before it could be "
            "read; give a cache_dir on another disk or a larger cache_bytes"
        )

    def _fetch(self, store: ObjectStore, stat: FileStat, path: Path) -> tuple[pa.Buffer, int] | None:
        """Fetches and checks a file; None where another process just did."""
        with self._lock(stat.sha256[:2]):
            if path.exists():
                return None
            partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
            try:
                fetch_data_file(store, stat, partial)
                # Mapped before it can be removed to make room for another.
                fetched = _mapped(partial), partial.stat().st_mtime_ns
                self._keep(partial, path, stat.num_bytes)
                return fetched
            except FileNotFoundError:
                return None  # somebody emptied the folder
            finally:
                partial.unlink(missing_ok=True)

    @contextmanager
    def _lock(self, name: str) -> Iterator[IO[str]]:
        folder = self._folder / ".locks"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / name).open("a+", encoding="ascii") as file:
            # Some network disks have no locks: then a file may be fetched twice, and the limit is passed for a while.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield file
            finally:
                # Closing does not suffice where a process was forked meanwhile.
                file.flush()
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_UN)

    def _keep(self, partial: Path, path: Path, num_bytes: int) -> None:
        """Gives a file its name, and removes others first if there would be too many bytes.

        The sum that all processes keep is never too small: a file that somebody else removes counts until the folder is
        looked through again.
        """
        with self._lock("room") as file:
            file.seek(0)
            text = file.read()
            total = int(text) + num_bytes if text.isdigit() else self._limit_bytes + 1
            if total > self._limit_bytes:
                total = self._remove_oldest(self._limit_bytes - num_bytes) + num_bytes
            file.truncate(0)
            file.write(str(total))
            partial.replace(path)

    def _remove_oldest(self, limit_bytes: int) -> int:
        """Removes files until there are fewer bytes, if there are more; the bytes that are left."""
        kept: list[tuple[int, int, Path]] = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):
                status = path.stat()
                if _KEPT.fullmatch(path.name) or (_PARTIAL.fullmatch(path.name) and _is_abandoned(status.st_mtime)):
                    kept.append((status.st_atime_ns, status.st_size, path))
        num_bytes = sum(size for _, size, _ in kept)
        if num_bytes > limit_bytes:
            limit_bytes -= self._limit_bytes // _ROOM_SHARE
        for _, size, path in sorted(kept):
            if num_bytes <= limit_bytes:
                break
            path.unlink(missing_ok=True)
            num_bytes -= size
        return num_bytes


def _local_bytes(path: str, stat: FileStat, checked: int) -> tuple[pa.Buffer, int]:
    try:
        changed_at = os.stat(path).st_mtime_ns
        buffer = _mapped(Path(path))
    except FileNotFoundError as error:
        raise StorageNotFoundError(f"{path} is committed but does not exist; restore it, or encode again") from error
    if not _is_as_stated(buffer, stat, is_checked=changed_at == checked):
        raise DamagedObjectError(
            f"{path} does not have the {stat.num_bytes} bytes with SHA-256 {stat.sha256} that its commit states; the "
            "file is damaged: restore it, or have its shard encoded again: latentmill verify --requeue"
        )
    return buffer, changed_at


def _is_abandoned(changed_at: float) -> bool:
    return time.time() - changed_at > _ABANDONED_AFTER_S


def _mapped(path: Path) -> pa.Buffer:
    return pa.memory_map(str(path)).read_buffer() if path.stat().st_size else pa.py_buffer(b"")


def _is_as_stated(buffer: pa.Buffer, stat: FileStat, is_checked: bool) -> bool:
    return buffer.size == stat.num_bytes if is_checked else has_stated_bytes(stat, buffer)
