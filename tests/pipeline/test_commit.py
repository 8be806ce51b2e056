"""What is promised of the commit protocol, to a local folder and to a real S3 store alike.

A shard is decided once, whoever tries and however often; an attempt knows whether it was the one, also when the answer
was lost; a kill at any point leaves a readable output; a snapshot never changes; nothing is decided by a clock.
Outcomes that a store shows only by bad luck are made by a wrapper around the real store.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from commits import later_generation, make_commit
from servers import BIN, FaultProxy, free_ports, s3_variables, stop, wait_for_http

import pipeline.collect
import pipeline.commit
import pipeline.store
from pipeline.commit import (
    DecidedShard,
    Snapshot,
    _commit_key,
    _commit_of,
    _json_bytes,
    accounts,
    check_store,
    commit_shard,
    committed_ids,
    create_once,
    decided_shards,
    fetch_data_file,
    fingerprint_of,
    has_stated_bytes,
    latest_snapshot,
    load_commits,
    open_dataset,
    parse_record_name,
    publish_snapshot,
    put_data_file,
    read_commit,
    read_data_file,
    read_manifest,
    read_shard,
    read_snapshot,
    record_name,
)
from pipeline.errors import (
    ConfigMismatchError,
    DamagedObjectError,
    ObjectExistsError,
    OutcomeUnknownError,
    StorageError,
    StorageNotFoundError,
    StorageUnavailableError,
    UsageError,
)
from pipeline.records import DatasetManifest, FileStat, ModelFacts, sum_counts
from pipeline.storage import ObjectStore, open_store

Answer = Callable[["Wayward", str, bytes], None]


def published(store: ObjectStore) -> Snapshot:
    """A new snapshot, as it is read."""
    return read_snapshot(store, publish_snapshot(store).number)


class Wayward:
    """A store whose creates end as the next of `answers` says; all else goes to the real one."""

    def __init__(self, store: ObjectStore, *answers: Answer) -> None:
        self.store = store
        self.answers = list(answers)
        self.num_creates = 0

    def put_if_absent(self, key: str, data: bytes) -> None:
        self.num_creates += 1
        if self.answers:
            self.answers.pop(0)(self, key, data)
        else:
            self.store.put_if_absent(key, data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def landed_but_unanswered(wayward: Wayward, key: str, data: bytes) -> None:
    wayward.store.put_if_absent(key, data)
    raise OutcomeUnknownError("the answer was lost")


def landed_and_refused_when_repeated(wayward: Wayward, key: str, data: bytes) -> None:
    wayward.store.put_if_absent(key, data)
    wayward.store.put_if_absent(key, data)


def never_arrived(wayward: Wayward, key: str, data: bytes) -> None:
    raise OutcomeUnknownError("the request was lost")


def refused_though_absent(wayward: Wayward, key: str, data: bytes) -> None:
    raise ObjectExistsError("a rival's create was in flight, and then failed")


def denied(wayward: Wayward, key: str, data: bytes) -> None:
    raise StorageError("denied")


def rival_lands_first(wayward: Wayward, key: str, data: bytes) -> None:
    wayward.store.put_if_absent(key, rival_of(data))
    wayward.store.put_if_absent(key, data)


def rival_lands_and_the_answer_is_lost(wayward: Wayward, key: str, data: bytes) -> None:
    wayward.store.put_if_absent(key, rival_of(data))
    raise OutcomeUnknownError("the answer was lost")


def rival_of(data: bytes) -> bytes:
    return json.dumps(json.loads(data) | {"nonce": "rival"}).encode()


def make_manifest(**changes: object) -> DatasetManifest:
    fields = {"fps": 8.0, "buckets": ("256x256x17", "256x256x1"), "store": "mean", "weights": "ab" * 32} | changes
    model = ModelFacts(
        model="small",
        revision=None,
        weights_sha256="ab" * 32,
        is_trained=True,
        scaling_factor=0.18,
        shift_factor=0.0,
        latent_channels=4,
        temporal_compression=4,
        spatial_compression=8,
    )
    return DatasetManifest(
        format_version=1,
        fingerprint=fingerprint_of(fields),
        fingerprint_fields=fields,
        model=model,
        kind="mean",
        latent_dtype="float16",
        passthrough={"width": "int64"},
    )


@pytest.mark.parametrize(
    ("answers", "outcome", "num_creates"),
    [
        ((), "committed", 1),
        ((landed_but_unanswered,), "committed", 1),
        ((landed_and_refused_when_repeated,), "committed", 1),
        ((never_arrived,), "committed", 2),
        ((refused_though_absent,), "committed", 2),
        ((never_arrived, refused_though_absent, landed_but_unanswered), "committed", 3),
        ((rival_lands_first,), "lost_race", 1),
        ((rival_lands_and_the_answer_is_lost,), "lost_race", 1),
        ((never_arrived, rival_lands_first), "lost_race", 2),
    ],
)
def test_an_outcome_is_decided_by_reading_back_the_nonce(
    answers: tuple[Answer, ...], outcome: str, num_creates: int, store: ObjectStore
) -> None:
    commit = make_commit()
    wayward = Wayward(store, *answers)
    assert commit_shard(wayward, commit) == outcome  # type: ignore[arg-type]
    assert wayward.num_creates == num_creates
    standing = read_commit(store, commit.shard_id)
    assert standing is not None
    assert standing.nonce == (commit.nonce if outcome == "committed" else "rival")
    assert len(list(store.list("commits/"))) == 1


@pytest.mark.parametrize("what", ["lose", "drop", "500", "503", "409"])
def test_a_commit_over_a_bad_line_is_recognised_as_ones_own(
    what: str, proxy: FaultProxy, far_store: ObjectStore
) -> None:
    commit = make_commit()
    proxy.first(2, what, "PUT", f"{commit.shard_id}.json")
    assert commit_shard(far_store, commit) == "committed"
    proxy.first(2, what, "PUT", f"{commit.shard_id}.json")
    assert commit_shard(far_store, make_commit()) == "lost_race"
    assert list(load_commits(far_store)) == [commit]


def test_a_denied_create_ends_the_attempt_at_once(store: ObjectStore) -> None:
    wayward = Wayward(store, denied)
    with pytest.raises(StorageError, match="denied"):
        commit_shard(wayward, make_commit())  # type: ignore[arg-type]
    assert wayward.num_creates == 1
    assert committed_ids(store) == set()


def test_an_outcome_that_cannot_be_learnt_says_that_trying_again_is_safe(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.store, "RETRY_BUDGET_S", 0.3)
    commit = make_commit()
    with pytest.raises(StorageUnavailableError, match=r"trying again is safe. Last answer: the request was lost"):
        commit_shard(Wayward(store, *[never_arrived] * 1000), commit)  # type: ignore[arg-type]
    assert commit_shard(store, commit) == "committed"


def test_committing_twice_is_the_same_commit_and_another_attempt_loses(store: ObjectStore) -> None:
    first, second = make_commit(), make_commit()
    assert commit_shard(store, first) == "committed"
    assert commit_shard(store, first) == "committed"
    assert commit_shard(store, second) == "lost_race"
    assert read_commit(store, first.shard_id) == first


_RIVAL = """
import sys
from pipeline.commit import create_once
from pipeline.storage import open_store
store, name, count = open_store(sys.argv[1]), sys.argv[2], int(sys.argv[3])
store.find("warm-up")
print("ready", flush=True)
sys.stdin.readline()
for number in range(count):
    print(create_once(store, f"commits/{number}", name.encode()).decode(), flush=True)
"""


def test_racing_processes_all_see_the_same_winner_of_every_shard(store: ObjectStore) -> None:
    command = [sys.executable, "-c", _RIVAL, store.root_uri]
    rivals = [
        subprocess.Popen([*command, f"rival-{number}", "12"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(3)
    ]
    for rival in rivals:
        assert rival.stdout is not None
        assert rival.stdout.readline() == "ready\n"
    for rival in rivals:
        assert rival.stdin is not None
        rival.stdin.write("go\n")
        rival.stdin.flush()
    seen = [rival.communicate()[0].split() for rival in rivals]
    assert [rival.returncode for rival in rivals] == [0, 0, 0]
    assert seen[0] == seen[1] == seen[2] == [store.get(f"commits/{number}").decode() for number in range(12)]


def test_a_commit_comes_back_as_it_was_written(store: ObjectStore) -> None:
    commit = make_commit(source_uri="/in/ümlaut \udcff.tar", source_etag='"e"')
    commit_shard(store, commit)
    retry = later_generation(commit, 1, keys=("ümlaut \udcff", "b"))
    commit_shard(store, retry)
    assert read_commit(store, commit.shard_id) == commit
    assert read_commit(store, commit.shard_id, generation=1) == retry
    assert read_commit(store, commit.shard_id, generation=2) is None
    assert committed_ids(store) == {commit.shard_id, f"{commit.shard_id}.r1"}
    assert list(load_commits(store)) == [commit, retry]
    assert published(store).commits == (commit, retry)
    assert latest_snapshot(store) == published(store)


def test_a_shard_is_what_its_generations_together_say(store: ObjectStore) -> None:
    first = make_commit("a")
    assert read_shard(store, "a") is None
    commit_shard(store, first)
    assert read_shard(store, "a") == DecidedShard(
        shard_id="a", commits=(first,), counts=first.counts, next_generation=1
    )
    retry = later_generation(first, 1)
    repair = later_generation(first, 2, replaces="a")
    repaired_again = later_generation(first, 3, replaces="a.r2")
    for commit in (retry, repair, repaired_again):
        commit_shard(store, commit)
    shard = read_shard(store, "a")
    assert shard is not None
    assert shard.commits == (retry, repaired_again)
    assert shard.counts == repaired_again.shard_counts
    assert shard.next_generation == 4
    other = make_commit("b", num_records=7)
    commit_shard(store, other)
    snapshot = published(store)
    assert decided_shards(snapshot.commits) == (shard, read_shard(store, "b"))
    assert snapshot.num_records == 5 + 7
    assert json.loads(store.get(f"snapshots/{snapshot.number:012d}.json"))["num_records"] == 12


@pytest.mark.parametrize("named", [(), ("a",), ("a", "b", "none")])
def test_the_accounts_of_many_shards_are_those_of_the_last_record_of_each(named: tuple[str, ...]) -> None:
    a, b, c, other = (make_commit(name, num_records=number) for number, name in enumerate("abco", 1))
    lost = {"reasons": {"timeout": 2}, "num_videos": 3, "num_videos_rejected": 2}
    a = dataclasses.replace(a, counts=dataclasses.replace(a.counts, **lost))
    commits = [later_generation(a, 2), a, b, c, later_generation(a, 1, num_records=2), other]
    expected = decided_shards(commits)[:3]
    for order in itertools.permutations(commits):
        found = accounts(lambda order=order: order, {"a", "b", "c", "open"}, named)  # type: ignore[misc]
        assert found.num_shards == 3
        assert found.counts == sum_counts(shard.counts for shard in expected)
        assert found.of_shards == {shard.shard_id: shard.counts for shard in expected if shard.shard_id in named}
    assert accounts(list, {"a"}).num_shards == 0


def test_a_generation_made_from_an_older_state_loses(store: ObjectStore) -> None:
    first = make_commit("a")
    commit_shard(store, first)
    retry, late = later_generation(first, 1), later_generation(first, 1)
    assert commit_shard(store, retry) == "committed"
    assert commit_shard(store, late) == "lost_race"
    assert commit_shard(store, retry) == "committed"
    repair, late = later_generation(first, 2, replaces="a"), later_generation(first, 2, replaces="a")
    assert commit_shard(Wayward(store, landed_and_refused_when_repeated), repair) == "committed"  # type: ignore[arg-type]
    assert commit_shard(Wayward(store, never_arrived), late) == "lost_race"  # type: ignore[arg-type]
    assert [commit.nonce for commit in load_commits(store)] == [first.nonce, retry.nonce, repair.nonce]


def test_no_generation_is_skipped(store: ObjectStore) -> None:
    first = make_commit("a")
    with pytest.raises(StorageNotFoundError):
        commit_shard(store, later_generation(first, 1))
    commit_shard(store, first)
    with pytest.raises(StorageNotFoundError):
        commit_shard(store, later_generation(first, 2))
    with pytest.raises(AssertionError, match=r"cannot replace a\.r1"):
        commit_shard(store, later_generation(first, 1, replaces="a.r1"))
    assert committed_ids(store) == {"a"}


def test_a_list_that_missed_a_generation_is_completed_from_its_successor(store: ObjectStore) -> None:
    first = make_commit("a")
    retries = [later_generation(first, generation) for generation in (1, 2)]
    for commit in (first, *retries):
        commit_shard(store, commit)

    class Torn(Wayward):
        def list(self, prefix: str) -> Iterator[Any]:
            return (info for info in self.store.list(prefix) if not info.key.endswith(("/a.json", "/a.r1.json")))

    snapshot = published(Torn(store))  # type: ignore[arg-type]
    assert snapshot.commits == (first, *retries)


@pytest.mark.parametrize("shard_id", ["00000-1234abcd", "a.b-1234abcd", "x.r0", "x.r1-1234abcd"])
@pytest.mark.parametrize("generation", [0, 1, 12])
def test_a_record_name_gives_shard_and_generation_back(shard_id: str, generation: int) -> None:
    assert parse_record_name(record_name(shard_id, generation)) == (shard_id, generation)


def test_a_shard_id_that_could_be_taken_for_a_generation_is_refused() -> None:
    with pytest.raises(AssertionError, match="like the name of a later generation"):
        record_name("video.r1")


def test_commits_load_in_the_order_of_their_names_and_a_missing_one_is_an_error(store: ObjectStore) -> None:
    commits = [make_commit(f"{number:05d}-aaaaaaaa") for number in range(20)]
    for commit in reversed(commits):
        commit_shard(store, commit)
    assert list(load_commits(store)) == commits
    assert list(load_commits(store, [commits[7].shard_id, commits[3].shard_id])) == [commits[3], commits[7]]
    with pytest.raises(StorageNotFoundError):
        list(load_commits(store, ["no-such-shard"]))


def test_a_commit_of_another_process_is_listed_at_once(store: ObjectStore) -> None:
    assert committed_ids(store) == set()
    commit = make_commit()
    commit_shard(open_store(store.root_uri), commit)
    assert committed_ids(store) == {commit.shard_id}


def test_a_record_that_is_damaged_or_from_another_layout_is_named(store: ObjectStore) -> None:
    commit = make_commit()
    key = pipeline.commit._commit_key(commit.shard_id)
    store.put_if_absent(key, b'{"shard_id": "00000-1234abcd", "fil')
    with pytest.raises(DamagedObjectError, match=f"{commit.shard_id}.json cannot be read"):
        read_commit(store, commit.shard_id)
    with pytest.raises(DamagedObjectError):
        commit_shard(store, commit)


def test_a_dataset_is_opened_by_many_and_described_once(store: ObjectStore) -> None:
    assert read_manifest(store) is None
    manifests = [dataclasses.replace(make_manifest(), passthrough={f"column_{n}": "int64"}) for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda manifest: open_dataset(store, manifest), manifests))
    assert opened[0] == opened[1] == opened[2] == opened[3] == read_manifest(store)
    assert opened[0].fingerprint == make_manifest().fingerprint
    assert opened[0].model == make_manifest().model


def test_another_configuration_is_refused_with_each_difference(store: ObjectStore) -> None:
    open_dataset(store, make_manifest())
    with pytest.raises(
        ConfigMismatchError, match=r"fps: 8.0 there, 16.0 asked for; new: None there, 1 asked for"
    ) as caught:
        open_dataset(store, make_manifest(fps=16.0, new=1))
    assert caught.value.differences == {"fps": (8.0, 16.0), "new": (None, 1)}
    assert pickle.loads(pickle.dumps(caught.value)).differences == caught.value.differences
    assert read_manifest(store) is not None


def test_a_fingerprint_knows_values_and_not_their_order() -> None:
    assert fingerprint_of({"a": 1, "b": (1, 2)}) == fingerprint_of({"b": [1, 2], "a": 1})
    assert fingerprint_of({"a": 1}) != fingerprint_of({"a": 2})
    assert fingerprint_of({"a": 1}) != fingerprint_of({"a": "1"})


@pytest.mark.parametrize(
    ("content", "extension"), [("parquet", "parquet"), ("webdataset", "tar"), ("rejected", "rejected.parquet")]
)
def test_a_data_file_is_named_by_its_content(content: Any, extension: str, store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"rows")
    sha256 = hashlib.sha256(b"rows").hexdigest()
    file = put_data_file(store, tmp_path / "x", shard_id="00000-1234abcd", content=content, num_rows=3)
    assert file == FileStat(
        key=f"data/{sha256[:2]}/00000-1234abcd-{sha256[:16]}.{extension}",
        num_bytes=4,
        sha256=sha256,
        num_rows=3,
        content=content,
        blake3=None if content == "rejected" else blake3(b"rows").hexdigest(),
    )
    assert file == put_data_file(store, tmp_path / "x", shard_id="00000-1234abcd", content=content, num_rows=3)
    later = put_data_file(store, tmp_path / "x", shard_id="00000-1234abcd", content=content, num_rows=3, generation=2)
    assert later.key == f"data/{sha256[:2]}/00000-1234abcd.r2-{sha256[:16]}.{extension}"
    assert read_data_file(store, file) == b"rows"
    fetch_data_file(store, file, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"rows"


def test_readers_check_the_faster_digest_and_sha256_where_it_is_absent_or_disagrees(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"rows")
    file = put_data_file(store, tmp_path / "x", shard_id="s", content="parquet", num_rows=1)
    for stated in (None, "0" * 64, file.blake3):
        assert has_stated_bytes(dataclasses.replace(file, blake3=stated), b"rows")
        assert not has_stated_bytes(dataclasses.replace(file, blake3=stated), b"rowz")
        assert not has_stated_bytes(dataclasses.replace(file, blake3=stated), b"rows and more")
        fetch_data_file(store, dataclasses.replace(file, blake3=stated), tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == b"rows"
    monkeypatch.setattr(hashlib, "sha256", None)
    assert has_stated_bytes(file, b"rows")


def test_records_of_versions_without_a_field_are_read_and_those_with_one_more_too(store: ObjectStore) -> None:
    commit = make_commit("s", 1)
    value = json.loads(_json_bytes(commit))
    for file in value["files"]:
        del file["blake3"]
        file["of_a_later_version"] = "?"
    assert _commit_of(store, "key", json.dumps(value).encode()) == commit


@pytest.mark.parametrize("with_blake3", [True, False])
@pytest.mark.parametrize("damage", [b"", b"row", b"rowz", b"rows and more"])
def test_a_damaged_data_file_is_never_handed_out(
    damage: bytes, with_blake3: bool, store: ObjectStore, tmp_path: Path
) -> None:
    (tmp_path / "x").write_bytes(b"rows")
    file = put_data_file(store, tmp_path / "x", shard_id="s", content="parquet", num_rows=1)
    file = file if with_blake3 else dataclasses.replace(file, blake3=None)
    store.delete(file.key)
    store.put_if_absent(file.key, damage)
    with pytest.raises(DamagedObjectError, match=f"its commit states 4 bytes with SHA-256 {file.sha256}"):
        read_data_file(store, file)
    with pytest.raises(DamagedObjectError):
        fetch_data_file(store, file, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    store.delete(file.key)
    with pytest.raises(StorageNotFoundError):
        read_data_file(store, file)


_ATTEMPT = """
import json, sys
from pathlib import Path
from pipeline.commit import put_data_file
from pipeline.storage import open_store
store, path = open_store(sys.argv[1]), Path(sys.argv[2])
file = put_data_file(store, path, shard_id="00000-1234abcd", content="parquet", num_rows=1)
print(file.key, flush=True)
sys.stdin.readline()
"""


def test_a_writer_killed_between_data_and_commit_leaves_a_readable_output(store: ObjectStore, tmp_path: Path) -> None:
    manifest = open_dataset(store, make_manifest())
    done = make_commit("99999-done0000")
    commit_shard(store, done)
    (tmp_path / "x").write_bytes(os.urandom(100_000))
    attempt = subprocess.Popen(
        [sys.executable, "-c", _ATTEMPT, store.root_uri, str(tmp_path / "x")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert attempt.stdout is not None
    orphan = attempt.stdout.readline().strip()
    attempt.send_signal(signal.SIGKILL)
    attempt.communicate()
    assert store.head(orphan) is not None
    assert committed_ids(store) == {done.shard_id}
    assert published(store).commits == (done,)
    assert read_manifest(store) == manifest
    file = put_data_file(store, tmp_path / "x", shard_id="00000-1234abcd", content="parquet", num_rows=1)
    assert file.key == orphan
    commit = make_commit(files=(file,))
    assert commit_shard(store, commit) == "committed"
    assert published(store).commits == (commit, done)


def test_snapshots_are_numbered_and_only_change_by_commits(store: ObjectStore) -> None:
    assert latest_snapshot(store) is None
    empty = published(store)
    assert (empty.number, empty.commits, empty.contents.segments) == (1, (), ())
    first, second = make_commit("a"), make_commit("b", num_records=3)
    commit_shard(store, second)
    two = published(store)
    assert (two.number, two.commits) == (2, (second,))
    assert publish_snapshot(store) == two.contents
    commit_shard(store, first)
    three = published(store)
    assert (three.number, three.commits, three.num_records) == (3, (first, second), 5)
    assert read_snapshot(store, 2) == two
    assert latest_snapshot(store) == three
    assert [info.key for info in store.list("snapshots/")] == [f"snapshots/{n:012d}.json" for n in (1, 2, 3)]
    with pytest.raises(StorageNotFoundError, match="000000000009"):
        read_snapshot(store, 9)


def test_full_segments_are_kept_and_loose_commits_packed_anew(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.commit, "SEGMENT_COMMITS", 3)
    commits = [make_commit(f"{number:05d}") for number in range(8)]
    for commit in commits[4:]:
        commit_shard(store, commit)
    before = publish_snapshot(store)
    assert [segment.num_commits for segment in before.segments] == [3, 1]
    for commit in commits[:4]:
        commit_shard(store, commit)
    after = publish_snapshot(store)
    assert [segment.num_commits for segment in after.segments] == [3, 3, 2]
    assert after.segments[0] == before.segments[0]
    assert read_snapshot(store, after.number).commits == tuple(commits)
    assert read_snapshot(store, before.number).commits == tuple(commits[4:])


def test_publishing_keeps_little_of_each_commit_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.commit, "SEGMENT_COMMITS", 200)
    monkeypatch.setattr(pipeline.commit, "_READ_AHEAD", 100)
    store = open_store(str(tmp_path))
    num_commits = 1100
    changes = {f"/in/{number}.mp4": "a version of then" for number in range(50)}
    for number in range(num_commits):
        commit = make_commit(f"{number:05d}", source_changes=changes)
        store.put_if_absent(_commit_key(commit.shard_id), _json_bytes(commit))
    peaks = []
    for _ in ("all are new", "all but one are published"):
        tracemalloc.start()
        publish_snapshot(store)
        peaks.append(tracemalloc.get_traced_memory()[1] / num_commits)
        tracemalloc.stop()
        commit_shard(store, make_commit("another"))
    # These commits take 9 kB each; a name, a nonce and what the list of a folder holds do not.
    assert max(peaks) < 3000, peaks


def test_the_digest_depends_on_the_commits_and_not_on_how_they_were_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, bit_by_bit = open_store(str(tmp_path / "a")), open_store(str(tmp_path / "b"))
    commits = [make_commit(f"{number:05d}") for number in range(5)]
    for commit in commits:
        commit_shard(at_once, commit)
    for commit in reversed(commits):
        commit_shard(bit_by_bit, commit)
        publish_snapshot(bit_by_bit)
    assert publish_snapshot(at_once).digest == publish_snapshot(bit_by_bit).digest
    commit_shard(at_once, make_commit("other"))
    assert publish_snapshot(at_once).digest != publish_snapshot(bit_by_bit).digest


def test_segments_are_the_same_bytes_whenever_they_are_written(tmp_path: Path) -> None:
    commit = make_commit()
    segments = []
    for name in ("a", "b"):
        store = open_store(str(tmp_path / name))
        commit_shard(store, commit)
        segments += publish_snapshot(store).segments
    assert segments[0] == segments[1]
    data = (tmp_path / "a" / segments[0].key).read_bytes()
    assert segments[0].key == f"manifests/{hashlib.sha256(data).hexdigest()[:16]}.jsonl.gz"
    assert data[4:8] == bytes(4), "no time of writing in the gzip header"
    assert json.loads(gzip.decompress(data))["nonce"] == commit.nonce


def test_a_publisher_that_lost_its_number_merges_again_under_the_next(store: ObjectStore) -> None:
    ours, theirs = make_commit("ours"), make_commit("theirs")
    commit_shard(store, ours)

    class Overtaken(Wayward):
        def put_if_absent(self, key: str, data: bytes) -> None:
            if key == "snapshots/000000000001.json":
                commit_shard(self.store, theirs)
                assert publish_snapshot(self.store).number == 1
                commit_shard(self.store, make_commit("late"))
            self.store.put_if_absent(key, data)

    snapshot = published(Overtaken(store))  # type: ignore[arg-type]
    assert snapshot.number == 2
    assert [commit.shard_id for commit in snapshot.commits] == ["late", "ours", "theirs"]
    assert latest_snapshot(store) == snapshot


def test_racing_publishers_lose_no_commit_and_take_each_number_once(store: ObjectStore) -> None:
    gate = threading.Barrier(3)

    def work(number: int) -> None:
        gate.wait()
        for step in range(3):
            commit_shard(store, make_commit(f"{number}-{step}"))
            publish_snapshot(store)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    last = published(store)
    assert {commit.shard_id for commit in last.commits} == {f"{n}-{s}" for n in range(3) for s in range(3)}
    names: set[str] = set()
    for number in range(1, last.number + 1):
        newer = {commit.shard_id for commit in read_snapshot(store, number).commits}
        assert names < newer, "each snapshot holds its predecessor and something new"
        names = newer


def test_a_publisher_that_dies_between_segments_and_snapshot_is_harmless(store: ObjectStore) -> None:
    commit_shard(store, make_commit())

    class Dies(Wayward):
        def put_if_absent(self, key: str, data: bytes) -> None:
            if key.startswith("snapshots/"):
                raise KeyboardInterrupt
            self.store.put_if_absent(key, data)

    with pytest.raises(KeyboardInterrupt):
        publish_snapshot(Dies(store))  # type: ignore[arg-type]
    assert len(list(store.list("manifests/"))) == 1
    assert latest_snapshot(store) is None
    assert publish_snapshot(store).number == 1
    assert len(list(store.list("manifests/"))) == 1


def test_a_damaged_segment_is_named(store: ObjectStore) -> None:
    commit_shard(store, make_commit())
    segment = publish_snapshot(store).segments[0]
    store.delete(segment.key)
    store.put_if_absent(segment.key, gzip.compress(b"{}\n"))
    with pytest.raises(DamagedObjectError, match=segment.key):
        latest_snapshot(store)


def test_what_decides_asks_no_clock() -> None:
    for module in (pipeline.commit, pipeline.collect):
        assert not {"time", "datetime"} & vars(module).keys(), module.__name__
    known_of_an_object = {field.name for field in dataclasses.fields(pipeline.store.ObjectInfo)}
    assert known_of_an_object == {"key", "num_bytes", "etag"}, "not even when it was written"


def test_a_store_that_keeps_its_promises_passes_and_is_left_clean(store: ObjectStore) -> None:
    check_store(store, single_writer=False)
    assert list(store.list("")) == []


def test_a_store_that_cannot_be_written_is_not_called_unconditional(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Not a directory"):
        check_store(open_store(str(tmp_path / "file" / "below")), single_writer=True)


@pytest.fixture
def rclone_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A real store that ignores If-None-Match."""
    (tmp_path / "rclone" / "bucket").mkdir(parents=True)
    port, log = free_ports(1), tmp_path / "rclone.log"
    command = [str(BIN / "rclone"), "serve", "s3", str(tmp_path / "rclone"), "--addr", f"127.0.0.1:{port}"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--auth-key", "key,secret", "--config", os.devnull], stdout=output, stderr=output
        )
    try:
        endpoint = f"http://127.0.0.1:{port}"
        wait_for_http(endpoint, process, log)
        for name, value in s3_variables(endpoint, "key", "secret").items():
            monkeypatch.setenv(name, value)
        yield open_store("s3://bucket/output")
    finally:
        stop(process)


def test_a_store_that_ignores_conditions_is_refused_unless_one_writer_is_promised(rclone_store: ObjectStore) -> None:
    rclone_store.put_if_absent("x", b"first")
    rclone_store.put_if_absent("x", b"second")
    assert rclone_store.get("x") == b"second", "this store does ignore the condition"
    with pytest.raises(UsageError, match=r"overwrites an object.*--single-writer"):
        check_store(rclone_store, single_writer=False)
    check_store(rclone_store, single_writer=True)
    assert create_once(rclone_store, "y", b"first") == b"first"
    assert create_once(rclone_store, "y", b"second") == b"first"
    first, second = make_commit(), make_commit()
    assert [commit_shard(rclone_store, commit) for commit in (first, second)] == ["committed", "lost_race"]
    assert published(rclone_store).commits == (first,)
