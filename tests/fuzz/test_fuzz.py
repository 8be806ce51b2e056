"""A few mutants of every kind on every run; `run.py` runs as many as one likes, by the same judges."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fuzz.judges import Tally, VideoJudge, judge_tars, judge_videos, source_video
from fuzz.mutants import VIDEO_KINDS, VideoMutant, encoded, number_of, numbered_frames, video_mutant

from pipeline.records import Clip

SEED = 0


@pytest.fixture(scope="module")
def judge() -> Iterator[VideoJudge]:
    made = VideoJudge()
    yield made
    made.close()


def test_damaged_videos_are_recorded_whole_or_rejected_and_never_with_a_frame_twice_or_missing(
    judge: VideoJudge,
) -> None:
    tally = Tally()
    judge_videos(judge, SEED, 0, 60, tally)
    assert tally.violations == []
    assert tally.counts["videos"] == 60
    assert tally.counts["clips with a gap"] == 0, tally.notes
    # These mutations hit what somebody wrote a checksum for in no container: measured, so that a change is seen.
    assert tally.counts["clips with wrong pixels"] <= 12, tally.notes
    assert tally.counts["videos that end early without a trace"] == 0, tally.notes
    assert tally.counts["rejected"] > 10
    assert tally.counts["clips recorded"] > 100
    assert not {"decoder_crash", "timeout", "out_of_memory"} & tally.reasons.keys()


def test_mutants_that_once_lost_frames_without_a_word_are_told_of_now(judge: VideoJudge) -> None:
    """Cuts among frames that need each other, a cluster twice, no key frame, a damaged index, two frames at once."""
    tally = Tally()
    judge.judge((video_mutant(1, number) for number in (88, 264, 268, 325, 400, 409, 412)), tally)
    assert tally.violations == []
    assert (tally.counts["videos"], tally.counts["videos recorded whole"]) == (7, 0)
    assert tally.reasons.keys() == {"frames_missing"}
    assert tally.counts["clips with a gap"] == 0, tally.notes


def test_damaged_tars_and_hostile_texts_lose_no_sample_without_a_word(tmp_path: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    tally = Tally()
    judge_tars(SEED, 0, 100, tmp_path, tally)
    assert tally.violations == []
    assert tally.counts["samples recorded"] > 400
    assert {"bad_caption", "bad_metadata", "bad_member", "duplicate_key", "damaged_shard", "digest_mismatch"} <= set(
        tally.reasons
    )
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_mutants_are_the_same_whenever_they_are_made() -> None:
    assert video_mutant(3, 17).data == video_mutant(3, 17).data
    assert video_mutant(3, 17).data != video_mutant(4, 17).data
    assert len({video_mutant(3, number).container for number in range(len(VIDEO_KINDS))}) == 5


def test_the_judge_sees_frames_that_are_lost_repeated_or_other_ones(judge: VideoJudge) -> None:
    """In files that are whole: the losses were there before they were encoded, so that only the judge can tell."""
    honest = numbered_frames()
    last = len(honest)
    assert [number_of(frame) for frame in honest] == list(range(last))
    assert number_of(np.full_like(honest[0], 128)) is None
    kinds = {
        "whole": list(range(last)),
        "lost": [*range(12), *range(13, last)],
        "twice": [*range(30), 29, *range(30, last)],
        "short": list(range(last - 9)),
    }
    tallies = {}
    for number, (kind, kept) in enumerate(kinds.items()):
        tallies[kind] = Tally()
        data = encoded(honest[kept], "mp4", "mjpeg")
        judge.judge([VideoMutant(number, "mp4", "mjpeg", kind, data)], tallies[kind])
    negative = encoded(255 - honest, "mp4", "mjpeg")
    tallies["other"] = Tally()
    judge.judge([VideoMutant(9, "mp4", "mjpeg", "other", negative)], tallies["other"])
    assert not [violation for tally in tallies.values() for violation in tally.violations]
    assert tallies["whole"].counts["videos recorded whole"] == 1
    assert tallies["whole"].notes == []
    assert tallies["lost"].counts["clips with a gap"] == 1
    assert tallies["short"].counts["videos that end early without a trace"] == 1
    assert tallies["other"].counts["clips with wrong pixels"] == 5
    # A file may show a picture twice. A clip that has one twice which its file shows once is the pipeline's doing.
    assert tallies["twice"].counts["clips with wrong pixels"] == 1
    data = encoded(honest, "mp4", "mjpeg")
    clip = next(iter(judge._pool.decode([source_video(data, "one")])))
    assert isinstance(clip, Clip)
    frames = clip.frames.copy()
    frames[5] = frames[4]
    tally = Tally()
    mutant = VideoMutant(0, "mp4", "mjpeg", "none", data)
    judge._judge_clip(mutant, replace(clip, frames=frames), judge._reference(mutant), tally)
    assert [violation.rpartition(": ")[2] for violation in tally.violations] == ["a frame twice"]
