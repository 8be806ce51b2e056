"""What a training batch holds, made from rows: latents as the diffusion model takes them, captions, conditions.

Not where rows are chosen (`epoch`) or read (`rows`). `dataset` is the caller. Everything that is drawn here (posterior,
caption, dropout) depends on the seed, the epoch and the sample alone: not on ranks, workers, batches or resuming.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.columns import ColumnSet
from pipeline.errors import DamagedObjectError
from pipeline.handover import empty
from pipeline.records import ModelFacts
from pipeline.stored import StoredRows

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

    def batch(self, rows: Sequence[tuple[StoredRows, int]], shard_ids: Sequence[str], epoch: int) -> dict[str, Any]:
        """The values of a batch whose rows, each given by its group and its index there, have one shape.

        Raises:
            DamagedObjectError: they have several.
            UsageError: a column set lacks one of them.
        """
        batch: dict[str, Any] = {name: [group.columns[name][index] for group, index in rows] for name in self.columns}
        batch["key"] = keys = [group.keys[index] for group, index in rows]
        batch["clip_index"] = clip_indices = [group.clip_indices[index] for group, index in rows]
        batch["shard_id"] = list(shard_ids)
        batch["fps"] = [group.columns["fps"][index] for group, index in rows]
        samples = list(zip(shard_ids, clip_indices, keys, strict=True))
        latents = [group.latents[index] for group, index in rows]
        means = self._means(rows, latents, shard_ids)
        if self.first_frame:
            batch["first_latent"] = self._scaled(_given_out(means[:, :, 0]))
        if self.sample_posterior:
            for mean, latent, sample in zip(means, latents, samples, strict=True):
                mean += _noise(latent[len(latent) // 2 :], self._digest(sample, epoch))
        batch["latents"] = self._scaled(means)
        texts = [[group.columns[name][index] or "" for name in self.captions] for group, index in rows]
        if len(self.captions) == 1 and not self.caption_dropout:
            batch["caption"] = [text for (text,) in texts]
        else:
            batch["caption"] = [
                self._drawn(some, self._digest(sample, epoch)) for some, sample in zip(texts, samples, strict=True)
            ]
        if self.text is not None:
            text = self.text
            found = [text.caption(shard, words) for shard, words in zip(shard_ids, batch["caption"], strict=True)]
            batch["caption_embedding"], batch["caption_mask"] = _padded(found)
        if self.image is not None:
            images = [self.image.image(shard, key, clip_index) for shard, clip_index, key in samples]
            batch["image_embedding"] = _given_out(torch.from_numpy(np.stack(images)))
        return batch

    def _means(
        self, rows: Sequence[tuple[StoredRows, int]], latents: Sequence[Any], shard_ids: Sequence[str]
    ) -> torch.Tensor:
        shapes = {latent.shape for latent in latents}
        if len(shapes) > 1:
            raise DamagedObjectError(f"latents of one bucket have the shapes {sorted(shapes)} in shards {shard_ids}")
        means = [
            latent if group.kinds[index] == "mean" else latent[: len(latent) // 2]
            for latent, (group, index) in zip(latents, rows, strict=True)
        ]
        # Torch widens half floats several times as fast as numpy.
        return _given_out(torch.from_numpy(np.concatenate(means)).view(len(means), *means[0].shape))

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        # A shift of 0, as most image VAEs have it, would be a pass over the batch for nothing.
        if self.is_scaled and self.model.shift_factor:
            latents.sub_(self.model.shift_factor)
        return latents.mul_(self.model.scaling_factor) if self.is_scaled else latents

    def _drawn(self, texts: Sequence[str], digest: bytes) -> str:
        """One of the captions of a sample that are not empty, or none."""
        if int.from_bytes(digest[8:16], "big") < self.caption_dropout * 2**64:
            return ""
        texts = [text for text in texts if text]
        return texts[int.from_bytes(digest[16:24], "big") % len(texts)] if texts else ""

    def _digest(self, sample: tuple[str, int, str], epoch: int) -> bytes:
        shard_id, clip_index, key = sample
        return hashlib.sha256(f"{self.seed}/{epoch}/{shard_id}/{clip_index}/{key}".encode()).digest()


def _given_out(values: torch.Tensor) -> torch.Tensor:
    """A copy in float32, where the training process finds it."""
    return empty(values.shape, torch.float32).copy_(values)


def _noise(logvar: npt.NDArray[np.floating], digest: bytes) -> torch.Tensor:
    """A draw of a posterior less its mean."""
    seed = int.from_bytes(digest[:8], "big") >> 1
    clamped = torch.from_numpy(logvar.astype(np.float32)).clamp_(*_LOGVAR_RANGE)
    noise = torch.randn(clamped.shape, generator=torch.Generator().manual_seed(seed))
    return clamped.mul_(0.5).exp_().mul_(noise)


def _padded(embeddings: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings `(L, D)` with zeros behind each, `(B, longest L, D)` float32, and where they are, `(B, longest L)`."""
    longest = max(len(embedding) for embedding in embeddings)
    padded = empty((len(embeddings), longest, embeddings[0].shape[-1]), torch.float32).zero_()
    mask = empty((len(embeddings), longest), torch.bool).zero_()
    for row, embedding in enumerate(embeddings):
        padded[row, : len(embedding)] = torch.from_numpy(embedding.astype(np.float32))
        mask[row, : len(embedding)] = True
    return padded, mask
