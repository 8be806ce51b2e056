"""The measures, against values worked out by hand and against formulas written out the slow way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cvvae import metrics


def _ramp(num_frames: int, step: float) -> torch.Tensor:
    """Frames of one grey each: 0, step, 2 step, ..."""
    return torch.arange(num_frames).view(-1, 1, 1, 1).float().mul(step).expand(num_frames, 3, 12, 12)


def test_pixels_are_rounded_and_clamped_as_when_they_are_stored() -> None:
    frames = torch.tensor([-1.5, -1.0, -0.996, 0.0, 0.5, 1.0, 1.2])
    # 0.5 -> 191.25 -> 191; halves go to the even neighbour: 127.5 -> 128.
    assert metrics.to_pixels(frames).tolist() == [0, 0, 1, 128, 191, 255, 255]


def test_pixels_cannot_be_made_of_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="2 of 3 values"):
        metrics.to_pixels(torch.tensor([0.0, math.nan, math.inf]))


def test_psnr_is_that_of_the_definition() -> None:
    reference = torch.zeros(2, 3, 4, 4)
    frames = torch.full_like(reference, 5.0)
    frames[1] = 0.0
    frames[1, 0, 0, 0] = 48.0  # mean squared error 48^2 / 48 = 48
    expected = [10 * math.log10(255**2 / 25), 10 * math.log10(255**2 / 48)]
    assert metrics.psnr_db(frames, reference).tolist() == pytest.approx(expected, abs=1e-9)


def test_psnr_of_equal_frames_is_the_stated_ceiling() -> None:
    frames = torch.full((1, 3, 4, 4), 7.0)
    assert metrics.psnr_db(frames, frames).tolist() == [metrics.MAX_PSNR_DB]


def test_ssim_is_that_of_the_formula_written_out_window_by_window() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (2, 3, 14, 17)).astype(np.float64)
    y = (x + rng.normal(0, 20, x.shape)).clip(0, 255).round()
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    expected = []
    for a, b in zip(x, y, strict=True):
        values = []
        for channel in range(3):
            for top in range(14 - 10):
                for left in range(17 - 10):
                    u = a[channel, top : top + 11, left : left + 11]
                    v = b[channel, top : top + 11, left : left + 11]
                    mu, mv = (window * u).sum(), (window * v).sum()
                    su, sv = (window * (u - mu) ** 2).sum(), (window * (v - mv) ** 2).sum()
                    cov = (window * (u - mu) * (v - mv)).sum()
                    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                    values.append((2 * mu * mv + c1) * (2 * cov + c2) / ((mu**2 + mv**2 + c1) * (su + sv + c2)))
        expected.append(np.mean(values))
    found = metrics.ssim(torch.from_numpy(x).float(), torch.from_numpy(y).float())
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_ssim_of_equal_frames_is_one_also_where_they_are_flat() -> None:
    frames = torch.cat([torch.full((1, 3, 16, 16), 250.0), torch.rand(1, 3, 16, 16) * 255])
    assert metrics.ssim(frames, frames).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


def test_ssim_refuses_frames_smaller_than_its_window() -> None:
    with pytest.raises(ValueError, match="8x16 px are smaller"):
        metrics.ssim(torch.zeros(1, 3, 16, 8), torch.zeros(1, 3, 16, 8))


def test_measures_refuse_frames_of_different_shapes() -> None:
    for measure in (metrics.psnr_db, metrics.ssim, metrics.temporal_differences):
        with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\).*\(1, 3, 16, 16\)"):
            measure(torch.zeros(2, 3, 16, 16), torch.zeros(1, 3, 16, 16))


def test_differences_of_frames_and_differences_of_those() -> None:
    slow, fast = _ramp(4, 2.0), _ramp(4, 5.0)
    assert metrics.frame_differences(slow).tolist() == [2.0, 2.0, 2.0]
    assert metrics.temporal_differences(fast, slow).tolist() == [3.0, 3.0, 3.0]


def test_an_error_that_stays_the_same_counts_nothing_in_time() -> None:
    clip = torch.rand(3, 3, 12, 12) * 100
    assert metrics.temporal_differences(clip + 9.0, clip).abs().max() < 1e-4


def test_an_error_that_comes_and_goes_counts_twice() -> None:
    clip = torch.zeros(3, 3, 12, 12)
    blink = clip.clone()
    blink[1] = 6.0
    assert metrics.temporal_differences(blink, clip).tolist() == [6.0, 6.0]


def test_interpolation_of_keys_is_exact_where_motion_is_linear() -> None:
    clip = _ramp(9, 3.0)
    assert torch.equal(metrics.interpolate_keys(clip[::4], 4), clip)


def test_held_keys_stay_until_the_next_one() -> None:
    held = metrics.hold_keys(_ramp(9, 1.0)[::4], 4)
    assert held[:, 0, 0, 0].tolist() == [0, 0, 0, 0, 4, 4, 4, 4, 8]


def test_one_key_is_a_clip_of_one_frame() -> None:
    key = _ramp(1, 1.0)
    assert len(metrics.interpolate_keys(key, 4)) == len(metrics.hold_keys(key, 4)) == 1


def test_relative_rms_counts_in_deviations_of_the_reference() -> None:
    reference = torch.tensor([-2.0, 2.0])
    assert metrics.relative_rms(torch.tensor([-1.0, 1.0]), reference) == pytest.approx(0.5)
    assert metrics.relative_rms(torch.ones(3), torch.ones(3)) == 0.0
    assert metrics.relative_rms(torch.zeros(3), torch.ones(3)) == math.inf


def test_channels_are_compared_over_all_that_was_added_as_if_it_came_at_once() -> None:
    torch.manual_seed(0)
    reference = torch.randn(6, 4, 3, 5) * torch.tensor([1.0, 2.0, 0.5, 3.0]).view(1, 4, 1, 1) + 1
    latents = 0.9 * reference + 0.3 * torch.randn_like(reference)
    statistics = metrics.ChannelStatistics(4)
    for part in (slice(0, 1), slice(1, 6)):
        statistics.add(latents[part], reference[part])
    found = statistics.agreement()
    a, b = (x.transpose(0, 1).flatten(1).double() for x in (latents, reference))
    assert found.num_values == 6 * 3 * 5
    assert found.mean == pytest.approx(a.mean(1).tolist())
    assert found.reference_deviation == pytest.approx(b.std(1, correction=0).tolist())
    expected = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(a, b, strict=True)]
    assert found.correlation == pytest.approx(expected)
    ratios = (a.std(1, correction=0) / b.std(1, correction=0)).sort().values
    assert found.deviation_ratio.min == pytest.approx(float(ratios[0]))
    assert found.deviation_ratio.max == pytest.approx(float(ratios[-1]))
    assert found.deviation_ratio.median == pytest.approx(float(ratios[1:3].mean()))
    error = (a - b).square().mean() / b.var(1, correction=0).mean()
    assert found.error_over_variance == pytest.approx(float(error))


def test_a_constant_channel_correlates_with_nothing() -> None:
    statistics = metrics.ChannelStatistics(2)
    reference = torch.randn(1, 2, 8, 8)
    latents = reference.clone()
    latents[:, 1] = 0.3
    statistics.add(latents, reference)
    found = statistics.agreement()
    assert found.correlation == pytest.approx([1.0, 0.0])
    assert found.deviation_ratio.min == pytest.approx(0.0, abs=1e-6)


def test_statistics_of_nothing_and_of_other_channels_are_refused() -> None:
    statistics = metrics.ChannelStatistics(2)
    with pytest.raises(ValueError, match="nothing to compare"):
        statistics.agreement()
    with pytest.raises(ValueError, match="2 channels"):
        statistics.add(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))
