"""The forms in which other projects read latents: what they have in common, FastVideo's Parquet, and a dataset of the
Hugging Face hub.

Not which rows are exported, nor in what order files come to stand (that is `export`, the caller); a third form is
`energon`. Written from:

* FastVideo (hao-ai-lab/FastVideo, 07766ab): `fastvideo/dataset/dataloader/schema.py`, `pyarrow_schema_t2v`; its readers
  `fastvideo/dataset/parquet_dataset_map_style.py` and `fastvideo/dataset/utils.py` take all bytes for float32 whatever
  the dtype column says, and stack the latents of a folder, so that a folder holds one shape.
* Hugging Face datasets: "Structure your repository", and the metadata of dataset cards.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.errors import DamagedObjectError, UsageError
from pipeline.format import encode_latent, member_key, schema
from pipeline.records import DatasetManifest
from pipeline.stored import StoredRecord

# Readers that take one random row decode its whole row group, so that these are kept as small as those of the source.
_ROW_GROUP_BYTES = 16 << 20
_INT_LIST = pa.list_(pa.int64())
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "n>1B")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A row to export.

    Attributes:
        record: with all its columns.
        caption_embedding: float32 `(L, D)` of its true length, or None where no column set was asked for.
    """

    shard_id: str
    record: StoredRecord
    caption_embedding: npt.NDArray[np.float32] | None

    @property
    def mean(self) -> npt.NDArray[np.float32]:
        """`(C, t, h, w)`, the posterior mean, unscaled."""
        return np.ascontiguousarray(self.record.mean, dtype="<f4")


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What an export is made of, for the files that describe it.

    Attributes:
        export_id: the same for every run of the same export, different for others.
        bucket_rows: rows of each bucket.
        text_encoder: what made the caption embeddings; None: there are none.
    """

    manifest: DatasetManifest
    export_id: str
    num_files: int
    bucket_rows: Mapping[str, int]
    text_encoder: str | None

    @property
    def num_rows(self) -> int:
        return sum(self.bucket_rows.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedSample:
    """Where a sample lies in its tar: from the header of its first member, and the contents of its members."""

    key: str
    offset: int
    num_bytes: int
    parts: Sequence[tuple[str, int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """What a finished file says of itself.

    Attributes:
        num_bytes: uncompressed.
        samples: of a tar.
    """

    key: str
    num_rows: int
    num_bytes: int
    samples: Sequence[IndexedSample] = ()


class Sink(ABC):
    """A file in the making; whole once it is closed."""

    @abstractmethod
    def add(self, sample: Sample) -> None:
        """Writes a row."""

    @abstractmethod
    def close(self) -> None:
        """Ends the file."""


class Peer(ABC):
    """The form of one project. Files are numbered as the source's files are; each is made of one of them.

    Attributes:
        name: as `--to` has it.
        num_bytes: of the files that were taken, uncompressed.

    Args:
        about: what is exported.
        folder: a local folder for the description in the making.
    """

    name: str

    def __init__(self, about: About, folder: Path) -> None:
        self.about = about
        self.num_bytes = 0
        self._folder = folder

    @abstractmethod
    def key(self, number: int, bucket: str) -> str:
        """Where the rows of a bucket in a file of the source go, relative to the target."""

    @abstractmethod
    def unfinished_keys(self) -> Sequence[str]:
        """Names under which a text, while the export runs, stops every reader of the files beside it."""

    @abstractmethod
    def sink(self, path: Path) -> Sink:
        """A new file."""

    @abstractmethod
    def inspect(self, key: str, file: BinaryIO) -> FileFacts:
        """What a finished file holds.

        Raises:
            DamagedObjectError: it is no whole file of this form.
        """

    def beside(self, facts: FileFacts) -> Iterator[tuple[str, bytes]]:
        """Files that go with one file."""
        return iter(())

    def take(self, facts: FileFacts) -> None:
        """Notes a finished file for the description; called once for each, in their order."""
        self.num_bytes += facts.num_bytes

    def description(self) -> Iterator[tuple[str, Path]]:
        """The files that describe the whole, in the order in which they may appear, from a local folder."""
        return iter(())

    def close(self) -> None:  # noqa: B027  (most have nothing open)
        """Lets go of what a description is made of."""


class _ParquetSink(Sink):
    def __init__(self, path: Path, about: pa.Schema, row: Callable[[Sample], dict[str, Any]]) -> None:
        self._schema = about
        self._row = row
        self._rows: list[dict[str, Any]] = []
        self._num_bytes = 0
        self._writer = pq.ParquetWriter(
            path,
            about,
            version="2.6",
            compression="zstd",
            compression_level=1,
            use_dictionary=False,
            write_statistics=[field.name for field in about if not pa.types.is_binary(field.type)],
            write_page_checksum=True,
        )

    def add(self, sample: Sample) -> None:
        row = self._row(sample)
        self._rows.append(row)
        self._num_bytes += sum(len(value) for value in row.values() if isinstance(value, str | bytes))
        if self._num_bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            table = pa.Table.from_pylist(self._rows, schema=self._schema)
            self._writer.write_table(table, row_group_size=len(self._rows))
            self._rows.clear()
            self._num_bytes = 0

    def close(self) -> None:
        self._flush()
        self._writer.close()


class _ParquetPeer(Peer):
    """A peer whose files are Parquet."""

    schema: pa.Schema

    @abstractmethod
    def row(self, sample: Sample) -> dict[str, Any]:
        """The columns of a row by name."""

    def sink(self, path: Path) -> Sink:
        return _ParquetSink(path, self.schema, self.row)

    def inspect(self, key: str, file: BinaryIO) -> FileFacts:
        try:
            # Closing it closes the file too.
            content = pq.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise DamagedObjectError(f"{key} is no readable Parquet file: {error}") from error
        if not content.schema_arrow.equals(self.schema):
            raise DamagedObjectError(f"{key} has other columns than this export: {content.schema_arrow.names}")
        about = content.metadata
        num_bytes = sum(about.row_group(group).total_byte_size for group in range(about.num_row_groups))
        return FileFacts(key=key, num_rows=about.num_rows, num_bytes=num_bytes)


class FastVideo(_ParquetPeer):
    """FastVideo's text-to-video schema, a folder per bucket: `TARGET/256x256x17` is what `--data-path` takes.

    Latents are posterior means, float32, `[C, T, H, W]` and unscaled: FastVideo's trainers scale them. `num_frames` are
    the clip's frames, as the schema says (FastVideo's own writer has the latent's there), `width` and `height` pixels
    of the encoded picture, `fps` and `duration_sec` those of the clip as it was resampled, 0 for images. Its schema of
    image-to-video is not offered: `clip_feature` is a tower's last hidden state and `first_frame_latent` the scaled
    latent of the first frame with grey behind it, neither of which an output has.
    """

    name = "fastvideo"
    _TENSOR = (("bytes", pa.binary()), ("shape", _INT_LIST), ("dtype", pa.string()))

    def __init__(self, about: About, folder: Path) -> None:
        super().__init__(about, folder)
        if about.text_encoder is None:
            raise UsageError(
                "FastVideo's schema has a text embedding in every row: give --text NAME of a column set; jobs/"
                "encode_text.py --latents URI --text-encoder FOLDER_OR_HUB_ID makes the set `text`"
            )
        tensors = [
            pa.field(f"{tensor}_{part}", kind)
            for tensor in ("vae_latent", "text_embedding")
            for part, kind in self._TENSOR
        ]
        texts = [pa.field(name, pa.string()) for name in ("file_name", "caption", "media_type")]
        counts = [pa.field(name, pa.int64()) for name in ("width", "height", "num_frames")]
        times = [pa.field(name, pa.float64()) for name in ("duration_sec", "fps")]
        fields = [pa.field("id", pa.string()), *tensors, *texts, *counts, *times]
        self.schema = pa.schema(fields, metadata=schema(about.manifest).metadata)

    def key(self, number: int, bucket: str) -> str:
        return f"{bucket}/data_chunk_{number:06d}.parquet"

    def unfinished_keys(self) -> Sequence[str]:
        return [f"{bucket}/UNFINISHED.parquet" for bucket in self.about.bucket_rows]

    def row(self, sample: Sample) -> dict[str, Any]:
        record, columns = sample.record, sample.record.columns
        assert sample.caption_embedding is not None
        fps = columns["fps"]
        return {
            "id": f"{sample.shard_id}/{member_key(record.key, record.clip_index)}",
            **_tensor("vae_latent", sample.mean),
            **_tensor("text_embedding", sample.caption_embedding),
            "file_name": columns["source_uri"].rpartition("#")[2].rpartition("/")[2],
            "caption": columns["caption"],
            "media_type": "image" if fps is None else "video",
            "width": columns["width"],
            "height": columns["height"],
            "num_frames": columns["num_frames"],
            "duration_sec": columns["num_frames"] / fps if fps else 0.0,
            "fps": fps or 0.0,
        }


class HuggingFace(_ParquetPeer):
    """A dataset of the hub: the columns of the output as they are, `shard_id` before them, and a card."""

    name = "hf"

    def __init__(self, about: About, folder: Path) -> None:
        super().__init__(about, folder)
        own = [pa.field("shard_id", pa.string())]
        if about.text_encoder is not None:
            own += [pa.field("text_embedding", pa.binary()), pa.field("text_embedding_shape", pa.list_(pa.int32()))]
            own.append(pa.field("text_embedding_dtype", pa.string()))
        native = schema(about.manifest)
        taken = {field.name for field in own}
        self._names: dict[str, str] = {}
        for name in native.names:
            # Columns of the input keep their values under another name, as where they have the name of ours.
            free = name
            while free in taken:
                free = f"source_{free}"
            taken.add(free)
            self._names[name] = free
        kept = [pa.field(self._names[field.name], _plain_type(field.type)) for field in native]
        self.schema = pa.schema([own[0], *kept, *own[1:]], metadata=native.metadata)

    def key(self, number: int, bucket: str) -> str:
        return f"data/train-{self._digits(number)}-of-{self._digits(self.about.num_files)}.parquet"

    def unfinished_keys(self) -> Sequence[str]:
        # Only names that begin like this are taken for shards of a split; this one sorts first.
        return [f"data/train-{self._digits(0)}-of-{self._digits(self.about.num_files)}-UNFINISHED.parquet"]

    def _digits(self, number: int) -> str:
        return f"{number:0{max(5, len(str(self.about.num_files)))}d}"

    def row(self, sample: Sample) -> dict[str, Any]:
        record = sample.record
        row = {free: record.columns.get(name) for name, free in self._names.items()}
        row["shard_id"] = sample.shard_id
        row[self._names["latent"]] = encode_latent(record.latent, record.columns["latent_dtype"])
        extra = record.columns.get("extra")
        row[self._names["extra"]] = None if extra is None else json.dumps(extra)
        if sample.caption_embedding is not None:
            row |= _tensor("text_embedding", sample.caption_embedding)
            row["text_embedding"] = row.pop("text_embedding_bytes")
        return row

    def description(self) -> Iterator[tuple[str, Path]]:
        path = self._folder / "README.md"
        path.write_text(self._card(), encoding="utf-8")
        yield "README.md", path

    def _card(self) -> str:
        about, model = self.about, self.about.manifest.model
        features = [{"name": field.name, **_feature(field.type)} for field in self.schema]
        split = {"name": "train", "num_bytes": self.num_bytes, "num_examples": about.num_rows}
        head = {
            "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
            "dataset_info": {"features": features, "splits": [split], "dataset_size": self.num_bytes},
            "size_categories": [_size_category(about.num_rows)],
            "tags": ["latents", "video", "image", "latentmill"],
        }
        buckets = "\n".join(f"| {bucket} | {rows:,} |" for bucket, rows in about.bucket_rows.items())
        text = f"\n`text_embedding` is that of the caption, float32 `(L, D)`, by {about.text_encoder}.\n"
        kind = "the posterior mean" if about.manifest.kind == "mean" else "mean, then log-variance, `(2C, t, h, w)`,"
        return f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---

<!-- The licence is yours to state: add `license: ...` above. It depends on the videos, not on the program. -->

# Latents of {about.num_rows:,} clips

Made by Latentmill with the VAE `{model.model}` (SHA-256 of its weights {model.weights_sha256}). A row is a clip.

`latent` is {kind} **unscaled**, as {about.manifest.latent_dtype} bytes, little-endian, in C order:

```python
latent = numpy.frombuffer(row["latent"], row["latent_dtype"]).reshape(row["latent_shape"])  # (C, t, h, w)
```

The diffusion model takes `{model.scaling_factor} * (mean - {model.shift_factor})`.
{text if about.text_encoder is not None else ""}
| bucket (width x height x frames) | clips |
|---|---|
{buckets}
"""


def _tensor(name: str, array: npt.NDArray[np.float32]) -> dict[str, Any]:
    data = np.ascontiguousarray(array, dtype="<f4")
    return {f"{name}_bytes": data.tobytes(), f"{name}_shape": list(data.shape), f"{name}_dtype": "float32"}


def _plain_type(kind: pa.DataType) -> pa.DataType:
    return pa.list_(kind.value_type) if pa.types.is_list(kind) else kind


def _feature(kind: pa.DataType) -> dict[str, str]:
    """A column's type as a dataset card names it."""
    if pa.types.is_list(kind):
        return {"list": _feature(kind.value_type)["dtype"]}
    return {"dtype": "float64" if pa.types.is_float64(kind) else str(kind)}


def _size_category(num_rows: int) -> str:
    """The hub's word for a number of rows."""
    return _SIZES[min(max(0, len(str(num_rows)) - 3), len(_SIZES) - 1)]
