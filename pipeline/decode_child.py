"""The program of a decode child: takes one media file after another from its parent and gives back clips.

Not imported for its decoders by anything else: `decode` starts it as a process of its own, with an empty environment,
because decoders hang, leak, crash and are attacked through the files they read. The child gives away what it does not
need before it sees the first byte of a file: the network, other programs, memory beyond a limit, core dumps. It
imports neither torch nor ray.

The parent writes requests to a socket and the child answers each (`_serve`); while it works it sends a sign of life at
least every second, so that silence means a hang. Media come as open file descriptors. The frames of a clip go through
one memory file that both map, one clip at a time.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import mmap
import os
import platform
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import DecodeLimits
from pipeline.cutting import Cover, CutRules, choose_bucket, clip_spans, cover
from pipeline.errors import RejectionError
from pipeline.frames import ClipReader, decoder_class, open_picture, scan_video
from pipeline.records import Bucket

MAX_MESSAGE_BYTES = 1 << 16
# What a child may write into files: its log, in which the parent reads what went wrong and the child whether decord
# complained.
_MAX_LOG_BYTES = 1 << 20
_SIGN_OF_LIFE_S = 1.0
_MAX_TEXT = 1000

# --- giving away rights ---------------------------------------------------------------------------------------------

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 1, 38, 22, 2
# AUDIT_ARCH_* and syscall numbers: no new socket, no other program, no look into other processes, and no io_uring,
# which opens sockets without the system call.
_SYSCALLS: Mapping[str, tuple[int, tuple[int, ...]]] = {
    #            socket execve execveat ptrace io_uring_setup process_vm_readv process_vm_writev pidfd_getfd
    "x86_64": (0xC000003E, (41, 59, 322, 101, 425, 310, 311, 438)),
    "aarch64": (0xC00000B7, (198, 221, 281, 117, 425, 270, 271, 438)),
}
_X32_SYSCALLS = 0x40000000


def _seccomp_filter(architecture: int, refused: tuple[int, ...]) -> bytes:
    """A classic BPF program: EPERM for the refused calls and for every call of another architecture.

    The layouts are those of `struct sock_filter` and `struct seccomp_data` in Linux's linux/filter.h and seccomp.h.
    """
    load, jump_if_equal, jump_if_at_least, answer = 0x20, 0x15, 0x35, 0x06
    allow, refuse_with_eperm = 0x7FFF0000, 0x00050001
    refuse = 5 + len(refused)  # the last step; jumps count from the step behind the jump
    steps = [
        (load, 0, 0, 4),
        (jump_if_equal, 0, refuse - 2, architecture),
        (load, 0, 0, 0),
        (jump_if_at_least, refuse - 4, 0, _X32_SYSCALLS),
        *((jump_if_equal, refuse - (5 + number), 0, call) for number, call in enumerate(refused)),
        (answer, 0, 0, allow),
        (answer, 0, 0, refuse_with_eperm),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def _refuse_network() -> str:
    """Installs the filter for this process and all its threads to come; returns what came of it, in words."""
    if platform.machine() not in _SYSCALLS:
        return f"open: no filter for {platform.machine()}"
    code = _seccomp_filter(*_SYSCALLS[platform.machine()])
    steps = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: a count, padding, a pointer.
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(steps)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        return f"open: the kernel refused the filter ({os.strerror(ctypes.get_errno())})"
    try:
        socket.socket().close()
    except PermissionError:
        return "refused by seccomp"
    return "open: the filter is in place and did not hold"


def _enter_sandbox(parent_pid: int, memory_bytes: int) -> dict[str, object]:
    """Gives away every right that decoding does not need; returns the report of it.

    The kernel sends the death signal when the *thread* that started this process ends, so that thread must live as
    long as the children shall.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    dies_with_parent = libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0
    if os.getppid() != parent_pid:
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_LOG_BYTES, _MAX_LOG_BYTES))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    return {
        "network": _refuse_network(),
        "environment": sorted(os.environ),
        "memory_limit_bytes": memory_bytes,
        "dies_with_parent": dies_with_parent,
    }


# --- making clips ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """What the parent asks of every file."""

    cut: CutRules
    limits: DecodeLimits


def _clips_of_video(
    path: str, first_clip: int, rules: _Rules, memory: memoryview, sign_of_life: Callable[[], None]
) -> Iterator[dict[str, object]]:
    """Messages for the parent: one that the video is open, then one for each clip from `first_clip` on.

    Every clip is decoded as if it were the only one: whether decord or PyAV makes its frames does not depend on the
    clips before it, so that a child that takes over in the middle gives the same bytes.
    """
    cut, limits = rules.cut, rules.limits
    scan = scan_video(path, limits, sign_of_life)
    timeline = scan.timeline
    num_instants = timeline.num_instants(cut.fps)
    bucket = choose_bucket(cut.buckets, "video", scan.width_px, scan.height_px, num_instants, cut.upscale)
    shape = _covering(bucket, scan.width_px, scan.height_px, limits)
    starts = clip_spans(num_instants, bucket.num_frames, cut.clip_stride, cut.clips_per_video)
    clip_fps = cut.fps if cut.fps is not None else scan.fps
    reader = ClipReader(path, scan, shape, limits, sign_of_life)
    yield {"type": "opened", "num_clips": len(starts)}

    shape_of_clip = (bucket.num_frames, bucket.height_px, bucket.width_px, 3)
    frames = np.frombuffer(memory, dtype=np.uint8, count=bucket.num_bytes).reshape(shape_of_clip)
    times_s = np.frombuffer(memory, dtype=np.float64, count=bucket.num_frames, offset=-(-bucket.num_bytes // 8) * 8)
    for clip_index in range(first_clip, len(starts)):
        start = int(starts[clip_index])
        try:
            indices = timeline.frames_at(start, bucket.num_frames, cut.fps)
            decoder = reader.read(indices, frames)
        except RejectionError as error:
            yield {"type": "rejected", "clip_index": clip_index, "reason": error.reason, "message": error.message}
            continue
        times_s[:] = timeline.times_s[indices]
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
            "crop": shape.crop,
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


def _covering(bucket: Bucket, width_px: int, height_px: int, limits: DecodeLimits) -> Cover:
    shape = cover(bucket, width_px, height_px)
    if shape.width_px * shape.height_px > limits.max_picture_px:
        raise RejectionError(
            "too_large",
            f"{width_px}x{height_px} px become {shape.width_px}x{shape.height_px} to cover {bucket}; "
            f"--max-picture-px is {limits.max_picture_px}",
        )
    return shape


def _clip_of_image(path: str, first_clip: int, rules: _Rules, memory: memoryview) -> Iterator[dict[str, object]]:
    """The messages for an image: that it is open, and its one clip."""
    cut, limits = rules.cut, rules.limits
    picture, codec = open_picture(path, limits)
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
    request: Mapping[str, Any], path: str, rules: _Rules, memory: memoryview, parent: _Parent
) -> Iterator[dict[str, object]]:
    """All answers to one file: "opened", "clip" and "rejected" in order, then "end" for ever.

    A rejection with clip_index None is of the whole file and comes instead of "opened".
    """
    num_bytes, limits = os.stat(path).st_size, rules.limits
    try:
        if num_bytes == 0:
            raise RejectionError("empty_file", "the file has 0 bytes")
        if num_bytes > limits.max_file_bytes:
            raise RejectionError(
                "too_large", f"the file has {num_bytes} bytes; --max-file-bytes is {limits.max_file_bytes}"
            )
        if request["media_kind"] == "image":
            yield from _clip_of_image(path, request["first_clip"], rules, memory)
        else:
            yield from _clips_of_video(path, request["first_clip"], rules, memory, parent.sign_of_life)
    except RejectionError as error:
        yield {"type": "rejected", "clip_index": None, "reason": error.reason, "message": error.message}
    while True:
        yield {"type": "end"}


def _serve(parent: _Parent, memory: memoryview, sandbox: Mapping[str, object]) -> None:
    request, _ = parent.receive()
    cut = request["cut"]
    buckets = tuple(Bucket(width_px=w, height_px=h, num_frames=t) for w, h, t in cut["buckets"])
    rules = _Rules(cut=CutRules(**{**cut, "buckets": buckets}), limits=DecodeLimits(**request["limits"]))
    parent.sign_of_life_every_s = min(_SIGN_OF_LIFE_S, rules.limits.decode_timeout_s / 4)
    _load_decoders()
    parent.send({"type": "ready", "sandbox": sandbox})
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
                answers = _messages(request, f"/proc/self/fd/{open_file}", rules, memory, parent)
            answer = next(answers)
        except MemoryError as error:
            answer = {"type": "out_of_memory", "message": str(error)}
        parent.send(answer)


def _load_decoders() -> None:
    """Imports what decoding needs before the first file, so that a missing library shows at the start."""
    import av
    import av.logging
    import decord  # noqa: F401
    import PIL.Image

    av.logging.set_level(av.logging.ERROR)
    PIL.Image.preinit()


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
    sandbox = _enter_sandbox(parent_pid, memory_bytes)
    memory = memoryview(mmap.mmap(memory_fd, 0))
    os.close(memory_fd)
    _serve(_Parent(socket.socket(fileno=connection_fd)), memory, sandbox)
