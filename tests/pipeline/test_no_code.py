"""Data files that carry code, under whatever name, are read without running it or refused."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from builders import tar_bytes
from latents import manifest, record

from pipeline.errors import DamagedObjectError
from pipeline.format import ShardWriter
from pipeline.stored import read_records


class Gadget:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._path,)


def written(folder: Path, output_format: str) -> Path:
    with ShardWriter(folder, "00000-deadbeef", manifest(), output_format) as writer:
        writer.write(record("a"))
        (file,) = writer.finish()
    return file.path


def with_members(path: Path, replaced: dict[str, bytes]) -> bytes:
    """The tar with some members of its one sample replaced by extension, or added."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    key = members[0][0].partition(".")[0]
    kept = [(name, content) for name, content in members if name.partition(".")[2] not in replaced]
    return tar_bytes([*kept, *((f"{key}.{extension}", content) for extension, content in replaced.items())])


def npy_header(shape: tuple[int, ...], descr: str) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"shape": shape, "fortran_order": False, "descr": descr})
    return buffer.getvalue()


def test_a_gadget_does_what_these_tests_watch_for(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Gadget(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_pickles_in_a_tar_are_never_loaded_whatever_they_are_called(tmp_path: Path) -> None:
    path = written(tmp_path, "webdataset")
    ran = tmp_path / "ran"
    gadget = pickle.dumps(Gadget(ran))
    (row,) = read_records(with_members(path, {"pyd": gadget, "pkl": gadget, "pth": gadget}), "webdataset")
    assert row.latent.dtype.kind == "f"
    assert not row.latent.flags.writeable
    objects = npy_header((1,), "|O") + gadget
    for content in (gadget, objects, npy_header((1 << 40,), "<f4"), npy_header((4,), "<f4") + b"\0", b""):
        with pytest.raises(DamagedObjectError, match=r"no \.npy of floats"):
            list(read_records(with_members(path, {"latent.npy": content}), "webdataset"))
    assert not ran.exists()


def test_a_parquet_file_whose_schema_holds_a_pickle_is_read_without_running_it(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    table = pq.read_table(written(tmp_path, "parquet"))
    payload = {
        b"ARROW:extension:name": b"ray.data.arrow_variable_shaped_tensor",
        b"ARROW:extension:metadata": pickle.dumps(Gadget(ran)),
    }
    place = table.schema.get_field_index("latent")
    schema = table.schema.set(place, table.schema.field(place).with_metadata(payload))
    pq.write_table(table.cast(schema), tmp_path / "hostile.parquet")
    (row,) = read_records((tmp_path / "hostile.parquet").read_bytes())
    assert row.latent.dtype.kind == "f"
    assert not ran.exists()
