"""The objective: what every term compares, whom its gradients reach, and that a term of weight 0 costs nothing."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cvvae import CVVAE, CVVAEConfig
from cvvae.losses import (
    LPIPS,
    LossConfig,
    LossError,
    LossOutput,
    VAELoss,
    VideoDiscriminator,
    adaptive_weight,
    hinge_loss,
    kl_divergence,
    load_perceptual,
    select_frames,
)
from cvvae.model import EncoderOutput, LatentDistribution
from cvvae.teachers import FrozenTeacher, TinyImageVAE

OFF = LossConfig(reconstruction_weight=0, perceptual_weight=0, kl_weight=0, adversarial_weight=0, lambda_decoder=0)
"""No term at all; tests turn on what they are about."""


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    with torch.enable_grad():
        yield


def only(**fields: Any) -> LossConfig:
    return dataclasses.replace(OFF, **fields)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def student() -> CVVAE:
    torch.manual_seed(1)
    config = CVVAEConfig(
        class_name="CVVAESD3Model",
        latent_channels=4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    return CVVAE(config)


class CountingTeacher(TinyImageVAE):
    """A tiny image VAE that writes down how many images each call got."""

    def __init__(self) -> None:
        torch.manual_seed(2)
        super().__init__(4, width=8)
        self.encoded: list[int] = []
        self.decoded: list[int] = []

    def encode(self, pixels: Tensor) -> Tensor:
        self.encoded.append(len(pixels))
        return super().encode(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded.append(len(latents))
        return super().decode(latents)


@pytest.fixture
def counted() -> CountingTeacher:
    return CountingTeacher()


@pytest.fixture
def clips() -> Tensor:
    return torch.rand(2, 3, 9, 16, 16, generator=seeded(7)) * 2 - 1


def run(config: LossConfig, student: Any, clips: Tensor, teacher: Any = None, **given: Any) -> LossOutput:
    frozen = None if teacher is None else FrozenTeacher(teacher)
    perceptual = given.pop("perceptual", None)
    step, rng = given.pop("step", 1), given.pop("rng", seeded())
    return VAELoss(config, frozen, perceptual).generator(student, clips, step=step, rng=rng, **given)


def numbered(num_clips: int, num_groups: int) -> Tensor:
    """Every pixel of frame t of clip b is 1000 b + t."""
    frames = torch.arange(1.0 + 4 * num_groups)
    clips = 1000.0 * torch.arange(num_clips)[:, None] + frames
    return clips[:, None, :, None, None].expand(-1, 3, -1, 2, 2)


class TestSelectFrames:
    @settings(deadline=None)
    @given(num_clips=st.integers(1, 3), num_groups=st.integers(0, 5), seed=st.integers(0, 99))
    def test_every_mapping_picks_what_it_promises(self, num_clips: int, num_groups: int, seed: int) -> None:
        clips = numbered(num_clips, num_groups)
        picked = {name: select_frames(clips, name, seeded(seed)) for name in ("first", "slice", "average", "random")}
        assert picked.pop("first").equal(clips[:, :, :1])
        for name, frames in picked.items():
            assert frames.shape == (num_clips, 3, 1 + num_groups, 2, 2)
            assert frames[:, :, 0].equal(clips[:, :, 0])
            for b in range(num_clips):
                for j in range(1, num_groups + 1):
                    (number,) = frames[b, :, j].unique().tolist()
                    group = [1000 * b + t for t in range(4 * j - 3, 4 * j + 1)]
                    wanted = {"slice": group[-1:], "average": [sum(group) / 4], "random": group}[name]
                    assert number in wanted

    def test_random_draws_every_member_of_every_group_for_each_clip_by_itself(self) -> None:
        clips, rng = numbered(2, 2), seeded()
        draws = [select_frames(clips, "random", rng)[:, 0, :, 0, 0] for _ in range(100)]
        members = torch.stack(draws)
        for b in range(2):
            for j in (1, 2):
                assert members[:, b, j].unique().tolist() == [1000 * b + t for t in range(4 * j - 3, 4 * j + 1)]
        offsets = torch.stack([(members[:, b, j] - 1000 * b - 4 * j) for b in range(2) for j in (1, 2)], dim=1)
        assert (offsets != offsets[:, :1]).any(dim=0).tolist() == [False, True, True, True]

    def test_the_same_generator_picks_the_same_frames(self) -> None:
        clips = numbered(3, 4)
        assert select_frames(clips, "random", seeded(5)).equal(select_frames(clips, "random", seeded(5)))

    def test_the_average_passes_gradients_and_keeps_the_type(self) -> None:
        clips = numbered(1, 1).to(torch.bfloat16).requires_grad_()
        frames = select_frames(clips, "average", seeded())
        frames.sum().backward()
        assert frames.dtype == torch.bfloat16
        assert clips.grad is not None
        assert clips.grad[0, 0, :, 0, 0].tolist() == [1, 0.25, 0.25, 0.25, 0.25]

    @pytest.mark.parametrize("num_frames", [0, 2, 4, 16])
    def test_a_clip_that_has_no_whole_groups_is_refused(self, num_frames: int) -> None:
        with pytest.raises(ValueError, match="1 \\+ 4 k"):
            select_frames(torch.zeros(1, 3, num_frames, 2, 2), "slice", seeded())

    def test_an_unknown_mapping_is_refused(self) -> None:
        with pytest.raises(ValueError, match="allowed are first, slice, average, random"):
            select_frames(numbered(1, 1), "median", seeded())  # type: ignore[arg-type]


class TestFormulas:
    @settings(deadline=None)
    @given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-8, 3)), min_size=1, max_size=8))
    def test_kl_is_the_divergence_that_torch_computes(self, values: list[tuple[float, float]]) -> None:
        mean, logvar = torch.tensor(values, dtype=torch.float64).T
        gaussian = torch.distributions.Normal(mean, (0.5 * logvar).exp())
        wanted = torch.distributions.kl_divergence(gaussian, torch.distributions.Normal(0.0, 1.0))
        moments = torch.stack([mean, logvar]).view(1, 2, -1, 1, 1)
        found = kl_divergence(LatentDistribution(moments)).flatten()
        torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-5)

    @settings(deadline=None)
    @given(st.lists(st.floats(-3, 3), min_size=1, max_size=6), st.lists(st.floats(-3, 3), min_size=1, max_size=6))
    def test_hinge_is_its_definition(self, real: list[float], fake: list[float]) -> None:
        wanted = 0.5 * sum(max(0, 1 - x) for x in real) / len(real) + 0.5 * sum(max(0, 1 + x) for x in fake) / len(fake)
        assert hinge_loss(torch.tensor(real), torch.tensor(fake)).item() == pytest.approx(wanted, abs=1e-5)

    def test_the_adaptive_weight_of_a_case_computed_by_hand(self) -> None:
        w = torch.tensor([2.0, 3.0], requires_grad=True)
        reconstruction, adversarial = 3 * w[0] + 4 * w[1], -6 * w[0] + 8 * w[1]
        assert adaptive_weight(reconstruction, adversarial, w).item() == pytest.approx(5 / (10 + 1e-4))
        assert w.grad is None

    def test_the_adaptive_weight_has_a_limit(self) -> None:
        w = torch.tensor([2.0], requires_grad=True)
        assert adaptive_weight(5 * w.sum(), 0 * w.sum(), w).item() == 1e4

    @pytest.mark.parametrize(
        ("reduction", "scale"), [("clip", 1 / 2 / (3 * 16 * 16)), ("mean", 1 / (2 * 4 * 3 * 2 * 2))]
    )
    def test_kl_is_weighed_as_its_reduction_says(
        self, student: CVVAE, clips: Tensor, reduction: Any, scale: float
    ) -> None:
        out = run(only(kl_weight=0.5, kl_reduction=reduction), student, clips)
        with torch.no_grad():
            summed = kl_divergence(student.encode(clips).latent_dist).sum()
        assert out.total.item() == pytest.approx(0.5 * scale * summed.item(), rel=1e-4)
        assert out.logs["kl"].item() == pytest.approx(
            (summed * (0.5 if reduction == "clip" else scale)).item(), rel=1e-4
        )

    @pytest.mark.parametrize(("kind", "distance"), [("l1", F.l1_loss), ("l2", F.mse_loss)])
    def test_reconstruction_is_the_mean_distance_to_the_clip(
        self, student: CVVAE, clips: Tensor, kind: Any, distance: Any
    ) -> None:
        out = run(only(reconstruction=kind, reconstruction_weight=2, sample_posterior=False), student, clips)
        torch.testing.assert_close(out.reconstruction, student(clips))
        torch.testing.assert_close(out.total, 2 * distance(student(clips), clips))

    def test_any_callable_serves_as_perceptual_distance_of_every_frame(self, student: CVVAE, clips: Tensor) -> None:
        seen = []

        def perceptual(a: Tensor, b: Tensor) -> Tensor:
            seen.append((a.shape, b))
            return (a - b).abs().mean(dim=(1, 2, 3))

        out = run(only(perceptual_weight=0.5), student, clips, perceptual=perceptual)
        ((shape, frames),) = seen
        assert shape == (18, 3, 16, 16)
        assert frames[9].equal(clips[1, :, 0])
        assert out.reconstruction is not None
        torch.testing.assert_close(out.total, 0.5 * F.l1_loss(out.reconstruction, clips))

    def test_learned_variances_scale_each_reconstruction_term(
        self, student: CVVAE, clips: Tensor, counted: CountingTeacher
    ) -> None:
        config = only(reconstruction_weight=1, lambda_decoder=1, learned_variance=True)
        loss = VAELoss(config, FrozenTeacher(counted))
        assert {name for name, _ in loss.named_parameters()} == {"logvar", "logvar_decoder"}
        with torch.no_grad():
            loss.logvar.fill_(0.5)
        out = loss.generator(student, clips, step=1, rng=seeded())
        r, r_decoder = out.logs["reconstruction"], out.logs["decoder"]
        torch.testing.assert_close(out.total, r / torch.tensor(0.5).exp() + 0.5 + r_decoder)
        out.total.backward()
        torch.testing.assert_close(loss.logvar.grad, 1 - r * torch.tensor(-0.5).exp())
        assert loss.logvar_decoder is not None
        torch.testing.assert_close(loss.logvar_decoder.grad, 1 - r_decoder)


class KeyFrames(nn.Module):
    """A student that is compatible from the start: a latent is the last frame of its group, 8x smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def encode(self, clips: Tensor) -> SimpleNamespace:
        mean = self.gain * F.avg_pool3d(clips[:, :, ::4], (1, 8, 8))
        return SimpleNamespace(latent_dist=LatentDistribution(torch.cat([mean, torch.zeros_like(mean)], dim=1)))

    def decode(self, latents: Tensor) -> SimpleNamespace:
        frames = F.interpolate(latents, scale_factor=(1, 8, 8)).repeat_interleave(4, dim=2)[:, :, 3:]
        return SimpleNamespace(sample=self.gain * frames)


class Shrink:
    """The image VAE that goes with it."""

    latent_channels, pixel_range, scaling_factor, shift_factor = 3, (-1.0, 1.0), 1.0, 0.0

    def encode(self, pixels: Tensor) -> Tensor:
        return F.avg_pool2d(pixels, 8)

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents, scale_factor=8.0)


class TestRegularisation:
    @pytest.mark.parametrize("regularised_latents", [None, 1, 2, 5])
    def test_a_compatible_student_has_no_decoder_loss_whichever_latents_are_drawn(
        self, regularised_latents: int | None
    ) -> None:
        clips = F.interpolate(torch.rand(2, 3, 17, 2, 2, generator=seeded()), scale_factor=(1, 8, 8))
        config = only(
            lambda_decoder=1, mapping="slice", regularised_latents=regularised_latents, sample_posterior=False
        )
        for seed in range(5):
            assert run(config, KeyFrames(), clips, Shrink(), rng=seeded(seed)).total.item() < 1e-12

    def test_every_latent_is_drawn_at_some_time(self) -> None:
        class Note(Shrink):
            def decode(self, latents: Tensor) -> Tensor:
                drawn.add(round(latents.mean().item()))
                return super().decode(latents)

        drawn: set[int] = set()
        frames = torch.arange(17.0)[:, None, None].expand(1, 3, 17, 8, 8)
        config = only(lambda_decoder=1, mapping="slice", regularised_latents=1, sample_posterior=False)
        rng = seeded()
        for _ in range(60):
            run(config, KeyFrames(), frames, Note(), rng=rng)
        assert drawn == {0, 4, 8, 12, 16}

    def test_the_decoder_term_is_the_distance_of_decoded_latents_to_the_frames_of_the_mapping(
        self, student: CVVAE, clips: Tensor, counted: CountingTeacher
    ) -> None:
        config = only(lambda_decoder=3, mapping="average", sample_posterior=False)
        out = run(config, student, clips, counted)
        images = FrozenTeacher(counted).decode_latents(out.latents)
        wanted = F.mse_loss(images, select_frames(clips, "average", seeded()))
        torch.testing.assert_close(out.logs["decoder"], wanted.detach())
        torch.testing.assert_close(out.total, 3 * wanted)

    def test_the_encoder_term_is_the_distance_of_decoded_image_latents_to_the_clip(
        self, student: CVVAE, clips: Tensor, counted: CountingTeacher
    ) -> None:
        out = run(only(lambda_encoder=2, mapping="slice", regularisation="l1"), student, clips, counted)
        frames = student.decode(FrozenTeacher(counted).encode_frames(clips[:, :, ::4])).sample
        torch.testing.assert_close(out.total, 2 * F.l1_loss(frames, clips))

    def test_with_the_first_frame_only_both_terms_are_about_frame_0(
        self, student: CVVAE, clips: Tensor, counted: CountingTeacher
    ) -> None:
        config = only(lambda_decoder=1, lambda_encoder=1, mapping="first", sample_posterior=False)
        out = run(config, student, clips, counted)
        assert (counted.encoded, counted.decoded) == ([2], [2])
        teacher = FrozenTeacher(counted)
        image = teacher.decode_latents(out.latents[:, :, :1])
        frame = student.decode(teacher.encode_frames(clips[:, :, :1])).sample
        torch.testing.assert_close(out.total, F.mse_loss(image, clips[:, :, :1]) + F.mse_loss(frame, clips[:, :, :1]))

    def test_images_are_clips_of_one_frame(self, student: CVVAE, clips: Tensor, counted: CountingTeacher) -> None:
        config = only(reconstruction_weight=1, lambda_decoder=1, lambda_encoder=1, latent_matching_weight=1)
        out = run(config, student, clips[:, :, :1], counted)
        assert out.reconstruction is not None
        assert out.reconstruction.shape == (2, 3, 1, 16, 16)
        assert out.total.isfinite()

    def test_a_matched_latent_is_the_posterior_mean_against_the_teachers(
        self, student: CVVAE, clips: Tensor, counted: CountingTeacher
    ) -> None:
        out = run(only(latent_matching_weight=2, latent_matching="l2"), student, clips, counted)
        mean = student.encode(clips).latent_dist.mean
        wanted = FrozenTeacher(counted).encode_frames(clips[:, :, ::4])
        torch.testing.assert_close(out.total, 2 * F.mse_loss(mean, wanted))
        assert out.reconstruction is None

    def test_the_deviation_term_is_the_squared_log_ratio_of_deviations_channel_by_channel(
        self, student: CVVAE, clips: Tensor, counted: CountingTeacher
    ) -> None:
        out = run(only(latent_deviation_weight=3), student, clips, counted)
        assert (counted.encoded, out.reconstruction) == ([6], None)
        mean = student.encode(clips).latent_dist.mean
        images = FrozenTeacher(counted).encode_frames(clips[:, :, ::4])
        ratios = [mean[:, c].std(correction=0) / images[:, c].std(correction=0) for c in range(4)]
        wanted = 3 * torch.stack(ratios).log().square().mean()
        torch.testing.assert_close(out.total, wanted, rtol=1e-3, atol=0)
        assert wanted > 0.01

    def test_the_deviation_term_pulls_shrunken_latents_apart_and_leaves_equal_ones_alone(
        self, student: CVVAE, clips: Tensor, counted: CountingTeacher
    ) -> None:
        images = FrozenTeacher(counted).encode_frames(clips[:, :, ::4])
        slopes = []
        for scale in (0.5, 1.0, 2.0):
            factor = torch.tensor(scale, requires_grad=True)
            moments = torch.cat([images * factor, torch.zeros_like(images)], dim=1)
            encoder = SimpleNamespace(encode=lambda _, m=moments: EncoderOutput(LatentDistribution(m)))
            run(only(latent_deviation_weight=1), encoder, clips, counted).total.backward()  # type: ignore[arg-type]
            assert factor.grad is not None
            slopes.append(float(factor.grad))
        assert slopes[0] < -0.5
        assert abs(slopes[1]) < 1e-5
        assert slopes[2] > 0.3

    def test_the_image_decoder_teaches_the_encoder_and_nobody_else(
        self, student: CVVAE, clips: Tensor, counted: CountingTeacher
    ) -> None:
        run(only(lambda_decoder=1), student, clips, counted).total.backward()
        moved = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
        assert moved == {name for name, _ in student.named_parameters() if name.startswith("encoder.")}
        assert student.encoder.conv_in.weight.grad is not None
        assert student.encoder.conv_in.weight.grad.abs().sum() > 0
        assert all(parameter.grad is None for parameter in counted.parameters())

    def test_the_image_encoder_teaches_the_decoder_and_nobody_else(
        self, student: CVVAE, clips: Tensor, counted: CountingTeacher
    ) -> None:
        run(only(lambda_encoder=1), student, clips, counted).total.backward()
        moved = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
        assert moved == {name for name, _ in student.named_parameters() if name.startswith("decoder.")}
        assert all(parameter.grad is None for parameter in counted.parameters())

    def test_a_teacher_of_another_width_is_refused(self, student: CVVAE, clips: Tensor) -> None:
        for config in (only(lambda_decoder=1), only(latent_matching_weight=1)):
            with pytest.raises(ValueError, match="4 latent channels and the teacher 16"):
                run(config, student, clips, TinyImageVAE(16, width=8))


class TestCost:
    def test_terms_of_weight_zero_ask_nobody(self, student: CVVAE, clips: Tensor, counted: CountingTeacher) -> None:
        def refuse(*_: Tensor) -> Tensor:
            raise AssertionError("was asked")

        discriminator = nn.Module()
        discriminator.forward = refuse  # type: ignore[assignment, method-assign]
        out = run(
            only(reconstruction_weight=1), student, clips, counted, perceptual=refuse, discriminator=discriminator
        )
        assert (counted.encoded, counted.decoded) == ([], [])
        assert set(out.logs) == {"reconstruction", "total"}

    @pytest.mark.parametrize(
        ("config", "encoded", "decoded"),
        [
            (only(lambda_decoder=1), [], [6]),
            (only(lambda_decoder=1, regularised_latents=1), [], [2]),
            (only(lambda_encoder=1), [6], []),
            (only(latent_matching_weight=1), [6], []),
            (only(latent_matching_weight=1, latent_deviation_weight=1, regularised_latents=1), [2], []),
            (only(latent_matching_weight=1, matching_mapping="first"), [2], []),
        ],
    )
    def test_the_teacher_sees_no_more_images_than_a_term_needs(
        self,
        student: CVVAE,
        clips: Tensor,
        counted: CountingTeacher,
        config: LossConfig,
        encoded: list[int],
        decoded: list[int],
    ) -> None:
        run(config, student, clips, counted)
        assert (counted.encoded, counted.decoded) == (encoded, decoded)

    def test_the_discriminator_waits_for_its_step(self, student: CVVAE, clips: Tensor) -> None:
        config = only(reconstruction_weight=1, adversarial_weight=0.5, adversarial_start_step=10)
        assert not config.is_adversarial(9)
        assert config.is_adversarial(10)
        assert "adversarial" not in run(config, student, clips, step=9).logs
        with pytest.raises(LossError, match="there is no discriminator"):
            run(config, student, clips, step=10)


class TestAdversarial:
    def test_the_generators_term_is_the_answer_times_the_adaptive_weight(self, student: CVVAE, clips: Tensor) -> None:
        discriminator = VideoDiscriminator(4)
        config = only(reconstruction_weight=1, adversarial_weight=0.5, sample_posterior=False)
        out = run(config, student, clips, discriminator=discriminator)
        logs = out.logs
        assert out.reconstruction is not None
        torch.testing.assert_close(logs["adversarial"], -discriminator(out.reconstruction).mean().detach())
        gradients = [
            torch.autograd.grad(term, student.decoder.conv_out.weight)[0].norm()
            for term in (F.l1_loss(student(clips), clips), -discriminator(student(clips)).mean())
        ]
        torch.testing.assert_close(logs["adaptive_weight"], gradients[0] / (gradients[1] + 1e-4), rtol=1e-3, atol=0)
        wanted = logs["reconstruction"] + 0.5 * logs["adaptive_weight"] * logs["adversarial"]
        torch.testing.assert_close(logs["total"], wanted)
        out.total.backward()
        plain = run(dataclasses.replace(config, adaptive_weight=False), student, clips, discriminator=discriminator)
        torch.testing.assert_close(plain.total.detach(), logs["reconstruction"] + 0.5 * logs["adversarial"])

    def test_the_discriminators_loss_reaches_the_discriminator_only(self, student: CVVAE, clips: Tensor) -> None:
        discriminator, loss = VideoDiscriminator(4), VAELoss(only(adversarial_weight=1, adaptive_weight=False))
        reconstruction = student(clips)
        total, logs = loss.discriminator(discriminator, clips, reconstruction)
        torch.testing.assert_close(total, hinge_loss(discriminator(clips), discriminator(reconstruction)))
        total.backward()
        assert all(parameter.grad is not None for parameter in discriminator.parameters())
        assert all(parameter.grad is None for parameter in student.parameters())
        assert set(logs) == {"discriminator", "answer_real", "answer_fake"}
        assert not any(value.requires_grad for value in logs.values())

    def test_a_decoder_without_a_known_last_layer_has_to_be_told(self, clips: Tensor) -> None:
        student: Any = KeyFrames()
        student.decoder = nn.Identity()
        config = only(reconstruction_weight=1, adversarial_weight=1)
        with pytest.raises(LossError, match="Identity has no layer conv_out: give `last_layer`"):
            run(config, student, clips, discriminator=VideoDiscriminator(4))
        out = run(config, student, clips, discriminator=VideoDiscriminator(4), last_layer=student.gain)
        assert out.logs["adaptive_weight"] > 0


class TestVideoDiscriminator:
    @pytest.mark.parametrize(("num_frames", "num_answers"), [(1, 1), (9, 2), (17, 3)])
    def test_it_answers_clips_and_images_in_patches(self, num_frames: int, num_answers: int) -> None:
        answers = VideoDiscriminator(4)(torch.zeros(2, 3, num_frames, 32, 48))
        assert answers.shape == (2, 1, num_answers, 4, 6)

    def test_at_full_width_it_has_the_published_parameters_but_for_the_unused_ones(self) -> None:
        with torch.device("meta"):
            discriminator = VideoDiscriminator()
        assert sum(parameter.numel() for parameter in discriminator.parameters()) == 29_015_041 - 722_304

    def test_it_starts_from_narrow_normal_weights(self) -> None:
        weights = torch.cat([m.weight.flatten() for m in VideoDiscriminator(16).modules() if isinstance(m, nn.Conv3d)])
        assert weights.std().item() == pytest.approx(0.02, rel=0.02)
        assert abs(weights.mean().item()) < 1e-3

    def test_the_convolutions_of_one_answer_see_113_pixels(self) -> None:
        torch.manual_seed(0)
        discriminator = VideoDiscriminator(4)
        for module in list(discriminator.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.GroupNorm):
                    setattr(module, name, nn.Identity())
        image = torch.randn(1, 3, 1, 192, 192, requires_grad=True)
        discriminator(image)[0, 0, 0, 12, 12].backward()
        assert image.grad is not None
        seen = image.grad.abs().sum(dim=(0, 1, 2))
        for dim in (0, 1):
            (touched,) = seen.sum(dim=dim).nonzero(as_tuple=True)
            assert touched.max() - touched.min() + 1 == 113


class TestWhole:
    def full(self) -> LossConfig:
        return LossConfig(lambda_encoder=0.5, latent_matching_weight=0.1, regularised_latents=2, kl_weight=1e-3)

    def perceptual(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean(dim=(1, 2, 3))

    def test_all_terms_add_up_and_are_logged(self, student: CVVAE, clips: Tensor, counted: CountingTeacher) -> None:
        torch.manual_seed(3)
        out = run(self.full(), student, clips, counted, perceptual=self.perceptual, discriminator=VideoDiscriminator(4))
        logs = out.logs
        assert all(value.dim() == 0 and value.dtype == torch.float32 for value in logs.values())
        assert not any(value.requires_grad for value in logs.values())
        wanted = (
            logs["reconstruction"]
            + 0.5 * logs["perceptual"]
            + 0.5 * logs["adaptive_weight"] * logs["adversarial"]
            + 1e-3 / (3 * 16 * 16) * logs["kl"]
            + logs["decoder"]
            + 0.5 * logs["encoder"]
            + 0.1 * logs["latent_matching"]
        )
        torch.testing.assert_close(logs["total"], wanted)
        out.total.backward()
        assert all(parameter.grad is not None for parameter in student.parameters())

    def test_the_same_generator_gives_the_same_bits(
        self, student: CVVAE, clips: Tensor, counted: CountingTeacher
    ) -> None:
        config = only(reconstruction_weight=1, lambda_decoder=1, regularised_latents=1)
        totals = [run(config, student, clips, counted, rng=seeded(seed)).total.item() for seed in (4, 4, 5)]
        assert totals[0] == totals[1] != totals[2]

    def test_under_autocast_terms_are_still_reduced_in_float32(
        self, student: CVVAE, clips: Tensor, counted: CountingTeacher
    ) -> None:
        config = only(
            reconstruction_weight=1, kl_weight=1e-3, lambda_decoder=1, latent_matching_weight=1, sample_posterior=False
        )
        wanted = run(config, student, clips, counted)
        with torch.autocast("cpu", torch.bfloat16):
            out = run(config, student, clips, counted)
        assert all(value.dtype == torch.float32 for value in out.logs.values())
        torch.testing.assert_close(out.total, wanted.total, rtol=0.05, atol=0)
        out.total.backward()
        assert all(parameter.grad is not None for parameter in student.parameters())

    def test_teacher_and_perceptual_move_with_the_loss_but_are_not_saved_with_it(self) -> None:
        teacher, perceptual = FrozenTeacher(TinyImageVAE(4, width=8)), LPIPS(nn.Conv2d(3, 1, 8))
        loss = VAELoss(LossConfig(learned_variance=True), teacher, perceptual).to(torch.float64)
        assert set(loss.state_dict()) == {"logvar", "logvar_decoder"}
        assert {p.dtype for part in (loss, teacher, perceptual) for p in part.parameters()} == {torch.float64}
        assert len(list(loss.parameters())) == 2

    def test_the_published_preset_is_the_published_code(self) -> None:
        config = LossConfig.published()
        assert (config.regularisation, config.reconstruction, config.learned_variance) == ("l1", "l1", True)
        assert (config.kl_weight, config.perceptual_weight, config.lambda_decoder) == (1.0, 0.5, 1.0)

    def test_frames_that_come_back_with_another_size_are_refused(self, student: CVVAE) -> None:
        with pytest.raises(ValueError, match="must be multiples of 8"):
            run(only(reconstruction_weight=1), student, torch.zeros(1, 3, 1, 20, 16))
        with pytest.raises(ValueError, match="an image has T = 1"):
            run(only(reconstruction_weight=1), student, torch.zeros(1, 3, 16, 16))


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"mapping": "last"}, "mapping is 'last': allowed are first, slice, average, random"),
            ({"matching_mapping": "last"}, "matching_mapping is 'last'"),
            ({"reconstruction": "l3"}, "reconstruction is 'l3': allowed are l1, l2"),
            ({"regularisation": "l3"}, "regularisation is 'l3'"),
            ({"latent_matching": "l3"}, "latent_matching is 'l3'"),
            ({"kl_reduction": "sum"}, "kl_reduction is 'sum': allowed are clip, mean"),
            ({"lambda_decoder": -1.0}, "lambda_decoder is -1.0"),
            ({"kl_weight": float("nan")}, "kl_weight is nan"),
            ({"regularised_latents": 0}, "regularised_latents is 0"),
            ({"reconstruction_weight": 0.0, "perceptual_weight": 0.0}, "no gradient to adapt to"),
        ],
    )
    def test_a_value_out_of_range_is_refused(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(LossError, match=message):
            LossConfig(**fields)

    @pytest.mark.parametrize(
        "name", ["lambda_decoder", "lambda_encoder", "latent_matching_weight", "latent_deviation_weight"]
    )
    def test_a_term_that_needs_the_teacher_says_so(self, name: str) -> None:
        with pytest.raises(LossError, match="there is no teacher"):
            VAELoss(only(**{name: 1.0}))

    def test_a_perceptual_weight_without_a_distance_says_so(self) -> None:
        with pytest.raises(LossError, match="there is no perceptual distance"):
            VAELoss(only(perceptual_weight=1.0))

    def test_no_perceptual_distance_is_none_and_others_are_unknown(self) -> None:
        assert load_perceptual(None) is None
        with pytest.raises(LossError, match="perceptual is 'vgg': allowed are lpips"):
            load_perceptual("vgg")

    @pytest.mark.skipif(importlib.util.find_spec("lpips") is not None, reason="the package lpips is installed")
    def test_without_the_package_lpips_says_how_to_get_it(self) -> None:
        with pytest.raises(LossError, match=r"pip install lpips"):
            load_perceptual("lpips")

    def test_a_network_with_dropout_never_goes_back_to_training(self) -> None:
        perceptual = LPIPS(nn.Sequential(nn.Dropout(), nn.Conv2d(3, 1, 8)))
        nn.ModuleList([perceptual]).train()
        assert not any(module.training for module in perceptual.modules())
        assert not any(parameter.requires_grad for parameter in perceptual.parameters())
