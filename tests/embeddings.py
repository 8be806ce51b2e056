"""Builders of column sets without an encoder: made-up embeddings, written and committed by the real parts.

Every value is drawn from its caption or clip, so a test that meets a row again can say what it must hold.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.columns import (
    ColumnsManifest,
    TextEmbedding,
    base_file,
    columns_store,
    commit_columns,
    new_manifest,
    open_columns,
    stored_captions_of,
    write_image_file,
    write_text_file,
)
from pipeline.commit import load_commits, read_data_file
from pipeline.storage import ObjectStore
from pipeline.stored import open_records

DIM = 6
MAX_LENGTH = 20


def columns_manifest(
    name: Literal["text", "image"], dtype: Literal["float16", "float32"] = "float16", weights: str = "12" * 32
) -> ColumnsManifest:
    return new_manifest(
        name,
        {"columns": ["caption"]} if name == "text" else {},
        encoder=f"made-up-{name}-encoder",
        revision=None,
        weights_sha256=weights,
        embedding_dim=DIM,
        embedding_dtype=dtype,
        max_length=MAX_LENGTH if name == "text" else 1,
    )


def _drawn(name: str, shape: tuple[int, ...], dtype: str) -> npt.NDArray[np.floating]:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16).astype(dtype)


def caption_embedding(caption: str, dtype: str = "float16") -> npt.NDArray[np.floating]:
    """(L, DIM) with L = 2 + the number of words, MAX_LENGTH at most."""
    return _drawn(caption, (min(MAX_LENGTH, 2 + len(caption.split())), DIM), dtype)


def image_embedding(key: str, clip_index: int, dtype: str = "float16") -> npt.NDArray[np.floating]:
    """(DIM,)."""
    return _drawn(f"{clip_index} {key}", (DIM,), dtype)


def add_text_set(output: ObjectStore, **about: str) -> ObjectStore:
    """Covers every record of an output with caption embeddings; returns the store of the set."""
    manifest = columns_manifest("text", **about)  # type: ignore[arg-type]
    store = columns_store(output, "text")
    open_columns(store, manifest)
    for commit in load_commits(output):
        base = base_file(commit.files)
        if base is None:
            continue
        captions = stored_captions_of(output, base, ("caption",))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "text.parquet"
            embeddings = (
                TextEmbedding(
                    embedding=caption_embedding(caption, manifest.embedding_dtype),
                    is_truncated=len(caption.split()) > MAX_LENGTH - 2,
                )
                for caption in captions
            )
            num_rows = write_text_file(path, manifest, captions, embeddings)
            commit_columns(store, manifest, commit.shard_id, base, path, num_rows)
    return store


def add_image_set(output: ObjectStore, **about: str) -> ObjectStore:
    """Covers every record of an output with first-frame embeddings; returns the store of the set."""
    manifest = columns_manifest("image", **about)  # type: ignore[arg-type]
    store = columns_store(output, "image")
    open_columns(store, manifest)
    for commit in load_commits(output):
        base = base_file(commit.files)
        if base is None:
            continue
        clips = open_records(read_data_file(output, base), base.content).read_columns(("key", "clip_index"))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "image.parquet"
            embeddings = {clip: image_embedding(*clip, manifest.embedding_dtype) for clip in clips}
            num_rows = write_image_file(path, manifest, embeddings)
            commit_columns(store, manifest, commit.shard_id, base, path, num_rows)
    return store
