"""Recorded calls, on a stand-in for CUDA graphs: no GPU could be had where this was written.

The stand-in keeps a list of what torch calls while a graph is recorded, and calls it again on the same memory. So a
result that depends on what Python does between the calls differs, as it would on a GPU. It knows neither streams nor
what a GPU forbids meanwhile: for that the encoders run on meta tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cvvae
from cvvae.layers import to_channels_last
from pipeline.cuda_graph import RecordedCall


class _Tape(TorchDispatchMode):
    """What torch was called with, and what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


class _Stream:
    def __init__(self, _device: torch.device) -> None:
        pass

    def wait_stream(self, other: _Stream) -> None:
        assert isinstance(other, _Stream)


@contextmanager
def _recording(graph: _Tape, *, pool: object, capture_error_mode: str) -> Iterator[None]:
    assert pool is not None
    assert capture_error_mode == "thread_local"
    with graph:
        yield


@pytest.fixture(autouse=True)
def _graphs_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Tape)
    monkeypatch.setattr(torch.cuda, "graph", _recording)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def vae() -> cvvae.CVVAE:
    return cvvae.load("small").eval().requires_grad_(False)


@pytest.mark.parametrize("num_frames", [1, 9])
def test_a_recorded_encoder_gives_each_clip_the_latent_that_it_has_without(vae: cvvae.CVVAE, num_frames: int) -> None:
    def encode(x: Tensor) -> Tensor:
        return vae.encode(x).latent_dist.mean

    clips = torch.rand(3, 1, 3, num_frames, 40, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    recorded = RecordedCall(encode, clips[0], object())
    for clip in clips:
        assert torch.equal(recorded(clip), encode(clip))


def test_a_result_lasts_until_the_next_call() -> None:
    recorded = RecordedCall(lambda x: x * 2, torch.ones(3), object())
    first = recorded(torch.full((3,), 2.0))
    assert first.tolist() == [4, 4, 4]
    assert recorded(torch.full((3,), 5.0)).tolist() == [10, 10, 10]
    assert first.tolist() == [10, 10, 10]


def test_a_call_that_the_host_has_a_part_in_is_not_recorded() -> None:
    """Its value is that of the recording, where all is zero, whatever comes later."""
    with pytest.raises(RuntimeError, match="3 of 3 values of the recorded call are others"):
        RecordedCall(lambda x: x + float(x.sum()), torch.ones(3), object())


class _OnTheGpuAlone(TorchDispatchMode):
    """Refuses what cannot be recorded: values that the host reads or gives, and sizes that depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        elsewhere = [x for x in tensors if x.device.type != "meta"]
        name = func.overloadpacket.__name__
        if elsewhere or name in ("_local_scalar_dense", "nonzero", "masked_select", "unique"):
            raise AssertionError(f"{func} needs the host")
        return result


@pytest.mark.parametrize("family", ["small", "CVVAEModel", "CVVAESD3Model"])
@pytest.mark.parametrize("tile_px", [None, 64])
def test_no_encoder_needs_the_host_while_it_runs(vae: cvvae.CVVAE, family: str, tile_px: int | None) -> None:
    config = vae.config if family == "small" else cvvae.CVVAEConfig.from_published({"_class_name": family})
    with torch.device("meta"):
        model = cvvae.CVVAE(config).eval().requires_grad_(False)
    model.set_chunking(8, tile_px)
    for num_frames in (1, 9, 17):
        x = to_channels_last(torch.empty(2, 3, num_frames, 96, 128, device="meta"))
        model.encode(x)
        with _OnTheGpuAlone():
            assert model.encode(x).latent_dist.mean.shape[2] == (num_frames + 3) // 4


def test_what_needs_the_host_is_seen() -> None:
    with pytest.raises(AssertionError, match="needs the host"), _OnTheGpuAlone():
        torch.zeros(3).to("meta")
