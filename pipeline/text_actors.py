"""Caption embeddings for records that are committed already: a record of the output in, a record of the set out.

Not where records are chosen (`jobs/encode_text.py`, which covers them in its own process or by `TextActor` on Ray) nor
where texts become embeddings (`conditions`, `text`). Whoever covers a record, and how often, the same bytes stand in
the end.
"""

from __future__ import annotations

import platform
import resource
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.columns import stored_captions_of
from pipeline.conditions import ConditionEncoders, open_sets
from pipeline.config import EncodingConfig, ImageEncoderConfig, TextEncoderConfig
from pipeline.errors import UsageError
from pipeline.records import FileStat
from pipeline.scratch import Scratch
from pipeline.storage import ObjectStore, open_store


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTask:
    """A record of the output to cover, or to cover again.

    Attributes:
        repairs: the record of the set whose files are to be put back; None for a first time.
    """

    record: str
    shard_id: str
    base: FileStat
    repairs: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Covered:
    """What came of a task.

    Attributes:
        is_ours: the set now holds exactly what was made here.
        num_texts: distinct ones.
        num_truncated: of these, with more tokens than the encoder takes.
    """

    is_ours: bool
    num_texts: int
    num_truncated: int


def load_text_encoder(
    text: TextEncoderConfig, output: ObjectStore, device_type: str, compute_dtype: str, cpus_per_actor: int | None
) -> ConditionEncoders:
    """The encoder, on threads by the rules of the job that makes latents and embeddings in one pass.

    Raises:
        UsageError: the encoder cannot be loaded, or torch sees no GPU.
    """
    import torch

    if device_type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"torch {torch.__version__} sees no GPU on {platform.node()}: install a CUDA build of torch and a driver, "
            "or pass --device cpu"
        )
    encoding = EncodingConfig(model="", compute_dtype=compute_dtype, cpus_per_actor=cpus_per_actor)
    num_threads = encoding.cpus_on(device_type)
    torch.set_num_threads(num_threads)
    return ConditionEncoders(
        text,
        ImageEncoderConfig(),
        output,
        torch.device(device_type),
        encoding.compute_dtype_on(device_type),
        num_threads,
    )


def cover(
    encoders: ConditionEncoders, task: TextTask, captions: Mapping[str, Sequence[str]], turn: threading.Lock
) -> Covered:
    """Embeds the captions of a record and commits them.

    Args:
        captions: as `columns.stored_captions_of` gives them.
        turn: held while texts are embedded.

    Raises:
        StorageError: the store failed; trying again is safe.
        UsageError: an embedding is not finite.
    """
    conditions = encoders.shard(task.shard_id)
    with Scratch("text") as folder:
        with turn:
            conditions.write_texts(folder, captions)
        is_ours = conditions.commit([task.base])
    return Covered(is_ours=is_ours, num_texts=len(captions), num_truncated=conditions.num_truncated)


class TextActor:
    """One text encoder on one GPU, a fraction of one, or a group of CPU cores. Wrapped by `ray.remote` in the job.

    Calls may overlap: while the captions of one record are embedded, those of another come, or are committed.
    """

    def __init__(
        self, latents: str, text: TextEncoderConfig, device_type: str, compute_dtype: str, cpus_per_actor: int | None
    ) -> None:
        self._text = text
        self._output = open_store(latents)
        self._how = device_type, compute_dtype, cpus_per_actor
        self._encoders: ConditionEncoders | None = None
        self._turn = threading.Lock()
        # A core dump would hold credentials.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))

    def start(self) -> None:
        """Loads the encoder, and creates the set or finds it as it should be.

        Raises:
            UsageError: as `load_text_encoder`.
            ConfigMismatchError: the set was made with another encoder.
        """
        self._loaded()

    def _loaded(self) -> ConditionEncoders:
        with self._turn:
            if self._encoders is None:
                encoders = load_text_encoder(self._text, self._output, *self._how)
                open_sets(self._output, encoders.manifests)
                self._encoders = encoders
            return self._encoders

    def cover(self, task: TextTask) -> Covered:
        """Covers one record.

        Raises:
            StorageError, UsageError: as `cover`.
        """
        # One that Ray has started anew has no encoder yet.
        encoders = self._loaded()
        return cover(encoders, task, stored_captions_of(self._output, task.base, self._text.text_columns), self._turn)
