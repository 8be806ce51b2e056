"""Promises: time padding without padding equals padding; an image takes the same numbers as the general path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cvvae.layers import (
    DoublingConv,
    DoublingFrameConv,
    FrameConv,
    Padding,
    SpaceTimeConv,
    Upsample,
    fold_frames,
    plan_taps,
    to_channels_last,
    unfold_frames,
)

PlainConv = Callable[..., torch.Tensor]

CAUSAL = {"time_before": 2, "time_after": 0, "time_mode": "replicate"}
CENTRED = {"time_before": 1, "time_after": 1}
PADDINGS = {
    "encoder sd21": (Padding(**CAUSAL, space_mode="zeros"), (1, 1)),
    "encoder sd3": (Padding(**CAUSAL, space_mode="replicate"), (1, 1)),
    "down sd21": (Padding(**CAUSAL, space_mode="zeros", right_bottom_only=True), (1, 2)),
    "down in time sd21": (Padding(**CAUSAL, space_mode="zeros", right_bottom_only=True), (2, 2)),
    "down in time sd3": (Padding(**CAUSAL, space_mode="replicate"), (2, 2)),
    "decoder sd21": (Padding(**CENTRED, time_mode="zeros", space_mode="zeros"), (1, 1)),
    "decoder sd3": (Padding(**CENTRED, time_mode="replicate", space_mode="replicate"), (1, 1)),
    "up sd21": (Padding(**CENTRED, time_mode="replicate", space_mode="zeros"), (1, 1)),
}


@pytest.mark.parametrize("num_frames", [1, 2, 3, 5, 9, 17])
@pytest.mark.parametrize("in_channels", [3, 24])
@pytest.mark.parametrize("name", PADDINGS)
def test_a_convolution_equals_the_one_of_a_padded_clip(
    name: str, in_channels: int, num_frames: int, plainly_padded: PlainConv
) -> None:
    padding, stride = PADDINGS[name]
    torch.manual_seed(1)
    conv = SpaceTimeConv(in_channels, 6, padding=padding, stride=stride)
    x = to_channels_last(torch.randn(2, in_channels, num_frames, 10, 7))
    torch.testing.assert_close(conv(x), plainly_padded(conv, x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_frames", [1, 5, 13])
def test_gradients_flow_through_joined_frames(num_frames: int, plainly_padded: PlainConv) -> None:
    conv = SpaceTimeConv(24, 6, padding=PADDINGS["encoder sd21"][0])
    x = torch.randn(1, 24, num_frames, 6, 6)
    with torch.enable_grad():
        ours = torch.autograd.grad(conv(x).square().sum(), conv.weight)[0]
        wanted = torch.autograd.grad(plainly_padded(conv, x).square().sum(), conv.weight)[0]
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 24, 1, 20, 20), (1, 24, 5, 20, 20), (2, 24, 1, 20, 20), (2, 24, 5, 20, 20)])
def test_every_step_keeps_channels_last_also_for_a_single_frame(shape: tuple[int, ...]) -> None:
    x = to_channels_last(torch.randn(shape))
    conv = SpaceTimeConv(24, 24, padding=PADDINGS["encoder sd3"][0])
    for result in (conv(x), torch.nn.GroupNorm(8, 24)(x), unfold_frames(fold_frames(x), shape[2])):
        assert result.stride() == x.stride()


def test_folding_frames_is_a_view() -> None:
    x = to_channels_last(torch.randn(2, 8, 3, 4, 4))
    assert fold_frames(x).data_ptr() == x.data_ptr()
    assert torch.equal(fold_frames(x)[4], x[1, :, 1])


def test_upsampling_in_time_drops_the_earlier_frame_of_the_first_pair(plainly_padded: PlainConv) -> None:
    up = Upsample(24, doubles_time=True, padding=PADDINGS["up sd21"][0])
    x = to_channels_last(torch.randn(1, 24, 3, 4, 4))
    pairs = plainly_padded(up.conv, x)
    found = up(x)
    assert found.shape == (1, 24, 5, 8, 8)
    torch.testing.assert_close(found[:, :, 0], pairs[:, 24:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:, :, 1], pairs[:, :24, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:, :, 4], pairs[:, 24:, 2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_frames", [1, 2, 5])
@pytest.mark.parametrize("in_channels", [3, 24])
@pytest.mark.parametrize("name", ["decoder sd21", "decoder sd3", "up sd21", "encoder sd21"])
def test_a_doubling_convolution_equals_the_one_of_a_doubled_clip(
    name: str, in_channels: int, num_frames: int, plainly_padded: PlainConv
) -> None:
    conv = DoublingConv(in_channels, 6, padding=PADDINGS[name][0])
    x = to_channels_last(torch.randn(2, in_channels, num_frames, 5, 4))
    torch.testing.assert_close(conv(x), plainly_padded(conv, x), atol=1e-5, rtol=0)


def test_a_doubling_convolution_of_frames_equals_the_one_of_doubled_frames() -> None:
    conv = DoublingFrameConv(24, 6)
    x = to_channels_last(torch.randn(2, 24, 3, 5, 4))
    wanted = FrameConv.forward(conv, to_channels_last(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0))))
    torch.testing.assert_close(conv(x), wanted, atol=1e-5, rtol=0)


def test_upsampling_of_an_image_computes_only_the_frame_that_is_kept(
    monkeypatch: pytest.MonkeyPatch, plainly_padded: PlainConv
) -> None:
    up = Upsample(24, doubles_time=True, padding=PADDINGS["up sd21"][0])
    x = to_channels_last(torch.randn(1, 24, 1, 4, 4))
    widths: list[int] = []
    conv2d = F.conv2d

    def recorded(*args: Any) -> torch.Tensor:
        widths.append(args[1].shape[0])
        return conv2d(*args)

    monkeypatch.setattr(F, "conv2d", recorded)
    found = up(x)
    assert widths == [4 * 24]  # one set for each pixel of the 2x2 that an input pixel becomes
    wanted = plainly_padded(up.conv, x)[:, 24:]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_taps_that_leave_the_clip_read_the_edge_or_nothing() -> None:
    causal, zeros = PADDINGS["encoder sd21"][0], PADDINGS["decoder sd21"][0]
    assert plan_taps(0, 9, 1, causal).taps == ((0, 1, 2),)
    assert plan_taps(1, 9, 1, causal).taps == ((0, 1), (2,))
    assert plan_taps(0, 1, 1, zeros).taps == ((1,),)
    assert (plan_taps(8, 9, 1, zeros).first, plan_taps(8, 9, 1, zeros).taps) == (7, ((0,), (1,)))
