"""Which rows of a dataset a filter on columns keeps.

Not where rows are read (`rows`). Commit records state rows per bucket and nothing of other columns, so a filter has to
look into every file before an epoch can be planned; `dataset` asks for that once, and `rows` repeats it for each file
on the bytes that it has checked.

Parquet gives the footer and the columns that the filter names, and of these only the row groups whose minimum and
maximum allow a match: of a remote store about one small request for each such group and column. A tar has no columns
and is read whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.committed import DataFile, FileCache, open_bytes
from pipeline.errors import DamagedObjectError, UsageError
from pipeline.records import FileStat
from pipeline.storage import ObjectStore
from pipeline.store import RangeReader

Filter: TypeAlias = pc.Expression | Sequence[tuple[str, str, Any]] | Sequence[Sequence[tuple[str, str, Any]]]

_NUM_READERS = 32
_MATCH = "is_match"


def expression_of(wanted: Filter, schema: pa.Schema) -> pc.Expression:
    """The Arrow expression of a filter, checked against the columns.

    Args:
        wanted: an expression, or (column, operator, value) triples as `pyarrow.parquet.read_table` takes them: all of
            a list must hold, of a list of lists one list.
        schema: the columns that it may name.

    Raises:
        UsageError: it names another column, compares what cannot be compared, or says neither yes nor no.
    """
    try:
        expression = wanted if isinstance(wanted, pc.Expression) else pq.filters_to_expression(wanted)
        kind = _matches(_arrow_dataset().dataset(schema.empty_table()), expression).schema.field(_MATCH).type
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"filter={wanted!r} does not fit the columns {', '.join(schema.names)}: {str(error).splitlines()[0]}; give "
            "(column, operator, value) triples or an expression of pyarrow.compute"
        ) from error
    if kind != pa.bool_():
        raise UsageError(f"filter={wanted!r} gives {kind} and not true or false for each row")
    return expression


def select(
    files: Sequence[DataFile], expression: pc.Expression, schema: pa.Schema, store: ObjectStore, cache: FileCache
) -> tuple[DataFile, ...]:
    """The files in which any row counts that matches, each with these rows only. Nothing is checked against a commit.

    Raises:
        DamagedObjectError: the bytes are no file of their kind.
        StorageNotFoundError: a file is gone.
    """

    def selected(file: DataFile) -> DataFile | None:
        if file.stat.content == "parquet":
            url = store.url(file.stat.key)
            source = RangeReader(store, file.stat.key, file.stat.num_bytes) if "://" in url else pa.memory_map(url)
        else:
            source = pa.BufferReader(cache.checked_bytes(store, file.stat))
        matching, buckets = _mask(source, file.stat, expression, schema, store)
        mask = matching & file.mask()
        if not mask.any():
            return None
        kept = file.with_mask(mask, [buckets[number] for number in np.flatnonzero(mask).tolist()])
        return replace(kept, num_matching=int(matching.sum()))

    with ThreadPoolExecutor(_NUM_READERS) as pool:
        return tuple(file for file in pool.map(selected, files) if file is not None)


def matching_rows(
    buffer: pa.Buffer, stat: FileStat, expression: pc.Expression, schema: pa.Schema, store: ObjectStore
) -> npt.NDArray[np.bool_]:
    """`(num_rows,)`, which rows of checked bytes match."""
    return _mask(pa.BufferReader(buffer), stat, expression, schema, store)[0]


def _mask(
    source: Any, stat: FileStat, expression: pc.Expression, schema: pa.Schema, store: ObjectStore
) -> tuple[npt.NDArray[np.bool_], dict[int, str]]:
    """Which rows match, and the bucket of each that does."""
    mask = np.zeros(stat.num_rows, np.bool_)
    buckets: dict[int, str] = {}
    try:
        for first, table in _tables(source, stat, expression, schema, store):
            found = table.column(_MATCH).fill_null(False).to_numpy()
            mask[first : first + len(found)] = found
            names = table.column("bucket")
            buckets.update((first + int(number), names[int(number)].as_py()) for number in np.flatnonzero(found))
    except (pa.ArrowInvalid, ValueError) as error:
        raise DamagedObjectError(f"{store.url(stat.key)} cannot be filtered: {error}") from error
    return mask, buckets


def _tables(
    source: Any, stat: FileStat, expression: pc.Expression, schema: pa.Schema, store: ObjectStore
) -> Iterator[tuple[int, pa.Table]]:
    """First row, and for each row from there on whether it matches and its bucket; without parts that cannot match."""
    if stat.content == "webdataset":
        names = [name for name in schema.names if name != "latent"]
        rows = open_bytes(source.read_buffer(), stat, store).read_columns(names)
        columns = dict(zip(names, zip(*rows, strict=True), strict=True))
        kinds = pa.schema([schema.field(name) for name in names])
        table = pa.table({name: list(columns[name]) for name in names}, kinds)
        yield 0, _matches(_arrow_dataset().dataset(table), expression)
        return
    ds = _arrow_dataset()
    options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    fragment = ds.ParquetFileFormat(default_fragment_scan_options=options).make_fragment(source)
    wanted = {group.id for group in fragment.subset(filter=expression).row_groups}
    first = 0
    for group in fragment.row_groups:
        if group.id in wanted:
            yield first, _matches(fragment.subset(row_group_ids=[group.id]), expression)
        first += group.num_rows


def _arrow_dataset() -> Any:
    # 40 MB that a process without a filter does without.
    import pyarrow.dataset

    return pyarrow.dataset


def _matches(rows: Any, expression: pc.Expression) -> pa.Table:
    table: pa.Table = rows.to_table(columns={_MATCH: expression, "bucket": pc.field("bucket")}, use_threads=False)
    return table
