"""What a diffusion model is tuned on: latents of an output with their captions or first frames, as endless batches.

The door of the tuning jobs to `LatentDataset`. Not where conditions meet a model (`jobs/t2v_models.py`).

Tensor letters: B batch, C channels, t h w latents, L tokens, D their width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from jobs.t2v_models import Adapter, Conditions
from pipeline import LatentDataset
from pipeline.columns import ColumnSet
from pipeline.committed import FileCache
from pipeline.config import auto_or, number, option, whole
from pipeline.errors import UsageError
from pipeline.records import Bucket
from pipeline.storage import open_store

_DEVIATIONS = (0.2, 5.0)
_LOOKED_AT = 64


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise UsageError(f"--captions: {text!r} names no column")
    return names


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which latents, and which conditions with them."""

    latents: str = option("output of encode_laion.py to train on: folder or s3://bucket/prefix", str)
    snapshot: int | None = option(
        "number of the snapshot to train on; auto: the latest at the start", auto_or(whole("snapshot", 1)), None
    )
    validation: str | None = option("output of encode_laion.py to validate on; default: no validation", str, None)
    validation_clips: int = option("its first so many clips are used", whole("validation-clips", 1), 32)
    captions: tuple[str, ...] = option("columns of captions, of which one is drawn each time", _names, ("caption",))
    condition_dropout: float = option(
        "share of clips whose caption, or first frame, is left out, which guidance needs",
        number("condition-dropout", 0, 1),
        0.1,
    )
    batch_size: int = option("clips of a worker in one pass", whole("batch-size", 1), 1)
    data_workers: int = option("processes of a worker that read; 0: itself", whole("data-workers", 0), 0)
    cache_dir: str | None = option("where files of a remote store are kept; default: ~/.cache/latentmill", str, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningBatch:
    """Clips of one shape with their conditions.

    Attributes:
        latents: (B, C, t, h, w) float32, scaled for the diffusion model.
        captions: texts, for people.
        names: shard, key and clip index of each.
        cursor: where the data stands after this batch.
    """

    latents: Tensor
    conditions: Conditions
    captions: list[str]
    names: list[tuple[str, str, int]]
    cursor: Mapping[str, Any]


def open_latents(
    uri: str, config: DataConfig, adapter: Adapter, *, for_training: bool, **options: Any
) -> LatentDataset:
    """The dataset with the conditions that a model needs; `options` are LatentDataset's.

    Raises:
        UsageError: there is no such output, or its embeddings are not there; the message says what to run.
    """
    given: dict[str, Any] = {"batch_size": config.batch_size, "cache_dir": config.cache_dir, **options}
    if adapter.needs_text:
        given |= {"text": "text", "captions": config.captions if for_training else config.captions[:1]}
        given["caption_dropout"] = config.condition_dropout if for_training else 0.0
    if adapter.needs_image:
        given |= {"image": "image", "first_frame": True}
    return LatentDataset(uri, **given)


def condition_set(uri: str, config: DataConfig, adapter: Adapter) -> ColumnSet:
    """The embeddings beside an output that a model is told of.

    Raises:
        UsageError: there are none; the message says what to run.
    """
    cache = FileCache(Path(config.cache_dir) if config.cache_dir else Path.home() / ".cache" / "latentmill", 64 << 30)
    return ColumnSet.open(open_store(uri), "text" if adapter.needs_text else "image", cache)


def tuning_batch(raw: Mapping[str, Any], dataset: LatentDataset, adapter: Adapter) -> TuningBatch:
    """A batch as LatentDataset gives it, with its conditions sorted out."""
    facts = dataset.manifest.model
    text = text_mask = image = first = None
    if adapter.needs_text:
        text, text_mask = raw["caption_embedding"], raw["caption_mask"]
    if adapter.needs_image:
        image = raw["image_embedding"]
        image = image.unsqueeze(1) if image.dim() == 2 else image
        first = raw["first_latent"] / facts.scaling_factor + facts.shift_factor
    fps = torch.tensor([(value or 0.0) / facts.temporal_compression for value in raw["fps"]], dtype=torch.float32)
    return TuningBatch(
        latents=raw["latents"],
        conditions=Conditions(text=text, text_mask=text_mask, image=image, first_latent=first, fps=fps),
        captions=list(raw["caption"]),
        names=list(zip(raw["shard_id"], raw["key"], raw["clip_index"], strict=True)),
        cursor=raw["cursor"],
    )


class TuningBatches(Iterator[TuningBatch]):
    """Batches without an end: one epoch after the other, from where a cursor says.

    Args:
        snapshot: a tuning stays with the one that it began with, also when nights went by since.
        cursor: of the last batch before; None: the beginning.

    Raises:
        UsageError: as `open_latents`; there are fewer clips than one batch of all workers; or the cursor is of other
            data.
    """

    def __init__(
        self,
        config: DataConfig,
        adapter: Adapter,
        *,
        snapshot: int | None,
        seed: int,
        rank: int,
        world_size: int,
        cursor: Mapping[str, Any] | None,
    ) -> None:
        self.dataset = open_latents(
            config.latents,
            config,
            adapter,
            for_training=True,
            shuffle_seed=seed,
            rank=rank,
            world_size=world_size,
            # All workers take part in every step.
            remainder="drop",
            snapshot=snapshot,
        )
        if len(self.dataset) == 0:
            raise UsageError(
                f"--latents: {config.latents} has {self.dataset.num_records} clips, fewer of each bucket than a batch "
                f"of {config.batch_size * world_size} (--batch-size times --num-workers): lower them"
            )
        self._adapter = adapter
        self._num_workers = config.data_workers
        self._epoch = 0
        if cursor is not None:
            self.dataset.load_state_dict(cursor)
            self._epoch = int(cursor["epoch"])
        self._batches = self._pass()

    def __next__(self) -> TuningBatch:
        while True:
            raw = next(self._batches, None)
            if raw is not None:
                return tuning_batch(raw, self.dataset, self._adapter)
            self._epoch += 1
            self.dataset.set_epoch(self._epoch)
            self._batches = self._pass()

    def _pass(self) -> Iterator[dict[str, Any]]:
        if self._num_workers == 0:
            return iter(self.dataset)
        return iter(DataLoader(self.dataset, batch_size=None, num_workers=self._num_workers))


def first_batches(uri: str, config: DataConfig, adapter: Adapter, num_clips: int) -> list[TuningBatch]:
    """The first clips of an output in their own order, in batches of `batch_size`; the same for every worker."""
    dataset = open_latents(uri, config, adapter, for_training=False, shuffle_seed=None)
    batches: list[TuningBatch] = []
    num_taken = 0
    for raw in dataset:
        batches.append(tuning_batch(raw, dataset, adapter))
        num_taken += len(batches[-1].names)
        if num_taken >= num_clips:
            break
    return batches


def checked_buckets(dataset: LatentDataset) -> list[Bucket]:
    """The shapes of the clips, of latents that have the scale which diffusion models take: a deviation near 1.

    Raises:
        UsageError: the deviation is far from it, as when latents were scaled twice or not at all.
    """
    stats = dataset.stats(num_samples=_LOOKED_AT)
    deviation = math.sqrt(sum(value**2 for value in stats.deviation) / len(stats.deviation))
    low, high = _DEVIATIONS
    if not low <= deviation <= high:
        model = dataset.manifest.model
        raise UsageError(
            f"--latents: {stats.num_samples} of them have a deviation of {deviation:.3g} after scaling by "
            f"{model.scaling_factor:g}, and a diffusion model takes about 1 ({low} to {high}): the scaling factor of "
            f"the VAE that made them ({model.model}) is wrong, or they show nothing"
        )
    sides = [tuple(int(part) for part in bucket.split("x")) for bucket in stats.bucket_rows]
    return [Bucket(width_px=width, height_px=height, num_frames=frames) for width, height, frames in sides]
