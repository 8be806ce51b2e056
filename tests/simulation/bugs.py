"""Planted bugs: ways to write the protocol that look right and are not. A simulation that misses one proves nothing.

Each is a `Habits` of the jobs, a change of the protocol's own functions, or both, for the length of one schedule.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from simulation.actors import Habits
from simulation.world import World

import pipeline.collect
import pipeline.commit as protocol
from pipeline.errors import ObjectExistsError, OutcomeUnknownError, StorageUnavailableError
from pipeline.packed import PackedSort
from pipeline.s3 import S3Store
from pipeline.storage import ObjectStore
from pipeline.store import Backoff

Change = Callable[[World], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Bug:
    """A mistake, and within how many seeds it must be found."""

    habits: Habits = Habits()  # noqa: RUF009 - frozen
    change: Change | None = None
    num_seeds: int = 1000


@contextmanager
def _plain_put_of(world: World, prefix: str, pattern: str = "") -> Iterator[None]:
    """Objects whose keys start so are written without a condition."""
    real = S3Store.put_if_absent

    def put(store: S3Store, key: str, data: bytes) -> None:
        if not key.startswith(prefix) or not re.search(pattern, key):
            return real(store, key, data)
        checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
        store._call("write", key, lambda c: c.put_object(**store._at(key), Body=data, ChecksumSHA256=checksum))

    with patch.object(S3Store, "put_if_absent", put):
        yield


def _create_once(decide: Callable[[ObjectStore, str, bytes, Exception], bytes | None]) -> Change:
    """A create whose outcome is decided by other rules; None: look, as the real one does."""

    def create_once(store: ObjectStore, key: str, data: bytes) -> bytes:
        backoff = Backoff()
        standing = store.find(key)
        while standing is None:
            try:
                store.put_if_absent(key, data)
                return data
            except (ObjectExistsError, OutcomeUnknownError) as error:
                decided = decide(store, key, data, error)
                if decided is not None:
                    return decided
                standing = store.find(key)
                if standing is None and not backoff.pause():
                    raise StorageUnavailableError(str(error)) from error
        return standing

    return lambda _: patch.object(protocol, "create_once", create_once)


def _exists_is_failure(store: ObjectStore, key: str, data: bytes, error: Exception) -> bytes | None:
    if isinstance(error, ObjectExistsError):
        raise error
    return None


def _exists_is_success(store: ObjectStore, key: str, data: bytes, error: Exception) -> bytes | None:
    return data if isinstance(error, ObjectExistsError) else None


def _unknown_is_success(store: ObjectStore, key: str, data: bytes, error: Exception) -> bytes | None:
    return data if isinstance(error, OutcomeUnknownError) else None


def _deletes_on_exists(store: ObjectStore, key: str, data: bytes, error: Exception) -> bytes | None:
    if isinstance(error, ObjectExistsError) and key.startswith("commits/"):
        for file in json.loads(data)["files"]:
            store.delete(file["key"])
    return None


def _judging(judge: Callable[[World, str, set[str], Mapping[str, str]], bool]) -> Change:
    """A collector that lets files go by other rules."""

    def change(world: World) -> AbstractContextManager[object]:
        def judged(
            key: str, records: set[str], named_by: Mapping[str, str], replaced_by: Mapping[str, str]
        ) -> tuple[bool, str]:
            return judge(world, key, records, named_by), ""

        return patch.object(pipeline.collect, "_judged", judged)

    return change


def _is_unnamed(world: World, key: str, records: set[str], named_by: Mapping[str, str]) -> bool:
    return key not in named_by


def _is_old(world: World, key: str, records: set[str], named_by: Mapping[str, str]) -> bool:
    stored = world.objects.get(key)
    is_old = stored is not None and world.now - stored.written_at > 3600
    return key not in named_by and (is_old or key.rpartition("/")[2].rpartition("-")[0] in records)


def _is_of_a_decided_shard(world: World, key: str, records: set[str], named_by: Mapping[str, str]) -> bool:
    record = key.rpartition("/")[2].rpartition("-")[0]
    return key not in named_by and protocol.parse_record_name(record)[0] in records


@contextmanager
def _names_without_hash(world: World) -> Iterator[None]:
    real = protocol.put_data_file

    def put(store: ObjectStore, path: Any, **of: Any) -> Any:
        file = real(store, path, **of)
        key = re.sub(r"-[0-9a-f]{16}\.", "-0000000000000000.", "data/00/" + file.key.rpartition("/")[2])
        store.put_file(key, path, file.sha256)
        return protocol.FileStat(
            key=key, num_bytes=file.num_bytes, sha256=file.sha256, num_rows=0, content=file.content
        )

    with patch.object(protocol, "put_data_file", put):
        yield


def _names_of_the_attempt(world: World) -> AbstractContextManager[object]:
    """Files named by who wrote them: nobody overwrites them, and by age they go all the same."""
    real = protocol.put_data_file

    def put(store: ObjectStore, path: Any, **of: Any) -> Any:
        file = real(store, path, **of)
        key = re.sub(r"-[0-9a-f]{16}\.", f"-{world.nonce()}.", file.key)
        store.put_file(key, path, file.sha256)
        return protocol.FileStat(
            key=key, num_bytes=file.num_bytes, sha256=file.sha256, num_rows=0, content=file.content
        )

    return patch.object(protocol, "put_data_file", put)


@contextmanager
def _by_age_with_names_of_the_attempt(world: World) -> Iterator[None]:
    with _names_of_the_attempt(world), _judging(_is_old)(world):
        yield


@contextmanager
def _only_what_is_new(world: World) -> Iterator[None]:
    real = protocol._Merged

    def merged(store: Any, names: Any, latest: Any) -> Any:
        found = real(store, names, latest)
        found._segments, found._noted, found._later = (), PackedSort(), {}
        return found

    with patch.object(protocol, "_Merged", merged):
        yield


@contextmanager
def _collects_segments(world: World) -> Iterator[None]:
    real = pipeline.collect.collect_garbage

    def collect(store: ObjectStore, *, delete: bool) -> Any:
        listed = [info.key for info in store.list("manifests/")]
        named = set()
        for info in store.list("snapshots/"):
            named |= {segment["key"] for segment in json.loads(store.get(info.key))["segments"]}
        for key in listed:
            if key not in named:
                store.delete(key)
        return real(store, delete=delete)

    with patch.object(pipeline.collect, "collect_garbage", collect):
        yield


@contextmanager
def _generation_of_what_counts(world: World) -> Iterator[None]:
    """The next number is how many records count, which a repair makes one too few; so a number comes again."""
    real = protocol._decided_shard

    def decided(shard_id: str, commits: Any) -> Any:
        shard = real(shard_id, commits)
        return protocol.DecidedShard(
            shard_id=shard_id, commits=shard.commits, counts=shard.counts, next_generation=len(shard.commits)
        )

    with patch.object(protocol, "_decided_shard", decided), _plain_put_of(world, "commits/", r"\.r\d+\.json$"):
        yield


BUGS: Mapping[str, Bug] = {
    "plain_put_of_the_record": Bug(change=lambda world: _plain_put_of(world, "commits/")),
    "record_before_data": Bug(Habits(record_before_data=True)),
    "loser_deletes_its_files": Bug(Habits(deletes_when_it_lost=True)),
    "deletes_after_an_unknown_outcome": Bug(Habits(deletes_when_it_failed=True)),
    "deletes_when_told_that_the_record_exists": Bug(change=_create_once(_deletes_on_exists)),
    "exists_is_failure": Bug(change=_create_once(_exists_is_failure)),
    "exists_is_success": Bug(change=_create_once(_exists_is_success)),
    "unknown_is_success": Bug(change=_create_once(_unknown_is_success)),
    "data_overwritten_under_one_name": Bug(change=_names_without_hash),
    "collects_all_that_no_record_names": Bug(change=_judging(_is_unnamed)),
    "collects_by_age": Bug(Habits(deadline_s=1800), _judging(_is_old), num_seeds=5000),
    "collects_by_age_with_names_of_the_attempt": Bug(
        Habits(deadline_s=1800), _by_age_with_names_of_the_attempt, num_seeds=5000
    ),
    "collects_files_of_generations_to_come": Bug(change=_judging(_is_of_a_decided_shard)),
    "names_files_without_their_generation": Bug(Habits(names_files_without_generation=True)),
    "collects_segments_that_no_snapshot_names": Bug(change=_collects_segments),
    "snapshot_not_merged_with_its_parent": Bug(change=_only_what_is_new),
    "snapshot_overwritten": Bug(change=lambda world: _plain_put_of(world, "snapshots/")),
    "generation_number_used_again": Bug(change=_generation_of_what_counts),
    "retry_of_an_older_state_takes_the_next_number": Bug(Habits(takes_next_free_generation=True)),
    "repair_in_place_with_other_bytes": Bug(Habits(repairs_in_place=True)),
}
