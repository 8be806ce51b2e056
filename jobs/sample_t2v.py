"""Makes videos from prompts, or from a first frame, with a tuned diffusion model and a video VAE.

    python jobs/sample_t2v.py --model tuned/final --prompt "a red circle moves left" --output videos
    python jobs/sample_t2v.py --model tuned/final --first-frame photo.jpg --output videos

n latents become 1 + 4 (n - 1) frames. Video VAE, encoder and size are those that the model was tuned with, unless flags
say others. Each video is an MP4 and a GIF; prompts of a file are numbered by its lines. The last line on standard
output is one JSON object; exit codes: 0 done, 2 wrong use, 4 failed.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_ROOT = str(Path(__file__).resolve().parent.parent)
if _ROOT not in sys.path:
    sys.path.insert(0, _ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

import cvvae
from jobs.t2v_models import Adapter, Conditions, Loaded, VideoSettings, load_model
from jobs.t2v_noise import scheduler_of
from jobs.t2v_sampling import decode, load_video_vae, sample_latents, write_videos
from pipeline.codec import pixels_to_input
from pipeline.config import (
    ImageEncoderConfig,
    TextEncoderConfig,
    auto_or,
    local_folder,
    number,
    option,
    parse_buckets,
    read_parts,
    whole,
)
from pipeline.errors import LatentmillError, StorageError, UsageError
from pipeline.pictures import Frames
from pipeline.records import Bucket

EXIT_DONE, EXIT_USAGE, EXIT_FAILED = 0, 2, 4


def _one_size(text: str) -> tuple[Bucket, ...]:
    try:
        wanted = [bucket for bucket in parse_buckets(text) if bucket.num_frames > 1]
    except UsageError as error:
        raise UsageError(str(error).replace("--buckets", "--size")) from error
    if len(wanted) != 1:
        raise UsageError(f"--size: {text!r} is not one WIDTHxHEIGHTxFRAMES of several frames, for example 256x256x17")
    return tuple(wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleConfig:
    """What is made, and of what."""

    model: str = option("folder of finetune_t2v.py (OUTPUT/final), or a diffusers folder or hub id", str)
    model_subfolder: str | None = option("folder of the model inside --model", str, None)
    output: str = option("local folder of the videos", local_folder("output"))
    prompt: str | None = option("what a text-to-video model shall show", str, None)
    prompts: str | None = option("instead: text file with one prompt a line", str, None)
    first_frame: str | None = option("picture that an image-to-video model shall go on from", str, None)
    vae: str | None = option("video VAE; default: the one of the latents that the model was tuned on", str, None)
    vae_subfolder: str | None = option("folder inside --vae", str, None)
    size: tuple[Bucket, ...] = option(
        "WIDTHxHEIGHTxFRAMES, frames 1 + 4k; default: the first that the model was tuned on", _one_size, ()
    )
    steps: int = option("steps of the sampler", whole("steps", 1), 25)
    guidance: float | None = option(
        "guidance, 1: none; auto: 6 for prompts, 3 for a first frame", auto_or(number("guidance", 0, 100)), None
    )
    fps: float = option("frames a second of the videos", number("fps", 0.1, 240), 8.0)
    seed: int = option("of the noise", whole("seed", 0), 0)
    threads: int = option("threads of torch on a CPU", whole("threads", 1), 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleJob:
    """A whole job, by concern."""

    sample: SampleConfig
    video: VideoSettings
    text: TextEncoderConfig
    image: ImageEncoderConfig


PARTS = {"sample": SampleConfig, "video": VideoSettings, "text": TextEncoderConfig, "image": ImageEncoderConfig}


def main(argv: Sequence[str]) -> int:
    """Runs the job; returns the exit code."""
    try:
        description = (__doc__ or "").partition("\n")[0]
        job = SampleJob(**read_parts(argv, PARTS, "sample_t2v.py", description))
        result = make_videos(job)
    except (UsageError, StorageError) as error:
        return _fail(EXIT_USAGE, error)
    except LatentmillError as error:
        return _fail(EXIT_FAILED, error)
    except Exception as error:
        traceback.print_exc()
        return _fail(EXIT_FAILED, error)
    print(json.dumps({"exit_code": EXIT_DONE, **result}), flush=True)
    return EXIT_DONE


def make_videos(job: SampleJob) -> dict[str, Any]:
    """Makes and writes the videos; returns what the result line says.

    Raises:
        UsageError: a model, encoder, picture or size that is not there or does not fit.
        StorageError: a video cannot be written.
    """
    began_s = time.perf_counter()
    config = job.sample
    torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(config.model, config.model_subfolder, job.video)
    adapter: Adapter = loaded.adapter
    prompts = _prompts(config, adapter)
    size = config.size[0] if config.size else _tuned_size(loaded)
    channels = adapter.latent_channels(loaded.model.config)
    latents_of: Mapping[str, Any] = loaded.origin.get("latents", {})
    name = config.vae or latents_of.get("model")
    if name is None:
        raise UsageError(f"--vae must be given: {config.model} does not say which video VAE made its latents")
    vae = load_video_vae(name, config.vae_subfolder, channels, device)
    scale = (
        float(latents_of.get("scaling_factor", vae.scaling_factor)),
        float(latents_of.get("shift_factor", vae.shift_factor)),
    )
    num = 1 + (size.num_frames - 1) // vae.temporal_compression
    adapter.check_shape(loaded.model.config, size, num)
    if adapter.needs_text:
        conditions, empty = _told_by_prompts(job, loaded, prompts, device)
    else:
        conditions, empty = _told_by_frame(job, loaded, vae, size, device), None
    guidance = config.guidance if config.guidance is not None else 6.0 if adapter.needs_text else 3.0
    compression = vae.spatial_compression
    latents = sample_latents(
        loaded.model.to(device).eval(),
        adapter,
        scheduler_of(loaded.scheduler_config, None),
        (channels, num, size.height_px // compression, size.width_px // compression),
        conditions,
        adapter.unconditional(conditions, empty),
        num_steps=config.steps,
        guidance=guidance,
        seed=config.seed,
    )
    videos = decode(vae, latents, *scale)
    written = write_videos(Path(config.output), "video", videos, prompts, config.fps)
    return {
        "output": config.output,
        "videos": written,
        "num_frames": size.num_frames,
        "num_latents": num,
        "seconds": round(time.perf_counter() - began_s, 3),
    }


def _prompts(config: SampleConfig, adapter: Adapter) -> list[str]:
    """One text a video; of a first frame its name."""
    if not adapter.needs_text:
        if config.first_frame is None or config.prompt is not None or config.prompts is not None:
            raise UsageError(f"{config.model} makes videos of a picture: give --first-frame and no prompt")
        return [Path(config.first_frame).name]
    if config.first_frame is not None or (config.prompt is None) == (config.prompts is None):
        raise UsageError(f"{config.model} makes videos of texts: give either --prompt or --prompts, no --first-frame")
    if config.prompt is not None:
        return [config.prompt]
    assert config.prompts is not None
    try:
        lines = Path(config.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts: {config.prompts} cannot be read: {error}") from error
    if not lines:
        raise UsageError(f"--prompts: {config.prompts} is empty")
    return lines


def _tuned_size(loaded: Loaded) -> Bucket:
    for name in loaded.origin.get("buckets", ()):
        width, height, frames = (int(part) for part in name.split("x"))
        if frames > 1:
            return Bucket(width_px=width, height_px=height, num_frames=frames)
    raise UsageError("--size must be given: the model does not say what it was tuned on")


def _told_by_prompts(
    job: SampleJob, loaded: Loaded, prompts: Sequence[str], device: torch.device
) -> tuple[Conditions, Tensor]:
    """Conditions of the prompts, and the empty prompt's embedding."""
    from pipeline.text import TextEncoder

    source = job.text.text_encoder or loaded.origin.get("conditions", {}).get("encoder")
    if source is None:
        raise UsageError("--text-encoder must be given: the model does not say which one its captions were embedded by")
    padding = loaded.origin.get("conditions", {}).get("padding", job.text.text_padding)
    config = replace(job.text, text_encoder=source, text_padding=padding)
    encoder = TextEncoder(config, device, "float32", job.sample.threads)
    _check_encoder(loaded, encoder.manifest, "text-encoder")
    *texts, empty = (torch.from_numpy(found.embedding.astype(np.float32)) for found in encoder.embed([*prompts, ""]))
    length = max(len(text) for text in texts)
    mask = torch.tensor([[place < len(text) for place in range(length)] for text in texts])
    padded = torch.stack([torch.nn.functional.pad(text, (0, 0, 0, length - len(text))) for text in texts])
    return Conditions(text=padded, text_mask=mask).to(device), empty


def _told_by_frame(job: SampleJob, loaded: Loaded, vae: cvvae.CVVAE, size: Bucket, device: torch.device) -> Conditions:
    """Conditions of the first frame: its embedding, its latent, and the rate of the latents."""
    from pipeline.text import ImageEncoder

    source = job.image.image_encoder or loaded.origin.get("conditions", {}).get("encoder")
    if source is None:
        raise UsageError("--image-encoder must be given: the model does not say which one its frames were embedded by")
    encoder = ImageEncoder(replace(job.image, image_encoder=source), device, "float32", job.sample.threads)
    _check_encoder(loaded, encoder.manifest, "image-encoder")
    assert job.sample.first_frame is not None
    frame = read_picture(job.sample.first_frame, size)
    (embedding,) = encoder.embed([frame])
    with torch.no_grad():
        pixels = pixels_to_input(torch.from_numpy(frame)[None, None], vae.dtype).to(device)
        latent = vae.encode(pixels).latent_dist.mode()[:, :, 0]
    generator = torch.Generator().manual_seed(job.sample.seed)
    noise = torch.randn(latent.shape, generator=generator).to(latent) * job.video.noise_aug
    image = torch.from_numpy(np.asarray(embedding, dtype=np.float32).copy()).view(1, 1, -1)
    fps = torch.tensor([job.sample.fps / vae.temporal_compression])
    return Conditions(image=image, first_latent=latent + noise, fps=fps).to(device)


def _check_encoder(loaded: Loaded, manifest: Any, flag: str) -> None:
    wanted = loaded.origin.get("conditions", {}).get("weights_sha256", manifest.weights_sha256)
    if manifest.weights_sha256 != wanted:
        raise UsageError(
            f"--{flag}: {manifest.encoder} has the weights {manifest.weights_sha256[:12]}, and the model was tuned "
            f"with those of {loaded.origin['conditions']['encoder']}, {wanted[:12]}: give that one"
        )


def read_picture(path: str, size: Bucket) -> Frames:
    """A picture as uint8 (H, W, 3), resized to cover and cropped to the middle as the encode job does it.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
            fitted = ImageOps.fit(upright, (size.width_px, size.height_px), Image.Resampling.LANCZOS)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"--first-frame: {path} cannot be read as a picture: {error}") from error
    return np.array(fitted)


def _fail(exit_code: int, error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    print(json.dumps({"exit_code": exit_code, "error": type(error).__name__, "message": str(error)}), flush=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
