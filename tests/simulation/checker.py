"""What must be true of an output at rest. Reads the objects, the plan and what jobs were told; knows no pipeline code.

For every planned sample exactly one outcome counts, with bytes behind it; nothing that may only be created once was
written twice; every snapshot holds its predecessor and names what exists; nothing that can never count is left.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = dict[str, Any]


def broken_promises(
    objects: Mapping[str, bytes],
    plan: Mapping[str, Sequence[str]],
    claims: Iterable[tuple[Any, ...]],
    rewritten: Iterable[str],
) -> list[str]:
    """Every promise that does not hold, in words; none for an output as it should be.

    Args:
        objects: the store's contents by key.
        plan: the samples of every shard.
        claims: ("commit", job, record, nonce, outcome) and ("snapshot", job, number, digest, shards said to be done).
        rewritten: keys of create-once objects that were written a second time.
    """
    records = {
        key.rpartition("/")[2].removesuffix(".json"): json.loads(data)
        for key, data in objects.items()
        if key.startswith("commits/")
    }
    found = [f"{key} was written twice" for key in rewritten]
    named: set[str] = set()
    for name, record in records.items():
        if _name(record) != name:
            found.append(f"record {name} says that it is {_name(record)}")
        named |= {file["key"] for file in record["files"]}
    by_shard: dict[str, list[Record]] = {shard_id: [] for shard_id in plan}
    for record in records.values():
        by_shard.setdefault(record["shard_id"], []).append(record)
    for shard_id, generations in by_shard.items():
        found += _shard(objects, shard_id, plan.get(shard_id), sorted(generations, key=lambda r: r["generation"]))
    snapshots = [_listed(objects, key, found) for key in sorted(objects) if key.startswith("snapshots/")]
    found += _snapshots(objects, records, snapshots)
    found += _claims(objects, records, snapshots, claims)
    for key in objects:
        match = re.fullmatch(r"data/../(.+)-[0-9a-f]{16}\..+", key)
        if match and match[1] in records and key not in named:
            found.append(f"{key} can never count and was not collected")
    return found


def _name(record: Record) -> str:
    return record["shard_id"] + (f".r{record['generation']}" if record["generation"] else "")


def _shard(
    objects: Mapping[str, bytes], shard_id: str, planned: Sequence[str] | None, generations: list[Record]
) -> list[str]:
    if planned is None:
        return [f"shard {shard_id} was never planned"]
    if [record["generation"] for record in generations] != list(range(len(generations))) or not generations:
        return [f"shard {shard_id} has the generations {[record['generation'] for record in generations]}"]
    replaced = [record["replaces"] for record in generations if record["replaces"] is not None]
    if len(replaced) != len(set(replaced)):
        return [f"shard {shard_id}: {replaced} were replaced, one of them twice"]
    found = []
    ok: dict[str, int] = {}
    rejected: dict[str, int] = {}
    for record in generations:
        if _name(record) in replaced:
            continue
        held = []
        for file in record["files"]:
            data = objects.get(file["key"])
            if data is None or len(data) != file["num_bytes"] or hashlib.sha256(data).hexdigest() != file["sha256"]:
                found.append(f"{file['key']} is not as record {_name(record)} states: {data!r}")
            else:
                held.append(json.loads(data))
        for key in {key for content in held for key in content["ok"]}:
            if key in ok:
                found.append(f"sample {key} of {shard_id} is ok in generations {ok[key]} and {record['generation']}")
            ok[key] = record["generation"]
        rejected |= {key: record["generation"] for content in held for key in content["rejected"]}
    if found:
        return found
    standing = rejected.keys() - ok.keys()
    if ok.keys() | standing != set(planned):
        found.append(f"shard {shard_id} has {sorted(ok.keys() | standing)}, planned are {sorted(planned)}")
    counts = generations[-1]["shard_counts"] or generations[-1]["counts"]
    if (counts["num_records"], counts["num_videos_rejected"]) != (len(ok), len(standing)):
        found.append(f"shard {shard_id} states {counts}, its files hold {sorted(ok)} and reject {sorted(standing)}")
    return found


def _listed(objects: Mapping[str, bytes], key: str, found: list[str]) -> dict[str, Record]:
    """The records that a snapshot lists, by name."""
    listed: dict[str, Record] = {}
    for segment in json.loads(objects[key])["segments"]:
        data = objects.get(segment["key"])
        if data is None or hashlib.sha256(data).hexdigest() != segment["sha256"]:
            found.append(f"{key} names {segment['key']}, which is damaged or gone")
            continue
        for record in map(json.loads, gzip.decompress(data).splitlines()):
            if _name(record) in listed:
                found.append(f"{key} lists {_name(record)} twice")
            listed[_name(record)] = record
    return listed


def _snapshots(
    objects: Mapping[str, bytes], records: Mapping[str, Record], snapshots: Sequence[Mapping[str, Record]]
) -> list[str]:
    keys = sorted(key for key in objects if key.startswith("snapshots/"))
    if keys != [f"snapshots/{number:012d}.json" for number in range(1, len(keys) + 1)]:
        return [f"the snapshots are {keys}"]
    found: list[str] = []
    before: Mapping[str, Record] = {}
    for key, listed in zip(keys, snapshots, strict=True):
        for name, record in listed.items():
            if records.get(name) != record:
                found.append(f"{key} lists {name} as it was never committed")
            earlier = {_name(record | {"generation": number}) for number in range(record["generation"])}
            if not earlier <= listed.keys():
                found.append(f"{key} lists {name} without {sorted(earlier - listed.keys())}")
        if not before.keys() <= listed.keys():
            found.append(f"{key} lost {sorted(before.keys() - listed.keys())} of its predecessor")
        before = listed
    if before.keys() != records.keys():
        found.append(f"the last snapshot lacks {sorted(records.keys() - before.keys())}")
    return found


def _claims(
    objects: Mapping[str, bytes],
    records: Mapping[str, Record],
    snapshots: Sequence[Mapping[str, Record]],
    claims: Iterable[tuple[Any, ...]],
) -> list[str]:
    found = []
    for claim in claims:
        if claim[0] == "commit":
            _, job, name, nonce, outcome = claim
            standing = records.get(name, {}).get("nonce")
            if standing is None or (standing == nonce) != (outcome == "committed"):
                found.append(f"{job} was told {outcome!r} of {name}; the record is of {standing}, its own is {nonce}")
        else:
            _, job, number, digest, done = claim
            data = objects.get(f"snapshots/{number:012d}.json")
            if data is None or json.loads(data)["digest"] != digest:
                found.append(f"{job} was told that it made snapshot {number} with digest {digest}, which is not there")
            elif done - snapshots[number - 1].keys():
                found.append(f"{job} said that {sorted(done)} are done and published; snapshot {number} lacks some")
    return found
