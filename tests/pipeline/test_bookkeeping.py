"""Real streams with pieces taken out: what is missing is noticed, and what is whole is let pass."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
from media import ffmpeg, moving_pattern

from pipeline.bookkeeping import TransportCheck, avi_packets_before_damage, check_transport_stream

# The video's packet identifier in what ffmpeg writes; 257 is the sound.
VIDEO = 256


def opened(data: bytes) -> int:
    descriptor = os.memfd_create("stream", os.MFD_CLOEXEC)
    os.write(descriptor, data)
    return descriptor


def checked(data: bytes, stream: int = VIDEO) -> TransportCheck:
    descriptor = opened(data)
    try:
        return check_transport_stream(descriptor, stream)
    finally:
        os.close(descriptor)


def stream_problem(data: bytes) -> str | None:
    return checked(data).problem


def whole_chunks(data: bytes) -> int | None:
    descriptor = opened(data)
    try:
        return avi_packets_before_damage(descriptor, 0)
    finally:
        os.close(descriptor)


@pytest.fixture(scope="module")
def stream() -> bytes:
    return moving_pattern("160x120", "25", 3, "-c:v", "mpeg2video", "-q:v", "4", suffix=".ts")


@pytest.fixture(scope="module")
def avi() -> bytes:
    return moving_pattern("160x120", "25", 2, "-c:v", "mjpeg", "-pix_fmt", "yuvj420p", suffix=".avi")


def test_whole_transport_streams_pass_in_each_of_their_forms(stream: bytes) -> None:
    packets = np.frombuffer(stream, dtype=np.uint8).reshape(-1, 188)
    with_times = np.concatenate([np.zeros((len(packets), 4), np.uint8), packets], axis=1)
    with_checksums = np.concatenate([packets, np.full((len(packets), 16), 7, np.uint8)], axis=1)
    assert stream_problem(stream) is None
    assert stream_problem(with_times.tobytes()) is None
    assert stream_problem(with_checksums.tobytes()) is None
    sound = ("-f", "lavfi", "-i", "sine=duration=2", "-c:a", "mp2")
    assert stream_problem(ffmpeg("-f", "lavfi", "-i", "testsrc=size=160x120:duration=2", *sound, suffix=".ts")) is None


def video_places(stream: bytes) -> list[int]:
    """Where the packets of the video with a payload are."""
    return [
        place
        for place in range(0, len(stream), 188)
        if struct.unpack_from(">H", stream, place + 1)[0] & 0x1FFF == VIDEO and stream[place + 3] & 0x10
    ]


def test_a_packet_that_is_sent_twice_is_no_loss(stream: bytes) -> None:
    middle = len(stream) // 188 // 2 * 188
    assert stream_problem(stream[:middle] + stream[middle - 188 : middle] + stream[middle:]) is None


@pytest.mark.parametrize("block", [1 << 15, 7])
def test_every_kind_of_loss_in_a_transport_stream_is_noticed(
    stream: bytes, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.bookkeeping._TS_PACKETS_PER_READ", block)
    middle = len(stream) // 188 // 2 * 188
    damaged = bytearray(stream)
    damaged[video_places(stream)[40] + 1] |= 0x80
    assert stream_problem(stream) is None
    for place in video_places(stream)[1:-1:7]:
        assert "missing" in str(stream_problem(stream[:place] + stream[place + 188 :]))
    assert "no transport packet" in str(stream_problem(stream[:middle] + stream[middle + 1 :] + b"\0"))
    assert "no transport packet" in str(stream_problem(stream[:middle] + b"\0" + stream[middle:-1]))
    assert "itself" in str(stream_problem(bytes(damaged)))
    assert "does not begin" in str(stream_problem(stream[:376] + b"\0" + stream[376:]))
    assert "does not begin" in str(stream_problem(bytes(1000) + stream))


def test_other_streams_of_a_transport_stream_may_lose_packets_and_count_as_they_like() -> None:
    sound = ("-f", "lavfi", "-i", "sine=duration=2", "-c:a", "mp2")
    both = ffmpeg("-f", "lavfi", "-i", "testsrc=size=160x120:duration=2", *sound, suffix=".ts")
    rewritten = bytearray(both)
    own = set(video_places(both))
    for place in range(0, len(both), 188):
        if place not in own and struct.unpack_from(">H", both, place + 1)[0] & 0x1FFF != VIDEO:
            rewritten[place + 3] = rewritten[place + 3] & 0xF0 | place // 188 * 7 % 16
            rewritten[place + 1] |= 0x80
    null = b"\x47\x1f\xff\x15" + bytes(184)
    assert checked(bytes(rewritten)) == checked(both) == TransportCheck(None)
    middle = len(both) // 376 * 188
    assert checked(both[:middle] + null * 3 + both[middle:]) == TransportCheck(None)
    assert "itself" in str(checked(bytes(rewritten), 257).problem)


@pytest.mark.parametrize("block", [1 << 15, 7, 1])
def test_a_jump_that_is_announced_in_a_packet_of_its_own_is_no_loss(
    stream: bytes, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.bookkeeping._TS_PACKETS_PER_READ", block)
    places = video_places(stream)
    before, gone, behind = places[30], places[31], places[32]
    announcement = b"\x47\x01\x00\x20\xb7\x80" + bytes(182)
    without = stream[:gone] + stream[gone + 188 : behind]
    assert before < gone
    assert "missing" in str(stream_problem(without + stream[behind:]))
    assert stream_problem(without + announcement + stream[behind:]) is None


def test_segments_one_behind_the_other_may_each_count_from_the_beginning(stream: bytes) -> None:
    assert checked(stream + stream + stream) == TransportCheck(None)
    first = video_places(stream)[0]
    assert "missing" in str(stream_problem(stream + stream[first:]))


def test_a_recording_may_begin_and_end_inside_a_packet(stream: bytes) -> None:
    assert checked(stream[100:]) == checked(bytes(5) + stream) == TransportCheck(None)
    assert checked(stream[:-1]) == checked(stream[:-187]) == TransportCheck(None, ends_inside_packet=True)
    assert checked(stream[:-400] + bytes(400)) == TransportCheck(None, ends_inside_packet=True)
    assert checked(stream + bytes(18800)) == TransportCheck(None, ends_inside_packet=True)


def test_a_whole_avi_and_one_that_ends_early_have_no_damage_in_the_middle(avi: bytes) -> None:
    assert whole_chunks(avi) is None
    assert whole_chunks(avi[: len(avi) // 2]) is None
    assert whole_chunks(b"") is None


def test_the_chunks_before_a_damage_in_an_avi_are_counted(avi: bytes) -> None:
    chunks = [place for place in range(len(avi) - 4) if avi[place : place + 4] == b"00dc" and place % 2 == 0]
    first_frame = avi.index(b"movi") + 4
    frames = [place for place in chunks if place >= first_frame]
    assert whole_chunks(avi[: frames[20]] + b"\0\0\0\0" + avi[frames[20] + 4 :]) == 20
    assert whole_chunks(avi[: frames[20] + 6] + b"\xff" + avi[frames[20] + 7 :]) in (None, 20)
    assert whole_chunks(avi[: frames[20] + 100] + avi[frames[21] + 50 :]) == 21


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack("<4sI", name, len(data)) + data + bytes(len(data) % 2)


def test_chunks_of_an_avi_that_nobody_knows_are_no_damage_outside_the_media(avi: bytes) -> None:
    media = avi.index(b"movi") - 8
    for behind in (bytes(5000), chunk(b"_PMX", b"<xml>"), chunk(b"DISP", bytes(40)), chunk(b"JUNQ", b"Q" * 99)):
        assert whole_chunks(avi + behind) is None
        assert whole_chunks(avi + behind + bytes(600)) is None
    assert whole_chunks(avi[:media] + chunk(b"IDIT", b"MON NOV 23 2026") + avi[media:]) is None


def test_zeros_between_the_last_frame_and_the_end_of_the_media_are_no_damage(avi: bytes) -> None:
    media, index = avi.index(b"movi") - 8, avi.index(b"idx1")
    (num_bytes,) = struct.unpack_from("<I", avi, media + 4)
    padded = avi[: media + 4] + struct.pack("<I", num_bytes + 4096) + avi[media + 8 : index] + bytes(4096) + avi[index:]
    assert whole_chunks(padded) is None
    assert whole_chunks(avi[:index] + bytes(4096)) is None


def test_what_no_avi_has_among_its_media_is_damage(avi: bytes) -> None:
    first_frame = avi.index(b"movi") + 4
    (num_bytes,) = struct.unpack_from("<I", avi, first_frame + 4)
    second = first_frame + 8 + num_bytes + num_bytes % 2
    for name in (b"JUNQ", b"DISP", bytes(4), b"\xff\xfe\xfd\xfc"):
        assert whole_chunks(avi[:second] + name + avi[second + 4 :]) == 1
    into_the_index = struct.pack("<I", avi.index(b"idx1") + 8 - second - 8)
    assert whole_chunks(avi[: second + 4] + into_the_index + avi[second + 8 :]) == 1
