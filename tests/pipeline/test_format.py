"""What the files of an output promise: the columns to the letter, nothing lost, the same bytes every time, and that
readers who have never heard of Latentmill read them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latents import IMAGE, SMALL, WIDE, latent_of, manifest, record, rejection

from pipeline import format as output_format_module
from pipeline.errors import DamagedObjectError
from pipeline.format import (
    COLUMNS,
    FORMAT_VERSION,
    ShardWriter,
    WrittenFile,
    column_name,
    decode_latent,
    encode_latent,
    member_key,
    schema,
    split_member_key,
)
from pipeline.records import ClipFailure, DatasetManifest, LatentRecord
from pipeline.stored import open_records, read_records, read_rejections

RECORDS = [
    record("a.b", bucket=SMALL),
    record("a.b", 1, bucket=SMALL),
    record("é/x", bucket=WIDE),
    record("i", 0, IMAGE),
]


def write(
    folder: Path,
    records: list[LatentRecord],
    rejections: list[ClipFailure] | None = None,
    about: DatasetManifest | None = None,
    output_format: str = "both",
) -> dict[str, WrittenFile]:
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, "00000-deadbeef", about or manifest(), output_format) as writer:
        for entry in records:
            writer.write(entry)
        for failure in rejections or []:
            writer.reject(failure)
        return {file.content: file for file in writer.finish()}


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_parquet_has_the_documented_columns_with_their_types_and_nullability(tmp_path: Path) -> None:
    about = manifest(passthrough={"title": "string", "score": "float64", "seen": "bool", "views": "int64"})
    stored = pq.read_schema(write(tmp_path, RECORDS, about=about)["parquet"].path)
    names = [
        *("key", "clip_index", "caption", "latent", "latent_shape", "latent_dtype", "kind", "num_frames"),
        *("latent_num_frames", "width", "height", "fps", "source_fps", "source_width", "source_height"),
        *("source_num_frames", "clip_start_s", "clip_end_s", "crop", "bucket", "source_uri", "decoder"),
    ]
    assert stored.names == [*names, "score", "seen", "title", "views", "extra"]
    assert stored.remove_metadata().equals(schema(about).remove_metadata())
    nullable = {field.name for field in stored if field.nullable}
    assert nullable == {"fps", "source_fps", "score", "seen", "title", "views", "extra"}
    assert {column.name: str(column.type) for column in COLUMNS if column.name in ("latent", "key", "clip_index")} == {
        "latent": "binary",
        "key": "string",
        "clip_index": "int32",
    }


def test_schema_metadata_says_which_model_made_the_latents_and_how_to_scale_them(tmp_path: Path) -> None:
    metadata = pq.read_schema(write(tmp_path, RECORDS)["parquet"].path).metadata
    found = {name.decode(): value.decode() for name, value in metadata.items() if name != b"ARROW:schema"}
    assert found == {
        "format_version": str(FORMAT_VERSION),
        "model": "made-up",
        "revision": "",
        "weights_sha256": "ab" * 32,
        "is_trained": "false",
        "scaling_factor": "0.5",
        "shift_factor": "0.25",
        "latent_channels": "4",
        "temporal_compression": "4",
        "spatial_compression": "8",
        "fingerprint": "cd" * 32,
    }


def test_a_row_says_what_its_clip_was(tmp_path: Path) -> None:
    row = pq.read_table(write(tmp_path, [record("k", 2, WIDE)])["parquet"].path).to_pylist()[0]
    latent = np.frombuffer(row.pop("latent"), "<f2").reshape(row["latent_shape"])
    np.testing.assert_array_equal(latent, latent_of("k", 2, WIDE))
    assert row == {
        "key": "k",
        "clip_index": 2,
        "caption": "caption of k",
        "latent_shape": [4, 3, 2, 8],
        "latent_dtype": "float16",
        "kind": "mean",
        "num_frames": 9,
        "latent_num_frames": 3,
        "width": 64,
        "height": 16,
        "fps": 8.0,
        "source_fps": 25.0,
        "source_width": 640,
        "source_height": 360,
        "source_num_frames": 100,
        "clip_start_s": 2.0,
        "clip_end_s": 3.125,
        "crop": [0, 20, 640, 320],
        "bucket": "64x16x9",
        "source_uri": "s3://videos/00000.tar#k.mp4",
        "decoder": "made-up-1",
        "extra": None,
    }


def test_an_image_has_no_frame_rate(tmp_path: Path) -> None:
    row = pq.read_table(write(tmp_path, [record("i", 0, IMAGE)])["parquet"].path).to_pylist()[0]
    assert (row["fps"], row["source_fps"], row["num_frames"], row["latent_num_frames"]) == (None, None, 1, 1)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", ["mean", "moments"])
def test_both_forms_give_back_every_record_as_it_was_written(tmp_path: Path, kind: str, dtype: str) -> None:
    about = manifest(kind, dtype)
    records = [record(f"k{i}", i, bucket, kind=kind, dtype=dtype) for i, bucket in enumerate([SMALL, WIDE, IMAGE])]
    files = write(tmp_path, records, about=about)
    read = [list(read_records(files[content].path, content)) for content in ("parquet", "webdataset")]  # type: ignore[arg-type]
    for wrote, rows in zip(records, zip(*read, strict=True), strict=True):
        for row in rows:
            assert (row.key, row.clip_index, row.kind) == (wrote.key, wrote.clip_index, kind)
            assert row.mean.dtype == dtype
            assert row.columns["latent_dtype"] == dtype
            np.testing.assert_array_equal(row.mean, wrote.mean)
            if wrote.logvar is None:
                assert row.logvar is None
            else:
                np.testing.assert_array_equal(row.logvar, wrote.logvar)
        assert rows[0].columns.items() <= rows[1].columns.items()


def test_a_data_file_can_be_read_from_its_bytes(tmp_path: Path) -> None:
    files = write(tmp_path, RECORDS)
    for content in ("parquet", "webdataset"):
        data = files[content].path.read_bytes()
        assert [row.key for row in read_records(data, content)] == [entry.key for entry in RECORDS]  # type: ignore[arg-type]


def test_moments_are_one_parquet_value_and_two_tar_members(tmp_path: Path) -> None:
    files = write(tmp_path, [record("k", kind="moments")], about=manifest("moments"))
    assert pq.read_table(files["parquet"].path).column("latent_shape").to_pylist() == [[8, 2, 2, 4]]
    tar = members(files["webdataset"].path)
    assert list(tar) == ["k_000.mean.npy", "k_000.logvar.npy", "k_000.json", "k_000.txt"]
    mean = np.load(io.BytesIO(tar["k_000.mean.npy"]), allow_pickle=False)
    np.testing.assert_array_equal(mean, latent_of("k", 0, SMALL))


def test_tar_members_are_named_by_escaped_key_and_clip_and_carry_no_trace_of_the_machine(tmp_path: Path) -> None:
    path = write(tmp_path, RECORDS)["webdataset"].path
    with tarfile.open(path) as tar:
        infos = list(tar)
    assert [info.name for info in infos[::3]] == [
        "a%2Eb_000.latent.npy",
        "a%2Eb_001.latent.npy",
        "é%2Fx_000.latent.npy",
        "i_000.latent.npy",
    ]
    assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode, i.isreg()) for i in infos} == {
        (0, 0, 0, "", "", 0o644, True)
    }
    sidecar = json.loads(members(path)["a%2Eb_000.json"])
    assert sidecar["key"] == "a.b"
    assert sidecar["latentmill"]["scaling_factor"] == 0.5
    assert "latent" not in sidecar


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), st.integers(0, 5000))
def test_every_key_survives_its_member_name(key: str, clip_index: int) -> None:
    name = member_key(key, clip_index)
    assert re.fullmatch(r"[\w%-]+_\d{3,}", name)
    assert split_member_key(name) == (key, clip_index)


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    digests = [
        {
            content: hashlib.sha256(file.path.read_bytes()).hexdigest()
            for content, file in write(tmp_path / str(attempt), RECORDS, [rejection("r")]).items()
        }
        for attempt in range(2)
    ]
    assert digests[0] == digests[1]
    assert list(digests[0]) == ["parquet", "webdataset", "rejected"]


def test_texts_count_towards_the_size_of_a_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_format_module, "_ROW_GROUP_BYTES", 1 << 20)
    records = [record(f"k{n}", fields={"note": "x" * 600_000}) for n in range(6)]
    with ShardWriter(tmp_path, "s", manifest(), "parquet") as writer:
        for entry in records:
            writer.write(entry)
        (written,) = writer.finish()
    assert pq.ParquetFile(written.path).metadata.num_row_groups == 3


def test_row_groups_are_cut_by_size_and_hold_all_rows_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_format_module, "_ROW_GROUP_BYTES", 5 * RECORDS[0].mean.nbytes)
    records = [record(f"k{i:02d}") for i in range(12)]
    path = write(tmp_path, records, output_format="parquet")["parquet"].path
    file = open_records(path, "parquet")
    assert list(file.group_rows) == [4, 4, 4]  # the texts of a row count as well
    assert [row.key for row in read_records(path)] == [entry.key for entry in records]


def test_the_writer_counts_rows_per_bucket_for_the_commit(tmp_path: Path) -> None:
    files = write(tmp_path, RECORDS, [rejection("r")])
    for content in ("parquet", "webdataset"):
        assert files[content].num_rows == 4
        assert files[content].bucket_rows == {"32x16x5": 2, "32x32x1": 1, "64x16x9": 1}
    assert (files["rejected"].num_rows, files["rejected"].bucket_rows) == (1, {})


def test_rejections_come_back_as_they_were(tmp_path: Path) -> None:
    failures = [rejection("a"), rejection("b", 3)]
    path = write(tmp_path, [], failures)["rejected"].path
    assert list(read_rejections(path)) == failures
    assert pq.read_schema(path).names == ["key", "clip_index", "step", "reason", "message", "source_uri"]


def test_files_without_rows_are_not_written(tmp_path: Path) -> None:
    assert write(tmp_path, []) == {}
    assert list(write(tmp_path, RECORDS, output_format="webdataset")) == ["webdataset"]
    assert list(write(tmp_path / "other", [], [rejection("a")])) == ["rejected"]


def test_an_interrupted_writer_leaves_no_file(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "s", manifest(), "both")
    writer.write(RECORDS[0])
    writer.reject(rejection("r"))
    assert all(path.name.endswith(".partial") for path in tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_fields_pass_through_typed_and_what_does_not_fit_is_kept_in_extra(tmp_path: Path) -> None:
    about = manifest(
        passthrough={"title": "string", "score": "float64", "views": "int64", "seen": "bool", "source_bucket": "string"}
    )
    fields: list[dict[str, Any]] = [
        {"title": "x", "score": 1, "views": 7, "seen": True, "bucket": "mine"},
        {"title": 5, "score": float("nan"), "views": 2**70, "seen": 1, "bucket": None, "source_bucket": "direct"},
        {"title": "\ud800", "score": "9", "views": 1.5, "nested": {"list": [1, float("-inf")]}, "none": None},
        {},
    ]
    files = write(tmp_path, [record(f"k{i}", fields=value) for i, value in enumerate(fields)], about=about)
    for content in ("parquet", "webdataset"):
        rows = [row.columns for row in read_records(files[content].path, content)]  # type: ignore[arg-type]
        names = ("title", "score", "views", "seen", "source_bucket", "extra")
        assert [tuple(row[name] for name in names) for row in rows] == [
            ("x", 1.0, 7, True, "mine", None),
            (None, None, None, None, "direct", {"title": 5, "score": "NaN", "views": 2**70, "seen": 1, "bucket": None}),
            (
                None,
                None,
                None,
                None,
                None,
                {"title": "\ud800", "score": "9", "views": 1.5, "nested": {"list": [1, "-Infinity"]}, "none": None},
            ),
            (None, None, None, None, None, None),
        ]
        assert [row["bucket"] for row in rows] == ["32x16x5"] * 4


def test_a_taken_name_gets_a_prefix_until_it_is_free_whatever_its_case() -> None:
    assert column_name("title") == "title"
    assert column_name("bucket") == "source_bucket"
    assert column_name("width") == "source_source_width"
    assert column_name("WIDTH") == "source_source_WIDTH"
    assert column_name("latentmill") == "source_latentmill"


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_every_caption_that_unicode_allows_is_kept_to_the_letter(tmp_path_factory: Any, caption: str) -> None:
    files = write(tmp_path_factory.mktemp("caption"), [record("k", caption=caption)])
    for content in ("parquet", "webdataset"):
        assert next(read_records(files[content].path, content)).columns["caption"] == caption  # type: ignore[arg-type]
    assert members(files["webdataset"].path)["k_000.txt"].decode() == caption


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (record("k", caption="x\udc80"), "lone surrogate"),
        (record("k", kind="moments"), "kind moments"),
        (record("k", dtype="float32"), "float32"),
    ],
)
def test_a_record_that_upstream_should_have_refused_is_named_in_the_error(
    tmp_path: Path, bad: LatentRecord, said: str
) -> None:
    writer = ShardWriter(tmp_path, "s", manifest(), "both")
    with writer, pytest.raises(AssertionError, match=f"(?s)s, clip 0 of 'k'.*{said}"):
        writer.write(bad)


def test_the_same_clip_twice_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "s", manifest(), "both") as writer:
        writer.write(RECORDS[0])
        with pytest.raises(AssertionError, match="written twice"):
            writer.write(RECORDS[0])


def test_latent_bytes_are_little_endian_in_c_order() -> None:
    latent = np.arange(8, dtype=">f4").reshape(1, 2, 2, 2).transpose(0, 3, 2, 1)
    data = encode_latent(latent, "float16")
    assert data == np.ascontiguousarray(latent).astype("<f2").tobytes()
    np.testing.assert_array_equal(decode_latent(data, (1, 2, 2, 2), "float16"), latent)


def test_latent_bytes_that_contradict_their_row_are_refused() -> None:
    with pytest.raises(DamagedObjectError, match=r"shape \(1, 2, 2, 2\) float16 has 14 bytes, not 16"):
        decode_latent(bytes(14), (1, 2, 2, 2), "float16")
    with pytest.raises(DamagedObjectError, match="'int8'"):
        decode_latent(bytes(8), (1, 2, 2, 2), "int8")


@pytest.mark.parametrize("content", ["parquet", "webdataset"])
def test_bytes_of_another_kind_are_refused_by_name(content: Any) -> None:
    with pytest.raises(DamagedObjectError, match="no readable"):
        open_records(b"these are not the bytes of any file" * 100, content)


# Readers without Latentmill run in processes of their own: what they import and cache stays away from the other tests.
HF_DATASETS = """
import sys, json, numpy as np, datasets
rows = datasets.load_dataset("parquet", data_files=[sys.argv[1]], split="train", cache_dir=sys.argv[2])
streamed = datasets.load_dataset("parquet", data_files=[sys.argv[1]], split="train", streaming=True)
assert [row["key"] for row in streamed] == rows["key"]
latents = [np.frombuffer(row["latent"], "<f2").reshape(row["latent_shape"]) for row in rows]
"""
WEBDATASET = """
import sys, json, numpy as np, webdataset
rows = list(webdataset.WebDataset([sys.argv[1]], shardshuffle=False).decode())
latents = [row["latent.npy"] for row in rows]
assert [row["txt"] for row in rows] == [row["json"]["caption"] for row in rows]
assert all(set(row) >= {"__key__", "latent.npy", "json", "txt"} for row in rows)
rows = [row["json"] for row in rows]
"""
PYARROW = """
import sys, json, numpy as np, pyarrow.dataset
rows = pyarrow.dataset.dataset([sys.argv[1]]).to_table().to_pylist()
latents = [np.frombuffer(row["latent"], "<f2").reshape(row["latent_shape"]) for row in rows]
"""
TELL = """
print(json.dumps([
    [row["key"], row["clip_index"], row["caption"], row["bucket"], latent.tolist()]
    for row, latent in zip(rows, latents, strict=True)
]))
"""


@pytest.mark.parametrize(
    ("script", "content"), [(HF_DATASETS, "parquet"), (PYARROW, "parquet"), (WEBDATASET, "webdataset")]
)
def test_stock_readers_read_the_files_as_they_are(tmp_path: Path, script: str, content: str) -> None:
    path = write(tmp_path / "files", RECORDS)[content].path
    env = {**os.environ, "HOME": str(tmp_path), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "WDS_SECURE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script + TELL, str(path), str(tmp_path / "cache")],
        env=env,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    told = json.loads(done.stdout.decode().splitlines()[-1])
    assert [row[:4] for row in told] == [[r.key, r.clip_index, r.caption, str(r.bucket)] for r in RECORDS]
    for row, wrote in zip(told, RECORDS, strict=True):
        np.testing.assert_array_equal(np.array(row[4]), wrote.mean)


def test_duckdb_counts_frames_by_bucket(tmp_path: Path) -> None:
    files = write(tmp_path, RECORDS, [rejection("r")])
    with duckdb.connect() as connection:
        table = f"'{files['parquet'].path}'"
        query = f"select bucket, sum(num_frames), sum(octet_length(latent)) from {table} group by 1 order by 1"
        assert connection.sql(query).fetchall() == [("32x16x5", 10, 256), ("32x32x1", 1, 128), ("64x16x9", 9, 384)]
        query = f"select key, clip_index, reason from '{files['rejected'].path}'"
        assert connection.sql(query).fetchall() == [("r", None, "timeout")]
