"""S3 as an object store, spoken by botocore alone, so that there is exactly one retry layer (`S3Store._call`).

Libraries that retry on top of each other multiply their requests just when a store asks for fewer. Here requests are
repeated with full jitter within `store.RETRY_BUDGET_S`; only `put_if_absent` is sent once, because what follows it must
be a look at the store and not a second write. All threads of a process share one pace, which gives way as soon as the
store asks for fewer requests. Not where anything is decided. Used by `storage`.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import botocore.exceptions
import botocore.session
from botocore.config import Config
from botocore.parsers import ResponseParserError

from pipeline.errors import (
    CredentialsExpiredError,
    ObjectExistsError,
    OutcomeUnknownError,
    StorageError,
    StorageNotFoundError,
    StorageUnavailableError,
    UsageError,
)
from pipeline.store import (
    Backoff,
    ObjectInfo,
    ObjectStore,
    Pace,
    Steps,
    StoreErrors,
    checked_key,
    copy_or_nothing,
    shown_uri,
)

# An endpoint that never answered this process is more likely a wrong address than an outage: say so soon.
FIRST_CONTACT_BUDGET_S = 15.0
# Without a byte; a body that stalls on the way is then asked for again.
READ_TIMEOUT_S = 60.0
# Above this a file goes up in parts; S3 itself refuses single uploads above 5 GB.
SINGLE_PUT_BYTES = 1 << 30
PART_BYTES = 128 << 20

_T = TypeVar("_T")

_S3_ERRORS = (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError, ResponseParserError)
# The connection failed, or the body that came was short or damaged.
_PASSING_ERRORS = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.FlexibleChecksumError,
    ResponseParserError,
)
_SLOW_DOWN_CODES = ("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded")
_PASSING_CODES = (*_SLOW_DOWN_CODES, "RequestTimeout")
_EXPIRED_CODES = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired")
_WRONG_REGION_CODES = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")

_answered: set[str] = set()  # endpoints that gave this process any answer
_pace = Pace()


@lru_cache(maxsize=4)
def _client_of(pid: int, environment: tuple[tuple[str, str], ...]) -> Any:
    """A botocore client; its arguments only name the cache entry: connections must not be shared across a fork."""
    session = botocore.session.get_session()
    if session.get_config_variable("region") is None:
        session.set_config_variable("region", os.environ.get("AWS_REGION", "us-east-1"))
    config = Config(
        retries={"total_max_attempts": 1, "mode": "standard"},
        connect_timeout=5,
        read_timeout=READ_TIMEOUT_S,
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
        return f"s3://{self._bucket}/{self._prefix}{checked_key(key)}"

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
                copy_or_nothing(body, path)

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

    def region(self) -> str | None:
        """Where the bucket lies, asked once; None where the store does not say."""
        try:
            found = _client().head_bucket(Bucket=self._bucket).get("BucketRegion")
        except _S3_ERRORS:
            return None
        return cast(str, found) if found else None

    def delete(self, key: str) -> None:
        self._call("delete", key, lambda c: c.delete_object(**self._at(key)))

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + checked_key(key)}

    def _call(self, verb: str, key: str, attempt: Callable[[Any], _T], is_sent_once: bool = False) -> _T:
        """Calls until it works, fails for good, or the budget is spent: the one retry layer."""
        backoff = Backoff()
        is_renewed = False
        while True:
            endpoint = ""
            try:
                client = _client()
                endpoint = client.meta.endpoint_url
                _pace.wait()
                answer = attempt(client)
                _answered.add(endpoint)
                _pace.faster()
                Steps.note()
                return answer
            except _S3_ERRORS as error:
                if isinstance(error, botocore.exceptions.ClientError):
                    _answered.add(endpoint)
                    if _asks_for_fewer(error):
                        _pace.slower()
                    if _is_denied(error) and not is_renewed:
                        # Keys are exchanged while a job runs; the new ones may be there already.
                        is_renewed = True
                        StoreErrors.note(is_repeated=True)
                        _client_of.cache_clear()
                        continue
                failure = self._failure(error, f"cannot {verb} s3://{self._bucket}/{self._prefix}{key}", endpoint)
                budget_s = None if endpoint in _answered else FIRST_CONTACT_BUDGET_S
                is_passing = isinstance(failure, StorageUnavailableError)
                is_repeated = is_passing and not is_sent_once and backoff.pause(budget_s)
                if not isinstance(failure, ObjectExistsError | StorageNotFoundError):
                    StoreErrors.note(is_repeated=is_repeated)
                if not is_repeated:
                    raise failure from error

    def _failure(self, error: Exception, what: str, endpoint: str) -> StorageError | UsageError:
        """The error for the caller. Says what to check, and never repeats a header, a key or a signature."""
        where = shown_uri(endpoint)
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
        code, status = _code(error), _status(error)
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
            denied = CredentialsExpiredError if code in _EXPIRED_CODES else StorageError
            return denied(
                f"{what}: denied by {where} ({code}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
                "AWS_SESSION_TOKEN (or AWS_PROFILE), this machine's clock, and that they may s3:GetObject, "
                f"s3:PutObject and s3:ListBucket on {self._bucket!r}"
            )
        if status == 404:
            return StorageNotFoundError(f"{what}: it does not exist ({code})")
        return StorageError(f"{what}: {where} refused it with {status} {code}")


def _code(error: botocore.exceptions.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: botocore.exceptions.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _asks_for_fewer(error: botocore.exceptions.ClientError) -> bool:
    return _status(error) in (429, 503) or _code(error) in _SLOW_DOWN_CODES


def _is_denied(error: botocore.exceptions.ClientError) -> bool:
    return _status(error) in (401, 403) or _code(error) in _EXPIRED_CODES
