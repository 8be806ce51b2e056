"""The types that flow: accounts that balance, closed lists, and errors that cross process borders."""

from __future__ import annotations

import pickle

import pytest

from pipeline import errors
from pipeline.records import REASONS, ClipFailure, ShardCounts

_COUNTS = {
    "num_videos": 3,
    "num_videos_ok": 2,
    "num_videos_rejected": 1,
    "num_clips": 5,
    "num_records": 4,
    "num_clips_rejected": 1,
    "num_frames": 68,
}


@pytest.mark.parametrize("name", ["num_videos", "num_videos_rejected", "num_records", "num_clips"])
def test_accounts_that_do_not_balance_cannot_be_built(name: str) -> None:
    ShardCounts(**_COUNTS)
    with pytest.raises(AssertionError, match="do not balance"):
        ShardCounts(**{**_COUNTS, name: _COUNTS[name] + 1})


def test_a_reason_outside_the_closed_list_cannot_be_recorded() -> None:
    for reason in [*REASONS]:
        ClipFailure(key="a", clip_index=None, step="decode", reason=reason, message="m", source_uri="u")
    with pytest.raises(AssertionError, match="closed list"):
        ClipFailure(key="a", clip_index=None, step="decode", reason="mood", message="m", source_uri="u")


@pytest.mark.parametrize(
    "error",
    [
        errors.UsageError("wrong flag"),
        errors.ConfigMismatchError("differs", {"fps": (8.0, 4.0)}),
        errors.StorageError("denied"),
        errors.StorageNotFoundError("no bucket"),
        errors.StorageUnavailableError("no answer"),
        errors.CredentialsExpiredError("too old"),
        errors.ObjectExistsError("there"),
        errors.OutcomeUnknownError("who knows"),
        errors.DamagedObjectError("short"),
        errors.RejectionError("too_small", "8 px"),
        errors.DecodeChildError("gone"),
    ],
)
def test_every_error_survives_pickling_with_its_message(error: errors.LatentmillError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
