"""The command `latentmill`, on committed outputs made without an encoder."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import latents
import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.commit import open_dataset, publish_snapshot, read_manifest
from pipeline.errors import StorageUnavailableError
from pipeline.records import Bucket
from pipeline.storage import open_store
from pipeline.store import LocalStore

VIDEO = Bucket(width_px=32, height_px=24, num_frames=9)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Two shards in both formats, three records and one rejection, and a snapshot."""
    store = latents.output(
        tmp_path / "out", [[latents.record("a", 0, VIDEO), latents.record("b", 0, VIDEO)]], output_format="both"
    )
    manifest = read_manifest(store)
    assert manifest is not None
    latents.commit_records(
        store, manifest, "s001", [latents.record("c", 0, VIDEO)], [latents.rejection("d")], output_format="both"
    )
    publish_snapshot(store)
    return tmp_path / "out"


def test_inspect_says_what_an_output_holds(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["shards"], found["snapshot"]) == (2, 1)
    assert (found["counts"]["num_records"], found["counts"]["num_videos_rejected"]) == (3, 1)
    assert sum(found["rejections"].values()) == 1
    assert (found["files"]["parquet files"], found["files"]["rejected files"]) == (2, 1)
    assert main(["inspect", str(output)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^  num_records +3$", text, re.MULTILINE)
    assert re.search(r"^BUCKETS\n  32x24x9 +3$", text, re.MULTILINE)
    assert found["fingerprint"] in text


def test_urls_lists_the_committed_files_of_one_format(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, ending in (([], ".parquet"), (["--format", "webdataset"], ".tar")):
        assert main(["urls", str(output), *flags]) == 0
        urls = capsys.readouterr().out.split()
        assert len(urls) == 2
        assert all(url.endswith(ending) and Path(url).is_file() for url in urls)


@pytest.mark.parametrize("flags", [["--model", "none"], []], ids=["not asked for", "not at hand"])
def test_preview_draws_latents_without_a_model(
    flags: list[str], output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "preview.png"
    assert main(["preview", str(output), "-o", str(picture), *flags, "--num-clips", "2"]) == 0
    assert ("not at hand" in capsys.readouterr().err) == (not flags)
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.height > 2 * 96


def test_a_model_that_did_not_make_the_latents_is_refused(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preview", str(output), "-o", str(tmp_path / "a.png"), "--model", "small"]) == 2
    assert "the latents come from" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("command", [["inspect"], ["urls"], ["preview", "-o", "x.png"]])
def test_a_folder_that_is_no_output_is_named(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command[0], str(tmp_path), *command[1:]]) == 2
    assert f"{tmp_path} is no output of Latentmill" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "verify", "gc", "urls"])
def test_a_store_that_does_not_answer_is_no_wrong_use(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def silent(*_: object) -> None:
        raise StorageUnavailableError("s3://bucket/out did not answer")

    monkeypatch.setattr(LocalStore, "find", silent)
    assert main([command, "/out"]) == 4
    assert "did not answer" in capsys.readouterr().err


def test_a_damaged_description_is_damage(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (output / "_dataset.json").write_text("{")
    assert main(["inspect", str(output)]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_what_stands_in_an_output_forges_no_line_and_reaches_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forged = "x\r\nall is well\x1b[2J\u202e"
    store = open_store(str(tmp_path / "out"))
    model = replace(latents.MODEL, model=forged)
    manifest = open_dataset(store, replace(latents.manifest(), model=model, fingerprint_fields={"fps": forged}))
    latents.commit_records(store, manifest, "s000", [latents.record("a", 0, VIDEO)])
    (tmp_path / "out" / "data" / f"{forged}.tar").write_text("")
    commands = (["inspect"], ["urls"], ["verify"], ["gc", "--all"])
    assert [main([command, str(tmp_path / "out"), *flags]) for command, *flags in commands] == [0, 0, 0, 0]
    assert main(["inspect", f"/no/{forged}"]) == 2
    said = "".join(capsys.readouterr())
    assert "x\\r\\nall is well\\x1b[2J\\u202e" in said
    assert "\nall is well\x1b" not in said
    assert not set("\x1b\r\u202e") & set(said)
