"""Latents in the form of another project, made from an output without encoding again.

Not what that form is (`peers`, `energon`), nor which rows count (`commit`, `committed`). Called by `cli`. Each file
of a pinned snapshot becomes a file, or one for each shape; its SHA-256 is checked when it is opened. For each file that
is worked on memory stays near one row group of it and one of each file in the making, temporary space near its size and
that of what it becomes.

    _export.json              create-once, first of all: what is exported, from where, of which snapshot
    .../UNFINISHED.<ext>      while the export runs: a text that stops whoever reads the files beside it
    files of the form         each appears whole
    the form's description    a dataset card, an index: when all files are there
    _complete.json            create-once, last: how many files and rows; then the UNFINISHED texts go

The same command goes on with an export that was interrupted, and keeps the files that are there and whole. A target
that holds anything else, another export included, is left as it is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.columns import ColumnSet
from pipeline.commit import (
    Snapshot,
    create_once,
    fingerprint_of,
    latest_snapshot,
    manifest_of_output,
    read_snapshot,
)
from pipeline.committed import DataFile, FileCache, data_files, open_checked
from pipeline.energon import EnergonDFM
from pipeline.errors import DamagedObjectError, StorageNotFoundError, UsageError
from pipeline.peers import About, FastVideo, FileFacts, HuggingFace, Peer, Sample, Sink
from pipeline.records import DatasetManifest
from pipeline.scratch import Scratch
from pipeline.storage import ObjectStore, open_input, open_store, sha256_of_file

EXPORT_VERSION = 1
EXPORT_KEY = "_export.json"
COMPLETE_KEY = "_complete.json"
PEERS: Mapping[str, type[Peer]] = {peer.name: peer for peer in (FastVideo, EnergonDFM, HuggingFace)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A finished export.

    Attributes:
        snapshot: the one that was exported.
        latest_snapshot: the latest of the source, now.
        num_files: with rows; not those that describe the whole.
        num_files_kept: of them, those that earlier runs had made.
    """

    target: str
    to: str
    snapshot: int
    latest_snapshot: int
    num_records: int
    num_files: int
    num_files_kept: int


def export(
    uri: str,
    to: str,
    target: str,
    *,
    snapshot: int | None = None,
    text: str | None = None,
    num_at_once: int = 4,
    on_file: Callable[[int, int], None] = lambda done, files: None,
) -> Export:
    """Writes the samples of a snapshot to `target` in the form `to`, goes on with that, or finds it done.

    Args:
        uri: an output of the encode job.
        to: a key of `PEERS`.
        target: a new or empty local folder or s3://bucket/prefix, or one where this export was begun.
        snapshot: its number; None: the one that was begun with, else the latest.
        text: name of the column set whose caption embeddings go along.
        num_at_once: files of the source that are worked on at the same time.
        on_file: called after each file of the source with how many are done, and of how many.

    Raises:
        UsageError: there is nothing to export, or the target holds something else.
        DamagedObjectError: a file of the source does not have the SHA-256 that its commit states.
    """
    source, goal = open_store(uri), open_store(target)
    manifest = manifest_of_output(source)
    if f"{goal.root_uri}/".startswith(f"{source.root_uri}/"):
        raise UsageError(f"{target} lies in the output {uri}; give a target outside of it")
    held = _held(goal)
    latest = latest_snapshot(source)
    if latest is None:
        raise UsageError(
            f"{uri} has no snapshot that could be exported; the encode job publishes one when it ends, also after an "
            "interrupt: run it again"
        )
    if snapshot is None and held.get("fingerprint") == manifest.fingerprint:
        snapshot = held["snapshot"]
    pinned = _pinned(source, latest, snapshot)
    with Scratch("export") as folder:
        cache = FileCache(folder / "cache", 0)
        texts = None if text is None else ColumnSet.open(source, text, cache)
        if texts is not None and texts.manifest.name != "text":
            raise UsageError(f"the column set {text!r} holds no embeddings of captions; give that of them: text")
        identity = {
            "version": EXPORT_VERSION,
            "to": to,
            "fingerprint": manifest.fingerprint,
            "snapshot": pinned.number,
            "snapshot_digest": pinned.contents.digest,
            "text": None if texts is None else texts.manifest.fingerprint,
        }
        files = data_files(pinned.commits, source, cache)
        about = _about(manifest, fingerprint_of(identity), files, texts)
        if not about.num_rows:
            raise UsageError(f"snapshot {pinned.number} of {uri} holds no latents")
        (folder / "description").mkdir()
        with closing(PEERS[to](about, folder / "description")) as peer:
            _claim(goal, identity, is_begun=bool(held), source_uri=source.root_uri)
            num_kept = None
            if goal.find(COMPLETE_KEY) is None:
                num_kept = _Job(source, goal, peer, files, text, folder, num_at_once).run(on_file)
            for key in peer.unfinished_keys():
                goal.delete(key)
        if "://" not in goal.root_uri:
            # Where a local store writes before it links; a killed run leaves files there, which nobody should publish.
            shutil.rmtree(Path(goal.root_uri) / ".tmp", ignore_errors=True)
        num_files: int = json.loads(goal.get(COMPLETE_KEY))["num_files"]
    return Export(
        target=goal.root_uri,
        to=to,
        snapshot=pinned.number,
        latest_snapshot=latest.number,
        num_records=about.num_rows,
        num_files=num_files,
        num_files_kept=num_files if num_kept is None else num_kept,
    )


def _held(goal: ObjectStore) -> dict[str, Any]:
    """What the target says that it holds; empty where no export was begun."""
    data = goal.find(EXPORT_KEY)
    try:
        held = {} if data is None else json.loads(data)
    except ValueError:
        held = None
    if not isinstance(held, dict) or (data is not None and "snapshot" not in held):
        raise UsageError(f"{goal.url(EXPORT_KEY)} was not written by an export; give another target")
    return held


def _pinned(source: ObjectStore, latest: Snapshot, number: int | None) -> Snapshot:
    if number in (None, latest.number):
        return latest
    assert number is not None
    try:
        return read_snapshot(source, number)
    except StorageNotFoundError as error:
        raise UsageError(f"{source.root_uri} has no snapshot {number}; the latest is {latest.number}") from error


def _about(manifest: DatasetManifest, export_id: str, files: Sequence[DataFile], texts: ColumnSet | None) -> About:
    bucket_rows: Counter[str] = Counter()
    for file in files:
        bucket_rows.update({bucket: rows for bucket, rows in file.bucket_rows.items() if rows})
    return About(
        manifest=manifest,
        export_id=export_id,
        num_files=len(files),
        bucket_rows=dict(sorted(bucket_rows.items())),
        text_encoder=None if texts is None else texts.encoder,
    )


def _claim(goal: ObjectStore, identity: Mapping[str, object], *, is_begun: bool, source_uri: str) -> None:
    """Makes the target this export's own, unless it holds something else.

    Raises:
        UsageError: it does.
    """
    stranger = None if is_begun else next((info.key for info in goal.list("") if info.key != EXPORT_KEY), None)
    if stranger is not None:
        raise UsageError(f"{goal.root_uri} is not empty (there is {stranger}); give a new or empty target")
    # Where a source lies may change while an export is made of it.
    begun = json.dumps({**identity, "source": source_uri}, indent=1) + "\n"
    standing = json.loads(create_once(goal, EXPORT_KEY, begun.encode()))
    different = [
        f"{name}: {standing.get(name)!r} there, {value!r} asked for"
        for name, value in identity.items()
        if standing.get(name) != value
    ]
    if different:
        raise UsageError(
            f"{goal.root_uri} holds another export ({'; '.join(different)}) and nothing was changed; give a new target"
        )


class _Job:
    """The files of one export."""

    def __init__(
        self,
        source: ObjectStore,
        goal: ObjectStore,
        peer: Peer,
        files: Sequence[DataFile],
        text: str | None,
        folder: Path,
        num_at_once: int,
    ) -> None:
        self._source = source
        self._goal = goal
        self._peer = peer
        self._files = files
        self._text = text
        self._folder = folder
        self._num_at_once = num_at_once

    def run(self, on_file: Callable[[int, int], None]) -> int:
        """Makes what is missing; returns how many files were there already."""
        there = frozenset(info.key for info in self._goal.list(""))
        notice = f"This export is not finished. Run the same latentmill export again: {self._goal.root_uri}\n"
        for key in self._peer.unfinished_keys():
            create_once(self._goal, key, notice.encode())
        num_files = num_kept = num_rows = 0
        for number, (files, is_kept) in enumerate(self._in_order(there), start=1):
            for facts in files:
                self._peer.take(facts)
                num_rows += facts.num_rows
            num_files += len(files)
            num_kept += len(files) if is_kept else 0
            on_file(number, len(self._files))
        for key, path in self._peer.description():
            self._goal.put_file(key, path, sha256_of_file(path))
        counts = {"num_files": num_files, "num_records": num_rows}
        create_once(self._goal, COMPLETE_KEY, (json.dumps(counts) + "\n").encode())
        return num_kept

    def _in_order(self, there: frozenset[str]) -> Iterator[tuple[list[FileFacts], bool]]:
        """What each file of the source became, and whether an earlier run made it; the next ones are being made."""
        waiting: deque[Future[tuple[list[FileFacts], bool]]] = deque()
        with ThreadPoolExecutor(self._num_at_once) as pool:
            try:
                for number in range(len(self._files)):
                    waiting.append(pool.submit(self._kept_or_made, number, there))
                    if len(waiting) == self._num_at_once:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _kept_or_made(self, number: int, there: frozenset[str]) -> tuple[list[FileFacts], bool]:
        file = self._files[number]
        rows: Counter[str] = Counter()
        for bucket, num_rows in file.bucket_rows.items():
            rows[self._peer.key(number, bucket)] += num_rows
        kept = self._kept(+rows, there)
        return (self._made(number, file, +rows), False) if kept is None else (kept, True)

    def _kept(self, rows: Mapping[str, int], there: frozenset[str]) -> list[FileFacts] | None:
        """The files that a file of the source became in an earlier run, or None where one is missing or not whole."""
        found = []
        for key in rows:
            if key not in there:
                return None
            try:
                with open_input(self._goal.url(key)) as stream:
                    facts = self._peer.inspect(key, stream)
            except DamagedObjectError:
                return None
            if facts.num_rows != rows[key]:
                return None
            found.append(facts)
        for facts in found:
            self._put_beside(facts, there)
        return found

    def _made(self, number: int, file: DataFile, rows: Mapping[str, int]) -> list[FileFacts]:
        """Makes and stores the files that a file of the source becomes.

        Raises:
            DamagedObjectError: the source does not hold what its commit states.
        """
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            paths = {key: Path(name) / str(place) for place, key in enumerate(rows)}
            with ExitStack() as stack:
                sinks: dict[str, Sink] = {}
                for sample in self._samples(file, Path(name)):
                    key = self._peer.key(number, sample.record.columns["bucket"])
                    if key not in sinks:
                        sinks[key] = stack.enter_context(closing(self._peer.sink(paths[key])))
                    sinks[key].add(sample)
            made = []
            for key, path in paths.items():
                with path.open("rb") as stream:
                    facts = self._peer.inspect(key, stream)
                if facts.num_rows != rows[key]:
                    raise DamagedObjectError(
                        f"{self._source.url(file.stat.key)} gave {facts.num_rows} rows for {key}, not the {rows[key]} "
                        "that its commit states"
                    )
                self._goal.put_file(key, path, sha256_of_file(path))
                self._put_beside(facts, frozenset())
                made.append(facts)
            return made

    def _put_beside(self, facts: FileFacts, there: frozenset[str]) -> None:
        for key, data in self._peer.beside(facts):
            if key not in there:
                with tempfile.NamedTemporaryFile(dir=self._folder) as file:
                    file.write(data)
                    file.flush()
                    self._goal.put_file(key, Path(file.name), hashlib.sha256(data).hexdigest())

    def _samples(self, file: DataFile, folder: Path) -> Iterator[Sample]:
        """The rows of a file of the source that count, in their order."""
        cache = FileCache(folder / "cache", 0)
        # A set keeps the files of many shards open; one of its own for each file lets go of them.
        texts = None if self._text is None else ColumnSet.open(self._source, self._text, cache)
        records = open_checked(file.stat, self._source, cache)
        counts = iter(file.mask())
        for group in range(len(records.group_rows)):
            for record in records.read_group(group):
                if next(counts):
                    embedding = None
                    if texts is not None:
                        embedding = texts.caption(file.shard_id, record.columns["caption"]).astype(np.float32)
                    yield Sample(shard_id=file.shard_id, record=record, caption_embedding=embedding)
