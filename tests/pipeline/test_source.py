"""Every sample of a shard comes out once: as its bytes with caption and fields, or as the reason why not."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from builders import CLIP_STILLS, CLIP_VIDEOS, clip_members, tar_bytes
from conftest import SeaweedFS
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.config import DecodeLimits, EncodingConfig, SourceConfig
from pipeline.errors import DamagedObjectError, RejectionError, StorageError, StorageUnavailableError
from pipeline.inputs import TarStream
from pipeline.plan import plan_shards
from pipeline.records import ClipFailure, ShardSpec, SourceVideo
from pipeline.source import iterate_videos
from pipeline.storage import open_store, stat_input

GOOD = CLIP_VIDEOS[0].read_bytes()
STILL = CLIP_STILLS[0].read_bytes()
NAMES = ("a.mp4", "a.txt", "b.mp4", "b.txt", "c.mp4", "c.txt")
THREE = [(name, b"bytes of %s" % name.encode().ljust(1991, b".")) for name in NAMES]


@dataclass(frozen=True)
class Drained:
    """What an iterator gave, with the descriptors read and closed."""

    videos: dict[str, SourceVideo]
    content: dict[str, bytes]
    failures: list[ClipFailure]

    @property
    def reasons(self) -> dict[str, str]:
        return {failure.key: failure.reason for failure in self.failures}


def drain(entries: Iterable[SourceVideo | ClipFailure]) -> Drained:
    drained = Drained({}, {}, [])
    for entry in entries:
        if isinstance(entry, ClipFailure):
            assert (entry.clip_index, entry.step) == (None, "source")
            drained.failures.append(entry)
            continue
        assert entry.key not in drained.videos
        with open(entry.media_fd, "rb") as media:
            drained.content[entry.key] = media.read()
        assert entry.num_bytes == len(drained.content[entry.key])
        drained.videos[entry.key] = entry
    return drained


def tar_spec(uri: str) -> ShardSpec:
    info = stat_input(uri)
    return ShardSpec(
        shard_id="00000-0badcafe",
        source_uri=uri,
        kind="tar",
        plan_key=None,
        source_size_bytes=info.num_bytes,
        source_etag=info.etag,
        num_videos=None,
    )


def read_tar(path: Path, data: bytes, *, caption_column: str = "caption", max_file_bytes: int = 10**9) -> Drained:
    path.write_bytes(data)
    encoding = EncodingConfig(model="small", caption_column=caption_column)
    limits = DecodeLimits(max_file_bytes=max_file_bytes)
    store = open_store(str(path.parent / "output"))
    before = set(os.listdir("/proc/self/fd"))
    drained = drain(iterate_videos(tar_spec(str(path)), store, encoding, limits))
    assert set(os.listdir("/proc/self/fd")) <= before, "a descriptor was left open"
    return drained


def read_input(uri: Path | str, output: Path | str, **config: object) -> Drained:
    source = SourceConfig(input=str(uri), **config)  # type: ignore[arg-type]
    store = open_store(str(output))
    shards = plan_shards(source, store)
    entries = [iterate_videos(spec, store, EncodingConfig(model="small"), DecodeLimits()) for spec in shards]
    return drain(entry for shard in entries for entry in shard)


def member(name: str, kind: bytes = tarfile.REGTYPE, *, size: int = 0, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info


def tar_of(*members: tarfile.TarInfo | tuple[str, bytes]) -> bytes:
    """A tar of members that `tar_bytes` does not make: headers without content, and files (name, content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for entry in members:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                tar.addfile(member(entry[0], size=len(entry[1])), io.BytesIO(entry[1]))
    return buffer.getvalue()


def gnu_tar_with_raw_size(size_field: bytes, *, kind: bytes = tarfile.REGTYPE) -> bytes:
    header = bytearray(member("b.mp4", kind).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = size_field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return tar_bytes(THREE[:2])[: 2 * 2560] + bytes(header) + bytes(1024)


def compressed(data: bytes, suffix: str) -> bytes:
    if suffix == ".tar.zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    return data if suffix == ".tar" else gzip.compress(data)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.zst"])
def test_a_tar_gives_the_bytes_caption_and_fields_of_every_sample(tmp_path: Path, suffix: str) -> None:
    clips = {"train/000000000": CLIP_VIDEOS[0], "train/000000001": CLIP_STILLS[0], "000000002": CLIP_VIDEOS[1]}
    members = [pair for key, path in clips.items() for pair in clip_members(path, key)]
    drained = read_tar(tmp_path / f"00000{suffix}", compressed(tar_bytes(members), suffix))
    assert not drained.failures
    assert drained.content == {key: path.read_bytes() for key, path in clips.items()}
    for key, path in clips.items():
        video = drained.videos[key]
        assert video.caption == path.with_suffix(".txt").read_text(encoding="utf-8")
        assert video.fields == json.loads(path.with_suffix(".json").read_bytes())
        assert video.extension == path.suffix[1:]
        assert video.media_kind == ("video" if path in CLIP_VIDEOS else "image")
        assert video.source_uri == f"{tmp_path}/00000{suffix}#{key}{path.suffix}"


def test_large_media_are_kept_on_disk_and_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.source._LARGEST_IN_MEMORY_BYTES", 1000)
    assert read_tar(tmp_path / "a.tar", tar_bytes([("a.mp4", GOOD)])).content == {"a": GOOD}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_are_read_in_every_tar_format(tmp_path: Path, form: int) -> None:
    name = f"./{'folder-' * 12}/{'k' * 90}.MP4"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        tar.addfile(member("./", tarfile.DIRTYPE))
        tar.addfile(member(name, size=len(GOOD)), io.BytesIO(GOOD))
    drained = read_tar(tmp_path / "a.tar", buffer.getvalue())
    assert drained.content == {name[2:-4]: GOOD}


TAR = tar_bytes(THREE)
# A member of `THREE` takes a header and 2,000 bytes of content in four blocks, 2,560 bytes in all.
CUTS = {
    "inside a header": (3 * 2560 + 100, ["a"]),
    "inside a member": (4 * 2560 + 700, ["a", "b"]),
    "between the members of a sample": (3 * 2560, ["a"]),
    "between samples": (4 * 2560, ["a"]),
    "before the mark of the end": (6 * 2560, ["a", "b"]),
    "at the very start": (0, []),
}


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.zst"])
def test_a_truncated_tar_keeps_what_came_before(tmp_path: Path, cut: str, suffix: str) -> None:
    length, kept = CUTS[cut]
    drained = read_tar(tmp_path / f"a{suffix}", compressed(TAR[:length], suffix))
    assert list(drained.videos) == kept
    assert drained.reasons == {"*": "damaged_shard"}
    assert str(length - length % 512) in drained.failures[0].message or "cut inside" in drained.failures[0].message


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.zst"])
def test_a_compressed_tar_that_is_cut_is_damaged(tmp_path: Path, suffix: str) -> None:
    data = compressed(tar_bytes([(f"{i}.mp4", os.urandom(200_000)) for i in range(5)]), suffix)
    drained = read_tar(tmp_path / f"a{suffix}", data[: len(data) // 2])
    assert 0 < len(drained.videos) < 5
    assert drained.reasons == {"*": "damaged_shard"}


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_tar_whose_end_was_cut_out_is_not_taken_for_a_shorter_one(tmp_path: Path, suffix: str) -> None:
    """The zeros at its end look like the mark of the end; that they are no whole blocks gives it away."""
    cut_out = TAR[: 4 * 2560] + TAR[6 * 2560 + 77 :]
    assert not any(cut_out[4 * 2560 :])
    drained = read_tar(tmp_path / f"a{suffix}", compressed(cut_out, suffix))
    assert (list(drained.videos), drained.reasons) == (["a"], {"*": "damaged_shard"})
    assert "no whole number of blocks of 512" in drained.failures[0].message


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    flipped = bytearray(TAR)
    flipped[4 * 2560 + 3] ^= 1
    drained = read_tar(tmp_path / "a.tar", bytes(flipped))
    assert (list(drained.videos), drained.reasons) == (["a"], {"*": "damaged_shard"})
    assert "lost from the sample 'b' on" in drained.failures[0].message


def test_a_hole_of_zeros_over_a_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    drained = read_tar(tmp_path / "a.tar", TAR[: 4 * 2560] + bytes(2560) + TAR[5 * 2560 :])
    assert (list(drained.videos), drained.reasons) == (["a"], {"*": "damaged_shard"})
    assert "data follows" in drained.failures[0].message


def test_one_block_of_zeros_is_enough_of_an_end(tmp_path: Path) -> None:
    drained = read_tar(tmp_path / "a.tar", TAR[: 6 * 2560 + 512])
    assert (list(drained.videos), drained.failures) == (["a", "b", "c"], [])


def test_a_gzip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.inputs._FREE_EXPANSION_BYTES", 1 << 20)
    bomb = tar_bytes([("a.mp4", GOOD), ("b.mp4", GOOD), ("c.mp4", bytes(100 << 20))])
    drained = read_tar(tmp_path / "a.tar.gz", gzip.compress(bomb, compresslevel=9))
    assert (list(drained.videos), drained.reasons) == (["a", "b"], {"*": "damaged_shard"})
    assert "decompress to more than" in drained.failures[0].message


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (gnu_tar_with_raw_size(b"\xff" * 12), "states -1 bytes"),
        (gnu_tar_with_raw_size(b"\x80\0\0\0" + b"\x7f" * 8), "cut inside the member"),
        (gnu_tar_with_raw_size(b"10000000000\0", kind=tarfile.GNUTYPE_LONGNAME), "extended header"),
        (gnu_tar_with_raw_size(b"10000000000\0", kind=tarfile.XHDTYPE), "extended header"),
    ],
    ids=["negative", "enormous", "name of 1 GiB", "pax of 1 GiB"],
)
def test_impossible_sizes_are_damage(tmp_path: Path, data: bytes, said: str) -> None:
    drained = read_tar(tmp_path / "a.tar", data, max_file_bytes=2**62)
    assert drained.reasons == {"*": "damaged_shard"}
    assert said in drained.failures[0].message


HOSTILE_NAMES = {
    "../b.mp4": "../b",
    "/etc/b.mp4": "/etc/b",
    "x/../../b.mp4": "x/../../b",
    "x//b.mp4": "x//b",
    "x\\b.mp4": "x\\b",
    "x\x1b[2Jb.mp4": "x\\x1b[2Jb",
    "x\nb.mp4": "x\\nb",
    ".mp4": "",
    "n" * 201 + ".mp4": "n" * 200,
}


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=repr)
def test_names_that_are_not_allowed_are_rejected_and_their_neighbours_are_not(tmp_path: Path, name: str) -> None:
    drained = read_tar(tmp_path / "a.tar", tar_bytes([("a.mp4", GOOD), (name, GOOD), ("c.mp4", GOOD)]))
    assert list(drained.videos) == ["a", "c"]
    assert drained.reasons == {HOSTILE_NAMES[name]: "bad_member"}


def test_the_members_of_a_sample_with_a_bad_key_are_one_rejection(tmp_path: Path) -> None:
    members = [("a.mp4", GOOD), *((f"../b.{extension}", b"b") for extension in ("mp4", "txt", "json"))]
    # The bad key ends the sample before it like any other key, so what comes late is no part of that.
    members += [("a.txt", b"late"), ("c.mp4", GOOD), ("../b.mp4", b"again")]
    drained = read_tar(tmp_path / "a.tar", tar_bytes(members))
    assert [(f.key, f.reason) for f in drained.failures] == [
        ("../b", "bad_member"),
        ("a", "duplicate_key"),
        ("../b", "bad_member"),
    ]
    assert (list(drained.videos), drained.videos["a"].caption) == (["a", "c"], "")


@pytest.mark.parametrize("extension", ["txt", "json"])
@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_texts_that_would_fill_the_memory_are_rejected(tmp_path: Path, extension: str, kind: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    members = [("a.mp4", GOOD), (f"a.{extension}", b" " * ((4 << 20) + 1)), ("b.mp4", GOOD)]
    if kind == "tar":
        (folder / "0.tar").write_bytes(tar_bytes(members))
    for name, data in members if kind == "folder" else []:
        (folder / name).write_bytes(data)
    drained = read_input(folder, tmp_path / "out")
    assert drained.reasons == {"a": {"txt": "bad_caption", "json": "bad_metadata"}[extension]}
    assert list(drained.videos) == ["b"]
    assert str(4 << 20) in drained.failures[0].message


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE]
)
def test_links_devices_and_sparse_files_are_rejected(tmp_path: Path, kind: bytes) -> None:
    odd = member("b.mp4", kind, link="/etc/passwd")
    drained = read_tar(tmp_path / "a.tar", tar_of(("a.mp4", GOOD), odd, ("b.txt", b"b"), ("c.mp4", GOOD)))
    assert (list(drained.videos), drained.reasons) == (["a", "c"], {"b": "bad_member"})


SAMPLES: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "no bytes": ([("b.mp4", b"")], "empty_file"),
    "too many bytes": ([("b.mp4", GOOD + b"12345")], "too_large"),
    "texts alone": ([("b.txt", b"b"), ("b.json", b"{}")], "not_found"),
    "unknown extension": ([("b.npy", b"b")], "not_allowed"),
    "two videos": ([("b.mp4", GOOD), ("b.webm", GOOD)], "duplicate_key"),
    "the same name twice": ([("b.mp4", GOOD), ("b.mp4", GOOD)], "duplicate_key"),
    "the same text twice": ([("b.mp4", GOOD), ("b.txt", b"1"), ("b.txt", b"2")], "duplicate_key"),
    "a dot in the key": ([("b.v2.mp4", GOOD), ("b.v2.txt", b"b")], "bad_member"),
    "JSON that is cut": ([("b.mp4", GOOD), ("b.json", b'{"a": 1')], "bad_metadata"),
    "JSON that is a list": ([("b.mp4", GOOD), ("b.json", b"[1]")], "bad_metadata"),
    "JSON in latin-1": ([("b.mp4", GOOD), ("b.json", '{"a": "\xe9"}'.encode("latin-1"))], "bad_metadata"),
    "JSON that is too deep": ([("b.mp4", GOOD), ("b.json", b'{"a":' * 300 + b"1" + b"}" * 300)], "bad_metadata"),
    "JSON that exhausts the parser": ([("b.mp4", GOOD), ("b.json", b"[" * 200_000)], "bad_metadata"),
    "caption in latin-1": ([("b.mp4", GOOD), ("b.txt", "caf\xe9".encode("latin-1"))], "bad_caption"),
    "caption with a surrogate": ([("b.mp4", GOOD), ("b.json", b'{"caption": "\\ud800"}')], "bad_caption"),
    "caption that is a list": ([("b.mp4", GOOD), ("b.json", b'{"caption": ["b"]}')], "bad_caption"),
    "wrong sha256": ([("b.mp4", GOOD), ("b.json", b'{"sha256": "%s"}' % (b"0" * 64))], "digest_mismatch"),
    "wrong md5": ([("b.mp4", GOOD), ("b.json", b'{"md5": "%s"}' % (b"A" * 32))], "digest_mismatch"),
}


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_a_bad_sample_is_one_rejection_and_its_neighbours_are_done(tmp_path: Path, sample: str) -> None:
    members, reason = SAMPLES[sample]
    data = tar_bytes([("a.mp4", GOOD), *members, ("c.mp4", GOOD)])
    drained = read_tar(tmp_path / "a.tar", data, max_file_bytes=len(GOOD))
    assert (list(drained.videos), drained.reasons) == (["a", "c"], {"b": reason})
    assert len(drained.failures) == 1


def test_a_key_that_comes_again_is_rejected_each_time(tmp_path: Path) -> None:
    members = [("a.mp4", GOOD), ("b.mp4", GOOD), ("a.mp4", STILL), ("b.txt", b"late")]
    drained = read_tar(tmp_path / "a.tar", tar_bytes(members))
    assert drained.content == {"a": GOOD, "b": GOOD}
    assert [(f.key, f.reason) for f in drained.failures] == [("a", "duplicate_key"), ("b", "duplicate_key")]


def test_a_picture_beside_a_video_is_its_poster(tmp_path: Path) -> None:
    members = [("a.jpg", STILL), ("a.mp4", GOOD), ("a.png", STILL), ("a.first.jpg", STILL)]
    assert read_tar(tmp_path / "a.tar", tar_bytes(members)).content == {"a": GOOD}


@pytest.mark.parametrize(
    ("caption", "column", "fields", "taken", "left"),
    [
        ("from txt", "caption", {"n": 1}, "from txt", {"n": 1}),
        ("from txt", "caption", {"caption": "from txt"}, "from txt", {}),
        ("from txt", "caption", {"caption": "other"}, "from txt", {"caption": "other"}),
        ("from txt", "recaption", {"recaption": "asked for"}, "asked for", {}),
        ("from txt", "recaption", {"recaption": None}, "from txt", {}),
        (None, "caption", {"caption": "from json"}, "from json", {}),
        ("", "caption", {"caption": "from json"}, "from json", {}),
        (None, "caption", {"caption": 7}, "7", {"caption": 7}),
        (None, "caption", {}, "", {}),
        (None, "caption", {"key": "a", "url": "http://x/"}, "", {"url": "http://x/"}),
        (None, "caption", {"key": "other"}, "", {"key": "other"}),
    ],
)
def test_the_caption_and_the_fields_come_from_where_they_were_asked_for(
    tmp_path: Path, caption: str | None, column: str, fields: dict[str, object], taken: str, left: dict[str, object]
) -> None:
    members = [("a.mp4", GOOD), ("a.json", json.dumps(fields).encode())]
    members += [("a.txt", caption.encode())] if caption is not None else []
    video = read_tar(tmp_path / "a.tar", tar_bytes(members), caption_column=column).videos["a"]
    assert (video.caption, video.fields) == (taken, left)


@pytest.mark.parametrize(
    "caption",
    ["\0 NUL \0", "\u202egnp.exe\u202c", "\ufeffmark", "line\r\nline\n", " \U0001f431 ", "long \u732b" * 500_000],
    ids=["NUL", "RTL", "BOM", "lines", "cat", "4 MB"],
)
def test_strange_captions_pass_without_loss(tmp_path: Path, caption: str) -> None:
    drained = read_tar(tmp_path / "a.tar", tar_bytes([("a.mp4", GOOD), ("a.txt", caption.encode())]))
    assert drained.videos["a"].caption == caption


def test_a_stated_digest_that_matches_is_accepted(tmp_path: Path) -> None:
    stated = {"sha256": hashlib.sha256(GOOD).hexdigest().upper(), "md5": hashlib.md5(GOOD).hexdigest()}
    drained = read_tar(tmp_path / "a.tar", tar_bytes([("a.mp4", GOOD), ("a.json", json.dumps(stated).encode())]))
    assert drained.videos["a"].fields == stated


def test_the_digest_that_img2dataset_took_before_it_resized_is_not_held_against_the_bytes(tmp_path: Path) -> None:
    stated = {"sha256": "0" * 64, "width": 256, "original_width": 1024}
    drained = read_tar(tmp_path / "a.tar", tar_bytes([("a.jpg", STILL), ("a.json", json.dumps(stated).encode())]))
    assert list(drained.videos) == ["a"]


def test_a_tar_that_changed_since_it_was_planned_ends_the_attempt(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(TAR)
    spec = tar_spec(str(path))
    path.write_bytes(TAR + bytes(512))
    with pytest.raises(StorageError, match="changed since it was planned"):
        next(iterate_videos(spec, open_store(str(tmp_path)), EncodingConfig(model="small"), DecodeLimits()))


def test_a_stream_that_ends_early_is_a_fault_of_the_storage_and_not_damage(tmp_path: Path) -> None:
    tar = TarStream("00000.tar", io.BytesIO(TAR[:5000]), len(TAR))
    with pytest.raises(StorageUnavailableError, match=f"5000 of {len(TAR)}"):
        list(tar)
    with pytest.raises(RejectionError, match="cut"):
        list(TarStream("00000.tar", io.BytesIO(TAR[:5000]), 5000))


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.zst"])
def test_a_disk_that_fails_is_a_fault_of_the_storage_and_not_damage(suffix: str) -> None:
    class FailingDisk(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 4000:
                raise OSError(5, "Input/output error")
            return super().read(min(size or 0, 1000))

    data = compressed(tar_bytes([("a.mp4", os.urandom(20_000))]), suffix)
    with pytest.raises(StorageError, match="Input/output error"):
        list(TarStream(f"00000{suffix}", FailingDisk(data), len(data)))


def test_no_room_for_temporary_files_ends_the_attempt_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr("os.memfd_create", lambda *_: os.dup(full))
    with pytest.raises(StorageError, match="TMPDIR"):
        read_tar(tmp_path / "a.tar", tar_bytes([("a.mp4", GOOD)]))
    os.close(full)


@pytest.mark.parametrize("num_taken", [0, 1, 2])
@pytest.mark.parametrize("make", ["tar", "folder"])
def test_an_iterator_that_is_closed_early_leaves_no_descriptor(tmp_path: Path, make: str, num_taken: int) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    if make == "tar":
        (folder / "0.tar").write_bytes(tar_bytes([(f"{i}.mp4", GOOD) for i in range(20)]))
    else:
        for i in range(20):
            (folder / f"{i}.mp4").write_bytes(GOOD)
    store = open_store(str(tmp_path / "output"))
    (spec,) = plan_shards(SourceConfig(input=str(folder)), store)
    before = sorted(os.listdir("/proc/self/fd"))
    videos = iterate_videos(spec, store, EncodingConfig(model="small"), DecodeLimits())
    for _ in range(num_taken):
        video = next(videos)
        assert isinstance(video, SourceVideo)
        os.close(video.media_fd)
    videos.close()  # type: ignore[attr-defined]
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_folder_gives_its_files_with_what_lies_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "cats"
    folder.mkdir(parents=True)
    (folder / "one (1).mp4").write_bytes(GOOD)
    (folder / "one (1).txt").write_text("a cat", encoding="utf-8")
    (folder / "one (1).json").write_text('{"stars": 5}', encoding="utf-8")
    (folder / "two.jpg").write_bytes(STILL)
    (folder / "three.mkv").write_bytes(b"")
    (folder / "four.mp4").write_bytes(GOOD)
    (folder / "four.txt").write_bytes(b"\xff")
    drained = read_input(tmp_path / "in", tmp_path / "out")
    assert drained.content == {"cats/one (1)": GOOD, "cats/two": STILL}
    assert drained.reasons == {"cats/three": "empty_file", "cats/four": "bad_caption"}
    video = drained.videos["cats/one (1)"]
    assert (video.caption, video.fields, video.source_uri) == ("a cat", {"stars": 5}, f"{folder}/one (1).mp4")
    assert video.media_kind == "video"
    assert drained.videos["cats/two"].media_kind == "image"


@pytest.mark.parametrize("name", ["b.mp4", "b.txt"])
def test_a_file_that_may_not_be_read_is_rejected_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for each in ("a.mp4", "b.mp4", "b.txt", "c.mp4"):
        (folder / each).write_bytes(GOOD if each.endswith(".mp4") else b"text")

    # Tests may run as root, who may read everything, so the answer of the system is made up.
    def refusing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *more: Any, **named: Any) -> Any:
            if str(path) == str(folder / name):
                raise PermissionError(errno.EACCES, "Permission denied")
            return real(path, *more, **named)

        return call

    monkeypatch.setattr("os.open", refusing(os.open))
    monkeypatch.setattr("builtins.open", refusing(open))
    drained = read_input(folder, tmp_path / "out")
    assert (list(drained.videos), drained.reasons) == (["a", "c"], {"b": "unreadable"})
    assert f"{folder / name} may not be read: Permission denied" in drained.failures[0].message


def test_links_in_a_folder_are_read_and_a_broken_one_is_rejected_by_name(tmp_path: Path) -> None:
    folder, cache = tmp_path / "in", tmp_path / "cache"
    folder.mkdir()
    cache.mkdir()
    (cache / "b.mp4").write_bytes(GOOD)
    (folder / "a.mp4").symlink_to(cache / "b.mp4")
    (folder / "linked").symlink_to(cache)
    (folder / "gone.mp4").symlink_to(tmp_path / "nowhere")
    (folder / "gone.md").symlink_to(tmp_path / "nowhere")
    (folder / "itself.mp4").symlink_to("itself.mp4")
    drained = read_input(folder, tmp_path / "out")
    assert drained.content == {"a": GOOD, "linked/b": GOOD}
    assert drained.reasons == {"gone": "not_found", "itself": "not_found"}


def test_rows_that_cannot_be_had_are_rejected_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(GOOD)
    (tmp_path / "videos" / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "videos" / "pipe.mp4")
    rows: dict[str, tuple[object, str | None]] = {
        "relative": ("videos/a.mp4", None),
        "absolute": (str(tmp_path / "videos" / "a.mp4"), None),
        "file": (f"file://{tmp_path}/videos/a.mp4", None),
        "missing": ("videos/b.mp4", "not_found"),
        "folder": ("videos/folder.mp4", "not_found"),
        "pipe": ("videos/pipe.mp4", "not_found"),
        "none": (None, "not_found"),
        "number": (7, "not_found"),
        "web": ("http://169.254.169.254/latest/meta-data.mp4", "not_allowed"),
        "chain": ("simplecache::s3://bucket/a.mp4", "not_allowed"),
        "concat": ("concat://a.mp4|b.mp4", "not_allowed"),
        "escape": ("s3://bucket/../a.mp4", "not_allowed"),
        "bucket": ("s3://user:secret@host/a.mp4", "not_allowed"),
        "long key": ("s3://bucket/" + "/".join(["\u732b" * 60] * 6) + ".mp4", "not_allowed"),
        "zero": ("videos/a\0.mp4", "not_allowed"),
        "long": ("videos/" + "a" * 5000 + ".mp4", "not_allowed"),
        "kind": ("videos/a.exe", "not_allowed"),
        "../key": ("videos/a.mp4", "bad_member"),
    }
    lines = [json.dumps({"key": key, "url": address, "n": 1}) for key, (address, _) in rows.items()]
    lines += [lines[0], "[1, 2]", '{"url": "videos/a.mp4", "caption": "\\ud800"}']
    (tmp_path / "table.jsonl").write_text("\n".join(lines), encoding="utf-8")
    drained = read_input(tmp_path / "table.jsonl", tmp_path / "out")
    expected = {key: reason for key, (_, reason) in rows.items() if reason is not None}
    row = len(rows)
    expected |= {"relative": "duplicate_key", f"{row + 1:08d}": "bad_metadata", f"{row + 2:08d}": "bad_caption"}
    assert drained.reasons == expected
    assert drained.content == dict.fromkeys(["relative", "absolute", "file"], GOOD)
    assert drained.videos["relative"].fields == {"url": "videos/a.mp4", "n": 1}
    assert len(drained.failures) + len(drained.videos) == len(lines)
    assert not any("secret" in failure.message for failure in drained.failures)


def test_an_address_that_no_store_takes_is_the_rejection_of_its_row(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(GOOD)
    odd = {
        "space": "s3://my bucket/x.mp4",
        "umlaut": "s3://b\u00fccket/x.mp4",
        "no package": "abfs://container/x.mp4",
    }
    lines = [json.dumps({"key": key, "url": address}) for key, address in {**odd, "good": "a.mp4"}.items()]
    (tmp_path / "table.jsonl").write_text("\n".join(lines), encoding="utf-8")
    drained = read_input(tmp_path / "table.jsonl", tmp_path / "out")
    assert list(drained.videos) == ["good"]
    assert drained.reasons == dict.fromkeys(odd, "not_allowed")


def test_a_file_name_that_is_no_text_is_rejected_and_can_be_stored(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.mp4").write_bytes(GOOD)
    (folder / os.fsdecode(b"caf\xe9.mp4")).write_bytes(GOOD)
    drained = read_input(folder, tmp_path / "out")
    assert list(drained.videos) == ["good"]
    (failure,) = drained.failures
    assert failure.reason == "bad_member"
    assert all(text.encode("utf-8") for text in (failure.key, failure.message, failure.source_uri))


def test_a_slice_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(GOOD)
    store = open_store(str(tmp_path / "out"))
    (spec,) = plan_shards(SourceConfig(input=str(tmp_path / "a.mp4")), store)
    path = tmp_path / "out" / str(spec.plan_key)
    path.write_bytes(path.read_bytes().replace(b"a.mp4", b"b.mp4"))
    with pytest.raises(DamagedObjectError, match="does not have the hash"):
        list(iterate_videos(spec, store, EncodingConfig(model="small"), DecodeLimits()))


def test_shards_on_s3_are_read_like_local_ones(s3_env: SeaweedFS, tmp_path: Path) -> None:
    root = s3_env.root()
    key = root.removeprefix(f"s3://{s3_env.bucket}/")
    client = s3_env.client()
    objects = {
        "tars/00000.tar": tar_bytes([*clip_members(CLIP_VIDEOS[0], "a"), ("b.mp4", b"")]),
        "tars/00001.tar": tar_bytes([("d.mp4", STILL), ("e.mp4", STILL)])[:-20_000],
        "videos/c.mp4": GOOD,
        "table.csv": b"path,caption\nvideos/c.mp4,see\nvideos/d.mp4,none\n/etc/hosts.mp4,local\n",
    }
    for name, data in objects.items():
        client.put_object(Bucket=s3_env.bucket, Key=f"{key}/{name}", Body=data)
    tars = read_input(f"{root}/tars", f"{root}/out")
    assert tars.content == {"a": GOOD, "d": STILL}
    assert sorted(tars.reasons.items()) == [("*", "damaged_shard"), ("b", "empty_file")]
    rows = read_input(f"{root}/table.csv", f"{root}/out", uri_column="path")
    assert rows.content == {"00000000": GOOD}
    assert rows.videos["00000000"].caption == "see"
    assert rows.videos["00000000"].source_uri == f"{root}/videos/c.mp4"
    assert rows.reasons == {"00000001": "not_found", "00000002": "not_allowed"}


def test_a_tar_that_is_replaced_on_s3_while_it_is_read_ends_the_attempt(s3_env: SeaweedFS) -> None:
    root = s3_env.root()
    client = s3_env.client()
    place = {"Bucket": s3_env.bucket, "Key": f"{root.removeprefix(f's3://{s3_env.bucket}/')}/00000.tar"}
    client.put_object(**place, Body=TAR)
    spec = tar_spec(f"{root}/00000.tar")
    videos = iterate_videos(spec, open_store(root), EncodingConfig(model="small"), DecodeLimits())
    first = next(videos)
    assert isinstance(first, SourceVideo)
    os.close(first.media_fd)
    client.put_object(**place, Body=TAR.replace(b"bytes", b"other"))
    with pytest.raises(StorageError, match="changed since it was planned"):
        drain(videos)


def _mutated(data: bytes, cut: int, flips: list[tuple[int, int]], moved: tuple[int, int] | None) -> bytes:
    changed = bytearray(data)
    for place, bits in flips:
        changed[place % len(changed)] ^= bits
    if moved is not None:
        start, length = moved[0] % len(changed), moved[1]
        del changed[start : start + length]
    return bytes(changed[: cut % (len(changed) + 1)])


FUZZED = tar_of(
    *(pair for key in ("a", "b", "dir/" + "c" * 120, "d") for pair in clip_members(CLIP_STILLS[0], key)),
    member("dir", tarfile.DIRTYPE),
    ("e.mp4", b"bytes" * 300),
    ("e.txt", "\u732b".encode()),
)


@settings(max_examples=300, deadline=None)
@example(cut=len(FUZZED), flips=[], moved=None, suffix=".tar")
@given(
    cut=st.one_of(st.just(len(FUZZED)), st.integers(0, len(FUZZED))),
    flips=st.lists(st.tuples(st.integers(0, len(FUZZED) - 1), st.integers(1, 255)), max_size=4),
    moved=st.one_of(st.none(), st.tuples(st.integers(0, len(FUZZED) - 1), st.integers(1, 3000))),
    suffix=st.sampled_from([".tar", ".tar", ".tar.gz", ".tar.zst"]),
)
def test_whatever_happens_to_a_tar_it_is_read_to_an_end_and_nothing_is_said_twice(
    tmp_path_factory: pytest.TempPathFactory,
    cut: int,
    flips: list[tuple[int, int]],
    moved: tuple[int, int] | None,
    suffix: str,
) -> None:
    whole = compressed(FUZZED, suffix)
    data = _mutated(whole, min(cut, len(whole)), flips, moved)
    path = tmp_path_factory.getbasetemp() / f"fuzzed{suffix}"
    drained = read_tar(path, data)
    num_rest = sum(failure.key == "*" for failure in drained.failures)
    assert num_rest <= 1
    if len(data) < len(whole) - 20 * 512:
        assert num_rest == 1, "a tar that lost its end was taken for whole"
    if data == whole:
        assert (len(drained.videos), drained.failures) == (5, [])


HEADERS = [offset for offset in range(0, len(FUZZED), 512) if FUZZED[offset + 257 : offset + 262] == b"ustar"]


@settings(max_examples=100, deadline=None)
@given(header=st.sampled_from(HEADERS), place=st.integers(0, 511), bits=st.integers(1, 255))
def test_any_damage_to_any_header_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, header: int, place: int, bits: int
) -> None:
    data = bytearray(FUZZED)
    data[header + place] ^= bits
    drained = read_tar(tmp_path_factory.getbasetemp() / "header.tar", bytes(data))
    # Only the two bytes that end the checksum field are not covered by it.
    assert drained.reasons == {"*": "damaged_shard"} or (place in (154, 155) and not drained.failures)
