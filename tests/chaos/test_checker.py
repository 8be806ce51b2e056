"""The independent checker finds what it is there for: each kind of damage, planted in an output that is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import latents
import numpy as np
import pytest
from builders import tar_bytes
from chaos.checker import check, plan_of_tars, read_output

from pipeline.commit import commit_shard, open_dataset, publish_snapshot
from pipeline.storage import ObjectStore, open_store

Objects = dict[str, bytes]


def _commit(store: ObjectStore, tar: Path, name: str, keys: list[str]) -> None:
    """Records of all keys but the last, which is rejected; of a shard that is decided, its next generation."""
    with pytest.MonkeyPatch.context() as patch:
        of_tar = str(tar)
        patch.setattr(latents, "commit_shard", lambda s, commit: commit_shard(s, replace(commit, source_uri=of_tar)))
        records = [latents.record(key) for key in keys[:-1]]
        refused = [latents.rejection(keys[-1])]
        about = open_dataset(store, latents.manifest())
        latents.commit_records(store, about, name, records, refused, output_format="both")


@pytest.fixture
def plan(tmp_path: Path) -> dict[str, set[str]]:
    (tmp_path / "in").mkdir()
    for number in range(3):
        members = [(f"{number}{place}.mp4", b"video") for place in range(3)]
        (tmp_path / "in" / f"{number}.tar").write_bytes(tar_bytes(members))
    return plan_of_tars(tmp_path / "in")


@pytest.fixture
def objects(tmp_path: Path, plan: dict[str, set[str]]) -> Objects:
    """Three shards of two records and a rejection each, in two snapshots."""
    store = open_store(str(tmp_path / "out"))
    for number, (uri, keys) in enumerate(plan.items()):
        _commit(store, Path(uri), f"s{number}", sorted(keys))
        if number != 1:
            publish_snapshot(store)
    return read_output(str(tmp_path / "out"))


def test_an_output_that_is_right_has_no_problems(objects: Objects, plan: dict[str, set[str]]) -> None:
    verdict = check(objects, plan)
    assert verdict.problems == []
    assert (verdict.num_planned, verdict.num_recorded, verdict.num_rejected) == (9, 6, 3)
    assert (verdict.num_lost, verdict.num_duplicated, verdict.num_snapshots, verdict.num_orphans) == (0, 0, 2, 0)


def test_a_retry_that_succeeds_counts_instead_of_the_rejection(
    tmp_path: Path, objects: Objects, plan: dict[str, set[str]]
) -> None:
    store = open_store(str(tmp_path / "out"))
    uri, keys = next(iter(plan.items()))
    _commit(store, Path(uri), "s0", [sorted(keys)[-1], "*"])
    verdict = check(read_output(str(tmp_path / "out")), plan)
    assert (verdict.num_recorded, verdict.num_rejected, verdict.num_lost, verdict.num_duplicated) == (7, 2, 0, 0)


def _key(objects: Objects, part: str) -> str:
    return sorted(key for key in objects if part in key)[0]


def _lose_file(objects: Objects) -> None:
    del objects[_key(objects, ".tar")]


def _flip(objects: Objects) -> None:
    key = _key(objects, ".tar")
    objects[key] = objects[key][:-1] + bytes([objects[key][-1] ^ 1])


def _lose_record(objects: Objects) -> None:
    del objects[_key(objects, "commits/")]


def _misplace_record(objects: Objects) -> None:
    key = _key(objects, "commits/")
    objects["commits/zz/" + key.rpartition("/")[2]] = objects.pop(key)


def _miscount(objects: Objects) -> None:
    key = _key(objects, "commits/")
    record = json.loads(objects[key])
    record["counts"]["num_videos"] += 1
    objects[key] = json.dumps(record).encode()


def _lose_snapshot(objects: Objects) -> None:
    del objects[_key(objects, "snapshots/000000000001")]


def _shrink_snapshot(objects: Objects) -> None:
    first = _key(objects, "snapshots/000000000001")
    objects["snapshots/000000000003.json"] = objects[first]


def _other_nonce(objects: Objects) -> None:
    key = _key(objects, "commits/")
    record = json.loads(objects[key])
    record["nonce"] = "f" * 32
    objects[key] = json.dumps(record).encode()


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (_lose_file, "is missing"),
        (_flip, "bytes with SHA-256"),
        (_lose_record, "neither recorded nor rejected"),
        (_misplace_record, "whose place is"),
        (_miscount, "accounts"),
        (_lose_snapshot, "not numbered"),
        (_shrink_snapshot, "lacks 2 records"),
        (_other_nonce, "not the record that stands"),
    ],
)
def test_every_planted_damage_is_found(
    plant: Callable[[Objects], None], found: str, objects: Objects, plan: dict[str, set[str]]
) -> None:
    plant(objects)
    verdict = check(objects, plan)
    assert any(found in problem for problem in verdict.problems), verdict.problems


def test_a_sample_in_two_generations_is_a_duplicate(
    tmp_path: Path, objects: Objects, plan: dict[str, set[str]]
) -> None:
    uri, keys = next(iter(plan.items()))
    _commit(open_store(str(tmp_path / "out")), Path(uri), "s0", [*sorted(keys)[:1], "*"])
    verdict = check(read_output(str(tmp_path / "out")), plan)
    assert verdict.num_duplicated == 1
    assert verdict.problems


def test_a_record_that_changed_since_it_was_seen_is_found(objects: Objects, plan: dict[str, set[str]]) -> None:
    seen: dict[str, str] = {}
    assert check(objects, plan, seen).problems == []
    _other_nonce(objects)
    assert any("changed or vanished" in problem for problem in check(objects, plan, seen).problems)


def test_a_latent_that_is_not_finite_is_found(tmp_path: Path, plan: dict[str, set[str]]) -> None:
    store = open_store(str(tmp_path / "nan"))
    bad = latents.record("00")
    bad = replace(bad, mean=np.full_like(bad.mean, np.nan))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "record", lambda key: replace(bad, key=key))
        _commit(store, Path(next(iter(plan))), "s0", ["00", "01"])
    assert any("not finite" in problem for problem in check(read_output(str(tmp_path / "nan")), plan).problems)
