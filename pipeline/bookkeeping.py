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

import numpy as np

_TS_PACKET_BYTES = 188
# A plain transport stream; with a time code before each packet (M2TS); with a checksum behind each (DVB).
_TS_STRIDES = ((188, 0), (192, 4), (204, 0))
_TS_SYNC = 0x47
_TS_PACKETS_PER_READ = 1 << 15
_NULL_PACKET = 0x1FFF
_AVI_MEDIA_CHUNK = re.compile(rb"\d\d(?:dc|db|wb|tx|pc|sb|iv)|ix\d\d|JUNK|LIST|idx1|rec ")
_AVI_NAME = re.compile(rb"[ -~]{4}")
_ZEROS_PER_READ_BYTES = 1 << 20


def transport_stream_problem(media_fd: int) -> str | None:
    """What is missing from an MPEG transport stream, or None where every packet follows the one before it."""
    num_bytes = os.fstat(media_fd).st_size
    found = next((layout for layout in _TS_STRIDES if _has_sync(media_fd, num_bytes, *layout)), None)
    if found is None:
        return "it does not begin with transport packets"
    stride, offset = found
    # A last packet without its checksum or a time code without its packet loses no frame.
    if num_bytes % stride and (num_bytes % stride) - offset != _TS_PACKET_BYTES:
        return f"it ends inside a transport packet, after {num_bytes} bytes"
    last_counters: dict[int, int] = {}
    for first in range(0, num_bytes, stride * _TS_PACKETS_PER_READ):
        block = os.pread(media_fd, stride * _TS_PACKETS_PER_READ, first)
        packets = np.frombuffer(block, dtype=np.uint8, count=len(block) // stride * stride).reshape(-1, stride)
        headers = packets[:, offset : offset + 6]
        unsynced = np.flatnonzero(headers[:, 0] != _TS_SYNC)
        if len(unsynced):
            return f"no transport packet is at byte {first + int(unsynced[0]) * stride}"
        problem = _lost_packets(headers, last_counters)
        if problem is not None:
            return f"{problem} after byte {first}"
    return None


def _has_sync(media_fd: int, num_bytes: int, stride: int, offset: int) -> bool:
    places = range(offset, min(num_bytes, 3 * stride), stride)
    return all(os.pread(media_fd, 1, place) == bytes([_TS_SYNC]) for place in places) and len(places) > 0


def _lost_packets(headers: np.ndarray, last_counters: dict[int, int]) -> str | None:
    """Follows the counter of each stream through `headers` `(n, 6)`."""
    if (headers[:, 1] & 0x80).any():
        return "a transport packet says itself that it is damaged"
    streams = ((headers[:, 1].astype(np.int32) & 0x1F) << 8) | headers[:, 2]
    has_payload = (headers[:, 3] & 0x10) != 0
    # The adaptation field may announce that the counter jumps.
    jumps = ((headers[:, 3] & 0x20) != 0) & (headers[:, 4] > 0) & ((headers[:, 5] & 0x80) != 0)
    for stream in np.unique(streams[has_payload]):
        if stream == _NULL_PACKET:
            continue
        of_stream = (streams == stream) & has_payload
        counters = headers[of_stream, 3].astype(np.int32) & 0x0F
        before = np.concatenate([[last_counters.get(int(stream), counters[0] - 1)], counters[:-1]])
        # A packet may be sent twice.
        steps = (counters - before) % 16
        if ((steps > 1) & ~jumps[of_stream]).any():
            return f"packets of the stream {int(stream)} are missing"
        last_counters[int(stream)] = int(counters[-1])
    return None


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
