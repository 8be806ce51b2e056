"""Says whether an output is right, from its files and its input alone.

Independent on purpose: nothing of `pipeline` is imported, S3 is spoken by plain botocore, tars are read by tarfile.
What must hold:

- every input tar has a record of generation 0, and record names, places and contents agree;
- every file that a record names is there with its size and SHA-256, and its rows are as many as stated;
- the accounts of a record balance and agree with the rows;
- every sample of the input is in the output exactly once: as rows, or as a rejection (of the records that count: those
  that no later generation replaces; rows beat rejections, the lowest generation's rows count);
- latents are finite and of the shape that their row states, and that shape follows from the bucket;
- WebDataset and Parquet hold the same rows;
- snapshots are numbered without gaps, each holds its predecessor, digests and segments are as stated, and every
  record in one is the record that stands;
- what was once seen under commits/, snapshots/ or manifests/ never changes or vanishes (`seen`, kept by the caller).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import botocore.session
import numpy as np
import pyarrow.parquet as pq

_MEDIA = {"mp4", "mkv", "webm", "avi", "ts", "mov", "jpg", "jpeg", "png", "webp"}
_FROZEN = ("commits/", "snapshots/", "manifests/")


@dataclass(slots=True)
class Verdict:
    """What was found; `problems` is empty where everything holds."""

    num_planned: int = 0
    num_recorded: int = 0
    num_rejected: int = 0
    num_lost: int = 0
    num_duplicated: int = 0
    num_records: int = 0
    num_snapshots: int = 0
    num_orphans: int = 0
    files: dict[str, str] = field(default_factory=dict)  # "<record> <content>" -> SHA-256
    rejections: list[str] = field(default_factory=list)  # "<key>: <reason>: <message>"
    problems: list[str] = field(default_factory=list)


def read_output(uri: str, s3: Mapping[str, str] | None = None) -> dict[str, bytes]:
    """Every object of an output by key: of a local folder (without its `.tmp`), or of s3://bucket/prefix.

    Args:
        s3: endpoint, key and secret, as AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
    """
    if not uri.startswith("s3://"):
        paths = (path for path in Path(uri).rglob("*") if path.is_file())
        named = ((path.relative_to(uri).as_posix(), path) for path in paths)
        return {key: path.read_bytes() for key, path in named if not key.startswith(".tmp/")}
    where = os.environ if s3 is None else s3
    client = botocore.session.get_session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=where["AWS_ENDPOINT_URL"],
        aws_access_key_id=where["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=where["AWS_SECRET_ACCESS_KEY"],
    )
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    objects = {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/"):
        for entry in page.get("Contents", []):
            key = entry["Key"].removeprefix(f"{prefix}/")
            try:
                objects[key] = client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
            except client.exceptions.NoSuchKey:
                # A driver that starts removes what it has tried the store with; nothing else may ever go.
                assert key.startswith("_probe/"), f"{entry['Key']} was listed, and is gone"
    return objects


def plan_of_tars(folder: Path, uri_of: Callable[[str], str] = str) -> dict[str, set[str]]:
    """The keys of the samples of each tar of a folder, by the tar's URI as the pipeline knows it."""
    plan = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            names = [member.name for member in tar if member.isfile()]
        media = [name for name in names if name.rpartition(".")[2].lower() in _MEDIA]
        plan[uri_of(str(path))] = {posixpath.basename(name).partition(".")[0] for name in media}
    return plan


def plan_of_slices(objects: Mapping[str, bytes]) -> dict[str, set[str]]:
    """The keys of the samples of each slice of tables and folders, as the plan in the output has them."""
    plan: dict[str, set[str]] = {}
    for key in sorted(key for key in objects if key.startswith("plans/") and "/round-" in key):
        document = json.loads(objects[key])
        first = sum(uri.startswith(f"{document['source']}#slice=") for uri in plan)
        for number, cut in enumerate(document["slices"], start=first):
            entries = json.loads(objects[cut["key"]])["entries"]
            plan[f"{document['source']}#slice={number}"] = {entry["key"] for entry in entries}
    return plan


def check(
    objects: Mapping[str, bytes], plan: Mapping[str, set[str]], seen: MutableMapping[str, str] | None = None
) -> Verdict:
    """Checks an output at rest against the plan: the keys of the samples by source URI.

    Args:
        seen: digests of what earlier checks saw; is brought up to date.
    """
    verdict = Verdict()
    records = _records(objects, verdict)
    by_source: dict[str, dict[str, dict[str, Any]]] = {uri: {} for uri in plan}
    for name, record in records.items():
        if record["source_uri"] not in plan:
            verdict.problems.append(f"record {name} is of {record['source_uri']}, which is not planned")
        else:
            by_source[record["source_uri"]][name] = record
    named: set[str] = set()
    for uri, keys in plan.items():
        _check_shard(uri, keys, by_source[uri], objects, verdict)
    for record in records.values():
        named |= {file["key"] for file in record["files"]}
    _check_snapshots(objects, records, verdict)
    verdict.num_orphans = sum(key.startswith("data/") and key not in named for key in objects)
    if seen is not None:
        _check_unchanged(objects, seen, verdict)
    return verdict


def _records(objects: Mapping[str, bytes], verdict: Verdict) -> dict[str, dict[str, Any]]:
    records = {}
    for key, data in objects.items():
        if not key.startswith("commits/"):
            continue
        record = json.loads(data)
        name = record["shard_id"] + (f".r{record['generation']}" if record["generation"] else "")
        place = f"commits/{hashlib.sha256(name.encode()).hexdigest()[:2]}/{name}.json"
        if key != place:
            verdict.problems.append(f"{key} holds the record of {name}, whose place is {place}")
        records[name] = record
    return records


def _check_shard(
    uri: str, keys: set[str], records: Mapping[str, dict[str, Any]], objects: Mapping[str, bytes], verdict: Verdict
) -> None:
    verdict.num_planned += len(keys)
    shard_ids = {record["shard_id"] for record in records.values()}
    if len(shard_ids) != 1 or not shard_ids <= records.keys():
        verdict.problems.append(f"{uri} has the records {sorted(records)}, not one shard with generation 0")
    replaced = {record.get("replaces") for record in records.values()}
    counting = sorted((r for name, r in records.items() if name not in replaced), key=lambda r: r["generation"])
    recorded: dict[str, int] = {}  # sample -> generation whose rows count
    rejected: set[str] = set()
    for record in counting:
        rows, refusals = _check_record(record, objects, verdict)
        for key in {key for key, _ in rows}:
            if key in recorded:
                verdict.num_duplicated += 1
                verdict.problems.append(f"{uri}: {key} has rows in generations {recorded[key]} and more")
            recorded.setdefault(key, record["generation"])
        rejected |= refusals
    rejected -= recorded.keys()
    unknown = (recorded.keys() | rejected) - keys - {"*"}
    if unknown:
        verdict.problems.append(f"{uri}: {sorted(unknown)[:3]} are in the output and not in the input")
    lost = keys - recorded.keys() - rejected
    if lost:
        verdict.problems.append(f"{uri}: {sorted(lost)[:3]} are neither recorded nor rejected")
    verdict.num_recorded += len(recorded.keys() & keys)
    verdict.num_rejected += len(rejected & keys)
    verdict.num_lost += len(lost)


def _check_record(
    record: Mapping[str, Any], objects: Mapping[str, bytes], verdict: Verdict
) -> tuple[set[tuple[str, int]], set[str]]:
    """The rows (key, clip index) and the keys rejected as a whole, or clip by clip, of one record."""
    name = f"{record['shard_id']} generation {record['generation']}"
    by_content: dict[str, list[tuple[str, int]]] = {}
    refused: list[tuple[str, int | None]] = []
    for file in record["files"]:
        data = objects.get(file["key"])
        if data is None:
            verdict.problems.append(f"{name}: {file['key']} is missing")
            continue
        digest = hashlib.sha256(data).hexdigest()
        if (len(data), digest) != (file["num_bytes"], file["sha256"]):
            verdict.problems.append(f"{name}: {file['key']} has {len(data)} bytes with SHA-256 {digest}")
            continue
        verdict.files[f"{name} {file['content']}"] = digest
        if file["content"] == "rejected":
            table = pq.read_table(io.BytesIO(data)).to_pydict()
            refused = list(zip(table["key"], table["clip_index"], strict=True))
            why = zip(table["key"], table["reason"], table["message"], strict=True)
            verdict.rejections += [f"{key}: {reason}: {message}" for key, reason, message in why]
            num_rows = len(refused)
        else:
            read = _parquet_rows if file["content"] == "parquet" else _tar_rows
            rows = read(data, name, verdict)
            by_content[file["content"]] = rows
            num_rows = len(rows)
        if num_rows != file["num_rows"]:
            verdict.problems.append(f"{name}: {file['key']} has {num_rows} rows, {file['num_rows']} are stated")
    for content, rows in by_content.items():
        twice = [row for row, number in Counter(rows).items() if number > 1]
        if twice:
            verdict.num_duplicated += len(twice)
            verdict.problems.append(f"{name}: {content} has {twice[:3]} more than once")
    all_rows = [set(rows) for rows in by_content.values()]
    if any(rows != all_rows[0] for rows in all_rows):
        verdict.problems.append(f"{name}: Parquet and WebDataset hold other rows")
    rows_of_record = all_rows[0] if all_rows else set()
    verdict.num_records += len(rows_of_record)
    _check_accounts(name, record["counts"], rows_of_record, refused, verdict)
    return rows_of_record, {key for key, _ in refused}


def _check_accounts(
    name: str,
    counts: Mapping[str, Any],
    rows: set[tuple[str, int]],
    refused: list[tuple[str, int | None]],
    verdict: Verdict,
) -> None:
    num_ok = len({key for key, _ in rows})
    num_clips_refused = sum(clip is not None for _, clip in refused)
    whole = sum(clip is None for _, clip in refused)
    part = len({key for key, clip in refused if clip is not None} - {key for key, _ in rows})
    found = {
        "num_videos": num_ok + whole + part,
        "num_videos_ok": num_ok,
        "num_videos_rejected": whole + part,
        "num_clips": len(rows) + num_clips_refused,
        "num_records": len(rows),
        "num_clips_rejected": num_clips_refused,
    }
    wrong = {key: (counts[key], number) for key, number in found.items() if counts[key] != number}
    if sum(counts["reasons"].values()) != len(refused):
        wrong["reasons"] = (counts["reasons"], len(refused))
    if wrong:
        verdict.problems.append(f"{name}: the accounts (stated, found) are wrong: {wrong}")


def _parquet_rows(data: bytes, name: str, verdict: Verdict) -> list[tuple[str, int]]:
    rows = []
    for row in pq.read_table(io.BytesIO(data)).to_pylist():
        dtype = {"float16": "<f2", "float32": "<f4"}[row["latent_dtype"]]
        latent = np.frombuffer(row["latent"], dtype)
        _check_latent(name, row, latent.reshape(row["latent_shape"]), verdict)
        rows.append((row["key"], row["clip_index"]))
    return rows


def _tar_rows(data: bytes, name: str, verdict: Verdict) -> list[tuple[str, int]]:
    latents: dict[str, list[np.ndarray[Any, Any]]] = {}
    facts: dict[str, dict[str, Any]] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            stem, _, ending = member.name.partition(".")
            file = tar.extractfile(member)
            content = b"" if file is None else file.read()
            if ending.endswith("npy"):
                latents.setdefault(stem, []).append(np.load(io.BytesIO(content), allow_pickle=False))
            elif ending == "json":
                facts[stem] = json.loads(content)
    if latents.keys() != facts.keys():
        verdict.problems.append(
            f"{name}: members of the tar are not whole: {sorted(latents.keys() ^ facts.keys())[:3]}"
        )
    rows = []
    for stem in latents.keys() & facts.keys():
        _check_latent(name, facts[stem], np.concatenate(latents[stem]), verdict)
        key, _, clip = stem.rpartition("_")
        rows.append((unquote(key), int(clip)))
    return rows


def _check_latent(name: str, row: Mapping[str, Any], latent: np.ndarray[Any, Any], verdict: Verdict) -> None:
    width, height, num_frames = map(int, row["bucket"].split("x"))
    expected = [1 + (num_frames - 1) // 4, height // 8, width // 8]
    if list(latent.shape) != list(row["latent_shape"]) or list(latent.shape[1:]) != expected:
        verdict.problems.append(f"{name}: {row['key']} of {row['bucket']} has a latent of {latent.shape}")
    if not np.isfinite(latent).all():
        verdict.problems.append(f"{name}: {row['key']} has values that are not finite")


def _check_snapshots(objects: Mapping[str, bytes], records: Mapping[str, dict[str, Any]], verdict: Verdict) -> None:
    keys = sorted(key for key in objects if key.startswith("snapshots/"))
    verdict.num_snapshots = len(keys)
    if keys != [f"snapshots/{number:012d}.json" for number in range(1, len(keys) + 1)]:
        verdict.problems.append(f"snapshots are not numbered from 1 without gaps: {keys[:3]} ...")
    before: set[tuple[str, str]] = set()
    for key in keys:
        snapshot = json.loads(objects[key])
        held: set[tuple[str, str]] = set()
        for segment in snapshot["segments"]:
            data = objects.get(segment["key"], b"")
            if (len(data), hashlib.sha256(data).hexdigest()) != (segment["num_bytes"], segment["sha256"]):
                verdict.problems.append(f"{key}: segment {segment['key']} is missing or damaged")
                continue
            for line in gzip.decompress(data).splitlines():
                record = json.loads(line)
                name = record["shard_id"] + (f".r{record['generation']}" if record["generation"] else "")
                held.add((name, record["nonce"]))
                if records.get(name, {}).get("nonce") != record["nonce"]:
                    verdict.problems.append(f"{key}: {name} is not the record that stands")
        digest = hashlib.sha256("".join(sorted(f"{name} {nonce}\n" for name, nonce in held)).encode()).hexdigest()
        if digest != snapshot["digest"]:
            verdict.problems.append(f"{key}: the digest is not that of its records")
        if not before <= held:
            verdict.problems.append(f"{key}: lacks {len(before - held)} records of its predecessor")
        before = held


def _check_unchanged(objects: Mapping[str, bytes], seen: MutableMapping[str, str], verdict: Verdict) -> None:
    now = {key: hashlib.sha256(data).hexdigest() for key, data in objects.items() if key.startswith(_FROZEN)}
    changed = [key for key, digest in seen.items() if now.get(key) != digest]
    if changed:
        verdict.problems.append(f"{len(changed)} objects changed or vanished, such as {changed[0]}")
    seen.update(now)
