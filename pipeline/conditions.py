"""What a diffusion model is conditioned on, made beside the latents: the embeddings of one shard, from clip to commit.

Not where anything is embedded (`text`) nor what a set holds (`columns`): this is the road between them. `actors` takes
it in the same pass as the latents, `jobs/encode_text.py` later; so both write the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.columns import (
    ColumnsManifest,
    SetName,
    TextEmbedding,
    base_file,
    captions_of,
    columns_store,
    commit_columns,
    open_columns,
    speaks_of,
    write_image_file,
    write_text_file,
)
from pipeline.commit import DecidedShard, name_of, parse_record_name, publish_snapshot, read_shard
from pipeline.config import ImageEncoderConfig, TextEncoderConfig
from pipeline.format import WrittenFile
from pipeline.records import Clip, ClipFailure, FileStat
from pipeline.redo import mark_done, repair_orders
from pipeline.storage import ObjectStore, sha256_of_file
from pipeline.store import Steps
from pipeline.stored import open_records

if TYPE_CHECKING:  # the driver has no use for torch
    import torch

    from pipeline.text import ImageEncoder, TextEncoder


class ConditionEncoders:
    """The encoders of one process, and the shards that they are asked for; one caller at a time.

    Args:
        text, image: the encoders that are given in them are loaded.
        output: the store of the output that the sets belong to.
        compute_dtype: "float32", "bfloat16" or "float16".
        num_threads: of a CPU.

    Attributes:
        manifests: the description of each set that is made.

    Raises:
        UsageError: an encoder cannot be loaded.
    """

    def __init__(
        self,
        text: TextEncoderConfig,
        image: ImageEncoderConfig,
        output: ObjectStore,
        device: torch.device,
        compute_dtype: str,
        num_threads: int,
    ) -> None:
        from pipeline.text import ImageEncoder, TextEncoder

        about = device, compute_dtype, num_threads
        self.output = output
        self.text = TextEncoder(text, *about) if text.text_encoder is not None else None
        self.text_columns = text.text_columns
        self.image = ImageEncoder(image, *about) if image.image_encoder is not None else None
        encoders: Mapping[SetName, TextEncoder | ImageEncoder | None] = {"text": self.text, "image": self.image}
        self.manifests: Mapping[SetName, ColumnsManifest] = {
            name: encoder.manifest for name, encoder in encoders.items() if encoder is not None
        }

    def shard(self, shard_id: str) -> ShardConditions:
        """The embeddings of one shard, none yet."""
        return ShardConditions(self, shard_id)


class ShardConditions:
    """The embeddings of one shard in the making: watch the clips, write the files, commit them.

    Attributes:
        embed_s: seconds spent on them.
        num_truncated: texts that had more tokens than the encoder takes.
    """

    def __init__(self, encoders: ConditionEncoders, shard_id: str) -> None:
        self.embed_s = 0.0
        self.num_truncated = 0
        self._encoders = encoders
        self._shard_id = shard_id
        self._waiting: list[tuple[tuple[str, int], npt.NDArray[np.uint8]]] = []
        self._frames: dict[tuple[str, int], npt.NDArray[np.floating]] = {}
        self._written: dict[SetName, _WrittenSet] = {}

    def watched(self, clips: Iterable[Clip | ClipFailure]) -> Iterator[Clip | ClipFailure]:
        """Passes clips on and embeds the first frame of each, where an image encoder is configured.

        Raises:
            UsageError: an embedding is not finite.
        """
        image = self._encoders.image
        for clip in clips:
            if image is not None and isinstance(clip, Clip):
                self._waiting.append(((clip.key, clip.clip_index), clip.frames[0].copy()))
                if len(self._waiting) == image.batch_size:
                    self._embed_frames()
            yield clip

    def _embed_frames(self) -> None:
        if self._encoders.image is None or not self._waiting:
            return
        started = time.perf_counter()
        found = self._encoders.image.embed([frame for _, frame in self._waiting])
        self._frames.update(zip((clip for clip, _ in self._waiting), found, strict=True))
        self._waiting.clear()
        Steps.note()
        self.embed_s += time.perf_counter() - started

    def write(self, directory: Path, files: Sequence[WrittenFile]) -> None:
        """Writes the rows of what a shard's finished files hold; nothing where they hold no sample.

        Raises:
            UsageError: an embedding is not finite.
        """
        by_content = {file.content: file for file in files}
        file = by_content.get("parquet") or by_content.get("webdataset")
        if file is None:
            return
        self._embed_frames()
        if self._encoders.text is not None:
            self.write_texts(
                directory, captions_of(file.path, file.content, file.num_rows, self._encoders.text_columns)
            )
        if self._encoders.image is not None:
            clips = open_records(file.path, file.content).read_columns(("key", "clip_index"))
            path = directory / f"{self._shard_id}.image.parquet"
            rows = {(key, index): self._frames[key, index] for key, index in clips}
            self._written["image"] = _WrittenSet(path, write_image_file(path, self._encoders.manifests["image"], rows))

    def write_texts(self, directory: Path, captions: Mapping[str, Sequence[str]]) -> None:
        """Embeds texts and writes their rows.

        Args:
            captions: as `columns.captions_of` gives them.

        Raises:
            UsageError: an embedding is not finite.
        """
        assert self._encoders.text is not None, "no text encoder is configured"
        started = time.perf_counter()
        path = directory / f"{self._shard_id}.text.parquet"
        num_rows = write_text_file(path, self._encoders.manifests["text"], captions, self._embedded(captions))
        self._written["text"] = _WrittenSet(path, num_rows)
        self.embed_s += time.perf_counter() - started

    def _embedded(self, captions: Iterable[str]) -> Iterator[TextEmbedding]:
        assert self._encoders.text is not None, "no text encoder is configured"
        for embedding in self._encoders.text.embed(captions):
            Steps.note()
            self.num_truncated += embedding.is_truncated
            yield embedding

    def commit(self, files: Sequence[FileStat]) -> bool:
        """Makes what was written count, as being about the base file among these; call it before their own commit.

        What stands already stays as it is; with these very bytes its file is put back, in case it was damaged.

        Returns:
            whether every set now holds exactly what was written.

        Raises:
            StorageError: the store failed; trying again is safe.
        """
        base = base_file(files)
        is_ours = True
        for name, written in self._written.items():
            assert base is not None, f"shard {self._shard_id} has embeddings and no samples"
            store = columns_store(self._encoders.output, name)
            record, stood_before = commit_columns(
                store, self._encoders.manifests[name], self._shard_id, base, written.path, written.num_rows
            )
            if record.files[0].sha256 != sha256_of_file(written.path):
                is_ours = False
            elif stood_before:
                mark_done(store, name_of(record))
        return is_ours


@dataclass(frozen=True, slots=True)
class _WrittenSet:
    """A finished local file of a set."""

    path: Path
    num_rows: int


def fingerprint_fields(manifests: Mapping[SetName, ColumnsManifest]) -> dict[str, object]:
    """What the encoders of the same pass add to the fingerprint of the output: nothing where there are none."""
    if not manifests:
        return {}
    return {"column_sets": sorted(manifests)} | {
        f"{name}.{key}": value
        for name, manifest in manifests.items()
        for key, value in manifest.fingerprint_fields.items()
    }


def configured_fields(text: TextEncoderConfig, image: ImageEncoderConfig) -> dict[str, object]:
    """The part of `fingerprint_fields` that needs no model to be loaded.

    Raises:
        UsageError: there is no such encoder, or its weights are not those that are pinned.
    """
    from pipeline.text import weights_sha256

    found: dict[str, object] = {}
    if text.text_encoder is not None:
        found["text.weights_sha256"] = weights_sha256(text)
        found["text.embedding_dtype"] = text.text_dtype
        found["text.columns"] = list(text.text_columns)
        found["text.padding"] = text.text_padding
    if image.image_encoder is not None:
        found["image.weights_sha256"] = weights_sha256(image)
        found["image.embedding_dtype"] = image.image_dtype
    return found


def open_sets(output: ObjectStore, manifests: Mapping[SetName, ColumnsManifest]) -> None:
    """Creates the sets of an output, or finds them as they should be.

    Raises:
        ConfigMismatchError: one was made with another encoder.
    """
    for name, manifest in manifests.items():
        open_columns(columns_store(output, name), manifest)


def publish_sets(output: ObjectStore, names: Iterable[str]) -> None:
    """Publishes a snapshot of each set. Do it before the output's own, so that its shards are among them."""
    for name in names:
        publish_snapshot(columns_store(output, name))


def shards_in_repair(output: ObjectStore, names: Iterable[str]) -> set[str]:
    """Ids of the shards of which a record in one of these sets was ordered to be repaired."""
    return {parse_record_name(record)[0] for name in names for record in repair_orders(columns_store(output, name))}


def records_of_ordered_repairs(
    output: ObjectStore, shards: Mapping[str, DecidedShard], name: str
) -> dict[str, str | None]:
    """Records of a set whose repair is ordered -> the record of the output that they are about, None if it is no more.

    Args:
        shards: of the output, by id, at least those that `shards_in_repair` names.
    """
    store = columns_store(output, name)
    ordered = frozenset(repair_orders(store))
    own = (read_shard(store, shard_id) for shard_id in sorted({parse_record_name(record)[0] for record in ordered}))
    counting = (commit for shard in own if shard is not None for commit in shard.commits)
    found: dict[str, str | None] = {}
    for record in (commit for commit in counting if name_of(commit) in ordered):
        shard = shards.get(record.shard_id)
        about = [
            name_of(commit)
            for commit in (shard.commits if shard is not None else ())
            if (base := base_file(commit.files)) is not None and speaks_of(record, base)
        ]
        found[name_of(record)] = about[0] if about else None
    return found
