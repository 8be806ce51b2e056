"""The order of an epoch as a pure function: every row once, batches of one bucket, the same for whoever asks, and few
files per rank."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.epoch import (
    LANES,
    REMAINDERS,
    WINDOW_FILES,
    GlobalBatch,
    Pieces,
    global_batches,
    lanes_of_worker,
    num_batches,
    shuffled,
    windows,
)

COUNTS = st.integers(1, 3).flatmap(
    lambda num_buckets: st.lists(
        st.lists(st.integers(0, 9), min_size=num_buckets, max_size=num_buckets), min_size=1, max_size=12
    )
)
SEEDS = st.one_of(st.none(), st.integers(0, 2**40))


def order(
    counts: list[list[int]],
    size: int,
    seed: int | None,
    epoch: int,
    remainder: str,
    window_bytes: int = 25,
    num_passed: int = 0,
    piece_bytes: int = 1 << 24,
) -> list[GlobalBatch]:
    array = np.array(counts, dtype=np.int64)
    return list(
        global_batches(
            array,
            array.sum(axis=1),
            batch_rows=np.full(array.shape[1], size),
            seed=seed,
            epoch=epoch,
            remainder=remainder,  # type: ignore[arg-type]
            window_bytes=window_bytes,
            num_passed=num_passed,
            piece_bytes=piece_bytes,
        )
    )


def rows(batches: list[GlobalBatch]) -> list[list[tuple[int, int, int]]]:
    return [
        [(int(file), batch.bucket, int(number)) for file, number in zip(*batch.places(0, batch.num_rows), strict=True)]
        for batch in batches
    ]


def all_rows(counts: list[list[int]]) -> Counter[tuple[int, int, int]]:
    return Counter((f, b, n) for f, row in enumerate(counts) for b, num in enumerate(row) for n in range(num))


@settings(deadline=None)
@given(COUNTS, st.integers(1, 12), SEEDS, st.integers(0, 3), st.integers(0, 60), st.integers(1, 30))
def test_every_row_is_in_exactly_one_batch(
    counts: list[list[int]], size: int, seed: int | None, epoch: int, window_bytes: int, piece_bytes: int
) -> None:
    kept = rows(order(counts, size, seed, epoch, "keep", window_bytes, piece_bytes=piece_bytes))
    assert Counter(row for batch in kept for row in batch) == all_rows(counts)
    assert all(0 < len(batch) <= size for batch in kept)


@settings(deadline=None)
@given(COUNTS, st.integers(1, 12), SEEDS, st.integers(0, 60), st.sampled_from(REMAINDERS), st.integers(1, 30))
def test_passing_over_batches_gives_the_rest_of_the_same_order(
    counts: list[list[int]], size: int, seed: int | None, window_bytes: int, remainder: str, piece_bytes: int
) -> None:
    whole = rows(order(counts, size, seed, 1, remainder, window_bytes, piece_bytes=piece_bytes))
    for num_passed in {0, 1, len(whole) // 2, max(0, len(whole) - 1), len(whole)}:
        rest = order(counts, size, seed, 1, remainder, window_bytes, num_passed, piece_bytes)
        assert rows(rest) == whole[num_passed:]


@settings(deadline=None)
@given(COUNTS, st.lists(st.integers(1, 12), min_size=3, max_size=3), SEEDS)
def test_each_bucket_has_batches_of_its_own_size(counts: list[list[int]], sizes: list[int], seed: int | None) -> None:
    array = np.array(counts, dtype=np.int64)
    batch_rows = np.array(sizes[: array.shape[1]])
    batches = list(
        global_batches(
            array,
            array.sum(axis=1),
            batch_rows=batch_rows,
            seed=seed,
            epoch=0,
            remainder="keep",
            window_bytes=25,
        )
    )
    assert Counter(row for batch in rows(batches) for row in batch) == all_rows(counts)
    for bucket, (total, size) in enumerate(zip(array.sum(axis=0), batch_rows, strict=True)):
        found = sorted((batch.num_rows for batch in batches if batch.bucket == bucket), reverse=True)
        assert found == [size] * (total // size) + [total % size] * bool(total % size)


def test_workers_in_turn_read_files_of_their_own() -> None:
    batches = order([[64]] * 64, 8, 0, 0, "drop", window_bytes=1000)
    for num_workers in (2, 4):
        assert lanes_of_worker(num_workers) == LANES // num_workers
        read = [
            {int(file) for batch in batches[worker::num_workers] for file in batch.places(0, 8)[0]}
            for worker in range(num_workers)
        ]
        assert sum(len(files) for files in read) == 64


@settings(deadline=None)
@given(COUNTS, st.integers(1, 12), SEEDS, st.integers(0, 3))
def test_the_remainders_differ_in_the_short_batches_only(
    counts: list[list[int]], size: int, seed: int | None, epoch: int
) -> None:
    kept, dropped, padded = (order(counts, size, seed, epoch, remainder) for remainder in REMAINDERS)
    assert rows(dropped) == [batch for batch in rows(kept) if len(batch) == size][: len(dropped)]
    assert len(padded) == len(kept)
    for short, full in zip(kept, padded, strict=True):
        assert full.num_rows == size
        assert full.num_distinct == short.num_rows
        assert rows([full])[0][: short.num_rows] == rows([short])[0]
        assert set(rows([full])[0]) == set(rows([short])[0])


@settings(deadline=None)
@given(COUNTS, st.integers(1, 4), st.integers(1, 4), SEEDS, st.sampled_from(REMAINDERS))
def test_the_number_of_batches_is_known_from_the_counts(
    counts: list[list[int]], batch_size: int, world_size: int, seed: int | None, remainder: str
) -> None:
    batches = order(counts, batch_size * world_size, seed, 0, remainder)
    totals = np.array(counts).sum(axis=0)
    for rank in range(world_size):
        expected = sum(batch.num_rows > rank * batch_size for batch in batches)
        assert num_batches(totals, np.full(len(totals), batch_size), rank, world_size, remainder) == expected  # type: ignore[arg-type]


def test_each_epoch_and_each_seed_has_its_own_order() -> None:
    counts = [[8], [8], [8]]
    orders = [rows(order(counts, 4, seed, epoch, "keep")) for seed in (0, 1) for epoch in (0, 1)]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))
    assert rows(order(counts, 4, 0, 0, "keep")) == orders[0]


def test_without_a_seed_rows_come_in_the_order_of_the_files() -> None:
    batches = rows(order([[3, 1], [2, 2]], 2, None, 0, "keep"))
    assert [row for batch in batches for row in batch if row[1] == 0] == [
        (0, 0, 0),
        (0, 0, 1),
        (0, 0, 2),
        (1, 0, 0),
        (1, 0, 1),
    ]


def test_the_permutation_is_the_same_in_every_version() -> None:
    # Saved cursors of running trainings depend on it.
    assert shuffled(8, 0, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert sorted(shuffled(1000, 5, 6, 7)) == list(range(1000))


@given(st.lists(st.integers(0, 50), max_size=300), st.integers(0, 100))
def test_windows_cover_the_order_and_respect_their_size(sizes: list[int], window_bytes: int) -> None:
    starts = windows(np.array(sizes, dtype=np.int64), window_bytes).tolist()
    found = list(itertools.pairwise([*starts, len(sizes)]))
    assert [place for start, end in found for place in range(start, end)] == list(range(len(sizes)))
    for start, end in found:
        assert end - start <= WINDOW_FILES
        assert end - start == 1 or sum(sizes[start:end]) <= window_bytes


def test_buckets_are_mixed_through_the_epoch() -> None:
    buckets = [batch.bucket for batch in order([[50, 50]] * 8, 10, 0, 0, "keep", window_bytes=10_000)]
    assert {0, 1} == set(buckets[: len(buckets) // 4])


def test_a_rank_reads_few_of_the_files_in_a_window() -> None:
    world_size, batch_size, num_files = 8, 32, 64
    batches = order([[64]] * num_files, world_size * batch_size, 0, 0, "keep", window_bytes=10**9)
    for rank in range(world_size):
        slices = [batch.places(rank * batch_size, (rank + 1) * batch_size) for batch in batches]
        seen = {int(file) for files, _ in slices for file in files}
        assert len(seen) <= num_files // 3, f"rank {rank} reads {len(seen)} of {num_files} files"


def test_a_file_larger_than_a_window_is_read_piece_by_piece() -> None:
    """Row groups are decoded once: at any time the rows in flight are those of a short run of each file."""
    num_files, num_rows, piece = 8, 4000, 100
    batches = order([[num_rows // 2, num_rows // 2]] * num_files, 10, 0, 0, "keep", LANES * piece, piece_bytes=piece)
    for first in range(0, len(batches) - 20, 20):
        seen: dict[int, set[int]] = {}
        for file, _, number in (row for batch in rows(batches[first : first + 20]) for row in batch):
            seen.setdefault(file, set()).add(number)
        # Half of a piece's rows are of each bucket; 20 batches are half of a window, and may lie in two.
        assert all(max(numbers) - min(numbers) < 2 * piece for numbers in seen.values())
        assert len(seen) <= 2 * LANES


@given(COUNTS, st.integers(0, 200), st.integers(1, 50))
def test_pieces_are_what_the_files_are_and_have_their_share_of_every_bucket(
    counts: list[list[int]], extra_bytes: int, piece_bytes: int
) -> None:
    array = np.array(counts, dtype=np.int64)
    file_bytes = array.sum(axis=1) * 10 + extra_bytes
    pieces = Pieces.of(array, file_bytes, piece_bytes)
    for file, row in enumerate(array):
        mine = pieces.files == file
        np.testing.assert_array_equal(pieces.counts[mine].sum(axis=0), row)
        np.testing.assert_array_equal(pieces.first[mine], np.cumsum(pieces.counts[mine], axis=0) - pieces.counts[mine])
        assert np.ptp(pieces.counts[mine], axis=0).max() <= 1
        assert mine.sum() == max(1, min(-(-file_bytes[file] // piece_bytes), row.sum()))
