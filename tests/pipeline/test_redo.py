"""What an input that lives on asks for: nights that overlap, rejections tried once more, damaged records repaired.

By a real encoder on real pictures; the driver's part, with Ray, is in tests/integration.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from builders import CLIP_STILLS, tar_bytes
from commits import later_generation, make_commit
from latents import manifest_of_worker

from pipeline import redo
from pipeline.actors import EncodeActor
from pipeline.audit import audit
from pipeline.cli import main
from pipeline.commit import (
    DecidedShard,
    commit_shard,
    decided_shards,
    known_commits,
    name_of,
    open_dataset,
    publish_snapshot,
    put_data_file,
    snapshot_commits,
)
from pipeline.committed import FileCache
from pipeline.config import JobConfig, parse_arguments
from pipeline.errors import StorageError
from pipeline.inputs import read_slice
from pipeline.metrics import RunMetrics
from pipeline.packed import Names
from pipeline.plan import changed_inputs, plan_shards
from pipeline.progress import Progress
from pipeline.records import Commit, DatasetManifest, ShardSpec
from pipeline.redo import Retries, order_repair, ordered_repairs, repairs, retries
from pipeline.run import RunSummary, _again, _before, _Ledger, run
from pipeline.storage import ObjectStore, open_store

PICTURES = {"a": CLIP_STILLS[0], "b": CLIP_STILLS[1], "c": CLIP_STILLS[1]}


@dataclass
class Job:
    """A job that runs in this process: input, output and one encoder."""

    folder: Path
    config: JobConfig
    store: ObjectStore
    actor: EncodeActor
    manifest: DatasetManifest

    def specs(self) -> Sequence[ShardSpec]:
        return plan_shards(self.config.source, self.store)

    def shards(self) -> dict[str, DecidedShard]:
        return {shard.shard_id: shard for shard in decided_shards(known_commits(self.store))}

    def encode(self, specs: Sequence[ShardSpec]) -> list[str]:
        return [self.actor.process(spec, self.manifest).outcome for spec in specs]

    def before(self, *reasons: str) -> Mapping[str, DecidedShard]:
        """Of the decided shards those that a run keeps which retries these reasons."""
        config = replace(self.config, run=replace(self.config.run, retry_failed=reasons))
        specs, shards = self.specs(), self.shards()
        found = _before(self.store, specs, config)
        assert len(found.decided) == len(shards)
        assert all(shard_id in found.decided for shard_id in shards)
        assert all(shards[shard_id] == shard for shard_id, shard in found.shards.items())
        assert changed_inputs(specs, found.shards) == changed_inputs(specs, shards)
        return found.shards

    def retries(self, *reasons: str, max_attempts: int = 3) -> Retries:
        specs, shards = self.specs(), self.before(*reasons)
        changed: dict[str, list[str]] = {}
        for change in changed_inputs(specs, shards):
            changed.setdefault(change.shard_id, []).append(change.uri)
        cache = FileCache(self.folder / "cache", 1 << 30)
        return retries(self.store, specs, shards, reasons, max_attempts=max_attempts, changed=changed, cache=cache)

    def repairs(self) -> list[ShardSpec]:
        shards = self.before()
        return repairs({spec.shard_id: spec for spec in self.specs()}, shards, ordered_repairs(self.store, shards))

    def commits(self) -> dict[str, Commit]:
        return {name_of(commit): commit for commit in known_commits(self.store)}

    def data(self) -> dict[str, bytes]:
        return {info.key: self.store.get(info.key) for info in self.store.list("data/")}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, EncodeActor]]:
    """Encoders by output; one model and its decode children serve the module."""
    made: dict[str, EncodeActor] = {}
    yield made
    for actor in made.values():
        actor.stop()


@pytest.fixture
def job(tmp_path: Path, encoders: dict[str, EncodeActor]) -> Job:
    """A folder of three pictures, "b" of them a file without bytes, as one slice that is not encoded yet."""
    for name, still in PICTURES.items():
        put_picture(tmp_path / "in", name, still)
    (tmp_path / "in" / "b.jpg").write_bytes(b"")
    return started(tmp_path, encoders)


def put_picture(folder: Path, name: str, still: Path) -> None:
    folder.mkdir(exist_ok=True)
    shutil.copyfile(still, folder / f"{name}.jpg")
    shutil.copyfile(still.with_suffix(".txt"), folder / f"{name}.txt")


def started(folder: Path, encoders: dict[str, EncodeActor], *more: str) -> Job:
    flags = ["--input", str(folder / "in"), "--output", str(folder / "out"), "--model", "small", "--format", "both"]
    config = parse_arguments([*flags, "--buckets", "64x64x1", *more])
    store = open_store(config.run.output)
    if not encoders:
        encoders["one"] = EncodeActor(config, "0", "cpu")
    actor = encoders["one"]
    actor._store, actor._config = store, config
    manifest = manifest_of_worker(config, actor.start())
    return Job(folder, config, store, actor, open_dataset(store, manifest))


def test_a_file_that_was_mended_is_encoded_in_a_generation_of_its_own(job: Job) -> None:
    (spec,) = job.specs()
    assert job.encode([spec]) == ["committed"]
    before = job.data()
    assert job.shards()[spec.shard_id].counts.reasons == {"empty_file": 1}
    assert job.retries("timeout").specs == ()
    put_picture(job.folder / "in", "b", PICTURES["b"])
    asked = job.retries("empty_file")
    (again,) = asked.specs
    assert (asked.num_videos, asked.num_spent, asked.refused) == (1, 0, {})
    assert again.shard_id == f"{spec.shard_id}.r1"
    assert job.encode([again]) == ["committed"]
    commit = job.commits()[f"{spec.shard_id}.r1"]
    assert (commit.generation, commit.replaces, commit.keys) == (1, None, ("b",))
    assert (commit.counts.num_videos, commit.counts.num_records) == (1, 1)
    counts = job.shards()[spec.shard_id].counts
    assert (counts.num_videos_ok, counts.num_videos_rejected, counts.reasons) == (3, 0, {})
    assert before.items() <= job.data().items(), "what was there is untouched"
    # The file is another one than planned, and the record says which one it has, so that it is not reported as changed.
    assert changed_inputs(job.specs(), job.shards()) == []
    assert job.encode([again]) == ["already_done"]
    assert job.retries("empty_file").specs == ()
    found = audit(job.store, with_inputs=True)
    assert (found.findings, found.num_inputs) == ((), 3)


def test_a_hopeless_video_is_tried_as_often_as_asked_and_no_more(job: Job) -> None:
    job.encode(job.specs())
    for generation in (1, 2):
        (again,) = job.retries("empty_file").specs
        assert again.redo is not None
        assert again.redo.generation == generation
        assert job.encode([again]) == ["committed"]
    asked = job.retries("empty_file")
    assert (asked.specs, asked.num_videos, asked.num_spent) == ((), 0, 1)
    assert len(job.retries("empty_file", max_attempts=4).specs) == 1
    (shard,) = job.shards().values()
    assert (shard.counts.num_videos, shard.counts.num_videos_rejected) == (3, 1)
    assert audit(job.store).findings == ()


def test_only_the_asked_videos_of_a_tar_are_encoded_again(tmp_path: Path, encoders: dict[str, EncodeActor]) -> None:
    (tmp_path / "in").mkdir()
    picture = PICTURES["a"].read_bytes()
    members = [("a.jpg", picture), ("b.jpg", b""), ("c.jpg", b"no picture"), ("d.jpg", picture)]
    (tmp_path / "in" / "0.tar").write_bytes(tar_bytes(members))
    job = started(tmp_path, encoders)
    job.encode(job.specs())
    asked = job.retries("empty_file")
    assert job.encode(asked.specs) == ["committed"]
    (shard,) = job.shards().values()
    assert [(commit.keys, commit.counts.num_videos) for commit in shard.commits] == [(None, 4), (("b",), 1)]
    assert shard.counts.reasons == {"empty_file": 1, "unreadable": 1}
    # A tar that changed may hold other samples under the same keys.
    (tmp_path / "in" / "0.tar").write_bytes(tar_bytes([*members, ("e.jpg", picture)]))
    asked = job.retries("unreadable")
    assert asked.specs == ()
    assert "changed since it was encoded" in asked.refused[shard.shard_id]


def _then(actions: list[Callable[[], object]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets others act between the encoding of a shard and its commit, in turn."""

    def after_others(*arguments: object) -> object:
        if actions:
            actions.pop(0)()
        return redo.finish(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("pipeline.actors.finish", after_others)


def test_two_runs_that_retry_the_same_make_one_generation(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    (job.folder / "in" / "a.jpg").write_bytes(b"")
    job.encode(job.specs())
    put_picture(job.folder / "in", "a", PICTURES["a"])
    mine, rivals = job.retries("empty_file").specs, job.retries("empty_file").specs
    assert mine == rivals
    _then([lambda: job.encode(rivals)], monkeypatch)
    assert job.encode(mine) == ["lost_race"]
    assert sorted(job.commits()) == sorted([rivals[0].base_id, rivals[0].shard_id])
    assert audit(job.store).findings == ()


def test_two_runs_that_retry_other_reasons_both_get_what_they_asked_for(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job.folder / "in" / "a.jpg").write_bytes(b"no picture")
    (spec,) = job.specs()
    job.encode([spec])
    put_picture(job.folder / "in", "a", PICTURES["a"])
    mine, rivals = job.retries("empty_file", "unreadable").specs, job.retries("unreadable").specs
    _then([lambda: job.encode(rivals)], monkeypatch)
    with pytest.raises(StorageError, match="another run appended generation 1 meanwhile"):
        job.encode(mine)
    assert job.encode(mine) == ["committed"]
    commits = job.commits()
    assert [commits[f"{spec.shard_id}.r{n}"].keys for n in (1, 2)] == [("a",), ("b",)]
    assert audit(job.store).findings == ()


def _damage(job: Job, record: str, content: str = "parquet") -> Path:
    path = Path(job.store.url(next(f.key for f in job.commits()[record].files if f.content == content)))
    path.write_bytes(path.read_bytes()[:-4] + b"????")
    return path


@pytest.mark.parametrize("content", ["parquet", "webdataset", "rejected"])
def test_a_damaged_file_is_put_back_with_the_same_bytes(content: str, job: Job) -> None:
    (spec,) = job.specs()
    job.encode([spec])
    before, commits = job.data(), job.commits()
    for number in (1, 2):
        _damage(job, spec.shard_id, content).unlink() if number == 2 else _damage(job, spec.shard_id, content)
        (record,) = audit(job.store).repairable
        assert order_repair(job.store, record, ["damaged"])
        assert not order_repair(job.store, record, ["damaged"]), "one order at a time"
        (again,) = job.repairs()
        assert job.encode([again]) == ["restored"]
        assert (job.data(), job.commits()) == (before, commits)
        assert job.repairs() == []
        assert len(list(job.store.list("repairs/"))) == 2 * number
    assert audit(job.store).findings == ()


def _as_if_encoded_elsewhere(job: Job, record: str) -> None:
    """Gives a record another Parquet file with the same rows, as another version of pyarrow might have written it."""
    commit = job.commits()[record]
    (old,) = (file for file in commit.files if file.content == "parquet")
    path = job.folder / "other.parquet"
    table = pq.ParquetFile(job.store.url(old.key))
    pq.write_table(table.read(), path, compression="gzip")
    new = put_data_file(job.store, path, shard_id=commit.shard_id, content="parquet", num_rows=old.num_rows)
    files = [asdict(replace(new, bucket_rows=old.bucket_rows) if file == old else file) for file in commit.files]
    (stored,) = (job.folder / "out").glob(f"commits/*/{record}.json")
    stored.write_text(json.dumps(json.loads(stored.read_bytes()) | {"files": files}))


def test_other_bytes_become_a_generation_that_replaces_the_damaged_record(job: Job) -> None:
    (spec,) = job.specs()
    job.encode([spec])
    _as_if_encoded_elsewhere(job, spec.shard_id)
    assert audit(job.store).findings == ()
    counts = job.shards()[spec.shard_id].counts
    damaged = _damage(job, spec.shard_id)
    assert main(["verify", job.store.root_uri, "--requeue"]) == 1
    (again,) = job.repairs()
    assert job.encode([again]) == ["committed"]
    (commit,) = job.shards()[spec.shard_id].commits
    assert (commit.generation, commit.replaces, commit.shard_counts) == (1, spec.shard_id, counts)
    assert damaged.exists(), "nothing is deleted"
    assert job.repairs() == []
    assert job.encode([again]) == ["already_done"]
    assert main(["verify", job.store.root_uri]) == 0


def test_a_retry_that_is_damaged_is_repaired_beside_its_shard(job: Job) -> None:
    (spec,) = job.specs()
    job.encode([spec])
    put_picture(job.folder / "in", "b", PICTURES["b"])
    job.encode(job.retries("empty_file").specs)
    before = job.data()
    for record in (spec.shard_id, f"{spec.shard_id}.r1"):
        _damage(job, record)
        order_repair(job.store, record, [])
    again = job.repairs()
    assert [spec.redo.keys for spec in again if spec.redo] == [None, ("b",)]
    with pytest.raises(StorageError, match="is not what it was then"):
        # The first record rejected "b" as it was then; what is there now must not slip in.
        job.encode(again[:1])
    assert job.encode(again[1:]) == ["restored"]
    (job.folder / "in" / "b.jpg").write_bytes(b"")
    os.utime(job.folder / "in" / "b.jpg", ns=(0, planned_time(job, "b")))
    assert job.encode(job.repairs()) == ["restored"]
    assert job.data() == before


def test_accounts_that_were_stated_while_a_file_could_not_be_read_are_put_right(job: Job) -> None:
    (spec,) = job.specs()
    job.encode([spec])
    put_picture(job.folder / "in", "b", PICTURES["b"])
    job.encode(job.retries("empty_file").specs)
    counts = job.shards()[spec.shard_id].counts
    retry = f"{spec.shard_id}.r1"
    _as_if_encoded_elsewhere(job, retry)
    first = Path(job.store.url(next(f.key for f in job.commits()[spec.shard_id].files if f.content == "parquet")))
    good = first.read_bytes()
    for record in (spec.shard_id, retry):
        _damage(job, record)
    order_repair(job.store, retry, [])
    assert job.encode(job.repairs()) == ["committed"]
    assert job.shards()[spec.shard_id].counts != counts, "what cannot be read is not counted"
    first.write_bytes(good)
    assert [finding.kind for finding in audit(job.store).findings] == ["counts"]
    assert main(["verify", job.store.root_uri, "--requeue"]) == 1
    assert job.encode(job.repairs()) == ["committed"]
    assert job.shards()[spec.shard_id].counts == counts
    assert job.commits()[f"{spec.shard_id}.r3"].replaces == f"{spec.shard_id}.r2"
    assert job.repairs() == []
    assert main(["verify", job.store.root_uri]) == 0


def planned_time(job: Job, key: str) -> int:
    """When a file was changed last before it was planned, in nanoseconds."""
    entries = [entry for spec in job.specs() for entry in read_slice(job.store, spec).entries]
    (version,) = (entry.version for entry in entries if entry.key == key)
    assert version is not None
    return int(version.partition("mtime-")[2].partition("|")[0])


def test_a_repair_from_an_input_that_changed_is_refused_and_stays_ordered(job: Job) -> None:
    (spec,) = job.specs()
    job.encode([spec])
    _damage(job, spec.shard_id)
    order_repair(job.store, spec.shard_id, [])
    put_picture(job.folder / "in", "a", PICTURES["b"])
    with pytest.raises(StorageError, match=r"cannot be repaired from .*not what it was then"):
        job.encode(job.repairs())
    assert list(job.commits()) == [spec.shard_id]
    assert len(job.repairs()) == 1


@pytest.mark.parametrize("content", ["parquet", "webdataset", "rejected"])
def test_a_repair_whose_input_is_gone_replaces_nothing_and_stays_ordered(
    content: str, job: Job, tmp_path: Path
) -> None:
    (spec,) = job.specs()
    job.encode([spec])
    before = job.shards()[spec.shard_id].counts
    path = Path(job.store.url(next(f.key for f in job.commits()[spec.shard_id].files if f.content == content)))
    whole = path.read_bytes()
    _damage(job, spec.shard_id, content)
    assert main(["verify", job.store.root_uri, "--requeue"]) == 1
    repair = job.repairs()
    (job.folder / "in" / "a.jpg").rename(tmp_path / "a.jpg")
    with pytest.raises(StorageError, match=r"not replaced.*gives less now.*1 samples for 2.*'a', not_found"):
        job.encode(repair)
    assert list(job.commits()) == [spec.shard_id]
    assert job.shards()[spec.shard_id].counts == before
    assert main(["verify", job.store.root_uri]) == 1, "it is still damaged"
    (tmp_path / "a.jpg").rename(job.folder / "in" / "a.jpg")
    assert job.encode(job.repairs()) == ["restored"]
    assert path.read_bytes() == whole
    assert job.repairs() == []


def test_a_repair_does_not_trade_one_sample_for_another(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of one rejection more and a sample less balances one of a sample more, if only numbers are compared."""
    (spec,) = job.specs()
    job.encode([spec])
    _damage(job, spec.shard_id)
    order_repair(job.store, spec.shard_id, [])
    (job.folder / "in" / "a.jpg").unlink()
    put_picture(job.folder / "in", "b", PICTURES["b"])
    # As with a web address, which has no version: nothing but the outcome tells that the input is another one.
    monkeypatch.setattr("pipeline.redo._refuse_other_input", lambda *_: None)
    with pytest.raises(StorageError, match=r"2 samples for 2, and 1 rejections .*'a', not_found"):
        job.encode(job.repairs())
    assert list(job.commits()) == [spec.shard_id]


def test_a_repair_beside_a_retry_is_compared_with_what_only_its_record_has(job: Job) -> None:
    (spec,) = job.specs()
    job.encode([spec])
    put_picture(job.folder / "in", "b", PICTURES["b"])
    job.encode(job.retries("empty_file").specs)
    _as_if_encoded_elsewhere(job, f"{spec.shard_id}.r1")
    _damage(job, f"{spec.shard_id}.r1")
    order_repair(job.store, f"{spec.shard_id}.r1", [])
    repair = job.repairs()
    picture = (job.folder / "in" / "b.jpg").read_bytes()
    stamp = (job.folder / "in" / "b.jpg").stat().st_mtime_ns
    (job.folder / "in" / "b.jpg").write_bytes(b"x" * len(picture))
    os.utime(job.folder / "in" / "b.jpg", ns=(0, stamp))
    with pytest.raises(StorageError, match="0 samples for 1, and 1 rejections"):
        job.encode(repair)
    (job.folder / "in" / "b.jpg").write_bytes(picture)
    os.utime(job.folder / "in" / "b.jpg", ns=(0, stamp))
    assert job.encode(repair) == ["committed"]
    assert job.shards()[spec.shard_id].counts.num_videos_ok == 3
    assert audit(job.store).findings == ()


def test_a_file_that_changes_between_planning_and_encoding_is_encoded_as_it_is_then(job: Job) -> None:
    (spec,) = job.specs()
    put_picture(job.folder / "in", "b", PICTURES["b"])
    report = job.actor.process(spec, job.manifest)
    assert (report.outcome, report.num_inputs_changed, report.counts.num_videos_ok) == ("committed", 1, 3)
    (commit,) = job.commits().values()
    assert list(commit.source_changes) == [str(job.folder / "in" / "b.jpg")]
    assert changed_inputs(job.specs(), job.shards()) == []
    assert audit(job.store, with_inputs=True).findings == ()
    put_picture(job.folder / "in", "b", PICTURES["a"])
    (change,) = changed_inputs(job.specs(), job.shards())
    assert (change.uri, change.encoded) == (str(job.folder / "in" / "b.jpg"), commit.source_changes[change.uri])
    (finding,) = audit(job.store, with_inputs=True).findings
    assert (finding.kind, finding.where, finding.is_damage) == ("changed", change.uri, False)


def test_files_that_a_table_names_are_compared_when_an_audit_is_asked_to(
    tmp_path: Path, encoders: dict[str, EncodeActor]
) -> None:
    put_picture(tmp_path / "pictures", "a", PICTURES["a"])
    put_picture(tmp_path / "pictures", "b", PICTURES["b"])
    (tmp_path / "in").mkdir()
    rows = [{"url": str(tmp_path / "pictures" / f"{name}.jpg"), "key": name} for name in "ab"]
    (tmp_path / "in" / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = started(tmp_path, encoders)
    job.encode(job.specs())
    found = audit(job.store, with_inputs=True)
    assert (found.findings, found.num_inputs) == ((), 2)
    put_picture(tmp_path / "pictures", "b", PICTURES["a"])
    (finding,) = audit(job.store, with_inputs=True).findings
    assert (finding.kind, finding.where) == ("changed", job.specs()[0].shard_id)


def _grow(folder: Path, kind: str, names: str) -> None:
    """The input in its present state: pictures of these names in a folder, a table or tars."""
    (folder / "in").mkdir(exist_ok=True)
    for name in names:
        still = PICTURES["a" if name in "ace" else "b"]
        if kind != "tar":
            pictures = folder / ("in" if kind == "folder" else "pictures")
            if not (pictures / f"{name}.jpg").exists():
                put_picture(pictures, name, still)
        elif not (folder / "in" / f"{name}.tar").exists():
            (folder / "in" / f"{name}.tar").write_bytes(tar_bytes([(f"{name}.jpg", still.read_bytes())]))
    if kind == "table":
        rows = [{"url": str(folder / "pictures" / f"{name}.jpg"), "key": name} for name in names]
        (folder / "in" / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("kind", ["folder", "table", "tar"])
def test_nights_that_overlap_decide_everything_once(
    kind: str, tmp_path: Path, encoders: dict[str, EncodeActor]
) -> None:
    _grow(tmp_path, kind, "ab")
    job = started(tmp_path, encoders, "--samples-per-shard", "1")
    last_night = job.specs()
    assert job.encode(last_night[:1]) == ["committed"]
    _grow(tmp_path, kind, "abcde")
    tonight = job.specs()
    assert {spec.shard_id for spec in last_night} < {spec.shard_id for spec in tonight}
    undecided = [spec for spec in tonight if spec.shard_id not in job.shards()]
    assert job.encode(undecided[:2]) == ["committed"] * 2
    # The first run is still going, and comes to what the second one did meanwhile.
    assert job.encode(last_night[1:]) == ["already_done"]
    assert job.encode(undecided[2:]) == ["committed"] * 2
    assert [spec for spec in job.specs() if spec.shard_id not in job.shards()] == []
    found = audit(job.store, with_inputs=True)
    assert (found.findings, found.num_records, found.num_inputs) == ((), 5, 5)
    keys = [key for path in job.store.list("data/") if path.key.endswith(".parquet") for key in _keys(job, path.key)]
    assert sorted(keys) == list("abcde")


def _keys(job: Job, key: str) -> list[str]:
    return list(pq.read_table(job.store.url(key), columns=["key"]).column("key").to_pylist())


def test_a_run_tells_what_changed_and_what_it_is_about_to_do_once_more(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    def dry_run(*more: str) -> RunSummary:
        flags = ["--input", str(job.folder / "in"), "--output", job.store.root_uri, "--model", "small", "--format"]
        flags += ["both", "--buckets", "64x64x1", "--dry-run", "--dry-run-seconds", "0", *more]
        with Progress("plain") as progress:
            return run(parse_arguments(flags), progress, RunMetrics())

    (spec,) = job.specs()
    job.encode([spec])
    put_picture(job.folder / "in", "a", PICTURES["b"])
    summary = dry_run("--retry-failed", "empty_file,timeout")
    said = capsys.readouterr().err
    assert (summary.exit_code, summary.num_shards, summary.num_shards_undone) == (0, 1, 0)
    assert (summary.num_inputs_changed, list(summary.inputs_changed)) == (1, [str(job.folder / "in" / "a.jpg")])
    assert f"shard {spec.shard_id} keeps what it has of {job.folder / 'in' / 'a.jpg'}, which changed" in said
    assert "1 rejected videos of 1 shards are tried again; 0 had their 3 attempts before" in said
    assert "1 to do in this run, of these 1 once more" in said
    dry_run("--retry-failed", "empty_file", "--max-attempts", "1")
    assert "0 rejected videos of 0 shards are tried again; 1 had their 1 attempts before" in capsys.readouterr().err
    _damage(job, spec.shard_id, "rejected")
    order_repair(job.store, spec.shard_id, [])
    dry_run("--retry-failed", "empty_file")
    said = capsys.readouterr().err
    assert "0 rejected videos of 0 shards are tried again" in said, "the repair comes first"
    assert "1 to do in this run, of these 1 once more" in said


def test_the_result_line_counts_what_was_done_once_more(job: Job) -> None:
    (job.folder / "in" / "a.jpg").write_bytes(b"")
    job.config = replace(job.config, source=replace(job.config.source, samples_per_shard=2))
    assert job.encode(job.specs()) == ["committed"] * 2
    first, second = (spec.shard_id for spec in job.specs())
    put_picture(job.folder / "in", "a", PICTURES["a"])
    _damage(job, second)
    assert main(["verify", job.store.root_uri, "--requeue"]) == 1
    flags = ["--input", str(job.folder / "in"), "--output", job.store.root_uri, "--model", "small"]
    config = parse_arguments([*flags, "--retry-failed", "empty_file,timeout"])
    specs = job.specs()
    planned = Names(spec.shard_id for spec in specs)
    with Progress("plain") as progress:
        again = _again(job.store, specs, _before(job.store, specs, config).shards, config, progress)
    assert [(spec.base_id, spec.redo.replaces) for spec in again.specs if spec.redo] == [
        (second, second),
        (first, None),
    ]
    ledger = _Ledger(planned, again.specs, again, 0.0, config, RunMetrics())
    for spec in again.specs:
        ledger.add(spec, job.actor.process(spec, job.manifest), 0)
    number = publish_snapshot(job.store).number
    found = ledger.accounts(partial(snapshot_commits, job.store, number))
    summary = ledger.close(found, number, True)
    assert (summary.exit_code, summary.num_shards, summary.num_shards_done) == (0, 2, 0)
    assert (summary.num_shards_done_before, summary.num_shards_undone) == (2, 0)
    # Two empty files were tried again: one was mended.
    assert (summary.num_shards_retried, summary.num_videos_retried, summary.num_videos_recovered) == (1, 2, 1)
    assert (summary.num_records_repaired, summary.num_inputs_changed) == (1, 1)
    assert (summary.num_videos, summary.num_videos_ok, summary.reasons) == (3, 2, {"empty_file": 1})
    # Left undone, the same is work left.
    undone = _Ledger(planned, again.specs, again, 0.0, config, RunMetrics())
    assert undone.close(found, number, True).exit_code == 4


def test_a_run_keeps_of_what_is_decided_only_what_it_may_have_to_do_something_about(job: Job) -> None:
    spec = replace(job.specs()[0], kind="tar", plan_key=None, source_size_bytes=1000, source_etag="a")
    specs = [replace(spec, shard_id=f"s{number}") for number in range(8)]
    commits = [make_commit(spec.shard_id, source_etag="a") for spec in specs[:7]]
    commits[2] = replace(commits[2], source_etag="b")
    rejected = {"num_videos": 3, "num_videos_rejected": 1}
    for number, reason in ((3, "timeout"), (4, "too_short")):
        commits[number] = replace(
            commits[number], counts=replace(commits[number].counts, **rejected, reasons={reason: 1})
        )
    later = [later_generation(commits[number], 1) for number in (5, 6)]
    rejected["num_videos"] = 4
    later[0] = replace(later[0], shard_counts=replace(later[0].shard_counts, **rejected, reasons={"timeout": 1}))
    for commit in commits:
        commit_shard(job.store, commit)
    publish_snapshot(job.store)
    for commit in later:
        commit_shard(job.store, commit)
    order_repair(job.store, "s1", ["it is damaged"])
    specs[0] = replace(specs[0], kind="slice", changed={"/in/a.mp4": "2:b|-|-"})
    config = replace(job.config, run=replace(job.config.run, retry_failed=("timeout",)))
    found = _before(job.store, specs, config)
    # Files of s0 changed, s1 is to be repaired, s2 is another tar now, s3 and at last s5 have what is to be retried.
    assert sorted(found.shards) == ["s0", "s1", "s2", "s3", "s5"]
    assert all(job.shards()[shard_id] == shard for shard_id, shard in found.shards.items())
    assert [commit.generation for commit in found.shards["s5"].commits] == [0, 1]
    assert ([spec.shard_id in found.decided for spec in specs], found.num_records) == ([True] * 7 + [False], 9)
