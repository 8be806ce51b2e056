"""The light family: a causal video VAE that encodes an order of magnitude faster, for a CPU, tests and demos.

The counterpart of the published halves in `model`, which builds these where the class name says so; `small`, the model
that ships, is one. Like the variant norm="frame" it is causal in both directions and streams, but it cannot be inflated
from an image VAE: it learns the latents of one.

What makes it light: four frames become one latent in the first layer and one latent becomes four frames late, so that
everything between is a 2D convolution of a group of frames; no layer works at full resolution; the only norms are those
of `FrameContext`. Time enters twice: the encoder sees the group's frames as differences to its last one, the key frame,
together with the key frame before; some blocks of the decoder see the features of the group before.

Ideas: pixel shuffling at the ends as in many later video VAEs (Haar transform: WF-VAE, arXiv 2411.17459); residual
blocks without norm and a pooled context at the lowest resolution as in TAESD and TAEF2 (O. B. Bohan).

Tensor letters: B batch, C channels, T H W frames in pixels, t h w latents: t = 1 + (T - 1) / 4. A group is the 4 frames
of one latent; the first latent's group is frame 0, four times.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvvae.config import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, CVVAEConfig
from cvvae.layers import (
    Cache,
    DoublingFrameConv,
    FrameConv,
    FrameNorm,
    Recomputable,
    append_frames,
    fold_frames,
    to_channels_last,
    unfold_frames,
)

_NO_VARIANCE = -30.0
"""Log-variance of every latent: the light family is deterministic, as the image VAEs that it follows."""
_RESIDUAL_GAIN = 0.3
"""Of the last convolution of a residual block at the start, as no norm keeps the sum of many blocks in bounds."""
_LATENT_BOUND = 3.0
"""Scaled latents are bent smoothly into +-3, as in TAESD: three deviations of what image encoders give."""
_CONTEXT_GROUPS = 4


class LightEncoder(nn.Module):
    """(B, 3, T, H, W) in [-1, 1] -> moments (B, 2 C, t, H // 8, W // 8): means, then log-variances of -30.

    In a stream a latent comes in the call that brings the last frame of its group. Sides that are no multiple of 8 are
    cut at the right and at the bottom.
    """

    def __init__(self, config: CVVAEConfig) -> None:
        super().__init__()
        half, quarter, eighth = config.light.encoder_widths
        num_half, num_quarter, num_eighth = config.light.encoder_blocks
        self.channels = config.in_channels
        self.conv_in = _ShuffledConv(self.channels, half)
        self.at_half = _blocks(half, num_half)
        self.to_quarter = FrameConv(half, quarter, stride=2)
        self.motion_in = _GroupConv(self.channels, quarter)
        self.motion = _blocks(quarter, config.light.motion_blocks)
        self.motion_out = FrameConv(quarter, quarter)
        self.at_quarter = _blocks(quarter, num_quarter)
        self.to_eighth = FrameConv(quarter, eighth, stride=2)
        self.at_eighth = _blocks(eighth, num_eighth, has_context=True)
        self.conv_out = FrameConv(eighth, config.latent_channels)
        # Motion starts as nothing, so that the encoder first learns what images look like.
        nn.init.zeros_(self.motion_out.weight)
        self._still_fields: dict[Hashable, tuple[list[Tensor], list[int], Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_still_fields": {}}

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        B, _, _, H, W = x.shape
        h, w = H // SPATIAL_COMPRESSION, W // SPATIAL_COMPRESSION
        x = x[..., : h * SPATIAL_COMPRESSION, : w * SPATIAL_COMPRESSION]
        past = None if cache is None else cache.past(self)
        frames = x if past is None else append_frames(past.frames, x)
        # The first frame is a key frame: that of the group before, or the whole of the first group.
        end = (frames.shape[2] - 1) // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION
        if cache is not None:
            cache.keep(self, frames[:, :, end:])
        keys = frames[:, :, 0 if past is None else TEMPORAL_COMPRESSION : end + 1 : TEMPORAL_COMPRESSION]
        if keys.shape[2] == 0:
            return x.new_empty(B, 2 * self.conv_out.out_channels, 0, h, w)
        mean = self._encode_groups(keys, frames[:, :, :end], is_start=past is None)
        return torch.cat([mean, torch.full_like(mean, _NO_VARIANCE)], dim=1)

    def _encode_groups(self, keys: Tensor, others: Tensor, *, is_start: bool) -> Tensor:
        """(B, C, t, h, w) from the groups' key frames (B, 3, t, H, W) and the four frames before each (but the first).

        Those are the key frame before and the group's first three frames, (B, 3, 4 t or 4 (t - 1), H, W).
        """
        x = self.to_quarter(self.at_half(self.conv_in(keys)))
        motions = [self._no_motion(x[:, :, :1])] if is_start else []
        if others.shape[2]:
            groups = others.unflatten(2, (-1, TEMPORAL_COMPRESSION))
            differences = (groups - keys[:, :, -groups.shape[2] :].unsqueeze(3)).flatten(2, 3)
            motions.append(self.motion_out(self.motion(self.motion_in(differences))))
        x = self.at_quarter(x + (append_frames(*motions) if len(motions) == 2 else motions[0]))
        mean: Tensor = self.conv_out(self.at_eighth(self.to_eighth(x)))
        return mean

    def _no_motion(self, x: Tensor) -> Tensor:
        """What `motion_out` gives, in the shape of x, for a group that is one frame four times.

        That is the same for every such group and, where no padding is in reach, for every position: so it is computed
        for a small field whose middle row and column then stand for all that lie between.
        """
        reach = 1 + 2 * len(self.motion)
        B, _, _, H, W = x.shape
        field = self._still_field(x, min(H, 2 * reach + 1), min(W, 2 * reach + 1))
        rows, columns = (_stretched(side, reach, x.device) for side in (H, W))
        # Channels last, as x is: adding tensors of two layouts takes ten times as long.
        stretched = field.movedim(1, -1).index_select(2, rows).index_select(3, columns).movedim(-1, 1)
        return stretched.expand(B, -1, -1, -1, -1)

    def _still_field(self, x: Tensor, height: int, width: int) -> Tensor:
        """(1, C, 1, height, width), what `motion_out` gives for no motion; kept while frozen weights stay as they are.

        torch counts each change of a tensor in place (but for those by `.data`, of which no module here has any), and
        another tensor in the place of one of these has another address, as these are kept: so a field is never one of
        other weights.
        """
        weights = [*self.motion_in.parameters(), *self.motion.parameters(), *self.motion_out.parameters()]
        if torch.compiler.is_compiling() or any(weight.requires_grad or weight.is_inference() for weight in weights):
            return self._new_still_field(x, height, width)
        key = height, width, x.dtype, x.device
        versions = [weight._version for weight in weights]
        kept = self._still_fields.get(key)
        if kept is None or kept[1] != versions or any(map(_differ, kept[0], weights)):
            field = self._new_still_field(x, height, width)
            kept = self._still_fields[key] = [weight.detach() for weight in weights], versions, field
        return kept[2]

    def _new_still_field(self, x: Tensor, height: int, width: int) -> Tensor:
        nothing = x.new_zeros(1, self.channels, TEMPORAL_COMPRESSION, 4 * height, 4 * width)
        field: Tensor = self.motion_out(self.motion(self.motion_in(to_channels_last(nothing))))
        return field


class LightDecoder(nn.Module):
    """Latents (B, C, t, h, w) -> frames (B, 3, 1 + 4 (t - 1), 8 h, 8 w), about [-1, 1], not clamped.

    In a stream every latent but the first gives 4 frames.
    """

    def __init__(self, config: CVVAEConfig) -> None:
        super().__init__()
        frame, quarter, eighth = config.light.decoder_widths
        num_frame, num_quarter, num_eighth = config.light.decoder_blocks
        self.scaling_factor, self.shift_factor = config.scaling_factor, config.shift_factor
        self.conv_in = _PastConv(config.latent_channels, eighth)
        self.at_eighth = _blocks(eighth, num_eighth, has_context=True, sees_past=True)
        self.to_quarter = DoublingFrameConv(eighth, quarter)
        self.at_quarter = _blocks(quarter, num_quarter, sees_past=True)
        self.to_frames = FrameConv(quarter, TEMPORAL_COMPRESSION * frame)
        self.at_frame = _blocks(frame, num_frame)
        self.conv_out = FrameConv(frame, config.in_channels * 16)

    def forward(self, z: Tensor, cache: Cache | None = None) -> Tensor:
        is_start = cache is None or cache.past(self.conv_in) is None
        # Far from what latents can be, a network without norms would answer with ever larger values.
        z = (z - self.shift_factor) * self.scaling_factor
        x = self.conv_in(torch.tanh(z / _LATENT_BOUND) * _LATENT_BOUND, cache)
        x = self.at_eighth(x, cache)
        x = self.to_frames(self.at_quarter(self.to_quarter(x), cache))
        # (B, 4 C, t, ..) -> (B, C, 4 t, ..); of the very first group only the last frame exists.
        x = x.movedim(1, -1).unflatten(-1, (TEMPORAL_COMPRESSION, -1)).movedim(4, 2).flatten(1, 2).movedim(-1, 1)
        x = to_channels_last(x[:, :, TEMPORAL_COMPRESSION - 1 if is_start else 0 :])
        x = self.conv_out(F.relu(self.at_frame(x)))
        return to_channels_last(unfold_frames(F.pixel_shuffle(fold_frames(x), 4), x.shape[2]))


class _Block(Recomputable):
    """x + conv2(relu(conv1(relu(x)))) of every group; conv1 may see the features of the group before, too.

    (B, C, t, H, W) -> the same shape.
    """

    def __init__(self, channels: int, *, has_context: bool, sees_past: bool) -> None:
        super().__init__()
        self.context = FrameContext(channels) if has_context else None
        self.conv1 = _PastConv(channels, channels) if sees_past else FrameConv(channels, channels)
        self.conv2 = FrameConv(channels, channels)
        with torch.no_grad():
            self.conv2.weight.mul_(_RESIDUAL_GAIN)

    def run(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        if self.context is not None:
            x = self.context(x)
        h = F.relu(x)
        h = self.conv1(h, cache) if isinstance(self.conv1, _PastConv) else self.conv1(h)
        # In place: no backward formula of a convolution reads its output.
        out: Tensor = self.conv2(F.relu(h, inplace=True)).add_(x)
        return out


class _Blocks(nn.ModuleList):
    """Blocks one after the other; callable as one."""

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        for block in self:
            x = block(x, cache)
        return x


def _blocks(channels: int, num_blocks: int, *, has_context: bool = False, sees_past: bool = False) -> _Blocks:
    """`sees_past`: the second block does, so that features of the group before have been made by a block already."""
    return _Blocks(
        _Block(channels, has_context=has_context, sees_past=sees_past and index == 1) for index in range(num_blocks)
    )


class FrameContext(nn.Module):
    """x + map(relu(norm(map(x)))) with a GroupNorm over the whole frame, by which a position learns of all others."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = FrameConv(channels, channels, kernel_size=1, bias=False)
        self.norm = FrameNorm(_CONTEXT_GROUPS, channels)
        self.conv2 = FrameConv(channels, channels, kernel_size=1, bias=False)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(F.relu(self.norm(self.conv1(x)), inplace=True)).add_(x)
        return out


class _PastConv(nn.Module):
    """A 3x3 convolution of every group beside the group before; the first group stands beside itself."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = FrameConv(2 * in_channels, out_channels)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        past = None if cache is None else cache.past(self)
        first = x[:, :, :1] if past is None else past.frames
        if cache is not None:
            cache.keep(self, x[:, :, -1:])
        before = append_frames(first, x[:, :, :-1])
        out: Tensor = self.conv(torch.cat([x.movedim(1, -1), before.movedim(1, -1)], dim=-1).movedim(-1, 1))
        return out


class _ShuffledConv(FrameConv):
    """A 3x3 convolution of frames of which 2x2 pixels have become channels, the weight (out, 4 in, 3, 3).

    Computed as what it is for the frames themselves, a 6x6 convolution of stride 2, which moves no pixels.
    (B, in, t, H, W) -> (B, out, t, H / 2, W / 2).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(4 * in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
        frames = F.conv2d(fold_frames(x), weight, self.bias, stride=2, padding=2)
        return to_channels_last(unfold_frames(frames, x.shape[2]))


class _GroupConv(FrameConv):
    """A linear map of blocks of four frames of 4x4 pixels, the weight (out, in * 4 * 16, 1, 1).

    (B, in, 4 t, H, W) -> (B, out, t, H / 4, W / 4).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels * TEMPORAL_COMPRESSION * 16, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.reshape(self.out_channels, x.shape[1], TEMPORAL_COMPRESSION, 4, 4)
        # Folded and unfolded, a single clip has strides in which torch recognises the layout.
        x = unfold_frames(fold_frames(x), x.shape[2])
        return to_channels_last(F.conv3d(x, weight, self.bias, stride=weight.shape[2:]))


def _differ(weight: Tensor, other: Tensor) -> bool:
    return weight.data_ptr() != other.data_ptr()


def _stretched(size: int, reach: int, device: torch.device) -> Tensor:
    """(size,) indices into a row of 2 reach + 1 whose middle one stands for all but `reach` at either end."""
    index = torch.arange(size, device=device)
    return index if size <= 2 * reach + 1 else index.clamp(max=reach) + (index - (size - 1 - reach)).clamp(min=0)
