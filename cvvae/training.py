"""Trains a video VAE towards an objective of `losses`: one batch a step, stage after stage, exactly resumable.

Plain PyTorch: not where clips come from, and not where checkpoints, processes or logs are kept (`jobs/train_vae.py` is
one user of it). What a step does depends on the state, the batch, the seed and the number of the step alone: every step
seeds its own random numbers, so that no state of a generator has to be saved, and a run that goes on from a saved state
repeats the undisturbed one to the bit on a CPU.

The generator (the VAE) and the discriminator are trained as in LDM, both on every batch; the code published with
CV-VAE gives every other batch to one of them alone, see `TrainerConfig.discriminator_turn`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from cvvae.losses import LossConfig, Perceptual, VAELoss, VideoDiscriminator
from cvvae.model import CVVAE
from cvvae.teachers import FrozenTeacher

_MOST_SKIPPED_IN_A_ROW = 20
_MOMENT = {"AdamW": "exp_avg", "Muon": "momentum_buffer"}
_T = TypeVar("_T")


class TrainingError(ValueError):
    """A training that cannot be carried out: a stage that makes no sense, or a state that does not fit."""


class DivergedError(RuntimeError):
    """Training has diverged: gradients are not finite any more. Its state is useless, an earlier one is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A number of steps with one objective and one course of the learning rate.

    Raises:
        TrainingError: a value is outside of what is allowed.
    """

    steps: int
    """Batches of this stage."""
    name: str = ""
    """For logs."""
    lr: float = 1e-4
    """Learning rate after the warm-up: the paper's (the published code has 4e-5)."""
    warmup_steps: int = 0
    """Steps in which the rate rises from 0; the published code has 1,000."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course after the warm-up; the cosine ends at `final_lr_factor` and stays there (the published one rises)."""
    final_lr_factor: float = 0.0
    """The rate at the end of the cosine, relative to `lr`; the published code has 0.005."""
    discriminator_lr: float | None = None
    """Constant learning rate of the discriminator; None: `lr`. The published code has 2e-5, half of the VAE's."""
    freeze: Literal["none", "encoder", "decoder"] = "none"
    """A half that does not learn in this stage."""
    lr_factors: Mapping[str, float] = field(default_factory=dict)
    """Factors of the learning rate: "encoder", "decoder", or any pattern such as "encoder.levels.0.*" of parameter
    names. The last pattern that fits counts; 0 freezes."""
    decoder_term_every: int = 1
    """Compute the term of lambda_decoder in every so-manieth step only, which saves its cost in the others."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Terms and weights. Its `adversarial_start_step` counts from the beginning of the stage."""

    def __post_init__(self) -> None:
        _check(self.steps >= 1, f"steps of a stage are {self.steps}: at least 1 is needed")
        _check(self.lr > 0 and math.isfinite(self.lr), f"lr of a stage is {self.lr}: a positive number is needed")
        _check(0 <= self.final_lr_factor <= 1, f"final_lr_factor is {self.final_lr_factor}: allowed is 0 to 1")
        _check(self.warmup_steps >= 0, f"warmup_steps are {self.warmup_steps}: 0 or more are needed")
        _check(self.decoder_term_every >= 1, f"decoder_term_every is {self.decoder_term_every}: 1 or more is needed")
        _check_choice("schedule", self.schedule, ("cosine", "constant"))
        _check_choice("freeze", self.freeze, ("none", "encoder", "decoder"))
        for pattern, factor in self.lr_factors.items():
            _check(factor >= 0, f"the factor of {pattern} in lr_factors is {factor}: 0 or more is needed")
        _check(
            self.decoder_term_every == 1 or not self.loss.learned_variance,
            "decoder_term_every is above 1 and learned_variance is on: the learned scalar of the term would drift in "
            "the steps without it; set one of them back",
        )
        _check(
            self.factor_of("decoder.conv_out.weight") > 0
            or not self.loss.adaptive_weight
            or not self.loss.is_adversarial(self.steps - 1),
            "the decoder's last layer does not learn, but the adaptive weight of the discriminator's term is taken at "
            "it: set adversarial_weight to 0 or adaptive_weight to false, or let it learn",
        )

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from the beginning of the stage."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        share = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * share))
        return self.lr * (self.final_lr_factor + (1 - self.final_lr_factor) * cosine)

    def check_patterns(self, names: Sequence[str]) -> None:
        """Raises TrainingError where a pattern of `lr_factors` fits no parameter of the VAE."""
        for pattern in self.lr_factors:
            _check(
                any(_fits(name, pattern) for name in names),
                f"lr_factors of the stage {self.name} names {pattern!r}, which no parameter of the model is called: "
                f"encoder, decoder, or a pattern of names such as {names[0]}",
            )

    def factor_of(self, name: str) -> float:
        """The factor of the learning rate of a parameter of the VAE; 0 for one that does not learn."""
        if name.startswith(f"{self.freeze}."):
            return 0.0
        fitting = [f for p, f in self.lr_factors.items() if _fits(name, p)]
        return fitting[-1] if fitting else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """What holds for all stages.

    Raises:
        TrainingError: a value is outside of what is allowed.
    """

    seed: int = 0
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: as the paper. muon: kernels and matrices of the VAE by torch.optim.Muon (K. Jordan, 2024), which makes
    every direction of an update equally long, scaled so that learning rates of AdamW fit (arXiv 2502.16982); the rest
    of the VAE, and the discriminator, by AdamW. Not in the paper; a light model without norms learns faster."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW; the paper gives none, the published code has (0.9, 0.98)."""
    eps: float = 1e-8
    """Of AdamW; the published code has 1e-4."""
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    """Longest gradient, of the VAE and of the discriminator each; the published code's."""
    ema_decay: float = 0.999
    """Of the moving average of the weights; 0: none, as published. In the first steps it is (1 + n) / (10 + n)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast; weights, losses and optimisers stay float32. The paper trains in float32. On a GPU torch
    convolves float32 in TF32 unless torch.backends.cudnn.allow_tf32 is off."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    discriminator_turn: Literal["every_batch", "every_other_batch"] = "every_batch"
    """every_batch: as LDM, the VAE and then the discriminator on the same batch. every_other_batch: as published, even
    steps train the VAE and odd ones the discriminator, once it takes part."""
    discriminator_channels: int = 64
    """Width of the discriminator's first layer."""

    def __post_init__(self) -> None:
        _check(0 <= self.ema_decay < 1, f"ema_decay is {self.ema_decay}: allowed is 0 <= decay < 1")
        _check(self.clip_norm > 0, f"clip_norm is {self.clip_norm}: a positive number is needed")
        _check_choice("precision", self.precision, ("float32", "bfloat16"))
        _check_choice("optimizer", self.optimizer, ("adamw", "muon"))
        _check(
            self.optimizer == "adamw" or hasattr(torch.optim, "Muon"),
            f"optimizer is muon, which torch {torch.__version__} does not have: torch 2.9 or later is needed",
        )
        _check_choice("discriminator_turn", self.discriminator_turn, ("every_batch", "every_other_batch"))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What a step did.

    Attributes:
        step: its number, from 0.
        losses: the terms that were computed, before their weights; scalars on the device, detached.
        lr: the learning rate, before factors.
        is_skipped: a gradient was not finite, so that the VAE stayed as it was, or the discriminator alone.
    """

    step: int
    losses: Mapping[str, Tensor]
    lr: float
    is_skipped: bool


class Trainer:
    """A video VAE in training.

    Args:
        vae: trained in place. Its parameters become contiguous float32 and it stops cutting clips.
        stages: in order; training ends after the last one.
        config: see there.
        teacher: the frozen image VAE; may be None where no stage needs it.
        perceptual: see `losses.Perceptual`; may be None where no stage needs it.
        rank: of this process; decides its random numbers.
        is_distributed: average the gradients over the default process group of torch.distributed.

    Raises:
        TrainingError: there is no stage, or the teacher has another number of latent channels.
        LossError: a stage needs a teacher or a perceptual distance that is not given.
    """

    def __init__(
        self,
        vae: CVVAE,
        stages: Sequence[Stage],
        config: TrainerConfig,
        *,
        teacher: FrozenTeacher | None = None,
        perceptual: Perceptual | None = None,
        rank: int = 0,
        is_distributed: bool = False,
    ) -> None:
        _check(bool(stages), "there is no stage to train")
        if teacher is not None and any(stage.loss.needs_teacher for stage in stages):
            _check(
                teacher.latent_channels == vae.latent_channels,
                f"the video VAE has {vae.latent_channels} latent channels and the teacher {teacher.latent_channels}: "
                "they must be equal to share a latent space; choose another teacher or another model to start from",
            )
        for stage in stages:
            stage.check_patterns([name for name, _ in vae.named_parameters()])
        self.vae = vae.float().train().requires_grad_(True)
        self.config = config
        self.stages = tuple(stages)
        self.step = 0
        self.num_skipped = 0
        self._stage_index = 0
        self._optimizer: torch.optim.Optimizer
        self._kernels: _Kernels | None = None
        self._discriminator_optimizer: torch.optim.Optimizer | None = None
        self._rank = rank
        self._is_distributed = is_distributed
        self._num_skipped_in_a_row = 0
        # Kernels are chosen by strides, so a model that was loaded must lie in memory as one that was not.
        for parameter in vae.parameters():
            parameter.data = parameter.data.contiguous()
        for module in vae.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(_with_gradient)
        vae.set_chunking(0, 0)
        if config.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        self.ema = copy.deepcopy(vae).eval().requires_grad_(False) if config.ema_decay else vae
        self._losses = [VAELoss(stage.loss, teacher, perceptual).to(vae.device) for stage in stages]
        self.discriminator: VideoDiscriminator | None = None
        if any(stage.loss.adversarial_weight > 0 for stage in stages):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self.discriminator = VideoDiscriminator(config.discriminator_channels).to(vae.device)
        self._begin_stage(0)

    @property
    def num_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def is_done(self) -> bool:
        """Whether the last stage is at its end."""
        return self.step >= self.num_steps

    @property
    def stage(self) -> Stage:
        """The stage of the next step."""
        return self.stages[self._stage_at(self.step)[0]]

    def train_step(self, clips: Tensor) -> StepReport:
        """One step on a batch.

        Args:
            clips: (B, 3, T, H, W), T = 1 + 4 k, H and W multiples of 8; uint8 0..255, or floating in [-1, 1].

        Raises:
            TrainingError: training is at its end.
            DivergedError: gradients were not finite 20 times in a row.
        """
        _check(not self.is_done, f"all {self.num_steps} steps are done")
        stage_index, step_in_stage = self._stage_at(self.step)
        if stage_index != self._stage_index:
            self._begin_stage(stage_index)
        stage = self.stages[stage_index]
        rng = self._seed_step()
        clips = clips.to(self.vae.device, non_blocking=True)
        clips = clips.float().div_(127.5).sub_(1) if clips.dtype == torch.uint8 else clips.float()
        is_adversarial = stage.loss.is_adversarial(step_in_stage)
        alternates = self.config.discriminator_turn == "every_other_batch" and is_adversarial
        losses: dict[str, Tensor] = {}
        reconstruction: Tensor | None
        is_skipped = False
        lr = stage.lr_at(step_in_stage)
        if alternates and self.step % 2:
            reconstruction = self._reconstruct(clips, rng)
        else:
            reconstruction, is_skipped = self._generator_step(clips, step_in_stage, lr, rng, losses)
        if is_adversarial and (not alternates or self.step % 2) and not is_skipped:
            assert reconstruction is not None, "an adversarial step has a reconstruction"
            is_skipped = self._discriminator_step(clips, reconstruction, losses)
        self._count_skipped(is_skipped)
        report = StepReport(step=self.step, losses=losses, lr=lr, is_skipped=is_skipped)
        self.step += 1
        return report

    def state_dict(self) -> dict[str, Any]:
        """All that a later `load_state_dict` needs to go on exactly: tensors by name and a few numbers.

        Its values are the live tensors: write or copy them before the next step.
        """
        state: dict[str, Any] = {
            "step": self.step,
            "num_skipped": self.num_skipped,
            "vae": self.vae.state_dict(),
            "optimizer": self._generator_optimizer_state(),
            "loss": self._losses[self._stage_index].state_dict(),
        }
        if self.ema is not self.vae:
            state["ema"] = self.ema.state_dict()
        if self.discriminator is not None:
            assert self._discriminator_optimizer is not None
            names = {id(p): n for n, p in self.discriminator.named_parameters()}
            state["discriminator"] = self.discriminator.state_dict()
            state["discriminator_optimizer"] = optimizer_state(self._discriminator_optimizer, names)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of the same stages; a state without a discriminator's part starts a new one.

        Raises:
            TrainingError: the state is that of another model.
        """
        try:
            self.vae.load_state_dict(state["vae"])
            if self.ema is not self.vae:
                self.ema.load_state_dict(state.get("ema", state["vae"]))
            if self.discriminator is not None and "discriminator" in state:
                self.discriminator.load_state_dict(state["discriminator"])
        except RuntimeError as error:
            raise TrainingError(f"the saved state belongs to another model: {error}") from error
        self.step = int(state["step"])
        self.num_skipped = int(state["num_skipped"])
        # The state may be that of the last step of a stage: the next one begins when its first batch comes.
        before = max(0, min(self.step, self.num_steps) - 1)
        self._begin_stage(self._stage_at(before)[0], carry=False)
        self._losses[self._stage_index].load_state_dict(state["loss"], strict=False)
        self._load_generator_optimizer_state(state["optimizer"])
        if self._discriminator_optimizer is not None and "discriminator_optimizer" in state:
            assert self.discriminator is not None
            names = {id(p): n for n, p in self.discriminator.named_parameters()}
            load_optimizer_state(self._discriminator_optimizer, names, state["discriminator_optimizer"])

    def _stage_at(self, step: int) -> tuple[int, int]:
        """The stage of a step, and the step's number in it; the end belongs to the last stage."""
        for index, stage in enumerate(self.stages):
            if step < stage.steps:
                return index, step
            step -= stage.steps
        return len(self.stages) - 1, step + self.stages[-1].steps

    def _begin_stage(self, index: int, carry: bool = True) -> None:
        """Makes optimisers for what learns in a stage; moments of what learned before are carried over."""
        stage = self.stages[index]
        carried: Mapping[str, Mapping[str, Tensor]] = {}
        carried_discriminator: Mapping[str, Mapping[str, Tensor]] = {}
        disc_names = {} if self.discriminator is None else {id(p): n for n, p in self.discriminator.named_parameters()}
        if index and carry:
            carried = self._generator_optimizer_state()
            self._losses[index].load_state_dict(self._losses[self._stage_index].state_dict(), strict=False)
            if self._discriminator_optimizer is not None:
                carried_discriminator = optimizer_state(self._discriminator_optimizer, disc_names)
        self._stage_index = index
        loss = self._losses[index]
        by_factor: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.vae.named_parameters():
            factor = stage.factor_of(name)
            parameter.requires_grad_(factor > 0)
            parameter.grad = None
            if factor > 0:
                by_factor.setdefault(factor, []).append(parameter)
        _check(bool(by_factor), f"nothing learns in the stage {stage.name or index}: see freeze and lr_factors")
        self._trained = [p for parameters in by_factor.values() for p in parameters] + list(loss.parameters())
        self._kernels = _Kernels(by_factor, stage.lr, self.config) if self.config.optimizer == "muon" else None
        groups: list[dict[str, Any]] = []
        for factor, learning in sorted(by_factor.items()):
            own = learning if self._kernels is None else [p for p in learning if p.dim() < 2]
            groups.append({"params": own, "factor": factor})
        if scalars := list(loss.parameters()):
            groups.append({"params": scalars, "factor": 1.0, "weight_decay": 0.0})
        self._optimizer = self._adamw(groups, stage.lr)
        self._load_generator_optimizer_state(carried)
        self._generator: nn.Module = _GeneratorPass(self.vae, loss)
        self._discriminator_pass: nn.Module | None = None
        self._discriminator_optimizer = None
        if self.discriminator is not None:
            lr = stage.lr if stage.discriminator_lr is None else stage.discriminator_lr
            parameters = [{"params": list(self.discriminator.parameters()), "factor": 1.0}]
            self._discriminator_optimizer = self._adamw(parameters, lr)
            load_optimizer_state(self._discriminator_optimizer, disc_names, carried_discriminator)
            self._discriminator_pass = _DiscriminatorPass(self.discriminator, loss)
        if self._is_distributed:
            self._generator = _distributed(self._generator)
            if self._discriminator_pass is not None and stage.loss.adversarial_weight > 0:
                self.discriminator.requires_grad_(True)  # type: ignore[union-attr]
                self._discriminator_pass = _distributed(self._discriminator_pass)

    def _adamw(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.AdamW:
        config = self.config
        return torch.optim.AdamW(
            groups, lr=lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )

    def _generator_optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        names = self._names(self._stage_index)
        state = optimizer_state(self._optimizer, names)
        return state if self._kernels is None else state | optimizer_state(self._kernels.optimizer, names)

    def _load_generator_optimizer_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        names = self._names(self._stage_index)
        load_optimizer_state(self._optimizer, names, state)
        if self._kernels is not None:
            load_optimizer_state(self._kernels.optimizer, names, state)

    def _names(self, stage_index: int) -> dict[int, str]:
        names = {id(p): f"vae.{n}" for n, p in self.vae.named_parameters()}
        if self._kernels is not None:
            names |= {id(matrix): names[id(kernel)] for kernel, matrix in self._kernels.pairs}
        return names | {id(p): f"loss.{n}" for n, p in self._losses[stage_index].named_parameters()}

    def _seed_step(self) -> torch.Generator:
        seeds = np.random.SeedSequence([self.config.seed, self._rank, self.step]).generate_state(2, np.uint64)
        # For whoever draws without a generator, such as dropout.
        torch.manual_seed(int(seeds[0]))
        return torch.Generator().manual_seed(int(seeds[1]))

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.vae.device.type, dtype=torch.bfloat16)

    def _generator_step(
        self, clips: Tensor, step: int, lr: float, rng: torch.Generator, losses: dict[str, Tensor]
    ) -> tuple[Tensor | None, bool]:
        """Trains the VAE; gives its detached reconstruction and whether the step was skipped."""
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)
        has_decoder_term = step % self.stages[self._stage_index].decoder_term_every == 0
        with self._autocast():
            total, logs, reconstruction = self._generator(clips, step, rng, self.discriminator, has_decoder_term)
        total.backward()
        losses |= logs
        norm, is_finite = clip_gradient(self._trained, self.config.clip_norm)
        losses["gradient_norm"] = norm
        if is_finite:
            for group in self._optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            self._optimizer.step()
            if self._kernels is not None:
                self._kernels.step(lr)
            self._update_ema()
        for parameter in self._trained:
            parameter.grad = None
        return None if reconstruction is None else reconstruction.detach(), not is_finite

    def _discriminator_step(self, clips: Tensor, reconstruction: Tensor, losses: dict[str, Tensor]) -> bool:
        """Trains the discriminator; whether the step was skipped."""
        assert self.discriminator is not None
        assert self._discriminator_pass is not None
        assert self._discriminator_optimizer is not None
        self.discriminator.requires_grad_(True)
        with self._autocast():
            loss, logs = self._discriminator_pass(clips, reconstruction)
        loss.backward()
        losses |= logs
        norm, is_finite = clip_gradient(list(self.discriminator.parameters()), self.config.clip_norm)
        losses["discriminator_gradient_norm"] = norm
        if is_finite:
            self._discriminator_optimizer.step()
        self._discriminator_optimizer.zero_grad(set_to_none=True)
        return not is_finite

    def _reconstruct(self, clips: Tensor, rng: torch.Generator) -> Tensor:
        samples = self.stages[self._stage_index].loss.sample_posterior
        with torch.no_grad(), self._autocast():
            posterior = self.vae.encode(clips).latent_dist
            return self.vae.decode(posterior.sample(rng) if samples else posterior.mode()).sample

    def _update_ema(self) -> None:
        if self.ema is self.vae:
            return
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.vae.parameters()), 1 - decay)

    def _count_skipped(self, is_skipped: bool) -> None:
        self.num_skipped += is_skipped
        self._num_skipped_in_a_row = self._num_skipped_in_a_row + 1 if is_skipped else 0
        if self._num_skipped_in_a_row >= _MOST_SKIPPED_IN_A_ROW:
            raise DivergedError(
                f"the gradient was not finite in {self._num_skipped_in_a_row} steps in a row, up to step {self.step}: "
                "training has diverged; go back to an earlier checkpoint with a lower learning rate, a longer warm-up "
                "or precision float32"
            )


class _Kernels:
    """Muon for kernels of any number of dimensions: each as a matrix (out, all else), as torch's takes matrices only.

    Attributes:
        pairs: every kernel with its matrix, which is the same memory.
        optimizer: of the matrices.
    """

    def __init__(self, by_factor: Mapping[float, Sequence[nn.Parameter]], lr: float, config: TrainerConfig) -> None:
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        groups: list[dict[str, Any]] = []
        for factor, parameters in sorted(by_factor.items()):
            kernels = [p for p in parameters if p.dim() >= 2]
            matrices = [nn.Parameter(kernel.detach().flatten(1)) for kernel in kernels]
            self.pairs += zip(kernels, matrices, strict=True)
            if matrices:
                groups.append({"params": matrices, "factor": factor})
        self.optimizer = torch.optim.Muon(
            groups, lr=lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        )

    def step(self, lr: float) -> None:
        """One step with the gradients of the kernels."""
        for kernel, matrix in self.pairs:
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        self.optimizer.step()
        for _, matrix in self.pairs:
            matrix.grad = None


class _GeneratorPass(nn.Module):
    """The VAE's part of a step as one forward call, as DistributedDataParallel needs it."""

    def __init__(self, vae: CVVAE, loss: VAELoss) -> None:
        super().__init__()
        self.vae = vae
        self.loss = loss

    def forward(
        self,
        clips: Tensor,
        step: int,
        rng: torch.Generator,
        discriminator: nn.Module | None,
        has_decoder_term: bool,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        out = self.loss.generator(
            self.vae, clips, step=step, rng=rng, discriminator=discriminator, has_decoder_term=has_decoder_term
        )
        return out.total, out.logs, out.reconstruction


class _DiscriminatorPass(nn.Module):
    """The discriminator's part of a step as one forward call."""

    def __init__(self, discriminator: VideoDiscriminator, loss: VAELoss) -> None:
        super().__init__()
        self.discriminator = discriminator
        # In a tuple, where torch does not look for parameters: its scalars are not the discriminator's to train.
        self._loss = (loss,)

    def forward(self, clips: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self._loss[0].discriminator(self.discriminator, clips, reconstruction)


def _with_gradient(norm: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Behind frozen layers a norm's input has no gradient, and torch 2.13 on a CPU then crashes in its backward pass
    (channels last); so it gets one that nobody asks for."""
    (x,) = inputs
    if torch.is_grad_enabled() and not x.requires_grad and next(norm.parameters()).requires_grad:
        return (x.detach().requires_grad_(),)
    return inputs


def _distributed(module: nn.Module) -> nn.Module:
    device = next(module.parameters()).device
    # Terms come and go with the step, and with them the parameters that a backward pass reaches.
    return nn.parallel.DistributedDataParallel(
        module, device_ids=[device] if device.type == "cuda" else None, find_unused_parameters=True
    )


def clip_gradient(parameters: Iterable[nn.Parameter], clip_norm: float) -> tuple[Tensor, bool]:
    """Shortens the gradient to a length; gives the length that it had, and whether that is finite."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients, foreach=True)
    length = float(norm)
    if clip_norm < length < math.inf:
        torch._foreach_mul_(gradients, clip_norm / length)
    return norm.detach(), math.isfinite(length)


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, dict[str, Tensor]]:
    """The moments by parameter name: indices would mean other parameters in another stage."""
    return {names[id(parameter)]: dict(state) for parameter, state in optimizer.state.items()}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], state: Mapping[str, Mapping[str, Tensor]]
) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            saved = state.get(names[id(parameter)])
            # The moments of another optimiser, which the run was trained with before, mean nothing to this one.
            if saved is not None and _MOMENT[type(optimizer).__name__] in saved:
                optimizer.state[parameter] = {
                    # Numbers of steps, too: fused kernels of a GPU read them there.
                    key: value.to(parameter.device, copy=value.dim() == 0)
                    for key, value in saved.items()
                }


def from_mapping(cls: type[_T], given: object, what: str) -> _T:
    """A dataclass of this package from a mapping as YAML gives it; numbers may be texts ("1e-4" is one in YAML).

    Raises:
        TrainingError: no mapping, an unknown or missing key, or a value of another type.
        LossError: a value that `LossConfig` refuses.
    """
    _check(isinstance(given, Mapping), f"{what} is {given!r}: a mapping of names to values is needed")
    assert isinstance(given, Mapping)
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = [str(key) for key in given if key not in known]
    _check(not unknown, f"{what} has the unknown keys {', '.join(unknown)}; known: {', '.join(known)}")
    values = {name: _converted(hints[name], value, f"{name} of {what}") for name, value in given.items()}
    missing = [
        name
        for name, f in known.items()
        if name not in given and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    _check(not missing, f"{what} lacks {', '.join(missing)}")
    return cls(**values)


def _converted(hint: Any, value: object, what: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return from_mapping(hint, value, what)
    if origin in (typing.Union, types.UnionType):
        (inner,) = [part for part in typing.get_args(hint) if part is not type(None)]
        return None if value is None else _converted(inner, value, what)
    if origin is Literal or hint is str:
        _check(isinstance(value, str), f"{what} is {value!r}: a text is needed")
        return value
    if hint is bool:
        _check(isinstance(value, bool), f"{what} is {value!r}: true or false is needed")
        return value
    if origin is tuple:
        _check(isinstance(value, list), f"{what} is {value!r}: a list is needed")
        assert isinstance(value, list)
        parts = typing.get_args(hint)
        _check(len(value) == len(parts), f"{what} is {value!r}: {len(parts)} numbers are needed")
        return tuple(_converted(part, entry, what) for part, entry in zip(parts, value, strict=True))
    if origin is not None:
        _check(isinstance(value, Mapping), f"{what} is {value!r}: a mapping of names to numbers is needed")
        assert isinstance(value, Mapping)
        return {str(key): _converted(float, entry, f"{key} in {what}") for key, entry in value.items()}
    try:
        if isinstance(value, bool):
            raise ValueError
        return hint(value) if hint is float or float(str(value)) == int(str(value)) else hint("no")
    except (ValueError, TypeError) as error:
        kind = "a whole number" if hint is int else "a number"
        raise TrainingError(f"{what} is {value!r}: {kind} is needed") from error


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _check(is_right: bool, message: str) -> None:
    if not is_right:
        raise TrainingError(message)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _check(value in allowed, f"{name} is {value!r}: allowed are {', '.join(allowed)}")
