"""The order of an epoch: which rows form which global batch, from counts alone.

Not where rows are read, and no file is opened here: a pure function of (row counts per file and bucket, seed, epoch),
so that every rank and every DataLoader worker works the same order out for itself. `dataset` is the caller.

Files are shuffled; consecutive ones form a window of bounded size; the rows of a window are shuffled together and dealt
to the pending batch of their bucket; a batch that is full is next. What is pending when a window ends is filled up from
the next window, what is pending at the end of the epoch is its remainder. Inside a global batch rows stand in the order
of their files: a batch is a set to the optimiser, and so the slice of a rank falls in few of the window's files, the
same few for every batch of the window. A rank then reads about its share of the data, not all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Remainder = Literal["keep", "drop", "pad"]
REMAINDERS: tuple[Remainder, ...] = ("keep", "drop", "pad")
# Rows of this many files at most are in flight at once; each open file costs a descriptor and its footer.
WINDOW_FILES = 128

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The rows that all ranks take in one step.

    Attributes:
        bucket: index of the bucket, as in the columns of the counts.
        files: `(n,)`, the file of each row.
        numbers: `(n,)`, each row's number among the rows of its bucket in its file, from 0.
        num_distinct: rows from here on repeat earlier ones (remainder "pad"), else n.
    """

    bucket: int
    files: Ints
    numbers: Ints
    num_distinct: int


def shuffled(num: int, seed: int, epoch: int, stream: int) -> Ints:
    """A permutation of range(num), the same in every version of numpy.

    It sorts raw output of PCG64, which numpy promises never to change; it does not promise that of `permutation`.
    """
    raw = np.random.PCG64(np.random.SeedSequence([seed, epoch, stream])).random_raw(num)
    return np.argsort(raw, kind="stable")


def num_batches(bucket_rows: Ints, batch_size: int, rank: int, world_size: int, remainder: Remainder) -> int:
    """Batches that a rank gets in an epoch, given the rows of each bucket."""
    whole, left = np.divmod(bucket_rows, batch_size * world_size)
    if remainder == "keep":
        return int(whole.sum() + (left > rank * batch_size).sum())
    return int(whole.sum() + (left > 0).sum() * (remainder == "pad"))


def windows(file_bytes: Ints, order: Ints, window_bytes: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of `order`: as many files as fit in `window_bytes` and WINDOW_FILES, at least one."""
    start, size = 0, 0
    for position, file in enumerate(order):
        size += int(file_bytes[file])
        if position > start and (size > window_bytes or position - start >= WINDOW_FILES):
            yield start, position
            start, size = position, int(file_bytes[file])
    if start < len(order):
        yield start, len(order)


def global_batches(
    counts: Ints,
    file_bytes: Ints,
    *,
    global_batch_size: int,
    seed: int | None,
    epoch: int,
    remainder: Remainder,
    window_bytes: int,
) -> Iterator[GlobalBatch]:
    """The global batches of an epoch in order.

    Every row is in exactly one of them; with remainder "drop" those of the last, short batch of each bucket are in
    none, with "pad" they repeat in turn until it is full.

    Args:
        counts: `(files, buckets)`, rows.
        file_bytes: `(files,)`, sizes that windows are measured by.
        seed: None keeps the order of the files and, per bucket, of the rows in them.
    """
    num_files, num_buckets = counts.shape
    order = np.arange(num_files) if seed is None else shuffled(num_files, seed, epoch, 0)
    # Each pending row is (position of its file in the order, number in its file and bucket).
    pending = [np.empty((0, 2), np.int64) for _ in range(num_buckets)]

    def batch(bucket: int, rows: Ints, size: int) -> GlobalBatch:
        rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
        repeated = rows[np.arange(size) % len(rows)]
        return GlobalBatch(bucket, order[repeated[:, 0]], repeated[:, 1], len(rows))

    for number, (start, end) in enumerate(windows(file_bytes, order, window_bytes)):
        buckets, rows = _rows(counts[order[start:end]], start)
        if seed is not None:
            permutation = shuffled(len(rows), seed, epoch, 1 + number)
            buckets, rows = buckets[permutation], rows[permutation]
        full: list[tuple[int, int, Ints]] = []
        for bucket in range(num_buckets):
            places = np.flatnonzero(buckets == bucket)
            num_before = len(pending[bucket])
            queue = np.concatenate([pending[bucket], rows[places]])
            num_rows = len(queue) // global_batch_size * global_batch_size
            for first in range(0, num_rows, global_batch_size):
                place = int(places[first + global_batch_size - 1 - num_before])
                full.append((place, bucket, queue[first : first + global_batch_size]))
            pending[bucket] = queue[num_rows:]
        for _, bucket, batch_rows in sorted(full, key=lambda entry: entry[0]):
            yield batch(bucket, batch_rows, global_batch_size)
    if remainder != "drop":
        for bucket in range(num_buckets):
            if len(pending[bucket]):
                size = len(pending[bucket]) if remainder == "keep" else global_batch_size
                yield batch(bucket, pending[bucket], size)


def _rows(counts: Ints, first_position: int) -> tuple[Ints, Ints]:
    """The bucket of each row of some files, and its (position of the file, number in file and bucket)."""
    flat = counts.ravel()
    cells = np.repeat(np.arange(len(flat)), flat)
    numbers = np.arange(len(cells)) - np.repeat(np.cumsum(flat) - flat, flat)
    positions, buckets = np.divmod(cells, counts.shape[1])
    return buckets, np.stack([positions + first_position, numbers], axis=1)
