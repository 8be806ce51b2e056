"""The files of an output: what a row holds and how it becomes bytes.

Not where files go or when they count (that is `storage` and `commit`), and not where rows are read back (`stored`).
`actors` writes with `ShardWriter`. Readers without Latentmill need nothing from here: Parquet and tar files are plain,
and `COLUMNS` below is their description.

Two forms of the same rows:

* **Parquet**, one row per clip. `latent` holds the values as little-endian bytes in C order, `latent_shape` and
  `latent_dtype` say how to look at them. With kind "moments" the first half of the channels is the mean, the second
  half the log-variance: shape (2C, t, h, w). Latents are *unscaled*; the diffusion model's latent is
  `scaling_factor * (mean - shift_factor)`, and both numbers stand in the schema metadata with `model`, `revision`
  ("" if none), `weights_sha256`, `is_trained`, `fingerprint`, `format_version` and the VAE's compression, all as text.
* **WebDataset**, a tar with the members KEY_000.latent.npy (kind "moments": KEY_000.mean.npy and KEY_000.logvar.npy),
  KEY_000.json (the columns of the row but `latent`, `extra` as an object, and under `latentmill` what Parquet has in
  the schema metadata) and KEY_000.txt (the caption, UTF-8). 000 is the clip index. WebDataset ends a key at its first
  dot, so in member names every character of a key that is no letter, digit, "_" or "-" is written as %XX of its UTF-8
  bytes; `urllib.parse.unquote` turns it back, and the JSON has the key as it is.

Rejections are Parquet with the columns of `REJECTION_COLUMNS`. A shard without records has no data file, one without
rejections no rejection file. The same records in the same order give the same bytes (with one version of pyarrow).

Columns and JSON fields of the input pass through: typed columns under their own names, or under `source_` + name
(again, until it is free) where the name, whatever its case, is a column of ours. A value that does not fit its column,
or has none, is kept in `extra`; numbers that JSON does not know are kept there as "NaN", "Infinity", "-Infinity".

Format history: 1 is the first.
"""

from __future__ import annotations

import io
import json
import math
import re
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DamagedObjectError
from pipeline.records import ClipFailure, DatasetManifest, LatentRecord

FORMAT_VERSION = 1

Content = Literal["parquet", "webdataset", "rejected"]
OutputFormat = Literal["parquet", "webdataset", "both"]

_INT_LIST = pa.list_(pa.field("element", pa.int32(), nullable=False))


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the output: its name, Arrow type, whether it may be null, and what it means."""

    name: str
    type: pa.DataType
    nullable: bool
    meaning: str


COLUMNS = (
    Column("key", pa.string(), False, "key of the source video, unique in the shard"),
    Column("clip_index", pa.int32(), False, "number of the clip in its video, from 0"),
    Column("caption", pa.string(), False, "caption of the video as given, empty if none"),
    Column("latent", pa.binary(), False, "unscaled posterior, little-endian, C order"),
    Column("latent_shape", _INT_LIST, False, "(C, t, h, w); kind moments: (2C, t, h, w), mean then log-variance"),
    Column("latent_dtype", pa.string(), False, "float16 or float32"),
    Column("kind", pa.string(), False, "mean or moments"),
    Column("num_frames", pa.int32(), False, "frames of the clip that were encoded, 1 + 4k"),
    Column("latent_num_frames", pa.int32(), False, "frames of the latent, t = 1 + k"),
    Column("width", pa.int32(), False, "width of the encoded picture in pixels"),
    Column("height", pa.int32(), False, "height of the encoded picture in pixels"),
    Column("fps", pa.float64(), True, "frames per second of the clip as encoded; null for images"),
    Column("source_fps", pa.float64(), True, "frames per second of the source; null for images"),
    Column("source_width", pa.int32(), False, "width of the source picture in pixels, after rotation"),
    Column("source_height", pa.int32(), False, "height of the source picture in pixels, after rotation"),
    Column("source_num_frames", pa.int64(), False, "frames of the source video"),
    Column("clip_start_s", pa.float64(), False, "start of the clip in the source in seconds; 0 for images"),
    Column("clip_end_s", pa.float64(), False, "end of the clip in the source in seconds, exclusive; 0 for images"),
    Column("crop", _INT_LIST, False, "(x, y, width, height) in source pixels that the clip shows"),
    Column("bucket", pa.string(), False, "WIDTHxHEIGHTxFRAMES in pixels and frames"),
    Column("source_uri", pa.string(), False, "where the video came from; of a tar: tar URI#member"),
    Column("decoder", pa.string(), False, "name and version of the decoder that made the pixels"),
)
EXTRA = Column("extra", pa.string(), True, "JSON object of input fields that have no fitting column; null if none")
REJECTION_COLUMNS = (
    Column("key", pa.string(), False, "key of the source video; * for the unread rest of a damaged shard"),
    Column("clip_index", pa.int32(), True, "number of the rejected clip; null: the whole video"),
    Column("step", pa.string(), False, "source, decode or encode"),
    Column("reason", pa.string(), False, "reason code, from a closed list"),
    Column("message", pa.string(), False, "one sentence for people"),
    Column("source_uri", pa.string(), False, "where the video came from"),
)
_PASSTHROUGH_TYPES = {"bool": pa.bool_(), "int64": pa.int64(), "float64": pa.float64(), "string": pa.string()}
_FACTS_NAME = "latentmill"
_OUR_NAMES = frozenset(column.name for column in (*COLUMNS, EXTRA)) | {_FACTS_NAME}
_LATENT_DTYPES: Mapping[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}

# Chosen by tests/benchmarks/bench_layout.py (2026-11-23; real clips through the trained "small": 64 MiB of float16
# latents; one thread of an x86-64 machine, pyarrow 26.0; size against raw, MiB/s, and the milliseconds that one
# random row costs; speeds differ up to twofold from run to run):
#   row group  codec   encoding  size   write  read  row ms
#      1 MiB   zstd 1  plain     0.922    697  1241     0.9
#     16 MiB   zstd 1  plain     0.922    549  1363    11.9
#     64 MiB   zstd 1  plain     0.922    512  1388    45.5
#     16 MiB   none    plain     1.000   1178  9198     1.8   <- chosen for latents; zstd 1 for all other columns
#     16 MiB   zstd 3  plain     0.916    467  1242    13.2
#     16 MiB   zstd 9  plain     0.922    490  1430    11.3
#     16 MiB   zstd 1  split     0.843    273   837    47.1
# Mantissas hardly compress, and to undo zstd is most of what reading a row costs: seven times the rest, for 8 % of
# bytes. Small row groups do not cost size; tens of MB keep the requests to a remote store few. Byte-stream-split saves
# a tenth more, but Parquet has it for numbers only: the latent would be a list of half floats instead of bytes that
# every reader can look at without conversion.
_ROW_GROUP_BYTES = 16 << 20
_ZSTD_LEVEL = 1
# Rows that weigh next to nothing must not pile up for ever either: rejections, and latents of tiny pictures.
_ROW_GROUP_ROWS = 16384


def column_name(field_name: str) -> str:
    """The output column that a column or JSON field of the input passes through to.

    The comparison with our names ignores case, because DuckDB and Spark do.
    """
    name = field_name
    while name.lower() in _OUR_NAMES:
        name = f"source_{name}"
    return name


def schema(manifest: DatasetManifest) -> pa.Schema:
    """The Arrow schema of the Parquet files of an output, schema metadata included."""
    passthrough = [pa.field(name, _PASSTHROUGH_TYPES[kind]) for name, kind in sorted(manifest.passthrough.items())]
    fields = [pa.field(c.name, c.type, nullable=c.nullable) for c in COLUMNS]
    extra = pa.field(EXTRA.name, EXTRA.type)
    return pa.schema([*fields, *passthrough, extra], metadata=_texts(_facts(manifest)))


def rejection_schema(manifest: DatasetManifest) -> pa.Schema:
    """The Arrow schema of the rejection files of an output."""
    facts = {"format_version": FORMAT_VERSION, "fingerprint": manifest.fingerprint}
    return pa.schema([pa.field(c.name, c.type, nullable=c.nullable) for c in REJECTION_COLUMNS], metadata=_texts(facts))


def _facts(manifest: DatasetManifest) -> dict[str, object]:
    model = manifest.model
    return {
        "format_version": FORMAT_VERSION,
        "model": model.model,
        "revision": model.revision,
        "weights_sha256": model.weights_sha256,
        "is_trained": model.is_trained,
        "scaling_factor": float(model.scaling_factor),
        "shift_factor": float(model.shift_factor),
        "latent_channels": model.latent_channels,
        "temporal_compression": model.temporal_compression,
        "spatial_compression": model.spatial_compression,
        "fingerprint": manifest.fingerprint,
    }


def _texts(facts: Mapping[str, object]) -> dict[str, str]:
    def text(value: object) -> str:
        if value is None:
            return ""
        return value if isinstance(value, str) else json.dumps(value)

    return {name: text(value) for name, value in facts.items()}


def encode_latent(latent: npt.NDArray[np.floating], dtype: str) -> bytes:
    """The bytes of the column `latent`: little-endian, C order."""
    return np.ascontiguousarray(latent, dtype=_LATENT_DTYPES[dtype]).tobytes()


def decode_latent(data: Any, shape: Sequence[int], dtype: str) -> npt.NDArray[np.floating]:
    """The array of a `latent` value, a view of `data` and read-only where that is.

    Args:
        data: anything with the buffer protocol; or uint8 `(B, bytes)`, of which each row is a value of that shape.
        shape: the row's `latent_shape`.
        dtype: the row's `latent_dtype`.

    Raises:
        DamagedObjectError: the dtype is unknown, or the number of bytes is not that of the shape.
    """
    if dtype not in _LATENT_DTYPES:
        raise DamagedObjectError(f"latent_dtype is {dtype!r}; allowed are {', '.join(_LATENT_DTYPES)}")
    little = _LATENT_DTYPES[dtype]
    values = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    num_bytes, expected = values.shape[-1], math.prod(shape) * little.itemsize
    if num_bytes != expected:
        raise DamagedObjectError(f"a latent of shape {tuple(shape)} {dtype} has {num_bytes} bytes, not {expected}")
    return values.view(little).reshape(*values.shape[:-1], *shape)


def member_key(key: str, clip_index: int) -> str:
    """The WebDataset key of a clip, `KEY_000`, with the key escaped as the head of this module says."""
    escaped = re.sub(r"[^\w-]", lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), key)
    return f"{escaped}_{clip_index:03d}"


def split_member_key(name: str) -> tuple[str, int]:
    """The key and the clip index that `member_key` was made of."""
    escaped, _, number = name.rpartition("_")
    return unquote(escaped), int(number)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """A finished file on local disk, before it is uploaded.

    Attributes:
        bucket_rows: rows per bucket; goes into the commit record, so that readers plan an epoch without opening files.
    """

    path: Path
    content: Content
    num_rows: int
    bucket_rows: Mapping[str, int] = field(default_factory=dict)


class ShardWriter:
    """Writes the records and rejections of one shard as they come; memory stays near one row group.

    A context manager. Files appear under their names when `finish` has closed them; leaving without `finish` removes
    them, so that an interrupted file never looks like a whole one.

    Args:
        directory: an existing folder for the files.
        shard_id: the stem of their names.
        manifest: what the rows must agree with, and the schema metadata.
        output_format: "parquet", "webdataset" or "both".
    """

    def __init__(self, directory: Path, shard_id: str, manifest: DatasetManifest, output_format: str) -> None:
        assert output_format in ("parquet", "webdataset", "both"), f"output format {output_format!r} is unknown"
        self._directory = directory
        self._shard_id = shard_id
        self._manifest = manifest
        self._contents: tuple[Content, ...] = (
            ("parquet", "webdataset") if output_format == "both" else (cast(Content, output_format),)
        )
        self._files: dict[Content, _ParquetFile | _TarFile] = {}
        self._seen: set[tuple[str, int]] = set()
        self._bucket_rows: Counter[str] = Counter()
        self._is_finished = False

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_finished:
            for file in self._files.values():
                file.discard()

    def write(self, record: LatentRecord) -> None:
        """Adds a record.

        Raises:
            AssertionError: the record does not fit the manifest, repeats a (key, clip_index), or has text that is no
                valid Unicode; all of these are settled upstream.
        """
        self._check(record)
        row = _row(record, self._manifest)
        self._bucket_rows[str(record.bucket)] += 1
        for content in self._contents:
            self._file(content).add(row)

    def reject(self, failure: ClipFailure) -> None:
        """Adds a rejection of a video or a clip."""
        self._file("rejected").add({c.name: getattr(failure, c.name) for c in REJECTION_COLUMNS})

    def finish(self) -> tuple[WrittenFile, ...]:
        """Closes the files: Parquet, tar, rejections, of these the ones that have rows."""
        self._is_finished = True
        written = []
        for content in ("parquet", "webdataset", "rejected"):
            file = self._files.get(content)
            if file is not None:
                buckets = {} if content == "rejected" else dict(sorted(self._bucket_rows.items()))
                written.append(
                    WrittenFile(path=file.close(), content=content, num_rows=file.num_rows, bucket_rows=buckets)
                )
        return tuple(written)

    def _file(self, content: Content) -> _ParquetFile | _TarFile:
        if content not in self._files:
            suffix = {"parquet": ".parquet", "webdataset": ".tar", "rejected": ".rejected.parquet"}[content]
            path = self._directory / (self._shard_id + suffix)
            if content == "webdataset":
                self._files[content] = _TarFile(path, self._manifest)
            else:
                make = schema if content == "parquet" else rejection_schema
                self._files[content] = _ParquetFile(path, make(self._manifest))
        return self._files[content]

    def _check(self, record: LatentRecord) -> None:
        name = f"shard {self._shard_id}, clip {record.clip_index} of {record.key!r}"
        manifest = self._manifest
        assert record.kind == manifest.kind, f"{name}: kind {record.kind} is not the dataset's {manifest.kind}"
        for part in (record.mean, record.logvar):
            assert part is None or part.dtype.name == manifest.latent_dtype, (
                f"{name}: the latent is {part.dtype.name}, not the dataset's {manifest.latent_dtype}"
            )
            assert part is None or (part.ndim == 4 and part.shape == record.mean.shape), (
                f"{name}: the latent has shape {part.shape}, not (C, t, h, w) like the mean {record.mean.shape}"
            )
        assert (record.key, record.clip_index) not in self._seen, f"{name}: written twice"
        self._seen.add((record.key, record.clip_index))
        for what, text in (("key", record.key), ("caption", record.caption), ("source_uri", record.source_uri)):
            assert _is_unicode(text), f"{name}: the {what} holds a lone surrogate, which UTF-8 cannot keep: {text!r}"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _row(record: LatentRecord, manifest: DatasetManifest) -> dict[str, Any]:
    """All columns of a record by name; `latent` still as an array and `extra` as a dictionary."""
    latent = record.mean if record.logvar is None else np.concatenate([record.mean, record.logvar])
    row: dict[str, Any] = {
        "key": record.key,
        "clip_index": record.clip_index,
        "caption": record.caption,
        "latent": latent,
        "latent_shape": list(latent.shape),
        "latent_dtype": manifest.latent_dtype,
        "kind": manifest.kind,
        "num_frames": record.bucket.num_frames,
        "latent_num_frames": latent.shape[1],
        "width": record.bucket.width_px,
        "height": record.bucket.height_px,
        "fps": record.fps,
        "source_fps": record.facts.fps,
        "source_width": record.facts.width_px,
        "source_height": record.facts.height_px,
        "source_num_frames": record.facts.num_frames,
        "clip_start_s": record.start_s,
        "clip_end_s": record.end_s,
        "crop": list(record.crop),
        "bucket": str(record.bucket),
        "source_uri": record.source_uri,
        "decoder": record.facts.decoder,
    }
    extra: dict[str, object] = {}
    passed: dict[str, object] = dict.fromkeys(sorted(manifest.passthrough))
    taken: set[str] = set()
    # A field that has the very name of a column comes before one that is renamed to it.
    for name in sorted(record.fields, key=lambda name: (column_name(name) != name, name)):
        column, value = column_name(name), record.fields[name]
        if column in passed and column not in taken and _fits(value, manifest.passthrough[column]):
            passed[column] = value
            taken.add(column)
        else:
            extra[name] = _json_safe(value)
    return row | passed | {"extra": extra or None}


def _fits(value: object, kind: str) -> bool:
    """Whether a column of the kind keeps the value without loss."""
    if value is None:
        return True
    if kind == "bool" or isinstance(value, bool):
        return kind == "bool" and isinstance(value, bool)
    if kind == "int64":
        return isinstance(value, int) and -(2**63) <= value < 2**63
    if kind == "float64":
        if isinstance(value, int):
            return abs(value) <= 2**53
        return isinstance(value, float) and math.isfinite(value)
    return isinstance(value, str) and _is_unicode(value)


def _json_safe(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(name): _json_safe(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(inner) for inner in value]
    return value


def _json_text(value: object) -> str:
    # ASCII escapes also carry the lone surrogates that JSON input may hold and UTF-8 may not.
    return json.dumps(value, ensure_ascii=True, allow_nan=False)


def _leaves(schema: pa.Schema) -> list[str]:
    """The names of a schema's columns as Parquet has them: of a list its elements."""
    return [f"{field.name}.list.element" if pa.types.is_list(field.type) else str(field.name) for field in schema]


class _ParquetFile:
    """One Parquet file in the making, a row group at a time."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.num_rows = 0
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self._num_bytes = 0
        # A dictionary or minimum and maximum of latents and captions would only cost bytes.
        unique = {"latent", "caption", "key", "message", "extra"}
        repeated = [f.name for f in schema if f.name not in unique and pa.types.is_string(f.type)]
        ordered = [f.name for f in schema if f.name not in unique - {"key"} and not pa.types.is_list(f.type)]
        codecs = {column: "none" if column == "latent" else "zstd" for column in _leaves(schema)}
        self._writer = pq.ParquetWriter(
            self._partial,
            schema,
            version="2.6",
            compression=codecs,
            compression_level={column: _ZSTD_LEVEL for column, codec in codecs.items() if codec == "zstd"},
            use_dictionary=repeated,
            write_statistics=ordered,
            write_page_checksum=True,
        )

    def add(self, row: Mapping[str, Any]) -> None:
        stored = dict(row)
        if "latent" in stored:
            stored["latent"] = encode_latent(stored["latent"], stored["latent_dtype"])
        if stored.get("extra") is not None:
            stored["extra"] = _json_text(stored["extra"])
        self._rows.append(stored)
        # Texts count as latents do: a video of many clips may have megabytes of JSON beside it, once for each clip.
        self._num_bytes += sum(len(value) for value in stored.values() if isinstance(value, str | bytes))
        self.num_rows += 1
        if self._num_bytes >= _ROW_GROUP_BYTES or len(self._rows) >= _ROW_GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            table = pa.Table.from_pylist(self._rows, schema=self._schema)
            self._writer.write_table(table, row_group_size=len(self._rows))
            self._rows.clear()
            self._num_bytes = 0

    def close(self) -> Path:
        self._flush()
        self._writer.close()
        return self._partial.rename(self._path)

    def discard(self) -> None:
        self._writer.close()
        self._partial.unlink(missing_ok=True)


class _TarFile:
    """One WebDataset tar in the making; the same members in the same order give the same bytes."""

    def __init__(self, path: Path, manifest: DatasetManifest) -> None:
        self.num_rows = 0
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._facts = _facts(manifest)
        self._tar = tarfile.open(self._partial, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(self, row: Mapping[str, Any]) -> None:
        name = member_key(row["key"], row["clip_index"])
        latent = row["latent"]
        if row["kind"] == "mean":
            arrays = {"latent": latent}
        else:
            arrays = {"mean": latent[: len(latent) // 2], "logvar": latent[len(latent) // 2 :]}
        columns = {column: value for column, value in row.items() if column != "latent"}
        for part, array in arrays.items():
            self._add(f"{name}.{part}.npy", _npy_bytes(array, row["latent_dtype"]))
        self._add(f"{name}.json", _json_text(columns | {_FACTS_NAME: self._facts}).encode())
        self._add(f"{name}.txt", row["caption"].encode())
        self.num_rows += 1

    def _add(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)  # its defaults are mtime 0, uid 0, gid 0, no names, mode 0644
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))

    def close(self) -> Path:
        self._tar.close()
        return self._partial.rename(self._path)

    def discard(self) -> None:
        self._tar.close()
        self._partial.unlink(missing_ok=True)


def _npy_bytes(array: npt.NDArray[np.floating], dtype: str) -> bytes:
    buffer = io.BytesIO()
    little = np.ascontiguousarray(array, dtype=_LATENT_DTYPES[dtype])
    np.lib.format.write_array(buffer, little, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
