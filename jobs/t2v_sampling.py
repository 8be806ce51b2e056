"""Videos out of a diffusion model: a scheduler of diffusers makes latents of noise, a video VAE frames of latents.

Not an entry point: `jobs/sample_t2v.py` samples for people, `jobs/t2v_training.py` on the way through a tuning.

Tensor letters: B batch, C channels, t h w latents, T H W frames.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import torch
from torch import Tensor, nn

import cvvae
from jobs.t2v_models import Adapter, Conditions
from pipeline.codec import output_to_pixels
from pipeline.errors import StorageError, UsageError
from pipeline.pictures import Frames, write_gif


@torch.no_grad()
def sample_latents(
    model: nn.Module,
    adapter: Adapter,
    scheduler: Any,
    shape: tuple[int, int, int, int],
    conditions: Conditions,
    unconditional: Conditions | None,
    *,
    num_steps: int,
    guidance: float,
    seed: int,
) -> Tensor:
    """Latents (B, C, t, h, w) as the diffusion model makes them: scaled.

    Args:
        shape: (C, t, h, w).
        conditions: of B videos, on the model's device.
        unconditional: what guidance leads away from; None: no guidance.
        num_steps: of the scheduler.
        guidance: 1: none.
        seed: of the noise.
    """
    device = next(model.parameters()).device
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_steps, device=device)
    count = _count(conditions)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn((count, *shape), generator=generator).to(device)
    latents = latents * float(getattr(scheduler, "init_noise_sigma", 1.0))
    is_guided = unconditional is not None and guidance != 1
    told = conditions.joined(unconditional) if is_guided and unconditional is not None else conditions
    strength = adapter.guidance(guidance, shape[1]).to(device)
    for timestep in scheduler.timesteps:
        given = torch.cat([latents] * 2) if is_guided else latents
        if hasattr(scheduler, "scale_model_input"):
            given = scheduler.scale_model_input(given, timestep)
        said = adapter.predict(model, given, timestep.expand(len(given)), told)
        if is_guided:
            with_condition, without = said.chunk(2)
            said = without + strength * (with_condition - without)
        latents = scheduler.step(said, timestep, latents).prev_sample
    return latents


@torch.no_grad()
def decode(vae: cvvae.CVVAE, latents: Tensor, scaling_factor: float, shift_factor: float) -> list[Frames]:
    """Scaled latents (B, C, t, h, w) as uint8 frames (1 + 4 (t - 1), 8 h, 8 w, 3), one array a video."""
    unscaled = (latents / scaling_factor + shift_factor).to(vae.device, vae.dtype)
    return [output_to_pixels(vae.decode(one.unsqueeze(0)).sample[0]) for one in unscaled]


def load_video_vae(model: str, subfolder: str | None, latent_channels: int, device: torch.device) -> cvvae.CVVAE:
    """The video VAE that decodes.

    Raises:
        UsageError: there is none, or its latents have another number of channels.
    """
    try:
        vae = cvvae.load(model, subfolder)
    except (cvvae.CheckpointError, OSError, ValueError) as error:
        raise UsageError(f"--vae: {error}") from error
    if vae.latent_channels != latent_channels:
        raise UsageError(
            f"--vae: the latents of {model} have {vae.latent_channels} channels, the diffusion model's "
            f"{latent_channels}: give the video VAE that made the latents which it was tuned on"
        )
    return vae.to(device).eval().requires_grad_(False)


def write_video(path: Path, frames: Frames, fps: float) -> None:
    """An H.264 MP4 of uint8 frames (T, H, W, 3), H and W even.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": "17"}
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    except (OSError, av.error.FFmpegError) as error:
        raise StorageError(f"{path} cannot be written: {error}") from error


def write_videos(folder: Path, name: str, videos: Sequence[Frames], titles: Sequence[str], fps: float) -> list[str]:
    """NAME-0.mp4, NAME-0.gif and so on; returns the names."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, (frames, title) in enumerate(zip(videos, titles, strict=True)):
        stem = f"{name}-{number}"
        write_video(folder / f"{stem}.mp4", frames, fps)
        write_gif(folder / f"{stem}.gif", title, [[frames]], fps, height_px=frames.shape[1])
        written += [f"{stem}.mp4", f"{stem}.gif"]
    return written


def _count(conditions: Conditions) -> int:
    for value in (conditions.text, conditions.image, conditions.fps):
        if value is not None:
            return len(value)
    raise AssertionError("conditions of no video")
