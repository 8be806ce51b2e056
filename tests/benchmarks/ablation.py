"""The paper's ablation at small scale: does regularising the latents make them compatible, and which way works best.

    python tests/benchmarks/ablation.py --teacher FOLDER --output FOLDER [--steps 400] [--seeds 0,1] [--arms both,none]

Run by `make ablation TEACHER=FOLDER`; pytest runs two steps of it. Source: CV-VAE, arXiv 2405.20279, tables 6 and 7.

Every arm trains the same model from the same start on the same batches for the same number of steps; only the latent
regularisation differs. Two arms run at a time, one thread each. What comes out of clips that were not trained on:

* video: the video VAE's own reconstruction against the clip;
* image decoder: the teacher's decoder on the video latents against frames 0, 4, 8, ... (are the latents readable?);
* any of group: the same against each frame of a latent's group, as "slice" is trained for the frames 0, 4, 8, ...;
* image encoder: the video decoder on the teacher's latents of these frames against the clip.

Each finished run leaves a file of results in the output folder and is not run again with the same settings; from an
interrupted run nothing is kept. The weights of the arm without regularisation stay there too. Objective: L1, the KL
term, and the regularisation as in the paper (squared L2, weight 1); no perceptual term and no discriminator, which at
this scale would cost more than they give.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cvvae.checkpoint import read_config
from cvvae.losses import LossConfig
from cvvae.metrics import psnr_db, to_pixels
from cvvae.model import CVVAE
from cvvae.teachers import FrozenTeacher, load_teacher
from cvvae.training import Stage, Trainer, TrainerConfig
from pipeline.config import DecodeLimits
from pipeline.training_clips import ClipsConfig, ClipSetting, TrainingClips

_ROOT = Path(__file__).resolve().parent.parent.parent
_CLIPS = _ROOT / "tests" / "data" / "clips"
TRAINED_ON = "bunny_[bfu]*.mp4", "city_[gpst]*.mp4"
HELD_OUT = "bunny_yawn.mp4", "city_waves.mp4", "meadow_rocks.mp4"
_HELD_OUT_SEED = 2405
_READABLE_DB = 3.0

BASE = LossConfig(perceptual_weight=0, adversarial_weight=0, sample_posterior=False, lambda_decoder=0, lambda_encoder=0)
ARMS = {
    "none": BASE,
    "encoder": dataclasses.replace(BASE, lambda_encoder=1),
    "decoder": dataclasses.replace(BASE, lambda_decoder=1),
    "both": dataclasses.replace(BASE, lambda_decoder=1, lambda_encoder=1),
    "decoder-first": dataclasses.replace(BASE, lambda_decoder=1, mapping="first"),
    "decoder-slice": dataclasses.replace(BASE, lambda_decoder=1, mapping="slice"),
    "decoder-average": dataclasses.replace(BASE, lambda_decoder=1, mapping="average"),
}
"""Objective of each arm; where the name says no mapping it is "random"."""
FIGURES = {
    "video": "video",
    "image_decoder": "image decoder",
    "image_decoder_group": "any of group",
    "image_encoder": "image encoder",
}


def main(argv: Sequence[str]) -> int:
    """Runs what is not finished yet, then prints the table; returns the exit code."""
    arguments = _parser().parse_args(argv)
    unknown = [arm for arm in arguments.arms if arm not in ARMS]
    if unknown:
        _parser().error(f"unknown arms {', '.join(unknown)}; known: {', '.join(ARMS)}")
    torch.set_num_threads(arguments.threads)
    if arguments.run is not None:
        arm, seed = arguments.run.rsplit(":", 1)
        run(arm, int(seed), arguments)
        return 0
    arguments.output.mkdir(parents=True, exist_ok=True)
    # Seed by seed, so that an ablation that is cut short has every arm once.
    runs = [(arm, seed) for seed in arguments.seeds for arm in arguments.arms]
    pending = [(arm, seed) for arm, seed in runs if read_result(arm, seed, arguments) is None]
    print(f"{len(runs)} runs of {arguments.steps} steps, {len(runs) - len(pending)} finished before", flush=True)
    load_teacher(str(arguments.teacher))  # a wrong path ends here, not in every run
    failed = _run_all(pending, arguments, argv)
    results = [result for arm, seed in runs if (result := read_result(arm, seed, arguments)) is not None]
    if results:
        table = render(results)
        document = {"settings": settings(arguments), "runs": results}
        (arguments.output / "ablation.json").write_text(json.dumps(document, indent=2) + "\n")
        (arguments.output / "ablation.md").write_text(table)
        print(table)
    return 1 if failed else 0


def run(arm: str, seed: int, arguments: argparse.Namespace) -> None:
    """Trains and judges one arm; writes its file when all is done."""
    began = time.perf_counter()
    teacher = load_teacher(str(arguments.teacher))
    config = dataclasses.replace(read_config(arguments.model), latent_channels=teacher.latent_channels, untrained=False)
    torch.manual_seed(seed)
    vae = CVVAE(config)
    stage = Stage(steps=arguments.steps, lr=arguments.lr, warmup_steps=arguments.steps // 20, loss=ARMS[arm])
    trainer_config = TrainerConfig(seed=seed, ema_decay=0, optimizer=arguments.optimizer)
    trainer = Trainer(vae, [stage], trainer_config, teacher=teacher)
    setting = ClipSetting(
        kind="video",
        width_px=arguments.size_px,
        height_px=arguments.size_px,
        num_frames=arguments.frames,
        batch_size=arguments.batch,
        share=1.0,
    )
    losses: list[float] = []
    batches = _clips(arguments.input, setting, seed)
    try:
        for _ in range(arguments.steps):
            report = trainer.train_step(next(batches).clips)
            losses.append(report.losses["total"].item())
            if report.step % 50 == 0:
                print(f"{arm} seed {seed} step {report.step}: {losses[-1]:.4f}", flush=True)
    finally:
        batches.close()
    trained_s = time.perf_counter() - began
    vae.eval()
    clips = held_out_clips(arguments)
    figures = judge(vae, teacher, clips)
    if arm == "none":
        vae.save_pretrained(arguments.output / f"none-seed{seed}")
    tail = losses[-max(1, len(losses) // 10) :]
    result = {
        "arm": arm,
        "seed": seed,
        "fingerprint": fingerprint(arguments),
        **figures,
        "teacher": judge_teacher(teacher, clips),
        "final_loss": statistics.fmean(tail),
        "seconds": round(trained_s, 1),
    }
    path = _result_path(arm, seed, arguments)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(result, indent=2) + "\n")
    beside.replace(path)


@torch.no_grad()
def judge(vae: CVVAE, teacher: FrozenTeacher, clips: Sequence[Tensor]) -> dict[str, float]:
    """PSNR in dB, mean over the frames of all clips (1, 3, T, H, W) in [-1, 1]; see the head of the module."""
    found: dict[str, list[float]] = {name: [] for name in FIGURES}
    for clip in clips:
        latents = vae.encode(clip).latent_dist.mode()
        keys = clip[:, :, ::4]
        found["video"] += _psnr(vae.decode(latents).sample, clip)
        images = teacher.decode_latents(latents)
        found["image_decoder"] += _psnr(images, keys)
        found["image_decoder_group"] += _psnr(images.repeat_interleave(4, dim=2)[:, :, 3:], clip)
        found["image_encoder"] += _psnr(vae.decode(teacher.encode_frames(keys)).sample, clip)
    return {name: statistics.fmean(values) for name, values in found.items()}


@torch.no_grad()
def judge_teacher(teacher: FrozenTeacher, clips: Sequence[Tensor]) -> float:
    """What the image VAE itself reaches on frames 0, 4, 8, ...: the most that "image decoder" can be."""
    keys = [clip[:, :, ::4] for clip in clips]
    values = [v for key in keys for v in _psnr(teacher.decode_latents(teacher.encode_frames(key)), key)]
    return statistics.fmean(values)


def held_out_clips(arguments: argparse.Namespace) -> list[Tensor]:
    """The clips that judge: the same for every arm and seed."""
    setting = ClipSetting(
        kind="video",
        width_px=arguments.held_out_size_px,
        height_px=arguments.held_out_size_px,
        num_frames=arguments.held_out_frames,
        batch_size=1,
        share=1.0,
    )
    batches = _clips(arguments.held_out, setting, _HELD_OUT_SEED)
    try:
        return [next(batches).clips.float() / 127.5 - 1 for _ in range(arguments.held_out_clips)]
    finally:
        batches.close()


def render(results: Sequence[dict[str, Any]]) -> str:
    """The table: per arm the mean over its seeds, and in brackets half the distance of the extremes."""
    by_arm = {arm: [result for result in results if result["arm"] == arm] for arm in ARMS}
    lines = ["| arm | " + " | ".join(FIGURES.values()) + " | seeds | s a run |", "|---|" + "---|" * (len(FIGURES) + 2)]
    for arm, of_arm in by_arm.items():
        if of_arm:
            cells = [_cell([result[name] for result in of_arm]) for name in FIGURES]
            seconds = statistics.fmean(result["seconds"] for result in of_arm)
            lines.append(f"| {arm} | {' | '.join(cells)} | {len(of_arm)} | {seconds:.0f} |")
    ceiling = statistics.fmean(result["teacher"] for result in results)
    lines += ["", f"PSNR in dB on held-out clips. Image decoder at most {ceiling:.2f}: the teacher on its own latents."]
    return "\n".join([*lines, *verdicts(by_arm)]) + "\n"


def verdicts(by_arm: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The paper's two expectations, and whether they hold here; noise is the largest distance between two seeds."""
    found = []
    if by_arm["none"] and by_arm["decoder"]:
        none, decoder = (_mean(by_arm[arm], "image_decoder") for arm in ("none", "decoder"))
        found.append(
            f"* Without regularisation the image decoder reads the latents {decoder - none:.2f} dB worse than with it: "
            + ("as expected." if decoder - none > _READABLE_DB else f"NOT the {_READABLE_DB} dB that were expected.")
        )
    rivals = {arm: of_arm for arm, of_arm in by_arm.items() if arm.startswith("decoder-") and of_arm}
    for name in ("video", "image_decoder_group") if by_arm["decoder"] and rivals else ():
        values = [[result[name] for result in of_arm] for of_arm in (by_arm["decoder"], *rivals.values())]
        noise = max(max(of_arm) - min(of_arm) for of_arm in values)
        best_mean, best = max((_mean(of_arm, name), arm) for arm, of_arm in rivals.items())
        ahead = _mean(by_arm["decoder"], name) - best_mean
        found.append(
            f"* Random mapping against the best other one, {FIGURES[name]} ({best}): {ahead:+.2f} dB, noise "
            f"{noise:.2f} dB: " + ("best or within noise, as expected." if ahead >= -noise else "NOT as expected.")
        )
    return ["", *found] if found else []


def _mean(results: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.fmean(result[name] for result in results)


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the figures of a run depend on, besides arm and seed."""
    ignored = {"output", "arms", "seeds", "parallel", "threads", "run"}
    return {name: str(value) for name, value in sorted(vars(arguments).items()) if name not in ignored}


def fingerprint(arguments: argparse.Namespace) -> str:
    """Digest of the settings, the model's configuration and the objectives."""
    document = [settings(arguments), dataclasses.asdict(read_config(arguments.model))]
    document.append({arm: dataclasses.asdict(config) for arm, config in ARMS.items()})
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def read_result(arm: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The figures of a finished run with these settings; None where there are none."""
    path = _result_path(arm, seed, arguments)
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result if result["fingerprint"] == fingerprint(arguments) else None


def _result_path(arm: str, seed: int, arguments: argparse.Namespace) -> Path:
    return Path(arguments.output) / f"{arm}-seed{seed}.json"


def _run_all(pending: list[tuple[str, int]], arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Runs arms, a few at a time, in processes of their own, so that they share neither threads nor random numbers.

    Returns how many failed; whatever ends this ends them.
    """
    waiting = list(pending)
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    failed = 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while waiting or running:
            while waiting and len(running) < arguments.parallel:
                arm, seed = waiting.pop(0)
                running[arm, seed] = _start(arm, seed, arguments, argv)
            time.sleep(0.1)
            for (arm, seed), process in list(running.items()):
                if process.poll() is not None:
                    del running[arm, seed]
                    failed += not _report(arm, seed, process.returncode, arguments)
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
    return failed


def _start(arm: str, seed: int, arguments: argparse.Namespace, argv: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--run", f"{arm}:{seed}"]
    env = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    with _log_path(arm, seed, arguments).open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)


def _report(arm: str, seed: int, code: int, arguments: argparse.Namespace) -> bool:
    """Says how a run ended; whether it has a result."""
    result = read_result(arm, seed, arguments)
    if code or result is None:
        print(f"{arm} seed {seed}: FAILED with exit code {code}, see {_log_path(arm, seed, arguments)}", flush=True)
        return False
    said = ", ".join(f"{label} {result[name]:.2f} dB" for name, label in FIGURES.items())
    print(f"{arm} seed {seed}: {said}, {result['seconds']:.0f} s", flush=True)
    return True


def _log_path(arm: str, seed: int, arguments: argparse.Namespace) -> Path:
    return Path(arguments.output) / f"{arm}-seed{seed}.log"


def _clips(inputs: str, setting: ClipSetting, seed: int) -> TrainingClips:
    config = ClipsConfig(input=inputs, cache_gb=2.0)
    return TrainingClips(config, DecodeLimits(decode_processes=1), [(1, [setting])], seed=seed)


def _psnr(frames: Tensor, reference: Tensor) -> list[float]:
    """Per frame of clips (1, 3, T, H, W) in [-1, 1]."""
    a, b = (to_pixels(clip[0].transpose(0, 1)) for clip in (frames, reference))
    return [float(value) for value in psnr_db(a, b)]


def _cell(values: Sequence[float]) -> str:
    spread = (max(values) - min(values)) / 2
    return f"{statistics.fmean(values):.2f}" + (f" (±{spread:.2f})" if len(values) > 1 else "")


def _parser() -> argparse.ArgumentParser:
    def names(text: str) -> list[str]:
        return [part.strip() for part in text.split(",")]

    def seeds(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError
        return int(text)

    def rate(text: str) -> float:
        if not 0 < float(text) < math.inf:
            raise ValueError
        return float(text)

    def repository(globs: Sequence[str]) -> str:
        return ",".join(str(_CLIPS / glob) for glob in globs)

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True, help="frozen image VAE: what cvvae.load_teacher takes")
    parser.add_argument("--output", type=Path, required=True, help="folder of results; finished runs in it are kept")
    parser.add_argument("--model", type=Path, default=_ROOT / "cvvae/weights/small", help="folder with a config.json")
    parser.add_argument("--input", default=repository(TRAINED_ON), help="videos to train on, as the training job takes")
    parser.add_argument("--held-out", default=repository(HELD_OUT), help="videos to judge by")
    parser.add_argument("--arms", type=names, default=list(ARMS), help=f"some of {','.join(ARMS)}")
    parser.add_argument("--seeds", type=seeds, default=[0, 1])
    parser.add_argument("--steps", type=positive, default=400, help="of every arm")
    parser.add_argument("--lr", type=rate, default=1e-3)
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon", help="muon learns more in few steps")
    parser.add_argument("--batch", type=positive, default=4, help="clips of a batch")
    parser.add_argument("--size-px", type=positive, default=64, help="side of training crops, a multiple of 8")
    parser.add_argument("--frames", type=positive, default=9, help="frames of training crops, 1 + 4 k")
    parser.add_argument("--held-out-clips", type=positive, default=12)
    parser.add_argument("--held-out-size-px", type=positive, default=128)
    parser.add_argument("--held-out-frames", type=positive, default=17)
    parser.add_argument("--parallel", type=positive, default=2, help="arms that run at a time")
    parser.add_argument("--threads", type=positive, default=1, help="of each arm")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
