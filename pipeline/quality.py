"""How good latents are, told while a run goes on: a sample of clips is decoded back beside the encoder that made them.

Not the audit of an output (`audit`) and not the page about it (`report`): those look at what is stored, later. Called
by `actors`, which check clips (`Inspection`), and by `run`, which adds up what they found and rings alarms
(`RunQuality`). Nothing here changes a byte of the output or ends a run, and where no share is asked for nothing here
is called.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.config import RunConfig
from pipeline.metrics import QUALITY_ALARMS, RunMetrics
from pipeline.progress import Progress, Quality
from pipeline.records import Clip, ClipFailure, LatentRecord, ModelFacts
from pipeline.store import Steps

if TYPE_CHECKING:  # the driver has no use for torch
    from pipeline.codec import LatentDecoder

_PERFECT_DB = 100.0
# A clip that is easy must come back better than this. One that is hard (noise, fine texture) gives less in any model,
# but a model that works gives it about as well as blocks of mean colour do: of white noise `small` stays 0.2 dB below
# them, of real clips at least 3 dB above.
_LOW_DB = 20.0
_BLOCKS_MARGIN_DB = 1.0
# Clips that are judged together by their channels. One clip says little: a title card has hardly any deviation, and of
# real clips the mean of a channel in `small` goes up to 1.25 (deviation 0.4 from clip to clip), which in the mean of 32
# is 0.07. Fewer would judge a video or two.
_GROUP_CLIPS = 32
# Scale and shift of a model promise diffusion models a mean near 0 and a deviation near 1, but of all channels
# together and on the model's own data. In sound models single channels have means up to 1.1 (Stable Diffusion's VAE by
# the figures in the code of Karras et al., "Analyzing and improving the training dynamics of diffusion models",
# 2024; its four channels together: 0.72) and deviations of 0.6 to 1.3 (`small` on the demo's clips; together: 0.84).
_DEVIATION_OF_ALL = (0.5, 2.0)
_DEVIATION_OF_ONE = (0.2, 4.0)
_LARGEST_MEAN = 2.0

Encode = Callable[[Iterable[Clip | ClipFailure]], Iterator[LatentRecord | ClipFailure]]
Frames = npt.NDArray[np.uint8]


def is_chosen(shard_id: str, key: str, clip_index: int, share: float) -> bool:
    """Whether a clip is among those looked at; the same in every process, and with a larger share still."""
    name = f"{shard_id}\0{key}\0{clip_index}".encode()
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "big") < share * 2.0**64


def psnr_db(original: Frames, other: Frames) -> float:
    """Peak signal to noise ratio over all pixels of two clips of uint8, in dB; equal clips have 100."""
    error = original.astype(np.float32) - other.astype(np.float32)
    return _decibels(float(np.mean(error * error, dtype=np.float64)))


def _decibels(mean_square: float) -> float:
    return min(_PERFECT_DB, 10 * math.log10(255**2 / mean_square)) if mean_square else _PERFECT_DB


def floor_db(frames: Frames, temporal: int, spatial: int) -> float:
    """The PSNR that any working model gives a clip: 20 dB, and of a hard clip what its mean colours would give.

    Args:
        frames: `(T, H, W, 3)`, T = 1 + k * temporal, sides multiples of spatial.
        temporal, spatial: how many frames and pixels a side one latent position stands for.
    """
    _, height, width, _ = frames.shape
    error = 0.0
    for part, depth in ((frames[:1], 1), (frames[1:], temporal)):
        shape = (len(part) // depth, depth, height // spatial, spatial, width // spatial, spatial, 3)
        error += float(part.reshape(shape).var(axis=(1, 3, 5), dtype=np.float32).sum(dtype=np.float64)) * depth
    blocks_db = _decibels(error * spatial**2 / frames.size)
    return min(_LOW_DB, blocks_db - _BLOCKS_MARGIN_DB)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipQuality:
    """What a clip came back as, and what it should at least; that is not looked at closer where 20 dB are reached."""

    key: str
    clip_index: int
    psnr_db: float
    floor_db: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardQuality:
    """What was seen of one shard.

    Attributes:
        num_clips: decoded back and compared.
        num_undecoded: that should have been, but the decoder failed; `why_undecoded` is its last error.
        psnr_sum_db: over the clips.
        worst: the clip with the lowest PSNR.
        num_low, low: clips under their floor, and the one that is farthest under.
        num_nonfinite_clips: of all clips of the shard, those rejected for latents that are NaN or infinite.
        num_nonfinite_values: of the decoded clips, before they became pixels.
        num_values: latent positions, over the clips; of these each channel's `sums` and `squares`, unscaled.
    """

    num_clips: int
    num_undecoded: int
    why_undecoded: str | None
    psnr_sum_db: float
    worst: ClipQuality | None
    num_low: int
    low: ClipQuality | None
    num_nonfinite_clips: int
    num_nonfinite_values: int
    num_values: int
    sums: tuple[float, ...]
    squares: tuple[float, ...]


class Inspection:
    """The checks of one attempt at a shard, in the thread that encodes it.

    Args:
        decoder: of the model that encodes.
        run: its share of clips, above 0, and its floor of PSNR.
        shard_id: of the plan, also where the shard is encoded once more.

    Attributes:
        check_s: seconds spent.
    """

    def __init__(self, decoder: LatentDecoder, run: RunConfig, shard_id: str) -> None:
        self.check_s = 0.0
        self._decoder = decoder
        self._share = run.quality_share
        self._min_psnr_db = run.quality_min_psnr_db
        self._shard_id = shard_id
        self._frames: dict[tuple[str, int], Frames] = {}
        self._num_clips = self._num_undecoded = self._num_low = 0
        self._why_undecoded: str | None = None
        self._psnr_sum_db = 0.0
        self._worst: ClipQuality | None = None
        self._low: ClipQuality | None = None
        self._num_nonfinite_clips = self._num_nonfinite_values = 0
        self._channels = _Channels(decoder.facts.latent_channels)

    def around(self, encode: Encode) -> Encode:
        """The encoder, and a look at what it makes of the chosen clips. Their pixels are held meanwhile, not copied."""

        def encode_and_look(clips: Iterable[Clip | ClipFailure]) -> Iterator[LatentRecord | ClipFailure]:
            for entry in encode(self._held(clips)):
                self._look_at(entry)
                yield entry

        return encode_and_look

    def found(self) -> ShardQuality:
        """All that was seen so far."""
        return ShardQuality(
            num_clips=self._num_clips,
            num_undecoded=self._num_undecoded,
            why_undecoded=self._why_undecoded,
            psnr_sum_db=self._psnr_sum_db,
            worst=self._worst,
            num_low=self._num_low,
            low=self._low,
            num_nonfinite_clips=self._num_nonfinite_clips,
            num_nonfinite_values=self._num_nonfinite_values,
            num_values=self._channels.num_values,
            sums=tuple(self._channels.sums.tolist()),
            squares=tuple(self._channels.squares.tolist()),
        )

    def _held(self, clips: Iterable[Clip | ClipFailure]) -> Iterator[Clip | ClipFailure]:
        for clip in clips:
            if isinstance(clip, Clip) and is_chosen(self._shard_id, clip.key, clip.clip_index, self._share):
                self._frames[clip.key, clip.clip_index] = clip.frames
            yield clip

    def _look_at(self, entry: LatentRecord | ClipFailure) -> None:
        if isinstance(entry, ClipFailure):
            self._num_nonfinite_clips += entry.reason == "nonfinite_latent"
            if entry.clip_index is not None:
                self._frames.pop((entry.key, entry.clip_index), None)
            return
        frames = self._frames.pop((entry.key, entry.clip_index), None)
        if frames is None:
            return
        started = time.perf_counter()
        Steps.note()
        # A check that fails must cost no sample: an encoder that is broken too fails by itself, at the next clip.
        try:
            self._compare(entry, frames)
        except (RuntimeError, MemoryError) as error:
            self._num_undecoded += 1
            self._why_undecoded = f"{type(error).__name__}: {error}".partition("\n")[0]
            import torch

            if isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()
        self.check_s += time.perf_counter() - started

    def _compare(self, record: LatentRecord, frames: Frames) -> None:
        decoded, num_nonfinite = self._decoder.decode_counted(record.mean)
        reached_db = psnr_db(frames, decoded)
        floor = self._min_psnr_db
        if floor is None:
            facts = self._decoder.facts
            is_near = reached_db < _LOW_DB
            floor = floor_db(frames, facts.temporal_compression, facts.spatial_compression) if is_near else _LOW_DB
        clip = ClipQuality(key=record.key, clip_index=record.clip_index, psnr_db=reached_db, floor_db=floor)
        self._num_clips += 1
        self._num_nonfinite_values += num_nonfinite
        self._psnr_sum_db += clip.psnr_db
        self._worst = _worse(self._worst, clip)
        if clip.psnr_db < clip.floor_db:
            self._num_low += 1
            self._low = _lower(self._low, clip)
        self._channels.add_latents(record.mean)


def _worse(one: ClipQuality | None, other: ClipQuality) -> ClipQuality:
    return other if one is None or other.psnr_db < one.psnr_db else one


def _lower(one: ClipQuality | None, other: ClipQuality) -> ClipQuality:
    return other if one is None or other.psnr_db - other.floor_db < one.psnr_db - one.floor_db else one


class _Channels:
    """Sums over latent positions, channel by channel, in float64."""

    def __init__(self, num_channels: int) -> None:
        self.num_values = 0
        self.sums = np.zeros(num_channels)
        self.squares = np.zeros(num_channels)

    def add_latents(self, mean: npt.NDArray[np.floating]) -> None:
        """Adds a latent `(C, t, h, w)` of finite values."""
        values = mean.reshape(len(mean), -1).astype(np.float64)
        self.num_values += values.shape[1]
        self.sums += values.sum(axis=1)
        self.squares += np.einsum("cn,cn->c", values, values)

    def add(self, found: ShardQuality) -> None:
        """Adds the sums of a shard."""
        self.num_values += found.num_values
        self.sums += found.sums
        self.squares += found.squares

    def scaled(self, model: ModelFacts) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Mean and deviation of each channel, as a diffusion model takes it. There must be values."""
        mean = self.sums / self.num_values
        deviation = np.sqrt(np.maximum(self.squares / self.num_values - mean * mean, 0))
        return model.scaling_factor * (mean - model.shift_factor), abs(model.scaling_factor) * deviation


def _of_all(deviation: npt.NDArray[np.float64]) -> float:
    """The deviation of all channels together, each about its own mean."""
    return float(np.sqrt(np.mean(deviation * deviation)))


def _why_off(mean: npt.NDArray[np.float64], deviation: npt.NDArray[np.float64]) -> str | None:
    """What is wrong with scaled latents that have these channels; None where nothing is."""
    low, high = _DEVIATION_OF_ALL
    if not low <= _of_all(deviation) <= high:
        return f"they have a deviation of {_of_all(deviation):.3g}, allowed is {low:g} to {high:g}"
    low, high = _DEVIATION_OF_ONE
    for number, value in enumerate(deviation):
        if not low <= value <= high:
            return f"channel {number} has a deviation of {value:.3g}, allowed is {low:g} to {high:g}"
    number = int(np.argmax(np.abs(mean)))
    if abs(mean[number]) > _LARGEST_MEAN:
        return f"channel {number} has a mean of {mean[number]:.3g}, allowed is {-_LARGEST_MEAN:g} to {_LARGEST_MEAN:g}"
    return None


class RunQuality:
    """What was seen of all shards of a run, and the alarms about it.

    Shards are taken in groups, in the order in which they come, each of as many as it takes to have 32 clips looked at.
    A kind of alarm rings once in a group, and of its 1st, 2nd, 4th, 8th, ... ring the log is told. Latents that are
    not finite, a decoder that fails and a clip under its floor ring at once; channels are judged when a group is full.
    Of an untrained model neither PSNR nor channels mean anything, and they ring nothing.
    """

    def __init__(self, model: ModelFacts, metrics: RunMetrics, progress: Progress) -> None:
        self._model = model
        self._metrics = metrics
        self._progress = progress
        self._alarms: Counter[str] = Counter()
        self._rung: set[str] = set()
        self._num_group_clips = 0
        self._group = _Channels(model.latent_channels)
        self._channels = _Channels(model.latent_channels)
        self._num_clips = self._num_undecoded = self._num_low = 0
        self._num_nonfinite_clips = self._num_nonfinite_values = 0
        self._psnr_sum_db = 0.0
        self._worst: tuple[str, ClipQuality] | None = None

    def add(self, shard_id: str, found: ShardQuality, actor: int) -> None:
        """Takes in what an actor saw of a shard; rings what there is to ring."""
        self._num_clips += found.num_clips
        self._num_undecoded += found.num_undecoded
        self._num_low += found.num_low
        self._num_nonfinite_clips += found.num_nonfinite_clips
        self._num_nonfinite_values += found.num_nonfinite_values
        self._psnr_sum_db += found.psnr_sum_db
        if found.worst is not None and (self._worst is None or found.worst.psnr_db < self._worst[1].psnr_db):
            self._worst = shard_id, found.worst
        self._channels.add(found)
        self._measure(found)
        self._ring_for(f"shard {shard_id} (encoder {actor})", found)
        self._num_group_clips += found.num_clips
        self._group.add(found)
        if self._num_group_clips >= _GROUP_CLIPS:
            why = _why_off(*self._group.scaled(self._model)) if self._model.is_trained else None
            if why is not None:
                what = (
                    f"scaled latents are not as diffusion models take them: of the last {self._num_group_clips} clips"
                )
                self._ring("channels", f"{what} {why}. Wrong weights, another compute dtype, or very uniform videos")
            self._rung.clear()
            self._num_group_clips = 0
            self._group = _Channels(self._model.latent_channels)

    def _measure(self, found: ShardQuality) -> None:
        self._metrics.add("latentmill_quality_clips_total", found.num_clips)
        self._metrics.add("latentmill_quality_nonfinite_values_total", found.num_nonfinite_values)
        if self._worst is None:
            return
        mean, deviation = self._channels.scaled(self._model)
        for name, value in (
            ("psnr_mean_db", self._psnr_sum_db / self._num_clips),
            ("psnr_worst_db", self._worst[1].psnr_db),
            ("latent_deviation", _of_all(deviation)),
            ("latent_mean", float(np.abs(mean).max())),
        ):
            self._metrics.set(f"latentmill_quality_{name}", value)

    def _ring_for(self, shard: str, found: ShardQuality) -> None:
        if found.num_nonfinite_clips:
            self._ring(
                "nonfinite", f"{shard}: {found.num_nonfinite_clips} clips gave NaN or infinite latents, rejected"
            )
        elif found.num_nonfinite_values:
            number = found.num_nonfinite_values
            self._ring("nonfinite", f"{shard}: {number} values of clips that were decoded back are NaN or infinite")
        if found.num_undecoded:
            number = found.num_undecoded
            self._ring("undecoded", f"{shard}: {number} clips could not be decoded back: {found.why_undecoded}")
        if found.low is not None and self._model.is_trained:
            clip = found.low
            self._ring(
                "psnr",
                f"{shard}: clip {clip.clip_index} of {clip.key} comes back with {clip.psnr_db:.1f} dB, allowed is "
                f"{clip.floor_db:.1f} or more (--quality-min-psnr-db); {found.num_low} of {found.num_clips} clips "
                "looked at are under their floor",
            )

    def _ring(self, kind: str, message: str) -> None:
        if kind in self._rung:
            return
        self._rung.add(kind)
        self._alarms[kind] += 1
        self._metrics.add("latentmill_quality_alarms_total", kind=kind)
        number = self._alarms[kind]
        if number & (number - 1) == 0:
            self._progress.say("quality", f"quality alarm {kind!r}, number {number}: {message}")

    def standing(self) -> Quality:
        """What a view of the run shows."""
        has_any = self._worst is not None
        return Quality(
            num_clips=self._num_clips,
            psnr_mean_db=round(self._psnr_sum_db / self._num_clips, 3) if has_any else None,
            psnr_worst_db=None if self._worst is None else round(self._worst[1].psnr_db, 3),
            latent_deviation=round(_of_all(self._channels.scaled(self._model)[1]), 4) if has_any else None,
            alarms=self._alarms_by_kind(),
        )

    def _alarms_by_kind(self) -> dict[str, int]:
        return {kind: self._alarms[kind] for kind in QUALITY_ALARMS if self._alarms[kind]}

    def facts(self) -> dict[str, object]:
        """What the result line says; JSON-safe. `channels` are scaled; both are None where no clip was looked at."""
        psnr: dict[str, object] | None = None
        channels: dict[str, object] | None = None
        if self._worst is not None:
            shard_id, worst = self._worst
            psnr = {
                "mean": round(self._psnr_sum_db / self._num_clips, 3),
                "worst": round(worst.psnr_db, 3),
                "worst_clip": {"shard_id": shard_id, "key": worst.key, "clip_index": worst.clip_index},
                "num_low": self._num_low,
            }
            mean, deviation = self._channels.scaled(self._model)
            channels = {
                "mean": mean.round(4).tolist(),
                "deviation": deviation.round(4).tolist(),
                "deviation_of_all": round(_of_all(deviation), 4),
            }
        return {
            "num_clips": self._num_clips,
            "num_undecoded": self._num_undecoded,
            "psnr_db": psnr,
            "non_finite": {"clips_rejected": self._num_nonfinite_clips, "decoded_values": self._num_nonfinite_values},
            "channels": channels,
            "alarms": self._alarms_by_kind(),
        }
