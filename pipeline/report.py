"""What an output holds and how good it is, as one document: the figures of `latentmill report` and its pictures.

Not an audit (`audit` reads every file) and not the page (`report_page`). Called by `cli`. Accounts are exact and come
from commit records and plans; what needs rows comes from a seeded sample of files, and the document says of how many.
So memory and time grow with the number of shards, not with that of the samples: an output of any size is looked at by
reading at most sixteen data files and a few lists of rejections.
"""

from __future__ import annotations

import tempfile
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.codec import LatentDecoder
from pipeline.commit import DecidedShard, decided_shards, known_commits, latest_snapshot_number, manifest_of_output
from pipeline.committed import DataFile, FileCache, data_files, open_checked, rejections_in, shard_outcome
from pipeline.config import EncodingConfig
from pipeline.epoch import shuffled
from pipeline.errors import DamagedObjectError, StorageError, UsageError
from pipeline.originals import FoundClips, Originals, encoding_of, slices_by_shard
from pipeline.pictures import Frames, held_latent, latent_to_frames, side_by_side
from pipeline.quality import psnr_db
from pipeline.records import COUNTED, REASONS, Bucket, Commit, DatasetManifest, ShardSpec, sum_counts
from pipeline.storage import ObjectStore, open_store
from pipeline.store import shown_uri

REPORT_VERSION = 1
MAX_EXAMPLES = 200
_SAMPLED_FILES = 16
_SAMPLED_BYTES = 512 << 20
_ROWS_PER_FILE = 20_000
_REJECTIONS_PER_REASON = 3
_SHARDS_PER_REASON = 4
# Of all pictures together, before base64 adds a third.
_PICTURE_BYTES = 9 << 20
_LARGEST_PICTURE_BYTES = 500_000
_PANEL_PX = 216
_MAX_FRAMES = 33
_PAUSE_S = 3600.0
_MOST_BINS = 48
# Upper ends of the classes that durations are counted in, in seconds.
_DURATIONS_S = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800)
_LOW_PSNR_DB = 20.0
_REJECTED_SHARE = 0.2
_FAINT_CHANNEL = 0.05
_LARGEST_FLOAT16_USED = 60_000.0
_ROW_COLUMNS = (
    "key",
    "clip_index",
    "bucket",
    "caption",
    "source_fps",
    "source_num_frames",
    "source_width",
    "source_height",
)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A clip of the gallery.

    Attributes:
        panels: what its picture shows side by side: "original", "reconstruction", "latent".
        picture: WebP, animated where the clip is a video.
        still: WebP of its first frame, for readers who asked their system for less motion.
        psnr_db: of the reconstruction against the original, over all pixels; None without both.
        why_no_original: None where there is one.
    """

    shard_id: str
    key: str
    clip_index: int
    caption: str
    bucket: str
    source_uri: str
    start_s: float
    end_s: float
    fps: float | None
    width_px: int
    height_px: int
    panels: tuple[str, ...]
    psnr_db: float | None
    why_no_original: str | None
    picture: bytes = field(repr=False)
    still: bytes = field(repr=False)

    def facts(self) -> dict[str, Any]:
        """All but the pictures, JSON-safe."""
        facts = {name: value for name, value in asdict(self).items() if name not in ("picture", "still")}
        return facts | {"panels": list(self.panels)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A document of plain JSON values, and the examples that its `examples` describe, in the same order."""

    document: Mapping[str, Any]
    examples: tuple[Example, ...]


def report(
    uri: str,
    *,
    num_examples: int = 24,
    seed: int = 0,
    model: str | None = None,
    subfolder: str | None = None,
    with_originals: bool = True,
    originals_budget_s: float = 300.0,
    say: Say = lambda line: None,
) -> Report:
    """Looks an output over.

    Args:
        uri: a local folder or s3://bucket/prefix.
        num_examples: clips of the gallery, which are also those whose quality is measured; at most `MAX_EXAMPLES`.
        seed: of the sample.
        model: the VAE to decode with; None: the output's own where it is at hand; "none": latents only.
        with_originals: also decode the sources again, where they are still there.
        originals_budget_s: seconds for that.
        say: called with a line now and then.

    Raises:
        UsageError: there is no output at `uri`, or `model` is not the one that made it.
    """
    if not 0 <= num_examples <= MAX_EXAMPLES:
        raise UsageError(f"--examples {num_examples}: a page holds 0 to {MAX_EXAMPLES}")
    store = open_store(uri)
    manifest = manifest_of_output(store)
    notes: list[str] = []
    commits = known_commits(store)
    shards = decided_shards(commits)
    say(f"{len(commits):,} records of {len(shards):,} shards")
    slices = _slices(store, notes)
    with tempfile.TemporaryDirectory(prefix="latentmill-report-") as folder:
        cache = FileCache(Path(folder), 4 * _SAMPLED_BYTES)
        files = data_files(commits, store, cache)
        document: dict[str, Any] = {
            "report_version": REPORT_VERSION,
            "output": store.root_uri,
            "reported_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "snapshot": latest_snapshot_number(store),
            "asked": _asked(manifest),
            "accounts": _accounts(shards, slices),
            "sources": _sources(commits),
            "files": _files(shards),
            "buckets": _buckets(files, manifest),
            "time": _time(commits),
            "rejections": _rejections(store, shards, cache, seed, say),
        }
        sample = _Sample.read(store, manifest, files, cache, seed, num_examples, notes, say)
        document["sample"] = sample.facts
        by_key = {file.key: commit for shard in shards for commit in shard.commits for file in commit.files}
        decoder = _decoder(manifest, model, subfolder, notes)
        gallery = _Gallery(store, manifest, decoder, slices, num_examples)
        examples = gallery.examples(sample, by_key, originals_budget_s if with_originals else None, notes, say)
    document["quality"] = _quality(examples, decoder)
    document["examples"] = [example.facts() for example in examples]
    document["notes"] = list(dict.fromkeys(notes))
    document["warnings"] = _warnings(document)
    return Report(document=document, examples=tuple(examples))


def _slices(store: ObjectStore, notes: list[str]) -> dict[str, ShardSpec]:
    try:
        return slices_by_shard(store)
    except DamagedObjectError as error:
        notes.append(f"What was planned cannot be read: {error}")
        return {}


def _asked(manifest: DatasetManifest) -> dict[str, Any]:
    return {
        "model": asdict(manifest.model),
        "kind": manifest.kind,
        "latent_dtype": manifest.latent_dtype,
        "fingerprint": manifest.fingerprint,
        "passed_through": dict(manifest.passthrough),
        "configuration": dict(manifest.fingerprint_fields),
    }


def _accounts(shards: Sequence[DecidedShard], slices: Mapping[str, ShardSpec]) -> dict[str, Any]:
    counts = sum_counts(shard.counts for shard in shards)
    decided = {shard.shard_id for shard in shards}
    undecided = [spec for shard_id, spec in slices.items() if shard_id not in decided]
    return {
        "num_shards": len(shards),
        **{name: getattr(counts, name) for name in COUNTED},
        "num_shards_left": len(undecided),
        "num_videos_left": sum(spec.num_videos or 0 for spec in undecided),
    }


def _sources(commits: Iterable[Commit]) -> list[dict[str, Any]]:
    """The folders and tables that shards came from, those with the most first; addresses without their secrets."""
    found: Counter[str] = Counter()
    for commit in commits:
        uri, cut, _ = commit.source_uri.partition("#slice=")
        found[shown_uri(uri if cut else uri.rpartition("/")[0] + "/")] += 1
    return [{"uri": uri, "num_records": number} for uri, number in found.most_common(10)]


def _files(shards: Iterable[DecidedShard]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for shard in shards:
        for file in (file for commit in shard.commits for file in commit.files):
            entry = found.setdefault(file.content, {"num_files": 0, "num_bytes": 0})
            entry["num_files"] += 1
            entry["num_bytes"] += file.num_bytes
    return dict(sorted(found.items()))


def _buckets(files: Iterable[DataFile], manifest: DatasetManifest) -> dict[str, Any]:
    """Clips of every bucket, those included that were asked for and stayed empty, and what that is in pixels."""
    asked = manifest.fingerprint_fields.get("buckets")
    rows: Counter[str] = Counter({str(name): 0 for name in (asked if isinstance(asked, list) else [])})
    for file in files:
        rows.update(file.bucket_rows)
    fps = manifest.fingerprint_fields.get("fps")
    num_pixel_bytes, seconds = 0, 0.0
    for name, number in rows.items():
        bucket = _bucket(name)
        num_pixel_bytes += number * bucket.num_bytes
        if bucket.num_frames > 1 and isinstance(fps, (int, float)) and fps > 0:
            seconds += number * bucket.num_frames / fps
    return {
        "rows": dict(sorted(rows.items(), key=lambda item: (-item[1], item[0]))),
        "num_pixel_bytes": num_pixel_bytes,
        "video_s": seconds if isinstance(fps, (int, float)) else None,
    }


def _bucket(name: str) -> Bucket:
    width, height, frames = (int(side) for side in name.split("x"))
    return Bucket(width_px=width, height_px=height, num_frames=frames)


def _time(commits: Iterable[Commit]) -> dict[str, Any]:
    """When records were made, by the clocks of the machines that made them; pauses of an hour part sittings."""
    moments: list[tuple[float, int]] = []
    num_without = 0
    for commit in commits:
        try:
            stated = datetime.fromisoformat(commit.created_at)
            moments.append((stated.timestamp(), commit.counts.num_records))
        except (ValueError, OverflowError):
            num_without += 1
    moments.sort()
    sittings: list[list[tuple[float, int]]] = []
    for moment, number in moments:
        if not sittings or moment - sittings[-1][-1][0] > _PAUSE_S:
            sittings.append([])
        sittings[-1].append((moment, number))
    longest = max(sittings, key=len, default=[])
    return {
        "num_records_without_time": num_without,
        "num_sittings": len(sittings),
        "sittings": [_sitting(one) for one in sittings[-10:]],
        "throughput": _throughput(longest),
    }


def _sitting(moments: Sequence[tuple[float, int]]) -> dict[str, Any]:
    seconds = moments[-1][0] - moments[0][0]
    # When the first shard was begun is not known, so its clips are in no rate.
    after_first = sum(number for _, number in moments) - moments[0][1]
    return {
        "first": _moment(moments[0][0]),
        "last": _moment(moments[-1][0]),
        "seconds": seconds,
        "num_records": len(moments),
        "num_clips": sum(number for _, number in moments),
        "clips_per_s": after_first / seconds if seconds else None,
    }


def _throughput(moments: Sequence[tuple[float, int]]) -> dict[str, Any] | None:
    """Clips in equal spans of one sitting; None where it has too few records to show a course."""
    if len(moments) < 12 or moments[-1][0] - moments[0][0] < 8:
        return None
    begin, end = moments[0][0], moments[-1][0]
    num_bins = min(_MOST_BINS, len(moments) // 3)
    span_s = (end - begin) / num_bins
    clips = [0] * num_bins
    for moment, number in moments[1:]:
        clips[min(num_bins - 1, int((moment - begin) / span_s))] += number
    return {"first": _moment(begin), "last": _moment(end), "span_s": span_s, "num_clips": clips}


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _rejections(
    store: ObjectStore, shards: Sequence[DecidedShard], cache: FileCache, seed: int, say: Say
) -> list[dict[str, Any]]:
    totals: Counter[str] = Counter()
    for shard in shards:
        totals.update(shard.counts.reasons)
    order = [shards[number] for number in shuffled(len(shards), seed, 0, 1).tolist()] if totals else []
    wanted = dict.fromkeys(totals, _SHARDS_PER_REASON)
    chosen = []
    for shard in order:
        new = [reason for reason in shard.counts.reasons if wanted.get(reason, 0)]
        if new:
            chosen.append(shard)
            for reason in new:
                wanted[reason] -= 1
        if not any(wanted.values()):
            break
    found: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    for shard in chosen:
        of_shard: dict[str, list[dict[str, Any]]] = defaultdict(list)
        try:
            is_one = len(shard.commits) == 1
            failures = (
                rejections_in(shard.commits[0], store) if is_one else shard_outcome(shard, store, cache).rejections
            )
        except StorageError as error:
            say(f"rejections of shard {shard.shard_id} cannot be read: {error}")
            continue
        for failure in failures:
            if len(of_shard[failure.reason]) < _REJECTIONS_PER_REASON:
                of_shard[failure.reason].append(
                    {
                        "key": failure.key,
                        "clip_index": failure.clip_index,
                        "step": failure.step,
                        "message": failure.message,
                        "source_uri": shown_uri(failure.source_uri),
                    }
                )
        for reason, ones in of_shard.items():
            found[reason].append(ones)
    # One of each shard before a second of any.
    examples = {
        reason: [one for turn in zip_longest(*lists) for one in turn if one is not None]
        for reason, lists in found.items()
    }
    return [
        {
            "reason": reason,
            "meaning": REASONS.get(reason, ""),
            "number": number,
            "examples": examples.get(reason, [])[:_REJECTIONS_PER_REASON],
        }
        for reason, number in totals.most_common()
        if number
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A row that the gallery shows, with its latent's mean `(C, t, h, w)`, unscaled."""

    file_key: str
    shard_id: str
    columns: Mapping[str, Any]
    mean: npt.NDArray[np.floating]

    @property
    def name(self) -> tuple[str, int]:
        return self.columns["key"], self.columns["clip_index"]


class _Channels:
    """Sums over all positions of latents, channel by channel; values that are not finite are counted and left out."""

    def __init__(self, num_channels: int) -> None:
        self.num_values = np.zeros(num_channels, np.int64)
        self.num_nonfinite = 0
        self._sums = np.zeros(num_channels)
        self._squares = np.zeros(num_channels)
        self._low = np.full(num_channels, np.inf)
        self._high = np.full(num_channels, -np.inf)

    def add(self, mean: npt.NDArray[np.floating]) -> None:
        values = mean.reshape(len(mean), -1).astype(np.float64)
        finite = np.isfinite(values)
        num_finite = finite.sum(axis=1)
        if int(num_finite.sum()) < values.size:
            self.num_nonfinite += values.size - int(num_finite.sum())
            self._low = np.minimum(self._low, np.where(finite, values, np.inf).min(axis=1))
            self._high = np.maximum(self._high, np.where(finite, values, -np.inf).max(axis=1))
            values = np.where(finite, values, 0.0)
        else:
            self._low = np.minimum(self._low, values.min(axis=1))
            self._high = np.maximum(self._high, values.max(axis=1))
        self.num_values += num_finite
        self._sums += values.sum(axis=1)
        self._squares += np.einsum("cn,cn->c", values, values)

    def facts(self) -> list[dict[str, float]]:
        """Mean, deviation, lowest and highest value of each channel that has any."""
        number = np.maximum(self.num_values, 1)
        mean = self._sums / number
        deviation = np.sqrt(np.maximum(self._squares / number - mean * mean, 0))
        rows = zip(mean, deviation, self._low, self._high, self.num_values, strict=True)
        return [
            {"mean": float(m), "deviation": float(d), "low": float(low), "high": float(high)}
            for m, d, low, high, n in rows
            if n
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """What was read of the sampled files, and the rows of the gallery."""

    facts: Mapping[str, Any]
    rows: tuple[_Row, ...]

    @staticmethod
    def read(
        store: ObjectStore,
        manifest: DatasetManifest,
        files: Sequence[DataFile],
        cache: FileCache,
        seed: int,
        num_examples: int,
        notes: list[str],
        say: Say,
    ) -> _Sample:
        channels = _Channels(manifest.model.latent_channels)
        durations: Counter[int] = Counter()
        shapes: Counter[str] = Counter()
        num_rows = num_videos = num_without_caption = num_read = 0
        chosen = _chosen_files(files, seed)
        candidates: list[tuple[int, int, str, str]] = []
        opened = {}
        for place, file in enumerate(chosen):
            try:
                records = open_checked(file.stat, store, cache)
                rows = records.read_columns(_ROW_COLUMNS)
            except StorageError as error:
                notes.append(f"A sampled file cannot be read; latentmill verify says what else is wrong: {error}")
                continue
            num_read += 1
            opened[place] = records
            seen: set[str] = set()
            counts = file.mask()
            for number, row in enumerate(rows[:_ROWS_PER_FILE]):
                if not counts[number]:
                    continue
                key, _, bucket, caption, fps, num_frames, width, height = row
                num_rows += 1
                num_without_caption += not caption.strip()
                candidates.append((place, number, bucket, key))
                if key not in seen:
                    seen.add(key)
                    num_videos += 1
                    shapes[f"{width}x{height}"] += 1
                    if fps:
                        durations[bisect_right(_DURATIONS_S, num_frames / fps)] += 1
        picked = _picked(candidates, seed, num_examples)
        say(f"{num_rows:,} clips of {num_read} files are read")
        found: dict[tuple[int, int], _Row] = {}
        for place, records in opened.items():
            file, number = chosen[place], -1
            counts = file.mask()
            for group in range(len(records.group_rows)):
                for record in records.read_group(group):
                    number += 1
                    if not counts[number]:
                        continue
                    channels.add(record.mean)
                    if (place, number) in picked:
                        columns = dict(record.columns) | {"key": record.key, "clip_index": record.clip_index}
                        found[place, number] = _Row(
                            file_key=file.stat.key, shard_id=file.shard_id, columns=columns, mean=record.mean.copy()
                        )
        facts = {
            "seed": seed,
            "num_files": num_read,
            "num_files_of": len(files),
            "num_clips": num_rows,
            "num_videos": num_videos,
            "num_values": int(channels.num_values.sum()) + channels.num_nonfinite,
            "num_nonfinite": channels.num_nonfinite,
            "num_without_caption": num_without_caption,
            "channels": channels.facts(),
            "durations_s": {
                "ends": list(_DURATIONS_S),
                "num_videos": [durations[place] for place in range(len(_DURATIONS_S) + 1)],
            },
            "source_shapes": dict(shapes.most_common(8)),
        }
        return _Sample(facts=facts, rows=tuple(found[where] for where in picked if where in found))


def _chosen_files(files: Sequence[DataFile], seed: int) -> list[DataFile]:
    chosen: list[DataFile] = []
    num_bytes = 0
    for number in shuffled(len(files), seed, 0, 0).tolist():
        file = files[number]
        if chosen and (len(chosen) == _SAMPLED_FILES or num_bytes + file.stat.num_bytes > _SAMPLED_BYTES):
            break
        chosen.append(file)
        num_bytes += file.stat.num_bytes
    return chosen


def _picked(
    candidates: Sequence[tuple[int, int, str, str]], seed: int, num_examples: int
) -> dict[tuple[int, int], None]:
    """(file, row) of the gallery: every bucket in turn, each video once before any comes again, else by lot."""
    waiting: dict[str, list[tuple[int, tuple[int, int]]]] = defaultdict(list)
    times: Counter[tuple[int, str]] = Counter()
    for number in shuffled(len(candidates), seed, 0, 2).tolist():
        place, row, bucket, key = candidates[number]
        times[place, key] += 1
        waiting[bucket].append((times[place, key], (place, row)))
    lines = [[where for _, where in sorted(waiting[bucket], key=lambda one: one[0])] for bucket in sorted(waiting)]
    longest = max(map(len, lines), default=0)
    in_turn = [line[turn] for turn in range(longest) for line in lines if turn < len(line)]
    return dict.fromkeys(in_turn[:num_examples])


def _decoder(
    manifest: DatasetManifest, model: str | None, subfolder: str | None, notes: list[str]
) -> LatentDecoder | None:
    """The VAE to decode with, if it is at hand; a model that was asked for by name must be the right one."""
    import torch

    if model == "none":
        notes.append("Nothing was decoded, as asked: clips show their latents.")
        return None
    facts = manifest.model
    try:
        try:
            encoding = encoding_of(manifest, model or facts.model, subfolder)
        except UsageError:
            encoding = EncodingConfig(model=model or facts.model, subfolder=subfolder)
        decoder = LatentDecoder(encoding, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except UsageError as error:
        if model is not None:
            raise
        notes.append(f"The model is not at hand, so that clips show their latents; --model FOLDER names it. {error}")
        return None
    if decoder.facts.weights_sha256 == facts.weights_sha256:
        return decoder
    message = (
        f"{decoder.facts.model} has the weights {decoder.facts.weights_sha256[:16]}, the latents come from "
        f"{facts.weights_sha256[:16]}"
    )
    if model is not None:
        raise UsageError(f"--model {message}: give the folder of that model, or --model none")
    notes.append(f"Clips show their latents: the model {message}; --model FOLDER names the right one.")
    return None


class _Gallery:
    """Makes the examples: originals decoded again, latents decoded, and one picture of both."""

    def __init__(
        self,
        store: ObjectStore,
        manifest: DatasetManifest,
        decoder: LatentDecoder | None,
        slices: Mapping[str, ShardSpec],
        num_examples: int,
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._decoder = decoder
        self._slices = slices
        self._picture_bytes = min(_LARGEST_PICTURE_BYTES, _PICTURE_BYTES // max(1, num_examples))

    def examples(
        self,
        sample: _Sample,
        commits: Mapping[str, Commit],
        budget_s: float | None,
        notes: list[str],
        say: Say,
    ) -> list[Example]:
        """In the order of the sample. `budget_s`: for reading sources; None: none is read."""
        by_file: dict[str, list[_Row]] = defaultdict(list)
        for row in sample.rows:
            by_file[row.file_key].append(row)
        made: dict[int, Example] = {}
        unread = "sources were not read, as asked" if budget_s is None else "sources were not read"
        with self._originals(budget_s, notes) as originals:
            for file_key, rows in by_file.items():
                commit = commits[file_key]
                found = (
                    FoundClips(clips={}, why_not=unread)
                    if originals is None
                    else originals.find(commit, {row.name for row in rows})
                )
                for row in rows:
                    made[id(row)] = self._example(row, found)
                    say(f"example {len(made)} of {len(sample.rows)}")
        return [made[id(row)] for row in sample.rows]

    def _originals(self, budget_s: float | None, notes: list[str]) -> AbstractContextManager[Originals | None]:
        if budget_s is None:
            return nullcontext()
        try:
            encoding = encoding_of(self._manifest, self._manifest.model.model)
        except UsageError as error:
            notes.append(f"Clips are shown without their originals: {error}.")
            return nullcontext()
        return Originals(self._store, encoding, self._slices, budget_s)

    def _example(self, row: _Row, found: FoundClips) -> Example:
        columns, bucket = row.columns, _bucket(row.columns["bucket"])
        clip = found.clips.get(row.name)
        is_same = clip is not None and clip.bucket == bucket and abs(clip.start_s - columns["clip_start_s"]) < 1e-6
        original = clip.frames if clip is not None and is_same else None
        decoded = self._decoded(row.mean, bucket)
        panels: dict[str, Frames] = {}
        if original is not None:
            panels["original"] = original
        if decoded is not None:
            panels["reconstruction"] = decoded
        if len(panels) < 2:
            latent = latent_to_frames(np.nan_to_num(row.mean, posinf=0, neginf=0))
            panels["latent"] = held_latent(latent, bucket.num_frames)
        why_not = None if original is not None else found.why_not
        if clip is not None and not is_same:
            why_not = "the source gives another clip now"
        picture, still = side_by_side(
            list(panels.values()),
            columns["fps"] or 8.0,
            panel_px=_PANEL_PX,
            max_frames=_MAX_FRAMES,
            max_bytes=self._picture_bytes,
        )
        return Example(
            shard_id=row.shard_id,
            key=columns["key"],
            clip_index=columns["clip_index"],
            caption=columns["caption"],
            bucket=columns["bucket"],
            source_uri=shown_uri(columns["source_uri"]),
            start_s=columns["clip_start_s"],
            end_s=columns["clip_end_s"],
            fps=columns["fps"],
            width_px=picture.width_px,
            height_px=picture.height_px,
            panels=tuple(panels),
            psnr_db=None if original is None or decoded is None else psnr_db(original, decoded),
            why_no_original=why_not,
            picture=picture.data,
            still=still.data,
        )

    def _decoded(self, mean: npt.NDArray[np.floating], bucket: Bucket) -> Frames | None:
        if self._decoder is None or not np.isfinite(mean).all():
            return None
        frames = self._decoder.decode(mean)
        shape = (bucket.num_frames, bucket.height_px, bucket.width_px, 3)
        assert frames.shape == shape, f"decoded frames are {frames.shape}, and their bucket says {shape}"
        return frames


def _quality(examples: Sequence[Example], decoder: LatentDecoder | None) -> dict[str, Any]:
    measured = sorted(example.psnr_db for example in examples if example.psnr_db is not None)
    return {
        "is_decoded": decoder is not None,
        "num_compared": len(measured),
        "psnr_db": None
        if not measured
        else {
            "mean": float(np.mean(measured)),
            "lowest": measured[0],
            "median": float(np.median(measured)),
            "highest": measured[-1],
        },
        "why_no_original": dict(
            Counter(example.why_no_original for example in examples if example.why_no_original).most_common()
        ),
    }


def _is_longer(bucket: str, image_bucket: str) -> bool:
    return bucket != image_bucket and bucket.rpartition("x")[0] == image_bucket.rpartition("x")[0]


def _warnings(document: Mapping[str, Any]) -> list[str]:
    """What a person should look at first; empty where nothing stands out."""
    accounts, sample, found = document["accounts"], document["sample"], []
    model = document["asked"]["model"]
    if not model["is_trained"]:
        found.append("The model is untrained: its latents and what they decode to carry no meaning.")
    if accounts["num_shards_left"]:
        found.append(
            f"Work is left: {accounts['num_shards_left']:,} planned shards with {accounts['num_videos_left']:,} videos "
            "are undecided. The same encode command goes on with them."
        )
    if accounts["num_videos"] and accounts["num_videos_rejected"] > _REJECTED_SHARE * accounts["num_videos"]:
        share = accounts["num_videos_rejected"] / accounts["num_videos"]
        found.append(f"{share:.0%} of the videos were rejected; see the reasons.")
    rows = document["buckets"]["rows"]
    # A bucket for images comes along with every bucket for videos, whether or not it was meant.
    meant = [name for name in rows if not name.endswith("x1") or not any(_is_longer(other, name) for other in rows)]
    empty = [name for name in meant if not rows[name]]
    if empty and accounts["num_records"]:
        found.append(f"Nothing fell into the bucket{'s' if len(empty) > 1 else ''} {', '.join(empty)}.")
    if sample["num_nonfinite"]:
        found.append(f"{sample['num_nonfinite']:,} latent values of the sample are NaN or infinite.")
    deviations = [channel["deviation"] for channel in sample["channels"]]
    middle = float(np.median(deviations)) if deviations else 0.0
    faint = [str(number) for number, value in enumerate(deviations) if value < _FAINT_CHANNEL * middle]
    if faint:
        found.append(f"Channel {', '.join(faint)} hardly varies: less than a twentieth of the median deviation.")
    largest = max((max(abs(c["low"]), abs(c["high"])) for c in sample["channels"]), default=0.0)
    if document["asked"]["latent_dtype"] == "float16" and largest > _LARGEST_FLOAT16_USED:
        found.append(
            f"Latents reach {largest:,.0f}, near the end of float16 (65,504); encode with --store-dtype float32."
        )
    if sample["num_clips"] and sample["num_without_caption"] == sample["num_clips"]:
        found.append("No clip of the sample has a caption.")
    elif sample["num_without_caption"] > sample["num_clips"] / 10:
        found.append(f"{sample['num_without_caption'] / sample['num_clips']:.0%} of the sampled clips have no caption.")
    psnr = document["quality"]["psnr_db"]
    if psnr is not None and model["is_trained"] and psnr["median"] < _LOW_PSNR_DB:
        found.append(f"Reconstructions are poor: a median PSNR of {psnr['median']:.1f} dB.")
    return found
