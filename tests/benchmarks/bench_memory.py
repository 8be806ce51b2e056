"""Which batch and tile sizes fit into so much memory, and which of them is fastest; run by `make bench`.

    python tests/benchmarks/bench_memory.py [--memory-gb 1] [--model small] [--frames 17] [--side 512]
        [--batches 1,2,4] [--tiles 0,256,384] [--device cuda --dtype bfloat16] [--rounds 3] [--results FOLDER]

Every combination is run in turns. Memory is the highest that a call adds to what was there, and the weights. The last
line names flags of `jobs/encode_laion.py`: the fastest combination that fits; of those within 2 % of it an untiled one
before tiles, which change latents slightly, and then the one with the least memory. On a CPU the job encodes one clip a
call, so that there only batches of 1 are recommended.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.config import CPU_ENVIRONMENT

sys.path.insert(0, str(Path(__file__).parent))

from bench_codec import load, peak_bytes, seconds
from results import add_results_option, report

REFERENCE_PX = 256 * 256
AS_FAST = 0.98


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each batch and tile: memory and rate."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    vae = load(options.model, device, dtype)
    weights_bytes = sum(weight.numel() * weight.element_size() for weight in vae.encoder.parameters())
    shapes = [(batch, 3, options.frames, options.side, options.side) for batch in options.batches]
    ways = [(shape, tile) for shape in shapes for tile in options.tiles if tile < options.side]
    times: dict[Any, list[float]] = {way: [] for way in ways}
    peaks: dict[Any, int | None] = {}
    for turn in range(options.rounds + 1):
        for shape, tile in ways:
            vae.set_chunking(tile_px=tile)
            x = torch.rand(shape, device=device, dtype=dtype) * 2 - 1
            if turn == 0:
                peaks[shape, tile] = peak_bytes(lambda x=x: vae.encode(x), device)  # type: ignore[misc]
            else:
                times[shape, tile].append(seconds(lambda x=x: vae.encode(x), device))  # type: ignore[misc]
    rows = []
    for (shape, tile), taken in times.items():
        peak = peaks[shape, tile]
        memory_gb = None if peak is None else (peak + weights_bytes) / 1e9
        fits = memory_gb is None or options.memory_gb is None or memory_gb <= options.memory_gb
        rate = shape[0] / statistics.median(taken)
        rows.append({"batch": shape[0], "tile_px": tile, "memory GB": memory_gb, "clips/s": rate, "fits": fits})
    return rows


def recommendation(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Flags for the job, in a sentence."""
    allowed = [row for row in rows if row["fits"] and (options.device != "cpu" or row["batch"] == 1)]
    if not allowed:
        return f"nothing fits into {options.memory_gb} GB: give smaller --tiles"
    fastest = max(row["clips/s"] for row in allowed)
    close = [row for row in allowed if row["clips/s"] >= AS_FAST * fastest]
    best = min(close, key=lambda row: (row["tile_px"] > 0, row["memory GB"] or 0))
    budget = "" if options.memory_gb is None else f" in {options.memory_gb:g} GB"
    batch_frames = -(-best["batch"] * options.frames * options.side**2 // REFERENCE_PX)
    flags = f"--tile-px {best['tile_px']}" + ("" if options.device == "cpu" else f" --batch-frames {batch_frames}")
    return f"recommended{budget}: {flags} ({best['clips/s']:.3g} clips/s)"


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-gb", type=float, help="of one encoder; default: without a limit")
    parser.add_argument("--model", default="small", help="small, CVVAEModel or CVVAESD3Model")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--batches", type=_numbers, default=[1, 2, 4])
    parser.add_argument("--tiles", type=_numbers, default=[0, 256, 384], help="0: untiled")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    add_results_option(parser)
    options = parser.parse_args()
    if not CPU_ENVIRONMENT.items() <= os.environ.items():
        # The allocator reads its settings when a process begins.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **CPU_ENVIRONMENT})
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        rows = measure(options)
    shape = f"{options.frames}x{options.side}x{options.side}"
    report(
        f"memory-{options.model}",
        rows,
        configuration=vars(options),
        title=f"{options.model}, clips of {shape}, {options.dtype}, {options.device}",
        notes=[recommendation(rows, options)],
    )


if __name__ == "__main__":
    main()
