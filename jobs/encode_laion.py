"""Encodes a video or image dataset into latents: the job that users start.

    python jobs/encode_laion.py --input shards/ --output s3://latents/run1 --model small
    ray job submit --working-dir . -- python jobs/encode_laion.py ...            the same on a cluster

Wiring only: the command line becomes a JobConfig, `pipeline.run` does the work, and what came of it becomes the last
line on standard output, one JSON object with the counts (on a terminal: some lines for people), and the exit code:

    0 every planned sample is decided       2 wrong use               3 the output holds another configuration
    4 work is left undone                   5 too many rejections     130 interrupted

Progress and messages go to standard error. The same command again goes on where the last one ended.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parent.parent)
if _ROOT not in sys.path:
    # Started by its path, the interpreter knows jobs/ only; Ray's workers inherit the environment, not sys.path.
    sys.path.insert(0, _ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))

from pipeline.config import JobConfig, parse_arguments
from pipeline.errors import (
    ConfigMismatchError,
    CredentialsExpiredError,
    LatentmillError,
    StorageError,
    StorageUnavailableError,
    UsageError,
    printable,
)
from pipeline.metrics import RunMetrics
from pipeline.progress import Progress, counted, duration_text
from pipeline.run import (
    EXIT_INTERRUPTED,
    EXIT_MISMATCH,
    EXIT_OK,
    EXIT_REJECTED,
    EXIT_UNDONE,
    EXIT_USAGE,
    RunSummary,
    run,
)
from pipeline.store import shown_uri


def main(argv: Sequence[str]) -> int:
    """Runs the job; returns the exit code."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        config = parse_arguments(argv)
    except UsageError as error:
        return _fail(EXIT_USAGE, error)
    metrics = RunMetrics(config.metric_labels)
    started_at = time.time()
    metrics.set("latentmill_run_start_timestamp_seconds", started_at)
    if config.run.deadline_s is not None:
        metrics.set("latentmill_run_deadline_timestamp_seconds", started_at + config.run.deadline_s)
    exit_code = _encode(config, metrics)
    if not config.run.dry_run:
        _leave_metrics(config, metrics, exit_code)
    return exit_code


def _encode(config: JobConfig, metrics: RunMetrics) -> int:
    server = None
    try:
        if config.run.metrics_port is not None:
            port, server = metrics.serve(config.run.metrics_address, config.run.metrics_port)
            print(f"metrics: http://{config.run.metrics_address}:{port}/metrics", file=sys.stderr, flush=True)
        with Progress(config.run.progress) as progress:
            summary = run(config, progress, metrics)
    except ConfigMismatchError as error:
        return _fail(EXIT_MISMATCH, error, differences={key: list(pair) for key, pair in error.differences.items()})
    except (StorageUnavailableError, CredentialsExpiredError) as error:
        return _fail(EXIT_UNDONE, error)
    except (UsageError, StorageError) as error:
        return _fail(EXIT_USAGE, error)
    except KeyboardInterrupt:
        return _fail(EXIT_INTERRUPTED, LatentmillError("interrupted and stopped at once; the same command goes on"))
    except LatentmillError as error:
        return _fail(EXIT_UNDONE, error)
    except Exception as error:
        # A lost cluster or a defect of ours: what is committed stays, and whoever reads the result line is told so.
        print("\n".join(map(printable, traceback.format_exc().splitlines())), file=sys.stderr, flush=True)
        return _fail(EXIT_UNDONE, error)
    finally:
        if server is not None:
            server.shutdown()
            server.server_close()
    if not sys.stdout.isatty():
        _result(asdict(summary))
    elif not config.run.dry_run:
        print("\n".join(map(printable, _told(summary, shown_uri(config.run.output)))), flush=True)
    return summary.exit_code


def _told(summary: RunSummary, output: str) -> Iterator[str]:
    """What came of a run, for people at a terminal."""
    yield (
        f"done      {counted(summary.num_records, 'clip')} of {summary.num_videos_ok:,} videos and images, in "
        f"{counted(summary.num_shards - summary.num_shards_undone, 'shard')}; {summary.num_shards_done:,} of them in "
        f"this run, in {duration_text(summary.elapsed_s)}"
    )
    if summary.num_videos_rejected or summary.reasons:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in summary.reasons.items())
        yield f"rejected  {summary.num_videos_rejected:,} videos and images; by reason, with single clips: {reasons}"
    if summary.exit_code == EXIT_REJECTED:
        yield "          that is more than --max-rejected-share allows: exit code 5"
    if summary.num_shards_undone:
        yield f"undone    {counted(summary.num_shards_undone, 'shard')}; the same command goes on"
    yield from (f"          {shard_id}: {message}" for shard_id, message in summary.undone.items())
    if summary.num_records:
        yield f"next      latentmill report {shlex.quote(output)} -o report.html"


def _leave_metrics(config: JobConfig, metrics: RunMetrics, exit_code: int) -> None:
    """Leaves the last values where they outlive the job. That this fails does not make a run fail."""
    metrics.set("latentmill_run_end_timestamp_seconds", time.time())
    metrics.set("latentmill_run_exit_code", exit_code)
    if exit_code == EXIT_OK:
        metrics.set("latentmill_run_success_timestamp_seconds", time.time())
    for flag, leave, place in (
        ("--metrics-file", metrics.write_final, config.run.metrics_file),
        ("--metrics-push", metrics.push_final, config.run.metrics_push),
    ):
        if place is None:
            continue
        try:
            leave(place)
        except (OSError, ValueError) as error:
            message = f"{flag} {shown_uri(place)}: the metrics of the run are lost: {error}"
            print(printable(f"warning: {message}"), file=sys.stderr, flush=True)


def _interrupt(_number: int, _frame: object) -> None:
    # A scheduler ends a job with SIGTERM; until the run has a handler of its own it counts as Ctrl-C.
    raise KeyboardInterrupt


def _fail(exit_code: int, error: Exception, **more: object) -> int:
    print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
    if not sys.stdout.isatty():
        _result({"exit_code": exit_code, "error": type(error).__name__, "message": str(error), **more})
    return exit_code


def _result(fields: Mapping[str, object]) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
