"""Rows read back from the data files that `format` describes.

Not which files count (`commit`), nor whether their bytes are the committed ones (`committed` checks that first).
Training reads through `committed`; checks and conversions of an output call `read_records` and `read_rejections`.
"""

from __future__ import annotations

import io
import itertools
import json
import struct
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DamagedObjectError
from pipeline.format import REJECTION_COLUMNS, Content, decode_latent
from pipeline.pages import plain_pages
from pipeline.records import ClipFailure, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRecord:
    """A row as it was read back.

    Attributes:
        latent: `(C, t, h, w)`, or `(2C, t, h, w)` of kind "moments"; read-only, unscaled.
        columns: the columns that were asked for, `latent` excepted, by name; `extra` as a dictionary or None.
    """

    key: str
    clip_index: int
    kind: Literal["mean", "moments"]
    latent: npt.NDArray[np.floating]
    columns: Mapping[str, Any]

    @property
    def mean(self) -> npt.NDArray[np.floating]:
        """`(C, t, h, w)`, the posterior mean."""
        return self.latent if self.kind == "mean" else self.latent[: len(self.latent) // 2]

    @property
    def logvar(self) -> npt.NDArray[np.floating] | None:
        """`(C, t, h, w)`, the log-variance of the posterior, or None of kind "mean"."""
        return None if self.kind == "mean" else self.latent[len(self.latent) // 2 :]


# One after the other, or stacked where all have one shape.
_Latents: TypeAlias = Sequence[npt.NDArray[np.floating]] | npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRows:
    """The rows of a group by column, so that a batch takes values of many without an object for each.

    Attributes:
        keys, clip_indices, kinds, latents: of each row as a `StoredRecord` has them.
        columns: of each column that was asked for the values of all rows.
        num_bytes: about the memory that they take.
    """

    keys: Sequence[str]
    clip_indices: Sequence[int]
    kinds: Sequence[Literal["mean", "moments"]]
    latents: _Latents
    columns: Mapping[str, Sequence[Any]]
    num_bytes: int

    @classmethod
    def of(
        cls,
        table: Mapping[str, Sequence[Any]],
        latents: _Latents,
        columns: Sequence[str] | None,
    ) -> StoredRows:
        """Rows of a table of Python values, of which all columns were asked for or the named ones."""
        absent = [None] * len(latents)
        found = table if columns is None else {name: table.get(name, absent) for name in columns}
        texts = (value for values in found.values() for value in values if isinstance(value, str))
        return cls(
            keys=table["key"],
            clip_indices=table["clip_index"],
            kinds=table["kind"],
            latents=latents,
            columns=found,
            num_bytes=sum(latent.nbytes for latent in latents) + sum(map(len, texts)),
        )

    def record(self, index: int) -> StoredRecord:
        """One of the rows."""
        return StoredRecord(
            key=self.keys[index],
            clip_index=self.clip_indices[index],
            kind=self.kinds[index],
            latent=self.latents[index],
            columns={name: values[index] for name, values in self.columns.items()},
        )


_ALWAYS_READ = ("key", "clip_index", "latent", "latent_shape", "latent_dtype", "kind")


class RecordFile(ABC):
    """A data file open for reading: rows in groups that are read at once.

    Attributes:
        group_rows: rows of each group; a Parquet file has its row groups, a tar one row per group.
    """

    group_rows: Sequence[int]

    @property
    def num_rows(self) -> int:
        return sum(self.group_rows)

    @abstractmethod
    def read_columns(self, names: Sequence[str]) -> list[tuple[Any, ...]]:
        """Some columns of every row, `latent` not among them, without reading latents."""

    @abstractmethod
    def read_rows(self, group: int, columns: Sequence[str] | None = None) -> StoredRows:
        """The rows of a group with all columns, or with the named ones.

        Raises:
            DamagedObjectError: bytes and columns of a row contradict each other.
        """

    def read_group(self, group: int, columns: Sequence[str] | None = None) -> list[StoredRecord]:
        """As `read_rows`, one by one."""
        rows = self.read_rows(group, columns)
        return [rows.record(index) for index in range(len(rows.keys))]


class _ParquetRecords(RecordFile):
    def __init__(self, source: Any, with_page_checksums: bool) -> None:
        try:
            readable = source if isinstance(source, Path) else pa.BufferReader(source)
            self._file = pq.ParquetFile(readable, page_checksum_verification=with_page_checksums)
        except pa.ArrowInvalid as error:
            raise DamagedObjectError(f"this is no readable Parquet file: {error}") from error
        metadata = self._file.metadata
        self.group_rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        # A path is not mapped: its values are read when they are asked for.
        self._data = None if isinstance(source, Path) else memoryview(source).cast("B")
        self._with_page_checksums = with_page_checksums

    def read_columns(self, names: Sequence[str]) -> list[tuple[Any, ...]]:
        table = self._file.read(columns=list(names), use_threads=False)
        return list(zip(*(table.column(name).to_pylist() for name in names), strict=True))

    def read_rows(self, group: int, columns: Sequence[str] | None = None) -> StoredRows:
        names = self._file.schema_arrow.names if columns is None else dict.fromkeys([*_ALWAYS_READ, *columns])
        # Latents apart: they lie in the file as they are, and Arrow would copy them. The rest is small: handing it to
        # threads of Arrow costs more than reading it.
        beside = [name for name in names if name != "latent"]
        values = self._file.read_row_group(group, columns=beside, use_threads=False).to_pydict()
        if "extra" in values:
            values["extra"] = [None if extra is None else json.loads(extra) for extra in values["extra"]]
        shapes, dtypes = values["latent_shape"], values["latent_dtype"]
        latents = self._latents_in_place(group, shapes, dtypes)
        if latents is None:
            latents = _latents(self._file.read_row_group(group, columns=["latent"]).column("latent"), shapes, dtypes)
        return StoredRows.of(values, latents, columns)

    def _latents_in_place(self, group: int, shapes: Sequence[Sequence[int]], dtypes: Sequence[str]) -> _Latents | None:
        """Views of the file's own bytes, where these are at hand and hold latents as they are."""
        if self._data is None:
            return None
        pages = plain_pages(self._data, self._file.metadata, group, "latent", with_checksums=self._with_page_checksums)
        if pages is None or sum(num_values for num_values, _ in pages) != len(shapes):
            return None
        parts: list[_Latents] = []
        first = 0
        for num_values, page in pages:
            stop = first + num_values
            part = _latents_of_page(page, shapes[first:stop], dtypes[first:stop])
            if part is None:
                return None
            parts.append(part)
            first = stop
        return parts[0] if len(parts) == 1 else [latent for part in parts for latent in part]


_LENGTH = struct.Struct("<I")


def _latents_of_page(page: memoryview, shapes: Sequence[Sequence[int]], dtypes: Sequence[str]) -> _Latents | None:
    """Views of PLAIN values, each with its length before it; rows of one shape are one array. None: not so laid out."""
    if _are_equal(shapes) and _are_equal(dtypes) and len(page) % len(shapes) == 0:
        table = np.frombuffer(page, np.uint8).reshape(len(shapes), -1)
        lengths = table[:, : _LENGTH.size].copy().view("<u4")
        if (lengths == table.shape[1] - _LENGTH.size).all():
            return decode_latent(table[:, _LENGTH.size :], shapes[0], dtypes[0])
    latents: list[npt.NDArray[np.floating]] = []
    position = 0
    for shape, dtype in zip(shapes, dtypes, strict=True):
        if position + _LENGTH.size > len(page):
            return None
        start = position + _LENGTH.size
        position = start + _LENGTH.unpack_from(page, position)[0]
        latents.append(decode_latent(page[start:position], shape, dtype))
    return latents


def _are_equal(values: Sequence[Any]) -> bool:
    return bool(values) and values.count(values[0]) == len(values)


def _latents(column: pa.ChunkedArray, shapes: Sequence[Sequence[int]], dtypes: Sequence[str]) -> _Latents:
    """Views of the values where Arrow has them; rows of one shape are one array, without an object for each."""
    if column.num_chunks != 1 or not len(column) or column.null_count or not pa.types.is_binary(column.type):
        return [
            decode_latent(value.as_buffer(), shape, dtype)
            for value, shape, dtype in zip(column, shapes, dtypes, strict=True)
        ]
    (chunk,) = column.chunks
    _, edges, data = chunk.buffers()
    bounds = np.frombuffer(edges, np.int32, len(chunk) + 1, chunk.offset * 4)
    values = memoryview(data)[bounds[0] : bounds[-1]]
    sizes = np.diff(bounds)
    if (sizes == sizes[0]).all() and _are_equal(dtypes) and _are_equal(shapes):
        return decode_latent(values, [len(chunk), *shapes[0]], dtypes[0])
    parts = [values[start:stop] for start, stop in itertools.pairwise(bounds.tolist())]
    return list(map(decode_latent, parts, shapes, dtypes))


class _TarRecords(RecordFile):
    def __init__(self, source: Any) -> None:
        self._source = pa.OSFile(str(source)) if isinstance(source, Path) else pa.BufferReader(source)
        self._members: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(fileobj=self._source, mode="r:") as tar:
                for member in tar:
                    name, _, extension = member.name.partition(".")
                    self._members.setdefault(name, {})[extension] = (member.offset_data, member.size)
            self._rows = [json.loads(self._read(members, "json")) for members in self._members.values()]
        except (tarfile.TarError, ValueError) as error:
            raise DamagedObjectError(f"this is no readable WebDataset tar: {error}") from error
        self.group_rows = [1] * len(self._rows)
        self._groups = list(self._members.values())

    def _read(self, members: Mapping[str, tuple[int, int]], extension: str) -> bytes:
        if extension not in members:
            raise DamagedObjectError(f"a sample of the tar has no .{extension} member, only {', '.join(members)}")
        offset, num_bytes = members[extension]
        self._source.seek(offset)
        return bytes(self._source.read(num_bytes))

    def read_columns(self, names: Sequence[str]) -> list[tuple[Any, ...]]:
        return [tuple(row[name] for name in names) for row in self._rows]

    def read_rows(self, group: int, columns: Sequence[str] | None = None) -> StoredRows:
        row, members = self._rows[group], self._groups[group]
        parts = ("latent",) if row["kind"] == "mean" else ("mean", "logvar")
        arrays = [_array_of_npy(self._read(members, f"{part}.npy"), row["key"]) for part in parts]
        latent = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        if list(latent.shape) != row["latent_shape"] or latent.dtype.name != row["latent_dtype"]:
            raise DamagedObjectError(
                f"the latent of {row['key']!r} is {latent.shape} {latent.dtype.name}; its JSON says "
                f"{tuple(row['latent_shape'])} {row['latent_dtype']}"
            )
        return StoredRows.of({name: [value] for name, value in row.items()}, [latent], columns)


def _array_of_npy(data: bytes, key: str) -> npt.NDArray[np.floating]:
    """The array of a .npy of floats; a view of its bytes. Any other content, objects included, is damage."""
    stream = io.BytesIO(data)
    try:
        np.lib.format.read_magic(stream)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        if is_fortran or dtype.kind != "f":
            raise ValueError(f"{dtype} in {'Fortran' if is_fortran else 'C'} order")
        # Not read_array, which makes room for what the header says before it looks how much there is.
        return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape)
    except (ValueError, TypeError) as error:
        raise DamagedObjectError(f"the latent of {key!r} is no .npy of floats: {error}") from error


def open_records(source: Path | pa.Buffer | bytes, content: Content, *, with_page_checksums: bool = True) -> RecordFile:
    """A data file, given by its path or its bytes, open for reading.

    Args:
        with_page_checksums: False where the bytes were checked just now, which saves a tenth of the time.

    Raises:
        DamagedObjectError: the bytes are no file of that kind.
    """
    if content == "webdataset":
        return _TarRecords(source)
    return _ParquetRecords(source, with_page_checksums)


def read_records(
    source: Path | pa.Buffer | bytes, content: Content = "parquet", columns: Sequence[str] | None = None
) -> Iterator[StoredRecord]:
    """The rows of a data file in order, with all columns or with the named ones; memory stays near one row group.

    Raises:
        DamagedObjectError: the bytes are no file of that kind, or contradict themselves.
    """
    file = open_records(source, content)
    for group in range(len(file.group_rows)):
        yield from file.read_group(group, columns)


def read_rejections(source: Path | pa.Buffer | bytes) -> Iterator[ClipFailure]:
    """The rows of a rejection file in order.

    Raises:
        DamagedObjectError: the bytes are no rejection file.
    """
    names = [column.name for column in REJECTION_COLUMNS]
    for row in open_records(source, "rejected").read_columns(names):
        key, clip_index, step, reason, message, source_uri = row
        yield ClipFailure(
            key=key,
            clip_index=clip_index,
            step=cast(Step, step),
            reason=reason,
            message=message,
            source_uri=source_uri,
        )
