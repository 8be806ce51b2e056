"""The objective that makes a video VAE compatible with an image VAE, term by term.

Reconstruction (L1 or L2, and a perceptual distance), KL, a 3D discriminator with hinge loss and adaptive weight, and
the regularisation of the latents by the frozen image VAE. Source: CV-VAE, arXiv 2405.20279, section 3; where the paper
and the code published with it differ, the paper is the default and `LossConfig.published` is the code. The training
calls `VAELoss`; nothing here steps an optimiser.

Every term is reduced in float32, to a mean over pixel values (or latent values), so that weights mean the same for
every size of clip. LDM and the published code sum over the values of a frame instead: the same objective times
3 H W, which AdamW does not notice. `LossConfig.kl_reduction` says what follows for the KL term.

Tensor letters: B batch, C channels, T H W frames in pixels, t h w latents: t = 1 + (T - 1) / 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvvae.config import TEMPORAL_COMPRESSION
from cvvae.model import CVVAE, LatentDistribution
from cvvae.teachers import FrozenTeacher

Mapping = Literal["first", "slice", "average", "random"]
Distance = Literal["l1", "l2"]
Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Maps two batches of frames (N, 3, H, W) in [-1, 1] to their distances (N,)."""

_ADAPTIVE_WEIGHT_FLOOR = 1e-4
_ADAPTIVE_WEIGHT_LIMIT = 1e4


class LossError(ValueError):
    """An objective that cannot be computed: a value out of range, or something that it needs is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """The terms of the objective and their weights; a term with weight 0 is not computed.

    Raises:
        LossError: a value is outside of what is allowed.
    """

    reconstruction: Distance = "l1"
    """Distance of frames. The paper follows the image VAE, which is trained with L1, and so does the published code."""
    reconstruction_weight: float = 1.0
    """With 0, and neither perceptual nor adversarial term, the decoder is not run: only the encoder learns."""
    perceptual_weight: float = 0.5
    """Weight of the perceptual distance per frame. The paper gives no number; the published code has 0.5."""
    kl_weight: float = 1e-6
    """Weight of the divergence to N(0, 1). The paper gives no number; 1e-6 is that of the image VAEs of LDM, whose
    latents are far from N(0, 1) (deviation 5.5 for Stable Diffusion), so that more would pull away from them. The
    published code has 1.0."""
    kl_reduction: Literal["clip", "mean"] = "clip"
    """"clip" as in LDM and in the published code: summed over the latents of a clip, against reconstruction summed over
    a frame; as reconstruction is a mean here, that is the sum divided by 3 H W. "mean": over the latents' values."""
    sample_posterior: bool = True
    """The decoder sees a draw from the posterior, as published; False: its mean, for encoders without a posterior."""
    adversarial_weight: float = 0.5
    """Weight of the discriminator's term; LDM's and the published code's."""
    adversarial_start_step: int = 1
    """First step with the discriminator's term; the published code's (LDM: 50,001)."""
    adaptive_weight: bool = True
    """Scale the discriminator's term so that its gradient at the decoder's last layer is as large as the
    reconstruction's (VQGAN, arXiv 2012.09841, equation 7), at most 10,000 times."""
    lambda_decoder: float = 1.0
    """lambda 1: psi(X) against the image decoder's frames from the video latents."""
    lambda_encoder: float = 0.0
    """lambda 2: X against the video decoder's frames from the image encoder's latents of psi(X)."""
    mapping: Mapping = "random"
    """psi: which frame stands for a group, see `select_frames`."""
    regularisation: Distance = "l2"
    """Distance in both of these; squared L2 in the paper, L1 in the published code."""
    regularised_latents: int | None = None
    """The image decoder decodes so many latents of a clip, and the image encoder makes targets of matching for them;
    drawn anew each time; None: all, as published."""
    latent_matching_weight: float = 0.0
    """Weight of the distance of the posterior's means to the image encoder's latents; not in the paper."""
    latent_matching: Distance = "l1"
    """Distance of latents."""
    latent_deviation_weight: float = 0.0
    """Weight of the squared logarithm of the ratio of deviations over a batch, video latents to the image encoder's, in
    the mean over the channels; not in the paper. Latents that are only asked to come near their targets shrink, as in
    any regression, and a diffusion model made for image latents meets a signal weaker than its noise was made for."""
    matching_mapping: Mapping = "slice"
    """Whose image latents are the target; "slice" is where an inflated encoder starts: the last frame of a group."""
    learned_variance: bool = False
    """Each reconstruction term r becomes r / exp(s) + s with a scalar s of its own that is learned; in the published
    code, not in the paper."""

    def __post_init__(self) -> None:
        for name, kind in (
            ("reconstruction", Distance),
            ("regularisation", Distance),
            ("latent_matching", Distance),
            ("mapping", Mapping),
            ("matching_mapping", Mapping),
        ):
            _check_choice(name, getattr(self, name), get_args(kind))
        _check_choice("kl_reduction", self.kl_reduction, ("clip", "mean"))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "float" and not (math.isfinite(value) and value >= 0):
                raise LossError(f"{field.name} is {value}: a weight is finite and not negative; 0 leaves the term out")
        has_pixel_term = self.reconstruction_weight > 0 or self.perceptual_weight > 0
        if self.adversarial_weight > 0 and self.adaptive_weight and not has_pixel_term:
            raise LossError(
                "adaptive_weight is on, but reconstruction_weight and perceptual_weight are 0: there is no gradient to "
                "adapt to; set adversarial_weight to 0, or adaptive_weight to false"
            )
        if self.regularised_latents is not None and self.regularised_latents < 1:
            raise LossError(
                f"regularised_latents is {self.regularised_latents}: at least 1 latent, or null for all; to leave the "
                f"term out set lambda_decoder to 0"
            )

    @classmethod
    def published(cls) -> LossConfig:
        """What the code published with the paper trains its SD3 model with."""
        return cls(kl_weight=1.0, regularisation="l1", learned_variance=True)

    @property
    def needs_teacher(self) -> bool:
        """Whether a term asks the image VAE."""
        return self.lambda_decoder > 0 or self.lambda_encoder > 0 or self.compares_latents

    @property
    def compares_latents(self) -> bool:
        """Whether a term sets the posterior's means beside the image encoder's latents."""
        return self.latent_matching_weight > 0 or self.latent_deviation_weight > 0

    def is_adversarial(self, step: int) -> bool:
        """Whether the discriminator takes part in that step (and so has to be trained in it)."""
        return self.adversarial_weight > 0 and step >= self.adversarial_start_step


@dataclass(frozen=True, slots=True)
class LossOutput:
    """What `VAELoss.generator` returns."""

    total: Tensor
    """Scalar to call backward on."""
    logs: dict[str, Tensor]
    """Every computed term before its weight, and `total`; detached float32 scalars."""
    reconstruction: Tensor | None
    """(B, 3, T, H, W), with gradients; None where no term needs it."""
    latents: Tensor
    """(B, C, t, h, w), with gradients: what the decoders were given."""


def select_frames(clip: Tensor, mapping: Mapping, generator: torch.Generator) -> Tensor:
    """psi of the paper (section 3): one frame for each latent of a clip.

    Frame 0 stands for itself; a later latent for frames 4j-3..4j. "slice" takes the last one (0, 4, 8, ...), "average"
    their mean, "random" one of the four, drawn for each clip and each group by itself (the published code draws once
    for the whole batch). "first" takes frame 0 and leaves the other latents alone.

    Args:
        clip: (B, 3, T, H, W), T = 1 + 4 k.
        mapping: see above.
        generator: of any device; only "random" draws from it.

    Returns:
        (B, 3, 1 + k, H, W); (B, 3, 1, H, W) for "first".

    Raises:
        ValueError: T is no 1 + 4 k, or there is no such mapping.
    """
    B, _, T, _, _ = clip.shape
    num_groups, rest = divmod(T - 1, TEMPORAL_COMPRESSION)
    if rest or T < 1:
        raise ValueError(f"the clip has {T} frames: 1 + 4 k are needed, as every latent after the first stands for 4")
    if mapping == "first":
        return clip[:, :, :1]
    if mapping == "slice" or num_groups == 0:
        return clip[:, :, ::TEMPORAL_COMPRESSION]
    groups = clip[:, :, 1:].unflatten(2, (num_groups, TEMPORAL_COMPRESSION)).permute(0, 2, 3, 1, 4, 5)
    if mapping == "average":
        chosen = groups.mean(dim=2)
    elif mapping == "random":
        draws = torch.randint(TEMPORAL_COMPRESSION, (B, num_groups), generator=generator, device=generator.device)
        rows, columns = torch.arange(B)[:, None], torch.arange(num_groups)
        chosen = groups[rows.to(clip.device), columns.to(clip.device), draws.to(clip.device)]
    else:
        raise ValueError(f"the mapping is {mapping!r}: allowed are {', '.join(get_args(Mapping))}")
    return torch.cat([clip[:, :, :1], chosen.transpose(1, 2)], dim=2)


def kl_divergence(distribution: LatentDistribution) -> Tensor:
    """The divergence of every value's Gaussian to N(0, 1), in nats; the shape of the mean, float32."""
    mean, logvar = distribution.mean.float(), distribution.logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What a discriminator minimises, of its answers to real and to made clips; scalar, float32."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """|grad reconstruction| / (|grad adversarial| + 1e-4) at the decoder's last layer, at most 1e4; detached scalar.

    Source: VQGAN, arXiv 2012.09841, equation 7. Costs a backward pass through the discriminator.
    """
    gradients = (torch.autograd.grad(term, last_layer, retain_graph=True)[0] for term in (reconstruction, adversarial))
    numerator, denominator = (gradient.detach().float().norm() for gradient in gradients)
    weight: Tensor = numerator / (denominator + _ADAPTIVE_WEIGHT_FLOOR)
    return weight.clamp(max=_ADAPTIVE_WEIGHT_LIMIT)


def load_perceptual(name: str | None) -> Perceptual | None:
    """A perceptual distance by its name: "lpips" (LPIPS on VGG), or None for none. On the CPU, float32, frozen.

    The package `lpips` and the weights that torchvision fetches for it are not part of this one.

    Raises:
        LossError: unknown name, package not installed, or its weights cannot be had.
    """
    if name is None:
        return None
    _check_choice("perceptual", name, ("lpips",))
    try:
        import lpips
    except (ImportError, RuntimeError) as error:
        raise LossError(
            f"the perceptual distance 'lpips' needs the package lpips and a torchvision that fits torch ({error}): pip "
            f"install lpips, or give another callable, or train without (perceptual_weight 0)"
        ) from error
    try:
        return LPIPS(lpips.LPIPS(net="vgg", verbose=False))
    except (OSError, RuntimeError) as error:
        raise LossError(
            f"the weights of LPIPS could not be had ({type(error).__name__}: {error}): torchvision fetches those of "
            f"VGG; fetch them where there is a network into TORCH_HOME, or train without (perceptual_weight 0)"
        ) from error


class LPIPS(nn.Module):
    """The package's network as a `Perceptual`: frozen, and in evaluation mode for good, as it has dropout."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in evaluation mode, whatever is asked."""
        del mode
        return super().train(False)

    def forward(self, frames_a: Tensor, frames_b: Tensor) -> Tensor:
        distances: Tensor = self.network(frames_a, frames_b)
        return distances.flatten()


class VAELoss(nn.Module):
    """Computes the objective for the video VAE and for the discriminator; its only parameters are learned variances.

    The teacher and the perceptual distance move with it by `.to`, but are no part of its parameters or state dict: they
    are frozen, and a checkpoint of the loss must not carry another's weights.

    Args:
        config: terms and weights.
        teacher: the frozen image VAE; may be None where no term needs it.
        perceptual: see `Perceptual`; may be None where perceptual_weight is 0.

    Raises:
        LossError: something that a term needs is missing.
    """

    def __init__(
        self, config: LossConfig, teacher: FrozenTeacher | None = None, perceptual: Perceptual | None = None
    ) -> None:
        super().__init__()
        if config.needs_teacher and teacher is None:
            raise LossError(
                "lambda_decoder, lambda_encoder, latent_matching_weight or latent_deviation_weight is above 0, but "
                "there is no teacher: give a frozen image VAE, or set all four to 0 to train latents of no particular "
                "space"
            )
        if config.perceptual_weight > 0 and perceptual is None:
            raise LossError(
                f"perceptual_weight is {config.perceptual_weight}, but there is no perceptual distance: give "
                f"load_perceptual('lpips') or another callable, or set the weight to 0"
            )
        self.config = config
        # In a tuple, where torch does not look for submodules.
        self._frozen = (teacher, perceptual)
        if config.learned_variance:
            self.logvar = nn.Parameter(torch.zeros(()))
            self.logvar_decoder = nn.Parameter(torch.zeros(())) if config.lambda_decoder > 0 else None
            self.logvar_encoder = nn.Parameter(torch.zeros(())) if config.lambda_encoder > 0 else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VAELoss:
        for part in self._frozen:
            if isinstance(part, nn.Module):
                part._apply(fn, recurse)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def teacher(self) -> FrozenTeacher:
        """The frozen image VAE.

        Raises:
            LossError: there is none.
        """
        teacher = self._frozen[0]
        if teacher is None:
            raise LossError("this loss was made without a teacher")
        return teacher

    def generator(
        self,
        vae: CVVAE,
        clips: Tensor,
        *,
        step: int,
        rng: torch.Generator,
        discriminator: nn.Module | None = None,
        last_layer: Tensor | None = None,
        has_decoder_term: bool = True,
    ) -> LossOutput:
        """Runs the video VAE on clips and computes all that it is to minimise.

        A backward pass of the total also leaves gradients in the discriminator where that takes part: clear them before
        the discriminator's own.

        Args:
            vae: encodes clips in one piece, with gradients; may run under autocast.
            clips: (B, 3, T, H, W) in [-1, 1], T = 1 + 4 k, H and W multiples of 8.
            step: decides whether the discriminator takes part yet.
            rng: draws posterior, frames and latents, in this order; of any device.
            discriminator: answers (B, 3, T, H, W) with any shape; needed from `adversarial_start_step` on.
            last_layer: the parameter at which the adaptive weight is taken; None: that of `vae.decoder.conv_out`.
            has_decoder_term: False leaves the term of lambda_decoder out of this call, and its cost.

        Raises:
            ValueError: wrong shapes, or teacher and student have different numbers of latent channels.
            LossError: no discriminator where one takes part.
        """
        config = self.config
        if clips.dim() != 5:
            raise ValueError(
                f"clips have the shape {tuple(clips.shape)}: (B, 3, T, H, W) is needed; an image has T = 1"
            )
        posterior = vae.encode(clips).latent_dist
        latents = posterior.sample(rng) if config.sample_posterior else posterior.mode()
        logs: dict[str, Tensor] = {}
        total = clips.new_zeros((), dtype=torch.float32)
        reconstruction: Tensor | None = None
        if config.reconstruction_weight > 0 or config.perceptual_weight > 0 or config.is_adversarial(step):
            reconstruction = vae.decode(latents).sample
            term = self._pixel_term(reconstruction, clips, logs)
            total = total + term
            if config.is_adversarial(step):
                if config.adaptive_weight and last_layer is None:
                    last_layer = _last_layer(vae)
                total = total + self._adversarial_term(term, reconstruction, discriminator, last_layer, logs)
        if config.kl_weight > 0:
            total = total + self._kl_term(posterior, clips, logs)
        has_decoder_term = has_decoder_term and config.lambda_decoder > 0
        if has_decoder_term or config.lambda_encoder > 0 or config.compares_latents:
            self._check_channels(latents)
            targets = select_frames(clips, config.mapping, rng)
            drawn = self._draw_latents(latents.shape[2], rng).to(clips.device)
            image_latents: Tensor | None = None
            if has_decoder_term:
                total = total + self._decoder_term(latents, targets, drawn, logs)
            if config.lambda_encoder > 0:
                with torch.no_grad():
                    image_latents = self.teacher.encode_frames(targets)
                total = total + self._encoder_term(vae, clips, image_latents, logs)
            if config.compares_latents:
                if config.matching_mapping != config.mapping or config.mapping == "random":
                    image_latents = None
                total = total + self._latent_terms(posterior, clips, drawn, image_latents, rng, logs)
        logs["total"] = total.detach()
        return LossOutput(total, logs, reconstruction, latents)

    def discriminator(
        self, discriminator: nn.Module, clips: Tensor, reconstruction: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The hinge loss that the discriminator minimises; no gradient reaches the video VAE.

        Args:
            discriminator: as in `generator`.
            clips: (B, 3, T, H, W) in [-1, 1].
            reconstruction: the same shape.

        Returns:
            The loss, and it with the mean answers to real and to made clips, detached.
        """
        real, fake = discriminator(clips.detach()), discriminator(reconstruction.detach())
        loss = hinge_loss(real, fake)
        logs = {"discriminator": loss, "answer_real": real.float().mean(), "answer_fake": fake.float().mean()}
        return loss, {name: value.detach() for name, value in logs.items()}

    def _pixel_term(self, reconstruction: Tensor, clips: Tensor, logs: dict[str, Tensor]) -> Tensor:
        config = self.config
        term = clips.new_zeros((), dtype=torch.float32)
        if config.reconstruction_weight > 0:
            distance = _distance(reconstruction, clips, config.reconstruction)
            logs["reconstruction"] = distance.detach()
            term = term + config.reconstruction_weight * distance
        perceptual = self._frozen[1]
        if config.perceptual_weight > 0 and perceptual is not None:
            frames = (x.transpose(1, 2).flatten(0, 1) for x in (reconstruction, clips))
            perceived = perceptual(*frames).float().mean()
            logs["perceptual"] = perceived.detach()
            term = term + config.perceptual_weight * perceived
        return self._with_variance(term, "logvar", logs)

    def _kl_term(self, posterior: LatentDistribution, clips: Tensor, logs: dict[str, Tensor]) -> Tensor:
        divergence = kl_divergence(posterior)
        if self.config.kl_reduction == "mean":
            kl = divergence.mean()
            logs["kl"] = kl.detach()
            return self.config.kl_weight * kl
        kl = divergence.sum() / clips.shape[0]
        logs["kl"] = kl.detach()
        _, channels, _, height, width = clips.shape
        return self.config.kl_weight / (channels * height * width) * kl

    def _adversarial_term(
        self,
        pixel_term: Tensor,
        reconstruction: Tensor,
        discriminator: nn.Module | None,
        last_layer: Tensor | None,
        logs: dict[str, Tensor],
    ) -> Tensor:
        config = self.config
        if discriminator is None:
            raise LossError(
                f"adversarial_weight is {config.adversarial_weight} and the step is at or after adversarial_start_step "
                f"({config.adversarial_start_step}), but there is no discriminator: give one, or set the weight to 0"
            )
        answers: Tensor = discriminator(reconstruction)
        adversarial = -answers.float().mean()
        logs["adversarial"] = adversarial.detach()
        weight: float | Tensor = config.adversarial_weight
        if last_layer is not None and config.adaptive_weight:
            adapted = adaptive_weight(pixel_term, adversarial, last_layer)
            logs["adaptive_weight"] = adapted
            weight = config.adversarial_weight * adapted
        return weight * adversarial

    def _draw_latents(self, num_latents: int, rng: torch.Generator) -> Tensor:
        """The numbers of the latents that stand for all of them in the terms of the image VAE."""
        limit = self.config.regularised_latents
        if limit is None or limit >= num_latents:
            return torch.arange(num_latents)
        return torch.randperm(num_latents, generator=rng, device=rng.device)[:limit]

    def _decoder_term(self, latents: Tensor, targets: Tensor, drawn: Tensor, logs: dict[str, Tensor]) -> Tensor:
        """L_dec of the paper: || psi(X) - D_i(E_v(X)) ||^2; with "first" of latent 0 alone."""
        if self.config.mapping == "first":
            drawn = drawn[:1].new_zeros(1)
        decoded = self.teacher.decode_latents(latents[:, :, drawn])
        distance = _distance(decoded, targets[:, :, drawn], self.config.regularisation)
        logs["decoder"] = distance.detach()
        return self.config.lambda_decoder * self._with_variance(distance, "logvar_decoder", logs)

    def _encoder_term(self, vae: CVVAE, clips: Tensor, image_latents: Tensor, logs: dict[str, Tensor]) -> Tensor:
        """L_en of the paper: || X - D_v(E_i(psi(X))) ||^2.

        With "first" there is one image latent, which a video decoder turns into one frame: that is compared to frame 0.
        To ask for the whole clip would be to ask for motion that the latent cannot know of.
        """
        frames = vae.decode(image_latents).sample
        distance = _distance(frames, clips[:, :, : frames.shape[2]], self.config.regularisation)
        logs["encoder"] = distance.detach()
        return self.config.lambda_encoder * self._with_variance(distance, "logvar_encoder", logs)

    def _latent_terms(
        self,
        posterior: LatentDistribution,
        clips: Tensor,
        drawn: Tensor,
        image_latents: Tensor | None,
        rng: torch.Generator,
        logs: dict[str, Tensor],
    ) -> Tensor:
        """The posterior's means (what is stored) beside the image encoder's latents, which may be known."""
        config = self.config
        if config.matching_mapping == "first":
            drawn = drawn[:1].new_zeros(1)
        if image_latents is None:
            frames = select_frames(clips, config.matching_mapping, rng)
            with torch.no_grad():
                targets = self.teacher.encode_frames(frames[:, :, drawn])
        else:
            targets = image_latents[:, :, drawn]
        means = posterior.mean[:, :, drawn]
        term = clips.new_zeros((), dtype=torch.float32)
        if config.latent_matching_weight > 0:
            distance = _distance(means, targets, config.latent_matching)
            logs["latent_matching"] = distance.detach()
            term = term + config.latent_matching_weight * distance
        if config.latent_deviation_weight > 0:
            deviation = (0.5 * (_log_variance(means) - _log_variance(targets))).square().mean()
            logs["latent_deviation"] = deviation.detach()
            term = term + config.latent_deviation_weight * deviation
        return term

    def _with_variance(self, term: Tensor, name: str, logs: dict[str, Tensor]) -> Tensor:
        if not self.config.learned_variance:
            return term
        logvar = cast(Tensor, getattr(self, name))
        logs[name] = logvar.detach().clone()
        return term / logvar.exp() + logvar

    def _check_channels(self, latents: Tensor) -> None:
        if latents.shape[1] != self.teacher.latent_channels:
            raise ValueError(
                f"the video VAE has {latents.shape[1]} latent channels and the teacher {self.teacher.latent_channels}: "
                f"they must be equal to share a latent space; choose another teacher or another configuration"
            )


class VideoDiscriminator(nn.Module):
    """Judges patches of clips and images: (B, 3, T, H, W) in [-1, 1] -> (B, 1, T', H', W'), T' about T / 8, H' = H / 8.

    The published structure: a strided convolution, then residual blocks of 2, 4, 8 and 8 times the width, the first
    two followed by 2x2x2 pooling, before which an odd clip repeats its first frame; with 64 channels 28,292,737
    parameters (the published one has 722,304 more, in projections of a diffusion time that it never uses). 17x256x256
    becomes 3x32x32. Convolutions of one answer see 113 px and 113 frames; through GroupNorm it sees all.

    Weights start from N(0, 0.02). The paper inflates an image discriminator instead; no image discriminator
    of this structure exists to be inflated, as that of LDM is a plain stack of 4x4 convolutions.

    Source: CV-VAE, arXiv 2405.20279, and PatchGAN, arXiv 1611.07004.

    Args:
        num_channels: width of the first layer.
    """

    def __init__(self, num_channels: int = 64) -> None:
        super().__init__()
        self.conv_in = nn.Conv3d(3, num_channels, 3, stride=2, padding=1)
        layers: list[nn.Module] = []
        width = num_channels
        for multiplier, pools in ((2, True), (4, True), (8, False), (8, False)):
            layers.append(_DiscriminatorBlock(width, multiplier * num_channels))
            width = multiplier * num_channels
            layers += [_Halve()] if pools else []
            layers += [_group_norm(width), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers)
        self.conv_out = nn.Conv3d(width, 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, clips: Tensor) -> Tensor:
        answers: Tensor = self.conv_out(self.layers(F.leaky_relu(self.conv_in(clips), 0.2)))
        return answers


class _DiscriminatorBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))) in 3D, the shortcut a 1x1x1 convolution where widths differ."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _group_norm(in_channels)
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _group_norm(out_channels)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = self.shortcut(x) + h
        return out


class _Halve(nn.Module):
    """Averages 2x2x2 values, the first frame of an odd clip repeated: T -> ceil(T / 2)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 2:
            x = torch.cat([x[:, :, :1], x], dim=2)
        return F.avg_pool3d(x, 2)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels)


def _log_variance(latents: Tensor) -> Tensor:
    """Natural logarithm of each channel's variance over a batch: (B, C, t, h, w) -> (C,), float32, at least -18.4."""
    return (latents.float().var(dim=(0, 2, 3, 4), correction=0) + 1e-8).log()


def _distance(a: Tensor, b: Tensor, distance: Distance) -> Tensor:
    """Mean over all values, in float32.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"the shapes {tuple(a.shape)} and {tuple(b.shape)} are to be compared and differ: the sides of clips must "
            f"be multiples of 8, so that what is decoded has the size of what was encoded"
        )
    difference = a.float() - b.float()
    return difference.abs().mean() if distance == "l1" else difference.square().mean()


def _last_layer(vae: CVVAE) -> Tensor:
    layer: Any = getattr(vae.decoder, "conv_out", None)
    if layer is None:
        raise LossError(
            f"the decoder {type(vae.decoder).__name__} has no layer conv_out: give `last_layer`, the parameter at "
            f"which the adaptive weight is to be taken, or set adaptive_weight to false"
        )
    return cast(Tensor, layer.weight)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise LossError(f"{name} is {value!r}: allowed are {', '.join(allowed)}")
