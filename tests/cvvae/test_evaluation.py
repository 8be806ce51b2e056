"""Figures of clips where they are known beforehand: an inflated model is its image VAE, a still clip does not move."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from image_vaes import narrow_image_vae

import cvvae
from cvvae import metrics
from cvvae.evaluation import ClipEvaluator, NonfiniteError, Pixels, mean_figures
from cvvae.inflate import inflate
from cvvae.teachers import FrozenTeacher, KLTeacher

SIDE_PX = 32


@pytest.fixture(scope="module")
def image_vae() -> Any:
    return narrow_image_vae(0)


@pytest.fixture(scope="module")
def teacher(image_vae: Any) -> FrozenTeacher:
    return FrozenTeacher(KLTeacher(image_vae))


@pytest.fixture(scope="module")
def twin(image_vae: Any) -> cvvae.CVVAE:
    """The video VAE that is the image VAE frame by frame."""
    return inflate(image_vae)


def _picture() -> Pixels:
    y, x = np.mgrid[:SIDE_PX, : 4 * SIDE_PX]
    waves = 127 + 60 * np.sin(x / 3) + 50 * np.cos(y / 4)
    return np.stack([waves, waves[::-1], 255 - waves], axis=-1).clip(0, 255).astype(np.uint8)


def _moving(num_frames: int = 9) -> Pixels:
    return np.stack([_picture()[:, 3 * t : 3 * t + SIDE_PX] for t in range(num_frames)])


def _still(num_frames: int = 9) -> Pixels:
    return np.repeat(_moving(1), num_frames, axis=0)


def test_the_inflated_model_is_found_to_be_its_image_vae(twin: cvvae.CVVAE, teacher: FrozenTeacher) -> None:
    evaluator = ClipEvaluator(twin, teacher)
    figures, _ = evaluator.measure(_moving())
    assert figures.compatibility is not None
    assert figures.image_vae is not None
    assert figures.image_vae_held is not None
    image_decoder, video_decoder = figures.compatibility.image_decoder, figures.compatibility.video_decoder
    assert image_decoder.psnr_db == pytest.approx(image_decoder.ceiling_psnr_db, abs=0.01)
    assert video_decoder.psnr_db == pytest.approx(video_decoder.ceiling_psnr_db, abs=0.01)
    assert figures.video_vae.key_psnr_db == pytest.approx(figures.image_vae.key_psnr_db, abs=0.01)
    assert figures.latents.to_image_vae == pytest.approx(0, abs=1e-4)
    assert figures.latents.single_frame_to_image_vae == pytest.approx(0, abs=1e-4)
    assert figures.latents.first_to_single_frame == pytest.approx(0, abs=1e-4)
    channels = evaluator.channels()
    assert channels is not None
    assert channels.num_values == 3 * (SIDE_PX // 8) ** 2
    assert channels.deviation_ratio.min == pytest.approx(1, abs=1e-3)
    assert channels.deviation_ratio.max == pytest.approx(1, abs=1e-3)
    assert channels.correlation_spread.min == pytest.approx(1, abs=1e-3)


def test_a_causal_model_has_no_seams_in_time_and_does_not_flicker(twin: cvvae.CVVAE) -> None:
    figures, _ = ClipEvaluator(twin, None).measure(_moving(), probe=True)
    assert figures.probe is not None
    assert figures.probe.chunked is not None
    assert figures.probe.chunked.chunk_frames == 4
    assert figures.probe.chunked.latent_rms < 1e-4
    assert figures.probe.chunked.frame_rms < 0.05
    assert figures.probe.still_flicker == pytest.approx(0, abs=0.05)
    assert len(figures.probe.still_frame_flicker) == 8


def test_a_published_model_has_seams_where_chunks_and_tiles_meet(make_model: Any, teacher: FrozenTeacher) -> None:
    vae = make_model("CVVAEModel")
    figures, _ = ClipEvaluator(vae, teacher).measure(_moving(), probe=True)
    assert figures.probe is not None
    chunked, tiled = figures.probe.chunked, figures.probe.tiled
    assert chunked is not None
    assert tiled is not None
    assert (chunked.chunk_frames, chunked.tile_px) == (4, 0)
    assert (tiled.chunk_frames, tiled.tile_px) == (0, 16)
    assert len(chunked.by_latent) == 3
    assert len(chunked.frame_psnr_db_difference) == 9
    # Norms pool over a chunk, so that even the first one differs; so does every latent.
    assert min(chunked.by_latent) > 1e-3
    assert tiled.latent_rms > 1e-3
    assert chunked.latent_rms == pytest.approx(math.sqrt(np.mean(np.square(chunked.by_latent))), rel=1e-4)


def test_probing_leaves_the_model_as_it_was(make_model: Any) -> None:
    vae = make_model("CVVAEModel")
    evaluator = ClipEvaluator(vae, None)
    plain, _ = evaluator.measure(_moving())
    evaluator.measure(_moving(), probe=True)
    again, _ = evaluator.measure(_moving())
    assert again == plain


def test_a_clip_is_measured_as_the_mean_of_its_frames(twin: cvvae.CVVAE, teacher: FrozenTeacher) -> None:
    figures, pictures = ClipEvaluator(twin, teacher).measure(_moving())
    video = figures.video_vae
    made, pixels = (torch.from_numpy(x).permute(0, 3, 1, 2).float() for x in (pictures.video_vae, pictures.original))
    assert video.frame_psnr_db == pytest.approx(metrics.psnr_db(made, pixels).tolist())
    assert video.psnr_db == pytest.approx(np.mean(video.frame_psnr_db))
    assert video.key_psnr_db == pytest.approx(np.mean(video.frame_psnr_db[::4]))
    assert video.between_psnr_db == pytest.approx(np.mean([db for t, db in enumerate(video.frame_psnr_db) if t % 4]))
    assert video.ssim == pytest.approx(np.mean(video.frame_ssim))
    assert len(video.frame_temporal_difference) == 8
    assert video.lpips is None
    assert pictures.image_decoder is not None
    assert pictures.image_decoder.shape == (3, SIDE_PX, SIDE_PX, 3)


def test_the_image_vae_with_interpolation_holds_its_keys_and_blends_between(
    twin: cvvae.CVVAE, teacher: FrozenTeacher
) -> None:
    figures, pictures = ClipEvaluator(twin, teacher).measure(_moving())
    assert figures.image_vae is not None
    assert figures.image_vae_interpolated is not None
    assert figures.image_vae_interpolated.frame_psnr_db[::4] == pytest.approx(figures.image_vae.frame_psnr_db[::4])
    assert figures.above_interpolation_db == pytest.approx(
        figures.video_vae.psnr_db - figures.image_vae_interpolated.psnr_db
    )
    frames = pictures.image_vae_interpolated
    assert frames is not None
    middle = (frames[0].astype(float) + frames[4]) / 2
    assert np.abs(frames[2] - middle).max() <= 1.0


def test_moving_clips_are_told_from_static_ones(twin: cvvae.CVVAE) -> None:
    evaluator = ClipEvaluator(twin, None)
    moving, _ = evaluator.measure(_moving())
    still, _ = evaluator.measure(_still())
    assert moving.is_moving
    assert moving.motion is not None
    assert moving.motion > 5
    assert not still.is_moving
    assert still.motion == 0
    assert still.interpolation_psnr_db == metrics.MAX_PSNR_DB
    assert ClipEvaluator(twin, None, moving_below_db=5.0).measure(_moving())[0].is_moving is False


def test_an_image_has_the_figures_that_an_image_can_have(twin: cvvae.CVVAE, teacher: FrozenTeacher) -> None:
    figures, _ = ClipEvaluator(twin, teacher).measure(_moving(1), probe=True)
    assert figures.num_frames == 1
    assert not figures.is_moving
    assert (figures.motion, figures.interpolation_psnr_db) == (None, None)
    assert figures.video_vae.between_psnr_db is None
    assert figures.video_vae.temporal_difference is None
    assert figures.video_vae.psnr_db == figures.video_vae.key_psnr_db
    assert figures.probe is not None
    assert (figures.probe.chunked, figures.probe.still_flicker) == (None, None)


def test_without_a_teacher_there_is_only_reconstruction(make_model: Any) -> None:
    evaluator = ClipEvaluator(make_model("CVVAESD3Model"), None)
    figures, pictures = evaluator.measure(_moving())
    assert figures.video_vae.psnr_db > 0
    assert (figures.image_vae, figures.compatibility, figures.above_interpolation_db) == (None, None, None)
    assert figures.latents.to_image_vae is None
    assert figures.latents.first_to_single_frame > 0
    assert pictures.image_decoder is None
    assert evaluator.channels() is None


def test_a_teacher_with_other_latent_channels_is_refused(make_model: Any, teacher: FrozenTeacher) -> None:
    with pytest.raises(ValueError, match="have 16 channels and the image VAE's 4"):
        ClipEvaluator(make_model("CVVAESD3Model"), teacher)


def test_a_perceptual_distance_is_taken_of_every_frame_in_its_own_range(twin: cvvae.CVVAE) -> None:
    def distance(frames: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        assert frames.shape == reference.shape
        assert max(frames.abs().max(), reference.abs().max()) <= 1
        return (frames - reference).abs().mean(dim=(1, 2, 3))

    figures, pictures = ClipEvaluator(twin, None, perceptual=distance).measure(_moving())
    expected = np.abs(pictures.video_vae.astype(float) - pictures.original).mean(axis=(1, 2, 3)) / 127.5
    assert figures.video_vae.frame_lpips == pytest.approx(expected.tolist(), rel=1e-4)
    assert figures.video_vae.lpips == pytest.approx(expected.mean(), rel=1e-4)


def test_a_model_that_gives_nan_is_said_to_do_so(image_vae: Any) -> None:
    vae = inflate(image_vae)
    vae.encoder.conv_out.bias.data[0] = math.nan
    with pytest.raises(NonfiniteError, match="48 of 192 latent values"):
        ClipEvaluator(vae, None).measure(_moving())


def test_timing_stands_beside_the_image_vae_on_every_frame(twin: cvvae.CVVAE, teacher: FrozenTeacher) -> None:
    timing = ClipEvaluator(twin, teacher).time(_moving(5), num_rounds=2)
    assert timing.clip_shape == [5, SIDE_PX, SIDE_PX, 3]
    assert timing.image_vae_encode_ms_per_frame is not None
    assert timing.encode_ratio == pytest.approx(timing.image_vae_encode_ms_per_frame / timing.encode_ms_per_frame)
    alone = ClipEvaluator(twin, None).time(_moving(5), num_rounds=1)
    assert alone.decode_ms_per_frame > 0
    assert (alone.encode_ratio, alone.decode_ratio) == (None, None)


def test_means_leave_out_what_a_clip_does_not_have(twin: cvvae.CVVAE) -> None:
    evaluator = ClipEvaluator(twin, None)
    video, image = (dataclasses.asdict(evaluator.measure(clip)[0]) for clip in (_moving(), _moving(1)))
    means = mean_figures([image, video])
    assert means["motion"] == video["motion"]
    assert means["video_vae"]["psnr_db"] == pytest.approx(
        (video["video_vae"]["psnr_db"] + image["video_vae"]["psnr_db"]) / 2
    )
    assert means["image_vae"] is None
    assert "frame_psnr_db" not in means["video_vae"]
    assert "num_frames" not in means
