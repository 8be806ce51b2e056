"""What a run will do and cost, before it starts: a look at some videos and a few encoded clips, scaled to what is left.

Not a promise, and nothing is written to the output. `run` calls `estimate` in a dry run. What was seen is scaled by the
bytes of tars and by the videos of slices (a ratio estimate over shards); where all of the input was seen, clips and
rejections are those of the run. Ranges are two standard errors of that estimate, of what was seen alone: the measured
speeds have errors of their own, of other programs on this machine for example.

Time is the largest of three: encoding by the encoders that there are, decoding by the decode children that there are,
and both by the cores that there are. The actors are those that fit on this machine, or as many as --num-actors says.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.calibration import Calibration, EmbeddingFacts, EncoderFacts
from pipeline.codec import batch_size
from pipeline.commit import latest_contents, refuse_differences
from pipeline.config import JobConfig
from pipeline.look import Look, look_at
from pipeline.packed import Packed
from pipeline.plan import UnwrittenSlices, infer_passthrough
from pipeline.progress import duration_text, size_text
from pipeline.records import (
    REASONS,
    Bucket,
    DatasetManifest,
    ShardSpec,
)
from pipeline.scaling import Scale, Sizes, sizes_of, texts_of
from pipeline.scratch import Scratch
from pipeline.storage import ObjectStore, open_store, region_of
from pipeline.traffic import KINDS, Work, requests_of_plan, requests_of_tars, requests_to_output

# Of the time that a dry run may take; the rest is for the encoder.
_LOOK_SHARE = 0.35
# The store tried, an embedded Ray started (tests/benchmarks/bench_start.py) and in the end stopped, on a machine that
# is not busy.
_RAY_START_S = 4.0
# The shape that tells how long one pixel takes, before larger ones are tried.
_PROBE = Bucket(width_px=64, height_px=64, num_frames=5)
_MOST_MEASURED = 5
_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
# So much a lost node costs; below it the work at a shard's borders shows, see the README.
_LONGEST_SHARD_S = 1200.0
_SHORTEST_SHARD_S = 5.0
_MANY_SHARDS = 100_000
_FEW_SHARDS = 100
# From so much on one side holds the other up, in a run that is long enough for somebody to care.
_BOUND_RATIO = 1.25
_SHORT_RUN_S = 60.0
_MOST_TEXTS = 64
# Of a bucket that fits nothing nobody should hear before enough has been seen.
_ENOUGH_VIDEOS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a dry run says, as it stands in the result line under `estimate`. None: not known.

    Attributes:
        num_shards: to encode in this run; all numbers of videos, clips, bytes and seconds are of these alone.
        num_shards_done_before, num_shards_beyond_limit: of the input, those that are decided, and those that --limit
            leaves to another run.
        is_whole: all videos were seen, so that counts are no estimates.
        num_videos_range, num_clips_range, duration_range_s, price_range: two standard errors to both sides.
        clips: bucket -> clips; without those that the decoder rejects.
        video_hours: duration of the videos that give clips.
        rejections: reason -> `num` (of videos and clips), `num_seen` of them, `meaning`, `example`.
        num_bytes_out: data files of the output, embeddings not among them.
        num_bytes_embeddings: of captions and first frames, as they are stored; 0 where there are none.
        requests: "input" and "output" -> kind (`traffic.KINDS`) -> number; an input that is no object store has none.
        encode_s_per_clip: bucket -> seconds of one actor.
        measured: buckets that were encoded; others are scaled from the nearest by their pixels.
        decode_cpu_s: computing time of all decoding.
        encode_s: seconds of all encoding by one actor.
        num_texts: that are embedded: the distinct ones of each shard.
        embed_s: seconds of all embedding of captions and first frames by one actor; 0 where there are none.
        start_s: until the first clip is encoded.
        limited_by: "encoding", "decoding" or "cores", what the run will wait for.
        num_decode_cores: cores that an actor's decoding needs for its encoder never to wait.
        actor_hours, gpu_hours: of all actors together, while the run lasts.
        price: of the GPU hours, or of the actor hours where there is no GPU; None without --gpu-hour-price.
    """

    num_shards: int
    num_shards_seen: int
    num_videos_seen: int
    num_bytes_seen: int
    is_whole: bool
    num_videos: int | None
    num_videos_range: tuple[int, int] | None
    num_videos_rejected: int | None
    num_clips: int | None
    num_clips_range: tuple[int, int] | None
    clips: Mapping[str, int]
    num_frames: int | None
    video_hours: float | None
    rejections: Mapping[str, Mapping[str, object]]
    num_bytes_out: int | None
    num_files_out: int | None
    requests: Mapping[str, Mapping[str, int]]
    device: str
    device_name: str | None
    num_actors: int
    cpus_per_actor: int
    gpus_per_actor: float
    encode_s_per_clip: Mapping[str, float]
    measured: Sequence[str]
    encode_s: float | None
    num_texts: int | None = 0
    embed_s: float | None = 0.0
    num_bytes_embeddings: int | None = 0
    decode_cpu_s: float | None
    start_s: float | None
    duration_s: float | None
    duration_range_s: tuple[float, float] | None
    limited_by: str | None
    num_decode_cores: float | None
    actor_hours: float | None
    gpu_hours: float | None
    price: float | None
    price_range: tuple[float, float] | None
    advice: Sequence[str] = field(default_factory=tuple)
    notes: Sequence[str] = field(default_factory=tuple)
    num_shards_done_before: int = 0
    num_shards_beyond_limit: int = 0
    took_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Crew:
    """The actors of the run, as far as they are known without Ray."""

    device_type: str
    num_wanted: int  # were there shards for all
    num_actors: int
    num_here: int  # of these on this machine at once
    cpus: int
    gpus: float
    decode_processes: int
    num_cores: int  # of all machines together

    @property
    def encoders(self) -> float:
        """Whole encoders: actors that share a GPU also share its speed."""
        return self.num_actors * (min(1.0, self.gpus) if self.gpus else 1.0)


def _cores_here() -> int:
    """Cores of this machine, or of the container as cgroup v2 limits it, as Ray counts them."""
    cores = os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = _CPU_LIMIT.read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def _crew_of(config: JobConfig, num_shards: int) -> _Crew:
    gpus = config.run.gpus_per_actor
    if gpus is None:
        gpus = float(torch.cuda.is_available())
    device_type = "cuda" if gpus else "cpu"
    cpus = config.encoding.cpus_on(device_type)
    cores_here = _cores_here()
    gpus_here = torch.cuda.device_count() if gpus and torch.cuda.is_available() else 0
    fitting = int(min(cores_here // cpus, gpus_here / gpus + 1e-6 if gpus else math.inf))
    num_wanted = config.run.num_actors or max(1, fitting)
    num_actors = max(1, min(num_wanted, num_shards))
    num_machines = math.ceil(num_actors / max(1, fitting))
    return _Crew(
        device_type=device_type,
        num_wanted=num_wanted,
        num_actors=num_actors,
        num_here=min(num_actors, max(1, fitting)),
        cpus=cpus,
        gpus=gpus,
        decode_processes=config.decode.decode_processes or cpus,
        num_cores=max(num_machines * cores_here, cpus),
    )


def estimate(
    config: JobConfig,
    planned: Sequence[ShardSpec],
    todo: Sequence[ShardSpec],
    store: ObjectStore,
    stored: DatasetManifest | None,
    decided: Container[str],
    num_records: int,
    unwritten: UnwrittenSlices,
    *,
    snapshot_every: int,
    snapshot_growth: float,
) -> Estimate:
    """Estimates a run; takes about --dry-run-seconds beside reading what the input needs.

    Args:
        planned: all shards of the input.
        todo: those that the run would encode.
        stored: the description of the output, if it has one.
        decided: ids of the shards that are.
        num_records: commit records that stand in the output.
        unwritten: slices among the planned that stand nowhere.
        snapshot_every, snapshot_growth: as in `traffic.Work`.

    Raises:
        UsageError: the model cannot be loaded.
        ConfigMismatchError: the output was made with other weights.
        StorageError: the input or the output cannot be read.
        DecodeChildError: decode children cannot be started here.
    """
    started = time.monotonic()
    crew = _crew_of(config, len(todo))
    latest = latest_contents(store)
    work = Work(
        num_shards=len(todo),
        num_records=num_records,
        num_published=None if latest is None else latest.num_commits,
        is_begun=stored is not None,
        num_files=0,
        num_sets=len(config.column_sets),
        num_plans=len({spec.source_uri.partition("#slice=")[0] for spec in planned if spec.kind == "slice"}),
        num_new_slices=len(unwritten.keys),
        num_input_files=sum(spec.num_videos or 1 for spec in planned),
        snapshot_every=snapshot_every,
        snapshot_growth=snapshot_growth,
    )
    found = replace(
        _see(config, crew, planned, todo, store, stored, unwritten, work, started) if todo else _nothing_to_do(crew),
        num_shards_done_before=sum(spec.shard_id in decided for spec in planned),
        num_shards_beyond_limit=sum(spec.shard_id not in decided for spec in planned)
        - sum(spec.redo is None for spec in todo),
    )
    return replace(found, took_s=round(time.monotonic() - started, 1))


def _see(
    config: JobConfig,
    crew: _Crew,
    planned: Sequence[ShardSpec],
    todo: Sequence[ShardSpec],
    store: ObjectStore,
    stored: DatasetManifest | None,
    unwritten: UnwrittenSlices,
    work: Work,
    started: float,
) -> Estimate:
    with Scratch("dry-run") as folder, _Stopwatch(config, crew, started, folder) as stopwatch:
        look = look_at(
            config,
            _seeable(todo, unwritten),
            store,
            unwritten.kept,
            folder,
            seconds=_LOOK_SHARE * config.run.dry_run_seconds,
            other_child=stopwatch.pid,
        )
        scale = Scale(todo, look)
        speeds = stopwatch.measure(look, scale)
        sizes = None
        if speeds is not None:
            if stored is not None:
                weights = {"weights_sha256": speeds.facts.model.weights_sha256}
                refuse_differences(store, {key: stored.fingerprint_fields.get(key) for key in weights}, weights)
                passthrough = stored.passthrough
            else:
                has_slice = planned[0].plan_key in unwritten.kept
                kept = open_store(str(folder)) if has_slice else store
                passthrough = infer_passthrough(config.source, config.encoding.caption_column, planned, kept)
            sizes = sizes_of(config, speeds.facts.model, passthrough, scale, folder)
    return _summed(config, crew, todo, look, scale, speeds, sizes, work)


def _nothing_to_do(crew: _Crew) -> Estimate:
    return Estimate(
        num_shards=0,
        num_shards_seen=0,
        num_videos_seen=0,
        num_bytes_seen=0,
        is_whole=True,
        num_videos=0,
        num_videos_range=(0, 0),
        num_videos_rejected=0,
        num_clips=0,
        num_clips_range=(0, 0),
        clips={},
        num_frames=0,
        video_hours=0.0,
        rejections={},
        num_bytes_out=0,
        num_files_out=0,
        requests={},
        device=crew.device_type,
        device_name=None,
        num_actors=0,
        cpus_per_actor=crew.cpus,
        gpus_per_actor=crew.gpus,
        encode_s_per_clip={},
        measured=(),
        encode_s=0.0,
        decode_cpu_s=0.0,
        start_s=0.0,
        duration_s=0.0,
        duration_range_s=None,
        limited_by=None,
        num_decode_cores=None,
        actor_hours=0.0,
        gpu_hours=0.0,
        price=None,
        price_range=None,
    )


def _seeable(todo: Sequence[ShardSpec], unwritten: UnwrittenSlices) -> Sequence[ShardSpec]:
    """The shards that can be looked at, whole ones rather than retries. Of slices that stand nowhere some are kept."""
    lost = set(unwritten.keys) - unwritten.kept.keys()
    seeable = Packed(spec for spec in todo if spec.plan_key not in lost)
    return Packed(spec for spec in seeable if spec.redo is None or spec.redo.keys is None) or seeable


@dataclass(frozen=True, slots=True, kw_only=True)
class _Speeds:
    """What was measured of the encoder, by bucket: seconds that one actor needs for a clip."""

    facts: EncoderFacts
    s_per_clip: Mapping[Bucket, float]
    measured: Sequence[Bucket]
    embedding: EmbeddingFacts | None = None  # None: there is none, or it was not measured


class _Stopwatch:
    """The encoder's process, from its start beside the look to the last bucket that there is time for.

    Where the run would use GPUs and this machine has none, it loads the model and measures nothing.
    """

    def __init__(self, config: JobConfig, crew: _Crew, started: float, folder: Path) -> None:
        self._deadline = started + config.run.dry_run_seconds
        self._folder = folder
        self._can_measure = crew.device_type == "cpu" or torch.cuda.is_available()
        device_type = crew.device_type if self._can_measure else "cpu"
        self._config = config
        self._calibration = Calibration(config.encoding, device_type, crew.num_here)

    @property
    def pid(self) -> int:
        """Of the encoder's process."""
        return self._calibration.pid

    def measure(self, look: Look, scale: Scale) -> _Speeds | None:
        """None where the encoder was not ready in time; no seconds where it cannot be measured here.

        Raises:
            UsageError: the model cannot be loaded.
        """
        facts = self._calibration.facts(self._deadline)
        if facts is None:
            return None
        if not self._can_measure:
            return _Speeds(facts=facts, s_per_clip={}, measured=())
        costly_first = sorted(scale.clips, key=lambda bucket: -scale.clips[bucket] * bucket.num_bytes)
        tries = [look.frames[bucket] for bucket in costly_first[:_MOST_MEASURED] if bucket in look.frames]
        if tries and tries[0][0].nbytes > _PROBE.num_bytes:
            # A small piece of the clips tells whether there is time for whole ones.
            piece = [f[: _PROBE.num_frames, : _PROBE.height_px, : _PROBE.width_px] for f in tries[0]]
            tries.insert(0, piece)
        found: dict[Bucket, float] = {}
        for number, frames in enumerate(tries):
            num_frames, height_px, width_px, _ = frames[0].shape
            shape = Bucket(width_px=width_px, height_px=height_px, num_frames=num_frames)
            left_s = self._deadline - time.monotonic()
            if found and 2 * _scaled(found, shape) > left_s:
                continue
            patience_s = left_s / (len(tries) - number + bool(self._config.column_sets))
            seconds = self._calibration.seconds_per_clip(frames, self._folder, patience_s, self._deadline)
            if seconds is None:
                break
            found[shape] = seconds
        return _Speeds(
            facts=facts,
            s_per_clip={bucket: _scaled(found, bucket) for bucket in scale.clips} if found else {},
            measured=sorted(found),
            embedding=self._embedding(look) if found and self._config.column_sets else None,
        )

    def _embedding(self, look: Look) -> EmbeddingFacts | None:
        texts = {text for shard in look.shards for text in texts_of(shard, self._config.text.text_columns)}
        frames = max(look.frames.values(), key=len)
        left_s = self._deadline - time.monotonic()
        return self._calibration.embedding(
            self._config.text,
            self._config.image,
            sorted(texts)[:_MOST_TEXTS] or [""],
            [clip[0] for clip in frames],
            self._folder,
            left_s,
            self._deadline,
        )

    def __enter__(self) -> _Stopwatch:
        return self

    def __exit__(self, *_: object) -> None:
        self._calibration.close()


def _scaled(measured: Mapping[Bucket, float], bucket: Bucket) -> float:
    """Seconds of a bucket: as measured, else of the nearest that was, by pixels."""
    nearest = min(measured, key=lambda other: abs(math.log(other.num_bytes / bucket.num_bytes)))
    return measured[nearest] * bucket.num_bytes / nearest.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Times:
    """Seconds of a run, and what they follow from."""

    encode_s: float
    decode_cpu_s: float
    start_s: float
    busy_s: Mapping[str, float]  # by what limits it, without the start
    embed_s: float = 0.0

    @property
    def in_actors_s(self) -> float:
        """Of the threads that encode, which embed as well."""
        return self.encode_s + self.embed_s

    @property
    def limited_by(self) -> str:
        return max(self.busy_s, key=lambda name: self.busy_s[name])

    @property
    def duration_s(self) -> float:
        return self.start_s + self.busy_s[self.limited_by]


def _times(config: JobConfig, crew: _Crew, look: Look, scale: Scale, speeds: _Speeds) -> _Times:
    encode_s = 0.0
    for bucket, number in scale.clips.items():
        size = batch_size(bucket, config.encoding.batch_frames, crew.device_type)
        # The last batch of a shard is filled up, on the average to the half.
        filled = number + min(number, scale.num_shards) * (size - 1) / 2
        encode_s += filled * speeds.s_per_clip[bucket]
    embed_s = 0.0
    if speeds.embedding is not None:
        num_texts = _num_texts(config, scale)
        embed_s = num_texts * speeds.embedding.s_per_text + scale.num_clips * speeds.embedding.s_per_frame
    decode_cpu_s = look.cpu_s * scale.factor
    # An actor embeds in the thread that encodes.
    in_actors_s = encode_s + embed_s
    on_cores_s = decode_cpu_s + (in_actors_s * crew.cpus if crew.device_type == "cpu" else 0.0)
    # A shard is encoded by one actor: of three shards and two actors one waits in the end.
    rounds = math.ceil(scale.num_shards / crew.num_actors) * crew.num_actors / scale.num_shards
    busy_s = {
        "encoding": rounds * in_actors_s / crew.encoders,
        "decoding": rounds * decode_cpu_s / min(crew.num_actors * crew.decode_processes, crew.num_cores),
        "cores": on_cores_s / crew.num_cores,
    }
    start_s = _RAY_START_S * speeds.facts.slowdown + speeds.facts.start_s + look.start_s * crew.decode_processes
    if speeds.embedding is not None:
        start_s += speeds.embedding.load_s
    return _Times(encode_s=encode_s, embed_s=embed_s, decode_cpu_s=decode_cpu_s, start_s=start_s, busy_s=busy_s)


def _num_texts(config: JobConfig, scale: Scale) -> float:
    """Texts that are embedded: of each shard the distinct ones, as far as they were seen."""
    if config.text.text_encoder is None:
        return 0.0
    return scale.total(lambda shard: len(texts_of(shard, config.text.text_columns)))


def _requests(
    work: Work, todo: Sequence[ShardSpec], look: Look, scale: Scale, num_files: float
) -> dict[str, dict[str, int]]:
    found = {"output": requests_to_output(replace(work, num_files=num_files))}
    sent: Counter[str] = Counter()
    if not work.num_plans and all(spec.source_uri.startswith("s3://") for spec in todo):
        sizes = [spec.source_size_bytes or 0 for spec in todo]
        per_video = sum(sizes) / max(1.0, scale.num_videos)
        sent += requests_of_tars(sizes) + requests_of_plan(work, sizes[0], per_video)
    elif work.num_plans and todo[0].source_uri.startswith("s3://"):
        sent += requests_of_plan(work, None, 0.0)
    for kind, number in look.file_requests.items():
        sent[kind] += round(number * scale.factor)
    if sent:
        found["input"] = {kind: sent[kind] for kind in KINDS}
    return found


def _summed(
    config: JobConfig,
    crew: _Crew,
    todo: Sequence[ShardSpec],
    look: Look,
    scale: Scale,
    speeds: _Speeds | None,
    sizes: Sizes | None,
    work: Work,
) -> Estimate:
    times = None
    if speeds is not None and scale.is_known and speeds.s_per_clip.keys() == scale.clips.keys():
        times = _times(config, crew, look, scale, speeds)
    clips_range = scale.range_of(lambda shard: shard.buckets.total())
    duration_range_s = price = price_range = actor_hours = gpu_hours = num_decode_cores = None
    if times is not None:
        actor_hours = times.duration_s * crew.num_actors / 3600
        gpu_hours = actor_hours * crew.gpus
        if clips_range is not None and scale.num_clips:
            rest_s = times.duration_s - times.start_s
            low_s, high_s = (times.start_s + rest_s * number / scale.num_clips for number in clips_range)
            duration_range_s = (round(low_s, 1), round(high_s, 1))
        if config.run.gpu_hour_price is not None:
            price = config.run.gpu_hour_price * (gpu_hours if crew.gpus else actor_hours)
            if duration_range_s is not None:
                low, high = (round(price * s / times.duration_s, 2) for s in duration_range_s)
                price_range = (low, high)
        if times.encode_s:
            num_decode_cores = times.decode_cpu_s / times.in_actors_s * crew.encoders / crew.num_actors
    found = Estimate(
        num_shards=scale.num_shards,
        num_shards_seen=len(look.shards),
        num_videos_seen=scale.num_videos_seen,
        num_bytes_seen=look.num_bytes,
        is_whole=scale.is_whole,
        num_videos=_whole(scale, scale.num_videos),
        num_videos_range=_whole_range(scale.range_of(lambda shard: shard.num_videos)),
        num_videos_rejected=_whole(scale, scale.total(lambda shard: shard.num_videos_rejected)),
        num_clips=_whole(scale, scale.num_clips),
        num_clips_range=_whole_range(clips_range),
        clips={str(bucket): round(number) for bucket, number in scale.clips.items()},
        num_frames=_whole(scale, sum(bucket.num_frames * number for bucket, number in scale.clips.items())),
        video_hours=round(scale.total(lambda shard: shard.seconds) / 3600, 6) if scale.is_known else None,
        rejections=_rejections(look, scale),
        num_bytes_out=None if sizes is None else round(sizes.num_bytes),
        num_files_out=None if sizes is None else round(sizes.num_files),
        requests=_requests(work, todo, look, scale, 0.0 if sizes is None else sizes.num_files),
        device=crew.device_type,
        device_name=None if times is None or speeds is None else speeds.facts.device_name,
        num_actors=crew.num_actors,
        cpus_per_actor=crew.cpus,
        gpus_per_actor=crew.gpus,
        encode_s_per_clip={} if speeds is None else {str(b): round(s, 4) for b, s in speeds.s_per_clip.items()},
        measured=() if speeds is None else tuple(str(bucket) for bucket in speeds.measured),
        encode_s=None if times is None else round(times.encode_s, 1),
        **_embeddings(config, scale, speeds, times),
        decode_cpu_s=round(look.cpu_s * scale.factor, 1) if scale.is_known else None,
        start_s=None if times is None else round(times.start_s, 1),
        duration_s=None if times is None else round(times.duration_s, 1),
        duration_range_s=duration_range_s,
        limited_by=None if times is None else times.limited_by,
        num_decode_cores=None if num_decode_cores is None else round(num_decode_cores, 2),
        actor_hours=None if actor_hours is None else round(actor_hours, 4),
        gpu_hours=None if gpu_hours is None else round(gpu_hours, 4),
        price=None if price is None else round(price, 2),
        price_range=price_range,
    )
    advice = _advice(config, crew, todo, look, scale, speeds, times, found)
    return replace(found, advice=tuple(advice), notes=tuple(_notes(config, crew, look, scale, found)))


def _embeddings(config: JobConfig, scale: Scale, speeds: _Speeds | None, times: _Times | None) -> dict[str, Any]:
    """The fields of `Estimate` that tell of them."""
    if not config.column_sets:
        return {"num_texts": 0, "embed_s": 0.0, "num_bytes_embeddings": 0}
    num_texts = _num_texts(config, scale)
    embed_s = num_bytes = None
    if speeds is not None and speeds.embedding is not None and times is not None:
        cost = speeds.embedding
        embed_s = round(times.embed_s, 3)
        num_bytes = round(num_texts * cost.bytes_per_text + scale.num_clips * cost.bytes_per_frame)
    return {"num_texts": _whole(scale, num_texts), "embed_s": embed_s, "num_bytes_embeddings": num_bytes}


def _whole(scale: Scale, number: float) -> int | None:
    return round(number) if scale.is_known else None


def _whole_range(limits: tuple[float, float] | None) -> tuple[int, int] | None:
    return None if limits is None else (math.floor(limits[0]), math.ceil(limits[1]))


def _rejections(look: Look, scale: Scale) -> dict[str, Mapping[str, object]]:
    counts: Counter[str] = Counter()
    for shard in look.shards:
        counts.update(shard.reasons)
    return {
        reason: {
            "num": round(number * scale.factor),
            "num_seen": number,
            "meaning": REASONS[reason],
            "example": look.examples[reason],
        }
        for reason, number in counts.most_common()
    }


# --- what it says ---------------------------------------------------------------------------------------------------


def _advice(
    config: JobConfig,
    crew: _Crew,
    todo: Sequence[ShardSpec],
    look: Look,
    scale: Scale,
    speeds: _Speeds | None,
    times: _Times | None,
    found: Estimate,
) -> Iterator[str]:
    if times is not None:
        if times.duration_s - times.start_s > _SHORT_RUN_S:
            yield from _advice_on_speed(crew, times, found.num_decode_cores)
        yield from _advice_on_shards(crew, todo, scale, times)
    yield from _advice_on_buckets(config, look, scale)
    yield from _advice_on_regions(config, todo, look.source_uris)
    if scale.num_videos and found.num_videos_rejected is not None:
        share = found.num_videos_rejected / scale.num_videos
        if share > config.run.max_rejected_share:
            yield (
                f"{share:.0%} of the videos would be rejected, above --max-rejected-share "
                f"{config.run.max_rejected_share:g}: the run would end with exit code 5"
            )
    if speeds is not None and not speeds.facts.model.is_trained:
        yield f"the model {speeds.facts.model.model!r} is untrained: its latents mean nothing"
    if found.num_bytes_out is not None and "://" not in config.run.output:
        folder = next(
            path
            for path in (Path(config.run.output).absolute(), *Path(config.run.output).absolute().parents)
            if path.exists()
        )
        free = shutil.disk_usage(folder).free
        num_bytes = found.num_bytes_out + (found.num_bytes_embeddings or 0)
        if num_bytes > free:
            yield f"the output needs {size_text(num_bytes)} and {folder} has {size_text(free)} free"


def _advice_on_speed(crew: _Crew, times: _Times, cores: float | None) -> Iterator[str]:
    encoding_s, decoding_s = times.busy_s["encoding"], max(times.busy_s["decoding"], times.busy_s["cores"])
    if crew.device_type == "cpu":
        encode_cpu_s = times.in_actors_s * crew.cpus
        if times.decode_cpu_s > _BOUND_RATIO * encode_cpu_s:
            share = times.decode_cpu_s / (times.decode_cpu_s + encode_cpu_s)
            yield (
                f"decoding takes {share:.0%} of the computing: smaller sources (fewer pixels, shorter groups of "
                "pictures) would help more than faster encoders"
            )
    elif cores is not None and decoding_s > _BOUND_RATIO * encoding_s:
        yield (
            f"decoding holds the encoders up: each actor's takes {cores:.1f} cores and it has "
            f"{min(crew.decode_processes, crew.num_cores / crew.num_actors):g}, so encoders would wait "
            f"{1 - encoding_s / decoding_s:.0%} of the time; give machines with more cores for each GPU and "
            f"--cpus-per-actor {math.ceil(cores)}, or make the sources smaller first"
        )


def _advice_on_shards(crew: _Crew, todo: Sequence[ShardSpec], scale: Scale, times: _Times) -> Iterator[str]:
    # What one actor spends on a shard.
    busy_s = times.duration_s - times.start_s
    shard_s = busy_s * crew.num_actors / scale.num_shards
    is_slice = todo[0].kind == "slice"
    videos_per_s = scale.num_videos_per_shard / shard_s if shard_s else 0.0

    def remedy(wanted_s: float) -> str:
        wanted = max(1, round(videos_per_s * wanted_s))
        flag = f"--samples-per-shard {wanted} (slices that are planned stay as they are)"
        return flag if is_slice else f"pack the tars anew with about {wanted:,} samples each"

    if scale.num_shards < crew.num_wanted and busy_s > _SHORT_RUN_S:
        yield (
            f"there are {scale.num_shards:,} shards for {crew.num_wanted:,} encoders, so that "
            f"{crew.num_wanted - scale.num_shards:,} have nothing to do: {remedy(busy_s / crew.num_wanted / 4)}"
        )
    elif shard_s > _LONGEST_SHARD_S:
        yield (
            f"a shard takes an actor {duration_text(shard_s)}, and that much is lost with each machine that goes: "
            f"{remedy(_LONGEST_SHARD_S / 4)}"
        )
    elif shard_s < _SHORTEST_SHARD_S and scale.num_shards > _FEW_SHARDS:
        yield (
            f"a shard takes an actor {shard_s:.1f} s, so that requests, small files and the one driver weigh more than "
            f"they must: {remedy(60.0)}"
        )
    if scale.num_shards > _MANY_SHARDS:
        yield f"{scale.num_shards:,} shards are more than one driver holds well ({_MANY_SHARDS:,}): make them larger"


def _advice_on_buckets(config: JobConfig, look: Look, scale: Scale) -> Iterator[str]:
    if not scale.is_whole and scale.num_videos_seen < _ENOUGH_VIDEOS:
        return
    shapes = {(bucket.width_px, bucket.height_px) for bucket in config.encoding.buckets if bucket.num_frames > 1}
    empty = [
        bucket
        for bucket in config.encoding.buckets
        if bucket not in scale.buckets
        and bucket.media_kind in look.kinds
        # Those for images come by themselves where none is named.
        and (bucket.num_frames > 1 or (bucket.width_px, bucket.height_px) not in shapes)
    ]
    if empty:
        how_many = "all" if scale.is_whole else "those seen"
        yield (
            f"--buckets: of {how_many} {scale.num_videos_seen} videos and images none went into "
            f"{', '.join(map(str, empty))}; a video takes the bucket nearest in shape that it fills at --fps"
        )


def _advice_on_regions(config: JobConfig, todo: Sequence[ShardSpec], seen_uris: Sequence[str]) -> Iterator[str]:
    uris = seen_uris if todo[0].kind == "slice" else [spec.source_uri for spec in todo[:1]]
    buckets = {"/".join(uri.split("/")[:3]): None for uri in uris if uri.startswith("s3://")}
    there = region_of(config.run.output)
    for bucket in buckets if there is not None else ():
        here = region_of(bucket)
        if here is not None and here != there:
            yield (
                f"the input {bucket} lies in {here} and the output in {there}: stores charge for what crosses regions; "
                "run in the input's region, and put the output there too"
            )


def _notes(config: JobConfig, crew: _Crew, look: Look, scale: Scale, found: Estimate) -> Iterator[str]:
    more = f"give more --dry-run-seconds than {config.run.dry_run_seconds:g}"
    if not scale.num_videos_seen:
        yield f"no video could be looked at in that time: {more}"
    elif look.ran_out:
        yield f"the time was up before all that was drawn had been seen; to be more certain, {more}"
    if look.num_passed_over:
        yield f"{look.num_passed_over} large files were passed over, and are taken to be like the others"
    if found.duration_s is None and crew.device_type == "cuda" and not torch.cuda.is_available():
        yield "the encoders run on GPUs and this machine has none, so time is not known: run this on one that has"
    elif found.duration_s is None:
        yield f"the encoder was not ready or not done in that time, so the run's is not known: {more}"
    elif not found.clips.keys() <= set(found.measured):
        scaled = ", ".join(bucket for bucket in found.clips if bucket not in found.measured)
        yield f"there was no time to encode {scaled}: scaled by pixels from {', '.join(found.measured)}"
    if config.run.num_actors is not None and crew.num_actors > crew.num_here:
        yield f"{crew.num_actors} actors are more than fit here; the others are taken to be on machines like this one"
    if config.encoding.compile:
        yield "the encoder was measured as it is, without torch.compile (--compile), which also starts later"
    if config.run.cuda_graphs:
        yield "the encoder was measured without CUDA graphs (--cuda-graphs)"
    if config.run.quality_share:
        yield f"decoding {config.run.quality_share:.2%} of the clips back (--quality-share) is not in the time"
    if found.embed_s is None:
        yield f"there was no time to embed captions and first frames: they are in neither time nor size; {more}"
