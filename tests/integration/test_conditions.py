"""Embeddings of captions and first frames by whole jobs: real clips, real Ray, a real sentence encoder.

What is read back is what a direct call of transformers gives for the same caption and the same frame.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import encoders
import numpy as np
import pytest
import torch
from builders import CLIP_STILLS, CLIP_VIDEOS, pack_clips
from integration.jobs_under_test import ROOT, SMALL, Outcome, RunningJob, data_digests, run_job, tree_of
from transformers import AutoTokenizer, BertModel

from jobs.encode_laion import main as encode
from jobs.encode_text import main as encode_text
from pipeline.cli import main as latentmill
from pipeline.columns import ColumnSet
from pipeline.commit import load_commits
from pipeline.committed import FileCache
from pipeline.config import ImageEncoderConfig, parse_arguments
from pipeline.decode import DecodePool
from pipeline.plan import plan_shards
from pipeline.records import Clip
from pipeline.source import iterate_videos
from pipeline.storage import open_store
from pipeline.stored import StoredRecord, read_records
from pipeline.text import ImageEncoder

MEDIA = (*CLIP_VIDEOS[:3], CLIP_STILLS[0])


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The job on four media in two tars, with both encoders."""
    encoders.quiet()
    folder = tmp_path_factory.mktemp("input")
    pack_clips(folder / "shards", 2, MEDIA)
    tower = encoders.clip_vision(folder / "tower")
    flags = ["--input", str(folder / "shards"), *SMALL, "--num-actors", "1"]
    return [*flags, "--text-encoder", str(encoders.minilm()), "--image-encoder", str(tower)]


@pytest.fixture(scope="module")
def encoded(
    flags: list[str], ray_home: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Outcome]:
    output = tmp_path_factory.mktemp("output") / "latents"
    outcome = _run([*flags, "--output", str(output)], ray_home, output.parent)
    assert outcome.code == 0, outcome.said
    return output, outcome


def _run(flags: list[str], env: Mapping[str, str], folder: Path) -> Outcome:
    # A folder of its own: Ray lets workers import from where the job was started, and transformers tries many names.
    return run_job(flags, env, folder)


def _rows(output: Path) -> Iterator[tuple[str, StoredRecord]]:
    store = open_store(str(output))
    for commit in load_commits(store):
        file = next(file for file in commit.files if file.content == "parquet")
        for row in read_records(store.get(file.key)):
            yield commit.shard_id, row


def test_every_caption_has_the_embedding_that_transformers_gives_it(
    encoded: tuple[Path, Outcome], tmp_path: Path
) -> None:
    output, outcome = encoded
    assert outcome.result["num_texts_truncated"] == 0
    texts = ColumnSet.open(open_store(str(output)), "text", FileCache(tmp_path, 1 << 30))
    tokenizer = AutoTokenizer.from_pretrained(encoders.minilm())
    model = BertModel.from_pretrained(encoders.minilm()).eval()
    torch.set_num_threads(1)
    pairs = {(shard_id, row.columns["caption"]) for shard_id, row in _rows(output)}
    assert len(pairs) == len(MEDIA)
    for shard_id, caption in pairs | {(shard_id, "") for shard_id, _ in pairs}:
        with torch.no_grad():
            wanted = model(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        found = texts.caption(shard_id, caption)
        assert found.shape == wanted.shape
        np.testing.assert_array_equal(found, wanted.half().numpy())


def test_every_clip_has_the_embedding_of_its_own_first_frame(
    encoded: tuple[Path, Outcome], flags: list[str], tmp_path: Path
) -> None:
    output, _ = encoded
    config = parse_arguments([*flags, "--output", str(tmp_path / "plan")])
    tower = ImageEncoder(
        ImageEncoderConfig(image_encoder=config.image.image_encoder), torch.device("cpu"), "float32", 1
    )
    images = ColumnSet.open(open_store(str(output)), "image", FileCache(tmp_path / "cache", 1 << 30))
    store = open_store(str(tmp_path / "plan"))
    pool = DecodePool(config.encoding, config.decode, 1)
    num_clips = 0
    try:
        for spec in plan_shards(config.source, store):
            for clip in pool.decode(iterate_videos(spec, store, config.encoding, config.decode)):
                assert isinstance(clip, Clip)
                num_clips += 1
                (wanted,) = tower.embed([clip.frames[0].copy()])
                found = images.image(spec.shard_id, clip.key, clip.clip_index)
                np.testing.assert_array_equal(found, wanted)
    finally:
        pool.close()
    assert num_clips == len(list(_rows(output)))


def test_a_dry_run_foresees_how_many_texts_are_embedded_and_their_bytes_and_counts_their_time(
    encoded: tuple[Path, Outcome], flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, _ = encoded
    rows = list(_rows(output))
    texts = ColumnSet.open(open_store(str(output)), "text", FileCache(tmp_path / "cache", 1 << 30))
    captions = {(shard_id, row.columns["caption"]) for shard_id, row in rows}
    num_bytes = (
        sum(texts.caption(*name).nbytes for name in captions) + len(rows) * encoders.VISION["projection_dim"] * 2
    )
    dry = [*flags, "--output", str(tmp_path / "latents"), "--dry-run", "--dry-run-seconds", "200"]
    assert encode([*dry, "--progress", "plain"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out.splitlines()[-1])["estimate"]
    assert (found["num_texts"], found["num_bytes_embeddings"]) == (len(captions), num_bytes)
    assert found["embed_s"] > 0
    assert found["duration_s"] >= found["start_s"] + found["encode_s"] + found["embed_s"] - 0.2
    assert "of embeddings" in said.err
    assert "neither" not in said.err


def test_the_same_command_again_changes_nothing_and_other_encoders_are_refused(
    encoded: tuple[Path, Outcome], flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is left to do, so that no Ray is started."""
    output, _ = encoded
    before = tree_of(output)

    def run(*more: str) -> tuple[int, dict[str, Any]]:
        code = encode([*more, "--output", str(output), "--progress", "plain"])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    assert run(*flags)[0] == 0
    code, result = run(*flags, "--text-encoder", str(encoders.t5(tmp_path / "t5")))
    assert (code, list(result["differences"])) == (3, ["text.weights_sha256"])
    code, result = run(*flags[:-4])
    assert (code, result["differences"]) == (3, {"column_sets": [["image", "text"], []]})
    assert "encode_text.py" in result["message"]
    assert tree_of(output) == before


def test_the_set_that_is_added_later_has_the_bytes_of_the_one_of_the_same_pass(
    encoded: tuple[Path, Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, _ = encoded
    later = tmp_path / "latents"
    shutil.copytree(output, later, ignore=shutil.ignore_patterns("text"))
    assert encode_text(["--latents", str(later), "--text-encoder", str(encoders.minilm()), "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["num_records_done"] == 2
    assert data_digests(str(later / "columns" / "text")) == data_digests(str(output / "columns" / "text"))
    assert latentmill(["verify", str(later)]) == 0


@pytest.mark.slow
def test_a_job_that_adds_a_set_and_is_killed_goes_on_to_the_same_bytes(
    encoded: tuple[Path, Outcome], tmp_path: Path
) -> None:
    output, _ = encoded
    later = tmp_path / "latents"
    shutil.copytree(output, later, ignore=shutil.ignore_patterns("text"))
    flags = ["--latents", str(later), "--text-encoder", str(encoders.minilm()), "--device", "cpu"]
    script = (str(ROOT / "jobs" / "encode_text.py"),)
    with RunningJob(flags, {}, script=script) as job:
        job.wait_until(lambda: (later / "columns" / "text" / "data").exists(), "the first file of the set")
        job.process.send_signal(signal.SIGKILL)
    with RunningJob(flags, {}, script=script) as job:
        outcome = job.end()
    assert outcome.code == 0, outcome.said
    assert data_digests(str(later / "columns" / "text")) == data_digests(str(output / "columns" / "text"))


@pytest.mark.slow
def test_damaged_embeddings_come_back_by_order_when_the_job_runs_again(
    encoded: tuple[Path, Outcome], flags: list[str], ray_home: Mapping[str, str], tmp_path: Path
) -> None:
    output, _ = encoded
    copy = tmp_path / "latents"
    shutil.copytree(output, copy)
    whole = data_digests(str(copy / "columns" / "image"))
    damaged = copy / "columns" / "image" / next(iter(whole))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert latentmill(["verify", str(copy), "--requeue"]) == 1
    again = _run([*flags, "--output", str(copy)], ray_home, tmp_path)
    assert (again.code, again.result["num_records_repaired"]) == (0, 1), again.said
    assert data_digests(str(copy / "columns" / "image")) == whole
    assert latentmill(["verify", str(copy)]) == 0
