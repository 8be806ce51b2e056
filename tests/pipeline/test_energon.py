"""An export for DFM as Megatron-Energon itself reads it; skipped where that is not installed.

It brings a dozen packages of its own, so that it is no part of the test extra: `pip install megatron-energon==7.4.1` in
a copy of the environment, then this file alone.
"""

from __future__ import annotations

import io
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from embeddings import add_text_set, caption_embedding
from latents import IMAGE, SMALL, WIDE, latent_of, output, record

from pipeline.commit import publish_snapshot
from pipeline.export import export
from pipeline.records import Bucket

energon = pytest.importorskip("megatron.energon", reason="Energon is not installed (megatron-energon==7.4.1)")

SAMPLES = {
    ("s000", "a", 0): (SMALL, "a red ball"),
    ("s000", "b.v1/ü", 0): (WIDE, ""),
    ("s001", "a", 0): (SMALL, "a blue box, turning"),
    ("s001", "k" * 120, 0): (SMALL, "a name that is too long for the first form of a tar header"),
    ("s001", "p", 0): (IMAGE, "a photograph"),
}


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    shards: dict[str, list[Any]] = {}
    for (shard_id, key, clip), (bucket, caption) in SAMPLES.items():
        shards.setdefault(shard_id, []).append(record(key, clip, bucket, caption=caption))
    store = output(tmp_path / "source", shards.values())
    add_text_set(store)
    publish_snapshot(store)
    export(store.root_uri, "webdataset-dfm", str(tmp_path / "dfm"), text="text")
    return tmp_path / "dfm"


@energon.stateless
def _cook(sample: dict[str, Any]) -> dict[str, Any]:
    """What DFM's WanTaskEncoder takes of a sample."""
    from megatron.energon.task_encoder.cooking import basic_sample_keys

    return dict(**basic_sample_keys(sample), json=sample["json"], pth=sample["pth"], pickle=sample["pickle"])


class _Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc]
    cookers = [energon.Cooker(_cook)]  # noqa: RUF012

    def batch(self, samples: list[Any]) -> list[Any]:
        return samples


def _scaled(key: str, clip_index: int, bucket: Bucket) -> npt.NDArray[np.float32]:
    """What the diffusion model takes: the made-up model has the shift 0.25 and the factor 0.5."""
    return (latent_of(key, clip_index, bucket) - np.float32(0.25)) * np.float32(0.5)


def _check(samples: list[dict[str, Any]]) -> None:
    found = {
        (s["json"]["shard_id"], s["json"]["columns"]["key"], s["json"]["columns"]["clip_index"]): s for s in samples
    }
    assert set(found) == set(SAMPLES)
    for (shard_id, key, clip), (bucket, caption) in SAMPLES.items():
        sample = found[shard_id, key, clip]
        assert sample["pth"].dtype == sample["pickle"].dtype == torch.float32
        np.testing.assert_array_equal(sample["pth"].numpy(), _scaled(key, clip, bucket))
        np.testing.assert_array_equal(sample["pickle"].numpy(), caption_embedding(caption).astype(np.float32))


@pytest.mark.filterwarnings("ignore")
def test_energon_trains_on_every_sample_of_the_export_with_the_very_values(exported: Path) -> None:
    workers = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = energon.get_train_dataset(
        exported,
        worker_config=workers,
        batch_size=1,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=_Encoder(),
        repeat=False,
    )
    _check([sample for batch in energon.get_loader(dataset) for sample in batch])


@pytest.mark.filterwarnings("ignore")
def test_energon_finds_samples_and_their_parts_through_the_sqlite_index(exported: Path) -> None:
    from megatron.energon.cache.file_store import WebdatasetFileStore
    from megatron.energon.epathlib import EPath

    store = WebdatasetFileStore(EPath(exported))
    content, _source = store["s000/a_000.pth"]
    np.testing.assert_array_equal(torch.load(io.BytesIO(content)).numpy(), _scaled("a", 0, SMALL))


@pytest.mark.filterwarnings("ignore")
def test_energons_own_preparation_makes_the_index_that_the_export_made(exported: Path) -> None:
    from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

    def contents() -> tuple[Any, ...]:
        with sqlite3.connect(exported / ".nv-meta" / "index.sqlite") as index:
            rows = [sorted(index.execute(f"SELECT * FROM {table}")) for table in ("samples", "sample_parts")]
        index.close()
        return (*rows, [path.read_bytes() for path in sorted(exported.glob("*.idx"))])

    ours = contents()
    for path in exported.glob("*.idx"):
        path.unlink()
    (exported / ".nv-meta" / "index.sqlite").unlink()
    tars = sorted(path.name for path in exported.glob("*.tar"))
    BaseWebdatasetFactory.prepare_dataset(exported, tars, split_parts_ratio=[("train", 1.0)], workers=1)
    assert contents() == ours
