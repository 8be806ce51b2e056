"""What a media file holds, and its frames by number: the only code that touches a decoder.

Not where clips are chosen (`cutting`) and not safe to run anywhere but in a decode child: everything here handles bytes
that a stranger wrote. decord decodes where it is known to be right; PyAV decodes what decord refuses, and checks what
decord gave with complaints. PyAV is run strictly: what it cannot decode without error is rejected. Neither is given a
name or an address, but bytes or an open descriptor, so that no demuxer can open anything else. Called by
`decode_child`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import io
import itertools
import os
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.bookkeeping import avi_packets_before_damage, check_transport_stream
from pipeline.config import DecodeLimits
from pipeline.cutting import Cover, Timeline
from pipeline.errors import RejectionError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from PIL import Image

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
# decord reads a file as a path, which a sandbox has none of, or from memory. Of larger files it gets excerpts.
_LARGEST_IN_MEMORY_BYTES = 64 << 20
_LARGEST_EXCERPT_BYTES = 64 << 20
_READ_BYTES = 1 << 18
# Frames that decord takes in one call; the child gives no sign of life in it.
_DECORD_FRAMES_PER_CALL = 8
_DECORD_SKIPS_PER_CALL = 64
# Packets in a row that the decoder may refuse before the first picture: more than a healthy stream, cut anywhere, has
# up to its next key frame.
_MOST_FAILURES = 300
# H.264 and HEVC keep at most 16 pictures until they are shown; the others fewer.
_MOST_REORDERED = 16
# More than the header of any slice of the first picture needs; a longer one only makes a glance useless.
_SLICE_HEADER_BYTES = 64


_T = TypeVar("_T")

# --- looking at a video ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What a video file holds, from its headers, all its packets and its first picture.

    Attributes:
        pts: `(n,)` int64, strictly rising, presentation times of the frames that can be shown, in ticks.
        key_frames: rising indices into `pts` of the frames that decoding can start at.
        lost_pts: the time of a last packet that is cut off; it is not among `pts`.
        is_cut: the file ends inside a packet, and nothing in it tells how much followed.
        has_wrong_times: of frames that are not among `pts`; readers that count by times count otherwise.
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
    is_cut: bool
    has_wrong_times: bool
    orientation: tuple[int, int, int, int]
    width_px: int
    height_px: int

    @property
    def fps(self) -> float:
        """Frames per second on the average."""
        return len(self.pts) / self.timeline.end_s

    @property
    def is_turned(self) -> bool:
        """Whether width and height are exchanged between the stored picture and the one shown."""
        return self.orientation[0] == 0

    def key_frame_before(self, index: int) -> int:
        """The last frame not after `index` that decoding can start at; 0 where only what precedes all frames serves."""
        place = int(np.searchsorted(self.key_frames, index, side="right")) - 1
        return int(self.key_frames[place]) if place >= 0 else 0


def _av_error_text(error: Exception) -> str:
    """The message with FFmpeg's last log line."""
    log = getattr(error, "log", None)
    said = f" ({log[2].strip()})" if log else ""
    return f"{getattr(error, 'strerror', None) or error}{said}"


class _Media(io.RawIOBase):
    """An open file from its beginning. Has a position of its own: several readers share the descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        end = os.fstat(self._descriptor).st_size if whence == os.SEEK_END else 0
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: end}[whence]
        if position < 0:
            raise ValueError(f"position {position} is before the file")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        num_read = os.preadv(self._descriptor, [buffer], self._position)
        self._position += num_read
        return num_read


def _open_container(media_fd: int, limits: DecodeLimits, *, by_headers: bool = False) -> InputContainer:
    """A file that its demuxer has read the beginning of.

    Args:
        by_headers: no picture is decoded for what the headers do not say, which is the format of its pixels.

    Raises:
        RejectionError: `not_allowed` or `unreadable`.
    """
    import av

    try:
        return av.open(
            _Media(media_fd),
            mode="r",
            buffer_size=_READ_BYTES,
            # Titles are written in whatever alphabet the writer had, and nothing here reads them.
            metadata_errors="replace",
            container_options={
                "protocol_whitelist": "none",
                "format_whitelist": ",".join(CONTAINERS),
                "codec_whitelist": ",".join(_CODEC_DECODERS),
                # Without presentation times in the container (AVI) they follow from the decoding times.
                "fflags": "+genpts",
                # Or a demuxer that learns nothing from pictures reads on.
                **({"probesize": "32"} if by_headers else {}),
            },
            options={"skip_frame": "all"} if by_headers else {},
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
    """The packets of a stream in the order of the file, and the first picture that comes out of them.

    Attributes:
        pts: presentation times in ticks, of the frames that can be shown.
        is_key: whether decoding can start there.
        num_seen: all packets, also those that only serve others.
        last_duration: ticks that the frame shown last is shown.
        lost_pts: the time of a last packet that is cut off; it is not among `pts`.
        ended_early: the demuxer met the end of the file where it expected more.
        num_proven: of `pts`, in the order of the file: the demuxer complained behind them, and what comes then may
            follow something that is lost.
        damage: what it complained of.
        unproven_end: the last time of a frame behind the damage.
        num_failures: packets one behind the other that the decoder refused before the first picture.
    """

    pts: list[int] = field(default_factory=list)
    is_key: list[bool] = field(default_factory=list)
    num_seen: int = 0
    last_duration: int = 0
    lost_pts: int | None = None
    ended_early: bool = False
    num_proven: int | None = None
    damage: str = ""
    unproven_end: int | None = None
    picture: VideoFrame | None = None
    num_failures: int = 0
    has_wrong_times: bool = False
    picture_error: str = "nothing came out of the decoder"

    @property
    def is_whole(self) -> bool:
        """Whether nothing speaks against a packet, or for one more."""
        return self.num_proven is None and self.lost_pts is None and not self.ended_early

    def note_damage(self, what: str) -> None:
        if self.num_proven is None:
            self.num_proven, self.damage = len(self.pts), what

    def drop_what_is_not_proven(self) -> None:
        """Keeps the frames before the last key frame before the damage: of those behind it some may be lost."""
        if self.num_proven is None:
            return
        key_places = [place for place in range(self.num_proven) if self.is_key[place]]
        num_kept = key_places[-1] if key_places else 0
        lost = self.pts[num_kept:]
        self.ended_early = True
        self.unproven_end = max(lost, default=None)
        self.pts, self.is_key = self.pts[:num_kept], self.is_key[:num_kept]

    def drop_from(self, dts: int) -> None:
        """Keeps the frames that are shown before `dts`: what follows a packet is never shown before its decoding."""
        kept = [place for place, pts in enumerate(self.pts) if pts < dts]
        self.ended_early = True
        self.unproven_end = max([*self.pts, *([] if self.unproven_end is None else [self.unproven_end])], default=None)
        self.pts, self.is_key = [self.pts[place] for place in kept], [self.is_key[place] for place in kept]


def _read_packets(
    container: InputContainer,
    stream: VideoStream,
    limits: DecodeLimits,
    sign_of_life: Callable[[], None],
    num_whole: int | None,
    is_cut: bool,
    said_at_open: str = "",
    *,
    is_glance: bool = False,
) -> _Packets:
    """Reads to the end.

    Args:
        num_whole: packets before damage that the demuxer does not see.
        is_cut: the last packet may not be whole, and the demuxer does not see it.
        said_at_open: what the demuxer complained of before the first packet; "" for nothing.
        is_glance: the first packet is to give the first picture, without what the picture shows.
    """
    import av.logging

    # What a glance leaves out is not to be filled in.
    _prepare(stream, {"ec": "0"} if is_glance else {}, limits)
    found = _Packets()
    has_key, last_pts, last_time, last_dts = False, None, None, None
    is_transport, is_mov = container.format.name == "mpegts", container.format.name.startswith("mov")
    num_before_key = 0
    times: set[int] = set()
    places: list[tuple[int, int]] = []
    # Also of frames that are not to be shown: one with a wrong time may lie outside what is.
    all_pts: list[int] = []
    num_kept_before: list[int] = []
    if said_at_open and not is_mov:
        # The demuxer had read ahead: which packets came before the damage is not known any more.
        found.note_damage(said_at_open)
    with av.logging.Capture() as complaints:
        for packet in _packets(container, stream):
            sign_of_life()
            _take_complaints(container, complaints, found)
            # What lies behind the last frame that was promised is no frame.
            is_whole = packet is None and 0 < stream.frames <= found.num_seen
            if num_whole is not None and found.num_seen >= num_whole and not is_whole:
                found.note_damage("something else follows where a piece of the video should be")
            if packet is None:
                _try_picture(stream, None, found)
                break
            found.num_seen += 1
            _check_length(found.num_seen, 0.0, limits)
            pts = _time_of(packet)
            if pts is None:
                raise RejectionError("unreadable", f"packet {found.num_seen} of the video carries no time")
            if found.lost_pts is not None:
                found.note_damage("a packet in the middle is damaged")
            # In transport streams the demuxer doubts every packet before a jump of a counter, also where it may jump.
            found.lost_pts = pts if packet.is_corrupt and not is_transport else None
            if is_mov and pts in times:
                found.note_damage(f"two frames are to be shown at the same time, {pts} ticks")
            times.add(pts)
            last_time, last_dts = pts, pts if packet.dts is None else packet.dts
            places.append((packet.pos or 0, packet.size))
            has_key |= packet.is_keyframe
            if not has_key:
                num_before_key += not packet.is_discard
                continue
            if not is_glance:
                _try_picture(stream, packet, found)
            elif found.num_seen == 1:
                _try_beginning(stream, packet, found)
            all_pts.append(pts)
            num_kept_before.append(len(found.pts))
            # Frames before the first key frame in time refer to what is not there; discarded ones are never shown.
            if packet.is_discard or (found.pts and pts < found.pts[0]):
                continue
            if last_pts is None or pts > last_pts:
                last_pts, found.last_duration = pts, packet.duration or 0
            found.pts.append(pts)
            found.is_key.append(packet.is_keyframe)
        _take_complaints(container, complaints, found)
    if found.lost_pts is not None and found.pts and found.pts[-1] == found.lost_pts:
        found.ended_early = True
        found.pts.pop()
        found.is_key.pop()
    strayed = _first_strayed(all_pts)
    found.has_wrong_times = strayed is not None
    if strayed is not None and (found.num_proven is None or num_kept_before[strayed] < found.num_proven):
        found.num_proven = min(num_kept_before[strayed], len(found.pts))
        found.damage = f"frame {strayed} of the file has a time at which no decoder could show it"
    places.sort()
    if container.format.name.startswith("mov") and any(a + n > b for (a, n), (b, _) in itertools.pairwise(places)):
        raise RejectionError("decode_error", "the index of the file gives the same bytes to several frames")
    if num_before_key and not is_transport:
        # A transport stream may begin anywhere; the writer of a file began at a key frame.
        raise RejectionError(
            "frames_missing", f"the first {num_before_key} frames of the file come before its first key frame"
        )
    is_short = found.num_seen - (found.lost_pts is not None) < stream.frames
    if said_at_open and is_mov and is_short:
        # Which of them are missing, the damaged index does not say.
        found.num_proven, found.damage = 0, said_at_open
    found.drop_what_is_not_proven()
    if is_cut:
        found.lost_pts = last_time
    # Frames that are shown earlier than what was read last may have been to follow it.
    if last_dts is not None and (is_cut or (found.ended_early and (is_short or stream.frames == 0))):
        found.drop_from(last_dts)
    return found


def _first_strayed(pts: Sequence[int]) -> int | None:
    """The first frame, in the order of the file, whose time puts it farther from its place than codecs reorder."""
    order = np.argsort(np.array(pts, dtype=np.int64), kind="stable")
    strayed = np.flatnonzero(np.abs(order - np.arange(len(order))) > _MOST_REORDERED)
    return int(order[strayed].min()) if len(strayed) else None


def _says_end(text: str) -> bool:
    return "prematurely" in text or "partial file" in text


def _take_complaints(container: InputContainer, complaints: list[tuple[int, str, str]], found: _Packets) -> None:
    """Looks at each complaint once: a file can cause as many as it has packets."""
    import av.logging

    for level, name, text in complaints:
        if _says_end(text):
            found.ended_early = True
        # Decoders complain as well, of the first picture, and of what healthy streams begin with.
        elif level <= av.logging.ERROR and name == container.format.name:
            found.note_damage(text.strip())
    complaints.clear()


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream] | None]:
    """The packets of a stream, then one None; a demuxer that fails has met the end."""
    import av

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except MemoryError:
            raise
        except av.error.FFmpegError:
            packet = None
        if packet is None or packet.size == 0:
            yield None
            return
        yield packet


def _time_of(packet: Packet[VideoStream]) -> int | None:
    return packet.dts if packet.pts is None else packet.pts


def _prepare(stream: VideoStream, options: dict[str, str], limits: DecodeLimits) -> None:
    stream.codec_context.options = {**options, "max_pixels": str(limits.max_picture_px)}
    stream.codec_context.thread_count = 1


def _try_picture(stream: VideoStream, packet: Packet[VideoStream] | None, found: _Packets) -> None:
    """Decodes until there is a first picture, leniently: it tells size, format and turn, and goes into no clip."""
    import av

    if found.picture is not None or found.num_failures >= _MOST_FAILURES:
        return
    try:
        for frame in stream.codec_context.decode(packet):
            found.picture = found.picture or frame
        found.num_failures = 0
    except MemoryError:
        raise
    except (av.error.FFmpegError, ValueError) as error:
        found.num_failures += 1
        found.picture_error = _av_error_text(error)


def _try_beginning(stream: VideoStream, packet: Packet[VideoStream], found: _Packets) -> None:
    """Decodes the packet without what its picture shows: that takes a fiftieth of the time."""
    from av.packet import Packet

    beginning = _without_picture(bytes(packet), stream.codec_context)
    if not beginning:
        return
    shortened: Packet[Any] = Packet(beginning)
    shortened.pts, shortened.dts = packet.pts, packet.dts
    _try_picture(stream, shortened, found)
    _try_picture(stream, None, found)


def _without_picture(packet: bytes, context: VideoCodecContext) -> bytes:
    """All of a packet of H.264 or HEVC in MP4 before the first slice, and of that little more than its header.

    Returns:
        units behind their lengths, as in ISO/IEC 14496-15; nothing where no slice is found.
    """
    extradata = context.extradata or b""
    is_hevc = context.name == "hevc"
    place_of_size = 21 if is_hevc else 4
    if context.name not in ("h264", "hevc") or len(extradata) <= place_of_size or extradata[0] != 1:
        return b""
    num_size_bytes = (extradata[place_of_size] & 3) + 1
    place = 0
    while place + num_size_bytes < len(packet):
        start = place + num_size_bytes
        num_bytes = int.from_bytes(packet[place:start], "big")
        kind = packet[start] >> 1 & 63 if is_hevc else packet[start] & 31
        if kind < 32 if is_hevc else 1 <= kind <= 5:
            shortened = packet[start : start + min(num_bytes, _SLICE_HEADER_BYTES)]
            return packet[:place] + len(shortened).to_bytes(num_size_bytes, "big") + shortened
        place = start + num_bytes
    return b""


def _orientation(frame: VideoFrame) -> tuple[int, int, int, int]:
    """The display matrix of a frame, rounded to quarter turns and flips."""
    from av.sidedata.sidedata import Type

    # The stubs of PyAV call the entries strings.
    entries: Iterator[Any] = iter(frame.side_data)
    for entry in entries:
        if entry.type == Type.DISPLAYMATRIX:
            a, b, _, c, d, *_ = struct.unpack("=9i", bytes(entry)[:36])
            if abs(a) + abs(d) >= abs(b) + abs(c):
                return (-1 if a < 0 else 1), 0, 0, (-1 if d < 0 else 1)
            return 0, (-1 if b < 0 else 1), (-1 if c < 0 else 1), 0
    return 1, 0, 0, 1


def scan_video(media_fd: int, limits: DecodeLimits, sign_of_life: Callable[[], None]) -> Scan:
    """Looks through a file without decoding more than one picture.

    Raises:
        RejectionError: unreadable, not_allowed, no_video, too_large, decode_error or frames_missing.
    """
    opened, said = _opened(media_fd, limits)
    with opened as container:
        stream, num_video_streams = _choose_stream(container, limits)
        num_whole, is_cut = None, False
        if container.format.name == "mpegts":
            check = check_transport_stream(media_fd, stream.id)
            if check.problem is not None:
                # Nothing in it tells how many frames there should be.
                raise RejectionError("frames_missing", f"the transport stream is not whole: {check.problem}")
            is_cut = check.ends_inside_packet
        if container.format.name == "avi":
            num_whole = avi_packets_before_damage(media_fd, stream.index)
        packets = _read_packets(container, stream, limits, sign_of_life, num_whole, is_cut, said)
        if not packets.pts and packets.damage:
            raise RejectionError("frames_missing", f"the file is damaged before its second key frame: {packets.damage}")
        if not packets.pts:
            raise RejectionError("frames_missing", f"of {stream.frames or 'the'} promised frames none is in the file")
        if packets.picture is None:
            raise RejectionError(
                "decode_error", f"no first picture comes out of {len(packets.pts)} frames: {packets.picture_error}"
            )
        return _scan_of(container, stream, num_video_streams, packets, packets.picture, limits, is_cut=is_cut)


def glance_at_video(media_fd: int, limits: DecodeLimits, sign_of_life: Callable[[], None]) -> Scan | None:
    """What `scan_video` finds in an MP4 of H.264 or HEVC with which all is well, in a tenth of the time.

    Size, format and turn of the first picture are those of its headers. That it decodes is not known: the scan holds
    where decord then reads frames without a complaint, and only there.

    Returns:
        None where the headers do not tell all or something speaks against the file: that is for `scan_video` to say.
    """
    if os.pread(media_fd, 4, 4) != b"ftyp":
        return None
    try:
        opened, said = _opened(media_fd, limits, by_headers=True)
        with opened as container:
            stream, num_video_streams = _choose_stream(container, limits)
            packets = _read_packets(container, stream, limits, sign_of_life, None, False, said, is_glance=True)
            is_mov = container.format.name.startswith("mov")
            is_whole = not said and packets.is_whole and packets.num_seen == stream.frames and len(packets.pts) > 1
            if packets.picture is None or not is_mov or not is_whole:
                return None
            return _scan_of(container, stream, num_video_streams, packets, packets.picture, limits, is_cut=False)
    except RejectionError:
        return None


def _opened(media_fd: int, limits: DecodeLimits, *, by_headers: bool = False) -> tuple[InputContainer, str]:
    """The open container and what its demuxer complained of."""
    import av.logging

    with av.logging.Capture() as complaints:
        opened = _open_container(media_fd, limits, by_headers=by_headers)
        said = [
            text.strip() for level, name, text in complaints if level <= av.logging.ERROR and name == opened.format.name
        ]
    return opened, "; ".join(said)


def _scan_of(
    container: InputContainer,
    stream: VideoStream,
    num_video_streams: int,
    packets: _Packets,
    picture: VideoFrame,
    limits: DecodeLimits,
    *,
    is_cut: bool,
) -> Scan:
    _check_picture(picture.width, picture.height, limits)
    if picture.format.name not in PIXEL_FORMATS:
        raise RejectionError("not_allowed", f"pixel format {picture.format.name} of codec {stream.codec_context.name}")
    orientation = _orientation(picture)
    is_turned = orientation[0] == 0
    pts, first_places = np.unique(np.array(packets.pts, dtype=np.int64), return_index=True)
    timeline = _timeline(container, stream, packets, pts)
    _check_length(len(pts), timeline.promised_end_s, limits)
    return Scan(
        container=container.format.name.split(",")[0],
        codec=stream.codec_context.codec.canonical_name,
        num_video_streams=num_video_streams,
        timeline=timeline,
        pts=pts,
        key_frames=np.flatnonzero(np.array(packets.is_key)[first_places]).astype(np.int64),
        lost_pts=packets.lost_pts,
        is_cut=is_cut,
        has_wrong_times=packets.has_wrong_times,
        orientation=orientation,
        width_px=picture.height if is_turned else picture.width,
        height_px=picture.width if is_turned else picture.height,
    )


def _timeline(
    container: InputContainer, stream: VideoStream, packets: _Packets, pts: npt.NDArray[np.int64]
) -> Timeline:
    """Times of the frames that are there, and how far the header promises that they go.

    A header is believed only where the demuxer met the end of the file too early, or in AVI, which says nothing then:
    counts and durations are often more than what healthy files show (edit lists, longer sound).
    """
    assert stream.time_base is not None, "packets were read, so there is a clock"
    tick_s = float(stream.time_base)
    times_s = (pts - pts[0]) * tick_s
    usual_s = float(np.median(np.diff(times_s))) if len(pts) > 1 else 1 / float(stream.average_rate or 25)
    end_s = float(times_s[-1]) + (packets.last_duration * tick_s or usual_s)
    num_missing = stream.frames - packets.num_seen + (packets.lost_pts is not None)
    header_end_s = end_s
    if container.format.name == "avi":
        # It counts slots of its clock, also those of frames that repeat the one before and are not in the file.
        header_end_s = stream.frames * tick_s
    elif packets.ended_early and num_missing > 0:
        header_end_s = max(float(stream.duration or 0) * tick_s, end_s + num_missing * usual_s)
    elif packets.ended_early and stream.frames == 0 and container.duration is not None:
        header_end_s = (container.duration + (container.start_time or 0)) / 1e6 - float(pts[0]) * tick_s
    if packets.unproven_end is not None:
        header_end_s = max(header_end_s, float(packets.unproven_end - int(pts[0])) * tick_s + usual_s)
    promised_end_s, num_promised = end_s, len(pts)
    if header_end_s > end_s + usual_s / 2:
        promised_end_s = header_end_s
        num_promised += max(num_missing, round((header_end_s - end_s) / usual_s))
    return Timeline(
        times_s=times_s, end_s=end_s, promised_end_s=promised_end_s, num_promised=num_promised, tick_s=tick_s
    )


# --- reading frames -------------------------------------------------------------------------------------------------


class _NumberingError(Exception):
    """decord counts the frames of the file in another way."""


class _Lent:
    """An array of decord for numpy to look at: `asnumpy` would copy it."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **_: object) -> Any:
        return self._array.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # the processor's memory


class _DecordReader:
    """Frames by index through decord, decoded straight to the covering size.

    Raises:
        _NumberingError: decord numbers the frames otherwise.
        Exception: it cannot open or decode the file; decord raises errors of many types.
    """

    def __init__(self, file: io.BufferedIOBase, scan: Scan, shape: Cover, sign_of_life: Callable[[], None]) -> None:
        import decord

        self._reader = decord.VideoReader(file, width=shape.width_px, height=shape.height_px, num_threads=1)
        self._scan = scan
        self._shape = shape
        self._sign_of_life = sign_of_life
        self._position = 0
        # Frames behind a cut that decord counts as well are not among those that are proven.
        is_shortened = scan.timeline.num_promised > len(scan.pts)
        if len(self._reader) != len(scan.pts) and not (is_shortened and len(self._reader) > len(scan.pts)):
            raise _NumberingError(f"decord counts {len(self._reader)} frames, the file has {len(scan.pts)}")
        given_s = self._reader.get_frame_timestamp(np.arange(len(scan.pts)))[:, 0].astype(np.float64)
        times_s = (scan.pts - scan.pts[0]) * scan.timeline.tick_s
        if not np.allclose(given_s - given_s[0], times_s, rtol=1e-5, atol=1e-3):
            raise _NumberingError("decord gives the frames other times than the file does")

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
            batch = np.asarray(np.from_dlpack(_Lent(self._reader.get_batch(indices[done:until]))), np.uint8)
            # Where decord pads lines it may misread them, as pictures of six channels for example.
            expected = (until - done, self._shape.height_px, self._shape.width_px, 3)
            if batch.shape != expected:
                raise _NumberingError(f"decord gave frames of shape {batch.shape}, not {expected}")
            frames[done:until] = batch[:, top : top + height, left : left + width]
            self._position = int(indices[until - 1]) + 1
            done = until
            self._sign_of_life()

    def _walk_to(self, index: int) -> None:
        """Moves on in steps short enough for a sign of life between them."""
        key_frame = self._scan.key_frame_before(index)
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
        self, media_fd: int, scan: Scan, shape: Cover, limits: DecodeLimits, sign_of_life: Callable[[], None]
    ) -> None:
        self._media_fd = media_fd
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
        can_jump = self._scan.container in ("mov", "matroska")
        key_frame = self._scan.key_frame_before(index) if can_jump else 0
        if self._container is not None and key_frame <= self._position <= index:
            return
        self.close()
        self._container = _open_container(self._media_fd, self._limits)
        stream, _ = _choose_stream(self._container, self._limits)
        _prepare(stream, {"err_detect": "explode"}, self._limits)
        if key_frame > 0:
            self._container.seek(int(self._scan.pts[key_frame]), stream=stream)
        self._position = key_frame
        self._coming = self._frames(self._container, stream)

    def _frames(self, container: InputContainer, stream: VideoStream) -> Iterator[tuple[int, VideoFrame]]:
        """Frames in the order they are shown, each with its index."""
        pts = self._scan.pts
        # In AVI packets carry decoding times; those of frames that are shown out of order belong to their neighbours.
        by_count = self._scan.container == "avi"
        num_shown = 0
        has_key = False
        for packet in _packets(container, stream):
            if packet is not None:
                has_key |= packet.is_keyframe
                time = _time_of(packet)
                is_lost = time is not None and time == self._scan.lost_pts
                is_cut_off = time is not None and time < pts[0] and not packet.is_discard
                if is_lost or is_cut_off or not has_key:
                    continue
            for frame in stream.codec_context.decode(packet):
                index = num_shown if by_count else self._index_of(frame)
                num_shown += 1
                if index is not None:
                    yield index, frame

    def _index_of(self, frame: VideoFrame) -> int | None:
        if frame.pts is None:
            return None
        index = int(np.searchsorted(self._scan.pts, frame.pts))
        return index if index < len(self._scan.pts) and self._scan.pts[index] == frame.pts else None

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
        resized = frame.reformat(width=width, height=height, format="rgb24", interpolation=Interpolation.BILINEAR)
        pixels = np.asarray(resized.to_ndarray(), dtype=np.uint8)
        a, b, c, d = scan.orientation
        if scan.is_turned:
            pixels = pixels.transpose(1, 0, 2)
        pixels = pixels[:: b + d, :: a + c]
        return pixels[shape.top_px : shape.top_px + height_px, shape.left_px : shape.left_px + width_px]


class ClipReader:
    """Reads the frames of a clip: by decord where that is known to be right, else by PyAV, which also checks decord.

    Which of them made a frame depends on the frames of the clip alone. decord reads ahead in a thread, so that how
    early it meets damage is a matter of luck; where it fails, it is given only the packets that the clip needs.
    """

    def __init__(
        self, media_fd: int, scan: Scan, shape: Cover, limits: DecodeLimits, sign_of_life: Callable[[], None]
    ) -> None:
        self._media_fd = media_fd
        self._scan = scan
        self._shape = shape
        self._limits = limits
        self._sign_of_life = sign_of_life
        self._strict = _StrictReader(media_fd, scan, shape, limits, sign_of_life)
        self._decord: _DecordReader | None = None
        # The frames that `_decord` has: all, or those of an excerpt.
        self._held = range(0)
        self._by_decord = (
            scan.container in _DECORD_CONTAINERS
            and scan.codec in _DECORD_CODECS
            and scan.num_video_streams == 1
            and not scan.has_wrong_times
            and not _needs_own_turning(scan)
        )
        self._fits_memory = os.fstat(media_fd).st_size <= _LARGEST_IN_MEMORY_BYTES

    def read(self, indices: npt.NDArray[np.int64], frames: npt.NDArray[np.uint8]) -> str:
        """Writes the frames of the never falling `indices` to `frames` `(T, H, W, 3)`; returns the decoder's name.

        Raises:
            RejectionError: `decode_error` or `frames_missing`.
        """
        return self._spread(self._read, indices, frames)

    def read_plainly(self, indices: npt.NDArray[np.int64], frames: npt.NDArray[np.uint8]) -> bool:
        """As `read`, where decord alone gives all frames and nothing speaks against them; else False."""
        return self._spread(self._read_plainly, indices, frames)

    def close(self) -> None:
        """Ends decoders, one of which goes on ahead of what was read."""
        self._decord = None
        self._strict.close()

    def _spread(
        self,
        read: Callable[[npt.NDArray[np.int64], npt.NDArray[np.uint8]], _T],
        indices: npt.NDArray[np.int64],
        frames: npt.NDArray[np.uint8],
    ) -> _T:
        """Reads each frame once, also one that stands more than once in `indices`."""
        needed, places = np.unique(indices, return_inverse=True)
        given = frames[: len(needed)]
        result = read(needed, given)
        if len(needed) < len(indices):
            # From the end, so that no frame is overwritten before it has been copied to its last place.
            for place in range(len(indices) - 1, -1, -1):
                frames[place] = given[places[place]]
        return result

    def _read_plainly(self, indices: npt.NDArray[np.int64], frames: npt.NDArray[np.uint8]) -> bool:
        has_read = self._by_decord and self._read_by_decord(indices, frames)
        return has_read and _is_beyond_doubt(frames)

    def _read(self, indices: npt.NDArray[np.int64], frames: npt.NDArray[np.uint8]) -> str:
        has_read = self._by_decord and self._read_by_decord(indices, frames)
        if has_read and _is_beyond_doubt(frames):
            return decoder_class("decord")
        checked = np.empty_like(frames)
        self._strict.read(indices, checked)
        if self._by_decord and (has_read or self._read_alone(indices, frames)) and _agree(frames, checked):
            return decoder_class("decord")
        frames[:] = checked
        return decoder_class("av")

    def _read_by_decord(self, indices: npt.NDArray[np.int64], frames: npt.NDArray[np.uint8]) -> bool:
        """Whether decord, reading on in the file or in a long excerpt of it, gave all frames."""
        try:
            reader = self._decord_with(int(indices[0]), int(indices[-1]))
            reader.read(indices - self._held.start, frames)
        except MemoryError:
            raise
        except _NumberingError:
            self._by_decord = False
            return False
        except Exception as error:
            # decord raises errors of many types; after any of them its reader is of no use.
            self._decord = None
            # At some small widths it pads lines and then finds its own picture too large.
            self._by_decord = "must exactly match" not in str(error)
            return False
        return True

    def _decord_with(self, first: int, last: int) -> _DecordReader:
        """A reader that has the frames from `first` to `last` and what they refer to.

        An excerpt begins at a key frame, so that clips within a long group of pictures would each decode it from its
        beginning. The excerpt of a clip that stands alone ends with it; one for a clip that follows on the last excerpt
        is three times as long as that.
        """
        key_frame = self._scan.key_frame_before(first)
        if self._decord is not None and self._held.start <= key_frame and last < self._held.stop:
            return self._decord
        self._decord = None
        if self._fits_memory:
            whole = io.BufferedReader(_Media(self._media_fd))
            self._decord = _DecordReader(whole, self._scan, self._shape, self._sign_of_life)
            self._held = range(len(self._scan.pts))
            return self._decord
        follows = self._held.start <= key_frame <= self._held.stop and first >= self._held.start
        reach = max(last, key_frame + 3 * len(self._held)) if follows else last
        excerpt, alone, num_held = _excerpt(
            self._media_fd, self._scan, self._limits, key_frame, last, reach, self._sign_of_life
        )
        self._decord = _DecordReader(excerpt, alone, self._shape, self._sign_of_life)
        self._held = range(key_frame, key_frame + num_held)
        return self._decord

    def _read_alone(self, indices: npt.NDArray[np.int64], frames: npt.NDArray[np.uint8]) -> bool:
        """Whether decord gave all frames from a file that ends with the last of them."""
        first, last = self._scan.key_frame_before(int(indices[0])), int(indices[-1])
        try:
            excerpt, alone, _ = _excerpt(
                self._media_fd, self._scan, self._limits, first, last, last, self._sign_of_life
            )
            _DecordReader(excerpt, alone, self._shape, self._sign_of_life).read(indices - first, frames)
        except MemoryError:
            raise
        except Exception:
            return False
        return True


def _excerpt(
    media_fd: int,
    scan: Scan,
    limits: DecodeLimits,
    first: int,
    last: int,
    reach: int,
    sign_of_life: Callable[[], None],
) -> tuple[io.BytesIO, Scan, int]:
    """A file of the same kind with the packets that the frames from the key frame `first` to `last` need.

    It goes on to the frame `reach` where it does not become too large. Some frames that are shown later may be in it,
    because others refer to them.

    Returns:
        the file, its scan, and how many frames from `first` on are in it without a gap.
    """
    import av

    made = io.BytesIO()
    missing = set(map(int, scan.pts[first : last + 1]))
    wished = set(map(int, scan.pts[last + 1 : reach + 1]))
    copied: list[int] = []
    with (
        _open_container(media_fd, limits) as container,
        av.open(made, "w", format="mp4" if scan.container == "mov" else scan.container) as copy,
    ):
        stream, _ = _choose_stream(container, limits)
        target = copy.add_stream_from_template(stream)
        container.seek(int(scan.pts[first]), stream=stream)
        for packet in _packets(container, stream):
            sign_of_life()
            time = None if packet is None else _time_of(packet)
            is_enough = not missing and (not wished or made.tell() > _LARGEST_EXCERPT_BYTES)
            if packet is None or time is None or is_enough:
                break
            if copied or time == scan.pts[first]:
                missing.discard(time)
                wished.discard(time)
                copied.append(time)
                packet.stream = target
                copy.mux(packet)
    made.seek(0)
    pts = np.array(sorted(copied), dtype=np.int64)
    is_held = np.isin(scan.pts[first:], pts)
    num_held = len(is_held) if is_held.all() else int(is_held.argmin())
    key_frames = scan.key_frames[(first < scan.key_frames) & (scan.key_frames < first + num_held)] - first
    return made, dataclasses.replace(scan, pts=pts, key_frames=np.insert(key_frames, 0, 0)), num_held


def _needs_own_turning(scan: Scan) -> bool:
    """Whether decord does not show the picture as the display matrix says: it knows the turns of MP4, and no flips."""
    a, b, c, d = scan.orientation
    return a * d - b * c < 0 or (scan.orientation != (1, 0, 0, 1) and scan.container != "mov")


def _is_beyond_doubt(frames: npt.NDArray[np.uint8]) -> bool:
    """Whether decord's frames need no strict decoder.

    decord puts the last good frame in a damaged one's place without a word, and the FFmpeg in it hides errors in the
    picture and says so on standard error only. Whether a picture stands still or a decoder repeats itself, only a
    strict decoder can tell. A complaint counts from then on: damage goes from frame to frame.
    """
    return os.fstat(sys.stderr.fileno()).st_size == 0 and not _repeats(frames).any()


def _repeats(frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """`(n - 1,)`: whether a frame of `(n, H, W, 3)` is byte for byte the one before it."""
    # Few lines tell most frames apart.
    may_repeat = (frames[1:, ::16] == frames[:-1, ::16]).all(axis=(1, 2, 3))
    for place in np.flatnonzero(may_repeat):
        may_repeat[place] = np.array_equal(frames[place], frames[place + 1])
    return np.asarray(may_repeat, dtype=np.bool_)


def _agree(frames: npt.NDArray[np.uint8], checked: npt.NDArray[np.uint8]) -> bool:
    """Whether decord's frames show what the strict decoder saw, up to the scalers, and repeat only what it repeats."""
    if (_repeats(frames) & ~_repeats(checked)).any():
        return False
    return all(
        float(np.abs(one.astype(np.int16) - other).mean()) <= _AGREEMENT_LEVELS
        for one, other in zip(frames, checked, strict=True)
    )


@functools.cache
def decoder_class(package: str) -> str:
    """decord 0.6.0 -> "decord-0.6", PyAV 18.1.0 -> "pyav-18", Pillow 13.0.0 -> "pillow-13"."""
    if package == "decord":
        try:
            version = importlib.metadata.version("decord")
        except importlib.metadata.PackageNotFoundError:
            return f"decord2-{importlib.metadata.version('decord2').split('.')[0]}"
        return f"decord-{'.'.join(version.split('.')[:2])}"
    major = importlib.metadata.version(package).split(".")[0]
    return f"{'pyav' if package == 'av' else package}-{major}"


def open_picture(media_fd: int, limits: DecodeLimits) -> tuple[Image.Image, str]:
    """The picture as it is meant to be seen, in RGB, and its format's name.

    EXIF orientation is applied. Transparency is laid on white, as img2dataset does. 16-bit grey keeps its upper
    8 bits. Of an animation the first frame counts.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    # Pillow only warns; the limit here is the configured one.
    Image.MAX_IMAGE_PIXELS = None
    try:
        picture: Image.Image = Image.open(io.BufferedReader(_Media(media_fd)), formats=IMAGE_FORMATS)
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
