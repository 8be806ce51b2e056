"""Builders for the tests of tuning: outputs with embeddings, and tiny diffusion models of diffusers' classes.

Not fixtures (those are in conftest.py). The latents and embeddings are made up; the files and commits are real.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from latents import commit_records, manifest, record

from pipeline.columns import (
    ColumnsManifest,
    TextEmbedding,
    base_file,
    captions_of,
    columns_store,
    commit_columns,
    new_manifest,
    open_columns,
    write_image_file,
    write_text_file,
)
from pipeline.commit import open_dataset
from pipeline.records import Bucket, Commit
from pipeline.storage import ObjectStore, open_store

Embedding = np.ndarray[Any, np.dtype[np.float16]]
CLIP = Bucket(width_px=64, height_px=64, num_frames=9)
EMBEDDING_DIM = 12

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


def text_embedding(caption: str, dim: int = EMBEDDING_DIM) -> Embedding:
    """(words + 2, dim), the same for the same caption."""
    seed = sum(ord(letter) * (place + 1) for place, letter in enumerate(caption))
    return np.random.default_rng(seed).standard_normal((len(caption.split()) + 2, dim)).astype(np.float16)


def image_embedding(key: str, clip_index: int, dim: int = EMBEDDING_DIM) -> Embedding:
    seed = sum(ord(letter) * (place + 1) for place, letter in enumerate(key)) + clip_index
    return np.random.default_rng(seed).standard_normal(dim).astype(np.float16)


def output_with_embeddings(
    root: Path, num_clips: int = 6, bucket: Bucket = CLIP, dim: int = EMBEDDING_DIM
) -> ObjectStore:
    """An output of one shard with both column sets; captions of two lengths."""
    store = open_store(str(root))
    about = open_dataset(store, manifest())
    records = [
        record(
            f"v{number}", bucket=bucket, caption="a red square" if number % 2 else f"circle {number} moves to the left"
        )
        for number in range(num_clips)
    ]
    commit = commit_records(store, about, "s000", records)
    write_texts(store, commit, dim, lambda caption: text_embedding(caption, dim))
    write_images(store, commit, [(entry.key, entry.clip_index) for entry in records], dim)
    return store


def write_texts(store: ObjectStore, commit: Commit, dim: int, embed: Callable[[str], Embedding]) -> None:
    """Caption embeddings of a committed shard."""
    base = base_file(commit)
    assert base is not None
    texts = open_columns(columns_store(store, "text"), set_manifest("text", dim))
    captions = captions_of(store, base, ("caption",))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.parquet"
        embeddings = [TextEmbedding(embedding=embed(caption), is_truncated=False) for caption in captions]
        num_rows = write_text_file(path, texts, captions, embeddings)
        commit_columns(columns_store(store, "text"), texts, commit.shard_id, base, path, num_rows)


def write_images(store: ObjectStore, commit: Commit, clips: Sequence[tuple[str, int]], dim: int) -> None:
    """First-frame embeddings of a committed shard."""
    base = base_file(commit)
    assert base is not None
    images = open_columns(columns_store(store, "image"), set_manifest("image", dim))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.parquet"
        num_rows = write_image_file(path, images, {name: image_embedding(*name, dim) for name in clips})
        commit_columns(columns_store(store, "image"), images, commit.shard_id, base, path, num_rows)


def set_manifest(name: Any, dim: int) -> ColumnsManifest:
    return new_manifest(
        name,
        {},
        encoder="made-up",
        revision=None,
        weights_sha256="ef" * 32,
        embedding_dim=dim,
        embedding_dtype="float16",
        max_length=16,
    )


def model_config(folder: Path, kind: str, **changes: Any) -> Path:
    """A config.json of a tiny model."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({**MODELS[kind], **changes}), encoding="utf-8")
    return path
