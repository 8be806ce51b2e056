"""Latents that are read where they lie in a mapped file: the same values and no copy; else it is left to Arrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latents import IMAGE, SMALL, WIDE, manifest, record

from pipeline.format import ShardWriter
from pipeline.pages import plain_pages
from pipeline.records import LatentRecord
from pipeline.stored import open_records, read_records

SAME = [record(f"k{number}", bucket=SMALL) for number in range(5)]
# As the writer of outputs has it.
PLAIN: dict[str, Any] = {
    "use_dictionary": False,
    "compression": "none",
    "write_statistics": False,
    "write_page_checksum": True,
}
MIXED = [record("a", bucket=SMALL), record("b", bucket=WIDE), record("c", bucket=IMAGE), record("d", bucket=SMALL)]


def written(folder: Path, records: list[LatentRecord]) -> bytes:
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, "00000-deadbeef", manifest(), "parquet") as writer:
        for entry in records:
            writer.write(entry)
        writer.finish()
    return next(folder.glob("*.parquet")).read_bytes()


def pages_of(data: bytes, with_checksums: bool = True) -> list[tuple[int, memoryview]] | None:
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    return plain_pages(memoryview(data), metadata, 0, "latent", with_checksums=with_checksums)


@pytest.mark.parametrize("records", [SAME, MIXED], ids=["one shape", "several shapes"])
def test_latents_of_a_mapped_file_are_views_of_it_with_the_values_that_were_written(
    tmp_path: Path, records: list[LatentRecord]
) -> None:
    data = written(tmp_path, records)
    rows = open_records(data, "parquet").read_rows(0)
    for latent, entry in zip(rows.latents, records, strict=True):
        np.testing.assert_array_equal(latent, entry.mean)
        assert np.shares_memory(latent, np.frombuffer(data, np.uint8))
        assert not latent.flags.writeable


def test_a_path_gives_the_same_rows_as_the_bytes_of_the_file(tmp_path: Path) -> None:
    data = written(tmp_path, MIXED)
    rows = zip(read_records(data), read_records(next(tmp_path.glob("*.parquet"))), strict=True)
    for mapped, read in rows:
        np.testing.assert_array_equal(mapped.latent, read.latent)
        assert mapped.columns == read.columns


@pytest.mark.parametrize("num_rows", [1, 4500])
def test_small_latents_that_take_several_pages_are_found_in_all_of_them(tmp_path: Path, num_rows: int) -> None:
    # Arrow ends a page at 1 MiB, and looks every 1,024 values.
    values = [bytes([number % 251]) * (600 + number % 7) for number in range(num_rows)]
    table = pa.table({"latent": pa.array(values, pa.binary())}, pa.schema([pa.field("latent", pa.binary(), False)]))
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, **PLAIN)
    pages = pages_of(path.read_bytes())
    assert pages is not None
    assert len(pages) == (1 if num_rows == 1 else 3)
    assert sum(num_values for num_values, _ in pages) == num_rows
    expected = b"".join(len(value).to_bytes(4, "little") + value for value in values)
    assert b"".join(page for _, page in pages) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zstd"},
        {"write_statistics": True},
        {"use_dictionary": True},
        {"data_page_version": "2.0"},
        {"nullable": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_any_other_kind_of_chunk_is_left_to_arrow(tmp_path: Path, options: dict[str, Any]) -> None:
    options = PLAIN | options
    field = pa.field("latent", pa.binary(), options.pop("nullable", False))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"latent": pa.array([b"ab", b"c"], pa.binary())}, pa.schema([field])), path, **options)
    assert pages_of(path.read_bytes()) is None


def test_a_changed_bit_is_found_by_the_checksum_of_its_page(tmp_path: Path) -> None:
    data = bytearray(written(tmp_path, SAME))
    ((_, page),) = pages_of(bytes(data)) or []
    place = data.index(bytes(page[:64])) + 50
    data[place] ^= 1
    assert pages_of(bytes(data)) is None
    assert pages_of(bytes(data), with_checksums=False) is not None
    with pytest.raises(OSError, match="CRC"):
        open_records(bytes(data), "parquet").read_rows(0)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 40), st.binary(min_size=1, max_size=12))
def test_whatever_stands_in_the_place_of_a_page_header_is_no_error_here(offset: int, noise: bytes) -> None:
    metadata = pq.ParquetFile(pa.BufferReader(DATA)).metadata
    start = metadata.row_group(0).column(0).data_page_offset + offset
    data = DATA[:start] + noise + DATA[start + len(noise) :]
    pages = plain_pages(memoryview(data), metadata, 0, "latent", with_checksums=True)
    assert pages is None or sum(len(page) for _, page in pages) <= len(data)


def _data() -> bytes:
    sink = pa.BufferOutputStream()
    schema = pa.schema([pa.field("latent", pa.binary(), nullable=False)])
    table = pa.table({"latent": pa.array([b"x" * 100] * 9, pa.binary())}, schema)
    pq.write_table(table, sink, **PLAIN)
    return bytes(sink.getvalue())


DATA = _data()
