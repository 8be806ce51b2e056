"""What of a decided shard is encoded again: rejections that are tried once more, and records whose files are damaged.

Not how it is encoded (`actors`, which calls `begin` and `finish`), and not what counts afterwards (`commit`). `run`
asks for `retries` and `repairs`; `cli` orders repairs from what `audit` found.

A **retry** is asked for by the reasons of rejections. Its generation holds the videos that were rejected for these
reasons, and stands beside the earlier ones. Every generation that speaks of a video is one attempt at it, and who spent
`--max-attempts` of them is not taken up again: a command that runs every night does not try a hopeless video for ever.

A **repair** is ordered by record, because damage is found by another process than the one that encodes:

    repairs/<record>/<number>.json         create-once: the files of this record are damaged
    repairs/<record>/<number>.done.json    create-once: they were put back; without one, a record may `replace` this one

What was encoded again has the same bytes as a rule, and is put back under its name. Other bytes become a generation
that replaces the damaged record, unless the input is another one than then, or gives less: nobody asked for that. An
input that was cleaned up, or that does not answer tonight, must not turn samples that are damaged into rejections.

Whoever starts from an older state than another one that is at it loses, reads anew and does what is left.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from pipeline.commit import (
    DecidedShard,
    commit_shard,
    create_once,
    name_of,
    parse_record_name,
    put_written_file,
    read_shard,
    record_name,
)
from pipeline.committed import FileCache, rejections_in, shard_outcome, with_shard_counts
from pipeline.errors import DamagedObjectError, StorageError, StorageNotFoundError
from pipeline.format import WrittenFile
from pipeline.inputs import REST_OF_TAR, is_other_version
from pipeline.records import ClipFailure, Commit, FileStat, Redo, ShardSpec
from pipeline.storage import ObjectStore, sha256_of_file
from pipeline.stored import read_rejections

_ORDER_KEY = re.compile(r"repairs/([^/]+)/(\d{6})(\.done)?\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """The retries of a run.

    Attributes:
        specs: one for each shard that has something to retry.
        num_videos: videos that they hold, the unread rest of a tar counting as one.
        num_spent: videos that had all their attempts.
        refused: shard id -> why nothing of it, or not all, can be retried.
    """

    specs: tuple[ShardSpec, ...]
    num_videos: int
    num_spent: int
    refused: Mapping[str, str]


def retries(
    store: ObjectStore,
    specs: Iterable[ShardSpec],
    shards: Mapping[str, DecidedShard],
    reasons: Collection[str],
    *,
    max_attempts: int,
    changed: Mapping[str, Collection[str]],
    cache: FileCache,
) -> Retries:
    """What of the decided shards is rejected for these reasons and may be tried again.

    A file that was rejected as a whole is tried as it is now, replaced or not. A video of which some clips are encoded
    is not once its file is another one, or its clips would come from two files; nor is anything of a tar that changed.

    Args:
        specs: as planned.
        shards: the decided ones by id, at least those with such rejections.
        max_attempts: at one video, the first included.
        changed: shard id -> its inputs that changed since they were encoded.
        cache: for the files that must be read.

    Raises:
        StorageError: a store does not answer.
    """
    found: list[ShardSpec] = []
    num_videos = num_spent = 0
    refused: dict[str, str] = {}
    for spec in specs:
        shard = shards.get(spec.shard_id)
        if shard is None or not shard.counts.reasons.keys() & set(reasons):
            continue
        inputs = frozenset(changed.get(spec.shard_id, ()))
        if spec.source_uri in inputs:
            refused[spec.shard_id] = (
                f"{spec.source_uri} changed since it was encoded; give it another name to encode it"
            )
            continue
        try:
            failures = [failure for failure in _rejections_of(store, shard) if failure.reason in reasons]
            # Looked at before the files with latents, which are large, so that spent videos cost little.
            spent = {failure.key for failure in failures if _num_attempts(shard, failure.key) >= max_attempts}
            if {failure.key for failure in failures} <= spent:
                num_spent += len(spent)
                continue
            standing = [f for f in shard_outcome(shard, store, cache).rejections if f.reason in reasons]
        except (DamagedObjectError, StorageNotFoundError) as error:
            refused[spec.shard_id] = f"{error}; `latentmill verify --requeue` orders a repair"
            continue
        mixed = {failure.key for failure in standing if failure.clip_index is not None and failure.source_uri in inputs}
        if mixed:
            refused[spec.shard_id] = (
                f"the files of {', '.join(sorted(mixed)[:3])} changed since clips of them were encoded"
            )
        keys = {failure.key for failure in standing} - mixed
        num_spent += len(keys & spent)
        keys -= spent
        if keys:
            num_videos += len(keys)
            wanted = None if REST_OF_TAR in keys else tuple(sorted(keys))
            found.append(_redo_spec(spec, shard.next_generation, replaces=None, keys=wanted))
    return Retries(specs=tuple(found), num_videos=num_videos, num_spent=num_spent, refused=refused)


def _rejections_of(store: ObjectStore, shard: DecidedShard) -> Iterator[ClipFailure]:
    for commit in shard.commits:
        yield from rejections_in(commit, store)


def _num_attempts(shard: DecidedShard, key: str) -> int:
    return sum(commit.keys is None or key in commit.keys for commit in shard.commits)


def _redo_spec(spec: ShardSpec, generation: int, *, replaces: str | None, keys: tuple[str, ...] | None) -> ShardSpec:
    redo = Redo(shard_id=spec.shard_id, generation=generation, replaces=replaces, keys=keys)
    return replace(spec, shard_id=record_name(spec.shard_id, generation), redo=redo)


def order_repair(store: ObjectStore, record: str, why: Sequence[str]) -> bool:
    """Orders that the shard of a damaged record be encoded again; False where an order stands that is not done yet."""
    last = _last_orders(store, record).get(record)
    if last is not None and not last.is_done:
        return False
    document = json.dumps({"version": 1, "record": record, "why": list(why)[:20]}, sort_keys=True).encode()
    create_once(store, _order_key(record, 1 if last is None else last.number + 1), document)
    return True


def repair_orders(store: ObjectStore) -> list[str]:
    """Names of the records that were ordered to be repaired and were not put back, sorted; some may count no more."""
    return sorted(record for record, last in _last_orders(store).items() if not last.is_done)


def ordered_repairs(store: ObjectStore, shards: Mapping[str, DecidedShard]) -> list[str]:
    """Names of the records that are to be repaired and still count, sorted.

    Args:
        shards: by id, at least those that `repair_orders` speaks of.
    """
    counting = {name_of(commit) for shard in shards.values() for commit in shard.commits}
    return [record for record in repair_orders(store) if record in counting]


def repairs(
    specs: Mapping[str, ShardSpec], shards: Mapping[str, DecidedShard], records: Iterable[str]
) -> list[ShardSpec]:
    """The repairs of the named records, as far as their shards are among those planned."""
    found: list[ShardSpec] = []
    for record in records:
        shard_id, _ = parse_record_name(record)
        shard = shards[shard_id]
        if shard_id in specs:
            keys = next(commit.keys for commit in shard.commits if name_of(commit) == record)
            num_before = sum(other.base_id == shard_id for other in found)
            spec = _redo_spec(specs[shard_id], shard.next_generation + num_before, replaces=record, keys=keys)
            found.append(spec)
    return found


class _Order(NamedTuple):
    number: int
    is_done: bool


def _last_orders(store: ObjectStore, record: str = "") -> dict[str, _Order]:
    """Record -> the last order to repair it; of every record, or of one."""
    last: dict[str, _Order] = {}
    for info in store.list(f"repairs/{record}/" if record else "repairs/"):
        if match := _ORDER_KEY.fullmatch(info.key):
            # True sorts after False: the mark that an order is done takes the place of the order.
            order = _Order(int(match[2]), match[3] is not None)
            last[match[1]] = max(order, last.get(match[1], order))
    return last


def _order_key(record: str, number: int, ending: str = "") -> str:
    return f"repairs/{record}/{number:06d}{ending}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A redo as it stands when somebody begins with it.

    Attributes:
        shard: as read now.
        keys: the videos that are left to encode; None for all.
        others: the records beside the new one that count and can be read; without the one that a repair replaces.
        elsewhere: (key, clip index) of the samples that other records have as ok; the new one leaves them out.
    """

    redo: Redo
    shard: DecidedShard
    keys: tuple[str, ...] | None
    others: tuple[Commit, ...]
    elsewhere: frozenset[tuple[str, int]]


def begin(store: ObjectStore, redo: Redo, cache: FileCache) -> Begun | None:
    """What is left of a redo, or None where others did it.

    Raises:
        StorageError: the records or the files of the shard cannot be read.
    """
    shard = read_shard(store, redo.shard_id)
    if shard is None:
        raise StorageError(f"shard {redo.shard_id} has no record any more, so it cannot be encoded again")
    if redo.replaces is not None:
        if all(name_of(commit) != redo.replaces for commit in shard.commits):
            return None
        # Not read, because they cannot be: the record that is repaired, and others that are damaged as well.
        others = _readable(store, replace(shard, commits=_others(shard, redo.replaces)), cache)
        elsewhere = shard_outcome(others, store, cache).generations if others.commits else {}
        return Begun(redo=redo, shard=shard, keys=redo.keys, others=others.commits, elsewhere=frozenset(elsewhere))
    later = [c for c in shard.commits if c.generation >= redo.generation and c.replaces is None]
    keys = redo.keys
    if later and (keys is None or any(commit.keys is None for commit in later)):
        return None
    if keys is not None:
        spoken_of = {key for commit in later for key in commit.keys or ()}
        keys = tuple(key for key in keys if key not in spoken_of)
        if not keys:
            return None
    elsewhere = shard_outcome(shard, store, cache).generations
    return Begun(redo=redo, shard=shard, keys=keys, others=shard.commits, elsewhere=frozenset(elsewhere))


def _others(shard: DecidedShard, record: str) -> tuple[Commit, ...]:
    return tuple(commit for commit in shard.commits if name_of(commit) != record)


def _readable(store: ObjectStore, shard: DecidedShard, cache: FileCache) -> DecidedShard:
    readable = []
    for commit in shard.commits:
        try:
            shard_outcome(replace(shard, commits=(commit,)), store, cache)
        except (DamagedObjectError, StorageNotFoundError):
            continue
        readable.append(commit)
    return replace(shard, commits=tuple(readable))


def finish(
    store: ObjectStore,
    begun: Begun,
    draft: Commit,
    written: Sequence[WrittenFile],
    cache: FileCache,
    before_commit: Callable[[Sequence[FileStat]], object] = lambda files: None,
) -> Literal["committed", "lost_race", "restored"]:
    """Stores what was encoded again and makes it count.

    Args:
        draft: the record to be, without files; its generation, `replaces`, `keys` and accounts are filled in here.
        written: its files.
        before_commit: called with the files as they are stored, before the record that names them.

    Raises:
        StorageError: the input of a repair changed, or gives less than the damaged record had; or another run appended
            a generation meanwhile and something is left to do, so that the shard must be tried again.
    """
    shard, redo = begun.shard, begun.redo
    damaged = next((commit for commit in shard.commits if name_of(commit) == redo.replaces), None)
    if damaged is not None:
        if _are_same_bytes(damaged, written):
            for file in written:
                put_written_file(store, file, damaged.shard_id, damaged.generation)
            if not _has_other_accounts(begun, damaged, store, cache):
                before_commit(damaged.files)
                mark_done(store, name_of(damaged))
                return "restored"
        else:
            _refuse_other_input(damaged, draft)
            _refuse_loss(store, begun, damaged, draft, written)
    generation = shard.next_generation
    draft = replace(
        draft,
        shard_id=shard.shard_id,
        generation=generation,
        files=tuple(put_written_file(store, file, shard.shard_id, generation) for file in written),
        replaces=redo.replaces,
        keys=begun.keys,
    )
    before_commit(draft.files)
    if commit_shard(store, with_shard_counts(draft, begun.others, store, cache)) == "committed":
        return "committed"
    if begin(store, redo, cache) is None:
        return "lost_race"
    raise StorageError(
        f"shard {shard.shard_id}: another run appended generation {generation} meanwhile, and not all that was asked "
        "for is in it; the rest is tried again"
    )


def _are_same_bytes(damaged: Commit, written: Sequence[WrittenFile]) -> bool:
    stated = {file.content: file.sha256 for file in damaged.files}
    return stated == {file.content: sha256_of_file(file.path) for file in written}


def _has_other_accounts(begun: Begun, damaged: Commit, store: ObjectStore, cache: FileCache) -> bool:
    """Whether the last record of a shard, whose files are well, states other accounts than all files together give.

    It was made while those of another record could not be read, and these came back since. Records are never changed,
    so another one must state what is right.
    """
    is_last = damaged.shard_counts is not None and damaged == begun.shard.commits[-1]
    if not is_last or len(begun.others) + 1 < len(begun.shard.commits):
        return False
    return with_shard_counts(damaged, begun.others, store, cache).shard_counts != damaged.shard_counts


def _refuse_other_input(damaged: Commit, draft: Commit) -> None:
    then, now = (
        (commit.source_size_bytes, commit.source_etag, dict(commit.source_changes)) for commit in (damaged, draft)
    )
    if is_other_version(then[:2], now[:2]) or then[2] != now[2]:
        raise StorageError(
            f"record {name_of(damaged)} is damaged and cannot be repaired from {damaged.source_uri}, which is not what "
            f"it was then: size, etag and changed files were {then} and are {now}. Restore the input, or the files of "
            "the record; a repair must not bring in what another input holds"
        )


def _refuse_loss(
    store: ObjectStore, begun: Begun, damaged: Commit, draft: Commit, written: Sequence[WrittenFile]
) -> None:
    """Refuses fewer records than only the damaged one has, and rejections that it did not have."""
    num_only_here = begun.shard.counts.num_records - len(begun.elsewhere)
    num_then, num_now = min(damaged.counts.num_records, num_only_here), draft.counts.num_records
    found = [failure for file in written if file.content == "rejected" for failure in read_rejections(file.path)]
    try:
        then = Counter((failure.key, failure.clip_index) for failure in rejections_in(damaged, store))
        now = Counter((failure.key, failure.clip_index) for failure in found)
        new = [failure for failure in found if (failure.key, failure.clip_index) in now - then]
    except (DamagedObjectError, StorageNotFoundError):
        # Which videos they were cannot be read any more; how many there were of each kind is in the record.
        more = Counter(draft.counts.reasons) - Counter(damaged.counts.reasons)
        new = [failure for failure in found if failure.reason in more]
    if num_now < num_then or new:
        example = f", for example {new[0].key!r}, {new[0].reason}: {new[0].message}" if new else ""
        raise StorageError(
            f"record {name_of(damaged)} is damaged and is not replaced, because {damaged.source_uri} gives less now: "
            f"{num_now} samples for {num_then}, and {len(new)} rejections that the record does not have{example}. Its "
            "order stands: restore the input, or the files of the record, give the flags of then (--allow-http, "
            "limits), or try again where the cause may pass"
        )


def mark_done(store: ObjectStore, record: str) -> None:
    """Notes that the files of a record were put back; nothing where no repair of it was ordered."""
    last = _last_orders(store, record).get(record)
    if last is not None and not last.is_done:
        create_once(store, _order_key(record, last.number, ".done"), b'{"outcome": "restored"}')
