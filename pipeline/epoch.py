"""The order of an epoch: which rows form which global batch, from counts alone.

Not where rows are read, and no file is opened here: a pure function of (row counts per file and bucket, seed, epoch),
so that every rank and every DataLoader worker works the same order out for itself. `dataset` is the caller.

Files are shuffled and dealt to LANES, which take turns to give a batch. In a lane consecutive files form a window of
bounded size, and a file that is larger than a window is cut into consecutive pieces, each in the place of a file; the
rows of a window are shuffled together and dealt to the pending batch of their bucket; a batch that is full is next.
What is pending when a window ends is filled up from the next window; what is pending at the end of the epoch is put
together over all lanes, and what fills no batch then is the epoch's remainder.

DataLoader asks its workers in turn, so with 1, 2 or 4 of them each reads lanes of its own, and nothing is decoded
twice. Inside a global batch rows stand in the order of their files: a batch is a set to the optimiser, and so the slice
of a rank falls in few of the window's files, the same few for every batch of the window. A rank then reads about its
share of the data, not all of it.

The place of a batch follows from counts, so passing over any number of batches costs a look at the counts and the rows
of the windows that are open there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from numpy.random import PCG64, SeedSequence

Remainder = Literal["keep", "drop", "pad"]
REMAINDERS: tuple[Remainder, ...] = ("keep", "drop", "pad")
LANES = 4
# Rows of this many files at most are in flight at once; each open file costs a descriptor and its footer.
WINDOW_FILES = 128
# A file is not cut into smaller pieces than its row groups are: a row costs the decoding of its group.
PIECE_BYTES = 16 << 20

Ints = npt.NDArray[np.int64]

# A row is one number: the position of its file in the order, then its number among the file's rows of the bucket.
_NUMBER_BITS = 32


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The rows that all ranks take in one step.

    Attributes:
        bucket: index of the bucket, as in the columns of the counts.
        num_rows: rows of it, repeated ones included.
        num_distinct: rows from here on repeat earlier ones (remainder "pad"), else `num_rows`.
    """

    bucket: int
    num_rows: int
    num_distinct: int
    _rows: Ints
    _order: Ints

    def places(self, start: int, stop: int) -> tuple[Ints, Ints]:
        """Of the rows start to stop - 1: the file, and the number among the rows of the bucket in that file."""
        # Sorted only here: a worker passes over most batches without a look at them.
        rows = np.sort(self._rows)[np.arange(start, stop) % self.num_distinct]
        return self._order[rows >> _NUMBER_BITS], rows & ((1 << _NUMBER_BITS) - 1)


def shuffled(num: int, seed: int, epoch: int, stream: int) -> Ints:
    """A permutation of range(num), the same in every version of numpy.

    It sorts raw output of PCG64, which numpy promises never to change; it does not promise that of `permutation`.
    """
    raw = PCG64(SeedSequence([seed, epoch, stream])).random_raw(num)
    return np.argsort(raw, kind="stable")


def num_batches(bucket_rows: Ints, batch_rows: Ints, rank: int, world_size: int, remainder: Remainder) -> int:
    """Batches that a rank gets in an epoch, given the rows of each bucket and a rank's rows of a batch of it."""
    whole, left = np.divmod(bucket_rows, batch_rows * world_size)
    if remainder == "keep":
        return int(whole.sum() + (left > rank * batch_rows).sum())
    return int(whole.sum() + (left > 0).sum() * (remainder == "pad"))


def lanes_of_worker(num_workers: int) -> int:
    """How many lanes one of so many workers reads."""
    return LANES // math.gcd(LANES, num_workers)


def windows(piece_bytes: Ints, window_bytes: int, window_files: int = WINDOW_FILES) -> Ints:
    """Where the windows start: each has as many consecutive pieces as fit in its size and number, at least one."""
    starts: list[int] = []
    size = num_files = 0
    for position, num_bytes in enumerate(piece_bytes.tolist()):
        size += num_bytes
        num_files += 1
        if position == 0 or size > window_bytes or num_files > window_files:
            starts.append(position)
            size, num_files = num_bytes, 1
    return np.array(starts, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Files cut where they are larger than a window, in order.

    Attributes:
        files: `(pieces,)`, index of the file.
        first: `(pieces, buckets)`, number of the first row among the file's rows of the bucket.
        counts: `(pieces, buckets)`, rows.
        num_bytes: `(pieces,)`.
    """

    files: Ints
    first: Ints
    counts: Ints
    num_bytes: Ints

    @classmethod
    def of(cls, counts: Ints, file_bytes: Ints, piece_bytes: int) -> Pieces:
        """Pieces of about equal numbers of rows, in each the same share of every bucket.

        Args:
            counts: `(files, buckets)`, rows.
            file_bytes: `(files,)`.
            piece_bytes: about the most that a piece has.
        """
        num = np.clip(-(-file_bytes // piece_bytes), 1, np.maximum(counts.sum(axis=1), 1))
        files = np.repeat(np.arange(len(num)), num)
        part = np.arange(len(files)) - np.repeat(np.cumsum(num) - num, num)
        before = counts[files] * part[:, None] // num[files][:, None]
        after = counts[files] * (part + 1)[:, None] // num[files][:, None]
        return cls(files, before, after - before, file_bytes[files] // num[files])


class _Lane:
    """Every LANES-th file of the order: its full batches one by one, and what is left of each bucket after them."""

    def __init__(
        self,
        pieces: Pieces,
        starts: Ints,
        positions: Ints,
        batch_rows: Ints,
        seed: tuple[int, int, int] | None,
    ) -> None:
        """
        Args:
            pieces: of the lane's files in their order.
            starts: first piece of each window.
            positions: `(files,)`, the positions of the lane's files in the order of all files.
            batch_rows: `(buckets,)`, rows of a global batch.
            seed: seed, epoch and number of the lane; None: not shuffled.
        """
        counts = pieces.counts
        self._counts = counts
        self._first = pieces.first
        self._edges = np.append(starts, len(counts))
        self._positions = positions[pieces.files]
        self._batch_rows = batch_rows
        self._seed = seed
        totals = np.add.reduceat(counts, starts, axis=0) if len(starts) else np.empty((0, counts.shape[1]), np.int64)
        # Rows of each bucket, and full batches, before each window and after the last.
        self._rows_before = np.concatenate([np.zeros((1, counts.shape[1]), np.int64), np.cumsum(totals, axis=0)])
        self._batches_before = (self._rows_before // batch_rows).sum(axis=1)
        self.num_batches = int(self._batches_before[-1])

    def batches(self, num_passed: int) -> Iterator[tuple[int, Ints]]:
        """Bucket and rows of each full batch after the first so many."""
        first_window = int(np.searchsorted(self._batches_before, num_passed, side="right")) - 1
        pending = self._pending(first_window)
        num_passed -= int(self._batches_before[first_window])
        for window in range(first_window, len(self._edges) - 1):
            full: list[tuple[int, int, Ints]] = []
            for bucket, (places, rows) in enumerate(self._rows_of(window)):
                num_before = len(pending[bucket])
                queue = np.concatenate([pending[bucket], rows])
                size = int(self._batch_rows[bucket])
                num_full = len(queue) // size * size
                for first in range(0, num_full, size):
                    # A batch is full where its last row stands in the shuffled window.
                    full.append((int(places[first + size - 1 - num_before]), bucket, queue[first : first + size]))
                pending[bucket] = queue[num_full:]
            full.sort(key=lambda entry: entry[0])
            for _, bucket, rows in full[num_passed:]:
                yield bucket, rows
            num_passed = 0

    def left_over(self) -> list[Ints]:
        """Of each bucket the rows after its last full batch."""
        return self._pending(len(self._edges) - 1)

    def _pending(self, window: int) -> list[Ints]:
        """Of each bucket the rows before a window that are in no full batch yet."""
        num_pending = self._rows_before[window] % self._batch_rows
        pending = [np.empty(0, np.int64)] * len(num_pending)
        needed: dict[int, list[int]] = {}
        for bucket in np.flatnonzero(num_pending).tolist():
            before = self._rows_before[: window + 1, bucket]
            first = int(np.searchsorted(before, before[-1] - num_pending[bucket], side="right")) - 1
            for earlier in (first + np.flatnonzero(np.diff(before[first:]))).tolist():
                needed.setdefault(earlier, []).append(bucket)
        for earlier in sorted(needed):
            rows_of = self._rows_of(earlier)
            for bucket in needed[earlier]:
                pending[bucket] = np.concatenate([pending[bucket], rows_of[bucket][1]])
        return [rows[len(rows) - num :] for rows, num in zip(pending, num_pending.tolist(), strict=True)]

    def _rows_of(self, window: int) -> list[tuple[Ints, Ints]]:
        """Of each bucket the places in the shuffled window of its rows, and the rows."""
        start, end = self._edges[window], self._edges[window + 1]
        flat = self._counts[start:end].ravel()
        cells = np.repeat(np.arange(len(flat)), flat)
        numbers = np.arange(len(cells)) - np.repeat(np.cumsum(flat) - flat, flat)
        numbers += self._first[start:end].ravel()[cells]
        pieces, buckets = np.divmod(cells, self._counts.shape[1])
        rows = (self._positions[start:end][pieces] << _NUMBER_BITS) | numbers
        if self._seed is not None:
            seed, epoch, lane = self._seed
            permutation = shuffled(len(rows), seed, epoch, 1 + window * LANES + lane)
            buckets, rows = buckets[permutation], rows[permutation]
        found = [np.flatnonzero(buckets == bucket) for bucket in range(self._counts.shape[1])]
        return [(places, rows[places]) for places in found]


def global_batches(
    counts: Ints,
    file_bytes: Ints,
    *,
    batch_rows: Ints,
    seed: int | None,
    epoch: int,
    remainder: Remainder,
    window_bytes: int,
    num_passed: int = 0,
    piece_bytes: int = PIECE_BYTES,
) -> Iterator[GlobalBatch]:
    """The global batches of an epoch in order, without the first `num_passed`.

    Every row is in exactly one of them; with remainder "drop" those of the last, short batch of each bucket are in
    none, with "pad" they repeat in turn until it is full. Short batches come last, so that a rank's n-th batch is its
    slice of the n-th global batch.

    Args:
        counts: `(files, buckets)`, rows.
        file_bytes: `(files,)`, sizes that windows are measured by.
        batch_rows: `(buckets,)`, rows of a global batch of the bucket.
        seed: None keeps the order of the files and, per bucket, of the rows in them.
        window_bytes: of all lanes together.
        piece_bytes: files that are larger than this and than the window of a lane are cut.
    """
    num_files, num_buckets = counts.shape
    order = np.arange(num_files) if seed is None else shuffled(num_files, seed, epoch, 0)
    num_lanes = 1 if seed is None else LANES
    lanes = []
    for number in range(num_lanes):
        mine = order[number::num_lanes]
        pieces = Pieces.of(counts[mine], file_bytes[mine], max(piece_bytes, window_bytes // num_lanes))
        starts = windows(pieces.num_bytes, window_bytes // num_lanes, WINDOW_FILES // num_lanes)
        lane_seed = None if seed is None else (seed, epoch, number)
        lanes.append(_Lane(pieces, starts, np.arange(number, num_files, num_lanes), batch_rows, lane_seed))
    for bucket, rows in _in_turn(lanes, num_passed):
        yield GlobalBatch(bucket, len(rows), len(rows), rows, order)
    num_passed = max(0, num_passed - sum(lane.num_batches for lane in lanes))
    left_over = [lane.left_over() for lane in lanes]
    last: list[tuple[float, int, Ints]] = []
    for bucket in range(num_buckets):
        rows = np.concatenate([of_lane[bucket] for of_lane in left_over])
        size = int(batch_rows[bucket])
        last += [(-len(some) / size, bucket, some) for some in (rows[i : i + size] for i in range(0, len(rows), size))]
    # The fullest first: a rank that gets nothing of a short batch gets nothing of those after it either.
    last.sort(key=lambda entry: entry[0])
    for fullness, bucket, rows in last[num_passed:]:
        if fullness == -1 or remainder != "drop":
            num_rows = len(rows) if remainder == "keep" else int(batch_rows[bucket])
            yield GlobalBatch(bucket, num_rows, len(rows), rows, order)


def _in_turn(lanes: Sequence[_Lane], num_passed: int) -> Iterator[tuple[int, Ints]]:
    """One batch of each lane that has any left, again and again, after the first so many."""
    totals = np.array([lane.num_batches for lane in lanes])
    low, high = 0, int(totals.max(initial=0))
    while low < high:  # the last round that begins at or before the batch asked for
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(totals, middle).sum() <= num_passed else (low, middle - 1)
    passed = np.minimum(totals, low)
    into_round = num_passed - int(passed.sum())
    passed[np.flatnonzero(totals > low)[:into_round]] += 1
    batches = [lane.batches(num) for lane, num in zip(lanes, passed.tolist(), strict=True)]
    for turn in range(low, int(totals.max(initial=0))):
        for number, lane in enumerate(batches):
            if passed[number] <= turn < totals[number]:
                yield next(lane)
