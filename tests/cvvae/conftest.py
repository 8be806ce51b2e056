"""Small models of both published families, with weights made from each key's name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import cvvae
from cvvae.checkpoint import save
from cvvae.layers import DoublingConv, SpaceTimeConv

SMALL = {
    "CVVAEModel": {"ch": 16, "ch_mult": [1, 1, 2, 2], "num_res_blocks": 1, "norm_num_groups": 8},
    "CVVAESD3Model": {"block_out_channels": [16, 16, 32, 32], "layers_per_block": 1, "norm_num_groups": 8},
}
CHUNK_AND_TILE = {"en_de_n_frames_a_time": 8, "tile_spatial_size": 64, "tile_overlap_ratio": 0.25}

MakeModel = Callable[..., cvvae.CVVAE]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=SMALL)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """A small model by its class name; fields of the published configuration may be added."""
    models: dict[str, cvvae.CVVAE] = {}

    def make(class_name: str, **fields: Any) -> cvvae.CVVAE:
        name = repr((class_name, sorted(fields.items())))
        if name not in models:
            published = {"_class_name": class_name, **SMALL[class_name], **CHUNK_AND_TILE, **fields}
            config = cvvae.CVVAEConfig.from_published(published)
            folder = tmp_path_factory.mktemp("model")
            with torch.device("meta"):
                empty = cvvae.CVVAE(dataclasses.replace(config, untrained=True))
            save(empty.to_empty(device="cpu"), folder)
            (folder / "diffusion_pytorch_model.safetensors").unlink()
            models[name] = cvvae.load(folder)
        models[name].set_chunking()
        return models[name]

    return make


@pytest.fixture
def frames() -> Callable[..., torch.Tensor]:
    """Uniform noise in [-1, 1] of a shape, always the same."""

    def make(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(7)) * 2 - 1

    return make


@pytest.fixture
def plainly_padded() -> Callable[..., torch.Tensor]:
    """What a SpaceTimeConv is by definition: pad the whole clip in space, then in time, then one 3D convolution.

    A DoublingConv doubles height and width before.
    """

    def convolve(
        conv: SpaceTimeConv, x: torch.Tensor, cache: None = None, outputs: slice = slice(None)
    ) -> torch.Tensor:
        edges = conv.edges
        if isinstance(conv, DoublingConv):
            x = F.interpolate(x, scale_factor=(1.0, 2.0, 2.0))
        if edges.right_bottom_only:
            x = F.pad(x, (0, 1, 0, 1, 0, 0))
        else:
            x = F.pad(x, (1, 1, 1, 1, 0, 0), mode="constant" if edges.space_mode == "zeros" else "replicate")
        in_time = (0, 0, 0, 0, edges.time_before, edges.time_after)
        x = F.pad(x, in_time, mode="constant" if edges.time_mode == "zeros" else "replicate")
        assert conv.bias is not None
        return F.conv3d(x, conv.weight, conv.bias, (conv.time_stride, conv.space_stride, conv.space_stride))[:, outputs]

    return convolve
