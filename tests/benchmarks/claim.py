"""The claim at small scale: a text-to-video model moves into the latents of a compatible video VAE almost for nothing.

    PYTHONPATH=.:tests python tests/benchmarks/claim.py --teacher FOLDER --output FOLDER [--base-steps 720] [--steps 48]

Run by `make claim TEACHER=FOLDER`; pytest runs two steps of it. The claim is CV-VAE's (arXiv 2405.20279, section 4.3):
a model that was trained on an image VAE's latents works on those of a video VAE made compatible with it, after little
tuning, and makes four times the frames; on an independent video VAE's it does not.

1. Clips of 17 frames of one coloured shape that moves, with a caption, drawn by a seed.
2. A small `UNet3DConditionModel` is trained on the *image* VAE's latents of frames 0, 4, 8, ...: the base.
3. It is moved to the latents of whole clips of (a) `compatible`, a video VAE made for that image VAE, and (b) `other`,
   one of the same architecture trained without regularisation; each with the output layer alone and as a whole, with
   the same steps, rates, noise and clips. The scale and shift of (b) are set so that its latents have the mean and
   deviation of (a)'s, as its owner would set them.

Measured: the validation loss (v-prediction, fixed noise, clips that are not trained on) against step; and videos of
the validation captions: whether the asked colour is seen, and moves as asked. Every run is one of
`jobs/finetune_t2v.py`; finished ones are kept, and the same command goes on. Captions are embedded by a fixed vector a
word: a text encoder would learn nothing here.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latents import MODEL, commit_records, manifest, record
from torch import Tensor

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
_DIM = 32
_FRAMES = 17
_FPS = 8.0
_ROWS_PER_SHARD = 64
TUNES = ("output-layer", "all")
_SHOWN_AT = (0, 1 / 6, 1 / 3, 1 / 2, 1)


@dataclasses.dataclass(frozen=True)
class Clip:
    """uint8 frames (17, side, side, 3) and what they show."""

    frames: Frames
    colour: str
    shape: str
    direction: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moves {self.direction}"


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
    """Runs what is not finished yet, then prints the table and draws the sheet; returns the exit code."""
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    began_s = time.perf_counter()
    teacher = load_teacher(str(arguments.teacher))
    train, held_out = draw_clips(arguments.clips, arguments.size, 1), draw_clips(arguments.held_out, arguments.size, 2)
    spaces = make_spaces(teacher, arguments, train)
    facts = {}
    for name, space in spaces.items():
        for part, clips in (("train", train), ("held-out", held_out)):
            write_output(output / "latents" / f"{name}-{part}", space, clips, name)
        facts[name] = statistics_of(encode(space, held_out), encode(spaces["image"], held_out))
        print(f"{name}: {facts[name]}", flush=True)
    (output / "model").mkdir(exist_ok=True)
    config = output / "model" / "config.json"
    config.write_text(json.dumps(model_config(teacher.latent_channels, arguments.size, arguments.width), indent=1))
    base = output / "base"
    if not tuned(base, "image", arguments, ["--model-config", str(config), "--tune", "all"], is_base=True):
        return 1
    for name in ("compatible", "other"):
        for tune in TUNES:
            how = ["--model", str(base / "final"), "--tune", tune]
            if not tuned(output / f"{name}-{tune}", name, arguments, how, is_base=False):
                return 1
    results = collect(output, spaces, held_out, arguments)
    document = {
        "settings": {key: str(value) for key, value in sorted(vars(arguments).items())},
        "latents": facts,
        "runs": results,
        "seconds_of_this_command": round(time.perf_counter() - began_s),
    }
    (output / "claim.json").write_text(json.dumps(document, indent=2) + "\n")
    table = render(results)
    (output / "claim.md").write_text(table)
    print(table)
    return 0


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
    return Clip(frames=frames, colour=colour, shape=shape, direction=direction)


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
        max_length=16,
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


def tuned(folder: Path, space: str, arguments: argparse.Namespace, how: Sequence[str], *, is_base: bool) -> bool:
    """One run of the tuning job; whether it is done."""
    latents = arguments.output / "latents"
    tune = how[how.index("--tune") + 1]
    steps = arguments.base_steps if is_base else arguments.steps
    lr = arguments.base_lr if is_base else arguments.lr if tune == "all" else arguments.output_lr
    every = 60 if is_base else max(1, steps // 6)
    print(f"{folder.name}: {steps} steps", flush=True)
    given = {
        "latents": latents / f"{space}-train",
        "validation": latents / f"{space}-held-out",
        "validation-clips": arguments.held_out,
        "output": folder,
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
    output: Path, spaces: Mapping[str, Space], held_out: Sequence[Clip], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Losses and videos of every run; draws the sheet."""
    asked = held_out[: arguments.videos]
    shown = asked[: arguments.shown]
    results = []
    pictures: list[Row] = []
    runs = [("base", "image", output / "base", "the base in the image VAE's latents, every fourth frame")]
    for name in ("compatible", "other"):
        runs.append((f"{name}, not tuned", name, output / "base", f"{name}: not tuned"))
        runs += [(f"{name}, {t}", name, output / f"{name}-{t}", f"{name}: {t} tuned") for t in TUNES]
    for label, space, folder, title in runs:
        videos = make_videos(folder / "final", spaces[space], asked, arguments)
        rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
        if label.endswith("not tuned"):
            rows = [json.loads((output / f"{space}-{TUNES[0]}" / "validation.jsonl").read_text().splitlines()[0])]
        results.append({"run": label, "validation": rows, **judge(videos, asked)})
        print(f"{label}: {judge(videos, asked)}", flush=True)
        places = spread(len(videos[0]), 5)
        pictures.append(Row(label=title, pictures=[v[p] for v in videos[: len(shown)] for p in places]))
    real = {name: judge(_round_trip(spaces[name], asked), asked) for name in spaces}
    results.append({"run": "real clips through each VAE", "validation": [], **real["image"], "by_space": real})
    captions = ", ".join(clip.caption for clip in shown)
    sheet = grid(f"five frames each: {captions}", pictures, height_px=64)
    sheet.save(output / "claim.jpg", quality=88)
    return results


def _round_trip(space: Space, clips: Sequence[Clip]) -> list[Frames]:
    latents = (encode(space, clips) - space.shift_factor) * space.scaling_factor
    return space.frames(latents)


def make_videos(model: Path, space: Space, clips: Sequence[Clip], arguments: argparse.Namespace) -> list[Frames]:
    """A video for the caption of each clip, by the model in a folder."""
    loaded = load_model(str(model), None)
    network = loaded.model.eval()
    texts = [embed(clip.caption) for clip in clips]
    text = torch.from_numpy(np.stack(texts).astype(np.float32))
    conditions = Conditions(text=text, text_mask=torch.ones(text.shape[:2], dtype=torch.bool))
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


def render(results: Sequence[Mapping[str, Any]]) -> str:
    """Validation loss by step, and what the videos show."""
    by_run = {result["run"]: result for result in results}
    base = by_run["base"]["validation"][-1]["loss"]
    steps = [row["step"] for row in by_run[f"compatible, {TUNES[0]}"]["validation"]]
    shown = sorted({steps[round(share * (len(steps) - 1))] for share in _SHOWN_AT})
    head = ["moved to, tuned", *(f"step {step}" for step in shown), "colour", "colour and motion"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    blank = " | ".join("" for _ in shown[1:])
    said = by_run["base"]
    lines.append(f"| the base itself, image latents | {base:.3f} | {blank} | {_shares(said)} |")
    for name in ("compatible", "other"):
        said = by_run[f"{name}, not tuned"]
        lines.append(f"| {name}, not tuned | {said['validation'][0]['loss']:.3f} | {blank} | {_shares(said)} |")
        for tune in TUNES:
            said = by_run[f"{name}, {tune}"]
            losses = {row["step"]: row["loss"] for row in said["validation"]}
            cells = " | ".join(f"{losses[step]:.3f}" for step in shown)
            lines.append(f"| {name}, {tune} | {cells} | {_shares(said)} |")
    real = by_run["real clips through each VAE"]["by_space"]
    ceiling = ", ".join(f"{name} {_shares(values)}" for name, values in real.items())
    lines += ["", f"Colour, and colour and motion, of the clips themselves through each VAE: {ceiling}."]
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


def _shares(values: Mapping[str, Any]) -> str:
    return f"{values['colour']:.0%} | {values['colour_and_motion']:.0%}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--teacher", type=Path, required=True, help="frozen image VAE: folder, or TAESD-family files")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--compatible", default="small", help="video VAE made compatible with the image VAE")
    parser.add_argument("--other", type=Path, default=_ROOT / "tests" / "data" / "unregularised")
    parser.add_argument("--clips", type=int, default=432, help="to train on")
    parser.add_argument("--held-out", type=int, default=16, help="to validate on, and captions of the videos")
    parser.add_argument("--size", type=int, default=48, help="side in pixels")
    parser.add_argument("--width", type=int, default=32, help="channels of the model's first level")
    parser.add_argument("--base-steps", type=int, default=720)
    parser.add_argument("--steps", type=int, default=48, help="of each tuning")
    parser.add_argument("--batch", type=int, default=8)
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
