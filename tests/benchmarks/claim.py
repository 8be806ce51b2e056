"""The claim at small scale: a text-to-video model moves into the latents of a compatible video VAE almost for nothing.

    PYTHONPATH=.:tests python tests/benchmarks/claim.py --teacher FOLDER --output FOLDER [--base-steps 3000]

Run by `make claim TEACHER=FOLDER`; pytest runs two steps of it. The claim is CV-VAE's (arXiv 2405.20279, section 4.3):
a model that was trained on an image VAE's latents works on those of a video VAE made compatible with it, after little
tuning, and makes four times the frames; on an independent video VAE's it does not.

1. Clips of 17 frames with captions: *shapes*, one coloured shape that moves, drawn by a seed; and *real* ones, crops of
   the videos in tests/data/clips, which neither video VAE was trained on.
2. For each of these subjects a small `UNet3DConditionModel` is trained on the *image* VAE's latents of frames 0, 4, 8,
   ...: the base.
3. It is moved to the latents of whole clips of (a) `compatible`, a video VAE made for that image VAE, and (b) `other`,
   one of the same architecture trained without regularisation; each with the output layer alone and as a whole, with
   the same steps, rates, noise and clips. The scale and shift of (b) are set so that its latents have the mean and
   deviation of (a)'s, as its owner would set them.

Measured: the validation loss (v-prediction, fixed noise, clips that are not trained on) against step; what the image
decoder makes of each space's latents; and videos: of shapes for the validation captions, judged by whether the asked
colour is seen, and moves as asked; of real clips for captions that were trained on, for people to look at. Every run is
one of `jobs/finetune_t2v.py`; finished ones are kept, and the same command goes on. Captions are embedded by a fixed
vector a word: a text encoder would learn nothing here. `time.json` has the seconds of every command that worked on it.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import resource
import shutil
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from builders import CLIP_VIDEOS
from latents import MODEL, commit_records, manifest, record
from PIL import Image
from results import circumstances
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import cvvae
from cvvae.teachers import FrozenTeacher, load_teacher
from jobs.finetune_t2v import main as finetune
from jobs.t2v_models import Conditions, load_model
from jobs.t2v_noise import scheduler_of
from jobs.t2v_sampling import sample_latents
from pipeline.codec import output_to_pixels
from pipeline.columns import (
    TextEmbedding,
    base_file,
    columns_store,
    commit_columns,
    new_manifest,
    open_columns,
    stored_captions_of,
    write_text_file,
)
from pipeline.commit import open_dataset
from pipeline.pictures import Frames, Row, grid, spread
from pipeline.records import Bucket, Commit
from pipeline.storage import ObjectStore, open_store

_ROOT = Path(__file__).resolve().parent.parent.parent
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 90, 240),
    "yellow": (235, 215, 40),
    "magenta": (220, 60, 220),
    "cyan": (50, 215, 225),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_GROUND = (28, 28, 32)
# Of the real videos those that are validated on.
_HELD_OUT_VIDEOS = ("bunny_face", "city_waves")
# Every third frame of 25 a second.
_REAL_STEP = 3
_DIM = 32
_FRAMES = 17
_FPS = 8.0
_ROWS_PER_SHARD = 64
TUNES = ("output-layer", "all")
_SHOWN_AT = (0, 1 / 6, 1 / 3, 1 / 2, 1)


@dataclasses.dataclass(frozen=True)
class Clip:
    """uint8 frames (17, side, side, 3) and what they show; colour and direction of shapes only."""

    frames: Frames
    caption: str
    colour: str | None = None
    direction: str | None = None


@dataclasses.dataclass(frozen=True)
class Subject:
    """What one base is trained on.

    Attributes:
        asked: the captions that videos are made for.
        is_judged: what the videos show can be told from their captions.
    """

    name: str
    train: Sequence[Clip]
    held_out: Sequence[Clip]
    asked: Sequence[Clip]
    base_steps: int
    is_judged: bool


@dataclasses.dataclass(frozen=True)
class Space:
    """A latent space: how clips get into it and latents become frames; the scale is that of the diffusion model."""

    name: str
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    def frames(self, latents: Tensor) -> list[Frames]:
        """Scaled latents (B, C, t, h, w) as uint8 frames (T, H, W, 3) each."""
        with torch.no_grad():
            decoded = self.decode(latents / self.scaling_factor + self.shift_factor)
        return [output_to_pixels(video) for video in decoded]


def main(argv: Sequence[str]) -> int:
    """Runs what is not finished yet, then prints the tables and draws the sheets; returns the exit code."""
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    teacher = load_teacher(str(arguments.teacher))
    (output / "model").mkdir(exist_ok=True)
    config = output / "model" / "config.json"
    config.write_text(json.dumps(model_config(teacher.latent_channels, arguments.size, arguments.width), indent=1))
    documents, tables = {}, []
    for subject in subjects(arguments):
        if subject.name not in arguments.subjects:
            continue
        root = output / subject.name
        with _timed(output, f"{subject.name}: latents"):
            spaces = make_spaces(teacher, arguments, subject.train)
            facts = {name: facts_of(space, spaces["image"], subject.held_out) for name, space in spaces.items()}
            for name, space in spaces.items():
                for part, clips in (("train", subject.train), ("held-out", subject.held_out)):
                    write_output(root / "latents" / f"{name}-{part}", space, clips, name)
                print(f"{subject.name}, {name}: {facts[name]}", flush=True)
        for run in RUNS:
            with _timed(output, f"{subject.name}: {run.folder}"):
                start = ["--model", str(root / "base" / "final")]
                start = ["--model-config", str(config)] if run.folder == "base" else start
                if not tuned(root, run, [*start, "--tune", run.tune], subject, arguments):
                    return 1
        with _timed(output, f"{subject.name}: videos"):
            found = collect(root, spaces, subject, arguments)
        documents[subject.name] = {"latents": facts, "runs": found}
        tables.append(render(found, facts, subject))
    took = time_of(output)
    document = {
        "settings": {key: str(value) for key, value in sorted(vars(arguments).items())},
        **circumstances(),
        "subjects": documents,
        "time": took,
    }
    (output / "claim.json").write_text(json.dumps(document, indent=2) + "\n")
    said = (
        f"All commands together: {took['wall_s'] / 60:.1f} minutes by the clock, {took['cpu_s'] / 60:.1f} of processor."
    )
    text = "\n".join([*tables, said]) + "\n"
    (output / "claim.md").write_text(text)
    print(text)
    return 0


@contextmanager
def _timed(output: Path, part: str) -> Iterator[None]:
    """Adds what a part takes to `time.json`; what is killed on the way is not in it."""
    began_s, cpu_began_s = time.perf_counter(), _cpu_s()
    yield
    path = output / "time.json"
    spent = json.loads(path.read_text()) if path.exists() else []
    spent.append(
        {"part": part, "wall_s": round(time.perf_counter() - began_s, 2), "cpu_s": round(_cpu_s() - cpu_began_s, 2)}
    )
    path.write_text(json.dumps(spent, indent=1) + "\n")


def _cpu_s() -> float:
    """Of this process and the children that it has waited for."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def time_of(output: Path) -> dict[str, Any]:
    """Seconds by the clock and of the processor: of all commands that worked on an output, and by part."""
    parts: dict[str, dict[str, float]] = {}
    for row in json.loads((output / "time.json").read_text()):
        part = parts.setdefault(row["part"], {"wall_s": 0.0, "cpu_s": 0.0})
        for name in part:
            part[name] = round(part[name] + row[name], 2)
    return {name: round(sum(part[name] for part in parts.values()), 1) for name in ("wall_s", "cpu_s")} | {
        "parts": parts
    }


def subjects(arguments: argparse.Namespace) -> list[Subject]:
    """Shapes, and real clips."""
    shapes = draw_clips(arguments.held_out, arguments.size, 2)
    real = cut_clips(arguments.real_clips, arguments.size, 1, is_held_out=False)
    return [
        Subject(
            "shapes",
            draw_clips(arguments.clips, arguments.size, 1),
            shapes,
            shapes[: arguments.videos],
            arguments.base_steps,
            is_judged=True,
        ),
        Subject(
            "real",
            real,
            cut_clips(arguments.held_out, arguments.size, 2, is_held_out=True),
            real[: arguments.shown],
            arguments.real_base_steps,
            is_judged=False,
        ),
    ]


def cut_clips(count: int, side_px: int, seed: int, *, is_held_out: bool) -> list[Clip]:
    """Crops of the real videos, mirrored or not, from anywhere in them; each video equally often."""
    rng = np.random.default_rng(seed)
    paths = [path for path in CLIP_VIDEOS if (path.stem in _HELD_OUT_VIDEOS) == is_held_out]
    # Another order than by name, which puts those of one scene side by side.
    paths = [paths[index] for index in np.random.default_rng(7).permutation(len(paths))][:count]
    videos = [(_frames(path, side_px * 3 // 2), path.with_suffix(".txt").read_text().strip()) for path in paths]
    clips = []
    for number in range(count):
        frames, caption = videos[number % len(videos)]
        length, height, width = frames.shape[:3]
        start = rng.integers(length - (_FRAMES - 1) * _REAL_STEP)
        top, left = rng.integers(height - side_px + 1), rng.integers(width - side_px + 1)
        cut = frames[start::_REAL_STEP][:_FRAMES, top : top + side_px, left : left + side_px]
        clips.append(Clip(np.ascontiguousarray(cut[:, :, ::-1] if rng.integers(2) else cut), caption))
    return clips


def _frames(path: Path, short_px: int) -> Frames:
    """All frames of a video (T, H, W, 3), the shorter side of so many pixels."""
    with av.open(str(path)) as container:
        pictures = [frame.to_image() for frame in container.decode(video=0)]
    scale = short_px / min(pictures[0].size)
    size = round(pictures[0].width * scale), round(pictures[0].height * scale)
    return np.stack([np.asarray(picture.resize(size, Image.Resampling.BOX)) for picture in pictures])


def draw_clips(count: int, side_px: int, seed: int) -> list[Clip]:
    """Moving shapes; a seed's clips are always the same, and every caption comes equally often."""
    rng = np.random.default_rng(seed)
    kinds = [(c, s, d) for c in COLOURS for s in SHAPES for d in DIRECTIONS]
    order = [kinds[index] for _ in range(-(-count // len(kinds))) for index in rng.permutation(len(kinds))]
    return [draw_clip(*kind, side_px, rng) for kind in order[:count]]


def draw_clip(colour: str, shape: str, direction: str, side_px: int, rng: np.random.Generator) -> Clip:
    """One shape on a dark ground that crosses a third to a half of the picture."""
    radius = side_px * rng.uniform(0.14, 0.2)
    way = side_px * rng.uniform(0.33, 0.5)
    step = np.array(DIRECTIONS[direction])
    # Of the line's middle; the shape stays inside all the way.
    room = side_px / 2 - radius - np.abs(step) * way / 2
    middle = side_px / 2 + rng.uniform(-1, 1, 2) * room
    places = [middle + step * way * (t / (_FRAMES - 1) - 0.5) for t in range(_FRAMES)]
    frames = np.stack([_draw(shape, COLOURS[colour], x, y, radius, side_px) for x, y in places])
    return Clip(frames, f"a {colour} {shape} moves {direction}", colour, direction)


def _draw(shape: str, colour: tuple[int, int, int], x: float, y: float, radius: float, side_px: int) -> Frames:
    # Four points a pixel in each direction, so that edges are smooth and motion below a pixel shows.
    points = (np.arange(side_px * 4) + 0.5) / 4
    dx, dy = points[None, :] - x, points[:, None] - y
    if shape == "circle":
        inside = dx**2 + dy**2 < radius**2
    elif shape == "square":
        inside = np.maximum(np.abs(dx), np.abs(dy)) < radius * 0.88
    else:
        inside = (dy < radius * 0.7) & (np.abs(dx) < (dy + radius) * 0.6)
    share = inside.reshape(side_px, 4, side_px, 4).mean(axis=(1, 3))[..., None]
    pixels = share * np.array(colour) + (1 - share) * np.array(_GROUND)
    return pixels.round().astype(np.uint8)


def make_spaces(teacher: FrozenTeacher, arguments: argparse.Namespace, clips: Sequence[Clip]) -> dict[str, Space]:
    """The image VAE's space and those of the two video VAEs, scaled as said in the head of the module."""
    image = Space(
        "image",
        lambda video: teacher.encode_frames(video[:, :, ::4]),
        teacher.decode_latents,
        teacher.scaling_factor,
        teacher.shift_factor,
    )
    compatible = _video_space("compatible", arguments.compatible)
    other = _video_space("other", str(arguments.other))
    few = clips[:64]
    theirs, ours = encode(compatible, few), encode(other, few)
    deviation = float(ours.std()) / float(theirs.std()) / compatible.scaling_factor
    mean = (float(theirs.mean()) - compatible.shift_factor) * compatible.scaling_factor
    other = dataclasses.replace(other, scaling_factor=1 / deviation, shift_factor=float(ours.mean()) - mean * deviation)
    return {"image": image, "compatible": compatible, "other": other}


def _video_space(name: str, source: str) -> Space:
    vae = cvvae.load(source).eval().requires_grad_(False)
    return Space(
        name,
        lambda video: vae.encode(video).latent_dist.mode(),
        lambda latents: vae.decode(latents).sample,
        vae.scaling_factor,
        vae.shift_factor,
    )


@torch.no_grad()
def encode(space: Space, clips: Sequence[Clip]) -> Tensor:
    """Unscaled latents (N, C, t, h, w)."""
    found = []
    for start in range(0, len(clips), 16):
        frames = np.stack([clip.frames for clip in clips[start : start + 16]])
        found.append(space.encode(torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1))
    return torch.cat(found)


def facts_of(space: Space, image: Space, clips: Sequence[Clip]) -> dict[str, float]:
    """Statistics of a space's latents, and what its own decoder and the image decoder make of them, in dB."""
    latents = encode(space, clips)
    scaled = (latents - space.shift_factor) * space.scaling_factor
    frames = [clip.frames for clip in clips]
    # In the image VAE's space there are frames 0, 4, 8, ... only, in both cases.
    own = [shown[::4] for shown in frames] if space.name == image.name else frames
    return {
        **statistics_of(latents, encode(image, clips)),
        "own_decoder_db": _psnr(space.frames(scaled), own),
        "image_decoder_db": _psnr(image.frames(scaled), [shown[::4] for shown in frames]),
    }


def _psnr(videos: Sequence[Frames], wanted: Sequence[Frames]) -> float:
    """The mean over videos of that over their frames together."""
    errors = [np.square(a.astype(np.float32) - b).mean() for a, b in zip(videos, wanted, strict=True)]
    return round(float(np.mean([10 * np.log10(255**2 / max(error, 1e-3)) for error in errors])), 2)


def statistics_of(latents: Tensor, image: Tensor) -> dict[str, float]:
    """Mean, deviation, and the mean correlation of the channels with the image VAE's latents of the same clips."""
    ours, theirs = (x.transpose(0, 1).flatten(1) for x in (latents, image))
    ours, theirs = (x - x.mean(1, keepdim=True) for x in (ours, theirs))
    correlation = (ours * theirs).mean(1) / (ours.square().mean(1) * theirs.square().mean(1)).sqrt().clamp_min(1e-9)
    values = {"mean": latents.mean(), "deviation": latents.std(), "correlation_with_image": correlation.mean()}
    return {name: round(float(value), 4) for name, value in values.items()}


def write_output(root: Path, space: Space, clips: Sequence[Clip], name: str) -> None:
    """An output as the encode job leaves it, with embeddings of its captions; one that is whole stays."""
    whole = root / "whole"
    if whole.exists():
        return
    shutil.rmtree(root, ignore_errors=True)
    store = open_store(str(root))
    latents = encode(space, clips).numpy()
    side = clips[0].frames.shape[1]
    bucket = Bucket(width_px=side, height_px=side, num_frames=_FRAMES)
    facts = dataclasses.replace(
        MODEL,
        model=name,
        latent_channels=latents.shape[1],
        scaling_factor=space.scaling_factor,
        shift_factor=space.shift_factor,
    )
    about = open_dataset(store, dataclasses.replace(manifest(dtype="float16"), model=facts))
    for start in range(0, len(clips), _ROWS_PER_SHARD):
        records = [
            dataclasses.replace(
                record(f"{place:05d}", bucket=bucket, caption=clips[place].caption),
                mean=latents[place].astype(np.float16),
            )
            for place in range(start, min(start + _ROWS_PER_SHARD, len(clips)))
        ]
        write_captions(store, commit_records(store, about, f"s{start:05d}", records))
    whole.touch()


def write_captions(store: ObjectStore, commit: Commit) -> None:
    """The embeddings of a committed shard's captions, as a column set beside it."""
    base = base_file(commit.files)
    assert base is not None
    about = new_manifest(
        "text",
        {},
        encoder="one vector a word",
        revision=None,
        weights_sha256="00" * 32,
        embedding_dim=_DIM,
        embedding_dtype="float16",
        max_length=64,
    )
    texts = columns_store(store, "text")
    open_columns(texts, about)
    captions = stored_captions_of(store, base, ("caption",))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "captions.parquet"
        found = [TextEmbedding(embedding=embed(caption), is_truncated=False) for caption in captions]
        num_rows = write_text_file(path, about, captions, found)
        commit_columns(texts, about, commit.shard_id, base, path, num_rows)


def embed(caption: str) -> np.ndarray[Any, np.dtype[np.float16]]:
    """One fixed vector a word, (words + 1, 32); the last one is the end."""
    words = [*caption.split(), "<end>"]
    seeds = [int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") for word in words]
    return np.stack([np.random.default_rng(seed).standard_normal(_DIM) for seed in seeds]).astype(np.float16)


def model_config(channels: int, side_px: int, width: int) -> dict[str, Any]:
    """The small text-to-video model."""
    return {
        "_class_name": "UNet3DConditionModel",
        "sample_size": side_px // 8,
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ["DownBlock3D", "CrossAttnDownBlock3D"],
        "up_block_types": ["CrossAttnUpBlock3D", "UpBlock3D"],
        "block_out_channels": [width, 2 * width],
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "cross_attention_dim": _DIM,
        "attention_head_dim": 2,
    }


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the tuning job: its folder, the latents that it learns, and what of the model learns."""

    folder: str
    space: str
    tune: str


RUNS = (
    Run("base", "image", "all"),
    *(Run(f"{space}-{tune}", space, tune) for space in ("compatible", "other") for tune in TUNES),
)


def tuned(root: Path, run: Run, how: Sequence[str], subject: Subject, arguments: argparse.Namespace) -> bool:
    """One run of the tuning job; whether it is done."""
    is_base, tune, space = run.folder == "base", run.tune, run.space
    steps = subject.base_steps if is_base else arguments.steps
    lr = arguments.base_lr if is_base else arguments.lr if tune == "all" else arguments.output_lr
    every = max(60, steps // 20) if is_base else max(1, steps // 12)
    print(f"{subject.name}, {run.folder}: {steps} steps", flush=True)
    given = {
        "latents": root / "latents" / f"{space}-train",
        "validation": root / "latents" / f"{space}-held-out",
        "validation-clips": arguments.held_out,
        "output": root / run.folder,
        "prediction": "v_prediction",
        "steps": steps,
        "batch-size": arguments.batch,
        "lr": lr,
        # A constant rate and a moving average: a base of fewer steps is one that was stopped earlier.
        "warmup-steps": 40 if is_base else 0,
        "ema-decay": 0.98 if is_base else 0,
        "validate-every": every,
        "log-every": every,
        "checkpoint-every": every,
        "keep-last": 1,
        "threads": arguments.threads,
        "seed": arguments.seed,
    }
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    return finetune([*how, *flags, "--local"]) == 0


def collect(
    root: Path, spaces: Mapping[str, Space], subject: Subject, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Losses and videos of every run; draws the sheet."""
    shown = subject.asked[: arguments.shown]
    results = []
    pictures = [] if subject.is_judged else _seen_by_the_image_decoder(spaces, shown)
    runs = [("base", "image", "base", "the base in the image VAE's latents, every fourth frame")]
    for name in ("compatible", "other"):
        runs.append((f"{name}, not tuned", name, "base", f"{name}: not tuned"))
        runs += [(f"{name}, {t}", name, f"{name}-{t}", f"{name}: {t} tuned") for t in TUNES]
    for label, space, folder, title in runs:
        videos = make_videos(root / folder / "final", spaces[space], subject.asked, arguments)
        losses = root / (f"{space}-{TUNES[0]}" if label.endswith("not tuned") else folder) / "validation.jsonl"
        rows = [json.loads(line) for line in losses.read_text().splitlines()]
        found = {"run": label, "validation": rows[:1] if label.endswith("not tuned") else rows}
        results.append(found | (judge(videos, subject.asked) if subject.is_judged else {}))
        pictures.append(_row(title, videos[: len(shown)]))
    if subject.is_judged:
        real = {name: judge(_round_trip(spaces[name], subject.asked), subject.asked) for name in spaces}
        results.append({"run": "the clips through each VAE", "validation": [], "by_space": real})
    # No wider than the pictures.
    title = textwrap.shorten("five frames each: " + "; ".join(clip.caption for clip in shown), 48 * len(shown))
    grid(title, pictures, height_px=64).save(root / "claim.jpg", quality=88)
    return results


def _row(label: str, videos: Sequence[Frames]) -> Row:
    return Row(label=label, pictures=[video[place] for video in videos for place in spread(len(video), 5)])


def _seen_by_the_image_decoder(spaces: Mapping[str, Space], clips: Sequence[Clip]) -> list[Row]:
    """Clips, and what the image decoder makes of their latents of each space."""
    rows = [_row("clips that were trained on", [clip.frames for clip in clips])]
    for name, space in spaces.items():
        scaled = (encode(space, clips) - space.shift_factor) * space.scaling_factor
        rows.append(_row(f"the image decoder on their {name} latents", spaces["image"].frames(scaled)))
    return rows


def _round_trip(space: Space, clips: Sequence[Clip]) -> list[Frames]:
    latents = (encode(space, clips) - space.shift_factor) * space.scaling_factor
    return space.frames(latents)


def make_videos(model: Path, space: Space, clips: Sequence[Clip], arguments: argparse.Namespace) -> list[Frames]:
    """A video for the caption of each clip, by the model in a folder."""
    loaded = load_model(str(model), None)
    network = loaded.model.eval()
    texts = [torch.from_numpy(embed(clip.caption).astype(np.float32)) for clip in clips]
    masks = [torch.ones(len(text), dtype=torch.bool) for text in texts]
    conditions = Conditions(text=pad_sequence(texts, batch_first=True), text_mask=pad_sequence(masks, batch_first=True))
    side = arguments.size // 8
    latents = sample_latents(
        network,
        loaded.adapter,
        scheduler_of(loaded.scheduler_config, None),
        (network.config.in_channels, 1 + (_FRAMES - 1) // 4, side, side),
        conditions,
        loaded.adapter.unconditional(conditions, torch.from_numpy(embed("").astype(np.float32))),
        num_steps=arguments.sample_steps,
        guidance=arguments.guidance,
        seed=arguments.seed,
    )
    return space.frames(latents)


def judge(videos: Sequence[Frames], clips: Sequence[Clip]) -> dict[str, float]:
    """Shares of the videos in which the asked colour is the one that is seen, and in which it also moves as asked."""
    seen, moving = [], []
    for frames, clip in zip(videos, clips, strict=True):
        areas = _areas(frames)
        is_seen = max(areas, key=lambda name: areas[name].sum()) == clip.colour and areas[clip.colour].sum() > 0
        seen.append(is_seen)
        moving.append(is_seen and _direction(areas[clip.colour]) == clip.direction)
    return {"colour": round(statistics.fmean(seen), 3), "colour_and_motion": round(statistics.fmean(moving), 3)}


def _areas(frames: Frames) -> dict[str, np.ndarray[Any, np.dtype[np.bool_]]]:
    """Where (T, H, W) each colour is nearer than the other ones and the ground, and not far."""
    known = [*COLOURS.values(), _GROUND]
    distances = np.stack([np.square(frames.astype(np.float32) - colour).sum(axis=-1) for colour in known])
    nearest, is_near = distances.argmin(axis=0), distances.min(axis=0) < 90**2
    return {name: (nearest == index) & is_near for index, name in enumerate(COLOURS)}


def _direction(area: np.ndarray[Any, np.dtype[np.bool_]]) -> str | None:
    """Where the middle of an area goes from the first to the last third; None where it is not seen or stands."""
    third = max(1, len(area) // 3)
    ends = []
    for part in (area[:third], area[-third:]):
        _, y, x = np.nonzero(part)
        if len(x) == 0:
            return None
        ends.append(np.array([x.mean(), y.mean()]))
    way = ends[1] - ends[0]
    if np.abs(way).max() < 0.08 * area.shape[2]:
        return None
    return max(DIRECTIONS, key=lambda name: float(way @ np.array(DIRECTIONS[name])))


def render(results: Sequence[Mapping[str, Any]], facts: Mapping[str, Mapping[str, float]], subject: Subject) -> str:
    """Validation loss by step, what the videos show, and what the image decoder sees."""
    by_run = {result["run"]: result for result in results}
    base = by_run["base"]["validation"][-1]["loss"]
    steps = [row["step"] for row in by_run[f"compatible, {TUNES[0]}"]["validation"]]
    shown = sorted({steps[round(share * (len(steps) - 1))] for share in _SHOWN_AT})
    head = ["moved to, tuned", *(f"step {step}" for step in shown)]
    head += ["colour", "colour and motion"] if subject.is_judged else []

    def line(label: str, cells: Sequence[str], said: Mapping[str, Any]) -> str:
        cells = [*cells, *[""] * (len(shown) - len(cells)), *(_shares(said) if subject.is_judged else [])]
        return f"| {' | '.join([label, *cells])} |"

    lines = [f"{subject.name}: {subject.base_steps} steps of the base", "", f"| {' | '.join(head)} |"]
    lines += ["|---" * len(head) + "|", line("the base itself, image latents", [f"{base:.3f}"], by_run["base"])]
    for name in ("compatible", "other"):
        said = by_run[f"{name}, not tuned"]
        lines.append(line(f"{name}, not tuned", [f"{said['validation'][0]['loss']:.3f}"], said))
        for tune in TUNES:
            said = by_run[f"{name}, {tune}"]
            losses = {row["step"]: row["loss"] for row in said["validation"]}
            lines.append(line(f"{name}, {tune}", [f"{losses[step]:.3f}" for step in shown], said))
    if subject.is_judged:
        real = by_run["the clips through each VAE"]["by_space"]
        ceiling = ", ".join(f"{name} {' and '.join(_shares(values))}" for name, values in real.items())
        lines += ["", f"Colour, and colour and motion, of the clips themselves through each VAE: {ceiling}."]
    seen = ", ".join(f"{name} {fact['image_decoder_db']:.1f} dB" for name, fact in facts.items())
    lines += ["", f"The image decoder on the latents of held-out clips, frames 0, 4, 8, ...: {seen}."]
    return "\n".join([*lines, *verdicts(by_run)]) + "\n"


def verdicts(by_run: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Whether it came out as the paper says."""
    base = by_run["base"]["validation"][-1]["loss"]
    start = {name: by_run[f"{name}, not tuned"]["validation"][0]["loss"] for name in ("compatible", "other")}
    end = {
        (name, tune): by_run[f"{name}, {tune}"]["validation"][-1]["loss"]
        for name in ("compatible", "other")
        for tune in TUNES
    }
    near = start["compatible"] - base < 0.5 * (start["other"] - base)
    few = all(end["compatible", tune] < end["other", tune] for tune in TUNES)
    return [
        "",
        f"* Before any tuning the loss is {start['compatible'] - base:+.3f} from the base's in compatible latents and "
        f"{start['other'] - base:+.3f} in the other's: " + ("as expected." if near else "NOT as expected."),
        f"* After tuning, compatible {end['compatible', 'output-layer']:.3f} (output layer) and "
        f"{end['compatible', 'all']:.3f} (all), other {end['other', 'output-layer']:.3f} and "
        f"{end['other', 'all']:.3f}: " + ("as expected." if few else "NOT as expected."),
    ]


def _shares(values: Mapping[str, Any]) -> list[str]:
    return [f"{values['colour']:.0%}", f"{values['colour_and_motion']:.0%}"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--teacher", type=Path, required=True, help="frozen image VAE: folder, or TAESD-family files")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--compatible", default="small", help="video VAE made compatible with the image VAE")
    parser.add_argument("--other", type=Path, default=_ROOT / "tests" / "data" / "unregularised")
    parser.add_argument("--subjects", nargs="+", choices=("shapes", "real"), default=("shapes", "real"))
    parser.add_argument("--clips", type=int, default=1296, help="shapes to train on")
    parser.add_argument("--real-clips", type=int, default=640, help="crops of real videos to train on")
    parser.add_argument("--held-out", type=int, default=16, help="to validate on, and captions of the videos")
    parser.add_argument("--size", type=int, default=48, help="side in pixels")
    parser.add_argument("--width", type=int, default=32, help="channels of the model's first level")
    parser.add_argument("--base-steps", type=int, default=3000, help="on shapes")
    parser.add_argument("--real-base-steps", type=int, default=1500, help="on real clips")
    parser.add_argument("--steps", type=int, default=96, help="of each tuning")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--base-lr", type=float, default=1.5e-3)
    parser.add_argument("--lr", type=float, default=5e-4, help="of tuning all")
    parser.add_argument("--output-lr", type=float, default=2e-3, help="of tuning the output layer")
    parser.add_argument("--videos", type=int, default=8, help="that are judged")
    parser.add_argument("--shown", type=int, default=3, help="in the sheet")
    parser.add_argument("--sample-steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
