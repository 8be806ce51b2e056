"""The promises of an export: every sample that counts and no other, with the very values, in the form of another
project; nothing that looks whole before it is; nothing of others touched.

FastVideo does not install beside the rest: its files are compared with its published schema and read as its reader
reads them, and by that reader in test_fastvideo.py where its wheel is at hand. Tars are read by stock webdataset, and
by Energon in test_energon.py where that is installed; what is made for the hub is read by datasets.
"""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import latents
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
import yaml
from embeddings import add_image_set, add_text_set, caption_embedding
from latents import IMAGE, SMALL, WIDE, commit_records, latent_of, record, rejection
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.cli import main
from pipeline.commit import publish_snapshot, read_manifest
from pipeline.errors import DamagedObjectError, UsageError
from pipeline.export import PEERS, export
from pipeline.records import Bucket, LatentRecord
from pipeline.storage import open_store

# Samples of two shards by (shard, key, clip index): three shapes, a key with dots and other letters, a caption that two
# clips share, an empty one, columns of the input.
SAMPLES: Mapping[tuple[str, str, int], tuple[Bucket, str]] = {
    ("s000", "a", 0): (SMALL, "a red ball"),
    ("s000", "a", 1): (SMALL, "a red ball"),
    ("s000", "b.v1/ü", 0): (WIDE, ""),
    ("s001", "a", 0): (SMALL, "a blue box, turning"),
    ("s001", "p", 0): (IMAGE, "a photograph"),
}
PASSTHROUGH = {"score": "float64", "shard_id": "string"}


def _records(shard_id: str, kind: str, dtype: str) -> list[LatentRecord]:
    return [
        record(
            key,
            clip,
            bucket,
            kind=kind,
            dtype=dtype,
            caption=caption,
            fields={"score": 0.5, "shard_id": "theirs", "tags": ["x"]},
        )
        for (shard, key, clip), (bucket, caption) in SAMPLES.items()
        if shard == shard_id
    ]


def _source(
    root: Path | str, kind: str = "mean", dtype: str = "float16", output_format: str = "parquet", with_text: bool = True
) -> str:
    shards = [_records(shard_id, kind, dtype) for shard_id in ("s000", "s001")]
    store = latents.output(root, shards, output_format=output_format, kind=kind, dtype=dtype, passthrough=PASSTHROUGH)
    if with_text:
        add_text_set(store)
    publish_snapshot(store)
    return store.root_uri


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Both shards as Parquet with means in float16, caption embeddings, and a snapshot."""
    return _source(tmp_path / "source")


@pytest.fixture(params=[("mean", "float16", "parquet"), ("moments", "float32", "webdataset")], ids="-".join)
def any_source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    kind, dtype, output_format = request.param
    return _source(tmp_path / "source", kind, dtype, output_format)


def _files(root: Path) -> dict[str, bytes]:
    """Every file of a finished export but what says where its source lies."""
    files = [path for path in root.rglob("*") if path.is_file() and path.name != "_export.json"]
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(files)}


def _scaled(key: str, clip_index: int, bucket: Bucket) -> npt.NDArray[np.float32]:
    """What the diffusion model takes: the made-up model has the shift 0.25 and the factor 0.5."""
    return (latent_of(key, clip_index, bucket) - np.float32(0.25)) * np.float32(0.5)


# hao-ai-lab/FastVideo, fastvideo/dataset/dataloader/schema.py, pyarrow_schema_t2v.
FASTVIDEO_COLUMNS = {
    "id": pa.string(),
    "vae_latent_bytes": pa.binary(),
    "vae_latent_shape": pa.list_(pa.int64()),
    "vae_latent_dtype": pa.string(),
    "text_embedding_bytes": pa.binary(),
    "text_embedding_shape": pa.list_(pa.int64()),
    "text_embedding_dtype": pa.string(),
    "file_name": pa.string(),
    "caption": pa.string(),
    "media_type": pa.string(),
    "width": pa.int64(),
    "height": pa.int64(),
    "num_frames": pa.int64(),
    "duration_sec": pa.float64(),
    "fps": pa.float64(),
}


def _fastvideo_rows(folder: Path) -> list[dict[str, Any]]:
    """As FastVideo's map-style dataset finds its rows: every .parquet below a folder, by its footer and row groups."""
    rows = []
    for path in sorted(folder.rglob("*.parquet")):
        file = pq.ParquetFile(path)
        assert {field.name: field.type for field in file.schema_arrow} == FASTVIDEO_COLUMNS
        for group in range(file.num_row_groups):
            rows += file.read_row_group(group).to_pylist()
    return rows


def _fastvideo_tensor(row: Mapping[str, Any], name: str) -> torch.Tensor:
    """As FastVideo's collator reads a tensor: float32, whatever the dtype column says."""
    array = np.frombuffer(row[f"{name}_bytes"], dtype=np.float32).reshape(row[f"{name}_shape"])
    assert row[f"{name}_dtype"] == "float32"
    return torch.from_numpy(array.copy())


def test_fastvideo_gets_float32_means_unscaled_with_text_and_columns_that_mean_what_they_say(
    any_source: str, tmp_path: Path
) -> None:
    done = export(any_source, "fastvideo", str(tmp_path / "fv"), text="text")
    assert (done.num_records, done.num_files, done.snapshot) == (5, 4, 1)
    rows = {row["id"]: row for row in _fastvideo_rows(tmp_path / "fv")}
    assert len(rows) == 5
    assert set(rows) == {"s000/a_000", "s000/a_001", "s000/b%2Ev1%2Fü_000", "s001/a_000", "s001/p_000"}
    for (name, row), ((_, key, clip), (bucket, caption)) in zip(sorted(rows.items()), SAMPLES.items(), strict=True):
        assert name.rpartition("_")[2] == f"{clip:03d}"
        np.testing.assert_array_equal(_fastvideo_tensor(row, "vae_latent").numpy(), latent_of(key, clip, bucket))
        np.testing.assert_array_equal(
            _fastvideo_tensor(row, "text_embedding").numpy(), caption_embedding(caption).astype(np.float32)
        )
        assert (row["width"], row["height"], row["num_frames"]) == (
            bucket.width_px,
            bucket.height_px,
            bucket.num_frames,
        )
        assert row["caption"] == caption
        assert row["file_name"] == f"{key}.mp4".rpartition("/")[2]
        is_image = bucket is IMAGE
        assert row["media_type"] == ("image" if is_image else "video")
        assert (row["fps"], row["duration_sec"]) == ((0, 0) if is_image else (8, bucket.num_frames / 8))


def test_a_folder_for_fastvideo_stacks_because_it_holds_one_shape(source: str, tmp_path: Path) -> None:
    export(source, "fastvideo", str(tmp_path / "fv"), text="text")
    folders = {path.name for path in (tmp_path / "fv").iterdir() if path.is_dir()}
    assert folders == {str(bucket) for bucket in (SMALL, WIDE, IMAGE)}
    for folder in folders:
        rows = _fastvideo_rows(tmp_path / "fv" / folder)
        assert torch.stack([_fastvideo_tensor(row, "vae_latent") for row in rows]).ndim == 5


def test_fastvideo_without_text_embeddings_is_refused_with_what_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _source(tmp_path / "source", with_text=False)
    assert main(["export", source, "--to", "fastvideo", "-o", str(tmp_path / "fv")]) == 2
    assert "encode_text.py" in capsys.readouterr().err
    assert main(["export", source, "--to", "fastvideo", "-o", str(tmp_path / "fv"), "--text", "text"]) == 2
    assert "encode_text.py" in capsys.readouterr().err
    assert not (tmp_path / "fv").exists()


def _tar_samples(root: Path) -> list[dict[str, Any]]:
    # The stages of webdataset.WebDataset(...).decode() but the first, which leaves files open.
    with ExitStack() as stack:
        tars = [
            {"url": str(path), "stream": stack.enter_context(path.open("rb"))} for path in sorted(root.glob("*.tar"))
        ]
        decode = webdataset.autodecode.Decoder([])
        return [decode(sample) for sample in group_by_keys(tar_file_expander(tars))]


def test_dfm_gets_scaled_float32_tensors_text_and_its_own_json_as_stock_webdataset_reads_them(
    any_source: str, tmp_path: Path
) -> None:
    done = export(any_source, "webdataset-dfm", str(tmp_path / "dfm"), text="text")
    assert (done.num_records, done.num_files) == (5, 2)
    samples = _tar_samples(tmp_path / "dfm")
    assert len({sample["__key__"] for sample in samples}) == 5
    for sample, ((shard_id, key, clip), (bucket, caption)) in zip(samples, SAMPLES.items(), strict=True):
        assert sample["pth"].dtype == sample["pickle"].dtype == torch.float32
        np.testing.assert_array_equal(sample["pth"].numpy(), _scaled(key, clip, bucket))
        np.testing.assert_array_equal(sample["pickle"].numpy(), caption_embedding(caption).astype(np.float32))
        told = sample["json"]
        assert (told["shard_id"], told["columns"]["key"], told["columns"]["clip_index"]) == (shard_id, key, clip)
        assert (told["processed_frames"], told["processed_width"], told["processed_height"]) == (
            bucket.num_frames,
            bucket.width_px,
            bucket.height_px,
        )
        assert told["caption"] == caption
        assert told["columns"]["score"] == 0.5
        assert (told["latents_are_scaled"], told["scaling_factor"], told["shift_factor"]) == (True, 0.5, 0.25)
        assert not {"latent", "latentmill"} & set(told["columns"])


def test_an_export_for_dfm_holds_what_the_reader_of_latentmill_gives(source: str, tmp_path: Path) -> None:
    from pipeline import LatentDataset

    export(source, "webdataset-dfm", str(tmp_path / "dfm"))
    told = {
        (s["json"]["shard_id"], s["json"]["columns"]["key"], s["json"]["columns"]["clip_index"]): s["pth"]
        for s in _tar_samples(tmp_path / "dfm")
    }
    batches = list(LatentDataset(source, batch_size=1, shuffle_seed=None))
    assert len(batches) == len(told)
    for batch in batches:
        name = (batch["shard_id"][0], batch["key"][0], int(batch["clip_index"][0]))
        assert torch.equal(batch["latents"][0], told[name])


def test_the_index_for_energon_is_the_documented_one(source: str, tmp_path: Path) -> None:
    root = tmp_path / "dfm"
    export(source, "webdataset-dfm", str(root), text="text")
    about = root / ".nv-meta"
    counts = {"shard-000000.tar": 3, "shard-000001.tar": 2}
    assert json.loads((about / ".info.json").read_text()) == {"shard_counts": counts}
    assert yaml.safe_load((about / ".info.yaml").read_text()) == {"shard_counts": counts}
    assert yaml.safe_load((about / "split.yaml").read_text()) == {
        "split_parts": {"train": list(counts), "val": [], "test": []},
        "exclude": [],
    }
    assert yaml.safe_load((about / "dataset.yaml").read_text()) == {
        "__module__": "megatron.energon",
        "__class__": "CrudeWebdataset",
    }
    assert len((about / "index.uuid").read_text()) == 36
    with sqlite3.connect(about / "index.sqlite") as index:
        samples = index.execute("SELECT * FROM samples ORDER BY tar_file_id, sample_index").fetchall()
        parts = index.execute("SELECT * FROM sample_parts").fetchall()
    index.close()
    assert (len(samples), len(parts)) == (5, 15)
    for number, name in enumerate(counts):
        content = (root / name).read_bytes()
        offsets = struct.unpack(f"<{counts[name] + 1}Q", (root / f"{name}.idx").read_bytes())
        mine = [row for row in samples if row[0] == number]
        assert [row[3] for row in mine] == list(offsets[:-1])
        assert [row[3] + row[4] for row in mine] == list(offsets[1:])
        with tarfile.open(root / name) as tar:
            members = tar.getmembers()
        for tar_id, place, part, offset, num_bytes in parts:
            if tar_id == number:
                member = f"{mine[place][1]}.{part}"
                (found,) = [m for m in members if m.name == member]
                assert (found.offset_data, found.size) == (offset, num_bytes)
        # After the last sample come only the zero blocks that end a tar.
        assert not any(content[offsets[-1] :])


def test_datasets_loads_the_export_for_the_hub_with_its_card(any_source: str, tmp_path: Path) -> None:
    root = tmp_path / "hf"
    export(any_source, "hf", str(root), text="text")
    loaded = datasets.load_dataset(str(root), split="train", cache_dir=str(tmp_path / "cache"))
    streamed = list(datasets.load_dataset(str(root), split="train", streaming=True))
    assert loaded.num_rows == len(streamed) == 5
    for row, streamed_row, ((shard_id, key, clip), (bucket, caption)) in zip(
        loaded, streamed, SAMPLES.items(), strict=True
    ):
        assert row == streamed_row
        assert (row["shard_id"], row["key"], row["clip_index"], row["caption"]) == (shard_id, key, clip, caption)
        latent = np.frombuffer(row["latent"], row["latent_dtype"]).reshape(row["latent_shape"])
        parts = ["mean"] if row["kind"] == "mean" else ["mean", "logvar"]
        wanted = np.concatenate([latent_of(key, clip, bucket, part) for part in parts])
        np.testing.assert_array_equal(latent, wanted)
        text = np.frombuffer(row["text_embedding"], row["text_embedding_dtype"]).reshape(row["text_embedding_shape"])
        np.testing.assert_array_equal(text, caption_embedding(caption).astype(np.float32))
        assert (row["score"], row["source_shard_id"]) == (0.5, "theirs")
        assert json.loads(row["extra"]) == {"tags": ["x"]}
    head = yaml.safe_load((root / "README.md").read_text().split("---\n")[1])
    assert head["dataset_info"]["splits"][0]["num_examples"] == 5
    assert datasets.Features._from_yaml_list(head["dataset_info"]["features"]) == loaded.features
    assert head["size_categories"] == ["n<1K"]
    assert "license" not in head
    assert "license:" in (root / "README.md").read_text()


def test_what_counts_is_exported_once_the_lowest_ok_generation_and_no_rejection(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "source"))
    latents.output(store.root_uri, [[record("a", caption="first")]])
    about = read_manifest(store)
    assert about is not None
    commit_records(store, about, "s001", [record("c")], [rejection("d"), rejection("e")])
    again = [record("a", caption="a later attempt"), record("b", caption="new")]
    commit_records(store, about, "s000", again, keys=("a", "b"))
    commit_records(store, about, "s001", [record("d")], keys=("d",))
    publish_snapshot(store)
    done = export(store.root_uri, "hf", str(tmp_path / "hf"))
    rows = pq.read_table(tmp_path / "hf" / "data").to_pylist()
    found = sorted((row["shard_id"], row["key"], row["caption"]) for row in rows)
    assert found == [
        ("s000", "a", "first"),
        ("s000", "b", "new"),
        ("s001", "c", "caption of c"),
        ("s001", "d", "caption of d"),
    ]
    assert done.num_records == 4


def test_the_snapshot_that_was_pinned_is_exported_and_an_export_is_not_made_of_two(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(source, "webdataset-dfm", str(tmp_path / "before"))
    store = open_store(source)
    about = read_manifest(store)
    assert about is not None
    commit_records(store, about, "s002", [record("z")])
    publish_snapshot(store)
    assert export(source, "webdataset-dfm", str(tmp_path / "one"), snapshot=1).num_records == 5
    assert _files(tmp_path / "one") == _files(tmp_path / "before")
    assert export(source, "webdataset-dfm", str(tmp_path / "two")).num_records == 6
    # A finished export stays what it is, and says that there is more by now.
    again = export(source, "webdataset-dfm", str(tmp_path / "one"))
    assert (again.snapshot, again.latest_snapshot, again.num_records, again.num_files_kept) == (1, 2, 5, 2)
    with pytest.raises(UsageError, match=r"snapshot: 1 there, 2 asked for"):
        export(source, "webdataset-dfm", str(tmp_path / "one"), snapshot=2)
    with pytest.raises(UsageError, match=r"no snapshot 7; the latest is 2"):
        export(source, "webdataset-dfm", str(tmp_path / "three"), snapshot=7)
    assert main(["export", source, "--to", "webdataset-dfm", "-o", str(tmp_path / "one")]) == 0
    assert "snapshot  1; the latest is 2" in capsys.readouterr().out


class _StoppedError(Exception):
    """What interrupts an export here."""


def _stop_after(num_files: int) -> Callable[[int, int], None]:
    def stop(done: int, files: int) -> None:
        if done == num_files:
            raise _StoppedError

    return stop


@pytest.mark.parametrize("to", PEERS)
def test_an_export_that_stopped_is_read_by_nobody_and_the_same_command_finishes_it(
    to: str, source: str, tmp_path: Path
) -> None:
    export(source, to, str(tmp_path / "whole"), text="text")
    part = tmp_path / "part"
    with pytest.raises(_StoppedError):
        export(source, to, str(part), text="text", on_file=_stop_after(1), num_at_once=1)
    made = {path: content for path, content in _files(part).items() if "UNFINISHED" not in path}
    assert made
    with pytest.raises(Exception, match=r"UNFINISHED|Parquet magic bytes|truncated|invalid header"):
        _read_all(to, part, tmp_path)
    done = export(source, to, str(part), text="text")
    assert done.num_files_kept == {"fastvideo": 2}.get(to, 1)
    assert _files(part) == _files(tmp_path / "whole")
    assert not list(part.rglob("*UNFINISHED*"))
    assert not (part / ".tmp").exists()
    # One that was killed just before its last step is whole already.
    marker = next(path for path in part.rglob("*") if path.suffix in (".parquet", ".tar")).parent / (
        {"hf": "train-00000-of-00002-"}.get(to, "") + "UNFINISHED" + (".tar" if to == "webdataset-dfm" else ".parquet")
    )
    marker.write_text("left behind")
    export(source, to, str(part), text="text")
    assert _files(part) == _files(tmp_path / "whole")
    _read_all(to, part, tmp_path)


def _read_all(to: str, root: Path, scratch: Path) -> None:
    if to == "hf":
        assert datasets.load_dataset(str(root), split="train", cache_dir=str(scratch / "read")).num_rows == 5
    elif to == "fastvideo":
        assert sum(len(_fastvideo_rows(folder)) for folder in sorted(root.iterdir()) if folder.is_dir()) == 5
    else:
        assert (root / ".nv-meta").exists() == (root / "_complete.json").exists()
        assert len(_tar_samples(root)) == 5


@pytest.mark.parametrize("to", PEERS)
def test_every_folder_that_a_reader_is_given_is_marked_while_it_is_unfinished(
    to: str, source: str, tmp_path: Path
) -> None:
    with pytest.raises(_StoppedError):
        export(source, to, str(tmp_path / "part"), text="text", on_file=_stop_after(2), num_at_once=1)
    folders = {path.parent for path in (tmp_path / "part").rglob("*") if path.suffix in (".parquet", ".tar")}
    for folder in folders:
        (marker,) = [path for path in folder.iterdir() if "UNFINISHED" in path.name]
        assert marker.suffix in (".parquet", ".tar")
        assert "latentmill export" in marker.read_text()
    assert not (tmp_path / "part" / "README.md").exists()


def test_streaming_an_unfinished_export_for_the_hub_fails_at_its_first_row(source: str, tmp_path: Path) -> None:
    with pytest.raises(_StoppedError):
        export(source, "hf", str(tmp_path / "hf"), on_file=_stop_after(2), num_at_once=1)
    with pytest.raises(Exception, match=r"UNFINISHED|Parquet magic bytes"):
        next(iter(datasets.load_dataset(str(tmp_path / "hf"), split="train", streaming=True)))


def test_a_file_of_the_target_that_lost_its_end_is_made_again(source: str, tmp_path: Path) -> None:
    export(source, "webdataset-dfm", str(tmp_path / "whole"))
    for to, name in (("webdataset-dfm", "shard-000000.tar"), ("hf", "data/train-00000-of-00002.parquet")):
        part = tmp_path / to
        with pytest.raises(_StoppedError):
            export(source, to, str(part), on_file=_stop_after(2), num_at_once=1)
        content = (part / name).read_bytes()
        (part / name).write_bytes(content[: len(content) // 2])
        assert export(source, to, str(part)).num_files_kept == 1
        assert (part / name).read_bytes() == content


def test_a_damaged_file_of_the_source_is_never_exported(source: str, tmp_path: Path) -> None:
    paths = sorted(path for path in (Path(source) / "data").rglob("s001*.parquet"))
    damaged = bytearray(paths[0].read_bytes())
    kept = bytes(damaged)
    damaged[len(damaged) // 2] ^= 1
    paths[0].write_bytes(damaged)
    with pytest.raises(DamagedObjectError, match="s001"):
        export(source, "hf", str(tmp_path / "hf"))
    assert not (tmp_path / "hf" / "README.md").exists()
    paths[0].write_bytes(kept)
    done = export(source, "hf", str(tmp_path / "hf"))
    assert (done.num_records, done.num_files_kept) == (5, 1)


@pytest.mark.parametrize("name", ["notes.txt", "data/train-00000-of-00001.parquet", "_dataset.json"])
def test_a_folder_of_others_is_left_as_it_is(name: str, source: str, tmp_path: Path) -> None:
    target = tmp_path / "theirs"
    (target / name).parent.mkdir(parents=True)
    (target / name).write_text("{}")
    with pytest.raises(UsageError, match=r"is not empty"):
        export(source, "hf", str(target))
    assert [path.name for path in target.rglob("*") if path.is_file()] == [Path(name).name]


def test_another_export_is_left_as_it_is(source: str, tmp_path: Path) -> None:
    export(source, "hf", str(tmp_path / "hf"))
    before = _files(tmp_path / "hf")
    for to, text, different in (
        ("webdataset-dfm", None, "to: 'hf' there, 'webdataset-dfm' asked for"),
        ("hf", "text", "text: None there"),
    ):
        with pytest.raises(UsageError, match=different):
            export(source, to, str(tmp_path / "hf"), text=text)
    other = latents.output(tmp_path / "other", [[record("a")]])
    publish_snapshot(other)
    with pytest.raises(UsageError, match="holds another export"):
        export(other.root_uri, "hf", str(tmp_path / "hf"))
    assert _files(tmp_path / "hf") == before
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "_export.json").write_text("[1]")
    with pytest.raises(UsageError, match="was not written by an export"):
        export(source, "hf", str(tmp_path / "theirs"))


def test_an_export_of_a_source_that_was_moved_goes_on(source: str, tmp_path: Path) -> None:
    with pytest.raises(_StoppedError):
        export(source, "hf", str(tmp_path / "hf"), on_file=_stop_after(1), num_at_once=1)
    shutil.move(source, tmp_path / "moved")
    assert export(str(tmp_path / "moved"), "hf", str(tmp_path / "hf")).num_files_kept == 1


def test_the_command_says_by_its_exit_code_what_to_do(
    source: str, s3_env: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["export", source, "--to", "hf", "--json", "-o"]
    assert main([*command, str(tmp_path / "hf")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["num_records"], told["num_files"], told["num_files_kept"], told["snapshot"]) == (5, 2, 0, 1)
    assert main([*command, str(tmp_path / "hf"), "--snapshot", "9"]) == 2
    assert main([*command, "s3://no-such-bucket-here/hf"]) == 4
    path = next((Path(source) / "data").rglob("s000*.parquet"))
    path.write_bytes(path.read_bytes()[:-1])
    assert main([*command, str(tmp_path / "again")]) == 1
    assert "s000" in capsys.readouterr().err


@pytest.mark.slow
def test_an_export_that_is_killed_again_and_again_ends_in_the_same_bytes(tmp_path: Path) -> None:
    shards = [[record(f"k{n}", bucket=Bucket(width_px=512, height_px=512, num_frames=17)) for n in range(8)]] * 12
    store = latents.output(tmp_path / "source", shards)
    publish_snapshot(store)
    export(store.root_uri, "webdataset-dfm", str(tmp_path / "whole"))
    part = tmp_path / "part"
    command = [
        sys.executable,
        "-m",
        "pipeline.cli",
        "export",
        store.root_uri,
        "--to",
        "webdataset-dfm",
        "-o",
        str(part),
    ]
    chance = random.Random(0)
    num_killed = 0
    for _ in range(30):
        num_made = len(list(part.glob("shard-*.tar")))
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            wanted = num_made + chance.randrange(3)
            while process.poll() is None and len(list(part.glob("shard-*.tar"))) <= wanted:
                time.sleep(0.001)
            if process.poll() is None:
                process.kill()
                num_killed += 1
                assert (part / "UNFINISHED.tar").exists() or (part / "_complete.json").exists()
        if process.returncode == 0:
            break
    assert num_killed >= 3
    assert process.returncode == 0
    assert _files(part) == _files(tmp_path / "whole")


def test_what_cannot_be_exported_is_said(tmp_path: Path, source: str) -> None:
    empty = latents.output(tmp_path / "empty", [])
    with pytest.raises(UsageError, match="has no snapshot"):
        export(empty.root_uri, "hf", str(tmp_path / "hf"))
    publish_snapshot(empty)
    with pytest.raises(UsageError, match="holds no latents"):
        export(empty.root_uri, "hf", str(tmp_path / "hf"))
    add_image_set(open_store(source))
    with pytest.raises(UsageError, match="no embeddings of captions"):
        export(source, "hf", str(tmp_path / "hf"), text="image")
    with pytest.raises(UsageError, match="lies in the output"):
        export(source, "hf", f"{source}/exports/hf")
    with pytest.raises(UsageError, match="is no output of Latentmill"):
        export(str(tmp_path), "hf", str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("to", PEERS)
def test_on_s3_the_same_bytes_come_to_stand_and_are_gone_on_with(
    to: str, source: str, s3_env: Any, tmp_path: Path
) -> None:
    export(source, to, str(tmp_path / "local"), text="text")
    target = s3_env.root()
    with pytest.raises(_StoppedError):
        export(source, to, target, text="text", on_file=_stop_after(1), num_at_once=1)
    assert export(source, to, target, text="text").num_files_kept >= 1
    store = open_store(target)
    found = {info.key: store.get(info.key) for info in store.list("") if info.key != "_export.json"}
    assert found == _files(tmp_path / "local")


def test_a_source_on_s3_is_exported_too(s3_env: Any, tmp_path: Path) -> None:
    source = _source(s3_env.root(), "moments", "float32", "both")
    export(source, "webdataset-dfm", str(tmp_path / "far"), text="text")
    export(
        _source(tmp_path / "near", "moments", "float32", "both"), "webdataset-dfm", str(tmp_path / "dfm"), text="text"
    )
    assert _files(tmp_path / "far") == _files(tmp_path / "dfm")
