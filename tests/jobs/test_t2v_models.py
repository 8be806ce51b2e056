"""Noise, targets and adapters: what a model is told and asked is what diffusers' own schedulers and classes take."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tuning import EMBEDDING_DIM, MODELS, model_config

from jobs.t2v_models import ADAPTERS, Adapter, Conditions, ImageUNet, TextUNet, VideoSettings, new_model
from jobs.t2v_noise import Process, process_of, scheduler_of

# diffusers' Euler scheduler asks numpy for an array in a way that torch's tensors do not know yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
LATENTS = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
NOISE = torch.randn(LATENTS.shape, generator=torch.Generator().manual_seed(2))


def model(folder: Path, kind: str, **changes: Any) -> tuple[Adapter, Any]:
    loaded = new_model(str(model_config(folder, kind, **changes)), seed=3)
    return loaded.adapter, loaded.model.eval()


def conditions(text_length: int = 4, padding: int = 0) -> Conditions:
    generator = torch.Generator().manual_seed(4)
    text = torch.randn(2, text_length, EMBEDDING_DIM, generator=generator)
    mask = torch.ones(2, text_length, dtype=torch.bool)
    return Conditions(
        text=torch.nn.functional.pad(text, (0, 0, 0, padding)),
        text_mask=torch.nn.functional.pad(mask, (0, padding)),
        image=torch.randn(2, 1, EMBEDDING_DIM, generator=generator),
        first_latent=torch.randn(2, 4, 8, 8, generator=generator),
        fps=torch.tensor([7.0, 2.0]),
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_an_ideal_model_of_numbered_steps_gives_the_latents_back(prediction: str) -> None:
    scheduler = scheduler_of(TextUNet.scheduler, prediction)
    noisy = process_of(scheduler).apply(LATENTS, NOISE, torch.tensor([0.3, 0.3]))
    assert noisy.timesteps.tolist() == [300, 300]
    scheduler.set_timesteps(1000)
    found = scheduler.step(noisy.target, 300, noisy.latents).pred_original_sample
    torch.testing.assert_close(found, LATENTS, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(noisy.latents, scheduler.add_noise(LATENTS, NOISE, noisy.timesteps))


def test_an_ideal_model_of_svd_gives_the_latents_back_at_every_step_of_its_scheduler() -> None:
    scheduler = scheduler_of(ImageUNet.scheduler, None)
    scheduler.set_timesteps(4)
    process = process_of(scheduler, log_sigma_mean=0.7, log_sigma_deviation=1.6)
    for index, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[index]
        level = torch.special.ndtr((sigma.double().log() - 0.7) / 1.6)
        if not 1e-6 < level < 1 - 1e-6:
            continue
        noisy = process.apply(LATENTS, NOISE, level.expand(2))
        torch.testing.assert_close(noisy.timesteps[0], timestep.to(noisy.timesteps.dtype), rtol=1e-3, atol=1e-3)
        unscaled = LATENTS + sigma * NOISE
        torch.testing.assert_close(noisy.latents, scheduler.scale_model_input(unscaled, timestep), rtol=1e-3, atol=1e-3)
        found = scheduler.step(noisy.target, timestep, unscaled).pred_original_sample
        torch.testing.assert_close(found, LATENTS, rtol=1e-2, atol=1e-2)


def test_flow_matching_is_told_and_asked_what_its_scheduler_has() -> None:
    scheduler = scheduler_of({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, None)
    noisy = process_of(scheduler, flow_levels="uniform").apply(LATENTS, NOISE, torch.tensor([0.5, 0.5]))
    share = 3.0 * 0.5 / (1 + 2.0 * 0.5)
    torch.testing.assert_close(noisy.timesteps, torch.tensor([1000 * share] * 2))
    torch.testing.assert_close(noisy.latents - share * noisy.target, LATENTS)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "edm"])
def test_weights_of_min_snr_are_those_of_its_paper(prediction: str) -> None:
    process: Process = process_of(scheduler_of(TextUNet.scheduler, prediction))
    snr = torch.tensor([0.5, 5.0, 50.0])
    divisor = snr if prediction == "epsilon" else snr + 1
    torch.testing.assert_close(process.weights(snr, 5.0), snr.clamp_max(5) / divisor)
    assert process.weights(snr, None).tolist() == [1, 1, 1]


def test_levels_are_shares_of_what_is_trained() -> None:
    process = process_of(scheduler_of(ImageUNet.scheduler, None), 0.7, 1.6)
    levels = torch.linspace(0.0005, 0.9995, 1000)
    log_sigma = 4 * process.apply(LATENTS[:1].expand(1000, -1, -1, -1, -1), NOISE[:1], levels).timesteps
    assert float(log_sigma.mean()) == pytest.approx(0.7, abs=0.01)
    assert float(log_sigma.std()) == pytest.approx(1.6, abs=0.02)


@pytest.mark.parametrize("kind", ["text", "transformer"])
def test_a_caption_says_the_same_whatever_it_is_padded_to(tmp_path: Path, kind: str) -> None:
    adapter, network = model(tmp_path, kind)
    timesteps = torch.tensor([10, 900])
    with torch.no_grad():
        plain = adapter.predict(network, LATENTS, timesteps, conditions())
        padded = adapter.predict(network, LATENTS, timesteps, conditions(padding=3))
    assert plain.shape == LATENTS.shape
    torch.testing.assert_close(plain, padded, rtol=1e-4, atol=1e-5)


def test_without_padding_the_text_model_says_what_diffusers_says(tmp_path: Path) -> None:
    adapter, network = model(tmp_path, "text")
    network.save_pretrained(tmp_path / "saved")
    original = diffusers.UNet3DConditionModel.from_pretrained(tmp_path / "saved").eval()
    told = conditions()
    with torch.no_grad():
        ours = adapter.predict(network, LATENTS, torch.tensor([10, 900]), told)
        theirs = original(LATENTS, torch.tensor([10, 900]), told.text).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_svd_gets_the_first_frame_beside_every_latent_and_its_three_numbers(tmp_path: Path) -> None:
    adapter, network = model(tmp_path, "image")
    adapter.settings = VideoSettings(motion_bucket=90, noise_aug=0.25)
    given: dict[str, Any] = {}

    def listening(*arguments: Any, **named: Any) -> Any:
        given.update(named, sample=arguments[0], timestep=arguments[1])
        return network(*arguments, **named)

    told = conditions()
    with torch.no_grad():
        said = adapter.predict(listening, LATENTS, torch.tensor([0.5, 1.0]), told)
    assert said.shape == LATENTS.shape
    assert given["added_time_ids"].tolist() == [[6.0, 90.0, 0.25], [1.0, 90.0, 0.25]]
    sample = given["sample"]
    assert sample.shape == (2, 3, 8, 8, 8)
    assert torch.equal(sample[:, :, :4], LATENTS.transpose(1, 2))
    assert all(torch.equal(sample[:, t, 4:], told.first_latent) for t in range(3))


def test_of_a_first_frame_embedding_and_latent_are_left_out_together() -> None:
    adapter = ImageUNet(VideoSettings(noise_aug=0.0))
    told = conditions()
    many = Conditions(image=told.image[:1].repeat(400, 1, 1), first_latent=told.first_latent[:1].repeat(400, 1, 1, 1))
    found = adapter.augment(many, 0.25, torch.Generator().manual_seed(0))
    image_out, latent_out = (x.flatten(1).abs().sum(1) == 0 for x in (found.image, found.first_latent))
    assert torch.equal(image_out, latent_out)
    assert 60 < int(image_out.sum()) < 140
    assert torch.equal(found.first_latent[~latent_out][0], told.first_latent[0])


def test_texts_of_two_batches_are_padded_to_the_longer_one() -> None:
    joined = conditions(text_length=4).joined(conditions(text_length=6))
    assert joined.text is not None
    assert joined.text_mask is not None
    assert joined.text.shape == (4, 6, EMBEDDING_DIM)
    assert joined.text_mask.sum(1).tolist() == [4, 4, 6, 6]


def test_guidance_of_svd_rises_from_the_first_frame_on() -> None:
    assert ImageUNet().guidance(3.0, 5).flatten().tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert math.isclose(float(TextUNet().guidance(6.0, 5)), 6.0)


def test_every_adapter_names_layers_and_a_scheduler_that_diffusers_has(tmp_path: Path) -> None:
    assert {config["_class_name"] for config in MODELS.values()} == set(ADAPTERS)
    for kind in MODELS:
        adapter, network = model(tmp_path / kind, kind)
        names = [name for name, _ in network.named_parameters()]
        for layer in (adapter.first, adapter.last):
            assert f"{layer}.weight" in names
        assert scheduler_of(adapter.scheduler, None).config.num_train_timesteps == 1000
        assert hasattr(diffusers, adapter.pipeline_class)
