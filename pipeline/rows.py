"""Rows of committed files for one process, and the files of later rows on their way meanwhile.

Not where rows are chosen (`epoch`, `selection`) or become batches (`batches`). `dataset` asks for rows and says which
files it will want next; threads fetch and check those, so that a training loop waits for the first file only.

What a process holds: open files (mapped, so that their pages are the kernel's), and row groups up to a limit in bytes,
the least recently used dropped first; latents that lie in mapped files as they are count, and take no memory.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.columns import ColumnSet
from pipeline.committed import DataFile, FileCache, open_bytes
from pipeline.errors import DamagedObjectError, StorageNotFoundError
from pipeline.selection import matching_rows
from pipeline.storage import ObjectStore
from pipeline.stored import RecordFile, StoredRecord, StoredRows

# Fetching waits for the network, checking for a core: a few threads keep both busy. More than a few for files that are
# there already only take the interpreter from the training loop, and a mounted disk may be a network too.
_NUM_FETCHERS_REMOTE, _NUM_FETCHERS_LOCAL = 8, 4
_NUM_DECODERS = 2
# Planned batches are small; what bounds their files is a limit in bytes. Row groups are larger than what a batch needs
# of them, and are decoded shortly before.
_BATCHES_AHEAD = 1024
_BATCHES_DECODED_AHEAD = 16
_V = TypeVar("_V")
# A row: the group that holds it, and its index there.
Place: TypeAlias = tuple[StoredRows, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedBatch:
    """Rows of one bucket that a rank takes in one step.

    Attributes:
        number: of its global batch in the epoch, from 1.
        turn: how many batches this rank got before, counted from where the pass began.
        files, numbers: `(B,)`, the file of each row and the row's number among those of the bucket that count there.
        num_distinct: rows from here on repeat others.
    """

    number: int
    turn: int
    bucket: str
    # Arrays: hundreds of batches are planned ahead, and the garbage collector looks at every list.
    files: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    num_distinct: int


class RowReader:
    """Rows by file, bucket and number.

    Args:
        files: as planned.
        checked: `(files,)`, shared by the processes of a dataset: what stands for the check of a file, 0 for none yet.
        columns: read beside the latents.
        column_sets: opened for a shard when its file is fetched ahead.
        wanted: the filter that the files were planned with, and the columns that it may name.
        max_open_files: files that stay open.
        window_bytes: twice as much is kept of decoded row groups, and as much of files is fetched ahead.
        num_lanes: read by turns; two row groups of each are kept, however large.
    """

    def __init__(
        self,
        store: ObjectStore,
        files: Sequence[DataFile],
        cache: FileCache,
        checked: npt.NDArray[np.int64],
        columns: Sequence[str],
        column_sets: Sequence[ColumnSet],
        wanted: tuple[pc.Expression, pa.Schema] | None,
        max_open_files: int,
        window_bytes: int,
        num_lanes: int,
    ) -> None:
        self.pid = os.getpid()
        self._store = store
        self.is_remote = "://" in store.root_uri
        self.data_files = files
        self._cache = cache
        self._checked = checked
        self.columns = tuple(dict.fromkeys(["bucket", *columns]))
        self._column_sets = column_sets
        for column_set in column_sets:
            column_set.own()
        self._wanted = wanted
        self._window_bytes = window_bytes
        self._files: _Recent[OpenFile] = _Recent(max_open_files)
        self._groups: _Recent[StoredRows] = _Recent(2 * window_bytes, at_least=2 * num_lanes)

    def read(self, batches: Iterable[PlannedBatch]) -> Iterator[tuple[PlannedBatch, list[Place]]]:
        """The batches with their rows; meanwhile files of later ones are fetched, up to `window_bytes` not used yet.

        Raises:
            DamagedObjectError: a file does not have the bytes or rows that its commit states.
            StorageNotFoundError: a file is gone.
        """
        batches = iter(batches)
        ahead: deque[tuple[PlannedBatch, int]] = deque()
        num_bytes = 0
        with _Background(self) as background:

            def look_ahead(num_batches: int) -> None:
                nonlocal num_bytes
                while len(ahead) < num_batches and num_bytes < self._window_bytes:
                    batch = next(batches, None)
                    if batch is None:
                        return
                    new = [file for file in dict.fromkeys(batch.files.tolist()) if background.begin_file(file)]
                    new_bytes = sum(self.data_files[file].stat.num_bytes for file in new)
                    num_bytes += new_bytes
                    ahead.append((batch, new_bytes))

            # The first batch comes sooner when its files are fetched alone.
            look_ahead(1)
            while ahead:
                batch, new_bytes = ahead.popleft()
                if len(ahead) >= _BATCHES_DECODED_AHEAD:
                    background.begin_groups(ahead[_BATCHES_DECODED_AHEAD - 1][0])
                rows = self._rows(batch, background)
                num_bytes -= new_bytes
                look_ahead(_BATCHES_AHEAD)
                yield batch, rows

    def _rows(self, batch: PlannedBatch, background: _Background) -> list[Place]:
        found: list[Place] = []
        last_file = last_group = -1
        # Rows stand in the order of their files, and most files have few groups.
        for file, number in zip(batch.files.tolist(), batch.numbers.tolist(), strict=True):
            if file != last_file:
                places = self.file(file, background).places[batch.bucket]
            group, index = places[number]
            if file != last_file or group != last_group:
                rows = self._group(file, group, background)
            last_file, last_group = file, group
            found.append((rows, index))
        return found

    def _group(self, file: int, group: int, background: _Background | None = None) -> StoredRows:
        rows = self._groups.find((file, group))
        if rows is None:
            opened = self.file(file, background)
            rows = opened.read(group, self.columns) if background is None else background.group(opened, file, group)
            self._groups.keep((file, group), rows, rows.num_bytes)
        return rows

    def record(self, file: int, bucket: str, number: int) -> StoredRecord:
        """The row with this number among the rows of the bucket that count in the file; raises as `read` does."""
        group, index = self.file(file).places[bucket][number]
        return self._group(file, group).record(index)

    def file(self, file: int, background: _Background | None = None) -> OpenFile:
        """A file, checked and open."""
        opened = self._files.find(file)
        if opened is None:
            opened = self.opened(file) if background is None else background.file(file)
            self._files.keep(file, opened, 1)
        return opened

    def has_file(self, file: int) -> bool:
        """Whether a file is open."""
        return file in self._files

    def has_group(self, file: int, group: int) -> bool:
        """Whether a row group is decoded."""
        return (file, group) in self._groups

    def fetched(self, file: int) -> OpenFile:
        """As `opened`, and the embeddings of its shard are at hand too."""
        for column_set in self._column_sets:
            column_set.prepare(self.data_files[file].shard_id)
        return self.opened(file)

    def opened(self, file: int) -> OpenFile:
        """Opens a file and checks it; safe in threads."""
        data_file = self.data_files[file]
        stat = data_file.stat
        try:
            before = int(self._checked[file])
            buffer, checked = self._cache.bytes_checked_once(self._store, stat, before)
        except StorageNotFoundError as error:
            raise StorageNotFoundError(f"of shard {data_file.shard_id}: {error}") from error
        self._checked[file] = checked
        records = open_bytes(buffer, stat, self._store, with_page_checksums=checked == before)
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
        return OpenFile(records, places)


class OpenFile:
    """An open file with the (group, index in it) of each row that counts, per bucket."""

    def __init__(self, records: RecordFile, places: Mapping[str, Sequence[tuple[int, int]]]) -> None:
        self.places = places
        self._records = records
        self._lock = threading.Lock()

    def read(self, group: int, columns: Sequence[str]) -> StoredRows:
        """Decodes a row group; safe in threads, one at a time."""
        with self._lock:
            return self._records.read_rows(group, columns)


class _Background:
    """Threads of one iteration that open files and decode row groups which will be wanted soon.

    Each iteration has its own, so that one which is given up takes nothing from another.
    """

    def __init__(self, reader: RowReader) -> None:
        self._reader = reader
        num_fetchers = _NUM_FETCHERS_REMOTE if reader.is_remote else _NUM_FETCHERS_LOCAL
        self._fetchers = ThreadPoolExecutor(num_fetchers, thread_name_prefix="latentmill-fetch")
        self._decoders = ThreadPoolExecutor(_NUM_DECODERS, thread_name_prefix="latentmill-decode")
        self._files: dict[int, Future[OpenFile]] = {}
        self._groups: dict[tuple[int, int], Future[StoredRows]] = {}

    def __enter__(self) -> _Background:
        return self

    def __exit__(self, *error: object) -> None:
        # Waits for what is being fetched: a process that is forked beside running threads may inherit their locks.
        for pool in (self._fetchers, self._decoders):
            pool.shutdown(wait=True, cancel_futures=True)

    def begin_file(self, file: int) -> bool:
        """Has a file opened; False where that is so already."""
        if file in self._files or self._reader.has_file(file):
            return False
        self._files[file] = self._fetchers.submit(self._reader.fetched, file)
        return True

    def begin_groups(self, batch: PlannedBatch) -> None:
        """Has decoded what a batch needs of the files that are open."""
        last_file = last_group = -1
        for file, number in zip(batch.files.tolist(), batch.numbers.tolist(), strict=True):
            if file != last_file:
                last_file, last_group = file, -1
                coming = self._files.get(file)
                is_open = coming is None or (coming.done() and coming.exception() is None)
                opened = self._reader.file(file, self) if is_open else None
            if opened is None:
                continue
            group, _ = opened.places[batch.bucket][number]
            if group != last_group:
                last_group = group
                if (file, group) not in self._groups and not self._reader.has_group(file, group):
                    self._groups[file, group] = self._decoders.submit(opened.read, group, self._reader.columns)

    def file(self, file: int) -> OpenFile:
        """A file that was begun, or opened now."""
        coming = self._files.pop(file, None)
        return self._reader.opened(file) if coming is None else coming.result()

    def group(self, opened: OpenFile, file: int, group: int) -> StoredRows:
        """A row group that was begun, or decoded now."""
        coming = self._groups.pop((file, group), None)
        return opened.read(group, self._reader.columns) if coming is None else coming.result()


class _Recent(Generic[_V]):
    """Values by key, the least recently used dropped while their weights are over a limit; so many always stay."""

    def __init__(self, limit: int, at_least: int = 1) -> None:
        self._limit = limit
        self._at_least = at_least
        self._weight = 0
        self._entries: OrderedDict[Hashable, tuple[_V, int]] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def find(self, key: Hashable) -> _V | None:
        """A value that is kept, and now the most recently used."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def keep(self, key: Hashable, value: _V, weight: int) -> None:
        """Keeps a value that is not kept yet."""
        self._entries[key] = value, weight
        self._weight += weight
        while self._weight > self._limit and len(self._entries) > self._at_least:
            self._weight -= self._entries.popitem(last=False)[1][1]
