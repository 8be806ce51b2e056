"""From what was seen of an input to all of it: counts with their errors, and the bytes of the files to come.

Not where anything is seen (`look`) or timed (`calibration`). Used by `estimate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.config import JobConfig
from pipeline.format import FORMAT_VERSION, ShardWriter
from pipeline.look import Look, ShardLook, weight_of
from pipeline.records import Bucket, Clip, ClipFailure, DatasetManifest, LatentRecord, ModelFacts, ShardSpec

# Shards and clips that are written to see what a record weighs beside its latents.
_MOST_WRITTEN_SHARDS = 8
_MOST_WRITTEN_CLIPS = 64


class Scale:
    """From what was seen to all that is to do, which is one shard or more."""

    def __init__(self, todo: Sequence[ShardSpec], look: Look) -> None:
        self.shards = look.shards
        self.num_videos_seen = sum(shard.num_videos for shard in look.shards)
        self._seen = sum(shard.weight for shard in look.shards)
        per_video = self._seen / self.num_videos_seen if self.num_videos_seen else 1.0
        self._all = sum(weight_of(spec, per_video) for spec in todo)
        self.num_shards = len(todo)
        self.is_whole = len(look.shards) == len(todo) and all(shard.is_whole for shard in look.shards)
        self.is_known = bool(self._seen)
        self.factor = 1.0 if self.is_whole or not self._seen else self._all / self._seen
        self.buckets = sorted({bucket for shard in look.shards for bucket in shard.buckets})
        self.clips = {bucket: self._clips_of(bucket) for bucket in self.buckets}
        self.num_videos = self.total(lambda shard: shard.num_videos)
        self.num_clips = self.total(lambda shard: shard.buckets.total())
        self.num_videos_per_shard = self.num_videos / self.num_shards

    def _clips_of(self, bucket: Bucket) -> float:
        return self.total(lambda shard: shard.buckets[bucket])

    def total(self, count: Callable[[ShardLook], float]) -> float:
        """Of all that is to do."""
        return self.factor * sum(count(shard) for shard in self.shards)

    def range_of(self, count: Callable[[ShardLook], float]) -> tuple[float, float] | None:
        """Two standard errors to both sides of `total`; None where a single shard was seen and is not all.

        Shards are drawn and videos are not, so that the spread is that between shards (the ratio estimate of Cochran,
        Sampling Techniques, 1977, chapter 6, with the correction for a finite population).
        """
        total = self.total(count)
        if self.is_whole:
            return total, total
        num_seen = len(self.shards)
        if num_seen < 2:
            return None
        ratio = sum(count(shard) for shard in self.shards) / self._seen
        squares = sum((count(shard) - ratio * shard.weight) ** 2 for shard in self.shards)
        share_left = max(0.0, 1 - self._seen / self._all)
        error = math.sqrt(share_left * squares / (num_seen * (num_seen - 1))) * num_seen / self._seen * self._all
        return max(0.0, total - 2 * error), total + 2 * error

    def shards_with(self, has: Callable[[ShardLook], int]) -> float:
        """Shards with at least one video of a kind, of which `has` says how many were seen in a shard."""
        if self.is_whole:
            return sum(has(shard) > 0 for shard in self.shards)
        share = min(1.0, sum(has(shard) for shard in self.shards) / max(1, self.num_videos_seen))
        none = math.pow(1 - share, self.num_videos_per_shard)
        return self.num_shards * (1 - none)


def texts_of(shard: ShardLook, columns: Sequence[str]) -> set[str]:
    """The distinct texts of the clips that were seen of a shard, "" not among them."""
    found = {clip.caption if name == "caption" else clip.fields.get(name) for clip in shard.clips for name in columns}
    return {text for text in found if isinstance(text, str) and text}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the data files of the output weigh, and how many there are."""

    num_bytes: float
    num_files: float


def sizes_of(config: JobConfig, model: ModelFacts, passthrough: Mapping[str, str], scale: Scale, folder: Path) -> Sizes:
    """Weighs real files of the clips and rejections that were seen. Latents are stored as they are, so zeros serve."""
    manifest = DatasetManifest(
        format_version=FORMAT_VERSION,
        fingerprint="0" * 64,
        fingerprint_fields={},
        model=model,
        kind=config.encoding.kind,
        latent_dtype=config.encoding.latent_dtype,
        passthrough=passthrough,
    )
    latent_bytes = {bucket: _zeros(bucket, manifest).nbytes for bucket in scale.buckets}
    clips = [shard.clips[:_MOST_WRITTEN_CLIPS] for shard in scale.shards if shard.clips][:_MOST_WRITTEN_SHARDS]
    failures = [shard.failures[:_MOST_WRITTEN_CLIPS] for shard in scale.shards if shard.failures]
    num_bytes = num_files = 0.0
    if clips:
        # One row alone shows what a file weighs that has next to none.
        samples = [clips[0][:1], *clips]
        written = [_written(folder, manifest, config.encoding.format, rows, []) for rows in samples]
        num_shards = scale.shards_with(lambda shard: shard.num_videos - shard.num_videos_rejected)
        for content in written[0]:
            beside = [
                (len(rows), sizes[content] - sum(latent_bytes[clip.bucket] for clip in rows))
                for rows, sizes in zip(samples, written, strict=True)
            ]
            num_bytes += sum(number * latent_bytes[bucket] for bucket, number in scale.clips.items())
            num_bytes += _weight(beside, num_shards, scale.num_clips)
            num_files += num_shards
    if failures:
        rejected = [failures[0][:1], *failures[:_MOST_WRITTEN_SHARDS]]
        weighed = [_written(folder, manifest, config.encoding.format, [], rows)["rejected"] for rows in rejected]
        num_shards = scale.shards_with(lambda shard: shard.num_videos_rejected)
        num_rows = scale.total(lambda shard: len(shard.failures))
        num_bytes += _weight(list(zip(map(len, rejected), weighed, strict=True)), num_shards, num_rows)
        num_files += num_shards
    return Sizes(num_bytes=num_bytes, num_files=num_files)


def _weight(samples: Sequence[tuple[int, int]], num_files: float, num_rows: float) -> float:
    """Bytes of files with so many rows in all; a file weighs something and each row of it.

    Args:
        samples: rows and bytes of some files, the first of them with one row.
    """
    of_one = samples[0][1]
    rest = samples[1:]
    further_rows = sum(rows for rows, _ in rest) - len(rest)
    per_row = max(0.0, (sum(size for _, size in rest) - len(rest) * of_one) / further_rows) if further_rows else 0.0
    return num_files * of_one + max(0.0, num_rows - num_files) * per_row


def _zeros(bucket: Bucket, manifest: DatasetManifest) -> npt.NDArray[np.floating]:
    model = manifest.model
    shape = (
        model.latent_channels,
        1 + (bucket.num_frames - 1) // model.temporal_compression,
        bucket.height_px // model.spatial_compression,
        bucket.width_px // model.spatial_compression,
    )
    shape = (shape[0] * (2 if manifest.kind == "moments" else 1), *shape[1:])
    # A single zero that looks like all of them.
    return np.broadcast_to(np.zeros((), dtype=manifest.latent_dtype), shape)


def _written(
    folder: Path, manifest: DatasetManifest, output_format: str, clips: Sequence[Clip], failures: Sequence[ClipFailure]
) -> dict[str, int]:
    """Bytes of the files of a shard, by content."""
    with ShardWriter(folder, "shard", manifest, output_format) as writer:
        for clip in clips:
            writer.write(LatentRecord.of_clip(clip, _zeros(clip.bucket, manifest), manifest.kind))
        for failure in failures:
            writer.reject(failure)
        files = writer.finish()
    sizes: dict[str, int] = {file.content: file.path.stat().st_size for file in files}
    for file in files:
        file.path.unlink()
    return sizes
