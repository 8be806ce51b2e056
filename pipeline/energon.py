"""Tars with the index of Megatron-Energon, filled as NeMo DFM's recipe for Wan fills and reads them.

Not which rows are exported, nor in what order files come to stand (that is `export`, the caller). Written from:

* NeMo DFM (NVIDIA-NeMo/DFM, 2de5934): `examples/megatron/recipes/wan/prepare_energon_dataset_wan.py` writes and
  `dfm/src/megatron/data/wan/wan_taskencoder.py` reads `.pth` (latent), `.pickle` (text) and `.json`.
* Megatron-Energon 7.4.1: `megatron/energon/flavors/webdataset/{prepare,structs,itar,indexing,metadata}.py` for
  `.nv-meta/` and `.tar.idx`.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import sqlite3
import struct
import tarfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import yaml

from pipeline.errors import DamagedObjectError
from pipeline.format import member_key
from pipeline.peers import About, FileFacts, IndexedSample, Peer, Sample, Sink

_MEMBER = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")
_TABLES = """
CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE, sample_index INTEGER NOT NULL,
                      byte_offset INTEGER, byte_size INTEGER);
CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT, content_byte_offset INTEGER,
                           content_byte_size INTEGER);
"""
_INDEXES = """
CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);
CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset);
CREATE INDEX idx_sample_parts_full
    ON sample_parts(tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size);
"""


class EnergonDFM(Peer):
    """Tars with Energon's index, filled as NeMo DFM's Wan recipe fills and reads them.

    `KEY.pth` is the latent `[C, T, H, W]`, the posterior mean, float32 and **scaled** as the diffusion model takes it,
    `scaling_factor * (mean - shift_factor)`: DFM stores latents normalised and its trainer does no more to them.
    `KEY.pickle` is the text embedding `[L, D]`, a float32 tensor, which DFM's task encoder pads; without a column set
    there is none. `KEY.json` has DFM's fields and under `columns` all columns of the row. All shards are in the split
    `train`; `energon prepare` or an editor divides `.nv-meta/split.yaml` otherwise.
    """

    name = "webdataset-dfm"

    def __init__(self, about: About, folder: Path) -> None:
        super().__init__(about, folder)
        self._counts: dict[str, int] = {}
        self._index = sqlite3.connect(folder / "index.sqlite")
        self._index.executescript(_TABLES)

    def key(self, number: int, bucket: str) -> str:
        return f"shard-{number:06d}.tar"

    def unfinished_keys(self) -> Sequence[str]:
        return ["UNFINISHED.tar"]

    def sink(self, path: Path) -> Sink:
        return _TarSink(path, self)

    def members(self, sample: Sample) -> Iterator[tuple[str, bytes]]:
        """Extension and content of a sample's members."""
        model, columns = self.about.manifest.model, dict(sample.record.columns)
        scaled = (sample.mean - np.float32(model.shift_factor)) * np.float32(model.scaling_factor)
        latent = io.BytesIO()
        torch.save(torch.from_numpy(scaled), latent)
        yield "pth", latent.getvalue()
        if sample.caption_embedding is not None:
            yield "pickle", _pickled(torch.from_numpy(sample.caption_embedding.copy()))
        columns.pop("latentmill", None)
        fields = {
            "video_path": columns["source_uri"],
            "processed_frames": columns["num_frames"],
            "processed_height": columns["height"],
            "processed_width": columns["width"],
            "caption": columns["caption"],
            "deterministic_latents": True,
            "model_version": model.model,
            "resize_settings": {
                "target_size": [columns["height"], columns["width"]],
                "resize_mode": "bilinear",
                "maintain_aspect_ratio": True,
                "center_crop": True,
            },
            "latents_are_scaled": True,
            "scaling_factor": model.scaling_factor,
            "shift_factor": model.shift_factor,
            "weights_sha256": model.weights_sha256,
            "shard_id": sample.shard_id,
            "columns": columns,
        }
        yield "json", json.dumps(fields).encode()

    def inspect(self, key: str, file: BinaryIO) -> FileFacts:
        found: list[IndexedSample] = []
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    name = _MEMBER.fullmatch(member.name)
                    if name is None:
                        raise DamagedObjectError(f"{key} has a member {member.name!r}, which is not KEY.EXTENSION")
                    earlier = found.pop() if found and found[-1].key == name[1] else None
                    offset, parts = (member.offset, []) if earlier is None else (earlier.offset, list(earlier.parts))
                    parts.append((name[2], member.offset_data, member.size))
                    end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    found.append(IndexedSample(key=name[1], offset=offset, num_bytes=end - offset, parts=parts))
        except tarfile.TarError as error:
            raise DamagedObjectError(f"{key} is no readable tar: {error}") from error
        num_bytes = sum(sample.num_bytes for sample in found)
        return FileFacts(key=key, num_rows=len(found), num_bytes=num_bytes, samples=found)

    def beside(self, facts: FileFacts) -> Iterator[tuple[str, bytes]]:
        ends = [sample.offset for sample in facts.samples] + [facts.num_bytes]
        yield f"{facts.key}.idx", struct.pack(f"<{len(ends)}Q", *ends)

    def take(self, facts: FileFacts) -> None:
        super().take(facts)
        number = len(self._counts)
        self._counts[facts.key] = facts.num_rows
        samples = [(number, s.key, place, s.offset, s.num_bytes) for place, s in enumerate(facts.samples)]
        parts = [(number, place, *part) for place, sample in enumerate(facts.samples) for part in sample.parts]
        self._index.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?)", samples)
        self._index.executemany("INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)", parts)

    def description(self) -> Iterator[tuple[str, Path]]:
        self._index.executescript(_INDEXES)
        self._index.commit()
        self.close()
        info = json.dumps({"shard_counts": self._counts}, indent=1)
        splits = {"split_parts": {"train": list(self._counts), "val": [], "test": []}, "exclude": []}
        # Energon 7 reads the .json, earlier ones the .yaml, which JSON is too; without either there is no dataset.
        texts = {
            "index.uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, self.about.export_id)),
            "dataset.yaml": yaml.safe_dump({"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}),
            "split.yaml": yaml.safe_dump(splits, sort_keys=False),
            ".info.yaml": info,
            ".info.json": info,
        }
        for name, text in texts.items():
            (self._folder / name).write_text(text, encoding="utf-8")
        for name in ("index.sqlite", *texts):
            yield f".nv-meta/{name}", self._folder / name

    def close(self) -> None:
        self._index.close()


class _TarSink(Sink):
    def __init__(self, path: Path, peer: EnergonDFM) -> None:
        self._peer = peer
        self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(self, sample: Sample) -> None:
        # Keys are unique in a shard; Energon wants them unique in the dataset, and takes folders into them.
        name = f"{sample.shard_id}/{member_key(sample.record.key, sample.record.clip_index)}"
        for extension, content in self._peer.members(sample):
            member = tarfile.TarInfo(f"{name}.{extension}")  # its defaults: mtime 0, uid 0, gid 0, mode 0644
            member.size = len(content)
            self._tar.addfile(member, io.BytesIO(content))

    def close(self) -> None:
        self._tar.close()


class _TensorPickler(pickle.Pickler):
    """Pickles a tensor by its array: torch's own form has addresses of this process in it."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def _pickled(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    _TensorPickler(buffer, protocol=4).dump(tensor)
    return buffer.getvalue()
