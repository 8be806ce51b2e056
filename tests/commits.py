"""Commit records without files behind them. Not fixtures (those are in conftest.py)."""

from __future__ import annotations

import dataclasses
import uuid
from typing import Any

from pipeline.records import Commit, FileStat, ShardCounts


def make_commit(shard_id: str = "00000-1234abcd", num_records: int = 2, **changes: Any) -> Commit:
    counts = ShardCounts(
        num_videos=num_records,
        num_videos_ok=num_records,
        num_videos_rejected=0,
        num_clips=num_records,
        num_records=num_records,
        num_clips_rejected=0,
        num_frames=17 * num_records,
        reasons={},
    )
    commit = Commit(
        shard_id=shard_id,
        generation=0,
        nonce=uuid.uuid4().hex,
        fingerprint="f" * 64,
        source_uri=f"/in/{shard_id}.tar",
        source_size_bytes=1000,
        source_etag=None,
        files=(FileStat(key="data/aa/x.parquet", num_bytes=1, sha256="a" * 64, num_rows=2, content="parquet"),),
        counts=counts,
        format_version=1,
        code_version="0.1.0",
        created_at="2026-01-01T00:00:00+00:00",
    )
    return dataclasses.replace(commit, **changes)


def later_generation(first: Commit, generation: int, num_records: int = 1, **changes: Any) -> Commit:
    counts = make_commit(num_records=num_records).counts
    total = make_commit(num_records=first.counts.num_records + generation * num_records).counts
    changes = {"generation": generation, "counts": counts, "shard_counts": total, "nonce": uuid.uuid4().hex} | changes
    return dataclasses.replace(first, **changes)
