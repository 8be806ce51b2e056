"""What a training loop may rely on: every row once, whole batches of one shape, the same order for any split over ranks
and workers, exact resume, and never a byte that no commit vouches for."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SeaweedFS
from latents import IMAGE, SMALL, WIDE, commit_records, latent_of, manifest, names, order, output, record, rejection
from torch.utils.data import DataLoader

from pipeline import LatentDataset
from pipeline.commit import load_commits, open_dataset, publish_snapshot
from pipeline.dataset import data_urls
from pipeline.errors import DamagedObjectError, StorageNotFoundError, UsageError
from pipeline.records import LatentRecord
from pipeline.storage import open_store

# 30 SMALL, 12 WIDE, 6 IMAGE: with global batches of 8 every bucket has a remainder.
SHARDS = [
    [record(f"k{s}{i}", i % 2, IMAGE if i == 7 else WIDE if i in (2, 5) else SMALL) for i in range(8)] for s in range(6)
]
RECORDS = {(r.key, r.clip_index): r for shard in SHARDS for r in shard}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("output")
    publish_snapshot(output(folder, SHARDS))
    return str(folder)


def loader(dataset: LatentDataset, num_workers: int = 2, **options: Any) -> DataLoader[dict[str, Any]]:
    return DataLoader(dataset, batch_size=None, num_workers=num_workers, **options)


def global_order(root: str, world_size: int, batch_size: int, **options: Any) -> list[tuple[tuple[str, int], ...]]:
    """The global batches as the ranks together take them."""
    ranks = [
        order(LatentDataset(root, batch_size=batch_size, rank=rank, world_size=world_size, **options))
        for rank in range(world_size)
    ]
    together = itertools.zip_longest(*ranks, fillvalue=())
    return [tuple(itertools.chain(*parts)) for parts in together]


def test_an_epoch_has_every_record_once_in_batches_of_one_shape(root: str) -> None:
    dataset = LatentDataset(root, batch_size=4)
    batches = list(dataset)
    assert Counter(itertools.chain(*order(batches))) == Counter(RECORDS.keys())
    assert dataset.num_records == len(RECORDS)
    assert len(dataset) == len(batches) == 8 + 3 + 2
    for batch in batches:
        assert {str(RECORDS[name].bucket) for name in names(batch)} == {batch["bucket"]}
        assert batch["latents"].shape[0] == len(batch["key"]) <= 4


def test_a_batch_holds_scaled_float32_latents_and_what_belongs_to_them(root: str) -> None:
    for batch in LatentDataset(root, batch_size=4, columns=["source_width", "clip_end_s", "extra"]):
        assert batch["latents"].dtype == torch.float32
        for row, name in enumerate(names(batch)):
            wrote = RECORDS[name]
            np.testing.assert_array_equal(batch["latents"][row], 0.5 * (latent_of(*name, wrote.bucket) - 0.25))
            assert batch["caption"][row] == wrote.caption
            assert batch["fps"][row] == wrote.fps
            assert batch["clip_end_s"][row] == wrote.end_s
            assert batch["source_width"][row] == 640
            assert batch["extra"][row] is None
            assert batch["shard_id"][row] == f"s{int(wrote.key[1]):03d}"
            assert batch["is_padding"][row] is False


def test_the_same_seed_and_epoch_give_the_same_order_and_others_do_not(root: str) -> None:
    dataset = LatentDataset(root, batch_size=4)
    first = order(dataset)
    assert order(dataset) == first
    assert order(LatentDataset(root, batch_size=4)) == first
    assert order(LatentDataset(root, batch_size=4, shuffle_seed=1)) != first
    dataset.set_epoch(1)
    assert order(dataset) != first
    dataset.set_epoch(0)
    assert order(dataset) == first


def test_without_a_seed_records_come_as_they_were_committed(root: str) -> None:
    expected = [name for name, wrote in RECORDS.items() if wrote.bucket == SMALL]
    batches = [batch for batch in LatentDataset(root, batch_size=4, shuffle_seed=None) if batch["bucket"] == str(SMALL)]
    assert list(itertools.chain(*order(batches))) == expected


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_hand_the_batches_over_in_the_order_of_one_process(root: str, num_workers: int) -> None:
    dataset = LatentDataset(root, batch_size=3, shuffle_seed=5)
    alone = list(dataset)
    shared = list(loader(dataset, num_workers))
    assert order(shared) == order(alone)
    assert [batch["cursor"] for batch in shared] == [batch["cursor"] for batch in alone]
    for ours, theirs in zip(alone, shared, strict=True):
        assert torch.equal(ours["latents"], theirs["latents"])


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_forked_and_spawned_workers_that_persist_follow_the_epoch_that_is_set(root: str, how: str) -> None:
    dataset = LatentDataset(root, batch_size=3)
    workers = loader(dataset, 1, persistent_workers=True, multiprocessing_context=how)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        assert order(workers) == order(dataset)
    state = list(dataset)[4]["cursor"]
    dataset.load_state_dict(state)
    assert order(workers) == order(dataset)


@pytest.mark.parametrize("remainder", ["keep", "drop", "pad"])
def test_ranks_take_the_slices_of_the_same_global_batches(root: str, remainder: str) -> None:
    alone = global_order(root, 1, 8, remainder=remainder)
    assert global_order(root, 2, 4, remainder=remainder) == alone
    assert global_order(root, 4, 2, remainder=remainder) == alone
    for rank in range(4):
        dataset = LatentDataset(root, batch_size=2, rank=rank, world_size=4, remainder=remainder)  # type: ignore[arg-type]
        assert len(dataset) == len(list(dataset))


def test_keep_gives_later_ranks_less_and_leaves_nothing_out(root: str) -> None:
    parts = [order(LatentDataset(root, batch_size=4, rank=rank, world_size=2)) for rank in range(2)]
    assert Counter(itertools.chain(*parts[0], *parts[1])) == Counter(RECORDS.keys())
    # Of each bucket 6, 4 and 6 rows are left.
    assert len(parts[0]) == len(parts[1]) + 1


def test_drop_and_pad_give_every_rank_the_same_number_of_whole_batches(root: str) -> None:
    for remainder, expected in (("drop", 3 + 1 + 0), ("pad", 4 + 2 + 1)):
        for rank in range(2):
            batches = list(LatentDataset(root, 4, 0, rank, 2, remainder))  # type: ignore[arg-type]
            assert [len(batch["key"]) for batch in batches] == [4] * expected


def test_pad_marks_the_rows_that_it_repeats(root: str) -> None:
    batches = list(LatentDataset(root, batch_size=8, remainder="pad"))
    fresh = [name for batch in batches for name, old in zip(names(batch), batch["is_padding"], strict=True) if not old]
    assert Counter(fresh) == Counter(RECORDS.keys())
    assert sum(sum(batch["is_padding"]) for batch in batches) == 2 + 4 + 2


@pytest.mark.parametrize("stop", [0, 1, 5, 12, 13])
def test_a_state_resumes_at_the_very_next_batch(root: str, stop: int) -> None:
    whole = order(LatentDataset(root, batch_size=4))
    dataset = LatentDataset(root, batch_size=4)
    seen = order(itertools.islice(dataset, stop))
    state = json.loads(json.dumps(dataset.state_dict()))
    resumed = LatentDataset(root, batch_size=4)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert seen + order(resumed) == whole


def test_a_cursor_from_workers_resumes_under_another_number_of_workers(root: str) -> None:
    dataset = LatentDataset(root, batch_size=4)
    dataset.set_epoch(3)
    whole = order(dataset)
    batches = list(itertools.islice(loader(dataset, 2), 5))
    for num_workers in (0, 1, 2):
        resumed = LatentDataset(root, batch_size=4)
        resumed.load_state_dict(batches[-1]["cursor"])
        assert order(batches) + order(loader(resumed, num_workers)) == whole


@pytest.mark.parametrize("taken_on", [0, 1])
def test_any_ranks_state_resumes_every_rank_of_another_world_size(root: str, taken_on: int) -> None:
    whole = global_order(root, 1, 8)
    batches = list(itertools.islice(LatentDataset(root, batch_size=4, rank=taken_on, world_size=2), 3))
    rest = []
    for rank in range(4):
        resumed = LatentDataset(root, batch_size=2, rank=rank, world_size=4)
        resumed.load_state_dict(batches[-1]["cursor"])
        rest.append(order(resumed))
    together = [tuple(itertools.chain(*parts)) for parts in itertools.zip_longest(*rest, fillvalue=())]
    assert together == whole[3:]


def test_a_new_epoch_after_a_resume_starts_at_its_beginning(root: str) -> None:
    dataset = LatentDataset(root, batch_size=4)
    dataset.load_state_dict(next(iter(dataset))["cursor"])
    assert len(order(dataset)) == len(dataset) - 1
    dataset.set_epoch(1)
    assert len(order(dataset)) == len(dataset)


@pytest.mark.parametrize("change", [{"shuffle_seed": 1}, {"batch_size": 5}, {"window_bytes": 1000}])
def test_a_state_of_another_order_is_refused(root: str, change: dict[str, Any]) -> None:
    state = LatentDataset(root, batch_size=4).state_dict()
    with pytest.raises(UsageError, match=r"does not fit.*there.*here"):
        LatentDataset(root, **{"batch_size": 4, **change}).load_state_dict(state)


def test_a_snapshot_is_pinned_and_later_commits_do_not_change_the_order(tmp_path: Path) -> None:
    store = output(tmp_path, SHARDS[:3])
    number = publish_snapshot(store).number
    dataset = LatentDataset(str(tmp_path), batch_size=4)
    before = order(dataset)
    commit_records(store, manifest(), "s100", SHARDS[3])
    assert order(LatentDataset(str(tmp_path), batch_size=4)) == before
    publish_snapshot(store)
    latest = LatentDataset(str(tmp_path), batch_size=4)
    assert latest.num_records == dataset.num_records + 8
    with pytest.raises(UsageError, match=f"snapshot={number}"):
        latest.load_state_dict(dataset.state_dict())
    pinned = LatentDataset(str(tmp_path), batch_size=4, snapshot=number)
    pinned.load_state_dict(dataset.state_dict())
    assert pinned.snapshot == number


def test_without_a_snapshot_the_commits_count(tmp_path: Path) -> None:
    output(tmp_path, SHARDS[:2])
    dataset = LatentDataset(str(tmp_path))
    assert (dataset.snapshot, dataset.num_records) == (None, 16)


def test_files_that_no_commit_names_are_not_read(tmp_path: Path) -> None:
    output(tmp_path, SHARDS[:2])
    for file in list((tmp_path / "data").rglob("*.parquet")):
        (file.parent / f"orphan-{file.name}").write_bytes(b"half written")
    assert len(list(itertools.chain(*order(LatentDataset(str(tmp_path)))))) == 16


def test_tars_give_the_same_batches_as_parquet(tmp_path: Path, root: str) -> None:
    output(tmp_path, SHARDS, output_format="webdataset")
    for ours, theirs in zip(
        LatentDataset(str(tmp_path), columns=["crop"]), LatentDataset(root, columns=["crop"]), strict=True
    ):
        assert torch.equal(ours.pop("latents"), theirs.pop("latents"))
        assert ours | {"cursor": None} == theirs | {"cursor": None}


def test_of_several_generations_of_a_shard_the_lowest_counts(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    about = open_dataset(store, manifest())
    first = [record("a"), record("b")]
    again = [record("b", caption="of the retry"), record("c", caption="of the retry"), record("c", 1, WIDE)]
    commit_records(store, about, "s", first, [rejection("c")])
    commit_records(store, about, "s", again, keys=["b", "c"])
    dataset = LatentDataset(str(tmp_path), batch_size=2)
    found = {name: text for batch in dataset for name, text in zip(names(batch), batch["caption"], strict=True)}
    assert found == {
        ("a", 0): "caption of a",
        ("b", 0): "caption of b",
        ("c", 0): "of the retry",
        ("c", 1): "caption of c",
    }
    assert dataset.num_records == 4


def test_opening_an_output_with_retries_fetches_no_file(s3_env: SeaweedFS, tmp_path: Path) -> None:
    root = s3_env.root()
    store = open_store(root)
    about = open_dataset(store, manifest())
    for shard_id in ("s", "t", "u"):
        commit_records(store, about, shard_id, [record("a"), record("b")], [rejection("c")])
        commit_records(store, about, shard_id, [record("b"), record("c")], keys=["b", "c"])
    dataset = LatentDataset(root, batch_size=2, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert Counter(name for batch in dataset for name in names(batch)) == {("a", 0): 3, ("b", 0): 3, ("c", 0): 3}


def test_a_record_that_was_replaced_is_not_read_and_an_older_snapshot_still_reads_it(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    about = open_dataset(store, manifest())
    commit_records(store, about, "s", [record("a", caption="before"), record("b", caption="before")])
    before = publish_snapshot(store)
    commit_records(store, about, "s", [record("a", caption="after"), record("b", caption="after")], replaces="s")
    after = publish_snapshot(store)

    def captions(snapshot: int) -> set[str]:
        return {text for batch in LatentDataset(str(tmp_path), snapshot=snapshot) for text in batch["caption"]}

    assert captions(before.number) == {"before"}
    assert captions(after.number) == {"after"}
    assert len(data_urls(str(tmp_path))) == 1
    assert data_urls(str(tmp_path), snapshot=before.number) != data_urls(str(tmp_path), snapshot=after.number)


def test_a_pinned_reader_sees_nothing_of_what_is_written_meanwhile(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    about = open_dataset(store, manifest())
    commit_records(store, about, "s", [record("a"), record("b")], [rejection("c")])
    publish_snapshot(store)
    dataset = LatentDataset(str(tmp_path), batch_size=1)
    state = dataset.state_dict()
    expected = list(itertools.chain(*order(dataset)))
    found = []
    for number, batch in enumerate(dataset):
        found += names(batch)
        commit_records(store, about, f"new-{number}", [record(f"n{number}")])
        commit_records(store, about, "s", [record("c", number)], keys=["c"])
        publish_snapshot(store)
    assert found == expected
    assert dataset.state_dict()["data"] == state["data"]
    assert LatentDataset(str(tmp_path)).num_records == 6
    again = LatentDataset(str(tmp_path), batch_size=1, snapshot=state["snapshot"])
    again.load_state_dict(state)
    assert list(itertools.chain(*order(again))) == expected


def test_posterior_samples_are_the_same_for_any_split_and_new_in_every_epoch(tmp_path: Path) -> None:
    records = [record(f"k{i}", kind="moments", dtype="float32") for i in range(12)]
    output(tmp_path, [records[:6], records[6:]], kind="moments", dtype="float32")

    def drawn(dataset: LatentDataset, num_workers: int = 0) -> dict[tuple[str, int], torch.Tensor]:
        batches = loader(dataset, num_workers)
        return {name: latent for batch in batches for name, latent in zip(names(batch), batch["latents"], strict=True)}

    whole = LatentDataset(str(tmp_path), batch_size=4, sample_posterior=True)
    draws = drawn(whole)
    ranks = [LatentDataset(str(tmp_path), batch_size=3, rank=r, world_size=2, sample_posterior=True) for r in range(2)]
    shared = drawn(ranks[0], 2) | drawn(ranks[1])
    assert all(torch.equal(draws[name], shared[name]) for name in draws)
    whole.set_epoch(1)
    assert not any(torch.equal(draws[name], latent) for name, latent in drawn(whole).items())
    # Undone, the draw is standard normal noise around the mean.
    noise = []
    for (key, clip_index), latent in draws.items():
        mean, logvar = (torch.from_numpy(latent_of(key, clip_index, SMALL, part)) for part in ("mean", "logvar"))
        noise.append((latent / 0.5 + 0.25 - mean) / torch.exp(0.5 * logvar))
    stacked = torch.stack(noise)
    assert abs(float(stacked.mean())) < 0.15
    assert abs(float(stacked.std()) - 1) < 0.15


def test_moments_give_their_mean_unless_samples_are_asked_for(tmp_path: Path) -> None:
    output(tmp_path, [[record("k", kind="moments")]], kind="moments")
    latents = next(iter(LatentDataset(str(tmp_path))))["latents"]
    np.testing.assert_array_equal(latents[0], 0.5 * (latent_of("k", 0, SMALL) - 0.25))


def damage(root: Path, how: str) -> Path:
    path = sorted((root / "data").rglob("*.parquet"))[0]
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    path.unlink()
    if how != "missing":
        path.write_bytes(data[:-1] if how == "truncated" else b"" if how == "emptied" else data)
    return path


# A worker that raised takes DataLoader five seconds to end, so one case of it must do.
@pytest.mark.parametrize(("how", "num_workers"), [("flipped", 1), ("flipped", 0), ("truncated", 0), ("emptied", 0)])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, how: str, num_workers: int) -> None:
    output(tmp_path, SHARDS[:2])
    path = damage(tmp_path, how)
    with pytest.raises(DamagedObjectError, match=path.name):
        list(loader(LatentDataset(str(tmp_path)), num_workers))


def test_a_committed_file_that_is_gone_is_named(tmp_path: Path) -> None:
    output(tmp_path, SHARDS[:2])
    path = damage(tmp_path, "missing")
    with pytest.raises(StorageNotFoundError, match=path.name):
        list(LatentDataset(str(tmp_path)))


def test_a_dataset_without_rows_says_what_it_holds(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    commit_records(store, open_dataset(store, manifest()), "s", [], [rejection("a"), rejection("b")])
    with pytest.raises(UsageError, match="no latents: 1 committed shards with 2 rejected videos"):
        LatentDataset(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 of world_size 2"),
        ({"remainder": "cut"}, "'cut' is not one of keep, drop, pad"),
        ({"shuffle_seed": -1}, "shuffle_seed is -1"),
        ({"columns": ["colour"]}, "no column 'colour'"),
        ({"columns": ["caption"]}, "'caption' is in every batch"),
        ({"sample_posterior": True}, "--store moments"),
        ({"snapshot": 99}, "no snapshot 99"),
    ],
)
def test_wrong_arguments_are_refused_with_what_is_allowed(root: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        LatentDataset(root, **options)


def test_a_folder_that_is_no_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"_dataset\.json"):
        LatentDataset(str(tmp_path))
    with pytest.raises(UsageError, match=r"_dataset\.json"):
        data_urls(str(tmp_path))


def test_a_dataset_pickles_after_use(root: str) -> None:
    dataset = LatentDataset(root)
    expected = order(dataset)
    assert order(pickle.loads(pickle.dumps(dataset))) == expected


def test_urls_name_the_committed_files_of_one_kind(tmp_path: Path) -> None:
    store = output(tmp_path, SHARDS[:2], output_format="both")
    commit_records(store, manifest(), "s9", [], [rejection("a")])
    found = {content: data_urls(str(tmp_path), content) for content in ("parquet", "webdataset", "rejected")}  # type: ignore[arg-type]
    assert {content: len(urls) for content, urls in found.items()} == {"parquet": 2, "webdataset": 2, "rejected": 1}
    assert all(Path(url).is_file() for urls in found.values() for url in urls)
    assert data_urls(str(tmp_path)) == found["parquet"]
    assert data_urls(str(tmp_path), snapshot=publish_snapshot(store).number) == found["parquet"]


def s3_output(shards: list[list[LatentRecord]], seaweedfs: SeaweedFS) -> tuple[str, list[str]]:
    root = seaweedfs.root()
    store = output(root, shards)
    return root, [file.key for commit in load_commits(store) for file in commit.files]


def test_files_of_a_remote_store_are_kept_and_not_fetched_twice(s3_env: SeaweedFS, tmp_path: Path) -> None:
    root, keys = s3_output(SHARDS[:3], s3_env)
    dataset = LatentDataset(root, batch_size=4, cache_dir=tmp_path)
    expected = order(LatentDataset(root, batch_size=4, cache_dir=tmp_path / "other"))
    assert order(loader(dataset)) == expected
    kept = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert len(kept) == 3
    assert all(name.endswith(".parquet") for name in kept)
    for key in keys:
        open_store(root).delete(key)
    assert order(LatentDataset(root, batch_size=4, cache_dir=tmp_path)) == expected


def test_files_of_later_batches_are_on_their_way_but_no_more_than_a_window(s3_env: SeaweedFS, tmp_path: Path) -> None:
    root, _ = s3_output([[record(f"k{s}-{i}") for i in range(6)] for s in range(24)], s3_env)
    sizes = [file.num_bytes for commit in load_commits(open_store(root)) for file in commit.files]
    window_bytes = 8 * max(sizes)
    batches = iter(LatentDataset(root, batch_size=2, cache_dir=tmp_path, window_bytes=window_bytes))
    next(batches)
    # What the first batch did not need itself arrives while nobody asks for it.
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.parquet"))) < 6:
        assert time.monotonic() < deadline, sorted(path.name for path in tmp_path.iterdir())
        time.sleep(0.02)
    batches.close()  # type: ignore[attr-defined]
    kept = sum(path.stat().st_size for path in tmp_path.glob("*.parquet"))
    assert kept <= window_bytes + 3 * max(sizes)


def test_a_damaged_file_in_the_cache_is_fetched_again(s3_env: SeaweedFS, tmp_path: Path) -> None:
    root, _ = s3_output(SHARDS[:2], s3_env)
    expected = order(LatentDataset(root, cache_dir=tmp_path))
    for path in tmp_path.glob("*.parquet"):
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert order(LatentDataset(root, cache_dir=tmp_path)) == expected


def test_a_damaged_file_in_a_remote_store_is_refused_and_not_kept(s3_env: SeaweedFS, tmp_path: Path) -> None:
    root, keys = s3_output(SHARDS[:1], s3_env)
    bucket_key = f"{root.removeprefix(f's3://{s3_env.bucket}/')}/{keys[0]}"
    s3_env.client().put_object(Bucket=s3_env.bucket, Key=bucket_key, Body=b"other bytes")
    with pytest.raises(DamagedObjectError, match=keys[0]):
        list(LatentDataset(root, cache_dir=tmp_path))
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []


def test_the_cache_stays_below_its_limit(s3_env: SeaweedFS, tmp_path: Path) -> None:
    root, _ = s3_output(SHARDS, s3_env)
    largest = max(file.num_bytes for commit in load_commits(open_store(root)) for file in commit.files)
    dataset = LatentDataset(root, batch_size=4, cache_dir=tmp_path, cache_bytes=2 * largest)
    assert Counter(itertools.chain(*order(dataset))) == Counter(RECORDS.keys())
    assert 0 < sum(path.stat().st_size for path in tmp_path.glob("*.parquet")) <= 2 * largest


def test_the_cache_removes_nothing_that_is_not_its_own(s3_env: SeaweedFS, tmp_path: Path) -> None:
    root, _ = s3_output(SHARDS, s3_env)
    (tmp_path / "precious.bin").write_bytes(bytes(1 << 20))
    (tmp_path / "folder").mkdir()
    in_flight = tmp_path / f"{'a' * 64}.parquet.{'b' * 32}.partial"
    in_flight.write_bytes(bytes(1 << 20))
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)
    assert Counter(itertools.chain(*order(LatentDataset(root, cache_dir=tmp_path, cache_bytes=1)))) == Counter(
        RECORDS.keys()
    )
    assert (tmp_path / "precious.bin").stat().st_size == in_flight.stat().st_size == 1 << 20
    assert (tmp_path / "folder").is_dir()
    assert len(list(tmp_path.glob("*.parquet"))) == 1
