"""Promises of norm="frame": nothing looks ahead, a latent is that of its own past, and training may save memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cvvae
from cvvae.checkpoint import published_state_dict
from cvvae.layers import FrameNorm, to_channels_last

Frames = Callable[..., torch.Tensor]
MakeModel = Callable[..., cvvae.CVVAE]


@pytest.fixture(params=[True, False], ids=["half 3D", "full 3D"])
def vae(request: pytest.FixtureRequest, family: str, make_model: MakeModel) -> cvvae.CVVAE:
    return make_model(family, norm="frame", half_3d=request.param)


def test_no_latent_depends_on_a_later_frame(vae: cvvae.CVVAE, frames: Frames) -> None:
    x = frames(1, 3, 17, 32, 32)
    changed = x.clone()
    changed[:, :, 9:] = -x[:, :, 9:]
    found, wanted = vae.encode(changed).latent_dist.mean, vae.encode(x).latent_dist.mean
    torch.testing.assert_close(found[:, :, :3], wanted[:, :, :3], atol=1e-5, rtol=0)
    assert not torch.allclose(found[:, :, 3], wanted[:, :, 3], atol=1e-2)


def test_no_frame_depends_on_a_later_latent(vae: cvvae.CVVAE) -> None:
    z = torch.randn(1, vae.latent_channels, 5, 4, 4)
    changed = z.clone()
    changed[:, :, 3:] = -z[:, :, 3:]
    found, wanted = vae.decode(changed).sample, vae.decode(z).sample
    torch.testing.assert_close(found[:, :, :9], wanted[:, :, :9], atol=1e-5, rtol=0)
    assert not torch.allclose(found[:, :, 9], wanted[:, :, 9], atol=1e-2)


def test_the_first_latent_of_a_video_is_that_of_its_first_frame(vae: cvvae.CVVAE, frames: Frames) -> None:
    x = frames(2, 3, 9, 32, 24)
    z, image_z = vae.encode(x).latent_dist.mean, vae.encode(x[:, :, 0]).latent_dist.mean
    torch.testing.assert_close(z[:, :, 0], image_z, atol=1e-5, rtol=0)
    torch.testing.assert_close(vae.decode(z).sample[:, :, 0], vae.decode(image_z).sample, atol=1e-5, rtol=1e-5)


def test_a_still_clip_has_the_latents_of_its_image(vae: cvvae.CVVAE, frames: Frames) -> None:
    image = frames(1, 3, 32, 32)
    z = vae.encode(image.unsqueeze(2).expand(-1, -1, 9, -1, -1)).latent_dist.mean
    torch.testing.assert_close(z, vae.encode(image).latent_dist.mean.unsqueeze(2).expand_as(z), atol=1e-5, rtol=0)


def test_odd_sides_round_down_in_both_families(vae: cvvae.CVVAE, frames: Frames) -> None:
    x = frames(1, 3, 5, 60, 52)
    assert vae.encode(x).latent_dist.mean.shape[-2:] == (7, 6) == vae.latent_shape(5, 60, 52)[-2:]


def test_a_norm_of_frames_is_the_norm_of_every_image_and_keeps_the_layout() -> None:
    for batch, num_frames in ((1, 1), (1, 5), (2, 5)):
        x = to_channels_last(torch.randn(batch, 16, num_frames, 6, 6))
        norm = FrameNorm(4, 16)
        found = norm(x)
        assert found.stride() == x.stride()
        for index in range(num_frames):
            wanted = torch.nn.functional.group_norm(x[:, :, index], 4, norm.weight, norm.bias)
            torch.testing.assert_close(found[:, :, index], wanted, atol=1e-5, rtol=0)


def test_the_variant_stands_in_the_configuration_and_decides_what_follows(family: str) -> None:
    config = cvvae.CVVAEConfig.from_published({"_class_name": family, "norm": "frame"})
    assert config.is_causal
    assert (config.norm_eps, config.spatial_padding, config.downsample_padding) == (1e-6, "zeros", "right_bottom")
    assert (config.encoder_attention, config.decoder_attention) == ("spatial", "spatial")
    written = config.to_published()
    assert (written["norm"], written["causal_decoder"]) == ("frame", True)
    assert cvvae.CVVAEConfig.from_published(written) == config
    published = cvvae.CVVAEConfig.from_published({"_class_name": family})
    assert not published.is_causal
    assert "norm" not in published.to_published()
    assert published.to_published()["causal_decoder"] is False


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"norm": "batch"}, "norm is 'batch': allowed are 'clip', 'frame'"),
        ({"norm": "frame", "spatial_padding": "replicate"}, "spatial_padding is 'replicate' beside norm='frame'"),
        ({"norm": "frame", "downsample_padding": "both"}, "downsample_padding is 'both'"),
        ({"norm": "frame", "decoder_time_padding": "zeros"}, "decoder_time_padding is 'zeros'"),
        ({"norm": "frame", "norm_eps": 1e-5}, "norm_eps is 1e-05"),
        ({"norm": "frame", "causal_decoder": False}, "causal_decoder=False and norm='frame'"),
        ({"causal_decoder": True}, "causal_decoder=True and norm='clip'"),
    ],
)
def test_fields_that_contradict_the_variant_are_refused(family: str, fields: dict[str, Any], wanted: str) -> None:
    with pytest.raises(cvvae.ConfigError, match=wanted):
        cvvae.CVVAEConfig.from_published({"_class_name": family, **fields})


def test_attention_over_time_is_refused_in_the_variant() -> None:
    fields = {"_class_name": "CVVAEModel", "norm": "frame", "decoder_attn_type": "spatial-temporal-xformer"}
    with pytest.raises(cvvae.ConfigError, match="decoder_attention is 'spatial_temporal'"):
        cvvae.CVVAEConfig.from_published(fields)


def test_widths_that_the_published_fields_cannot_say_are_refused() -> None:
    fields = cvvae.CVVAEConfig.from_published({"_class_name": "CVVAEModel", "norm": "frame"})
    with pytest.raises(cvvae.ConfigError, match="multiples of the first"):
        type(fields)(class_name="CVVAEModel", norm_num_groups=8, block_out_channels=(16, 24, 32, 32))


def test_a_saved_variant_comes_back_with_its_keys_and_values(vae: cvvae.CVVAE, frames: Frames, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["norm"] == "frame"
    again, x = cvvae.load(tmp_path), frames(1, 3, 5, 32, 32)
    assert again.config == vae.config
    assert torch.equal(again(x), vae(x))


def test_the_variant_has_the_published_keys_but_those_of_attention_over_time(family: str) -> None:
    with torch.device("meta"):
        published, variant = (
            published_state_dict(cvvae.CVVAE(cvvae.CVVAEConfig.from_published({"_class_name": family, "norm": norm})))
            for norm in ("clip", "frame")
        )
    gone = {"q_t", "k_t", "v_t", "norm_t", "proj_out_t"}
    kept = {key: tensor.shape for key, tensor in published.items() if not gone & set(key.split("."))}
    assert {key: tensor.shape for key, tensor in variant.items()} == kept


@pytest.fixture
def trainable(make_model: MakeModel, family: str, tmp_path: Path) -> cvvae.CVVAE:
    make_model(family, norm="frame").save_pretrained(tmp_path)
    return cvvae.load(tmp_path).train().requires_grad_(True)


def gradients(vae: cvvae.CVVAE, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], int]:
    """The gradient of every parameter, and how many bytes the forward pass kept for it."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = vae(x).square().mean()
    loss.backward()
    found = {name: parameter.grad for name, parameter in vae.named_parameters() if parameter.grad is not None}
    vae.zero_grad()
    return found, sum(kept.values())


def test_recomputed_blocks_give_the_same_gradients_from_less_memory(trainable: cvvae.CVVAE, frames: Frames) -> None:
    x = frames(1, 3, 5, 32, 32)
    wanted, bytes_kept = gradients(trainable, x)
    trainable.enable_gradient_checkpointing()
    found, fewer_bytes = gradients(trainable, x)
    assert found.keys() == wanted.keys() == dict(trainable.named_parameters()).keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
    assert fewer_bytes < 0.7 * bytes_kept
    trainable.enable_gradient_checkpointing(False)
    assert gradients(trainable, x)[1] == bytes_kept


def test_gradients_cross_chunks(trainable: cvvae.CVVAE, frames: Frames) -> None:
    x = frames(1, 3, 13, 16, 16)  # chunks of 8
    assert trainable.config.chunk_num_frames == 8
    in_chunks, _ = gradients(trainable, x)
    trainable.set_chunking(0)
    whole, _ = gradients(trainable, x)
    for name, gradient in whole.items():
        torch.testing.assert_close(in_chunks[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_half_compiles_to_one_graph(make_model: MakeModel, frames: Frames, half: str) -> None:
    vae = make_model("CVVAEModel", norm="frame")
    x = frames(1, 3 if half == "encoder" else vae.latent_channels, 5, 16, 16)
    module = getattr(vae, half)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
