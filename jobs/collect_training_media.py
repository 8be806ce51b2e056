"""Collects the media that the small shipped model is trained on: video, photographs, and photographs set in motion.

    python jobs/collect_training_media.py --output media/train --held-out media/held_out

Everything comes out of packages that the public registries keep: `jobs/training_media.yaml` names each package, its
version, the SHA-256 of its archive, which files of it are taken, and under which licence. What the model is judged on
goes to another folder, and no package file feeds both. Beside the files of each folder lies `SOURCES.json`: for every
file its package, its author where known, its licence and what was changed.

The archives are kept in `--downloads`, and a run with all of them there needs no network. A package that is gone, or
that is not the one the table states, is reported, the rest goes on, and the exit code is 4: 0 is all of it, 2 a wrong
request, 130 interrupted. The last line on standard output is one JSON object with the counts.

It is not a downloader of video datasets, and the encode and training jobs never call it: their input is any folder.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

_ROOT = Path(__file__).resolve().parent.parent
if str(_ROOT) not in sys.path:
    sys.path.insert(0, str(_ROOT))

import av
import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFilter

from pipeline.errors import DamagedObjectError, LatentmillError, StorageNotFoundError, UsageError
from pipeline.store import sha256_of_file

SOURCES = Path(__file__).resolve().with_name("training_media.yaml")
EXIT_DONE, EXIT_USAGE, EXIT_INCOMPLETE, EXIT_INTERRUPTED = 0, 2, 4, 130

_STILL_SHORT_SIDE_PX = 720
_MOVING_SIZE_PX, _MOVING_NUM_FRAMES, _MOVING_FPS = 288, 33, 24
# Nearly free of artefacts: a decoder that learns from blocky frames learns to draw blocks.
_PIECE_QP, _MOVING_QP = 14, 10

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Media:
    """One file of a package, or several that are treated alike.

    Attributes:
        members: paths inside the archive; `outer.zip!inner` reads an archive inside the archive.
        licence: of these files where they have one of their own, else that of the package.
        author: as the package names them.
        held_out: judged on, never trained on.
        name: what the files written are called; the member's own name by default.
        runs: (first frame, number of frames) of each run that becomes a file of its own; empty: the file as it is.
        short_side_px: the size of those runs; 0 keeps the size.
    """

    members: tuple[str, ...]
    licence: str = ""
    author: str = ""
    held_out: bool = False
    name: str = ""
    runs: tuple[tuple[int, int], ...] = ()
    short_side_px: int = 0


@dataclass(frozen=True, kw_only=True)
class Package:
    """An archive and what is taken from it.

    Attributes:
        package: name and version as the client of its registry writes them, or an address for the client `url`.
        client: "pip", "npm", "apt" or "url".
        options: further arguments of that client, so that every machine gets the same archive.
        archive: file name of the archive.
        sha256: of the archive, in hexadecimal.
        licence: of the package.
    """

    package: str
    client: str
    archive: str
    sha256: str
    licence: str
    media: tuple[Media, ...]
    options: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MediaFile:
    """One row of `SOURCES.json`: a file written, and where it is from. Sizes are 0 frames per second for a still."""

    file: str
    kind: str
    width_px: int
    height_px: int
    num_frames: int
    fps: float
    package: str
    member: str
    author: str
    licence: str
    changes: str


@dataclass
class _Collected:
    train: list[MediaFile] = field(default_factory=list)
    held_out: list[MediaFile] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def main(argv: Sequence[str]) -> int:
    """Collects the media; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of what to train on, replaced as a whole")
    parser.add_argument("--held-out", type=Path, required=True, help="folder of what to judge on, replaced as a whole")
    parser.add_argument("--sources", type=Path, default=SOURCES, help="the table of packages")
    parser.add_argument("--downloads", type=Path, help="folder that keeps the archives; default: OUTPUT-downloads")
    parser.add_argument("--moving-stills", type=int, default=240, help="how many clips to make out of the stills")
    parser.add_argument("--seed", type=int, default=0, help="of those clips")
    arguments = parser.parse_args(argv)
    downloads = arguments.downloads or arguments.output.with_name(arguments.output.name + "-downloads")
    try:
        collected = collect(
            read_table(arguments.sources),
            output=arguments.output,
            held_out=arguments.held_out,
            downloads=downloads,
            num_moving_stills=arguments.moving_stills,
            seed=arguments.seed,
        )
    except (LatentmillError, OSError) as error:
        return _result(EXIT_USAGE, {"message": str(error)})
    except KeyboardInterrupt:
        return _result(EXIT_INTERRUPTED, {"message": "interrupted; the folders are as they were"})
    counts: dict[str, object] = {
        "num_train_files": len(collected.train),
        "num_held_out_files": len(collected.held_out),
        "train_video_s": _seconds(collected.train, "video"),
        "train_moving_still_s": _seconds(collected.train, "moving still"),
        "num_train_stills": sum(media.kind == "still" for media in collected.train),
        "failures": collected.failures,
    }
    return _result(EXIT_INCOMPLETE if collected.failures else EXIT_DONE, counts)


def collect(
    packages: Sequence[Package],
    *,
    output: Path,
    held_out: Path,
    downloads: Path,
    num_moving_stills: int,
    seed: int,
) -> _Collected:
    """Writes both folders; each is replaced only when its new content is complete.

    Raises:
        UsageError: a folder holds files that are not of an earlier run, or the table asks for what an archive lacks.
    """
    places = output.resolve(), held_out.resolve()
    if places[0] == places[1]:
        raise UsageError(f"--output and --held-out are the same folder, {output}: what is judged on must lie apart")
    if places[0] in places[1].parents or places[1] in places[0].parents:
        raise UsageError(f"of --output {output} and --held-out {held_out} one lies in the other: they must lie apart")
    if num_moving_stills < 0:
        raise UsageError(f"--moving-stills: {num_moving_stills} is negative; 0 makes none")
    downloads.mkdir(parents=True, exist_ok=True)
    collected = _Collected()
    with _Replaced(output) as train_folder, _Replaced(held_out) as held_out_folder:
        for package in packages:
            _say(f"{package.package}: {package.archive}")
            try:
                archive = fetch(package, downloads)
            except (StorageNotFoundError, DamagedObjectError) as error:
                _say(f"  LEFT OUT: {error}")
                collected.failures.append(str(error))
                continue
            members = [member for media in package.media for member in media.members]
            contents = _read_members(archive, package.archive, members)
            for media in package.media:
                folder, rows = (
                    (held_out_folder, collected.held_out) if media.held_out else (train_folder, collected.train)
                )
                for member in media.members:
                    rows.extend(_take(package, media, member, contents[member], folder, {row.file for row in rows}))
        collected.train.extend(_set_in_motion(train_folder, collected.train, num_moving_stills, seed))
        for folder, rows in ((train_folder, collected.train), (held_out_folder, collected.held_out)):
            text = json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False)
            (folder / "SOURCES.json").write_text(text + "\n", encoding="utf-8")
    return collected


def read_table(path: Path) -> tuple[Package, ...]:
    """The packages of a YAML table; see `Package` and `Media` for its keys.

    Raises:
        UsageError: the file is not there, or an entry has an unknown key or lacks one.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--sources: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--sources {path}: not YAML: {error}") from error
    if not isinstance(entries, list):
        raise UsageError(f"--sources {path}: a list of packages is needed, found {type(entries).__name__}")
    packages = []
    for number, entry in enumerate(entries, 1):
        where = f"--sources {path}: entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("media"), list):
            raise UsageError(f"{where}: a mapping with a list `media` is needed")
        media = [_entry(Media, one, where) for one in entry["media"]]
        packages.append(_entry(Package, {**entry, "media": media}, where))
    uses = {
        (one.package, member, media.held_out) for one in packages for media in one.media for member in media.members
    }
    if both := {
        (package, member) for package, member, is_held_out in uses if (package, member, not is_held_out) in uses
    }:
        raise UsageError(f"--sources {path}: both to train on and to judge on: {', '.join(min(both))}")
    return tuple(packages)


def _entry(kind: Callable[..., _T], values: dict[str, Any], where: str) -> _T:
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except TypeError as error:
        allowed = ", ".join(one.name for one in fields(kind))  # type: ignore[arg-type]
        raise UsageError(f"{where}: {error}; the keys are {allowed}") from error


def fetch(package: Package, downloads: Path) -> Path:
    """The archive of a package, from `downloads` or from its registry, with the SHA-256 that the table states.

    Raises:
        StorageNotFoundError: the registry does not give it.
        DamagedObjectError: the registry gives other bytes; they are not kept.
    """
    kept = downloads / package.archive
    if kept.is_file() and sha256_of_file(kept) == package.sha256:
        return kept
    with tempfile.TemporaryDirectory(dir=downloads) as folder:
        fetched = Path(folder) / package.archive
        said = _download(package, Path(folder))
        if not fetched.is_file():
            found = ", ".join(sorted(path.name for path in Path(folder).iterdir())) or "nothing"
            raise StorageNotFoundError(
                f"{package.package}: {package.client} fetched {found}, not {package.archive}: {said}"
            )
        digest = sha256_of_file(fetched)
        if digest != package.sha256:
            raise DamagedObjectError(
                f"{package.package}: {package.archive} ({fetched.stat().st_size} bytes) has SHA-256 {digest}, not "
                f"{package.sha256}: damaged on the way, or replaced in the registry; nothing of it is used"
            )
        fetched.replace(kept)
    return kept


def _download(package: Package, folder: Path) -> str:
    """Runs the client of the registry; returns the end of what it said."""
    if package.client == "url":
        try:
            with urllib.request.urlopen(package.package, timeout=60) as source:
                (folder / package.archive).write_bytes(source.read())
        except (OSError, urllib.error.URLError) as error:
            return str(error)
        return ""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--disable-pip-version-check",
        "--dest",
        ".",
    ]
    clients = {"pip": pip, "npm": ["npm", "pack", "--silent"], "apt": ["apt-get", "download", "--quiet"]}
    if package.client not in clients:
        raise UsageError(f"{package.package}: client {package.client!r} is none of url, {', '.join(clients)}")
    command = [*clients[package.client], *package.options, package.package]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)
    except FileNotFoundError:
        return f"{command[0]} is not installed"
    except subprocess.TimeoutExpired:
        return f"{command[0]} did not end within 600 s"
    return " ".join((done.stderr or done.stdout).split())[-400:]


def _read_members(archive: Path | io.BytesIO, name: str, members: Sequence[str]) -> dict[str, bytes]:
    """Files of a zip, tar or Debian archive, read in one pass; `name` says which of them it is.

    Raises:
        UsageError: the archive lacks one of them, or is of another kind.
    """
    outer = {member.partition("!")[0] for member in members}
    found: dict[str, bytes] = {}
    try:
        if name.endswith((".whl", ".zip")):
            with zipfile.ZipFile(archive) as zipped:
                found = {one: zipped.read(one) for one in outer & set(zipped.namelist())}
        else:
            if name.endswith(".deb"):
                command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
                archive = io.BytesIO(subprocess.run(command, check=True, capture_output=True).stdout)
            stream = archive if isinstance(archive, io.BytesIO) else io.BytesIO(archive.read_bytes())
            with tarfile.open(fileobj=stream) as tar:
                for entry in tar:
                    one = entry.name.removeprefix("./")
                    if one in outer and (file := tar.extractfile(entry)) is not None:
                        found[one] = file.read()
    except (OSError, tarfile.TarError, zipfile.BadZipFile, subprocess.CalledProcessError) as error:
        raise UsageError(f"{name} cannot be read: {error}") from error
    if missing := outer - set(found):
        raise UsageError(f"{name} has no {min(missing)}: mend the table")
    contents = {}
    for one in outer:
        inner = [member.partition("!")[2] for member in members if member.startswith(one + "!")]
        if inner:
            read = _read_members(io.BytesIO(found[one]), one, inner)
            contents.update({f"{one}!{key}": value for key, value in read.items()})
        if one in members:
            contents[one] = found[one]
    return contents


def _take(
    package: Package, media: Media, member: str, content: bytes, folder: Path, taken: set[str]
) -> list[MediaFile]:
    """Writes what the table takes of one file of a package; returns its rows."""
    path = PurePosixPath(member.rpartition("!")[2])
    stem = media.name or path.stem
    suffix = path.suffix.lower()
    shared = {
        "package": package.package,
        "member": member,
        "author": media.author,
        "licence": media.licence or f"that of the package: {package.licence}",
    }
    if suffix in {".jpg", ".jpeg", ".png"}:
        name, width_px, height_px, changes = _write_still(content, folder, stem, suffix)
        rows = [MediaFile(file=name, kind="still", num_frames=1, fps=0.0, width_px=width_px, height_px=height_px,
                          changes=changes, **shared)]  # fmt: skip
    elif media.runs:
        rows = []
        for name, (start, frames, fps) in _write_runs(content, folder, stem, media):
            width_px, height_px = frames[0].width, frames[0].height
            changes = f"frames {start} to {start + len(frames) - 1}, scaled to {width_px}x{height_px}, encoded again"
            rows.append(MediaFile(file=name, kind="video", num_frames=len(frames), fps=fps, width_px=width_px,
                                  height_px=height_px, changes=changes, **shared))  # fmt: skip
    else:
        name = stem + suffix
        (folder / name).write_bytes(content)
        with av.open(io.BytesIO(content), "r") as container:
            stream = container.streams.video[0]
            num_frames = len([frame.pts for frame in container.decode(stream)])
            rows = [MediaFile(file=name, kind="video", num_frames=num_frames, fps=_fps(stream), width_px=stream.width,
                              height_px=stream.height, changes="none", **shared)]  # fmt: skip
    if again := taken & {row.file for row in rows}:
        raise UsageError(f"{package.package}: {min(again)} would be written twice; give one of them another name")
    return rows


def _write_still(content: bytes, folder: Path, stem: str, suffix: str) -> tuple[str, int, int, str]:
    with Image.open(io.BytesIO(content)) as picture:
        scale = _STILL_SHORT_SIDE_PX / min(picture.size)
        if scale >= 1:
            (folder / (stem + suffix)).write_bytes(content)
            return stem + suffix, *picture.size, "none"
        size = (round(picture.width * scale), round(picture.height * scale))
        smaller = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    smaller.save(folder / f"{stem}.jpg", quality=95)
    return f"{stem}.jpg", *size, f"scaled to {size[0]}x{size[1]}, encoded again"


def _write_runs(
    content: bytes, folder: Path, stem: str, media: Media
) -> Iterator[tuple[str, tuple[int, list[av.VideoFrame], float]]]:
    runs = sorted(media.runs)
    with av.open(io.BytesIO(content), "r") as container:
        stream = container.streams.video[0]
        scale = media.short_side_px / min(stream.width, stream.height) if media.short_side_px else 1.0
        width_px, height_px = (2 * round(side * scale / 2) for side in (stream.width, stream.height))
        decoded = enumerate(container.decode(stream))
        for start, num_frames in runs:
            frames = [
                frame.reformat(width_px, height_px, format="yuv420p", interpolation="AREA")
                for _, frame in _between(decoded, start, start + num_frames)
            ]
            if len(frames) != num_frames:
                raise UsageError(f"{stem}: the run of {num_frames} frames at {start} has {len(frames)}; mend the table")
            name = f"{stem}_{start:05d}.mp4"
            _encode(folder / name, frames, _fps(stream), _PIECE_QP)
            yield name, (start, frames, _fps(stream))


def _between(numbered: Iterator[tuple[int, _T]], start: int, end: int) -> Iterator[tuple[int, _T]]:
    """Items `start` to `end` - 1 of an enumeration that goes on afterwards."""
    for number, item in numbered:
        if number >= start:
            yield number, item
        if number == end - 1:
            return


def _fps(stream: av.VideoStream) -> float:
    return float(stream.average_rate or stream.base_rate or 25)


def _encode(path: Path, frames: Iterable[av.VideoFrame], fps: float, qp: int) -> None:
    """The same frames give the same bytes: one thread, no encoder name, and none of x264's adaptive quantisation."""
    with av.open(str(path), "w", container_options={"fflags": "+bitexact", "movflags": "+faststart"}) as container:
        stream = None
        rate = Fraction(fps).limit_denominator(1001)
        for number, frame in enumerate(frames):
            if stream is None:
                stream = container.add_stream("libx264", rate)
                stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "yuv420p"
                stream.codec_context.thread_count = 1
                stream.codec_context.options = {"qp": str(qp), "preset": "veryfast", "g": "24", "flags": "+bitexact"}
            # A frame that comes from a decoder carries the time base of its source, by which the encoder would round.
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode(None))


def _set_in_motion(folder: Path, rows: Sequence[MediaFile], num_clips: int, seed: int) -> list[MediaFile]:
    """Clips in which a camera moves over a still, half of them with cut-outs of other stills that move on their own."""
    stills = [row for row in rows if row.kind == "still"]
    if not stills or num_clips < 1:
        return []
    _say(f"{num_clips} clips out of {len(stills)} stills")
    made = []
    for number in range(num_clips):
        rng = np.random.default_rng((seed, number))
        # In turn, not at random: every still appears about as often as any other.
        ground = stills[number % len(stills)]
        num_cut_outs = int(rng.integers(1, 4)) if number % 2 else 0
        cut_outs = [stills[index] for index in rng.integers(len(stills), size=num_cut_outs)]
        name = f"moving_{number:04d}.mp4"
        _encode(folder / name, _moving_frames(folder, ground, cut_outs, rng), _MOVING_FPS, _MOVING_QP)
        used = [ground, *cut_outs]
        made.append(
            MediaFile(
                file=name,
                kind="moving still",
                width_px=_MOVING_SIZE_PX,
                height_px=_MOVING_SIZE_PX,
                num_frames=_MOVING_NUM_FRAMES,
                fps=float(_MOVING_FPS),
                package="; ".join(dict.fromkeys(still.package for still in used)),
                member="; ".join(dict.fromkeys(still.member for still in used)),
                author="; ".join(dict.fromkeys(still.author for still in used if still.author)),
                licence="; ".join(dict.fromkeys(still.licence for still in used)),
                changes=f"moved over, turned and laid upon each other by this script, seed {seed}",
            )
        )
    return made


def _moving_frames(
    folder: Path, ground: MediaFile, cut_outs: Sequence[MediaFile], rng: np.random.Generator
) -> Iterator[av.VideoFrame]:
    size = _MOVING_SIZE_PX
    # Larger than the frame, so that the camera has room; never much larger, so that nothing is blurred or aliased.
    canvas = _covering(folder / ground.file, round(size * rng.uniform(1.4, 2.2)))
    camera = _path(rng, canvas.size, (0.75, 1.15))
    things = []
    for still in cut_outs:
        picture = _covering(folder / still.file, round(size * rng.uniform(0.35, 0.7)))
        things.append((_cut_out(picture, rng), _path(rng, (size, size), (0.8, 1.25))))
    for step in np.linspace(0.0, 1.0, _MOVING_NUM_FRAMES):
        x, y, zoom, angle = camera(float(step))
        frame = _placed(canvas, (size, size), (x, y), (size / 2, size / 2), zoom, angle).convert("RGBA")
        for thing, path in things:
            x, y, zoom, angle = path(float(step))
            middle = (thing.width / 2, thing.height / 2)
            frame.alpha_composite(_placed(thing, (size, size), middle, (x, y), zoom, angle))
        pixels = np.ascontiguousarray(frame.convert("RGB"))
        yield av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")


def _covering(path: Path, short_side_px: int) -> Image.Image:
    with Image.open(path) as picture:
        scale = short_side_px / min(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _cut_out(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The middle of a picture under an ellipse or a rectangle with an edge that is sharp or soft."""
    side = min(picture.size)
    picture = picture.crop((0, 0, side, side))
    mask = Image.new("L", picture.size, 0)
    margin = side // 8
    box = (margin, margin, side - margin, side - int(margin * rng.uniform(1, 3)))
    draw = ImageDraw.Draw(mask)
    (draw.ellipse if rng.random() < 0.6 else draw.rectangle)(box, fill=255)
    picture.putalpha(mask.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 4)))))
    return picture


def _path(
    rng: np.random.Generator, size: tuple[int, int], zooms: tuple[float, float]
) -> Callable[[float], tuple[float, float, float, float]]:
    """From a time in [0, 1] to (x px, y px, zoom, angle in radians): a curved way through the middle of an area.

    Speeds are spread over a logarithm: most motion in real video is slow, and the fast rest is what is hard.
    """
    heading, bend = rng.uniform(0, 2 * math.pi), rng.uniform(-0.25, 0.25)
    length_px = min(float(np.exp(rng.uniform(math.log(8), math.log(260)))), 0.6 * min(size))
    along = np.array([math.cos(heading), math.sin(heading)]) * length_px
    across = np.array([-along[1], along[0]]) * bend
    middle = np.array(size) * rng.uniform(0.42, 0.58, size=2)
    zoom_from, zoom_to = rng.uniform(*zooms, size=2)
    angle_from = rng.uniform(-0.2, 0.2)
    turn = rng.uniform(-0.35, 0.35) if rng.random() < 0.5 else 0.0

    def at(step: float) -> tuple[float, float, float, float]:
        x, y = middle + along * (step - 0.5) + across * (1 - (2 * step - 1) ** 2)
        return float(x), float(y), float(zoom_from + (zoom_to - zoom_from) * step), float(angle_from + turn * step)

    return at


def _placed(
    picture: Image.Image,
    size: tuple[int, int],
    point: tuple[float, float],
    at: tuple[float, float],
    zoom: float,
    angle: float,
) -> Image.Image:
    """`picture` turned and zoomed so that its `point` lies `at` a place of a frame; sampled between its pixels."""
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    (px, py), (ax, ay) = point, at
    coefficients = (cos, sin, px - cos * ax - sin * ay, -sin, cos, py + sin * ax - cos * ay)
    if picture.mode == "RGB":
        # Pillow samples black outside of a picture; a mirrored margin keeps black corners out of the training.
        margin = max(size)
        picture = _mirrored(picture, margin)
        coefficients = (*coefficients[:2], coefficients[2] + margin, *coefficients[3:5], coefficients[5] + margin)
    return picture.transform(size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)


def _mirrored(picture: Image.Image, margin: int) -> Image.Image:
    around = ((margin, margin), (margin, margin), (0, 0))
    return Image.fromarray(np.pad(np.asarray(picture), around, mode="symmetric"))


class _Replaced:
    """A folder beside `folder` that takes its place when all went well, and is removed when not."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._partial = folder.with_name(folder.name + ".partial")

    def __enter__(self) -> Path:
        if self._folder.exists() and any(self._folder.iterdir()) and not (self._folder / "SOURCES.json").is_file():
            raise UsageError(f"{self._folder} holds files and no SOURCES.json of an earlier run: give another folder")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        return self._partial

    def __exit__(self, kind: object, _error: object, _trace: object) -> None:
        if kind is None:
            shutil.rmtree(self._folder, ignore_errors=True)
            os.replace(self._partial, self._folder)
        else:
            shutil.rmtree(self._partial, ignore_errors=True)


def _seconds(rows: Sequence[MediaFile], kind: str) -> float:
    return round(sum(row.num_frames / row.fps for row in rows if row.kind == kind), 1)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _result(code: int, counts: dict[str, object]) -> int:
    if "message" in counts:
        _say(str(counts["message"]))
    print(json.dumps({"exit_code": code, **counts}, ensure_ascii=False))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
