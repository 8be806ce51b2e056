"""The same command night after night: runs that overlap, inputs that grow and change, repairs and retries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from builders import CLIP_STILLS
from integration.jobs_under_test import RunningJob, commits_of, run_job, tree_of

from pipeline import LatentDataset
from pipeline.cli import main


def _put(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        still = CLIP_STILLS[number % len(CLIP_STILLS)]
        shutil.copyfile(still, folder / f"{name}.jpg")
        shutil.copyfile(still.with_suffix(".txt"), folder / f"{name}.txt")


@pytest.mark.slow
def test_two_nights_at_once_then_repairs_and_retries(
    ray_home: Mapping[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs, output = tmp_path / "in", tmp_path / "out"
    _put(inputs, *"abcdef")
    (inputs / "b.jpg").write_bytes(b"")
    flags = ["--input", str(inputs), "--output", str(output), "--model", "small", "--buckets", "64x64x1"]
    flags += ["--samples-per-shard", "1", "--num-actors", "1", "--max-rejected-share", "1"]
    with RunningJob(flags, ray_home) as last_night:
        last_night.wait_until(lambda: bool(list(output.glob("commits/*/*.json"))), "the first commit was there")
        _put(inputs, "g", "h")
        tonight = run_job(flags, ray_home)
        first = last_night.end()
    assert (first.code, tonight.code) == (0, 0), first.said + tonight.said
    assert (first.result["num_shards"], tonight.result["num_shards"]) == (6, 8)
    assert first.result["num_shards_undone"] == tonight.result["num_shards_undone"] == 0
    assert (tonight.result["num_videos_ok"], tonight.result["reasons"]) == (7, {"empty_file": 1})
    assert main(["verify", str(output), "--inputs"]) == 0

    # What one night's operators do: mend a file, replace another one, lose a data file.
    _put(inputs, "b")
    _put(inputs, "x", "c")
    (inputs / "x.jpg").unlink()
    (inputs / "x.txt").unlink()
    before = tree_of(output)
    commits = commits_of(str(output))
    damaged = next(commit for shard_id, commit in sorted(commits.items()) if "-00004-" in shard_id)
    (output / damaged.files[0].key).unlink()
    assert main(["verify", str(output), "--quick", "--requeue"]) == 1
    capsys.readouterr()

    third = run_job([*flags, "--retry-failed", "empty_file,timeout"], ray_home)
    assert third.code == 0, third.said
    result = third.result
    assert (result["num_shards"], result["num_shards_done"], result["num_shards_done_before"]) == (8, 0, 8)
    assert (result["num_shards_retried"], result["num_videos_retried"], result["num_videos_recovered"]) == (1, 1, 1)
    # The mended file too has changed since it was encoded, as a rejection.
    assert (result["num_records_repaired"], result["num_inputs_changed"]) == (1, 2)
    assert list(result["inputs_changed"]) == [str(inputs / "b.jpg"), str(inputs / "c.jpg")]
    assert (result["num_videos_ok"], result["num_videos_rejected"]) == (8, 0)
    assert f"keeps what it has of {inputs / 'c.jpg'}" in third.said
    after = tree_of(output)
    assert {path: size for path, (size, _) in before.items()}.items() <= {
        p: size for p, (size, _) in after.items()
    }.items()

    assert main(["verify", str(output), "--inputs", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(finding["kind"], finding["where"]) for finding in found["findings"]] == [
        ("changed", str(inputs / "c.jpg"))
    ]
    keys = [key for batch in LatentDataset(str(output), batch_size=3) for key in batch["key"]]
    assert sorted(keys) == list("abcdefgh")

    again = run_job([*flags, "--retry-failed", "empty_file,timeout"], ray_home)
    assert (again.code, again.result["num_videos_retried"], again.result["num_inputs_changed"]) == (0, 0, 1)
    assert {path: size for path, (size, _) in tree_of(output).items()} == {p: size for p, (size, _) in after.items()}
