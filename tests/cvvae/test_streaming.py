"""Promises of streams: any pieces give what the whole gives, memory does not grow, nothing is computed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import cvvae
from cvvae.layers import Cache

Frames = Callable[..., torch.Tensor]
MakeModel = Callable[..., cvvae.CVVAE]
NUM_FRAMES, NUM_LATENTS = 33, 9
LENGTHS: dict[str, list[int]] = {
    "1": [1] * 33,
    "4": [4] * 9,
    "5": [5] * 7,
    "16": [16] * 3,
    "all": [33],
    "uneven": [2, 1, 1, 7, 3, 1, 18],
}


@pytest.fixture
def vae(family: str, make_model: MakeModel) -> cvvae.CVVAE:
    """Half 3D in one family, full 3D in the other."""
    return make_model(family, norm="frame", half_3d=family == "CVVAEModel")


def cut(x: torch.Tensor, lengths: list[int]) -> Iterator[torch.Tensor]:
    start = 0
    for length in lengths:
        if start < x.shape[2]:
            yield x[:, :, start : start + length]
        start += length


@pytest.fixture(params=[(32, 40), (72, 72)], ids=["whole frames", "tiles"])
def clip(request: pytest.FixtureRequest, frames: Frames) -> torch.Tensor:
    return frames(1, 3, NUM_FRAMES, *request.param)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_frames_in_pieces_give_the_latents_of_the_whole(
    vae: cvvae.CVVAE, clip: torch.Tensor, lengths: list[int]
) -> None:
    vae.set_chunking(chunk_frames=0)
    wanted = vae.encode(clip).latent_dist
    found = list(vae.encode_stream(cut(clip, lengths)))
    mean, logvar = (torch.cat([getattr(latents, name) for latents in found], 2) for name in ("mean", "logvar"))
    torch.testing.assert_close(mean, wanted.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(logvar, wanted.logvar, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_latents_in_pieces_give_the_frames_of_the_whole(
    vae: cvvae.CVVAE, clip: torch.Tensor, lengths: list[int]
) -> None:
    vae.set_chunking(chunk_frames=0)
    side = (clip.shape[3] // 8, clip.shape[4] // 8)
    z = torch.randn(1, vae.latent_channels, NUM_LATENTS, *side, generator=torch.Generator().manual_seed(1))
    found = list(vae.decode_stream(cut(z, lengths)))
    torch.testing.assert_close(torch.cat(found, 2), vae.decode(z).sample, atol=1e-5, rtol=1e-5)
    assert found[0].shape[2] == 4 * min(lengths[0], NUM_LATENTS) - 3


def test_every_clip_of_a_batch_streams_by_itself(vae: cvvae.CVVAE, frames: Frames) -> None:
    x = frames(2, 3, 9, 24, 32)
    for start in (0, 1):
        alone = [latents.mean for latents in vae.encode_stream(cut(x[start : start + 1], [2] * 5))]
        both = [latents.mean[start : start + 1] for latents in vae.encode_stream(cut(x, [2] * 5))]
        torch.testing.assert_close(torch.cat(both, 2), torch.cat(alone, 2), atol=1e-5, rtol=0)


def test_a_latent_comes_with_the_last_frame_of_its_group(make_model: MakeModel, frames: Frames) -> None:
    vae = make_model("CVVAEModel", norm="frame")
    num_given = 0

    def given() -> Iterator[torch.Tensor]:
        nonlocal num_given
        for frame in frames(1, 3, 9, 16, 16).split(1, dim=2):
            num_given += 1
            yield frame

    assert [(num_given, latents.mean.shape[2]) for latents in vae.encode_stream(given())] == [(1, 1), (5, 1), (9, 1)]


def test_encoding_and_decoding_in_chunks_equals_one_piece(vae: cvvae.CVVAE, clip: torch.Tensor) -> None:
    vae.set_chunking(chunk_frames=0)
    wanted = vae.encode(clip).latent_dist.mean
    wanted_video = vae.decode(wanted).sample
    for chunk_frames in (4, 8, 16):
        vae.set_chunking(chunk_frames)
        torch.testing.assert_close(vae.encode(clip).latent_dist.mean, wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(vae.decode(wanted).sample, wanted_video, atol=1e-5, rtol=1e-5)


def test_no_frame_is_computed_twice_and_no_chunk_is_too_long(make_model: MakeModel, frames: Frames) -> None:
    vae = make_model("CVVAESD3Model", norm="frame")  # chunks of 8 frames, 2 latents
    lengths: list[int] = []
    hooks = [
        half.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[2]))
        for half in (vae.encoder, vae.decoder)
    ]
    try:
        vae(frames(1, 3, 33, 16, 16))
    finally:
        for hook in hooks:
            hook.remove()
    assert lengths == [9, 9, 9, 6, 3, 3, 3]


@pytest.mark.parametrize("length", [1, 4, 5])
def test_memory_between_pieces_does_not_grow_with_the_video(vae: cvvae.CVVAE, frames: Frames, length: int) -> None:
    for half, x in ((vae.encoder, frames(1, 3, 40, 16, 16)), (vae.decoder, frames(1, vae.latent_channels, 40, 2, 2))):
        cache, sizes = Cache(), []
        for piece in x.split(length, dim=2):
            half(piece, cache)
            sizes.append(cache.num_bytes)
            for past in cache._pasts.values():
                assert past.frames.shape[2] == 2
                # The frames are all that is kept: no view holds the activations that they were cut from.
                assert past.frames.untyped_storage().nbytes() == past.frames.numel() * past.frames.element_size()
        assert sizes[0] > 0
        assert len(set(sizes[4 // length :])) == 1


def test_a_published_model_cannot_stream_and_says_so_at_once(family: str, make_model: MakeModel) -> None:
    vae = make_model(family)
    for stream in (vae.encode_stream, vae.decode_stream):
        with pytest.raises(ValueError, match=r"needs a causal model \(norm='frame'\)"):
            stream(iter(()))


def test_a_stream_that_ends_inside_a_group_says_so(make_model: MakeModel, frames: Frames) -> None:
    stream = make_model("CVVAEModel", norm="frame").encode_stream(frames(1, 3, 7, 16, 16).split(2, dim=2))
    assert [next(stream).mean.shape[2] for _ in range(2)] == [1, 1]
    with pytest.raises(ValueError, match=r"7 frames: 1 \+ 4 k are needed \(nearest: 5 or 9\)"):
        next(stream)


def test_an_empty_stream_gives_nothing(make_model: MakeModel) -> None:
    vae = make_model("CVVAEModel", norm="frame")
    assert list(vae.encode_stream(())) == list(vae.decode_stream(())) == []


@pytest.mark.parametrize(
    ("shapes", "wanted"),
    [
        ([(1, 3, 16, 16)], r"piece 0 of the stream has the shape \(1, 3, 16, 16\)"),
        ([(1, 3, 0, 16, 16)], "piece 0 .* t >= 1"),
        ([(1, 3, 1, 16, 16), (1, 3, 4, 16, 24)], r"piece 1 .* \(1, 16, 24\), the first one has \(1, 16, 16\)"),
        ([(1, 4, 1, 16, 16)], r"\(B, 3, T, H, W\)"),
        ([(1, 3, 1, 4, 16)], "height of the frames is 4 px"),
    ],
)
def test_a_piece_that_does_not_fit_is_refused(
    make_model: MakeModel, shapes: list[tuple[int, ...]], wanted: str
) -> None:
    vae = make_model("CVVAEModel", norm="frame")
    with pytest.raises(ValueError, match=wanted):
        list(vae.encode_stream(torch.zeros(shape) for shape in shapes))
