"""The training media come out of pinned archives, with their sources beside them, or it is said what is missing."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import av
import media
import numpy as np
import pytest
import yaml
from PIL import Image

from jobs.collect_training_media import SOURCES, main, read_table


def _picture(side_px: int, kind: str) -> bytes:
    pixels = np.random.default_rng(side_px).integers(0, 255, (side_px // 8, side_px // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((side_px, side_px)).save(buffer, kind)
    return buffer.getvalue()


def _zip(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, content in members.items():
            zipped.writestr(name.replace("__", "/").replace("_DOT_", "."), content)
    return buffer.getvalue()


class _Registry:
    """A folder of archives, the table that names them, and the folders that a run writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[dict[str, Any]] = []
        self.train, self.held_out = folder / "train", folder / "held_out"

    def add(self, archive: str, content: bytes, *media: dict[str, Any]) -> None:
        path = self.folder / archive
        path.write_bytes(content)
        self.entries.append(
            {
                "package": path.as_uri(),
                "client": "url",
                "archive": archive,
                "sha256": hashlib.sha256(content).hexdigest(),
                "licence": "MIT",
                "media": list(media),
            }
        )

    def collect(self, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
        table = self.folder / "table.yaml"
        table.write_text(yaml.safe_dump(self.entries), encoding="utf-8")
        flags = ["--output", str(self.train), "--held-out", str(self.held_out), "--sources", str(table)]
        code = main([*flags, "--moving-stills", "0", *more])
        result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["exit_code"] == code
        return result


@pytest.fixture(scope="module")
def video() -> bytes:
    return media.moving_pattern("96x64", "10", 2)


@pytest.fixture
def registry(tmp_path: Path, video: bytes) -> _Registry:
    made = _Registry(tmp_path)
    inner = _zip(film_DOT_mp4=video)
    content = _zip(
        a__film_DOT_mp4=video, a__b_DOT_png=_picture(64, "PNG"), big_DOT_jpg=_picture(800, "JPEG"), in_DOT_zip=inner
    )
    made.add(
        "first.whl",
        content,
        {"members": ["a/film.mp4"], "runs": [[2, 5], [9, 6]], "short_side_px": 32, "author": "A. Person"},
        {"members": ["a/b.png", "big.jpg"], "licence": "CC0-1.0"},
        {"members": ["in.zip!film.mp4"], "name": "judged", "held_out": True},
    )
    return made


def _rows(folder: Path) -> dict[str, dict[str, Any]]:
    rows = json.loads((folder / "SOURCES.json").read_text(encoding="utf-8"))
    return {row["file"]: row for row in rows}


def _frames(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def _times_s(path: Path) -> list[float | None]:
    with av.open(str(path)) as container:
        return [frame.time for frame in container.decode(video=0)]


def test_a_table_becomes_two_folders_that_name_the_source_of_every_file(
    registry: _Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    result = registry.collect(capsys)
    assert result["exit_code"] == 0
    assert (result["num_train_files"], result["num_held_out_files"], result["train_video_s"]) == (4, 1, 1.1)
    for folder in (registry.train, registry.held_out):
        assert set(_rows(folder)) == {path.name for path in folder.iterdir()} - {"SOURCES.json"}
    rows = _rows(registry.train)
    assert rows["film_00002.mp4"]["author"] == "A. Person"
    assert rows["film_00002.mp4"]["licence"] == "that of the package: MIT"
    assert rows["b.png"]["licence"] == "CC0-1.0"
    assert set(_rows(registry.held_out)) == {"judged.mp4"}
    assert not list(registry.folder.glob("*.partial"))


def test_a_run_holds_exactly_the_frames_that_the_table_names(
    registry: _Registry, video: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.collect(capsys)
    (registry.folder / "whole.mp4").write_bytes(video)
    whole = _frames(registry.folder / "whole.mp4")
    for name, start, num_frames in (("film_00002.mp4", 2, 5), ("film_00009.mp4", 9, 6)):
        piece = _frames(registry.train / name)
        assert len(piece) == num_frames
        fps = _rows(registry.train)[name]["fps"]
        assert _times_s(registry.train / name) == pytest.approx([index / fps for index in range(num_frames)], abs=1e-3)
        for offset, frame in enumerate(piece):
            small = [
                np.asarray(Image.fromarray(one).resize((48, 32), Image.Resampling.BOX), dtype=float) for one in whole
            ]
            distances = [np.abs(one - frame).mean() for one in small]
            assert np.argmin(distances) == start + offset


def test_a_large_still_is_scaled_and_a_small_one_stays_as_it_is(
    registry: _Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.collect(capsys)
    assert (registry.train / "b.png").read_bytes() == _picture(64, "PNG")
    with Image.open(registry.train / "big.jpg") as picture:
        assert picture.size == (720, 720)
    assert _rows(registry.train)["big.jpg"]["changes"] == "scaled to 720x720, encoded again"


def test_the_same_seed_sets_stills_in_motion_in_the_same_way_and_another_one_does_not(
    registry: _Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []
    for seed in ("1", "1", "2"):
        result = registry.collect(capsys, "--moving-stills", "2", "--seed", seed)
        assert result["train_moving_still_s"] == 2.8
        made.append([(registry.train / f"moving_000{number}.mp4").read_bytes() for number in range(2)])
    assert made[0] == made[1]
    assert made[0] != made[2]
    frames = _frames(registry.train / "moving_0001.mp4")
    assert len(frames) == _rows(registry.train)["moving_0001.mp4"]["num_frames"]
    assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 1


def test_a_damaged_archive_is_named_with_both_hashes_and_nothing_of_it_is_used(
    registry: _Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.add("second.zip", _zip(c_DOT_png=_picture(64, "PNG")), {"members": ["c.png"]})
    with (registry.folder / "second.zip").open("ab") as file:
        file.write(b"damage")
    result = registry.collect(capsys)
    assert result["exit_code"] == 4
    assert result["num_train_files"] == 4
    (failure,) = result["failures"]
    assert registry.entries[1]["sha256"] in failure
    assert hashlib.sha256((registry.folder / "second.zip").read_bytes()).hexdigest() in failure
    assert not (registry.folder / "train-downloads" / "second.zip").exists()


@pytest.mark.parametrize("client", ["url", "npm"])
def test_a_package_that_is_gone_is_reported_and_the_rest_goes_on(
    registry: _Registry, capsys: pytest.CaptureFixture[str], client: str
) -> None:
    registry.add("gone.tgz", b"", {"members": ["d.png"]})
    (registry.folder / "gone.tgz").unlink()
    registry.entries.reverse()
    # A folder that is not there: the clients fail on it without asking any registry.
    registry.entries[0] |= {"client": client, "package": f"file://{registry.folder}/no/such/folder"}
    result = registry.collect(capsys)
    assert result["exit_code"] == 4
    assert result["num_train_files"] == 4
    (failure,) = result["failures"]
    assert "no/such/folder" in failure
    assert "gone.tgz" in failure


def test_kept_archives_need_no_registry_and_a_spoiled_one_is_fetched_again(
    registry: _Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.collect(capsys)
    original = registry.folder / "first.whl"
    kept = registry.folder / "train-downloads" / "first.whl"
    kept.write_bytes(b"spoiled")
    assert registry.collect(capsys)["exit_code"] == 0
    assert kept.read_bytes() == original.read_bytes()
    original.unlink()
    assert registry.collect(capsys)["exit_code"] == 0


def test_a_tar_archive_is_read_like_a_zip(registry: _Registry, capsys: pytest.CaptureFixture[str]) -> None:
    buffer = io.BytesIO()
    content = _picture(64, "PNG")
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        member = tarfile.TarInfo("package/e.png")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    registry.add("third.tgz", buffer.getvalue(), {"members": ["package/e.png"]})
    registry.collect(capsys)
    assert (registry.train / "e.png").read_bytes() == content


def test_a_folder_with_other_files_is_never_replaced(registry: _Registry, capsys: pytest.CaptureFixture[str]) -> None:
    registry.held_out.mkdir()
    (registry.held_out / "precious.txt").write_text("mine", encoding="utf-8")
    result = registry.collect(capsys)
    assert result["exit_code"] == 2
    assert "SOURCES.json" in result["message"]
    assert (registry.held_out / "precious.txt").read_text(encoding="utf-8") == "mine"
    assert not registry.train.exists()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"members": ["a/film.mp4"], "held_out": True}, "both to train on and to judge on"),
        ({"members": ["big.jpg"], "hold_out": True}, "hold_out"),
        ({"members": ["not/there.png"]}, "not/there.png"),
        ({"members": ["a/film.mp4"], "name": "long", "runs": [[15, 50]]}, "mend the table"),
        ({"members": ["a/b.png"]}, "would be written twice"),
    ],
)
def test_a_table_that_cannot_be_is_refused_and_nothing_is_written(
    registry: _Registry, capsys: pytest.CaptureFixture[str], entry: dict[str, Any], said: str
) -> None:
    registry.entries[0]["media"].append(entry)
    result = registry.collect(capsys)
    assert result["exit_code"] == 2
    assert said in result["message"]
    assert not registry.train.exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--held-out", "{train}"], "the same folder"),
        (["--held-out", "{train}/judged"], "one lies in the other"),
        (["--moving-stills", "-1"], "-1 is negative"),
    ],
)
def test_folders_and_numbers_that_cannot_be_are_refused_before_anything_is_fetched(
    registry: _Registry, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    result = registry.collect(capsys, *(flag.format(train=registry.train) for flag in flags))
    assert result["exit_code"] == 2
    assert said in result["message"]
    assert not registry.train.exists()


def test_the_shipped_table_pins_every_archive_and_takes_nothing_copyleft() -> None:
    packages = read_table(SOURCES)
    assert len({one.sha256 for one in packages}) == len(packages) > 10
    for package in packages:
        assert len(package.sha256) == 64
        assert package.package.count("=") + package.package.count("@") >= 1, "no version"
        for one in package.media:
            licence = one.licence or package.licence
            assert licence.startswith(("MIT", "BSD", "Apache", "CC0", "CC-BY-2", "CC-BY-3", "CC-BY-4", "Pexels"))
    assert sum(one.held_out for package in packages for one in package.media) >= 3
