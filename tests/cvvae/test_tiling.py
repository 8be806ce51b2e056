"""Promises: plans cover everything exactly, a blend is a ramp, tiles of a local function join without a trace."""

from __future__ import annotations

import itertools

import pytest
import torch

from cvvae.tiling import Span, blend, plan_chunks, plan_tiles, run_tiles


def test_chunks_share_one_latent_and_cover_the_clip() -> None:
    assert plan_chunks(1, 4) == [Span(0, 1)]
    assert plan_chunks(5, 4) == [Span(0, 5)]
    assert plan_chunks(6, 4) == [Span(0, 5), Span(4, 6)]
    assert plan_chunks(9, 4) == [Span(0, 5), Span(4, 9)]
    assert plan_chunks(11, 4) == [Span(0, 5), Span(4, 9), Span(8, 11)]
    assert plan_chunks(11, None) == [Span(0, 11)]


@pytest.mark.parametrize(("tile", "overlap"), [(8, 2), (72, 16), (5, 0), (7, 6)])
@pytest.mark.parametrize("num_latents", [1, 7, 8, 9, 14, 15, 72, 73, 128, 129, 200])
def test_tiles_cover_the_side_and_each_is_longer_than_the_overlap(num_latents: int, tile: int, overlap: int) -> None:
    spans = plan_tiles(num_latents, tile, overlap)
    assert spans[0].start == 0
    assert spans[-1].stop == num_latents
    assert (len(spans) == 1) == (num_latents <= tile)
    for before, span in itertools.pairwise(spans):
        assert span.start == before.start + tile - overlap
        assert before.stop - before.start == tile
        assert overlap < span.stop - span.start <= tile


def test_the_published_sizes_give_the_published_tiles() -> None:
    assert plan_tiles(72, 72, 16) == [Span(0, 72)]
    assert plan_tiles(128, 72, 16) == [Span(0, 72), Span(56, 128)]
    assert plan_tiles(135, 72, 16) == [Span(0, 72), Span(56, 128), Span(112, 135)]


def test_a_blend_is_a_linear_ramp_that_begins_with_the_neighbour() -> None:
    before, piece = torch.zeros(1, 1, 1, 6, 2), torch.ones(1, 1, 1, 5, 2)
    blend(before, piece, 4, dim=3)
    assert piece[0, 0, 0, :, 0].tolist() == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("overlap", [0, 3])
@pytest.mark.parametrize("size", [(8, 8), (8, 13), (20, 31), (9, 14)])
def test_tiles_of_a_function_without_borders_join_to_the_untiled_result(size: tuple[int, int], overlap: int) -> None:
    field = torch.randn(2, 3, 2, *size)

    def doubled(row: Span, column: Span) -> torch.Tensor:
        return field[..., row.start : row.stop, column.start : column.stop].repeat_interleave(2, 3) * 1.0

    rows, columns = plan_tiles(size[0], 8, overlap), plan_tiles(size[1], 8, overlap)

    def both(row: Span, column: Span) -> torch.Tensor:
        return doubled(row, column).repeat_interleave(2, 4)

    joined = run_tiles(both, rows, columns, 2 * overlap, 2 * (8 - overlap))
    torch.testing.assert_close(joined, field.repeat_interleave(2, 3).repeat_interleave(2, 4))
