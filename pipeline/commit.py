"""The commit protocol: which shard counts as done, and what a reader may rely on.

Not where bytes lie (`storage`) and not what a data file holds (`format`). Used by `actors` and `run` to write, by
`dataset` and whoever looks after an output to read.

    _dataset.json                        create-once: the configuration that every shard was made with
    data/<pp>/<record>-<sha16>.<ext>     immutable, named by their content; pp = the hash's first two digits
    commits/<pp>/<record>.json           create-once: THE commit point; pp = first two digits of sha256(name)
    manifests/<sha16>.jsonl.gz           immutable segments of up to 10,000 commit records
    snapshots/<number>.json              create-once, numbered from 1: what a reader pins

Why it holds: a record is created once, after the files that it names have arrived, so whoever sees a record sees whole
files; files are named by their hash, so a second attempt never changes them; losers delete nothing. However often a
shard is tried, by however many jobs, one record decides it. No clock decides anything.

**Generations.** The record `<shard>` decides a shard. What is said of it later is appended as `<shard>.r1`, `.r2`, ...:
a retry of rejected videos, or a repair that replaces a damaged record. Who writes generation n has read all before it,
and its name is free only once: an attempt that started from an older state loses, so that no two speak past each
other. A record counts unless a later one replaces it. Where several that count speak of one sample, ok beats rejected,
and of several ok the lowest generation's is read; a writer leaves out what another that counts has as ok, so that
readers who know nothing of this see no sample twice.

Layout version 1.
"""

from __future__ import annotations

import gzip
import hashlib
import heapq
import io
import json
import re
import uuid
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cache
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

from blake3 import blake3

from pipeline.errors import (
    ConfigMismatchError,
    DamagedObjectError,
    ObjectExistsError,
    OutcomeUnknownError,
    StorageError,
    StorageUnavailableError,
    UsageError,
)
from pipeline.packed import Names, Packed, PackedSort
from pipeline.records import Commit, DatasetManifest, FileStat, ModelFacts, ShardCounts, sum_counts
from pipeline.storage import ObjectStore, sha256_of_file
from pipeline.store import Backoff

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from pipeline.format import WrittenFile

LAYOUT_VERSION = 1
MANIFEST_KEY = "_dataset.json"
SEGMENT_COMMITS = 10_000

_EXTENSIONS: Mapping[str, str] = {"parquet": "parquet", "webdataset": "tar", "rejected": "rejected.parquet"}
_NUM_READERS = 16
_READ_AHEAD = 1000
_NUM_PROBES = 8
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """An immutable, sorted run of commit records: gzipped JSON lines, named by the hash of the compressed bytes."""

    key: str
    num_bytes: int
    sha256: str
    num_commits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What stands in `snapshots/<number>.json`: an immutable, numbered set of commits, by the segments that hold them.

    Attributes:
        number: from 1.
        digest: sha256 hex over the sorted (record name, nonce) pairs: equal sets of commits have equal digests,
            however they were published.
        num_commits: in all segments.
        num_records: samples that are ok, each counted once however many generations speak of it.
    """

    number: int
    digest: str
    num_commits: int
    num_records: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A snapshot with its commits, which take 2 kB of memory each.

    Attributes:
        commits: sorted by record name.
    """

    contents: Contents
    commits: tuple[Commit, ...]

    @property
    def number(self) -> int:
        """From 1."""
        return self.contents.number

    @property
    def num_records(self) -> int:
        """Samples that are ok, each counted once."""
        return self.contents.num_records


@dataclass(frozen=True, slots=True, kw_only=True)
class DecidedShard:
    """A shard as its records together describe it.

    Attributes:
        commits: the records that count, in the order of their generations.
        counts: accounts of the whole shard.
        next_generation: the number that a retry or repair made from this state must take.
    """

    shard_id: str
    commits: tuple[Commit, ...]
    counts: ShardCounts
    next_generation: int


def decided_shards(commits: Iterable[Commit]) -> tuple[DecidedShard, ...]:
    """The shards that these records decide, in the order of their ids: what counts of each."""
    by_shard: dict[str, list[Commit]] = {}
    for commit in commits:
        by_shard.setdefault(commit.shard_id, []).append(commit)
    return tuple(_decided_shard(shard_id, by_shard[shard_id]) for shard_id in sorted(by_shard))


def _decided_shard(shard_id: str, commits: list[Commit]) -> DecidedShard:
    last = max(commits, key=lambda commit: commit.generation)
    return DecidedShard(
        shard_id=shard_id,
        commits=tuple(records_that_count(commits)),
        counts=_stated_counts(last),
        next_generation=last.generation + 1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Accounts:
    """What the last records of some shards state.

    Attributes:
        num_shards: of those asked for, the decided ones.
        counts: of all of them together.
        of_shards: shard id -> accounts, of the decided ones among those that were named.
    """

    num_shards: int
    counts: ShardCounts
    of_shards: Mapping[str, ShardCounts]


def accounts(commits: Callable[[], Iterable[Commit]], asked: Container[str], named: Container[str] = ()) -> Accounts:
    """Adds up shards, of which only those with later generations are kept one by one.

    Args:
        commits: gives all of them, in any order; called again where there are later generations.
        asked: the ids of the shards that count.
        named: some of these.
    """
    last: dict[str, tuple[int, ShardCounts]] = {}
    num_plain = 0

    def plain() -> Iterator[ShardCounts]:
        nonlocal num_plain
        for commit in commits():
            if commit.shard_id not in asked:
                continue
            if commit.generation or commit.shard_id in named:
                stated = commit.generation, _stated_counts(commit)
                last[commit.shard_id] = max(stated, last.get(commit.shard_id, stated), key=itemgetter(0))
            else:
                num_plain += 1
                yield commit.counts

    counts = sum_counts(plain())
    first = [
        commit.counts
        for commit in (commits() if any(shard_id not in named for shard_id in last) else ())
        if not commit.generation and commit.shard_id in last and commit.shard_id not in named
    ]
    return Accounts(
        num_shards=num_plain - len(first) + len(last),
        counts=sum_counts([counts, *(stated for _, stated in last.values())], less=first),
        of_shards={shard_id: stated for shard_id, (_, stated) in last.items() if shard_id in named},
    )


def _stated_counts(commit: Commit) -> ShardCounts:
    """The accounts of the whole shard from a generation on."""
    return commit.counts if commit.shard_counts is None else commit.shard_counts


class RecordOfShard(Protocol):
    """What decides whether a record counts among those of its shard."""

    @property
    def shard_id(self) -> str: ...
    @property
    def generation(self) -> int: ...
    @property
    def replaces(self) -> str | None: ...


_R = TypeVar("_R", bound=RecordOfShard)


def records_that_count(records: Iterable[_R]) -> list[_R]:
    """Of all records of one shard those that none replaces, in the order of their generations."""
    records = sorted(records, key=lambda record: record.generation)
    replaced = {record.replaces for record in records if record.replaces is not None}
    if not replaced:
        return records
    return [record for record in records if record_name(record.shard_id, record.generation) not in replaced]


_LATER_GENERATION = re.compile(r"(.+)\.r([1-9][0-9]*)")


def record_name(shard_id: str, generation: int = 0) -> str:
    """The name of a commit record: the shard id, with ".r<n>" for later generations."""
    assert re.fullmatch(r"[^./\0][^/\0]*", shard_id), f"shard id {shard_id!r} is not a plain file name"
    assert not _LATER_GENERATION.fullmatch(shard_id), f"shard id {shard_id!r} ends like the name of a later generation"
    return f"{shard_id}.r{generation}" if generation else shard_id


def parse_record_name(name: str) -> tuple[str, int]:
    """Shard id and generation of a record name."""
    later = _LATER_GENERATION.fullmatch(name)
    return (later[1], int(later[2])) if later else (name, 0)


def name_of(commit: Commit) -> str:
    """The name of a record."""
    return record_name(commit.shard_id, commit.generation)


def _commit_key(name: str) -> str:
    return f"commits/{hashlib.sha256(name.encode()).hexdigest()[:2]}/{name}.json"


def _json_bytes(value: object) -> bytes:
    """Canonical JSON, of a dataclass its fields; escapes keep file names that are not valid UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_fields_of)
    return (text + "\n").encode("ascii")


def _fields_of(record: object) -> dict[str, Any]:
    # asdict() copies all that is in them, which takes longer than the JSON.
    record_type: Any = record.__class__
    return {name: getattr(record, name) for name in _field_names(record_type)}


def fingerprint_of(fields: Mapping[str, object]) -> str:
    """SHA-256 in hex of the canonical JSON of everything that changes bytes."""
    return hashlib.sha256(_json_bytes(dict(fields))).hexdigest()


def create_once(store: ObjectStore, key: str, data: bytes) -> bytes:
    """The bytes that stand under `key` from now on: these, or those of whoever was first.

    Whatever the store answers, only reading back decides: a create may land and its answer be lost, and the same
    create repeated then fails on its own success. So `data` must hold something unique (a nonce) where the caller has
    to tell its own bytes from a rival's.

    Raises:
        StorageUnavailableError: the outcome could not be learnt within the retry budget; trying again is safe.
        StorageError: the store refuses for good.
    """
    backoff = Backoff()
    # Looking first costs one read, and protects what stands in a store that ignores the condition (--single-writer).
    standing = store.find(key)
    while standing is None:
        try:
            store.put_if_absent(key, data)
            return data
        except (ObjectExistsError, OutcomeUnknownError) as error:
            standing = store.find(key)
            if standing is None and not backoff.pause():
                raise StorageUnavailableError(
                    f"{store.url(key)} could not be created and is not there after {backoff.num_pauses + 1} attempts; "
                    f"trying again is safe. Last answer: {error}"
                ) from error
    return standing


def check_store(store: ObjectStore, single_writer: bool) -> None:
    """Tries on probe objects that creating twice fails, that of racing creates one wins, and that lists are fresh.

    Raises:
        UsageError: the store does not keep one of these promises and `single_writer` is off.
        StorageError: the store cannot be written or read.
    """
    probe = f"_probe/{uuid.uuid4().hex}"
    probes = [f"{probe}-twice", f"{probe}-race"]
    try:
        broken = _broken_promise(store, *probes)
    finally:
        for key in probes:
            _delete_if_allowed(store, key)
    if broken is not None and not single_writer:
        raise UsageError(
            f"{store.root_uri} {broken}, so two jobs or a late retry could overwrite each other's commits. Use a store "
            "with conditional writes (If-None-Match), or pass --single-writer and never run two jobs on this output"
        )


def _broken_promise(store: ObjectStore, twice: str, race: str) -> str | None:
    first = create_once(store, twice, b"first")
    if first != b"first" or store.get(twice) != b"first":
        return "does not return what was just written"
    if [info.key for info in store.list(twice)] != [twice]:
        return "does not list what was just written"
    if _creates(store, twice, b"second") or store.get(twice) != b"first":
        return "overwrites an object that may only be created once"
    rivals = [f"rival {number}".encode() for number in range(_NUM_PROBES)]
    with ThreadPoolExecutor(_NUM_PROBES) as pool:
        won = list(pool.map(lambda rival: _creates(store, race, rival), rivals))
    winners = [rival for rival, has_won in zip(rivals, won, strict=True) if has_won]
    if len(winners) > 1 or (winners and store.get(race) != winners[0]):
        return f"let {len(winners)} of {_NUM_PROBES} racing creates win"
    return None


def _creates(store: ObjectStore, key: str, data: bytes) -> bool:
    try:
        store.put_if_absent(key, data)
    except (ObjectExistsError, OutcomeUnknownError):
        return False
    return True


def _delete_if_allowed(store: ObjectStore, key: str) -> None:
    try:
        store.delete(key)
    except StorageUnavailableError:
        raise
    except StorageError:
        return  # a bucket policy may well deny deletes to writers; a probe is a few bytes


def open_dataset(store: ObjectStore, manifest: DatasetManifest) -> DatasetManifest:
    """The description of the output, created from `manifest` if there is none yet.

    Raises:
        ConfigMismatchError: the output holds another configuration; the error lists each differing key.
    """
    standing = _manifest_of(store, create_once(store, MANIFEST_KEY, _json_bytes(manifest)))
    if standing.fingerprint == manifest.fingerprint:
        return standing
    refuse_differences(store, standing.fingerprint_fields, manifest.fingerprint_fields)
    raise ConfigMismatchError(f"{store.root_uri} states a fingerprint that is not that of its configuration", {})


def refuse_differences(store: ObjectStore, held: Mapping[str, object], asked: Mapping[str, object]) -> None:
    """Compares the configuration of an output with the one that is asked for.

    Raises:
        ConfigMismatchError: a key is missing on one side or its values differ; the error lists each.
    """
    held, asked = _plain(held), _plain(asked)
    differences = {
        key: (held.get(key), asked.get(key))
        for key in sorted(held.keys() | asked.keys())
        if held.get(key) != asked.get(key)
    }
    if differences:
        listed = "; ".join(f"{key}: {old!r} there, {new!r} asked for" for key, (old, new) in differences.items())
        raise ConfigMismatchError(
            f"{store.root_uri} was made with another configuration ({listed}) and nothing was changed; give the same "
            "settings to go on with it, or another --output to begin anew",
            differences,
        )


def read_manifest(store: ObjectStore) -> DatasetManifest | None:
    """The description of the output, or None where no job opened it yet."""
    data = store.find(MANIFEST_KEY)
    return None if data is None else _manifest_of(store, data)


def manifest_of_output(store: ObjectStore) -> DatasetManifest:
    """The description of an output that must be there.

    Raises:
        UsageError: no job opened an output here.
    """
    manifest = read_manifest(store)
    if manifest is None:
        raise UsageError(f"{store.root_uri} is no output of Latentmill: there is no {MANIFEST_KEY} in it")
    return manifest


def put_data_file(
    store: ObjectStore,
    path: Path,
    *,
    shard_id: str,
    content: Literal["parquet", "webdataset", "rejected"],
    num_rows: int,
    bucket_rows: Mapping[str, int] | None = None,
    generation: int = 0,
) -> FileStat:
    """Stores a finished local file under a name that holds its hash. It counts only once a commit names it.

    The name also holds that of the record to come: while that one does not exist, nobody may remove the file.
    """
    sha256 = sha256_of_file(path)
    key = f"data/{sha256[:2]}/{record_name(shard_id, generation)}-{sha256[:16]}.{_EXTENSIONS[content]}"
    store.put_file(key, path, sha256)
    return FileStat(
        key=key,
        num_bytes=path.stat().st_size,
        sha256=sha256,
        num_rows=num_rows,
        content=content,
        bucket_rows=dict(bucket_rows or {}),
        # Rejections are read by what goes by SHA-256 anyway.
        blake3=None if content == "rejected" else blake3().update_mmap(path).hexdigest(),
    )


def put_written_file(store: ObjectStore, file: WrittenFile, shard_id: str, generation: int = 0) -> FileStat:
    """Stores what a `ShardWriter` finished, as `put_data_file` does."""
    return put_data_file(
        store,
        file.path,
        shard_id=shard_id,
        content=file.content,
        num_rows=file.num_rows,
        bucket_rows=file.bucket_rows,
        generation=generation,
    )


def read_data_file(store: ObjectStore, file: FileStat) -> bytes:
    """The whole data file, with size and SHA-256 as its commit states.

    Raises:
        DamagedObjectError: twice in a row the bytes were others.
        StorageNotFoundError: it is gone.
    """
    for _ in range(2):  # damage on the way passes, damage at rest does not
        data = store.get(file.key)
        found = f"{len(data)} bytes with SHA-256 {hashlib.sha256(data).hexdigest()}"
        if found == f"{file.num_bytes} bytes with SHA-256 {file.sha256}":
            return data
    raise _damaged(store, file, found)


def fetch_data_file(store: ObjectStore, file: FileStat, path: Path) -> None:
    """Copies a data file to `path`, checked as by `has_stated_bytes`; on failure no file is left.

    Raises:
        DamagedObjectError: twice in a row the bytes were others.
        StorageNotFoundError: it is gone.
    """
    for _ in range(2):
        store.fetch_file(file.key, path)
        num_bytes = path.stat().st_size
        is_complete = num_bytes == file.num_bytes
        if file.blake3 is not None and is_complete and blake3().update_mmap(path).hexdigest() == file.blake3:
            return
        found = f"{num_bytes} bytes with SHA-256 {sha256_of_file(path)}"
        if found == f"{file.num_bytes} bytes with SHA-256 {file.sha256}":
            return
        path.unlink()
    raise _damaged(store, file, found)


def has_stated_bytes(file: FileStat, data: Buffer) -> bool:
    """Whether these are the bytes of a file as its commit states them: by BLAKE3 where it does, else by SHA-256."""
    if memoryview(data).nbytes != file.num_bytes:
        return False
    if file.blake3 is not None and blake3(data).hexdigest() == file.blake3:
        return True
    return hashlib.sha256(data).hexdigest() == file.sha256


def _damaged(store: ObjectStore, file: FileStat, found: str) -> DamagedObjectError:
    return DamagedObjectError(
        f"{store.url(file.key)} holds {found}, its commit states {file.num_bytes} bytes with SHA-256 {file.sha256}; "
        "the file is damaged: restore it, or have its shard encoded again: latentmill verify --requeue"
    )


def commit_shard(store: ObjectStore, commit: Commit) -> Literal["committed", "lost_race"]:
    """Decides a shard, or appends a generation. Call it after every file of the commit was stored.

    "lost_race" is a success too: another attempt was first, and its files are the ones that count. The loser's files
    stay where they are; deleting them could delete the winner's, which may carry the same bytes and name. A retry or
    repair that lost started from a state that is no more: read the shard anew to see whether anything is left to do.

    Raises:
        StorageUnavailableError: the outcome could not be learnt; the shard may be tried again.
        StorageNotFoundError: a generation was skipped.
    """
    name = name_of(commit)
    if commit.generation:
        assert commit.shard_counts is not None, f"{name} does not state the accounts of the whole shard"
        earlier = {record_name(commit.shard_id, generation) for generation in range(commit.generation)}
        assert commit.replaces is None or commit.replaces in earlier, f"{name} cannot replace {commit.replaces}"
        # Generations have no gap, or a reader could count one and not know of another that was there before it.
        store.get(_commit_key(record_name(commit.shard_id, commit.generation - 1)))
    key = _commit_key(name)
    standing = _commit_of(store, key, create_once(store, key, _json_bytes(commit)))
    return "committed" if standing.nonce == commit.nonce else "lost_race"


def read_commit(store: ObjectStore, shard_id: str, generation: int = 0) -> Commit | None:
    """A record of a shard, or None where there is none; without generation 0 the shard is undecided."""
    key = _commit_key(record_name(shard_id, generation))
    data = store.find(key)
    return None if data is None else _commit_of(store, key, data)


def read_shard(store: ObjectStore, shard_id: str) -> DecidedShard | None:
    """A shard with all its generations as of now, or None while it is undecided."""
    commits: list[Commit] = []
    while (commit := read_commit(store, shard_id, len(commits))) is not None:
        commits.append(commit)
    return _decided_shard(shard_id, commits) if commits else None


def committed_ids(store: ObjectStore) -> set[str]:
    """The names of all commit records, listed anew: shard ids, and `<shard_id>.r<n>` for later generations."""
    return set(record_names(store))


def record_names(store: ObjectStore) -> Packed[str]:
    """As `committed_ids`, each once and in no order, in a tenth of the memory."""
    names = Packed[str]()
    earlier: set[str] = set()
    for info in store.list("commits/"):
        if info.key.endswith(".json"):
            name = info.key.rpartition("/")[2].removesuffix(".json")
            names.append(name)
            shard_id, generation = parse_record_name(name)
            earlier.update(record_name(shard_id, number) for number in range(generation))
    # While a list is read page by page, a record may come to stand before the place that was reached, and its successor
    # after it. A generation is never without those before it.
    names.extend(sorted(earlier.difference(names) if earlier else ()))
    return names


def load_commits(store: ObjectStore, ids: Iterable[str] | None = None) -> Iterator[Commit]:
    """The commits of the given record names, or of all, in the order of their names.

    Raises:
        StorageNotFoundError: a name has no record.
    """
    names = iter(PackedSort(record_names(store) if ids is None else ids))
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        # What is asked for is kept until it is taken, so that not all is asked for at once.
        while asked := [_commit_key(name) for name in islice(names, _READ_AHEAD)]:
            yield from pool.map(lambda key: _commit_of(store, key, store.get(key)), asked)


class KnownCommits:
    """Every commit of now, one at a time and in any order; those of the latest snapshot are not read one by one.

    Attributes:
        names: of all their records.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._latest = latest_contents(store)
        self.names = record_names(store)

    def __iter__(self) -> Iterator[Commit]:
        listed, held = Names(), Names()
        if self._latest is not None:
            listed = Names(self.names)
            for commit in _commits_of(self._store, self._latest):
                if name_of(commit) in listed:
                    held.add(name_of(commit))
                    yield commit
        yield from load_commits(self._store, (name for name in self.names if name not in held))


def known_commits(store: ObjectStore) -> tuple[Commit, ...]:
    """Every commit of now, sorted by name, in 2 kB of memory each."""
    return tuple(sorted(KnownCommits(store), key=name_of))


def publish_snapshot(store: ObjectStore) -> Contents:
    """A snapshot that holds every commit there is: the latest one if nothing was committed since, else a new one.

    Any number of publishers may run at once: records are immutable, so each merges what it sees and takes the next
    free number. In memory are names and nonces of all commits, packed, and never the commits themselves.
    """
    while True:
        latest = latest_contents(store)
        merged = _Merged(store, record_names(store), latest)
        if latest is not None and not merged.new:
            return latest
        contents = merged.packed()
        data = _snapshot_bytes(contents)
        if create_once(store, _snapshot_key(contents.number), data) == data:
            return contents


def latest_snapshot(store: ObjectStore) -> Snapshot | None:
    """The snapshot with the highest number, or None before the first."""
    number = latest_snapshot_number(store)
    return None if number is None else read_snapshot(store, number)


def latest_snapshot_number(store: ObjectStore) -> int | None:
    """The highest number of a snapshot, or None before the first."""
    numbers = [int(match[1]) for info in store.list("snapshots/") if (match := _SNAPSHOT_KEY.fullmatch(info.key))]
    return max(numbers, default=None)


def latest_contents(store: ObjectStore) -> Contents | None:
    """What the latest snapshot states of itself, or None before the first; no commit is read."""
    number = latest_snapshot_number(store)
    return None if number is None else _read_contents(store, number)


def read_snapshot(store: ObjectStore, number: int) -> Snapshot:
    """A snapshot with its commits.

    Raises:
        StorageNotFoundError: there is no snapshot of this number.
        DamagedObjectError: the snapshot or a segment of it is damaged.
    """
    contents = _read_contents(store, number)
    return Snapshot(contents=contents, commits=tuple(sorted(_commits_of(store, contents), key=name_of)))


def snapshot_commits(store: ObjectStore, number: int) -> Iterator[Commit]:
    """The commits of a snapshot in any order, one segment of them in memory; for readers that keep little of each.

    Raises:
        StorageNotFoundError: there is no snapshot of this number.
        DamagedObjectError: the snapshot or a segment of it is damaged; after the last commit where it lacks one.
    """
    return _commits_of(store, _read_contents(store, number))


def _read_contents(store: ObjectStore, number: int) -> Contents:
    """What a snapshot states of itself; no segment is read.

    Raises:
        StorageNotFoundError: there is no snapshot of this number.
        DamagedObjectError: the snapshot is damaged.
    """
    key = _snapshot_key(number)
    return _parsed(
        store,
        key,
        store.get(key),
        lambda value: Contents(
            number=number,
            digest=str(value["digest"]),
            num_commits=int(value["num_commits"]),
            num_records=int(value["num_records"]),
            segments=tuple(Segment(**segment) for segment in value["segments"]),
        ),
    )


def _commits_of(store: ObjectStore, contents: Contents) -> Iterator[Commit]:
    lines = PackedSort[str]()
    for segment in contents.segments:
        for commit in _read_segment(store, segment):
            lines.add(_digest_line(name_of(commit), commit.nonce))
            yield commit
    _refuse_other_digest(store, contents, _digest_of_lines(lines))


def _refuse_other_digest(store: ObjectStore, contents: Contents, digest: str) -> None:
    if digest != contents.digest:
        url = store.url(_snapshot_key(contents.number))
        raise DamagedObjectError(f"{url} states another digest than that of its commits")


_SNAPSHOT_KEY = re.compile(r"snapshots/(\d{12})\.json")


def _snapshot_key(number: int) -> str:
    return f"snapshots/{number:012d}.json"


def _snapshot_bytes(contents: Contents) -> bytes:
    return _json_bytes({"layout_version": LAYOUT_VERSION, **_fields_of(contents)})


def _digest_line(name: str, nonce: str) -> str:
    return f"{name} {nonce}\n"


def _digest_of_lines(lines: Iterable[str]) -> str:
    """Of sorted lines."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode())
    return digest.hexdigest()


class _Line(NamedTuple):
    """A commit as it stands in a segment, and what of it a snapshot speaks of."""

    name: str
    nonce: str
    shard_id: str
    generation: int
    num_records: int  # of the whole shard
    data: bytes


class _Merged:
    """The commits of the latest snapshot and those that came since, on their way into a new snapshot.

    Args:
        names: of all commits.

    Attributes:
        new: names of the commits that the latest snapshot does not hold.
    """

    def __init__(self, store: ObjectStore, names: Iterable[str], latest: Contents | None) -> None:
        self._store = store
        self._number = 1 if latest is None else latest.number + 1
        self._segments = () if latest is None else latest.segments
        # Of each commit its line of the digest, and of a generation 0 the records that it states.
        self._noted = PackedSort[tuple[str, int]]()
        self._later: dict[str, tuple[int, int]] = {}  # shard id -> its last generation, and the records as that says
        held = Names()
        for segment in self._segments:
            for line in _read_lines(store, segment):
                self._note(line)
                held.add(line.name)
        if latest is not None:
            _refuse_other_digest(store, latest, self._sums()[0])
        self.new = Packed(name for name in names if name not in held)

    def _note(self, line: _Line) -> None:
        """Keeps what the snapshot will say of a commit."""
        self._noted.add((_digest_line(line.name, line.nonce), 0 if line.generation else line.num_records))
        if line.generation:
            stated = line.generation, line.num_records
            self._later[line.shard_id] = max(stated, self._later.get(line.shard_id, stated))

    def _sums(self) -> tuple[str, int]:
        """The digest of what was noted, and its records."""
        num_records = sum(num_records for _, num_records in self._later.values())

        def lines() -> Iterator[str]:
            nonlocal num_records
            for line, num_first in self._noted:
                if line.rpartition(" ")[0] not in self._later:
                    num_records += num_first
                yield line

        return _digest_of_lines(lines()), num_records

    def packed(self) -> Contents:
        """Keeps the full segments of the latest snapshot and packs all other commits anew."""
        segments = [segment for segment in self._segments if segment.num_commits == SEGMENT_COMMITS]
        loose = [segment for segment in self._segments if segment.num_commits != SEGMENT_COMMITS]
        num_left = len(self.new) + sum(segment.num_commits for segment in loose)
        runs = [self._new_lines(), *(_read_lines(self._store, segment) for segment in loose)]
        lines = heapq.merge(*runs, key=lambda line: line.name)
        while num_left:
            segments.append(_put_segment(self._store, islice(lines, SEGMENT_COMMITS)))
            num_left -= segments[-1].num_commits
        digest, num_records = self._sums()
        return Contents(
            number=self._number,
            digest=digest,
            num_commits=len(self._noted),
            num_records=num_records,
            segments=tuple(segments),
        )

    def _new_lines(self) -> Iterator[_Line]:
        for commit in load_commits(self._store, self.new):
            line = _line_of(commit, _json_bytes(commit))
            self._note(line)
            yield line


def _line_of(commit: Commit, data: bytes) -> _Line:
    num_records = _stated_counts(commit).num_records
    return _Line(name_of(commit), commit.nonce, commit.shard_id, commit.generation, num_records, data)


def _put_segment(store: ObjectStore, lines: Iterable[_Line]) -> Segment:
    # As gzip.compress(mtime=0) does, without all the lines in memory at once.
    packer = zlib.compressobj(9, wbits=31)
    parts: list[bytes] = []
    num_commits = 0
    for line in lines:
        parts.append(packer.compress(line.data))
        num_commits += 1
    data = b"".join([*parts, packer.flush()])
    sha256 = hashlib.sha256(data).hexdigest()
    key = f"manifests/{sha256[:16]}.jsonl.gz"
    create_once(store, key, data)
    return Segment(key=key, num_bytes=len(data), sha256=sha256, num_commits=num_commits)


def _read_lines(store: ObjectStore, segment: Segment) -> Iterator[_Line]:
    """The commits of a segment, in half the time that whole ones take."""

    def line(value: dict[str, Any]) -> _Line:
        shard_id, generation = value["shard_id"], value["generation"]
        counts = value.get("shard_counts") or value["counts"]
        return _Line(
            record_name(shard_id, generation), value["nonce"], shard_id, generation, counts["num_records"], data
        )

    for data in _read_raw(store, segment):
        yield _parsed(store, segment.key, data, line)


def _read_segment(store: ObjectStore, segment: Segment) -> Iterator[Commit]:
    return (_commit_of(store, segment.key, data) for data in _read_raw(store, segment))


def _read_raw(store: ObjectStore, segment: Segment) -> Iterator[bytes]:
    data = store.get(segment.key)
    if len(data) != segment.num_bytes or hashlib.sha256(data).hexdigest() != segment.sha256:
        raise DamagedObjectError(f"{store.url(segment.key)} does not have the SHA-256 that its snapshot states")
    with gzip.open(io.BytesIO(data)) as lines:
        yield from lines


def _plain(value: Mapping[str, object]) -> dict[str, Any]:
    """The same after a trip through JSON, where tuples are lists."""
    plain: dict[str, Any] = json.loads(_json_bytes(dict(value)))
    return plain


def _parsed(store: ObjectStore, key: str, data: bytes, build: Callable[[dict[str, Any]], _T]) -> _T:
    try:
        return build(json.loads(data))
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise DamagedObjectError(
            f"{store.url(key)} cannot be read as version {LAYOUT_VERSION} of the layout: {error!r:.200}"
        ) from error


def _commit_of(store: ObjectStore, key: str, data: bytes) -> Commit:
    return _parsed(
        store,
        key,
        data,
        lambda value: Commit(
            **_known(Commit, value)
            | {
                "files": tuple(FileStat(**_known(FileStat, file)) for file in value["files"]),
                "counts": ShardCounts(**_known(ShardCounts, value["counts"])),
                "keys": None if value.get("keys") is None else tuple(value["keys"]),
                "shard_counts": (
                    None
                    if value.get("shard_counts") is None
                    else ShardCounts(**_known(ShardCounts, value["shard_counts"]))
                ),
            }
        ),
    )


def _manifest_of(store: ObjectStore, data: bytes) -> DatasetManifest:
    return _parsed(
        store,
        MANIFEST_KEY,
        data,
        lambda value: DatasetManifest(
            **_known(DatasetManifest, value) | {"model": ModelFacts(**_known(ModelFacts, value["model"]))}
        ),
    )


def _known(record_type: Any, value: dict[str, Any]) -> dict[str, Any]:
    # A later version may add fields that this one does not need.
    return {name: value[name] for name in _field_names(record_type) if name in value}


@cache
def _field_names(record_type: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(record_type))
