"""What runs in the simulation: jobs that encode, retry, repair, publish, collect and read, on the real protocol.

Each is the shape of a real job with the work left out: the "encoding" of a sample is a draw whether it succeeds, and a
data file lists the samples that it holds. Where a planted bug needs a job that is written wrongly, it asks `Habits`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from simulation.world import World, local_file

import pipeline.collect
import pipeline.commit as protocol
from pipeline.errors import (
    CredentialsExpiredError,
    DamagedObjectError,
    StorageError,
    StorageNotFoundError,
    StorageUnavailableError,
)
from pipeline.records import Commit, FileStat, ShardCounts

Plan = Mapping[str, tuple[str, ...]]

NUM_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class Habits:
    """How jobs behave; every field but the default is a bug."""

    record_before_data: bool = False
    deletes_when_it_lost: bool = False
    deletes_when_it_failed: bool = False
    takes_next_free_generation: bool = False
    names_files_without_generation: bool = False
    repairs_in_place: bool = False
    deadline_s: float | None = None  # of an attempt, checked before it commits; no bug alone, but all that age has


@dataclass(frozen=True, slots=True)
class Said:
    """What a file, or the records of a shard together, say of each sample."""

    ok: frozenset[str]
    rejected: frozenset[str]

    @property
    def counts(self) -> ShardCounts:
        return ShardCounts(
            num_videos=len(self.ok) + len(self.rejected),
            num_videos_ok=len(self.ok),
            num_videos_rejected=len(self.rejected),
            num_clips=len(self.ok),
            num_records=len(self.ok),
            num_clips_rejected=0,
            num_frames=0,
        )


class Jobs:
    """The jobs of a schedule."""

    def __init__(self, world: World, plan: Plan, habits: Habits) -> None:
        self.world = world
        self.plan = plan
        self.habits = habits
        self.store = world.store
        self._originals: dict[str, bytes] = {}  # by key
        self._deterministic: dict[str, bool] = {}  # by nonce

    def write(self, name: str) -> None:
        """A run: every shard that is undecided, then a snapshot, then the result line."""
        world, done = self.world, set[str]()
        for attempt in range(NUM_ATTEMPTS):
            left = [shard_id for shard_id in self.plan if shard_id not in done]
            world.random.shuffle(left)
            for shard_id in left:
                if self._tolerant(partial(self._write_shard, f"{name}.{attempt}", shard_id)):
                    done.add(shard_id)
            if len(done) == len(self.plan):
                break
        self.publish(name, done)

    def _write_shard(self, name: str, shard_id: str) -> None:
        if protocol.read_commit(self.store, shard_id) is None:
            self._attempt(name, shard_id, 0, self.plan[shard_id], None, None)

    def retry(self, name: str) -> None:
        """A run that tries the rejected samples of every shard again."""
        for shard_id in self.plan:
            self._tolerant(partial(self._retry_shard, name, shard_id))
        self.publish(name, set())

    def _retry_shard(self, name: str, shard_id: str) -> None:
        shard = protocol.read_shard(self.store, shard_id)
        if shard is None:
            return
        said = self._said_by(shard.commits)
        if said.rejected:
            keys = tuple(sorted(said.rejected))
            self._attempt(name, shard_id, shard.next_generation, keys, said, None)

    def repair(self, name: str) -> None:
        """A verification that makes damaged files anew, twice because each round replaces one record of a shard."""
        for shard_id in (*self.plan, *self.plan):
            self._tolerant(partial(self._repair_shard, name, shard_id))

    def _repair_shard(self, name: str, shard_id: str) -> None:
        shard = protocol.read_shard(self.store, shard_id)
        damaged: list[Commit] = []
        for commit in () if shard is None else shard.commits:
            files = [file for file in commit.files if self._is_damaged(file)]
            if not files:
                continue
            if self._comes_again(commit):
                for file in files:
                    self.store.put_file(file.key, local_file(self._originals[file.key]), file.sha256)
            elif self.habits.repairs_in_place:
                for file in files:
                    path = local_file(self._originals[file.key] + b"again")
                    self.store.put_file(file.key, path, protocol.sha256_of_file(path))
            else:
                damaged.append(commit)
        if damaged:
            # The latest first: what it holds is ok nowhere else, while an earlier one must leave out what it holds.
            assert shard is not None
            commit = damaged[-1]
            said = self._said_by(other for other in shard.commits if other not in damaged)
            keys = self.plan[shard_id] if commit.keys is None else commit.keys
            keys = tuple(key for key in keys if key not in said.ok)
            self._attempt(name, shard_id, shard.next_generation, keys, said, protocol.name_of(commit))
        elif shard is not None and len(shard.commits) > 1 and self._said_by(shard.commits).counts != shard.counts:
            # The last record was made while a file could not be read that came back since, by a late write: what it
            # holds is stated once more, by a record with the accounts of all.
            last = shard.commits[-1]
            said = self._said_by(shard.commits[:-1])
            again = self._said_by([last])
            keys = self.plan[shard_id] if last.keys is None else last.keys
            name_of_last = protocol.name_of(last)
            self._attempt(name, shard_id, shard.next_generation, keys, said, name_of_last, ok=again.ok)

    def _comes_again(self, commit: Commit) -> bool:
        """Whether encoding what a record holds once more gives the same bytes."""
        if commit.nonce not in self._deterministic:
            self._deterministic[commit.nonce] = self.world.random.random() < 0.5
        return self._deterministic[commit.nonce]

    def _is_damaged(self, file: FileStat) -> bool:
        try:
            self._held(file)
        except _RottenError:
            return True
        return False

    def _held(self, file: FileStat) -> dict[str, list[str]]:
        """What a committed file holds. It may be gone or damaged only where the world itself saw to that."""
        try:
            held: dict[str, list[str]] = json.loads(protocol.read_data_file(self.store, file))
        except (DamagedObjectError, StorageNotFoundError) as error:
            if file.key not in self.world.rotten:
                self.world.violations.append(f"a committed file cannot be read: {error}")
            raise _RottenError from None
        return held

    def _said_by(self, commits: Iterable[Commit]) -> Said:
        held = [self._held(file) for commit in commits for file in commit.files]
        ok = frozenset(key for one in held for key in one["ok"])
        return Said(ok, frozenset(key for one in held for key in one["rejected"]) - ok)

    def _attempt(
        self,
        name: str,
        shard_id: str,
        generation: int,
        keys: tuple[str, ...],
        before: Said | None,
        replaces: str | None,
        ok: frozenset[str] | None = None,
    ) -> None:
        """Encodes some samples and commits what came of them: by chance, or `ok`."""
        draw, started = self.world.random, self.world.now
        if ok is None:
            ok = frozenset(key for key in keys if draw.random() < (0.7 if before is None else 0.4))
        said = Said(ok, frozenset(keys) - ok)
        after = said if before is None else Said(before.ok | ok, (before.rejected | said.rejected) - before.ok - ok)
        # An encoder is not always deterministic; mostly the same bytes come again.
        variant = draw.choice((0, 0, 0, 1, 2))
        contents = {
            "parquet": {"ok": sorted(said.ok), "rejected": [], "shard": shard_id, "variant": variant},
            "rejected": {"ok": [], "rejected": sorted(said.rejected), "shard": shard_id, "variant": variant},
        }
        generation_in_names = 0 if self.habits.names_files_without_generation else generation
        commit = Commit(
            shard_id=shard_id,
            generation=generation,
            nonce=self.world.nonce(),
            fingerprint="",
            source_uri="",
            source_size_bytes=None,
            source_etag=None,
            files=(),
            counts=said.counts,
            format_version=1,
            code_version="",
            created_at="",
            replaces=replaces,
            keys=None if before is None else keys,
            shard_counts=None if generation == 0 else after.counts,
        )
        data = {content: json.dumps(value).encode() for content, value in contents.items()}

        def put(content: str, bytes_: bytes) -> FileStat:
            file = protocol.put_data_file(
                self.store,
                local_file(bytes_),
                shard_id=shard_id,
                content=content,  # type: ignore[arg-type]
                num_rows=0,
                generation=generation_in_names,
            )
            self._originals[file.key] = bytes_
            return file

        if self.habits.record_before_data:
            named = tuple(self._unstored(c, b, shard_id, generation) for c, b in data.items())
            self._commit(name, replace(commit, files=named))
            for content, bytes_ in data.items():
                put(content, bytes_)
            return
        files = tuple(put(content, bytes_) for content, bytes_ in data.items())
        if self.habits.deadline_s is not None and self.world.now - started > self.habits.deadline_s:
            raise _TooLateError
        self._commit(name, replace(commit, files=files))

    def _unstored(self, content: str, data: bytes, shard_id: str, generation: int) -> FileStat:
        path = local_file(data)
        sha256 = protocol.sha256_of_file(path)
        extension = protocol._EXTENSIONS[content]
        name = protocol.record_name(shard_id, generation)
        key = f"data/{sha256[:2]}/{name}-{sha256[:16]}.{extension}"
        self._originals[key] = data
        return FileStat(key=key, num_bytes=len(data), sha256=sha256, num_rows=0, content=content)  # type: ignore[arg-type]

    def _commit(self, name: str, commit: Commit) -> None:
        try:
            outcome = protocol.commit_shard(self.store, commit)
        except StorageError:
            if self.habits.deletes_when_it_failed:
                self._delete(commit)
            raise
        self.world.claims.append(("commit", name, protocol.name_of(commit), commit.nonce, outcome))
        self.world.note(f"{protocol.name_of(commit)}: {outcome}")
        if outcome == "lost_race":
            if self.habits.deletes_when_it_lost:
                self._delete(commit)
            if self.habits.takes_next_free_generation and commit.generation:
                shard = protocol.read_shard(self.store, commit.shard_id)
                assert shard is not None
                self._commit(name, replace(commit, generation=shard.next_generation))

    def _delete(self, commit: Commit) -> None:
        for file in commit.files:
            self.store.delete(file.key)

    def publish(self, name: str, done: set[str]) -> None:
        """A snapshot, and the result line of the run that made it."""

        def publish() -> None:
            snapshot = protocol.publish_snapshot(self.store)
            self.world.claims.append(("snapshot", name, snapshot.number, snapshot.digest, frozenset(done)))

        self._tolerant(publish)

    def publish_often(self, name: str) -> None:
        """A job that publishes every now and then."""
        for _ in range(3):
            self.world.sleep(self.world.random.uniform(0, 3))
            self.publish(name, set())

    def collect(self, name: str) -> None:
        """A job that removes garbage every now and then."""
        for _ in range(2):
            self.world.sleep(self.world.random.choice((0.0, 0.5, 2.0, 5000.0)))
            self._tolerant(lambda: pipeline.collect.collect_garbage(self.store, delete=True))

    def read(self, name: str) -> None:
        """A training run: pins a snapshot, reads all of it, and later all of it again."""
        self.world.sleep(self.world.random.uniform(0, 3))
        pinned: list[protocol.Snapshot] = []

        def pin() -> None:
            latest = protocol.latest_snapshot(self.store)
            if latest is not None:
                pinned.append(latest)

        if not self._tolerant(pin) or not pinned:
            return
        (snapshot,) = pinned
        seen: list[dict[str, str]] = []
        for _ in range(2):
            self._tolerant(lambda: seen.append(self._epoch(protocol.read_snapshot(self.store, snapshot.number))))
            self.world.sleep(self.world.random.uniform(0, 3))
        if seen and seen[0] != seen[-1]:
            self.world.violations.append(f"snapshot {snapshot.number} was {seen[0]}, then {seen[-1]}")

    def _epoch(self, snapshot: protocol.Snapshot) -> dict[str, str]:
        """The samples of a snapshot with the hash of the file that each is read from."""
        samples: dict[str, str] = {}
        for shard in protocol.decided_shards(snapshot.commits):
            of_shard: dict[str, str] = {}
            for commit in shard.commits:
                for file in commit.files:
                    for key in self._held(file)["ok"]:
                        of_shard.setdefault(key, file.sha256)
            if len(of_shard) != shard.counts.num_records:
                self.world.violations.append(
                    f"snapshot {snapshot.number} counts {shard.counts.num_records} records of {shard.shard_id}, "
                    f"its files hold {sorted(of_shard)}"
                )
            samples |= of_shard
        return samples

    def _tolerant(self, act: Callable[[], object]) -> bool:
        """Whether it ended well. What an outage or expired credentials explain is no violation, anything else is."""
        try:
            act()
        except (_RottenError, _TooLateError):
            return False
        except StorageError as error:
            if type(error) not in (StorageError, StorageUnavailableError, CredentialsExpiredError):
                raise
            self.world.note(f"failed: {error}")
            return False
        return True


class _RottenError(Exception):
    """A file that the world itself damaged; what a reader does with it is no matter of the protocol."""


class _TooLateError(Exception):
    """An attempt passed its deadline and gives up before it commits."""
