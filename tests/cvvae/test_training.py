"""The trainer: what learns in a stage, at which rate, and that a saved state goes on to the bit."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import cvvae
from cvvae.losses import LossConfig, LossError
from cvvae.teachers import FrozenTeacher, TinyImageVAE
from cvvae.training import (
    DivergedError,
    Stage,
    Trainer,
    TrainerConfig,
    TrainingError,
    from_mapping,
    load_optimizer_state,
)

PUBLISHED = {"_class_name": "CVVAEModel", "z_channels": 4, "ch": 8, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}
PLAIN = LossConfig(perceptual_weight=0, adversarial_weight=0, lambda_decoder=0)
MATCHING = LossConfig(
    reconstruction_weight=0,
    perceptual_weight=0,
    kl_weight=0,
    adversarial_weight=0,
    lambda_decoder=0,
    latent_matching_weight=1,
)
FULL = LossConfig(perceptual_weight=0, adversarial_start_step=1, regularised_latents=1)
SMALL = TrainerConfig(seed=3, discriminator_channels=8)
Losses = list[dict[str, float]]


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    with torch.enable_grad():
        yield


def model(**fields: Any) -> cvvae.CVVAE:
    torch.manual_seed(1)
    return cvvae.CVVAE(cvvae.CVVAEConfig.from_published({**PUBLISHED, "norm": "frame", "norm_num_groups": 4, **fields}))


def teacher() -> FrozenTeacher:
    torch.manual_seed(2)
    return FrozenTeacher(TinyImageVAE(4, width=8))


def batch(step: int, size: int = 16) -> Tensor:
    shape = (1, 3, 1, size, size) if step % 3 == 2 else (1, 3, 5, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(step))


def trainer(stages: Sequence[Stage], config: TrainerConfig = SMALL, **options: Any) -> Trainer:
    return Trainer(model(), stages, config, teacher=teacher(), **options)


def run(trained: Trainer, until: int | None = None) -> Losses:
    losses = []
    while trained.step < (trained.num_steps if until is None else until):
        report = trained.train_step(batch(trained.step))
        losses.append({name: float(value) for name, value in report.losses.items()})
    return losses


def weights(trained: Trainer, part: str = "vae") -> dict[str, Tensor]:
    return {name: value.clone() for name, value in getattr(trained, part).state_dict().items()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    return {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}


def saved(trained: Trainer) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(trained.state_dict(), buffer)
    buffer.seek(0)
    state: dict[str, Any] = torch.load(buffer, weights_only=True)
    return state


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("turn", ["every_batch", "every_other_batch"])
@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_saved_state_goes_on_to_the_bit(cut: int, turn: str, optimizer: str) -> None:
    stages = [
        Stage(steps=2, lr=1e-3, freeze="decoder", loss=MATCHING),
        Stage(steps=5, lr=1e-3, warmup_steps=2, lr_factors={"encoder": 0.1}, loss=FULL),
    ]
    config = TrainerConfig(
        seed=3,
        discriminator_channels=8,
        discriminator_turn=turn,  # type: ignore[arg-type]
        optimizer=optimizer,  # type: ignore[arg-type]
    )
    undisturbed = trainer(stages, config)
    losses = run(undisturbed)
    assert "discriminator" in losses[-1] or turn == "every_other_batch"
    first = trainer(stages, config)
    before = run(first, until=cut)
    second = trainer(stages, config)
    torch.manual_seed(cut)
    second.load_state_dict(saved(first))
    assert before + run(second) == losses
    for part in ("vae", "ema", "discriminator"):
        assert not changed(weights(second, part), weights(undisturbed, part))


def test_muon_makes_every_direction_of_an_update_about_equally_long_and_adamw_moves_the_rest() -> None:
    moves = {}
    for optimizer in ("adamw", "muon"):
        config = TrainerConfig(optimizer=optimizer, weight_decay=0)  # type: ignore[arg-type]
        trained = trainer([Stage(steps=1, lr=1e-3, schedule="constant", loss=PLAIN)], config)
        before = weights(trained)
        run(trained)
        moves[optimizer] = {name: after - before[name] for name, after in weights(trained).items()}
    kernel, bias = "decoder.levels.1.blocks.0.conv1.weight", "decoder.levels.1.blocks.0.conv1.bias"
    singular = torch.linalg.svdvals(moves["muon"][kernel].flatten(1)) / (0.2e-3 * (8 * 27) ** 0.5)
    assert 0.5 < singular.min() < singular.max() < 1.5
    assert not torch.allclose(moves["muon"][kernel], moves["adamw"][kernel], atol=5e-4)
    torch.testing.assert_close(moves["muon"][bias], moves["adamw"][bias])


def test_a_state_of_another_optimiser_gives_weights_and_no_moments() -> None:
    stages = [Stage(steps=4, lr=1e-3, loss=PLAIN)]
    for one, other in (("adamw", "muon"), ("muon", "adamw")):
        first = trainer(stages, TrainerConfig(optimizer=one))  # type: ignore[arg-type]
        run(first, until=2)
        second = trainer(stages, TrainerConfig(optimizer=other))  # type: ignore[arg-type]
        second.load_state_dict(saved(first))
        assert not changed(weights(second), weights(first))
        run(second)
        assert second.is_done


def test_only_what_is_not_frozen_learns_and_the_average_follows() -> None:
    for frozen, learns in (("encoder", {"decoder"}), ("decoder", {"encoder"}), ("none", {"encoder", "decoder"})):
        trained = trainer([Stage(steps=1, lr=1e-3, freeze=frozen, loss=PLAIN)])  # type: ignore[arg-type]
        before, average = weights(trained), weights(trained, "ema")
        run(trained)
        assert changed(before, weights(trained)) == learns
        assert changed(average, weights(trained, "ema")) == learns
    expected = {name: 0.1 * average[name] + 0.9 * value for name, value in weights(trained).items()}
    torch.testing.assert_close(weights(trained, "ema"), expected)


def test_a_half_may_be_frozen_in_part() -> None:
    # Norms behind frozen layers have inputs without gradients.
    for frozen in ("encoder.conv_in", "decoder.conv_in"):
        trained = trainer([Stage(steps=1, lr=1e-3, freeze="encoder", lr_factors={frozen: 0.0}, loss=PLAIN)])
        run(trained)
        trained = trainer([Stage(steps=1, lr=1e-3, lr_factors={frozen: 0.0}, loss=PLAIN)])
        assert run(trained)[0]["gradient_norm"] > 0


def test_factors_of_the_rate_apply_by_pattern_and_the_last_one_counts() -> None:
    stage = Stage(steps=1, lr_factors={"encoder": 0.5, "encoder.levels.*": 0.25, "decoder.conv_in.weight": 0.0})
    factors = [stage.factor_of(name) for name in ("encoder.conv_in.bias", "encoder.levels.0.x", "decoder.conv_in.bias")]
    assert factors == [0.5, 0.25, 1.0]
    trained = trainer([Stage(steps=1, lr=1e-3, lr_factors={"encoder": 0.0, "decoder.conv_in": 0.0}, loss=PLAIN)])
    before = weights(trained)
    run(trained)
    after = weights(trained)
    assert changed(before, after) == {"decoder"}
    assert torch.equal(before["decoder.conv_in.weight"], after["decoder.conv_in.weight"])


def test_a_factor_for_parameters_that_do_not_exist_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"lr_factors.*encodr"):
        trainer([Stage(steps=1, lr_factors={"encodr": 0.1}, loss=PLAIN)])


def test_the_rate_warms_up_falls_as_a_cosine_and_stays_at_its_end() -> None:
    stage = Stage(steps=110, lr=1.0, warmup_steps=10, final_lr_factor=0.1)
    assert [stage.lr_at(step) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert stage.lr_at(10) == 1.0
    assert stage.lr_at(60) == pytest.approx(0.55)
    assert stage.lr_at(110) == stage.lr_at(170) == pytest.approx(0.1)
    assert Stage(steps=5, lr=2.0, schedule="constant").lr_at(4) == 2.0


def test_the_discriminator_begins_at_its_step_of_the_stage() -> None:
    losses = run(trainer([Stage(steps=1, loss=PLAIN), Stage(steps=3, loss=FULL)]))
    assert ["discriminator" in entry for entry in losses] == [False, False, True, True]


def test_every_other_batch_trains_one_of_the_two_as_published() -> None:
    config = TrainerConfig(seed=3, discriminator_channels=8, discriminator_turn="every_other_batch")
    trained = trainer([Stage(steps=4, lr=1e-3, loss=FULL)], config)
    learned = []
    for step in range(4):
        before = weights(trained), weights(trained, "discriminator")
        trained.train_step(batch(step))
        learned.append(
            tuple(bool(changed(b, weights(trained, p))) for b, p in zip(before, ("vae", "discriminator"), strict=True))
        )
    # Before it takes part the VAE has all batches to itself; then odd steps are the discriminator's.
    assert learned == [(True, False), (False, True), (True, False), (False, True)]


def test_the_decoder_term_can_be_left_out_of_steps() -> None:
    losses = run(
        trainer([Stage(steps=4, decoder_term_every=2, loss=LossConfig(perceptual_weight=0, adversarial_weight=0))])
    )
    assert ["decoder" in entry for entry in losses] == [True, False, True, False]


def test_ranks_draw_other_numbers_for_the_same_batch() -> None:
    # One clip twice: only the draws differ.
    ours, theirs = (run(trainer([Stage(steps=1, loss=FULL)], rank=rank))[0] for rank in range(2))
    assert ours["kl"] == theirs["kl"]
    assert ours["reconstruction"] != theirs["reconstruction"]


def test_recomputed_activations_give_the_same_losses() -> None:
    stages = [Stage(steps=3, lr=1e-3, loss=PLAIN)]
    ours = run(trainer(stages))
    theirs = run(trainer(stages, TrainerConfig(seed=3, gradient_checkpointing=True)))
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_bfloat16_computes_the_same_roughly_and_keeps_float32_weights() -> None:
    stages = [Stage(steps=2, lr=1e-4, loss=PLAIN)]
    exact = run(trainer(stages))
    trained = trainer(stages, TrainerConfig(seed=3, precision="bfloat16"))
    rough = run(trained)
    assert rough[-1]["total"] == pytest.approx(exact[-1]["total"], rel=0.05)
    assert rough != exact
    assert {value.dtype for value in weights(trained).values()} == {torch.float32}


def test_a_gradient_that_is_not_finite_changes_nothing_and_twenty_in_a_row_end_training() -> None:
    trained = trainer([Stage(steps=30, lr=1e-3, loss=PLAIN)])
    run(trained, until=1)
    before = weights(trained)
    spoilt = torch.full((1, 3, 1, 16, 16), torch.nan)
    assert trained.train_step(spoilt).is_skipped
    assert not changed(before, weights(trained))
    assert not trained.train_step(batch(0)).is_skipped
    for _ in range(19):
        trained.train_step(spoilt)
    with pytest.raises(DivergedError, match="20 steps in a row"):
        trained.train_step(spoilt)
    assert trained.num_skipped == 21


def test_learned_variances_are_trained_saved_and_carried_to_the_next_stage() -> None:
    published = LossConfig(
        perceptual_weight=0, adversarial_weight=0, kl_weight=1.0, regularisation="l1", learned_variance=True
    )
    stages = [Stage(steps=2, lr=1e-2, loss=published), Stage(steps=2, lr=1e-2, loss=published)]
    losses = run(trainer(stages))
    scalars = [entry["logvar"] for entry in losses]
    assert scalars[0] == 0.0
    assert len(set(scalars)) == 4
    half = trainer(stages)
    run(half, until=2)
    rest = trainer(stages)
    rest.load_state_dict(saved(half))
    assert run(rest) == losses[2:]


def test_without_an_average_the_model_itself_is_the_result() -> None:
    trained = trainer([Stage(steps=1, loss=PLAIN)], TrainerConfig(ema_decay=0))
    assert trained.ema is trained.vae
    assert "ema" not in trained.state_dict()


def test_a_state_of_another_model_is_refused() -> None:
    stages = [Stage(steps=2, loss=PLAIN)]
    other = Trainer(model(ch=16), stages, SMALL, teacher=teacher())
    with pytest.raises(TrainingError, match="another model"):
        trainer(stages).load_state_dict(other.state_dict())


def test_a_teacher_of_another_width_is_refused_before_the_first_step() -> None:
    wide = FrozenTeacher(TinyImageVAE(16, width=8))
    with pytest.raises(TrainingError, match="4 latent channels and the teacher 16"):
        Trainer(model(), [Stage(steps=1, loss=MATCHING)], SMALL, teacher=wide)
    Trainer(model(), [Stage(steps=1, loss=PLAIN)], SMALL, teacher=wide)  # nobody asks it


def test_training_ends_with_the_last_stage() -> None:
    trained = trainer([Stage(steps=1, loss=PLAIN)])
    run(trained)
    assert trained.is_done
    with pytest.raises(TrainingError, match="all 1 steps are done"):
        trained.train_step(batch(0))


def test_a_stage_comes_from_yaml_with_numbers_as_texts() -> None:
    given = {"steps": 10, "lr": "1e-3", "lr_factors": {"encoder": "0.1"}, "loss": {"lambda_decoder": 1}}
    stage = from_mapping(Stage, given, "stage 0")
    assert (stage.lr, stage.lr_factors, stage.loss.lambda_decoder) == (1e-3, {"encoder": 0.1}, 1.0)
    config = from_mapping(TrainerConfig, {"betas": [0.9, 0.98]}, "trainer")
    assert config.betas == (0.9, 0.98)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 1, "colour": "red"}, "colour"),
        ({}, "lacks steps"),
        ({"steps": 1.5}, "whole number"),
        ({"steps": True}, "whole number"),
        ({"steps": 0}, "at least 1"),
        ({"steps": 1, "lr": "fast"}, "a number"),
        ({"steps": 1, "lr": 0}, "positive"),
        ({"steps": 1, "freeze": "all"}, "encoder, decoder"),
        ({"steps": 1, "final_lr_factor": 2}, "0 to 1"),
        ({"steps": 1, "loss": {"kl": 1}}, "kl"),
        ({"steps": 1, "loss": {"mapping": "last"}}, "first, slice"),
        ({"steps": 1, "loss": 3}, "mapping"),
        ({"steps": 1, "lr_factors": [1]}, "mapping"),
        ({"steps": 2, "freeze": "decoder"}, "adaptive_weight"),
        ({"steps": 2, "lr_factors": {"decoder.conv_out": 0}}, "adaptive_weight"),
        ([1], "mapping"),
    ],
)
def test_a_stage_that_cannot_be_is_refused(given: object, said: str) -> None:
    with pytest.raises((TrainingError, LossError), match=said):
        from_mapping(Stage, given, "stage 0")


def test_all_of_a_saved_optimiser_goes_to_the_device_of_its_parameter() -> None:
    # Of a device that no machine lacks; on a GPU a step count left behind would end the first step.
    parameter = torch.nn.Parameter(torch.zeros(2, device="meta"))
    optimizer = torch.optim.AdamW([parameter])
    state = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    load_optimizer_state(optimizer, {id(parameter): "weight"}, {"weight": state})
    moved = optimizer.state[parameter]
    assert {name: value.device.type for name, value in moved.items()} == dict.fromkeys(state, "meta")


def test_a_stage_in_which_nothing_learns_is_refused() -> None:
    with pytest.raises(TrainingError, match="nothing learns"):
        trainer([Stage(steps=1, lr_factors={"*": 0.0}, loss=PLAIN)])
