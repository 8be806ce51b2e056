"""What must hold for every mutant, whatever it is: it is recorded or rejected, and what is recorded is whole and right.

Not tests: `test_fuzz` runs a few mutants in them, `run` many. A violation is a sentence with the mutant's number; what
nobody could notice without a digest (other pixels, other captions) is counted.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import decord
import numpy as np
from fuzz.mutants import (
    NUM_FRAMES,
    TarMutant,
    VideoMutant,
    clean_samples,
    clean_video,
    number_of,
    tar_file,
    tar_mutant,
    video_mutant,
)

from pipeline.config import DecodeLimits, EncodingConfig, SourceConfig, parse_buckets
from pipeline.decode import DecodePool
from pipeline.plan import plan_shards
from pipeline.records import Clip, ClipFailure, SourceVideo
from pipeline.source import iterate_videos
from pipeline.storage import open_store

CLIP_FRAMES = 9
ENCODING = EncodingConfig(model="small", buckets=parse_buckets(f"128x64x{CLIP_FRAMES}"), fps=None)
LIMITS = DecodeLimits(decode_timeout_s=20.0, decode_memory_bytes=1 << 30, max_decode_cpu_s=60.0)
# Mean difference in levels of a right frame from another decoder or scaler.
_SAME_LEVELS = 6.0


@dataclass(slots=True)
class Tally:
    """What came of many mutants. Counts add up over several runs."""

    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "counts": dict(sorted(self.counts.items())),
            "reasons": dict(sorted(self.reasons.items())),
            "violations": self.violations,
            "notes": self.notes,
        }

    @staticmethod
    def from_json(stored: dict[str, Any]) -> Tally:
        return Tally(Counter(stored["counts"]), Counter(stored["reasons"]), stored["violations"], stored["notes"])


def source_video(data: bytes, key: str) -> SourceVideo:
    descriptor = os.memfd_create("mutant", os.MFD_CLOEXEC)
    os.write(descriptor, data)
    return SourceVideo(
        key=key,
        media_fd=descriptor,
        num_bytes=len(data),
        extension="mp4",
        media_kind="video",
        caption="",
        fields={},
        source_uri=f"mutant {key}",
    )


class VideoJudge:
    """Decodes mutants as a shard does, one after another through one pool, and judges what comes out."""

    def __init__(self, num_processes: int = 1) -> None:
        self._pool = DecodePool(ENCODING, LIMITS, num_processes)
        self._clean: dict[tuple[str, str], np.ndarray] = {}

    def close(self) -> None:
        self._pool.close()

    def judge(self, mutants: Iterable[VideoMutant], tally: Tally) -> None:
        waiting: dict[str, VideoMutant] = {}

        def videos() -> Iterator[SourceVideo]:
            for mutant in mutants:
                waiting[str(mutant.number)] = mutant
                yield source_video(mutant.data, str(mutant.number))

        entries: dict[str, list[Clip | ClipFailure]] = {}
        for entry in self._pool.decode(videos()):
            entries.setdefault(entry.key, []).append(entry)
            for key in [key for key in entries if key != entry.key]:
                self._judge_one(waiting.pop(key), entries.pop(key), tally)
        for key, found in entries.items():
            self._judge_one(waiting.pop(key), found, tally)
        tally.violations += [f"{mutant.name}: neither recorded nor rejected" for mutant in waiting.values()]

    def _reference(self, mutant: VideoMutant) -> np.ndarray:
        kind = (mutant.container, mutant.codec)
        if kind not in self._clean:
            clips = list(self._pool.decode([source_video(clean_video(*kind), "clean")]))
            frames = np.concatenate([clip.frames for clip in clips if isinstance(clip, Clip)])
            assert [number_of(frame) for frame in frames] == list(range(NUM_FRAMES)), f"{kind} is not what it should be"
            self._clean[kind] = frames
        return self._clean[kind]

    def _judge_one(self, mutant: VideoMutant, entries: list[Clip | ClipFailure], tally: Tally) -> None:
        tally.counts["videos"] += 1
        clips = [entry for entry in entries if isinstance(entry, Clip)]
        failures = [entry for entry in entries if isinstance(entry, ClipFailure)]
        tally.reasons.update(failure.reason for failure in failures)
        indices = [entry.clip_index for entry in entries]
        if indices != list(range(len(entries))) and (len(entries) != 1 or clips):
            tally.violations.append(f"{mutant.name}: entries {indices}")
        tally.counts[
            "videos recorded whole" if not failures else "videos recorded in part" if clips else "rejected"
        ] += 1
        if clips and not failures and len(clips) < NUM_FRAMES // CLIP_FRAMES:
            tally.counts["videos that end early without a trace"] += 1
            tally.notes.append(f"{mutant.name}: {len(clips)} clips")
        reference = self._reference(mutant)
        for clip in clips:
            self._judge_clip(mutant, clip, reference, tally)

    def _judge_clip(self, mutant: VideoMutant, clip: Clip, reference: np.ndarray, tally: Tally) -> None:
        tally.counts["clips recorded"] += 1
        numbers = [number_of(frame) for frame in clip.frames]
        where = f"{mutant.name}, clip {clip.clip_index}, frames {numbers}"
        if np.diff(clip.frame_times_s).min() <= 0:
            tally.violations.append(f"{where}: times that do not rise")
        known = [number for number in numbers if number is not None and number < NUM_FRAMES]
        right = len(known) == len(numbers) and all(
            float(np.abs(frame.astype(np.int16) - reference[number]).mean()) <= _SAME_LEVELS
            for frame, number in zip(clip.frames, known, strict=True)
        )
        if len({frame.tobytes() for frame in clip.frames}) < len(clip.frames) and not _shows(mutant.data, numbers):
            tally.violations.append(f"{where}: a frame twice")
        elif not right or len(set(known)) < len(known):
            # Also an older picture in the place of another: that is what decoders leave there, and call it well.
            tally.counts["clips with wrong pixels"] += 1
            tally.notes.append(f"{where}: wrong pixels")
        elif any(later - earlier != 1 for earlier, later in itertools.pairwise(known)):
            tally.counts["clips with a gap"] += 1
            tally.notes.append(f"{where}: a gap")


def _shows(data: bytes, numbers: list[int | None]) -> bool:
    """Whether one of the decoders, asked for nothing but all pictures, shows these one after the other.

    In the place of a picture that it cannot make out a decoder leaves what its buffer held, another one each time.
    """
    return any(
        _is_alike(shown[start : start + len(numbers)], numbers)
        for shown in (_shown_by_decord(data), _shown_by_av(data))
        for start in range(len(shown) - len(numbers) + 1)
    )


def _is_alike(shown: list[int | None], numbers: list[int | None]) -> bool:
    starts = Counter(number - place for place, number in enumerate(shown) if number is not None)
    first = starts.most_common(1)[0][0] if starts else 0
    in_order = [number == first + place for place, number in enumerate(shown)]
    return shown == numbers or (
        sum(in_order) > len(shown) // 2
        and all(one == other for one, other, is_right in zip(shown, numbers, in_order, strict=True) if is_right)
    )


def _shown_by_decord(data: bytes) -> list[int | None]:
    try:
        reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
        return [number_of(reader[place].asnumpy()) for place in range(len(reader))]
    except decord.DECORDError:
        return []


def _shown_by_av(data: bytes) -> list[int | None]:
    shown: list[int | None] = []
    with suppress(av.error.FFmpegError), av.open(io.BytesIO(data)) as container:
        for packet in container.demux(video=0):
            with suppress(av.error.FFmpegError):  # it goes on behind what it cannot decode
                shown += [number_of(frame.to_ndarray(format="rgb24")) for frame in packet.decode()]
    return shown


def judge_videos(judge: VideoJudge, seed: int, first: int, count: int, tally: Tally) -> None:
    """Judges the mutants `first` to `first + count - 1`."""
    judge.judge((video_mutant(seed, number) for number in range(first, first + count)), tally)


# --- tars -------------------------------------------------------------------------------------------------------------


def judge_tar(mutant: TarMutant, folder: Path, tally: Tally) -> None:
    """Reads one tar as a shard does."""
    path = tar_file(mutant, folder)
    name = f"{mutant.number}: tar, {mutant.mutation}"
    tally.counts["tars"] += 1
    store = open_store(str(folder / "output"))
    try:
        (spec,) = plan_shards(SourceConfig(input=str(path)), store, write=False)
        entries = list(iterate_videos(spec, store, ENCODING, LIMITS))
    except Exception as error:
        tally.violations.append(f"{name}: {type(error).__name__}: {error}")
        return
    finally:
        path.unlink()
    originals = {sample.key: sample for sample in clean_samples()}
    seen: Counter[str] = Counter()
    is_cut = has_other_bytes = False
    for entry in entries:
        seen[entry.key] += 1
        if isinstance(entry, ClipFailure):
            tally.reasons[entry.reason] += 1
            is_cut |= entry.key == "*"
            if not (entry.key.isprintable() and entry.message.encode() and entry.source_uri.encode()):
                tally.violations.append(f"{name}: a rejection that cannot be stored")
            continue
        data = os.pread(entry.media_fd, entry.num_bytes + 1, 0)
        os.close(entry.media_fd)
        tally.counts["samples recorded"] += 1
        stated = entry.fields.get("sha256")
        if stated is not None and hashlib.sha256(data).hexdigest() != stated:
            tally.violations.append(f"{name}: {entry.key} does not have its digest")
        original = originals.get(entry.key)
        if original is None or data != original.media:
            has_other_bytes = True
            tally.counts["samples with other bytes"] += 1
            tally.notes.append(f"{name}: {entry.key} has other bytes")
        elif entry.caption != original.caption:
            entry.caption.encode("utf-8")
            tally.counts["samples with another caption"] += 1
    missing = originals.keys() - seen.keys()
    if mutant.hostile_key is not None:
        # Names may have changed the key; the neighbours must all be there.
        missing -= {mutant.hostile_key}
        if len(entries) < len(originals) or is_cut:
            tally.violations.append(f"{name}: {len(entries)} entries for {len(originals)} samples")
    if missing and not is_cut and has_other_bytes:
        # Zeros from inside a member to the end are a tar that ends behind that member.
        tally.counts["tars that end behind a damaged sample without a trace"] += 1
    elif missing and not is_cut and mutant.mutation == "delete" and len(mutant.data) % 512 == 0:
        # Whole blocks that are gone, headers with them, leave a tar to which nothing is missing.
        tally.counts["tars that lack whole blocks without a trace"] += 1
    elif missing and not is_cut:
        tally.violations.append(f"{name}: {sorted(missing)} are lost without a word")
    if any(count > 1 for key, count in seen.items()) and "twice" not in mutant.mutation and not is_cut:
        tally.counts["tars with a key twice"] += 1


def judge_tars(seed: int, first: int, count: int, folder: Path, tally: Tally) -> None:
    """Judges the tars `first` to `first + count - 1`."""
    for number in range(first, first + count):
        judge_tar(tar_mutant(seed, number), folder, tally)
