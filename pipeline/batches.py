"""What a training batch holds, made from rows: latents as the diffusion model takes them, captions, conditions.

Not where rows are chosen (`epoch`) or read (`rows`). `dataset` is the caller. Everything that is drawn here (posterior,
caption, dropout) depends on the seed, the epoch and the sample alone: not on ranks, workers, batches or resuming.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.columns import ColumnSet
from pipeline.errors import DamagedObjectError
from pipeline.records import ModelFacts
from pipeline.stored import StoredRecord

# What a batch holds beside the columns that were asked for.
BATCH_NAMES = (
    *("latents", "caption", "key", "clip_index", "shard_id", "fps", "is_padding", "bucket", "cursor"),
    *("caption_embedding", "caption_mask", "image_embedding", "first_latent"),
)
# diffusers clamps the log-variance of a posterior to this before it draws from it.
_LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecipe:
    """What of a row goes into a batch, and how.

    Attributes:
        model: whose scale and shift the latents get, if `is_scaled`.
        seed: of all draws.
        columns: given out as lists, by name.
        captions: columns of which one that is not empty is drawn for each sample.
        caption_dropout: probability with which a caption is left empty.
        text, image: column sets whose embeddings are given out.
    """

    model: ModelFacts
    seed: int
    columns: tuple[str, ...]
    is_scaled: bool
    sample_posterior: bool
    captions: tuple[str, ...]
    caption_dropout: float
    first_frame: bool
    text: ColumnSet | None
    image: ColumnSet | None

    @property
    def column_sets(self) -> tuple[ColumnSet, ...]:
        """The sets that are asked for embeddings."""
        return tuple(columns for columns in (self.text, self.image) if columns is not None)

    @property
    def read_columns(self) -> tuple[str, ...]:
        """The columns that rows must have."""
        return tuple(dict.fromkeys([*self.captions, "fps", *self.columns]))

    def batch(self, records: Sequence[StoredRecord], shard_ids: Sequence[str], epoch: int) -> dict[str, Any]:
        """The values of a batch whose rows have one shape.

        Raises:
            DamagedObjectError: they have several.
            UsageError: a column set lacks one of them.
        """
        batch: dict[str, Any] = {name: [record.columns[name] for record in records] for name in self.columns}
        means = self._means(records, shard_ids)
        if self.first_frame:
            batch["first_latent"] = self._scaled(means[:, :, 0].clone())
        if self.sample_posterior:
            for latent, record, shard_id in zip(means, records, shard_ids, strict=True):
                latent += self._noise(record, shard_id, epoch)
        batch["latents"] = self._scaled(means)
        batch["caption"] = [
            self._caption(record, shard_id, epoch) for record, shard_id in zip(records, shard_ids, strict=True)
        ]
        batch["key"] = [record.key for record in records]
        batch["clip_index"] = [record.clip_index for record in records]
        batch["shard_id"] = list(shard_ids)
        batch["fps"] = [record.columns["fps"] for record in records]
        if self.text is not None:
            text = self.text
            found = [text.caption(shard, words) for shard, words in zip(shard_ids, batch["caption"], strict=True)]
            batch["caption_embedding"], batch["caption_mask"] = _padded(found)
        if self.image is not None:
            images = [self.image.image(s, r.key, r.clip_index) for s, r in zip(shard_ids, records, strict=True)]
            batch["image_embedding"] = torch.from_numpy(np.stack(images).astype(np.float32))
        return batch

    def _means(self, records: Sequence[StoredRecord], shard_ids: Sequence[str]) -> torch.Tensor:
        shapes = {record.latent.shape for record in records}
        if len(shapes) > 1:
            raise DamagedObjectError(f"latents of one bucket have the shapes {sorted(shapes)} in shards {shard_ids}")
        # Torch widens half floats several times as fast as numpy.
        return torch.from_numpy(np.stack([record.mean for record in records])).float()

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        if not self.is_scaled:
            return latents
        return latents.sub_(self.model.shift_factor).mul_(self.model.scaling_factor)

    def _noise(self, record: StoredRecord, shard_id: str, epoch: int) -> torch.Tensor:
        """A draw of the posterior less its mean."""
        assert record.logvar is not None, f"{record.key!r} of shard {shard_id} has no log-variance"
        seed = int.from_bytes(self._digest(record, shard_id, epoch)[:8], "big") >> 1
        logvar = torch.from_numpy(record.logvar.astype(np.float32)).clamp_(*_LOGVAR_RANGE)
        noise = torch.randn(logvar.shape, generator=torch.Generator().manual_seed(seed))
        return logvar.mul_(0.5).exp_().mul_(noise)

    def _caption(self, record: StoredRecord, shard_id: str, epoch: int) -> str:
        if len(self.captions) == 1 and not self.caption_dropout:
            return _text(record.columns, self.captions[0])
        digest = self._digest(record, shard_id, epoch)
        if int.from_bytes(digest[8:16], "big") < self.caption_dropout * 2**64:
            return ""
        texts = [text for name in self.captions if (text := _text(record.columns, name))]
        return texts[int.from_bytes(digest[16:24], "big") % len(texts)] if texts else ""

    def _digest(self, record: StoredRecord, shard_id: str, epoch: int) -> bytes:
        name = f"{self.seed}/{epoch}/{shard_id}/{record.clip_index}/{record.key}"
        return hashlib.sha256(name.encode()).digest()


def _text(columns: Mapping[str, Any], name: str) -> str:
    text: str | None = columns[name]
    return text or ""


def _padded(embeddings: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings `(L, D)` with zeros behind each, `(B, longest L, D)` float32, and where they are, `(B, longest L)`."""
    longest = max(len(embedding) for embedding in embeddings)
    padded = torch.zeros(len(embeddings), longest, embeddings[0].shape[-1])
    mask = torch.zeros(len(embeddings), longest, dtype=torch.bool)
    for row, embedding in enumerate(embeddings):
        padded[row, : len(embedding)] = torch.from_numpy(embedding.astype(np.float32))
        mask[row, : len(embedding)] = True
    return padded, mask
