"""How many requests a run sends to its stores, worked out from what it does: a list of a run's steps with their costs.

Nothing is sent here. Each number below belongs to a line of `run`, `plan`, `actors`, `source` or `commit`, and a test
counts the requests of a real run against the sum. Requests that fail and are repeated are not foreseen. On a local disk
the same steps are files read, listed and written. Used by `estimate`.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from pipeline.commit import SEGMENT_COMMITS

KINDS = ("get", "head", "list", "put", "delete")
# Of one list; what S3 and those that speak its API give at once.
_KEYS_PER_PAGE = 1000
# `storage.open_input` reads ahead by so much.
READ_BYTES = 4 << 20
# Samples of the first shard whose fields tell the columns that pass through (`plan.infer_passthrough`).
_NUM_SAMPLES_FOR_COLUMNS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a run does, as far as its requests follow from it.

    Attributes:
        num_shards: to encode in this run.
        num_records: commit records that stand in the output.
        num_published: of these in the latest snapshot; None where there is none.
        is_begun: the output has its description.
        num_files: data files that the shards will have.
        num_sets: of embeddings in the same pass.
        num_plans: tables and folders of the input; 0 for tars.
        num_new_slices: that are not written under plans/ yet.
        num_input_files: that the input lists, about.
        snapshot_every, snapshot_growth: of the shards done since, a snapshot follows at the larger of this number and
            this share of all.
    """

    num_shards: int
    num_records: int
    num_published: int | None
    is_begun: bool
    num_files: float
    num_sets: int
    num_plans: int
    num_new_slices: int
    num_input_files: int
    snapshot_every: int
    snapshot_growth: float


def requests_to_output(work: Work) -> dict[str, int]:
    """Requests to the output by kind."""
    sent: Counter[str] = Counter()
    _begin(sent, work)
    for _ in range(1 + work.num_sets):
        _publish_all(sent, work)
    # The accounts of all shards are read from the last one.
    sent["get"] += _snapshot_reads(work.num_records + work.num_shards)
    # The driver looks whether it sees what its actors committed.
    sent["list"] += _pages(work.num_records + work.num_shards)
    # An actor looks whether the shard is decided; to create the record it looks once more.
    sent["get"] += 2 * work.num_shards
    sent["put"] += work.num_shards
    sent["put"] += round(work.num_files)
    if work.num_plans:
        sent["get"] += work.num_shards  # its slice
    # Of each set: is there a record, the file, and the record.
    sent["get"] += 2 * work.num_shards * work.num_sets
    sent["put"] += 2 * work.num_shards * work.num_sets
    return {kind: sent[kind] for kind in KINDS}


def _begin(sent: Counter[str], work: Work) -> None:
    sent["get"] += 1  # the description
    for _ in range(work.num_plans):
        sent["list"] += 1
        sent["get"] += int(work.is_begun)  # its earlier round, or a few of them
    if work.num_new_slices:
        sent["get"] += work.num_new_slices + work.num_plans
        sent["put"] += work.num_new_slices + work.num_plans
    sent["list"] += 2 + _pages(work.num_records)  # snapshots, ordered repairs, records
    sent["get"] += _snapshot_reads(work.num_published) + work.num_records - (work.num_published or 0)
    sent["list"] += 2 * work.num_sets  # their ordered repairs
    # Output and sets are created or compared.
    sent["get"] += 1 + work.num_sets
    sent["put"] += int(not work.is_begun) * (1 + work.num_sets)
    if work.num_plans and not work.is_begun:
        sent["get"] += 1  # the first slice, for the columns that pass through
    # `commit.check_store`
    sent["get"] += 4
    sent["put"] += 10
    sent["list"] += 1
    sent["delete"] += 2


def _publish_all(sent: Counter[str], work: Work) -> None:
    """The snapshots of a run, as `run` comes to them."""
    published, num_records, num_since = work.num_published, work.num_records, 0
    for number in range(1, work.num_shards + 1):
        num_records += 1
        num_since += 1
        if num_since >= max(work.snapshot_every, work.snapshot_growth * num_records) and number < work.num_shards:
            published, num_since = _publish(sent, num_records, published), 0
    _publish(sent, num_records, published)


def _publish(sent: Counter[str], num_records: int, published: int | None) -> int:
    sent["list"] += 1 + _pages(num_records)
    sent["get"] += _snapshot_reads(published) + num_records - (published or 0)
    if published == num_records:
        return num_records
    num_full = (published or 0) // SEGMENT_COMMITS
    num_segments = math.ceil((num_records - num_full * SEGMENT_COMMITS) / SEGMENT_COMMITS)
    # Full segments stay; the last one is read once more, and all but full ones are packed anew, and then the snapshot.
    sent["get"] += int((published or 0) % SEGMENT_COMMITS > 0) + num_segments + 1
    sent["put"] += num_segments + 1
    return num_records


def _snapshot_reads(published: int | None) -> int:
    return 0 if published is None else 1 + math.ceil(published / SEGMENT_COMMITS)


def _pages(num_keys: int) -> int:
    return max(1, math.ceil(num_keys / _KEYS_PER_PAGE))


def reads_of_file(num_bytes: float) -> int:
    """Requests for the content of an input file that is read to its end."""
    return math.ceil(num_bytes / READ_BYTES)


def requests_of_tars(sizes_bytes: list[int]) -> Counter[str]:
    """Requests to an input for the content of tars: each is looked at before, when it is opened, and afterwards."""
    return Counter(head=3 * len(sizes_bytes), get=sum(map(reads_of_file, sizes_bytes)))


def requests_of_plan(work: Work, first_tar_bytes: float | None, bytes_per_video: float) -> Counter[str]:
    """Requests of the driver to an input.

    Args:
        first_tar_bytes: size of the first shard where that is a tar.
        bytes_per_video: of a tar.
    """
    sent: Counter[str] = Counter(head=1, list=_pages(work.num_input_files))
    if first_tar_bytes is not None and not work.is_begun:
        sent["head"] += 1
        sent["get"] += max(1, reads_of_file(min(first_tar_bytes, _NUM_SAMPLES_FOR_COLUMNS * bytes_per_video)))
    return sent
