"""Frozen image VAEs: the latent space that a video VAE is trained for, and the judge of whether it got there.

Any image VAE that compresses 8x in space can be a teacher through the small `Teacher` protocol; there are adapters for
diffusers' `AutoencoderKL` and `AutoencoderTiny`, and a module of our own for the TAESD family. `load_teacher` finds
out which one a path holds. Nothing here is trained, and no weights come with the package. `losses`, the training
and the evaluation job call it.

TAESD and TAEF2 are the work of Ollin Boer Bohan (MIT licence, https://github.com/madebyollin/taesd); `TinyImageVAE` is
written from the description of their layers.

Tensor letters: B batch, N images, C channels, T H W frames in pixels, t h w latents: h = H / 8, w = W / 8.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cvvae.config import SPATIAL_COMPRESSION

_CONFIG_NAME = "config.json"
_ENCODER_BLOCKS = (1, 3, 3, 3)
_DECODER_BLOCKS = (3, 3, 3, 1)
_POOL_GROUPS = 4
_SUFFIXES = (".safetensors", ".pth")
# Before, a crafted pickle could corrupt memory in spite of `weights_only` (CVE-2026-24747).
# TorchVersion compares as versions do.
_SAFE_PICKLES_SINCE = "2.10"


class TeacherError(ValueError):
    """No image VAE that can be a teacher is where one was looked for."""


class Teacher(Protocol):
    """What an image VAE must offer. Deterministic; latents are unscaled, as the encoder makes them.

    A diffusion model for these latents sees scaling_factor * (z - shift_factor).
    """

    @property
    def latent_channels(self) -> int: ...

    @property
    def pixel_range(self) -> tuple[float, float]:
        """Values of black and white."""

    @property
    def scaling_factor(self) -> float: ...

    @property
    def shift_factor(self) -> float: ...

    def encode(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) in pixel_range -> (N, C, H / 8, W / 8)."""

    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 3, 8 h, 8 w), about pixel_range, not clamped."""


class FrozenTeacher(nn.Module):
    """A teacher that takes and gives frames of clips in [-1, 1], and that no optimiser and no mode can change.

    Its parameters take no gradients and gradients pass through it; it stays in evaluation mode when a module that
    holds it is told to train.

    Args:
        teacher: any image VAE; where it is an `nn.Module`, `.to` moves it.
    """

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher
        self.requires_grad_(False)
        self.eval()

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return self.teacher.latent_channels

    @property
    def scaling_factor(self) -> float:
        """See `Teacher`; never applied here."""
        return self.teacher.scaling_factor

    @property
    def shift_factor(self) -> float:
        """See `Teacher`; never applied here."""
        return self.teacher.shift_factor

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stays in evaluation mode, whatever is asked."""
        del mode
        return super().train(False)

    def encode_frames(self, frames: Tensor) -> Tensor:
        """The image latents of every frame by itself, unscaled.

        Args:
            frames: (B, 3, T, H, W) or (N, 3, H, W) in [-1, 1], H and W multiples of 8.

        Returns:
            (B, C, T, H / 8, W / 8) or (N, C, H / 8, W / 8).

        Raises:
            ValueError: another shape.
        """
        _check(frames, 3, "frames")
        if frames.shape[-2] % SPATIAL_COMPRESSION or frames.shape[-1] % SPATIAL_COMPRESSION:
            raise ValueError(
                f"frames are {frames.shape[-1]}x{frames.shape[-2]} pixels: multiples of {SPATIAL_COMPRESSION} are "
                f"needed, as image VAEs round other sides differently; crop the frames"
            )
        low, high = self.teacher.pixel_range
        pixels = low + (frames + 1) * ((high - low) / 2)
        return _per_frame(self.teacher.encode, pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Every latent by itself, decoded as an image.

        Args:
            latents: (B, C, t, h, w) or (N, C, h, w), unscaled.

        Returns:
            (B, 3, t, 8 h, 8 w) or (N, 3, 8 h, 8 w), about [-1, 1], not clamped.

        Raises:
            ValueError: another shape.
        """
        _check(latents, self.latent_channels, "latents")
        low, high = self.teacher.pixel_range
        return (_per_frame(self.teacher.decode, latents) - low) * (2 / (high - low)) - 1


class TinyBlock(nn.Module):
    """y = relu(conv(x) + x) with three 3x3 convolutions; with `pools`, x + pool(x) goes in instead of x.

    (N, width, H, W) -> the same shape. Parameter names are those of TAESD files.
    """

    def __init__(self, width: int, *, pools: bool = False) -> None:
        super().__init__()
        self.pool: nn.Sequential | None = None
        if pools:
            self.pool = nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False),
                nn.GroupNorm(_POOL_GROUPS, 4 * width),
                nn.ReLU(),
                nn.Conv2d(4 * width, width, 1, bias=False),
            )
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class SoftClamp(nn.Module):
    """3 tanh(x / 3): what TAESD decoders do first, so that no latent is far outside of what they know."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class TinyImageVAE(nn.Module):
    """An image VAE of the TAESD family, a `Teacher`.

    TAESD and TAESDXL have 4 latent channels, TAESD3 and TAEF1 have 16, TAEF2 has 32 and blocks that pool. Both halves
    are flat sequences, so that their state dicts have the keys of the files: N.weight, N.conv.0.weight, and so on.
    Deterministic, without a posterior; its latents are already those that a diffusion model sees.

    Args:
        latent_channels: C.
        width: channels of every layer between.
        pools: the blocks at the lowest resolution are those that pool (TAEF2).
    """

    pixel_range = (0.0, 1.0)
    scaling_factor = 1.0
    shift_factor = 0.0

    def __init__(self, latent_channels: int, *, width: int = 64, pools: bool = False) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.encoder = _tiny_encoder(latent_channels, width, pools)
        self.decoder = _tiny_decoder(latent_channels, width, pools)

    @classmethod
    def from_state_dicts(cls, encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> TinyImageVAE:
        """The model that the two files of a TAESD release hold, in float32; width, channels and kind from their keys.

        Raises:
            TeacherError: the keys or shapes are not those of one model of this family.
        """
        last = f"{sum(_ENCODER_BLOCKS) + len(_ENCODER_BLOCKS)}.weight"
        if "0.weight" not in encoder or last not in encoder or encoder["0.weight"].dim() != 4:
            raise TeacherError(
                f"the encoder has the keys {_some(encoder)}: an encoder of the TAESD family has, among others, "
                f"0.weight and {last}; give the files of a TAESD release, or a diffusers folder with its config.json"
            )
        model = cls(
            encoder[last].shape[0],
            width=encoder["0.weight"].shape[0],
            pools=any(".pool." in key for key in encoder),
        )
        for name, half, given in (("encoder", model.encoder, encoder), ("decoder", model.decoder, decoder)):
            wanted = {key: tuple(tensor.shape) for key, tensor in half.state_dict().items()}
            found = {key: tuple(tensor.shape) for key, tensor in given.items()}
            wrong = {key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)}
            if wrong:
                raise TeacherError(
                    f"the {name} is not that of a TAESD-family model with {model.latent_channels} latent channels: "
                    + "; ".join(f"{key} is {found.get(key)} instead of {wanted.get(key)}" for key in sorted(wrong)[:8])
                    + f" ({len(wrong)} keys differ); check that the two files belong together"
                )
            half.load_state_dict(given)
        return model

    def encode(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, C, H / 8, W / 8)."""
        latents: Tensor = self.encoder(pixels)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 3, 8 h, 8 w), about [0, 1], not clamped."""
        pixels: Tensor = self.decoder(latents)
        return pixels


class _DiffusersTeacher(nn.Module):
    """What the image VAEs of diffusers have in common as teachers: all but how latents come out."""

    pixel_range = (-1.0, 1.0)

    def __init__(self, vae: Any, num_levels: int) -> None:
        super().__init__()
        _check_compression(type(vae).__name__, num_levels)
        self.vae = vae
        self.latent_channels = int(vae.config.latent_channels)
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift_factor = float(vae.config.shift_factor or 0.0)

    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 3, 8 h, 8 w), about [-1, 1]."""
        return cast(Tensor, self.vae.decode(latents).sample)


class KLTeacher(_DiffusersTeacher):
    """diffusers' `AutoencoderKL` as a `Teacher`: latents are the posterior's mean, pixels in [-1, 1]."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae, len(vae.config.block_out_channels))

    def encode(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, C, H / 8, W / 8)."""
        return cast(Tensor, self.vae.encode(pixels).latent_dist.mode())


class TinyTeacher(_DiffusersTeacher):
    """diffusers' `AutoencoderTiny` as a `Teacher`; unlike TAESD's own files it maps pixels to and from [-1, 1]."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae, len(vae.config.encoder_block_out_channels))

    def encode(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, C, H / 8, W / 8)."""
        return cast(Tensor, self.vae.encode(pixels).latents)


def load_teacher(path: str, subfolder: str | None = None) -> FrozenTeacher:
    """The image VAE at a path, frozen, in float32, on the CPU.

    Args:
        path: a diffusers folder or hub id whose config.json says AutoencoderKL or AutoencoderTiny; or a folder with
            one pair of TAESD-family files, *encoder*.pth and *decoder*.pth (or .safetensors); or that encoder's file,
            the decoder's being beside it under the same name with "decoder" in it.
        subfolder: folder inside the folder or hub repository, such as "vae".

    Raises:
        TeacherError: nothing there that can be a teacher; the message says what is there.
    """
    place = Path(path) / (subfolder or "")
    if place.is_file():
        return FrozenTeacher(_load_pair(place, _decoder_beside(place)))
    if not place.is_dir():
        if path.count("/") != 1 or path.startswith((".", "/")):
            raise TeacherError(
                f"there is no {place}: a teacher is a diffusers folder, a hub id OWNER/NAME, or a folder or file of "
                f"the TAESD family"
            )
        return FrozenTeacher(_load_diffusers(path, subfolder, _fetch_config(path, subfolder)))
    if (place / _CONFIG_NAME).is_file():
        return FrozenTeacher(_load_diffusers(str(place), None, place / _CONFIG_NAME))
    return FrozenTeacher(_load_pair(*_find_pair(place)))


def _tiny_encoder(latent_channels: int, width: int, pools: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
    for stage, num_blocks in enumerate(_ENCODER_BLOCKS):
        if stage > 0:
            layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
        layers += [TinyBlock(width, pools=pools and stage == len(_ENCODER_BLOCKS) - 1) for _ in range(num_blocks)]
    return nn.Sequential(*layers, nn.Conv2d(width, latent_channels, 3, padding=1))


def _tiny_decoder(latent_channels: int, width: int, pools: bool) -> nn.Sequential:
    layers: list[nn.Module] = [SoftClamp(), nn.Conv2d(latent_channels, width, 3, padding=1), nn.ReLU()]
    for stage, num_blocks in enumerate(_DECODER_BLOCKS):
        if stage > 0:
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        layers += [TinyBlock(width, pools=pools and stage == 0) for _ in range(num_blocks)]
    return nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1))


def _per_frame(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Runs on (N, C, H, W), with the frames of clips folded into N."""
    if x.dim() == 4:
        return run(x)
    B, _, T, _, _ = x.shape
    frames = run(x.transpose(1, 2).flatten(0, 1))
    return frames.reshape(B, T, *frames.shape[1:]).transpose(1, 2)


def _check(x: Tensor, channels: int, name: str) -> None:
    if x.dim() not in (4, 5) or x.shape[1] != channels:
        raise ValueError(
            f"{name} have the shape {tuple(x.shape)}: (B, {channels}, T, H, W) or (N, {channels}, H, W) is needed, as "
            f"this teacher has {channels} channels there"
        )


def _check_compression(class_name: str, num_levels: int) -> None:
    if 2 ** (num_levels - 1) != SPATIAL_COMPRESSION:
        raise TeacherError(
            f"the {class_name} has {num_levels} levels and so compresses {2 ** (num_levels - 1)}x in space: a teacher "
            f"must compress {SPATIAL_COMPRESSION}x, as the video VAE does; take another image VAE"
        )


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TeacherError(f"{path} is not JSON ({error}): fetch the file again") from error
    return cast("Mapping[str, Any]", config)


def _fetch_config(hub_id: str, subfolder: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(hub_id, _CONFIG_NAME, subfolder=subfolder))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise TeacherError(
            f"the teacher {hub_id!r} is no folder here and its {_CONFIG_NAME} could not be fetched from the hub "
            f"({type(error).__name__}: {error}); check the name, the subfolder (often 'vae') and the network"
        ) from error


def _load_diffusers(source: str, subfolder: str | None, config_path: Path) -> Teacher:
    try:
        import diffusers
    except ImportError as error:
        raise TeacherError(
            f"{source} is a diffusers folder, and diffusers could not be imported ({error}): pip install diffusers"
        ) from error
    adapters: dict[str, Callable[[Any], Teacher]] = {"AutoencoderKL": KLTeacher, "AutoencoderTiny": TinyTeacher}
    class_name = str(_read_config(config_path).get("_class_name"))
    if class_name not in adapters:
        raise TeacherError(
            f"config.json of {source} says _class_name {class_name!r}: a teacher is an image VAE of the classes "
            f"{', '.join(adapters)}; in a whole pipeline it lies in the subfolder 'vae'"
        )
    try:
        vae = getattr(diffusers, class_name).from_pretrained(
            source, subfolder=subfolder, torch_dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise TeacherError(
            f"the {class_name} in {source} could not be read ({type(error).__name__}: {error}); a folder holds "
            f"config.json and diffusion_pytorch_model.safetensors that belong together"
        ) from error
    return adapters[class_name](vae)


def _find_pair(folder: Path) -> tuple[Path, Path]:
    encoders = [path for path in sorted(folder.iterdir()) if "encoder" in path.name and path.suffix in _SUFFIXES]
    names = {path.stem: path for path in sorted(encoders, key=lambda path: _SUFFIXES.index(path.suffix), reverse=True)}
    if len(names) != 1:
        found = sorted(path.name for path in encoders) or sorted(path.name for path in folder.iterdir())[:20]
        raise TeacherError(
            f"{folder} holds {found or 'nothing'}: a teacher's folder holds a diffusers config.json, or one pair "
            f"*encoder*.pth and *decoder*.pth (or .safetensors) of the TAESD family; "
            + ("give the encoder's file instead of the folder" if names else "check the folder and the subfolder")
        )
    encoder = next(iter(names.values()))
    return encoder, _decoder_beside(encoder)


def _decoder_beside(encoder: Path) -> Path:
    decoder = encoder.with_name(encoder.name.replace("encoder", "decoder"))
    if decoder == encoder or not decoder.is_file():
        raise TeacherError(
            f"the teacher's decoder is missing: beside {encoder}, a file with 'encoder' in its name, there must be "
            f"one with 'decoder' in its place (such as {decoder.name.replace('encoder', 'decoder')})"
        )
    return decoder


def _load_pair(encoder: Path, decoder: Path) -> TinyImageVAE:
    try:
        return TinyImageVAE.from_state_dicts(_read(encoder), _read(decoder))
    except TeacherError as error:
        raise TeacherError(f"{encoder.name} and {decoder.name} in {encoder.parent}: {error}") from error


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if torch.__version__ < _SAFE_PICKLES_SINCE:
            raise TeacherError(
                f"{path} is a pickle; in torch {torch.__version__} a crafted one can corrupt memory (CVE-2026-24747): "
                "use torch 2.10 or newer, or convert the file to safetensors"
            )
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise TeacherError(f"{path} could not be read as weights ({error}): fetch the file again") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise TeacherError(f"{path} is not a whole safetensors file ({error}): fetch it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise TeacherError(f"{path} holds a {type(tensors).__name__}: a state dict, names with tensors, is needed")
    return tensors


def _some(state_dict: Mapping[str, Tensor]) -> list[str]:
    keys = sorted(state_dict)
    return [*keys[:6], *(["..."] if len(keys) > 6 else [])]
