"""What a run has to do: the shards of an input, cut the same way by whoever plans, today and in a year.

Not where media are read (`source`) and not where work is handed out (`run`, the caller). Inputs are img2dataset and
video2dataset tars (one tar is one shard), tables of URIs (Parquet, CSV, JSONL) and folders or globs of media with
.txt and .json beside them.

Tables and folders have no shards of their own, so they are cut into slices, and the cut is written down:

    plans/<plan>/<number>-<sha16>.json    a slice: its entries, under the hash of its content
    plans/<plan>/round-<number>.json      create-once: the slices of one round, and what of the input they cover

A round counts from the moment its own object stands. Two drivers that plan at once write the same slices, or the one
that comes second takes the first one's round as it is and goes on behind it. What stands is never cut again: files
and rows that appear later form the slices of a new round. A table may only grow at its end.

An entry of a slice names what to encode and does not pin its bytes: a file that is replaced before its slice is
encoded is encoded as it is then, and the record of the shard says so. A tar is pinned by its size and etag, because its
samples are not known before.

An input that changes under its name after it was encoded keeps the latents that it has: `changed_inputs` tells which
they are. On a local disk the time of change stands for the etag. Files that a table names are not looked at here,
which would take a request for each of them every time; `audit` compares them when it is asked to.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import random
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.commit import DecidedShard, create_once
from pipeline.config import SourceConfig
from pipeline.errors import (
    DamagedObjectError,
    RejectionError,
    StorageDeniedError,
    StorageNotFoundError,
    UsageError,
)
from pipeline.format import column_name
from pipeline.inputs import (
    COMPRESSIONS,
    MEDIA_KINDS,
    Slice,
    SliceEntry,
    TarStream,
    extension_of,
    is_other_version,
    key_problem,
    parse_object,
    read_slice,
    recorded_uri,
    slice_digest,
    tar_suffix,
    version_of,
)
from pipeline.packed import Names, Packed
from pipeline.records import Commit, ShardSpec
from pipeline.storage import InputFile, ObjectStore, list_inputs, open_input, web_is_allowed

_TABLES = ("parquet", "csv", "jsonl", "ndjson")
# Web addresses are read only where that is asked for: a table comes from anyone. img2dataset and video2dataset are made
# for that, and keep what they fetched.
_REMOTE_SCHEMES = ("s3", "gs", "gcs", "az", "abfs")
_WEB_SCHEMES = ("http", "https")

# A slice is full at 64 videos, at 1,000 images, or at a mixture that costs as much.
_SLICE_COST = 64_000
_COSTS = {"video": 1000, "image": 64}

_CSV_BLOCK_BYTES = 64 << 20  # a row, with its caption, must fit
_LONGEST_KEY_BYTES = 1024  # of S3, Google and Azure alike
_NUM_UPLOADS = 16
_LOOKUP_FILES = 256
_NUM_KEPT_SLICES = 32
_NUM_FIRST_SLICES = 8
_LOOK_SAMPLES = 32
_LOOK_BYTES = 256 << 20
_LONGEST_JSON_BYTES = 4 << 20
# Typed columns are for fields that most samples share; data with more names than this has made-up ones.
_MOST_COLUMNS = 256


class UnwrittenSlices:
    """The slices that a dry run planned and did not write: all their names, and the content of some of them.

    Kept are the first ones and an even draw of all: those of a table of millions of rows would not fit into memory.

    Attributes:
        keys: of all of them, under plans/.
        kept: key -> bytes.
    """

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.kept: dict[str, bytes] = {}
        self._drawn: list[str] = []
        self._random = random.Random(0)

    def note(self, key: str, data: bytes) -> None:
        """Takes the next slice (Vitter's algorithm R: at any time each has been drawn with the same chance)."""
        self.keys.append(key)
        if len(self.keys) <= _NUM_FIRST_SLICES:
            self.kept[key] = data
        elif len(self._drawn) < _NUM_KEPT_SLICES:
            self._drawn.append(key)
            self.kept[key] = data
        elif (place := self._random.randrange(len(self.keys) - _NUM_FIRST_SLICES)) < _NUM_KEPT_SLICES:
            del self.kept[self._drawn[place]]
            self._drawn[place] = key
            self.kept[key] = data


def plan_shards(
    source: SourceConfig, store: ObjectStore, *, write: bool = True, unwritten: UnwrittenSlices | None = None
) -> Packed[ShardSpec]:
    """The shards of an input, sorted by source URI and number: the same for the same input and output, 39 bytes each.

    Args:
        source: what to read and how finely to cut it.
        store: the output; new slices are written under its plans/.
        write: False plans alike and writes nothing (a dry run); the `plan_key` of a new slice then leads nowhere.
        unwritten: takes what is not written then.

    Raises:
        UsageError: the input is empty, of unknown kind or of several kinds; or a table lacks the URI column, is
            damaged, or changed otherwise than by growing.
        StorageNotFoundError: there is no such file, folder or bucket.
        StorageError: the input could not be read or the output not written.
    """
    found = _classify(source.input, list_inputs(source.input), store.root_uri)
    specs = Packed(_tar_spec(tar) for tar in found.tars)
    for table in found.tables:
        specs.extend(_TablePlan(source, store, table).specs(write, unwritten))
    if found.media:
        specs.extend(_FolderPlan(source, store, found).specs(write, unwritten))
    if not specs:
        raise UsageError(f"--input: {source.input} has no rows, so there is nothing to encode")
    _refuse_equal_ids(specs)
    return specs


@dataclass(frozen=True, slots=True, kw_only=True)
class InputChange:
    """An input that is another one now than when it was encoded; the output keeps the latents of then.

    Attributes:
        shard_id: of the shard that holds what it was.
        uri: the tar, or the file of a slice.
        encoded, found: size and etag or time of change, as `inputs.version_of` states them; `encoded` is "as planned"
            where the plan of the slice says it.
    """

    shard_id: str
    uri: str
    encoded: str
    found: str


def changed_inputs(specs: Iterable[ShardSpec], shards: Mapping[str, DecidedShard]) -> list[InputChange]:
    """Of decided shards, the inputs that changed under their names since they were encoded.

    Args:
        specs: as `plan_shards` gave them now.
        shards: the decided ones by id, at least those that may have changed.
    """
    changes: list[InputChange] = []
    for spec in specs:
        shard = shards.get(spec.shard_id)
        if shard is None:
            continue
        if spec.kind == "tar":
            then, now = _stated(shard.commits[0]), (spec.source_size_bytes, spec.source_etag)
            if is_other_version(then, now):
                encoded, found = (f"{num_bytes}:{etag or ''}" for num_bytes, etag in (then, now))
                changes.append(InputChange(shard_id=spec.shard_id, uri=spec.source_uri, encoded=encoded, found=found))
        for uri, found in spec.changed.items():
            encoded_as = [commit.source_changes[uri] for commit in shard.commits if uri in commit.source_changes]
            if found not in encoded_as:
                encoded = encoded_as[-1] if encoded_as else "as planned"
                changes.append(InputChange(shard_id=spec.shard_id, uri=uri, encoded=encoded, found=found))
    return changes


def _stated(commit: Commit) -> tuple[int | None, str | None]:
    return commit.source_size_bytes, commit.source_etag


def planned_slices(store: ObjectStore) -> list[ShardSpec]:
    """The shards of every table and folder that was ever planned in an output, from what stands under its plans/.

    Raises:
        DamagedObjectError: a round cannot be read.
    """
    rounds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for key in sorted(info.key for info in store.list("plans/")):
        if match := _ROUND_KEY.fullmatch(key):
            rounds[match[1]].append(_read_round(store, key))
    specs = []
    for documents in rounds.values():
        slices = [cut for document in documents for cut in document["slices"]]
        source_uri = documents[0]["source"]
        specs += [_slice_spec(source_uri, n, cut["key"], cut["num_videos"]) for n, cut in enumerate(slices)]
    return specs


_ROUND_KEY = re.compile(r"plans/([^/]+)/round-\d+\.json")


def _read_round(store: ObjectStore, key: str) -> dict[str, Any]:
    try:
        document = _parsed_round(store.get(key).decode())
        assert all(isinstance(cut["num_videos"], int) and cut["key"] for cut in document["slices"])
        assert isinstance(document["source"], str)
        assert isinstance(document["covered"], dict)
    except (ValueError, KeyError, IndexError, TypeError, AssertionError) as error:
        raise DamagedObjectError(
            f"{store.url(key)} cannot be read as a round of a plan: {error!r:.200}; restore it, or encode into a new "
            "output"
        ) from error
    return document


def _parsed_round(text: str) -> dict[str, Any]:
    """As `json.loads`; the lists of all files of a folder are packed as they are read."""
    lists: dict[str, Packed[str]] = {}
    place = len('{"covered":{')
    for name in ("files", "versions"):
        head = f'{"," * bool(lists)}"{name}":['
        if text.startswith(head, place):
            lists[name], place = _packed_list(text, place + len(head))
    if not lists or not text.startswith('{"covered":{'):
        return dict(json.loads(text))
    document: dict[str, Any] = json.loads('{"covered":{' + text[place:])
    document["covered"] |= lists
    return document


def _packed_list(text: str, place: int) -> tuple[Packed[str], int]:
    """A list of strings whose first one is at this place, and the place behind it."""
    found = Packed[str]()
    while text[place] != "]":
        string, place = _JSON_READER.raw_decode(text, place)
        found.append(string)
        if text[place] == ",":
            place += 1
    return found, place + 1


_JSON_READER = json.JSONDecoder()


def infer_passthrough(
    source: SourceConfig, caption_column: str, specs: Sequence[ShardSpec], store: ObjectStore
) -> dict[str, str]:
    """Types of the columns and JSON fields that pass through: output column -> bool, int64, float64 or string.

    Decided by the schema of a Parquet table, as string for every column of a CSV table, and otherwise by the fields
    of the first samples of the first shard. Fields of other or mixed types are left out; they go to column `extra`.

    Raises:
        UsageError: a caption column was asked for that the table does not have.
        StorageError: the first shard or its plan could not be read.
    """
    if not specs:
        return {}
    if specs[0].plan_key is None:
        kinds = _kinds_of(_fields_in_tar(specs[0]))
        kinds.pop("key", None)
    else:
        first = read_slice(store, specs[0])
        if first.columns and caption_column not in first.columns and caption_column != "caption":
            raise UsageError(
                f"--caption-column: {source.input} has no column {caption_column!r}; it has "
                f"{', '.join(sorted(first.columns))}"
            )
        kinds = {name: kind for name, kind in first.columns.items() if name != "key"}
        kinds = kinds or _kinds_of(_fields_in_slice(first))
    kinds.pop(caption_column, None)
    typed = sorted((column_name(name), kind) for name, kind in kinds.items() if kind and name and name.isprintable())
    return dict(typed[:_MOST_COLUMNS])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """The files of an input by kind, sorted by URI; only one of the three kinds is not empty."""

    source: str  # the input as an absolute path or a URI
    root: str  # the folder that the keys of media are relative to
    tars: Sequence[InputFile]
    tables: Sequence[InputFile]
    media: Sequence[InputFile]
    sidecars: _ByUri  # captions and metadata beside media


class _ByUri:
    """Sorted files by URI; looking them up in about their order is cheap."""

    def __init__(self, files: Sequence[InputFile]) -> None:
        self._files = files
        self._firsts = [file.uri for file in files[::_LOOKUP_FILES]]
        self._open: tuple[int, Mapping[str, InputFile]] = (-1, {})  # the files behind the first one that was asked last

    def get(self, uri: str) -> InputFile | None:
        """The file with this URI, or None."""
        number = bisect_right(self._firsts, uri) - 1
        if number != self._open[0]:
            files = self._files[max(0, number) * _LOOKUP_FILES : (number + 1) * _LOOKUP_FILES]
            self._open = number, {file.uri: file for file in files}
        return self._open[1].get(uri)


def _classify(asked: str, files: Sequence[InputFile], output: str) -> _Found:
    source = _absolute(asked)
    root = _root(source, files)
    tars, tables, media, texts = (Packed[InputFile]() for _ in range(4))
    # img2dataset and video2dataset leave 00000.parquet beside 00000.tar, or beside the folder 00000.
    described = Names()
    seen: list[str] = []
    for file in files:
        if not _is_visible(file.uri, root, output):
            continue
        extension = extension_of(file.uri)
        seen += [file.uri] * (len(seen) < 3)
        if tar_suffix(file.uri):
            tars.append(file)
            described.add(_without_tar_suffix(file.uri))
        elif extension in MEDIA_KINDS:
            media.append(file)
            described.add(posixpath.dirname(file.uri))
        elif extension in _TABLES:
            tables.append(file)
        elif extension in ("txt", "json"):
            texts.append(file)
    tables = Packed(f for f in tables if posixpath.splitext(f.uri)[0] not in described)
    present = {"tars": tars, "tables": tables, "videos or images": media}
    present = {name: listed for name, listed in present.items() if listed}
    if len(present) > 1:
        examples = "; ".join(f"{len(listed)} {name}, for example {listed[0].uri}" for name, listed in present.items())
        raise UsageError(f"--input: {asked} holds {examples}; give one kind, for example with a glob such as '*.tar'")
    if not present:
        examples = ", ".join(seen) or "nothing that is visible and not the output itself"
        raise UsageError(
            f"--input: {asked} holds {examples}, and no tar ({', '.join(COMPRESSIONS)}), table "
            f"(.{', .'.join(_TABLES)}), video or image (.{', .'.join(MEDIA_KINDS)})"
        )
    return _Found(source=source, root=root, tars=tars, tables=tables, media=media, sidecars=_ByUri(texts))


def _absolute(uri: str) -> str:
    if uri.startswith("file://"):
        uri = unquote(urlsplit(uri).path)
    return uri.rstrip("/") if "://" in uri else posixpath.abspath(uri)


def _root(source: str, files: Sequence[InputFile]) -> str:
    if [f.uri for f in files[:2]] == [source]:
        root = posixpath.dirname(source)
    else:
        # Of a glob, the part before the first folder with a wildcard.
        root = re.split(r"/[^/]*[*?\[]", source, maxsplit=1)[0]
    return "" if root == "/" else root


def _is_visible(uri: str, root: str, output: str) -> bool:
    # An output inside the input must not become its own input.
    is_output = uri.startswith(output.rstrip("/") + "/")
    return not is_output and "/." not in uri.removeprefix(root)


def _shard_id(stem: str, source_uri: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_")[:80] or "shard"
    return f"{plain}-{hashlib.sha256(source_uri.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def _without_tar_suffix(uri: str) -> str:
    return uri[: len(uri) - len(tar_suffix(uri) or "")]


def _tar_spec(tar: InputFile) -> ShardSpec:
    stem = posixpath.basename(_without_tar_suffix(tar.uri))
    return ShardSpec(
        shard_id=_shard_id(stem, tar.uri),
        source_uri=tar.uri,
        kind="tar",
        plan_key=None,
        source_size_bytes=tar.num_bytes,
        source_etag=tar.etag,
        num_videos=None,
    )


def _refuse_equal_ids(specs: Iterable[ShardSpec]) -> None:
    seen = Names()
    repeated = {spec.shard_id for spec in specs if not seen.add(spec.shard_id)}
    by_id: dict[str, str] = {}
    for spec in specs if repeated else ():
        if spec.shard_id in repeated and by_id.setdefault(spec.shard_id, spec.source_uri) != spec.source_uri:
            raise UsageError(
                f"--input: {by_id[spec.shard_id]} and {spec.source_uri} lead to the same shard id {spec.shard_id}, so "
                "one would be taken for the other; rename one of them"
            )


def _stem(source_uri: str) -> str:
    return posixpath.splitext(posixpath.basename(re.sub(r"/[^/]*[*?\[].*", "", source_uri)))[0]


def _slice_spec(
    source: str, number: int, plan_key: str, num_videos: int, changed: Mapping[str, str] | None = None
) -> ShardSpec:
    source_uri = f"{source}#slice={number}"
    return ShardSpec(
        shard_id=_shard_id(f"{_stem(source)}-{number:05d}", source_uri),
        source_uri=source_uri,
        kind="slice",
        plan_key=plan_key,
        source_size_bytes=None,
        source_etag=None,
        num_videos=num_videos,
        changed=changed or {},
    )


class _SlicePlan(ABC):
    """The rounds of one table, folder or glob: those that stand, and one more for what they do not cover."""

    def __init__(self, source: SourceConfig, store: ObjectStore, source_uri: str) -> None:
        self._source = source
        self._store = store
        self._source_uri = source_uri
        self._folder = f"plans/{_shard_id(_stem(source_uri), source_uri)}"

    @abstractmethod
    def _new_entries(self, rounds: Sequence[Mapping[str, Any]], covered: dict[str, object]) -> Iterator[SliceEntry]:
        """The entries that no round covers, in order; fills `covered`, which the new round keeps for the next call."""

    def _columns(self) -> Mapping[str, str]:
        return {}

    def _changed(self, rounds: Sequence[Mapping[str, Any]]) -> Mapping[int, Mapping[str, str]]:
        """By number of the slice: the files that are not as planned any more, with their version of now."""
        return {}

    def specs(self, write: bool, unwritten: UnwrittenSlices | None = None) -> Iterator[ShardSpec]:
        """The slices of all rounds, a new one included."""
        while True:
            rounds = self._rounds()
            slices = Packed((s["key"], s["num_videos"]) for r in rounds for s in r["slices"])
            covered: dict[str, object] = {}
            new_slices = self._write_slices(self._new_entries(rounds, covered), len(slices), write, unwritten)
            if new_slices and write:
                document = {
                    "version": 1,
                    "source": self._source_uri,
                    "covered": covered,
                    "slices": Packed({"key": key, "num_videos": num_videos} for key, num_videos in new_slices),
                }
                data = _json_bytes(document)
                if create_once(self._store, f"{self._folder}/round-{len(rounds):06d}.json", data) != data:
                    # Another driver's round stands here; ours goes behind it, if anything is left to cut.
                    continue
            changed = self._changed(rounds)
            return (
                _slice_spec(self._source_uri, number, *entry, changed.get(number))
                for number, entry in enumerate(chain(slices, new_slices))
            )

    def _rounds(self) -> list[dict[str, Any]]:
        keys = [info.key for info in self._store.list(f"{self._folder}/round-")]
        rounds = [_read_round(self._store, key) for key in sorted(keys)]
        for key, document in zip(keys, rounds, strict=True):
            if document["source"] != self._source_uri:
                raise UsageError(
                    f"--input: {self._store.url(key)} plans {document['source']}, whose id is the same as that of "
                    f"{self._source_uri}; rename the input, or encode into another output"
                )
        return rounds

    def _write_slices(
        self, entries: Iterator[SliceEntry], first: int, write: bool, unwritten: UnwrittenSlices | None
    ) -> Packed[tuple[str, int]]:
        written = Packed[tuple[str, int]]()
        uploads: deque[Future[bytes]] = deque()
        with ThreadPoolExecutor(_NUM_UPLOADS) as pool:
            for number, batch in enumerate(_batches(entries, self._source.samples_per_shard), first):
                source = f"{self._source_uri}#slice={number}"
                data = Slice(source=source, columns=self._columns(), entries=batch).to_bytes()
                key = f"{self._folder}/{number:06d}-{slice_digest(data)}.json"
                written.append((key, len(batch)))
                if write:
                    uploads.append(pool.submit(create_once, self._store, key, data))
                elif unwritten is not None:
                    unwritten.note(key, data)
                if len(uploads) > 4 * _NUM_UPLOADS:
                    uploads.popleft().result()
            for upload in uploads:
                upload.result()
        return written


def _json_bytes(value: object) -> bytes:
    """Canonical JSON, of packed lists piece by piece: a round names all files of a folder."""
    text = io.BytesIO()
    for piece in _json_pieces(value):
        text.write(piece.encode())
    return text.getvalue()


def _json_pieces(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for number, name in enumerate(sorted(value)):
            yield f"{',' if number else '{'}{_JSON.encode(name)}:"
            yield from _json_pieces(value[name])
        yield "}" if value else "{}"
    elif isinstance(value, Packed):
        for number, item in enumerate(value):
            yield f"{',' if number else '['}{_JSON.encode(item)}"
        yield "]" if value else "[]"
    else:
        yield _JSON.encode(value)


_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def _batches(entries: Iterable[SliceEntry], samples_per_shard: int | None) -> Iterator[list[SliceEntry]]:
    batch: list[SliceEntry] = []
    cost = 0
    for entry in entries:
        entry_cost = _COSTS[MEDIA_KINDS.get(extension_of(entry.uri), "video")]
        is_full = cost + entry_cost > _SLICE_COST if samples_per_shard is None else len(batch) == samples_per_shard
        if batch and is_full:
            yield batch
            batch, cost = [], 0
        batch.append(entry)
        cost += entry_cost
    if batch:
        yield batch


class _FolderPlan(_SlicePlan):
    """Slices of the videos and images of a folder or glob; keys are paths relative to it, without the extension."""

    def __init__(self, source: SourceConfig, store: ObjectStore, found: _Found) -> None:
        super().__init__(source, store, found.source)
        self._found = found

    def _changed(self, rounds: Sequence[Mapping[str, Any]]) -> Mapping[int, Mapping[str, str]]:
        media = _ByUri(self._found.media)
        changed: dict[int, dict[str, str]] = defaultdict(dict)
        first = 0
        for r in rounds:
            # Entries were cut into slices in the order in which the round names them.
            numbers = (n for n, cut in enumerate(r["slices"], first) for _ in range(cut["num_videos"]))
            first += len(r["slices"])
            planned = r["covered"].get("versions", [])
            for number, path, version in zip(numbers, r["covered"]["files"], planned, strict=False):
                # A file that is gone has not changed: people clear their inputs behind a run.
                file = media.get(f"{self._found.root}/{path}")
                if file is not None and (now := self._version(file)) != version:
                    changed[number][file.uri] = now
        return changed

    def _version(self, media: InputFile) -> str:
        return version_of(media, *(self._beside(media, extension) for extension in ("txt", "json")))

    def _beside(self, media: InputFile, extension: str) -> InputFile | None:
        return self._found.sidecars.get(f"{posixpath.splitext(media.uri)[0]}.{extension}")

    def _path(self, file: InputFile) -> str:
        return file.uri.removeprefix(f"{self._found.root}/")

    def _new_entries(self, rounds: Sequence[Mapping[str, Any]], covered: dict[str, object]) -> Iterator[SliceEntry]:
        known = Names(path for r in rounds for path in r["covered"]["files"])
        new_paths, versions = Packed[str](), Packed[str]()
        covered["files"], covered["versions"] = new_paths, versions
        # Files that share a stem are told apart by their extensions; a.mp4.webm must not take the key of a.mp4 then.
        taken = Names(self._path(file) for _, files in self._samples() if len(files) > 1 for file in files)
        for stem, files in self._samples():
            for file in files:
                path = self._path(file)
                if path not in known:
                    version = self._version(file)
                    new_paths.append(path)
                    versions.append(version)
                    yield self._entry(file, stem if len(files) == 1 and stem not in taken else path, version)

    def _samples(self) -> Iterator[tuple[str, list[InputFile]]]:
        """The files of each stem, in the order of the first of them; a stem is a path without its extension."""
        waiting: dict[str, list[InputFile]] = {}
        for file in self._found.media:
            path = self._path(file)
            # Files that begin alike stand together, so that no further one of the stem comes from here on.
            while waiting and not path.startswith(f"{(first := next(iter(waiting)))}."):
                yield first, _without_posters(waiting.pop(first))
            waiting.setdefault(posixpath.splitext(path)[0], []).append(file)
        for stem, files in waiting.items():
            yield stem, _without_posters(files)

    def _entry(self, file: InputFile, key: str, version: str) -> SliceEntry:
        problem = key_problem(key)
        text, metadata = self._beside(file, "txt"), self._beside(file, "json")
        return SliceEntry(
            key=key,
            uri=file.uri,
            txt_uri=None if text is None else text.uri,
            json_uri=None if metadata is None else metadata.uri,
            problem=("bad_member", f"the name {self._path(file)!r} is not allowed: {problem}") if problem else None,
            version=version,
        )


def _without_posters(files: list[InputFile]) -> list[InputFile]:
    # A picture beside a video of the same name is its poster.
    videos = [file for file in files if MEDIA_KINDS[extension_of(file.uri)] == "video"]
    return videos or files


class _TablePlan(_SlicePlan):
    """Slices of the rows of a table, in their order; keys are those of its column `key`, or the row numbers."""

    def __init__(self, source: SourceConfig, store: ObjectStore, table: InputFile) -> None:
        super().__init__(source, store, table.uri)
        self._table = table
        self._types: Mapping[str, str] = {}

    def _columns(self) -> Mapping[str, str]:
        return self._types

    def _new_entries(self, rounds: Sequence[Mapping[str, Any]], covered: dict[str, object]) -> Iterator[SliceEntry]:
        last: Mapping[str, Any] = rounds[-1]["covered"] if rounds else {"num_rows": 0}
        if rounds and last["uri_column"] != self._source.uri_column:
            raise UsageError(
                f"--uri-column: {self._table.uri} is planned in this output with the column {last['uri_column']!r}, "
                f"not {self._source.uri_column!r}; use the same, or another output"
            )
        stands = (self._table.num_bytes, self._table.etag)
        # On a local disk two changes may be too close in time to be told apart; elsewhere an etag says all.
        if rounds and self._table.etag and "://" in self._table.uri and stands == (last["num_bytes"], last["etag"]):
            return
        digest = hashlib.sha256()
        num_rows, first_problem, num_usable = 0, "", 0
        for entry in self._entries():
            if num_rows == last["num_rows"]:
                self._refuse_changed(digest, last)
            digest.update(json.dumps([entry.key, entry.uri, dict(entry.fields)], sort_keys=True).encode())
            num_rows += 1
            num_usable += entry.problem is None
            first_problem = first_problem or (entry.problem or ("", ""))[1]
            if num_rows > last["num_rows"]:
                yield entry
        if num_rows <= last["num_rows"]:
            self._refuse_changed(digest, last)
        if num_rows and not num_usable:
            raise UsageError(f"--input: no row of {self._table.uri} can be used; the first one: {first_problem}")
        covered["uri_column"] = self._source.uri_column
        covered["num_bytes"], covered["etag"] = stands
        covered["num_rows"], covered["rows_sha256"] = num_rows, digest.hexdigest()

    def _refuse_changed(self, digest: hashlib._Hash, last: Mapping[str, Any]) -> None:
        if last["num_rows"] and digest.hexdigest() != last["rows_sha256"]:
            raise UsageError(
                f"--input: the first {last['num_rows']} rows of {self._table.uri} are planned in this output and are "
                "not the same any more; rows may be added at the end only, so restore them, give the new rows as a "
                "table of their own, or use another output"
            )

    def _entries(self) -> Iterator[SliceEntry]:
        with closing(open_input(self._table.uri)) as file:
            for number, row in enumerate(self._rows(file)):
                yield self._entry(number, row)

    def _rows(self, file: BinaryIO) -> Iterator[dict[str, object] | str]:
        """Each row as JSON-safe values by column, or what is wrong with it."""
        extension = extension_of(self._table.uri)
        if extension in ("jsonl", "ndjson"):
            yield from _json_rows(file)
            return
        try:
            if extension == "csv":
                # Of bytes, because a single cell that is no UTF-8 would end the reading of text.
                names = pyarrow.csv.open_csv(file, *_csv_options()).schema.names
                file.seek(0)
                binary = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.binary()))
                marked = pa.PythonFile(_WithLastRow(file, len(names)), mode="r")
                reader = pyarrow.csv.open_csv(marked, *_csv_options(), binary)
                schema = self._named([pa.field(name, pa.string()) for name in names])
                yield from self._closed_rows(self._arrow_rows(schema, reader))
            else:
                table = pq.ParquetFile(file)
                schema = self._named([f for f in table.schema_arrow if not _is_binary(f.type)])
                yield from self._arrow_rows(schema, table.iter_batches(batch_size=1024, columns=schema.names))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UsageError(f"--input: {self._table.uri} cannot be read as {extension}: {error}") from error

    def _arrow_rows(self, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[dict[str, object]]:
        if self._source.uri_column not in schema.names:
            raise UsageError(
                f"--uri-column: {self._table.uri} has no column {self._source.uri_column!r}; it has "
                f"{', '.join(schema.names)}"
            )
        self._types = {f.name: _kind_of_type(f.type) for f in schema}
        for batch in batches:
            columns = [self._values(batch, name) for name in schema.names]
            for values in zip(*columns, strict=True):
                yield dict(zip(schema.names, values, strict=True))

    def _named(self, fields: Sequence[pa.Field]) -> pa.Schema:
        """The columns that have a name: spreadsheets leave empty ones at the end."""
        names = [f.name for f in fields if f.name]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise UsageError(
                f"--input: {self._table.uri} has more than one column {_short(repeated)}, and nothing says which one "
                "is meant; rename or remove one"
            )
        return pa.schema([f for f in fields if f.name])

    def _values(self, batch: pa.RecordBatch, name: str) -> list[object]:
        column = batch.column(name)
        try:
            return _json_values(column)
        except (pa.ArrowException, ArithmeticError, TypeError, ValueError) as error:
            raise UsageError(
                f"--input: {self._table.uri}: the column {_short(name)} of type {column.type} has a value that cannot "
                f"be read: {error}; correct or remove it"
            ) from error

    def _closed_rows(self, rows: Iterator[dict[str, object]]) -> Iterator[dict[str, object]]:
        """The rows before the one that `_WithLastRow` adds. In a cell that is left open it comes as text of that."""
        row = next(rows, None)
        for following in rows:
            assert row is not None, "a row is followed"
            yield row
            row = following
        if row is None or any(value != _WithLastRow.CELL for value in row.values()):
            raise UsageError(
                f"--input: {self._table.uri}: a quote is not closed, so all rows behind it are taken for one cell; "
                "close it, or double a quote that is meant as a character"
            )

    def _entry(self, number: int, row: dict[str, object] | str) -> SliceEntry:
        key = f"{number:08d}"
        if isinstance(row, str):
            return SliceEntry(key=key, uri="", problem=("bad_metadata", f"row {number}: {row}"))
        given = row.pop("key", None)
        key = key if given is None or given == "" else str(given)
        address = row.get(self._source.uri_column)
        uri, problem = _address(address, self._table.uri)
        if isinstance(address, str):
            row[self._source.uri_column] = recorded_uri(address)
        wrong_key = key_problem(key)
        if wrong_key:
            problem = "bad_member", f"the key {_short(key)} is not allowed: {wrong_key}"
        elif problem:
            problem = problem[0], f"row {number}, column {self._source.uri_column!r}: {problem[1]}"
        return SliceEntry(key=key, uri=uri, fields=row, problem=problem)


class _WithLastRow(io.RawIOBase):
    """A CSV file with one row more, by which a reader is seen to have taken its end for the end of a row."""

    CELL = "latentmill-end-of-table"

    def __init__(self, file: BinaryIO, num_columns: int) -> None:
        self._file = file
        self._rest = b"\n" + b",".join([self.CELL.encode()] * num_columns) + b"\n"

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        block = self._file.read(size)
        if not block:
            block, self._rest = self._rest[:size], self._rest[size:]
        return block


def _json_rows(file: BinaryIO) -> Iterator[dict[str, object] | str]:
    for line in file:
        if not line.strip():
            continue
        try:
            row = parse_object(line)
        except RejectionError as error:
            yield error.message
        else:
            yield row


def _csv_options() -> tuple[pyarrow.csv.ReadOptions, pyarrow.csv.ParseOptions]:
    options = pyarrow.csv.ReadOptions(block_size=_CSV_BLOCK_BYTES, use_threads=False)
    return options, pyarrow.csv.ParseOptions(newlines_in_values=True)


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _kind_of_type(kind: pa.DataType) -> str:
    types = pa.types
    if types.is_dictionary(kind):
        return _kind_of_type(kind.value_type)
    if types.is_boolean(kind):
        return "bool"
    if types.is_integer(kind):
        return "int64"
    if types.is_floating(kind):
        return "float64"
    return "string" if _is_text(kind) or types.is_temporal(kind) or types.is_decimal(kind) else ""


def _json_values(column: pa.Array) -> list[object]:
    """The values of a column as JSON has them; bytes that are no UTF-8 become lone surrogates, which JSON can carry."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _json_values(column.dictionary_decode())
    if _is_text(kind) or pa.types.is_binary(kind):
        texts = column.cast(pa.large_binary()).to_pylist()
        return [None if text is None else text.decode("utf-8", "surrogateescape") for text in texts]
    if pa.types.is_floating(kind):
        return list(column.cast(pa.float64()).to_pylist())
    if _kind_of_type(kind) == "string":
        return list(column.cast(pa.string()).to_pylist())
    values = column.to_pylist()
    return values if _kind_of_type(kind) else [json.loads(json.dumps(value, default=str)) for value in values]


def _address(value: object, table: str) -> tuple[str, tuple[str, str] | None]:
    """The place that a cell of a table names, or ("", the rejection that it deserves).

    A table on a disk may name files there. One from elsewhere may not: it has no business with this machine's files.
    """
    if not isinstance(value, str) or not value.strip():
        return "", ("not_found", f"the cell holds {_short(value)} and names no file")
    scheme = re.match(r"([A-Za-z][\w+.-]*):(?://|:)", value)
    is_local_table = "://" not in table
    if scheme is None and not value.startswith("/"):
        table_scheme, _, table_path = table.rpartition("://")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(table_path), value))
        uri = path if is_local_table else f"{table_scheme}://{path}"
    elif scheme is None or scheme[1].lower() == "file":
        path = value if scheme is None else "/" + unquote(value[len("file://") :]).partition("/")[2]
        uri = posixpath.normpath("/" + path.lstrip("/"))
        if not is_local_table:
            return "", ("not_allowed", f"{_short(value)} is a local file, which only a local table may name")
    else:
        uri = value
        is_web = scheme[1] in _WEB_SCHEMES and web_is_allowed()
        if not (is_web or scheme[1] in _REMOTE_SCHEMES) or "::" in value:
            allowed = ", ".join(_REMOTE_SCHEMES)
            return "", (
                "not_allowed",
                f"{scheme[1]}: addresses are not read, only local files and {allowed}; fetch it first, for example "
                f"with img2dataset or video2dataset{', or pass --allow-http' * (scheme[1] in _WEB_SCHEMES)}",
            )
    if _is_plain(uri):
        return uri, None
    # Not shown, because it may hold a password.
    form = "scheme://bucket/path" if "://" in uri else "path"
    return "", ("not_allowed", f"the cell is not the plain {form} of a file")


def _is_plain(uri: str) -> bool:
    """That the stores will take an address as it stands, so that one row cannot stop its whole shard."""
    _, separator, path = uri.rpartition("://")
    parts = path.split("/")
    if separator and (not uri.isprintable() or len(parts) < 2 or any(p in ("", ".", "..") for p in parts)):
        return False
    if separator and re.search(r"@" if uri.startswith("http") else r"[@:]", parts[0]):
        return False
    if separator and len(path.partition("/")[2].encode()) > _LONGEST_KEY_BYTES:
        return False
    try:
        return "\0" not in path and len(os.fsencode(path)) < 4096 and all(len(os.fsencode(p)) < 256 for p in parts)
    except UnicodeEncodeError:
        return False


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _fields_in_tar(spec: ShardSpec) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    with closing(open_input(spec.source_uri)) as file:
        tar = TarStream(spec.source_uri, file, spec.source_size_bytes)
        try:
            for member in tar:
                if member.kind == "file" and extension_of(member.name) == "json":
                    found += _objects(tar.read(_LONGEST_JSON_BYTES))
                if len(found) == _LOOK_SAMPLES or tar.num_bytes_read > _LOOK_BYTES:
                    break
        except RejectionError:
            # A damaged tar has told what it could; its shard is rejected when it is encoded.
            return found
    return found


def _fields_in_slice(planned: Slice) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for entry in planned.entries[:_LOOK_SAMPLES]:
        found.append(dict(entry.fields))
        if entry.json_uri is not None:
            try:
                with closing(open_input(entry.json_uri)) as file:
                    found += _objects(file.read(_LONGEST_JSON_BYTES))
            except (StorageNotFoundError, StorageDeniedError):
                # Its entry is rejected when it is encoded.
                continue
    return found


def _objects(data: bytes) -> list[dict[str, object]]:
    try:
        return [parse_object(data)]
    except RejectionError:
        return []


def _kinds_of(samples: Iterable[Mapping[str, object]]) -> dict[str, str]:
    kinds: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        for name, value in sample.items():
            if value is not None:
                kinds[name].add(_kind_of_value(value))
    return {name: seen.pop() if len(seen) == 1 else _NUMBERS.get(frozenset(seen), "") for name, seen in kinds.items()}


_NUMBERS = {frozenset(("int64", "float64")): "float64"}


def _kind_of_value(value: object) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -(2**63) <= value < 2**63 else ""
    if isinstance(value, float):
        return "float64"
    return "string" if isinstance(value, str) else ""
