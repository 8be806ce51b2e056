"""The layers that the families are made of; every difference between families is an argument.

Activations are (B, C, T, H, W) whose memory is (B, T, H, W, C): folding T into B for a 2D convolution or moving C to
the end for a linear layer is a view, and oneDNN and cuDNN run their fastest kernels. All views go by `movedim`, because
torch recognises the layout by its strides, and `transpose(1, 2).flatten(0, 1)` gives a single frame strides that it
does not recognise; from there on everything ran in the other layout, and encoding took half as long again.

Layers that look back in time take a `Cache`, and then a clip may be given in pieces of any length: what a piece gives
equals what the whole clip gives. Without one (None) the piece is the whole clip.

Only the modules that define halves build these layers (`model`, and other families beside it).

Tensor letters: B batch, C channels, T H W frames, height and width at whatever resolution the layer works.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cvvae.config import CVVAEConfig, PaddingMode

KERNEL = 3
NARROW_CHANNELS = 16
"""Inputs of at most so many channels (frames, latents) have their temporal taps stacked as channels."""
RUN_FRAMES = 4
"""Output frames of one 3D convolution; with 4 the kernels run within 3 % of the speed they have with 15."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """How a 3x3x3 convolution continues its input: in time by (before, after) frames, in space by one pixel."""

    time_before: int
    time_after: int
    time_mode: PaddingMode
    space_mode: PaddingMode
    right_bottom_only: bool = False

    @property
    def is_causal(self) -> bool:
        """An output frame reads its own input frame and earlier ones; before the first there is its repetition."""
        return self.time_before == KERNEL - 1 and self.time_after == 0 and self.time_mode == "replicate"


@dataclass(frozen=True, slots=True)
class TapPlan:
    """Which kernel taps read which input frame, for one output frame: taps[i] read frame `first + i`."""

    first: int
    taps: tuple[tuple[int, ...], ...]


def plan_taps(index: int, num_frames: int, stride: int, padding: Padding) -> TapPlan:
    """The taps of output frame `index`, padding resolved: repeated frames collect several taps, zeros none."""
    readers: dict[int, list[int]] = {}
    for tap in range(KERNEL):
        position = index * stride - padding.time_before + tap
        frame = min(max(position, 0), num_frames - 1)
        if frame == position or padding.time_mode == "replicate":
            readers.setdefault(frame, []).append(tap)
    return TapPlan(min(readers), tuple(tuple(readers[frame]) for frame in sorted(readers)))


@dataclass(frozen=True, slots=True)
class Past:
    """What a layer remembers of the frames that it has read: the last two, and how many there were."""

    frames: Tensor
    num_frames: int


class Cache:
    """The state of one half in one stream: empty at its start, passed to every call, in order of time.

    Holds the last two input frames (B, C, 2, H, W) of every convolution over time, so its size does not depend on how
    long the stream is or how it is cut. The frames are copies without gradients: neither the activations of a piece nor
    its graph outlive the piece. Every stream and every spatial tile needs a cache of its own.
    """

    def __init__(self) -> None:
        self._pasts: dict[nn.Module, Past] = {}

    def past(self, layer: nn.Module) -> Past | None:
        """What the layer has read before; None at the start of the stream."""
        return self._pasts.get(layer)

    def add(self, layer: nn.Module, x: Tensor) -> None:
        """Remembers that the layer has read the frames x (B, C, T, H, W), T >= 1."""
        past, x = self.past(layer), x.detach()
        if x.shape[2] < KERNEL - 1:
            x_before = x if past is None else past.frames[:, :, 1:]
            frames = append_frames(x_before, x)
        else:
            last = x[:, :, 1 - KERNEL :].movedim(1, -1)
            frames = last.clone(memory_format=torch.contiguous_format).movedim(-1, 1)
        self._pasts[layer] = Past(frames, x.shape[2] + (0 if past is None else past.num_frames))

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        """Remembers just these frames, for a layer that decides by itself what it will need."""
        kept = frames.detach().movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)
        self._pasts[layer] = Past(kept, kept.shape[2])

    @property
    def num_bytes(self) -> int:
        """Bytes of all frames held."""
        return sum(past.frames.numel() * past.frames.element_size() for past in self._pasts.values())


def to_channels_last(x: Tensor) -> Tensor:
    """The same tensor in the memory layout of this module; a view where it already is."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def fold_frames(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B * T, C, H, W); a view."""
    return x.movedim(1, -1).flatten(0, 1).movedim(-1, 1)


def unfold_frames(x: Tensor, num_frames: int) -> Tensor:
    """(B * T, C, H, W) -> (B, C, T, H, W); a view."""
    frames: Tensor = x.movedim(1, -1).unflatten(0, (-1, num_frames))
    return frames.movedim(-1, 1)


def join_frames(pieces: Iterable[Tensor], num_frames: int) -> Tensor:
    """Concatenates (B, C, T_i, H, W) in time; without gradients each piece is freed before the next is made."""
    if torch.is_grad_enabled():
        return torch.cat([piece.movedim(1, -1) for piece in pieces], dim=1).movedim(-1, 1)
    joined: Tensor | None = None
    begin = 0
    for piece in pieces:
        if joined is None:
            B, C, T, H, W = piece.shape
            if num_frames == T:
                return piece
            joined = piece.new_empty(B, num_frames, H, W, C).movedim(-1, 1)
        end = begin + piece.shape[2]
        joined[:, :, begin:end] = piece
        begin = end
    assert joined is not None, "a convolution of a clip makes at least one frame"
    return joined


def append_frames(x: Tensor, later: Tensor) -> Tensor:
    """Both, one after the other in time, in the memory layout of this module."""
    return torch.cat([x.movedim(1, -1), later.movedim(1, -1)], dim=1).movedim(-1, 1)


class SpaceTimeConv(nn.Conv3d):
    """A 3x3x3 convolution over time and space, weight (out, in, 3, 3, 3).

    Padding in time costs no memory and no arithmetic: an output frame whose window leaves the clip is computed
    from the frames that exist, with the taps that would read the same frame summed. A clip of one frame thereby
    becomes a 2D convolution. Summing costs about 1.5 % of the encoding of a 256x256 image on a CPU, so it is done in
    each call and can never be stale.

    The frames between the edges are computed a few at a time, so that copies padded in space and results not yet
    joined stay small beside input and output.

    (B, in, T, H, W) -> (B, out, T', H', W') with T' = (T + before + after - 3) // time stride + 1. In a stream, output
    frame i is made in the call that brings input frame i * time stride; that may be none of a call's, so T' may be 0.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, padding: Padding, stride: tuple[int, int] = (1, 1)
    ) -> None:
        super().__init__(in_channels, out_channels, KERNEL)
        self.edges = padding
        self.time_stride, self.space_stride = stride

    def forward(self, x: Tensor, cache: Cache | None = None, outputs: slice = slice(None)) -> Tensor:
        """`outputs` selects output channels, so that a caller need not compute what it would throw away."""
        weight, bias = self._kernel(outputs)
        past = None
        if cache is not None:
            assert self.edges.is_causal, "a convolution that reads later frames cannot run in a stream"
            past = cache.past(self)
            cache.add(self, x)
        if past is None:
            num_out = (x.shape[2] + self.edges.time_before + self.edges.time_after - KERNEL) // self.time_stride + 1
        else:
            num_out = -(-(x.shape[2] - self._num_skipped(past)) // self.time_stride)
        if num_out == 0:
            return self._no_frames(x, weight.shape[0])
        if self.in_channels <= NARROW_CHANNELS:
            return self._conv_stacked(x, past, weight, bias)
        return join_frames(self._pieces(x, past, weight, bias, num_out), num_out)

    def _kernel(self, outputs: slice) -> tuple[Tensor, Tensor | None]:
        return self.weight[outputs], None if self.bias is None else self.bias[outputs]

    def _num_skipped(self, past: Past) -> int:
        """Frames of this call before the one that the next output frame ends with."""
        return -past.num_frames % self.time_stride

    def _no_frames(self, x: Tensor, num_channels: int) -> Tensor:
        B, _, _, H, W = x.shape
        rest = KERNEL - (1 if self.edges.right_bottom_only else 2)
        sides = ((side - rest) // self.space_stride + 1 for side in (H, W))
        return x.new_empty(B, num_channels, 0, *sides)

    def _pieces(
        self, x: Tensor, past: Past | None, weight: Tensor, bias: Tensor | None, num_out: int
    ) -> Iterator[Tensor]:
        """The output in order of time: edge frames one by one, the frames between in runs."""
        stride = self.time_stride
        if past is None:
            offset = -self.edges.time_before
            begin = min(-(offset // stride), num_out)
            end = max((x.shape[2] - KERNEL - offset) // stride + 1, begin)
        else:
            offset = self._num_skipped(past) - self.edges.time_before
            begin, end = 0, num_out
        for index in range(begin):
            yield self._edge_frame(x, index, weight, bias)
        for first in range(begin, end, RUN_FRAMES):
            last = min(first + RUN_FRAMES, end) - 1
            start, stop = first * stride + offset, last * stride + offset + KERNEL
            if start < 0:
                assert past is not None, "only frames of earlier calls lie before the first one"
                window = append_frames(past.frames[:, :, start:], x[:, :, :stop])
            else:
                window = x[:, :, start:stop]
            yield self._conv(window, weight, bias)
        for index in range(end, num_out):
            yield self._edge_frame(x, index, weight, bias)

    def _edge_frame(self, x: Tensor, index: int, weight: Tensor, bias: Tensor | None) -> Tensor:
        plan = plan_taps(index, x.shape[2], self.time_stride, self.edges)
        # Slices, not an index tensor: summing those took eight times as long.
        summed = [sum((weight[:, :, tap] for tap in taps[1:]), weight[:, :, taps[0]]) for taps in plan.taps]
        return self._conv(x[:, :, plan.first : plan.first + len(summed)], torch.stack(summed, dim=2), bias)

    @property
    def _space_padding(self) -> int:
        """Pixels of zeros that the convolution itself has to add on every side."""
        return 0 if self.edges.right_bottom_only or self.edges.space_mode == "replicate" else 1

    def _pad_space(self, x: Tensor) -> Tensor:
        if self.edges.right_bottom_only:
            return F.pad(x, (0, 1, 0, 1))
        if self.edges.space_mode == "replicate":
            return F.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate")
        return x

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution without padding in time."""
        x = self._pad_space(x)
        padding = self._space_padding
        if weight.shape[2] == 1:
            frames = F.conv2d(fold_frames(x), weight[:, :, 0], bias, self.space_stride, padding)
            return to_channels_last(unfold_frames(frames, x.shape[2]))
        stride = (self.time_stride, self.space_stride, self.space_stride)
        return to_channels_last(F.conv3d(x, weight, bias, stride, (0, padding, padding)))

    def _conv_stacked(self, x: Tensor, past: Past | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One 2D convolution of 3 in channels; for few channels much faster, as torch then has no good 3D kernel."""
        if past is None:
            mode = "replicate" if self.edges.time_mode == "replicate" else "constant"
            x = F.pad(self._pad_space(x), (0, 0, 0, 0, self.edges.time_before, self.edges.time_after), mode=mode)
        else:
            x = self._pad_space(append_frames(past.frames[:, :, self._num_skipped(past) :], x))
        windows = x.unfold(2, KERNEL, self.time_stride)  # (B, in, T', H, W, 3)
        num_out = windows.shape[2]
        frames = windows.permute(0, 2, 3, 4, 1, 5).flatten(4).flatten(0, 1).movedim(-1, 1)
        frames = F.conv2d(frames, weight.flatten(1, 2), bias, self.space_stride, self._space_padding)
        return to_channels_last(unfold_frames(frames, num_out))


class DoublingConv(SpaceTimeConv):
    """The same convolution of an input whose height and width are doubled by repetition, with 4/9 of the arithmetic.

    Of the three rows that an output row reads two are the same, so their taps are summed; likewise of columns. The
    doubled input is never made.
    (B, in, T, H, W) -> (B, out, T', 2 H, 2 W).
    """

    def _kernel(self, outputs: slice) -> tuple[Tensor, Tensor | None]:
        weight, bias = super()._kernel(outputs)
        return fold_repetition(weight), None if bias is None else bias.repeat(4)

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return interleave_phases(super()._conv(x, weight, bias))

    def _conv_stacked(self, x: Tensor, past: Past | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        return interleave_phases(super()._conv_stacked(x, past, weight, bias))


def fold_repetition(weight: Tensor) -> Tensor:
    """Kernels for an input of which each pixel stands for 2x2: (out, in, ..., 3, 3) -> (4 out, in, ..., 2, 2).

    One after the other the kernels of the output's even rows and columns, even and odd, odd and even, odd and odd.
    """
    for dim in (-1, -2):
        first, middle, last = weight.unbind(dim)
        even, odd = torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)
        weight = torch.cat([even, odd])
    return weight


def interleave_phases(x: Tensor) -> Tensor:
    """What folded kernels give of an input padded by one pixel, as a picture: (B, 4 C, T, H + 1, W + 1) -> 2 H, 2 W."""
    B, _, T, H, W = x.shape
    phases = x.movedim(1, -1).unflatten(-1, (4, -1))
    out = x.new_empty(B, T, H - 1, 2, W - 1, 2, phases.shape[-1])
    for row in range(2):
        for column in range(2):
            out[:, :, :, row, :, column] = phases[:, :, row : row + H - 1, column : column + W - 1, 2 * row + column]
    return out.flatten(4, 5).flatten(2, 3).movedim(-1, 1)


class FrameConv(nn.Conv2d):
    """A 2D convolution of every frame by itself, zeros around; with stride 1 it keeps height and width."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel_size: int = KERNEL, stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == (1, 1):
            # Rows as images: on one thread torch gives 1x1 convolutions of fewer than 16 images to a slower kernel.
            rows = x.movedim(1, -1).flatten(0, 2).unsqueeze(1).movedim(-1, 1)
            return super().forward(rows).movedim(1, -1).reshape(*x.movedim(1, -1).shape[:-1], -1).movedim(-1, 1)
        return to_channels_last(unfold_frames(super().forward(fold_frames(x)), x.shape[2]))


class DoublingFrameConv(FrameConv):
    """As `FrameConv`, of frames whose height and width are doubled by repetition; see `DoublingConv`."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.repeat(4)
        phases = F.conv2d(fold_frames(x), fold_repetition(self.weight), bias, padding=1)
        return interleave_phases(unfold_frames(phases, x.shape[2]))


class PointwiseLinear(nn.Module):
    """A linear map of the channels, which are last: (..., in) -> (..., out).

    The families store the weight as a linear, 2D or 3D layer would: (out, in) and `num_trailing_dims` ones.
    """

    def __init__(self, in_channels: int, out_channels: int, num_trailing_dims: int) -> None:
        super().__init__()
        linear = nn.Linear(in_channels, out_channels)
        ones = (1,) * num_trailing_dims
        self.weight = nn.Parameter(linear.weight.detach().reshape(out_channels, in_channels, *ones))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class FrameNorm(nn.GroupNorm):
    """GroupNorm of every frame by itself: statistics over the channels of a group, height and width."""

    def forward(self, x: Tensor) -> Tensor:
        return unfold_frames(super().forward(fold_frames(x)), x.shape[2])


def group_norm(channels: int, config: CVVAEConfig) -> nn.GroupNorm:
    """The GroupNorm of (B, C, T, H, W) that the configuration asks for."""
    kind = FrameNorm if config.norm == "frame" else nn.GroupNorm
    return kind(config.norm_num_groups, channels, config.norm_eps)


class Recomputable(nn.Module):
    """A block that in training may keep its input only and compute the rest again in the backward pass.

    Subclasses define `run`; `CVVAE.enable_gradient_checkpointing` sets the attribute in all of them.

    Attributes:
        gradient_checkpointing: whether it does.
    """

    gradient_checkpointing = False

    def run(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """What the block computes."""
        raise NotImplementedError

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        # Not in a stream: there a second computation would find the cache as the first one left it.
        if self.gradient_checkpointing and self.training and cache is None and torch.is_grad_enabled():
            out: Tensor = checkpoint(self.run, x, use_reentrant=False)
            return out
        return self.run(x, cache)


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """GroupNorm, then SiLU; in place on the norm's own result where no gradient needs it."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


class ResidualBlock(Recomputable):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), the shortcut a 1x1 map where widths differ.

    (B, in, T, H, W) -> (B, out, T, H, W).
    """

    def __init__(self, in_channels: int, out_channels: int, config: CVVAEConfig, padding: Padding) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, config)
        self.conv1 = SpaceTimeConv(in_channels, out_channels, padding=padding)
        self.norm2 = group_norm(out_channels, config)
        self.conv2: SpaceTimeConv | FrameConv
        if config.half_3d:
            self.conv2 = FrameConv(out_channels, out_channels)
        else:
            self.conv2 = SpaceTimeConv(out_channels, out_channels, padding=padding)
        self.shortcut: PointwiseLinear | None = None
        if in_channels != out_channels:
            num_trailing_dims = 3 if config.class_name == "CVVAEModel" else 2
            self.shortcut = PointwiseLinear(in_channels, out_channels, num_trailing_dims)

    def run(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        # One name and one line for each step, so that an activation is freed as soon as the next one exists.
        h: Tensor = self.conv1(norm_silu(self.norm1, x), cache)
        h = norm_silu(self.norm2, h)
        h = self.conv2(h) if isinstance(self.conv2, FrameConv) else self.conv2(h, cache)
        if self.shortcut is not None:
            x = self.shortcut(x.movedim(1, -1)).movedim(-1, 1)
        # In place: no backward formula of a convolution reads its output.
        return h.add_(x)


class Attention(nn.Module):
    """Self-attention of the positions of each frame, one head; with `has_time` then of each position over time.

    The input is added once, at the end, so the temporal part sits in series and has no residual of its own.
    (B, C, T, H, W) -> the same shape.
    """

    def __init__(self, channels: int, config: CVVAEConfig, *, has_time: bool) -> None:
        super().__init__()
        num_trailing_dims = 2 if config.class_name == "CVVAEModel" else 0
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, config.norm_eps)
        self.q = PointwiseLinear(channels, channels, num_trailing_dims)
        self.k = PointwiseLinear(channels, channels, num_trailing_dims)
        self.v = PointwiseLinear(channels, channels, num_trailing_dims)
        self.out = PointwiseLinear(channels, channels, num_trailing_dims)
        self.time: TimeAttention | None = TimeAttention(channels) if has_time else None

    def forward(self, x: Tensor) -> Tensor:
        B, C, T, H, W = x.shape
        h: Tensor = self.norm(fold_frames(x)).flatten(2).transpose(1, 2).unsqueeze(1)
        h = F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))
        h = self.out(h).view(B, T, H * W, C)
        if self.time is not None:
            h = self.time(h.transpose(1, 2)).transpose(1, 2)
        return x + h.reshape(B, T, H, W, C).permute(0, 4, 1, 2, 3)


class TimeAttention(nn.Module):
    """LayerNorm, then self-attention over time, not causal, one head: (B, positions, T, C) -> the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))
        out: Tensor = self.out(h)
        return out


class Upsample(nn.Module):
    """Doubles height and width by repetition, convolves, and in time turns T frames into 2 T - 1.

    In time the convolution makes 2 C channels: the first C are the earlier, the last C the later frame of each
    pair, and the earlier frame of the first pair is dropped, in a stream that of its very first pair only.
    (B, C, T, H, W) -> (B, C, 2 T - 1 (later in a stream 2 T) or T, 2 H, 2 W).
    """

    def __init__(self, channels: int, *, doubles_time: bool, padding: Padding) -> None:
        super().__init__()
        self.doubles_time = doubles_time
        self.conv = DoublingConv(channels, channels * (1 + doubles_time), padding=padding)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        num_frames = x.shape[2]
        is_start = cache is None or cache.past(self.conv) is None
        if self.doubles_time and not (is_start and num_frames == 1):
            phases: Tensor = self.conv(x, cache).movedim(1, -1).unflatten(-1, (2, -1))  # (B, T, H, W, 2, C)
            return phases.movedim(4, 2).flatten(1, 2)[:, 1 if is_start else 0 :].movedim(-1, 1)
        # Of an image's one pair only the later frame is kept, so only that is computed.
        kept = slice(self.conv.out_channels // 2 if self.doubles_time else 0, None)
        out: Tensor = self.conv(x, cache, outputs=kept)
        return out
