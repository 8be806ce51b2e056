"""The door to storage: opens the store of an output, and reads inputs from a local disk, S3 or what fsspec opens.

Not where bytes are written (`store`, `s3`) nor where anything is decided (`commit`). `plan` and `source` read inputs
here; everyone opens outputs here. S3 inputs take the same road as outputs, with its one retry layer; fsspec, whose S3
has layers of its own, opens other object stores; `web` fetches http(s), where that is allowed.
"""

from __future__ import annotations

import errno
import glob
import io
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

import fsspec
from fsspec.utils import glob_translate

from pipeline.errors import (
    StorageDeniedError,
    StorageError,
    StorageNotFoundError,
    StorageUnavailableError,
    UsageError,
)
from pipeline.packed import Packed, PackedSort
from pipeline.s3 import S3Store
from pipeline.store import LocalStore, ObjectInfo, ObjectStore, RangeReader, copy_blocks, sha256_of_file, shown_uri
from pipeline.web import fetch

__all__ = [
    "InputFile",
    "ObjectInfo",
    "ObjectStore",
    "allow_web_inputs",
    "is_web_address",
    "list_inputs",
    "open_input",
    "open_input_fd",
    "open_store",
    "region_of",
    "sha256_of_file",
    "stat_input",
    "web_is_allowed",
]

_READ_AHEAD_BYTES = 4 << 20
# Object stores whose host is not for the address to choose: an input may come from anyone.
_FSSPEC_SCHEMES = ("gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "hf")
_largest_web_bytes: int | None = None


def allow_web_inputs(largest_bytes: int | None) -> None:
    """Lets this process read http:// and https:// files of at most so many bytes; None, as at the start: none."""
    global _largest_web_bytes
    _largest_web_bytes = largest_bytes


def is_web_address(uri: str) -> bool:
    """Whether a file is read only where `allow_web_inputs` has allowed it."""
    return re.match(r"https?://", uri, re.IGNORECASE) is not None


def web_is_allowed() -> bool:
    """Whether `allow_web_inputs` has allowed them."""
    return _largest_web_bytes is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """A file of the input as its store lists it.

    Attributes:
        uri: an absolute local path, or a URI with its scheme.
        num_bytes: None where a store does not say, and of a local link that leads nowhere.
        etag: of a file on a local disk its time of change, "mtime-" and nanoseconds; None where a store has none.
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
    return S3Store(bucket, prefix.strip("/"))


def region_of(uri: str) -> str | None:
    """The region of the bucket of an S3 URI, as its store states it; None of all else, and where it does not."""
    if not uri.startswith("s3://"):
        return None
    return _InputBucket(_split_s3(uri)[0], "").region()


def list_inputs(uri: str) -> Packed[InputFile]:
    """The files behind a file, folder (with all below it) or glob, in the order of their URIs: 29 bytes each.

    On a local disk links are followed. One that leads nowhere is listed without a size, so that it is missed by name.

    Raises:
        StorageNotFoundError: nothing is there.
        UsageError: the scheme cannot be read here.
    """
    local = _local_path(uri)
    files: Iterable[InputFile]
    if local is not None:
        files = _list_local(local)
    elif uri.startswith("s3://"):
        files = _list_s3(uri)
    elif is_web_address(uri):
        if "?" in uri:
            raise UsageError(f"{shown_uri(uri)}: what follows the ? would stand in every record; name it in a table")
        files = [stat_input(uri)]
    else:
        files = _list_fsspec(uri)
    found = PackedSort(files, key=lambda file: file.uri).packed()
    if not found:
        raise StorageNotFoundError(f"no file is at {shown_uri(uri)}")
    return found


def _list_s3(uri: str) -> Iterable[InputFile]:
    store, key = _s3_input(uri.rstrip("/"))
    info = store.head(key) if key else None
    if info is not None:
        return [_s3_file(store, info)]
    is_pattern = glob.has_magic(key)
    literal = re.split(r"[*?[]", key, maxsplit=1)[0] if is_pattern else f"{key}/" if key else ""
    pattern = re.compile(glob_translate(key) if is_pattern else "")
    listed = (info for info in store.list(literal) if pattern.match(info.key))
    # A key that ends in a slash is what some tools leave to mark a folder.
    return (_s3_file(store, info) for info in listed if not info.key.endswith("/"))


def _list_local(path: str) -> Iterable[InputFile]:
    if os.path.isdir(path):
        return _walk(path)
    if os.path.exists(path) or not glob.has_magic(path):
        with _input_errors(path):
            return [_local_file(path, os.stat(path))]
    root = re.split(r"/[^/]*[*?[]", path, maxsplit=1)[0] or "/"
    if not os.path.isdir(root):
        return []
    # What lies deeper than the pattern cannot match, and a glob just below / must not read the whole disk.
    max_depth = None if "**" in path else path.count("/") - root.rstrip("/").count("/")
    with _input_errors(path):
        pattern = re.compile(glob_translate(path))
    return (file for file in _walk(root, max_depth) if pattern.match(file.uri))


def _walk(root: str, max_depth: int | None = None) -> Iterator[InputFile]:
    """The files below a folder, links followed. A folder is not entered again below itself, so that walks end."""
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [(root, frozenset())]
    while pending:
        folder, above = pending.pop()
        # A folder may go while its neighbours are read; one that may not be read is an error, or its files are missed.
        with _input_errors(folder), suppress(FileNotFoundError), os.scandir(folder) as entries:
            itself = os.stat(folder)
            identity = (itself.st_dev, itself.st_ino)
            if identity in above:
                continue
            for entry in entries:
                try:
                    status = entry.stat()
                except OSError:
                    yield InputFile(uri=entry.path, num_bytes=None, etag=None)
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield _local_file(entry.path, status)
                elif stat.S_ISDIR(status.st_mode) and (max_depth is None or len(above) + 1 < max_depth):
                    pending.append((entry.path, above | {identity}))


def _list_fsspec(uri: str) -> Iterable[InputFile]:
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
    if is_web_address(uri):
        _web_limit(uri)
        # Known once it is fetched: servers answer questions about size as they like.
        return InputFile(uri=uri, num_bytes=None, etag=None)
    local = _local_path(uri)
    with _input_errors(uri):
        if local is not None:
            return _local_file(local, os.stat(local))
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
        info = store.head(key)
        if info is None:
            raise StorageNotFoundError(f"{store.url(key)} does not exist")
        return cast(BinaryIO, io.BufferedReader(RangeReader(store, key, info.num_bytes), _READ_AHEAD_BYTES))
    if is_web_address(uri):
        return os.fdopen(fetch(uri, _web_limit(uri)), "rb")
    local = _local_path(uri)
    with _input_errors(uri):
        if local is not None:
            return open(local, "rb")
        filesystem, path = _filesystem(uri)
        return cast(BinaryIO, filesystem.open(path, "rb"))


def open_input_fd(uri: str) -> int:
    """A read-only file descriptor over one input file; what is not local is copied to an unnamed temporary file first.

    The caller closes it.

    Raises:
        StorageNotFoundError: there is no such file.
        StorageDeniedError: it is local and may not be read.
    """
    if is_web_address(uri):
        return fetch(uri, _web_limit(uri))
    local = _local_path(uri)
    with _input_errors(uri):
        if local is not None:
            # O_NONBLOCK keeps a named pipe from stopping the job before it is found not to be a file.
            descriptor = os.open(local, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise StorageNotFoundError(f"{local} is not a regular file")
            return descriptor
        with open_input(uri) as source, _temporary_file(uri) as spool:
            copy_blocks(source, spool)
            spool.flush()
            os.lseek(spool.fileno(), 0, os.SEEK_SET)
            return os.dup(spool.fileno())


def _temporary_file(uri: str) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        # A temporary folder that is missing must not pass for an input that is.
        raise StorageError(
            f"{shown_uri(uri)} cannot be kept on the disk: {error.strerror or error}; make room in the temporary "
            "folder, or set TMPDIR"
        ) from error


def _local_path(uri: str) -> str | None:
    """The absolute path of a local URI, or None for another scheme."""
    if not uri:
        raise UsageError("an empty URI names nothing; give a folder, a file or s3://bucket/prefix")
    if uri.startswith("file://"):
        return os.path.abspath(unquote(urlsplit(uri).path))
    return None if re.match(r"[A-Za-z][\w+.-]*:(//|:)", uri) else os.path.abspath(uri)


def _web_limit(uri: str) -> int:
    if _largest_web_bytes is None:
        raise UsageError(f"{shown_uri(uri)} is a web address; they are read with --allow-http only")
    return _largest_web_bytes


def _split_s3(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket or "@" in bucket or ":" in bucket:
        raise UsageError(
            f"{shown_uri(uri)} does not name a bucket as s3://bucket/prefix does; credentials belong into the "
            "environment (AWS_ACCESS_KEY_ID, AWS_PROFILE), an endpoint into AWS_ENDPOINT_URL"
        )
    return bucket, key


class _InputBucket(S3Store):
    """A bucket that is only read. Its keys are of others' making: "a//b" is a plain key to S3, as is "a/./b"."""

    def url(self, key: str) -> str:
        return f"{self.root_uri}/{key}"

    def _at(self, key: str) -> dict[str, str]:
        # Servers and proxies may resolve dots, and lead out of the bucket then.
        if any(part in (".", "..") for part in key.split("/")):
            raise StorageError(f"{self.url(key)} has a part '.' or '..' in its key and is not read; rename the object")
        return {"Bucket": self._bucket, "Key": key}


def _s3_input(uri: str) -> tuple[S3Store, str]:
    bucket, key = _split_s3(uri)
    return _InputBucket(bucket, ""), key


def _local_file(path: str, status: os.stat_result) -> InputFile:
    if not stat.S_ISREG(status.st_mode):
        raise StorageNotFoundError(f"{path} is not a regular file")
    return InputFile(uri=path, num_bytes=status.st_size, etag=f"mtime-{status.st_mtime_ns}")


def _s3_file(store: S3Store, info: ObjectInfo) -> InputFile:
    return InputFile(uri=store.url(info.key), num_bytes=info.num_bytes, etag=info.etag)


def _filesystem(uri: str) -> tuple[Any, str]:
    if "::" in uri:
        raise UsageError(f"{shown_uri(uri)}: chained URIs are not read; give the file itself")
    scheme = uri.partition("://")[0]
    if scheme not in _FSSPEC_SCHEMES:
        allowed = ", ".join(("s3", *_FSSPEC_SCHEMES))
        raise UsageError(f"{shown_uri(uri)}: {scheme}: addresses are not read; use a local path or one of {allowed}")
    filesystem, path = fsspec.url_to_fs(uri, use_listings_cache=False)
    return filesystem, path


def _fsspec_file(filesystem: Any, info: dict[str, Any]) -> InputFile:
    etag = info.get("ETag") or info.get("etag")
    return InputFile(
        uri=filesystem.unstrip_protocol(info["name"]),
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
        # Elsewhere than on a disk it is mostly the credentials, which deny all files alike.
        kind = StorageError if _local_path(uri) is None else StorageDeniedError
        raise kind(f"{where} may not be read: {error.strerror or type(error).__name__}") from error
    except (ImportError, ValueError) as error:
        raise UsageError(f"{where} cannot be read here: {error}") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StorageNotFoundError(f"{where} is a link that leads to itself") from error
        raise StorageUnavailableError(f"{where} cannot be read: {type(error).__name__}; try again later") from error
