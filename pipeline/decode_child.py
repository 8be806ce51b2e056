"""The program of a decode child: takes one media file after another from its parent and gives back clips.

Not imported for its decoders by anything else: `decode` starts it as a process of its own, with an empty environment,
because decoders hang, leak, crash and are attacked through the files they read. Once its decoders are loaded, and
before it sees the first byte of a file, the child enters the `sandbox`; memory, computing time and what it writes are
limited as well. It imports neither torch nor ray.

The parent writes requests to a socket and the child answers each (`_serve`); while it works it sends a sign of life at
least every second, so that silence means a hang. Media come as open file descriptors, and nothing in here knows a name
of them. The frames of a clip go through one memory file that both map, one clip at a time.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import mmap
import os
import pkgutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import sandbox
from pipeline.config import DecodeLimits
from pipeline.cutting import Cover, CutRules, choose_bucket, clip_spans, cover
from pipeline.errors import RejectionError
from pipeline.frames import ClipReader, Scan, decoder_class, glance_at_video, open_picture, scan_video
from pipeline.records import Bucket

MAX_MESSAGE_BYTES = 1 << 16
# What a child may write into files: its log, in which the parent reads what went wrong and the child whether decord
# complained.
_MAX_LOG_BYTES = 1 << 20
_SIGN_OF_LIFE_S = 1.0
_MAX_TEXT = 1000

# --- making clips ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """What the parent asks of every file."""

    cut: CutRules
    limits: DecodeLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class _Video:
    """A video that has been looked through, and how it is cut."""

    scan: Scan
    bucket: Bucket
    shape: Cover
    starts: npt.NDArray[np.int64]
    reader: ClipReader

    def frames_of(self, clip_index: int, fps: float | None) -> npt.NDArray[np.int64]:
        return self.scan.timeline.frames_at(int(self.starts[clip_index]), self.bucket.num_frames, fps)


def _planned(media_fd: int, scan: Scan, rules: _Rules, sign_of_life: Callable[[], None]) -> _Video:
    cut, limits = rules.cut, rules.limits
    num_instants = scan.timeline.num_instants(cut.fps)
    bucket = choose_bucket(cut.buckets, "video", scan.width_px, scan.height_px, num_instants, cut.upscale)
    shape = _covering(bucket, scan.width_px, scan.height_px, limits)
    starts = clip_spans(num_instants, bucket.num_frames, cut.clip_stride, cut.clips_per_video)
    reader = ClipReader(media_fd, scan, shape, limits, sign_of_life)
    return _Video(scan=scan, bucket=bucket, shape=shape, starts=starts, reader=reader)


def _by_a_glance(
    media_fd: int, first_clip: int, rules: _Rules, memory: memoryview, sign_of_life: Callable[[], None]
) -> _Video | None:
    """The video, its first clip in the memory; None where a glance does not do, which means nothing."""
    with suppress(RejectionError):
        scan = glance_at_video(media_fd, rules.limits, sign_of_life)
        if scan is not None:
            video = _planned(media_fd, scan, rules, sign_of_life)
            is_one = first_clip < len(video.starts)
            frames = _frames_in(memory, video.bucket)
            if is_one and video.reader.read_plainly(video.frames_of(first_clip, rules.cut.fps), frames):
                return video
    return None


def _clips_of_video(
    media_fd: int, first_clip: int, rules: _Rules, memory: memoryview, sign_of_life: Callable[[], None]
) -> Iterator[dict[str, object]]:
    """Messages for the parent: one that the video is open, then one for each clip from `first_clip` on.

    Every clip is decoded as if it were the only one: whether decord or PyAV makes its frames does not depend on the
    clips before it, so that a child that takes over in the middle gives the same bytes.
    """
    cut, limits = rules.cut, rules.limits
    glanced_at = _by_a_glance(media_fd, first_clip, rules, memory, sign_of_life)
    video = glanced_at or _planned(media_fd, scan_video(media_fd, limits, sign_of_life), rules, sign_of_life)
    scan, bucket, timeline = video.scan, video.bucket, video.scan.timeline
    clip_fps = cut.fps if cut.fps is not None else scan.fps
    # A stream that breaks off does not say how much followed: one rejection stands for all of it.
    has_unknown_rest = scan.is_cut and cut.clips_per_video is None
    last_clip = len(video.starts) - 1
    if glanced_at and first_clip == last_clip:
        video.reader.close()
    yield {"type": "opened", "num_clips": len(video.starts) + has_unknown_rest}

    frames = _frames_in(memory, bucket)
    times_s = np.frombuffer(memory, dtype=np.float64, count=bucket.num_frames, offset=-(-bucket.num_bytes // 8) * 8)
    for clip_index in range(first_clip, len(video.starts)):
        try:
            indices = video.frames_of(clip_index, cut.fps)
            if glanced_at and clip_index == first_clip:
                decoder = decoder_class("decord")
            else:
                decoder = video.reader.read(indices, frames)
        except RejectionError as error:
            yield {"type": "rejected", "clip_index": clip_index, "reason": error.reason, "message": error.message}
            continue
        finally:
            if clip_index == last_clip:
                video.reader.close()
        times_s[:] = timeline.times_s[indices]
        start = int(video.starts[clip_index])
        if cut.fps is not None:
            start_s, end_s = start / cut.fps, (start + bucket.num_frames) / cut.fps
        else:
            stop = start + bucket.num_frames
            start_s = float(timeline.times_s[start])
            end_s = float(timeline.times_s[stop]) if stop < len(timeline.times_s) else timeline.end_s
        yield {
            "type": "clip",
            "clip_index": clip_index,
            "bucket": cut.buckets.index(bucket),
            "start_s": start_s,
            "end_s": end_s,
            "fps": clip_fps,
            "crop": video.shape.crop,
            "facts": {
                "width_px": scan.width_px,
                "height_px": scan.height_px,
                "num_frames": len(scan.pts),
                "fps": scan.fps,
                "duration_s": timeline.end_s,
                "codec": scan.codec,
                "decoder": decoder,
            },
        }
    if has_unknown_rest:
        message = f"the file ends inside a packet, {timeline.end_s:.3f} s after its first frame"
        yield {"type": "rejected", "clip_index": len(video.starts), "reason": "frames_missing", "message": message}


def _frames_in(memory: memoryview, bucket: Bucket) -> npt.NDArray[np.uint8]:
    """Where the frames of a clip lie, `(T, H, W, 3)`."""
    shape = (bucket.num_frames, bucket.height_px, bucket.width_px, 3)
    return np.frombuffer(memory, dtype=np.uint8, count=bucket.num_bytes).reshape(shape)


def _covering(bucket: Bucket, width_px: int, height_px: int, limits: DecodeLimits) -> Cover:
    shape = cover(bucket, width_px, height_px)
    if shape.width_px * shape.height_px > limits.max_picture_px:
        raise RejectionError(
            "too_large",
            f"{width_px}x{height_px} px become {shape.width_px}x{shape.height_px} to cover {bucket}; "
            f"--max-picture-px is {limits.max_picture_px}",
        )
    return shape


def _clip_of_image(media_fd: int, first_clip: int, rules: _Rules, memory: memoryview) -> Iterator[dict[str, object]]:
    """The messages for an image: that it is open, and its one clip."""
    cut, limits = rules.cut, rules.limits
    picture, codec = open_picture(media_fd, limits)
    bucket = choose_bucket(cut.buckets, "image", picture.width, picture.height, 1, cut.upscale)
    shape = _covering(bucket, picture.width, picture.height, limits)
    yield {"type": "opened", "num_clips": 1}
    if first_clip > 0:
        return
    from PIL import Image

    resized = picture.resize((shape.width_px, shape.height_px), Image.Resampling.BICUBIC)
    right, bottom = shape.left_px + bucket.width_px, shape.top_px + bucket.height_px
    pixels = np.asarray(resized.crop((shape.left_px, shape.top_px, right, bottom)))
    np.frombuffer(memory, dtype=np.uint8, count=bucket.num_bytes)[:] = pixels.reshape(-1)
    np.frombuffer(memory, dtype=np.float64, count=1, offset=-(-bucket.num_bytes // 8) * 8)[:] = 0.0
    yield {
        "type": "clip",
        "clip_index": 0,
        "bucket": cut.buckets.index(bucket),
        "start_s": 0.0,
        "end_s": 0.0,
        "fps": None,
        "crop": shape.crop,
        "facts": {
            "width_px": picture.width,
            "height_px": picture.height,
            "num_frames": 1,
            "fps": None,
            "duration_s": None,
            "codec": codec,
            "decoder": decoder_class("pillow"),
        },
    }


# --- serving the parent ---------------------------------------------------------------------------------------------


class _Parent:
    """The child's end of the conversation. Each message is one JSON object in one packet."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._last_sent_s = 0.0
        self.sign_of_life_every_s = _SIGN_OF_LIFE_S

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        """The next request and the file descriptors with it. Ends the process when the parent has gone."""
        data, descriptors, _, _ = socket.recv_fds(self._connection, MAX_MESSAGE_BYTES, 1)
        if not data:
            os._exit(0)
        return json.loads(data), list(descriptors)

    def send(self, message: Mapping[str, object]) -> None:
        texts = {name: text[:_MAX_TEXT] for name, text in message.items() if isinstance(text, str)}
        self._connection.sendall(json.dumps({**message, **texts}).encode("ascii"))
        self._last_sent_s = time.monotonic()

    def sign_of_life(self) -> None:
        """Says "alive", at most once in a while."""
        if time.monotonic() - self._last_sent_s >= self.sign_of_life_every_s:
            self.send({"type": "alive"})


def _messages(
    request: Mapping[str, Any], media_fd: int, rules: _Rules, memory: memoryview, parent: _Parent
) -> Iterator[dict[str, object]]:
    """All answers to one file: "opened", "clip" and "rejected" in order, then "end" for ever.

    A rejection with clip_index None is of the whole file and comes instead of "opened".
    """
    num_bytes, limits = os.fstat(media_fd).st_size, rules.limits
    try:
        if num_bytes == 0:
            raise RejectionError("empty_file", "the file has 0 bytes")
        if num_bytes > limits.max_file_bytes:
            raise RejectionError(
                "too_large", f"the file has {num_bytes} bytes; --max-file-bytes is {limits.max_file_bytes}"
            )
        if request["media_kind"] == "image":
            yield from _clip_of_image(media_fd, request["first_clip"], rules, memory)
        else:
            yield from _clips_of_video(media_fd, request["first_clip"], rules, memory, parent.sign_of_life)
    except RejectionError as error:
        yield {"type": "rejected", "clip_index": None, "reason": error.reason, "message": error.message}
    while True:
        yield {"type": "end"}


def _serve(parent: _Parent, memory: memoryview, report: Mapping[str, object]) -> None:
    request, _ = parent.receive()
    cut = request["cut"]
    buckets = tuple(Bucket(width_px=w, height_px=h, num_frames=t) for w, h, t in cut["buckets"])
    rules = _Rules(cut=CutRules(**{**cut, "buckets": buckets}), limits=DecodeLimits(**request["limits"]))
    parent.sign_of_life_every_s = min(_SIGN_OF_LIFE_S, rules.limits.decode_timeout_s / 4)
    parent.send({"type": "ready", "sandbox": report})
    answers: Iterator[dict[str, object]] = iter(())
    open_file: int | None = None
    while True:
        request, descriptors = parent.receive()
        try:
            if request["op"] == "open":
                del answers
                if open_file is not None:
                    os.close(open_file)
                # The log is about this file only; the parent reads it when the child is lost.
                os.ftruncate(sys.stderr.fileno(), 0)
                (open_file,) = descriptors
                sandbox.limit_cpu_time(rules.limits.max_decode_cpu_s)
                answers = _messages(request, open_file, rules, memory, parent)
            answer = next(answers)
        except MemoryError as error:
            answer = {"type": "out_of_memory", "message": str(error)}
        except ImportError as error:
            # In the sandbox nothing can be imported any more: no fault of the file.
            answer = {"type": "incomplete", "message": str(error)}
        parent.send(answer)


def _load_decoders() -> None:
    """Imports all that decoding needs: in the sandbox no file can be opened. A missing library shows at the start."""
    import av
    import av.logging
    import decord  # noqa: F401
    import numpy.ma  # noqa: F401 - a median needs it
    import PIL.Image
    import PIL.ImageOps

    # PyAV imports some of its parts only when a file has a stream of their kind.
    for part in pkgutil.walk_packages(av.__path__, "av."):
        if part.name not in ("av.__main__", "av.datasets"):
            importlib.import_module(part.name)
    av.logging.set_level(av.logging.ERROR)
    # Or a file that ends as the one before it did seems to end well.
    av.logging.set_skip_repeated(False)
    PIL.Image.init()
    for package in ("decord", "av", "pillow"):
        decoder_class(package)


def main(arguments: list[str]) -> None:
    """Serves until the parent closes the connection.

    Args:
        arguments: file descriptors of the connection and of the memory file, the parent's process id, and the limit
            of the address space in bytes.
    """
    connection_fd, memory_fd, parent_pid, memory_bytes = map(int, arguments)
    faulthandler.enable()
    # Ctrl-C in a terminal reaches every process of the group; the parent decides when a child ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sandbox.end_with_parent(parent_pid)
    sandbox.limit_resources(memory_bytes, _MAX_LOG_BYTES)
    memory = memoryview(mmap.mmap(memory_fd, 0))
    os.close(memory_fd)
    _load_decoders()
    report = {**sandbox.enter(parent_pid), "memory_limit_bytes": memory_bytes}
    _serve(_Parent(socket.socket(fileno=connection_fd)), memory, report)
