"""An export for FastVideo as FastVideo's own reader reads it; skipped where its wheel is not installed.

FastVideo pins another torch and brings kernels, so that it does not install beside the rest. Its reader needs none of
that: `pip install --no-deps fastvideo==0.2.1` in a copy of the environment, then this file alone. The modules of the
reader are loaded as they are; stood in for is only what they ask of a cluster, answered for one process.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from embeddings import add_text_set, caption_embedding
from latents import SMALL, WIDE, latent_of, output, record

from pipeline.commit import publish_snapshot
from pipeline.export import export
from pipeline.records import Bucket

_FOUND = importlib.util.find_spec("fastvideo")
if _FOUND is None or _FOUND.origin is None:
    pytest.skip("FastVideo is not installed (--no-deps fastvideo==0.2.1)", allow_module_level=True)
ROOT = Path(_FOUND.origin).parent
# Of torchdata, and of memory that is to be pinned where there is no accelerator.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SAMPLES: dict[str, tuple[str, int, Bucket, str]] = {
    "s000/a_000": ("a", 0, SMALL, "a red ball"),
    "s000/b_000": ("b", 0, WIDE, ""),
    "s001/a_000": ("a", 0, SMALL, "a blue box, turning"),
    "s001/c_002": ("c", 2, SMALL, "a red ball"),
}


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    return module


def _load(name: str, path: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of FastVideo that read latents, without its package, which loads kernels."""
    logger = SimpleNamespace(info=lambda *_: None, warning=lambda *_: None, error=lambda *_: None)
    world = SimpleNamespace(barrier=lambda: None)
    stands_in = {
        "fastvideo": _module("fastvideo", __path__=[str(ROOT)]),
        "fastvideo.dataset": _module("fastvideo.dataset", __path__=[str(ROOT / "dataset")]),
        "fastvideo.platforms": _module("fastvideo.platforms", current_platform=None),
        "fastvideo.logger": _module("fastvideo.logger", init_logger=lambda _: logger),
        "fastvideo.distributed": _module(
            "fastvideo.distributed",
            get_sp_world_size=lambda: 1,
            get_world_size=lambda: 1,
            get_world_rank=lambda: 0,
            get_world_group=lambda: world,
        ),
    }
    loaded = {
        "fastvideo.dataset.utils": "dataset/utils.py",
        "fastvideo.schema": "dataset/dataloader/schema.py",
        "fastvideo.dataset.parquet_dataset_map_style": "dataset/parquet_dataset_map_style.py",
    }
    for name, module in stands_in.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in loaded:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    _, schema, dataset = (_load(name, path) for name, path in loaded.items())
    return SimpleNamespace(schema=schema.pyarrow_schema_t2v, dataloader=dataset.build_parquet_map_style_dataloader)


def test_fastvideos_reader_gives_every_latent_and_every_caption_with_its_mask(
    reader: SimpleNamespace, tmp_path: Path
) -> None:
    shards: dict[str, list[Any]] = {}
    for name, (key, clip, bucket, caption) in SAMPLES.items():
        shards.setdefault(name.partition("/")[0], []).append(record(key, clip, bucket, caption=caption))
    store = output(tmp_path / "source", shards.values())
    add_text_set(store)
    publish_snapshot(store)
    export(store.root_uri, "fastvideo", str(tmp_path / "fv"), text="text")
    seen = {}
    for folder in sorted(path for path in (tmp_path / "fv").iterdir() if path.is_dir()):
        _, loader = reader.dataloader(
            str(folder), 1, 0, parquet_schema=reader.schema, drop_last=False, text_padding_length=16
        )
        for batch in loader:
            (info,) = batch["info_list"]
            seen[info["id"]] = batch, info
    assert set(seen) == set(SAMPLES)
    for name, (key, clip, bucket, caption) in SAMPLES.items():
        batch, info = seen[name]
        assert batch["vae_latent"].dtype == torch.float32
        np.testing.assert_array_equal(batch["vae_latent"][0].numpy(), latent_of(key, clip, bucket))
        wanted = caption_embedding(caption).astype(np.float32)
        np.testing.assert_array_equal(batch["text_embedding"][0, : len(wanted)].numpy(), wanted)
        assert not batch["text_embedding"][0, len(wanted) :].any()
        assert batch["text_attention_mask"][0].sum() == len(wanted)
        assert (info["prompt"], info["media_type"], info["num_frames"]) == (caption, "video", bucket.num_frames)
