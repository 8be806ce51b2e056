"""What a CV-VAE is made of: one frozen description, read from and written to the published `config.json`.

Both published families are one architecture here; where they differ (padding, norm epsilon, attention, key
names) the difference is a field of `CVVAEConfig`, filled from the table of the family. The variant norm="frame",
which is not published, fills the same fields from a table of its own. This module knows no tensors. `layers`,
`model`, `tiling` and `checkpoint` read it; users meet it as `vae.config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

PaddingMode = Literal["zeros", "replicate"]
Attention = Literal["spatial", "spatial_temporal"]
Norm = Literal["clip", "frame"]

TEMPORAL_COMPRESSION = 4
SPATIAL_COMPRESSION = 8
NUM_LEVELS = 4


class ConfigError(ValueError):
    """A `config.json` that does not describe a model this package can build."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LightArchitecture:
    """Sizes of the light family; resolutions are shares of a frame's.

    Raises:
        ConfigError: a number that makes no network.
    """

    encoder_widths: tuple[int, int, int] = (32, 64, 96)
    """Channels at 1/2, 1/4 and 1/8."""
    encoder_blocks: tuple[int, int, int] = (2, 4, 3)
    """Residual blocks at 1/2, 1/4 and 1/8."""
    motion_blocks: int = 2
    """Residual blocks, at 1/4, of what the frames of a group differ in."""
    decoder_widths: tuple[int, int, int] = (48, 64, 112)
    """Channels of single frames at 1/4, of groups at 1/4 and of groups at 1/8."""
    decoder_blocks: tuple[int, int, int] = (3, 2, 3)
    """Residual blocks of each."""

    def __post_init__(self) -> None:
        for name in _LIGHT_NAMES:
            value = getattr(self, name)
            is_one, is_width = name == "motion_blocks", name.endswith("widths")
            numbers = (value,) if is_one else value
            least = 4 if is_width else 0
            if (
                not isinstance(numbers, tuple)
                or len(numbers) != (1 if is_one else 3)
                or not all(type(n) is int and n >= least and not (is_width and n % 4) for n in numbers)
            ):
                numbers_needed = "one whole number" if is_one else "three whole numbers"
                multiples = ", multiples of 4, as the norms have 4 groups" if is_width else ""
                raise ConfigError(f"{name} is {value!r}: needed is {numbers_needed} of at least {least}{multiples}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CVVAEConfig:
    """Architecture, chunking and scale of one model.

    Raises:
        ConfigError: a value is outside what the layers can build.
    """

    class_name: Literal["CVVAEModel", "CVVAESD3Model", "CVVAELightModel"]
    """The family: decides the field names, key names and parameter shapes. The first two are the published ones; the
    light family reads `light` instead of widths, norms, attention and padding."""
    light: LightArchitecture = field(default_factory=LightArchitecture)
    """Sizes of the light family, without meaning for the others."""
    in_channels: int = 3
    """Channels of a frame."""
    latent_channels: int = 4
    """Channels of a latent (z); the encoder's last layer has twice as many."""
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Width of each of the four levels, full resolution first."""
    layers_per_block: int = 2
    """Residual blocks per encoder level; the decoder has one more."""
    norm: Norm = "clip"
    """What a GroupNorm pools over. "clip": all frames given, as published. "frame": each frame by itself, and with that
    the variant whose two halves are causal and which starts as the image VAE that it was inflated from."""
    norm_num_groups: int = 32
    """Groups of every GroupNorm."""
    norm_eps: float = 1e-5
    """Epsilon of every GroupNorm."""
    half_3d: bool = True
    """The second convolution of a residual block is 2D, per frame; else 3D."""
    encoder_attention: Attention = "spatial"
    """Attention of the encoder's middle block."""
    decoder_attention: Attention = "spatial"
    """Attention of the decoder's middle block."""
    spatial_padding: PaddingMode = "zeros"
    """How 3D convolutions continue a frame beyond its border (2D ones always with zeros)."""
    decoder_time_padding: PaddingMode = "zeros"
    """How the decoder's stride-1 convolutions continue a clip at both ends; the encoder, and all of a causal model,
    always repeat frame 0."""
    downsample_padding: Literal["right_bottom", "both"] = "right_bottom"
    """Where a downsampling convolution pads; decides floor(H/8) or ceil(H/8) for odd sizes."""
    post_quant_conv: bool = False
    """The decoder begins with a 1x1 map of the latents, as in image VAEs before SD3; no published model has it."""
    chunk_num_frames: int | None = 16
    """Stride of temporal chunks, which have one frame more; None: clips run in one piece."""
    tile_size_px: int | None = 576
    """Side of a spatial tile; larger frames are tiled, with None never."""
    tile_overlap_ratio: float = 0.2222
    """Share of a tile that overlaps the next one."""
    scaling_factor: float = 1.0
    """A diffusion model sees scaling_factor * (z - shift_factor). Never applied by the codec."""
    shift_factor: float = 0.0
    """See scaling_factor."""
    force_upcast: bool = False
    """Published, read by some diffusers pipelines, without meaning for the codec."""
    untrained: bool = False
    """The weights are made from a seed: latents carry no meaning."""

    def __post_init__(self) -> None:
        if len(self.block_out_channels) != NUM_LEVELS:
            raise ConfigError(
                f"block widths are {self.block_out_channels}: {NUM_LEVELS} are needed, since the published "
                f"design compresses {SPATIAL_COMPRESSION}x in space by {NUM_LEVELS - 1} halvings"
            )
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ConfigError(
                    f"a level is {width} channels wide, which norm_num_groups={self.norm_num_groups} does not "
                    f"divide; GroupNorm needs equal groups: change the width or norm_num_groups"
                )
        if self.norm not in get_args(Norm):
            raise ConfigError(f"norm is {self.norm!r}: allowed are {', '.join(map(repr, get_args(Norm)))}")
        if self.norm == "frame":
            for name, needed in _FRAME_VARIANT.items():
                if getattr(self, name) != needed:
                    raise ConfigError(
                        f"{name} is {getattr(self, name)!r} beside norm='frame': that variant is causal and starts as "
                        f"an image VAE, which needs {needed!r}; leave the field out, or use norm='clip'"
                    )
        if self.class_name == "CVVAELightModel" and self.norm != "frame":
            raise ConfigError(
                f"norm is {self.norm!r} in a CVVAELightModel: the light family is causal, with 'frame' only"
            )
        base = self.block_out_channels[0]
        if self.class_name == "CVVAEModel" and any(width % base for width in self.block_out_channels):
            raise ConfigError(
                f"block widths are {self.block_out_channels}: the published fields of a CVVAEModel (ch, ch_mult) need "
                f"multiples of the first one"
            )
        for name, step in (("chunk_num_frames", TEMPORAL_COMPRESSION), ("tile_size_px", SPATIAL_COMPRESSION)):
            value = getattr(self, name)
            if value is not None and (value < step or value % step):
                raise ConfigError(f"{name} is {value}: a positive multiple of {step} is needed, one latent step")
        if not 0 <= self.tile_overlap_ratio < 1:
            raise ConfigError(f"tile_overlap_ratio is {self.tile_overlap_ratio}: allowed is 0 <= ratio < 1")

    @property
    def is_causal(self) -> bool:
        """No latent depends on a later frame and no frame on a later latent, so that both halves can stream."""
        return self.norm == "frame"

    @classmethod
    def from_published(cls, published: Mapping[str, Any]) -> CVVAEConfig:
        """The configuration that a published `config.json` describes; missing fields take published defaults.

        Raises:
            ConfigError: unknown class, unknown field, or a value that the released models never use.
        """
        class_name = published.get("_class_name")
        if class_name not in _FAMILIES:
            raise ConfigError(f"_class_name is {class_name!r}: supported are {', '.join(_FAMILIES)}")
        family = _FAMILIES[class_name]
        given = {key: value for key, value in published.items() if key not in _BOOKKEEPING}
        norm = published.get("norm", family.defaults.get("norm", "clip"))
        values = {"class_name": class_name, **_defaults(family, norm)}
        unknown = []
        for key, value in given.items():
            if key == "causal_decoder":
                if value != (norm == "frame"):
                    raise ConfigError(
                        f"config.json of a {class_name} has causal_decoder={value!r} and norm={norm!r}: the decoder is "
                        f"causal with norm='frame' and only then"
                    )
            elif key in family.fixed:
                _check_fixed(class_name, key, value, family.fixed[key])
            elif key in family.ignored or key in family.sizes:
                continue
            elif key in family.renamed:
                values[family.renamed[key]] = _neutral_value(class_name, key, value)
            elif key in _FIELD_NAMES - set(family.renamed.values()) - {"class_name", "light"} - family.foreign:
                values[key] = value
            else:
                unknown.append(key)
        if unknown:
            raise ConfigError(
                f"config.json of a {class_name} has unknown fields {sorted(unknown)}: the model may be built "
                f"otherwise than this package would build it; remove them if they carry no meaning"
            )
        if class_name == "CVVAELightModel":
            sizes = {key: _neutral_value(class_name, key, given[key]) for key in _LIGHT_NAMES if key in given}
            values["light"] = LightArchitecture(**sizes)
        if class_name == "CVVAEModel":
            values["block_out_channels"] = _widths(given.get("ch", 128), given.get("ch_mult", (1, 2, 4, 4)))
        return cls(**values)

    def to_published(self) -> dict[str, Any]:
        """The fields of the published `config.json`; fields of this package only where they say something else."""
        family = _FAMILIES[self.class_name]
        published: dict[str, Any] = {"_class_name": self.class_name}
        published.update({key: _listed(values[0]) for key, values in family.fixed.items()})
        published["causal_decoder"] = self.is_causal
        published.update(family.ignored)
        for key, name in family.renamed.items():
            published[key] = _published_value(key, getattr(self, name))
        if self.class_name == "CVVAEModel":
            base = self.block_out_channels[0]
            published["ch"] = base
            published["ch_mult"] = [width // base for width in self.block_out_channels]
        defaults = type(self)(class_name=self.class_name, **_defaults(family, self.norm))
        if self.class_name == "CVVAELightModel":
            published.update({name: _listed(getattr(self.light, name)) for name in _LIGHT_NAMES})
        own = _FIELD_NAMES - set(family.renamed.values()) - {"class_name", "block_out_channels", "light"}
        for name in sorted(own):
            if getattr(self, name) != getattr(defaults, name):
                published[name] = getattr(self, name)
        if self.norm != family.defaults.get("norm", "clip"):
            published["norm"] = self.norm
        return dict(sorted(published.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """How one published class names and fills the fields of `CVVAEConfig`."""

    defaults: Mapping[str, Any]
    renamed: Mapping[str, str]
    fixed: Mapping[str, tuple[Any, ...]]
    """Published fields with the values that the released models use; others are refused, not guessed."""
    ignored: Mapping[str, Any]
    """Published fields that the published code never reads (or that only its demo reads)."""
    sizes: frozenset[str] = frozenset()
    """Fields from which `CVVAEConfig.from_published` makes the sizes of the family's layers."""
    foreign: frozenset[str] = frozenset()
    """Fields of `CVVAEConfig` that the family does not read."""


_BOOKKEEPING = frozenset({"_class_name", "_diffusers_version", "_name_or_path", "_commit_hash", "_use_default_values"})
_FIELD_NAMES = frozenset(entry.name for entry in fields(CVVAEConfig))
_LIGHT_NAMES = tuple(entry.name for entry in fields(LightArchitecture))
_FRAME_VARIANT: dict[str, Any] = {
    "norm": "frame",
    "norm_eps": 1e-6,
    "encoder_attention": "spatial",
    "decoder_attention": "spatial",
    "spatial_padding": "zeros",
    "decoder_time_padding": "replicate",
    "downsample_padding": "right_bottom",
}
"""The fields that norm="frame" decides in every family; each as in an image VAE, or needed for causality."""
_ATTENTION_NAMES: dict[str, Attention] = {
    "vanilla-xformers": "spatial",
    "vanilla": "spatial",
    "spatial-temporal-xformer": "spatial_temporal",
}
_CHUNK_AND_TILE = {
    "en_de_n_frames_a_time": "chunk_num_frames",
    "tile_spatial_size": "tile_size_px",
    "tile_overlap_ratio": "tile_overlap_ratio",
}
_FIXED_IN_BOTH: dict[str, tuple[Any, ...]] = {
    "causal_encoder": (True,),
    "double_z": (True,),
    "num_video_frames": (None,),
    "reshape_x_dim_to_4": (False,),
    "time_n_compress": (TEMPORAL_COMPRESSION,),
    "spatial_n_compress": (SPATIAL_COMPRESSION,),
}
_FAMILIES = {
    "CVVAEModel": _Family(
        defaults={
            "latent_channels": 4,
            "norm_eps": 1e-5,
            "decoder_attention": "spatial_temporal",
            "spatial_padding": "zeros",
            "decoder_time_padding": "zeros",
            "downsample_padding": "right_bottom",
            "scaling_factor": 0.18215,
            "force_upcast": True,
        },
        renamed={
            "in_channels": "in_channels",
            "z_channels": "latent_channels",
            "num_res_blocks": "layers_per_block",
            "half_3d": "half_3d",
            "encoder_attn_type": "encoder_attention",
            "decoder_attn_type": "decoder_attention",
            "scaling_factor": "scaling_factor",
            "force_upcast": "force_upcast",
            **_CHUNK_AND_TILE,
        },
        fixed={**_FIXED_IN_BOTH, "out_ch": (3,), "attn_resolutions": ((),), "dropout": (0.0,), "use_3d_conv": (True,)},
        ignored={"reshape_z_dim_to_4": False},
        sizes=frozenset({"ch", "ch_mult"}),
    ),
    "CVVAESD3Model": _Family(
        defaults={
            "latent_channels": 16,
            "norm_eps": 1e-6,
            "decoder_attention": "spatial",
            "spatial_padding": "replicate",
            "decoder_time_padding": "replicate",
            "downsample_padding": "both",
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
        },
        renamed={
            "in_channels": "in_channels",
            "out_channels": "latent_channels",
            "block_out_channels": "block_out_channels",
            "layers_per_block": "layers_per_block",
            "norm_num_groups": "norm_num_groups",
            "half_3d": "half_3d",
            **_CHUNK_AND_TILE,
        },
        fixed={
            **_FIXED_IN_BOTH,
            "down_block_types": (("DownEncoderBlock3D",) * NUM_LEVELS,),
            "up_block_types": (("UpDecoderBlock3D",) * NUM_LEVELS,),
            "act_fn": ("silu",),
            "mid_block_add_attention": (True,),
        },
        ignored={"reshape_z_dim_to_4": False},
    ),
    "CVVAELightModel": _Family(
        defaults={**_FRAME_VARIANT, "latent_channels": 32},
        renamed={
            "in_channels": "in_channels",
            "latent_channels": "latent_channels",
            "scaling_factor": "scaling_factor",
            "shift_factor": "shift_factor",
            "chunk_num_frames": "chunk_num_frames",
            "tile_size_px": "tile_size_px",
            "tile_overlap_ratio": "tile_overlap_ratio",
        },
        fixed={},
        ignored={},
        sizes=frozenset(_LIGHT_NAMES),
        foreign=frozenset({"block_out_channels", "layers_per_block", "norm_num_groups", "half_3d", "post_quant_conv"}),
    ),
}


def _defaults(family: _Family, norm: Any) -> dict[str, Any]:
    """The fields of a family that nothing was said about."""
    return {**family.defaults, **(_FRAME_VARIANT if norm == "frame" else {})}


def _check_fixed(class_name: str, key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if (tuple(value) if isinstance(value, list) else value) not in allowed:
        raise ConfigError(
            f"config.json of a {class_name} has {key}={value!r}: only {_listed(allowed[0])!r} is supported, "
            f"as in every released model"
        )


def _neutral_value(class_name: str, key: str, value: Any) -> Any:
    if key in ("encoder_attn_type", "decoder_attn_type"):
        if value not in _ATTENTION_NAMES:
            raise ConfigError(
                f"config.json of a {class_name} has {key}={value!r}: supported are {', '.join(_ATTENTION_NAMES)}"
            )
        return _ATTENTION_NAMES[value]
    return tuple(value) if isinstance(value, list) else value


def _published_value(key: str, value: Any) -> Any:
    if key in ("encoder_attn_type", "decoder_attn_type"):
        return next(name for name, attention in _ATTENTION_NAMES.items() if attention == value)
    return _listed(value)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _widths(base: int, multipliers: Any) -> tuple[int, ...]:
    widths = tuple(base * multiplier for multiplier in multipliers)
    if not widths or widths[0] != base:
        raise ConfigError(f"ch_mult is {list(multipliers)}: it must start with 1, as in every released model")
    return widths
