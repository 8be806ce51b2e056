"""Builders for the tests of tuning: outputs with embeddings, and tiny diffusion models of diffusers' classes.

Not fixtures (those are in conftest.py). The latents and embeddings are made up; the files and commits are real.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embeddings import DIM, add_image_set, add_text_set
from latents import output, record

from pipeline.records import Bucket
from pipeline.storage import ObjectStore

CLIP = Bucket(width_px=64, height_px=64, num_frames=9)
EMBEDDING_DIM = DIM

MODELS: Mapping[str, Mapping[str, Any]] = {
    "text": {
        "_class_name": "UNet3DConditionModel",
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"],
        "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"],
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": EMBEDDING_DIM,
        "attention_head_dim": 4,
    },
    "image": {
        "_class_name": "UNetSpatioTemporalConditionModel",
        "sample_size": 8,
        "in_channels": 8,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"],
        "up_block_types": ["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"],
        # diffusers' blocks of this class normalise 32 groups.
        "block_out_channels": [32, 32],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24,
        "layers_per_block": 1,
        "cross_attention_dim": EMBEDDING_DIM,
        "num_attention_heads": [2, 2],
        "num_frames": 3,
    },
    "transformer": {
        "_class_name": "LatteTransformer3DModel",
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 1,
        "sample_size": 8,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "cross_attention_dim": 8,
        "caption_channels": EMBEDDING_DIM,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "num_embeds_ada_norm": 1000,
        "video_length": 3,
    },
}


def output_with_embeddings(root: Path, num_clips: int = 6, bucket: Bucket = CLIP) -> ObjectStore:
    """An output of one shard with both column sets; captions of two lengths."""
    captions = [f"circle {n} moves to the left" if n % 2 else "a red square" for n in range(num_clips)]
    store = output(root, [[record(f"v{n}", bucket=bucket, caption=text) for n, text in enumerate(captions)]])
    add_text_set(store)
    add_image_set(store)
    return store


def model_config(folder: Path, kind: str, **changes: Any) -> Path:
    """A config.json of a tiny model."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({**MODELS[kind], **changes}), encoding="utf-8")
    return path
