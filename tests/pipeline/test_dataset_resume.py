"""A training that is stopped anywhere, by anyone, goes on with the same batches: every sample once in every epoch."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
import torch.multiprocessing
from conftest import SeaweedFS
from latents import IMAGE, SMALL, WIDE, commit_records, manifest, names, order, output, record
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from pipeline import LatentDataset
from pipeline.commit import load_commits, publish_snapshot
from pipeline.errors import UsageError
from pipeline.storage import open_store

# torchdata calls something that newer versions of torch have given up.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

# Small windows and many shards, so that stops fall into every part of an epoch: 120 records in three buckets.
SHARDS = [
    [record(f"k{s}-{i}", 0, IMAGE if i == 5 else WIDE if i == (s % 4) else SMALL) for i in range(6)] for s in range(20)
]
SAMPLES = Counter((r.key, r.clip_index) for shard in SHARDS for r in shard)
WINDOW_BYTES = 120_000
GLOBAL_BATCH = {str(SMALL): 8, str(WIDE): 4, str(IMAGE): 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("output")
    publish_snapshot(output(folder, SHARDS))
    return str(folder)


def opened(root: str, rank: int = 0, world_size: int = 1, **options: Any) -> LatentDataset:
    sizes = {bucket: rows // world_size for bucket, rows in GLOBAL_BATCH.items()}
    return LatentDataset(root, sizes, 3, rank, world_size, window_bytes=WINDOW_BYTES, **options)


def batches_of(dataset: LatentDataset, num_workers: int) -> Iterator[dict[str, Any]]:
    return iter(DataLoader(dataset, batch_size=None, num_workers=num_workers) if num_workers else dataset)


@pytest.mark.parametrize("remainder", ["keep", "pad"])
def test_no_sample_is_missed_or_repeated_after_any_of_many_stops(root: str, remainder: str) -> None:
    draw = random.Random(remainder)
    num_stops = epoch = 0
    while num_stops < 100:
        seen: Counter[tuple[str, int]] = Counter()
        state: dict[str, Any] | None = None
        is_over = False
        while not is_over:
            world_size = draw.choice((1, 2, 4))
            num_workers = draw.choice((0,) * 11 + (2,)) if world_size < 4 else 0
            num_steps = draw.randint(1, 9)
            ranks = list(range(world_size))
            draw.shuffle(ranks)
            cursors, given = [], 0
            for rank in ranks:
                dataset = opened(root, rank, world_size, remainder=remainder)
                dataset.set_epoch(epoch)
                if state is not None:
                    dataset.load_state_dict(json.loads(json.dumps(state)))
                running = batches_of(dataset, num_workers)
                for batch in itertools.islice(running, num_steps):
                    fresh = [n for n, old in zip(names(batch), batch["is_padding"], strict=True) if not old]
                    seen.update(fresh)
                    cursors.append(batch["cursor"])
                    given += 1
            # All ranks stop after the same step. Whose state is kept does not matter, but it must be of the last step.
            is_over = given < num_steps * world_size and (
                not cursors or max(c["num_global_batches"] for c in cursors) == total_batches(root, remainder)
            )
            if not is_over:
                last = max(cursor["num_global_batches"] for cursor in cursors)
                state = draw.choice([cursor for cursor in cursors if cursor["num_global_batches"] == last])
                num_stops += 1
        assert seen == SAMPLES, f"epoch {epoch} after {num_stops} stops"
        epoch += 1


def total_batches(root: str, remainder: str) -> int:
    return len(opened(root, remainder=remainder))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 6, 19])
def test_a_stateful_loader_goes_on_where_it_was_saved(root: str, num_workers: int, stop: int) -> None:
    whole = order(opened(root))
    loader = StatefulDataLoader(opened(root), batch_size=None, num_workers=num_workers)
    running = iter(loader)
    seen = order(itertools.islice(running, stop))
    state = json.loads(json.dumps(loader.state_dict()))
    del running, loader
    resumed = StatefulDataLoader(opened(root), batch_size=None, num_workers=num_workers)
    resumed.load_state_dict(state)
    assert seen + order(resumed) == whole


def test_a_stateful_loader_with_persistent_spawned_workers_goes_through_epochs(root: str) -> None:
    def made(dataset: LatentDataset) -> StatefulDataLoader[dict[str, Any]]:
        return StatefulDataLoader(
            dataset, batch_size=None, num_workers=2, persistent_workers=True, multiprocessing_context="spawn"
        )

    plain = opened(root)
    whole = []
    for epoch in (4, 5, 6):
        plain.set_epoch(epoch)
        whole.append(order(plain))
    dataset = opened(root)
    loader = made(dataset)
    dataset.set_epoch(4)
    assert order(loader) == whole[0]
    dataset.set_epoch(5)
    running = iter(loader)
    seen = order(itertools.islice(running, 7))
    state = loader.state_dict()
    del running, loader
    again = opened(root)
    resumed = made(again)
    again.set_epoch(5)
    resumed.load_state_dict(state)
    assert seen + order(resumed) == whole[1]
    again.set_epoch(6)
    assert order(resumed) == whole[2]


def test_the_state_of_an_epoch_that_is_over_leaves_a_later_one_as_it_is(root: str) -> None:
    dataset = opened(root)
    list(dataset)
    over = dataset.state_dict()
    again = opened(root)
    again.load_state_dict(over)
    assert order(again) == []
    again.set_epoch(1)
    again.load_state_dict(over)
    assert len(order(again)) == len(again)


def test_the_state_of_a_worker_is_for_that_worker_alone(root: str) -> None:
    dataset = opened(root)
    state = dataset.state_dict() | {"worker": [1, 2, 3]}
    with pytest.raises(UsageError, match=r"worker 1 of 2, and this process is none.*cursor"):
        dataset.load_state_dict(state)


def test_a_following_reader_takes_newer_snapshots_at_epoch_borders_only(tmp_path: Path) -> None:
    store = output(tmp_path, SHARDS[:4])
    publish_snapshot(store)
    dataset = LatentDataset(str(tmp_path), batch_size=4, follow=True)
    workers = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    first = iter(dataset)
    seen = [names(next(first))]
    assert order(workers) == order(LatentDataset(str(tmp_path), batch_size=4))
    commit_records(store, manifest(), "s100", SHARDS[4])
    publish_snapshot(store)
    middle = dataset.state_dict()
    seen += order(first)
    assert len(list(itertools.chain(*seen))) == 24
    dataset.set_epoch(0)
    assert (dataset.snapshot, dataset.num_records) == (1, 24)
    dataset.set_epoch(1)
    assert (dataset.snapshot, dataset.num_records) == (2, 30)
    latest = LatentDataset(str(tmp_path), batch_size=4)
    latest.set_epoch(1)
    assert order(dataset) == order(latest) == order(workers)
    resumed = LatentDataset(str(tmp_path), batch_size=4, follow=True)
    resumed.load_state_dict(middle)
    assert resumed.snapshot == 1
    assert order(resumed) == seen[1:]
    resumed.set_epoch(1)
    assert order(resumed) == order(latest)


def test_ranks_that_follow_need_somebody_who_says_which_snapshot(root: str) -> None:
    with pytest.raises(UsageError, match=r"torch\.distributed"):
        LatentDataset(root, rank=0, world_size=2, follow=True)


def _follows(rank: int, root: str, rendezvous: str, to: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    dataset = LatentDataset(root, 4, rank=rank, world_size=2, follow=True)
    if rank == 0:
        commit_records(open_store(root), manifest(), "s100", SHARDS[4])
        publish_snapshot(open_store(root))
    dataset.set_epoch(1)
    Path(to, str(rank)).write_text(json.dumps([dataset.snapshot, order(dataset)]))
    torch.distributed.destroy_process_group()


def test_ranks_that_follow_take_the_snapshot_that_rank_0_sees(tmp_path: Path) -> None:
    publish_snapshot(output(tmp_path / "output", SHARDS[:4]))
    torch.multiprocessing.spawn(
        _follows, (str(tmp_path / "output"), str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2
    )
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert [snapshot for snapshot, _ in found] == [2, 2]
    samples = [tuple(sample) for _, batches in found for batch in batches for sample in batch]
    assert Counter(samples) == Counter((r.key, r.clip_index) for shard in SHARDS[:5] for r in shard)


def _reads(number: int, root: str, cache: str, cache_bytes: int) -> None:
    dataset = LatentDataset(root, 4, number, cache_dir=cache, cache_bytes=cache_bytes, window_bytes=30_000)
    found = Counter(itertools.chain(*order(dataset)))
    assert found == SAMPLES


def test_several_processes_share_one_bounded_cache(s3_env: SeaweedFS, tmp_path: Path) -> None:
    root = s3_env.root()
    store = output(root, SHARDS)
    sizes = [file.num_bytes for commit in load_commits(store) for file in commit.files]
    limit = sum(sizes) // 3
    torch.multiprocessing.spawn(_reads, (root, str(tmp_path), limit), nprocs=2)
    kept = [path.stat().st_size for path in tmp_path.iterdir() if path.is_file()]
    assert 0 < sum(kept) <= limit
    assert int((tmp_path / ".locks" / "room").read_text()) <= limit
