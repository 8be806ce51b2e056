"""Real files through real decode children: what comes out, what is rejected, and what a child survives or cannot do."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
from builders import CLIP_STILLS, CLIP_VIDEOS, CLIPS
from media import audio_only, ffmpeg, moving_pattern, one_hour_of_16_px, two_frames
from PIL import Image

from pipeline import frames
from pipeline.config import DecodeLimits, EncodingConfig, parse_buckets
from pipeline.decode import _START, DecodePool, decoder_versions
from pipeline.errors import DecodeChildError
from pipeline.records import Clip, ClipFailure, SourceVideo
from pipeline.sandbox import is_tight

WAVES = CLIPS / "city_waves.mp4"
Result = Clip | ClipFailure


def encoding(buckets: str = "128x96x9", fps: float | None = 8.0, **more: Any) -> EncodingConfig:
    return EncodingConfig(model="small", buckets=parse_buckets(buckets), fps=fps, **more)


def video(content: bytes | Path, key: str = "key", kind: str = "video") -> SourceVideo:
    """A file as `source` hands it over: an open descriptor of a file that may have no name any more."""
    data = content.read_bytes() if isinstance(content, Path) else content
    fd = os.memfd_create("media", os.MFD_CLOEXEC)
    os.write(fd, data)
    return SourceVideo(
        key=key,
        media_fd=fd,
        num_bytes=len(data),
        extension="mp4",
        media_kind="image" if kind == "image" else "video",
        caption=f"caption of {key}",
        fields={"license": "CC0"},
        source_uri=f"file:///in/{key}",
    )


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    with_default_limits = DecodePool(encoding(), DecodeLimits(), 2)
    yield with_default_limits
    with_default_limits.close()


def decode(videos: Iterable[SourceVideo | ClipFailure], **more: Any) -> list[Result]:
    limits = {name: more.pop(name) for name in tuple(more) if name in DecodeLimits.__dataclass_fields__}
    num_processes = more.pop("num_processes", 1)
    own_pool = DecodePool(encoding(**more), DecodeLimits(**limits), num_processes)
    try:
        return list(own_pool.decode(videos))
    finally:
        own_pool.close()


def only_clip(results: list[Result]) -> Clip:
    (result,) = results
    assert isinstance(result, Clip), result
    return result


def clips_of(results: list[Result]) -> list[Clip]:
    assert all(isinstance(result, Clip) for result in results), results
    return [result for result in results if isinstance(result, Clip)]


def rejection(results: list[Result]) -> tuple[int | None, str]:
    (result,) = results
    assert isinstance(result, ClipFailure), result
    assert result.step == "decode"
    return result.clip_index, result.reason


def digests(results: list[Result]) -> list[tuple[object, ...]]:
    return [
        (r.key, r.clip_index, r.facts.decoder, hashlib.sha256(r.frames.tobytes()).hexdigest())
        if isinstance(r, Clip)
        else (r.key, r.clip_index, r.reason)
        for r in results
    ]


def reference_frames(path: Path, width: int, height: int) -> np.ndarray[Any, Any]:
    """Every frame through PyAV in this process, only of files that the tests made or ship."""
    with av.open(str(path)) as container:
        frames = [f.reformat(width=width, height=height, format="rgb24") for f in container.decode(video=0)]
        return np.stack([f.to_ndarray() for f in frames])


def nearest(frame: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> int:
    return int(np.argmin([np.abs(frame.astype(int) - other).mean() for other in reference]))


# --- what comes out -------------------------------------------------------------------------------------------------


def test_the_real_clips_decode_to_the_frames_that_a_plain_decoder_gives(pool: DecodePool) -> None:
    results = list(pool.decode(video(path, path.stem) for path in CLIP_VIDEOS))
    by_key: dict[str, list[Clip]] = {}
    for clip in clips_of(results):
        by_key.setdefault(clip.key, []).append(clip)
    assert list(by_key) == [path.stem for path in CLIP_VIDEOS]
    for clips in by_key.values():
        assert [clip.clip_index for clip in clips] == list(range(len(clips)))
        assert [clip.start_s for clip in clips] == [9 * i / 8 for i in range(len(clips))]
        assert clips[0].facts.decoder.startswith("decord-")
        assert clips[0].caption == f"caption of {clips[0].key}"
    wide = reference_frames(WAVES, 171, 96)[:, :, 21 : 21 + 128]
    for clip in by_key["city_waves"]:
        seen = [nearest(frame, wide) for frame in clip.frames]
        assert seen == [int(instant * 25 / 8 + 1e-6) for instant in range(9 * clip.clip_index, 9 * clip.clip_index + 9)]
        assert clip.frame_times_s.tolist() == pytest.approx([index / 25 for index in seen])
        assert np.abs(clip.frames[0].astype(int) - wide[seen[0]]).mean() < 4


def test_stills_decode_to_clips_of_one_frame(pool: DecodePool) -> None:
    clips = clips_of(list(pool.decode(video(path, path.stem, "image") for path in CLIP_STILLS)))
    assert [(clip.key, clip.bucket.num_frames, clip.fps) for clip in clips] == [
        ("bunny_still", 1, None),
        ("city_still", 1, None),
    ]
    assert all((clip.start_s, clip.end_s, clip.facts.decoder.split("-")[0]) == (0, 0, "pillow") for clip in clips)


def test_frames_of_a_variable_rate_are_chosen_by_their_true_times(pool: DecodePool, tmp_path: Path) -> None:
    made = ffmpeg(
        "-i", str(WAVES), "-vf", "setpts='(N+floor(N/10)*7)/25/TB'", "-fps_mode", "vfr", "-c:v", "libx264"
    )  # fmt: skip
    path = tmp_path / "vfr.mp4"
    path.write_bytes(made)
    reference = reference_frames(path, 171, 96)[:, :, 21 : 21 + 128]
    times_s = [(n + n // 10 * 7) / 25 for n in range(len(reference))]
    clips = clips_of(list(pool.decode([video(made)])))
    assert len(clips) == 3
    for clip in clips:
        instants_s = [(9 * clip.clip_index + i) / 8 for i in range(9)]
        expected = [max(n for n, t in enumerate(times_s) if t <= instant + 1e-6) for instant in instants_s]
        assert [nearest(frame, reference) for frame in clip.frames] == expected
        assert clip.frame_times_s.tolist() == pytest.approx([times_s[n] for n in expected])


def test_every_frame_of_native_rate_is_there_once(pool: DecodePool) -> None:
    clips = clips_of(decode([video(WAVES)], fps=None))
    assert len(clips) == 58 // 9
    assert np.concatenate([clip.frame_times_s for clip in clips]).tolist() == pytest.approx([n / 25 for n in range(54)])
    assert all(clip.fps == pytest.approx(25) and clip.end_s - clip.start_s == pytest.approx(9 / 25) for clip in clips)


@pytest.mark.parametrize(
    ("made_by", "decoder", "turn"),
    [
        (("-display_rotation", "90"), "decord", lambda p: np.rot90(p, 1, (1, 2))),
        (("-display_rotation", "180"), "decord", lambda p: np.rot90(p, 2, (1, 2))),
        (("-display_rotation", "270"), "decord", lambda p: np.rot90(p, 3, (1, 2))),
        (("-display_hflip",), "pyav", lambda p: p[:, :, ::-1]),
    ],
)
def test_a_display_matrix_is_applied(
    made_by: tuple[str, ...], decoder: str, turn: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
) -> None:
    made = ffmpeg(*made_by, "-i", str(WAVES), "-c", "copy")
    buckets = "96x168x9;168x96x9"
    clip = clips_of(decode([video(made)], buckets=buckets))[0]
    expected = turn(reference_frames(WAVES, 512, 288))[0]
    height, width = clip.frames.shape[1:3]
    assert (clip.facts.width_px, clip.facts.height_px) == (expected.shape[1], expected.shape[0])
    assert clip.facts.decoder.startswith(decoder)
    x, y, crop_width, crop_height = clip.crop
    shown = Image.fromarray(np.ascontiguousarray(expected)).crop((x, y, x + crop_width, y + crop_height))
    # Water is all edges: compared at an eighth, where a pixel more or less at the border does not count.
    coarse = [
        np.asarray(picture.resize((width // 8, height // 8), Image.Resampling.BOX)).astype(int)
        for picture in (shown, Image.fromarray(clip.frames[0]))
    ]
    assert np.abs(coarse[0] - coarse[1]).mean() < 4
    assert np.abs(coarse[0] - coarse[1][:, ::-1]).mean() > 8


def test_both_decoders_apply_a_quarter_turn_alike() -> None:
    turned = ffmpeg("-display_rotation", "90", "-i", str(WAVES), "-c", "copy")
    av1 = ("-c:v", "libsvtav1", "-preset", "10", "-crf", "15", "-svtav1-params", "lp=1")
    turned_av1 = ffmpeg("-display_rotation", "90", "-noautorotate", "-i", str(WAVES), *av1)
    one = clips_of(decode([video(turned)], buckets="96x168x9"))[0]
    other = clips_of(decode([video(turned_av1)], buckets="96x168x9"))[0]
    assert (one.facts.decoder.split("-")[0], other.facts.decoder.split("-")[0]) == ("decord", "pyav")
    assert one.crop == other.crop
    assert np.abs(one.frames.astype(int) - other.frames).mean() < 4


@pytest.mark.parametrize(
    ("suffix", "codec", "decoder"),
    [
        (".mkv", ("-c", "copy"), "decord"),
        (".webm", ("-c:v", "libvpx", "-auto-alt-ref", "1", "-lag-in-frames", "16", "-b:v", "400k"), "decord"),
        (".webm", ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"), "decord"),
        (".mp4", ("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none"), "decord"),
        (".mp4", ("-c:v", "libsvtav1", "-preset", "10", "-svtav1-params", "lp=1"), "pyav"),
        (".ts", ("-c", "copy"), "pyav"),
        (".avi", ("-c:v", "libx264", "-bf", "2"), "pyav"),
        (".avi", ("-c:v", "mpeg4", "-bf", "2", "-q:v", "2"), "pyav"),
        (".mpg", ("-c:v", "mpeg2video", "-q:v", "2"), "pyav"),
        (".mp4", ("-c:v", "mjpeg", "-q:v", "2"), "decord"),
    ],
)
def test_containers_and_codecs_give_the_same_frames(
    suffix: str, codec: tuple[str, ...], decoder: str, pool: DecodePool
) -> None:
    reference = reference_frames(WAVES, 171, 96)[:, :, 21 : 21 + 128]
    clips = clips_of(list(pool.decode([video(ffmpeg("-i", str(WAVES), *codec, suffix=suffix))])))
    assert len(clips) == 2
    assert {clip.facts.decoder.split("-")[0] for clip in clips} == {decoder}
    for clip in clips:
        seen = [nearest(frame, reference) for frame in clip.frames]
        assert seen == [int(instant * 25 / 8 + 1e-6) for instant in range(9 * clip.clip_index, 9 * clip.clip_index + 9)]


@pytest.mark.parametrize("suffix", [".avi", ".mkv", ".mp4"])
@pytest.mark.parametrize(
    "title",
    [
        "Caf\u00e9 \u00fc".encode("latin-1"),
        "\u041a\u0438\u043d\u043e".encode("cp1251"),
        "\u6620\u753b".encode("shift-jis"),
    ],
)
def test_a_title_in_any_alphabet_is_no_fault_of_a_video(suffix: str, title: bytes, pool: DecodePool) -> None:
    stand_in = b"Q" * len(title)
    codec = ("-c:v", "mpeg4", "-q:v", "3") if suffix == ".avi" else ("-c:v", "libx264")
    whole = moving_pattern("160x120", "25", 2, *codec, "-metadata", f"title={stand_in.decode()}", suffix=suffix)
    named = whole.replace(stand_in, title)
    assert named != whole
    assert digests(list(pool.decode([video(named)]))) == digests(list(pool.decode([video(whole)])))


def test_a_transport_stream_that_is_cut_anywhere_gives_the_clips_before_the_cut(pool: DecodePool) -> None:
    codec = ("-c:v", "libx264", "-g", "50", "-bf", "3")
    whole = moving_pattern("160x120", "25", 8, *codec, suffix=".ts")
    expected = digests(list(pool.decode([video(whole)])))
    assert len(expected) == 7
    for share, padding in ((0.5, 0), (0.7, 0), (0.7, 3000)):
        cut = int(len(whole) * share) // 188 * 188 + 100
        got = digests(list(pool.decode([video(whole[:cut] + bytes(padding))])))
        there = [one for one in got if len(one) == 4]
        assert 2 <= len(there) <= 6
        assert there == expected[: len(there)]
        lost = [("key", index, "frames_missing") for index in range(len(there), len(got))]
        assert got[len(there) :] == lost
        assert 1 <= len(lost) <= 2
    late = digests(list(pool.decode([video(whole[100:])])))
    assert late == expected


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_file_that_is_cut_among_frames_that_need_each_other_rejects_what_was_to_follow(
    suffix: str, pool: DecodePool
) -> None:
    codec = ("-c:v", "libx264", "-g", "50", "-bf", "3", "-movflags", "+faststart")
    whole = moving_pattern("160x120", "25", 8, *codec, suffix=suffix)
    expected = digests(list(pool.decode([video(whole)])))
    assert len(expected) == 7
    for share in np.linspace(0.6, 0.98, 6):
        got = digests(list(pool.decode([video(whole[: int(len(whole) * share)])])))
        there = [one for one in got if len(one) == 4]
        assert there == expected[: len(there)]
        assert got[len(there) :] == [("key", index, "frames_missing") for index in range(len(there), 7)]
        assert len(there) < 7


def test_a_decoder_that_refuses_everything_is_asked_only_so_often() -> None:
    codec = ("-c:v", "libx264", "-bf", "0", "-preset", "ultrafast")
    broken = bytearray(moving_pattern("64x64", "25", 20, *codec, suffix=".avi"))
    place = broken.index(b"movi") + 4
    while broken[place : place + 2] == b"00":
        (num_bytes,) = struct.unpack_from("<I", broken, place + 4)
        broken[place + 8 : place + 8 + num_bytes] = b"\0\0\0\1\x65" + b"\x11" * (num_bytes - 5)
        place += 8 + num_bytes + num_bytes % 2
    # In this process: what a child does not do cannot be seen from outside.
    opened, limits = video(bytes(broken)), DecodeLimits()
    with frames._open_container(opened.media_fd, limits) as container:
        stream, _ = frames._choose_stream(container, limits)
        found = frames._read_packets(container, stream, limits, lambda: None, None, False)
    os.close(opened.media_fd)
    assert (found.num_seen, found.num_failures) == (500, frames._MOST_FAILURES)
    assert rejection(decode([video(bytes(broken))])) == (None, "decode_error")


def test_segments_of_a_stream_one_behind_the_other_are_one_video(pool: DecodePool) -> None:
    codec = ("-c:v", "libx264", "-g", "25", "-bf", "2")
    reference = clips_of(list(pool.decode([video(moving_pattern("160x120", "25", 4, *codec, suffix=".ts"))])))
    source = ("-f", "lavfi", "-i", "testsrc=size=160x120:rate=25:duration=4", "-pix_fmt", "yuv420p", *codec)
    segments = [
        ffmpeg(
            *source,
            "-vf",
            f"trim={start}:{start + 2}",
            "-muxdelay",
            "0",
            suffix=".ts",
        )
        for start in (0, 2)
    ]
    clips = clips_of(list(pool.decode([video(b"".join(segments))])))
    assert len(clips) == len(reference) == 3
    for one, other in zip(clips, reference, strict=True):
        assert np.abs(one.frames.astype(int) - other.frames).mean() < 4


def test_what_writers_add_to_an_avi_changes_no_clip(pool: DecodePool) -> None:
    whole = moving_pattern("160x120", "25", 3, "-c:v", "mpeg4", "-g", "50", "-q:v", "3", suffix=".avi")
    media = whole.index(b"movi") - 8
    made = [
        whole,
        whole + bytes(3000),
        whole + b"_PMX" + struct.pack("<I", 10) + b"<metadata>",
        whole + b"no chunk at all, and more than once: " * 9,
        whole[:media] + b"IDIT" + struct.pack("<I", 26) + b"MON NOV 23 04:00:00 2026\n\0" + whole[media:],
    ]
    results = [digests(list(pool.decode([video(content)]))) for content in made]
    assert len(results[0]) == 2
    assert all(result == results[0] for result in results)


def test_a_trimmed_mp4_begins_where_its_edit_list_says(pool: DecodePool, tmp_path: Path) -> None:
    made = ffmpeg("-ss", "0.3", "-i", str(WAVES), "-c", "copy")
    path = tmp_path / "trimmed.mp4"
    path.write_bytes(made)
    shown = reference_frames(path, 171, 96)[:, :, 21 : 21 + 128]
    clip = clips_of(list(pool.decode([video(made)])))[0]
    assert [nearest(frame, shown) for frame in clip.frames] == [int(instant * 25 / 8) for instant in range(9)]


def test_overlapping_clips_show_the_same_frames_where_they_overlap() -> None:
    for suffix in (".mp4", ".ts"):
        made = ffmpeg("-i", str(WAVES), "-c", "copy", suffix=suffix)
        clips = clips_of(decode([video(made)], clip_stride=4))
        assert len(clips) == 3
        for one, other in itertools.pairwise(clips):
            assert np.array_equal(one.frames[4:], other.frames[:5])


def test_clips_per_video_are_taken_evenly() -> None:
    made = moving_pattern("128x96", "25", 20)
    clips = clips_of(decode([video(made)], clips_per_video=3))
    assert [clip.start_s for clip in clips] == [0.0, 9.0, 18.0]


def test_a_picture_that_stands_still_is_no_damage(pool: DecodePool) -> None:
    made = ffmpeg("-f", "lavfi", "-i", "color=teal:size=160x120:rate=25:duration=3", "-pix_fmt", "yuv420p")
    clips = clips_of(list(pool.decode([video(made)])))
    assert len(clips) == 2
    assert all(clip.facts.decoder.startswith("decord-") for clip in clips)


def test_widths_that_decord_misreads_come_out_right() -> None:
    made = moving_pattern("16x16", "8", 3, "-g", "8")
    clip = clips_of(decode([video(made)], buckets="16x16x9"))[0]
    assert clip.frames.shape == (9, 16, 16, 3)
    assert clip.facts.decoder.startswith("pyav-")


def test_an_hour_of_tiny_video_is_cut_whole_in_bounded_memory() -> None:
    own_pool = DecodePool(encoding("16x16x9", fps=1.0), DecodeLimits(decode_memory_bytes=1 << 30), 1)
    num_clips = 0
    for result in own_pool.decode([video(one_hour_of_16_px())]):
        assert isinstance(result, Clip)
        assert result.clip_index == num_clips
        num_clips += 1
    own_pool.close()
    assert num_clips == 3600 // 9


def scans(content: bytes) -> tuple[frames.Scan | None, frames.Scan]:
    """What a glance finds in a file and what looking through it finds; in this process, of files made here."""
    opened, limits = video(content), DecodeLimits()
    try:
        return (
            frames.glance_at_video(opened.media_fd, limits, lambda: None),
            frames.scan_video(opened.media_fd, limits, lambda: None),
        )
    finally:
        os.close(opened.media_fd)


def plain(scan: frames.Scan) -> dict[str, Any]:
    told = dataclasses.asdict(scan)
    told.update(told.pop("timeline"))
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in told.items()}


@pytest.mark.parametrize(
    "made_by",
    [
        ("-i", str(WAVES), "-c", "copy"),
        ("-i", str(WAVES), "-c", "copy", "-movflags", "+faststart"),
        ("-ss", "0.3", "-i", str(WAVES), "-c", "copy"),
        ("-display_rotation", "90", "-i", str(WAVES), "-c", "copy"),
        ("-display_hflip", "-i", str(WAVES), "-c", "copy"),
        ("-i", str(WAVES), "-c", "copy", "-bsf:v", "h264_metadata=display_orientation=insert:rotate=90"),
        ("-i", str(WAVES), "-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv422p10le"),
        ("-i", str(WAVES), "-c:v", "libx264", "-preset", "ultrafast", "-x264-params", "slices=4:tff=1"),
        ("-i", str(WAVES), "-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none"),
        ("-f", "lavfi", "-i", "sine=duration=2", "-i", str(WAVES), "-map", "0", "-map", "1", "-c:v", "copy"),
    ],
)
def test_a_glance_at_a_whole_mp4_finds_what_looking_through_it_finds(made_by: tuple[str, ...]) -> None:
    glance, scan = scans(ffmpeg(*made_by))
    assert glance is not None
    assert plain(glance) == plain(scan)


@pytest.mark.parametrize(
    ("suffix", "made_by"),
    [
        (".mp4", ("-c", "copy", "-movflags", "+frag_keyframe+empty_moov")),
        (".mp4", ("-c:v", "mjpeg", "-q:v", "2")),
        (".mkv", ("-c", "copy")),
        (".ts", ("-c", "copy")),
        (".avi", ("-c:v", "mpeg4", "-q:v", "2")),
    ],
)
def test_a_glance_says_nothing_where_headers_do_not_tell_all(suffix: str, made_by: tuple[str, ...]) -> None:
    glance, scan = scans(ffmpeg("-i", str(WAVES), *made_by, suffix=suffix))
    assert glance is None
    assert len(scan.pts) == 58


def test_a_glance_says_nothing_of_an_mp4_that_is_cut() -> None:
    whole = ffmpeg("-i", str(WAVES), "-c", "copy", "-movflags", "+faststart")
    for share in (0.5, 0.9, 0.999):
        assert scans(whole[: int(len(whole) * share)])[0] is None


def test_damage_in_a_picture_that_a_glance_does_not_see_is_found(pool: DecodePool) -> None:
    damaged = bytearray(moving_pattern("160x120", "25", 4, "-c:v", "libx264", "-g", "25", "-bf", "0"))
    with av.open(io.BytesIO(bytes(damaged))) as container:
        first = next(packet for packet in container.demux(video=0))
    assert first.pos is not None
    middle = first.pos + first.size // 2
    damaged[middle : middle + 200] = b"\xaa" * 200
    assert scans(bytes(damaged))[0] is not None
    results = digests(list(pool.decode([video(bytes(damaged))])))
    assert results[0] == ("key", 0, "decode_error")
    assert [len(result) for result in results[1:]] == [4, 4]


# --- pictures -------------------------------------------------------------------------------------------------------


def picture_bytes(picture: Image.Image, image_format: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **more)
    return buffer.getvalue()


def decoded_picture(content: bytes) -> np.ndarray[Any, Any]:
    clip = only_clip(decode([video(content, kind="image")], buckets="64x48x1"))
    return clip.frames[0]


def gradient() -> Image.Image:
    y, x = np.mgrid[0:48, 0:64]
    return Image.fromarray(np.stack([x * 4, y * 5, 255 - x * 4], axis=-1).astype(np.uint8))


@pytest.mark.parametrize(
    ("mode", "image_format"),
    [("RGB", "PNG"), ("CMYK", "JPEG"), ("P", "GIF"), ("P", "PNG"), ("RGB", "WEBP"), ("RGB", "BMP")],
)
def test_pictures_of_every_mode_come_out_in_rgb(mode: str, image_format: str) -> None:
    drawn = gradient().quantize(256) if mode == "P" else gradient().convert(mode)
    seen = decoded_picture(picture_bytes(drawn, image_format))
    assert np.abs(seen.astype(int) - np.asarray(gradient())).mean() < 12


def test_16_bit_grey_keeps_its_upper_8_bits() -> None:
    grey = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    seen = decoded_picture(picture_bytes(Image.fromarray(grey), "PNG"))
    assert np.array_equal(seen[:, :, 0], grey >> 8)


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (64, 48), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 32, 48))
    seen = decoded_picture(picture_bytes(clear, "PNG"))
    assert seen[24, 4].tolist() == [0, 0, 255]
    assert seen[24, 60].tolist() == [255, 255, 255]


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, to be turned a quarter clockwise
    stored = gradient().transpose(Image.Transpose.ROTATE_90)
    seen = decoded_picture(picture_bytes(stored, "JPEG", exif=exif, quality=95))
    assert np.abs(seen.astype(int) - np.asarray(gradient())).mean() < 4


# --- what is rejected -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "reason"),
    [
        (lambda: b"", "video", "empty_file"),
        (lambda: b"", "image", "empty_file"),
        (lambda: bytes(range(256)) * 400, "video", "unreadable"),
        (lambda: b"no picture at all" * 40, "image", "unreadable"),
        (lambda: WAVES.read_bytes()[:5000], "video", "frames_missing"),
        (lambda: audio_only(), "video", "no_video"),
        (lambda: two_frames(), "video", "too_short"),
        (lambda: moving_pattern("96x96", "8", 2), "video", "too_small"),
        (lambda: moving_pattern("128x96", "8", 2, "-c:v", "magicyuv", suffix=".mkv"), "video", "not_allowed"),
        (lambda: b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n", "video", "not_allowed"),
        (lambda: b"ffconcat version 1.0\nfile /etc/passwd\n", "video", "not_allowed"),
        (lambda: (CLIPS / "city_still.jpg").read_bytes()[:9000], "image", "decode_error"),
    ],
)
def test_hopeless_files_are_rejected_whole_by_name(
    make: Callable[[], bytes], kind: str, reason: str, pool: DecodePool
) -> None:
    assert rejection(list(pool.decode([video(make(), kind=kind)]))) == (None, reason)


@pytest.mark.parametrize(
    "limit",
    [
        {"max_picture_px": 512 * 288 - 1},
        {"max_duration_s": 2.0},
        {"max_frames": 57},
        {"max_file_bytes": 1000},
    ],
)
def test_a_video_over_a_limit_is_rejected_and_never_shortened(limit: dict[str, Any]) -> None:
    assert rejection(decode([video(WAVES)], **limit)) == (None, "too_large")


def test_a_picture_over_the_limit_is_refused_before_it_is_decoded() -> None:
    header = picture_bytes(Image.new("1", (16384, 16384)), "PNG")
    assert rejection(decode([video(header, kind="image")])) == (None, "too_large")


def test_without_a_bucket_of_its_kind_a_file_is_rejected() -> None:
    results = decode([video(CLIP_STILLS[0], "a", "image"), video(WAVES, "b")], buckets="128x96x1")
    assert isinstance(results[0], Clip)
    assert rejection(results[1:]) == (None, "no_bucket")


@pytest.mark.parametrize(("suffix", "share"), [(".mp4", 0.7), (".mkv", 0.7), (".avi", 0.7)])
def test_a_cut_file_gives_the_whole_clips_that_are_there_and_rejects_the_others(
    suffix: str, share: float, pool: DecodePool
) -> None:
    codec = ("-c:v", "mpeg4", "-q:v", "3") if suffix == ".avi" else ("-c:v", "libx264", "-g", "25")
    more = ("-movflags", "+faststart") if suffix == ".mp4" else ()
    whole = moving_pattern("160x120", "25", 8, *codec, *more, suffix=suffix)
    expected = digests(list(pool.decode([video(whole)])))
    got = digests(list(pool.decode([video(whole[: int(len(whole) * share)])])))
    assert len(got) == len(expected) == 7
    there = [one for one in got if len(one) == 4]
    assert 3 <= len(there) <= 5
    assert there == expected[: len(there)]
    assert got[len(there) :] == [("key", index, "frames_missing") for index in range(len(there), 7)]


def damaged(whole: bytes, seed: int) -> bytes:
    """Two runs of random bytes somewhere in the packets."""
    rng = np.random.default_rng(seed)
    broken = bytearray(whole)
    for _ in range(2):
        start, length = int(rng.integers(len(whole) // 10, len(whole) * 9 // 10)), int(rng.integers(20, 300))
        broken[start : start + length] = rng.bytes(length)
    return bytes(broken)


def test_damage_rejects_the_clips_it_touches_and_leaves_the_others_as_they_were() -> None:
    whole = moving_pattern("320x240", "25", 12, "-c:v", "libx264", "-g", "25", "-bf", "2")
    files = [video(damaged(whole, seed), f"damaged{seed}") for seed in range(6)]
    expected = [digest[1:] for digest in digests(decode([video(whole)]))]
    got = digests(decode(files, num_processes=2))
    num_rejected = 0
    for digest in got:
        if len(digest) == 3:
            assert digest[2] in ("decode_error", "frames_missing")
            num_rejected += 1
        else:
            assert digest[1:] == expected[int(str(digest[1]))], digest
    assert 6 <= num_rejected < len(got) / 2


@pytest.mark.parametrize("late", [1 << 20, 1 << 28])
def test_a_frame_that_is_to_be_shown_when_no_decoder_could_is_missed_where_it_belongs(late: int) -> None:
    """One bit of an index moves a frame behind all others, which then looks like a video that is one frame shorter."""
    whole = bytearray(moving_pattern("320x240", "25", 12, "-c:v", "libx264", "-g", "25", "-bf", "2"))
    table = whole.index(b"ctts") + 12
    (num_entries,) = struct.unpack_from(">I", whole, table - 4)
    assert num_entries > 120
    entry = table + 8 * 100 + 4
    struct.pack_into(">I", whole, entry, struct.unpack_from(">I", whole, entry)[0] + late)
    expected = clips_of(decode([video(whole_again(whole, entry, late))]))
    results = decode([video(bytes(whole))])
    clips = [result for result in results if isinstance(result, Clip)]
    assert 0 < len(clips) < len(expected)
    assert len(results) == len(expected)
    assert {result.reason for result in results if isinstance(result, ClipFailure)} == {"frames_missing"}
    for clip, wanted in zip(clips, expected, strict=False):
        np.testing.assert_allclose(clip.frame_times_s, wanted.frame_times_s)
        # Read by another decoder, whose scaler rounds otherwise.
        assert float(np.abs(clip.frames.astype(np.int16) - wanted.frames).mean()) < 4


def whole_again(changed: bytearray, entry: int, late: int) -> bytes:
    whole = bytearray(changed)
    struct.pack_into(">I", whole, entry, struct.unpack_from(">I", whole, entry)[0] - late)
    return bytes(whole)


def test_the_results_do_not_depend_on_the_size_of_the_pool() -> None:
    whole = moving_pattern("320x240", "25", 8, "-c:v", "libx264", "-g", "25", "-bf", "2")

    def files() -> Iterator[SourceVideo]:
        for path in CLIP_VIDEOS[:4]:
            yield video(path, path.stem)
        for seed in range(4):
            yield video(damaged(whole, seed), f"damaged{seed}")

    once = digests(decode(files(), num_processes=1))
    assert digests(decode(files(), num_processes=3)) == once
    assert digests(decode(files(), num_processes=2, videos_per_child=1)) == once


# --- the pool -------------------------------------------------------------------------------------------------------


def test_failures_of_the_input_pass_through_in_their_place(pool: DecodePool) -> None:
    failure = ClipFailure(
        key="gone", clip_index=None, step="source", reason="not_found", message="no such file", source_uri="x"
    )
    results = list(pool.decode([failure, video(WAVES, "a"), failure, video(WAVES, "b")]))
    assert [result.key for result in results] == ["gone", "a", "a", "gone", "b", "b"]
    assert results[0] is failure


def test_two_threads_decode_at_once_even_while_nobody_takes_the_clips_of_one(pool: DecodePool) -> None:
    many = [video(path, path.stem) for path in CLIP_VIDEOS * 2]
    waiting = pool.decode(many)
    next(waiting)
    taken: list[Result] = []
    thread = threading.Thread(target=lambda: taken.extend(pool.decode([video(WAVES)])))
    thread.start()
    thread.join(60)
    assert len(clips_of(taken)) == 2
    assert len(list(waiting)) >= len(many) - 1


def open_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_a_call_that_is_closed_early_leaves_no_descriptor_and_no_process() -> None:
    others = {process.pid for process in psutil.Process().children()}
    own_pool = DecodePool(encoding(), DecodeLimits(), 2)
    list(own_pool.decode([video(WAVES)]))
    before = open_descriptors()
    for _ in range(3):
        results = own_pool.decode(iter([video(path, path.stem) for path in CLIP_VIDEOS[:3]]))
        next(results)
        assert isinstance(results, Iterator)
        results.close()  # type: ignore[attr-defined]
    rest = [video(path, path.stem) for path in CLIP_VIDEOS[:3]]
    assert len(clips_of(list(own_pool.decode(rest)))) == 6
    own_pool.close()
    assert open_descriptors() <= before
    assert {process.pid for process in psutil.Process().children()} <= others


def test_no_descriptor_is_left_after_many_files() -> None:
    own_pool = DecodePool(encoding(), DecodeLimits(videos_per_child=5), 2)
    list(own_pool.decode([video(WAVES)]))
    before = open_descriptors()
    list(own_pool.decode(video(b"garbage" if n % 3 else b"", str(n), "image") for n in range(40)))
    # A second child may have been started since; it brings a socket, a memory file and a log.
    assert open_descriptors() <= before + 3
    own_pool.close()
    assert open_descriptors() <= before


def test_a_closed_pool_says_so(pool: DecodePool) -> None:
    own_pool = DecodePool(encoding(), DecodeLimits(), 1)
    own_pool.close()
    with pytest.raises(DecodeChildError, match="closed"):
        list(own_pool.decode([video(WAVES)]))


# --- children -------------------------------------------------------------------------------------------------------


def child_of(own_pool: DecodePool) -> psutil.Process:
    """The one decode child of a pool that has decoded nothing yet or is idle."""
    (child,) = own_pool._idle
    return psutil.Process(child._process.pid)


def test_a_child_is_replaced_after_its_share_of_files() -> None:
    own_pool = DecodePool(encoding(), DecodeLimits(videos_per_child=2), 1)
    pids = []
    for _ in range(4):
        pids.append(child_of(own_pool).pid if own_pool._idle else None)
        assert len(clips_of(list(own_pool.decode([video(WAVES)])))) == 2
    own_pool.close()
    assert pids[0] == pids[1]
    assert pids[2:] == [None, pids[3]]
    assert pids[3] != pids[0]


def do_to_child_after_first_clip(signals: int, how: signal.Signals, **limits: Any) -> list[Result]:
    """Decodes a long video and sends the child in work a signal once clips flow, and to its next children too."""
    own_pool = DecodePool(encoding("128x96x9", fps=None), DecodeLimits(**limits), 1)
    made = moving_pattern("640x480", "25", 40, "-preset", "ultrafast")
    results: list[Result] = []
    hit: set[int] = set()
    for result in own_pool.decode([video(made, "long"), video(WAVES, "next")]):
        results.append(result)
        busy = [child._process.pid for child in own_pool._busy if child._process.pid not in hit]
        if len(hit) < signals and busy:
            hit.update(busy)
            os.kill(busy[0], how)
    own_pool.close()
    assert len(hit) == signals
    return results


def test_a_video_whose_child_is_killed_once_comes_out_whole() -> None:
    clips = clips_of(do_to_child_after_first_clip(1, signal.SIGKILL))
    assert [(clip.key, clip.clip_index) for clip in clips] == [
        *(("long", index) for index in range(1000 // 9)),
        *(("next", index) for index in range(58 // 9)),
    ]


def test_a_child_that_stays_silent_is_killed_and_its_video_tried_again() -> None:
    clips = clips_of(do_to_child_after_first_clip(1, signal.SIGSTOP, decode_timeout_s=1.0))
    assert len(clips) == 1000 // 9 + 58 // 9


@pytest.fixture
def hostile_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., DecodePool]]:
    """Pools whose children meet a decoder that misbehaves on one file. Stands in for a bug that no known file shows."""
    made: list[DecodePool] = []

    def make(misbehave: str, **limits: Any) -> DecodePool:
        start = (
            "import json, os, signal, sys; sys.path[:] = json.loads(sys.argv[1]); import pipeline.decode_child as c\n"
            "honest = c._clips_of_video\n"
            "def hostile(media_fd, first_clip, rules, memory, sign_of_life):\n"
            "    if os.fstat(media_fd).st_size % 2 == 0:\n"
            "        return honest(media_fd, first_clip, rules, memory, sign_of_life)\n"
            f"    {misbehave}\n"
            "c._clips_of_video = hostile; c.main(sys.argv[2:])"
        )
        monkeypatch.setattr("pipeline.decode._START", start)
        made.append(DecodePool(encoding(), DecodeLimits(**limits), 1))
        return made[-1]

    yield make
    for own_pool in made:
        own_pool.close()


def even_and_odd() -> list[SourceVideo]:
    """Three healthy videos; the one in the middle has an odd number of bytes."""
    data = WAVES.read_bytes()
    even = data if len(data) % 2 == 0 else data + b"\0"
    return [video(even, "before"), video(even + b"\0", "bad"), video(even, "after")]


@pytest.mark.parametrize(
    ("misbehave", "limits", "reason", "says"),
    [
        ("os.abort()", {}, "decoder_crash", "SIGABRT"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", {}, "decoder_crash", "2 times, the last time: ended by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", {}, "decoder_crash", "6 times, the last time: ended by SIGKILL"),
        ("signal.pause()", {"decode_timeout_s": 1.0}, "timeout", "silent for"),
        ("while True: sign_of_life()", {"max_decode_cpu_s": 1.0}, "timeout", "--max-decode-cpu-s"),
        ("bytearray(8 << 30)", {}, "out_of_memory", "no memory"),
        ("print('terminate: std::bad_alloc', file=sys.stderr); os.abort()", {}, "out_of_memory", "bad_alloc"),
        ("return iter([{'type': 'clip', 'clip_index': 7}])", {}, "decoder_crash", ""),
        ("print('\\x1b[31mred\\r' * 9000, file=sys.stderr); os._exit(3)", {}, "decoder_crash", "x1b[31mred"),
    ],
)
def test_a_file_that_ruins_its_decoder_every_time_is_rejected_alone(
    hostile_pool: Callable[..., DecodePool],
    misbehave: str,
    limits: dict[str, Any],
    reason: str,
    says: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    results = list(hostile_pool(misbehave, **limits).decode(even_and_odd()))
    assert [result.key for result in results] == ["before", "before", "bad", "after", "after"]
    bad = results[2]
    assert isinstance(bad, ClipFailure)
    assert (bad.clip_index, bad.reason) == (None, reason), bad.message
    # The last words of the child are for the log; what goes into the output is the same for the same file every time.
    assert says in bad.message + caplog.text
    assert "decode child" not in bad.message
    assert bad.message.isprintable()
    assert all(len(message) < 20_000 and message.isprintable() for message in caplog.messages)


def test_a_video_whose_child_dies_twice_at_one_clip_loses_that_clip_and_the_rest(
    hostile_pool: Callable[..., DecodePool],
) -> None:
    own_pool = hostile_pool(
        "return (m if m.get('clip_index') != 1 else os.abort() for m in "
        "honest(media_fd, first_clip, rules, memory, sign_of_life))"
    )
    results = list(own_pool.decode(even_and_odd()))
    assert [(r.key, r.clip_index, isinstance(r, Clip)) for r in results[2:4]] == [("bad", 0, True), ("bad", 1, False)]
    assert isinstance(results[3], ClipFailure)
    assert results[3].reason == "decoder_crash"


def test_a_video_loses_nothing_when_its_children_are_killed_from_outside_a_few_times_at_one_place(
    hostile_pool: Callable[..., DecodePool],
) -> None:
    own_pool = hostile_pool(
        "os.kill(os.getpid(), signal.SIGSTOP); return honest(media_fd, first_clip, rules, memory, sign_of_life)"
    )
    num_met = 0

    def meet_those_that_stopped() -> None:
        nonlocal num_met
        while not is_over.wait(0.02):
            for child in psutil.Process().children():
                with suppress(psutil.NoSuchProcess):
                    if child.status() == psutil.STATUS_STOPPED:
                        num_met += 1
                        child.send_signal(signal.SIGKILL if num_met < 5 else signal.SIGCONT)

    is_over = threading.Event()
    watcher = threading.Thread(target=meet_those_that_stopped)
    watcher.start()
    try:
        results = list(own_pool.decode(even_and_odd()))
    finally:
        is_over.set()
        watcher.join()
    assert num_met >= 5
    assert all(isinstance(result, Clip) for result in results), results
    assert [result.key for result in results] == [key for key in ("before", "bad", "after") for _ in range(2)]


def test_a_child_can_reach_no_network_no_program_and_no_secret(
    hostile_pool: Callable[..., DecodePool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    probe = (
        "import socket, subprocess, resource, json, errno; found = {'environment': sorted(os.environ)}\n"
        "    for name, act in (('socket', socket.socket), ('exec', lambda: os.execv('/bin/true', ['true'])),"
        " ('write', lambda: open('/tmp/latentmill-canary', 'wb').write(bytes(4 << 20))),"
        " ('read', lambda: open('/etc/passwd', 'rb').read()),"
        " ('parent', lambda: open(f'/proc/{os.getppid()}/environ', 'rb').read()),"
        " ('fork', os.fork), ('kill', lambda: os.kill(os.getppid(), 0)),"
        " ('log', lambda: [os.write(2, bytes(1 << 20)) for _ in range(4)])):\n"
        "        try: act(); found[name] = 'went through'\n"
        "        except OSError as error: found[name] = errno.errorcode[error.errno]\n"
        "    found['core'] = resource.getrlimit(resource.RLIMIT_CORE)[0]\n"
        "    found['modules'] = [m for m in ('torch', 'ray', 'boto3', 's3fs') if m in sys.modules]\n"
        "    raise c.RejectionError('unreadable', json.dumps(found))"
    )
    own_pool = hostile_pool(probe)
    try:
        bad = next(r for r in own_pool.decode(even_and_odd()) if isinstance(r, ClipFailure))
    finally:
        Path("/tmp/latentmill-canary").unlink(missing_ok=True)
    found = json.loads(bad.message)
    assert found.pop("environment") == ["LC_ALL", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH"]
    assert (found.pop("core"), found.pop("modules")) == (0, [])
    assert (found["socket"], found["exec"], found["fork"], found["log"]) == ("EPERM", "EPERM", "EPERM", "EFBIG")
    assert "went through" not in found.values()
    report = own_pool.sandbox_report()
    assert is_tight(report), report
    assert report["memory_limit_bytes"] == DecodeLimits().decode_memory_bytes


def test_children_die_with_the_process_that_started_them() -> None:
    program = (
        "import sys, time; from pipeline.decode import DecodePool; from pipeline.config import *\n"
        "pool = DecodePool(EncodingConfig(model='small'), DecodeLimits(), 1)\n"
        "print(pool._idle[0]._process.pid, flush=True); time.sleep(60)"
    )
    root = str(Path(__file__).parents[2])
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=root, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert psutil.pid_exists(pid)
        process.kill()
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.05)


def test_children_that_cannot_start_are_a_fault_of_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.decode._START", "import no_such_decoder")
    before = open_descriptors()
    with pytest.raises(DecodeChildError, match="no_such_decoder"):
        DecodePool(encoding(), DecodeLimits(), 1)
    assert open_descriptors() == before


@pytest.mark.parametrize("cut", [{"fps": 8.0}, {"fps": None}, {"fps": None, "clip_stride": 30}])
def test_large_files_are_decoded_in_excerpts_to_the_same_frames(
    monkeypatch: pytest.MonkeyPatch, cut: dict[str, Any]
) -> None:
    expected = digests(decode([video(WAVES)], **cut))
    assert len(expected) > 1
    small_memory = "from pipeline import frames; frames._LARGEST_IN_MEMORY_BYTES = 1000; from pipeline.decode_child"
    monkeypatch.setattr("pipeline.decode._START", _START.replace("from pipeline.decode_child", small_memory))
    assert digests(decode([video(WAVES)], **cut)) == expected


def test_decoder_versions_are_told_without_loading_a_decoder() -> None:
    versions = decoder_versions()
    assert versions["av"] == importlib.metadata.version("av")
    assert "decord" in versions or "decord2" in versions
    program = (
        "import sys, pipeline.decode as d; d.decoder_versions(); "
        "assert not {'av', 'decord', 'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
