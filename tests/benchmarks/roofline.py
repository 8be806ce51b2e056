"""What encoding can cost on GPUs at best, on paper: operations and bytes of every step, against data sheets.

    python tests/benchmarks/roofline.py [--model CVVAEModel] [--frames 17] [--side 256] [--batch 1] [--results FOLDER]

Nothing is computed: the encoder runs on meta tensors, and each call of torch that moves data is counted with its
floating point operations (two for each multiplication with its addition) and the bytes of its inputs and outputs, each
read or written once; scores of attention stay on the chip. A step takes at least the longer of operations / peak and
bytes / bandwidth; steps follow one another. That is a bound, not a forecast: kernels reach neither limit, caches save
some traffic, launches cost time.

`fused` is the same with three things that a fused implementation could do: statistics of a GroupNorm come out of the
convolution before, normalising and SiLU go into the convolution behind it, additions and padding into a neighbour. Then
every norm, SiLU, addition, copy and padding is free.

Peaks are dense bfloat16 with float32 accumulation and memory bandwidth, from NVIDIA's data sheets: A100 80GB SXM (312
TFLOP/s, 2,039 GB/s), H100 SXM (989, 3,350), L4 (121, 300).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import cvvae
from cvvae.layers import to_channels_last

sys.path.insert(0, str(Path(__file__).parent))

from results import add_results_option, report, table


@dataclass(frozen=True)
class Gpu:
    """Peaks of a data sheet."""

    name: str
    tflop_per_s: float
    gbyte_per_s: float

    def seconds(self, steps: Sequence[Step]) -> float:
        """Least time of steps that follow one another."""
        return math.fsum(max(self.compute_s(step), self.memory_s(step)) for step in steps)

    def compute_s(self, step: Step) -> float:
        return step.flops / (self.tflop_per_s * 1e12)

    def memory_s(self, step: Step) -> float:
        return step.num_bytes / (self.gbyte_per_s * 1e9)


GPUS = (Gpu("A100", 312, 2039), Gpu("H100", 989, 3350), Gpu("L4", 121, 300))
_VIEWS = {"view", "_unsafe_view", "as_strided", "detach", "alias", "expand", "permute", "transpose", "t", "slice"}
_VIEWS |= {"select", "unsqueeze", "squeeze", "split", "unbind", "unfold", "empty", "empty_like", "new_empty", "chunk"}
_KINDS = {
    "convolution": "convolution",
    "addmm": "matrix product",
    "mm": "matrix product",
    "bmm": "matrix product",
    "native_group_norm": "GroupNorm",
    "silu": "SiLU",
    "silu_": "SiLU",
    "relu": "ReLU",
    "relu_": "ReLU",
    "add": "addition",
    "add_": "addition",
    "_safe_softmax": "matrix product",
}
_ARITHMETIC = ("convolution", "matrix product")


@dataclass(frozen=True)
class Step:
    """One call of torch."""

    kind: str
    inputs: tuple[tuple[int, ...], ...]
    flops: int
    num_bytes: int


class _Counter(TorchDispatchMode):
    """Writes down every step that moves data."""

    def __init__(self, num_positions: int) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._scores = (num_positions, num_positions)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _VIEWS:
            return result
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        moved = [x for x in (*read, *written) if tuple(x.shape[-2:]) != self._scores]
        count_flops = flop_registry.get(func.overloadpacket)
        flops = 0 if count_flops is None else int(count_flops(*args, **(kwargs or {}), out_val=result))
        num_bytes = sum(x.numel() * x.element_size() for x in moved)
        self.steps.append(
            Step(_KINDS.get(name, "copy, padding"), tuple(tuple(x.shape) for x in read), flops, num_bytes)
        )
        if name == "convolution":
            # As on a GPU; meta tensors forget the layout, and copies would be counted that nobody makes.
            layout = torch.channels_last if result.dim() == 4 else torch.channels_last_3d
            result = result.contiguous(memory_format=layout)
        return result


def count(config: cvvae.CVVAEConfig, shape: tuple[int, ...]) -> list[Step]:
    """The steps of one encoder call in bfloat16, in order."""
    # Not in inference mode, which shows the calls before they are taken apart.
    with torch.device("meta"), torch.no_grad():
        encoder = cvvae.CVVAE(config).to(torch.bfloat16).eval().encoder
        x = to_channels_last(torch.empty(shape, dtype=torch.bfloat16))
        with _Counter(shape[3] // 8 * shape[4] // 8) as counter:
            encoder(x)
    return counter.steps


def by_kind(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """A line for each kind of step: operations, bytes and least milliseconds on each GPU."""
    kinds: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        kinds[step.kind].append(step)
    rows = []
    for kind, members in sorted(kinds.items(), key=lambda entry: -GPUS[0].seconds(entry[1])):
        row: dict[str, Any] = {"step": kind, "calls": len(members), **_sums(members)}
        rows.append({**row, **{f"{gpu.name} ms": 1000 * gpu.seconds(members) for gpu in GPUS}})
    return rows


def by_convolution(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """A line for each shape of convolution: what bounds it."""
    shapes: dict[tuple[Any, ...], list[Step]] = defaultdict(list)
    for step in steps:
        if step.kind == "convolution":
            shapes[step.inputs[:2]].append(step)
    rows = []
    for (x, weight), members in shapes.items():
        row: dict[str, Any] = {"input": _text(x), "weight": _text(weight), "calls": len(members), **_sums(members)}
        for gpu in GPUS:
            is_memory = gpu.memory_s(members[0]) > gpu.compute_s(members[0])
            row[gpu.name] = "memory" if is_memory else "arithmetic"
        rows.append(row)
    return rows


def by_gpu(steps: Sequence[Step], batch: int) -> list[dict[str, Any]]:
    """A line for each GPU: bounds of the rate as written and fused, and what would be left without memory."""
    arithmetic = [step for step in steps if step.kind in _ARITHMETIC]
    rows = []
    for gpu in GPUS:
        as_written, fused = gpu.seconds(steps), gpu.seconds(arithmetic)
        memory = [step for step in steps if gpu.memory_s(step) > gpu.compute_s(step)]
        rows.append(
            {
                "GPU": gpu.name,
                "clips/s at most": batch / as_written,
                "share of the time in steps bound by memory": gpu.seconds(memory) / as_written,
                "share of peak operations at most": math.fsum(map(gpu.compute_s, steps)) / as_written,
                "fused: clips/s at most": batch / fused,
                "fused: gain": as_written / fused,
                "fused: share of peak operations at most": math.fsum(map(gpu.compute_s, steps)) / fused,
            }
        )
    return rows


def _sums(steps: Sequence[Step]) -> dict[str, Any]:
    flops, num_bytes = sum(step.flops for step in steps), sum(step.num_bytes for step in steps)
    return {"GFLOP": flops / 1e9, "GB": num_bytes / 1e9, "FLOP/byte": flops / num_bytes}


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="CVVAEModel", help="small, CVVAEModel or CVVAESD3Model")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    add_results_option(parser)
    options = parser.parse_args()
    if options.model == "small":
        config = cvvae.load("small").config
    else:
        config = cvvae.CVVAEConfig.from_published({"_class_name": options.model})
    steps = count(config, (options.batch, 3, options.frames, options.side, options.side))
    kinds, convolutions = by_kind(steps), by_convolution(steps)
    print(f"{table(kinds)}\n\n{table(convolutions)}\n")
    report(
        f"roofline-{options.model}",
        by_gpu(steps, options.batch),
        configuration=vars(options),
        more={"kinds": kinds, "convolutions": convolutions},
    )


if __name__ == "__main__":
    main()
