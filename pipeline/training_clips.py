"""Training batches from videos and images: random crops of clips that are decoded once and drawn from many times.

Not an encoder and not a trainer: what comes out is pixels. The inputs are those of the encode job, planned by `plan`,
opened by `source` and decoded by the children of `decode`; here they become an endless sequence of batches. Called by
`jobs/train_vae.py`.

How it flows. The videos of an input, in an order drawn anew for each epoch, give *source clips*: runs of frames, longer
and larger than what is trained on. As many as fit into the cache are one *load*; batches are drawn from the load at
random until each of its clips has served `crops_per_clip` times on the average, while the next load is decoded. An
input that fits into one load is decoded once and stays.

What batch n holds is a function of the inputs, the configuration, the seed, the rank, the number of ranks and n; never
of time. A cursor is a few numbers: going on from one decodes the load that it stands in again, and nothing before it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import (
    DecodeLimits,
    EncodingConfig,
    SourceConfig,
    auto_or,
    number,
    option,
    parse_fps,
    whole,
    yes_no,
)
from pipeline.decode import DecodePool
from pipeline.errors import LatentmillError, UsageError
from pipeline.plan import plan_shards
from pipeline.records import Bucket, Clip, ClipFailure, MediaKind, ShardSpec, SourceVideo
from pipeline.scratch import Scratch
from pipeline.source import iterate_videos
from pipeline.storage import open_store

_log = logging.getLogger(__name__)

# Width over height of the source clips that videos and pictures are brought to, whichever is nearest.
_ASPECTS = (1.0, 4 / 3, 16 / 9, 3 / 4, 9 / 16)
_LONGEST_SOURCE_FRAMES = 129
_REJECTIONS_SAID = 20
_PATIENCE_S = 2.0
_VERSION = 1


def parse_downscale(text: str) -> tuple[float, float]:
    """The range "LOW,HIGH" (or one number) of source pixels per training pixel.

    Raises:
        UsageError: it is no such range, or outside (0, 64].
    """
    parts = text.split(",")
    parse = number("downscale", 0.05, 64)
    values = [parse(part) for part in (parts if len(parts) == 2 else [text, text])]
    if values[0] > values[1]:
        raise UsageError(f"--downscale: {text!r} must have the smaller number first")
    return values[0], values[1]


def _parse_weights(text: str) -> tuple[float, ...]:
    parse = number("input-weights", 1e-6, 1e6)
    return tuple(parse(part) for part in text.split(","))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSetting:
    """The shape of a training batch, and how often it is drawn.

    Attributes:
        kind: "video", or "image": pictures, or single frames of videos where an input has no pictures.
        share: of the steps, relative to the shares of the other settings.
    """

    kind: MediaKind
    width_px: int
    height_px: int
    num_frames: int
    batch_size: int
    share: float

    def __str__(self) -> str:
        return f"{self.kind} {self.num_frames}x{self.width_px}x{self.height_px} batch {self.batch_size}"

    @classmethod
    def from_yaml(cls, given: object) -> ClipSetting:
        """The setting of a YAML mapping {kind, size, frames, batch, share}; size is a number or WIDTHxHEIGHT.

        Raises:
            UsageError: another key, or a value that is not allowed.
        """
        known = {"kind", "size", "frames", "batch", "share"}
        if not isinstance(given, Mapping) or set(given) - known:
            raise UsageError(f"a setting is {given!r}: a mapping with keys of {', '.join(sorted(known))} is needed")
        kind = given.get("kind", "video")
        if kind not in ("video", "image"):
            raise UsageError(f"kind of a setting is {kind!r}: video or image is needed")
        width_px, _, height_px = str(given.get("size", 256)).partition("x")
        setting = cls(
            kind=kind,
            width_px=whole("size", 8)(width_px),
            height_px=whole("size", 8)(height_px or width_px),
            num_frames=whole("frames", 1)(str(given.get("frames", 1 if kind == "image" else 9))),
            batch_size=whole("batch", 1)(str(given.get("batch", 1))),
            share=number("share", 0, 1e6)(str(given.get("share", 1))),
        )
        if setting.width_px % 8 or setting.height_px % 8:
            raise UsageError(f"size of a setting is {given.get('size')!r}: sides must be multiples of 8, one latent")
        if (setting.num_frames - 1) % 4 or (setting.num_frames == 1) != (kind == "image"):
            raise UsageError(f"frames of a setting are {setting.num_frames}: 1 for an image, 5, 9, 13, ... for a video")
        return setting


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipsConfig:
    """What is read and how crops are drawn from it."""

    input: str = option(
        "URI of a folder, glob, table (Parquet, CSV, JSONL) or of img2dataset tars; several with commas", str
    )
    input_weights: tuple[float, ...] | None = option(
        "how often each of several inputs is drawn from, relative, with commas; auto: all alike",
        auto_or(_parse_weights),
        None,
    )
    uri_column: str = option("column of a table that holds the video URIs", str, "url")
    fps: float | None = option("frames per second of source clips, or native", parse_fps, None)
    source_px: int | None = option(
        "short side of source clips; auto: the largest crop times the largest --downscale",
        auto_or(whole("source-px", 8)),
        None,
    )
    source_frames: int | None = option(
        "frames of a source clip; auto: what the longest setting needs at the largest --max-stride, 129 at most",
        auto_or(whole("source-frames", 2)),
        None,
    )
    clips_per_video: int | None = option(
        "at most this many source clips of a video, spread evenly; auto: all",
        auto_or(whole("clips-per-video", 1)),
        16,
    )
    max_stride: int = option("largest temporal stride, drawn from 1 on", whole("max-stride", 1), 4)
    downscale: tuple[float, float] = option(
        "LOW,HIGH: source pixels per training pixel, drawn between them", parse_downscale, (1.0, 2.0)
    )
    flip: bool = option("mirror half of the crops", yes_no("flip"), True)
    upscale: bool = option("enlarge sources that are too small", yes_no("upscale"), False, is_switch=True)
    cache_gb: float = option(
        "memory for decoded clips of a worker; what fits into half of it is decoded once",
        number("cache-gb", 0.001, 1e5),
        4.0,
    )
    crops_per_clip: float = option(
        "crops drawn from a source clip, on the average, before it makes room for another",
        number("crops-per-clip", 0.1, 1e6),
        4.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """Clips of one setting.

    Attributes:
        step: its number, from 0.
        clips: uint8 `(B, 3, T, H, W)`, RGB, values 0..255.
        cursor: JSON-safe; `TrainingClips(cursor=...)` goes on after this batch.
    """

    step: int
    setting: ClipSetting
    clips: Tensor
    cursor: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a load begins in the stream of an input: before this clip of this video of this shard of this epoch."""

    epoch: int = 0
    shard: int = 0
    video: int = 0
    clip: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """Source clips uint8 `(N, H, W, 3)` that are drawn from together.

    Attributes:
        is_whole: it holds all that the input has for this rank.
    """

    place: _Place
    next_place: _Place
    clips: Sequence[npt.NDArray[np.uint8]]
    is_whole: bool

    def fitting(self, setting: ClipSetting) -> list[int]:
        """The clips that a setting can be cropped from; for images the pictures, or all where there are none."""
        fitting = [
            index
            for index, frames in enumerate(self.clips)
            if len(frames) >= setting.num_frames
            and frames.shape[1] >= setting.height_px
            and frames.shape[2] >= setting.width_px
        ]
        if setting.kind == "image":
            return [index for index in fitting if len(self.clips[index]) == 1] or fitting
        return fitting


class TrainingClips:
    """An endless iterator of `TrainingBatch`; `close` ends its threads and children.

    Args:
        config: inputs and augmentation.
        limits: what decoding may cost.
        stages: (number of steps, settings) in order; the last one's settings stay after its end.
        rank, world_size: every rank draws other crops of its own part of the inputs, of the same setting at a step.
        cursor: of a batch, to go on after it.
        num_ahead: batches made ahead in a thread; 0 makes each when it is asked for.

    Raises:
        UsageError: the inputs are empty or hold nothing that can be used, or the cursor belongs to other inputs.
        StorageError: an input could not be read.
    """

    def __init__(
        self,
        config: ClipsConfig,
        limits: DecodeLimits,
        stages: Sequence[tuple[int, Sequence[ClipSetting]]],
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        cursor: Mapping[str, Any] | None = None,
        num_ahead: int = 0,
    ) -> None:
        self._config = config
        self._stages = stages
        self._seed = seed
        self._rank = rank
        self._step = 0
        self._inputs: list[_Input] = []
        self._pool: DecodePool | None = None
        self._ahead: _Ahead | None = None
        uris = [uri.strip() for uri in config.input.split(",") if uri.strip()]
        if not uris:
            raise UsageError(f"--input: {config.input!r} names nothing to read")
        weights = config.input_weights or (1.0,) * len(uris)
        if len(weights) != len(uris):
            raise UsageError(f"--input-weights: {len(weights)} numbers for {len(uris)} inputs; give one for each")
        self._weights = np.array(weights)
        settings = [setting for _, of_stage in stages for setting in of_stage]
        encoding = EncodingConfig(
            model="",
            buckets=source_buckets(config, settings),
            fps=config.fps,
            clips_per_video=config.clips_per_video,
            upscale=config.upscale,
        )
        states: Sequence[Mapping[str, Any] | None] = [None] * len(uris)
        if cursor is not None:
            self._step = _checked(cursor, uris, rank, world_size)
            states = cursor["inputs"]
        self._scratch = Scratch("plans")
        try:
            self._pool = DecodePool(encoding, limits, limits.decode_processes or 1)
            budget_bytes = int(config.cache_gb * 1e9 / 2 / len(uris))
            for index, (uri, state) in enumerate(zip(uris, states, strict=True)):
                plan = _Plan(
                    uri=uri,
                    folder=str(self._scratch.path / str(index)),
                    config=config,
                    encoding=encoding,
                    limits=limits,
                    seed=(seed, index),
                    rank=rank,
                    world_size=world_size,
                )
                self._inputs.append(_Input(plan, self._pool, budget_bytes, config.crops_per_clip, state))
            if all(entry.load.is_whole for entry in self._inputs):
                # Nothing is decoded any more.
                self._pool.close()
            if num_ahead:
                self._ahead = _Ahead(self._make, num_ahead)
        except BaseException:
            self.close()
            raise

    @property
    def num_rejected(self) -> Counter[str]:
        """Rejected videos and clips by reason, so far."""
        # Copies, because the threads that decode go on counting.
        return sum((Counter(dict(entry.num_rejected)) for entry in self._inputs), Counter())

    @property
    def num_cached(self) -> int:
        """Source clips that are held and drawn from."""
        return sum(len(entry.load.clips) for entry in self._inputs)

    def __iter__(self) -> Iterator[TrainingBatch]:
        return self

    def __next__(self) -> TrainingBatch:
        return self._make() if self._ahead is None else self._ahead.take()

    def close(self) -> None:
        """Ends threads and decode children, and removes what was planned; safe to repeat."""
        if self._ahead is not None:
            self._ahead.stop()
        for entry in self._inputs:
            entry.stop()
        if self._pool is not None:
            # Whoever waits for a clip is told.
            self._pool.close()
        for entry in self._inputs:
            entry.close()
        if self._ahead is not None:
            self._ahead.join()
        self._scratch.close()

    def _make(self) -> TrainingBatch:
        step = self._step
        settings = _settings_at(self._stages, step)
        shares = np.array([setting.share for setting in settings])
        # Without the rank: workers that wait for each other should have equal work.
        chosen = np.random.default_rng([self._seed, 1, step]).choice(len(settings), p=shares / shares.sum())
        setting = settings[int(chosen)]
        rng = np.random.default_rng([self._seed, 2, self._rank, step])
        crops = [self._crop(setting, rng) for _ in range(setting.batch_size)]
        self._step += 1
        return TrainingBatch(step=step, setting=setting, clips=torch.stack(crops), cursor=self._cursor())

    def _cursor(self) -> dict[str, Any]:
        return {"version": _VERSION, "step": self._step, "inputs": [entry.state() for entry in self._inputs]}

    def _crop(self, setting: ClipSetting, rng: np.random.Generator) -> Tensor:
        for entry in self._inputs:
            entry.go_on_when_used_up()
        fitting = [entry.fitting(setting) for entry in self._inputs]
        if not any(fitting):
            fitting = [entry.go_on_until_fitting(setting) for entry in self._inputs]
        if not any(fitting):
            raise UsageError(
                f"nothing in {self._config.input} is long and large enough for {setting}; rejected were "
                f"{dict(self.num_rejected) or 'none'}: give other inputs, smaller settings, or --upscale"
            )
        if setting.kind == "image":
            pictures = [
                found if found and len(entry.load.clips[found[0]]) == 1 else []
                for found, entry in zip(fitting, self._inputs, strict=True)
            ]
            fitting = pictures if any(pictures) else fitting
        weights = self._weights * [bool(found) for found in fitting]
        place = int(rng.choice(len(weights), p=weights / weights.sum()))
        frames = self._inputs[place].take(fitting[place][int(rng.integers(len(fitting[place])))])
        return random_crop(frames, setting, self._config, rng)


def _settings_at(stages: Sequence[tuple[int, Sequence[ClipSetting]]], step: int) -> Sequence[ClipSetting]:
    for num_steps, settings in stages:
        if step < num_steps:
            return settings
        step -= num_steps
    return stages[-1][1]


def _checked(cursor: Mapping[str, Any], uris: Sequence[str], rank: int, world_size: int) -> int:
    if cursor.get("version") != _VERSION or len(cursor["inputs"]) != len(uris):
        raise UsageError(
            f"the checkpoint stands in {len(cursor.get('inputs', ()))} inputs, asked for are {len(uris)}: "
            "go on with the same --input"
        )
    return int(cursor["step"])


def source_buckets(config: ClipsConfig, settings: Sequence[ClipSetting]) -> tuple[Bucket, ...]:
    """The shapes of source clips: several aspects, and for small or short sources the least that a setting needs."""
    buckets: set[Bucket] = set()
    kinds: tuple[Literal["video", "image"], ...] = ("video", "image")
    for kind in kinds:
        of_kind = [setting for setting in settings if setting.kind == kind]
        if kind == "image" and not of_kind:
            continue
        # Videos serve for images where there are none, so they are taken in also where no setting asks for clips.
        of_kind = of_kind or list(settings)
        crop_px = max(max(setting.width_px, setting.height_px) for setting in of_kind)
        sides = {config.source_px or math.ceil(crop_px * max(1.0, config.downscale[1]))}
        sides |= {crop_px} if min(sides) > crop_px else set()
        for num_frames in _source_lengths(config, of_kind) if kind == "video" else (1,):
            for side in sides:
                for aspect in _ASPECTS:
                    width_px, height_px = round(side * max(1, aspect)), round(side / min(1, aspect))
                    buckets.add(Bucket(width_px=width_px, height_px=height_px, num_frames=num_frames))
    return tuple(sorted(buckets))


def _source_lengths(config: ClipsConfig, settings: Sequence[ClipSetting]) -> list[int]:
    needed = sorted({max(2, setting.num_frames) for setting in settings})
    longest = config.source_frames
    if longest is None:
        longest = min(_LONGEST_SOURCE_FRAMES, (needed[-1] - 1) * config.max_stride + 1)
        longest = max(longest, needed[-1])
    lengths = {longest}
    while longest > needed[0]:
        longest = max(needed[0], longest // 2)
        lengths.add(longest)
    return sorted(lengths | {length for length in needed if length <= max(lengths)})


def random_crop(
    frames: npt.NDArray[np.uint8], setting: ClipSetting, config: ClipsConfig, rng: np.random.Generator
) -> Tensor:
    """A crop at random: start, stride, size, place and mirroring.

    Args:
        frames: uint8 `(N, H, W, 3)`, at least as long and as large as the setting.

    Returns:
        uint8 `(3, T, H, W)`, contiguous in memory as frames of RGB pixels.
    """
    num_source, source_height, source_width = frames.shape[:3]
    most = config.max_stride if setting.num_frames == 1 else (num_source - 1) // (setting.num_frames - 1)
    stride = int(rng.integers(1, min(config.max_stride, most) + 1))
    span = (setting.num_frames - 1) * stride + 1
    start = int(rng.integers(0, num_source - span + 1))
    largest = min(source_width / setting.width_px, source_height / setting.height_px)
    low, high = (min(limit, largest) for limit in config.downscale)
    scale = math.exp(rng.uniform(math.log(low), math.log(high))) if low < high else low
    width_px = min(source_width, max(1, round(setting.width_px * scale)))
    height_px = min(source_height, max(1, round(setting.height_px * scale)))
    left = int(rng.integers(0, source_width - width_px + 1))
    top = int(rng.integers(0, source_height - height_px + 1))
    is_flipped = config.flip and bool(rng.integers(2))
    crop = frames[start : start + span : stride, top : top + height_px, left : left + width_px]
    pixels = torch.from_numpy(np.ascontiguousarray(crop)).permute(0, 3, 1, 2)
    if (width_px, height_px) != (setting.width_px, setting.height_px):
        size = (setting.height_px, setting.width_px)
        pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    if is_flipped:
        pixels = pixels.flip(-1)
    return pixels.permute(1, 0, 2, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """One input as one rank sees it."""

    uri: str
    folder: str
    config: ClipsConfig
    encoding: EncodingConfig
    limits: DecodeLimits
    seed: tuple[int, ...]
    rank: int
    world_size: int


class _Input:
    """The loads of one input, one after another, the next one decoded while one is drawn from."""

    def __init__(
        self,
        plan: _Plan,
        pool: DecodePool,
        budget_bytes: int,
        crops_per_clip: float,
        state: Mapping[str, Any] | None,
    ) -> None:
        self.num_rejected: Counter[str] = Counter()
        self._plan = plan
        self._pool = pool
        self._budget_bytes = budget_bytes
        self._crops_per_clip = crops_per_clip
        self._stop = threading.Event()
        self._store = open_store(plan.folder)
        self._shards = plan_shards(SourceConfig(input=plan.uri, uri_column=plan.config.uri_column), self._store)
        self._digest = _digest(self._shards, plan)
        self._stream: Iterator[tuple[_Place, Clip]] | None = None
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="training-clips")
        self._next: Future[_Load] | None = None
        self._num_draws = 0
        self._fitting: dict[ClipSetting, list[int]] = {}
        place = _Place()
        if state is not None and state["digest"] != self._digest:
            _log.warning("%s is not what the checkpoint was trained on: it is read from its beginning", plan.uri)
        elif state is not None:
            place = _Place(**state["place"])
            self._num_draws = int(state["num_draws"])
        try:
            # In the thread that goes on with it, because a generator belongs to whoever runs it.
            self.load = self._decoder.submit(self._fill, place).result()
            self._prepare_next()
        except BaseException:
            self.stop()
            self.close()
            raise

    def state(self) -> dict[str, Any]:
        """What a cursor says of this input."""
        place = dataclasses.asdict(self.load.place)
        return {"digest": self._digest, "place": place, "num_draws": self._num_draws}

    def take(self, index: int) -> npt.NDArray[np.uint8]:
        """A clip of the load, counted as drawn."""
        self._num_draws += 1
        return self.load.clips[index]

    def fitting(self, setting: ClipSetting) -> list[int]:
        """The clips of the load that a setting can be cropped from."""
        if setting not in self._fitting:
            self._fitting[setting] = self.load.fitting(setting)
        return self._fitting[setting]

    def go_on_when_used_up(self) -> None:
        """Takes the next load when each clip of this one has served its number of times on the average."""
        if not self.load.is_whole and self._num_draws >= self._crops_per_clip * len(self.load.clips):
            self._go_on()

    def go_on_until_fitting(self, setting: ClipSetting) -> list[int]:
        """The fitting clips of the first load from here on that has any; none when a whole epoch has none."""
        first = self.load.place
        while not (found := self.fitting(setting)):
            if self.load.is_whole or self.load.place.epoch > first.epoch + 1:
                return []
            self._go_on()
        return found

    def stop(self) -> None:
        """Makes what decodes end at its next clip, and waits for that for a moment."""
        self._stop.set()
        if self._next is not None:
            wait([self._next], timeout=_PATIENCE_S)

    def close(self) -> None:
        """Waits for what decodes, which `stop` has been told to."""
        self._decoder.shutdown(wait=True, cancel_futures=True)
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()

    def _go_on(self) -> None:
        assert self._next is not None, "a whole load has no next one"
        self.load = self._next.result()
        self._num_draws = 0
        self._fitting = {}
        self._prepare_next()

    def _prepare_next(self) -> None:
        self._next = None if self.load.is_whole else self._decoder.submit(self._fill, self.load.next_place)

    def _fill(self, place: _Place) -> _Load:
        """Decodes the load that begins at a place; ends at the budget or at the end of the epoch."""
        begin = place
        while True:
            clips: list[npt.NDArray[np.uint8]] = []
            num_bytes = 0
            if self._stream is None:
                self._stream = self._epoch(place)
            for next_place, clip in self._stream:
                place = next_place
                clips.append(clip.frames)
                num_bytes += clip.frames.nbytes
                if num_bytes >= self._budget_bytes:
                    return _Load(place=begin, next_place=place, clips=clips, is_whole=False)
            self._stream = None
            next_epoch = _Place(epoch=place.epoch + 1)
            is_from_start = begin == _Place(epoch=begin.epoch)
            if clips:
                return _Load(place=begin, next_place=next_epoch, clips=clips, is_whole=is_from_start)
            if is_from_start:
                raise UsageError(
                    f"--input: nothing in {self._plan.uri} can be trained on by rank {self._plan.rank} of "
                    f"{self._plan.world_size}; rejected: {dict(self.num_rejected) or 'none'}"
                )
            begin = place = next_epoch

    def _epoch(self, place: _Place) -> Iterator[tuple[_Place, Clip]]:
        """The clips of an epoch from a place on, each with the place behind it."""
        plan = self._plan
        order = [int(i) for i in np.random.default_rng([*plan.seed, 3, place.epoch]).permutation(len(self._shards))]
        # Few shards are read by every rank, which keeps every so-manieth video of them.
        deals_shards = len(order) >= plan.world_size
        if deals_shards:
            order = order[plan.rank :: plan.world_size]
        for shard in range(place.shard, len(order)):
            spec = self._shards[order[shard]]
            first_video = place.video if shard == place.shard else 0
            num_skipped = place.clip if shard == place.shard else 0
            videos = self._videos(spec, first_video, deals_shards)
            entries = self._pool.decode(videos)
            video, clip = first_video, num_skipped
            try:
                for entry in entries:
                    if self._stop.is_set():
                        raise LatentmillError("the training clips are closed")
                    index = int(entry.key.partition(":")[0])
                    if index != video:
                        video, clip, num_skipped = index, 0, 0
                    if isinstance(entry, ClipFailure):
                        self._reject(entry)
                        continue
                    if entry.clip_index < num_skipped:
                        continue
                    clip = entry.clip_index + 1
                    yield _Place(epoch=place.epoch, shard=shard, video=video, clip=clip), entry
            finally:
                entries.close()  # type: ignore[attr-defined]
                videos.close()  # type: ignore[attr-defined]

    def _videos(self, spec: ShardSpec, first: int, deals_shards: bool) -> Iterator[SourceVideo | ClipFailure]:
        """The videos of a shard that are this rank's, from a number on, their numbers in front of their keys."""
        plan = self._plan
        for index, entry in enumerate(iterate_videos(spec, self._store, plan.encoding, plan.limits)):
            if index < first or (not deals_shards and index % plan.world_size != plan.rank):
                if isinstance(entry, SourceVideo):
                    os.close(entry.media_fd)
                continue
            key = f"{index}:{entry.key}"
            if isinstance(entry, SourceVideo):
                yield dataclasses.replace(entry, key=key, caption="", fields={})
            else:
                yield dataclasses.replace(entry, key=key)

    def _reject(self, failure: ClipFailure) -> None:
        self.num_rejected[failure.reason] += 1
        if self.num_rejected.total() <= _REJECTIONS_SAID:
            _log.warning("rejected %s: %s: %s", failure.source_uri, failure.reason, failure.message)
        if self.num_rejected.total() == _REJECTIONS_SAID:
            _log.warning("further rejections of %s are only counted", self._plan.uri)


def _digest(shards: Sequence[ShardSpec], plan: _Plan) -> str:
    """What the places of a cursor depend on besides the seed."""
    listed = [(spec.shard_id, spec.plan_key, spec.source_size_bytes, _etag(spec)) for spec in shards]
    shapes = [str(bucket) for bucket in plan.encoding.buckets]
    document = [listed, shapes, plan.encoding.fps, plan.encoding.clips_per_video, plan.rank, plan.world_size]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()[:16]


def _etag(spec: ShardSpec) -> str | None:
    """Without times of change: a copy of the same files is the same input. Slices are known by their plan."""
    is_time = spec.kind == "slice" or (spec.source_etag or "").startswith("mtime-")
    return None if is_time else spec.source_etag


class _Ahead:
    """Makes batches in a thread, a few ahead of whoever takes them."""

    def __init__(self, make: Callable[[], TrainingBatch], num_ahead: int) -> None:
        self._make = make
        self._queue: queue.Queue[TrainingBatch | BaseException] = queue.Queue(num_ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="training-batches", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        entry: TrainingBatch | BaseException
        while not self._stop.is_set():
            try:
                entry = self._make()
            except BaseException as error:
                entry = error
            while not self._stop.is_set():
                try:
                    self._queue.put(entry, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if isinstance(entry, BaseException):
                return

    def take(self) -> TrainingBatch:
        entry = self._queue.get()
        if isinstance(entry, BaseException):
            raise entry
        return entry

    def stop(self) -> None:
        self._stop.set()

    def join(self) -> None:
        self._thread.join()
