"""Pictures of latents and clips: strips, a grid as PNG, an animation as GIF or WebP.

Not a decoder: it draws what it is given. The commands `latentmill preview` and `report` and the demo draw with it.
"""

from __future__ import annotations

import io
import math
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
_WEBP_QUALITIES = (72, 50, 30)
_STILL_QUALITY = 60


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


def held_latent(frames: Frames, num_frames: int) -> Frames:
    """A frame for each of a clip's: a latent's stands for the group that ends with its key frame."""
    step = max(1, (num_frames - 1) // max(1, len(frames) - 1))
    return frames[[min(len(frames) - 1, -(-frame // step)) for frame in range(num_frames)]]


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
    _write_gif(path, images, fps)


def write_animation(path: Path, frames: Frames, fps: float) -> None:
    """One clip `(T, h, w, 3)` at its own size as an endless GIF."""
    _write_gif(path, [Image.fromarray(frame) for frame in frames], fps)


def _write_gif(path: Path, images: Sequence[Image.Image], fps: float) -> None:
    # One palette for all frames: by itself Pillow looks for one in each, which takes ten times as long and flickers.
    step = math.ceil(math.sqrt(len(images)))
    sample = Image.fromarray(np.concatenate([np.asarray(image)[::step, ::step] for image in images]))
    palette = sample.quantize(256)
    frames = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class WebP:
    """A picture, animated or not, as the bytes of a file."""

    data: bytes
    width_px: int
    height_px: int


def side_by_side(
    clips: Sequence[Frames], fps: float, *, panel_px: int, max_frames: int, max_bytes: int
) -> tuple[WebP, WebP]:
    """Clips `(T, h, w, 3)` that play in step in one picture, endlessly, and the first frame of it by itself.

    Args:
        clips: of one length; of any sizes with one aspect ratio.
        fps: of the clips, so that they take their true time.
        panel_px: the longer side of each; nothing is enlarged beyond it.
        max_frames: of the picture; of longer clips every n-th frame is shown.
        max_bytes: quality goes down until the animation fits, then frames are left out, down to three.
    """
    num_frames = len(clips[0])
    step = max(1, -(-num_frames // max_frames))
    shown = [_beside([clip[index] for clip in clips], panel_px) for index in range(0, num_frames, step)]
    still = _webp(shown[:1], 0, _STILL_QUALITY)
    if len(shown) == 1:
        return _webp(shown, 0, _WEBP_QUALITIES[0]), still
    while True:
        for quality in _WEBP_QUALITIES:
            picture = _webp(shown, round(1000 * step / fps), quality)
            if len(picture.data) <= max_bytes or len(shown) < 4:
                return picture, still
        shown, step = shown[::2], 2 * step


def _beside(pictures: Sequence[Frames], panel_px: int) -> Image.Image:
    height_px, width_px = pictures[0].shape[:2]
    scale = panel_px / max(height_px, width_px)
    size = max(1, round(width_px * scale)), max(1, round(height_px * scale))
    canvas = Image.new("RGB", ((size[0] + _GAP_PX) * len(pictures) - _GAP_PX, size[1]), (128, 128, 128))
    for place, picture in enumerate(pictures):
        # Latents and small clips stay sharp when they grow.
        how = Image.Resampling.NEAREST if picture.shape[0] < size[1] else Image.Resampling.LANCZOS
        canvas.paste(Image.fromarray(picture).resize(size, how), (place * (size[0] + _GAP_PX), 0))
    return canvas


def _webp(images: Sequence[Image.Image], duration_ms: int, quality: int) -> WebP:
    buffer = io.BytesIO()
    if len(images) == 1:
        images[0].save(buffer, "WEBP", quality=quality, method=4)
    else:
        images[0].save(
            buffer,
            "WEBP",
            save_all=True,
            append_images=images[1:],
            duration=duration_ms,
            loop=0,
            quality=quality,
            method=2,
        )
    return WebP(data=buffer.getvalue(), width_px=images[0].width, height_px=images[0].height)
