"""Builders that several tests share: real clips and the tars, tables and folders that inputs come in.

Not fixtures (those are in conftest.py) and not test helpers that check anything.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

CLIPS = Path(__file__).parent / "data" / "clips"
CLIP_VIDEOS = tuple(sorted(CLIPS.glob("*.mp4")))
CLIP_STILLS = tuple(sorted(CLIPS.glob("*.jpg")))


def tar_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    """An uncompressed tar of regular files (name, content), the same bytes every time."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def clip_members(media: Path, key: str) -> list[tuple[str, bytes]]:
    """The img2dataset members of one clip: KEY.<extension>, KEY.txt, KEY.json."""
    return [
        (key + side.suffix, side.read_bytes())
        for side in (media, media.with_suffix(".txt"), media.with_suffix(".json"))
        if side.exists()
    ]


def pack_clips(folder: Path, num_shards: int, media: Iterable[Path] = CLIP_VIDEOS) -> list[Path]:
    """Deals clips over img2dataset-style shards 00000.tar, 00001.tar, ...; keys are SSSSSNNNN as img2dataset's."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[Path]] = [[] for _ in range(num_shards)]
    for number, path in enumerate(media):
        shards[number % num_shards].append(path)
    tars = []
    for number, paths in enumerate(shards):
        members = [m for i, path in enumerate(paths) for m in clip_members(path, f"{number:05d}{i:04d}")]
        tar = folder / f"{number:05d}.tar"
        tar.write_bytes(tar_bytes(members))
        tars.append(tar)
    return tars
