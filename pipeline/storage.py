"""Where bytes lie: the output store (a local folder or S3, alike) and the inputs (local, S3, or whatever fsspec opens).

Not where anything is decided: which write counts, and what an unknown outcome means, is `commit`. The only module that
imports botocore and fsspec. `commit` writes and reads outputs through `ObjectStore`; `plan` and `source` read inputs.

S3 is spoken by botocore alone, inputs included, so that there is exactly one retry layer (`S3Store._call`): libraries
that retry on top of each other multiply their requests just when a store asks for fewer. Requests are retried with
full jitter within `RETRY_BUDGET_S`; only `put_if_absent` is sent once, because what follows it must be a look at the
store and not a second write.
"""

from __future__ import annotations

import base64
import glob
import hashlib
import io
import os
import random
import re
import shutil
import stat
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import unquote, urlsplit

import botocore.exceptions
import botocore.session
import fsspec
from botocore.config import Config
from botocore.parsers import ResponseParserError
from fsspec.utils import glob_translate

from pipeline.errors import (
    ObjectExistsError,
    OutcomeUnknownError,
    StorageError,
    StorageNotFoundError,
    StorageUnavailableError,
    UsageError,
)

# An outage or a throttled prefix passes within this; a shard's work is worth waiting for.
RETRY_BUDGET_S = 900.0
# An endpoint that never answered this process is more likely a wrong address than an outage: say so soon.
FIRST_CONTACT_BUDGET_S = 15.0
# Above this a file goes up in parts; S3 itself refuses single uploads above 5 GB.
SINGLE_PUT_BYTES = 1 << 30
PART_BYTES = 128 << 20

_SHORTEST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 20.0
_READ_AHEAD_BYTES = 4 << 20
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """An object of a store; `etag` is None on a local disk."""

    key: str
    num_bytes: int
    etag: str | None


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


class Backoff:
    """Pauses between attempts: full jitter, the limit doubling from 0.1 s to 20 s, until a budget is spent."""

    def __init__(self) -> None:
        self.num_pauses = 0
        self._started = time.monotonic()

    def pause(self, budget_s: float) -> bool:
        """Sleeps, or returns False at once when the pause would end after `budget_s` seconds from the start."""
        # 2**16 is far above the longest pause; the bound only keeps the float finite.
        limit_s = min(_LONGEST_PAUSE_S, _SHORTEST_PAUSE_S * 2 ** min(self.num_pauses, 16))
        pause_s = random.uniform(0, limit_s)
        if time.monotonic() - self._started + pause_s > budget_s:
            return False
        self.num_pauses += 1
        time.sleep(pause_s)
        return True


class ObjectStore(ABC):
    """A root under which bytes lie by key; keys are relative, with slashes, and never lead out of the root.

    Every method raises StorageError for what will fail again (denied, not writable), StorageUnavailableError for what
    may pass. Instances pickle as their URI and may be shared by threads and inherited by forked processes.
    """

    root_uri: str

    def get(self, key: str) -> bytes:
        """The whole object.

        Raises:
            StorageNotFoundError: there is no such object.
        """
        data = self.find(key)
        if data is None:
            raise StorageNotFoundError(f"{self.url(key)} does not exist")
        return data

    @abstractmethod
    def find(self, key: str) -> bytes | None:
        """The whole object, or None where there is none. A missing bucket is an error, not None."""

    @abstractmethod
    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`; fewer only where the object ends.

        Raises:
            StorageNotFoundError: there is no such object.
        """

    @abstractmethod
    def fetch_file(self, key: str, path: Path) -> None:
        """Copies the object to a local file; on failure no file is left. The caller verifies what came.

        Raises:
            StorageNotFoundError: there is no such object.
        """

    @abstractmethod
    def put_file(self, key: str, path: Path, sha256: str) -> None:
        """Stores a local file under a name that holds its hash, whatever was there.

        Nobody sees a part of it. The bytes that arrive are checked against `sha256` (hex) before they count.
        """

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> None:
        """Creates a small object, once and whole. Sent once: `commit.create_once` is what callers want.

        Raises:
            ObjectExistsError: an object stands under the key, possibly this one.
            OutcomeUnknownError: the store did not say what happened.
        """

    @abstractmethod
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """The objects whose keys start with `prefix`, in the order of their keys, straight from the store."""

    @abstractmethod
    def head(self, key: str) -> ObjectInfo | None:
        """What is under a key, or None."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes an object; no error when there is none."""

    @abstractmethod
    def url(self, key: str) -> str:
        """The path or URI of a key, as other tools take it."""

    def __reduce__(self) -> tuple[Callable[[str], ObjectStore], tuple[str]]:
        return open_store, (self.root_uri,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root_uri!r})"


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
            f"{_shown(uri)} cannot hold a dataset: the scheme is {uri.partition('://')[0]!r}; "
            "use a local folder or s3://bucket/prefix"
        )
    bucket, prefix = _split_s3(uri)
    return S3Store(bucket, prefix)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a local file in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _checked(key: str) -> str:
    # Keys come from records, and a dataset may come from anyone.
    if not key or key.startswith("/") or "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise StorageError(f"the key {key!r} is not a plain relative path, so it is not followed")
    return key


class LocalStore(ObjectStore):
    """A folder. Files are written under `.tmp/`, synced, then linked into place: none is ever seen half-written."""

    def __init__(self, root: str) -> None:
        if os.path.exists(root) and not os.path.isdir(root):
            raise UsageError(f"{root} is a file; an output is a folder, which is made when it is missing")
        self.root_uri = root

    def url(self, key: str) -> str:
        return os.path.join(self.root_uri, _checked(key))

    def find(self, key: str) -> bytes | None:
        with self._errors("read", key):
            try:
                return Path(self.url(key)).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self._errors("read", key), open(self.url(key), "rb") as file:
            file.seek(start)
            return file.read(length)

    def fetch_file(self, key: str, path: Path) -> None:
        with self._errors("read", key), open(self.url(key), "rb") as source:
            _copy_or_nothing(source, path)

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        def copy(target: BinaryIO) -> None:
            digest = hashlib.sha256()
            with path.open("rb") as source:
                while block := source.read(1 << 20):
                    digest.update(block)
                    target.write(block)
            if digest.hexdigest() != sha256:
                raise StorageError(
                    f"{path} changed while it was stored as {self.url(key)}: its SHA-256 is not {sha256}"
                )

        with self._errors("write", key), self._temporary(copy) as temporary:
            final = self._in_folder(key)
            os.replace(temporary, final)
            _sync_folder(os.path.dirname(final))

    def put_if_absent(self, key: str, data: bytes) -> None:
        with self._errors("create", key), self._temporary(lambda target: target.write(data)) as temporary:
            final = self._in_folder(key)
            # link() alone creates a finished file under a name that must be free: rename() replaces, and open("x")
            # shows an empty file to whoever looks before the write.
            try:
                os.link(temporary, final)
            except FileExistsError as error:
                raise ObjectExistsError(f"{final} exists already") from error
            _sync_folder(os.path.dirname(final))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        top = os.path.join(self.root_uri, os.path.dirname(prefix))
        found = []
        for folder, folders, names in os.walk(top):
            if os.path.samefile(folder, self.root_uri):
                folders[:] = [name for name in folders if name != ".tmp"]
            found += [os.path.relpath(os.path.join(folder, name), self.root_uri) for name in names]
        for key in sorted(found):
            info = self.head(key) if key.startswith(prefix) else None
            if info is not None:
                yield info

    def head(self, key: str) -> ObjectInfo | None:
        with self._errors("read", key):
            try:
                status = os.stat(self.url(key))
            except (FileNotFoundError, NotADirectoryError):
                return None
        return ObjectInfo(key=key, num_bytes=status.st_size, etag=None) if stat.S_ISREG(status.st_mode) else None

    def delete(self, key: str) -> None:
        with self._errors("delete", key), suppress(FileNotFoundError):
            os.unlink(self.url(key))

    @contextmanager
    def _temporary(self, write: Callable[[BinaryIO], object]) -> Iterator[str]:
        """A written and synced file beside the data; gone afterwards unless it was moved away."""
        path = os.path.join(self.root_uri, ".tmp", uuid.uuid4().hex)
        _make_folder(os.path.dirname(path))
        try:
            with open(path, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)

    def _in_folder(self, key: str) -> str:
        path = self.url(key)
        _make_folder(os.path.dirname(path))
        return path

    @contextmanager
    def _errors(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            if verb == "read":
                raise StorageNotFoundError(f"{self.url(key)} does not exist") from error
            raise StorageError(f"cannot {verb} {self.url(key)}: {error.strerror} ({error.filename})") from error
        except OSError as error:
            raise StorageError(
                f"cannot {verb} {self.url(key)}: {error.strerror or error}; check that {self.root_uri} is a folder on "
                "a disk with hard links and free space, and that you may write there"
            ) from error


def _make_folder(path: str) -> None:
    if not os.path.isdir(path):
        parent = os.path.dirname(path)
        _make_folder(parent)
        with suppress(FileExistsError):
            os.mkdir(path)
        _sync_folder(parent)


def _sync_folder(path: str) -> None:
    # A name is safe from a power cut only when its folder is synced too.
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy_or_nothing(source: BinaryIO, path: Path) -> None:
    try:
        with path.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


_S3_ERRORS = (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError, ResponseParserError)
# The connection failed, or the body that came was short or damaged.
_PASSING_ERRORS = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.FlexibleChecksumError,
    ResponseParserError,
)
_PASSING_CODES = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded")
_EXPIRED_CODES = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired")
_WRONG_REGION_CODES = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")

_answered: set[str] = set()  # endpoints that gave this process any answer


@lru_cache(maxsize=4)
def _client_of(pid: int, environment: tuple[tuple[str, str], ...]) -> Any:
    """A botocore client; its arguments only name the cache entry: connections must not be shared across a fork."""
    session = botocore.session.get_session()
    if session.get_config_variable("region") is None:
        session.set_config_variable("region", os.environ.get("AWS_REGION", "us-east-1"))
    config = Config(
        retries={"total_max_attempts": 1, "mode": "standard"},
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=32,
        tcp_keepalive=True,
        # Every upload states its own SHA-256; stores other than AWS refuse the trailing checksums of "when_supported".
        request_checksum_calculation="when_required",
    )
    # The endpoint comes from AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the profile; where one is set, botocore puts the
    # bucket into the path and not into the host name.
    return session.create_client("s3", config=config)


def _client() -> Any:
    environment = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _client_of(os.getpid(), environment)


class S3Store(ObjectStore):
    """A prefix of a bucket of AWS S3 or of any store that speaks its API."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.root_uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""

    def url(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{_checked(key)}"

    def find(self, key: str) -> bytes | None:
        def attempt(client: Any) -> bytes | None:
            try:
                return cast(bytes, client.get_object(**self._at(key))["Body"].read())
            except botocore.exceptions.ClientError as error:
                if _code(error) == "NoSuchKey":
                    return None
                raise

        return self._call("read", key, attempt)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        if length <= 0:
            return b""

        def attempt(client: Any) -> bytes:
            try:
                answer = client.get_object(**self._at(key), Range=f"bytes={start}-{start + length - 1}")
            except botocore.exceptions.ClientError as error:
                if _code(error) in ("InvalidRange", "416"):
                    return b""
                raise
            data = cast(bytes, answer["Body"].read())
            # A range carries no checksum, and a short body with a matching length header looks whole.
            total = int(answer["ContentRange"].rpartition("/")[2])
            expected = min(length, total - start)
            if len(data) != expected:
                raise botocore.exceptions.IncompleteReadError(actual_bytes=len(data), expected_bytes=expected)
            return data

        return self._call("read", key, attempt)

    def fetch_file(self, key: str, path: Path) -> None:
        def attempt(client: Any) -> None:
            with closing(client.get_object(**self._at(key))["Body"]) as body:
                _copy_or_nothing(body, path)

        self._call("read", key, attempt)

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        num_bytes = path.stat().st_size
        if num_bytes > SINGLE_PUT_BYTES:
            return self._put_parts(key, path, num_bytes)
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()

        def attempt(client: Any) -> None:
            with path.open("rb") as file:
                client.put_object(**self._at(key), Body=file, ContentLength=num_bytes, ChecksumSHA256=checksum)

        self._call("write", key, attempt)

    def _put_parts(self, key: str, path: Path, num_bytes: int) -> None:
        at = self._at(key)
        upload = self._call("write", key, lambda c: c.create_multipart_upload(**at, ChecksumAlgorithm="SHA256"))
        at["UploadId"] = upload["UploadId"]
        try:
            parts: list[dict[str, object]] = []
            with path.open("rb") as file:
                while block := file.read(PART_BYTES):
                    parts.append(self._put_part(key, at, len(parts) + 1, block))
            self._call("write", key, lambda c: c.complete_multipart_upload(**at, MultipartUpload={"Parts": parts}))
        except BaseException as error:
            # The answer to a completion may be lost; repeated, it finds no upload, but the object stands.
            info = self.head(key) if isinstance(error, StorageNotFoundError) else None
            if info is not None and info.num_bytes == num_bytes:
                return
            with suppress(StorageError):
                self._call("abort the upload of", key, lambda c: c.abort_multipart_upload(**at))
            raise

    def _put_part(self, key: str, at: dict[str, str], number: int, block: bytes) -> dict[str, object]:
        checksum = base64.b64encode(hashlib.sha256(block).digest()).decode()

        def attempt(client: Any) -> str:
            answer = client.upload_part(**at, PartNumber=number, Body=block, ChecksumSHA256=checksum)
            return cast(str, answer["ETag"])

        return {"PartNumber": number, "ETag": self._call("write", key, attempt), "ChecksumSHA256": checksum}

    def put_if_absent(self, key: str, data: bytes) -> None:
        checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
        try:
            self._call(
                "create",
                key,
                lambda c: c.put_object(**self._at(key), Body=data, IfNoneMatch="*", ChecksumSHA256=checksum),
                is_sent_once=True,
            )
        except StorageUnavailableError as error:
            raise OutcomeUnknownError(*error.args) from error

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        request = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        while True:
            page = self._call("list", prefix, lambda c: c.list_objects_v2(**request))
            for entry in page.get("Contents", []):
                key = entry["Key"].removeprefix(self._prefix)
                yield ObjectInfo(key=key, num_bytes=entry["Size"], etag=entry.get("ETag", "").strip('"') or None)
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def head(self, key: str) -> ObjectInfo | None:
        def attempt(client: Any) -> ObjectInfo | None:
            try:
                answer = client.head_object(**self._at(key))
            except botocore.exceptions.ClientError as error:
                if _code(error) in ("404", "NoSuchKey", "NotFound"):
                    return None
                raise
            etag = answer.get("ETag", "").strip('"') or None
            return ObjectInfo(key=key, num_bytes=answer["ContentLength"], etag=etag)

        return self._call("read", key, attempt)

    def delete(self, key: str) -> None:
        self._call("delete", key, lambda c: c.delete_object(**self._at(key)))

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + _checked(key)}

    def _call(self, verb: str, key: str, attempt: Callable[[Any], _T], is_sent_once: bool = False) -> _T:
        """Calls until it works, fails for good, or the budget is spent: the one retry layer."""
        backoff = Backoff()
        is_renewed = False
        while True:
            endpoint = ""
            try:
                client = _client()
                endpoint = client.meta.endpoint_url
                answer = attempt(client)
                _answered.add(endpoint)
                return answer
            except _S3_ERRORS as error:
                if isinstance(error, botocore.exceptions.ClientError):
                    _answered.add(endpoint)
                    if _code(error) in _EXPIRED_CODES and not is_renewed:
                        is_renewed = True
                        _client_of.cache_clear()
                        continue
                failure = self._failure(error, f"cannot {verb} s3://{self._bucket}/{self._prefix}{key}", endpoint)
                budget_s = RETRY_BUDGET_S if endpoint in _answered else FIRST_CONTACT_BUDGET_S
                is_passing = isinstance(failure, StorageUnavailableError)
                if not is_passing or is_sent_once or not backoff.pause(budget_s):
                    raise failure from error

    def _failure(self, error: Exception, what: str, endpoint: str) -> StorageError | UsageError:
        """The error for the caller. Says what to check, and never repeats a header, a key or a signature."""
        where = _shown(endpoint)
        if isinstance(error, _PASSING_ERRORS):
            return StorageUnavailableError(
                f"{what}: {where} did not answer properly ({type(error).__name__}); check AWS_ENDPOINT_URL and the "
                "network, or try again later"
            )
        if isinstance(error, botocore.exceptions.ParamValidationError):
            return UsageError(f"{what}: {self._bucket!r} is not a valid bucket name, or the key is not valid")
        if not isinstance(error, botocore.exceptions.ClientError):
            return StorageError(
                f"{what}: no usable credentials ({type(error).__name__}); set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role"
            )
        code, status = _code(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code == "NoSuchBucket":
            return StorageNotFoundError(
                f"{what}: the bucket {self._bucket!r} does not exist at {where}; create it, or correct the URI"
            )
        if status == 412:
            return ObjectExistsError(f"{what}: it exists already")
        if status == 501:
            return StorageError(f"{what}: {where} does not implement this request ({code})")
        if status >= 500 or status in (408, 409, 429) or code in _PASSING_CODES:
            return StorageUnavailableError(f"{what}: {where} answered {status} {code}; try again later")
        if status == 301 or code in _WRONG_REGION_CODES:
            return StorageError(f"{what}: the bucket lies in another region ({code}); set AWS_DEFAULT_REGION to it")
        if status in (401, 403) or code in _EXPIRED_CODES:
            return StorageError(
                f"{what}: denied by {where} ({code}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
                "AWS_SESSION_TOKEN (or AWS_PROFILE), this machine's clock, and that they may s3:GetObject, "
                f"s3:PutObject and s3:ListBucket on {self._bucket!r}"
            )
        if status == 404:
            return StorageNotFoundError(f"{what}: it does not exist ({code})")
        return StorageError(f"{what}: {where} refused it with {status} {code}")


def _code(error: botocore.exceptions.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def list_inputs(uri: str) -> list[InputFile]:
    """The files behind a file, folder (with all below it) or glob, in the order of their URIs.

    Raises:
        StorageNotFoundError: nothing is there.
        UsageError: the scheme cannot be read here.
    """
    files = _list_s3(uri) if uri.startswith("s3://") else _list_fsspec(uri)
    if not files:
        raise StorageNotFoundError(f"no file is at {_shown(uri)}")
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
            raise StorageNotFoundError(f"{_shown(uri)} does not exist")
        return _s3_file(store, found)
    with _input_errors(uri):
        filesystem, path = _filesystem(uri)
        info = filesystem.info(path)
        if info["type"] != "file":
            raise StorageNotFoundError(f"{_shown(uri)} is no file but a {info['type']}")
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
            f"{_shown(uri)} does not name a bucket as s3://bucket/prefix does; credentials belong into the environment "
            "(AWS_ACCESS_KEY_ID, AWS_PROFILE), an endpoint into AWS_ENDPOINT_URL"
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
        raise UsageError(f"{_shown(uri)}: chained URIs are not read; give the file itself")
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
    where = _shown(uri)
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


def _shown(uri: str) -> str:
    """A URI as messages may show it: without user, password and query (presigned URLs carry their secret there)."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"
