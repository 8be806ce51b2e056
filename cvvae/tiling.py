"""Cutting clips into temporal chunks and frames into spatial tiles, and joining the results again.

One plan and one blend, which encoding and decoding share: they differ only in the scale between what goes in
and what comes out. Pure functions of sizes and tensors; the model gives the function that runs on a piece.
Source: CV-VAE, arXiv 2405.20279, appendix (chunks of 17 frames, tiles of 576 px with 128 px overlap).

Tensor letters: B batch, C channels, T H W time, height and width of whatever is being joined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """The half-open range [start, stop) that one piece reads along one dimension."""

    start: int
    stop: int


def plan_chunks(num_latents: int, chunk_latents: int | None) -> list[Span]:
    """Temporal chunks, in latents: each begins with the last latent of the one before.

    Args:
        num_latents: latents of the whole clip.
        chunk_latents: stride of the chunks, so that a chunk spans chunk_latents + 1; None for one single chunk.
    """
    if chunk_latents is None or num_latents <= chunk_latents + 1:
        return [Span(0, num_latents)]
    starts = range(0, num_latents - 1, chunk_latents)
    return [Span(start, min(start + chunk_latents + 1, num_latents)) for start in starts]


def plan_tiles(num_latents: int, tile_latents: int, overlap_latents: int) -> list[Span]:
    """Spatial tiles along one side, in latents: one every stride, until one reaches the end.

    Every tile but the first is therefore longer than the overlap. One tile only where the whole side fits in.
    """
    stride = tile_latents - overlap_latents
    starts = range(0, max(num_latents - overlap_latents, 1), stride)
    return [Span(start, min(start + tile_latents, num_latents)) for start in starts]


def blend(before: Tensor, piece: Tensor, overlap: int, dim: int) -> None:
    """Replaces the first `overlap` rows (or columns) of `piece` by a ramp from the end of `before`, in place.

    Row i becomes before * (1 - i / overlap) + piece * i / overlap.
    """
    shape = [1] * piece.dim()
    shape[dim] = overlap
    ramp = (torch.arange(overlap, device=piece.device, dtype=torch.float32) / overlap).to(piece.dtype).view(shape)
    head = piece.narrow(dim, 0, overlap)
    tail = before.narrow(dim, before.shape[dim] - overlap, overlap)
    head.copy_(torch.lerp(tail, head, ramp))


def run_tiles(
    run: Callable[[Span, Span], Tensor], rows: Sequence[Span], columns: Sequence[Span], overlap: int, stride: int
) -> Tensor:
    """Runs every tile and joins the results, vertical blend first, then horizontal, as published.

    Args:
        run: maps a row span and a column span to that tile's result (B, C, T, H, W).
        rows: spans from `plan_tiles`.
        columns: spans from `plan_tiles`.
        overlap: overlap of two results, in their own units.
        stride: distance between the beginnings of two results, in their own units.
    """
    bands: list[Tensor] = []
    above: list[Tensor] = []
    for row in rows:
        band: list[Tensor] = []
        for index, column in enumerate(columns):
            tile = run(row, column)
            if above:
                blend(above[index], tile, overlap, dim=3)
            if band:
                blend(band[-1], tile, overlap, dim=4)
            band.append(tile)
        height = stride if row is not rows[-1] else band[0].shape[3]
        bands.append(
            torch.cat([tile[:, :, :, :height, :stride] for tile in band[:-1]] + [band[-1][:, :, :, :height]], 4)
        )
        above = band
    return torch.cat(bands, dim=3)
