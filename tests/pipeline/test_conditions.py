"""Embeddings in the same pass as the latents: there before the shard is done, about its very bytes, whoever died.

By a real actor in this process, on real pictures; the encoders are small and their weights are made.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import encoders
import numpy as np
import pytest
import torch
from builders import CLIP_STILLS

from pipeline import actors
from pipeline.actors import EncodeActor
from pipeline.audit import audit
from pipeline.columns import ColumnSet, columns_store
from pipeline.commit import decided_shards, known_commits, load_commits, name_of
from pipeline.committed import FileCache
from pipeline.conditions import publish_sets, records_of_ordered_repairs
from pipeline.config import JobConfig, TextEncoderConfig, parse_arguments
from pipeline.plan import plan_shards
from pipeline.records import DatasetManifest, ShardSpec
from pipeline.redo import order_repair, ordered_repairs, repairs, retries
from pipeline.run import _open_output
from pipeline.storage import ObjectStore, open_store
from pipeline.text import TextEncoder

CPU = torch.device("cpu")


def put_picture(folder: Path, name: str, still: Path, caption: str) -> None:
    (folder / "in").mkdir(exist_ok=True)
    shutil.copyfile(still, folder / "in" / f"{name}.jpg")
    (folder / "in" / f"{name}.txt").write_text(caption, encoding="utf-8")


class Job:
    """A job that runs in this process: a folder of pictures in, an output with both sets out."""

    def __init__(self, folder: Path, made: Path, running: dict[str, EncodeActor]) -> None:
        self.folder = folder
        flags = ["--input", str(folder / "in"), "--output", str(folder / "out"), "--model", "small"]
        flags += ["--text-encoder", str(made / "text"), "--image-encoder", str(made / "tower")]
        self.config: JobConfig = parse_arguments([*flags, "--buckets", "64x64x1"])
        self.store: ObjectStore = open_store(self.config.run.output)
        if not running:
            running["one"] = EncodeActor(self.config, "0", "cpu")
        self.actor = running["one"]
        self.actor._store, self.actor._config = self.store, self.config
        facts = self.actor.start()
        assert self.actor._conditions is not None
        self.actor._conditions.output = self.store
        self.manifest: DatasetManifest = _open_output(self.store, None, self.config, facts, self.specs())

    def specs(self) -> Sequence[ShardSpec]:
        return plan_shards(self.config.source, self.store)

    def encode(self, spec: ShardSpec) -> str:
        return self.actor.process(spec, self.manifest).outcome

    def records(self, name: str) -> list[str]:
        return [name_of(commit) for commit in load_commits(columns_store(self.store, name))]

    def caption(self, shard_id: str, caption: str) -> np.ndarray:
        return ColumnSet.open(self.store, "text", self._cache).caption(shard_id, caption)

    def image(self, shard_id: str, key: str) -> bytes:
        return ColumnSet.open(self.store, "image", self._cache).image(shard_id, key, 0).tobytes()

    @property
    def _cache(self) -> FileCache:
        return FileCache(self.folder / "cache", 1 << 30)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    encoders.quiet()
    folder = tmp_path_factory.mktemp("encoders")
    encoders.t5(folder / "text")
    encoders.clip_vision(folder / "tower")
    return folder


@pytest.fixture(scope="module")
def running() -> Iterator[dict[str, EncodeActor]]:
    """The actor of the module, with its model and decode children."""
    actors: dict[str, EncodeActor] = {}
    yield actors
    for actor in actors.values():
        actor.stop()


@pytest.fixture
def job(tmp_path: Path, made: Path, running: dict[str, EncodeActor]) -> Job:
    """Three pictures in one shard that is not encoded yet; "b" is a file without bytes."""
    put_picture(tmp_path, "a", CLIP_STILLS[0], "a hare")
    put_picture(tmp_path, "b", CLIP_STILLS[1], "a town")
    put_picture(tmp_path, "c", CLIP_STILLS[1], "a hare")
    (tmp_path / "in" / "b.jpg").write_bytes(b"")
    return Job(tmp_path, made, running)


def test_a_shard_that_is_done_has_its_embeddings_and_retries_get_theirs(job: Job, made: Path) -> None:
    (spec,) = job.specs()
    assert job.encode(spec) == "committed"
    assert job.records("text") == job.records("image") == [spec.shard_id]
    encoder = TextEncoder(TextEncoderConfig(text_encoder=str(made / "text")), CPU, "float32", 1)
    hare, nothing, town = (found.embedding for found in encoder.embed(["a hare", "", "a town"]))
    np.testing.assert_array_equal(job.caption(spec.shard_id, "a hare"), hare)
    np.testing.assert_array_equal(job.caption(spec.shard_id, ""), nothing)
    assert job.image(spec.shard_id, "a") != job.image(spec.shard_id, "c")
    put_picture(job.folder, "b", CLIP_STILLS[1], "a town")
    shards = {shard.shard_id: shard for shard in decided_shards(known_commits(job.store))}
    cache = FileCache(job.folder / "driver", 1 << 30)
    (again,) = retries(job.store, job.specs(), shards, ("empty_file",), max_attempts=3, changed={}, cache=cache).specs
    assert job.encode(again) == "committed"
    assert job.records("text") == job.records("image") == [spec.shard_id, f"{spec.shard_id}.r1"]
    np.testing.assert_array_equal(job.caption(spec.shard_id, "a town"), town)
    assert job.image(spec.shard_id, "b") == job.image(spec.shard_id, "c"), "one picture under two names"
    publish_sets(job.store, ("text", "image"))
    for store in (job.store, columns_store(job.store, "text"), columns_store(job.store, "image")):
        assert not audit(store).findings


class _DeathError(BaseException):
    """The actor is gone between two requests."""


def test_an_actor_that_dies_between_the_records_leaves_nothing_that_is_ever_read(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    (spec,) = job.specs()

    def died(*_: object) -> None:
        raise _DeathError

    with monkeypatch.context() as patched:
        patched.setattr(actors, "commit_shard", died)
        with pytest.raises(_DeathError):
            job.encode(spec)
    assert job.records("image") == [spec.shard_id]
    assert not list(load_commits(job.store))
    lost = job.image(spec.shard_id, "a")
    put_picture(job.folder, "a", CLIP_STILLS[1], "a town")
    assert job.encode(spec) == "committed"
    # The input was another one: what the dead actor had seen does not speak for it.
    assert job.records("image") == [spec.shard_id, f"{spec.shard_id}.r1"]
    assert job.image(spec.shard_id, "a") == job.image(spec.shard_id, "c") != lost
    assert len(job.caption(spec.shard_id, "a town"))
    assert not audit(columns_store(job.store, "image")).findings


def test_an_attempt_that_is_repeated_on_the_same_input_finds_its_embeddings_there(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    (spec,) = job.specs()

    def died(*_: object) -> None:
        raise _DeathError

    with monkeypatch.context() as patched:
        patched.setattr(actors, "commit_shard", died)
        with pytest.raises(_DeathError):
            job.encode(spec)
    before = _data(job, "text"), _data(job, "image")
    assert job.encode(spec) == "committed"
    assert (_data(job, "text"), _data(job, "image")) == before
    assert job.records("text") == job.records("image") == [spec.shard_id]


def _data(job: Job, name: str) -> Mapping[str, bytes]:
    store = columns_store(job.store, name)
    return {info.key: store.get(info.key) for info in store.list("data/")}


def test_damage_of_a_set_is_mended_by_encoding_the_record_again_that_it_is_about(job: Job) -> None:
    (spec,) = job.specs()
    job.encode(spec)
    whole = _data(job, "image")
    store = columns_store(job.store, "image")
    Path(store.url(next(iter(whole)))).unlink()
    (record,) = audit(store).repairable
    assert order_repair(store, record, ["missing"])
    shards = {shard.shard_id: shard for shard in decided_shards(known_commits(job.store))}
    assert records_of_ordered_repairs(job.store, shards, "image") == {spec.shard_id: spec.shard_id}
    (again,) = repairs({spec.shard_id: spec}, shards, [spec.shard_id])
    assert job.encode(again) == "restored"
    assert _data(job, "image") == whole
    sets = {shard.shard_id: shard for shard in decided_shards(known_commits(store))}
    assert ordered_repairs(store, sets) == []
    assert not audit(store).findings
