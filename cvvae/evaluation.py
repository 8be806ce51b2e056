"""What a video VAE is worth, clip by clip: reconstruction, compatibility with an image VAE, seams, steadiness.

Not where clips come from and not where figures are written (`jobs/evaluate_vae.py` does both): a clip goes in, the
figures and, where asked, the pictures behind them come out. Runs with an image VAE as the measure (the teacher whose
latent space the model should share) or without one, and with every model that `cvvae.load` gives.

Key frames are the frames 0, 4, 8, ...: the ones whose image latents the video latents should equal.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cvvae import metrics
from cvvae.config import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from cvvae.metrics import ChannelAgreement, ChannelStatistics
from cvvae.model import CVVAE

MOVING_BELOW_DB = 35.0
"""A clip moves where linear interpolation between its own key frames gives less than this: an error of 4.5 levels of
255, above which motion, and no longer the codec's own error, decides what interpolation is worth."""
# Frames of one call of the image VAE; more would only take more memory.
_TEACHER_FRAMES = 4

Pixels = npt.NDArray[np.uint8]
Perceptual = Callable[[Tensor, Tensor], Tensor]


class ImageVAE(Protocol):
    """The frozen image VAE as it is used here; frames in [-1, 1], latents unscaled."""

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""

    def encode_frames(self, frames: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, H / 8, W / 8)."""

    def decode_latents(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 3, 8 h, 8 w)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameFigures:
    """One way of making a clip's frames, measured against the frames.

    Attributes:
        psnr_db: mean of the frames' PSNRs.
        key_psnr_db, between_psnr_db: the same over the key frames, and over all others (None for an image).
        ssim, lpips: means over the frames; lpips is None where it was not asked for.
        temporal_difference: mean of `frame_temporal_difference`, None for an image.
        frame_psnr_db, frame_ssim, frame_lpips: by frame.
        frame_temporal_difference: by pair of frames, mean |(x[t+1] - x[t]) - (y[t+1] - y[t])| in levels of 255.
    """

    psnr_db: float
    key_psnr_db: float
    between_psnr_db: float | None
    ssim: float
    lpips: float | None
    temporal_difference: float | None
    frame_psnr_db: Sequence[float]
    frame_ssim: Sequence[float]
    frame_lpips: Sequence[float] | None
    frame_temporal_difference: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossFigures:
    """Frames that one VAE decodes from the other one's latents.

    Attributes:
        psnr_db: mean over the frames compared.
        ceiling_psnr_db: what the decoder reaches on latents of its own encoder, over the same frames.
        key_psnr_db: over the key frames only.
        best_of_group_psnr_db: image decoder only: each picture against whichever frame of its latent's group it shows
            best. Above `psnr_db` where latents stand for another frame than the key frame.
        frame_psnr_db: by frame compared.
    """

    psnr_db: float
    ceiling_psnr_db: float
    key_psnr_db: float
    best_of_group_psnr_db: float | None
    frame_psnr_db: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentFigures:
    """How far the latents of a clip are from the image VAE's, and the first one from that of the frame alone.

    Attributes, each a root mean square of the difference over the standard deviation of the second one named:
        to_image_vae: all latents to the image VAE's of the key frames.
        single_frame_to_image_vae: the latent of frame 0 alone (T = 1) to the image VAE's.
        first_to_single_frame: the first latent of the clip to the model's own latent of frame 0 alone.
    """

    to_image_vae: float | None
    single_frame_to_image_vae: float | None
    first_to_single_frame: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Compatibility:
    """The two VAEs crossed. `image_decoder` reads video latents, `video_decoder` reads latents of the key frames."""

    image_decoder: CrossFigures
    video_decoder: CrossFigures


@dataclass(frozen=True, slots=True, kw_only=True)
class SeamFigures:
    """A clip cut into pieces against the same clip in one call.

    Attributes:
        chunk_frames, tile_px: as given to `CVVAE.set_chunking`; 0 means not cut.
        latent_rms: root mean square of the latents' difference over their standard deviation.
        psnr_db_difference: PSNR of the reconstruction in pieces less that in one call; below 0 where cutting harms.
        frame_rms: root mean square between the two reconstructions, in levels of 255.
        by_latent: `latent_rms` by latent (deviation over the whole clip).
        frame_psnr_db_difference: `psnr_db_difference` by frame.
    """

    chunk_frames: int
    tile_px: int
    latent_rms: float
    psnr_db_difference: float
    frame_rms: float
    by_latent: Sequence[float]
    frame_psnr_db_difference: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeFigures:
    """What is measured on few clips only, because each figure costs further passes through the model.

    Attributes:
        chunked: None where the clip has too few frames for two chunks.
        tiled: None where the frames are too small for two tiles.
        still_flicker: mean |y[t+1] - y[t]| in levels of 255 of a clip that repeats frame 0; 0 is steady.
        still_frame_flicker: the same by pair of frames.
    """

    chunked: SeamFigures | None
    tiled: SeamFigures | None
    still_flicker: float | None
    still_frame_flicker: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipFigures:
    """Everything measured on one clip (T = 1 + 4 k frames; an image where T = 1).

    Attributes:
        num_frames: T.
        motion: mean |x[t+1] - x[t]| of the clip itself, in levels of 255; None for an image.
        interpolation_psnr_db: the clip's own key frames with linear interpolation between, over the frames between;
            None for an image. The lower, the more the clip moves.
        is_moving: `interpolation_psnr_db` is below the threshold.
        video_vae: encoded and decoded by the model.
        image_vae: the image VAE on every frame. This and what follows is None without an image VAE.
        image_vae_interpolated: the image VAE on the key frames, linear interpolation between.
        image_vae_held: the image VAE on the key frames, each shown until the next.
        above_interpolation_db: PSNR of `video_vae` less that of `image_vae_interpolated`.
        compatibility: the two VAEs crossed.
        latents: distances between latents.
        probe: None where the clip was not probed.
    """

    num_frames: int
    motion: float | None
    interpolation_psnr_db: float | None
    is_moving: bool
    video_vae: FrameFigures
    image_vae: FrameFigures | None
    image_vae_interpolated: FrameFigures | None
    image_vae_held: FrameFigures | None
    above_interpolation_db: float | None
    compatibility: Compatibility | None
    latents: LatentFigures
    probe: ProbeFigures | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipPictures:
    """The frames behind the figures, uint8 (T, H, W, 3); `image_decoder` has one for each latent."""

    original: Pixels
    video_vae: Pixels
    image_decoder: Pixels | None
    image_vae_interpolated: Pixels | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Milliseconds per frame, medians of interleaved rounds; a ratio above 1 says how often faster the model is.

    The image VAE takes every frame, in one call or in several of one frame, whichever is faster.
    """

    num_rounds: int
    num_threads: int
    device: str
    clip_shape: Sequence[int]
    encode_ms_per_frame: float
    decode_ms_per_frame: float
    image_vae_encode_ms_per_frame: float | None
    image_vae_decode_ms_per_frame: float | None
    encode_ratio: float | None
    decode_ratio: float | None


class NonfiniteError(ValueError):
    """The model gave NaN or infinity for a clip."""


class ClipEvaluator:
    """Measures clips one after the other and gathers what is known only over all of them.

    Args:
        vae: on its device, in the dtype to compute in.
        teacher: the frozen image VAE, on the same device, or None.
        perceptual: distance of (N, 3, H, W) frames in [-1, 1], giving (N,), or None.
        chunk_frames: chunks for the seams; None: the largest that cuts the clip in two.
        tile_px: tiles for the seams; None: five eighths of the longer side, which makes two by two of a square.
        moving_below_db: see `ClipFigures.is_moving`.

    Raises:
        ValueError: the teacher has other latent channels than the model.
    """

    def __init__(
        self,
        vae: CVVAE,
        teacher: ImageVAE | None,
        *,
        perceptual: Perceptual | None = None,
        chunk_frames: int | None = None,
        tile_px: int | None = None,
        moving_below_db: float = MOVING_BELOW_DB,
    ) -> None:
        if teacher is not None and teacher.latent_channels != vae.latent_channels:
            raise ValueError(
                f"the model's latents have {vae.latent_channels} channels and the image VAE's "
                f"{teacher.latent_channels}: they cannot share a latent space; give the image VAE that the model was "
                f"made for"
            )
        self._vae = vae
        self._teacher = teacher
        self._perceptual = perceptual
        self._chunk_frames = chunk_frames
        self._tile_px = tile_px
        self._moving_below_db = moving_below_db
        self._channels = ChannelStatistics(vae.latent_channels)
        self._has_channels = False

    @torch.inference_mode()
    def measure(self, frames: Pixels, *, probe: bool = False) -> tuple[ClipFigures, ClipPictures]:
        """Figures and pictures of one clip.

        Args:
            frames: uint8 (T, H, W, 3) in 0..255, T = 1 + 4 k.
            probe: also measure seams and the still clip, at the cost of four further passes through the model.

        Raises:
            NonfiniteError: latents or decoded frames hold NaN or infinity.
        """
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).to(self._vae.device, torch.float32)
        clip = pixels.div(127.5).sub(1.0)
        keys = clip[::TEMPORAL_COMPRESSION]
        latents = self._encode(clip)
        decoded = self._decode(latents)
        num_frames = len(frames)
        video = self._figures(decoded, pixels)
        single = self._encode(clip[:1])
        interpolation_db = _interpolation_psnr_db(pixels)
        image = interpolated = held = None
        image_decoded = interpolated_frames = None
        compatibility = None
        to_teacher = single_to_teacher = None
        if self._teacher is not None:
            key_latents = self._teacher_encode(keys)
            by_frame = self._teacher_decode(self._teacher_encode(clip))
            key_frames = by_frame[::TEMPORAL_COMPRESSION].clamp(-1.0, 1.0)
            interpolated_frames = metrics.interpolate_keys(key_frames, TEMPORAL_COMPRESSION)
            image = self._figures(by_frame, pixels)
            interpolated = self._figures(interpolated_frames, pixels)
            held = self._figures(metrics.hold_keys(key_frames, TEMPORAL_COMPRESSION), pixels)
            image_decoded = self._teacher_decode(latents)
            compatibility = Compatibility(
                image_decoder=_image_decoder_figures(image_decoded, pixels, image.key_psnr_db),
                video_decoder=_video_decoder_figures(self._decode(key_latents), pixels, video.psnr_db),
            )
            to_teacher = metrics.relative_rms(latents, key_latents)
            single_to_teacher = metrics.relative_rms(single, key_latents[:1])
            self._channels.add(latents, key_latents)
            self._has_channels = True
        figures = ClipFigures(
            num_frames=num_frames,
            motion=float(metrics.frame_differences(pixels).mean()) if num_frames > 1 else None,
            interpolation_psnr_db=interpolation_db,
            is_moving=interpolation_db is not None and interpolation_db < self._moving_below_db,
            video_vae=video,
            image_vae=image,
            image_vae_interpolated=interpolated,
            image_vae_held=held,
            above_interpolation_db=video.psnr_db - interpolated.psnr_db if interpolated is not None else None,
            compatibility=compatibility,
            latents=LatentFigures(
                to_image_vae=to_teacher,
                single_frame_to_image_vae=single_to_teacher,
                first_to_single_frame=metrics.relative_rms(latents[:1], single),
            ),
            probe=self._probe(clip, pixels) if probe else None,
        )
        pictures = ClipPictures(
            original=frames,
            video_vae=_as_uint8(decoded),
            image_decoder=_as_uint8(image_decoded) if image_decoded is not None else None,
            image_vae_interpolated=_as_uint8(interpolated_frames) if interpolated_frames is not None else None,
        )
        return figures, pictures

    def channels(self) -> ChannelAgreement | None:
        """Latents against the image VAE's, over all clips measured so far; None without any or without a teacher."""
        return self._channels.agreement() if self._has_channels else None

    @torch.inference_mode()
    def time(self, frames: Pixels, *, num_rounds: int) -> Timing:
        """Time to encode and decode one clip, beside the image VAE on each of its frames, in turns.

        Args:
            frames: uint8 (T, H, W, 3).
            num_rounds: rounds that count, after one that does not.
        """
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).to(self._vae.device, torch.float32)
        clip = pixels.div(127.5).sub(1.0)
        latents = self._encode(clip)
        work: dict[str, Callable[[], object]] = {
            "encode": lambda: self._encode(clip),
            "decode": lambda: self._decode(latents),
        }
        teacher = self._teacher
        if teacher is not None:
            image_latents = teacher.encode_frames(clip)
            work |= {
                "teacher_encode": lambda: teacher.encode_frames(clip),
                "teacher_encode_single": lambda: [teacher.encode_frames(frame) for frame in clip.split(1)],
                "teacher_decode": lambda: teacher.decode_latents(image_latents),
                "teacher_decode_single": lambda: [teacher.decode_latents(latent) for latent in image_latents.split(1)],
            }
        seconds: dict[str, list[float]] = {name: [] for name in work}
        for number in range(num_rounds + 1):
            for name, run in work.items():
                _wait_for(self._vae.device)
                started = time.perf_counter()
                run()
                _wait_for(self._vae.device)
                if number:
                    seconds[name].append(time.perf_counter() - started)
        per_frame = {name: 1000 * statistics.median(taken) / len(frames) for name, taken in seconds.items()}
        teacher_ms = {
            half: min(per_frame[f"teacher_{half}"], per_frame[f"teacher_{half}_single"]) if teacher else None
            for half in ("encode", "decode")
        }
        ratios = {half: ms / per_frame[half] if ms is not None else None for half, ms in teacher_ms.items()}
        return Timing(
            num_rounds=num_rounds,
            num_threads=torch.get_num_threads(),
            device=str(self._vae.device),
            clip_shape=list(frames.shape),
            encode_ms_per_frame=per_frame["encode"],
            decode_ms_per_frame=per_frame["decode"],
            image_vae_encode_ms_per_frame=teacher_ms["encode"],
            image_vae_decode_ms_per_frame=teacher_ms["decode"],
            encode_ratio=ratios["encode"],
            decode_ratio=ratios["decode"],
        )

    def _encode(self, clip: Tensor) -> Tensor:
        """Frames (T, 3, H, W) -> latents (t, C, h, w), float32: time stands in front, as for pictures."""
        encoded = self._vae.encode(clip.transpose(0, 1).unsqueeze(0)).latent_dist.mode()[0]
        latents = encoded.transpose(0, 1).float()
        if not torch.isfinite(latents).all():
            num_bad = int((~torch.isfinite(latents)).sum())
            raise NonfiniteError(f"{num_bad} of {latents.numel()} latent values are NaN or infinite ({encoded.dtype})")
        return latents

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents (t, C, h, w) -> frames (T, 3, H, W), float32."""
        frames = self._vae.decode(latents.transpose(0, 1).unsqueeze(0)).sample[0].transpose(0, 1).float()
        if not torch.isfinite(frames).all():
            raise NonfiniteError(
                f"{int((~torch.isfinite(frames)).sum())} of {frames.numel()} decoded values are NaN or infinite"
            )
        return frames

    def _teacher_encode(self, frames: Tensor) -> Tensor:
        assert self._teacher is not None
        return torch.cat([self._teacher.encode_frames(part).float() for part in frames.split(_TEACHER_FRAMES)])

    def _teacher_decode(self, latents: Tensor) -> Tensor:
        assert self._teacher is not None
        return torch.cat([self._teacher.decode_latents(part).float() for part in latents.split(_TEACHER_FRAMES)])

    def _figures(self, decoded: Tensor, pixels: Tensor) -> FrameFigures:
        made = metrics.to_pixels(decoded)
        psnr = metrics.psnr_db(made, pixels)
        similarity = metrics.ssim(made, pixels)
        temporal = metrics.temporal_differences(made, pixels)
        lpips = None
        if self._perceptual is not None:
            pairs = zip(made.split(_TEACHER_FRAMES), pixels.split(_TEACHER_FRAMES), strict=True)
            lpips = torch.cat([self._perceptual(a / 127.5 - 1, b / 127.5 - 1).flatten().float() for a, b in pairs])
        is_key = torch.arange(len(psnr)) % TEMPORAL_COMPRESSION == 0
        return FrameFigures(
            psnr_db=float(psnr.mean()),
            key_psnr_db=float(psnr[is_key].mean()),
            between_psnr_db=float(psnr[~is_key].mean()) if len(psnr) > 1 else None,
            ssim=float(similarity.mean()),
            lpips=float(lpips.mean()) if lpips is not None else None,
            temporal_difference=float(temporal.mean()) if len(temporal) else None,
            frame_psnr_db=psnr.tolist(),
            frame_ssim=similarity.tolist(),
            frame_lpips=lpips.tolist() if lpips is not None else None,
            frame_temporal_difference=temporal.tolist(),
        )

    def _probe(self, clip: Tensor, pixels: Tensor) -> ProbeFigures:
        num_frames, _, height, width = clip.shape
        half_frames = (num_frames - 1) // 2 // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION
        chunk_frames = half_frames if self._chunk_frames is None else self._chunk_frames
        part_px = max(height, width) * 5 // 8 // SPATIAL_COMPRESSION * SPATIAL_COMPRESSION
        tile_px = part_px if self._tile_px is None else self._tile_px
        try:
            whole = self._in_pieces(clip, 0, 0)
            chunked = tiled = None
            if 0 < chunk_frames < num_frames - 1:
                chunked = _seam_figures(whole, self._in_pieces(clip, chunk_frames, 0), pixels, chunk_frames, 0)
            if 0 < tile_px < max(height, width):
                tiled = _seam_figures(whole, self._in_pieces(clip, 0, tile_px), pixels, 0, tile_px)
        finally:
            self._vae.set_chunking()
        still = clip[:1].expand(num_frames, -1, -1, -1)
        flicker = metrics.frame_differences(metrics.to_pixels(self._decode(self._encode(still))))
        return ProbeFigures(
            chunked=chunked,
            tiled=tiled,
            still_flicker=float(flicker.mean()) if len(flicker) else None,
            still_frame_flicker=flicker.tolist(),
        )

    def _in_pieces(self, clip: Tensor, chunk_frames: int, tile_px: int) -> tuple[Tensor, Tensor]:
        """(latents, frames 0..255) with the given chunks and tiles."""
        self._vae.set_chunking(chunk_frames, tile_px)
        latents = self._encode(clip)
        return latents, metrics.to_pixels(self._decode(latents))


def mean_figures(clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over clips of every single figure; each clip weighs the same, curves are left out.

    Args:
        clips: nested mappings of one shape (`dataclasses.asdict` of ClipFigures); a figure that a clip does not have
            (None) does not enter its mean, and is None where no clip has it.
    """
    means: dict[str, Any] = {}
    for name in clips[0]:
        values = [clip[name] for clip in clips if clip[name] is not None]
        if not values:
            means[name] = None
        elif isinstance(values[0], Mapping):
            means[name] = mean_figures(values)
        elif isinstance(values[0], float):
            means[name] = statistics.fmean(values)
    return means


def _interpolation_psnr_db(pixels: Tensor) -> float | None:
    if len(pixels) == 1:
        return None
    made = metrics.interpolate_keys(pixels[::TEMPORAL_COMPRESSION], TEMPORAL_COMPRESSION).round()
    is_between = torch.arange(len(pixels)) % TEMPORAL_COMPRESSION != 0
    return float(metrics.psnr_db(made, pixels)[is_between].mean())


def _image_decoder_figures(decoded: Tensor, pixels: Tensor, ceiling_db: float) -> CrossFigures:
    made = metrics.to_pixels(decoded)
    psnr = metrics.psnr_db(made, pixels[::TEMPORAL_COMPRESSION])
    best = []
    for index, picture in enumerate(made):
        stop = TEMPORAL_COMPRESSION * index + 1
        group = pixels[max(stop - TEMPORAL_COMPRESSION, 0) : stop]
        best.append(float(metrics.psnr_db(picture.expand_as(group), group).max()))
    return CrossFigures(
        psnr_db=float(psnr.mean()),
        ceiling_psnr_db=ceiling_db,
        key_psnr_db=float(psnr.mean()),
        best_of_group_psnr_db=statistics.fmean(best),
        frame_psnr_db=psnr.tolist(),
    )


def _video_decoder_figures(decoded: Tensor, pixels: Tensor, ceiling_db: float) -> CrossFigures:
    psnr = metrics.psnr_db(metrics.to_pixels(decoded), pixels)
    return CrossFigures(
        psnr_db=float(psnr.mean()),
        ceiling_psnr_db=ceiling_db,
        key_psnr_db=float(psnr[::TEMPORAL_COMPRESSION].mean()),
        best_of_group_psnr_db=None,
        frame_psnr_db=psnr.tolist(),
    )


def _seam_figures(
    whole: tuple[Tensor, Tensor], pieces: tuple[Tensor, Tensor], pixels: Tensor, chunk_frames: int, tile_px: int
) -> SeamFigures:
    (latents, frames), (cut_latents, cut_frames) = whole, pieces
    deviation = latents.std(correction=0)
    error = (cut_latents - latents).square()
    psnr = metrics.psnr_db(cut_frames, pixels) - metrics.psnr_db(frames, pixels)
    return SeamFigures(
        chunk_frames=chunk_frames,
        tile_px=tile_px,
        latent_rms=float(error.mean().sqrt() / deviation),
        psnr_db_difference=float(psnr.mean()),
        frame_rms=float((cut_frames - frames).square().mean().sqrt()),
        by_latent=(error.mean(dim=(1, 2, 3)).sqrt() / deviation).tolist(),
        frame_psnr_db_difference=psnr.tolist(),
    )


def _as_uint8(frames: Tensor) -> Pixels:
    pixels = metrics.to_pixels(frames).to(torch.uint8).permute(0, 2, 3, 1)
    return np.asarray(pixels.contiguous().cpu().numpy())


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
