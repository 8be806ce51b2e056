"""Clips to latents and latents back to pictures: the one door to `cvvae`.

Not where batches are waited for, and not where latents are written: it takes an iterator of clips and gives an iterator
of records. `actors` encodes with it; previews, the demo and quality checks decode with it.

The bytes of a record depend on the clip, the model and the configuration, never on a neighbour: on a CPU every clip is
a batch of its own; on a GPU every batch of a bucket has the same size, short ones padded with zeros.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import cvvae
from pipeline.config import EncodingConfig
from pipeline.cuda_graph import RecordedCall
from pipeline.errors import UsageError
from pipeline.records import Bucket, Clip, ClipFailure, LatentRecord, ModelFacts

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_REFERENCE_PICTURE_PX = 256 * 256
_MOST_SHAPES = 256  # of buckets, chunks and tiles, which a compiled encoder is made for one by one


def batch_size(bucket: Bucket, batch_frames: int, device_type: str) -> int:
    """Clips of one encoder call: 1 on a CPU; on a GPU so many that pixels stay near `batch_frames` at 256x256."""
    if device_type == "cpu":
        return 1
    pixels = bucket.width_px * bucket.height_px * bucket.num_frames
    return max(1, batch_frames * _REFERENCE_PICTURE_PX // pixels)


def load_model(encoding: EncodingConfig, device: torch.device) -> cvvae.CVVAE:
    """The VAE that the configuration names, on the device, in the dtype it computes in.

    Raises:
        UsageError: no such model, other weights than pinned, a checkpoint with missing or left-over keys, a chunk or
            tile it cannot take.
    """
    dtype = _DTYPES[encoding.compute_dtype_on(device.type)]
    try:
        vae = cvvae.load(
            encoding.model,
            encoding.subfolder,
            torch_dtype=dtype,
            revision=encoding.revision,
            sha256=encoding.model_sha256,
        )
        vae.set_chunking(encoding.chunk_frames, encoding.tile_px)
    except (cvvae.CheckpointError, OSError, ValueError) as error:
        raise UsageError(f"--model {encoding.model}: {error}") from error
    vae.to(device)
    return vae.eval().requires_grad_(False)


def model_facts(vae: cvvae.CVVAE, encoding: EncodingConfig) -> ModelFacts:
    """What the output says about the model."""
    return ModelFacts(
        model=encoding.model if encoding.subfolder is None else f"{encoding.model}/{encoding.subfolder}",
        revision=vae.revision,
        weights_sha256=vae.weights_sha256,
        is_trained=vae.is_trained,
        scaling_factor=vae.scaling_factor,
        shift_factor=vae.shift_factor,
        latent_channels=vae.latent_channels,
        temporal_compression=vae.temporal_compression,
        spatial_compression=vae.spatial_compression,
    )


def pixels_to_input(frames: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 `(B, T, H, W, 3)` in 0..255 -> `(B, 3, T, H, W)` in [-1, 1], on the device of the input."""
    return frames.permute(0, 4, 1, 2, 3).to(torch.float32).div_(127.5).sub_(1.0).to(dtype)


def output_to_pixels(video: torch.Tensor) -> npt.NDArray[np.uint8]:
    """`(3, T, H, W)` about [-1, 1] -> uint8 `(T, H, W, 3)`, rounded, not truncated."""
    pixels = video.to(torch.float32).add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return np.asarray(pixels.permute(1, 2, 3, 0).contiguous().cpu().numpy())


@dataclass(slots=True)
class _Staging:
    """A pinned host buffer for one batch and the event after which it may be written again."""

    host: torch.Tensor
    free: torch.cuda.Event


@dataclass(frozen=True, slots=True)
class _Pending:
    """A batch on its way: moments `(B, 2C, t, h, w)` on the host once `done` has passed (None: already there)."""

    clips: Sequence[Clip]
    moments: torch.Tensor
    done: torch.cuda.Event | None


class ClipEncoder:
    """Encodes the clips of a shard, one caller at a time.

    On a GPU the next batch is copied and started before the last one is read back: uploads run on a stream of their
    own from pinned memory, results return to pinned memory, and the host waits for one event per batch.

    Args:
        cuda_graphs: record the kernels of a batch of every bucket once; the latents are the same to the bit.

    Attributes:
        busy_s: seconds spent in the encoder since the start (on a GPU: host time from submission to result).
        compile_error: why the encoder runs as it is although it was to be compiled; None where all is as asked.
        cuda_graphs_error: why kernels are started one by one although they were to be recorded; likewise.
    """

    def __init__(self, encoding: EncodingConfig, device: torch.device, *, cuda_graphs: bool = False) -> None:
        self.device = device
        self.busy_s = 0.0
        self._encoding = encoding
        self._dtype = _DTYPES[encoding.compute_dtype_on(device.type)]
        self._store_dtype = _DTYPES[encoding.store_dtype]
        self._vae = load_model(encoding, device)
        self.facts = model_facts(self._vae, encoding)
        self._staging: dict[Bucket, list[_Staging]] = {}
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._recorded: dict[torch.Size, RecordedCall] = {}
        self.compile_error = self._compile() if encoding.compile else None
        self.cuda_graphs_error = self._record() if cuda_graphs else None

    @torch.inference_mode()
    def _compile(self) -> str | None:
        """Compiles the encoder for every bucket before the first clip comes; says why where that fails."""
        as_it_is = self._vae.encoder
        self._vae.encoder = cast(nn.Module, torch.compile(as_it_is, fullgraph=True, dynamic=False))
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = _MOST_SHAPES
        try:
            for bucket in self._encoding.buckets:
                self._moments(torch.zeros(self._batch_shape(bucket), dtype=torch.uint8, device=self.device))
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # of many kinds: no C compiler, no Triton, an operation it does not know
            self._vae.encoder = as_it_is
            return _in_short(error)
        return None

    @torch.inference_mode()
    def _record(self) -> str | None:
        """Records a batch of every bucket before the first clip comes; says why where that fails."""
        if self.device.type != "cuda":
            return "the encoder is not on a GPU"
        generator = torch.Generator(self.device).manual_seed(0)
        pool = torch.cuda.graph_pool_handle()
        try:
            for bucket in self._encoding.buckets:
                shape = self._batch_shape(bucket)
                frames = torch.randint(256, shape, dtype=torch.uint8, device=self.device, generator=generator)
                self._recorded[frames.shape] = RecordedCall(self._moments, frames, pool)
        except Exception as error:  # of many kinds; too little memory for the recordings too
            self._recorded.clear()
            torch.cuda.empty_cache()
            return _in_short(error)
        return None

    def _batch_shape(self, bucket: Bucket) -> tuple[int, ...]:
        size = batch_size(bucket, self._encoding.batch_frames, self.device.type)
        return size, bucket.num_frames, bucket.height_px, bucket.width_px, 3

    def decoder(self) -> LatentDecoder:
        """A decoder on the weights that this encoder holds, for the same thread: nothing is loaded."""
        return LatentDecoder(self._encoding, self.device, self._vae)

    def encode(self, clips: Iterable[Clip | ClipFailure]) -> Iterator[LatentRecord | ClipFailure]:
        """Records in the order in which batches fill; failures in the input pass through at once.

        Yields:
            one LatentRecord or one ClipFailure (`nonfinite_latent`, `encode_error`) for every clip.
        """
        waiting: dict[Bucket, list[Clip]] = {}
        pending: list[_Pending] = []
        for clip in clips:
            if isinstance(clip, ClipFailure):
                yield clip
                continue
            batch = waiting.setdefault(clip.bucket, [])
            batch.append(clip)
            if len(batch) == batch_size(clip.bucket, self._encoding.batch_frames, self.device.type):
                yield from self._advance(waiting.pop(clip.bucket), pending)
        for bucket in sorted(waiting):
            yield from self._advance(waiting[bucket], pending)
        while pending:
            yield from self._collect(pending.pop(0))

    def _advance(self, batch: Sequence[Clip], pending: list[_Pending]) -> Iterator[LatentRecord | ClipFailure]:
        started = time.perf_counter()
        try:
            pending.append(self._submit(batch))
        except torch.cuda.OutOfMemoryError as error:
            raise UsageError(
                f"the GPU ran out of memory on a batch of {len(batch)} clips of {batch[0].bucket}; lower "
                f"--batch-frames (now {self._encoding.batch_frames}), give --tile-px, or give the actor more of the GPU"
            ) from error
        except RuntimeError as error:
            # After most CUDA errors the context is lost and every later clip would fail too; want of memory says
            # something of the machine and nothing of the clip. Both end the attempt.
            if self.device.type == "cuda" or "alloc" in str(error).lower():
                raise
            yield from (_failure(clip, "encode_error", f"the encoder failed: {error}") for clip in batch)
        finally:
            self.busy_s += time.perf_counter() - started
        depth = 1 if self.device.type == "cuda" else 0
        while len(pending) > depth:
            yield from self._collect(pending.pop(0))

    @torch.inference_mode()
    def _submit(self, batch: Sequence[Clip]) -> _Pending:
        if self._copy_stream is None:
            frames = torch.from_numpy(np.stack([clip.frames for clip in batch]))
            return _Pending(batch, self._moments(frames), None)
        staging = self._staging_for(batch[0].bucket)
        staging.free.synchronize()
        for index, clip in enumerate(batch):
            staging.host[index].copy_(torch.from_numpy(clip.frames))
        staging.host[len(batch) :].zero_()
        compute = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copy_stream):
            frames = staging.host.to(self.device, non_blocking=True)
            staging.free.record(self._copy_stream)
        compute.wait_stream(self._copy_stream)
        # The caching allocator must not hand this memory out again while the compute stream still reads it.
        frames.record_stream(compute)
        moments = self._recorded.get(frames.shape, self._moments)(frames)
        host = torch.empty(moments.shape, dtype=moments.dtype, pin_memory=True)
        host.copy_(moments, non_blocking=True)
        done = torch.cuda.Event()
        done.record(compute)
        return _Pending(batch, host, done)

    def _staging_for(self, bucket: Bucket) -> _Staging:
        slots = self._staging.get(bucket)
        if slots is None:
            shape = self._batch_shape(bucket)
            slots = [
                _Staging(torch.empty(shape, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)
            ]
            self._staging[bucket] = slots
        slots.append(slots.pop(0))
        return slots[-1]

    def _moments(self, frames: torch.Tensor) -> torch.Tensor:
        """`(B, C or 2C, t, h, w)` of uint8 `(B, T, H, W, 3)`."""
        return torch.cat([self._stored(posterior) for posterior in self._posteriors(frames)], dim=2)

    def _posteriors(self, frames: torch.Tensor) -> Iterable[cvvae.LatentDistribution]:
        """Of the whole clips, or where the model streams of one piece after the other.

        A stream gives the same latents, and only one piece is ever in memory in floating point.
        """
        if not self._vae.is_causal or self._vae.chunk_frames is None:
            return [self._vae.encode(pixels_to_input(frames, self._dtype)).latent_dist]
        # A piece ends with a group, as the first frame is a group by itself.
        starts = range(1, max(frames.shape[1], 2), self._vae.chunk_frames)
        pieces = (frames[:, start if start > 1 else 0 : start + self._vae.chunk_frames] for start in starts)
        return self._vae.encode_stream(pixels_to_input(piece, self._dtype) for piece in pieces)

    def _stored(self, posterior: cvvae.LatentDistribution) -> torch.Tensor:
        parts = [posterior.mean] if self._encoding.store == "mean" else [posterior.mean, posterior.logvar]
        return torch.cat([part.to(self._store_dtype) for part in parts], dim=1)

    def _collect(self, batch: _Pending) -> Iterator[LatentRecord | ClipFailure]:
        started = time.perf_counter()
        if batch.done is not None:
            batch.done.synchronize()
        self.busy_s += time.perf_counter() - started
        for clip, moments in zip(batch.clips, batch.moments.numpy(), strict=False):
            num_bad = int(moments.size - np.isfinite(moments).sum())
            if num_bad:
                dtypes = f"{self._encoding.compute_dtype_on(self.device.type)}, stored as {self._encoding.store_dtype}"
                text = f"{num_bad} of {moments.size} latent values are NaN or infinite (computed in {dtypes})"
                yield _failure(clip, "nonfinite_latent", text)
            else:
                yield LatentRecord.of_clip(clip, moments, self._encoding.kind)


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _failure(clip: Clip, reason: str, message: str) -> ClipFailure:
    return ClipFailure(
        key=clip.key,
        clip_index=clip.clip_index,
        step="encode",
        reason=reason,
        message=message,
        source_uri=clip.source_uri,
    )


class LatentDecoder:
    """Decodes stored latents to pictures, for previews and quality checks.

    Args:
        vae: a model as `load_model` gives it; None: it is loaded.
    """

    def __init__(self, encoding: EncodingConfig, device: torch.device, vae: cvvae.CVVAE | None = None) -> None:
        self._vae = load_model(encoding, device) if vae is None else vae
        self._device = device
        self._dtype = _DTYPES[encoding.compute_dtype_on(device.type)]
        self.facts = model_facts(self._vae, encoding)

    def decode(self, mean: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
        """Unscaled posterior mean `(C, t, h, w)` -> uint8 `(1+4(t-1), 8h, 8w, 3)` in 0..255."""
        return self.decode_counted(mean)[0]

    @torch.inference_mode()
    def decode_counted(self, mean: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.uint8], int]:
        """As `decode`, with the number of values that were NaN or infinite before they became pixels."""
        latents = torch.from_numpy(np.ascontiguousarray(mean)).to(self._device, self._dtype).unsqueeze(0)
        num_nonfinite = 0
        pictures = []
        for video in self._decoded(latents):
            num_nonfinite += video.numel() - int(torch.isfinite(video).sum())
            pictures.append(output_to_pixels(video))
        return np.concatenate(pictures), num_nonfinite

    def _decoded(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """The video `(3, T, H, W)`, or where the model streams one piece of it after the other."""
        chunk_frames = self._vae.chunk_frames
        if not self._vae.is_causal or chunk_frames is None:
            yield self._vae.decode(latents).sample[0]
            return
        for piece in self._vae.decode_stream(latents.split(chunk_frames // self._vae.temporal_compression, dim=2)):
            yield piece[0]
