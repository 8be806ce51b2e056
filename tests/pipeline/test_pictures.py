"""Pictures: sizes, ranges, and hostile labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.pictures import Row, grid, latent_to_frames, spread, write_animation, write_gif


@pytest.mark.parametrize("num_channels", [1, 2, 4, 16])
def test_a_latent_of_any_channels_becomes_rgb_frames_that_use_the_range(num_channels: int) -> None:
    latent = np.random.default_rng(0).normal(size=(num_channels, 5, 6, 7)).astype(np.float16)
    frames = latent_to_frames(latent)
    assert (frames.shape, frames.dtype) == ((5, 48, 56, 3), np.uint8)
    assert frames.min() == 0
    assert frames.max() == 255


def test_a_constant_latent_is_drawn_without_a_division_by_zero() -> None:
    assert not latent_to_frames(np.ones((4, 1, 2, 2), np.float32)).any()


def test_the_first_and_the_last_frame_are_always_shown() -> None:
    assert spread(17, 3) == [0, 8, 16]
    assert spread(1, 3) == [0]


def test_a_grid_shows_every_row_whatever_its_label() -> None:
    picture = np.zeros((20, 40, 3), np.uint8)
    image = grid("title", [Row(label="plain", pictures=[picture]), Row(label="\u732b\n\x00", pictures=[picture] * 5)])
    assert image.width >= 5 * 192
    assert np.asarray(image).min() == 0


def test_an_animation_has_a_frame_for_every_frame_of_the_longest_clip(tmp_path: Path) -> None:
    clips = [np.random.default_rng(n).integers(0, 255, (n, 16, 16, 3), np.uint8) for n in (3, 5)]
    write_gif(tmp_path / "a.gif", "title", [clips], fps=8)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 5
        assert gif.info["loop"] == 0


def test_an_animation_has_the_colours_of_every_scene(tmp_path: Path) -> None:
    scenes = [(200, 30, 30), (30, 180, 40), (40, 50, 220), (240, 240, 30), (20, 20, 20)]
    frames = np.array([np.full((24, 32, 3), colour) for colour in scenes], np.uint8)
    write_animation(tmp_path / "a.gif", frames, fps=8)
    with Image.open(tmp_path / "a.gif") as gif:
        for number, frame in enumerate(frames):
            gif.seek(number)
            assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - frame).max() < 8
