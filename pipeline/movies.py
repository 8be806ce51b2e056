"""A clip as an MP4 file that plays anywhere.

Not a decoder: nothing of an input or an output is opened here, only pixels of this process are written. `cli` writes
previews with it.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from pipeline.errors import UsageError
from pipeline.pictures import Frames

_CODECS = {"libx264": {"crf": "16", "preset": "medium"}, "mpeg4": {"qscale": "2"}}


def write_mp4(path: Path, frames: Frames, fps: float) -> None:
    """Writes uint8 `(T, H, W, 3)` with even sides as H.264, or as MPEG-4 part 2 where this build has no encoder for it.

    Raises:
        UsageError: the file cannot be written, or no codec of this build takes the frames.
    """
    codec = next((name for name in _CODECS if name in av.codecs_available), None)
    if codec is None:
        raise UsageError(f"{path}: this build of PyAV writes neither H.264 nor MPEG-4; give a name that ends in .gif")
    try:
        with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=_CODECS[codec])
            assert isinstance(stream, av.VideoStream), f"{codec} writes video"
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            for picture in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except (OSError, av.FFmpegError) as error:
        raise UsageError(f"{path} cannot be written: {error}") from error
