"""An audit finds every kind of damage, says where it is, and orders the repair; what is whole it calls whole."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import latents
import numpy as np
import pytest
from latents import SMALL

from pipeline.audit import FINDINGS, REPAIRABLE, Audit, audit
from pipeline.cli import main
from pipeline.commit import known_commits, name_of, open_dataset, publish_snapshot, read_manifest
from pipeline.config import SourceConfig
from pipeline.plan import plan_shards
from pipeline.records import Commit, DatasetManifest, LatentRecord
from pipeline.storage import ObjectStore, open_store

RECORDS = [latents.record(key, clip) for key in "ab" for clip in (0, 1)]


def whole(root: Path | str, **about: Any) -> tuple[ObjectStore, DatasetManifest]:
    """Two shards in both formats; the second has rejections, a retry of one of them, and a snapshot before that."""
    store = open_store(str(root))
    manifest = open_dataset(store, latents.manifest(**about))
    commit = commit_both(store, manifest)
    commit("s000", [latents.record(key, clip, **about) for key in "ab" for clip in (0, 1)])
    commit("s001", [latents.record("c", 0, **about)], [latents.rejection("c", 1), latents.rejection("d")])
    publish_snapshot(store)
    commit("s001", [latents.record("d", 0, **about)], keys=["d"])
    publish_snapshot(store)
    return store, manifest


def commit_both(store: ObjectStore, manifest: DatasetManifest) -> Callable[..., Commit]:
    def commit(shard_id: str, records: list[LatentRecord], *rest: Any, **more: Any) -> Commit:
        return latents.commit_records(store, manifest, shard_id, records, *rest, output_format="both", **more)

    return commit


def kinds(found: Audit) -> dict[str, list[str | None]]:
    listed: dict[str, list[str | None]] = {}
    for finding in found.findings:
        assert finding.kind in FINDINGS
        assert finding.message
        listed.setdefault(finding.kind, []).append(finding.record)
    return listed


def path_of(store: ObjectStore, name: str, content: str) -> Path:
    (commit,) = (commit for commit in known_commits(store) if name_of(commit) == name)
    return Path(store.url(next(file.key for file in commit.files if file.content == content)))


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("about", [{}, {"kind": "moments"}, {"dtype": "float32"}], ids=["mean", "moments", "float32"])
def test_a_whole_output_is_called_whole(about: dict[str, str], tmp_path: Path) -> None:
    store, _ = whole(tmp_path / "out", **about)
    before = {info.key: store.get(info.key) for info in store.list("")}
    found = audit(store)
    assert found.findings == ()
    assert (found.num_records, found.num_shards, found.num_snapshots) == (3, 2, 2)
    assert (found.num_files, found.num_unnamed) == (7, 0)
    assert found.num_bytes_read == found.num_bytes == sum(len(data) for key, data in before.items() if "data/" in key)
    assert (found.counts.num_records, found.counts.num_videos_ok, found.counts.num_clips_rejected) == (6, 4, 1)
    quick = audit(store, is_quick=True)
    assert quick == replace(found, is_quick=True, num_bytes_read=0)
    assert {info.key: store.get(info.key) for info in store.list("")} == before


def test_a_whole_output_on_s3_is_called_whole_and_a_lost_object_is_found(s3_env: Any) -> None:
    store, _ = whole(s3_env.root())
    assert audit(store).findings == ()
    key = next(info.key for info in store.list("data/") if info.key.endswith(".tar"))
    store.delete(key)
    for is_quick in (True, False):
        (finding,) = audit(store, is_quick=is_quick).findings
        assert (finding.kind, finding.where) == ("missing", store.url(key))


@pytest.mark.parametrize("content", ["parquet", "webdataset"])
@pytest.mark.parametrize(
    ("damage", "kind", "is_seen_quickly"),
    [
        (lambda path: path.unlink(), "missing", True),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "size", True),
        (lambda path: path.write_bytes(b""), "size", True),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "digest", False),
        (lambda path: path.write_bytes(b"?" + path.read_bytes()[1:]), "digest", False),
    ],
    ids=["gone", "cut", "empty", "end-flipped", "start-flipped"],
)
def test_files_that_are_not_as_recorded_are_found(
    damage: Callable[[Path], None], kind: str, is_seen_quickly: bool, content: str, tmp_path: Path
) -> None:
    store, _ = whole(tmp_path / "out")
    path = path_of(store, "s000", content)
    damage(path)
    found = audit(store)
    assert kinds(found) == {kind: ["s000"]}
    assert found.findings[0].where == str(path)
    assert list(found.repairable) == ["s000"]
    assert bool(audit(store, is_quick=True).findings) == is_seen_quickly


def _nan(record: LatentRecord) -> LatentRecord:
    mean = record.mean.copy()
    mean[0, 0, 0, 0] = np.nan
    return replace(record, mean=mean)


def _narrow(record: LatentRecord) -> LatentRecord:
    return replace(record, mean=np.ascontiguousarray(record.mean[..., :1]))


@pytest.mark.parametrize(("spoil", "kind"), [(_nan, "values"), (_narrow, "shape")], ids=["nan", "shape"])
def test_latents_that_cannot_be_true_are_found_though_their_digest_is_right(
    spoil: Callable[[LatentRecord], LatentRecord], kind: str, tmp_path: Path
) -> None:
    store, manifest = whole(tmp_path / "out")
    commit_both(store, manifest)("s002", [latents.record("e"), spoil(latents.record("f"))])
    found = audit(store)
    assert kinds(found) == {kind: ["s002", "s002"]}, "once in each format"
    assert all("'f'" in finding.message for finding in found.findings)


def _recommit(store: ObjectStore, name: str, **changes: Any) -> None:
    """Changes a record in place, with the snapshots gone, as nobody but a broken writer would."""
    for info in list(store.list("snapshots/")):
        store.delete(info.key)
    for path in Path(store.root_uri).glob(f"commits/*/{name}.json"):
        rewrite(path, lambda document: document.update(changes))


def test_counts_that_are_not_those_of_the_files_are_found(tmp_path: Path) -> None:
    store, _ = whole(tmp_path / "out")
    (commit,) = (commit for commit in known_commits(store) if name_of(commit) == "s000")
    counts = asdict(commit.counts)
    _recommit(store, "s000", counts=counts | {"num_records": 3, "num_clips": 3})
    found = audit(store)
    assert kinds(found) == {"counts": ["s000"]}
    assert "num_records 4 (3 stated)" in found.findings[0].message
    _recommit(store, "s000", counts=counts, files=[asdict(file) | {"num_rows": 7} for file in commit.files])
    assert kinds(audit(store)) == {"counts": ["s000", "s000"]}


def test_accounts_that_do_not_balance_are_found(tmp_path: Path) -> None:
    store, _ = whole(tmp_path / "out")
    (commit,) = (commit for commit in known_commits(store) if name_of(commit) == "s000")
    _recommit(store, "s000", counts=asdict(commit.counts) | {"num_videos": 9})
    (finding,) = audit(store, is_quick=True).findings
    assert (finding.kind, finding.record) == ("record", "s000")
    assert "do not balance" in finding.message


def test_formats_that_hold_different_latents_are_found(tmp_path: Path) -> None:
    store, manifest = whole(tmp_path / "out")
    commit = commit_both(store, manifest)
    one = commit("s002", [latents.record("e")])
    other = commit("s003", [replace(latents.record("e"), mean=latents.record("f").mean)])
    mixed = [asdict(file) for file in (one.files[0], other.files[1])]
    _recommit(store, "s002", files=mixed)
    found = audit(store)
    assert kinds(found) == {"formats": ["s002"]}
    assert "clip 0 of 'e'" in found.findings[0].message


def test_a_sample_in_two_generations_is_found(tmp_path: Path) -> None:
    store, manifest = whole(tmp_path / "out")
    commit_both(store, manifest)("s000", [latents.record("a", 0)], keys=["a"])
    assert kinds(audit(store)) == {"duplicate": ["s000.r1"]}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.write_bytes(b"{"), "cannot be read"),
        (lambda path: path.unlink(), "the record itself is not there"),
        (lambda path: rewrite(path, lambda d: d.update(nonce="0" * 32)), "is another one"),
        (lambda path: rewrite(path, lambda d: d.update(fingerprint="0" * 64)), "its fingerprint is"),
        (lambda path: rewrite(path, lambda d: d.update(shard_id="s009")), "it is the record of generation 0 of s009"),
        (lambda path: rewrite(path, lambda d: d.update(files=d["files"] * 2)), "several files of"),
    ],
    ids=["unreadable", "gone", "nonce", "fingerprint", "name", "files"],
)
def test_records_that_are_gone_or_changed_are_found(spoil: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    store, _ = whole(tmp_path / "out")
    (path,) = (tmp_path / "out").glob("commits/*/s000.json")
    spoil(path)
    for is_quick in (True, False):
        found = audit(store, is_quick=is_quick)
        assert "record" in kinds(found)
        assert any(says in finding.message for finding in found.findings)


def test_a_generation_without_the_one_before_it_is_found(tmp_path: Path) -> None:
    store, _ = whole(tmp_path / "out")
    for info in list(store.list("snapshots/")):
        store.delete(info.key)
    (path,) = (tmp_path / "out").glob("commits/*/s001.json")
    path.unlink()
    assert kinds(audit(store))["record"] == ["s001"]


def test_snapshots_that_lose_something_are_found(tmp_path: Path) -> None:
    store, _ = whole(tmp_path / "out")
    folder = tmp_path / "out" / "snapshots"
    first, second = sorted(folder.iterdir())
    # A third that is the first again: it lacks the retry.
    document = json.loads(first.read_bytes()) | {"number": 3}
    (folder / f"{3:012d}.json").write_text(json.dumps(document))
    (finding,) = audit(store).findings
    assert (finding.kind, finding.where) == ("snapshot", str(folder / f"{3:012d}.json"))
    assert "lacks 1 records that snapshot 2 holds, such as s001.r1" in finding.message
    (folder / f"{3:012d}.json").unlink()
    first.unlink()
    (finding,) = audit(store, is_quick=True).findings
    assert (finding.kind, finding.message) == ("snapshot", "snapshots 1 are not there, though later ones are")
    segment = tmp_path / "out" / json.loads(second.read_bytes())["segments"][0]["key"]
    segment.write_bytes(gzip.compress(b""))
    assert kinds(audit(store))["snapshot"] == [None, None]


def _planned(tmp_path: Path) -> tuple[ObjectStore, list[Any]]:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(b"picture")
    store, _ = whole(tmp_path / "out")
    return store, plan_shards(SourceConfig(input=str(tmp_path / "in"), samples_per_shard=2), store)


def test_planned_slices_that_are_not_decided_are_work_left_and_no_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, specs = _planned(tmp_path)
    manifest = read_manifest(store)
    assert manifest is not None
    found = audit(store)
    assert kinds(found) == {"undecided": [None, None]}
    assert (found.damage, found.is_unfinished, found.num_slices) == ((), True, 2)
    assert main(["verify", store.root_uri]) == 4
    assert "unfinished, nothing is damaged" in capsys.readouterr().out
    for spec, keys in zip(specs, (["0", "1"], ["2"]), strict=True):
        latents.commit_records(store, manifest, spec.shard_id, [latents.record(key) for key in keys])
    assert main(["verify", store.root_uri]) == 0
    assert "all is well" in capsys.readouterr().out


def test_a_record_that_does_not_account_for_its_slice_is_found(tmp_path: Path) -> None:
    store, specs = _planned(tmp_path)
    manifest = read_manifest(store)
    assert manifest is not None
    latents.commit_records(store, manifest, specs[0].shard_id, [latents.record("0")])
    found = audit(store, is_quick=True)
    assert kinds(found) == {"counts": [specs[0].shard_id], "undecided": [None]}
    assert "its slice has 2 videos, and the record accounts for 1" in found.findings[0].message


@pytest.mark.parametrize("part", ["round", "slice"])
def test_plans_that_are_damaged_or_gone_are_found(part: str, tmp_path: Path) -> None:
    store, specs = _planned(tmp_path)
    path = (
        next((tmp_path / "out" / "plans").rglob("round-*")) if part == "round" else Path(store.url(specs[0].plan_key))
    )
    path.write_bytes(path.read_bytes()[:-1])
    assert "plan" in kinds(audit(store))
    if part == "slice":
        path.unlink()
        assert kinds(audit(store, is_quick=True))["plan"] == [None]


def test_verify_says_what_is_damaged_and_orders_the_repair_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, _ = whole(tmp_path / "out")
    path = path_of(store, "s001", "parquet")
    path.write_bytes(path.read_bytes()[:-4] + b"????")
    assert main(["verify", store.root_uri]) == 1
    said = capsys.readouterr().out
    assert "DAMAGED   1 x digest" in said
    assert str(path) in said
    assert "latentmill verify --requeue" in said
    for ordered in (["s001"], []):
        assert main(["verify", store.root_uri, "--requeue", "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["ordered_repairs"] == ordered
    (order,) = store.list("repairs/")
    assert order.key == "repairs/s001/000001.json"
    assert json.loads(store.get(order.key))["record"] == "s001"
    assert kinds(audit(store)) == {"digest": ["s001"], "ordered": [None]}
    assert len(REPAIRABLE) < len(FINDINGS)


def test_gc_explains_before_it_deletes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, _ = whole(tmp_path / "out")
    orphans = []
    for record in ("s000", "s777"):
        data = f"an attempt at {record} that lost".encode()
        sha256 = hashlib.sha256(data).hexdigest()
        orphans.append(tmp_path / "out" / "data" / sha256[:2] / f"{record}-{sha256[:16]}.parquet")
        orphans[-1].parent.mkdir(exist_ok=True)
        orphans[-1].write_bytes(data)
    assert audit(store).num_unnamed == 2
    for flags in ([], ["--all"]):
        assert main(["gc", store.root_uri, *flags]) == 0
        said = capsys.readouterr().out
        assert f"may go   {orphans[0]}" in said
        assert "1 of 9 files" in said
        assert ("stays" in said) == bool(flags)
    assert main(["gc", store.root_uri, "--delete", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["is_deleted"], found["num_files_that_may_go"]) == (True, 1)
    assert [path.exists() for path in orphans] == [False, True]
    assert audit(store).findings == ()


@pytest.mark.parametrize("command", ["verify", "gc"])
def test_a_folder_that_is_no_output_is_wrong_use(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path)]) == 2
    assert f"{tmp_path} is no output of Latentmill" in capsys.readouterr().err


def test_clips_of_several_buckets_are_whole(tmp_path: Path) -> None:
    records = [latents.record("a", n, bucket) for n, bucket in enumerate((SMALL, latents.WIDE, latents.IMAGE))]
    store = latents.output(tmp_path / "out", [records], output_format="webdataset")
    assert audit(store).findings == ()
