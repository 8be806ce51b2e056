"""Tuning a diffusion model as users start it: exit codes, files, and a kill that leaves no trace in what comes out."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import encoders
import pytest
import torch
from latents import IMAGE
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer
from tuning import EMBEDDING_DIM, MODELS, model_config, output_with_embeddings

import cvvae
from cvvae.config import CVVAEConfig
from cvvae.model import CVVAE
from jobs.finetune_t2v import PARTS, main, read_job
from jobs.training_checkpoints import checkpoints_in
from pipeline.config import argument_parser

# diffusers' Euler scheduler asks numpy for an array in a way that torch's tensors do not know yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
ROOT = Path(__file__).resolve().parent.parent.parent
JOB = ROOT / "jobs" / "finetune_t2v.py"
CLASSES = {kind: config["_class_name"] for kind, config in MODELS.items()}
VAE = {
    "_class_name": "CVVAELightModel",
    "latent_channels": 4,
    "encoder_widths": [8, 8, 8],
    "decoder_widths": [8, 8, 8],
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
}


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips with embeddings of captions and first frames."""
    root = tmp_path_factory.mktemp("latents") / "out"
    output_with_embeddings(root)
    return root


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny video VAE with random weights."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    CVVAE(CVVAEConfig.from_published(VAE)).save_pretrained(folder)
    return folder


def flags(latents: Path, output: Path, *more: str) -> list[str]:
    base = ["--latents", str(latents), "--output", str(output), "--lr", "1e-3", "--batch-size", "2", "--local"]
    return [*base, "--threads", "1", "--log-every", "1", *more]


def rows(output: Path, name: str = "losses.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / name).read_text(encoding="utf-8").splitlines()]


def weights(final: Path) -> dict[str, torch.Tensor]:
    (path,) = [path for folder in ("unet", "transformer") for path in (final / folder).glob("*.safetensors")]
    return load_file(path)


@pytest.fixture(scope="module")
def started(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model of each class after two steps from random weights."""
    folder = tmp_path_factory.mktemp("started")
    for kind in MODELS:
        config = model_config(folder / kind, kind)
        how = ["--model-config", str(config), "--tune", "all", "--steps", "2"]
        assert main(flags(latents, folder / kind / "out", *how)) == 0
    return {kind: folder / kind / "out" / "final" for kind in MODELS}


@pytest.mark.parametrize("kind", list(MODELS))
def test_what_comes_out_is_loaded_by_diffusers_with_its_scheduler(started: dict[str, Path], kind: str) -> None:
    final = started[kind]
    index = json.loads((final / "model_index.json").read_text())
    (folder,) = [name for name, part in index.items() if isinstance(part, list) and part[1] == CLASSES[kind]]
    model = getattr(diffusers, CLASSES[kind]).from_pretrained(final / folder)
    assert sum(p.numel() for p in model.parameters()) == sum(w.numel() for w in weights(final).values())
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(final / "scheduler")
    wanted = {"text": "epsilon", "image": "v_prediction", "transformer": "epsilon"}[kind]
    assert scheduler.config.prediction_type == wanted
    said = json.loads((final / "latentmill.json").read_text())
    assert said["latents"]["weights_sha256"] == "ab" * 32
    assert said["conditions"]["encoder"] == "made-up-text-encoder" or kind == "image"
    assert said["buckets"] == ["64x64x9"]


def test_diffusers_own_pipeline_takes_what_comes_out_and_the_video_vae_makes_all_frames_of_its_latents(
    started: dict[str, Path], vae: Path, tmp_path: Path
) -> None:
    encoders.quiet()
    text = encoders.clip_text(tmp_path, hidden_size=EMBEDDING_DIM)
    video_vae = cvvae.load(vae)
    pipeline = diffusers.TextToVideoSDPipeline.from_pretrained(
        started["text"],
        vae=video_vae,
        text_encoder=CLIPTextModel.from_pretrained(text),
        tokenizer=CLIPTokenizer.from_pretrained(text),
    )
    pipeline.set_progress_bar_config(disable=True)
    drawn = {
        kind: pipeline(
            "a red square",
            num_frames=3,
            height=64,
            width=64,
            num_inference_steps=2,
            output_type=kind,
            generator=torch.Generator().manual_seed(0),
        ).frames
        for kind in ("latent", "pt")
    }
    with torch.inference_mode():
        frames = video_vae.decode(drawn["latent"] / video_vae.scaling_factor + video_vae.shift_factor).sample
    assert frames.shape == (1, 3, 1 + 4 * 2, 64, 64)
    assert torch.isfinite(frames).all()
    assert drawn["pt"].shape == (1, 3, 3, 64, 64), "the pipeline itself decodes each latent as a picture of its own"


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("tune", ["output-layer", "first-last", "lora"])
def test_only_what_is_asked_for_learns(
    started: dict[str, Path], latents: Path, tmp_path: Path, kind: str, tune: str
) -> None:
    how = ["--model", str(started[kind]), "--tune", tune, "--steps", "2", "--lora-rank", "2"]
    assert main(flags(latents, tmp_path / "out", *how)) == 0
    before, after = weights(started[kind]), weights(tmp_path / "out" / "final")
    assert before.keys() == after.keys()
    changed = {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    first, last = ("pos_embed.proj", "proj_out") if kind == "transformer" else ("conv_in", "conv_out")
    if tune == "lora":
        assert changed
        assert all(name.endswith(("to_q", "to_k", "to_v", "to_out.0")) for name in changed)
        assert (tmp_path / "out" / "final" / "lora" / "adapter_model.safetensors").exists()
    else:
        assert changed == ({last} if tune == "output-layer" else {first, last})


def test_an_adapter_of_peft_gives_what_the_merged_model_gives(
    started: dict[str, Path], latents: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    how = ["--model", str(started["text"]), "--tune", "lora", "--steps", "2", "--lora-rank", "2", "--lora-alpha", "8"]
    assert main(flags(latents, tmp_path / "out", *how)) == 0
    final = tmp_path / "out" / "final"
    base, merged = (diffusers.UNet3DConditionModel.from_pretrained(p / "unet").eval() for p in (started["text"], final))
    noisy, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 5, EMBEDDING_DIM)
    with torch.no_grad():
        plain = base(noisy, 7, text).sample
        adapted = PeftModel.from_pretrained(base, str(final / "lora")).eval()(noisy, 7, text).sample
        wanted = merged(noisy, 7, text).sample
    torch.testing.assert_close(adapted, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "edm", "flow"])
def test_every_prediction_is_trained_and_sampled_with_the_scheduler_that_is_saved(
    latents: Path, vae: Path, tmp_path: Path, prediction: str
) -> None:
    config = model_config(tmp_path, "text")
    how = ["--model-config", str(config), "--tune", "all", "--steps", "2", "--prediction", prediction]
    look = ["--samples-every", "2", "--sample-steps", "2", "--sample-clips", "1", "--vae", str(vae)]
    assert main(flags(latents, tmp_path / "out", *how, *look)) == 0
    scheduler = json.loads((tmp_path / "out" / "final" / "scheduler" / "scheduler_config.json").read_text())
    if prediction == "flow":
        assert scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    elif prediction == "edm":
        assert (scheduler["timestep_type"], scheduler["prediction_type"]) == ("continuous", "v_prediction")
    else:
        assert scheduler["prediction_type"] == prediction
    assert (tmp_path / "out" / "samples" / "step-0000000002-0.mp4").stat().st_size > 0


RESUMED = ["--steps", "12", "--accumulate", "2", "--ema-decay", "0.9", "--condition-dropout", "0.5"]
RESUMED += ["--checkpoint-every", "4", "--validate-every", "3", "--validation-clips", "4", "--log-every", "2"]
RESUMED += ["--warmup-steps", "3", "--schedule", "cosine", "--tune", "all", "--seed", "5"]


def command(latents: Path, output: Path, config: Path) -> list[str]:
    validation = ["--validation", str(latents), "--model-config", str(config)]
    return [sys.executable, str(JOB), *flags(latents, output, *validation, *RESUMED)]


def test_a_tuning_killed_and_resumed_gives_the_same_to_the_bit(latents: Path, tmp_path: Path) -> None:
    config = model_config(tmp_path, "text")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "out"
    assert main(command(latents, undisturbed, config)[2:]) == 0
    with subprocess.Popen(command(latents, output, config), env=env, stdout=subprocess.DEVNULL) as process:
        try:
            for _ in range(5000):
                if checkpoints_in(output) or process.poll() is not None:
                    break
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGKILL)
    assert checkpoints_in(output)[-1].step < 12
    with (output / "losses.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 11, "loss": "of a later st')
    done = subprocess.run(command(latents, output, config), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["num_steps_of_run"] < 12
    for name in ("losses.jsonl", "validation.jsonl", "final/unet/diffusion_pytorch_model.safetensors"):
        assert (output / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert [row["step"] for row in rows(output, "validation.jsonl")] == [0, 3, 6, 9, 12]
    assert rows(output)[-1].keys() == {"step", "lr", "loss", "gradient_norm", "skipped"}


def test_what_comes_out_is_the_moving_average_and_no_step_sees_it(
    latents: Path, tmp_path: Path, started: dict[str, Path]
) -> None:
    how = ["--model", str(started["text"]), "--tune", "output-layer"]
    for name, more in {"1": ["--steps", "1"], "2": ["--steps", "2"], "ema": ["--steps", "2"]}.items():
        decay = ["--ema-decay", "0.05"] if name == "ema" else []
        assert main(flags(latents, tmp_path / name, *how, *more, *decay)) == 0
    assert (tmp_path / "ema" / "losses.jsonl").read_bytes() == (tmp_path / "2" / "losses.jsonl").read_bytes()
    before, first, second, average = (
        weights(folder)["conv_out.weight"]
        for folder in (started["text"], *(tmp_path / name / "final" for name in ("1", "2", "ema")))
    )
    torch.testing.assert_close(average, 0.05 * (0.05 * before + 0.95 * first) + 0.95 * second, rtol=1e-5, atol=1e-7)
    assert not torch.equal(average, second)


def test_the_validation_is_the_same_whatever_was_drawn_before(latents: Path, tmp_path: Path) -> None:
    config = model_config(tmp_path, "text")
    how = ["--model-config", str(config), "--tune", "all", "--steps", "1", "--validation", str(latents)]
    losses = []
    for number, more in enumerate((["--condition-dropout", "0"], ["--condition-dropout", "1", "--accumulate", "2"])):
        assert main(flags(latents, tmp_path / str(number), *how, *more, "--validate-every", "1")) == 0
        losses.append([row["loss"] for row in rows(tmp_path / str(number), "validation.jsonl")])
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]


def test_gradient_checkpointing_changes_no_loss(latents: Path, tmp_path: Path, started: dict[str, Path]) -> None:
    for kind in MODELS:
        found = []
        for more in ([], ["--gradient-checkpointing"]):
            output = tmp_path / kind / str(len(found))
            how = ["--model", str(started[kind]), "--tune", "all", "--steps", "2", *more]
            assert main(flags(latents, output, *how)) == 0
            found.append([row["loss"] for row in rows(output)])
        assert found[0] == pytest.approx(found[1], rel=1e-4), kind


def test_bfloat16_trains_weights_that_stay_float32(latents: Path, tmp_path: Path, started: dict[str, Path]) -> None:
    how = ["--model", str(started["text"]), "--tune", "first-last", "--steps", "2", "--precision", "bfloat16"]
    assert main(flags(latents, tmp_path / "out", *how, "--min-snr-gamma", "5")) == 0
    assert {weight.dtype for weight in weights(tmp_path / "out" / "final").values()} == {torch.float32}


def test_two_processes_that_read_give_the_same_losses_as_none(
    latents: Path, tmp_path: Path, started: dict[str, Path]
) -> None:
    found = []
    for number in ("0", "1"):
        output = tmp_path / number
        how = ["--model", str(started["text"]), "--steps", "4", "--data-workers", number]
        assert main(flags(latents, output, *how)) == 0
        found.append((output / "losses.jsonl").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("kind", "changes", "more", "said"),
    [
        ("text", {"in_channels": 8, "out_channels": 8}, [], "the latents have 4 channels (made-up), the model 8"),
        ("text", {"cross_attention_dim": 16}, [], "the embeddings have 6 values a token, the model takes 16"),
        ("transformer", {"video_length": 5}, [], "encode buckets of 17 frames"),
        ("transformer", {"patch_size": 3}, [], "multiples of 24 px"),
        ("image", {"in_channels": 4}, [], "takes twice what it gives"),
        ("text", {"_class_name": "UNet2DModel"}, [], "only UNet3DConditionModel"),
        ("text", {}, ["--batch-size", "7"], "fewer of each bucket than a batch of 7"),
        ("text", {}, ["--tune", "lora"], "--tune all"),
        ("text", {}, ["--prediction", "flow", "--min-snr-gamma", "5"], "--min-snr-gamma"),
        ("text", {}, ["--captions", "title"], "title"),
        ("text", {}, ["--latents", "{tmp}/nowhere"], "nowhere"),
        ("text", {}, ["--samples-every", "1"], "--vae"),
        ("text", {}, ["--colour", "red"], "colour"),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_step(
    latents: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    changes: dict[str, Any],
    more: Sequence[str],
    said: str,
) -> None:
    config = model_config(tmp_path, kind, **changes)
    how = ["--model-config", str(config), "--tune", "all", "--steps", "1"]
    given = [flag.format(tmp=tmp_path) for flag in more]
    assert main(flags(latents, tmp_path / "out", *how, *given)) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert json.loads(captured.out.splitlines()[-1])["exit_code"] == 2
    assert not (tmp_path / "out" / "losses.jsonl").exists()


def test_latents_of_another_scale_than_the_models_image_vae_are_refused(
    latents: Path, tmp_path: Path, started: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    for path in started["text"].iterdir():
        (pipeline / path.name).symlink_to(path)
    (pipeline / "vae").mkdir()
    (pipeline / "vae" / "config.json").write_text('{"scaling_factor": 0.18215}')
    assert main(flags(latents, tmp_path / "out", "--model", str(pipeline), "--steps", "1")) == 2
    assert "scale and shift 0.18215, 0" in capsys.readouterr().err


def test_latents_that_were_scaled_by_a_wrong_factor_are_refused(
    latents: Path, tmp_path: Path, started: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    scaled = tmp_path / "latents"
    shutil.copytree(latents, scaled)
    about = json.loads((scaled / "_dataset.json").read_text())
    about["model"]["scaling_factor"] *= 100
    (scaled / "_dataset.json").write_text(json.dumps(about))
    assert main(flags(scaled, tmp_path / "out", "--model", str(started["text"]), "--steps", "1")) == 2
    assert "a diffusion model takes about 1 (0.2 to 5.0)" in capsys.readouterr().err
    assert not (tmp_path / "out" / "losses.jsonl").exists()


def test_images_are_no_data_for_an_image_to_video_model(
    tmp_path: Path, started: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output_with_embeddings(tmp_path / "images", bucket=IMAGE)
    how = ["--model", str(started["image"]), "--steps", "1"]
    assert main(flags(tmp_path / "images", tmp_path / "out", *how)) == 2
    assert "encode buckets of several frames only" in capsys.readouterr().err


def test_an_output_without_embeddings_says_what_to_run(
    tmp_path: Path, started: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from latents import output, record

    output(tmp_path / "plain", [[record("a"), record("b")]])
    assert main(flags(tmp_path / "plain", tmp_path / "out", "--model", str(started["text"]), "--steps", "1")) == 2
    assert "encode_text.py" in capsys.readouterr().err


def test_every_flag_that_the_readme_names_is_known() -> None:
    known = {flag for action in argument_parser(PARTS)._actions for flag in action.option_strings}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"finetune_t2v\.py((?:\\\n|[^\n`])*)", text)
    used = {flag for found in commands for flag in re.findall(r"--[a-z][a-z0-9-]*", found)}
    assert len(used) >= 4
    assert used <= known


def test_the_papers_tuning_of_svd_is_the_default(tmp_path: Path) -> None:
    job = read_job(["--latents", "latents", "--model", "svd", "--output", str(tmp_path)])
    optimisation = job.optimisation
    assert (job.model.tune, optimisation.lr, optimisation.schedule, optimisation.steps) == (
        "output-layer",
        1e-5,
        "constant",
        5000,
    )
