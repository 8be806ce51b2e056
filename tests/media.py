"""Media that no camera makes: broken, empty, huge, endless and hostile files, made with the ffmpeg of imageio-ffmpeg.

Not fixtures and not tests. The files are made where they are needed and never committed.
"""

from __future__ import annotations

import io
import subprocess
import tempfile
from pathlib import Path

import imageio_ffmpeg
from PIL import Image


def ffmpeg(*arguments: str, suffix: str = ".mp4") -> bytes:
    """What ffmpeg writes for these arguments, without the output name, as bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"made{suffix}"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *arguments, str(path)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        return path.read_bytes()


def moving_pattern(size: str, fps: str, seconds: float, *more: str, suffix: str = ".mp4") -> bytes:
    """A synthetic video of SIZE WIDTHxHEIGHT."""
    source = f"testsrc=size={size}:rate={fps}:duration={seconds}"
    return ffmpeg("-f", "lavfi", "-i", source, "-pix_fmt", "yuv420p", *more, suffix=suffix)


def audio_only() -> bytes:
    """An mp4 with sound and no picture."""
    return ffmpeg("-f", "lavfi", "-i", "sine=frequency=440:duration=2", "-c:a", "aac")


def two_frames() -> bytes:
    """A video of two frames."""
    return moving_pattern("256x256", "8", 0.25, "-frames:v", "2")


def one_hour_of_16_px() -> bytes:
    """An hour of tiny pictures, one a second: small on disk, long in time."""
    return moving_pattern("16x16", "1", 3600, "-c:v", "libx264", "-preset", "ultrafast")


def png_header_of_16384_px() -> bytes:
    """A picture that is small on disk and a gigabyte in memory as RGB."""
    buffer = io.BytesIO()
    Image.new("1", (16384, 16384)).save(buffer, "PNG")
    return buffer.getvalue()
