"""How fast the codec encodes and decodes, beside what this machine can do at all; run by `make bench`, never by pytest.

    python tests/benchmarks/bench_codec.py [--model small] [--rounds 3] [--threads 2] [--device cuda --dtype bfloat16]
        [--compile] [--cuda-graphs] [--plain-malloc] [--results FOLDER]

One run measures everything in turns (matrix products, clip, image, stream, and again), so that a busy neighbour slows
all of them, and reports medians; shares are medians of the ratios within a turn. Two counts of operations:
*executed*, by torch's counter, what this package really computes; and *published*, every padded frame and every tap of
the published architecture, which is what a caller gets done. `small` has no published count. Its weights are trained,
those of the published families random here: values do not change the speed.

Two ceilings are measured: torch's own matrix product, and a matrix product as a 1x1 convolution, which goes through
oneDNN instead of MKL. On processors that MKL does not favour the second is the honest one.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cvvae
from cvvae.layers import Attention, FrameConv, PointwiseLinear, SpaceTimeConv, to_channels_last
from pipeline.config import CPU_ENVIRONMENT
from pipeline.cuda_graph import RecordedCall

sys.path.insert(0, str(Path(__file__).parent))

from results import add_results_option, report

CLIP = (1, 3, 17, 256, 256)
IMAGE = (1, 3, 1, 256, 256)
MATRIX = 2048
WIDTH = 512  # of the published models' widest layers
MODELS = ("small", "CVVAEModel", "CVVAESD3Model")


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


def executed_flops(run: Callable[[], Any]) -> int:
    """What a call really computes, by torch's counter; runs it."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Time of one call, the device's queue drained; on one CPU thread processor time, which no neighbour lengthens."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


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


@dataclass(frozen=True)
class Measured:
    """A call that is measured: what it works on, its operations, and how often it runs in a turn."""

    name: str
    run: Callable[[], Any]
    executed: int
    published: int | None = None
    num_frames: int = 1
    repeats: int = 5


def load(model: str, device: torch.device, dtype: torch.dtype) -> cvvae.CVVAE:
    """`small`, or a published family with random weights."""
    if model == "small":
        return cvvae.load("small", torch_dtype=dtype).to(device).eval()
    return cvvae.CVVAE(cvvae.CVVAEConfig.from_published({"_class_name": model})).to(device, dtype).eval()


def calls(model: str, options: argparse.Namespace) -> list[Measured]:
    """What is measured of a model, after the two matrix products."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    vae = load(model, device, dtype)
    clip, image = (
        to_channels_last(torch.rand((options.batch, *shape[1:]), device=device, dtype=dtype) * 2 - 1)
        for shape in (CLIP, IMAGE)
    )
    with torch.device("meta"):
        meta = cvvae.CVVAE(vae.config)

    def encoding(name: str, x: Tensor, num_frames: int, repeats: int) -> Measured:
        executed = executed_flops(lambda: meta.encoder(torch.empty(x.shape, device="meta")))
        published = None if model == "small" else published_flops(vae.config, tuple(x.shape))
        return Measured(name, lambda: vae.encode(x), executed, published, num_frames, repeats)

    num_repeats = 5 if model == "small" else 1
    found = [
        encoding("clip", clip, options.batch * CLIP[2], num_repeats),
        encoding("image", image, options.batch, 5),
    ]
    if vae.is_causal:
        for length in (4, 1):
            name = f"clip, streamed in pieces of {length}"
            executed = found[0].executed
            stream = partial(_stream, vae, clip, length)
            found.append(Measured(name, stream, executed, None, options.batch * CLIP[2], num_repeats))
    if options.compile:
        compiled = torch.compile(vae.encoder)
        found.append(
            replace(found[0], name="clip, torch.compile", run=lambda: compiled(clip), repeats=max(num_repeats, 2))
        )
    if options.cuda_graphs:
        pool = torch.cuda.graph_pool_handle()
        for call, x in (found[0], clip), (found[1], image):
            recorded = RecordedCall(lambda frames: vae.encode(frames).latent_dist.mean, x, pool)
            found.append(replace(call, name=f"{call.name}, CUDA graph", run=partial(recorded, x)))
    if options.decode:
        z = vae.encode(clip).latent_dist.mean
        executed = executed_flops(lambda: meta.decoder(torch.empty(z.shape, device="meta")))
        found.append(
            Measured("decoding a clip", lambda: vae.decode(z), executed, None, options.batch * CLIP[2], num_repeats)
        )
    return found


def _stream(vae: cvvae.CVVAE, clip: Tensor, length: int) -> None:
    for _ in vae.encode_stream(iter(clip.split(length, dim=2))):
        pass


def products(device: torch.device, dtype: torch.dtype) -> list[Measured]:
    """Two matrix products, the ceilings."""
    matrix = torch.randn(MATRIX, MATRIX, device=device, dtype=dtype)
    # 16 images, as on one thread torch gives a 1x1 convolution of fewer to MKL after all.
    field = torch.randn(16, WIDTH, 32, 32, device=device, dtype=dtype)
    field = field.contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(WIDTH, WIDTH, 1, 1, device=device, dtype=dtype)
    return [
        Measured("torch.matmul", lambda: matrix @ matrix, 2 * MATRIX**3),
        Measured("matrix product as convolution", lambda: torch.conv2d(field, kernel), 2 * WIDTH * field.numel()),
    ]


def measure(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each call, medians over the rounds."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    measured = [*products(device, dtype), *calls(model, options)]
    times: dict[str, list[float]] = {call.name: [] for call in measured}
    for turn in range(options.rounds + 1):
        for call in measured:
            taken = statistics.median(seconds(call.run, device) for _ in range(call.repeats))
            if turn > 0:  # the first turn warms up
                times[call.name].append(taken)
    matmul, onednn = ([call.executed / s for s in times[call.name]] for call in measured[:2])
    clip = [measured[2].executed / s for s in times["clip"]]
    rows = []
    for call in measured:
        rates = [call.executed / s for s in times[call.name]]
        median_s = statistics.median(times[call.name])
        row: dict[str, Any] = {
            "model": model,
            "call": call.name,
            "executed GFLOP": call.executed / 1e9,
            "published GFLOP": None if call.published is None else call.published / 1e9,
            "ms": 1000 * median_s,
            "executed GFLOP/s": statistics.median(rates) / 1e9,
            "published GFLOP/s": None if call.published is None else call.published / median_s / 1e9,
            "of torch.matmul": _ratio(rates, matmul),
            "of the convolution": _ratio(rates, onednn),
            "of the clip's rate": _ratio(rates, clip),
        }
        if call not in measured[:2]:
            row["frames/s"] = call.num_frames / median_s
        if call.name in ("clip", "image"):
            peak = peak_bytes(call.run, device)
            row["peak MB"] = None if peak is None else peak / 1e6
        rows.append(row)
    return rows


def _ratio(rates: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(rate / other for rate, other in zip(rates, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="default: small and CVVAEModel")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1, help="clips, or images, of a call")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--decode", action="store_true", help="also decode a clip")
    parser.add_argument("--compile", action="store_true", help="also the encoder under torch.compile")
    parser.add_argument("--cuda-graphs", action="store_true", help="also clip and image recorded (a GPU alone)")
    parser.add_argument("--plain-malloc", action="store_true", help="without the environment that encoders get")
    add_results_option(parser)
    options = parser.parse_args()
    if not options.plain_malloc and not CPU_ENVIRONMENT.items() <= os.environ.items():
        # The allocator reads its settings when a process begins.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **CPU_ENVIRONMENT})
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    # Without inference mode: torch.compile cannot trace into it.
    with torch.no_grad():
        rows = [row for model in options.model or MODELS[:2] for row in measure(model, options)]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    report("codec", rows, configuration=vars(options), title=f"{options.dtype}, 256x256, {name}")


if __name__ == "__main__":
    main()
