"""Measures of pictures, clips and latents: PSNR, SSIM, differences in time, statistics of channels.

Pure functions of tensors, and one accumulator. They know no model: `cvvae.evaluation` applies them.

Pixels are compared as they would be stored, so frames are float32 tensors of whole values 0..255 (`to_pixels`).
Tensor letters: N frames, C channels, T time, H W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PIXEL_PEAK = 255.0
MAX_PSNR_DB = 100.0
"""Given for frames that are equal or as good as equal, where the ratio itself is infinite."""
SSIM_WINDOW_PX = 11
_SSIM_SIGMA_PX = 1.5
_SSIM_K1 = 0.01
_SSIM_K2 = 0.03


def to_pixels(frames: Tensor) -> Tensor:
    """Frames about [-1, 1], any shape, to float32 of whole values 0..255: rounded and clamped as when they are stored.

    Raises:
        ValueError: a value is NaN or infinite, which no pixel can hold.
    """
    values = frames.to(torch.float32)
    if not torch.isfinite(values).all():
        raise ValueError(
            f"{int((~torch.isfinite(values)).sum())} of {values.numel()} values of decoded frames are NaN or infinite: "
            f"compute in float32, or look at the weights"
        )
    return values.add(1.0).mul(PIXEL_PEAK / 2).round().clamp(0.0, PIXEL_PEAK)


def psnr_db(frames: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame: 10 log10(255^2 / mean squared error over the frame's RGB values).

    Args:
        frames: (N, C, H, W), values 0..255.
        reference: the same shape.

    Returns:
        (N,) float64 in decibels, at most MAX_PSNR_DB. The PSNR of a clip is the mean of these, not the PSNR of the
        clip's pooled error: one bad frame among good ones weighs less so, and papers on video VAEs count this way.
    """
    _check_pair(frames, reference)
    error = (frames.double() - reference.double()).square().mean(dim=(1, 2, 3))
    lowest_error = PIXEL_PEAK**2 / 10 ** (MAX_PSNR_DB / 10)
    return 10.0 * torch.log10(PIXEL_PEAK**2 / error.clamp_min(lowest_error))


def ssim(frames: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each frame: mean over the picture and over R, G and B.

    Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03, population covariance, and only where the window
    lies inside the frame: Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment", IEEE TIP 13(4), 2004. The
    paper measures luminance; taking the mean over the colours is what scikit-image does with `channel_axis`.

    Args:
        frames: (N, C, H, W), values 0..255, at least 11 px a side.
        reference: the same shape.

    Returns:
        (N,) float32, 1 for equal frames.

    Raises:
        ValueError: shapes differ, or a frame is smaller than the window.
    """
    _check_pair(frames, reference)
    num_frames, channels, height, width = frames.shape
    if min(height, width) < SSIM_WINDOW_PX:
        raise ValueError(f"frames of {width}x{height} px are smaller than SSIM's window of {SSIM_WINDOW_PX} px")
    # GPUs convolve float32 in TF32 unless told otherwise, with too few digits for a difference of squares.
    dtype = torch.float64 if frames.is_cuda else torch.float32
    x, y = frames.to(dtype), reference.to(dtype)
    # Variances are small differences of large squares: taken about the middle of the range they keep their digits.
    middle = PIXEL_PEAK / 2
    xc, yc = x - middle, y - middle
    fields = torch.stack([xc, yc, xc * xc, yc * yc, xc * yc]).reshape(5 * num_frames * channels, 1, height, width)
    window = _gaussian_window(frames.device).to(dtype)
    blurred = F.conv2d(F.conv2d(fields, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    mean_x, mean_y, square_x, square_y, product = blurred.view(5, num_frames, channels, *blurred.shape[2:])
    variance_x = square_x - mean_x * mean_x
    variance_y = square_y - mean_y * mean_y
    covariance = product - mean_x * mean_y
    mean_x, mean_y = mean_x + middle, mean_y + middle
    c1, c2 = (_SSIM_K1 * PIXEL_PEAK) ** 2, (_SSIM_K2 * PIXEL_PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    similarity: Tensor = luminance * structure
    return similarity.mean(dim=(1, 2, 3)).float()


def frame_differences(clip: Tensor) -> Tensor:
    """How much each frame differs from the one before: mean |x[t+1] - x[t]|.

    Args:
        clip: (T, C, H, W), values 0..255.

    Returns:
        (T - 1,) float32, in the units of the pixels. Of a still clip it is the flicker that a codec adds.
    """
    return (clip[1:] - clip[:-1]).abs().float().mean(dim=(1, 2, 3))


def temporal_differences(clip: Tensor, reference: Tensor) -> Tensor:
    """How differently two clips change in time: mean |(x[t+1] - x[t]) - (y[t+1] - y[t])|.

    An error that stays the same from frame to frame counts nothing, one that comes and goes counts twice.

    Args:
        clip: (T, C, H, W), values 0..255.
        reference: the same shape.

    Returns:
        (T - 1,) float32, in the units of the pixels.
    """
    _check_pair(clip, reference)
    error = clip.float() - reference.float()
    return (error[1:] - error[:-1]).abs().mean(dim=(1, 2, 3))


def interpolate_keys(keys: Tensor, step: int) -> Tensor:
    """Every `step`-th frame given, those between made by blending the two beside them linearly in time.

    Args:
        keys: (1 + k, C, H, W).
        step: frames from one key to the next.

    Returns:
        (1 + step * k, C, H, W); frame step * j is key j itself.
    """
    if len(keys) == 1:
        return keys
    share = torch.arange(1, step + 1, device=keys.device, dtype=keys.dtype).div(step).view(1, step, 1, 1, 1)
    between = torch.lerp(keys[:-1, None], keys[1:, None], share)
    return torch.cat([keys[:1], between.flatten(0, 1)])


def hold_keys(keys: Tensor, step: int) -> Tensor:
    """Every `step`-th frame given, each shown until the next one comes: (1 + k, ...) -> (1 + step * k, ...)."""
    return torch.cat([keys[:-1].repeat_interleave(step, dim=0), keys[-1:]])


def relative_rms(values: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference over the standard deviation of the reference; 0 for equal tensors."""
    difference = (values.double() - reference.double()).square().mean().sqrt()
    deviation = reference.double().std(correction=0)
    if deviation == 0:
        return 0.0 if difference == 0 else math.inf
    return float(difference / deviation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median, smallest and largest of one figure over the channels of a latent."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Tensor) -> Spread:
        """The spread of (C,) values; the median of an even number is the mean of the middle two."""
        return cls(median=float(values.quantile(0.5)), min=float(values.min()), max=float(values.max()))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelAgreement:
    """How the latents of two encoders compare, channel by channel, over everything that was added.

    Attributes:
        num_values: values of each channel.
        mean, deviation: of each channel of the latents under test.
        reference_mean, reference_deviation: of each channel of the reference.
        correlation: Pearson's, of each channel; 0 where one side is constant.
        deviation_ratio: spread of deviation / reference_deviation.
        mean_difference: spread of |mean - reference_mean|.
        correlation_spread: spread of `correlation`.
        error_over_variance: mean squared difference over the reference's variance, all channels pooled.
    """

    num_values: int
    mean: Sequence[float]
    deviation: Sequence[float]
    reference_mean: Sequence[float]
    reference_deviation: Sequence[float]
    correlation: Sequence[float]
    deviation_ratio: Spread
    mean_difference: Spread
    correlation_spread: Spread
    error_over_variance: float


class ChannelStatistics:
    """Sums over latents, from which `agreement` follows; holds no latent, so any number of clips can be added."""

    def __init__(self, num_channels: int) -> None:
        self._num_values = 0
        self._sums = torch.zeros(5, num_channels, dtype=torch.float64)

    def add(self, latents: Tensor, reference: Tensor) -> None:
        """Takes in latents and what the reference encoder makes of the same pictures: (B, C, ...) each."""
        a, b = (x.detach().transpose(0, 1).flatten(1).double().cpu() for x in (latents, reference))
        if a.shape != b.shape or len(a) != self._sums.shape[1]:
            raise ValueError(
                f"latents {tuple(latents.shape)} and reference {tuple(reference.shape)} must have the same shape and "
                f"{self._sums.shape[1]} channels"
            )
        self._sums += torch.stack([x.sum(dim=1) for x in (a, b, a * a, b * b, a * b)])
        self._num_values += a.shape[1]

    def agreement(self) -> ChannelAgreement:
        """The comparison over all that was added.

        Raises:
            ValueError: nothing was added.
        """
        if not self._num_values:
            raise ValueError("no latents were added, so there is nothing to compare")
        mean_a, mean_b, square_a, square_b, product = self._sums / self._num_values
        variance_a = (square_a - mean_a**2).clamp_min(0)
        variance_b = (square_b - mean_b**2).clamp_min(0)
        tiny = torch.finfo(torch.float64).tiny
        # What rounding leaves of the variance of a constant channel correlates with nothing.
        is_constant = (variance_a <= 1e-12 * square_a) | (variance_b <= 1e-12 * square_b)
        correlation = (product - mean_a * mean_b) / (variance_a * variance_b).sqrt().clamp_min(tiny)
        correlation = correlation.masked_fill(is_constant, 0.0)
        error = square_a + square_b - 2 * product
        return ChannelAgreement(
            num_values=self._num_values,
            mean=mean_a.tolist(),
            deviation=variance_a.sqrt().tolist(),
            reference_mean=mean_b.tolist(),
            reference_deviation=variance_b.sqrt().tolist(),
            correlation=correlation.tolist(),
            deviation_ratio=Spread.of((variance_a / variance_b.clamp_min(tiny)).sqrt()),
            mean_difference=Spread.of((mean_a - mean_b).abs()),
            correlation_spread=Spread.of(correlation),
            error_over_variance=float(error.mean() / variance_b.mean().clamp_min(tiny)),
        )


def _gaussian_window(device: torch.device) -> Tensor:
    offsets = torch.arange(SSIM_WINDOW_PX, device=device, dtype=torch.float32) - SSIM_WINDOW_PX // 2
    weights = torch.exp(-(offsets**2) / (2 * _SSIM_SIGMA_PX**2))
    return weights / weights.sum()


def _check_pair(frames: Tensor, reference: Tensor) -> None:
    if frames.shape != reference.shape or frames.dim() != 4:
        raise ValueError(
            f"frames {tuple(frames.shape)} and reference {tuple(reference.shape)} must have one shape (N, C, H, W)"
        )
