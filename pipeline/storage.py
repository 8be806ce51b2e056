"""The door to storage: opens the store of an output, and reads inputs from a local disk, S3 or what fsspec opens.

Not where bytes are written (`store`, `s3`) nor where anything is decided (`commit`). `plan` and `source` read inputs
here; everyone opens outputs here. S3 inputs take the same road as outputs, with its one retry layer; fsspec, whose S3
has layers of its own, opens the other schemes.
"""

from __future__ import annotations

import glob
import io
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

import fsspec
from fsspec.utils import glob_translate

from pipeline.errors import StorageError, StorageNotFoundError, StorageUnavailableError, UsageError
from pipeline.s3 import S3Store
from pipeline.store import LocalStore, ObjectInfo, ObjectStore, sha256_of_file, shown_uri

__all__ = [
    "InputFile",
    "ObjectInfo",
    "ObjectStore",
    "list_inputs",
    "open_input",
    "open_input_fd",
    "open_store",
    "sha256_of_file",
    "stat_input",
]

_READ_AHEAD_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """A file of the input as its store lists it.

    Attributes:
        uri: an absolute local path, or a URI with its scheme.
        num_bytes: None where a web server does not say.
        etag: None where the store has none (a local disk).
    """

    uri: str
    num_bytes: int | None
    etag: str | None


def open_store(uri: str) -> ObjectStore:
    """The store of an output URI: a local folder (path or file://) or s3://bucket/prefix. Touches nothing yet.

    Raises:
        UsageError: another scheme, no bucket, credentials in the URI, or a local path that is a file.
    """
    local = _local_path(uri)
    if local is not None:
        return LocalStore(local)
    if not uri.startswith("s3://"):
        raise UsageError(
            f"{shown_uri(uri)} cannot hold a dataset: the scheme is {uri.partition('://')[0]!r}; "
            "use a local folder or s3://bucket/prefix"
        )
    bucket, prefix = _split_s3(uri)
    return S3Store(bucket, prefix)


def list_inputs(uri: str) -> list[InputFile]:
    """The files behind a file, folder (with all below it) or glob, in the order of their URIs.

    Raises:
        StorageNotFoundError: nothing is there.
        UsageError: the scheme cannot be read here.
    """
    files = _list_s3(uri) if uri.startswith("s3://") else _list_fsspec(uri)
    if not files:
        raise StorageNotFoundError(f"no file is at {shown_uri(uri)}")
    return sorted(files, key=lambda file: file.uri)


def _list_s3(uri: str) -> list[InputFile]:
    store, key = _s3_input(uri)
    info = store.head(key) if key else None
    if info is not None:
        return [_s3_file(store, info)]
    if not glob.has_magic(key):
        return [_s3_file(store, info) for info in store.list(f"{key}/" if key else "") if not info.key.endswith("/")]
    pattern = re.compile(glob_translate(key))
    literal = re.split(r"[*?[]", key, maxsplit=1)[0]
    return [_s3_file(store, info) for info in store.list(literal) if pattern.match(info.key)]


def _list_fsspec(uri: str) -> list[InputFile]:
    with _input_errors(uri):
        filesystem, path = _filesystem(uri)
        try:
            info = filesystem.info(path)
        except FileNotFoundError:
            found = filesystem.glob(path, detail=True) if glob.has_magic(path) else {}
        else:
            found = filesystem.find(path, detail=True) if info["type"] == "directory" else {path: info}
        return [_fsspec_file(filesystem, info) for info in found.values() if info["type"] == "file"]


def stat_input(uri: str) -> InputFile:
    """Size and etag of one input file.

    Raises:
        StorageNotFoundError: there is no such file.
    """
    if uri.startswith("s3://"):
        store, key = _s3_input(uri)
        found = store.head(key)
        if found is None:
            raise StorageNotFoundError(f"{shown_uri(uri)} does not exist")
        return _s3_file(store, found)
    with _input_errors(uri):
        filesystem, path = _filesystem(uri)
        info = filesystem.info(path)
        if info["type"] != "file":
            raise StorageNotFoundError(f"{shown_uri(uri)} is no file but a {info['type']}")
        return _fsspec_file(filesystem, info)


def open_input(uri: str) -> BinaryIO:
    """A readable, seekable stream over one input file; errors while reading are StorageError for S3, OSError else.

    Raises:
        StorageNotFoundError: there is no such file.
    """
    if uri.startswith("s3://"):
        store, key = _s3_input(uri)
        return cast(BinaryIO, io.BufferedReader(_S3Reader(store, key), _READ_AHEAD_BYTES))
    with _input_errors(uri):
        filesystem, path = _filesystem(uri)
        return cast(BinaryIO, filesystem.open(path, "rb"))


def open_input_fd(uri: str) -> int:
    """A read-only file descriptor over one input file; what is not local is copied to an unnamed temporary file first.

    The caller closes it.

    Raises:
        StorageNotFoundError: there is no such file.
    """
    local = _local_path(uri)
    with _input_errors(uri):
        if local is not None:
            # O_NONBLOCK keeps a named pipe from stopping the job before it is found not to be a file.
            descriptor = os.open(local, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise StorageNotFoundError(f"{local} is not a regular file")
            return descriptor
        with open_input(uri) as source, tempfile.TemporaryFile() as spool:
            shutil.copyfileobj(source, spool, _READ_AHEAD_BYTES)
            spool.flush()
            os.lseek(spool.fileno(), 0, os.SEEK_SET)
            return os.dup(spool.fileno())


class _S3Reader(io.RawIOBase):
    """An object as a file, by ranges: each goes through the store's own retries and length check."""

    def __init__(self, store: S3Store, key: str) -> None:
        info = store.head(key)
        if info is None:
            raise StorageNotFoundError(f"{store.url(key)} does not exist")
        self._store, self._key, self._num_bytes, self._position = store, key, info.num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._num_bytes}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._num_bytes - self._position)
        if length <= 0:
            return 0
        data = self._store.get_range(self._key, self._position, length)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _local_path(uri: str) -> str | None:
    """The absolute path of a local URI, or None for another scheme."""
    if not uri:
        raise UsageError("an empty URI names nothing; give a folder, a file or s3://bucket/prefix")
    if uri.startswith("file://"):
        return os.path.abspath(unquote(urlsplit(uri).path))
    return None if re.match(r"[A-Za-z][\w+.-]*:(//|:)", uri) else os.path.abspath(uri)


def _split_s3(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket or "@" in bucket or ":" in bucket:
        raise UsageError(
            f"{shown_uri(uri)} does not name a bucket as s3://bucket/prefix does; credentials belong into the "
            "environment (AWS_ACCESS_KEY_ID, AWS_PROFILE), an endpoint into AWS_ENDPOINT_URL"
        )
    return bucket, key.strip("/")


def _s3_input(uri: str) -> tuple[S3Store, str]:
    bucket, key = _split_s3(uri)
    return S3Store(bucket, ""), key


def _s3_file(store: S3Store, info: ObjectInfo) -> InputFile:
    return InputFile(uri=store.url(info.key), num_bytes=info.num_bytes, etag=info.etag)


def _filesystem(uri: str) -> tuple[Any, str]:
    local = _local_path(uri)
    if local is not None:
        return fsspec.filesystem("file"), local
    if "::" in uri:
        raise UsageError(f"{shown_uri(uri)}: chained URIs are not read; give the file itself")
    filesystem, path = fsspec.url_to_fs(uri, use_listings_cache=False)
    return filesystem, path


def _fsspec_file(filesystem: Any, info: dict[str, Any]) -> InputFile:
    is_local = "file" in filesystem.protocol
    etag = info.get("ETag") or info.get("etag")
    return InputFile(
        uri=info["name"] if is_local else filesystem.unstrip_protocol(info["name"]),
        num_bytes=info.get("size"),
        etag=str(etag).strip('"') if etag else None,
    )


@contextmanager
def _input_errors(uri: str) -> Iterator[None]:
    where = shown_uri(uri)
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StorageNotFoundError(f"{where} does not exist") from error
    except PermissionError as error:
        raise StorageError(f"{where} may not be read: {error.strerror or type(error).__name__}") from error
    except (ImportError, ValueError) as error:
        raise UsageError(f"{where} cannot be read here: {error}") from error
    except OSError as error:
        raise StorageUnavailableError(f"{where} cannot be read: {type(error).__name__}; try again later") from error
