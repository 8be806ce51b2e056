"""Whether a container is whole by its own bookkeeping, where demuxers pass over damage without a word.

Not a demuxer: nothing is parsed but what says that a piece is missing. An AVI is a row of chunks, and behind a damaged
one FFmpeg searches for anything that looks like a chunk; an MPEG transport stream is a row of packets that are counted,
and FFmpeg looks for the next one. The frames that got lost between would be missing from clips that look whole.
Called by `frames`; the layouts are those of Microsoft's "AVI RIFF File Reference" and ISO/IEC 13818-1, 2.4.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_TS_PACKET_BYTES = 188
# A plain transport stream; with a time code before each packet (M2TS); with a checksum behind each (DVB).
_TS_STRIDES = (188, 192, 204)
_TS_SYNC = 0x47
_TS_PACKETS_PER_READ = 1 << 15
_TS_PROBE_PACKETS = 5
_PROGRAM_TABLE = 0
_AVI_MEDIA_CHUNK = re.compile(rb"\d\d(?:dc|db|wb|tx|pc|sb|iv)|ix\d\d|JUNK|LIST|idx1|rec ")
_AVI_NAME = re.compile(rb"[ -~]{4}")
_ZEROS_PER_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TransportCheck:
    """What the packets of one elementary stream say of themselves.

    Attributes:
        problem: what is missing from the middle, or None where every packet follows the one before it.
        ends_inside_packet: the last packet, of whatever stream, is not whole; the frame that came last may not be.
    """

    problem: str | None
    ends_inside_packet: bool = False


def check_transport_stream(media_fd: int, stream: int) -> TransportCheck:
    """Follows the packets of one stream of an MPEG transport stream.

    Others do not count: recorders drop, add and rewrite sound and tables without renumbering them.

    Args:
        stream: the packet identifier (PID), 13 bits.
    """
    num_bytes = os.fstat(media_fd).st_size
    found = _first_packet(os.pread(media_fd, (_TS_PROBE_PACKETS + 1) * max(_TS_STRIDES), 0))
    if found is None:
        return TransportCheck("it does not begin with transport packets")
    stride, start = found
    counters = _Counters(stream)
    for first in range(start, num_bytes, stride * _TS_PACKETS_PER_READ):
        block = os.pread(media_fd, stride * _TS_PACKETS_PER_READ, first)
        # The last packet needs neither its checksum nor the time code of a next one.
        num_packets = (len(block) - _TS_PACKET_BYTES) // stride + 1
        packets = np.frombuffer(block.ljust(num_packets * stride), dtype=np.uint8, count=num_packets * stride)
        headers = packets.reshape(-1, stride)[:, :6]
        unsynced = np.flatnonzero(headers[:, 0] != _TS_SYNC)
        num_synced = int(unsynced[0]) if len(unsynced) else num_packets
        problem = counters.problem_in(headers[:num_synced])
        if problem is not None:
            return TransportCheck(f"{problem} after byte {first}")
        end = first + num_synced * stride
        if len(unsynced) and not _is_zero(media_fd, end, num_bytes):
            return TransportCheck(f"no transport packet is at byte {end}")
        if len(unsynced) or end < first + len(block):
            return TransportCheck(None, ends_inside_packet=True)
    return TransportCheck(None)


def _first_packet(beginning: bytes) -> tuple[int, int] | None:
    """The distance of the packets and where the first whole one is: a recording may begin inside a packet."""
    for stride in _TS_STRIDES:
        for start in range(min(stride, len(beginning))):
            if set(beginning[start : start + _TS_PROBE_PACKETS * stride : stride]) == {_TS_SYNC}:
                return stride, start
    return None


class _Counters:
    """Follows the counter of a stream, block after block."""

    def __init__(self, stream: int) -> None:
        self._stream = stream
        # The last packet with a payload, and what came behind it.
        self._rest = np.empty((0, 6), dtype=np.uint8)

    def problem_in(self, headers: npt.NDArray[np.uint8]) -> str | None:
        """What is missing from the packets of `headers` `(n, 6)`, the next ones of the file."""
        headers = np.concatenate([self._rest, headers[np.isin(_streams(headers), (self._stream, _PROGRAM_TABLE))]])
        is_own = _streams(headers) == self._stream
        if (headers[is_own, 1] & 0x80).any():
            return f"a packet of the stream {self._stream} says itself that it is damaged"
        places = np.flatnonzero(is_own & ((headers[:, 3] & 0x10) != 0))
        steps = np.diff(headers[places, 3].astype(np.int32) & 0x0F) % 16
        # A packet may be sent twice.
        for jump in np.flatnonzero(steps > 1):
            if not self._may_jump(headers[places[jump] + 1 : places[jump + 1] + 1]):
                return f"packets of the stream {self._stream} are missing"
        self._rest = headers[places[-1] :] if len(places) else headers
        return None

    def _may_jump(self, headers: npt.NDArray[np.uint8]) -> bool:
        """Whether the counter may start anew at the last of `headers`, which follow a packet with a payload."""
        is_own = _streams(headers) == self._stream
        # The adaptation field may announce it, also in a packet without a payload.
        if (is_own & ((headers[:, 3] & 0x20) != 0) & (headers[:, 4] > 0) & ((headers[:, 5] & 0x80) != 0)).any():
            return True
        # Segments that are put one behind the other each begin with the table of programs, and count from 0.
        counts_from_0 = (headers[:, 3] & 0x0F) == 0
        begins_a_unit = bool(headers[-1, 1] & 0x40)
        return begins_a_unit and bool(counts_from_0[-1]) and bool((counts_from_0 & ~is_own).any())


def _streams(headers: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    return ((headers[:, 1].astype(np.int32) & 0x1F) << 8) | headers[:, 2]


def avi_packets_before_damage(media_fd: int, stream_index: int) -> int | None:
    """How many chunks of the video stream stand one behind the other before the first piece that is none; None for all.

    Beside the lists of the media, any chunk that could be one is passed over: writers add their own, as the format
    lets them. A file that ends early, or in zeros, is no damage of this kind: its header tells how much is missing.
    """
    num_bytes = os.fstat(media_fd).st_size
    video_chunks = re.compile(rb"%02d(?:dc|db)" % stream_index)
    place, movi_end, num_video = 0, 0, 0
    while place + 12 <= num_bytes:
        name, size, kind = struct.unpack("<4sI4s", os.pread(media_fd, 12, place))
        end = place + 8 + size
        in_movi = place < movi_end
        if name == b"RIFF" or (name == b"LIST" and kind in (b"movi", b"rec ")):
            if kind == b"movi":
                # Its length is written last, and is wrong where the writer did not get there.
                movi_end = end if size > 4 and end <= num_bytes else num_bytes
            place += 12  # go in
            continue
        if name == bytes(4) and _is_zero(media_fd, place, num_bytes):
            return None
        if name == bytes(4) and in_movi and _is_zero(media_fd, place, movi_end):
            place = movi_end
            continue
        if in_movi:
            is_chunk = _AVI_MEDIA_CHUNK.fullmatch(name) is not None and (end <= movi_end or movi_end == num_bytes)
        else:
            is_chunk = _AVI_NAME.fullmatch(name) is not None and (end <= num_bytes or movi_end > 0)
        if not is_chunk:
            return num_video
        num_video += size > 0 and end <= num_bytes and video_chunks.fullmatch(name) is not None
        place = end + size % 2
    return None


def _is_zero(media_fd: int, start: int, stop: int) -> bool:
    return all(
        not any(os.pread(media_fd, min(_ZEROS_PER_READ_BYTES, stop - place), place))
        for place in range(start, stop, _ZEROS_PER_READ_BYTES)
    )
