"""The pixels that records were made of, decoded once more from their source where that is still as it was.

Not where anything is encoded, and not a cache: clips come out again by the rules that the output states, in decode
children as in a run. `report` shows them beside what the latents give back.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any

from pipeline.config import DecodeLimits, EncodingConfig
from pipeline.decode import DecodePool
from pipeline.errors import LatentmillError, StorageNotFoundError, UsageError
from pipeline.inputs import FoundVersions, read_slice
from pipeline.plan import planned_slices
from pipeline.records import Clip, ClipFailure, Commit, DatasetManifest, Redo, ShardSpec, SourceVideo
from pipeline.source import iterate_videos
from pipeline.storage import ObjectStore

Name = tuple[str, int]  # key and clip index


def encoding_of(manifest: DatasetManifest, model: str, subfolder: str | None = None) -> EncodingConfig:
    """The configuration that an output was encoded with, for another model if asked for.

    What it computed in is left to the device of now.

    Raises:
        UsageError: the output does not say it, or says what no job takes.
    """
    held = manifest.fingerprint_fields
    if "buckets" not in held or "fps" not in held:
        raise UsageError("the output does not say how its clips were cut")
    given: dict[str, Any] = {"model": model, "subfolder": subfolder}
    for option in fields(EncodingConfig):
        if option.name in held and option.name not in ("compute_dtype", "model", "subfolder"):
            given[option.name] = _parsed(option.metadata["parse"], held[option.name])
    return EncodingConfig(**given)


def _parsed(parse: Any, value: object) -> Any:
    if value is None:
        return None
    if isinstance(value, list):
        return parse(";".join(map(str, value)))
    return parse(str(value).lower() if isinstance(value, bool) else str(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundClips:
    """Clips of one record of a shard, and in one sentence why others are not among them."""

    clips: Mapping[Name, Clip]
    why_not: str | None


class Originals:
    """Decodes clips of committed records again, in one decode child; a context manager.

    Args:
        store: the output.
        encoding: how its clips were cut.
        slices: the planned slices of the output by shard id; other shards are tars.
        budget_s: seconds after which no further clip is waited for, over all calls.
    """

    def __init__(
        self, store: ObjectStore, encoding: EncodingConfig, slices: Mapping[str, ShardSpec], budget_s: float
    ) -> None:
        self._store = store
        self._encoding = encoding
        self._slices = slices
        self._until = time.monotonic() + budget_s
        self._pool: DecodePool | None = None

    def __enter__(self) -> Originals:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.close()

    def find(self, commit: Commit, wanted: Collection[Name]) -> FoundClips:
        """The wanted clips of a record, as far as its source still gives them; its faults are told, not raised."""
        found: dict[Name, Clip] = {}
        if time.monotonic() > self._until:
            return FoundClips(clips=found, why_not="the time for reading sources was over")
        left = set(wanted)
        try:
            if self._pool is None:
                self._pool = DecodePool(self._encoding, DecodeLimits(), 1)
            spec = self._spec(commit, tuple(sorted({key for key, _ in wanted})))
            changed = FoundVersions()
            videos = iterate_videos(spec, self._store, self._encoding, DecodeLimits(), changed)
            for clip in self._pool.decode(_until_last(videos, {key for key, _ in wanted})):
                name = clip.key, -1 if clip.clip_index is None else clip.clip_index
                if isinstance(clip, Clip) and name in left:
                    found[name] = clip
                left.discard(name)
                if isinstance(clip, ClipFailure) and clip.clip_index is None:
                    left = {other for other in left if other[0] != clip.key}
                if not left or time.monotonic() > self._until:
                    break
            others = self._changed_since(commit, spec, changed)
        except StorageNotFoundError as error:
            return FoundClips(clips={}, why_not=f"the source is gone: {error}")
        except LatentmillError as error:
            return FoundClips(clips={}, why_not=str(error))
        if others:
            found = {name: clip for name, clip in found.items() if name[0] not in others}
            return FoundClips(clips=found, why_not="the source changed since it was encoded")
        if len(found) < len(wanted):
            return FoundClips(clips=found, why_not="the source is gone, or does not give the clip any more")
        return FoundClips(clips=found, why_not=None)

    def _spec(self, commit: Commit, keys: tuple[str, ...]) -> ShardSpec:
        redo = Redo(shard_id=commit.shard_id, generation=commit.generation, replaces=None, keys=keys)
        planned = self._slices.get(commit.shard_id)
        is_slice = planned is not None
        return ShardSpec(
            shard_id=commit.shard_id,
            source_uri=commit.source_uri,
            kind="slice" if is_slice else "tar",
            plan_key=planned.plan_key if planned is not None else None,
            source_size_bytes=None if is_slice else commit.source_size_bytes,
            source_etag=None if is_slice else commit.source_etag,
            num_videos=None,
            redo=redo,
        )

    def _changed_since(self, commit: Commit, spec: ShardSpec, found: FoundVersions) -> set[str]:
        """Keys of a slice whose files are others than those that were encoded."""
        if spec.kind == "tar" or not (found.changes or commit.source_changes):
            return set()
        return {
            entry.key
            for entry in read_slice(self._store, spec).entries
            if entry.uri in found.changes.keys() | commit.source_changes.keys()
            and found.changes.get(entry.uri) != commit.source_changes.get(entry.uri)
        }


def _until_last(videos: Iterator[SourceVideo | ClipFailure], keys: set[str]) -> Iterator[SourceVideo | ClipFailure]:
    """Ends with the last of the wanted videos, so that the rest of a tar is not read."""
    left = set(keys)
    for video in videos:
        left.discard(video.key)
        yield video
        if not left:
            return


def slices_by_shard(store: ObjectStore) -> dict[str, ShardSpec]:
    """The planned slices of an output by the id of their shard.

    Raises:
        DamagedObjectError: a plan cannot be read.
    """
    return {spec.shard_id: spec for spec in planned_slices(store)}
