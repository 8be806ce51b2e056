"""A driver without an encoder, for faults of the store: plans, reads inputs, commits, publishes and reads back.

    python -m chaos.writer --input s3://shards/in --output s3://latents/out --name 1      (with tests/ in PYTHONPATH)

Everything is the real pipeline but for the latents, which are drawn from the bytes of each input file: an input that
was damaged on the way gives other latents than an undisturbed run. Whatever a fault of the store raises is one failed
attempt, as in the real driver. Ends with 0 once every shard is decided, published and read back. Any number may run at
once on one output. Needs no torch and no Ray, so that hundreds of faults take seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sys
import tempfile
import time
import uuid
from dataclasses import replace
from pathlib import Path

import latents

from pipeline.commit import (
    check_store,
    commit_shard,
    committed_ids,
    load_commits,
    open_dataset,
    publish_snapshot,
    put_written_file,
    read_commit,
    read_data_file,
    snapshot_commits,
)
from pipeline.config import DecodeLimits, JobConfig, parse_arguments
from pipeline.errors import StorageError
from pipeline.format import ShardWriter
from pipeline.plan import plan_shards
from pipeline.records import ClipFailure, Commit, DatasetManifest, ShardCounts, ShardSpec
from pipeline.source import iterate_videos
from pipeline.storage import ObjectStore, open_store

_MAX_ATTEMPTS = 200


def _encode(store: ObjectStore, spec: ShardSpec, manifest: DatasetManifest, config: JobConfig) -> None:
    if read_commit(store, spec.shard_id) is not None:
        return
    records = []
    for video in iterate_videos(spec, store, config.encoding, DecodeLimits()):
        if isinstance(video, ClipFailure):
            raise StorageError(f"{video.key} was rejected: {video.reason} {video.message}")
        with open(video.media_fd, "rb") as file:
            drawn_from = hashlib.sha256(file.read()).hexdigest()
        record = latents.record(video.key, caption=video.caption)
        mean = latents.latent_of(drawn_from, 0, record.bucket).astype("float16")
        records.append(replace(record, mean=mean, source_uri=video.source_uri))
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(Path(folder), spec.shard_id, manifest, "both") as writer:
            for record in records:
                writer.write(record)
            written = writer.finish()
        files = tuple(put_written_file(store, f, spec.shard_id) for f in written)
    number = len(records)
    commit_shard(
        store,
        Commit(
            shard_id=spec.shard_id,
            generation=0,
            nonce=uuid.uuid4().hex,
            fingerprint=manifest.fingerprint,
            source_uri=spec.source_uri,
            source_size_bytes=spec.source_size_bytes,
            source_etag=spec.source_etag,
            files=files,
            counts=ShardCounts(
                num_videos=number,
                num_videos_ok=number,
                num_videos_rejected=0,
                num_clips=number,
                num_records=number,
                num_clips_rejected=0,
                num_frames=sum(record.bucket.num_frames for record in records),
            ),
            format_version=1,
            code_version="0",
            created_at="2026-01-01T00:00:00+00:00",
        ),
    )


def _drive(config: JobConfig, chance: random.Random) -> None:
    store = open_store(config.run.output)
    check_store(store, single_writer=False)
    specs = plan_shards(config.source, store)
    manifest = open_dataset(store, latents.manifest())
    open_specs = [spec for spec in specs if spec.shard_id not in committed_ids(store)]
    # Rivals start in other places, and meet.
    chance.shuffle(open_specs)
    for spec in open_specs:
        _encode(store, spec, manifest, config)
        if chance.random() < 0.6:
            publish_snapshot(store)
    number = publish_snapshot(store).number
    assert {commit.shard_id for commit in snapshot_commits(store, number)} >= {spec.shard_id for spec in specs}
    for commit in load_commits(store):
        for file in commit.files:
            read_data_file(store, file)


def main() -> int:
    """Drives to the end, however often the store fails; 1 after too many attempts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--name", required=True)
    flags = parser.parse_args()
    more = ["--model", "made-up", "--samples-per-shard", "2"]
    config = parse_arguments(["--input", flags.input, "--output", flags.output, *more])
    chance = random.Random(flags.name)
    for _ in range(_MAX_ATTEMPTS):
        try:
            _drive(config, chance)
            return 0
        except StorageError as error:
            print(f"{os.getpid()}: {error}", file=sys.stderr, flush=True)
            time.sleep(chance.uniform(0, 0.1))
    return 1


if __name__ == "__main__":
    sys.exit(main())
