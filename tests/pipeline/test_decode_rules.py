"""Which bucket, which frames and which part of the picture: pure numbers, no decoder."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import parse_buckets
from pipeline.cutting import Timeline, choose_bucket, clip_spans, cover
from pipeline.errors import RejectionError
from pipeline.records import Bucket


def timeline(times_s: list[float], end_s: float, tick_s: float = 1e-5) -> Timeline:
    return Timeline(
        times_s=np.array(times_s), end_s=end_s, promised_end_s=end_s, num_promised=len(times_s), tick_s=tick_s
    )


def chosen(buckets: str, width: int, height: int, num_instants: int, upscale: bool = False, kind: str = "video") -> str:
    return str(choose_bucket(parse_buckets(buckets), kind, width, height, num_instants, upscale))  # type: ignore[arg-type]


def test_the_nearest_aspect_ratio_wins_over_length() -> None:
    assert chosen("256x256x33;320x192x17", 1280, 720, 100) == "320x192x17"
    assert chosen("256x256x17;192x320x17", 720, 1280, 100) == "192x320x17"


def test_of_equal_aspects_the_longest_that_is_filled_wins() -> None:
    assert chosen("256x256x17;256x256x33;256x256x49", 300, 300, 40) == "256x256x33"


def test_a_picture_too_small_for_one_bucket_takes_the_next_of_its_aspect() -> None:
    assert chosen("512x512x17;256x256x17", 300, 300, 40) == "256x256x17"
    assert chosen("512x512x17;256x256x17", 600, 600, 40) == "512x512x17"


def test_upscaling_takes_the_bucket_that_enlarges_least() -> None:
    assert chosen("512x512x17;256x256x17", 100, 100, 40, upscale=True) == "256x256x17"


@pytest.mark.parametrize(
    ("buckets", "width", "height", "num_instants", "kind", "reason"),
    [
        ("256x256x17", 255, 400, 100, "video", "too_small"),
        ("256x256x17", 256, 256, 16, "video", "too_short"),
        ("256x256x1", 256, 256, 100, "video", "no_bucket"),
        ("512x512x1", 500, 600, 1, "image", "too_small"),
    ],
)
def test_what_fits_no_bucket_is_rejected_by_name(
    buckets: str, width: int, height: int, num_instants: int, kind: str, reason: str
) -> None:
    with pytest.raises(RejectionError) as caught:
        chosen(buckets, width, height, num_instants, kind=kind)
    assert caught.value.reason == reason


def test_images_take_buckets_of_one_frame_and_videos_never_do() -> None:
    assert chosen("256x256x17;256x256x1", 300, 300, 1, kind="image") == "256x256x1"
    assert chosen("256x256x17;256x256x1", 300, 300, 17) == "256x256x17"


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    bucket_width=st.integers(1, 64),
    bucket_height=st.integers(1, 64),
)
def test_the_resized_picture_covers_the_bucket_and_the_crop_lies_in_the_source(
    width: int, height: int, bucket_width: int, bucket_height: int
) -> None:
    bucket = Bucket(width_px=8 * bucket_width, height_px=8 * bucket_height, num_frames=17)
    shape = cover(bucket, width, height)
    assert shape.width_px >= bucket.width_px
    assert shape.height_px >= bucket.height_px
    assert shape.width_px == bucket.width_px or shape.height_px == bucket.height_px
    assert 0 <= shape.left_px <= shape.width_px - bucket.width_px
    assert 0 <= shape.top_px <= shape.height_px - bucket.height_px
    x, y, crop_width, crop_height = shape.crop
    assert x >= 0
    assert y >= 0
    assert crop_width >= 1
    assert crop_height >= 1
    assert x + crop_width <= width
    assert y + crop_height <= height
    assert crop_width == width or crop_height == height


@given(
    num_instants=st.integers(0, 3000),
    k=st.integers(0, 20),
    stride=st.none() | st.integers(1, 200),
    count=st.none() | st.integers(1, 50),
)
def test_clips_lie_in_the_video_rise_and_are_as_many_as_asked(
    num_instants: int, k: int, stride: int | None, count: int | None
) -> None:
    num_frames = 1 + 4 * k
    starts = clip_spans(num_instants, num_frames, stride, count)
    everything = clip_spans(num_instants, num_frames, stride)
    assert len(starts) == (len(everything) if count is None else min(count, len(everything)))
    assert (np.diff(starts) > 0).all()
    assert set(starts.tolist()) <= set(everything.tolist())
    assert bool((starts + num_frames <= num_instants).all())
    if count is not None and 2 <= count <= len(everything):
        assert starts[0] == everything[0]
        assert starts[-1] == everything[-1]
        gaps = np.diff(starts)
        assert gaps.max() - gaps.min() <= 2 * (stride or num_frames)


def test_clips_are_back_to_back_unless_a_stride_is_given() -> None:
    assert clip_spans(60, 17).tolist() == [0, 17, 34]
    assert clip_spans(60, 17, clip_stride=20).tolist() == [0, 20, 40]
    assert clip_spans(60, 17, clips_per_video=1).tolist() == [17]
    assert clip_spans(16, 17).tolist() == []


def test_a_frame_is_the_nearest_not_later_than_its_instant() -> None:
    video = timeline([0.0, 0.1, 0.2, 0.9, 1.0], end_s=1.1)
    assert video.num_instants(4.0) == 5
    assert video.frames_at(0, 5, 4.0).tolist() == [0, 2, 2, 2, 4]


def test_a_clock_that_counts_in_milliseconds_does_not_repeat_frames() -> None:
    times_s = [round(number / 30, 3) for number in range(30)]
    video = timeline(times_s, end_s=1.0, tick_s=0.001)
    assert video.num_instants(30.0) == 30
    assert video.frames_at(0, 30, 30.0).tolist() == list(range(30))


@given(
    steps_ms=st.lists(st.integers(1, 400), min_size=1, max_size=60),
    fps=st.floats(0.5, 60, allow_nan=False),
)
def test_no_chosen_frame_is_later_than_its_instant_and_none_nearer_is_passed_over(
    steps_ms: list[int], fps: float
) -> None:
    times_s = np.concatenate([[0], np.cumsum(steps_ms)]) / 1000
    video = timeline(times_s[:-1].tolist(), end_s=float(times_s[-1]))
    num_instants = video.num_instants(fps)
    indices = video.frames_at(0, num_instants, fps)
    instants_s = np.arange(num_instants) / fps
    tolerance_s = 1e-4
    assert (times_s[indices] <= instants_s + tolerance_s).all()
    assert (times_s[indices + 1] > instants_s - tolerance_s).all()


def test_a_span_behind_the_end_of_a_cut_file_is_rejected_and_one_before_it_is_not() -> None:
    cut = Timeline(times_s=np.arange(20) / 10, end_s=2.0, promised_end_s=4.0, num_promised=40, tick_s=1e-5)
    assert cut.num_instants(10.0) == cut.num_instants(None) == 40
    assert cut.frames_at(0, 17, 10.0).tolist() == cut.frames_at(0, 17, None).tolist() == list(range(17))
    for fps in (10.0, None):
        with pytest.raises(RejectionError, match="promises 40 frames") as caught:
            cut.frames_at(17, 17, fps)
        assert caught.value.reason == "frames_missing"
