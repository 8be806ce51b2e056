"""The object store as the pipeline sees it, and a local folder as one.

Not S3 (that is `s3`), and not where anything is decided: which write counts, and what an unknown outcome means, is
`commit`. Used by `s3`, `storage` and `commit`.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import random
import re
import stat
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, ClassVar

from pipeline.errors import ObjectExistsError, StorageError, StorageNotFoundError, UsageError
from pipeline.packed import PackedSort

# An outage or a throttled prefix passes within this; a shard's work is worth waiting for.
RETRY_BUDGET_S = 900.0
_SHORTEST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 20.0
# Of all threads of a process together, once a store has asked for fewer requests.
_SLOWEST_PER_S = 0.1
_FASTEST_PER_S = 64.0
_FASTER_PER_S = 0.5
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """An object of a store; `etag` is None on a local disk."""

    key: str
    num_bytes: int
    etag: str | None


class Steps:
    """Counts what this process gets done, so that it is not held for hanging.

    Attributes:
        num_of_process: videos, clips, records, blocks read, parts stored, pauses of retries and signs of life of
            decoders. Threads may lose some of them to each other; what matters is that the number grows.
    """

    num_of_process: ClassVar[int] = 0

    @classmethod
    def note(cls) -> None:
        """Counts one."""
        cls.num_of_process += 1


class StoreErrors:
    """Counts the requests to object stores that failed in this process, for the metrics of the run.

    That something does not exist, or exists already, is an answer and no failure. Threads may lose some counts to
    each other.
    """

    num_repeated: ClassVar[int] = 0
    num_given_up: ClassVar[int] = 0

    @classmethod
    def note(cls, *, is_repeated: bool) -> None:
        """Counts one."""
        if is_repeated:
            cls.num_repeated += 1
        else:
            cls.num_given_up += 1


class Backoff:
    """Pauses between attempts: full jitter, the limit doubling from 0.1 s to 20 s, until a budget is spent."""

    def __init__(self) -> None:
        self.num_pauses = 0
        self._started = time.monotonic()

    def pause(self, budget_s: float | None = None) -> bool:
        """Sleeps, or returns False at once when the pause would end after the budget (default RETRY_BUDGET_S)."""
        # 2**16 is far above the longest pause; the bound only keeps the float finite.
        limit_s = min(_LONGEST_PAUSE_S, _SHORTEST_PAUSE_S * 2 ** min(self.num_pauses, 16))
        pause_s = random.uniform(0, limit_s)
        if time.monotonic() - self._started + pause_s > (RETRY_BUDGET_S if budget_s is None else budget_s):
            return False
        self.num_pauses += 1
        Steps.note()
        time.sleep(pause_s)
        return True


class Pace:
    """The rate of requests that the threads of a process share: free until a store asks for fewer.

    Then it is halved, at most once a second, and every answer that is well adds to it until it is free again: the rule
    by which TCP shares a line (additive increase, multiplicative decrease).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._per_s: float | None = None
        self._next_at = 0.0
        self._slowed_at = float("-inf")

    def wait(self) -> None:
        """Sleeps until it is this request's turn."""
        with self._lock:
            if self._per_s is None:
                return
            now = time.monotonic()
            turn_at = max(now, self._next_at)
            self._next_at = turn_at + 1 / self._per_s
        if turn_at > now:
            time.sleep(turn_at - now)

    def slower(self) -> None:
        """The store asked for fewer requests."""
        with self._lock:
            now = time.monotonic()
            if now - self._slowed_at >= 1:
                self._slowed_at = now
                self._per_s = max(_SLOWEST_PER_S, (_FASTEST_PER_S if self._per_s is None else self._per_s) / 2)

    def faster(self) -> None:
        """The store answered well."""
        if self._per_s is None:
            return
        with self._lock:
            per_s = _FASTEST_PER_S if self._per_s is None else self._per_s + _FASTER_PER_S
            self._per_s = None if per_s >= _FASTEST_PER_S else per_s


class ObjectStore(ABC):
    """A root under which bytes lie by key; keys are relative, with slashes, and never lead out of the root.

    Every method raises StorageError for what will fail again (denied, not writable), StorageUnavailableError for what
    may pass. Instances hold no connection: they pickle, and may be shared by threads and
    inherited by forked processes.
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

    def left_behind(self) -> Iterator[ObjectInfo]:
        """What writers that are gone left half-written where no list shows it; none where there is no such place."""
        return iter(())

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes an object; no error when there is none."""

    @abstractmethod
    def url(self, key: str) -> str:
        """The path or URI of a key, as other tools take it."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root_uri!r})"


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a local file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shown_uri(uri: str) -> str:
    """A URI as messages may show it: without user, password and query (presigned URLs carry their secret there)."""
    return re.sub(r"\?.*=.*", "", re.sub(r"://[^/]*@", "://", uri)) if "://" in uri else uri


def checked_key(key: str) -> str:
    # Keys come from records, and a dataset may come from anyone.
    if not key or key.startswith("/") or "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise StorageError(f"the key {key!r} is not a plain relative path, so it is not followed")
    return key


class RangeReader(io.RawIOBase):
    """An object as a file, by ranges: each goes through the store's own retries and length check.

    Args:
        num_bytes: of the whole object.
    """

    def __init__(self, store: ObjectStore, key: str, num_bytes: int) -> None:
        self._store, self._key, self._num_bytes, self._position = store, key, num_bytes, 0

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


class LocalStore(ObjectStore):
    """A folder. Files are written under `.tmp/`, synced, then linked into place: none is ever seen half-written."""

    def __init__(self, root: str) -> None:
        if os.path.exists(root) and not os.path.isdir(root):
            raise UsageError(f"{root} is a file; an output is a folder, which is made when it is missing")
        self.root_uri = root

    def url(self, key: str) -> str:
        return os.path.join(self.root_uri, checked_key(key))

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
            copy_or_nothing(source, path)

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        def copy(target: BinaryIO) -> None:
            digest = hashlib.sha256()
            with path.open("rb") as source:
                while block := source.read(_BLOCK_BYTES):
                    digest.update(block)
                    target.write(block)
                    Steps.note()
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
        def refuse(error: OSError) -> None:
            # os.walk() would pass over a folder that may not be read, and its shards would count as not done.
            if not isinstance(error, FileNotFoundError):
                raise error

        found = PackedSort[str]()
        with self._errors("list", prefix):
            top = os.path.normpath(os.path.join(self.root_uri, os.path.dirname(prefix)))
            for folder, folders, names in os.walk(top, onerror=refuse):
                if folder == self.root_uri:
                    folders[:] = [name for name in folders if name != ".tmp"]
                for name in names:
                    found.add(os.path.relpath(os.path.join(folder, name), self.root_uri))
        for key in found:
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
            with _locked_file(path) as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                yield path
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)

    def left_behind(self) -> Iterator[ObjectInfo]:
        folder = os.path.join(self.root_uri, ".tmp")
        with suppress(FileNotFoundError):
            for name in sorted(os.listdir(folder)):
                # A writer holds a lock on its file for as long as it lives; where locks do not work, nothing is said.
                with suppress(OSError), open(os.path.join(folder, name), "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    yield ObjectInfo(key=f".tmp/{name}", num_bytes=os.fstat(file.fileno()).st_size, etag=None)

    def _in_folder(self, key: str) -> str:
        path = self.url(key)
        _make_folder(os.path.dirname(path))
        return path

    @contextmanager
    def _errors(self, verb: str, key: str) -> Iterator[None]:
        where = os.path.join(self.root_uri, key)
        try:
            yield
        except FileNotFoundError as error:
            if verb == "read":
                raise StorageNotFoundError(f"{where} does not exist") from error
            raise StorageError(f"cannot {verb} {where}: {error.strerror} ({error.filename})") from error
        except OSError as error:
            raise StorageError(
                f"cannot {verb} {where}: {error.strerror or error}; check that {self.root_uri} is a folder on a disk "
                "with hard links and free space, and that you may write there"
            ) from error


@contextmanager
def _locked_file(path: str) -> Iterator[BinaryIO]:
    """A new file, locked so that others see that its writer lives; some network disks have no locks."""
    while True:
        with open(path, "xb") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever collects what is left behind may have found it before it was locked.
            if os.fstat(file.fileno()).st_nlink:
                yield file
                return


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


def copy_blocks(source: BinaryIO, target: IO[bytes]) -> None:
    """Copies to the end, each block a step."""
    while block := source.read(_BLOCK_BYTES):
        target.write(block)
        Steps.note()


def copy_or_nothing(source: BinaryIO, path: Path) -> None:
    try:
        with path.open("wb") as target:
            copy_blocks(source, target)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
