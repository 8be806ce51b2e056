"""Real small videos and tars, and what chance and malice make of them, each mutant by its seed and number alone.

Not tests and no judgement: `judges` says what a mutant may lead to.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from builders import tar_bytes
from media import ffmpeg

WIDTH_PX, HEIGHT_PX, NUM_FRAMES, FPS = 128, 64, 45, 25
_CODE_BITS = 6

# Container and codec -> ffmpeg's flags.
VIDEO_KINDS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("mp4", "h264"): ("-c:v", "libx264", "-g", "12", "-bf", "2"),
    ("mp4", "hevc"): ("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none:keyint=12"),
    ("mp4", "mpeg4"): ("-c:v", "mpeg4", "-q:v", "3", "-movflags", "+faststart"),
    ("mp4", "mjpeg"): ("-c:v", "mjpeg", "-q:v", "3"),
    ("mkv", "h264"): ("-c:v", "libx264", "-g", "12", "-bf", "2"),
    ("mkv", "mjpeg"): ("-c:v", "mjpeg", "-q:v", "3"),
    ("webm", "vp9"): ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-g", "12"),
    ("webm", "vp8"): ("-c:v", "libvpx", "-deadline", "realtime", "-cpu-used", "8", "-g", "12", "-b:v", "800k"),
    ("avi", "mpeg4"): ("-c:v", "mpeg4", "-q:v", "3"),
    ("avi", "mjpeg"): ("-c:v", "mjpeg", "-q:v", "3"),
    ("ts", "h264"): ("-c:v", "libx264", "-g", "12", "-bf", "2"),
    ("ts", "hevc"): ("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none:keyint=12"),
}


def numbered_frames() -> np.ndarray:
    """Frames that carry their own number as black and white blocks in the upper half, over a picture that moves."""
    y, x = np.mgrid[0:HEIGHT_PX, 0:WIDTH_PX]
    frames = np.empty((NUM_FRAMES, HEIGHT_PX, WIDTH_PX, 3), dtype=np.uint8)
    side = WIDTH_PX // _CODE_BITS
    for n in range(NUM_FRAMES):
        frames[n] = np.stack([(x * 2 + n * 5) % 256, (y * 4 + n * 3) % 256, (x + y + n * 7) % 256], axis=-1)
        for bit in range(_CODE_BITS):
            frames[n, : HEIGHT_PX // 2, bit * side : (bit + 1) * side] = 255 * (n >> bit & 1)
    return frames


def number_of(frame: np.ndarray) -> int | None:
    """The number that a frame carries, or None where it cannot be read for sure."""
    side = WIDTH_PX // _CODE_BITS
    number = 0
    for bit in range(_CODE_BITS):
        level = float(frame[4 : HEIGHT_PX // 2 - 4, bit * side + 4 : (bit + 1) * side - 4].mean())
        if 80 < level < 175:
            return None
        number |= (level >= 175) << bit
    return number


@cache
def clean_video(container: str, codec: str) -> bytes:
    """The video of a kind, made once for each process."""
    return encoded(numbered_frames(), container, codec)


def encoded(frames: np.ndarray, container: str, codec: str) -> bytes:
    """A video of frames `(n, H, W, 3)`."""
    with tempfile.NamedTemporaryFile(suffix=".rgb") as raw:
        raw.write(frames.tobytes())
        raw.flush()
        size = f"{WIDTH_PX}x{HEIGHT_PX}"
        source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(FPS), "-i", raw.name)
        pixels = ("-pix_fmt", "yuvj420p" if codec == "mjpeg" else "yuv420p")
        return ffmpeg(*source, "-threads", "1", *VIDEO_KINDS[container, codec], *pixels, suffix=f".{container}")


# --- what is done to bytes ------------------------------------------------------------------------------------------


def _place(data: bytes, rng: np.random.Generator, length: int) -> int:
    return int(rng.integers(0, max(1, len(data) - length)))


def _truncate(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(0, len(data)))]


def _lose_the_tail(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: len(data) - int(rng.integers(1, 1 + len(data) // 8))]


def _flip_bits(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        changed[_place(data, rng, 1)] ^= 1 << int(rng.integers(0, 8))
    return bytes(changed)


def _flip_one_header_bit(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    place = int(rng.integers(0, min(1500, len(data))))
    changed[place if rng.integers(0, 2) else len(data) - 1 - place] ^= 1 << int(rng.integers(0, 8))
    return bytes(changed)


def _overwrite(data: bytes, rng: np.random.Generator) -> bytes:
    length = int(rng.integers(1, 400))
    start = _place(data, rng, length)
    new = bytes(length) if rng.integers(0, 2) else rng.bytes(length)
    return data[:start] + new + data[start + length :]


def _extreme_number(data: bytes, rng: np.random.Generator) -> bytes:
    start = _place(data, rng, 4) if rng.integers(0, 2) else int(rng.integers(0, min(1200, len(data) - 4)))
    number = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x00FFFFFF)[int(rng.integers(0, 6))]
    return data[:start] + struct.pack(">I" if rng.integers(0, 2) else "<I", number) + data[start + 4 :]


def _delete(data: bytes, rng: np.random.Generator) -> bytes:
    length = int(rng.integers(1, 1 + len(data) // 4))
    start = _place(data, rng, length)
    return data[:start] + data[start + length :]


def _insert(data: bytes, rng: np.random.Generator) -> bytes:
    start = _place(data, rng, 1)
    return data[:start] + rng.bytes(int(rng.integers(1, 2000))) + data[start:]


def _repeat(data: bytes, rng: np.random.Generator) -> bytes:
    length = int(rng.integers(1, 1 + len(data) // 4))
    start, target = _place(data, rng, length), _place(data, rng, 1)
    return data[:target] + data[start : start + length] + data[target:]


def _swap(data: bytes, rng: np.random.Generator) -> bytes:
    length = int(rng.integers(1, 1 + len(data) // 8))
    one, other = sorted((_place(data, rng, length), _place(data, rng, length)))
    if one + length > other:
        return _overwrite(data, rng)
    parts = (data[:one], data[other : other + length], data[one + length : other], data[one : one + length])
    return b"".join(parts) + data[other + length :]


def _promise_more_frames(data: bytes, rng: np.random.Generator) -> bytes:
    """Raises a count or a length in the header of MP4, AVI or Matroska; elsewhere an extreme number."""
    changed = bytearray(data)
    factor = (2, 10, 100_000)[int(rng.integers(0, 3))]
    boxes = [box for box in (b"stts", b"stsz", b"mdhd", b"tkhd", b"mvhd", b"ctts", b"stsc", b"elst") if box in data]
    if data[4:8] == b"ftyp" and boxes:
        box = boxes[int(rng.integers(0, len(boxes)))]
        # Behind the type: version and flags, then counts and lengths of 32 bits.
        place = data.index(box) + 4 + 4 * int(rng.integers(1, 5))
        number = struct.unpack_from(">I", data, place)[0]
        struct.pack_into(">I", changed, place, min(0xFFFFFFFF, max(1, number) * factor))
    elif data[8:11] == b"AVI":
        place = data.index(b"avih") + 8 + 16 if rng.integers(0, 2) else data.index(b"strh") + 8 + 32
        struct.pack_into("<I", changed, place, min(0xFFFFFFFF, NUM_FRAMES * factor))
    elif b"\x44\x89\x88" in data:
        struct.pack_into(">d", changed, data.index(b"\x44\x89\x88") + 3, 1000.0 * NUM_FRAMES / FPS * factor)
    else:
        return _extreme_number(data, rng)
    return bytes(changed)


MUTATIONS: Mapping[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "truncate": _truncate,
    "lose the tail": _lose_the_tail,
    "flip bits": _flip_bits,
    "flip one header bit": _flip_one_header_bit,
    "overwrite": _overwrite,
    "extreme number": _extreme_number,
    "delete": _delete,
    "insert": _insert,
    "repeat": _repeat,
    "swap": _swap,
    "promise more frames": _promise_more_frames,
}


@dataclass(frozen=True, slots=True)
class VideoMutant:
    """A damaged video and what it was."""

    number: int
    container: str
    codec: str
    mutation: str
    data: bytes

    @property
    def name(self) -> str:
        return f"{self.number}: {self.container} {self.codec}, {self.mutation}"


def video_mutant(seed: int, number: int) -> VideoMutant:
    """The mutant of a number. Neighbours go through the kinds and the mutations in turn."""
    rng = np.random.default_rng([seed, number])
    kinds = list(VIDEO_KINDS)
    container, codec = kinds[number % len(kinds)]
    mutation = list(MUTATIONS)[int(rng.integers(0, len(MUTATIONS)))]
    data = MUTATIONS[mutation](clean_video(container, codec), rng)
    return VideoMutant(number, container, codec, mutation, data)


# --- tars and what lies in them ---------------------------------------------------------------------------------------

CAPTIONS = (
    "",
    "plain",
    "caf\u00e9 \u732b",
    "\u202eright to left\u202c",
    "line\r\nbreak\ttab",
    "\x1b[31mred",
    "e\u0301" * 50,
)


@dataclass(frozen=True, slots=True)
class Sample:
    """A member of a clean tar: what must come out of it, or nothing."""

    key: str
    media: bytes
    caption: str


@cache
def clean_samples() -> tuple[Sample, ...]:
    rng = np.random.default_rng(7)
    sizes = rng.integers(1, 3000, len(CAPTIONS))
    return tuple(
        Sample(f"{n:05d}", rng.bytes(int(size)), caption)
        for n, (size, caption) in enumerate(zip(sizes, CAPTIONS, strict=True))
    )


def _hostile_text(rng: np.random.Generator) -> bytes:
    return (
        "caf\u00e9".encode("latin-1"),
        b"\xff\xfe" + "utf-16".encode("utf-16"),
        b"nul\0nul",
        "\ud800".encode("utf-8", "surrogatepass"),
        rng.bytes(50),
        b"long " * (1 << 20),
    )[int(rng.integers(0, 6))]


def _hostile_json(rng: np.random.Generator) -> bytes:
    return (
        b"{",
        b"[1]",
        b'"text"',
        b'{"caption": "\\ud800"}',
        b'{"caption": 1, "caption": 2}',
        b'{"caption": {"nested": []}}',
        b'{"sha256": "' + b"0" * 64 + b'"}',
        b"[" * 100_000,
        b'{"a": 1e999, "b": NaN}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"\xff" * 10,
        json.dumps({"x" * 100_000: None, "\u0000": "\u0000"}).encode(),
    )[int(rng.integers(0, 12))]


@dataclass(frozen=True, slots=True)
class TarMutant:
    """A damaged tar, or a whole one with hostile texts in it; `hostile_key` is the sample that got them."""

    number: int
    mutation: str
    hostile_key: str | None
    data: bytes


def tar_mutant(seed: int, number: int) -> TarMutant:
    """The mutant of a number: odd ones have damaged bytes, even ones hostile captions, JSON or names."""
    rng = np.random.default_rng([seed, number, 1])
    samples = clean_samples()
    members: list[tuple[str, bytes]] = []
    hostile = samples[int(rng.integers(0, len(samples)))].key if number % 2 == 0 else None
    what = ("caption", "json", "name", "twice")[int(rng.integers(0, 4))] if hostile else ""
    for sample in samples:
        text, fields = (
            sample.caption.encode(),
            json.dumps({"sha256": hashlib.sha256(sample.media).hexdigest()}).encode(),
        )
        key = sample.key
        if key == hostile:
            text = _hostile_text(rng) if what == "caption" else text
            fields = _hostile_json(rng) if what == "json" else fields
            if what == "name":
                key = ("../" + key, "/abs" + key, "x" * 3000, "a\\b", "c\x07", "d\udc80")[int(rng.integers(0, 6))]
        members += [(f"{key}.mp4", sample.media), (f"{key}.txt", text), (f"{key}.json", fields)]
        if key == hostile and what == "twice":
            members.append((f"{key}.mp4", sample.media))
    data = tar_bytes(members)
    if hostile is not None:
        return TarMutant(number, f"hostile {what}", hostile, data)
    mutation = [name for name in MUTATIONS if name != "promise more frames"][int(rng.integers(0, len(MUTATIONS) - 1))]
    return TarMutant(number, mutation, None, MUTATIONS[mutation](data, rng))


def tar_file(mutant: TarMutant, folder: Path) -> Path:
    path = folder / f"{mutant.number:06d}.tar"
    path.write_bytes(mutant.data)
    return path
