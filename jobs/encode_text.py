"""Adds caption embeddings to an output that has its latents already, or to what came since the last time.

    python jobs/encode_text.py --latents s3://bucket/latents --text-encoder openai/clip-vit-large-patch14

The same rows as `jobs/encode_laion.py --text-encoder` makes in one pass (with equal `--cpus-per-actor`, on equal
devices: the same bytes), under LATENTS/columns/text. The same command every night does what is new: every record of the
output gets one record of the set, retries and repairs like first ones. Of the output's Parquet files only keys and
texts are fetched. Killed at any moment it goes on with the same command, and several may run at once; repairs that
`latentmill verify --requeue LATENTS/columns/text` ordered are carried out.

One process. The last line on standard output is one JSON object with the counts, and the exit code is

    0 every committed record is covered       2 wrong use       3 the set was made with another encoder
    4 work is left undone                     130 interrupted
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parent.parent)
if _ROOT not in sys.path:
    # Started by its path, the interpreter knows jobs/ only.
    sys.path.insert(0, _ROOT)

import torch

from pipeline.columns import base_file, columns_store, refuse_unknown_columns, stored_captions_of
from pipeline.commit import check_store, decided_shards, known_commits, manifest_of_output, name_of, publish_snapshot
from pipeline.conditions import ConditionEncoders, open_sets, records_of_ordered_repairs
from pipeline.config import (
    COMPUTE_DTYPES,
    PROGRESS,
    EncodingConfig,
    ImageEncoderConfig,
    TextEncoderConfig,
    auto_or,
    choice,
    option,
    read_parts,
    whole,
    yes_no,
)
from pipeline.errors import (
    ConfigMismatchError,
    LatentmillError,
    StorageError,
    StorageUnavailableError,
    UsageError,
)
from pipeline.progress import Progress
from pipeline.records import FileStat
from pipeline.scratch import Scratch
from pipeline.storage import ObjectStore, open_store

EXIT_OK, EXIT_USAGE, EXIT_MISMATCH, EXIT_UNDONE, EXIT_INTERRUPTED = 0, 2, 3, 4, 130
# A snapshot every so many records, so that readers of a long run see what is there.
_SNAPSHOT_EVERY = 1000
_TOLD_EVERY_S = 10.0
_MAX_TOLD = 20
# Records whose captions are on their way while others are embedded.
_FETCHED_AHEAD = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPart:
    """What is covered, and how. Device, dtype and cores change the bytes and are part of the set's fingerprint."""

    latents: str = option("URI of the output: a local folder or s3://bucket/prefix", str)
    device: str = option(
        "auto (cuda where there is one), cpu or cuda", choice("device", ("auto", "cpu", "cuda")), "auto"
    )
    compute_dtype: str = option(
        "auto (float32 on CPU, bfloat16 on GPU), float32, bfloat16 or float16",
        choice("compute-dtype", COMPUTE_DTYPES),
        "auto",
    )
    cpus_per_actor: int | None = option(
        "CPU cores of the encoder; auto: 1 without a GPU, 4 with one", auto_or(whole("cpus-per-actor", 1)), None
    )
    limit: int | None = option("cover at most this many records in this run", whole("limit", 1), None)
    single_writer: bool = option(
        "allow a store without conditional writes (then never run two jobs at once)",
        yes_no("single_writer"),
        False,
        is_switch=True,
    )
    progress: str = option("auto, plain or json", choice("progress", PROGRESS), "auto")


PARTS = {"run": RunPart, "text": TextEncoderConfig}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """A record of the output to cover, or to cover again.

    Attributes:
        repairs: the record of the set whose files are to be put back; None for a first time.
    """

    record: str
    shard_id: str
    base: FileStat
    repairs: str | None = None


@dataclass(slots=True, kw_only=True)
class Summary:
    """How a run ended; printed as the last line."""

    exit_code: int = EXIT_OK
    num_records: int = 0  # of the output, with samples
    num_records_done_before: int = 0
    num_records_done: int = 0
    num_records_repaired: int = 0
    num_texts: int = 0  # distinct in their shards, of this run
    num_texts_truncated: int = 0  # of these
    snapshot: int | None = None
    elapsed_s: float = 0.0
    undone: dict[str, str] = field(default_factory=dict)  # record -> why, at most 20 of them


def main(argv: Sequence[str]) -> int:
    """Runs the job; returns the exit code."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        description = (__doc__ or "").split("\n")[0]
        parts = read_parts(argv, PARTS, "encode_text.py", description)
        with Progress(parts["run"].progress) as progress:
            summary = encode_texts(parts["run"], parts["text"], progress)
    except ConfigMismatchError as error:
        return _fail(EXIT_MISMATCH, error, differences={key: list(pair) for key, pair in error.differences.items()})
    except StorageUnavailableError as error:
        return _fail(EXIT_UNDONE, error)
    except (UsageError, StorageError) as error:
        return _fail(EXIT_USAGE, error)
    except KeyboardInterrupt:
        return _fail(
            EXIT_INTERRUPTED, LatentmillError("interrupted; what is committed stays, the same command goes on")
        )
    except Exception as error:
        traceback.print_exc()
        return _fail(EXIT_UNDONE, error)
    print(json.dumps(asdict(summary)), flush=True)
    return summary.exit_code


def encode_texts(run: RunPart, text: TextEncoderConfig, progress: Progress) -> Summary:
    """Covers every record of an output that the set does not cover yet.

    Raises:
        UsageError: there is no output, no such encoder, or a flag is wrong.
        ConfigMismatchError: the set was made with another encoder or configuration.
        StorageError: the store failed for good.
    """
    started = time.monotonic()
    if text.text_encoder is None:
        raise UsageError("--text-encoder must be given, as a flag or in --config; see --help")
    output = open_store(run.latents)
    refuse_unknown_columns(manifest_of_output(output), text.text_columns, output.root_uri)
    encoders = _encoders(run, text, output)
    store = columns_store(output, "text")
    check_store(store, run.single_writer)
    open_sets(output, encoders.manifests)
    tasks, summary = _tasks(output, progress)
    todo = tasks[: run.limit]
    told_at_s = started
    for number, (task, captions) in enumerate(_with_captions(output, todo, text.text_columns), start=1):
        try:
            is_ours = _cover(encoders, task, captions.result(), summary)
        except StorageUnavailableError:
            raise
        except StorageError as error:
            # Damage of one file of the output; the next record may be well.
            _leave_undone(summary, task, str(error), progress)
            continue
        if task.repairs is None:
            summary.num_records_done += 1
        elif is_ours:
            summary.num_records_repaired += 1
        else:
            message = f"{task.repairs} of the set is damaged, and its texts give other bytes now: restore its file"
            _leave_undone(summary, task, message, progress)
        if number % _SNAPSHOT_EVERY == 0:
            publish_snapshot(store)
        if time.monotonic() - told_at_s >= _TOLD_EVERY_S:
            told_at_s = time.monotonic()
            progress.say("progress", f"records {number}/{len(todo)}  elapsed {told_at_s - started:.0f} s")
    summary.snapshot = publish_snapshot(store).number
    summary.elapsed_s = round(time.monotonic() - started, 3)
    return summary


def _encoders(run: RunPart, text: TextEncoderConfig, output: ObjectStore) -> ConditionEncoders:
    device_type = run.device if run.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    # The same rules as of the job that makes both in one pass.
    encoding = EncodingConfig(model="", compute_dtype=run.compute_dtype, cpus_per_actor=run.cpus_per_actor)
    num_threads = encoding.cpus_on(device_type)
    torch.set_num_threads(num_threads)
    compute_dtype = encoding.compute_dtype_on(device_type)
    return ConditionEncoders(text, ImageEncoderConfig(), output, torch.device(device_type), compute_dtype, num_threads)


def _tasks(output: ObjectStore, progress: Progress) -> tuple[list[_Task], Summary]:
    store = columns_store(output, "text")
    shards = {shard.shard_id: shard for shard in decided_shards(known_commits(output))}
    covered: dict[str, list[object]] = {}
    for record in known_commits(store):
        covered.setdefault(record.shard_id, []).append(record.source_etag)
    bases: dict[str, _Task] = {}
    for shard in shards.values():
        for commit in shard.commits:
            base = base_file(commit.files)
            if base is not None:
                bases[name_of(commit)] = _Task(record=name_of(commit), shard_id=shard.shard_id, base=base)
    tasks = [task for task in bases.values() if task.base.sha256 not in covered.get(task.shard_id, ())]
    summary = Summary(num_records=len(bases), num_records_done_before=len(bases) - len(tasks))
    for damaged, about in sorted(records_of_ordered_repairs(output, shards, "text").items()):
        if about is None:
            progress.say("repair", f"{damaged} of the set is damaged and about no record that counts; nobody reads it")
        else:
            task = bases[about]
            tasks.append(_Task(record=about, shard_id=task.shard_id, base=task.base, repairs=damaged))
    progress.say(
        "plan",
        f"{len(bases)} records with samples, {summary.num_records_done_before} covered before, {len(tasks)} to do",
    )
    return tasks, summary


def _with_captions(
    output: ObjectStore, tasks: Sequence[_Task], columns: Sequence[str]
) -> Iterator[tuple[_Task, Future[dict[str, list[str]]]]]:
    """The tasks with their captions, those of the next ones on their way meanwhile: an encoder waits for no store."""
    with ThreadPoolExecutor(_FETCHED_AHEAD) as pool:
        coming = deque[tuple[_Task, Future[dict[str, list[str]]]]]()
        try:
            for task in tasks:
                coming.append((task, pool.submit(stored_captions_of, output, task.base, columns)))
                if len(coming) > _FETCHED_AHEAD:
                    yield coming.popleft()
            while coming:
                yield coming.popleft()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _cover(encoders: ConditionEncoders, task: _Task, captions: Mapping[str, Sequence[str]], summary: Summary) -> bool:
    conditions = encoders.shard(task.shard_id)
    with Scratch("text") as folder:
        conditions.write_texts(folder, captions)
        is_ours = conditions.commit([task.base])
    summary.num_texts += len(captions)
    summary.num_texts_truncated += conditions.num_truncated
    return is_ours


def _leave_undone(summary: Summary, task: _Task, message: str, progress: Progress) -> None:
    progress.say("undone", f"record {task.record} is left undone: {message}")
    summary.exit_code = EXIT_UNDONE
    if len(summary.undone) < _MAX_TOLD:
        summary.undone[task.record] = message


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _fail(exit_code: int, error: Exception, **more: Mapping[str, object]) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    print(
        json.dumps({"exit_code": exit_code, "error": type(error).__name__, "message": str(error), **more}), flush=True
    )
    return exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
