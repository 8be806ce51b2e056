"""Latents back into a training loop: whole batches of one shape, in an exact order that can be resumed anywhere.

Not where the order is decided (`epoch`), nor which shards count (`commit`), nor what a batch holds (`batches`).
Training code imports `LatentDataset` from `pipeline`; `cli` draws previews with it. Needs neither Ray nor a video
decoder.

Only files that a commit names are read, never a listing of `data/`, and size and digest of a file are checked when a
process first opens it. Files of a local folder are mapped where they are; those of a remote store are kept in a cache
folder that all processes of a machine share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.batches import BATCH_NAMES, BatchRecipe
from pipeline.columns import ColumnSet, SetName, columns_store
from pipeline.commit import (
    decided_shards,
    latest_snapshot_number,
    load_commits,
    manifest_of_output,
    read_snapshot,
)
from pipeline.committed import FileCache
from pipeline.contents import BatchSize, Contents, contents_of
from pipeline.epoch import (
    LANES,
    REMAINDERS,
    WINDOW_FILES,
    Remainder,
    global_batches,
    lanes_of_worker,
    num_batches,
    shuffled,
)
from pipeline.errors import UsageError
from pipeline.format import EXTRA, Content, schema
from pipeline.records import DatasetManifest
from pipeline.rows import PlannedBatch, RowReader
from pipeline.selection import Filter, expression_of
from pipeline.storage import ObjectStore, open_store

STATE_VERSION = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentStats:
    """What a dataset holds, and how its latents are spread.

    Attributes:
        bucket_rows: rows of an epoch over all ranks, by bucket.
        num_samples: rows that were read for the rest.
        mean, deviation: of each channel, over all positions of these rows, as the dataset gives latents out; of the
            posterior mean, whatever is sampled.
    """

    bucket_rows: Mapping[str, int]
    num_samples: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


class LatentDataset(IterableDataset[dict[str, Any]]):
    """Batches of latents, each of one bucket; `DataLoader(dataset, batch_size=None, num_workers=N)`.

    A batch is a dictionary:

    * "latents": float32 `(B, C, t, h, w)`, as the diffusion model takes it: `scaling_factor * (latent - shift_factor)`
    * "caption", "key", "clip_index", "shard_id", "fps" (None for images), "is_padding": lists of B values;
      (shard_id, key, clip_index) identifies a sample; "is_padding" marks rows that remainder "pad" repeats
    * "bucket": WIDTHxHEIGHTxFRAMES of all rows
    * "cursor": the state after this batch, for `load_state_dict`
    * every column of `columns` by its name: a list of B values
    * with `first_frame` "first_latent": float32 `(B, C, h, w)`, the first frame's, never sampled
    * with `text` "caption_embedding": float32 `(B, L, D)`, zeros behind each, and "caption_mask": bool `(B, L)`
    * with `image` "image_embedding": float32 `(B, D)` or `(B, N, D)`

    The order of an epoch depends on the data, `shuffle_seed`, the epoch and the rows of a global batch (a rank's times
    `world_size`), not on how ranks and workers share it. Ranks take consecutive slices of each global batch. DataLoader
    asks its workers in turn, and worker w of N prepares the batches w, w + N, ...: batches arrive in order (keep
    `in_order=True`, the default). Take 1, 2 or 4 workers: with these no file is decoded by two of them.

    Call `set_epoch` before each pass, as with a DistributedSampler. A pass starts at the beginning of the epoch, or
    where a loaded state says until another epoch is set. Under torchdata's StatefulDataLoader the loader keeps the
    state, for the same number of workers and ranks; "cursor" fits any number.

    Files are fetched and checked in the background before their rows are due. At hand are rows of about twice
    `window_bytes` (or eight row groups of 16 MiB, if that is more), for all workers of a rank together (1, 2 or 4;
    others hold as much each). Latents of Parquet files stay in mapped pages, which the kernel may take back; those of
    tars and of outputs with compressed latents are in memory. In the background up to `window_bytes` of files are on
    their way to the cache. Each worker keeps shared memory for the batches that are on their way or still held, which
    later ones use again.

    Args:
        uri: a local folder or s3://bucket/prefix.
        batch_size: rows per rank, for all buckets or by bucket (`{"256x256x17": 8, "512x512x1": 32}`); 8 unless given.
        shuffle_seed: None keeps the order of the shards and, per bucket, of the rows in them.
        rank, world_size: this process among those that share the data.
        remainder: what becomes of the last rows of a bucket that fill no global batch. "keep": a short last batch, of
            which later ranks get less or nothing; "drop": left out in this epoch; "pad": rows repeat until it is full.
            With "drop" and "pad" every rank gets the same number of batches.
        max_tokens: in place of `batch_size`: as many rows of a bucket as have this many latent positions t * h * w.
        snapshot: number of the snapshot to read; None: the latest now, or all commits where there is no snapshot. Give
            all ranks the same number where a job may publish meanwhile.
        follow: read the latest snapshot, at the start and at each epoch that `set_epoch` begins. With several ranks
            these calls are collective: rank 0 of torch.distributed says which snapshot all of them take.
        columns: more columns to give out.
        filter: rows that count: an expression of `pyarrow.compute`, or (column, operator, value) triples as
            `pyarrow.parquet.read_table` takes them. Opening the dataset then reads these columns of every file (a small
            request for each column and row group of 16 MiB, 32 files at a time), in every rank, and with `follow` in
            every worker at each new snapshot; tars are read whole for it.
        scaled: False gives latents as they are stored.
        sample_posterior: kind "moments" only: draw from the posterior instead of giving its mean. The draw depends on
            the seed, the epoch and the sample only, as those of captions do.
        captions: columns that hold captions: of those that are not empty one is drawn for each sample.
        caption_dropout: probability with which a sample gets the empty caption.
        first_frame: give the latent of the first frame as well.
        text, image: names of column sets ("text", "image") whose embeddings are given out; a text set must be one of
            all columns of `captions`.
        window_bytes: files that are shuffled together, at most 128, a quarter of them for each batch.
        cache_dir: where files of a remote store are kept; None: ~/.cache/latentmill.
        cache_bytes: what all processes together keep there. Should hold a few windows of each rank of the machine.

    Raises:
        UsageError: an argument is wrong, there is no dataset at `uri`, it holds no rows, or a column set lacks some.
        DamagedObjectError: while iterating, a file does not have the bytes that its commit states.
        StorageNotFoundError: while iterating, a committed file is not there.
    """

    def __init__(
        self,
        uri: str,
        batch_size: int | Mapping[str, int] | None = None,
        shuffle_seed: int | None = 0,
        rank: int = 0,
        world_size: int = 1,
        remainder: Remainder = "keep",
        *,
        max_tokens: int | None = None,
        snapshot: int | None = None,
        follow: bool = False,
        columns: Sequence[str] = (),
        filter: Filter | None = None,  # noqa: A002
        scaled: bool = True,
        sample_posterior: bool = False,
        captions: Sequence[str] = ("caption",),
        caption_dropout: float = 0.0,
        first_frame: bool = False,
        text: str | None = None,
        image: str | None = None,
        window_bytes: int = 512 << 20,
        cache_dir: str | Path | None = None,
        cache_bytes: int = 64 << 30,
    ) -> None:
        _check_order(shuffle_seed, rank, world_size, remainder)
        if follow and snapshot is not None:
            raise UsageError(f"follow reads the latest snapshot, and snapshot={snapshot} pins one; give one of the two")
        self._store = open_store(str(uri))
        self.manifest = manifest_of_output(self._store)
        table = schema(self.manifest)
        _check_columns(columns, captions, table, str(uri))
        _check_draws(sample_posterior, caption_dropout, self.manifest, str(uri))
        self._batch_size = BatchSize.of(batch_size, max_tokens)
        self._seed = shuffle_seed
        self._rank = rank
        self._world_size = world_size
        self._remainder: Remainder = remainder
        self._follow = follow
        self._filter = (
            None if filter is None else (expression_of(filter, table.remove(table.names.index("latent"))), table)
        )
        self._window_bytes = window_bytes
        self._cache = FileCache(Path(cache_dir) if cache_dir else Path.home() / ".cache" / "latentmill", cache_bytes)
        self._recipe = BatchRecipe(
            model=self.manifest.model,
            seed=shuffle_seed or 0,
            columns=tuple(columns),
            is_scaled=scaled,
            sample_posterior=sample_posterior,
            captions=tuple(captions),
            caption_dropout=caption_dropout,
            first_frame=first_frame,
            text=_column_set("text", text, self._store, self._cache, captions),
            image=_column_set("image", image, self._store, self._cache, captions),
        )
        self._contents = self._planned(self._agreed_latest() if follow else snapshot)
        # Epoch, global batches to pass over, snapshot. Shared memory, so that persistent workers see a new epoch too.
        self._start = torch.tensor([0, 0, self._contents.snapshot or 0]).share_memory_()
        # Of this process: epoch, global batches behind it, turns behind it.
        self._position = 0, 0, 0
        self._resumed: tuple[int, int, int] | None = None
        self._reader: RowReader | None = None

    @property
    def snapshot(self) -> int | None:
        """Number of the snapshot that is read, None where there is none."""
        return self._contents.snapshot

    @property
    def num_records(self) -> int:
        """Rows of an epoch over all ranks, before the remainder is dropped or padded."""
        return int(self._contents.counts.sum())

    def __len__(self) -> int:
        """Batches of a whole epoch for this rank."""
        return self._num_batches(self._rank)

    def _num_batches(self, rank: int) -> int:
        rows = self._contents.counts.sum(axis=0)
        return num_batches(rows, self._contents.batch_rows, rank, self._world_size, self._remainder)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next pass; another epoch than before starts at its beginning.

        Raises:
            UsageError: the epoch is negative.
        """
        if epoch < 0:
            raise UsageError(f"epoch {epoch} is negative; epochs count from 0")
        if epoch != int(self._start[0]):
            if self._follow:
                self._turn_to(self._agreed_latest())
            self._begin_at(epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that this object gave out, for any rank; plain JSON values.

        In a DataLoader worker it is the worker's own: torchdata's StatefulDataLoader asks for it there, and gives it
        back to the same one of as many workers. Behind a plain DataLoader take the "cursor" of the last batch.
        """
        epoch, passed, turn = self._position
        worker = get_worker_info()
        return self._state(self._contents, epoch, passed) | {"worker": worker and [worker.id, worker.num_workers, turn]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Starts the next pass where the state was taken; the same order goes on, batch by batch.

        Any rank's state serves every rank, also with another world size at the same global batch; among the short
        batches that end an epoch with remainder "keep" take rank 0's, which gets all of them. The state of an epoch
        that is over changes nothing where a later one is set already.

        Raises:
            UsageError: the state is of other data, another seed, window or global batch size, or of a worker and this
                is not the same one.
        """
        worker, of_worker = get_worker_info(), state.get("worker")
        if of_worker is not None and (worker is None or [worker.id, worker.num_workers] != list(of_worker[:2])):
            here = "is none" if worker is None else f"is worker {worker.id} of {worker.num_workers}"
            raise UsageError(
                f"the state is that of DataLoader worker {of_worker[0]} of {of_worker[1]}, and this process {here}; "
                'torchdata\'s StatefulDataLoader loads it with as many workers, and batch["cursor"] fits any number'
            )
        if self._follow and state.get("version") == STATE_VERSION:
            self._turn_to(state["snapshot"])
        self._refuse_another_order(state)
        epoch, passed = int(state["epoch"]), int(state["num_global_batches"])
        if worker is not None:
            self._resumed = self._position = epoch, passed, 0 if of_worker is None else int(of_worker[2])
        elif epoch >= int(self._start[0]) or passed < self._num_batches(rank=0):
            self._begin_at(epoch, passed)
        else:
            self._turn_to(int(self._start[2]) or None)

    def _refuse_another_order(self, state: Mapping[str, Any]) -> None:
        now = self._state(self._contents, 0, 0)
        fixed = [name for name in now if name not in ("epoch", "num_global_batches", "snapshot", "worker")]
        other = [
            f"{name} {state.get(name)!r} there, {now[name]!r} here" for name in fixed if state.get(name) != now[name]
        ]
        if other:
            raise UsageError(
                f"the state does not fit this dataset ({'; '.join(other)}); open it with the same seed, window_bytes, "
                "filter and rows of a global batch (batch_size * world_size), and with "
                f"snapshot={state.get('snapshot')!r}"
            )

    def _begin_at(self, epoch: int, passed: int) -> None:
        self._start[0], self._start[1], self._start[2] = epoch, passed, self._contents.snapshot or 0
        self._position = epoch, passed, 0

    def _turn_to(self, snapshot: int | None) -> None:
        if snapshot != self._contents.snapshot:
            self._contents = self._planned(snapshot)
            self._reader = None

    def _state(self, plan: Contents, epoch: int, passed: int) -> dict[str, Any]:
        sizes = (plan.batch_rows * self._world_size).tolist()
        return {
            "version": STATE_VERSION,
            "snapshot": plan.snapshot,
            "data": plan.digest,
            "shuffle_seed": self._seed,
            "window_bytes": self._window_bytes,
            "global_batch_size": dict(zip(plan.buckets, sizes, strict=True)),
            "epoch": epoch,
            "num_global_batches": passed,
            "worker": None,
        }

    def _agreed_latest(self) -> int:
        """The latest snapshot as rank 0 sees it: two ranks that look may see different ones."""
        number = latest_snapshot_number(self._store)
        if self._world_size > 1:
            if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
                raise UsageError(
                    "follow with several ranks needs torch.distributed, initialised before: each rank alone could see "
                    "another snapshot as the latest. Without it, open a new dataset with snapshot=N in every rank"
                )
            agreed = [number]
            torch.distributed.broadcast_object_list(agreed, src=0)
            (number,) = agreed
        if number is None:
            raise UsageError(f"{self._store.root_uri} has no snapshot to follow yet; a run publishes one when it ends")
        return number

    def _planned(self, snapshot: int | None) -> Contents:
        contents = contents_of(self._store, self._cache, snapshot, self._filter, self._batch_size, self.manifest.model)
        if get_worker_info() is None:  # a worker plans what its loader has planned before
            for column_set in self._recipe.column_sets:
                column_set.refuse_gaps(contents.files)
        return contents

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Not a generator itself: StatefulDataLoader asks for the state before the first batch.
        if self._resumed is None:
            epoch, passed, snapshot = (int(value) for value in self._start)
            self._turn_to(snapshot or None)
            self._position = epoch, passed, 0
        else:
            self._position, self._resumed = self._resumed, None
        return self._batches(self._contents, *self._position)

    def _batches(self, plan: Contents, epoch: int, passed: int, turn: int) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        worker_id, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        reader = self._row_reader(num_workers)
        for batch, rows in reader.read(self._planned_batches(plan, epoch, passed, turn, worker_id, num_workers)):
            loaded = self._recipe.batch(rows, [plan.files[file].shard_id for file in batch.files.tolist()], epoch)
            loaded["is_padding"] = [row >= batch.num_distinct for row in range(len(rows))]
            loaded["bucket"] = batch.bucket
            loaded["cursor"] = self._state(plan, epoch, batch.number)
            self._position = epoch, batch.number, batch.turn + 1
            yield loaded

    def _planned_batches(
        self, plan: Contents, epoch: int, passed: int, turn: int, worker_id: int, num_workers: int
    ) -> Iterator[PlannedBatch]:
        batches = global_batches(
            plan.counts,
            plan.file_bytes,
            batch_rows=plan.batch_rows * self._world_size,
            seed=self._seed,
            epoch=epoch,
            remainder=self._remainder,
            window_bytes=self._window_bytes,
            num_passed=passed,
        )
        for number, batch in enumerate(batches, start=passed + 1):
            rows = int(plan.batch_rows[batch.bucket])
            start, stop = self._rank * rows, min((self._rank + 1) * rows, batch.num_rows)
            if start >= stop:
                return
            if turn % num_workers == worker_id:
                files, numbers = batch.places(start, stop)
                yield PlannedBatch(
                    number=number,
                    turn=turn,
                    bucket=plan.buckets[batch.bucket],
                    files=files,
                    numbers=numbers,
                    num_distinct=batch.num_distinct - start,
                )
            turn += 1

    def _row_reader(self, num_workers: int) -> RowReader:
        # A forked worker inherits what its parent had open; it opens its own.
        if self._reader is None or self._reader.pid != os.getpid():
            self._reader = self._new_reader(lanes_of_worker(num_workers))
        return self._reader

    def _new_reader(self, num_lanes: int) -> RowReader:
        return RowReader(
            self._store,
            self._contents.files,
            self._cache,
            self._contents.checked.numpy(),
            self._recipe.read_columns,
            self._recipe.column_sets,
            self._filter,
            # A batch may still hold rows of the window before the current one.
            max_open_files=2 * WINDOW_FILES * num_lanes // LANES,
            window_bytes=self._window_bytes * num_lanes // LANES,
            num_lanes=num_lanes,
        )

    def stats(self, num_samples: int | None = None) -> LatentStats:
        """Counts, and mean and deviation of each channel.

        Args:
            num_samples: about as many rows are read, of files in random order; None: all.

        Raises:
            DamagedObjectError: a file does not have the bytes that its commit states.
        """
        plan, reader = self._contents, self._new_reader(1)
        num_read = num_values = 0
        sums = squares = np.zeros(self.manifest.model.latent_channels)
        for file in shuffled(len(plan.files), self._seed or 0, 0, 0).tolist():
            if num_samples is not None and num_read >= num_samples:
                break
            for bucket, rows in plan.files[file].bucket_rows.items():
                for number in range(rows):
                    mean = reader.record(file, bucket, number).mean.astype(np.float64)
                    sums = sums + mean.sum(axis=(1, 2, 3))
                    squares = squares + (mean * mean).sum(axis=(1, 2, 3))
                    num_values += mean[0].size
                num_read += rows
        average = sums / num_values
        deviation = np.sqrt(np.maximum(squares / num_values - average * average, 0))
        if self._recipe.is_scaled:
            model = self.manifest.model
            average, deviation = (average - model.shift_factor) * model.scaling_factor, deviation * model.scaling_factor
        rows_of = dict(zip(plan.buckets, plan.counts.sum(axis=0).tolist(), strict=True))
        return LatentStats(
            bucket_rows=rows_of,
            num_samples=num_read,
            mean=tuple(average.tolist()),
            deviation=tuple(deviation.tolist()),
        )

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


def _check_order(shuffle_seed: int | None, rank: int, world_size: int, remainder: str) -> None:
    if not 0 <= rank < world_size:
        raise UsageError(f"rank {rank} of world_size {world_size}: ranks go from 0 to world_size - 1")
    if remainder not in REMAINDERS:
        raise UsageError(f"remainder {remainder!r} is not one of {', '.join(REMAINDERS)}")
    if shuffle_seed is not None and shuffle_seed < 0:
        raise UsageError(f"shuffle_seed is {shuffle_seed}; it must be 0 or more, or None for no shuffling")


def _check_columns(columns: Sequence[str], captions: Sequence[str], table: pa.Schema, uri: str) -> None:
    known = [name for name in table.names if name != "latent"]
    unknown = [name for name in (*columns, *captions) if name not in known]
    if unknown:
        raise UsageError(f"{uri} has no column {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
    taken = [name for name in columns if name in BATCH_NAMES]
    if taken:
        raise UsageError(f"columns: {', '.join(map(repr, taken))} is in every batch already; leave it out")
    texts = [name for name in known if pa.types.is_string(table.field(name).type) and name != EXTRA.name]
    if not captions or not set(captions) <= set(texts):
        raise UsageError(f"captions={tuple(captions)!r}: give columns of text, such as {', '.join(texts)}")


def _column_set(
    argument: SetName, name: str | None, store: ObjectStore, cache: FileCache, captions: Sequence[str]
) -> ColumnSet | None:
    if name is None:
        return None
    found = ColumnSet.open(store, name, cache)
    if found.manifest.name != argument:
        raise UsageError(
            f"{argument}={name!r} names a set of {found.manifest.name} embeddings; give {argument}={argument!r}"
        )
    embedded = found.manifest.fingerprint_fields.get("columns")
    if argument == "text" and isinstance(embedded, list) and not set(captions) <= set(embedded):
        raise UsageError(
            f"captions={tuple(captions)!r}: {columns_store(store, name).root_uri} holds embeddings of the columns "
            f"{', '.join(embedded)} only; draw captions of these, or encode into another output with --text-columns "
            f"{','.join(captions)}"
        )
    return found


def _check_draws(sample_posterior: bool, caption_dropout: float, manifest: DatasetManifest, uri: str) -> None:
    if sample_posterior and manifest.kind != "moments":
        raise UsageError(
            f"sample_posterior: {uri} holds means without log-variances; encode with --store moments to draw from them"
        )
    if not 0 <= caption_dropout <= 1:
        raise UsageError(f"caption_dropout is {caption_dropout}; it is a probability, from 0 to 1")
