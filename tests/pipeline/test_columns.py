"""The promises of column sets: what was committed is found by shard and caption or clip, and nothing else ever is."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embeddings import (
    DIM,
    MAX_LENGTH,
    add_image_set,
    add_text_set,
    caption_embedding,
    columns_manifest,
    image_embedding,
)
from latents import commit_records, manifest, output, record

from pipeline.audit import audit
from pipeline.cli import main
from pipeline.collect import collect_garbage
from pipeline.columns import (
    ColumnSet,
    TextEmbedding,
    base_file,
    base_of,
    captions_of,
    columns_store,
    commit_columns,
    open_columns,
    read_columns_manifest,
    records_of,
    stored_captions_of,
    write_image_file,
    write_text_file,
)
from pipeline.commit import (
    decided_shards,
    latest_snapshot,
    load_commits,
    name_of,
    publish_snapshot,
    put_data_file,
    read_commit,
    read_data_file,
)
from pipeline.committed import FileCache
from pipeline.errors import ConfigMismatchError, DamagedObjectError, UsageError
from pipeline.records import Commit
from pipeline.redo import ordered_repairs
from pipeline.storage import ObjectStore, open_store


@pytest.fixture
def cache(tmp_path: Path) -> FileCache:
    return FileCache(tmp_path / "cache", 1 << 30)


def _two_shards(store: ObjectStore) -> ObjectStore:
    long = "word " * (2 * MAX_LENGTH)
    shards = [
        [record("a", caption="a red ball"), record("b", caption="a red ball"), record("b", 1, caption="a red ball")],
        [record("c", caption=""), record("d", caption=long), record("e", caption="日本語 🙂")],
    ]
    return output(store.root_uri, shards)


def test_every_caption_of_a_shard_and_the_empty_one_are_found_in_folders_and_on_s3(
    store: ObjectStore, cache: FileCache
) -> None:
    base = _two_shards(store)
    add_text_set(base)
    texts = ColumnSet.open(base, "text", cache)
    assert (texts.embedding_dim, texts.dtype, texts.max_length) == (DIM, np.dtype("float16"), MAX_LENGTH)
    assert texts.encoder == "made-up-text-encoder"
    for shard_id, captions in (("s000", ["a red ball", ""]), ("s001", ["", "word " * (2 * MAX_LENGTH), "日本語 🙂"])):
        for caption in captions:
            found = texts.caption(shard_id, caption)
            np.testing.assert_array_equal(found, caption_embedding(caption))
            assert found.dtype == np.float16
            assert not found.flags.writeable


def test_every_clip_has_the_embedding_of_its_first_frame(store: ObjectStore, cache: FileCache) -> None:
    base = _two_shards(store)
    add_image_set(base, dtype="float32")
    images = ColumnSet.open(base, "image", cache)
    for shard_id, key, clip_index in (("s000", "a", 0), ("s000", "b", 1), ("s001", "e", 0)):
        found = images.image(shard_id, key, clip_index)
        assert found.shape == (DIM,)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, image_embedding(key, clip_index, "float32"))


def test_a_caption_stands_once_in_a_file_with_the_keys_that_have_it(tmp_path: Path) -> None:
    base = _two_shards(open_store(str(tmp_path / "out")))
    (file,) = next(iter(load_commits(add_text_set(base), ["s000"]))).files
    rows = pq.read_table(tmp_path / "out" / "columns" / "text" / file.key).to_pylist()
    assert [(row["caption"], row["keys"], row["is_truncated"]) for row in rows] == [
        ("", [], False),
        ("a red ball", ["a", "b"], False),
    ]
    assert rows[1]["embedding_shape"] == [5, DIM]
    assert rows[1]["embedding"] == caption_embedding("a red ball").tobytes()


def test_a_set_that_is_not_there_says_what_to_run(tmp_path: Path, cache: FileCache) -> None:
    base = _two_shards(open_store(str(tmp_path / "out")))
    with pytest.raises(UsageError, match=r"encode_text.py --latents .*out"):
        ColumnSet.open(base, "text", cache)
    with pytest.raises(UsageError, match="--image-encoder"):
        ColumnSet.open(base, "image", cache)
    with pytest.raises(UsageError, match="'sound'"):
        ColumnSet.open(base, "sound", cache)


def test_what_a_set_does_not_hold_is_named_with_its_shard(tmp_path: Path, cache: FileCache) -> None:
    base = _two_shards(open_store(str(tmp_path / "out")))
    add_text_set(base)
    texts = ColumnSet.open(base, "text", cache)
    with pytest.raises(UsageError, match=r"s001.*'a red ball'"):
        texts.caption("s001", "a red ball")
    with pytest.raises(UsageError, match=r"s777.*holds nothing of this shard"):
        texts.caption("s777", "")
    commit_records(base, manifest(), "s777", [record("z", caption="late")])
    add_text_set(base)
    np.testing.assert_array_equal(texts.caption("s777", "late"), caption_embedding("late"))


def test_a_damaged_file_is_noticed_and_named(tmp_path: Path, cache: FileCache) -> None:
    base = _two_shards(open_store(str(tmp_path / "out")))
    store = add_text_set(base)
    (file,) = next(iter(load_commits(store, ["s000"]))).files
    path = Path(store.url(file.key))
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedObjectError, match=file.key):
        ColumnSet.open(base, "text", cache).caption("s000", "")


def test_later_generations_of_a_shard_are_covered_and_every_text_of_them_is_found(
    tmp_path: Path, cache: FileCache
) -> None:
    base = output(tmp_path / "out", [[record("a", caption="first")]])
    add_text_set(base)
    texts = ColumnSet.open(base, "text", cache)
    texts.caption("s000", "first")
    commit_records(base, manifest(), "s000", [record("b", caption="retried")], keys=["b"])
    store = add_text_set(base)
    assert [name_of(commit) for commit in load_commits(store)] == ["s000", "s000.r1"]
    for caption in ("first", "retried", ""):
        np.testing.assert_array_equal(texts.caption("s000", caption), caption_embedding(caption))


def _image_record(base: ObjectStore, commit: Commit, value: float) -> None:
    """Covers a record of an output with image embeddings that are all of one value."""
    about = columns_manifest("image")
    store = columns_store(base, "image")
    open_columns(store, about)
    file = base_file(commit.files)
    assert file is not None
    path = Path(base.root_uri).parent / f"{value}.parquet"
    write_image_file(path, about, {("a", 0): np.full(DIM, value, np.float16)})
    standing, stood_before = commit_columns(store, about, commit.shard_id, file, path, 1)
    assert (standing.source_etag, stood_before) == (file.sha256, False)


def test_an_attempt_that_came_to_nothing_does_not_give_its_frames_to_the_one_that_counts(
    tmp_path: Path, cache: FileCache
) -> None:
    """An actor dies between the set's record and the output's, the input changes, another actor encodes the shard."""
    elsewhere = output(tmp_path / "elsewhere", [[record("a", caption="as it was")]])
    base = output(tmp_path / "out", [[record("a", caption="as it is")]])
    lost, kept = next(iter(load_commits(elsewhere))), next(iter(load_commits(base)))
    _image_record(base, lost, 1.0)
    _image_record(base, kept, 2.0)
    assert len(records_of(columns_store(base, "image"), "s000")) == 2
    assert ColumnSet.open(base, "image", cache).image("s000", "a", 0).tolist() == [2.0] * DIM


def test_a_repaired_clip_has_the_frame_of_the_repair(tmp_path: Path, cache: FileCache) -> None:
    base = output(tmp_path / "out", [[record("a", caption="damaged later")]])
    _image_record(base, next(iter(load_commits(base))), 1.0)
    commit_records(base, manifest(), "s000", [record("a", caption="repaired")], replaces="s000")
    repaired = read_commit(base, "s000", 1)
    assert repaired is not None
    _image_record(base, repaired, 2.0)
    assert ColumnSet.open(base, "image", cache).image("s000", "a", 0).tolist() == [2.0] * DIM


def test_whoever_comes_second_with_a_base_file_changes_nothing(store: ObjectStore) -> None:
    base = _two_shards(store)
    texts = add_text_set(base)
    before = {info.key for info in texts.list("")}
    add_text_set(base)
    assert {info.key for info in texts.list("")} == before


def test_another_encoder_is_refused_with_what_differs(tmp_path: Path) -> None:
    base = _two_shards(open_store(str(tmp_path / "out")))
    store = add_text_set(base)
    with pytest.raises(ConfigMismatchError) as caught:
        add_text_set(base, weights="34" * 32)
    assert caught.value.differences == {"weights_sha256": ("12" * 32, "34" * 32)}
    assert read_columns_manifest(store) == columns_manifest("text")


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "two"):
        store = add_text_set(_two_shards(open_store(str(tmp_path / name))))
        digests.add(tuple(commit.files[0].sha256 for commit in load_commits(store)))
    assert len(digests) == 1


def test_a_set_is_published_and_collected_like_any_output(tmp_path: Path) -> None:
    base = _two_shards(open_store(str(tmp_path / "out")))
    store = add_text_set(base)
    assert publish_snapshot(store).number == 1
    assert not collect_garbage(store, delete=False).may_go
    assert latest_snapshot(base) is None
    assert base_of(store) is not None
    assert base_of(store).root_uri == base.root_uri  # type: ignore[union-attr]
    assert base_of(base) is None


def test_a_reader_can_be_pickled_and_forked(tmp_path: Path, cache: FileCache) -> None:
    base = _two_shards(open_store(str(tmp_path / "out")))
    add_text_set(base)
    texts = ColumnSet.open(base, "text", cache)
    expected = hashlib.sha256(texts.caption("s000", "a red ball").tobytes()).hexdigest()
    thawed = pickle.loads(pickle.dumps(texts))
    assert hashlib.sha256(thawed.caption("s000", "a red ball").tobytes()).hexdigest() == expected
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_digest_of, (texts, "s000", "a red ball")) == expected


def _digest_of(texts: ColumnSet, shard_id: str, caption: str) -> str:
    return hashlib.sha256(texts.caption(shard_id, caption).tobytes()).hexdigest()


@pytest.mark.parametrize("output_format", ["parquet", "webdataset", "both"])
def test_the_captions_of_a_base_file_are_read_without_its_latents(
    store: ObjectStore, tmp_path: Path, output_format: str
) -> None:
    records = [record(f"k{n}", caption=f"caption {n % 3}", fields={"short": f"s{n}" if n else None}) for n in range(5)]
    base = output(store.root_uri, [records], output_format=output_format, passthrough={"short": "string"})
    file = base_file(next(iter(load_commits(base))).files)
    assert file is not None
    found = stored_captions_of(base, file, ("caption", "short"))
    assert list(found) == sorted(found)
    assert found["caption 0"] == ["k0", "k3"]
    assert found["s4"] == ["k4"]
    assert found[""] == []
    local = tmp_path / "local"
    local.write_bytes(read_data_file(base, file))
    assert captions_of(local, file.content, file.num_rows, ("caption", "short")) == found


def test_rows_come_back_from_many_row_groups(tmp_path: Path, cache: FileCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.columns._GROUP_BYTES", 100)
    monkeypatch.setattr("pipeline.columns._KEPT_BYTES", 200)
    base = output(tmp_path / "out", [[record(f"k{n}", caption=f"caption {n}") for n in range(20)]])
    add_text_set(base)
    texts = ColumnSet.open(base, "text", cache)
    for number in (3, 19, 0, 3, 7, 7):
        found = texts.caption("s000", f"caption {number}")
        np.testing.assert_array_equal(found, caption_embedding(f"caption {number}"))


def test_a_row_that_is_not_as_the_set_says_is_never_written(tmp_path: Path) -> None:
    about = columns_manifest("text")
    for wrong in (np.zeros((2, DIM), np.float32), np.zeros((2, DIM + 1), np.float16)):
        row = TextEmbedding(embedding=wrong, is_truncated=False)
        with pytest.raises(AssertionError):
            write_text_file(tmp_path / "wrong.parquet", about, {"": []}, [row])


def _rewritten(store: ObjectStore, record_name: str, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Puts other rows under a record of a set that states them truly: damage that no digest shows."""
    commit = next(iter(load_commits(store, [record_name])))
    table = pq.read_table(store.url(commit.files[0].key))
    rows = table.to_pylist()
    change(rows)
    path = Path(store.root_uri) / "changed.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    stat = put_data_file(store, path, shard_id=commit.shard_id, content="parquet", num_rows=commit.files[0].num_rows)
    key = next(info.key for info in store.list("commits/") if info.key.endswith(f"/{record_name}.json"))
    record_path = Path(store.url(key))
    document = json.loads(record_path.read_bytes())
    document["files"] = [asdict(stat)]
    record_path.write_text(json.dumps(document))
    path.unlink()


def _doubled(rows: list[dict[str, Any]]) -> None:
    rows[1] = rows[0]


def _not_a_number(rows: list[dict[str, Any]]) -> None:
    rows[0]["embedding"] = np.full((2, DIM), np.nan, np.float16).tobytes()


def _longer(rows: list[dict[str, Any]]) -> None:
    rows[0]["embedding_shape"] = [3, DIM]


def _another_text(rows: list[dict[str, Any]]) -> None:
    rows[1]["caption"] = "a blue ball"


def _another_key(rows: list[dict[str, Any]]) -> None:
    rows[1]["keys"] = ["a"]


def _one_less(rows: list[dict[str, Any]]) -> None:
    rows.pop()


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (_doubled, {"duplicate", "counts"}),
        (_not_a_number, {"values"}),
        (_longer, {"shape"}),
        (_another_text, {"counts"}),
        (_another_key, {"counts"}),
        (_one_less, {"counts"}),
    ],
)
def test_an_audit_finds_rows_that_are_not_true(
    change: Callable[[list[dict[str, Any]]], None], kinds: set[str], tmp_path: Path
) -> None:
    base = _two_shards(open_store(str(tmp_path / "out")))
    store = add_text_set(base)
    assert not audit(store).findings
    _rewritten(store, "s000", change)
    found = audit(store).findings
    assert {finding.kind for finding in found} == kinds
    assert {finding.record for finding in found} == {"s000"}


def test_verify_inspect_and_gc_know_column_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = _two_shards(open_store(str(tmp_path / "out")))
    store = add_text_set(base)
    add_image_set(base)
    assert main(["verify", base.root_uri]) == 0
    assert capsys.readouterr().out.count("all is well") == 3
    assert main(["verify", store.root_uri, "--quick"]) == 0
    assert main(["gc", store.root_uri]) == 0
    capsys.readouterr()
    assert main(["urls", store.root_uri]) == 0
    tables = [pq.read_table(url) for url in capsys.readouterr().out.splitlines()]
    assert sum(table.num_rows for table in tables) == 2 + 3
    assert main(["inspect", base.root_uri, "--json"]) == 0
    assert main(["inspect", store.root_uri]) == 0
    said = capsys.readouterr().out
    assert '"column_sets": [\n  "text",\n  "image"\n ]' in said
    assert "made-up-text-encoder" in said
    commit_records(base, manifest(), "s002", [record("z")])
    assert main(["verify", base.root_uri, "--json"]) == 4
    document = json.loads(capsys.readouterr().out)
    for name in ("text", "image"):
        assert [(f["kind"], f["where"]) for f in document["column_sets"][name]["findings"]] == [("undecided", "s002")]
    (file,) = next(iter(load_commits(store, ["s001"]))).files
    Path(store.url(file.key)).unlink()
    assert main(["verify", base.root_uri, "--requeue"]) == 1
    assert list(ordered_repairs(store, {s.shard_id: s for s in decided_shards(load_commits(store))})) == ["s001"]
    assert main(["verify", str(tmp_path / "nowhere" / "columns" / "text")]) == 2
