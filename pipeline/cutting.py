"""The rules by which a video becomes clips: which bucket, which frames, which part of the picture.

Pure functions of numbers; not where anything is decoded or measured. The decode child applies them to what it finds in
a file; `decode` passes `choose_bucket` and `clip_spans` on. Every rule here changes bytes of the output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import RejectionError
from pipeline.records import Bucket, MediaKind

# Two aspect ratios are the same when their logarithms differ by less than float rounding can explain.
_SAME_ASPECT = 1e-9
# Presentation times are sums of binary fractions; an instant this close after a frame's time has reached it.
_TIME_ROUNDING_S = 1e-6
# A clock of milliseconds rounds; slower ones (AVI's ticks once a frame) are exact.
_COARSE_CLOCK_S = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class CutRules:
    """The part of the encoding configuration that decides which pixels a clip shows."""

    buckets: tuple[Bucket, ...]
    fps: float | None  # None: every frame as it comes
    clips_per_video: int | None
    clip_stride: int | None
    upscale: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """When the frames of a video are shown.

    Attributes:
        times_s: `(n,)` float64, strictly rising, seconds since the first frame (times_s[0] = 0).
        end_s: when the last frame that is there ends.
        promised_end_s: when the last frame ends by the header; more than `end_s` where the file is cut short.
        num_promised: frames by the header; more than n where the file is cut short.
        tick_s: the container's clock; where it is a millisecond (Matroska) or less, times are known to half of it.
    """

    times_s: npt.NDArray[np.float64]
    end_s: float
    promised_end_s: float
    num_promised: int
    tick_s: float

    def num_instants(self, fps: float | None) -> int:
        """Frames that the whole video gives at `fps`; None: as many as it has."""
        return self.num_promised if fps is None else self._num_instants_before(self.promised_end_s, fps)

    def frames_at(self, start: int, num_frames: int, fps: float | None) -> npt.NDArray[np.int64]:
        """Index of the nearest frame not later than each of the instants `start`, `start + 1`, ... over `fps`.

        Returns:
            `(num_frames,)` int64, never falling; a frame stands more than once where the source is slower than `fps`.

        Raises:
            RejectionError: `frames_missing`, the file ends before the header says so and the span is not whole.
        """
        num_there = len(self.times_s) if fps is None else self._num_instants_before(self.end_s, fps)
        num_missing = start + num_frames - num_there
        if num_missing > 0:
            raise RejectionError(
                "frames_missing",
                f"the header promises {self.num_promised} frames in {self.promised_end_s:.3f} s, the file holds "
                f"{len(self.times_s)} in {self.end_s:.3f} s; {min(num_missing, num_frames)} of the clip's "
                f"{num_frames} frames lie past that",
            )
        numbers = np.arange(start, start + num_frames, dtype=np.int64)
        if fps is None:
            return numbers
        return np.searchsorted(self.times_s, numbers / fps + self._tolerance_s, side="right").astype(np.int64) - 1

    @property
    def _tolerance_s(self) -> float:
        return min(max(_TIME_ROUNDING_S, self.tick_s / 2), _COARSE_CLOCK_S / 2)

    def _num_instants_before(self, end_s: float, fps: float) -> int:
        return max(1, math.ceil((end_s - self._tolerance_s) * fps))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cover:
    """How a picture is resized to cover a bucket and where the bucket is cut out of it.

    Attributes:
        width_px, height_px: of the resized picture; each at least the bucket's, one of them equal to it.
        left_px, top_px: where the bucket lies in the resized picture.
        crop: (x, y, width, height) of what the bucket shows, in pixels of the source picture.
    """

    width_px: int
    height_px: int
    left_px: int
    top_px: int
    crop: tuple[int, int, int, int]


def cover(bucket: Bucket, width_px: int, height_px: int) -> Cover:
    """Resize to cover, crop the centre: the geometry for a source picture of this size."""
    scale = max(bucket.width_px / width_px, bucket.height_px / height_px)
    resized_width_px = max(bucket.width_px, round(width_px * scale))
    resized_height_px = max(bucket.height_px, round(height_px * scale))
    crop_width_px = min(width_px, max(1, round(bucket.width_px / scale)))
    crop_height_px = min(height_px, max(1, round(bucket.height_px / scale)))
    return Cover(
        width_px=resized_width_px,
        height_px=resized_height_px,
        left_px=(resized_width_px - bucket.width_px) // 2,
        top_px=(resized_height_px - bucket.height_px) // 2,
        crop=((width_px - crop_width_px) // 2, (height_px - crop_height_px) // 2, crop_width_px, crop_height_px),
    )


def choose_bucket(
    buckets: Sequence[Bucket], kind: MediaKind, width_px: int, height_px: int, num_instants: int, upscale: bool
) -> Bucket:
    """Of the buckets nearest in aspect ratio, the longest that the video fills; images take buckets of one frame.

    Nearness is the difference of the logarithms, so that 2:1 is as far from 1:1 as 1:2 is. Among buckets of equal
    aspect, those that the picture covers without being enlarged come first; of equal length, the largest of those,
    or, where `upscale` enlarges, the one that needs the least.

    Args:
        num_instants: frames that the video gives at the asked rate; ignored for images.

    Raises:
        RejectionError: `no_bucket`, `too_small` or `too_short`.
    """
    of_kind = [bucket for bucket in buckets if bucket.media_kind == kind]
    if not of_kind:
        raise RejectionError("no_bucket", f"no bucket for a {kind} is configured: {_names(buckets)}")
    aspect = math.log(width_px / height_px)
    distances = [abs(math.log(bucket.width_px / bucket.height_px) - aspect) for bucket in of_kind]
    nearest = [b for b, d in zip(of_kind, distances, strict=True) if d <= min(distances) + _SAME_ASPECT]
    covered = [b for b in nearest if b.width_px <= width_px and b.height_px <= height_px]
    if not covered and not upscale:
        raise RejectionError(
            "too_small", f"the picture is {width_px}x{height_px} px, smaller than {_names(nearest)}; see --upscale"
        )
    usable = nearest if upscale else covered
    filled = usable if kind == "image" else [bucket for bucket in usable if bucket.num_frames <= num_instants]
    if not filled:
        raise RejectionError(
            "too_short", f"the video gives {num_instants} frames at --fps, too few for {_names(usable)}"
        )

    def preference(bucket: Bucket) -> tuple[int, bool, int, Bucket]:
        area_px, is_covered = bucket.width_px * bucket.height_px, bucket in covered
        return bucket.num_frames, is_covered, area_px if is_covered else -area_px, bucket

    return max(filled, key=preference)


def clip_spans(
    num_instants: int, num_frames: int, clip_stride: int | None = None, clips_per_video: int | None = None
) -> npt.NDArray[np.int64]:
    """First instant of each clip: back to back unless a stride is given, spread evenly where only some are taken.

    Args:
        num_instants: frames that the video gives at the asked rate.
        num_frames: frames of a clip.
        clip_stride: frames from one clip's start to the next; None: `num_frames`.
        clips_per_video: at most this many, chosen among the same starts; a single one comes from the middle.

    Returns:
        int64 starts, rising; empty when not even one clip fits.
    """
    if num_instants < num_frames:
        return np.empty(0, dtype=np.int64)
    starts = np.arange(0, num_instants - num_frames + 1, clip_stride or num_frames, dtype=np.int64)
    if clips_per_video is None or clips_per_video >= len(starts):
        return starts
    if clips_per_video == 1:
        return starts[[(len(starts) - 1) // 2]]
    last, gaps = len(starts) - 1, clips_per_video - 1
    # Whole-number rounding: a float product could land on another clip on another machine.
    return starts[[(2 * number * last + gaps) // (2 * gaps) for number in range(clips_per_video)]]


def _names(buckets: Sequence[Bucket]) -> str:
    return ", ".join(str(bucket) for bucket in buckets)
