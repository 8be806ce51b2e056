"""What a snapshot holds for a training: files with their rows by bucket, and how many rows make a batch.

Not the order of an epoch (`epoch`) and not the rows themselves (`rows`). `dataset` is the caller, at the start and when
it follows newer snapshots. Opens no data file, except for a filter and for shards of several generations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.commit import decided_shards, latest_snapshot_number, load_commits, snapshot_commits
from pipeline.committed import DataFile, FileCache, data_files
from pipeline.epoch import Ints
from pipeline.errors import StorageNotFoundError, UsageError
from pipeline.records import Commit, ModelFacts
from pipeline.selection import select
from pipeline.storage import ObjectStore

_DEFAULT_ROWS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Files, and the rows of each bucket in them.

    Attributes:
        snapshot: its number; None: all commits there were.
        counts: `(files, buckets)`, rows.
        file_bytes: `(files,)`.
        batch_rows: `(buckets,)`, rows of a batch of one rank.
        digest: of everything that decides the order, the batch sizes excepted.
        checked: `(files,)` int64, what stands for the check of a file; in shared memory, so that workers check it once.
    """

    snapshot: int | None
    files: tuple[DataFile, ...]
    buckets: tuple[str, ...]
    counts: Ints
    file_bytes: Ints
    batch_rows: Ints
    digest: str
    checked: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSize:
    """Rows of a batch of one rank: one number, one by bucket, or as many as have so many latent positions."""

    rows: int | Mapping[str, int] | None
    max_tokens: int | None

    @classmethod
    def of(cls, rows: int | Mapping[str, int] | None, max_tokens: int | None) -> BatchSize:
        """The size that a caller asks for; 8 rows where nothing is said.

        Raises:
            UsageError: both are given, or a number is below 1.
        """
        if max_tokens is not None:
            if rows is not None:
                raise UsageError(f"batch_size={rows!r} and max_tokens={max_tokens} both say how many rows; give one")
            return cls(rows=None, max_tokens=max_tokens)
        rows = _DEFAULT_ROWS if rows is None else rows
        smallest = min(rows.values(), default=1) if isinstance(rows, Mapping) else rows
        if smallest < 1:
            raise UsageError(f"batch_size is {rows}; it must be 1 or more")
        return cls(rows=rows, max_tokens=None)

    def by_bucket(self, buckets: Sequence[str], model: ModelFacts) -> Ints:
        """`(buckets,)`, the rows of each.

        Raises:
            UsageError: a bucket has no size, or one sample of it has too many positions.
        """
        if isinstance(self.rows, int):
            return np.full(len(buckets), self.rows, dtype=np.int64)
        if self.rows is not None:
            missing = [bucket for bucket in buckets if bucket not in self.rows]
            if missing:
                raise UsageError(
                    f"batch_size says nothing of {', '.join(missing)}; the dataset has the buckets {', '.join(buckets)}"
                )
            return np.array([self.rows[bucket] for bucket in buckets], dtype=np.int64)
        assert self.max_tokens is not None
        tokens = {bucket: _tokens(bucket, model) for bucket in buckets}
        too_large = [f"{bucket} ({num})" for bucket, num in tokens.items() if num > self.max_tokens]
        if too_large:
            raise UsageError(
                f"max_tokens is {self.max_tokens}, and one sample has more latent positions: {', '.join(too_large)}; "
                f"give at least {max(tokens.values())}"
            )
        return np.array([self.max_tokens // tokens[bucket] for bucket in buckets], dtype=np.int64)


def _tokens(bucket: str, model: ModelFacts) -> int:
    """Latent positions t * h * w of a sample."""
    width, height, num_frames = (int(side) for side in bucket.split("x"))
    latent_frames = 1 + (num_frames - 1) // model.temporal_compression
    return latent_frames * (height // model.spatial_compression) * (width // model.spatial_compression)


def contents_of(
    store: ObjectStore,
    cache: FileCache,
    snapshot: int | None,
    wanted: tuple[pc.Expression, pa.Schema] | None,
    batch_size: BatchSize,
    model: ModelFacts,
) -> Contents:
    """What a snapshot holds.

    Args:
        snapshot: None: the latest now, or all commits where there is none.
        wanted: the filter, and the columns that it may name.

    Raises:
        UsageError: there is no such snapshot, no row in it, or a bucket without a batch size.
    """
    if snapshot is None:
        snapshot = latest_snapshot_number(store)
    files = data_files(_commits(store, snapshot), store, cache)
    if wanted is not None:
        files = select(files, *wanted, store, cache)
    buckets = tuple(sorted({bucket for file in files for bucket, rows in file.bucket_rows.items() if rows}))
    if not buckets:
        shards = decided_shards(_commits(store, snapshot))
        rejected = sum(shard.counts.num_videos_rejected for shard in shards)
        raise UsageError(
            f"{store.root_uri} holds no latents: {len(shards)} committed shards with {rejected} rejected videos and no "
            f"record{'' if wanted is None else ' that matches the filter'}"
        )
    return Contents(
        snapshot=snapshot,
        files=files,
        buckets=buckets,
        counts=np.array([[file.bucket_rows.get(bucket, 0) for bucket in buckets] for file in files], dtype=np.int64),
        file_bytes=np.array([file.stat.num_bytes for file in files], dtype=np.int64),
        batch_rows=batch_size.by_bucket(buckets, model),
        digest=_digest(files),
        checked=torch.zeros(len(files), dtype=torch.int64).share_memory_(),
    )


def _commits(store: ObjectStore, snapshot: int | None) -> Iterator[Commit]:
    if snapshot is None:
        return load_commits(store)
    try:
        return snapshot_commits(store, snapshot)
    except StorageNotFoundError as error:
        raise UsageError(f"{store.root_uri} has no snapshot {snapshot}: {error}") from error


def _digest(files: Sequence[DataFile]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.shard_id} {file.stat.sha256} {(file.counted or b'').hex()}\n".encode())
    return digest.hexdigest()
