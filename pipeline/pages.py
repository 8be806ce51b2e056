"""Values of an uncompressed Parquet column where they lie in a mapped file, without a copy of them.

Not a reader of Parquet: pyarrow reads everything else, and also this wherever a chunk is not the simplest that there
is (one PLAIN page after another, no compression, no nulls, no lists). It copies every value into memory of its own,
which the kernel has to find and clear first; latents are all but a thousandth of a file. `stored` is the caller.

Source: parquet.thrift of apache/parquet-format (PageHeader, DataPageHeader) and the compact protocol of Apache Thrift.
"""

from __future__ import annotations

import mmap
import zlib
from typing import Any, TypeAlias

import numpy as np
import pyarrow.parquet as pq

# The header of a page without statistics has about 30 bytes.
_HEADER_BYTES = 128
# Types of Thrift's compact protocol, and numbers of fields and values in parquet.thrift.
_STOP, _INT32, _STRUCT = 0, 5, 12
_PAGE_TYPE, _UNCOMPRESSED_BYTES, _STORED_BYTES, _CRC, _DATA_PAGE = 1, 2, 3, 4, 5
_NUM_VALUES, _ENCODING = 1, 2
_IS_DATA_PAGE = _IS_PLAIN = 0
_Struct: TypeAlias = dict[int, Any]


def plain_pages(
    data: memoryview, metadata: pq.FileMetaData, group: int, name: str, *, with_checksums: bool
) -> list[tuple[int, memoryview]] | None:
    """Of each page of a column chunk the number of values, and the values: 4 bytes of length before each.

    All their pages are in memory afterwards, as far as the kernel keeps them there.

    Args:
        data: the whole file.
        with_checksums: compare pages with the CRC-32 in their headers, where there is one.

    Returns:
        None where the chunk is of another kind or not as its headers say; pyarrow says what is wrong with it.
    """
    column = next((i for i in range(metadata.num_columns) if metadata.schema.column(i).path == name), None)
    if column is None:
        return None
    chunk, kind = metadata.row_group(group).column(column), metadata.schema.column(column)
    if chunk.compression != "UNCOMPRESSED" or chunk.physical_type != "BYTE_ARRAY" or chunk.has_dictionary_page:
        return None
    if kind.max_definition_level or kind.max_repetition_level:
        return None
    position, end = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
    pages: list[tuple[int, memoryview]] = []
    while position < end:
        try:
            header, num_bytes = _struct(data[position : position + _HEADER_BYTES], 0)
            start, stop = position + num_bytes, position + num_bytes + header[_STORED_BYTES]
            num_values, encoding = header[_DATA_PAGE][_NUM_VALUES], header[_DATA_PAGE][_ENCODING]
            is_plain = header[_PAGE_TYPE] == _IS_DATA_PAGE and encoding == _IS_PLAIN
            is_whole = header[_STORED_BYTES] == header[_UNCOMPRESSED_BYTES]
        except (ValueError, IndexError, KeyError, TypeError):
            return None
        if not (is_plain and is_whole and start <= stop <= min(end, len(data)) and num_values >= 0):
            return None
        page = data[start:stop]
        if with_checksums and _CRC in header:
            if zlib.crc32(page) != header[_CRC] & 0xFFFFFFFF:
                return None
        else:
            # Who is called in a thread shall wait for the disk there.
            np.frombuffer(page, np.uint8)[:: mmap.PAGESIZE].max(initial=0)
        pages.append((num_values, page))
        position = stop
    return pages


def _struct(data: memoryview, position: int) -> tuple[_Struct, int]:
    """A struct of 32-bit numbers and of such structs, by the numbers of its fields, and where it ends."""
    found: _Struct = {}
    field = 0
    while (head := data[position]) != _STOP:
        position += 1
        if head >> 4 == 0:
            raise ValueError("a field whose number is written out, which no page has")
        field += head >> 4
        if head & 15 == _INT32:
            found[field], position = _int32(data, position)
        elif head & 15 == _STRUCT:
            found[field], position = _struct(data, position)
        else:
            raise ValueError(f"a field of type {head & 15}, which no page of latents has")
    return found, position + 1


def _int32(data: memoryview, position: int) -> tuple[int, int]:
    """A number, seven bits in a byte and zigzag, and where it ends."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return (value >> 1) ^ -(value & 1), position
