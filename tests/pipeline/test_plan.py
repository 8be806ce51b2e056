"""An input is cut the same way by whoever plans, and what was cut is never cut again."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import random
import re
import shutil
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import patch

import latents
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import CLIP_STILLS, CLIP_VIDEOS, clip_members, pack_clips, tar_bytes
from conftest import SeaweedFS

import pipeline.plan
from pipeline.commit import DecidedShard, decided_shards
from pipeline.config import SourceConfig
from pipeline.errors import StorageDeniedError, StorageNotFoundError, UsageError
from pipeline.inputs import Slice, SliceEntry, read_slice
from pipeline.packed import Packed
from pipeline.plan import _json_bytes, _parsed_round, changed_inputs, infer_passthrough, plan_shards, planned_slices
from pipeline.records import ShardSpec
from pipeline.s3 import S3Store
from pipeline.storage import InputFile, ObjectInfo, ObjectStore, open_input, open_store


def config(uri: Path | str, **more: Any) -> SourceConfig:
    return SourceConfig(input=str(uri), **more)


def output(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "output"))


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"bytes")
    return folder


def entries_of(store: ObjectStore, specs: Sequence[ShardSpec]) -> list[SliceEntry]:
    return [entry for spec in specs for entry in read_slice(store, spec).entries]


def keys_of(store: ObjectStore, specs: Sequence[ShardSpec]) -> list[list[str]]:
    return [[entry.key for entry in read_slice(store, spec).entries] for spec in specs]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def stored(store: ObjectStore) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list("")}


def test_each_tar_is_a_shard_named_after_it(tmp_path: Path) -> None:
    tars = pack_clips(tmp_path / "in", 3)
    store = output(tmp_path)
    specs = plan_shards(config(tmp_path / "in"), store)
    assert specs == [
        ShardSpec(
            shard_id=f"0000{i}-{hashlib.sha256(str(tar).encode()).hexdigest()[:8]}",
            source_uri=str(tar),
            kind="tar",
            plan_key=None,
            source_size_bytes=tar.stat().st_size,
            source_etag=f"mtime-{tar.stat().st_mtime_ns}",
            num_videos=None,
        )
        for i, tar in enumerate(tars)
    ]
    assert plan_shards(config(f"{tmp_path}/in/*.tar"), store) == specs
    assert plan_shards(config(f"file://{tmp_path}/in"), store) == specs
    assert plan_shards(config(tars[1]), store) == specs[1:2]
    assert stored(store) == {}


def test_a_relative_input_means_the_same_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "in", "a.mp4")
    pack_clips(tmp_path / "tars", 2)
    monkeypatch.chdir(tmp_path)
    for name in ("in", "tars"):
        there = plan_shards(config(tmp_path / name), output(tmp_path))
        assert plan_shards(config(name), output(tmp_path)) == there
        assert plan_shards(config(f"./{name}/"), output(tmp_path)) == there


def test_what_img2dataset_leaves_beside_its_tars_is_no_input(tmp_path: Path) -> None:
    pack_clips(tmp_path / "in", 2)
    touch(tmp_path / "in", "00000.parquet", "00000_stats.json", "00001.parquet", "00001_stats.json", ".hidden/a.mp4")
    assert [spec.kind for spec in plan_shards(config(tmp_path / "in"), output(tmp_path))] == ["tar", "tar"]


def test_what_img2dataset_leaves_beside_its_folders_is_no_input(tmp_path: Path) -> None:
    touch(tmp_path / "in", "00000.parquet", "00000_stats.json", "00000/000000000.jpg", "00000/000000000.txt")
    store = output(tmp_path)
    (entry,) = entries_of(store, plan_shards(config(tmp_path / "in"), store))
    assert (entry.key, entry.txt_uri) == ("00000/000000000", f"{tmp_path}/in/00000/000000000.txt")


def test_stems_that_are_no_plain_names_still_make_shard_ids(tmp_path: Path) -> None:
    touch(tmp_path / "in", "a b/c.d?.tar", "a b/\u732b.tar.gz", f"{'x' * 200}.tgz")
    ids = [spec.shard_id for spec in plan_shards(config(tmp_path / "in"), output(tmp_path))]
    assert all(re.fullmatch(r"(c_d|shard|x{80})-[0-9a-f]{8}", shard_id) for shard_id in ids), ids
    assert len(set(ids)) == 3


def test_a_folder_is_cut_into_slices_of_the_asked_size_in_the_order_of_names(tmp_path: Path) -> None:
    names = [f"{folder}/{i:02d}.mp4" for folder in "ba" for i in range(5)]
    touch(tmp_path / "in", *names, "a/00.txt", "a/01.json", "a/notes.md", "b/other.txt")
    store = output(tmp_path)
    specs = plan_shards(config(tmp_path / "in", samples_per_shard=4), store)
    assert keys_of(store, specs) == [
        ["a/00", "a/01", "a/02", "a/03"],
        ["a/04", "b/00", "b/01", "b/02"],
        ["b/03", "b/04"],
    ]
    assert [spec.num_videos for spec in specs] == [4, 4, 2]
    assert [spec.source_uri for spec in specs] == [f"{tmp_path}/in#slice={i}" for i in range(3)]
    assert [spec.shard_id.rpartition("-")[0] for spec in specs] == ["in-00000", "in-00001", "in-00002"]
    first, second = entries_of(store, specs)[:2]
    assert (first.txt_uri, first.json_uri) == (f"{tmp_path}/in/a/00.txt", None)
    assert (second.txt_uri, second.json_uri) == (None, f"{tmp_path}/in/a/01.json")


def test_without_a_size_a_slice_takes_64_videos_or_1000_images(tmp_path: Path) -> None:
    rows = [{"url": f"/v/{i}.mp4"} for i in range(65)] + [{"url": f"/i/{i}.jpg"} for i in range(2000)]
    specs = plan_shards(config(write_rows(tmp_path / "t.jsonl", rows)), output(tmp_path))
    assert [spec.num_videos for spec in specs] == [64, 985, 1000, 16]


def test_files_of_one_name_are_told_apart_and_a_picture_beside_a_video_is_its_poster(tmp_path: Path) -> None:
    touch(tmp_path / "in", "a.mp4", "a.jpg", "a.txt", "b.mp4", "b.webm", "b.txt", "c.png", "c.jpg")
    store = output(tmp_path)
    entries = entries_of(store, plan_shards(config(tmp_path / "in"), store))
    assert [entry.key for entry in entries] == ["a", "b.mp4", "b.webm", "c.jpg", "c.png"]
    assert [entry.txt_uri for entry in entries[:3]] == [f"{tmp_path}/in/{name}.txt" for name in "abb"]


def test_a_name_with_two_extensions_does_not_take_the_key_of_another_file(tmp_path: Path) -> None:
    touch(tmp_path / "in", "a.mp4", "a.mov", "a.mp4.webm", "a.mp4.txt", "b.mp4", "b.mp4.webm")
    store = output(tmp_path)
    entries = entries_of(store, plan_shards(config(tmp_path / "in"), store))
    assert {entry.uri.rpartition("/")[2]: entry.key for entry in entries} == {
        "a.mov": "a.mov",
        "a.mp4": "a.mp4",
        "a.mp4.webm": "a.mp4.webm",
        "b.mp4": "b",
        "b.mp4.webm": "b.mp4",
    }
    assert [entry.key for entry in entries if entry.txt_uri] == ["a.mp4.webm"]


def test_planning_again_changes_nothing(tmp_path: Path) -> None:
    touch(tmp_path / "in", *(f"{i}.mp4" for i in range(10)))
    store = output(tmp_path)
    specs = plan_shards(config(tmp_path / "in", samples_per_shard=3), store)
    before = stored(store)
    assert plan_shards(config(tmp_path / "in", samples_per_shard=5), store) == specs
    assert stored(store) == before


def test_a_dry_run_plans_alike_and_writes_nothing(tmp_path: Path) -> None:
    touch(tmp_path / "in", *(f"{i}.mp4" for i in range(10)))
    store = output(tmp_path)
    source = config(tmp_path / "in", samples_per_shard=3)
    planned = plan_shards(source, store, write=False)
    assert not (tmp_path / "output").exists()
    assert plan_shards(source, store) == planned


def test_files_that_appear_later_form_new_slices(tmp_path: Path) -> None:
    folder = touch(tmp_path / "in", "b.mp4", "d.mp4", "f.mp4")
    store = output(tmp_path)
    source = config(folder, samples_per_shard=2)
    first = plan_shards(source, store)
    touch(folder, "a.mp4", "c.mp4", "e.mp4")
    (folder / "d.mp4").unlink()
    second = plan_shards(source, store)
    assert second[:2] == first
    assert keys_of(store, second) == [["b", "d"], ["f"], ["a", "c"], ["e"]]
    assert plan_shards(source, store) == second


def test_rows_that_are_added_to_a_table_form_new_slices(tmp_path: Path) -> None:
    rows = [{"url": f"{i}.mp4", "n": i} for i in range(7)]
    table = write_rows(tmp_path / "t.jsonl", rows[:3])
    store = output(tmp_path)
    source = config(table, samples_per_shard=2)
    first = plan_shards(source, store)
    write_rows(table, rows)
    second = plan_shards(source, store)
    assert second[:2] == first
    assert keys_of(store, second) == [
        ["00000000", "00000001"],
        ["00000002"],
        ["00000003", "00000004"],
        ["00000005", "00000006"],
    ]


@pytest.mark.parametrize("change", ["other", "fewer"])
def test_a_table_whose_planned_rows_changed_is_refused(tmp_path: Path, change: str) -> None:
    rows = [{"url": f"{i}.mp4"} for i in range(4)]
    table = write_rows(tmp_path / "t.jsonl", rows)
    store = output(tmp_path)
    plan_shards(config(table), store)
    write_rows(table, [{"url": "x.mp4"}, *rows[1:], {"url": "y.mp4"}] if change == "other" else rows[:3])
    with pytest.raises(UsageError, match="rows may be added at the end only"):
        plan_shards(config(table), store)


def test_another_uri_column_for_a_planned_table_is_refused(tmp_path: Path) -> None:
    table = write_rows(tmp_path / "t.jsonl", [{"url": "a.mp4", "path": "b.mp4"}])
    store = output(tmp_path)
    plan_shards(config(table), store)
    with pytest.raises(UsageError, match="'url', not 'path'"):
        plan_shards(config(table, uri_column="path"), store)


def test_drivers_that_race_agree_on_every_slice(tmp_path: Path, store: ObjectStore) -> None:
    folder = touch(tmp_path / "in", *(f"{i:02d}.mp4" for i in range(10)))
    plans: list[list[ShardSpec]] = []
    start = threading.Barrier(4)

    def drive(samples_per_shard: int) -> None:
        start.wait()
        plans.append(plan_shards(config(folder, samples_per_shard=samples_per_shard), store))

    threads = [threading.Thread(target=drive, args=(n,)) for n in (2, 2, 3, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(plans) == 4
    assert all(plan == plans[0] for plan in plans)
    assert sorted(key for keys in keys_of(store, plans[0]) for key in keys) == [f"{i:02d}" for i in range(10)]


def test_the_driver_that_comes_second_plans_what_the_first_did_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = touch(tmp_path / "in", "a.mp4", "b.mp4", "c.mp4")
    store = output(tmp_path)
    put = store.put_if_absent
    rivals: list[list[ShardSpec]] = []

    def put_after_a_rival(key: str, data: bytes) -> None:
        if "round" in key and not rivals:
            (folder / "c.mp4").rename(tmp_path / "c.mp4")
            rivals.append(plan_shards(config(folder), output(tmp_path)))
        put(key, data)

    monkeypatch.setattr(store, "put_if_absent", put_after_a_rival)
    second = plan_shards(config(folder), store)
    assert second[:1] == rivals[0]
    assert keys_of(store, second) == [["a", "b"], ["c"]]


@pytest.mark.parametrize("extension", ["parquet", "csv", "jsonl"])
def test_a_table_gives_its_rows_with_all_columns(tmp_path: Path, extension: str) -> None:
    rows = [
        {"key": f"k{i}", "url": f"videos/{i}.mp4", "caption": f'say "{i}",\nor not \u732b', "score": i / 2, "n": i}
        for i in range(3)
    ]
    path = tmp_path / f"table.{extension}"
    if extension == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif extension == "csv":
        quoted = [",".join('"' + str(value).replace('"', '""') + '"' for value in row.values()) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *quoted]), encoding="utf-8")
    else:
        write_rows(path, rows)
    store = output(tmp_path)
    specs = plan_shards(config(path), store)
    entries = entries_of(store, specs)
    assert [entry.key for entry in entries] == ["k0", "k1", "k2"]
    assert [entry.uri for entry in entries] == [f"{tmp_path}/videos/{i}.mp4" for i in range(3)]
    expected = [{name: value for name, value in row.items() if name != "key"} for row in rows]
    if extension == "csv":
        expected = [{name: str(value) for name, value in row.items()} for row in expected]
    assert [entry.fields for entry in entries] == expected
    types = {"url": "string", "score": "float64", "n": "int64"}
    text_only = dict.fromkeys(types, "string")
    inferred = infer_passthrough(config(path), "caption", specs, store)
    assert inferred == (text_only if extension == "csv" else types)


def test_every_type_of_a_parquet_column_is_kept_or_left_out_on_purpose(tmp_path: Path) -> None:
    noon = datetime.datetime(2024, 5, 6, 12, tzinfo=datetime.UTC)
    columns = {
        "url": pa.array(["a.mp4", "b.mp4"]),
        "flag": pa.array([True, None]),
        "small": pa.array([1, None], pa.int8()),
        "half": pa.array([0.5, None], pa.float16()),
        "label": pa.array(["x", "y"]).dictionary_encode(),
        "large": pa.array(["x", None], pa.large_string()),
        "when": pa.array([noon, None], pa.timestamp("ns", "UTC")),
        "day": pa.array([noon.date(), None]),
        "price": pa.array([Decimal("1.50"), None]),
        "embedding": pa.array([[1.5, 2.5], None]),
        "nested": pa.array([{"at": noon, "n": 1}, None]),
        "nothing": pa.nulls(2),
        "jpg": pa.array([b"\xff\xd8", None]),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    store = output(tmp_path)
    specs = plan_shards(config(tmp_path / "t.parquet"), store)
    first, second = (dict(entry.fields) for entry in entries_of(store, specs))
    assert first == {
        "url": "a.mp4",
        "flag": True,
        "small": 1,
        "half": 0.5,
        "label": "x",
        "large": "x",
        "when": first["when"],
        "day": "2024-05-06",
        "price": "1.50",
        "embedding": [1.5, 2.5],
        "nested": first["nested"],
        "nothing": None,
    }
    assert str(first["when"]).startswith("2024-05-06 12:00:00")
    assert second == {**dict.fromkeys(first), "url": "b.mp4", "label": "y"}
    strings = dict.fromkeys(("url", "label", "large", "when", "day", "price"), "string")
    expected = {**strings, "flag": "bool", "small": "int64", "half": "float64"}
    assert infer_passthrough(config(tmp_path / "t.parquet"), "caption", specs, store) == expected


@pytest.mark.parametrize("extension", ["parquet", "csv"])
def test_a_cell_that_is_no_utf8_does_not_stop_the_table(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"t.{extension}"
    captions = [b"good", b"caf\xe9"]
    if extension == "csv":
        path.write_bytes(b"url,caption\n" + b"".join(b"a.mp4,%s\n" % caption for caption in captions))
    else:
        text = pa.Array.from_buffers(pa.string(), 2, pa.array(captions).buffers())
        pq.write_table(pa.table({"url": ["a.mp4", "b.mp4"], "caption": text}), path)
    store = output(tmp_path)
    entries = entries_of(store, plan_shards(config(path), store))
    assert [entry.fields["caption"] for entry in entries] == ["good", "caf\udce9"]


def test_quotes_and_nameless_columns_of_a_csv_are_read_as_they_are_meant(tmp_path: Path) -> None:
    text = 'url,caption,,\na.mp4,"5"" and\nmore",,\nb.mp4,5" wide,x,\n\nc.mp4,"latentmill-end-of-table",,'
    store = output(tmp_path)
    for end in ("", "\n", "\r\n\r\n"):
        path = _text(tmp_path / f"t{len(end)}.csv", text + end)
        entries = entries_of(store, plan_shards(config(path), store))
        assert [entry.fields for entry in entries] == [
            {"url": "a.mp4", "caption": '5" and\nmore'},
            {"url": "b.mp4", "caption": '5" wide'},
            {"url": "c.mp4", "caption": "latentmill-end-of-table"},
        ]


def test_nameless_columns_of_a_parquet_table_are_left_out(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([value]) for value in ("a.mp4", 1, 2)], ["url", "", ""])
    pq.write_table(table, tmp_path / "t.parquet")
    store = output(tmp_path)
    (entry,) = entries_of(store, plan_shards(config(tmp_path / "t.parquet"), store))
    assert entry.fields == {"url": "a.mp4"}


def test_passthrough_of_a_tar_is_read_from_its_json(tmp_path: Path) -> None:
    samples = [
        {
            "key": "0",
            "caption": "a",
            "n": 1,
            "score": 1,
            "tags": ["x"],
            "mixed": 1,
            "width": 3,
            "flag": True,
            "no": None,
        },
        {"key": "1", "caption": "b", "n": 2, "score": 0.5, "mixed": "x", "huge": 2**70, "url": "http://x/", "Key": 1},
    ]
    members = [
        pair for i, s in enumerate(samples) for pair in ((f"{i}.json", json.dumps(s).encode()), (f"{i}.mp4", b""))
    ]
    members += [("2.json", b"{"), ("3.json", b"[]")]
    (tmp_path / "0.tar").write_bytes(tar_bytes(members)[:-1024])
    store = output(tmp_path)
    source = config(tmp_path / "0.tar")
    inferred = infer_passthrough(source, "caption", plan_shards(source, store), store)
    assert inferred == {
        "n": "int64",
        "score": "float64",
        "source_source_width": "int64",
        "flag": "bool",
        "url": "string",
        "source_Key": "int64",
    }


def test_passthrough_of_a_folder_is_read_from_the_files_beside_the_media(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for path in CLIP_VIDEOS[:2]:
        for side in (path, path.with_suffix(".json")):
            shutil.copy(side, folder / side.name)
    store = output(tmp_path)
    specs = plan_shards(config(folder), store)
    assert infer_passthrough(config(folder), "title", specs, store) == dict.fromkeys(
        ("author", "changes", "license"), "string"
    )
    assert infer_passthrough(config(folder), "title", [], store) == {}


def test_json_that_may_not_be_read_does_not_stop_the_planning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = touch(tmp_path / "in", "a.mp4", "a.json", "b.mp4")
    (folder / "b.json").write_text('{"n": 1}', encoding="utf-8")
    store = output(tmp_path)
    specs = plan_shards(config(folder), store)

    # Tests may run as root, who may read everything, so the answer of the system is made up.
    def refusing(uri: str) -> BinaryIO:
        if uri == f"{folder}/a.json":
            raise StorageDeniedError(f"{uri} may not be read: Permission denied")
        return open_input(uri)

    monkeypatch.setattr("pipeline.plan.open_input", refusing)
    assert infer_passthrough(config(folder), "caption", specs, store) == {"n": "int64"}


def test_a_caption_column_that_the_table_lacks_is_wrong_use(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("url,text\na.mp4,b\n", encoding="utf-8")
    store = output(tmp_path)
    specs = plan_shards(config(tmp_path / "t.csv"), store)
    with pytest.raises(UsageError, match="no column 'recaption'; it has text, url"):
        infer_passthrough(config(tmp_path / "t.csv"), "recaption", specs, store)
    assert infer_passthrough(config(tmp_path / "t.csv"), "text", specs, store) == {"url": "string"}


def test_an_output_inside_the_input_is_not_its_own_input(tmp_path: Path) -> None:
    pack_clips(tmp_path, 2)
    touch(tmp_path / "output", "data/ab/x.tar", "plans/y.json")
    assert len(plan_shards(config(tmp_path), output(tmp_path))) == 2
    with pytest.raises(UsageError, match="not the output itself"):
        plan_shards(config(tmp_path / "output"), output(tmp_path))


WRONG_INPUTS: dict[str, tuple[Callable[[Path], Path | str], type[Exception], str]] = {
    "nothing there": (lambda p: p / "nowhere", StorageNotFoundError, "nowhere"),
    "empty folder": (lambda p: p, StorageNotFoundError, "no file is at"),
    "empty glob": (lambda p: f"{p}/*.tar", StorageNotFoundError, r"\*\.tar"),
    "texts only": (lambda p: touch(p, "a.txt", "b.doc"), UsageError, "no tar"),
    "unknown file": (lambda p: touch(p, "a.doc") / "a.doc", UsageError, "a.doc, and no tar"),
    "tars and tables": (lambda p: touch(p, "0.tar", "x.csv"), UsageError, "1 tars, for example .*0.tar; 1 tables"),
    "tables and media": (lambda p: touch(p, "metadata.csv", "a.mp4"), UsageError, "give one kind"),
    "no such column": (lambda p: _text(p / "t.csv", "path\na.mp4\n"), UsageError, "no column 'url'; it has path"),
    "no such field": (lambda p: write_rows(p / "t.jsonl", [{"path": "a"}]), UsageError, "no row .* names no file"),
    "table without rows": (lambda p: _text(p / "t.csv", "url,caption\n"), UsageError, "no rows"),
    "empty table": (lambda p: _text(p / "t.csv", ""), UsageError, "cannot be read as csv"),
    "ragged table": (lambda p: _text(p / "t.csv", "url,caption\na.mp4\n"), UsageError, "cannot be read as csv"),
    "no Parquet": (lambda p: _text(p / "t.parquet", "rubbish"), UsageError, "cannot be read as parquet"),
    "open quote": (
        lambda p: _text(p / "t.csv", 'url,n\n/a.mp4,"open\n/b.mp4,1\n'),
        UsageError,
        "t.csv: a quote is not",
    ),
    "open quote in the last row": (lambda p: _text(p / "t.csv", 'url,n\n/a.mp4,1\n/b.mp4,"'), UsageError, "a quote is"),
    "equal columns": (lambda p: _text(p / "t.csv", "url,n,n\n/a.mp4,1,2\n"), UsageError, "t.csv has .* column 'n'"),
    "equal Parquet columns": (lambda p: _parquet(p, n=pa.array([1]), m=pa.array([2])), UsageError, "one column 'n'"),
    "dates beyond Python": (
        lambda p: _parquet(p, n=pa.array([[2**62]], pa.list_(pa.timestamp("ms")))),
        UsageError,
        "t.parquet: the column 'n' of type list.*cannot be read",
    ),
    "nested bytes that are no text": (
        lambda p: _parquet(p, n=pa.array([[b"caf\xe9"]]).view(pa.list_(pa.string()))),
        UsageError,
        "t.parquet: the column 'n' of type list.*cannot be read",
    ),
    "web only": (lambda p: _text(p / "t.csv", "url\nhttps://x/a.mp4\n"), UsageError, "no row .* https.* img2dataset"),
}


def _parquet(folder: Path, **columns: pa.Array) -> Path:
    names = ["n" if name == "m" else name for name in columns]
    table = pa.Table.from_arrays([pa.array(["a.mp4"]), *columns.values()], ["url", *names])
    pq.write_table(table, folder / "t.parquet")
    return folder / "t.parquet"


def _text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("case", WRONG_INPUTS, ids=str)
def test_wrong_input_is_a_message_that_says_what_is_there_and_nothing_is_planned(tmp_path: Path, case: str) -> None:
    make, error, said = WRONG_INPUTS[case]
    (tmp_path / "in").mkdir()
    store = output(tmp_path)
    with pytest.raises(error, match=said):
        plan_shards(config(make(tmp_path / "in")), store)
    assert not [key for key in stored(store) if "round" in key]


def test_a_plan_is_plain_json_that_says_what_it_is(tmp_path: Path) -> None:
    table = write_rows(tmp_path / "t.jsonl", [{"url": "a.mp4", "caption": "\ud800"}])
    store = output(tmp_path)
    (spec,) = plan_shards(config(table), store)
    data = store.get(str(spec.plan_key))
    assert data.isascii()
    document = json.loads(data)
    assert document["source"] == spec.source_uri
    assert document["entries"] == [
        {"key": "00000000", "uri": f"{tmp_path}/a.mp4", "fields": {"url": "a.mp4", "caption": "\ud800"}}
    ]
    entries = read_slice(store, spec).entries
    assert Slice(source=spec.source_uri, columns={}, entries=entries).to_bytes() == data


def test_inputs_on_s3_are_planned_like_local_ones(s3_env: SeaweedFS) -> None:
    root = s3_env.root()
    prefix = root.removeprefix(f"s3://{s3_env.bucket}/")
    table = b"".join(json.dumps({"url": f"../v/{i}.mp4"}).encode() + b"\n" for i in range(3))
    tar = tar_bytes(clip_members(CLIP_STILLS[0], "a"))
    for name, data in {"t/0.tar": tar, "t/1.tar": tar, "v/a.mp4": b"x", "v/b.mp4": b"y", "l/t.jsonl": table}.items():
        s3_env.client().put_object(Bucket=s3_env.bucket, Key=f"{prefix}/{name}", Body=data)
    store = open_store(f"{root}/out")
    tars = plan_shards(config(f"{root}/t"), store)
    assert [(spec.source_uri, spec.source_size_bytes) for spec in tars] == [
        (f"{root}/t/0.tar", len(tar)),
        (f"{root}/t/1.tar", len(tar)),
    ]
    assert all(spec.source_etag == hashlib.md5(tar).hexdigest() for spec in tars)
    assert infer_passthrough(config(f"{root}/t"), "caption", tars, store)["title"] == "string"
    videos = plan_shards(config(f"{root}/v/*.mp4"), store)
    assert keys_of(store, videos) == [["a", "b"]]
    rows = plan_shards(config(f"{root}/l/t.jsonl", samples_per_shard=2), store)
    assert [entry.uri for entry in entries_of(store, rows)] == [f"{root}/v/{i}.mp4" for i in range(3)]
    assert plan_shards(config(f"{root}/l/t.jsonl", samples_per_shard=2), store) == rows
    with pytest.raises(StorageNotFoundError):
        plan_shards(config(f"{root}/nothing"), store)
    with pytest.raises(StorageNotFoundError):
        plan_shards(config("s3://no-such-bucket/tars"), store)


def test_a_key_with_empty_parts_names_its_own_object_and_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The store behind the tests tidies its keys, so only the listing is made up.
    infos = [ObjectInfo(key=key, num_bytes=1, etag=None) for key in ("in//b.mp4", "in/a.mp4", "in/x//b.mp4")]
    monkeypatch.setattr(S3Store, "list", lambda self, prefix: iter(infos))
    monkeypatch.setattr(S3Store, "head", lambda self, key: None)
    store = output(tmp_path)
    entries = entries_of(store, plan_shards(config("s3://bucket/in"), store))
    assert [entry.uri for entry in entries] == [f"s3://bucket/{info.key}" for info in infos]
    assert [entry.problem and entry.problem[0] for entry in entries] == ["bad_member", None, "bad_member"]


def test_two_inputs_with_one_shard_id_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "in", "x/0.tar", "y/0.tar")
    monkeypatch.setattr("pipeline.plan._shard_id", lambda stem, uri: stem)
    with pytest.raises(UsageError, match=r"x/0\.tar and .*y/0\.tar lead to the same shard id"):
        plan_shards(config(tmp_path / "in"), output(tmp_path))


def _decided(store: ObjectStore, specs: list[ShardSpec], **changes: str) -> dict[str, DecidedShard]:
    """The shards as decided from what was planned, with what was found on the way."""
    about = latents.manifest()
    shards = {}
    for spec in specs:
        commit = latents.commit_records(store, about, spec.shard_id, [latents.record("a")])
        source = {"source_size_bytes": spec.source_size_bytes, "source_etag": spec.source_etag}
        (shard,) = decided_shards([replace(commit, **source, source_changes=changes)])
        shards[spec.shard_id] = shard
    return shards


def _changed(tmp_path: Path, store: ObjectStore, shards: dict[str, DecidedShard]) -> list[tuple[str, str]]:
    found = changed_inputs(plan_shards(config(tmp_path / "in"), store), shards)
    assert all(change.encoded != change.found for change in found)
    return [(change.shard_id, change.uri) for change in found]


@pytest.mark.parametrize("how", ["size", "time", "caption", "new caption"])
def test_a_file_that_changed_under_its_name_is_told_and_its_neighbours_are_not(how: str, tmp_path: Path) -> None:
    folder = touch(tmp_path / "in", *(f"{i}.mp4" for i in range(5)), "3.txt")
    store = output(tmp_path)
    specs = plan_shards(config(folder, samples_per_shard=2), store)
    shards = _decided(store, specs)
    assert _changed(tmp_path, store, shards) == []
    if how == "size":
        (folder / "3.mp4").write_bytes(b"other bytes")
    elif how == "time":
        os.utime(folder / "3.mp4", ns=(0, 1))
    elif how == "caption":
        (folder / "3.txt").write_text("another caption")
    else:
        (folder / "3.json").write_text("{}")
    touch(folder, "9.mp4")
    assert _changed(tmp_path, store, shards) == [(specs[1].shard_id, str(folder / "3.mp4"))]
    # What is not decided yet is encoded as it is then; what is gone has not changed.
    assert _changed(tmp_path, store, {specs[0].shard_id: shards[specs[0].shard_id]}) == []
    (folder / "3.mp4").unlink()
    assert _changed(tmp_path, store, shards) == []


def test_files_that_changed_in_later_rounds_are_told_of_their_own_slices(tmp_path: Path) -> None:
    store = output(tmp_path)
    for name in "abc":
        folder = touch(tmp_path / "in", f"{name}1.mp4", f"{name}2.mp4")
        specs = plan_shards(config(folder, samples_per_shard=1), store)
    shards = _decided(store, specs)
    for name in ("a2", "c1"):
        (folder / f"{name}.mp4").write_bytes(b"other bytes")
    assert _changed(tmp_path, store, shards) == [
        (spec.shard_id, entry.uri)
        for spec in specs
        for entry in read_slice(store, spec).entries
        if entry.key in ("a2", "c1")
    ]


def test_a_plan_without_versions_tells_of_no_change(tmp_path: Path) -> None:
    folder = touch(tmp_path / "in", "a.mp4")
    store = output(tmp_path)
    shards = _decided(store, plan_shards(config(folder), store))
    (path,) = (tmp_path / "output" / "plans").rglob("round-*.json")
    document = json.loads(path.read_bytes())
    del document["covered"]["versions"]
    path.write_text(json.dumps(document))
    (folder / "a.mp4").write_bytes(b"other bytes")
    assert _changed(tmp_path, store, shards) == []


def test_a_tar_that_changed_under_its_name_is_told(tmp_path: Path) -> None:
    tars = pack_clips(tmp_path / "in", 2)
    store = output(tmp_path)
    shards = _decided(store, plan_shards(config(tmp_path / "in"), store))
    assert _changed(tmp_path, store, shards) == []
    os.utime(tars[0], ns=(0, 1))
    tars[1].write_bytes(tars[1].read_bytes()[:-512])
    assert [uri for _, uri in _changed(tmp_path, store, shards)] == [str(tar) for tar in tars]
    # Outputs of before times were kept have sizes only.
    untimed = {
        shard_id: replace(shard, commits=tuple(replace(commit, source_etag=None) for commit in shard.commits))
        for shard_id, shard in shards.items()
    }
    assert [uri for _, uri in _changed(tmp_path, store, untimed)] == [str(tars[1])]


def test_what_changed_on_s3_is_told_by_its_etag(s3_env: SeaweedFS) -> None:
    root, store = f"{s3_env.root()}/in", open_store(s3_env.root())
    client = s3_env.client()

    def put(name: str, data: bytes) -> None:
        client.put_object(Bucket=s3_env.bucket, Key=f"{root.partition('://')[2].partition('/')[2]}/{name}", Body=data)

    for name in ("videos/a.mp4", "videos/b.mp4", "tars/0.tar", "tars/1.tar"):
        put(name, b"bytes")
    for kind, names in (("videos", ("a.mp4", "b.mp4")), ("tars", ("0.tar", "1.tar"))):
        shards = _decided(store, plan_shards(config(f"{root}/{kind}"), store))
        put(f"{kind}/{names[0]}", b"bytes")
        put(f"{kind}/{names[1]}", b"other")
        found = changed_inputs(plan_shards(config(f"{root}/{kind}"), store), shards)
        assert [change.uri for change in found] == [f"{root}/{kind}/{names[1]}"], "the same bytes again are no change"


def test_every_planned_slice_can_be_listed_from_the_output_alone(tmp_path: Path) -> None:
    store = output(tmp_path)
    folder = touch(tmp_path / "in", "a.mp4", "b.mp4", "c.mp4")
    table = write_rows(tmp_path / "t.jsonl", [{"url": "/v/1.mp4"}])
    specs = [*plan_shards(config(folder, samples_per_shard=2), store), *plan_shards(config(table), store)]
    touch(folder, "d.mp4")
    specs += plan_shards(config(folder), store)[2:]
    assert sorted(spec.shard_id for spec in planned_slices(store)) == sorted(spec.shard_id for spec in specs)
    assert sum(spec.num_videos or 0 for spec in planned_slices(store)) == 5


def _listing(number: int, extension: str, chance: random.Random) -> Packed[InputFile]:
    return Packed(
        InputFile(
            uri=f"/in/{place:06d}.{extension}",
            num_bytes=chance.randrange(1 << 30),
            etag=f"{chance.randbytes(16).hex()}",
        )
        for place in range(number)
    )


@pytest.mark.parametrize(("extension", "num_bytes_each"), [("tar", 180), ("mp4", 180)])
def test_a_plan_of_many_files_is_made_in_a_bounded_memory_of_each(
    extension: str, num_bytes_each: int, tmp_path: Path
) -> None:
    number = 20_000
    listing = _listing(number, extension, random.Random(0))
    with patch.object(pipeline.plan, "list_inputs", lambda _: listing):
        tracemalloc.start()
        try:
            specs = plan_shards(config("/in"), output(tmp_path))
            held, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert len(specs) == (number if extension == "tar" else -(-number // 64))
    # As objects the listing alone would take 300 bytes a file, and the shards of tars 500.
    assert peak < num_bytes_each * number
    assert held < 80 * number
    assert specs[1] == list(specs)[1]


def test_files_of_one_stem_are_one_sample_however_many_others_stand_between_them(tmp_path: Path) -> None:
    names = [
        "a.mp4",
        "a.n.mp4",
        "a.n.x.jpg",
        "a.n.x.webm",
        "a.webm",
        "a-1.mp4",
        "b.jpg",
        "b.mp4",
        "a.mp4.webm",
        "b/a.mkv",
    ]
    for name in (*names, "a.n.txt", "a.txt", "a.mp4.json", "b.json"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"{}")
    store = output(tmp_path)
    (spec,) = plan_shards(config(tmp_path / "in"), store)
    entries = read_slice(store, spec).entries
    # Pictures of a.n.x and b are posters; a has two videos, whose keys are their names, so that a.mp4.webm has its own.
    assert [entry.key for entry in entries] == ["a-1", "a.mp4", "a.webm", "a.mp4.webm", "a.n", "a.n.x", "b", "b/a"]
    texts = {entry.key: (entry.txt_uri or "").rpartition("/")[2] for entry in entries if entry.txt_uri}
    assert texts == {"a.mp4": "a.txt", "a.webm": "a.txt", "a.n": "a.n.txt"}
    assert {entry.key for entry in entries if entry.json_uri} == {"a.mp4.webm", "b"}
    assert plan_shards(config(tmp_path / "in"), store) == [spec]


def test_a_round_is_the_same_json_whether_its_lists_are_packed_or_not() -> None:
    files = [f'{place} \udcff "' for place in range(300)]
    for document in ({"b": files, "a": {"d": [], "c": [{"z": 1, "y": None}]}}, {}, {"a": {}}):
        packed = {
            name: Packed(value) if isinstance(value, list) else {k: Packed(v) for k, v in value.items()}
            for name, value in document.items()
        }
        assert _json_bytes(packed) == json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize(
    "covered",
    [
        {"files": [f'{place} \udcff "],' for place in range(600)], "versions": ["1:a|-|-"] * 600},
        {"files": ["a.mp4"]},
        {"files": [], "versions": []},
        {"num_rows": 3, "etag": None},
        {},
    ],
)
def test_a_round_reads_as_it_was_written_by_any_version(covered: dict[str, Any], separators: tuple[str, str]) -> None:
    document = {"version": 1, "source": "/in", "covered": covered, "slices": [{"key": "k", "num_videos": 1}]}
    found = _parsed_round(json.dumps(document, sort_keys=True, separators=separators))
    assert found == document
