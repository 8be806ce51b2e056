"""Training clips: what is drawn, from what, in which order, and that a cursor goes on exactly."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import CLIP_STILLS, CLIP_VIDEOS, pack_clips

from pipeline.config import DecodeLimits
from pipeline.errors import UsageError
from pipeline.training_clips import (
    ClipsConfig,
    ClipSetting,
    TrainingBatch,
    TrainingClips,
    parse_downscale,
    random_crop,
    source_buckets,
)

VIDEO = ClipSetting.from_yaml({"size": "48x32", "frames": 9, "batch": 2})
IMAGE = ClipSetting.from_yaml({"kind": "image", "size": 32, "batch": 3})
# So little that the clips of two or three videos are one load.
STREAMED = {"cache_gb": 0.004, "crops_per_clip": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos and one picture."""
    folder = tmp_path_factory.mktemp("media")
    for path in (*CLIP_VIDEOS[:4], CLIP_STILLS[0]):
        shutil.copy(path, folder / path.name)
    return folder


@contextmanager
def opened(folder: Path | str, settings: Sequence[ClipSetting], **options: Any) -> Iterator[TrainingClips]:
    own = {name: options.pop(name) for name in ("rank", "world_size", "cursor", "num_ahead") if name in options}
    config = ClipsConfig(**{"input": str(folder), "source_px": 64, "source_frames": 17, **options})
    clips = TrainingClips(config, DecodeLimits(), [(1, settings)], seed=3, **own)
    try:
        yield clips
    finally:
        clips.close()


def drawn(clips: TrainingClips, number: int) -> list[TrainingBatch]:
    return [next(clips) for _ in range(number)]


def same(ours: Sequence[TrainingBatch], theirs: Sequence[TrainingBatch]) -> bool:
    return all(
        a.setting == b.setting and a.cursor == b.cursor and torch.equal(a.clips, b.clips)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_batches_have_the_shapes_and_shares_of_their_settings(folder: Path) -> None:
    rare = ClipSetting.from_yaml({"kind": "image", "size": 32, "batch": 3, "share": 0.25})
    with opened(folder, [VIDEO, rare]) as clips:
        batches = drawn(clips, 100)
        assert clips.num_cached > 5
    for batch in batches:
        B, T = batch.setting.batch_size, batch.setting.num_frames
        assert batch.clips.shape == (B, 3, T, batch.setting.height_px, batch.setting.width_px)
        assert batch.clips.dtype == torch.uint8
    assert 8 <= sum(batch.setting == rare for batch in batches) <= 35
    assert [batch.step for batch in batches] == list(range(100))


@pytest.mark.parametrize("options", [{}, STREAMED], ids=["decoded once", "streamed"])
def test_the_same_seed_draws_the_same_and_a_cursor_goes_on_exactly(folder: Path, options: dict[str, Any]) -> None:
    with opened(folder, [VIDEO, IMAGE], **options) as clips:
        batches = drawn(clips, 24)
    places = {json.dumps(batch.cursor["inputs"][0]["place"]) for batch in batches}
    assert len(places) > 3 if options else len(places) == 1
    with opened(folder, [VIDEO, IMAGE], num_ahead=2, **options) as clips:
        assert same(drawn(clips, 24), batches)
    for after in (5, 17):
        cursor = json.loads(json.dumps(batches[after].cursor))
        with opened(folder, [VIDEO, IMAGE], cursor=cursor, **options) as clips:
            assert same(drawn(clips, 24 - after - 1), batches[after + 1 :])


def test_streaming_shows_every_clip_once_an_epoch(folder: Path) -> None:
    frame = ClipSetting.from_yaml({"size": 64, "frames": 17})
    plain = {"flip": False, "max_stride": 1, "downscale": (1.0, 1.0), "source_px": 64}
    with opened(folder, [frame], cache_gb=1.0, **plain) as clips:
        num_clips = clips.num_cached
    with opened(folder, [frame], **STREAMED, **plain) as clips:
        epochs = [batch.cursor["inputs"][0]["place"]["epoch"] for batch in drawn(clips, 3 * num_clips)]
    # As many crops as clips are drawn from each load, and the picture is one of the clips.
    assert [epochs.count(epoch) for epoch in (0, 1)] == [num_clips, num_clips]


def test_ranks_see_other_videos_and_the_same_settings(tmp_path: Path) -> None:
    pack_clips(tmp_path / "tars", 2, CLIP_VIDEOS[:4])
    seen: list[list[TrainingBatch]] = []
    for rank in range(2):
        with opened(tmp_path / "tars", [VIDEO, IMAGE], rank=rank, world_size=2) as clips:
            seen.append(drawn(clips, 12))
            # Each of the two shards has two videos of about 60 frames.
            assert 4 <= clips.num_cached <= 8
    assert [batch.setting for batch in seen[0]] == [batch.setting for batch in seen[1]]
    assert not any(torch.equal(a.clips, b.clips) for a, b in zip(*seen, strict=True))


def test_fewer_shards_than_ranks_are_dealt_by_videos(folder: Path) -> None:
    counts = []
    for rank in range(2):
        with opened(folder, [VIDEO], rank=rank, world_size=2) as clips:
            counts.append(clips.num_cached)
    with opened(folder, [VIDEO]) as clips:
        assert sum(counts) == clips.num_cached
    assert all(counts)


def test_a_broken_video_is_counted_and_its_neighbours_are_drawn_from(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "in")
    whole = (tmp_path / "in" / CLIP_VIDEOS[0].name).read_bytes()
    (tmp_path / "in" / "a_broken.mp4").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "in" / "b_empty.mp4").write_bytes(b"")
    with opened(tmp_path / "in", [VIDEO, IMAGE]) as clips:
        drawn(clips, 3)
        assert clips.num_rejected == {"frames_missing": 3, "empty_file": 1}


def test_nothing_usable_is_said_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(UsageError, match="unreadable"), opened(tmp_path, [VIDEO]):
        pass


def test_pictures_alone_cannot_be_clips(tmp_path: Path) -> None:
    shutil.copy(CLIP_STILLS[0], tmp_path)
    with opened(tmp_path, [IMAGE, VIDEO]) as clips, pytest.raises(UsageError, match="long and large enough"):
        drawn(clips, 20)


def test_images_are_frames_of_videos_where_there_are_no_pictures(tmp_path: Path) -> None:
    shutil.copy(CLIP_VIDEOS[0], tmp_path)
    with opened(tmp_path, [IMAGE]) as clips:
        assert next(clips).clips.shape == (3, 3, 1, 32, 32)


def test_images_come_from_the_pictures_of_any_input_where_there_are_some(tmp_path: Path) -> None:
    for name, path in (("videos", CLIP_VIDEOS[0]), ("pictures", CLIP_STILLS[0])):
        (tmp_path / name).mkdir()
        shutil.copy(path, tmp_path / name)
    with opened(f"{tmp_path}/videos,{tmp_path}/pictures", [IMAGE]) as clips:
        cursor = drawn(clips, 4)[-1].cursor
    assert [entry["num_draws"] for entry in cursor["inputs"]] == [0, 12]


def test_weights_say_how_often_an_input_is_drawn_from(tmp_path: Path) -> None:
    for name, path in zip("ab", CLIP_VIDEOS, strict=False):
        (tmp_path / name).mkdir()
        shutil.copy(path, tmp_path / name)
    with opened(f"{tmp_path}/a,{tmp_path}/b", [VIDEO], input_weights=(9.0, 1.0)) as clips:
        first, second = (entry["num_draws"] for entry in drawn(clips, 50)[-1].cursor["inputs"])
    assert first + second == 100
    assert 80 <= first <= 97
    with pytest.raises(UsageError, match="input-weights"), opened(tmp_path / "a", [VIDEO], input_weights=(1.0, 2.0)):
        pass


def test_a_cursor_of_other_inputs_starts_them_anew(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(folder, [VIDEO], **STREAMED) as clips:
        cursor = drawn(clips, 9)[-1].cursor
    shutil.copy(CLIP_VIDEOS[0], tmp_path)
    with opened(tmp_path, [VIDEO], cursor=cursor) as clips:
        assert next(clips).step == 9
    assert "from its beginning" in caplog.text
    with pytest.raises(UsageError, match="--input"), opened(f"{tmp_path},{folder}", [VIDEO], cursor=cursor):
        pass


def test_settings_follow_the_stages_and_the_last_ones_stay(folder: Path) -> None:
    config = ClipsConfig(input=str(folder), source_px=64, source_frames=17)
    clips = TrainingClips(config, DecodeLimits(), [(2, [IMAGE]), (1, [VIDEO])], seed=0)
    try:
        assert [batch.setting for batch in drawn(clips, 5)] == [IMAGE, IMAGE, VIDEO, VIDEO, VIDEO]
    finally:
        clips.close()


def test_a_crop_is_a_part_of_the_source_at_a_stride_and_mirrored_half_of_the_time() -> None:
    numbers = np.arange(17 * 40 * 60, dtype=np.uint32).reshape(17, 40, 60)
    frames = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], axis=-1).astype(np.uint8)
    config = ClipsConfig(input="-", downscale=(1.0, 1.0), max_stride=3)
    rng = np.random.default_rng(0)
    strides, mirrored = set(), 0
    for _ in range(200):
        crop = random_crop(frames, VIDEO, config, rng).numpy().astype(np.int64)
        where = crop[0] + 256 * crop[1] + 65536 * crop[2]
        t, y, x = where // 2400, where // 60 % 40, where % 60
        (stride,) = set(np.diff(t, axis=0).reshape(-1))
        (step,) = set(np.diff(x, axis=2).reshape(-1))
        assert set(np.diff(y, axis=1).reshape(-1)) == {1}
        strides.add(int(stride))
        mirrored += step == -1
    # 17 frames allow 9 of them at a stride of 2 at most.
    assert strides == {1, 2}
    assert 60 < mirrored < 140


def test_a_crop_is_never_enlarged_where_the_source_is_large_enough() -> None:
    frames = np.zeros((9, 40, 60, 3), dtype=np.uint8)
    frames[:, ::2] = 255
    config = ClipsConfig(input="-", downscale=(1.25, 1.25))
    crop = random_crop(frames, VIDEO, config, np.random.default_rng(0))
    assert crop.shape == (3, 9, 32, 48)
    # Shrunk by 1.25, lines of one pixel lose contrast; enlarged, or copied, they would not.
    assert float(crop.float().std()) < 110
    untouched = random_crop(frames, VIDEO, ClipsConfig(input="-", downscale=(1.0, 1.0)), np.random.default_rng(0))
    assert set(untouched.unique().tolist()) == {0, 255}


def test_source_shapes_cover_the_largest_crop_at_the_largest_scale_and_the_shortest_video() -> None:
    buckets = source_buckets(ClipsConfig(input="-", max_stride=2, downscale=(1.0, 2.0)), [VIDEO, IMAGE])
    assert {min(b.width_px, b.height_px) for b in buckets if b.media_kind == "video"} == {48, 96}
    assert {min(b.width_px, b.height_px) for b in buckets if b.media_kind == "image"} == {32, 64}
    assert {b.num_frames for b in buckets} == {1, 9, 17}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"size": 30}, "multiples of 8"),
        ({"size": 32, "frames": 8}, "5, 9, 13"),
        ({"kind": "image", "size": 32, "frames": 5}, "1 for an image"),
        ({"kind": "gif"}, "video or image"),
        ({"size": 32, "colour": 1}, "colour"),
        ({"size": 32, "batch": 0}, "batch"),
        (17, "mapping"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(given: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ClipSetting.from_yaml(given)


def test_downscale_is_a_number_or_a_range() -> None:
    assert parse_downscale("1.5") == (1.5, 1.5)
    assert parse_downscale("1,2") == (1.0, 2.0)
    for wrong in ("2,1", "x", "0", str(math.inf)):
        with pytest.raises(UsageError, match="downscale"):
            parse_downscale(wrong)
