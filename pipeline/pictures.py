"""Pictures of latents and clips: strips, a grid as PNG, an animation as GIF.

Not a decoder: it draws what it is given. The command `latentmill preview` and the demo draw with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Frames = npt.NDArray[np.uint8]
_GAP_PX = 4
_TEXT_PX = 14
_BACKGROUND = (250, 250, 250)


def latent_to_frames(latent: npt.NDArray[np.floating], scale: int = 8) -> Frames:
    """Latent `(C, t, h, w)` -> uint8 `(t, scale * h, scale * w, 3)`: its first three channels as red, green and blue.

    Each channel is stretched from its 1st to its 99th percentile over the whole clip, so that motion shows as motion.
    Fewer than three channels repeat the last one. What the colours mean depends on the VAE.
    """
    values = latent[[0, min(1, len(latent) - 1), min(2, len(latent) - 1)]].astype(np.float32)
    low, high = np.percentile(values, (1, 99), axis=(1, 2, 3), keepdims=True)
    unit = ((values - low) / np.maximum(high - low, 1e-6)).clip(0, 1)
    pixels: Frames = (unit * 255).round().astype(np.uint8).transpose(1, 2, 3, 0)
    return pixels.repeat(scale, axis=1).repeat(scale, axis=2)


def spread(num_frames: int, num_shown: int) -> list[int]:
    """Indices of `num_shown` frames spread over a clip, the first and the last among them."""
    return sorted({round(index) for index in np.linspace(0, num_frames - 1, num_shown)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a grid: a label and pictures side by side, uint8 `(h, w, 3)`."""

    label: str
    pictures: Sequence[Frames]


def _fit(picture: Frames, height_px: int) -> Image.Image:
    image = Image.fromarray(picture)
    width_px = max(1, round(image.width * height_px / image.height))
    return image.resize((width_px, height_px), Image.Resampling.LANCZOS)


def grid(title: str, rows: Sequence[Row], height_px: int = 96) -> Image.Image:
    """The rows under each other, every picture brought to the same height, each row under its label."""
    lines = [[_fit(picture, height_px) for picture in row.pictures] for row in rows]
    width_px = max([sum(image.width + _GAP_PX for image in line) for line in lines] + [8 * len(title)])
    row_px = height_px + _TEXT_PX + _GAP_PX
    canvas = Image.new("RGB", (width_px + _GAP_PX, _TEXT_PX + 2 * _GAP_PX + row_px * len(rows)), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((_GAP_PX, _GAP_PX), _drawable(title), fill=(0, 0, 0))
    for index, (row, line) in enumerate(zip(rows, lines, strict=True)):
        top = _TEXT_PX + 2 * _GAP_PX + index * row_px
        draw.text((_GAP_PX, top), _drawable(row.label), fill=(90, 90, 90))
        left = _GAP_PX
        for image in line:
            canvas.paste(image, (left, top + _TEXT_PX))
            left += image.width + _GAP_PX
    return canvas


def _drawable(text: str) -> str:
    # The font that Pillow carries knows Latin-1; other letters become question marks instead of an error.
    return text.encode("latin-1", "replace").decode("latin-1").replace("\n", " ")[:160]


def write_gif(path: Path, title: str, clips: Sequence[Sequence[Frames]], fps: float, height_px: int = 128) -> None:
    """An endless animation: each entry of `clips` is a row of clips `(T, h, w, 3)` that play side by side.

    A clip that is shorter than the longest holds its last frame.
    """
    num_frames = max(len(frames) for row in clips for frames in row)
    images = [
        grid(title, [Row(label="", pictures=[f[min(t, len(f) - 1)] for f in row]) for row in clips], height_px)
        for t in range(num_frames)
    ]
    images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
