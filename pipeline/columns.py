"""Column sets: embeddings of captions and of first frames beside the latents, as an output of their own.

Not where anything is embedded (`text`) or chosen (`dataset`): here is what such a set holds, how its shards become
done, and how one embedding is found again. `actors` and `jobs/encode_text.py` write, `dataset` and exports read.

    OUTPUT/columns/text/     caption embeddings: one row for each distinct caption of a shard, and always one for ""
    OUTPUT/columns/image/    first-frame embeddings: one row for each clip

Each is laid out, committed, published and collected exactly like the output itself (`commit`); its `_dataset.json`
describes the encoder. One record of the set speaks of one data file of the output, its *base file*: `source_uri` is
that file's key, `source_size_bytes` its size and `source_etag` its SHA-256. So a set belongs to what the output holds,
byte for byte: of two attempts that saw different inputs each has its own record, whichever of them the output keeps.
Records of one shard are numbered as generations, as they come; all of them count. An actor commits the set's record
before the output's, so that a shard that is done has its embeddings; a set that is added later follows.

A row holds `embedding` (little-endian, C order), `embedding_shape` and `embedding_dtype` (float16 or float32). Of a
text it is the last hidden state of its tokens, `(L, D)`, trimmed to their true number L, special tokens included;
`is_truncated` says that the caption had more tokens than the encoder takes. Of a first frame it is `(D,)`.

Columns format history: 1 is the first.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

import pipeline
from pipeline.commit import (
    MANIFEST_KEY,
    commit_shard,
    committed_ids,
    create_once,
    fetch_data_file,
    fingerprint_of,
    latest_snapshot_number,
    load_commits,
    name_of,
    parse_record_name,
    put_data_file,
    read_shard,
    refuse_differences,
    snapshot_commits,
)
from pipeline.committed import DataFile, FileCache, parquet_columns
from pipeline.errors import ConfigMismatchError, DamagedObjectError, UsageError
from pipeline.format import Column, Content, decode_latent, encode_latent, schema
from pipeline.records import Commit, DatasetManifest, FileStat, ShardCounts
from pipeline.scratch import Scratch
from pipeline.storage import ObjectStore, open_store, sha256_of_file
from pipeline.stored import open_records

COLUMNS_VERSION = 1
SetName = Literal["text", "image"]
SET_NAMES: tuple[SetName, ...] = ("text", "image")

_INT_LIST = pa.list_(pa.field("element", pa.int32(), nullable=False))
_STRING_LIST = pa.list_(pa.field("element", pa.string(), nullable=False))
_EMBEDDING = (
    Column("embedding", pa.binary(), False, "little-endian, C order"),
    Column("embedding_shape", _INT_LIST, False, "text: (tokens, D); image: (D,)"),
    Column("embedding_dtype", pa.string(), False, "float16 or float32"),
)
SET_COLUMNS: Mapping[SetName, tuple[Column, ...]] = {
    "text": (
        Column("caption", pa.string(), False, "the text, to the letter; once in a file"),
        Column("keys", _STRING_LIST, False, "keys of the videos of the base file that have it"),
        *_EMBEDDING,
        Column("is_truncated", pa.bool_(), False, "whether the caption has more tokens than were embedded"),
    ),
    "image": (
        Column("key", pa.string(), False, "key of the source video, unique in the shard"),
        Column("clip_index", pa.int32(), False, "number of the clip in its video, from 0"),
        *_EMBEDDING,
    ),
}
# One embedding is read at a time and in any order, and float16 hardly compresses: small groups, no codec.
_GROUP_BYTES = 1 << 20
# Of a reader, for one process.
_OPEN_SHARDS = 256
_KEPT_BYTES = 64 << 20
_HOW_TO_ADD: Mapping[str, str] = {
    "text": "add them: python jobs/encode_text.py --latents {uri} --text-encoder FOLDER_OR_HUB_ID",
    "image": "first frames are embedded in the same pass as the latents: encode with --image-encoder",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnsManifest:
    """The create-once description of a column set, its `_dataset.json`; also every file's schema metadata.

    Attributes:
        format_version: of this module.
        fingerprint: sha256 hex of the canonical JSON of `fingerprint_fields`.
        fingerprint_fields: everything that changes bytes.
        encoder: the folder or hub id that was asked for.
        revision: commit of the hub repository, None for a folder.
        weights_sha256: hex, of the encoder's weights.
        embedding_dim: D.
        embedding_dtype: as stored.
        max_length: the most tokens of a text; 1 in a set of images.
    """

    name: SetName
    format_version: int
    fingerprint: str
    fingerprint_fields: Mapping[str, object]
    encoder: str
    revision: str | None
    weights_sha256: str
    embedding_dim: int
    embedding_dtype: Literal["float16", "float32"]
    max_length: int


def new_manifest(
    name: SetName,
    fingerprint_fields: Mapping[str, object],
    *,
    encoder: str,
    revision: str | None,
    weights_sha256: str,
    embedding_dim: int,
    embedding_dtype: Literal["float16", "float32"],
    max_length: int,
) -> ColumnsManifest:
    """The description of a set; the fingerprint follows from the fields, to which what is stated here is added."""
    decided = {
        **fingerprint_fields,
        "set": name,
        "weights_sha256": weights_sha256,
        "embedding_dim": embedding_dim,
        "embedding_dtype": embedding_dtype,
        "max_length": max_length,
        "columns_version": COLUMNS_VERSION,
    }
    return ColumnsManifest(
        name=name,
        format_version=COLUMNS_VERSION,
        fingerprint=fingerprint_of(decided),
        fingerprint_fields=decided,
        encoder=encoder,
        revision=revision,
        weights_sha256=weights_sha256,
        embedding_dim=embedding_dim,
        embedding_dtype=embedding_dtype,
        max_length=max_length,
    )


def columns_store(output: ObjectStore, name: str) -> ObjectStore:
    """The store of a set of an output, whether or not there is one yet."""
    return open_store(f"{output.root_uri.rstrip('/')}/columns/{name}")


def base_of(store: ObjectStore) -> ObjectStore | None:
    """The store of the output that a set belongs to, by its place; None where it is no place of a set."""
    root, _, name = store.root_uri.rstrip("/").rpartition("/columns/")
    return open_store(root) if root and name in SET_NAMES else None


def sets_of(output: ObjectStore) -> dict[str, ObjectStore]:
    """The sets that an output has, by name: their stores."""
    stores = {name: columns_store(output, name) for name in SET_NAMES} if base_of(output) is None else {}
    return {name: store for name, store in stores.items() if store.head(MANIFEST_KEY) is not None}


def open_columns(store: ObjectStore, manifest: ColumnsManifest) -> ColumnsManifest:
    """The description of the set, created from `manifest` if there is none yet.

    Raises:
        ConfigMismatchError: the set was made with another encoder or configuration; the error lists each difference.
    """
    data = (json.dumps(asdict(manifest), sort_keys=True, allow_nan=False) + "\n").encode()
    standing = _manifest_of(store, create_once(store, MANIFEST_KEY, data))
    if standing.fingerprint != manifest.fingerprint:
        refuse_differences(store, standing.fingerprint_fields, manifest.fingerprint_fields)
        raise ConfigMismatchError(f"{store.root_uri} states a fingerprint that is not that of its configuration", {})
    return standing


def columns_manifest_of(store: ObjectStore) -> ColumnsManifest:
    """The description of the set that lies here and must be there.

    Raises:
        UsageError: there is none.
        DamagedObjectError: it cannot be read.
    """
    manifest = read_columns_manifest(store)
    if manifest is None:
        raise UsageError(f"{store.root_uri} holds no column set: there is no {MANIFEST_KEY} in it")
    return manifest


def read_columns_manifest(store: ObjectStore) -> ColumnsManifest | None:
    """The description of the set that lies here, or None where none does.

    Raises:
        DamagedObjectError: it cannot be read.
    """
    data = store.find(MANIFEST_KEY)
    return None if data is None else _manifest_of(store, data)


def _manifest_of(store: ObjectStore, data: bytes) -> ColumnsManifest:
    try:
        value = json.loads(data)
        return ColumnsManifest(**{field.name: value[field.name] for field in fields(ColumnsManifest)})
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedObjectError(
            f"{store.url(MANIFEST_KEY)} is no description of a column set: {error!r:.200}"
        ) from error


def columns_schema(manifest: ColumnsManifest) -> pa.Schema:
    """The Arrow schema of the Parquet files of a set, schema metadata included."""
    facts = {
        "columns_version": str(COLUMNS_VERSION),
        "set": manifest.name,
        "encoder": manifest.encoder,
        "revision": manifest.revision or "",
        "weights_sha256": manifest.weights_sha256,
        "embedding_dtype": manifest.embedding_dtype,
        "max_length": str(manifest.max_length),
        "fingerprint": manifest.fingerprint,
    }
    return pa.schema(
        [pa.field(c.name, c.type, nullable=c.nullable) for c in SET_COLUMNS[manifest.name]], metadata=facts
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEmbedding:
    """What an encoder gives for a text: `(L, D)` of the stored dtype, finite, and whether the text was cut."""

    embedding: npt.NDArray[np.floating]
    is_truncated: bool


def write_text_file(
    path: Path,
    manifest: ColumnsManifest,
    captions: Mapping[str, Sequence[str]],
    embeddings: Iterable[TextEmbedding],
) -> int:
    """Writes the rows of a base file's captions; memory stays near one row group.

    Args:
        captions: caption -> keys that have it, in the order of the rows, as `captions_of` gives them.
        embeddings: one for each caption, in the same order.

    Returns:
        the number of rows.
    """
    rows = (
        {"caption": caption, "keys": list(keys), "is_truncated": found.is_truncated} | _stored(found.embedding)
        for (caption, keys), found in zip(captions.items(), embeddings, strict=True)
    )
    return _write(path, manifest, rows)


def write_image_file(
    path: Path, manifest: ColumnsManifest, embeddings: Mapping[tuple[str, int], npt.NDArray[np.floating]]
) -> int:
    """Writes a row for each (key, clip index); returns their number."""
    rows = (
        {"key": key, "clip_index": clip_index} | _stored(embedding)
        for (key, clip_index), embedding in embeddings.items()
    )
    return _write(path, manifest, rows)


def _stored(embedding: npt.NDArray[np.floating]) -> dict[str, Any]:
    dtype = embedding.dtype.name
    return {
        "embedding": encode_latent(embedding, dtype),
        "embedding_shape": list(embedding.shape),
        "embedding_dtype": dtype,
    }


def _write(path: Path, manifest: ColumnsManifest, rows: Iterable[Mapping[str, Any]]) -> int:
    arrow = columns_schema(manifest)
    num_rows = num_bytes = 0
    group: list[Mapping[str, Any]] = []
    with pq.ParquetWriter(
        path,
        arrow,
        version="2.6",
        compression="NONE",
        use_dictionary=["embedding_dtype"],
        write_statistics=False,
        write_page_checksum=True,
    ) as writer:
        for row in rows:
            assert row["embedding_dtype"] == manifest.embedding_dtype, f"the row is {row['embedding_dtype']}"
            assert row["embedding_shape"][-1] == manifest.embedding_dim, f"the row has shape {row['embedding_shape']}"
            group.append(row)
            num_rows += 1
            num_bytes += len(row["embedding"])
            if num_bytes >= _GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(group, schema=arrow))
                group, num_bytes = [], 0
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema=arrow))
    return num_rows


def base_file(files: Sequence[FileStat]) -> FileStat | None:
    """The one of a record's files that a set speaks of: Parquet, else the tar; None where it has no samples."""
    by_content = {stat.content: stat for stat in files}
    return by_content.get("parquet") or by_content.get("webdataset")


def refuse_unknown_columns(manifest: DatasetManifest, columns: Sequence[str], uri: str) -> None:
    """Checks that an output has these columns of text.

    Raises:
        UsageError: one is missing or holds no text.
    """
    known = [field.name for field in schema(manifest) if pa.types.is_string(field.type)]
    unknown = [name for name in columns if name not in known]
    if unknown:
        raise UsageError(
            f"--text-columns: {uri} has no column of text {', '.join(map(repr, unknown))}; it has {', '.join(known)}"
        )


def captions_of(path: Path, content: Content, num_rows: int, columns: Sequence[str]) -> dict[str, list[str]]:
    """The distinct texts of some columns of a local base file, each with the keys that have it: sorted, "" among them.

    Raises:
        DamagedObjectError: the file cannot be read, or has another number of rows.
    """
    return _captions(open_records(path, content).read_columns(("key", *columns)), num_rows, str(path))


def stored_captions_of(store: ObjectStore, stat: FileStat, columns: Sequence[str]) -> dict[str, list[str]]:
    """As `captions_of`, of a stored base file. Of Parquet only these columns are fetched, checked by page checksums.

    Raises:
        DamagedObjectError: the file cannot be read, or has another number of rows than its record states.
        StorageNotFoundError: it is gone.
    """
    names = ("key", *columns)
    if stat.content == "parquet":
        rows = parquet_columns(stat, store, names)
    else:
        with Scratch("columns") as folder:
            path = folder / "base.tar"
            fetch_data_file(store, stat, path)
            rows = open_records(path, stat.content).read_columns(names)
    return _captions(rows, stat.num_rows, store.url(stat.key))


def _captions(rows: Sequence[tuple[Any, ...]], num_rows: int, where: str) -> dict[str, list[str]]:
    if len(rows) != num_rows:
        raise DamagedObjectError(f"{where} has {len(rows)} rows, its record states {num_rows}")
    found: dict[str, dict[str, None]] = {"": {}}
    for key, *texts in rows:
        for text in texts:
            if text is not None:
                found.setdefault(text, {})[key] = None
    return {text: list(found[text]) for text in sorted(found)}


def records_of(store: ObjectStore, shard_id: str) -> tuple[Commit, ...]:
    """The records that a set has of a shard, in the order in which they came."""
    shard = read_shard(store, shard_id)
    return () if shard is None else shard.commits


def speaks_of(record: Commit, base: FileStat) -> bool:
    """Whether a record of a set is about this base file."""
    return record.source_etag == base.sha256


def commit_columns(
    store: ObjectStore, manifest: ColumnsManifest, shard_id: str, base: FileStat, path: Path, num_rows: int
) -> tuple[Commit, bool]:
    """Stores the rows of a base file and makes them count, once, however many try.

    Args:
        store: of the set.
        path: the finished local file.

    Returns:
        the record that stands, and whether it stood before; where that one names these very bytes, they were stored
        under its name again, in case they were damaged.

    Raises:
        StorageError: the store failed; trying again is safe.
    """
    while True:
        before = records_of(store, shard_id)
        standing = next((record for record in before if speaks_of(record, base)), None)
        generation = len(before) if standing is None else standing.generation
        if standing is not None and standing.files[0].sha256 != sha256_of_file(path):
            return standing, True
        stat = put_data_file(
            store, path, shard_id=shard_id, content="parquet", num_rows=num_rows, generation=generation
        )
        if standing is not None:
            return standing, True
        record = Commit(
            shard_id=shard_id,
            generation=generation,
            nonce=uuid.uuid4().hex,
            fingerprint=manifest.fingerprint,
            source_uri=base.key,
            source_size_bytes=base.num_bytes,
            source_etag=base.sha256,
            files=(stat,),
            counts=_counts(num_rows),
            format_version=manifest.format_version,
            code_version=pipeline.__version__,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            shard_counts=_counts(num_rows + sum(c.counts.num_records for c in before)) if before else None,
        )
        if commit_shard(store, record) == "committed":
            return record, False


def _counts(num_rows: int) -> ShardCounts:
    # The accounts of a set: a row is a sample, and nothing is ever rejected.
    return ShardCounts(
        num_videos=num_rows,
        num_videos_ok=num_rows,
        num_videos_rejected=0,
        num_clips=num_rows,
        num_records=num_rows,
        num_clips_rejected=0,
        num_frames=0,
    )


class ColumnSet:
    """Embeddings of a set, found by shard and caption or clip; safe in threads, picklable, safe to fork.

    Nothing but the description is read before the first question. Of a shard its records are read when it is first
    asked for or prepared (two small requests) and its file is checked against them.

    Attributes:
        embedding_dim: D.
        dtype: of the arrays that come back.
        encoder: the folder or hub id of the encoder.
        max_length: the most tokens of a text.
    """

    def __init__(self, output: ObjectStore, store: ObjectStore, manifest: ColumnsManifest, cache: FileCache) -> None:
        self.manifest = manifest
        self.embedding_dim = manifest.embedding_dim
        self.dtype: np.dtype[Any] = np.dtype(manifest.embedding_dtype)
        self.encoder = manifest.encoder
        self.max_length = manifest.max_length
        self._output = output
        self._store = store
        self._cache = cache
        self._forget()

    @classmethod
    def open(cls, output: ObjectStore, name: str, cache: FileCache) -> ColumnSet:
        """The set of an output.

        Args:
            output: the store of the output itself.
            name: "text" or "image".
            cache: where files of a remote store are kept.

        Raises:
            UsageError: the output has no such set; the message says what to run.
            DamagedObjectError: its description cannot be read.
        """
        if name not in SET_NAMES:
            raise UsageError(f"there is no column set {name!r}; known are {', '.join(SET_NAMES)}")
        store = columns_store(output, name)
        manifest = read_columns_manifest(store)
        if manifest is None:
            what = "caption embeddings" if name == "text" else "embeddings of first frames"
            raise UsageError(f"{output.root_uri} has no {what}; {_HOW_TO_ADD[name].format(uri=output.root_uri)}")
        return cls(output, store, manifest, cache)

    def refuse_gaps(self, files: Iterable[DataFile]) -> None:
        """Checks that the set speaks of each of these files of the output.

        Raises:
            UsageError: it does not; the message says what to run.
        """
        missing = {file.stat.sha256: file.shard_id for file in files}
        number = latest_snapshot_number(self._store)
        if number is not None:
            for record in snapshot_commits(self._store, number):
                missing.pop(record.source_etag or "", None)
        if missing:
            # What is committed and not yet published counts as well.
            shards = set(missing.values())
            names = [name for name in committed_ids(self._store) if parse_record_name(name)[0] in shards]
            for record in load_commits(self._store, names):
                missing.pop(record.source_etag or "", None)
        if missing:
            raise UsageError(
                f"{self._store.root_uri} does not cover {len(missing)} files of {self._output.root_uri}, such as that "
                f"of shard {min(missing.values())}; {self._hint()}"
            )

    def prepare(self, shard_id: str) -> None:
        """Opens a shard, so that the first question about it does not wait; raises as `caption` does."""
        with self._lock:
            if shard_id in self._shards:
                return
        shard = self._opened(shard_id)
        with self._lock:
            self._keep(shard_id, shard)

    def own(self) -> None:
        """Forgets what another process had open: a forked worker inherits it. Call it before threads use the set."""
        if self._pid != os.getpid():
            self._forget()

    def caption(self, shard_id: str, caption: str) -> npt.NDArray[np.floating]:
        """The embedding `(L, D)` of a caption of a shard, read-only; "" is the empty caption, which every shard has.

        Raises:
            UsageError: the set does not cover the shard, or does not hold this text of it.
            DamagedObjectError: a file of the set is not what its record states.
        """
        return self._find(shard_id, caption, f"the caption {caption[:80]!r}")

    def image(self, shard_id: str, key: str, clip_index: int) -> npt.NDArray[np.floating]:
        """The embedding `(D,)` of the first frame of a clip, read-only.

        Raises:
            UsageError: the set does not cover the shard, or does not hold this clip of it.
            DamagedObjectError: a file of the set is not what its record states.
        """
        return self._find(shard_id, (key, clip_index), f"clip {clip_index} of {key!r}")

    def _find(self, shard_id: str, name: str | tuple[str, int], what: str) -> npt.NDArray[np.floating]:
        self.own()
        with self._lock:
            shard = self._shards.get(shard_id)
            if shard is None or name not in shard.places:
                # What is committed after a shard was opened is found as well: readers may follow newer snapshots.
                shard = self._opened(shard_id)
                self._keep(shard_id, shard)
            self._shards.move_to_end(shard_id)
            if name not in shard.places:
                covered = (
                    f"it holds {len(shard.places)} rows of it" if shard.files else "it holds nothing of this shard"
                )
                raise UsageError(
                    f"{self._store.root_uri}: shard {shard_id}: {what} has no embedding: {covered}; {self._hint()}"
                )
            file, group, index = shard.places[name]
            return self._group(shard_id, shard.files[file], file, group)[index]

    def _hint(self) -> str:
        return _HOW_TO_ADD[self.manifest.name].format(uri=self._output.root_uri)

    def _keep(self, shard_id: str, shard: _OpenShard) -> None:
        for known in [known for known in self._groups if known[0] == shard_id]:
            self._num_kept_bytes -= sum(row.nbytes for row in self._groups.pop(known))
        self._shards[shard_id] = shard
        while len(self._shards) > _OPEN_SHARDS:
            self._shards.popitem(last=False)

    def _opened(self, shard_id: str) -> _OpenShard:
        records = records_of(self._store, shard_id)
        if self.manifest.name == "image" and len(records) > 1:
            records = self._of_the_output(shard_id, records)
        files: list[pq.ParquetFile] = []
        places: dict[Any, tuple[int, int, int]] = {}
        for record in records:
            file, found = self._rows(record)
            for name, (group, index) in found.items():
                places.setdefault(name, (len(files), group, index))
            files.append(file)
        return _OpenShard(files, places)

    def _of_the_output(self, shard_id: str, records: Sequence[Commit]) -> tuple[Commit, ...]:
        """The records about files that count in the output, in the order of the generations there.

        A repaired clip, or one of an attempt that came to nothing, is there twice and may have other pixels.
        """
        shard = read_shard(self._output, shard_id)
        bases = [base for commit in (shard.commits if shard else ()) if (base := base_file(commit.files)) is not None]
        return tuple(record for base in bases for record in records if speaks_of(record, base))

    def _rows(self, record: Commit) -> tuple[pq.ParquetFile, dict[Any, tuple[int, int]]]:
        (stat,) = record.files
        where = self._store.url(stat.key)
        buffer = self._cache.checked_bytes(self._store, stat)
        try:
            file = pq.ParquetFile(pa.BufferReader(buffer))
            columns = ["caption"] if self.manifest.name == "text" else ["key", "clip_index"]
            table = file.read(columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise DamagedObjectError(f"{where} is no file of a column set: {error}") from error
        names: list[Any] = table.column(0).to_pylist()
        if self.manifest.name == "image":
            names = list(zip(names, table.column(1).to_pylist(), strict=True))
        if len(names) != stat.num_rows or len(set(names)) != len(names):
            raise DamagedObjectError(
                f"{where} has {len(names)} rows, {len(set(names))} of them different; the record {name_of(record)} "
                f"states {stat.num_rows}"
            )
        metadata = file.metadata
        places = (
            (group, index)
            for group in range(metadata.num_row_groups)
            for index in range(metadata.row_group(group).num_rows)
        )
        return file, dict(zip(names, places, strict=True))

    def _group(self, shard_id: str, file: pq.ParquetFile, number: int, group: int) -> list[npt.NDArray[np.floating]]:
        known = shard_id, number, group
        rows = self._groups.get(known)
        if rows is None:
            table = file.read_row_group(group, columns=[column.name for column in _EMBEDDING])
            rows = [
                decode_latent(embedding.as_buffer(), shape, dtype)
                for embedding, shape, dtype in zip(
                    table.column("embedding"),
                    table.column("embedding_shape").to_pylist(),
                    table.column("embedding_dtype").to_pylist(),
                    strict=True,
                )
            ]
            for row in rows:
                row.flags.writeable = False
            self._groups[known] = rows
            self._num_kept_bytes += sum(row.nbytes for row in rows)
            while self._num_kept_bytes > _KEPT_BYTES and len(self._groups) > 1:
                self._num_kept_bytes -= sum(row.nbytes for row in self._groups.popitem(last=False)[1])
        else:
            self._groups.move_to_end(known)
        return rows

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._shards: OrderedDict[str, _OpenShard] = OrderedDict()
        self._groups: OrderedDict[tuple[str, int, int], list[npt.NDArray[np.floating]]] = OrderedDict()
        self._num_kept_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pid": None, "_lock": None, "_shards": None, "_groups": None}


@dataclass(frozen=True, slots=True)
class _OpenShard:
    """The files of a shard of a set, and (file, group, row in it) of each caption or clip."""

    files: Sequence[pq.ParquetFile]
    places: Mapping[Any, tuple[int, int, int]]
