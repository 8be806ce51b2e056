"""How long a driver needs to its first commit where thousands of shards are decided already.

Called by `run`. The decided shards are copies of one real record under other ids: a driver reads records and plans,
and never opens the data of what is done.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

from builders import CLIP_STILLS, pack_clips
from integration.jobs_under_test import SMALL, RunningJob, commits_of, run_job

from pipeline.config import parse_arguments
from pipeline.plan import plan_shards
from pipeline.storage import open_store

_NUM_LEFT = 3


def restart_s(env: Mapping[str, str], num_shards: int) -> float:
    """Seconds from the start of a driver to its first new commit, with `num_shards` planned and nearly all decided."""
    with tempfile.TemporaryDirectory(prefix="lm-restart-") as folder:
        tars, output = Path(folder, "in"), Path(folder, "latents")
        (tar,) = pack_clips(tars, 1, CLIP_STILLS[:1])
        for number in range(1, num_shards):
            os.link(tar, tars / f"{number:05d}.tar")
        flags = ["--input", str(tars), "--output", str(output), *SMALL]
        first = run_job([*flags, "--limit", "1"], env)
        assert first.code == 0, first.said
        (done,) = commits_of(str(output)).values()
        specs = plan_shards(parse_arguments(flags).source, open_store(str(output)), write=False)
        for spec in specs[:-_NUM_LEFT]:
            copy = replace(done, shard_id=spec.shard_id, source_uri=spec.source_uri, nonce=uuid.uuid4().hex)
            place = output / "commits" / sha256(spec.shard_id.encode()).hexdigest()[:2] / f"{spec.shard_id}.json"
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(json.dumps(asdict(copy)))
        before = _num_records(output)
        started = time.monotonic()
        with RunningJob(flags, env) as job:
            job.wait_until(lambda: _num_records(output) > before, "the first new commit was there", 600)
            took_s = time.monotonic() - started
            outcome = job.end(600)
        assert outcome.code == 0, outcome.said
        assert outcome.result["num_shards_done_before"] == num_shards - _NUM_LEFT
    return took_s


def _num_records(output: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(output / "commits"))
