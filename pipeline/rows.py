"""Rows of committed files for one process, and the files of later rows on their way meanwhile.

Not where rows are chosen (`epoch`, `selection`) or become batches (`batches`). `dataset` asks for rows and says which
files it will want next; threads fetch and check those, so that a training loop waits for the first file only.

What a process holds: open files (mapped, so that their pages are the kernel's), and decoded row groups up to a limit in
bytes, the least recently used dropped first.
"""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.committed import DataFile, FileCache, open_bytes
from pipeline.errors import DamagedObjectError, StorageNotFoundError
from pipeline.selection import matching_rows
from pipeline.storage import ObjectStore
from pipeline.stored import RecordFile, StoredRecord

# Fetching waits for the network, checking for a core: a few threads keep both busy.
_NUM_THREADS = 8
# Planned batches are small; what bounds their files is a limit in bytes.
_BATCHES_AHEAD = 1024
_V = TypeVar("_V")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedBatch:
    """Rows of one bucket that a rank takes in one step.

    Attributes:
        number: of its global batch in the epoch, from 1.
        turn: how many batches this rank got before, counted from where the pass began.
        files, numbers: `(B,)`, the file of each row and the row's number among those of the bucket that count there.
        is_padding: rows that repeat others.
    """

    number: int
    turn: int
    bucket: str
    files: Sequence[int]
    numbers: Sequence[int]
    is_padding: Sequence[bool]


class RowReader:
    """Rows by file, bucket and number.

    Args:
        files: as planned.
        checked: `(files,)`, shared by the processes of a dataset: what stands for the check of a file, 0 for none yet.
        columns: read beside the latents.
        wanted: the filter that the files were planned with, and the columns that it may name.
        max_open_files: files that stay open.
        window_bytes: twice as much is kept of decoded row groups, and as much of files is fetched ahead.
    """

    def __init__(
        self,
        store: ObjectStore,
        files: Sequence[DataFile],
        cache: FileCache,
        checked: npt.NDArray[np.int64],
        columns: Sequence[str],
        wanted: tuple[pc.Expression, pa.Schema] | None,
        max_open_files: int,
        window_bytes: int,
    ) -> None:
        self.pid = os.getpid()
        self._store = store
        self.data_files = files
        self._cache = cache
        self._checked = checked
        self._columns = tuple(dict.fromkeys(["bucket", *columns]))
        self._wanted = wanted
        self._window_bytes = window_bytes
        self._files: _Recent[_OpenFile] = _Recent(max_open_files)
        self._groups: _Recent[list[StoredRecord]] = _Recent(2 * window_bytes)
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future[_OpenFile]] = {}

    def with_files_ahead(self, batches: Iterable[PlannedBatch]) -> Iterator[PlannedBatch]:
        """The batches as they are; meanwhile files of later ones are fetched, up to `window_bytes` not used yet.

        Files that were asked for and not used are forgotten when this ends.
        """
        batches = iter(batches)
        ahead: deque[tuple[PlannedBatch, int]] = deque()
        num_bytes = 0
        is_over = False
        try:
            while True:
                while not is_over and len(ahead) < _BATCHES_AHEAD and num_bytes < self._window_bytes:
                    batch = next(batches, None)
                    if batch is None:
                        is_over = True
                    else:
                        new = [file for file in dict.fromkeys(batch.files) if self._begin(file)]
                        new_bytes = sum(self.data_files[file].stat.num_bytes for file in new)
                        num_bytes += new_bytes
                        ahead.append((batch, new_bytes))
                if not ahead:
                    return
                batch, new_bytes = ahead.popleft()
                num_bytes -= new_bytes
                yield batch
        finally:
            self._forget_coming()

    def record(self, file: int, bucket: str, number: int) -> StoredRecord:
        """The row with this number among the rows of the bucket that count in the file.

        Raises:
            DamagedObjectError: the file does not have the bytes or rows that its commit states.
            StorageNotFoundError: the file is gone.
        """
        opened = self._files.get(file, lambda: self._arrived(file), lambda _: 1)
        group, index = opened.places[bucket][number]
        return self._groups.get(
            (file, group),
            lambda: opened.records.read_group(group, self._columns),
            lambda records: sum(record.latent.nbytes + _text_bytes(record.columns) for record in records),
        )[index]

    def _begin(self, file: int) -> bool:
        """Has a file fetched and opened in the background; False where that is so already."""
        if file in self._coming or file in self._files:
            return False
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="latentmill-fetch")
        self._coming[file] = self._pool.submit(self._opened, file)
        return True

    def _arrived(self, file: int) -> _OpenFile:
        coming = self._coming.pop(file, None)
        return self._opened(file) if coming is None else coming.result()

    def _forget_coming(self) -> None:
        self._coming.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _opened(self, file: int) -> _OpenFile:
        data_file = self.data_files[file]
        stat = data_file.stat
        try:
            buffer, checked = self._cache.bytes_checked_once(self._store, stat, int(self._checked[file]))
        except StorageNotFoundError as error:
            raise StorageNotFoundError(f"of shard {data_file.shard_id}: {error}") from error
        self._checked[file] = checked
        records = open_bytes(buffer, stat, self._store)
        mask = data_file.mask()
        if len(mask) != records.num_rows:
            raise DamagedObjectError(
                f"{self._store.url(stat.key)} has {records.num_rows} rows, its commit states {len(mask)}"
            )
        matching = mask if self._wanted is None else matching_rows(buffer, stat, *self._wanted, self._store)
        if not matching[mask].all() or data_file.num_matching not in (None, matching.sum()):
            raise DamagedObjectError(
                f"{self._store.url(stat.key)} has other rows that match the filter than when the epoch was planned: "
                "what was read then was damaged on the way; open the dataset again"
            )
        places: dict[str, list[tuple[int, int]]] = {}
        rows = ((group, index) for group, num_rows in enumerate(records.group_rows) for index in range(num_rows))
        for counts, (bucket,), place in zip(mask.tolist(), records.read_columns(("bucket",)), rows, strict=True):
            if counts:
                places.setdefault(bucket, []).append(place)
        found = {bucket: len(rows) for bucket, rows in places.items()}
        if found != {bucket: rows for bucket, rows in data_file.bucket_rows.items() if rows}:
            raise DamagedObjectError(
                f"{self._store.url(stat.key)} has the rows {found} per bucket, its commit states "
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

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

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


def _text_bytes(columns: Mapping[str, object]) -> int:
    return sum(len(value) for value in columns.values() if isinstance(value, str))
