"""The program of a decode child: takes one media file after another from its parent and gives back clips.

Not imported for its decoders by anything else: `decode` starts it as a process of its own, with an empty environment,
because decoders hang, leak, crash and are attacked through the files they read. The child gives away what it does not
need before it sees the first byte of a file: the network, other programs, memory beyond a limit, core dumps. It
imports neither torch nor ray.

The parent writes requests to a socket and the child answers each (`_serve`); while it works it sends a sign of life at
least every second, so that silence means a hang. Media come as open file descriptors. The frames of a clip go through
one memory file that both map, one clip at a time.

decord decodes where it is known to be right; PyAV decodes what decord refuses, and checks what decord gave with
complaints. PyAV is run strictly: what it cannot decode without error is rejected.
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
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.config import DecodeLimits
from pipeline.cutting import Cover, CutRules, Timeline, choose_bucket, clip_spans, cover
from pipeline.errors import RejectionError
from pipeline.records import Bucket

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from PIL import Image

MAX_MESSAGE_BYTES = 1 << 16
# What a child may write into files: its log, which the parent reads when something went wrong.
MAX_LOG_BYTES = 1 << 20
_SIGN_OF_LIFE_S = 1.0
_MAX_TEXT = 1000

CONTAINERS = ("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo")
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg")
_CODEC_DECODERS = (*CODECS, "libdav1d", "libvpx", "libvpx-vp9")
PIXEL_FORMATS = frozenset(
    (
        *(f"yuv{kind}p" for kind in ("420", "422", "444", "j420", "j422", "j444")),
        *(f"yuv{kind}p{bits}le" for kind in ("420", "422", "444") for bits in (10, 12)),
        *("yuva420p", "nv12", "gray", "gray10le", "gray12le", "gbrp", "gbrp10le", "gbrp12le"),
    )
)
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")

# Where decord 0.6 and its FFmpeg 4.1 were measured to number frames right. In MPEG streams it repeats frames without
# a word, in AVI it has no times.
_DECORD_CONTAINERS = ("mov", "matroska")
_DECORD_CODECS = frozenset(CODECS) - {"av1"}
# decord and PyAV scale with the same filter from different FFmpegs: measured 0.6 levels apart on the average.
_AGREEMENT_LEVELS = 4.0
# Frames that decord takes in one call; the child gives no sign of life in it.
_DECORD_FRAMES_PER_CALL = 8
_DECORD_SKIPS_PER_CALL = 64

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
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_LOG_BYTES, MAX_LOG_BYTES))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    return {
        "network": _refuse_network(),
        "environment": sorted(os.environ),
        "memory_limit_bytes": memory_bytes,
        "dies_with_parent": dies_with_parent,
    }


# --- looking at a video ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """What the parent asks of every file."""

    cut: CutRules
    limits: DecodeLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scan:
    """What a video file holds, from its headers, all its packets and its first picture.

    Attributes:
        pts: `(n,)` int64, strictly rising, presentation times of the frames that can be shown, in ticks.
        key_frames: rising indices into `pts` of the frames that decoding can start at.
        lost_pts: the time of a last packet that is cut off; it is not among `pts`.
        orientation: the display matrix (a, b, c, d), each -1, 0 or 1: a pixel (x, y) is shown at (ax + cy, bx + dy).
        width_px, height_px: of the picture as it is shown.
    """

    container: str
    codec: str
    num_video_streams: int
    timeline: Timeline
    pts: npt.NDArray[np.int64]
    key_frames: npt.NDArray[np.int64]
    lost_pts: int | None
    orientation: tuple[int, int, int, int]
    width_px: int
    height_px: int

    @property
    def fps(self) -> float:
        """Frames per second on the average."""
        return len(self.pts) / self.timeline.end_s

    @property
    def is_turned(self) -> bool:
        return self.orientation[0] == 0


def _av_error_text(error: Exception) -> str:
    """The message with FFmpeg's last log line, without the path."""
    log = getattr(error, "log", None)
    said = f" ({log[2].strip()})" if log else ""
    return f"{getattr(error, 'strerror', None) or error}{said}"


def _open_container(path: str, limits: DecodeLimits) -> InputContainer:
    import av

    try:
        return av.open(
            path,
            container_options={
                "protocol_whitelist": "file",
                "format_whitelist": ",".join(CONTAINERS),
                "codec_whitelist": ",".join(_CODEC_DECODERS),
                # Without presentation times in the container (AVI) they follow from the decoding times.
                "fflags": "+genpts",
            },
        )
    except MemoryError:
        raise
    except (av.error.FFmpegError, ValueError) as error:
        text = _av_error_text(error)
        if "not on whitelist" in text:
            raise RejectionError("not_allowed", f"container: {text}; allowed: {', '.join(CONTAINERS)}") from error
        raise RejectionError("unreadable", f"no allowed container was recognised: {text}") from error


def _choose_stream(container: InputContainer, limits: DecodeLimits) -> tuple[VideoStream, int]:
    """The first video stream that is no cover picture, after the limits of the header; and how many there are."""
    import av

    if len(container.streams) > limits.max_streams:
        raise RejectionError(
            "too_large", f"the file has {len(container.streams)} streams; --max-streams is {limits.max_streams}"
        )
    pictures = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams:
        raise RejectionError("no_video", f"none of the file's {len(container.streams)} streams is a video")
    stream = streams[0]
    context = stream.codec_context
    codec = context.codec.canonical_name if context is not None else "unknown"
    if codec not in CODECS:
        raise RejectionError("not_allowed", f"codec {codec}; allowed: {', '.join(CODECS)}")
    _check_picture(context.width, context.height, limits)
    header_s = 0.0 if stream.duration is None or stream.time_base is None else float(stream.duration * stream.time_base)
    _check_length(stream.frames, header_s, limits)
    return stream, len(streams)


def _check_picture(width_px: int, height_px: int, limits: DecodeLimits) -> None:
    if width_px < 1 or height_px < 1:
        raise RejectionError("unreadable", f"the header gives a picture of {width_px}x{height_px} px")
    if width_px * height_px > limits.max_picture_px:
        raise RejectionError(
            "too_large",
            f"the picture is {width_px}x{height_px} px = {width_px * height_px}; --max-picture-px is "
            f"{limits.max_picture_px}",
        )


def _check_length(num_frames: int, duration_s: float, limits: DecodeLimits) -> None:
    if num_frames > limits.max_frames:
        raise RejectionError("too_large", f"the video has {num_frames} frames; --max-frames is {limits.max_frames}")
    if duration_s > limits.max_duration_s:
        raise RejectionError(
            "too_large", f"the video lasts {duration_s:.1f} s; --max-duration-s is {limits.max_duration_s:g}"
        )


@dataclass(slots=True)
class _Packets:
    """The packets of a stream: presentation times, which can be started at, and what the demuxer complained about."""

    pts: list[int]
    is_key: list[bool]
    num_seen: int
    last_duration: int
    last_pts: int
    lost_pts: int | None
    ended_early: bool


def _read_packets(
    container: InputContainer, stream: VideoStream, limits: DecodeLimits, sign_of_life: Callable[[], None]
) -> _Packets:
    import av.logging

    found = _Packets(
        pts=[], is_key=[], num_seen=0, last_duration=0, last_pts=-(1 << 62), lost_pts=None, ended_early=False
    )
    packets = container.demux(stream)
    with av.logging.Capture() as complaints:
        while True:
            sign_of_life()
            try:
                packet = next(packets, None)
            except MemoryError:
                raise
            except av.error.FFmpegError:
                found.ended_early = True
                break
            if packet is None or packet.size == 0:
                break
            found.num_seen += 1
            _check_length(found.num_seen, 0.0, limits)
            pts = packet.dts if packet.pts is None else packet.pts
            if pts is None:
                raise RejectionError("unreadable", f"packet {found.num_seen} of the video carries no time")
            found.lost_pts = pts if packet.is_corrupt else None
            if packet.is_discard or not (packet.is_keyframe or found.pts):
                continue
            if pts >= found.last_pts:
                found.last_pts, found.last_duration = pts, packet.duration or 0
            found.pts.append(pts)
            found.is_key.append(packet.is_keyframe)
    found.ended_early |= any("ended prematurely" in text for _, _, text in complaints)
    if found.lost_pts is not None and found.pts:
        found.ended_early = True
        found.pts.pop()
        found.is_key.pop()
    return found


def _first_picture(container: InputContainer, stream: VideoStream, limits: DecodeLimits) -> VideoFrame:
    import av

    container.seek(0)
    stream.codec_context.options = {"max_pixels": str(limits.max_picture_px)}
    stream.codec_context.thread_count = 1
    try:
        for frame in container.decode(stream):
            return frame
    except MemoryError:
        raise
    except (av.error.FFmpegError, ValueError) as error:
        raise RejectionError("decode_error", f"the first frame does not decode: {_av_error_text(error)}") from error
    raise RejectionError("frames_missing", "no frame of the video decodes")


def _orientation(frame: VideoFrame) -> tuple[int, int, int, int]:
    """The display matrix of a frame, rounded to quarter turns and flips."""
    from av.sidedata.sidedata import Type

    for entry in frame.side_data:
        if entry.type == Type.DISPLAYMATRIX:
            matrix = struct.unpack("=9i", bytes(entry)[:36])
            a, b, c, d = (matrix[0], matrix[1], matrix[3], matrix[4])
            if abs(a) + abs(d) >= abs(b) + abs(c):
                return (-1 if a < 0 else 1), 0, 0, (-1 if d < 0 else 1)
            return 0, (-1 if b < 0 else 1), (-1 if c < 0 else 1), 0
    return 1, 0, 0, 1


def _scan_video(path: str, limits: DecodeLimits, sign_of_life: Callable[[], None]) -> _Scan:
    """Looks through a file without decoding more than one picture.

    Raises:
        RejectionError: unreadable, not_allowed, no_video, too_large, decode_error or frames_missing.
    """
    with _open_container(path, limits) as container:
        stream, num_video_streams = _choose_stream(container, limits)
        packets = _read_packets(container, stream, limits, sign_of_life)
        if not packets.pts:
            raise RejectionError(
                "frames_missing", f"{stream.frames or 'the'} promised frames, none of them in the file"
            )
        frame = _first_picture(container, stream, limits)
        _check_picture(frame.width, frame.height, limits)
        if frame.format.name not in PIXEL_FORMATS:
            raise RejectionError(
                "not_allowed", f"pixel format {frame.format.name} of codec {stream.codec_context.name}"
            )
        orientation = _orientation(frame)
        is_turned = orientation[0] == 0
        pts, first_places = np.unique(np.array(packets.pts, dtype=np.int64), return_index=True)
        timeline = _timeline(container, stream, packets, pts)
        _check_length(len(pts), timeline.promised_end_s, limits)
        return _Scan(
            container=container.format.name.split(",")[0],
            codec=stream.codec_context.codec.canonical_name,
            num_video_streams=num_video_streams,
            timeline=timeline,
            pts=pts,
            key_frames=np.flatnonzero(np.array(packets.is_key)[first_places]).astype(np.int64),
            lost_pts=packets.lost_pts,
            orientation=orientation,
            width_px=frame.height if is_turned else frame.width,
            height_px=frame.width if is_turned else frame.height,
        )


def _timeline(
    container: InputContainer, stream: VideoStream, packets: _Packets, pts: npt.NDArray[np.int64]
) -> Timeline:
    """Times of the frames that are there, and how far the header promises that they go.

    A header is believed only where something says that the file was cut: fewer packets than it counts (MP4, AVI) or a
    demuxer that met the end too early (Matroska). Durations alone are often wrong in healthy files.
    """
    tick_s = float(stream.time_base)
    times_s = (pts - pts[0]) * tick_s
    usual_s = float(np.median(np.diff(times_s))) if len(pts) > 1 else 1 / float(stream.average_rate or 25)
    end_s = float(times_s[-1]) + (packets.last_duration * tick_s or usual_s)
    promised_end_s, num_promised = end_s, len(pts)
    if stream.frames > packets.num_seen - (packets.lost_pts is not None):
        header_end_s = float(stream.duration or 0) * tick_s
        if header_end_s > end_s + 1.5 * usual_s:
            promised_end_s = header_end_s
            num_promised += stream.frames - packets.num_seen + (packets.lost_pts is not None)
    elif packets.ended_early and container.duration is not None:
        start_s = (pts[0] * tick_s) - (container.start_time or 0) / 1e6
        header_end_s = container.duration / 1e6 - start_s
        if header_end_s > end_s + 1.5 * usual_s:
            promised_end_s = header_end_s
            num_promised += round((header_end_s - end_s) / usual_s)
    return Timeline(
        times_s=times_s, end_s=end_s, promised_end_s=promised_end_s, num_promised=num_promised, tick_s=tick_s
    )


# --- reading frames -------------------------------------------------------------------------------------------------


class _DecordReader:
    """Frames by index through decord, decoded straight to the covering size.

    Raises:
        RuntimeError, ValueError and others of decord: it cannot open the file, or numbers its frames otherwise.
    """

    def __init__(self, path: str, scan: _Scan, shape: Cover, sign_of_life: Callable[[], None]) -> None:
        import decord

        self._reader = decord.VideoReader(path, width=shape.width_px, height=shape.height_px, num_threads=1)
        self._key_frames = scan.key_frames
        self._shape = shape
        self._sign_of_life = sign_of_life
        self._position = 0
        if len(self._reader) != len(scan.pts):
            raise ValueError(f"decord counts {len(self._reader)} frames, the file has {len(scan.pts)}")
        times_s = self._reader.get_frame_timestamp(np.arange(len(scan.pts)))[:, 0].astype(np.float64)
        if not np.allclose(times_s - times_s[0], scan.timeline.times_s, rtol=1e-5, atol=1e-3):
            raise ValueError("decord gives the frames other times than the file does")

    def read(self, indices: npt.NDArray[np.int64], frames: npt.NDArray[np.uint8]) -> None:
        """Writes the frames of rising `indices` `(n,)` to `frames` `(n, H, W, 3)`, cropped."""
        left, top = self._shape.left_px, self._shape.top_px
        height, width = frames.shape[1:3]
        done = 0
        while done < len(indices):
            first = int(indices[done])
            self._walk_to(first)
            reachable = int(np.searchsorted(indices, first + _DECORD_SKIPS_PER_CALL, side="right"))
            until = min(reachable, done + _DECORD_FRAMES_PER_CALL)
            batch = self._reader.get_batch(indices[done:until]).asnumpy()
            # At some small widths decord pads lines and misreads them, as pictures of six channels for example.
            expected = (until - done, self._shape.height_px, self._shape.width_px, 3)
            if batch.shape != expected:
                raise ValueError(f"decord gave frames of shape {batch.shape}, not {expected}")
            frames[done:until] = batch[:, top : top + height, left : left + width]
            self._position = int(indices[until - 1]) + 1
            done = until
            self._sign_of_life()

    def _walk_to(self, index: int) -> None:
        """Moves on in steps short enough for a sign of life between them."""
        key_frame = int(self._key_frames[np.searchsorted(self._key_frames, index, side="right") - 1])
        here = self._position if key_frame <= self._position <= index else key_frame
        for step in range(here + _DECORD_SKIPS_PER_CALL, index, _DECORD_SKIPS_PER_CALL):
            self._reader.seek_accurate(step)
            self._sign_of_life()


class _StrictReader:
    """Frames by index through PyAV, with every complaint of the decoder an error.

    It reads forwards. In Matroska and MP4 it jumps to the last key frame before the frames asked for; elsewhere
    (MPEG streams, AVI) jumps are not exact, and it decodes what lies between.
    """

    def __init__(
        self, path: str, scan: _Scan, shape: Cover, limits: DecodeLimits, sign_of_life: Callable[[], None]
    ) -> None:
        self._path = path
        self._scan = scan
        self._shape = shape
        self._limits = limits
        self._sign_of_life = sign_of_life
        self._container: InputContainer | None = None
        self._coming: Iterator[tuple[int, VideoFrame]] = iter(())
        self._position = 0
        self._last_indices: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._last_frames: npt.NDArray[np.uint8] | None = None

    def read(self, indices: npt.NDArray[np.int64], frames: npt.NDArray[np.uint8]) -> None:
        """Writes the frames of rising `indices` `(n,)` to `frames` `(n, H, W, 3)`, cropped.

        Raises:
            RejectionError: `decode_error` or `frames_missing`.
        """
        import av

        try:
            self._read(indices, frames)
        except MemoryError:
            raise
        except (av.error.FFmpegError, ValueError) as error:
            self.close()
            raise RejectionError(
                "decode_error", f"behind frame {self._position - 1} of {len(self._scan.pts)}: {_av_error_text(error)}"
            ) from error
        except RejectionError:
            self.close()
            raise

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container, self._coming = None, iter(())
        self._last_indices, self._last_frames = np.empty(0, dtype=np.int64), None

    def _read(self, indices: npt.NDArray[np.int64], frames: npt.NDArray[np.uint8]) -> None:
        # Clips may overlap; what the last one showed is not decoded again, which without exact jumps would mean from
        # the beginning.
        kept = np.isin(indices, self._last_indices)
        if self._last_frames is not None:
            frames[kept] = self._last_frames[np.searchsorted(self._last_indices, indices[kept])]
        missing = [int(index) for index in indices[~kept]]
        places = np.flatnonzero(~kept)
        if missing:
            self._start_before(missing[0])
        for place, wanted in zip(places, missing, strict=True):
            frames[place] = self._picture(self._next(wanted), frames.shape[1], frames.shape[2])
        self._last_indices, self._last_frames = indices.copy(), frames.copy()

    def _next(self, wanted: int) -> VideoFrame:
        for index, frame in self._coming:
            self._sign_of_life()
            self._position = index + 1
            if index < wanted:
                continue
            if index > wanted:
                break
            if frame.is_corrupt:
                raise RejectionError("decode_error", f"frame {wanted} decodes with errors")
            return frame
        raise RejectionError(
            "frames_missing", f"frame {wanted} of {len(self._scan.pts)} does not come out of the decoder"
        )

    def _start_before(self, index: int) -> None:
        """Makes `_coming` give frames from a key frame at or before `index`."""
        keys = self._scan.key_frames
        can_jump = self._scan.container in ("mov", "matroska")
        key_frame = int(keys[np.searchsorted(keys, index, side="right") - 1]) if can_jump else 0
        if self._container is not None and key_frame <= self._position <= index:
            return
        self.close()
        self._container = _open_container(self._path, self._limits)
        stream, _ = _choose_stream(self._container, self._limits)
        stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(self._limits.max_picture_px)}
        stream.codec_context.thread_count = 1
        if key_frame > 0:
            self._container.seek(int(self._scan.pts[key_frame]), stream=stream)
        self._position = key_frame
        self._coming = self._frames(self._container, stream)

    def _frames(self, container: InputContainer, stream: VideoStream) -> Iterator[tuple[int, VideoFrame]]:
        """Frames in the order they are shown, each with its index."""
        import av

        pts = self._scan.pts
        # In AVI packets carry decoding times; those of frames that are shown out of order belong to their neighbours.
        by_count = self._scan.container == "avi"
        num_shown = 0
        packets = container.demux(stream)
        has_started = False
        while True:
            try:
                packet = next(packets, None)
            except MemoryError:
                raise
            except av.error.FFmpegError:
                packet = None
            if packet is not None and packet.size > 0:
                has_started |= packet.is_keyframe
                is_lost = packet.is_corrupt and packet.pts == self._scan.lost_pts
                if is_lost or not has_started:
                    continue
            for frame in stream.codec_context.decode(packet if packet is not None and packet.size > 0 else None):
                if by_count:
                    index = num_shown
                elif frame.pts is None or (index := int(np.searchsorted(pts, frame.pts))) == len(pts):
                    continue
                elif pts[index] != frame.pts:
                    continue
                num_shown += 1
                yield index, frame
            if packet is None or packet.size == 0:
                return

    def _picture(self, frame: VideoFrame, height_px: int, width_px: int) -> npt.NDArray[np.uint8]:
        """Resized to cover, turned as the display matrix says, cropped."""
        from av.video.reformatter import Interpolation

        scan, shape = self._scan, self._shape
        stored = (scan.height_px, scan.width_px) if scan.is_turned else (scan.width_px, scan.height_px)
        if (frame.width, frame.height) != stored:
            raise RejectionError(
                "decode_error", f"the picture changes from {stored[0]}x{stored[1]} to {frame.width}x{frame.height} px"
            )
        width, height = (shape.height_px, shape.width_px) if scan.is_turned else (shape.width_px, shape.height_px)
        pixels: npt.NDArray[np.uint8] = frame.reformat(
            width=width, height=height, format="rgb24", interpolation=Interpolation.BILINEAR
        ).to_ndarray()
        a, b, c, d = scan.orientation
        if scan.is_turned:
            pixels = pixels.transpose(1, 0, 2)
        pixels = pixels[:: b + d, :: a + c]
        return pixels[shape.top_px : shape.top_px + height_px, shape.left_px : shape.left_px + width_px]


# --- making clips ---------------------------------------------------------------------------------------------------


def _clips_of_video(
    path: str, first_clip: int, rules: _Rules, memory: memoryview, sign_of_life: Callable[[], None]
) -> Iterator[dict[str, object]]:
    """Messages for the parent: one that the video is open, then one for each clip from `first_clip` on.

    Every clip is decoded as if it were the only one: whether decord or PyAV makes its frames does not depend on the
    clips before it, so that a child that takes over in the middle gives the same bytes.
    """
    cut, limits = rules.cut, rules.limits
    scan = _scan_video(path, limits, sign_of_life)
    timeline = scan.timeline
    num_instants = timeline.num_instants(cut.fps)
    bucket = choose_bucket(cut.buckets, "video", scan.width_px, scan.height_px, num_instants, cut.upscale)
    shape = _covering(bucket, scan.width_px, scan.height_px, limits)
    starts = clip_spans(num_instants, bucket.num_frames, cut.clip_stride, cut.clips_per_video)
    clip_fps = cut.fps if cut.fps is not None else scan.fps
    reader = _ClipReader(path, scan, shape, limits, sign_of_life)
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
            f"{width_px}x{height_px} px become {shape.width_px}x{shape.height_px} to cover {bucket}; --max-picture-px is "
            f"{limits.max_picture_px}",
        )
    return shape


class _ClipReader:
    """Reads the frames of a clip: by decord where that is known to be right, else by PyAV, which also checks decord."""

    def __init__(
        self, path: str, scan: _Scan, shape: Cover, limits: DecodeLimits, sign_of_life: Callable[[], None]
    ) -> None:
        self._open_decord: Callable[[], _DecordReader] = lambda: _DecordReader(path, scan, shape, sign_of_life)
        self._strict = _StrictReader(path, scan, shape, limits, sign_of_life)
        self._decord: _DecordReader | None = None
        self._by_decord = (
            scan.container in _DECORD_CONTAINERS
            and scan.codec in _DECORD_CODECS
            and scan.num_video_streams == 1
            and not _needs_own_turning(scan)
        )
        if self._by_decord:
            try:
                self._decord = self._open_decord()
            except MemoryError:
                raise
            except Exception:
                # decord raises errors of many types; each means only that PyAV has to do it.
                self._by_decord = False

    def read(self, indices: npt.NDArray[np.int64], frames: npt.NDArray[np.uint8]) -> str:
        """Writes the frames of the never falling `indices` to `frames` `(T, H, W, 3)`; returns the decoder's name.

        Raises:
            RejectionError: `decode_error` or `frames_missing`.
        """
        needed, places = np.unique(indices, return_inverse=True)
        given = frames[: len(needed)]
        decoder = self._read(needed, given)
        if len(needed) < len(indices):
            # From the end, so that no frame is overwritten before it has been copied to its last place.
            for place in range(len(indices) - 1, -1, -1):
                frames[place] = given[places[place]]
        return decoder

    def _read(self, indices: npt.NDArray[np.int64], frames: npt.NDArray[np.uint8]) -> str:
        if self._by_decord and self._read_by_decord(indices, frames):
            if not (self._complained or _repeats(frames).any()):
                return _version_class("decord")
            # decord puts the last good frame in a damaged one's place and gives it without a word. Only a strict
            # decoder can tell that from a picture that stands still.
            checked = np.empty_like(frames)
            self._strict.read(indices, checked)
            if _agree(frames, checked):
                return _version_class("decord")
            frames[:] = checked
        else:
            self._strict.read(indices, frames)
        return _version_class("av")

    def _read_by_decord(self, indices: npt.NDArray[np.int64], frames: npt.NDArray[np.uint8]) -> bool:
        log_bytes = os.fstat(sys.stderr.fileno()).st_size
        try:
            if self._decord is None:
                self._decord = self._open_decord()
            self._decord.read(indices, frames)
        except MemoryError:
            raise
        except Exception:
            self._decord = None
            return False
        # FFmpeg inside decord conceals errors in the picture and says so only on standard error.
        self._complained = os.fstat(sys.stderr.fileno()).st_size != log_bytes or log_bytes >= MAX_LOG_BYTES
        return True


def _needs_own_turning(scan: _Scan) -> bool:
    """Whether decord does not show the picture as the display matrix says: it knows the turns of MP4, and no flips."""
    a, b, c, d = scan.orientation
    return a * d - b * c < 0 or (scan.orientation != (1, 0, 0, 1) and scan.container != "mov")


def _repeats(frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """`(n - 1,)`: whether a frame of `(n, H, W, 3)` is byte for byte the one before it."""
    return np.array([np.array_equal(one, other) for one, other in zip(frames, frames[1:])], dtype=np.bool_)


def _agree(frames: npt.NDArray[np.uint8], checked: npt.NDArray[np.uint8]) -> bool:
    """Whether two decoders saw the same pictures, up to their scalers, and the same ones stand still."""
    if not np.array_equal(_repeats(frames), _repeats(checked)):
        return False
    return all(
        float(np.abs(one.astype(np.int16) - other).mean()) <= _AGREEMENT_LEVELS
        for one, other in zip(frames, checked, strict=True)
    )


def _version_class(package: str) -> str:
    """decord 0.6.0 -> "decord-0.6", PyAV 18.1.0 -> "pyav-18", Pillow 13.0.0 -> "pillow-13"."""
    import importlib.metadata

    if package == "decord":
        try:
            version = importlib.metadata.version("decord")
        except importlib.metadata.PackageNotFoundError:
            return f"decord2-{importlib.metadata.version('decord2').split('.')[0]}"
        return f"decord-{'.'.join(version.split('.')[:2])}"
    major = importlib.metadata.version(package).split(".")[0]
    return f"{'pyav' if package == 'av' else package}-{major}"


def _clip_of_image(path: str, first_clip: int, rules: _Rules, memory: memoryview) -> Iterator[dict[str, object]]:
    """The messages for an image: that it is open, and its one clip."""
    cut, limits = rules.cut, rules.limits
    picture, codec = _open_picture(path, limits)
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
            "decoder": _version_class("pillow"),
        },
    }


def _open_picture(path: str, limits: DecodeLimits) -> tuple[Image.Image, str]:
    """The picture as it is meant to be seen, in RGB, and its format's name.

    EXIF orientation is applied. Transparency is laid on white, as img2dataset does. 16-bit grey keeps its upper
    8 bits. Of an animation the first frame counts.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    # Pillow only warns; the limit here is the configured one.
    Image.MAX_IMAGE_PIXELS = None
    try:
        picture: Image.Image = Image.open(path, formats=IMAGE_FORMATS)
    except UnidentifiedImageError as error:
        raise RejectionError(
            "unreadable", f"no allowed image format was recognised; allowed: {', '.join(IMAGE_FORMATS)}"
        ) from error
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise RejectionError("unreadable", f"the image's header is damaged: {error}") from error
    codec = (picture.format or "unknown").lower()
    _check_picture(picture.width, picture.height, limits)
    try:
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):
            grey = np.asarray(picture).clip(0, 65535).astype(np.uint16) >> 8
            picture = Image.fromarray(grey.astype(np.uint8))
        elif picture.has_transparency_data:
            seen = picture.convert("RGBA")
            picture = Image.new("RGBA", seen.size, "white")
            picture.alpha_composite(seen)
        return picture.convert("RGB"), codec
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's plug-ins raise errors of many types on damaged files.
        raise RejectionError("decode_error", f"the image does not decode: {error}") from error


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
    sandbox = _enter_sandbox(parent_pid, memory_bytes)
    memory = memoryview(mmap.mmap(memory_fd, 0))
    os.close(memory_fd)
    _serve(_Parent(socket.socket(fileno=connection_fd)), memory, sandbox)
