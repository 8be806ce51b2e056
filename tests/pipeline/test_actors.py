"""The encoder actor without Ray: accounts, order of turns, decoding ahead, temporary files.

Whole shards through real actors are in tests/integration.
"""

from __future__ import annotations

import io
import json
import pickle
import resource
import select
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import CLIP_VIDEOS, pack_clips
from latents import manifest_of_worker

import pipeline.actors as actors
from pipeline import memory
from pipeline.actors import EncodeActor, _Account, _DecodeAhead, _Turns
from pipeline.commit import open_dataset
from pipeline.config import JobConfig, parse_arguments
from pipeline.decode import _Child
from pipeline.errors import UsageError
from pipeline.plan import plan_shards
from pipeline.records import ClipFailure
from pipeline.storage import open_store
from pipeline.store import Steps, copy_blocks, sha256_of_file

REQUIRED = ["--input", "in", "--output", "out", "--model", "small"]


def _failure(key: str, clip_index: int | None, reason: str = "timeout") -> ClipFailure:
    return ClipFailure(key=key, clip_index=clip_index, step="decode", reason=reason, message="m", source_uri="u")


def test_a_video_whose_clips_are_all_rejected_counts_as_rejected_once() -> None:
    account = _Account()
    for failure in (_failure("a", 0), _failure("a", 1), _failure("b", None, "empty_file")):
        account.reject(failure)
    counts = account.counts()
    assert (counts.num_videos, counts.num_videos_ok, counts.num_videos_rejected) == (2, 0, 2)
    assert (counts.num_clips, counts.num_records, counts.num_clips_rejected) == (2, 0, 2)
    assert counts.reasons == {"empty_file": 1, "timeout": 2}


def test_turns_are_served_in_the_order_in_which_they_were_drawn() -> None:
    turns, served = _Turns(), []
    drawn = [turns.draw() for _ in range(4)]

    def serve(turn: int) -> None:
        turns.wait_for(turn)
        served.append(turn)
        turns.end(turn)

    turns.end(drawn[2])  # gave up before its turn came
    threads = [threading.Thread(target=serve, args=(turn,)) for turn in (drawn[3], drawn[1], drawn[0])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert served == [drawn[0], drawn[1], drawn[3]]


def test_decoding_ahead_is_bounded_and_stops_when_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "_CLIPS_AHEAD_BYTES", 3)
    made: list[int] = []

    def endless() -> Iterator[ClipFailure]:
        while True:
            made.append(len(made))
            yield _failure(str(len(made)), None)

    ahead = _DecodeAhead(endless(), clip_bytes=1)
    time.sleep(0.5)
    assert 1 <= len(made) <= 5
    assert next(iter(ahead)).key == "1"
    ahead.close()
    num_made = len(made)
    time.sleep(0.3)
    assert len(made) == num_made


def test_an_error_while_decoding_ahead_reaches_whoever_waits() -> None:
    def broken() -> Iterator[ClipFailure]:
        yield _failure("a", None)
        raise OSError("gone")

    ahead = _DecodeAhead(broken(), clip_bytes=1)
    with pytest.raises(OSError, match="gone"):
        list(ahead)
    ahead.close()


def test_an_actor_leaves_no_core_dump_with_keys_in_it(config: JobConfig) -> None:
    before = resource.getrlimit(resource.RLIMIT_CORE)
    try:
        EncodeActor(config, "0", "cpu").stop()
        assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)


def test_every_block_that_is_copied_or_stored_is_a_step(tmp_path: Path) -> None:
    before, data = Steps.num_of_process, bytes(3 << 20)
    copy_blocks(io.BytesIO(data), io.BytesIO())
    assert Steps.num_of_process == before + 3
    path = tmp_path / "file"
    path.write_bytes(data)
    open_store(str(tmp_path / "out")).put_file("file", path, sha256_of_file(path))
    assert Steps.num_of_process == before + 6


def test_signs_of_life_of_a_decode_child_are_steps_for_as_long_as_a_file_may_compute() -> None:
    for max_decode_cpu_s, num_steps in ((3600.0, 5), (0.0, 0)):
        child = object.__new__(_Child)  # without a process: only the conversation is looked at
        child._limits = replace(parse_arguments(REQUIRED).decode, max_decode_cpu_s=max_decode_cpu_s)
        child._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with child._connection, theirs:
            child._poll = select.poll()
            child._poll.register(child._connection, select.POLLIN)
            for kind in ["alive"] * 5 + ["opened"]:
                theirs.send(json.dumps({"type": kind}).encode())
            before = Steps.num_of_process
            assert child.ask({"op": "open"}, 10)["type"] == "opened"
            assert Steps.num_of_process == before + num_steps


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobConfig:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pack_clips(tmp_path / "in", 1)
    flags = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--model", "small"]
    return parse_arguments([*flags, "--buckets", "64x64x9", "--clips-per-video", "1"])


def test_a_shard_is_committed_once_and_leaves_no_temporary_file(config: JobConfig, tmp_path: Path) -> None:
    actor = EncodeActor(config, "0", "cpu")
    try:
        store = open_store(config.run.output)
        facts = actor.start()
        manifest = open_dataset(store, manifest_of_worker(config, facts))
        (spec,) = plan_shards(config.source, store)
        report = actor.process(spec, manifest)
        assert b"torch." not in pickle.dumps((facts, report)), "the driver would load torch to read it"
        assert (report.outcome, report.counts.num_records, report.counts.num_frames) == ("committed", 10, 90)
        assert 0 < report.busy_share <= 1
        assert report.num_bytes_in == sum(path.stat().st_size for path in CLIP_VIDEOS)
        assert actor.process(spec, manifest).outcome == "already_done"
        assert [path.name for path in tmp_path.glob("latentmill-actor-*/*")] == ["owner.lock"]
    finally:
        actor.stop()
    assert not list(tmp_path.glob("latentmill-actor-*"))


def test_a_worker_with_another_decoder_or_device_refuses_to_write(config: JobConfig) -> None:
    actor = EncodeActor(config, "0", "cpu")
    try:
        (spec,) = plan_shards(config.source, open_store(config.run.output))
        for changes, named in (({"decoders": {"decord": "0.0"}}, "decoders"), ({"device_type": "cuda"}, "device")):
            with pytest.raises(UsageError, match=named):
                actor.process(spec, manifest_of_worker(config, actor.start(), **changes))
    finally:
        actor.stop()


def test_an_actor_gives_memory_back_after_shards_that_failed_too(
    config: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    monkeypatch.setattr(memory, "give_memory_back", lambda: given.append("all"))
    actor = EncodeActor(config, "0", "cpu")
    try:
        (spec,) = plan_shards(config.source, open_store(config.run.output))
        refused = manifest_of_worker(config, actor.start(), device_type="cuda")
        for every_s in (60.0, 0.0, 0.0):
            monkeypatch.setattr(memory, "_EVERY_S", every_s)
            with pytest.raises(UsageError, match="device"):
                actor.process(spec, refused)
    finally:
        actor.stop()
    assert given == ["all", "all"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_an_actor_that_was_given_a_gpu_never_falls_back_to_the_cpu(config: JobConfig) -> None:
    actor = EncodeActor(config, "0", "cuda")
    with pytest.raises(UsageError, match="sees none"):
        actor.start()
    actor.stop()
