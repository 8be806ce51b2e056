"""Latents back into a training loop: whole batches of one shape, in an exact order that can be resumed anywhere.

Not where the order is decided (`epoch`), nor which shards count (`commit`). Training code imports `LatentDataset` from
`pipeline`; `cli` draws previews with it. Needs neither Ray nor a video decoder.

Only files that a commit names are read, never a listing of `data/`, and each process checks the size and SHA-256 of a
file when it opens it. Files of a local folder are mapped where they are; those of a remote store are kept in a cache
folder that all processes of a machine share.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.commit import decided_shards, latest_snapshot, load_commits, manifest_of_output, read_snapshot
from pipeline.committed import DataFile, FileCache, RowReader, data_files
from pipeline.epoch import REMAINDERS, WINDOW_FILES, GlobalBatch, Remainder, global_batches, num_batches
from pipeline.errors import DamagedObjectError, StorageNotFoundError, UsageError
from pipeline.format import Content, schema
from pipeline.records import Commit, DatasetManifest
from pipeline.storage import ObjectStore, open_store
from pipeline.stored import StoredRecord

STATE_VERSION = 1
_BATCH_NAMES = ("latents", "caption", "key", "clip_index", "shard_id", "fps", "is_padding", "bucket", "cursor")
# diffusers clamps the log-variance of a posterior to this before it draws from it.
_LOGVAR_RANGE = (-30.0, 20.0)


class LatentDataset(IterableDataset[dict[str, Any]]):
    """Batches of latents, each of one bucket; `DataLoader(dataset, batch_size=None, num_workers=N)`.

    A batch is a dictionary:

    * "latents": float32 `(B, C, t, h, w)`, as the diffusion model takes it: `scaling_factor * (latent - shift_factor)`
    * "caption", "key", "clip_index", "shard_id", "fps" (None for images), "is_padding": lists of B values;
      (shard_id, key, clip_index) identifies a sample; "is_padding" marks rows that remainder "pad" repeats
    * "bucket": WIDTHxHEIGHTxFRAMES of all rows
    * "cursor": the state after this batch, for `load_state_dict`
    * every column of `columns` by its name: a list of B values

    The order of an epoch depends on the data, `shuffle_seed`, the epoch and `batch_size * world_size`, not on how ranks
    and workers share it. Ranks take consecutive slices of each global batch. DataLoader asks its workers in turn, and
    worker w of N prepares the batches w, w + N, ...: batches arrive in order (keep `in_order=True`, the default).

    Call `set_epoch` before each pass, as with a DistributedSampler. A pass starts at the beginning of the epoch, or
    where a loaded state says until another epoch is set.

    Args:
        uri: a local folder or s3://bucket/prefix.
        batch_size: rows per rank.
        shuffle_seed: None keeps the order of the shards and, per bucket, of the rows in them.
        rank, world_size: this process among those that share the data.
        remainder: what becomes of the last rows of a bucket that fill no global batch. "keep": a short last batch, of
            which later ranks get less or nothing; "drop": left out in this epoch; "pad": rows repeat until it is full.
            With "drop" and "pad" every rank gets the same number of batches.
        snapshot: number of the snapshot to read; None: the latest now, or all commits where there is no snapshot.
        columns: more columns to give out.
        sample_posterior: kind "moments" only: draw from the posterior instead of giving its mean. The draw depends on
            the seed, the epoch and the sample only.
        window_bytes: files that are shuffled together, at most 128; about the most a worker keeps in memory.
        cache_dir: where files of a remote store are kept; None: ~/.cache/latentmill.
        cache_bytes: the least recently used files are removed from the cache above this.

    Raises:
        UsageError: an argument is wrong, there is no dataset at `uri`, or it holds no rows.
        DamagedObjectError: while iterating, a file does not have the size or SHA-256 that its commit states.
    """

    def __init__(
        self,
        uri: str,
        batch_size: int = 8,
        shuffle_seed: int | None = 0,
        rank: int = 0,
        world_size: int = 1,
        remainder: Remainder = "keep",
        *,
        snapshot: int | None = None,
        columns: Sequence[str] = (),
        sample_posterior: bool = False,
        window_bytes: int = 512 << 20,
        cache_dir: str | Path | None = None,
        cache_bytes: int = 64 << 30,
    ) -> None:
        _check_arguments(batch_size, shuffle_seed, rank, world_size, remainder)
        self._store = open_store(str(uri))
        manifest = manifest_of_output(self._store)
        _check_columns(columns, sample_posterior, manifest, str(uri))
        self.manifest = manifest
        self.snapshot, commits = _pinned_commits(self._store, snapshot)
        self._cache = FileCache(Path(cache_dir) if cache_dir else Path.home() / ".cache" / "latentmill", cache_bytes)
        self._files = data_files(commits, self._store, self._cache)
        self._buckets = sorted({bucket for file in self._files for bucket, rows in file.bucket_rows.items() if rows})
        if not self._buckets:
            shards = decided_shards(commits)
            rejected = sum(shard.counts.num_videos_rejected for shard in shards)
            raise UsageError(
                f"{uri} holds no latents: {len(shards)} committed shards with {rejected} rejected videos and no record"
            )
        self._counts = np.array(
            [[file.bucket_rows.get(bucket, 0) for bucket in self._buckets] for file in self._files], dtype=np.int64
        )
        self._file_bytes = np.array([file.stat.num_bytes for file in self._files], dtype=np.int64)
        self._digest = _digest(self._files)
        self._batch_size = batch_size
        self._seed = shuffle_seed
        self._rank = rank
        self._world_size = world_size
        self._remainder: Remainder = remainder
        self._columns = tuple(columns)
        self._sample_posterior = sample_posterior
        self._window_bytes = window_bytes
        # (epoch, global batches to pass over). Shared memory, so that persistent workers see a new epoch too.
        self._start = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._done = 0
        self._reader: RowReader | None = None

    @property
    def num_records(self) -> int:
        """Rows of an epoch over all ranks, before the remainder is dropped or padded."""
        return int(self._counts.sum())

    def __len__(self) -> int:
        """Batches of a whole epoch for this rank."""
        rows = self._counts.sum(axis=0)
        return num_batches(rows, self._batch_size, self._rank, self._world_size, self._remainder)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next pass; another epoch than before starts at its beginning.

        Raises:
            UsageError: the epoch is negative.
        """
        if epoch < 0:
            raise UsageError(f"epoch {epoch} is negative; epochs count from 0")
        if epoch != int(self._start[0]):
            self._start[0], self._start[1] = epoch, 0
            self._done = 0

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that this object gave out, for any rank; plain JSON values.

        Behind DataLoader workers this object gives out nothing itself: there, take the "cursor" of the last batch.

        Raises:
            UsageError: called in a DataLoader worker, which has only seen its own share.
        """
        if get_worker_info() is not None:
            raise UsageError(
                "state_dict() of a DataLoader worker would hold its own position only; "
                'save batch["cursor"] of the last batch instead, and give it to load_state_dict()'
            )
        return self._state(int(self._start[0]), self._done)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Starts the next pass where the state was taken; the same order goes on, batch by batch.

        Any rank's state serves every rank, also with another world size at the same `batch_size * world_size`.

        Raises:
            UsageError: the state is of other data, another seed, window or global batch size.
        """
        now = self._state(0, 0)
        fixed = [name for name in now if name not in ("epoch", "num_global_batches", "snapshot")]
        other = [
            f"{name} {state.get(name)!r} there, {now[name]!r} here" for name in fixed if state.get(name) != now[name]
        ]
        if other:
            raise UsageError(
                f"the state does not fit this dataset ({'; '.join(other)}); open it with the same seed, window_bytes "
                f"and batch_size * world_size, and with snapshot={state.get('snapshot')!r}"
            )
        self._start[0], self._start[1] = state["epoch"], state["num_global_batches"]
        self._done = int(state["num_global_batches"])

    def _state(self, epoch: int, num_global_batches: int) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "snapshot": self.snapshot,
            "data": self._digest,
            "shuffle_seed": self._seed,
            "window_bytes": self._window_bytes,
            "global_batch_size": self._batch_size * self._world_size,
            "epoch": epoch,
            "num_global_batches": num_global_batches,
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        worker_id, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch, start = (int(value) for value in self._start)
        self._done = start
        first = self._rank * self._batch_size
        turn = 0
        for number, batch in enumerate(self._global_batches(epoch), start=1):
            mine = slice(first, min(first + self._batch_size, len(batch.files)))
            if number <= start or mine.start >= mine.stop:
                continue
            if turn % num_workers == worker_id:
                loaded = self._load(batch, mine, epoch)
                loaded["cursor"] = self._state(epoch, number)
                self._done = number
                yield loaded
            turn += 1

    def _global_batches(self, epoch: int) -> Iterator[GlobalBatch]:
        return global_batches(
            self._counts,
            self._file_bytes,
            global_batch_size=self._batch_size * self._world_size,
            seed=self._seed,
            epoch=epoch,
            remainder=self._remainder,
            window_bytes=self._window_bytes,
        )

    def _load(self, batch: GlobalBatch, mine: slice, epoch: int) -> dict[str, Any]:
        # A forked worker inherits what its parent had open; it opens its own.
        if self._reader is None or self._reader.pid != os.getpid():
            # A batch may still hold rows of the window before the current one.
            limits = 2 * WINDOW_FILES, 2 * self._window_bytes
            self._reader = RowReader(self._store, self._files, self._cache, self._columns, *limits)
        bucket = self._buckets[batch.bucket]
        files = [int(file) for file in batch.files[mine]]
        numbers = [int(number) for number in batch.numbers[mine]]
        records = [self._reader.record(file, bucket, number) for file, number in zip(files, numbers, strict=True)]
        shard_ids = [self._files[file].shard_id for file in files]
        values: dict[str, Any] = {name: [record.columns[name] for record in records] for name in self._columns}
        return values | {
            "latents": self._latents(records, shard_ids, epoch),
            "caption": [record.columns["caption"] for record in records],
            "key": [record.key for record in records],
            "clip_index": [record.clip_index for record in records],
            "shard_id": shard_ids,
            "fps": [record.columns["fps"] for record in records],
            "is_padding": [row >= batch.num_distinct for row in range(mine.start, mine.stop)],
            "bucket": bucket,
        }

    def _latents(self, records: Sequence[StoredRecord], shard_ids: Sequence[str], epoch: int) -> torch.Tensor:
        shapes = {record.mean.shape for record in records}
        if len(shapes) > 1:
            raise DamagedObjectError(f"latents of one bucket have the shapes {sorted(shapes)} in shards {shard_ids}")
        latents = torch.from_numpy(np.stack([record.mean for record in records]).astype(np.float32))
        if self._sample_posterior:
            for latent, record, shard_id in zip(latents, records, shard_ids, strict=True):
                latent += self._noise(record, shard_id, epoch)
        return latents.sub_(self.manifest.model.shift_factor).mul_(self.manifest.model.scaling_factor)

    def _noise(self, record: StoredRecord, shard_id: str, epoch: int) -> torch.Tensor:
        """A draw of the posterior less its mean, the same wherever and whenever the sample is read in this epoch."""
        assert record.logvar is not None, f"{record.key!r} of shard {shard_id} has no log-variance"
        name = f"{self._seed or 0}/{epoch}/{shard_id}/{record.clip_index}/{record.key}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
        logvar = torch.from_numpy(record.logvar.astype(np.float32)).clamp_(*_LOGVAR_RANGE)
        noise = torch.randn(logvar.shape, generator=torch.Generator().manual_seed(seed))
        return logvar.mul_(0.5).exp_().mul_(noise)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}


def data_urls(uri: str, content: Content | None = None, snapshot: int | None = None) -> list[str]:
    """Paths or URIs of the committed files, for readers without Latentmill.

    Args:
        uri: a local folder or s3://bucket/prefix.
        content: "parquet", "webdataset" or "rejected"; None: Parquet where there is any, else WebDataset.
        snapshot: number of the snapshot; None: every commit of now.

    Raises:
        UsageError: there is no dataset at `uri`.
    """
    store = open_store(uri)
    manifest_of_output(store)
    commits = load_commits(store) if snapshot is None else read_snapshot(store, snapshot).commits
    files = [file for shard in decided_shards(commits) for commit in shard.commits for file in commit.files]
    if content is None:
        content = "parquet" if any(file.content == "parquet" for file in files) else "webdataset"
    return [store.url(file.key) for file in files if file.content == content]


def _check_arguments(batch_size: int, shuffle_seed: int | None, rank: int, world_size: int, remainder: str) -> None:
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; it must be 1 or more")
    if not 0 <= rank < world_size:
        raise UsageError(f"rank {rank} of world_size {world_size}: ranks go from 0 to world_size - 1")
    if remainder not in REMAINDERS:
        raise UsageError(f"remainder {remainder!r} is not one of {', '.join(REMAINDERS)}")
    if shuffle_seed is not None and shuffle_seed < 0:
        raise UsageError(f"shuffle_seed is {shuffle_seed}; it must be 0 or more, or None for no shuffling")


def _check_columns(columns: Sequence[str], sample_posterior: bool, manifest: DatasetManifest, uri: str) -> None:
    known = [name for name in schema(manifest).names if name != "latent"]
    unknown = [name for name in columns if name not in known]
    if unknown:
        raise UsageError(f"{uri} has no column {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
    taken = [name for name in columns if name in _BATCH_NAMES]
    if taken:
        raise UsageError(f"columns: {', '.join(map(repr, taken))} is in every batch already; leave it out")
    if sample_posterior and manifest.kind != "moments":
        raise UsageError(
            f"sample_posterior: {uri} holds means without log-variances; encode with --store moments to draw from them"
        )


def _pinned_commits(store: ObjectStore, number: int | None) -> tuple[int | None, list[Commit]]:
    if number is not None:
        try:
            return number, list(read_snapshot(store, number).commits)
        except StorageNotFoundError as error:
            raise UsageError(f"{store.root_uri} has no snapshot {number}: {error}") from error
    latest = latest_snapshot(store)
    return (None, list(load_commits(store))) if latest is None else (latest.number, list(latest.commits))


def _digest(files: Sequence[DataFile]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.shard_id} {file.stat.sha256}\n".encode())
    return digest.hexdigest()
