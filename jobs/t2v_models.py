"""The diffusion models that can be tuned, each behind one small adapter, and how they are read and written.

An adapter says what a class of diffusers takes and gives: the order of its axes, its conditions, the noise that it was
trained with, its first and last layer. Another class joins by another adapter in `ADAPTERS`. Not where noise is added
(`jobs/t2v_noise.py`) nor where tuning happens (`jobs/t2v_training.py`).

Sources of facts: the forward methods and pipelines of diffusers; Stable Video Diffusion (arXiv 2311.15127); ModelScope
text-to-video (arXiv 2308.06571); Latte (arXiv 2401.03048).

Tensor letters: B batch, C latent channels, t h w latents, L tokens, D their width.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.config import option, whole
from pipeline.errors import UsageError
from pipeline.records import Bucket, ModelFacts

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_STABLE_DIFFUSION_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a model is told besides the noisy latents; None where it is not told.

    Attributes:
        text: (B, L, D), zeros behind each caption's end.
        text_mask: (B, L) bool, True where a token is.
        image: (B, N, D), embedding of the first frame.
        first_latent: (B, C, h, w), the first frame's latent **as the VAE makes it**, without scale and shift.
        fps: (B,), latents a second; 0 where unknown.
    """

    text: Tensor | None = None
    text_mask: Tensor | None = None
    image: Tensor | None = None
    first_latent: Tensor | None = None
    fps: Tensor | None = None

    def to(self, device: torch.device) -> Conditions:
        """The same on a device."""
        moved = {name: value.to(device) for name, value in self._tensors().items()}
        return replace(self, **moved)

    def first(self, count: int) -> Conditions:
        """Of the first videos."""
        return replace(self, **{name: value[:count] for name, value in self._tensors().items()})

    def joined(self, other: Conditions) -> Conditions:
        """Both batches as one; texts are padded to the longer one."""
        ours, theirs = self, other
        if ours.text is not None and theirs.text is not None:
            length = max(ours.text.shape[1], theirs.text.shape[1])
            ours, theirs = ours._padded(length), theirs._padded(length)
        pairs = ((name, value, getattr(theirs, name)) for name, value in ours._tensors().items())
        return replace(ours, **{name: torch.cat([a, b]) for name, a, b in pairs})

    def _tensors(self) -> dict[str, Tensor]:
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in values.items() if value is not None}

    def _padded(self, length: int) -> Conditions:
        assert self.text is not None
        assert self.text_mask is not None
        more = length - self.text.shape[1]
        return replace(
            self,
            text=nn.functional.pad(self.text, (0, 0, 0, more)),
            text_mask=nn.functional.pad(self.text_mask, (0, more)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSettings:
    """What an image-to-video model of SVD's kind is told of every video alike."""

    motion_bucket: int = option("SVD: amount of motion that the model is told", whole("motion-bucket", 0), 127)
    noise_aug: float = option(
        "SVD: deviation of the noise on the first frame's latent (unscaled), which the model is told",
        lambda text: _not_negative("noise-aug", text),
        0.02,
    )


def _not_negative(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e3:
        raise UsageError(f"--{name}: {text!r} is not a number of 0 or more")
    return value


class Adapter(ABC):
    """A class of diffusion models.

    Attributes:
        class_name: in diffusers.
        folder: of the model inside a pipeline's folder.
        pipeline_class: of diffusers, in which such a model samples.
        needs_text, needs_image: which conditions a batch must bring; an image condition is the first frame's embedding
            and its latent.
        first, last: names of the layers that meet the latents.
        scheduler: configuration of the scheduler that such models were published with, for those that bring none.
    """

    class_name: ClassVar[str]
    folder: ClassVar[str]
    pipeline_class: ClassVar[str]
    needs_text: ClassVar[bool]
    needs_image: ClassVar[bool]
    first: ClassVar[str]
    last: ClassVar[str]
    scheduler: ClassVar[Mapping[str, Any]]

    def __init__(self, settings: VideoSettings | None = None) -> None:
        self.settings = settings or VideoSettings()

    def prepare(self, model: nn.Module) -> None:  # noqa: B027
        """Changes a model that was just loaded where its class lacks what is needed here."""

    @abstractmethod
    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """Channels of the latents that a model makes."""

    def condition_dim(self, config: Mapping[str, Any]) -> int:
        """Width of the embeddings that it is told of."""
        width = config["cross_attention_dim"]
        return int(width if isinstance(width, int) else width[0])

    @abstractmethod
    def predict(self, model: Callable[..., Any], noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """What the model says.

        Args:
            model: an instance of the class, or something that is called the same.
            noisy: (B, C, t, h, w), scaled as the model expects it.
            timesteps: (B,).

        Returns:
            (B, C, t, h, w).
        """

    def augment(self, conditions: Conditions, dropout: float, rng: torch.Generator) -> Conditions:
        """Conditions as a training step needs them: left out for a share of the batch, and with noise on them.

        Captions are left out where they are read.
        """
        return conditions

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The parts whose activations gradient checkpointing computes twice; none where diffusers does it itself."""
        return []

    def check_shape(self, config: Mapping[str, Any], bucket: Bucket, latent_num_frames: int) -> None:  # noqa: B027
        """Raises UsageError where a model cannot take latents of a bucket."""

    def guidance(self, scale: float, latent_num_frames: int) -> Tensor:
        """How far guidance goes, to be multiplied with (B, C, t, h, w)."""
        return torch.tensor(scale)

    def unconditional(self, conditions: Conditions, empty: Tensor | None) -> Conditions | None:
        """The conditions of guidance without a condition; None where it has none.

        Args:
            empty: (L, D), the empty caption's embedding.
        """
        if not self.needs_text or empty is None or conditions.text is None:
            return None
        count = len(conditions.text)
        text = empty.to(conditions.text).unsqueeze(0).expand(count, -1, -1)
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        return replace(conditions, text=text, text_mask=mask)


class TextUNet(Adapter):
    """Text-to-video by diffusers' `UNet3DConditionModel`: ModelScope's and Zeroscope's.

    Its blocks have no place for a mask of the text, so the layers that look at it get one that knows it: a caption says
    the same whatever it is padded to.
    """

    class_name = "UNet3DConditionModel"
    folder = "unet"
    pipeline_class = "TextToVideoSDPipeline"
    needs_text = True
    needs_image = False
    first = "conv_in"
    last = "conv_out"
    scheduler: ClassVar[Mapping[str, Any]] = {
        "_class_name": "DDIMScheduler",
        **_STABLE_DIFFUSION_BETAS,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        return int(config["in_channels"])

    def prepare(self, model: nn.Module) -> None:
        self._mask = _TextMask()
        for module in model.modules():
            if type(module).__name__ == "BasicTransformerBlock" and module.attn2 is not None:
                attention: Any = module.attn2
                attention.set_processor(_masked_processor(self._mask))

    def predict(self, model: Callable[..., Any], noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        self._mask.of_batch = conditions.text_mask
        said: Tensor = model(noisy, timesteps, encoder_hidden_states=conditions.text).sample
        return said

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        # diffusers has no gradient checkpointing for this class.
        return [*model.down_blocks, model.mid_block, *model.up_blocks]  # type: ignore[list-item, misc]


class ImageUNet(Adapter):
    """Image-to-video by diffusers' `UNetSpatioTemporalConditionModel`: Stable Video Diffusion.

    The first frame's latent, unscaled as in SVD's own pipeline, goes in beside every noisy latent; its embedding is
    looked at; and rate, motion and the noise on the first frame are told by numbers. The rate is that of the
    *latents*, a quarter of the frames', less 1 as SVD was trained: so the model is asked for the motion from one latent
    to the next that it knows. Noise is added to the latent, where SVD adds it to the pixels.
    """

    class_name = "UNetSpatioTemporalConditionModel"
    folder = "unet"
    pipeline_class = "StableVideoDiffusionPipeline"
    needs_text = False
    needs_image = True
    first = "conv_in"
    last = "conv_out"
    scheduler: ClassVar[Mapping[str, Any]] = {
        "_class_name": "EulerDiscreteScheduler",
        **_STABLE_DIFFUSION_BETAS,
        "prediction_type": "v_prediction",
        "sigma_max": 700.0,
        "sigma_min": 0.002,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "timestep_type": "continuous",
        "use_karras_sigmas": True,
    }

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        return int(config["out_channels"])

    def predict(self, model: Callable[..., Any], noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        first, fps = conditions.first_latent, conditions.fps
        assert first is not None, "an image-to-video model needs the first frame"
        assert fps is not None, "an image-to-video model needs the rate"
        beside = first.unsqueeze(1).expand(-1, noisy.shape[2], -1, -1, -1).to(noisy.dtype)
        told = torch.tensor([self.settings.motion_bucket, self.settings.noise_aug], device=noisy.device)
        ids = torch.cat([(fps - 1).clamp_min(0).unsqueeze(1), told.expand(len(noisy), -1)], dim=1).to(noisy.dtype)
        said: Tensor = model(
            torch.cat([noisy.transpose(1, 2), beside], dim=2),
            timesteps,
            encoder_hidden_states=conditions.image,
            added_time_ids=ids,
        ).sample
        return said.transpose(1, 2)

    def augment(self, conditions: Conditions, dropout: float, rng: torch.Generator) -> Conditions:
        image, first = conditions.image, conditions.first_latent
        assert image is not None
        assert first is not None
        noise = torch.randn(first.shape, generator=rng).to(first)
        # Both or none, as guidance leaves them out together.
        stays = torch.rand(len(first), generator=rng).ge(dropout).to(first)
        return replace(
            conditions,
            image=image * stays.view(-1, 1, 1),
            first_latent=(first + self.settings.noise_aug * noise) * stays.view(-1, 1, 1, 1),
        )

    def check_shape(self, config: Mapping[str, Any], bucket: Bucket, latent_num_frames: int) -> None:
        if config["in_channels"] != 2 * config["out_channels"]:
            raise UsageError(
                f"the model takes {config['in_channels']} channels and gives {config['out_channels']}: an "
                "image-to-video model takes twice what it gives, the noisy latents and the first frame's"
            )
        if latent_num_frames < 2:
            raise UsageError(
                f"the latents have the bucket {bucket}, images, and an image-to-video model makes a video of one: "
                "encode buckets of several frames only"
            )

    def guidance(self, scale: float, latent_num_frames: int) -> Tensor:
        # As in SVD's pipeline: the nearer to the first frame, the less.
        return torch.linspace(1, scale, latent_num_frames).view(1, 1, -1, 1, 1)

    def unconditional(self, conditions: Conditions, empty: Tensor | None) -> Conditions | None:
        assert conditions.image is not None
        assert conditions.first_latent is not None
        return replace(
            conditions,
            image=torch.zeros_like(conditions.image),
            first_latent=torch.zeros_like(conditions.first_latent),
        )


class TextTransformer(Adapter):
    """Text-to-video by diffusers' `LatteTransformer3DModel`, a transformer over patches.

    It knows one number of latents (`video_length`). A model that also gives variances says twice as many channels, of
    which the first half is the prediction.
    """

    class_name = "LatteTransformer3DModel"
    folder = "transformer"
    pipeline_class = "LattePipeline"
    needs_text = True
    needs_image = False
    first = "pos_embed.proj"
    last = "proj_out"
    scheduler: ClassVar[Mapping[str, Any]] = {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "clip_sample": False,
    }

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        return int(config["in_channels"])

    def condition_dim(self, config: Mapping[str, Any]) -> int:
        return int(config["caption_channels"])

    def predict(self, model: Callable[..., Any], noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        bias = None
        if conditions.text_mask is not None:
            bias = torch.zeros(conditions.text_mask.shape, dtype=noisy.dtype, device=noisy.device)
            bias = bias.masked_fill_(~conditions.text_mask, torch.finfo(noisy.dtype).min)
            # diffusers repeats the text for every frame, and leaves its mask to the caller.
            bias = bias.unsqueeze(1).repeat_interleave(noisy.shape[2], dim=0)
        said: Tensor = model(
            noisy, timesteps, encoder_hidden_states=conditions.text, encoder_attention_mask=bias
        ).sample
        return said[:, : noisy.shape[1]]

    def check_shape(self, config: Mapping[str, Any], bucket: Bucket, latent_num_frames: int) -> None:
        length, patch = config["video_length"], config["patch_size"]
        if latent_num_frames != length:
            raise UsageError(
                f"the latents of the bucket {bucket} are {latent_num_frames}, and the model was made for "
                f"{length} (video_length): encode buckets of {1 + 4 * (length - 1)} frames"
            )
        sides = bucket.width_px // 8, bucket.height_px // 8
        if any(side % patch for side in sides):
            raise UsageError(
                f"latents of the bucket {bucket} are {sides[0]}x{sides[1]}, no multiples of the model's patches of "
                f"{patch}: encode sides that are multiples of {8 * patch} px"
            )


ADAPTERS: Mapping[str, type[Adapter]] = {
    adapter.class_name: adapter for adapter in (TextUNet, ImageUNet, TextTransformer)
}


class _TextMask:
    """The mask of the batch that a model is being called with."""

    of_batch: Tensor | None = None


def _masked_processor(mask: _TextMask) -> Any:
    from diffusers.models.attention_processor import AttnProcessor2_0

    class MaskedText(AttnProcessor2_0):
        def __call__(  # type: ignore[override]
            self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **more: Any
        ) -> Tensor:
            of_batch = mask.of_batch
            # Layers over time look at the frames once more, and at no text.
            if of_batch is not None and encoder_hidden_states is not None:
                bias = torch.zeros(of_batch.shape, dtype=hidden_states.dtype, device=hidden_states.device)
                bias = bias.masked_fill_(~of_batch, torch.finfo(hidden_states.dtype).min).unsqueeze(1)
                # The model repeats the text for every frame.
                more["attention_mask"] = bias.repeat_interleave(len(encoder_hidden_states) // len(of_batch), dim=0)
            said: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, **more)
            return said

    return MaskedText()  # type: ignore[no-untyped-call]


def enable_gradient_checkpointing(adapter: Adapter, model: nn.Module) -> None:
    """Activations of the model's blocks are computed twice instead of being kept."""
    blocks = adapter.blocks(model)
    if not blocks:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    for block in blocks:
        block.forward = _twice(block.forward)


def _twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, use_reentrant=False, **named)

    return run


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A diffusion model with what belongs to it.

    Attributes:
        model: in float32.
        scheduler_config: as diffusers writes it, with `_class_name`.
        scale: scaling and shift factor of the image VAE that the model was published with, where it says so.
        origin: the settings of the tuning that wrote the folder; empty for others.
    """

    model: Any
    adapter: Adapter
    scheduler_config: Mapping[str, Any]
    scale: tuple[float, float] | None
    origin: Mapping[str, Any]


def load_model(source: str, subfolder: str | None, settings: VideoSettings | None = None) -> Loaded:
    """Reads a model out of a pipeline's folder or repository, or out of its own folder.

    Args:
        source: folder or hub id.
        subfolder: of the model inside it; None: where the pipeline says, else the folder itself.

    Raises:
        UsageError: there is no such model, or none of a known class.
    """
    index = _read_json(source, "model_index.json")
    if subfolder is None and index is not None:
        found = [
            name for name, part in index.items() if isinstance(part, list) and len(part) == 2 and part[1] in ADAPTERS
        ]
        if not found:
            raise UsageError(f"--model: the pipeline {source} holds no model of {_known()}")
        subfolder = found[0]
    config = _read_json(source, f"{subfolder}/config.json" if subfolder else "config.json")
    if config is None:
        raise UsageError(
            f"--model: {source} has neither a model_index.json nor a {subfolder or ''}/config.json; give a folder or "
            "hub id of diffusers, or --model-config to start at random"
        )
    adapter = adapter_of(config, source, settings)
    try:
        model = _class_of(adapter).from_pretrained(source, subfolder=subfolder, torch_dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"--model: {source} cannot be read: {error}") from error
    adapter.prepare(model)
    vae = _read_json(source, "vae/config.json")
    scale = None
    if vae is not None and "scaling_factor" in vae:
        scale = float(vae["scaling_factor"]), float(vae.get("shift_factor") or 0.0)
    return Loaded(
        model=model,
        adapter=adapter,
        scheduler_config=_read_json(source, "scheduler/scheduler_config.json") or adapter.scheduler,
        scale=scale,
        origin=_read_json(source, "latentmill.json") or {},
    )


def new_model(config_path: str, seed: int, settings: VideoSettings | None = None) -> Loaded:
    """A model that starts at random, of a `config.json` of diffusers.

    Raises:
        UsageError: the file cannot be read, or describes no model that can be built.
    """
    try:
        config = json.loads(Path(config_path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--model-config: {config_path} cannot be read as JSON: {error}") from error
    adapter = adapter_of(config, config_path, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = _class_of(adapter).from_config(config)
        except (TypeError, ValueError) as error:
            raise UsageError(f"--model-config: {config_path} describes no model: {error}") from error
    adapter.prepare(model)
    return Loaded(model=model, adapter=adapter, scheduler_config=adapter.scheduler, scale=None, origin={})


def adapter_of(config: Mapping[str, Any], source: str, settings: VideoSettings | None = None) -> Adapter:
    """The adapter of a model's configuration.

    Raises:
        UsageError: there is none for its class.
    """
    name = config.get("_class_name") if isinstance(config, Mapping) else None
    if name not in ADAPTERS:
        raise UsageError(f"{source} is of the class {name}, and only {_known()} can be tuned")
    return ADAPTERS[str(name)](settings)


def check_fit(loaded: Loaded, latents: ModelFacts, buckets: Sequence[Bucket], condition_dim: int | None) -> None:
    """Whether a model can learn from latents, before anything is computed.

    Args:
        latents: what the latents say of the VAE that made them.
        buckets: of the latents.
        condition_dim: width of the embeddings that come with them.

    Raises:
        UsageError: channels, scale, frames, sides or embeddings do not fit; the message says both values.
    """
    adapter, config = loaded.adapter, loaded.model.config
    channels = adapter.latent_channels(config)
    if channels != latents.latent_channels:
        raise UsageError(
            f"the latents have {latents.latent_channels} channels ({latents.model}), the model {channels}: encode "
            "with a video VAE of the model's latent space, or take a model of the latents'"
        )
    scale = latents.scaling_factor, latents.shift_factor
    if loaded.scale is not None and any(abs(a - b) > 1e-4 for a, b in zip(scale, loaded.scale, strict=True)):
        raise UsageError(
            f"the model was trained on latents with scale and shift {loaded.scale[0]:g}, {loaded.scale[1]:g} (its "
            f"vae/config.json), and those of {latents.model} have {scale[0]:g}, {scale[1]:g}: take a video VAE that "
            "was made compatible with that image VAE"
        )
    wanted = adapter.condition_dim(config)
    if condition_dim is not None and condition_dim != wanted:
        raise UsageError(
            f"the embeddings have {condition_dim} values a token, the model takes {wanted}: encode the captions or "
            "first frames with the encoder that the model was trained with"
        )
    for bucket in buckets:
        compression = latents.temporal_compression
        adapter.check_shape(config, bucket, 1 + (bucket.num_frames - 1) // compression)


def write_model(folder: Path, model: Any, adapter: Adapter, scheduler: Any, origin: Mapping[str, Any]) -> None:
    """A folder that diffusers loads: the model, its scheduler, and an index whose other parts the caller brings."""
    model.save_pretrained(folder / adapter.folder)
    scheduler.save_pretrained(folder / "scheduler")
    parts = {
        "TextToVideoSDPipeline": ("vae", "text_encoder", "tokenizer"),
        "StableVideoDiffusionPipeline": ("vae", "image_encoder", "feature_extractor"),
        "LattePipeline": ("vae", "text_encoder", "tokenizer"),
    }[adapter.pipeline_class]
    index: dict[str, Any] = {
        "_class_name": adapter.pipeline_class,
        adapter.folder: ["diffusers", adapter.class_name],
        "scheduler": ["diffusers", type(scheduler).__name__],
        **{part: [None, None] for part in parts},
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "latentmill.json").write_text(json.dumps(dict(origin), indent=2) + "\n", encoding="utf-8")


def _class_of(adapter: Adapter) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise UsageError(f"diffusers could not be imported ({error}): pip install '.[train]'") from error
    return getattr(diffusers, adapter.class_name)


def _known() -> str:
    return ", ".join(ADAPTERS)


def _read_json(source: str, name: str) -> dict[str, Any] | None:
    """A JSON object of a folder or hub repository; None where it has no such file."""
    if Path(source).is_dir():
        path = Path(source) / name
        if not path.is_file():
            return None
    else:
        if source.count("/") != 1 or source.startswith((".", "/")):
            raise UsageError(f"--model: {source} is neither a folder nor a hub id")
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = Path(hf_hub_download(source, name))
        except EntryNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UsageError(f"--model: {source} is no folder, and the hub does not give it: {error}") from error
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--model: {path} cannot be read as JSON: {error}") from error
    return loaded if isinstance(loaded, dict) else None
