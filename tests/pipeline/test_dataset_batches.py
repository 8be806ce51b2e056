"""What a training loop may ask of its batches: sizes, rows, captions and conditions, and statistics of all of them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from conftest import SeaweedFS
from embeddings import add_image_set, add_text_set, caption_embedding, image_embedding
from latents import IMAGE, SMALL, WIDE, commit_records, latent_of, manifest, output, record
from torch.utils.data import DataLoader

from pipeline import LatentDataset
from pipeline.columns import ColumnSet
from pipeline.commit import load_commits, manifest_of_output, open_dataset, publish_snapshot
from pipeline.errors import DamagedObjectError, UsageError
from pipeline.records import LatentRecord
from pipeline.storage import open_store

# 32 SMALL, 4 WIDE, 4 IMAGE.
PASSTHROUGH = {"score": "float64", "title": "string"}


def made(shard: int, number: int) -> LatentRecord:
    bucket = {5: WIDE, 6: IMAGE}.get(number, SMALL)
    key = f"k{shard}{number}"
    fields = {"score": shard * 10.0 + number, "title": f"title of {key}" if number % 2 else None}
    return record(key, number % 2, bucket, fields=fields)


SHARDS = [[made(shard, number) for number in range(10)] for shard in range(4)]
RECORDS = {(r.key, r.clip_index): r for shard in SHARDS for r in shard}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("output")
    store = output(folder, SHARDS, passthrough=PASSTHROUGH)
    add_text_set(store)
    add_image_set(store)
    return str(folder)


def names(batches: Iterable[dict[str, Any]]) -> list[tuple[str, int]]:
    return [name for batch in batches for name in zip(batch["key"], batch["clip_index"], strict=True)]


def by_name(batches: Iterable[dict[str, Any]], value: str) -> dict[tuple[str, int], Any]:
    return {
        name: found
        for batch in batches
        for name, found in zip(zip(batch["key"], batch["clip_index"], strict=True), batch[value], strict=True)
    }


def test_each_bucket_may_have_its_own_batch_size(root: str) -> None:
    sizes = {str(SMALL): 5, str(WIDE): 2, str(IMAGE): 4, "512x512x1": 3}
    batches = list(LatentDataset(root, batch_size=sizes, remainder="drop"))
    assert all(len(batch["key"]) == sizes[batch["bucket"]] for batch in batches)
    kept = list(LatentDataset(root, batch_size=sizes))
    assert Counter(names(kept)) == Counter(RECORDS.keys())
    assert len(LatentDataset(root, batch_size=sizes, rank=1, world_size=2)) == len(
        list(LatentDataset(root, batch_size=sizes, rank=1, world_size=2))
    )


def test_a_token_budget_is_filled_and_never_passed(root: str) -> None:
    dataset = LatentDataset(root, max_tokens=64, remainder="drop")
    tokens = {str(SMALL): 2 * 2 * 4, str(WIDE): 3 * 2 * 8, str(IMAGE): 16}
    sizes = {batch["bucket"]: len(batch["key"]) for batch in dataset}
    assert sizes == {bucket: 64 // num for bucket, num in tokens.items()}
    assert all(batch["latents"][:, 0].numel() <= 64 for batch in dataset)


def test_a_state_fits_another_number_of_ranks_where_budgets_give_the_same_global_batches(root: str) -> None:
    state = next(iter(LatentDataset(root, max_tokens=96, world_size=1)))["cursor"]
    assert state["global_batch_size"] == {str(IMAGE): 6, str(SMALL): 6, str(WIDE): 2}
    LatentDataset(root, max_tokens=48, world_size=2).load_state_dict(state)
    LatentDataset(root, batch_size={str(IMAGE): 3, str(SMALL): 3, str(WIDE): 1}, world_size=2).load_state_dict(state)
    with pytest.raises(UsageError, match="global_batch_size"):
        LatentDataset(root, max_tokens=64, world_size=2).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": {str(SMALL): 4}}, "says nothing of 32x32x1, 64x16x9"),
        ({"batch_size": {str(SMALL): 0}}, "must be 1 or more"),
        ({"batch_size": 4, "max_tokens": 64}, "give one"),
        ({"max_tokens": 40}, r"64x16x9 \(48\); give at least 48"),
        ({"captions": ["score"]}, "give columns of text"),
        ({"captions": []}, "give columns of text"),
        ({"caption_dropout": 1.5}, "from 0 to 1"),
        ({"filter": [("colour", "==", 1)]}, "does not fit the columns key"),
        ({"filter": [("score", "~", 1)]}, "does not fit"),
        ({"filter": [("latent", "==", b"")]}, "does not fit"),
        ({"filter": pc.field("score") + 1}, "gives double"),
        ({"filter": [("score", ">", 1e9)]}, "no record that matches the filter"),
        ({"follow": True, "snapshot": 1}, "give one of the two"),
        ({"follow": True}, "no snapshot to follow"),
        ({"text": "texts"}, "no column set 'texts'"),
        ({"text": "image"}, "names a set of image embeddings"),
        ({"image": "text"}, "names a set of text embeddings"),
        ({"captions": ("extra",)}, "give columns of text"),
        ({"captions": ("caption", "title"), "text": "text"}, "embeddings of the columns caption only"),
    ],
)
def test_wrong_wishes_are_refused_with_what_is_allowed(root: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        LatentDataset(root, **options)


FILTERS = [
    ([("score", ">=", 12.0), ("bucket", "==", str(SMALL))], lambda r: r.fields["score"] >= 12 and r.bucket == SMALL),
    ([[("title", "==", "title of k01")], [("score", "<", 3)]], lambda r: r.key == "k01" or r.fields["score"] < 3),
    (pc.field("title").is_null() & (pc.field("source_width") == 640), lambda r: r.fields["title"] is None),
    (pc.field("title") != "title of k11", lambda r: r.fields["title"] not in (None, "title of k11")),
]


@pytest.mark.parametrize("output_format", ["parquet", "webdataset"])
@pytest.mark.parametrize("number", range(len(FILTERS)))
def test_a_filter_keeps_the_rows_that_match_and_plans_with_their_number(
    tmp_path: Path, root: str, output_format: str, number: int
) -> None:
    wanted, matches = FILTERS[number]
    if output_format == "webdataset":
        root = str(tmp_path)
        output(tmp_path, SHARDS, output_format="webdataset", passthrough=PASSTHROUGH)
    dataset = LatentDataset(root, batch_size=2, filter=wanted)  # type: ignore[arg-type]
    expected = {name for name, wrote in RECORDS.items() if matches(wrote)}  # type: ignore[no-untyped-call]
    batches = list(dataset)
    assert Counter(names(batches)) == Counter(expected)
    assert dataset.num_records == len(expected)
    assert len(dataset) == len(batches)
    means = {name: latent / 0.5 + 0.25 for name, latent in by_name(batches, "latents").items()}
    assert all(np.array_equal(means[name], latent_of(*name, RECORDS[name].bucket)) for name in expected)


def test_a_filter_reads_ranges_of_remote_files_and_workers_know_it(s3_env: SeaweedFS, tmp_path: Path) -> None:
    root = s3_env.root()
    output(root, SHARDS, passthrough=PASSTHROUGH)
    dataset = LatentDataset(root, batch_size=2, cache_dir=tmp_path, filter=[("score", "<", 20.0)])
    assert list(tmp_path.iterdir()) == [], "planning fetches no file"
    workers = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert names(workers) == names(dataset)
    assert len(list(tmp_path.glob("*.parquet"))) == 2, "files without a match are not fetched"


def test_a_filter_and_generations_of_a_shard_go_together(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    about = open_dataset(store, manifest(passthrough=PASSTHROUGH))
    commit_records(store, about, "s", [record("a", fields={"score": 1.0}), record("b", fields={"score": 2.0})])
    commit_records(
        store, about, "s", [record("b", fields={"score": 0.0}), record("c", fields={"score": 0.0})], keys=["b", "c"]
    )
    assert set(names(LatentDataset(str(tmp_path), filter=[("score", "<", 1.5)]))) == {("a", 0), ("c", 0)}


def test_a_state_of_another_filter_is_refused(root: str) -> None:
    state = LatentDataset(root, filter=[("score", ">", 5.0)]).state_dict()
    LatentDataset(root, filter=pc.field("score") > 5.5).load_state_dict(state)
    with pytest.raises(UsageError, match=r"data .* there"):
        LatentDataset(root, filter=[("score", ">", 7.0)]).load_state_dict(state)


def test_rows_that_match_otherwise_than_planned_are_damage(tmp_path: Path, root: str) -> None:
    output(tmp_path, SHARDS[:1], passthrough=PASSTHROUGH)
    dataset = LatentDataset(str(tmp_path), filter=[("score", "<", 5.0)])
    expression, table = LatentDataset(str(tmp_path), filter=[("score", "<", 4.0)])._filter or (None, None)
    dataset._filter = expression, table
    with pytest.raises(DamagedObjectError, match="open the dataset again"):
        list(dataset)


def test_latents_are_given_as_stored_where_no_scale_is_wanted(root: str) -> None:
    for name, latent in by_name(LatentDataset(root, scaled=False), "latents").items():
        np.testing.assert_array_equal(latent, latent_of(*name, RECORDS[name].bucket))


def test_the_first_frame_is_latent_0_and_never_sampled(tmp_path: Path, root: str) -> None:
    for batch in LatentDataset(root, first_frame=True):
        assert torch.equal(batch["first_latent"], batch["latents"][:, :, 0])
    output(tmp_path, [[record(f"k{i}", kind="moments") for i in range(3)]], kind="moments")
    for batch in LatentDataset(str(tmp_path), first_frame=True, sample_posterior=True):
        assert not torch.equal(batch["first_latent"], batch["latents"][:, :, 0])
        for key, first in zip(batch["key"], batch["first_latent"], strict=True):
            np.testing.assert_array_equal(first, 0.5 * (latent_of(key, 0, SMALL)[:, 0] - 0.25))


def test_captions_are_drawn_by_sample_and_epoch_whatever_the_split(root: str) -> None:
    options: dict[str, Any] = {"captions": ["caption", "title"], "caption_dropout": 0.3}
    dataset = LatentDataset(root, batch_size=4, **options)
    epochs = []
    for epoch in range(8):
        dataset.set_epoch(epoch)
        epochs.append(by_name(dataset, "caption"))
    ranks = [LatentDataset(root, batch_size=3, rank=rank, world_size=2, **options) for rank in range(2)]
    for rank in ranks:
        rank.set_epoch(7)
    workers = DataLoader(ranks[0], batch_size=None, num_workers=1)
    assert by_name(workers, "caption") | by_name(ranks[1], "caption") == epochs[7]
    drawn = Counter(text.partition(" ")[0] for captions in epochs for text in captions.values())
    # Of 320 draws 0.3 are dropped; of the rest half have a choice, the others have a caption alone.
    assert abs(drawn[""] / 320 - 0.3) < 0.1
    assert abs(drawn["title"] / 320 - 0.7 / 4) < 0.1
    assert epochs[0] != epochs[1]
    for name, text in epochs[0].items():
        assert text in ("", RECORDS[name].caption, RECORDS[name].fields["title"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_embeddings_belong_to_the_caption_that_was_drawn(root: str, num_workers: int) -> None:
    dataset = LatentDataset(root, batch_size=4, caption_dropout=0.5, text="text", image="image")
    dropped = 0
    for batch in DataLoader(dataset, batch_size=None, num_workers=num_workers):
        wanted = [torch.from_numpy(caption_embedding(text).astype(np.float32)) for text in batch["caption"]]
        longest = max(map(len, wanted))
        assert batch["caption_embedding"].shape == (len(wanted), longest, wanted[0].shape[1])
        assert batch["caption_embedding"].dtype == batch["image_embedding"].dtype == torch.float32
        for row, (embedding, mask) in enumerate(zip(batch["caption_embedding"], batch["caption_mask"], strict=True)):
            assert torch.equal(embedding[mask], wanted[row])
            assert not embedding[~mask].any()
            image = image_embedding(batch["key"][row], batch["clip_index"][row])
            np.testing.assert_array_equal(batch["image_embedding"][row], image.astype(np.float32))
        dropped += batch["caption"].count("")
    assert 5 < dropped < 35


def test_a_set_that_does_not_cover_the_data_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    store = output(tmp_path, SHARDS[:2], passthrough=PASSTHROUGH)
    texts = add_text_set(store)
    publish_snapshot(texts)
    about = manifest_of_output(store)
    commit_records(store, about, "later", [record("z", fields={"score": 1.0, "title": None})])
    with pytest.raises(UsageError, match=r"does not cover 1 files .* shard later; add them: .*encode_text\.py"):
        LatentDataset(str(tmp_path), text="text")
    # What is committed to the set counts, published or not.
    add_text_set(store)
    assert len(names(LatentDataset(str(tmp_path), text="text"))) == 21


def test_the_embeddings_of_later_batches_are_opened_ahead(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, set[bool]] = {}
    opened = ColumnSet._opened

    def noted(self: ColumnSet, shard_id: str) -> Any:
        threads.setdefault(shard_id, set()).add(threading.current_thread() is threading.main_thread())
        return opened(self, shard_id)

    monkeypatch.setattr(ColumnSet, "_opened", noted)
    assert len(names(LatentDataset(root, batch_size=4, text="text"))) == 40
    assert threads == {shard_id: {False} for shard_id in ("s000", "s001", "s002", "s003")}


def test_statistics_are_those_of_the_latents_that_are_given_out(root: str) -> None:
    stats = LatentDataset(root).stats()
    assert stats.bucket_rows == {str(IMAGE): 4, str(SMALL): 32, str(WIDE): 4}
    assert stats.num_samples == 40
    values = np.concatenate([latent_of(*name, r.bucket).reshape(4, -1) for name, r in RECORDS.items()], axis=1)
    np.testing.assert_allclose(stats.mean, 0.5 * (values.mean(axis=1, dtype=np.float64) - 0.25), atol=1e-6)
    np.testing.assert_allclose(stats.deviation, 0.5 * values.std(axis=1, dtype=np.float64), atol=1e-6)
    unscaled = LatentDataset(root, scaled=False).stats(num_samples=15)
    assert unscaled.num_samples == 20
    assert abs(np.mean(unscaled.deviation) - 1) < 0.1


def test_a_file_that_is_gone_is_named_with_its_shard(tmp_path: Path) -> None:
    store = output(tmp_path, SHARDS[:2], passthrough=PASSTHROUGH)
    (commit, _) = load_commits(store)
    store.delete(commit.files[0].key)
    with pytest.raises(Exception, match=r"shard s000: .*s000-.* is committed but does not exist"):
        list(LatentDataset(str(tmp_path)))


def test_a_given_up_iteration_takes_nothing_from_the_next(root: str) -> None:
    dataset = LatentDataset(root, batch_size=4)
    expected = names(dataset)
    given_up = iter(dataset)
    next(given_up)
    again = iter(dataset)
    found = names([next(again)])
    del given_up
    assert found + names(again) == expected
