"""How latents are made noisy and what a diffusion model is asked to say of it: epsilon, v, SVD's v, flow matching.

Pure arithmetic on tensors: not a sampler (diffusers' schedulers take the steps back) and not a model. Which process a
model has is read off its scheduler's configuration, so that training and sampling cannot disagree.

Sources: v-prediction, Salimans and Ho (arXiv 2202.00512); preconditioning and continuous noise levels, Karras et al.
(arXiv 2206.00364), in SVD's form (arXiv 2311.15127); flow matching with logit-normal levels, Esser et al. (arXiv
2403.03206); min-SNR weights, Hang et al. (arXiv 2303.09556).

Tensor letters: B batch, C channels, t h w latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jobs.t2v_models import ImageUNet
from pipeline.errors import UsageError

PREDICTIONS = ("epsilon", "v_prediction", "edm", "flow")


@dataclass(frozen=True, slots=True, kw_only=True)
class Noisy:
    """What a model gets and should say.

    Attributes:
        latents: (B, C, t, h, w), as the model takes them.
        timesteps: (B,), as the model takes them.
        target: (B, C, t, h, w).
        snr: (B,), signal-to-noise ratio.
    """

    latents: Tensor
    timesteps: Tensor
    target: Tensor
    snr: Tensor


class Process(ABC):
    """A way from latents to noise. Its levels are numbers in [0, 1): shares of the training distribution, so that
    evenly spaced ones are an even sample of what the model is trained on."""

    def __init__(self, prediction: str) -> None:
        self.prediction = prediction

    @abstractmethod
    def apply(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Noisy:
        """Makes latents (B, C, t, h, w) noisy, as far as levels (B,) say."""

    def weights(self, snr: Tensor, min_snr_gamma: float | None) -> Tensor:
        """Weights (B,) of the squared error of what the model says."""
        if min_snr_gamma is None:
            return torch.ones_like(snr)
        capped = snr.clamp_max(min_snr_gamma)
        # A noise of 0 has an infinite ratio, of which the limit is 0.
        return torch.nan_to_num(capped / (snr + 1 if self.prediction != "epsilon" else snr), nan=1.0)


class Discrete(Process):
    """Diffusion in numbered steps, with the betas of a scheduler; the model says the noise, or v."""

    def __init__(self, alphas_cumprod: Tensor, prediction: str) -> None:
        super().__init__(prediction)
        self._alphas_cumprod = alphas_cumprod.double()

    def apply(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Noisy:
        timesteps = (levels.double() * len(self._alphas_cumprod)).long().clamp_max(len(self._alphas_cumprod) - 1)
        kept = self._alphas_cumprod.to(latents.device)[timesteps]
        a, b = _spread(kept.sqrt(), latents), _spread((1 - kept).sqrt(), latents)
        target = noise if self.prediction == "epsilon" else a * noise - b * latents
        snr = (kept / (1 - kept)).to(latents.dtype)
        return Noisy(latents=a * latents + b * noise, timesteps=timesteps, target=target, snr=snr)


class Continuous(Process):
    """SVD's process: noise of any deviation sigma, log-normal in training; the model says v of latents that are
    brought to a deviation of 1, and is told log(sigma) / 4."""

    def __init__(self, log_sigma_mean: float, log_sigma_deviation: float) -> None:
        super().__init__("edm")
        self._mean = log_sigma_mean
        self._deviation = log_sigma_deviation

    def apply(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Noisy:
        log_sigma = self._mean + self._deviation * torch.special.ndtri(levels.double().clamp(1e-6, 1 - 1e-6))
        sigma = log_sigma.exp()
        a = _spread((sigma**2 + 1).rsqrt(), latents)
        b = _spread(sigma * (sigma**2 + 1).rsqrt(), latents)
        return Noisy(
            latents=a * latents + b * noise,
            timesteps=(log_sigma / 4).to(latents.dtype),
            target=a * noise - b * latents,
            snr=(sigma**-2).to(latents.dtype),
        )


class Flow(Process):
    """Flow matching: the straight line from latents to noise, along which the model says the direction."""

    def __init__(self, num_timesteps: int, shift: float, *, is_logit_normal: bool) -> None:
        super().__init__("flow")
        self._num_timesteps = num_timesteps
        self._shift = shift
        self._is_logit_normal = is_logit_normal

    def apply(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Noisy:
        share = levels.double().clamp(1e-6, 1 - 1e-6)
        if self._is_logit_normal:
            share = torch.sigmoid(torch.special.ndtri(share))
        share = self._shift * share / (1 + (self._shift - 1) * share)
        b = _spread(share, latents)
        return Noisy(
            latents=(1 - b) * latents + b * noise,
            timesteps=(share * self._num_timesteps).to(latents.dtype),
            target=noise - latents,
            snr=(((1 - share) / share) ** 2).to(latents.dtype),
        )

    def weights(self, snr: Tensor, min_snr_gamma: float | None) -> Tensor:
        if min_snr_gamma is not None:
            raise UsageError(
                "--min-snr-gamma: these weights are for epsilon and v, not for flow matching; leave it out"
            )
        return torch.ones_like(snr)


def scheduler_of(config: Mapping[str, Any], prediction: str | None) -> Any:
    """The scheduler of diffusers with which a model samples.

    Args:
        config: its configuration, with `_class_name`.
        prediction: what the model shall say from now on, one of PREDICTIONS; None: as the configuration says.

    Raises:
        UsageError: a scheduler that diffusers does not have, or one whose process is not known here.
    """
    import diffusers

    values = {name: value for name, value in config.items() if not name.startswith("_")}
    name = str(config.get("_class_name"))
    betas: dict[str, Any] = {name: value for name, value in values.items() if name.startswith("beta_")}
    if prediction == "flow" and "FlowMatch" not in name:
        name, values = "FlowMatchEulerDiscreteScheduler", {}
    elif prediction == "edm" and values.get("timestep_type") != "continuous":
        name, values = "EulerDiscreteScheduler", {**ImageUNet.scheduler, **betas}
    elif prediction in ("epsilon", "v_prediction"):
        if "FlowMatch" in name or values.get("timestep_type") == "continuous":
            name, values = "DDIMScheduler", {**betas, "clip_sample": False, "set_alpha_to_one": False}
        values["prediction_type"] = prediction
    values.pop("_class_name", None)
    cls = getattr(diffusers, name, None)
    if cls is None or not name.endswith("Scheduler"):
        raise UsageError(f"the model's scheduler is {name}, which diffusers {diffusers.__version__} does not have")
    return cls.from_config(values)


def process_of(
    scheduler: Any,
    log_sigma_mean: float = 0.7,
    log_sigma_deviation: float = 1.6,
    flow_levels: str = "logit-normal",
) -> Process:
    """The process that a scheduler of diffusers reverses.

    Args:
        scheduler: of diffusers.
        log_sigma_mean, log_sigma_deviation: of SVD's process.
        flow_levels: "logit-normal" or "uniform".

    Raises:
        UsageError: a prediction that cannot be trained here.
    """
    config = scheduler.config
    if "FlowMatch" in type(scheduler).__name__:
        if config.use_dynamic_shifting:
            raise UsageError("the scheduler shifts by resolution (use_dynamic_shifting), which cannot be trained here")
        return Flow(config.num_train_timesteps, config.shift, is_logit_normal=flow_levels == "logit-normal")
    prediction = config.prediction_type
    if getattr(config, "timestep_type", None) == "continuous" and prediction == "v_prediction":
        return Continuous(log_sigma_mean, log_sigma_deviation)
    if prediction not in ("epsilon", "v_prediction"):
        raise UsageError(
            f"the scheduler's prediction_type is {prediction}, which cannot be trained here: --prediction is one of "
            f"{', '.join(PREDICTIONS)}"
        )
    return Discrete(scheduler.alphas_cumprod, prediction)


def _spread(values: Tensor, latents: Tensor) -> Tensor:
    return values.to(device=latents.device, dtype=latents.dtype).view(-1, *[1] * (latents.dim() - 1))
