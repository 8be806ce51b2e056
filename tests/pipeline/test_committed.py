"""What is promised of a shard with several generations: each sample counts once, and the accounts say so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from latents import commit_records, manifest, record, rejection

from pipeline.commit import name_of, open_dataset, publish_snapshot, read_shard
from pipeline.committed import FileCache, ShardOutcome, shard_outcome, stored_columns
from pipeline.errors import DamagedObjectError
from pipeline.records import DatasetManifest
from pipeline.storage import ObjectStore, open_store


@pytest.fixture
def output(tmp_path: Path) -> tuple[ObjectStore, DatasetManifest, FileCache]:
    store = open_store(str(tmp_path / "output"))
    return store, open_dataset(store, manifest()), FileCache(tmp_path / "cache", 1 << 30)


Output = tuple[ObjectStore, DatasetManifest, FileCache]


def outcome(output: Output) -> ShardOutcome:
    store, _, cache = output
    shard = read_shard(store, "s")
    assert shard is not None
    found = shard_outcome(shard, store, cache)
    assert found.counts == shard.counts, "the latest record states the accounts of the whole shard"
    assert publish_snapshot(store).num_records == len(found.generations)
    return found


def standing(found: ShardOutcome) -> set[tuple[str, int | None]]:
    return {(failure.key, failure.clip_index) for failure in found.rejections}


def test_a_first_generation_is_its_own_account(output: Output) -> None:
    store, about, _ = output
    commit = commit_records(
        store, about, "s", [record("a"), record("b"), record("b", 1)], [rejection("c"), rejection("b", 2)]
    )
    found = outcome(output)
    assert found.generations == {("a", 0): 0, ("b", 0): 0, ("b", 1): 0}
    assert standing(found) == {("c", None), ("b", 2)}
    assert found.counts == commit.counts


def test_ok_beats_rejected_and_the_latest_rejection_says_why(output: Output) -> None:
    store, about, _ = output
    commit_records(store, about, "s", [record("a")], [rejection("b"), rejection("c"), rejection("a", 1)])
    commit_records(store, about, "s", [record("b"), record("b", 1)], [rejection("c", 0)], keys=["b", "c"])
    found = outcome(output)
    assert found.generations == {("a", 0): 0, ("b", 0): 1, ("b", 1): 1}
    assert standing(found) == {("c", 0), ("a", 1)}
    assert (found.counts.num_videos, found.counts.num_videos_ok, found.counts.num_videos_rejected) == (3, 2, 1)
    assert (found.counts.num_clips, found.counts.num_clips_rejected) == (5, 2)
    commit_records(store, about, "s", [record("a", 1)], [rejection("c")], keys=["a", "c"])
    found = outcome(output)
    assert found.generations[("a", 1)] == 2
    assert standing(found) == {("c", None)}


def test_of_several_ok_the_lowest_generation_that_counts_is_read(output: Output) -> None:
    store, about, _ = output
    first = commit_records(store, about, "s", [record("a"), record("b")], [rejection("c")])
    commit_records(store, about, "s", [record("b"), record("c")], keys=["b", "c"])
    assert outcome(output).generations == {("a", 0): 0, ("b", 0): 0, ("c", 0): 1}
    commit_records(store, about, "s", [record("a"), record("b")], [rejection("c")], replaces=name_of(first))
    found = outcome(output)
    assert found.generations == {("a", 0): 2, ("b", 0): 1, ("c", 0): 1}
    assert (found.rejections, found.counts.num_videos) == ((), 3)


def test_a_video_that_a_retry_could_not_read_keeps_the_clips_that_it_had(output: Output) -> None:
    store, about, _ = output
    commit_records(store, about, "s", [record("a")], [rejection("a", 1)])
    commit_records(store, about, "s", [], [rejection("a")], keys=["a"])
    found = outcome(output)
    assert found.generations == {("a", 0): 0}
    assert standing(found) == {("a", 1)}
    assert (found.counts.num_videos, found.counts.num_videos_rejected, found.counts.num_clips) == (1, 0, 2)


def test_what_was_the_unread_rest_of_a_shard_is_gone_when_it_is_read(output: Output) -> None:
    store, about, _ = output
    commit_records(store, about, "s", [record("a")], [rejection("*")])
    commit_records(store, about, "s", [record("b"), record("c")], keys=["*", "b", "c"])
    found = outcome(output)
    assert (found.rejections, found.counts.num_videos, found.counts.num_records) == ((), 3, 3)


def test_a_replaced_record_may_be_damaged_and_one_that_counts_may_not(output: Output) -> None:
    store, about, _ = output
    first = commit_records(store, about, "s", [record("a")])
    (file,) = first.files
    store.delete(file.key)
    store.put_if_absent(file.key, b"rot")
    shard = read_shard(store, "s")
    assert shard is not None
    with pytest.raises(DamagedObjectError):
        shard_outcome(shard, store, output[2])
    commit_records(store, about, "s", [record("a")], replaces="s")
    assert outcome(output).generations == {("a", 0): 1}


@pytest.mark.parametrize("content", ["parquet", "webdataset"])
def test_a_file_with_another_number_of_rows_than_its_record_states_is_damaged(output: Output, content: str) -> None:
    store, about, cache = output
    (stat,) = commit_records(store, about, "s", [record("a"), record("b")], output_format=content).files
    assert stored_columns(stat, store, cache, ("key", "clip_index")) == [("a", 0), ("b", 0)]
    with pytest.raises(DamagedObjectError, match="has 2 rows, its record states 3"):
        stored_columns(replace(stat, num_rows=3), store, cache, ("key",))
