"""Builders of outputs without an encoder: records with made-up latents, written and committed by the real parts.

Every latent value of a record is drawn from its key and clip index, so a test that meets a row again can say what it
must hold. The description of an output that a real encoder writes is made here too.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.commit import commit_shard, fingerprint_of, name_of, open_dataset, put_written_file, read_shard
from pipeline.committed import FileCache, with_shard_counts
from pipeline.format import ShardWriter
from pipeline.records import (
    Bucket,
    ClipFailure,
    Commit,
    DatasetManifest,
    LatentRecord,
    ModelFacts,
    ShardCounts,
    VideoFacts,
)
from pipeline.storage import ObjectStore, open_store

if TYPE_CHECKING:
    from pipeline.actors import WorkerFacts
    from pipeline.config import JobConfig

SMALL = Bucket(width_px=32, height_px=16, num_frames=5)
WIDE = Bucket(width_px=64, height_px=16, num_frames=9)
IMAGE = Bucket(width_px=32, height_px=32, num_frames=1)

MODEL = ModelFacts(
    model="made-up",
    revision=None,
    weights_sha256="ab" * 32,
    is_trained=False,
    scaling_factor=0.5,
    shift_factor=0.25,
    latent_channels=4,
    temporal_compression=4,
    spatial_compression=8,
)


def manifest(
    kind: str = "mean", dtype: str = "float16", passthrough: Mapping[str, str] | None = None
) -> DatasetManifest:
    """The description of an output with the made-up model: scaling factor 0.5, shift factor 0.25."""
    return DatasetManifest(
        format_version=1,
        fingerprint="cd" * 32,
        fingerprint_fields={},
        model=MODEL,
        kind=kind,  # type: ignore[arg-type]
        latent_dtype=dtype,  # type: ignore[arg-type]
        passthrough=passthrough or {},
    )


def manifest_of_worker(config: JobConfig, facts: WorkerFacts, **changes: object) -> DatasetManifest:
    """The description of an output that this worker may write, or one with changed fields of the fingerprint."""
    fields = {**config.encoding.fingerprint_fields("cpu"), "decoders": dict(facts.decoders), **changes}
    return DatasetManifest(
        format_version=1,
        fingerprint=fingerprint_of(fields),
        fingerprint_fields=fields,
        model=facts.model,
        kind=config.encoding.kind,
        latent_dtype=config.encoding.latent_dtype,
        passthrough={},
    )


def latent_of(key: str, clip_index: int, bucket: Bucket, part: str = "mean") -> npt.NDArray[np.float32]:
    """The latent (C, t, h, w) that a record of this name holds, in values that float16 keeps."""
    seed = int.from_bytes(hashlib.sha256(f"{part} {clip_index} {key}".encode()).digest()[:8], "big")
    shape = (4, 1 + (bucket.num_frames - 1) // 4, bucket.height_px // 8, bucket.width_px // 8)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16).astype(np.float32)


def record(
    key: str,
    clip_index: int = 0,
    bucket: Bucket = SMALL,
    *,
    kind: str = "mean",
    dtype: str = "float16",
    caption: str | None = None,
    fields: Mapping[str, object] | None = None,
) -> LatentRecord:
    """A record whose latent `latent_of` knows."""
    is_image = bucket.num_frames == 1
    facts = VideoFacts(
        width_px=640,
        height_px=360,
        num_frames=1 if is_image else 100,
        fps=None if is_image else 25.0,
        duration_s=None if is_image else 4.0,
        codec="mjpeg" if is_image else "h264",
        decoder="made-up-1",
    )
    return LatentRecord(
        key=key,
        clip_index=clip_index,
        mean=latent_of(key, clip_index, bucket).astype(dtype),
        logvar=latent_of(key, clip_index, bucket, "logvar").astype(dtype) if kind == "moments" else None,
        bucket=bucket,
        caption=f"caption of {key}" if caption is None else caption,
        fields=fields or {},
        fps=None if is_image else 8.0,
        start_s=0.0 if is_image else clip_index * 1.0,
        end_s=0.0 if is_image else clip_index + bucket.num_frames / 8,
        crop=(0, 20, 640, 320),
        facts=facts,
        source_uri=f"s3://videos/00000.tar#{key}.mp4",
    )


def rejection(key: str, clip_index: int | None = None) -> ClipFailure:
    return ClipFailure(
        key=key,
        clip_index=clip_index,
        step="decode",
        reason="timeout",
        message="decoding passed its deadline of 60 s twice",
        source_uri=f"s3://videos/00000.tar#{key}.mp4",
    )


def commit_records(
    store: ObjectStore,
    about: DatasetManifest,
    shard_id: str,
    records: Sequence[LatentRecord],
    rejections: Sequence[ClipFailure] = (),
    *,
    output_format: str = "parquet",
    replaces: str | None = None,
    keys: Sequence[str] | None = None,
) -> Commit:
    """Writes and commits a shard as an actor does; of a shard that is decided, its next generation."""
    shard = read_shard(store, shard_id)
    generation = 0 if shard is None else shard.next_generation
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(Path(folder), shard_id, about, output_format) as writer:
            for entry in records:
                writer.write(entry)
            for failure in rejections:
                writer.reject(failure)
            written = writer.finish()
        files = tuple(put_written_file(store, file, shard_id, generation) for file in written)
    keys_ok = {entry.key for entry in records}
    clips_rejected = [failure.key for failure in rejections if failure.clip_index is not None]
    num_ok = len(keys_ok)
    num_rejected = len(rejections) - len(clips_rejected) + len(set(clips_rejected) - keys_ok)
    commit = Commit(
        shard_id=shard_id,
        generation=generation,
        nonce=hashlib.sha256(f"{shard_id} {generation}".encode()).hexdigest()[:32],
        fingerprint=about.fingerprint,
        source_uri="s3://videos/00000.tar",
        source_size_bytes=None,
        source_etag=None,
        files=files,
        counts=ShardCounts(
            num_videos=num_ok + num_rejected,
            num_videos_ok=num_ok,
            num_videos_rejected=num_rejected,
            num_clips=len(records) + len(clips_rejected),
            num_records=len(records),
            num_clips_rejected=len(clips_rejected),
            num_frames=sum(entry.bucket.num_frames for entry in records),
            reasons=dict(Counter(failure.reason for failure in rejections)),
        ),
        format_version=1,
        code_version="0",
        created_at="2026-01-01T00:00:00+00:00",
        replaces=replaces,
        keys=None if keys is None else tuple(keys),
    )
    if shard is not None:
        before = [earlier for earlier in shard.commits if name_of(earlier) != replaces]
        with tempfile.TemporaryDirectory() as folder:
            commit = with_shard_counts(commit, before, store, FileCache(Path(folder), 1 << 30))
    assert commit_shard(store, commit) == "committed"
    return commit


def output(
    root: Path | str, shards: Iterable[Sequence[LatentRecord]], *, output_format: str = "parquet", **about: Any
) -> ObjectStore:
    """An output with one committed shard s000, s001, ... per sequence of records; no snapshot."""
    store = open_store(str(root))
    described = open_dataset(store, manifest(**about))
    for number, records in enumerate(shards):
        commit_records(store, described, f"s{number:03d}", records, output_format=output_format)
    return store


def names(batch: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    """(key, clip index) of each row of a batch."""
    return tuple(zip(batch["key"], batch["clip_index"], strict=True))


def order(batches: Iterable[dict[str, Any]]) -> list[tuple[tuple[str, int], ...]]:
    """The rows of batches, batch by batch."""
    return [names(batch) for batch in batches]
