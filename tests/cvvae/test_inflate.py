"""Promises: an inflated model is its image VAE, frame by frame, to 1e-5; nothing of the image VAE is lost or guessed.

The image VAEs are diffusers' own class with made weights, in the shapes of Stable Diffusion 2.1 (quantisation layers, 4
channels) and Stable Diffusion 3 (none, 16 channels, a shift), only narrower.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from image_vaes import narrow_image_vae
from safetensors.torch import load_file, save_file

import cvvae
from cvvae.inflate import NEW_PARAMETERS, inflate, load_image_vae

Frames = Callable[..., torch.Tensor]
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHAPES: dict[str, dict[str, Any]] = {
    "sd21": {"latent_channels": 4, "scaling_factor": 0.18215},
    "sd3": {
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}


def made_image_vae(**fields: Any) -> Any:
    vae = narrow_image_vae(3, block_out_channels=[16, 16, 32, 48], norm_num_groups=8, **fields)
    for name, parameter in vae.named_parameters():
        if "norm" in name:  # by default ones and zeros, which would hide a swap
            parameter.add_(0.2 * torch.randn_like(parameter))
    return vae


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def image_vae(shape: str) -> Any:
    return made_image_vae(**SHAPES[shape])


def by_frame(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.stack([function(frame) for frame in x.unbind(2)], dim=2)


def assert_is_the_image_vae(vae: cvvae.CVVAE, image_vae: Any, clip: torch.Tensor, atol: float = 1e-5) -> None:
    found = vae.encode(clip).latent_dist
    wanted = image_vae.encode(clip[:, :, ::4].movedim(2, 1).flatten(0, 1)).latent_dist
    for moment in ("mean", "logvar"):
        frames = getattr(wanted, moment).unflatten(0, (clip.shape[0], -1)).movedim(1, 2)
        torch.testing.assert_close(getattr(found, moment), frames, atol=atol, rtol=0)
    latents = found.mean
    groups = [0] + [1 + frame // 4 for frame in range(clip.shape[2] - 1)]
    wanted_frames = by_frame(lambda z: image_vae.decode(z).sample, latents)[:, :, groups]
    torch.testing.assert_close(vae.decode(latents).sample, wanted_frames, atol=atol, rtol=0)


@pytest.mark.parametrize("half_3d", [True, False])
def test_every_latent_and_every_frame_is_the_image_vaes(image_vae: Any, half_3d: bool, frames: Frames) -> None:
    assert_is_the_image_vae(inflate(image_vae, half_3d=half_3d), image_vae, frames(2, 3, 9, 32, 40))


def test_what_is_left_is_the_rounding_of_float32(frames: Frames) -> None:
    image_vae = made_image_vae(**SHAPES["sd3"])
    vae = inflate(image_vae).double()
    assert_is_the_image_vae(vae, image_vae.double(), frames(1, 3, 5, 32, 32).double(), atol=1e-12)


def test_images_are_the_image_vaes(image_vae: Any, frames: Frames) -> None:
    vae, x = inflate(image_vae), frames(2, 3, 40, 32)
    z = image_vae.encode(x).latent_dist.mean
    torch.testing.assert_close(vae.encode(x).latent_dist.mean, z, atol=1e-5, rtol=0)
    torch.testing.assert_close(vae.decode(z).sample, image_vae.decode(z).sample, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sides", [(True, False), (False, True)])
def test_quantisation_layers_on_one_side_only_are_taken_over(sides: tuple[bool, bool], frames: Frames) -> None:
    image_vae = made_image_vae(latent_channels=4, use_quant_conv=sides[0], use_post_quant_conv=sides[1])
    assert_is_the_image_vae(inflate(image_vae), image_vae, frames(1, 3, 5, 32, 32))


def test_the_published_architecture_starts_as_the_image_vae_on_images_of_sd21(frames: Frames) -> None:
    image_vae = made_image_vae(**SHAPES["sd21"])
    vae, x = inflate(image_vae, norm="clip"), frames(1, 3, 40, 32)
    assert not vae.is_causal
    assert_is_the_image_vae(vae, image_vae, x.unsqueeze(2))


def test_the_published_architecture_takes_every_weight_of_sd3() -> None:
    vae = inflate(made_image_vae(**SHAPES["sd3"]), norm="clip")
    assert (vae.config.spatial_padding, vae.config.downsample_padding) == ("replicate", "both")


def test_scale_shift_and_shape_are_taken_over(image_vae: Any, shape: str) -> None:
    vae = inflate(image_vae)
    assert vae.config.class_name == {"sd21": "CVVAEModel", "sd3": "CVVAESD3Model"}[shape]
    assert (vae.scaling_factor, vae.shift_factor) == {"sd21": (0.18215, 0.0), "sd3": (1.5305, 0.0609)}[shape]
    assert vae.latent_channels == SHAPES[shape]["latent_channels"]
    assert vae.config.block_out_channels == (16, 16, 32, 48)
    assert vae.config.post_quant_conv == (shape == "sd21")
    assert vae.is_causal
    assert vae.is_trained
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_no_parameter_is_new() -> None:
    assert not NEW_PARAMETERS


def test_a_folder_that_diffusers_wrote_gives_the_same_model(image_vae: Any, tmp_path: Path) -> None:
    image_vae.save_pretrained(tmp_path / "vae")
    wanted = inflate(image_vae)
    for vae in (inflate(load_image_vae(tmp_path / "vae")), inflate(load_image_vae(str(tmp_path), "vae"))):
        assert vae.config == wanted.config
        for name, tensor in wanted.state_dict().items():
            assert torch.equal(vae.state_dict()[name], tensor)


def test_an_inflated_model_is_saved_and_comes_back(image_vae: Any, shape: str, frames: Frames, tmp_path: Path) -> None:
    vae, x = inflate(image_vae), frames(1, 3, 5, 32, 32)
    vae.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["norm"] == "frame"
    keys = load_file(tmp_path / WEIGHTS)
    assert ("post_quant_conv.weight" in keys, "post_quant_conv.bias" in keys) == (shape == "sd21", shape == "sd21")
    again = cvvae.load(tmp_path)
    assert again.config == vae.config
    assert torch.equal(again(x), vae(x))


def test_files_from_before_the_attention_layers_were_renamed_are_read(shape: str, tmp_path: Path) -> None:
    image_vae = made_image_vae(**SHAPES[shape])
    image_vae.save_pretrained(tmp_path)
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, tensor in load_file(tmp_path / WEIGHTS).items():
        for new_name, old_name in old_names.items():
            key = key.replace(f".{new_name}.", f".{old_name}.")
        old[key] = tensor
    save_file(old, tmp_path / WEIGHTS)
    found, wanted = inflate(load_image_vae(tmp_path)).state_dict(), inflate(image_vae).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_half_precision_files_are_inflated_in_float32(image_vae: Any, tmp_path: Path) -> None:
    image_vae.half().save_pretrained(tmp_path)
    assert inflate(load_image_vae(tmp_path)).dtype == torch.float32


def test_weights_that_are_missing_left_over_or_of_another_shape_are_all_named(image_vae: Any) -> None:
    state = dict(image_vae.state_dict())
    del state["encoder.conv_in.bias"]
    state["encoder.temporal.weight"] = torch.zeros(2)
    state["decoder.conv_out.bias"] = torch.zeros(5)
    with pytest.raises(cvvae.CheckpointError) as caught:
        inflate((dict(image_vae.config), state))
    message = str(caught.value)
    assert "encoder.conv_in.bias has nothing to be filled from" in message
    assert "encoder.temporal.weight is not used" in message
    assert "decoder.conv_out.bias is (5,) there and decoder.conv_out.bias (3,) here" in message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


def test_a_quantisation_layer_that_the_configuration_does_not_have_is_named() -> None:
    image_vae = made_image_vae(**SHAPES["sd21"])
    with pytest.raises(cvvae.CheckpointError, match=r"quant_conv\.bias is not used"):
        inflate(({**image_vae.config, "use_quant_conv": False}, image_vae.state_dict()))
    state = {key: tensor for key, tensor in image_vae.state_dict().items() if not key.startswith("quant_conv")}
    with pytest.raises(cvvae.CheckpointError, match=r"lack quant_conv\.weight, quant_conv\.bias"):
        inflate((image_vae.config, state))


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"_class_name": "AutoencoderKLFlux2"}, "is a AutoencoderKLFlux2: only a plain AutoencoderKL"),
        ({"latents_mean": [0.0] * 4}, r"latents_mean=\[0.0"),
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention=False"),
        ({"down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D"),
        ({"block_out_channels": [16, 32, 32]}, "4 widths are needed"),
        ({"block_out_channels": [16, 24, 32, 32]}, "multiples of the first"),
        ({"norm_num_groups": 5}, "norm_num_groups=5"),
        ({"out_channels": 6}, "3 channels into 6"),
    ],
)
def test_what_a_video_vae_cannot_be_built_from_is_refused_by_name(fields: dict[str, Any], wanted: str) -> None:
    config = {**made_image_vae(**SHAPES["sd21"]).config, **fields}
    with pytest.raises(cvvae.ConfigError, match=wanted):
        inflate((config, {}))


def test_a_folder_without_a_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(cvvae.ConfigError, match=r"config\.json cannot be read"):
        load_image_vae(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(cvvae.CheckpointError, match=r"only safetensors are read"):
        load_image_vae(tmp_path)


def test_inflating_from_a_folder_needs_no_diffusers() -> None:
    code = "import sys, cvvae.inflate; print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
