"""The videos of a shard: from a tar, or from the files that a slice names, with caption and fields.

Not where shards are cut (`plan`) and not where media are decoded: bytes pass as they are, as open file descriptors.
`actors` gives the iterator to the decode pool.

Every sample comes out once, as a SourceVideo or as the ClipFailure that says why not. What cannot be read for good is
a rejection; what the storage may yet give (a fault, a file that changes) is a StorageError and ends the attempt.

Rules that hold for tars:

* A sample is the run of members with one key. As WebDataset has it, the key ends at the first dot of the base name
  and keeps its folders; members of a sample stand next to each other.
* A picture beside a video of the same key is its poster. Other extensions are passed over.
* The caption is KEY.txt, else the field `caption_column` of KEY.json. A column other than the default "caption" was
  asked for by name, so then the field comes first.
* A damaged tar gives the samples before the damage. The rest, with the sample that the damage may have shortened, is
  one rejection with the key "*".
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import BinaryIO

from pipeline.config import DecodeLimits, EncodingConfig
from pipeline.errors import RejectionError, StorageDeniedError, StorageError, StorageNotFoundError, UsageError
from pipeline.inputs import (
    MEDIA_KINDS,
    REST_OF_TAR,
    FoundVersions,
    SliceEntry,
    TarMember,
    TarStream,
    extension_of,
    key_problem,
    parse_object,
    read_slice,
    recorded_uri,
    version_of,
)
from pipeline.records import ClipFailure, ShardSpec, SourceVideo
from pipeline.storage import (
    InputFile,
    ObjectStore,
    is_web_address,
    open_input,
    open_input_fd,
    stat_input,
    web_is_allowed,
)
from pipeline.store import shown_uri

_DEFAULT_CAPTION_COLUMN = "caption"
# Of a caption or of the JSON beside a video; what is stored is held in memory many at a time.
_LARGEST_TEXT_BYTES = 4 << 20
_TEXT_REASONS = {"txt": "bad_caption", "json": "bad_metadata"}
# Smaller media wait for their decoder in memory, larger ones on disk.
_LARGEST_IN_MEMORY_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 20
# Files of a slice that are opened ahead: enough to hide the latency of a store behind decoding.
_FILES_AHEAD = 8
_DIGESTS = ("sha256", "md5")


def iterate_videos(
    spec: ShardSpec,
    store: ObjectStore,
    encoding: EncodingConfig,
    limits: DecodeLimits,
    found: FoundVersions | None = None,
    open_tar: Callable[[str], BinaryIO] = open_input,
) -> Iterator[SourceVideo | ClipFailure]:
    """The videos and images of a shard in their order, each once, and a failure for each that cannot be had.

    Whoever iterates owns the `media_fd` of what was yielded. Closing the iterator early leaves nothing open.

    Args:
        spec: a shard as planned; of a later generation only the videos come out that it orders.
        store: the output, which holds the slices under plans/.
        encoding: says where the caption is.
        limits: says how large a file may be.
        found: takes down the versions of a slice's files as they are read.
        open_tar: opens the stream of a tar; who reads only the beginning of tars counts and ends it there.

    Raises:
        StorageError: the input could not be read, or changed since it was planned; the shard may be tried again.
        UsageError: a slice holds web addresses, which were allowed when it was planned and are not now.
    """
    keys = None if spec.redo is None or spec.redo.keys is None else frozenset(spec.redo.keys)
    if spec.kind == "tar":
        videos = _tar_videos(spec, encoding.caption_column, limits.max_file_bytes, open_tar)
        return videos if keys is None else _only(videos, keys)
    return _slice_videos(spec, store, encoding.caption_column, limits.max_file_bytes, keys, found or FoundVersions())


def _only(videos: Iterator[SourceVideo | ClipFailure], keys: Collection[str]) -> Iterator[SourceVideo | ClipFailure]:
    for video in videos:
        if video.key in keys:
            yield video
        elif isinstance(video, SourceVideo):
            os.close(video.media_fd)


@dataclass(slots=True, kw_only=True)
class _Media:
    """The bytes of a video or image, open; `descriptor` is None once they are handed over, or were not taken in."""

    name: str
    num_bytes: int
    descriptor: int | None

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


@dataclass(slots=True, kw_only=True)
class _Sample:
    """The members of one key so far. Mutable, because a sample is known only when the next one begins."""

    key: str
    media: dict[str, _Media] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    other_names: list[str] = field(default_factory=list)
    problem: RejectionError | None = None

    def close(self) -> None:
        for media in self.media.values():
            media.close()


def _tar_videos(
    spec: ShardSpec, caption_column: str, max_file_bytes: int, open_tar: Callable[[str], BinaryIO]
) -> Iterator[SourceVideo | ClipFailure]:
    uri = spec.source_uri
    _refuse_changed(spec)
    sample: _Sample | None = None
    seen: set[str] = set()
    with closing(open_tar(uri)) as file:
        tar = TarStream(uri, file, spec.source_size_bytes)
        try:
            for member in tar:
                if member.kind == "folder":
                    continue
                name = member.name.removeprefix("./")
                key, extension = _split(name)
                if sample is None or sample.key != key:
                    ended, sample = sample, _Sample(key=key)
                    if ended is not None:
                        yield _finish(ended, seen, caption_column, max_file_bytes, uri)
                wrong_key = key_problem(key)
                if wrong_key is None:
                    _take_member(sample, tar, member, extension, max_file_bytes)
                elif sample.problem is None:
                    message = f"the member name {_shown(name)} is not allowed: {wrong_key}"
                    sample.problem = RejectionError("bad_member", message)
            if sample is not None:
                ended, sample = sample, None
                yield _finish(ended, seen, caption_column, max_file_bytes, uri)
            _refuse_changed(spec)
        except RejectionError as damage:
            place = f"; lost from the sample {_shown(sample.key)} on" if sample is not None else ""
            yield _failure(
                REST_OF_TAR, damage.reason, f"{spec.shard_id}: the tar is damaged: {damage.message}{place}", uri
            )
        finally:
            if sample is not None:
                sample.close()


def _refuse_changed(spec: ShardSpec) -> None:
    now = stat_input(spec.source_uri)
    planned, found = (spec.source_size_bytes, spec.source_etag), (now.num_bytes, now.etag)
    if planned != found:
        raise StorageError(
            f"shard {spec.shard_id}: {spec.source_uri} changed since it was planned: size and etag were {planned} and "
            f"are {found}; run the job again when it is complete"
        )


def _split(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _take_member(sample: _Sample, tar: TarStream, member: TarMember, extension: str, max_file_bytes: int) -> None:
    if member.kind == "other":
        sample.problem = RejectionError("bad_member", f"{_shown(member.name)} is a link, device or sparse file")
    elif extension in sample.media or extension in sample.texts:
        sample.problem = RejectionError("duplicate_key", f"the sample has two members .{extension}")
    elif extension in MEDIA_KINDS:
        descriptor = _spool(tar, member.num_bytes) if 0 < member.num_bytes <= max_file_bytes else None
        sample.media[extension] = _Media(name=member.name, num_bytes=member.num_bytes, descriptor=descriptor)
    elif extension in _TEXT_REASONS:
        if member.num_bytes > _LARGEST_TEXT_BYTES:
            sample.problem = _too_large(
                member.name, member.num_bytes, _LARGEST_TEXT_BYTES, reason=_TEXT_REASONS[extension]
            )
        sample.texts[extension] = tar.read(member.num_bytes) if sample.problem is None else b""
    else:
        sample.other_names.append(member.name)


def _spool(tar: TarStream, num_bytes: int) -> int:
    """The content of the current member as a readable, seekable descriptor without a name."""
    try:
        if num_bytes <= _LARGEST_IN_MEMORY_BYTES:
            descriptor = os.memfd_create("latentmill-media", os.MFD_CLOEXEC)
        else:
            with tempfile.TemporaryFile() as unnamed:
                descriptor = os.dup(unnamed.fileno())
        try:
            with open(descriptor, "wb", closefd=False) as spool:
                while block := tar.read(_BLOCK_BYTES):
                    spool.write(block)
            os.lseek(descriptor, 0, os.SEEK_SET)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise StorageError(
            f"a tar member of {num_bytes} bytes cannot be kept for its decoder: {error}; make room in "
            f"{tempfile.gettempdir()}, or set TMPDIR"
        ) from error
    return descriptor


def _finish(
    sample: _Sample, seen: set[str], caption_column: str, max_file_bytes: int, tar_uri: str
) -> SourceVideo | ClipFailure:
    """What became of a sample whose last member has passed."""
    try:
        if sample.problem is not None:
            raise sample.problem
        if sample.key in seen:
            raise RejectionError(
                "duplicate_key", "the shard has this key before; members of a sample must stand next to each other"
            )
        media = _chosen(sample)
        fields = parse_object(sample.texts["json"]) if "json" in sample.texts else {}
        if fields.get("key") == sample.key:
            del fields["key"]
        return _video(
            key=sample.key,
            media=media,
            extension=extension_of(media.name),
            txt=sample.texts.get("txt"),
            fields=fields,
            caption_column=caption_column,
            max_file_bytes=max_file_bytes,
            source_uri=f"{tar_uri}#{media.name}",
        )
    except RejectionError as error:
        # A key that is not allowed may be as long as a mebibyte.
        return _failure(sample.key, error.reason, error.message, f"{tar_uri}#{sample.key[:200]}")
    finally:
        seen.add(sample.key)
        sample.close()


def _chosen(sample: _Sample) -> _Media:
    videos = [media for extension, media in sample.media.items() if MEDIA_KINDS[extension] == "video"]
    candidates = videos or list(sample.media.values())
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        names = " and ".join(_shown(media.name) for media in candidates)
        raise RejectionError("duplicate_key", f"the sample has {names}, and nothing says which one is meant")
    if any(extension_of(name) in MEDIA_KINDS for name in sample.other_names):
        raise RejectionError(
            "bad_member", f"a tar member's key ends at the first dot, so {_shown(sample.other_names[0])} has no key"
        )
    if sample.texts:
        raise RejectionError("not_found", f"the sample has .{', .'.join(sample.texts)} and no video or image")
    raise RejectionError("not_allowed", f"{_shown(sample.other_names[0])} is no video or image by its extension")


def _slice_videos(
    spec: ShardSpec,
    store: ObjectStore,
    caption_column: str,
    max_file_bytes: int,
    keys: Collection[str] | None,
    found: FoundVersions,
) -> Iterator[SourceVideo | ClipFailure]:
    entries = read_slice(store, spec).entries
    _refuse_forgotten_flag(spec, entries)
    first_with_key = {entry.key: number for number, entry in reversed(list(enumerate(entries)))}
    opened: deque[Future[SourceVideo | ClipFailure]] = deque()
    with ThreadPoolExecutor(_FILES_AHEAD, thread_name_prefix="open-ahead") as pool:
        try:
            for number, entry in enumerate(entries):
                if keys is not None and _stored_key(entry.key) not in keys:
                    continue
                is_first = first_with_key[entry.key] == number
                opened.append(pool.submit(_open_entry, entry, spec, is_first, caption_column, max_file_bytes, found))
                if len(opened) == _FILES_AHEAD:
                    yield opened.popleft().result()
            while opened:
                yield opened.popleft().result()
        finally:
            for left in opened:
                _close_unused(left)


def _refuse_forgotten_flag(spec: ShardSpec, entries: Sequence[SliceEntry]) -> None:
    """A plan that was made without the flag holds the rejection of a web address, one with it the bare address."""
    if not web_is_allowed() and any(entry.problem is None and is_web_address(entry.uri) for entry in entries):
        raise UsageError(
            f"shard {spec.shard_id} was planned with --allow-http and holds web addresses; give --allow-http again, "
            "or they would be rejected for good"
        )


def _close_unused(future: Future[SourceVideo | ClipFailure]) -> None:
    if future.cancel() or future.exception() is not None:
        return
    unused = future.result()
    if isinstance(unused, SourceVideo):
        os.close(unused.media_fd)


def _open_entry(
    entry: SliceEntry,
    spec: ShardSpec,
    is_first: bool,
    caption_column: str,
    max_file_bytes: int,
    found: FoundVersions,
) -> SourceVideo | ClipFailure:
    media: _Media | None = None
    try:
        if entry.problem is not None:
            raise RejectionError(*entry.problem)
        if not is_first:
            raise RejectionError("duplicate_key", "an earlier row of the shard has this key")
        extension = extension_of(entry.uri)
        if extension not in MEDIA_KINDS:
            raise RejectionError("not_allowed", f"{_shown(shown_uri(entry.uri))} is no video or image by its extension")
        info = stat_input(entry.uri)
        found.note(entry, version_of(info, _stat_beside(entry.txt_uri), _stat_beside(entry.json_uri)))
        media = _open_media(info, max_file_bytes)
        fields = dict(entry.fields)
        if entry.json_uri is not None:
            fields = parse_object(_text(entry.json_uri))
        return _video(
            key=entry.key,
            media=media,
            extension=extension,
            txt=_text(entry.txt_uri) if entry.txt_uri is not None else None,
            fields=fields,
            caption_column=caption_column,
            max_file_bytes=max_file_bytes,
            source_uri=entry.uri,
        )
    except RejectionError as error:
        return _failure(entry.key, error.reason, error.message, entry.uri or spec.source_uri)
    except StorageNotFoundError as error:
        return _failure(entry.key, "not_found", str(error), entry.uri)
    except StorageDeniedError as error:
        message = f"{error}; make it readable to this user and encode it into another output"
        return _failure(entry.key, "unreadable", message, entry.uri)
    except UsageError as error:
        # One row with an address that no store takes must not end the run.
        return _failure(entry.key, "not_allowed", str(error), entry.uri)
    finally:
        if media is not None:
            media.close()


def _stat_beside(uri: str | None) -> InputFile | None:
    try:
        return None if uri is None else stat_input(uri)
    except (StorageNotFoundError, StorageDeniedError):
        return None  # reading it says what is wrong


def _open_media(info: InputFile, max_file_bytes: int) -> _Media:
    # What is not local is copied when it is opened, so its size is looked at before.
    if info.num_bytes is not None and not 0 < info.num_bytes <= max_file_bytes:
        return _Media(name=info.uri, num_bytes=info.num_bytes, descriptor=None)
    descriptor = open_input_fd(info.uri)
    return _Media(name=info.uri, num_bytes=os.fstat(descriptor).st_size, descriptor=descriptor)


def _text(uri: str) -> bytes:
    with closing(open_input(uri)) as file:
        try:
            data = file.read(_LARGEST_TEXT_BYTES + 1)
        except OSError as error:
            raise StorageError(f"{uri} cannot be read: {error}") from error
    if len(data) > _LARGEST_TEXT_BYTES:
        raise RejectionError(
            _TEXT_REASONS[extension_of(uri)],
            f"{_shown(uri)} has more than the {_LARGEST_TEXT_BYTES} bytes that are allowed",
        )
    return data


def _video(
    *,
    key: str,
    media: _Media,
    extension: str,
    txt: bytes | None,
    fields: dict[str, object],
    caption_column: str,
    max_file_bytes: int,
    source_uri: str,
) -> SourceVideo:
    """The finished video, which takes the descriptor out of `media`; RejectionError where there can be none."""
    if media.num_bytes == 0:
        raise RejectionError("empty_file", f"{_shown(media.name)} has no bytes")
    if media.num_bytes > max_file_bytes:
        raise _too_large(media.name, media.num_bytes, max_file_bytes)
    assert media.descriptor is not None, "media within the limits are open"
    caption = _take_caption(txt, fields, caption_column)
    _check_digest(media, media.descriptor, fields)
    descriptor, media.descriptor = media.descriptor, None
    return SourceVideo(
        key=key,
        media_fd=descriptor,
        num_bytes=media.num_bytes,
        extension=extension,
        media_kind=MEDIA_KINDS[extension],
        caption=caption,
        fields=fields,
        source_uri=_storable(recorded_uri(source_uri)),
    )


def _take_caption(txt: bytes | None, fields: dict[str, object], caption_column: str) -> str:
    """The caption, out of `fields` if it came from there or says the same."""
    try:
        caption = txt.decode("utf-8") if txt is not None else ""
        given = fields.get(caption_column)
        if given is not None and (not caption or caption_column != _DEFAULT_CAPTION_COLUMN):
            if isinstance(given, (list, dict)):
                raise RejectionError(
                    "bad_caption", f"the field {caption_column!r} holds a {type(given).__name__}, not a text"
                )
            caption = given if isinstance(given, str) else json.dumps(given)
            caption.encode("utf-8")
    except UnicodeDecodeError as error:
        raise RejectionError("bad_caption", f"the .txt is not UTF-8: {error.reason} at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise RejectionError(
            "bad_caption", f"the caption is no Unicode text: {error.reason} at character {error.start}"
        ) from error
    if fields.get(caption_column) in (None, caption):
        fields.pop(caption_column, None)
    return caption


def _check_digest(media: _Media, descriptor: int, fields: Mapping[str, object]) -> None:
    # img2dataset states the digest of what it downloaded, before it resized and encoded that again; it also states the
    # original size then. Such a digest says nothing of these bytes.
    if "original_width" in fields:
        return
    for name in _DIGESTS:
        stated = fields.get(name)
        digest = hashlib.new(name, usedforsecurity=False)
        if not isinstance(stated, str) or len(stated) != 2 * digest.digest_size:
            continue
        offset = 0
        while block := os.pread(descriptor, _BLOCK_BYTES, offset):
            digest.update(block)
            offset += len(block)
        if digest.hexdigest() != stated.lower():
            raise RejectionError(
                "digest_mismatch", f"{_shown(media.name)} has the {name} {digest.hexdigest()}, and {stated} is stated"
            )


def _too_large(name: str, num_bytes: int, limit: int, *, reason: str = "too_large") -> RejectionError:
    return RejectionError(reason, f"{_shown(name)} has {num_bytes} bytes and at most {limit} are allowed")


def _failure(key: str, reason: str, message: str, source_uri: str) -> ClipFailure:
    return ClipFailure(
        key=_stored_key(key),
        clip_index=None,
        step="source",
        reason=reason,
        message=_storable(message),
        source_uri=_storable(recorded_uri(source_uri)),
    )


def _stored_key(key: str) -> str:
    """The key as a rejection states it: one that is not allowed may be anything."""
    return key if key.isprintable() and len(key) <= 200 else ascii(key)[1:-1][:200]


def _storable(text: str) -> str:
    """Text that UTF-8 can hold: file names may have bytes that are no text."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _shown(name: str) -> str:
    text = repr(name)
    return text if len(text) <= 200 else text[:200] + "..."
