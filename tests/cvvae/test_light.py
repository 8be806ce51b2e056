"""Promises of the light family: streams, causality, images as clips of one frame, its configuration, its memory."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import cvvae
from cvvae.layers import Cache

FRAMES_PER_CLIP, LATENTS_PER_CLIP = 17, 5
SMALL_SIZES = {
    "encoder_widths": [8, 8, 16],
    "encoder_blocks": [1, 1, 2],
    "motion_blocks": 1,
    "decoder_widths": [8, 8, 16],
    "decoder_blocks": [1, 2, 2],
}


@pytest.fixture(scope="module")
def vae() -> cvvae.CVVAE:
    config = cvvae.CVVAEConfig.from_published(
        {"_class_name": "CVVAELightModel", **SMALL_SIZES, "tile_size_px": 64, "tile_overlap_ratio": 0.25}
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = cvvae.CVVAE(config).eval()
        for parameter in model.parameters():  # zero at the start, they would hide mistakes
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return model.requires_grad_(False)


@pytest.fixture(params=[(32, 40), (72, 32)], ids=["whole frames", "tiles"])
def clip(request: pytest.FixtureRequest) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, FRAMES_PER_CLIP, *request.param, generator=generator) * 2 - 1


def cut(x: torch.Tensor, length: int) -> Iterator[torch.Tensor]:
    return iter(x.split(length, dim=2))


@pytest.mark.parametrize("length", [1, 2, 4, 5, 16, FRAMES_PER_CLIP])
def test_frames_in_pieces_of_any_length_give_the_latents_of_the_whole(
    vae: cvvae.CVVAE, clip: torch.Tensor, length: int
) -> None:
    vae.set_chunking(0)
    whole = vae.encode(clip).latent_dist.mean
    pieces = [latents.mean for latents in vae.encode_stream(cut(clip, length))]
    torch.testing.assert_close(torch.cat(pieces, dim=2), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 4, LATENTS_PER_CLIP])
def test_latents_in_pieces_of_any_length_give_the_frames_of_the_whole(
    vae: cvvae.CVVAE, clip: torch.Tensor, length: int
) -> None:
    vae.set_chunking(0)
    z = vae.encode(clip).latent_dist.mean
    pieces = torch.cat(list(vae.decode_stream(cut(z, length))), dim=2)
    torch.testing.assert_close(pieces, vae.decode(z).sample, atol=1e-5, rtol=0)


def test_no_latent_depends_on_a_later_frame_and_none_is_deaf(vae: cvvae.CVVAE, clip: torch.Tensor) -> None:
    before = vae.encode(clip).latent_dist.mean
    for frame, first_changed in ((4, 1), (5, 2), (7, 2), (16, 4)):
        changed = clip.clone()
        changed[:, :, frame] = -changed[:, :, frame]
        differs = (vae.encode(changed).latent_dist.mean - before).abs().amax(dim=(0, 1, 3, 4)) > 0
        assert differs.tolist()[:first_changed] == [False] * first_changed
        assert differs[first_changed]


def test_no_frame_depends_on_a_later_latent_and_every_one_on_its_own(vae: cvvae.CVVAE, clip: torch.Tensor) -> None:
    z = vae.encode(clip).latent_dist.mean
    before = vae.decode(z).sample
    for latent in (1, 4):
        changed = z.clone()
        changed[:, :, latent] += 0.5
        differs = (vae.decode(changed).sample - before).abs().amax(dim=(0, 1, 3, 4)) > 0
        assert differs.tolist() == [frame > 4 * (latent - 1) for frame in range(FRAMES_PER_CLIP)]


def test_a_clip_that_stands_still_gives_the_latents_of_its_image_again_and_again(
    vae: cvvae.CVVAE, clip: torch.Tensor
) -> None:
    image = clip[:, :, 0]
    latents = vae.encode(image[:, :, None].expand(-1, -1, 9, -1, -1)).latent_dist.mean
    alone = vae.encode(image).latent_dist.mean
    torch.testing.assert_close(latents, alone[:, :, None].expand_as(latents), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side_px", [8, 24, 32, 56])
def test_a_still_clip_of_any_size_has_the_same_latent_first_and_last(vae: cvvae.CVVAE, side_px: int) -> None:
    """The first comes from a small field without motion that is stretched, the last from differences that are zero."""
    image = torch.rand(1, 3, 1, side_px, side_px + 8, generator=torch.Generator().manual_seed(side_px)) * 2 - 1
    latents = vae.encode(image.expand(-1, -1, 5, -1, -1)).latent_dist.mean
    torch.testing.assert_close(latents[:, :, 0], latents[:, :, 1], atol=1e-5, rtol=0)


def _images(vae: cvvae.CVVAE, image: torch.Tensor) -> list[torch.Tensor]:
    """Its latent from frozen weights, twice, and from a copy that has to learn and so keeps nothing."""
    learning = copy.deepcopy(vae).requires_grad_(True)
    with torch.no_grad():
        return [model.encode(image).latent_dist.mean for model in (vae, vae, learning)]


def test_what_an_encoder_keeps_of_frozen_weights_is_never_that_of_other_weights(
    vae: cvvae.CVVAE, clip: torch.Tensor
) -> None:
    vae = copy.deepcopy(vae).requires_grad_(False)
    image = clip[:, :, :1]
    seen = [first := _images(vae, image)]
    with torch.no_grad():
        weight = vae.encoder.motion_out.weight
        weight.add_(0.05)
        seen.append(_images(vae, image))
        # Elsewhere, with the count of changes that the one before has.
        vae.encoder.motion_out.weight.data = weight.detach() * 1.5
        seen.append(_images(vae, image))
        other = copy.deepcopy(vae)
        other.encoder.motion_in.bias.add_(0.5)
        seen.append(_images(other, image))
        other.load_state_dict(vae.state_dict())
        seen.append(_images(other, image))
        other.double()
        seen.append([latent.float() for latent in _images(other, image.double())])
    for latents in seen:
        assert torch.equal(latents[0], latents[1])
        assert torch.equal(latents[0], latents[2])
    for before, after in itertools.pairwise(seen[:4]):
        assert not torch.allclose(before[0], after[0])
    assert torch.equal(seen[4][0], seen[2][0])
    assert torch.allclose(seen[5][0], seen[2][0], atol=1e-4)
    assert torch.isfinite(first[0]).all()


def test_what_an_encoder_keeps_is_of_one_precision_and_does_not_travel(vae: cvvae.CVVAE, clip: torch.Tensor) -> None:
    image = clip[:, :, :1]
    plain = vae.encode(image).latent_dist.mean
    vae = copy.deepcopy(vae)
    size = len(pickle.dumps(vae))
    with torch.autocast("cpu", torch.bfloat16):
        vae.encode(image)
    assert torch.equal(vae.encode(image).latent_dist.mean, plain)
    assert len(pickle.dumps(vae)) == size


def test_an_image_gives_gradients_to_itself_and_to_weights_that_learn_again_and_again(
    vae: cvvae.CVVAE, clip: torch.Tensor
) -> None:
    image = clip[:, :, :1]
    vae = copy.deepcopy(vae)
    with torch.inference_mode():
        plain = vae.encode(image).latent_dist.mean
    found = []
    for learns in (False, True, True):
        vae.requires_grad_(learns).zero_grad()
        asked = image.clone().requires_grad_(True)
        with torch.enable_grad():
            latent = vae.encode(asked).latent_dist.mean
            latent.square().sum().backward()
        assert torch.equal(latent.detach(), plain)
        found.append((asked.grad, vae.encoder.motion_out.weight.grad))
    assert found[0][1] is None
    assert found[0][0].abs().max() > 0
    assert found[1][1].abs().max() > 0
    torch.testing.assert_close([of_image for of_image, _ in found[:2]], [of_image for of_image, _ in found[1:]])
    torch.testing.assert_close(found[1][1], found[2][1])


def test_an_image_goes_in_and_comes_out_as_one(vae: cvvae.CVVAE) -> None:
    latents = vae.encode(torch.zeros(1, 3, 24, 32)).latent_dist
    assert latents.mean.shape == (1, vae.latent_channels, 3, 4)
    assert vae.decode(latents.mean).sample.shape == (1, 3, 24, 32)


def test_the_posterior_has_no_variance(vae: cvvae.CVVAE, clip: torch.Tensor) -> None:
    posterior = vae.encode(clip).latent_dist
    torch.testing.assert_close(posterior.sample(torch.Generator()), posterior.mean, atol=1e-5, rtol=0)


def test_sides_that_are_no_multiple_of_8_are_cut_right_and_below(vae: cvvae.CVVAE, clip: torch.Tensor) -> None:
    cropped = vae.encode(clip[..., :24, :24]).latent_dist.mean
    torch.testing.assert_close(vae.encode(clip[..., :30, :29]).latent_dist.mean, cropped, atol=1e-5, rtol=0)
    assert vae.latent_shape(FRAMES_PER_CLIP, 30, 29) == tuple(cropped.shape[1:])


def test_the_memory_of_a_stream_does_not_grow(vae: cvvae.CVVAE, clip: torch.Tensor) -> None:
    cache, sizes = Cache(), []
    for piece in cut(clip[..., :32, :32], 4):
        vae.encoder(piece, cache)
        sizes.append(cache.num_bytes)
    assert len(set(sizes[1:])) <= 2
    assert max(sizes) == 4 * clip[:, :, :4, :32, :32].numel()


def test_gradients_reach_every_parameter_also_with_recomputation(vae: cvvae.CVVAE, clip: torch.Tensor) -> None:
    gradients = []
    for recomputes in (False, True):
        model = cvvae.CVVAE(vae.config).train()
        model.load_state_dict(vae.state_dict())
        model.requires_grad_(True)
        if recomputes:
            model.enable_gradient_checkpointing()
        with torch.enable_grad():
            model(clip[:, :, :9, :32, :32]).square().mean().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_saving_and_loading_gives_the_same_latents(vae: cvvae.CVVAE, clip: torch.Tensor, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path)
    loaded = cvvae.load(tmp_path)
    assert loaded.config == vae.config
    assert torch.equal(loaded.encode(clip).latent_dist.mean, vae.encode(clip).latent_dist.mean)


def test_a_half_precision_model_stays_close(vae: cvvae.CVVAE, clip: torch.Tensor, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path)
    loaded = cvvae.load(tmp_path, torch_dtype=torch.bfloat16)
    wanted = vae.encode(clip).latent_dist.mean
    found = loaded.encode(clip.bfloat16()).latent_dist.mean.float()
    assert (found - wanted).square().mean().sqrt() < 0.03 * wanted.std()


def test_sizes_stand_in_the_configuration() -> None:
    published = {"_class_name": "CVVAELightModel", **SMALL_SIZES, "latent_channels": 16, "scaling_factor": 0.5}
    config = cvvae.CVVAEConfig.from_published(published)
    assert (config.light.encoder_widths, config.latent_channels, config.is_causal) == ((8, 8, 16), 16, True)
    assert cvvae.CVVAEConfig.from_published(config.to_published()) == config


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"norm": "clip"}, "norm"),
        ({"encoder_widths": [8, 8]}, "encoder_widths"),
        ({"encoder_widths": 8}, "encoder_widths"),
        ({"motion_blocks": [1, 1, 1]}, "motion_blocks"),
        ({"decoder_widths": [6, 8, 8]}, "decoder_widths"),
        ({"decoder_blocks": [1, -1, 1]}, "decoder_blocks"),
        ({"motion_blocks": 1.5}, "motion_blocks"),
        ({"norm_num_groups": 8}, "norm_num_groups"),
        ({"block_out_channels": [8, 8, 8, 8]}, "block_out_channels"),
    ],
)
def test_a_configuration_that_makes_no_light_model_is_refused(fields: dict[str, object], named: str) -> None:
    with pytest.raises(cvvae.ConfigError, match=named):
        cvvae.CVVAEConfig.from_published({"_class_name": "CVVAELightModel", **fields})


def test_the_published_families_know_nothing_of_light_sizes() -> None:
    with pytest.raises(cvvae.ConfigError, match="encoder_widths"):
        cvvae.CVVAEConfig.from_published({"_class_name": "CVVAEModel", "encoder_widths": [8, 8, 8]})
    config = cvvae.CVVAEConfig.from_published({"_class_name": "CVVAEModel"})
    assert dataclasses.replace(config).to_published() == config.to_published()
