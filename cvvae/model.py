"""The codec: encoder, decoder and the model that cuts, runs and joins.

`checkpoint.load` builds a `CVVAE`; `pipeline/codec` and training use it. It applies no scale: latents leave and
enter as the encoder makes them, and `scaling_factor` and `shift_factor` only say what a diffusion model expects.

A half is called as half(x, cache=None): with a `Cache` x is the next piece of a stream, without one the whole clip.

Tensor letters: B batch, C channels, T H W frames in pixels, t h w latents: t = 1 + (T - 1) / 4.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import torch
from torch import Tensor, nn

from cvvae.config import NUM_LEVELS, SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, CVVAEConfig
from cvvae.layers import (
    Attention,
    Cache,
    Padding,
    PointwiseLinear,
    Recomputable,
    ResidualBlock,
    SpaceTimeConv,
    Upsample,
    group_norm,
    norm_silu,
    to_channels_last,
)
from cvvae.light import LightDecoder, LightEncoder
from cvvae.tiling import Span, plan_chunks, plan_tiles, run_tiles

LOGVAR_RANGE = (-30.0, 20.0)


class LatentDistribution:
    """A diagonal Gaussian over latents.

    Attributes:
        mean: (B, C, t, h, w), or (B, C, h, w) for images, unscaled.
        logvar: the same shape, clamped to [-30, 20].
    """

    def __init__(self, moments: Tensor) -> None:
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(*LOGVAR_RANGE)

    @property
    def std(self) -> Tensor:
        """Standard deviation, the shape of `mean`."""
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        """The mean: what the pipeline stores."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw, the shape of `mean`; reproducible with a seeded generator of the same device."""
        device = generator.device if generator is not None else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)


@dataclass(frozen=True, slots=True)
class EncoderOutput:
    """What `CVVAE.encode` returns."""

    latent_dist: LatentDistribution


@dataclass(frozen=True, slots=True)
class DecoderOutput:
    """What `CVVAE.decode` returns; sample is about [-1, 1], not clamped."""

    sample: Tensor


class Level(nn.Module):
    """Residual blocks of one width, then a change of resolution (none at the end of a half). Only holds them."""

    def __init__(self, blocks: list[ResidualBlock], resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


def layers_in_order(levels: nn.ModuleList) -> list[nn.Module]:
    """What a half runs; by itself, layer after layer, as calling a level would keep the level's input alive."""
    layers: list[nn.Module] = []
    for level in levels:
        assert isinstance(level, Level), f"a half consists of levels, found {type(level).__name__}"
        layers += [*level.blocks, *([] if level.resample is None else [level.resample])]
    return layers


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, config: CVVAEConfig, padding: Padding, *, has_time: bool) -> None:
        super().__init__()
        self.block1 = ResidualBlock(channels, channels, config, padding)
        self.attention = Attention(channels, config, has_time=has_time)
        self.block2 = ResidualBlock(channels, channels, config, padding)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        out: Tensor = self.block2(self.attention(self.block1(x, cache)), cache)
        return out


class Encoder(nn.Module):
    """(B, 3, T, H, W) in [-1, 1] -> moments (B, 2 C, t, h, w): means, then log-variances.

    Frame j of the result has read frames up to 4 j only through convolutions. With norm="clip" GroupNorm pools over the
    whole input all the same, so results depend on all frames given; with norm="frame" they do not, and in a stream the
    latents come in the call that brings frame 4 j, so that t of a call may be 0.
    """

    def __init__(self, config: CVVAEConfig) -> None:
        super().__init__()
        padding = Padding(time_before=2, time_after=0, time_mode="replicate", space_mode=config.spatial_padding)
        down_padding = Padding(
            time_before=2,
            time_after=0,
            time_mode="replicate",
            space_mode=config.spatial_padding,
            right_bottom_only=config.downsample_padding == "right_bottom",
        )
        widths = config.block_out_channels
        self.conv_in = SpaceTimeConv(config.in_channels, widths[0], padding=padding)
        self.levels = nn.ModuleList()
        previous = widths[0]
        for index, width in enumerate(widths):
            blocks = [
                ResidualBlock(previous if block == 0 else width, width, config, padding)
                for block in range(config.layers_per_block)
            ]
            down = None
            if index < NUM_LEVELS - 1:
                time_stride = 2 if index in _TIME_LEVELS else 1
                down = SpaceTimeConv(width, width, padding=down_padding, stride=(time_stride, 2))
            self.levels.append(Level(blocks, down))
            previous = width
        has_time = config.encoder_attention == "spatial_temporal"
        self.middle = Middle(previous, config, padding, has_time=has_time)
        self.norm_out = group_norm(previous, config)
        self.conv_out = SpaceTimeConv(previous, 2 * config.latent_channels, padding=padding)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        B, _, _, H, W = x.shape
        x = self.conv_in(x, cache)
        for layer in layers_in_order(self.levels):
            x = layer(x, cache)
            if x.shape[2] == 0:  # a piece of a stream that ends inside a group
                return x.new_empty(B, self.conv_out.out_channels, 0, H // SPATIAL_COMPRESSION, W // SPATIAL_COMPRESSION)
        x = self.middle(x, cache)
        out: Tensor = self.conv_out(norm_silu(self.norm_out, x), cache)
        return out


class Decoder(nn.Module):
    """Latents (B, C, t, h, w) -> frames (B, 3, 1 + 4 (t - 1), 8 h, 8 w), about [-1, 1], not clamped.

    With norm="frame" in a stream every latent but the first gives 4 frames.
    """

    def __init__(self, config: CVVAEConfig) -> None:
        super().__init__()
        before, after = (2, 0) if config.is_causal else (1, 1)
        padding = Padding(
            time_before=before,
            time_after=after,
            time_mode=config.decoder_time_padding,
            space_mode=config.spatial_padding,
        )
        up_padding = dataclasses.replace(padding, time_mode="replicate")
        widths = config.block_out_channels[::-1]
        C = config.latent_channels
        # Its bias cannot be folded into conv_in: that pads with zeros what this layer has mapped.
        self.post_quant_conv = PointwiseLinear(C, C, num_trailing_dims=2) if config.post_quant_conv else None
        self.conv_in = SpaceTimeConv(config.latent_channels, widths[0], padding=padding)
        has_time = config.decoder_attention == "spatial_temporal"
        self.middle = Middle(widths[0], config, padding, has_time=has_time)
        self.levels = nn.ModuleList()
        previous = widths[0]
        for index, width in enumerate(widths):
            blocks = [
                ResidualBlock(previous if block == 0 else width, width, config, padding)
                for block in range(config.layers_per_block + 1)
            ]
            up = None
            if index < NUM_LEVELS - 1:
                up = Upsample(width, doubles_time=index in _TIME_LEVELS, padding=up_padding)
            self.levels.append(Level(blocks, up))
            previous = width
        self.norm_out = group_norm(previous, config)
        self.conv_out = SpaceTimeConv(previous, config.in_channels, padding=padding)

    def forward(self, z: Tensor, cache: Cache | None = None) -> Tensor:
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z.movedim(1, -1)).movedim(-1, 1)
        x = self.middle(self.conv_in(z, cache), cache)
        for layer in layers_in_order(self.levels):
            x = layer(x, cache)
        out: Tensor = self.conv_out(norm_silu(self.norm_out, x), cache)
        return out


TileCaches = defaultdict[tuple[Span, Span], Cache]
"""Of a stream: one cache for each tile."""
_TIME_LEVELS = (0, 2)
"""Changes of resolution that also change the frame rate, counted in the order in which a half runs them."""


def _records_gradients(half: nn.Module, x: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in half.parameters()))


def _halves(config: CVVAEConfig) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of the family; each is called as half(x, cache=None)."""
    if config.class_name == "CVVAELightModel":
        return LightEncoder(config), LightDecoder(config)
    return Encoder(config), Decoder(config)


class CVVAE(nn.Module):
    """A video VAE whose latents live in the space of an image VAE.

    Source: CV-VAE, arXiv 2405.20279. Clips longer than a chunk and frames larger than a tile are cut as published;
    `set_chunking` changes that. A causal model runs long clips as a stream: chunks bound its memory and change nothing.

    Attributes:
        config: the `CVVAEConfig`, also read as `vae.config` by diffusers pipelines.
        source: where the weights came from.
        revision: commit of the hub repository, or "".
        weights_sha256: SHA-256 of the weights' file, or "" for a model that was not loaded.
    """

    temporal_compression = TEMPORAL_COMPRESSION
    spatial_compression = SPATIAL_COMPRESSION

    def __init__(self, config: CVVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = _halves(config)
        self._tile_latents: int | None = None
        self._chunk_latents: int | None = None
        self.set_chunking()
        self.source = ""
        self.revision = ""
        self.weights_sha256 = ""

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def latent_channels(self) -> int:
        """Channels of a latent: 4 (SD2.1) or 16 (SD3)."""
        return self.config.latent_channels

    @property
    def scaling_factor(self) -> float:
        """A diffusion model sees scaling_factor * (z - shift_factor)."""
        return self.config.scaling_factor

    @property
    def shift_factor(self) -> float:
        """A diffusion model sees scaling_factor * (z - shift_factor)."""
        return self.config.shift_factor

    @property
    def is_trained(self) -> bool:
        """False where the weights were made from a seed, so that latents carry no meaning."""
        return not self.config.untrained

    @property
    def is_causal(self) -> bool:
        """No latent depends on a later frame and no frame on a later latent, so that streams are possible."""
        return self.config.is_causal

    @property
    def chunk_frames(self) -> int | None:
        """The chunks' length as given to `set_chunking`, without the frame more; None where clips are not cut."""
        return None if self._chunk_latents is None else self._chunk_latents * TEMPORAL_COMPRESSION

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, t, h, w) of the latents of a clip of that many frames and that size in pixels.

        Raises:
            ValueError: the frame count is not 1 + 4 k, or a side is too small for one latent.
        """
        _check_frame_count(num_frames)
        sides = []
        for name, size in (("height", height), ("width", width)):
            side = self._latent_side(size)
            if side < 1:
                raise ValueError(
                    f"the {name} of the frames is {size} px: at least {SPATIAL_COMPRESSION} px make one latent; "
                    f"resize the frames"
                )
            sides.append(side)
        num_latents = 1 + (num_frames - 1) // TEMPORAL_COMPRESSION
        return self.latent_channels, num_latents, sides[0], sides[1]

    def set_chunking(self, chunk_frames: int | None = None, tile_px: int | None = None) -> None:
        """How to cut clips in time and frames in space.

        Both change the results of a published model slightly, as norms pool over a piece; a causal model streams its
        chunks, with the same results, and only tiles change them. Where gradients are recorded a causal model runs a
        clip in one piece all the same, as a stream carries no gradients from one piece to the next.

        Args:
            chunk_frames: frames from the beginning of one chunk to that of the next, a multiple of 4; a chunk has one
                frame more, which in a published model it shares with the next. 0: never cut in time. None: as the
                model's configuration says (published: 16).
            tile_px: side of a tile, a multiple of 8; larger frames are tiled. 0: never. None: as the model's
                configuration says (published: 576, with 128 overlap).

        Raises:
            ValueError: a value is negative or no such multiple.
        """
        chunk_frames = self.config.chunk_num_frames if chunk_frames is None else chunk_frames
        tile_px = self.config.tile_size_px if tile_px is None else tile_px
        self._chunk_latents = _whole_latents("chunk_frames", chunk_frames, TEMPORAL_COMPRESSION)
        self._tile_latents = _whole_latents("tile_px", tile_px, SPATIAL_COMPRESSION)

    @overload
    def encode(self, x: Tensor, return_dict: Literal[True] = True) -> EncoderOutput: ...

    @overload
    def encode(self, x: Tensor, return_dict: Literal[False]) -> tuple[LatentDistribution]: ...

    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[LatentDistribution]:
        """The distribution of the latents of clips or images.

        Args:
            x: clips (B, 3, T, H, W) with T = 1 + 4 k, or images (B, 3, H, W); floating, in [-1, 1].
            return_dict: False gives a tuple, as diffusers pipelines ask for.

        Returns:
            An object whose latent_dist has .mean and .logvar, (B, C, 1 + k, h, w), or (B, C, h, w) for images;
            unscaled. Sides are floor(H / 8) for the SD2.1 family and ceil(H / 8) for the SD3 family.

        Raises:
            ValueError: wrong number of dimensions or channels, T not 1 + 4 k, frames too small, or integer frames.
        """
        clips = self._as_clips(x, self.config.in_channels, "frames")
        _, num_latents, _, _ = self.latent_shape(*clips.shape[2:])
        pieces = []
        for chunk in plan_chunks(num_latents, None if self.is_causal else self._chunk_latents):
            frames = clips[:, :, _first_frame(chunk.start) : _end_frame(chunk.stop)]
            moments = self._encode_tiles(frames)
            pieces.append(moments[:, :, 1:] if chunk.start else moments)
        moments = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
        distribution = LatentDistribution(moments if x.dim() == 5 else moments.squeeze(2))
        return EncoderOutput(distribution) if return_dict else (distribution,)

    @overload
    def decode(
        self, z: Tensor, return_dict: Literal[True] = True, generator: torch.Generator | None = None
    ) -> DecoderOutput: ...

    @overload
    def decode(
        self, z: Tensor, return_dict: Literal[False], generator: torch.Generator | None = None
    ) -> tuple[Tensor]: ...

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Frames from latents.

        Args:
            z: latents (B, C, t, h, w), unscaled, or of images (B, C, h, w).
            return_dict: False gives a tuple, as diffusers pipelines ask for.
            generator: ignored, decoding is deterministic; diffusers pipelines pass one.

        Returns:
            An object whose sample is (B, 3, 1 + 4 (t - 1), 8 h, 8 w), or (B, 3, 8 h, 8 w); about [-1, 1], not clamped.

        Raises:
            ValueError: wrong number of dimensions or channels.
        """
        latents = self._as_clips(z, self.latent_channels, "latents")
        pieces = []
        for chunk in plan_chunks(latents.shape[2], None if self.is_causal else self._chunk_latents):
            frames = self._decode_tiles(latents[:, :, chunk.start : chunk.stop])
            pieces.append(frames[:, :, 1:] if chunk.start else frames)
        frames = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
        sample = frames if z.dim() == 5 else frames.squeeze(2)
        return DecoderOutput(sample) if return_dict else (sample,)

    def encode_stream(self, frames: Iterable[Tensor]) -> Iterator[LatentDistribution]:
        """The latents of a video that is never in memory as a whole; equal to those that `encode` gives for all of it.

        Args:
            frames: the pieces of one clip (B, 3, t, H, W) in order, any t >= 1 each; floating, in [-1, 1].

        Yields:
            the distribution of the latents that a piece completed, (B, C, k, h, w); nothing where it completed none.

        Raises:
            ValueError: the model is not causal (at the call), a piece does not fit the first one, frames are too small
                or integer, or the pieces end inside a group: together they must have 1 + 4 k frames.
        """
        self._check_streams("encode_stream")
        return self._encode_pieces(frames)

    def _encode_pieces(self, pieces: Iterable[Tensor]) -> Iterator[LatentDistribution]:
        caches: TileCaches = defaultdict(Cache)
        num_frames = 0
        for piece in self._checked(pieces, self.config.in_channels, "frames"):
            if not num_frames:
                self.latent_shape(1, *piece.shape[3:])
            num_frames += piece.shape[2]
            moments = self._encode_tiles(piece, caches)
            if moments.shape[2]:
                yield LatentDistribution(moments)
        if num_frames:
            _check_frame_count(num_frames)

    def decode_stream(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """The frames of latents that are never in memory as a whole; equal to those that `decode` gives for all.

        Args:
            latents: the pieces (B, C, t, h, w) of one clip's latents in order, any t >= 1 each; unscaled.

        Yields:
            for every piece its frames: (B, 3, 1 + 4 (t - 1), 8 h, 8 w) for the first, (B, 3, 4 t, 8 h, 8 w) for each
            later one; about [-1, 1], not clamped.

        Raises:
            ValueError: the model is not causal (at the call), or a piece does not fit the first one.
        """
        self._check_streams("decode_stream")
        return self._decode_pieces(latents)

    def _decode_pieces(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        caches: TileCaches = defaultdict(Cache)
        for piece in self._checked(pieces, self.latent_channels, "latents"):
            yield self._decode_tiles(piece, caches)

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """In training the residual blocks keep their input only and are computed once more in the backward pass.

        Less memory for about a third more computation; values and gradients are the same.
        """
        for module in self.modules():
            if isinstance(module, Recomputable):
                module.gradient_checkpointing = enabled

    def forward(self, x: Tensor) -> Tensor:
        """Encodes, then decodes the mean: what comes back has the shape of x where H and W are multiples of 8."""
        encoded = self.encode(x)
        assert isinstance(encoded, EncoderOutput)
        decoded = self.decode(encoded.latent_dist.mode())
        assert isinstance(decoded, DecoderOutput)
        return decoded.sample

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `diffusion_pytorch_model.safetensors` with the published fields and keys."""
        from cvvae.checkpoint import save

        save(self, Path(folder))

    def _latent_side(self, size_px: int) -> int:
        rounds_up = self.config.downsample_padding == "both"
        return -(-size_px // SPATIAL_COMPRESSION) if rounds_up else size_px // SPATIAL_COMPRESSION

    def _encode_tiles(self, frames: Tensor, caches: TileCaches | None = None) -> Tensor:
        # Rounded up also where the encoder rounds down: published tiles are planned in pixels, so that a rest of a few
        # pixels beyond a tile begins another one.
        h, w = (-(-side // SPATIAL_COMPRESSION) for side in frames.shape[3:])
        chunk_frames = None if self._chunk_latents is None else _end_frame(self._chunk_latents + 1)

        def encode_tile(row: Span, column: Span) -> Tensor:
            cache = None if caches is None else caches[row, column]
            return self._run(self.encoder, frames[..., _pixels(row), _pixels(column)], cache, chunk_frames)

        return self._tiled(encode_tile, h, w, 1)

    def _decode_tiles(self, latents: Tensor, caches: TileCaches | None = None) -> Tensor:
        chunk_latents = None if self._chunk_latents is None else self._chunk_latents + 1

        def decode_tile(row: Span, column: Span) -> Tensor:
            cache = None if caches is None else caches[row, column]
            tile = latents[..., row.start : row.stop, column.start : column.stop]
            return self._run(self.decoder, tile, cache, chunk_latents)

        return self._tiled(decode_tile, latents.shape[3], latents.shape[4], SPATIAL_COMPRESSION)

    def _tiled(self, run: Callable[[Span, Span], Tensor], height: int, width: int, scale: int) -> Tensor:
        """Runs every tile of a field of height x width latents; results have `scale` rows for every latent."""
        tile = self._tile_latents
        if tile is None:
            return run(Span(0, height), Span(0, width))
        overlap = round(self.config.tile_overlap_ratio * tile)
        rows, columns = (plan_tiles(side, tile, overlap) for side in (height, width))
        return run_tiles(run, rows, columns, overlap * scale, (tile - overlap) * scale)

    def _run(self, half: nn.Module, x: Tensor, cache: Cache | None, chunk: int | None) -> Tensor:
        """The half on one tile, at most `chunk` time steps at once where the model is causal."""
        if not self.is_causal or chunk is None or x.shape[2] <= chunk or _records_gradients(half, x):
            pieces = (x,)
        else:
            pieces = x.split(chunk, dim=2)
            cache = Cache() if cache is None else cache
        results: list[Tensor] = [half(to_channels_last(piece), cache) for piece in pieces]
        return results[0] if len(results) == 1 else torch.cat(results, dim=2)

    def _check_streams(self, method: str) -> None:
        if not self.is_causal:
            raise ValueError(
                f"{method} needs a causal model (norm='frame'); in this one (norm={self.config.norm!r}) every result "
                f"depends on all frames given, so a stream could not equal the whole: use encode and decode"
            )

    def _checked(self, pieces: Iterable[Tensor], channels: int, name: str) -> Iterator[Tensor]:
        """The pieces of a stream in the data type of the model."""
        wanted: tuple[int, ...] | None = None
        for number, piece in enumerate(pieces):
            if piece.dim() != 5 or piece.shape[2] == 0:
                raise ValueError(
                    f"piece {number} of the stream has the shape {tuple(piece.shape)}: (B, {channels}, t, H, W) with "
                    f"t >= 1 is needed"
                )
            shape = (piece.shape[0], *piece.shape[3:])
            wanted = shape if wanted is None else wanted
            if shape != wanted:
                raise ValueError(
                    f"piece {number} of the stream has B, H, W = {shape}, the first one has {wanted}: a stream is one "
                    f"batch of clips of one size"
                )
            yield self._as_clips(piece, channels, name)

    def _as_clips(self, x: Tensor, channels: int, name: str) -> Tensor:
        if x.dim() not in (4, 5) or x.shape[1] != channels:
            raise ValueError(
                f"{name} have the shape {tuple(x.shape)}: (B, {channels}, T, H, W) or (B, {channels}, H, W) is needed, "
                f"as this model has {channels} channels there"
            )
        if not x.is_floating_point():
            raise ValueError(f"{name} are {x.dtype}: floating point is needed; pixels in 0..255 become x / 127.5 - 1")
        return (x if x.dim() == 5 else x.unsqueeze(2)).to(self.dtype)


def _check_frame_count(num_frames: int) -> None:
    rest = (num_frames - 1) % TEMPORAL_COMPRESSION
    if num_frames < 1 or rest:
        lower = max(num_frames - rest, 1)
        raise ValueError(
            f"the clip has {num_frames} frames: 1 + 4 k are needed (nearest: {lower} or "
            f"{lower + TEMPORAL_COMPRESSION}), because the first frame and then every {TEMPORAL_COMPRESSION} frames "
            f"become one latent; cut the clip, or repeat its last frame"
        )


def _whole_latents(name: str, value: int | None, step: int) -> int | None:
    """The value in latents; None where it is 0 or None."""
    if value is not None and (value < 0 or value % step):
        raise ValueError(
            f"{name} is {value}: a multiple of {step} is needed, which is one latent, or 0 to run in one piece"
        )
    return value // step if value else None


def _first_frame(latent: int) -> int:
    """The frame in which a chunk that begins with that latent begins: the last one of its group."""
    return latent * TEMPORAL_COMPRESSION


def _end_frame(latent_stop: int) -> int:
    return (latent_stop - 1) * TEMPORAL_COMPRESSION + 1


def _pixels(span: Span) -> slice:
    """The pixels of a tile; where the frame ends first, slicing stops there, odd rest included."""
    return slice(span.start * SPATIAL_COMPRESSION, span.stop * SPATIAL_COMPRESSION)
