"""Narrow image VAEs of diffusers' real class, for tests that inflate, teach with or compare to one."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL


def narrow_image_vae(seed: int, **fields: Any) -> Any:
    """An `AutoencoderKL` with four levels, as Stable Diffusion's but narrow; `fields` of its configuration win."""
    torch.manual_seed(seed)
    narrow: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return AutoencoderKL(**{**narrow, **fields}).eval()
