"""What the files of an input are: which names are media, which keys are allowed, how a slice and a tar are read.

Not where shards are cut (`plan`) and not where videos are made of files (`source`); both stand on this.

A tar is read front to back and strictly. Python's `tarfile` and everything built on it take a damaged header for the
end of the archive and say nothing; here whatever is not a whole archive is said to be damaged, with the byte where.
Members are never extracted to a path.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import BinaryIO, Literal, cast

import pyarrow as pa

from pipeline.errors import DamagedObjectError, RejectionError, StorageError, StorageUnavailableError
from pipeline.records import MediaKind, ShardSpec
from pipeline.storage import InputFile, ObjectStore
from pipeline.store import Steps, shown_uri

# What counts as media here; whether it can be decoded is for the decoder to say, in a rejection that people can see.
_VIDEOS = ("mp4", "m4v", "mov", "webm", "mkv", "avi", "mpg", "mpeg", "ts", "m2ts", "3gp", "flv", "wmv", "ogv")
_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
MEDIA_KINDS: Mapping[str, MediaKind] = {**dict.fromkeys(_VIDEOS, "video"), **dict.fromkeys(_IMAGES, "image")}
# Of a tar, by the end of its name.
COMPRESSIONS: Mapping[str, Literal["none", "gzip", "zstd"]] = {
    ".tar": "none",
    ".tar.gz": "gzip",
    ".tgz": "gzip",
    ".tar.zst": "zstd",
}

# The key of the rejection that stands for all that could not be read of a damaged tar.
REST_OF_TAR = "*"
_BLOCK_BYTES = 512
_READ_BYTES = 1 << 20
_LONGEST_NAME = 200
_DEEPEST_JSON = 64
_LONGEST_EXTENSION_BYTES = 1 << 20
# Media hardly compress, so an archive that swells more than this is made to fill disks. The first part is free:
# a small archive of texts may well compress a thousandfold.
_FREE_EXPANSION_BYTES = 256 << 20
_LARGEST_EXPANSION = 100


def extension_of(name: str) -> str:
    """What follows the last dot of the base name, in lower case; "" without a dot. A web address ends at its query."""
    if name.startswith(("http://", "https://")):
        name = name.partition("#")[0].partition("?")[0]
    base = name.rpartition("/")[2]
    return base.rpartition(".")[2].lower() if "." in base else ""


def recorded_uri(uri: str) -> str:
    """An address as plans and records may state it: signed ones are keys to what they name, some hold passwords."""
    is_key_of_bucket = uri.startswith("s3://") and "@" not in uri.split("/")[2]
    return uri if is_key_of_bucket else shown_uri(uri)


def tar_suffix(uri: str) -> str | None:
    """The end of a tar's name, a key of `COMPRESSIONS`; None for what is no tar."""
    return next((suffix for suffix in COMPRESSIONS if uri.lower().endswith(suffix)), None)


def key_problem(key: str) -> str | None:
    """Why a key is not allowed, or None.

    A key is a relative path in printable characters, so that it is harmless as a file name wherever it is written.
    Folders inside a key are allowed: "train/00017".
    """
    if not key or not key.rpartition("/")[2]:
        return "it is empty"
    if len(key) > _LONGEST_NAME:
        return f"it has {len(key)} characters and at most {_LONGEST_NAME} are allowed"
    if not key.isprintable():
        return "it has control characters or bytes that are not UTF-8"
    if key.startswith("/") or "\\" in key or any(part in ("", ".", "..") for part in key.split("/")):
        return "it is absolute, leads out of its folder, or has a backslash"
    return None


def parse_object(data: bytes) -> dict[str, object]:
    """The JSON object that a sidecar or a row holds.

    Raises:
        RejectionError: reason `bad_metadata`; it does not parse, is no object, or is nested so deeply that whoever
            writes it again would fail.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RejectionError("bad_metadata", f"the JSON does not parse: {error}") from error
    if not isinstance(value, dict):
        raise RejectionError("bad_metadata", f"the JSON holds a {type(value).__name__}, not an object")
    if _is_deeper(value, _DEEPEST_JSON):
        raise RejectionError("bad_metadata", f"the JSON is nested more than {_DEEPEST_JSON} levels deep")
    return value


def _is_deeper(value: object, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(v, levels - 1) for v in inner)


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceEntry:
    """One video or image of a slice.

    Attributes:
        key: unique in the slice, unless the input itself repeats it.
        uri: an absolute local path or a URI with its scheme; "" where the row names none.
        fields: the columns of the row by their own names, JSON-safe; empty for files of a folder.
        txt_uri, json_uri: the files beside it, None where there are none.
        problem: (reason, message) of the rejection that planning already knows of.
        version: `version_of` its files when it was planned; None where planning does not look at them, as in tables.
    """

    key: str
    uri: str
    fields: Mapping[str, object] = field(default_factory=dict)
    txt_uri: str | None = None
    json_uri: str | None = None
    problem: tuple[str, str] | None = None
    version: str | None = None


def version_of(media: InputFile | None, *beside: InputFile | None) -> str:
    """What tells the files of a sample from others under the same names: size and etag, or time of change, of each.

    Args:
        media: None where there is none.
        beside: its .txt and its .json, in this order.
    """
    files = [media, *beside]
    return "|".join("-" if f is None or f.num_bytes is None else f"{f.num_bytes}:{f.etag or ''}" for f in files)


class FoundVersions:
    """The versions of a slice's files as they were read, kept as far as the plan does not say the same.

    Attributes:
        changes: URI -> version, of files that were not as planned.
    """

    def __init__(self) -> None:
        self.changes: dict[str, str] = {}
        self._unplanned: dict[str, str] = {}

    def note(self, entry: SliceEntry, version: str) -> None:
        """Takes down the version of an entry that was read; safe from several threads."""
        if entry.version is None:
            self._unplanned[entry.uri] = version
        elif entry.version != version:
            self.changes[entry.uri] = version

    @property
    def digest(self) -> str | None:
        """Of the versions that no plan holds; None where there are none."""
        return digest_of_versions(self._unplanned) if self._unplanned else None


def digest_of_versions(versions: Mapping[str, str]) -> str:
    """32 hex digits for URI -> version, whatever the order."""
    text = json.dumps(sorted(versions.items()))
    return f"files-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def is_other_version(then: tuple[int | None, str | None], now: tuple[int | None, str | None]) -> bool:
    """Whether two pairs of size and etag are of different files; what is not known of one is not compared."""
    return any(a is not None and b is not None and a != b for a, b in zip(then, now, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A shard of a table or folder as it stands under plans/.

    Attributes:
        source: the `source_uri` of its ShardSpec.
        columns: of the table, name -> "bool" | "int64" | "float64" | "string" | "" (anything else); empty where the
            input has no schema.
    """

    source: str
    columns: Mapping[str, str]
    entries: Sequence[SliceEntry]

    def to_bytes(self) -> bytes:
        """The same bytes for the same slice, ASCII, so that text that is no Unicode survives too."""
        entries = [{name: value for name, value in asdict(entry).items() if value} for entry in self.entries]
        document = {"version": 1, "source": self.source, "columns": dict(self.columns), "entries": entries}
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def slice_digest(data: bytes) -> str:
    """The 16 hex digits of a slice's SHA-256 that end its name."""
    return hashlib.sha256(data).hexdigest()[:16]


def read_slice(store: ObjectStore, spec: ShardSpec) -> Slice:
    """The slice that a shard was planned as.

    Raises:
        DamagedObjectError: the object is not the one that was planned.
        StorageError: it could not be read.
    """
    assert spec.plan_key is not None, f"shard {spec.shard_id} is a {spec.kind} and has no plan"
    data = store.get(spec.plan_key)
    if not spec.plan_key.endswith(f"-{slice_digest(data)}.json"):
        raise DamagedObjectError(
            f"shard {spec.shard_id}: {store.url(spec.plan_key)} does not have the hash in its name; restore it, or "
            "encode into a new output"
        )
    document = json.loads(data)
    entries = [
        SliceEntry(
            **{"key": "", "uri": "", **entry, "problem": tuple(entry["problem"]) if "problem" in entry else None}
        )
        for entry in document["entries"]
    ]
    return Slice(source=document["source"], columns=document["columns"], entries=entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class TarMember:
    """The header of a member; kind "other" is a link, device, pipe or sparse file."""

    name: str
    num_bytes: int
    kind: Literal["file", "folder", "other"]


class TarStream:
    """The members of a tar, in order, from a stream that is read once.

    Iterate for the headers; `read` gives the content of the member that came last, as far as it is wanted.

    Args:
        uri: of the archive; the end of its name says how it is compressed.
        raw: the stream as stored; not closed here.
        num_bytes: size of the archive as stored, where known.

    Raises (all while iterating or reading):
        RejectionError: reason `damaged_shard`; nothing after this place can be read.
        StorageError: the bytes could not be fetched, or the archive grew while it was read.
        StorageUnavailableError: the stream ended before `num_bytes`.
    """

    def __init__(self, uri: str, raw: BinaryIO, num_bytes: int | None) -> None:
        self._stored = _StoredBytes(uri, raw, num_bytes)
        compression = COMPRESSIONS[tar_suffix(uri) or ".tar"]
        self._is_compressed = compression != "none"
        self._stream = cast(BinaryIO, self._stored)
        if self._is_compressed:
            self._stream = pa.CompressedInputStream(pa.PythonFile(self._stored, mode="r"), compression)
        self._position = 0
        self._member = ""
        self._num_left = 0
        self._num_padding = 0

    @property
    def num_bytes_read(self) -> int:
        """Bytes of the uncompressed archive that went by."""
        return self._position

    def __iter__(self) -> Iterator[TarMember]:
        while True:
            member = self._next_member()
            if member is None:
                self._finish()
                return
            yield member

    def read(self, length: int) -> bytes:
        """At most `length` further bytes of the member that came last; b"" at its end."""
        wanted = min(length, self._num_left)
        data = self._take(wanted)
        if len(data) < wanted:
            raise _damaged(f"it is cut inside the member {self._member!r}, at byte {self._position}")
        self._num_left -= len(data)
        return data

    def _next_member(self) -> TarMember | None:
        long_name: str | None = None
        pax: dict[str, str] = {}
        while True:
            self._skip_rest()
            header = self._next_header()
            if header is None:
                return None
            if header.type == tarfile.XHDTYPE:
                pax = self._read_pax(header)
            elif header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = self._read_extension(header).rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif header.type in (tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGLINK):
                self._start(header.name, header.size)
            else:
                return self._member_of(header, pax, long_name)

    def _member_of(self, header: tarfile.TarInfo, pax: Mapping[str, str], long_name: str | None) -> TarMember:
        name = pax.get("path", long_name if long_name is not None else header.name).rstrip("/")
        size = self._pax_size(pax["size"]) if "size" in pax else header.size
        is_sparse = header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in pax)
        # Only members without content may state a size that means nothing.
        has_content = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
        self._start(name, size if has_content else 0)
        if header.isdir():
            return TarMember(name=name, num_bytes=0, kind="folder")
        is_file = header.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not is_sparse
        return TarMember(name=name, num_bytes=self._num_left, kind="file" if is_file else "other")

    def _next_header(self) -> tarfile.TarInfo | None:
        at = self._position
        block = self._take(_BLOCK_BYTES)
        if not block:
            raise _damaged(f"it ends at byte {at} without the mark of the end, so it is cut")
        if len(block) < _BLOCK_BYTES:
            raise _damaged(f"it is cut inside the header at byte {at}")
        if not any(block):
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise _damaged(f"the header at byte {at} is not one of a tar ({error})") from error
        if header.type == tarfile.GNUTYPE_SPARSE:
            self._skip_sparse_map(block)
        return header

    def _skip_sparse_map(self, header: bytes) -> None:
        is_extended = header[482]
        while is_extended:
            block = self._take(_BLOCK_BYTES)
            if len(block) < _BLOCK_BYTES:
                raise _damaged(f"it is cut inside a sparse map, at byte {self._position}")
            is_extended = block[504]

    def _start(self, name: str, size: int) -> None:
        if size < 0:
            raise _damaged(f"the member {_short(name)!r} before byte {self._position} states {size} bytes")
        self._member = _short(name)
        self._num_left = size
        self._num_padding = -size % _BLOCK_BYTES

    def _read_extension(self, header: tarfile.TarInfo) -> bytes:
        if header.size > _LONGEST_EXTENSION_BYTES:
            raise _damaged(
                f"the extended header before byte {self._position} states {header.size} bytes and at most "
                f"{_LONGEST_EXTENSION_BYTES} are allowed"
            )
        self._start(header.name, header.size)
        return self.read(header.size)

    def _read_pax(self, header: tarfile.TarInfo) -> dict[str, str]:
        data = self._read_extension(header)
        values: dict[str, str] = {}
        while data.rstrip(b"\0"):
            length_text, space, _ = data.partition(b" ")
            length = int(length_text) if length_text.isdigit() and len(length_text) < 8 else 0
            key, equals, value = data[len(length_text) + 1 : length - 1].partition(b"=")
            if not space or not equals or length > len(data) or data[length - 1 : length] != b"\n":
                raise _damaged(f"the extended header before byte {self._position} does not parse")
            values[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
            data = data[length:]
        return values

    def _pax_size(self, text: str) -> int:
        if not text.isdecimal() or len(text) > 19:
            raise _damaged(f"an extended header before byte {self._position} states the size {_short(text)!r}")
        return int(text)

    def _skip_rest(self) -> None:
        while self._num_left:
            self.read(_READ_BYTES)
        if len(self._take(self._num_padding)) < self._num_padding:
            raise _damaged(f"it is cut behind the member {self._member!r}, at byte {self._position}")
        self._num_padding = 0

    def _finish(self) -> None:
        # A hole of zeros over a header looks like the end, but something follows it.
        while block := self._read(_READ_BYTES):
            if any(block):
                raise _damaged(f"data follows the mark of the end, before byte {self._position}")
        if self._position % _BLOCK_BYTES:
            # Every tar consists of whole blocks; where the end was cut out, the zeros behind it still look like one.
            raise _damaged(
                f"its {self._position} bytes are no whole number of blocks of {_BLOCK_BYTES}, so bytes are missing"
            )
        self._stored.check_end()

    def _take(self, length: int) -> bytes:
        parts = []
        while length:
            block = self._read(min(length, _READ_BYTES))
            if not block:
                break
            parts.append(block)
            length -= len(block)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read(self, length: int) -> bytes:
        try:
            block = self._stream.read(length)
        except (OSError, pa.ArrowException) as error:
            # Storage faults are no OSError here, so this is the decompressor.
            raise _damaged(f"it does not decompress after byte {self._position}: {error}") from error
        self._position += len(block)
        allowed = _FREE_EXPANSION_BYTES + _LARGEST_EXPANSION * self._stored.num_bytes_read
        if self._is_compressed and self._position > allowed:
            raise _damaged(
                f"its first {self._stored.num_bytes_read} bytes decompress to more than {allowed}, "
                f"over {_LARGEST_EXPANSION} times as many"
            )
        return block


class _StoredBytes(io.RawIOBase):
    """A stream that counts, and that tells a fault of the storage from damage in what is stored."""

    def __init__(self, uri: str, raw: BinaryIO, num_bytes: int | None) -> None:
        self.num_bytes_read = 0
        self._uri = uri
        self._raw = raw
        self._num_bytes = num_bytes

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        try:
            block = self._raw.read(size)
        except OSError as error:
            raise StorageError(f"{self._uri} cannot be read after byte {self.num_bytes_read}: {error}") from error
        self.num_bytes_read += len(block)
        Steps.note()
        if size and not block and self._num_bytes is not None and self.num_bytes_read < self._num_bytes:
            raise StorageUnavailableError(
                f"{self._uri} ended after {self.num_bytes_read} of {self._num_bytes} bytes; trying again is safe"
            )
        return block

    def check_end(self) -> None:
        if self._num_bytes is not None and self.num_bytes_read > self._num_bytes:
            raise StorageError(
                f"{self._uri} has more than the {self._num_bytes} bytes that it had when it was opened: "
                "it changes while it is read; run the job again when it is complete"
            )


def _damaged(message: str) -> RejectionError:
    return RejectionError("damaged_shard", message)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "..."
