"""How fast the codec encodes, beside what this machine can do at all; run by `make bench`, never by pytest.

    python tests/benchmarks/bench_codec.py [--family CVVAEModel] [--rounds 5] [--threads 2] [--plain-malloc]

One run measures everything in turns (matrix product, clip, image, and again), so that a busy neighbour slows all of
them, and reports medians. Floating point operations are counted on the published architecture, every padded frame and
every tap included, as a caller gets that much work done; the operations that are really executed are fewer (an image
needs one temporal tap of three) and are reported beside it. Weights are random: their values do not change the speed.

Two ceilings are shown: torch's own matrix product, and a matrix product as a 1x1 convolution, which goes through
oneDNN instead of MKL. On processors that MKL does not favour the second is the honest one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cvvae
from cvvae.layers import Attention, FrameConv, PointwiseLinear, SpaceTimeConv
from pipeline.config import CPU_ENVIRONMENT

CLIP = (1, 3, 17, 256, 256)
IMAGE = (1, 3, 1, 256, 256)
MATRIX = 2048
WIDTH = 512  # of the model's widest layers


def published_flops(config: cvvae.CVVAEConfig, shape: tuple[int, ...]) -> int:
    """Operations of one encoder call of the published architecture: two for each multiplication with its addition."""
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, SpaceTimeConv | FrameConv):
            total += 2 * module.weight.numel() * output.numel() // output.shape[1]
        elif isinstance(module, PointwiseLinear):
            total += 2 * module.weight.numel() * output.numel() // output.shape[-1]
        elif isinstance(module, Attention):
            B, C, T, H, W = output.shape
            total += 4 * B * T * C * (H * W) ** 2

    with torch.device("meta"):
        encoder = cvvae.CVVAE(config).encoder
        for module in encoder.modules():
            module.register_forward_hook(count)
        encoder(torch.empty(shape))
    return total


def executed_flops(config: cvvae.CVVAEConfig, shape: tuple[int, ...]) -> int:
    """What this package really computes for it, by torch's counter."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        cvvae.CVVAE(config).encoder(torch.empty(shape))
    return int(counter.get_total_flops())


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock time of one call, the device's queue drained."""
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Most memory that one call adds to what was there; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # What the allocator kept from the call before would hide the peak of this one.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of the resident set
    except (OSError, AttributeError):
        return None
    before = _resident_kib("VmRSS")
    run()
    return 1024 * (_resident_kib("VmHWM") - before)


def _resident_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def measure(family: str, rounds: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Medians over the rounds, as one JSON object."""
    config = cvvae.CVVAEConfig.from_published({"_class_name": family})
    vae = cvvae.CVVAE(config).to(device, dtype).eval()
    matrix = torch.randn(MATRIX, MATRIX, device=device, dtype=dtype)
    # 16 images, as on one thread torch gives a 1x1 convolution of fewer to MKL after all.
    field = torch.randn(16, WIDTH, 32, 32, device=device, dtype=dtype)
    field = field.contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(WIDTH, WIDTH, 1, 1, device=device, dtype=dtype)
    inputs = {name: torch.rand(shape, device=device, dtype=dtype) * 2 - 1 for name, shape in SHAPES.items()}
    runs: dict[str, tuple[Callable[[], Any], int]] = {
        "matmul": (lambda: matrix @ matrix, 2 * MATRIX**3),
        "matmul_onednn": (lambda: torch.conv2d(field, kernel), 2 * WIDTH * field.numel()),
        "clip": (lambda: vae.encode(inputs["clip"]), published_flops(config, CLIP)),
        "image": (lambda: vae.encode(inputs["image"]), published_flops(config, IMAGE)),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, (run, _) in runs.items():
            repeats = 1 if name == "clip" else 5
            taken = statistics.median(seconds(run, device) for _ in range(repeats))
            if turn > 0:  # the first turn warms up
                times[name].append(taken)
    median_s = {name: statistics.median(values) for name, values in times.items()}
    rate = {name: flops / median_s[name] for name, (_, flops) in runs.items()}
    width = config.block_out_channels[0]
    largest_bytes = width * math.prod(CLIP[2:]) * torch.empty((), dtype=dtype).element_size()
    peak = peak_bytes(runs["clip"][0], device)
    return {
        "family": family,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "median_s": median_s,
        "published_gflop": {"clip": runs["clip"][1] / 1e9, "image": runs["image"][1] / 1e9},
        "executed_gflop": {name: executed_flops(config, shape) / 1e9 for name, shape in SHAPES.items()},
        "gflop_per_s": {name: value / 1e9 for name, value in rate.items()},
        "clip_frames_per_s": CLIP[2] / median_s["clip"],
        "images_per_s": 1 / median_s["image"],
        "clip_share_of_matmul": rate["clip"] / rate["matmul"],
        "clip_share_of_onednn_matmul": rate["clip"] / rate["matmul_onednn"],
        "image_rate_share_of_clip_rate": rate["image"] / rate["clip"],
        "largest_activation_bytes": largest_bytes,
        "peak_bytes": peak,
        "peak_in_largest_activations": None if peak is None else peak / largest_bytes,
        "max_resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


SHAPES = {"clip": CLIP, "image": IMAGE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=["CVVAEModel", "CVVAESD3Model"], action="append", help="default: both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--plain-malloc", action="store_true", help="without the environment that encoders get")
    options = parser.parse_args()
    if not options.plain_malloc and not CPU_ENVIRONMENT.items() <= os.environ.items():
        # The allocator reads its settings when a process begins.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **CPU_ENVIRONMENT})
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        for family in options.family or ["CVVAEModel", "CVVAESD3Model"]:
            found = measure(family, options.rounds, torch.device(options.device), getattr(torch, options.dtype))
            print(json.dumps(found, indent=2), flush=True)


if __name__ == "__main__":
    main()
