"""Promises of the model: shapes, the published sizes, one path for clips and images, chunks, tiles, data types."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import cvvae
from cvvae.layers import SpaceTimeConv

Frames = Callable[..., torch.Tensor]
MakeModel = Callable[..., cvvae.CVVAE]

# Encoder and decoder parameters, from the released checkpoints (half 3D) and the paper's table 1 (full 3D, rounded).
NUM_PARAMETERS = {
    ("CVVAEModel", True): (68_748_936, 113_697_539),
    ("CVVAEModel", False): (100_009_608, 155_869_955),
    ("CVVAESD3Model", True): (69_080_736, 112_811_779),
    ("CVVAESD3Model", False): (100_341_408, 154_984_195),
}


@pytest.mark.parametrize(("class_name", "half_3d"), NUM_PARAMETERS)
def test_the_published_models_have_the_published_size_and_shapes(class_name: str, half_3d: bool) -> None:
    with torch.device("meta"):
        vae = cvvae.CVVAE(cvvae.CVVAEConfig.from_published({"_class_name": class_name, "half_3d": half_3d}))
        clip, image = torch.empty(1, 3, 33, 256, 256), torch.empty(2, 3, 1024, 600)
    found = tuple(sum(p.numel() for p in half.parameters()) for half in (vae.encoder, vae.decoder))
    assert found == NUM_PARAMETERS[class_name, half_3d]
    C = vae.latent_channels
    z = vae.encode(clip).latent_dist.mean
    assert z.shape == (1, C, 9, 32, 32)
    assert vae.decode(z).sample.shape == clip.shape
    z = vae.encode(image).latent_dist.mean
    assert z.shape == (2, C, 128, 75)
    assert vae.decode(z).sample.shape == image.shape


def test_an_image_gives_what_the_general_path_gives(
    family: str,
    make_model: MakeModel,
    frames: Frames,
    plainly_padded: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vae = make_model(family)
    x = frames(2, 3, 48, 40)
    encoded = vae.encode(x).latent_dist
    decoded = vae.decode(encoded.mode()).sample
    monkeypatch.setattr(SpaceTimeConv, "forward", plainly_padded)
    general = vae.encode(x).latent_dist
    torch.testing.assert_close(encoded.mean, general.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoded.logvar, general.logvar, atol=1e-5, rtol=0)
    torch.testing.assert_close(decoded, vae.decode(encoded.mode()).sample, atol=1e-5, rtol=1e-5)


def test_a_clip_gives_what_the_general_path_gives(
    family: str,
    make_model: MakeModel,
    frames: Frames,
    plainly_padded: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vae = make_model(family, half_3d=False)
    x = frames(1, 3, 9, 32, 40)
    encoded = vae.encode(x).latent_dist
    decoded = vae.decode(encoded.mode()).sample
    monkeypatch.setattr(SpaceTimeConv, "forward", plainly_padded)
    torch.testing.assert_close(encoded.mean, vae.encode(x).latent_dist.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decoded, vae.decode(encoded.mode()).sample, atol=1e-5, rtol=1e-5)


def test_a_still_clip_has_the_latents_of_its_image(family: str, make_model: MakeModel, frames: Frames) -> None:
    vae = make_model(family)
    image = frames(1, 3, 32, 32)
    z = vae.encode(image.unsqueeze(2).expand(-1, -1, 9, -1, -1)).latent_dist.mean
    torch.testing.assert_close(z, vae.encode(image).latent_dist.mean.unsqueeze(2).expand_as(z), atol=1e-5, rtol=0)


def test_images_have_four_dimensions_in_and_out(family: str, make_model: MakeModel, frames: Frames) -> None:
    vae = make_model(family)
    z = vae.encode(frames(2, 3, 32, 24)).latent_dist.mean
    assert z.shape == (2, vae.latent_channels, 4, 3)
    assert vae.decode(z).sample.shape == (2, 3, 32, 24)


def test_the_sides_of_odd_frames_round_as_published(make_model: MakeModel, frames: Frames) -> None:
    x = frames(1, 3, 60, 52)
    for class_name, size in (("CVVAEModel", (7, 6)), ("CVVAESD3Model", (8, 7))):
        vae = make_model(class_name)
        assert vae.encode(x).latent_dist.mean.shape[-2:] == size
        assert vae.latent_shape(1, 60, 52)[-2:] == size


def test_tiles_of_odd_frames_give_the_promised_shape(family: str, make_model: MakeModel, frames: Frames) -> None:
    vae = make_model(family)
    for height, width in ((68, 64), (71, 115), (64, 72)):
        z = vae.encode(frames(1, 3, height, width)).latent_dist.mean
        assert z.shape[1:] == (vae.latent_channels, *vae.latent_shape(1, height, width)[2:])


def test_clips_of_a_batch_do_not_touch_each_other(family: str, make_model: MakeModel, frames: Frames) -> None:
    vae = make_model(family)
    x = frames(2, 3, 5, 32, 32)
    both = vae.encode(x).latent_dist.mean
    torch.testing.assert_close(both[1:], vae.encode(x[1:]).latent_dist.mean, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_frames", [2, 4, 16, 18])
def test_a_frame_count_that_is_not_1_plus_4k_says_what_to_do(make_model: MakeModel, num_frames: int) -> None:
    with pytest.raises(ValueError, match=rf"{num_frames} frames: 1 \+ 4 k .* cut the clip, or repeat its last frame"):
        make_model("CVVAEModel").encode(torch.zeros(1, 3, num_frames, 16, 16))


@pytest.mark.parametrize(
    ("x", "wanted"),
    [
        (torch.zeros(3, 16, 16), r"\(3, 16, 16\): \(B, 3, T, H, W\)"),
        (torch.zeros(1, 1, 16, 16), r"\(1, 1, 16, 16\)"),
        (torch.zeros(1, 3, 4, 16), "height of the frames is 4 px"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), r"x / 127.5 - 1"),
    ],
)
def test_input_that_does_not_fit_is_refused_with_its_value(make_model: MakeModel, x: torch.Tensor, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        make_model("CVVAEModel").encode(x)


def test_chunks_are_runs_that_share_one_frame(family: str, make_model: MakeModel, frames: Frames) -> None:
    vae = make_model(family)
    x = frames(1, 3, 21, 32, 32)
    z = vae.encode(x).latent_dist.mean
    pieces = [vae.encode(x[:, :, first : first + 9]).latent_dist.mean for first in (0, 8, 16)]
    assert torch.equal(z, torch.cat([pieces[0], pieces[1][:, :, 1:], pieces[2][:, :, 1:]], dim=2))
    video = vae.decode(z).sample
    parts = [vae.decode(z[:, :, first : first + 3]).sample for first in (0, 2, 4)]
    assert torch.equal(video, torch.cat([parts[0], parts[1][:, :, 1:], parts[2][:, :, 1:]], dim=2))


def test_chunks_and_tiles_can_be_changed_and_switched_off(family: str, make_model: MakeModel, frames: Frames) -> None:
    vae = make_model(family)
    x = frames(1, 3, 17, 72, 64)
    as_published = vae.encode(x).latent_dist.mean
    vae.set_chunking(0, 0)
    in_one_piece = vae.encode(x).latent_dist.mean
    decoded = vae.decode(in_one_piece).sample
    vae.set_chunking(chunk_frames=16, tile_px=128)
    assert torch.equal(vae.encode(x).latent_dist.mean, in_one_piece)
    assert torch.equal(vae.decode(in_one_piece).sample, decoded)
    assert not torch.equal(as_published, in_one_piece)
    vae.set_chunking()
    assert torch.equal(vae.encode(x).latent_dist.mean, as_published)
    with pytest.raises(ValueError, match="chunk_frames is 6: a multiple of 4"):
        vae.set_chunking(chunk_frames=6)
    with pytest.raises(ValueError, match="tile_px is 100: a multiple of 8"):
        vae.set_chunking(tile_px=100)


def test_tiles_are_runs_on_their_own_and_a_ramp_between(family: str, make_model: MakeModel, frames: Frames) -> None:
    vae = make_model(family)  # tiles of 64 px, which overlap by 16
    x = frames(1, 3, 64, 104)
    z = vae.encode(x).latent_dist.mean
    left, right = (vae.encode(x[..., tile]).latent_dist.mean for tile in (slice(0, 64), slice(48, 104)))
    middle = torch.lerp(left[..., 6:], right[..., :2], torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(z, torch.cat([left[..., :6], middle, right[..., 2:]], dim=-1), atol=1e-5, rtol=0)
    image = vae.decode(z).sample
    left, right = (vae.decode(z[..., tile]).sample for tile in (slice(0, 8), slice(6, 13)))
    middle = torch.lerp(left[..., 48:], right[..., :16], torch.arange(16) / 16)
    torch.testing.assert_close(image, torch.cat([left[..., :48], middle, right[..., 16:]], dim=-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
def test_half_precision_is_near_float32_and_stays_half(
    family: str, make_model: MakeModel, frames: Frames, dtype: torch.dtype, tolerance: float, tmp_path: object
) -> None:
    vae = make_model(family)
    x = frames(1, 3, 5, 32, 32)
    z = vae.encode(x).latent_dist.mean
    video = vae.decode(z).sample
    vae.save_pretrained(str(tmp_path))
    half = cvvae.load(str(tmp_path), torch_dtype=dtype)
    half_z = half.encode(x).latent_dist.mean
    half_video = half.decode(z).sample
    assert half_z.dtype == half_video.dtype == half.dtype == dtype
    assert (half_z.float() - z).square().mean().sqrt() < tolerance * z.std()
    assert (half_video.float() - video).square().mean().sqrt() < tolerance * video.std()


def test_encoding_applies_no_scale_and_knows_it(family: str, make_model: MakeModel, frames: Frames) -> None:
    vae = make_model(family)
    x = frames(1, 3, 16, 16)
    moments = vae.encoder(x.unsqueeze(2))
    mean = vae.encode(x).latent_dist.mean.unsqueeze(2)
    torch.testing.assert_close(mean, moments[:, : vae.latent_channels], atol=1e-5, rtol=0)
    assert (vae.scaling_factor, vae.shift_factor) == {
        "CVVAEModel": (0.18215, 0.0),
        "CVVAESD3Model": (1.5305, 0.0609),
    }[family]


def test_the_mode_is_the_mean_and_a_seed_gives_the_same_sample(make_model: MakeModel, frames: Frames) -> None:
    latent_dist = make_model("CVVAEModel").encode(frames(1, 3, 16, 16)).latent_dist
    assert latent_dist.mode() is latent_dist.mean
    first, second = (latent_dist.sample(torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, latent_dist.sample(torch.Generator().manual_seed(4)))
    assert torch.equal(latent_dist.std, (latent_dist.logvar / 2).exp())


def test_log_variances_are_clamped_as_published() -> None:
    logvar = cvvae.LatentDistribution(torch.tensor([0.0, 100.0, 0.0, -100.0]).view(2, 2, 1, 1)).logvar
    assert logvar.flatten().tolist() == [20.0, -30.0]


def test_a_diffusion_pipeline_can_call_it_as_its_vae(make_model: MakeModel, frames: Frames) -> None:
    vae = make_model("CVVAEModel")
    z = vae.encode(frames(1, 3, 16, 16), return_dict=False)[0].mode()
    image = vae.decode(z / vae.config.scaling_factor, return_dict=False, generator=torch.Generator())[0]
    assert image.shape == (1, 3, 16, 16)
    assert vae.config.block_out_channels == (16, 16, 32, 32)


def test_gradients_reach_every_weight_and_change_no_value(family: str, make_model: MakeModel, frames: Frames) -> None:
    vae = make_model(family)
    x = frames(1, 3, 5, 16, 16)
    wanted = vae(x)
    vae.requires_grad_(True)
    try:
        with torch.enable_grad():
            found = vae(x)
            found.square().mean().backward()
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        # The half of the last layer that makes log-variances has no part in the mean.
        assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
    finally:
        vae.requires_grad_(False)
        vae.zero_grad()


@pytest.mark.parametrize("num_frames", [1, 9])
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_half_compiles_to_one_graph(
    family: str, make_model: MakeModel, frames: Frames, half: str, num_frames: int
) -> None:
    vae = make_model(family)
    channels = 3 if half == "encoder" else vae.latent_channels
    x = frames(1, channels, num_frames, 16, 16)
    module = getattr(vae, half)
    # "eager" needs no C++ compiler: what is promised is that nothing breaks the graph.
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
