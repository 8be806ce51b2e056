"""A video VAE that begins as an image VAE: every weight of diffusers' `AutoencoderKL` put where it belongs.

Not training, and no other image VAE than that class. What comes out with norm="frame" equals the image VAE from the
first step: the latents of a video are the image VAE's latents of frames 0, 4, 8, ..., and each frame decodes as the
image VAE decodes the latent of its group. `training` starts from it; users call `inflate(load_image_vae(FOLDER))`.

A 3x3 kernel becomes one of the three temporal taps of a 3x3x3 kernel and the others are zero. Which tap decides which
frame is copied: the last one in a causal convolution, the middle one in the published decoder, which looks both ways.
A convolution that doubles the frame rate makes both frames of a pair from the same kernel. Source of the idea: CV-VAE,
arXiv 2405.20279, section 3.2; the tap, the folding of the quantisation layers and the variant are our own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cvvae.checkpoint import (
    CheckpointError,
    find_folder,
    published_key,
    read_safetensors,
)
from cvvae.config import NUM_LEVELS, ConfigError, CVVAEConfig, Norm
from cvvae.folders import CONFIG_NAME, WEIGHTS_NAME
from cvvae.layers import KERNEL, SpaceTimeConv, Upsample
from cvvae.model import CVVAE

ImageVAE = tuple[Mapping[str, Any], Mapping[str, Tensor]]
"""Configuration and state dict of an image VAE."""

NEW_PARAMETERS: frozenset[str] = frozenset()
"""Parameters of a video VAE, by their own names, that no image VAE has and that keep their initial values.

None: both variants are built with spatial attention, and all that works over time comes from a kernel of the image VAE.
"""

# What an AutoencoderKL does where its configuration says nothing.
_SOURCE_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
_NEEDED: dict[str, Any] = {
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "latents_mean": None,
    "latents_std": None,
    "down_block_types": ("DownEncoderBlock2D",) * NUM_LEVELS,
    "up_block_types": ("UpDecoderBlock2D",) * NUM_LEVELS,
}
_NORM_EPS = 1e-6  # of every norm in diffusers' class, which has no field for it
# The names of the attention's layers in files written before diffusers 0.18, Stable Diffusion 2.1 among them.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Own names read as the SD3 family publishes them are diffusers' names.
_DIFFUSERS_NAMES = "CVVAESD3Model"


def load_image_vae(
    model: str | os.PathLike[str], subfolder: str | None = None, *, revision: str | None = None
) -> ImageVAE:
    """Configuration and float32 weights of a diffusers folder; diffusers itself is not needed.

    Args:
        model: a folder with config.json and diffusion_pytorch_model.safetensors, or a hub id.
        subfolder: folder inside it, such as "vae" in a whole pipeline.
        revision: branch, tag or commit of a hub repository.

    Raises:
        CheckpointError: nothing there, no network for a hub id, or a damaged file.
        ConfigError: config.json is not a JSON object.
    """
    folder, _, _ = find_folder(os.fspath(model), subfolder, revision)
    config = _read_json(folder / CONFIG_NAME)
    return config, read_safetensors(folder / WEIGHTS_NAME, torch.float32)


def inflate(image_vae: Any, *, norm: Norm = "frame", half_3d: bool = True) -> CVVAE:
    """The video VAE that an image VAE becomes, float32, in evaluation mode, every parameter filled from it.

    `quant_conv` is folded into the encoder's last layer. `post_quant_conv` stays a layer of its own, because its bias
    cannot be folded where the next layer pads with zeros. Scale and shift are taken over.

    Args:
        image_vae: an `AutoencoderKL` of diffusers, or (configuration, state dict) as `load_image_vae` gives them.
        norm: "frame" gives the causal variant, equal to the image VAE on every frame as the module says. "clip" gives
            the published architecture with spatial attention: with quantisation layers (Stable Diffusion 1 and 2, SDXL)
            equal for images only, as norms pool over a clip; without (SD3, FLUX) not even for images, as the published
            SD3 family pads otherwise, and training has to find the way back.
        half_3d: as in the published models, half of the residual blocks' convolutions stay 2D.

    Returns:
        a `CVVAEModel` where the image VAE has quantisation layers, else a `CVVAESD3Model`.

    Raises:
        ConfigError: another class, or a feature that the video VAE does not have; the value is named.
        CheckpointError: a parameter that would be neither filled nor is named in NEW_PARAMETERS, a weight of the image
            VAE that is not used, or a wrong shape; all of them are listed.
    """
    if isinstance(image_vae, tuple):
        config, state = image_vae
    else:
        config, state = {**image_vae.config, "_class_name": type(image_vae).__name__}, image_vae.state_dict()
    source = {**_SOURCE_DEFAULTS, **config}
    with torch.device("meta"):
        vae = CVVAE(_video_config(source, norm, half_3d))
    weights = {_modern(key): tensor.detach().to("cpu", torch.float32) for key, tensor in state.items()}
    if source["use_quant_conv"]:
        _fold_quant_conv(weights)
    filled: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, wanted in vae.state_dict().items():
        key = published_key(name, _DIFFUSERS_NAMES)
        tensor = weights.pop(key, None)
        if tensor is not None:
            filled[name] = _inflated(vae, name, tensor, wanted)
            if filled[name].shape != wanted.shape:
                problems.append(f"{key} is {tuple(tensor.shape)} there and {name} {tuple(wanted.shape)} here")
        elif name not in NEW_PARAMETERS:
            problems.append(f"{name} has nothing to be filled from: {key} is missing there")
    problems += [f"{key} is not used" for key in sorted(weights)]
    if problems:
        raise CheckpointError(
            f"the weights of the image VAE do not fit its configuration, {len(problems)} of them:\n"
            + "\n".join(problems)
            + "\ncheck that both belong together and that the image VAE is a plain AutoencoderKL"
        )
    vae.load_state_dict(filled, strict=True, assign=True)
    return vae.eval().requires_grad_(False)


def _video_config(source: Mapping[str, Any], norm: Norm, half_3d: bool) -> CVVAEConfig:
    _check_source(source)
    has_quant_convs = source["use_quant_conv"] or source["use_post_quant_conv"]
    widths = source["block_out_channels"]
    fields: dict[str, Any] = {
        "norm": norm,
        "norm_eps": _NORM_EPS,
        "norm_num_groups": source["norm_num_groups"],
        "in_channels": source["in_channels"],
        "half_3d": half_3d,
        "scaling_factor": source["scaling_factor"],
        "shift_factor": source["shift_factor"] or 0.0,
        "post_quant_conv": bool(source["use_post_quant_conv"]),
    }
    if has_quant_convs:
        if any(width % widths[0] for width in widths):
            raise ConfigError(
                f"the image VAE has block_out_channels={list(widths)}: multiples of the first one are needed, as the "
                f"published fields of a CVVAEModel say them so"
            )
        fields |= {
            "_class_name": "CVVAEModel",
            "z_channels": source["latent_channels"],
            "ch": widths[0],
            "ch_mult": [width // widths[0] for width in widths],
            "num_res_blocks": source["layers_per_block"],
            "decoder_attn_type": "vanilla-xformers",
            "force_upcast": bool(source["force_upcast"]),
        }
    else:
        fields |= {
            "_class_name": "CVVAESD3Model",
            "out_channels": source["latent_channels"],
            "block_out_channels": widths,
            "layers_per_block": source["layers_per_block"],
        }
    return CVVAEConfig.from_published(fields)


def _check_source(source: Mapping[str, Any]) -> None:
    class_name = source.get("_class_name", "AutoencoderKL")
    if class_name != "AutoencoderKL":
        raise ConfigError(
            f"the image VAE is a {class_name}: only a plain AutoencoderKL can be inflated; others have layers (batch "
            f"norms of the latents, patches, time) that the video VAE does not have"
        )
    widths = source.get("block_out_channels", ())
    if len(widths) != NUM_LEVELS:
        raise ConfigError(
            f"the image VAE has block_out_channels={list(widths)}: {NUM_LEVELS} widths are needed, as the video VAE "
            f"halves frames {NUM_LEVELS - 1} times"
        )
    for key, needed in _NEEDED.items():
        value = source.get(key, needed)
        if (tuple(value) if isinstance(value, list) else value) != needed:
            raise ConfigError(f"the image VAE has {key}={value!r}: the video VAE can only be built with {needed!r}")
    if source["out_channels"] != source["in_channels"]:
        raise ConfigError(
            f"the image VAE turns {source['in_channels']} channels into {source['out_channels']}: a video VAE gives "
            f"back the channels that it was given"
        )


def _modern(key: str) -> str:
    """The key as diffusers writes it today."""
    before, dot, last = key.rpartition(".")
    parent, _, layer = before.rpartition(".")
    return f"{parent}.{_OLD_ATTENTION[layer]}{dot}{last}" if layer in _OLD_ATTENTION else key


def _fold_quant_conv(weights: dict[str, Tensor]) -> None:
    """Puts the 1x1 layer after the encoder into the encoder's last layer, exactly."""
    names = [f"{layer}.{kind}" for layer in ("quant_conv", "encoder.conv_out") for kind in ("weight", "bias")]
    if missing := [name for name in names if name not in weights]:
        raise CheckpointError(
            f"the image VAE's configuration has a quant_conv, but its weights lack {', '.join(missing)}: check that "
            f"both belong together"
        )
    matrix, offset = weights.pop("quant_conv.weight").flatten(1).double(), weights.pop("quant_conv.bias").double()
    weight, bias = weights["encoder.conv_out.weight"].double(), weights["encoder.conv_out.bias"].double()
    weights["encoder.conv_out.weight"] = torch.einsum("oc,cihw->oihw", matrix, weight).float()
    weights["encoder.conv_out.bias"] = (matrix @ bias + offset).float()


def _inflated(vae: CVVAE, name: str, tensor: Tensor, wanted: Tensor) -> Tensor:
    """An image VAE's tensor in the shape of the video VAE's parameter of that name, where it has one."""
    layer_name, _, kind = name.rpartition(".")
    layer = vae.get_submodule(layer_name)
    if not isinstance(layer, SpaceTimeConv):
        # 1x1 maps are stored with or without trailing ones.
        return tensor.reshape(wanted.shape) if tensor.numel() == wanted.numel() else tensor
    parent = vae.get_submodule(layer_name.rpartition(".")[0])
    if isinstance(parent, Upsample) and parent.doubles_time:
        tensor = torch.cat([tensor, tensor])  # the earlier and the later frame of each pair
    if kind == "bias" or tensor.dim() != 4:
        return tensor
    inflated = tensor.new_zeros(*tensor.shape[:2], KERNEL, *tensor.shape[2:])
    inflated[:, :, KERNEL - 1 if layer.edges.time_after == 0 else KERNEL // 2] = tensor
    return inflated


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}): a diffusers folder has one") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a {type(config).__name__}: a JSON object is needed")
    return config
