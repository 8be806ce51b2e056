"""The training job as users start it: exit codes, files, and a kill that leaves no trace in what comes out."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import CLIPS
from image_vaes import narrow_image_vae
from PIL import Image
from safetensors.torch import load_file, save_file

import cvvae
from cvvae.teachers import FrozenTeacher, TinyImageVAE
from cvvae.training import StepReport
from jobs.train_vae import PARTS, main, read_job
from jobs.training_checkpoints import checkpoints_in, write_folder
from jobs.training_loop import Journal
from jobs.vae_training import ModelConfig, OptimisationConfig, initial_vae
from pipeline.config import argument_parser
from pipeline.errors import StorageError, UsageError

ROOT = Path(__file__).resolve().parent.parent.parent
JOB = ROOT / "jobs" / "train_vae.py"
MODEL = {
    "_class_name": "CVVAEModel",
    "z_channels": 4,
    "ch": 8,
    "ch_mult": [1, 1, 2, 2],
    "num_res_blocks": 1,
    "norm_num_groups": 4,
    "norm": "frame",
}
MATCHING = {
    "reconstruction_weight": 0,
    "kl_weight": 0,
    "lambda_decoder": 0,
    "latent_matching_weight": 1,
    "adversarial_weight": 0,
}
CONFIG: dict[str, Any] = {
    "input": str(CLIPS),
    "perceptual": "none",
    "seed": 4,
    "source_px": 72,
    "source_frames": 17,
    # Streamed: each load serves some steps only.
    "cache_gb": 0.006,
    "crops_per_clip": 1,
    "log_every": 2,
    "checkpoint_every": 4,
    "pictures_every": 6,
    "settings": [
        {"kind": "video", "size": 32, "frames": 5, "batch": 2},
        {"kind": "image", "size": "64x32", "batch": 2, "share": 0.5},
    ],
    "loss": {"perceptual_weight": 0, "regularised_latents": 1},
    "trainer": {"discriminator_channels": 8, "ema_decay": 0.9},
    "stages": [
        {"name": "encoder", "steps": 5, "lr": "1e-3", "freeze": "decoder", "loss": MATCHING},
        {"name": "joint", "steps": 8, "lr": 1e-3, "warmup_steps": 2, "lr_factors": {"encoder": 0.1}},
    ],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML file with a tiny model and a teacher with made weights."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "model.json").write_text(json.dumps(MODEL), encoding="utf-8")
    torch.manual_seed(2)
    teacher = TinyImageVAE(4, width=8)
    for half in ("encoder", "decoder"):
        save_file(getattr(teacher, half).state_dict(), folder / f"tiny_{half}.safetensors")
    path = folder / "training.yaml"
    given = {**CONFIG, "teacher": str(folder), "model_config": str(folder / "model.json")}
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    return path


@contextmanager
def started(config: Path, output: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(JOB), "--config", str(config), "--output", str(output), "--local", *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    said, messages = process.communicate(timeout=200)
    return process.returncode, json.loads(said.splitlines()[-1]), messages


def run(config: Path, output: Path, *flags: str) -> tuple[int, dict[str, Any], str]:
    with started(config, output, *flags) as process:
        return ended(process)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(4000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("it did not happen within 200 s")


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    code, result, messages = run(config, output)
    assert code == 0, messages
    assert (result["ended_by"], result["step"], result["num_steps_of_run"]) == ("end", 13, 13)
    return output


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "losses.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_training_leaves_a_model_losses_pictures_and_checkpoints(undisturbed: Path) -> None:
    vae = cvvae.load(undisturbed / "final")
    assert vae.is_trained
    assert [checkpoint.step for checkpoint in checkpoints_in(undisturbed)] == [8, 12, 13]
    assert not list(undisturbed.rglob(".*"))
    written = rows(undisturbed)
    assert [(row["step"], row["stage"]) for row in written] == [
        (2, "encoder"),
        (4, "encoder"),
        *((step, "joint") for step in (6, 8, 10, 12, 13)),
    ]
    assert written[0].keys() == {"step", "stage", "lr", "latent_matching", "total", "gradient_norm", "skipped"}
    assert {"reconstruction", "kl", "decoder", "adversarial", "discriminator"} <= written[-1].keys()
    for step in (6, 12):
        with Image.open(undisturbed / "pictures" / f"step-{step:010d}.jpg") as picture:
            # Of each clip three rows: frames, reconstruction, image decoder.
            assert picture.height > 6 * 96
    average = load_file(undisturbed / "checkpoints" / "step-0000000013" / "ema" / "diffusion_pytorch_model.safetensors")
    final = load_file(undisturbed / "final" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(average[name], final[name]) for name in final)


def test_a_training_killed_and_resumed_gives_the_same_to_the_bit(
    config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with started(config, output) as process:
        # Between the checkpoint and the next one, rows of later steps are written: those must go.
        wait_for(lambda: bool(checkpoints_in(output)), process)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    at = checkpoints_in(output)[-1].step
    assert at < 13
    with (output / "losses.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 12, "stage": "of a later st')
    code, result, messages = run(config, output)
    assert code == 0, messages
    assert result["num_steps_of_run"] == 13 - at
    assert (output / "losses.jsonl").read_bytes() == (undisturbed / "losses.jsonl").read_bytes()
    for name in ("final", "checkpoints/step-0000000013/model"):
        file_name = f"{name}/diffusion_pytorch_model.safetensors"
        assert (output / file_name).read_bytes() == (undisturbed / file_name).read_bytes()
    state = "checkpoints/step-0000000013/training.safetensors"
    ours, theirs = load_file(output / state), load_file(undisturbed / state)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_sigterm_ends_with_a_checkpoint_and_the_same_command_goes_on(
    config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with started(config, output) as process:
        wait_for(lambda: (output / "losses.jsonl").exists() and bool(rows(output)), process)
        process.send_signal(signal.SIGTERM)
        code, result, _ = ended(process)
    assert (code, result["ended_by"]) == (130, "interrupt")
    assert [checkpoint.step for checkpoint in checkpoints_in(output)][-1] == result["step"]
    assert not (output / "final").exists()
    assert run(config, output)[0] == 0
    assert (output / "losses.jsonl").read_bytes() == (undisturbed / "losses.jsonl").read_bytes()


def test_a_training_stops_where_asked_and_does_nothing_when_done(
    config: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--config", str(config), "--output", str(tmp_path / "out"), "--local"]
    assert main([*base, "--stop-at-step", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["ended_by"] == "stop_at_step"
    assert main([*base, "--max-hours", "0"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["ended_by"], result["step"], result["num_steps_of_run"]) == ("max_hours", 3, 0)
    assert main([*base, "--resume", "never"]) == 2
    assert "step 3" in capsys.readouterr().err
    finished = (undisturbed / "losses.jsonl").read_bytes()
    assert main(["--config", str(config), "--output", str(undisturbed), "--local"]) == 0
    assert json.loads(capsys.readouterr().out)["num_steps_of_run"] == 0
    assert (undisturbed / "losses.jsonl").read_bytes() == finished


def test_the_output_of_another_training_is_noticed(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--config", str(config), "--output", str(tmp_path / "out"), "--local"]
    assert main([*base, "--stop-at-step", "2"]) == 0
    assert "note:" not in capsys.readouterr().err
    assert main([*base, "--stop-at-step", "2", "--seed", "9"]) == 0
    assert "note: seed is 9, but 4 was what" in capsys.readouterr().err
    shorter = tmp_path / "shorter.yaml"
    stages = [{"steps": 1, "loss": MATCHING}]
    shorter.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "stages": stages}), encoding="utf-8")
    assert main([*base, "--config", str(shorter)]) == 2
    assert "holds step 2, and the stages have 1 steps in all" in capsys.readouterr().err
    assert not (tmp_path / "out" / "final").exists()


def test_a_damaged_checkpoint_is_named_with_what_to_do(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--config", str(config), "--output", str(tmp_path / "out"), "--local"]
    assert main([*base, "--stop-at-step", "1"]) == 0
    damaged = tmp_path / "out" / "checkpoints" / "step-0000000001" / "training.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert main(base) == 2
    assert f"{damaged.parent} cannot be read" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_a_storage_error_and_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        save_file({"weight": torch.zeros(2)}, folder / "missing" / "weights.safetensors")

    with pytest.raises(StorageError, match="cannot be written"):
        write_folder(tmp_path / "final", fail)
    assert not list(tmp_path.iterdir())


def test_all_sums_of_losses_lie_on_the_device_of_the_training(tmp_path: Path) -> None:
    # Of a device that no machine lacks; a row of sums from two devices could not be made.
    journal = Journal(tmp_path, torch.device("meta"), is_writing=False)
    journal.go_on(4, {"decoder": (1.5, 2)})
    journal.add(StepReport(step=4, losses={"total": torch.zeros((), device="meta")}, lr=1e-3, is_skipped=False))
    journal.add(StepReport(step=5, losses={}, lr=1e-3, is_skipped=True))
    assert {name: total.device.type for name, total in journal._sums.items()} == {
        "decoder": "meta",
        "total": "meta",
        "skipped": "meta",
    }


def test_a_row_says_which_share_of_its_steps_was_skipped_and_means_of_the_others(tmp_path: Path) -> None:
    journal = Journal(tmp_path, torch.device("cpu"), is_writing=True)
    journal.begin()
    for step, (loss, is_skipped) in enumerate([(1.0, False), (float("nan"), True), (3.0, False), (2.0, False)]):
        report = StepReport(step=step, losses={"total": torch.tensor(loss)}, lr=1e-3, is_skipped=is_skipped)
        journal.add(report)
    journal.write_row(4, 1e-3, {"stage": "joint"})
    assert rows(tmp_path) == [{"step": 4, "stage": "joint", "lr": 1e-3, "skipped": 0.25, "total": 2.0}]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--preset", "paper"], "either --preset, or stages"),
        (["--steps", "7"], "--steps"),
        (["--local", "--num-workers", "2"], "--local"),
        (["--gpus-per-worker", "0.5"], "--gpus-per-worker"),
        (["--teacher", "{tmp}/nowhere"], "nowhere"),
        (["--init", "small"], "--init"),
        (["--input", "{tmp}/nowhere"], "nowhere"),
        (["--output", "s3://bucket/run"], "no folder of a disk"),
        (["--colour", "red"], "colour"),
        (["--config", "{tmp}/unknown.yaml"], "colour"),
        (["--config", "{tmp}/stage.yaml"], "patience"),
        (["--config", "{tmp}/setting.yaml"], "multiples of 8"),
    ],
)
def test_wrong_use_is_exit_code_2_and_names_the_culprit(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: Sequence[str], said: str
) -> None:
    given = yaml.safe_load(config.read_text(encoding="utf-8"))
    for name, wrong in (
        ("unknown", {"colour": "red"}),
        ("stage", {"stages": [{"steps": 1, "patience": 3}]}),
        ("setting", {"settings": [{"size": 20}]}),
    ):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**given, **wrong}), encoding="utf-8")
    argv = ["--config", str(config), "--output", str(tmp_path / "out"), *(flag.format(tmp=tmp_path) for flag in flags)]
    assert main([*argv, *([] if "--num-workers" in flags else ["--local"])]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert json.loads(captured.out)["exit_code"] == 2


def test_the_preset_is_the_papers_four_settings(tmp_path: Path) -> None:
    given = ["--preset", "paper", "--input", "videos", "--output", str(tmp_path)]
    (stage,), ((num_steps, settings),) = read_job(given).stages()
    assert (stage.lr, stage.schedule, num_steps) == (1e-4, "cosine", 200_000)
    assert (stage.loss.lambda_decoder, stage.loss.lambda_encoder, stage.loss.mapping) == (1.0, 0.0, "random")
    assert [str(setting) for setting in settings] == [
        "image 1x256x256 batch 8",
        "image 1x512x512 batch 2",
        "video 9x256x256 batch 1",
        "video 17x192x192 batch 1",
    ]
    assert [setting.share for setting in settings] == [0.4, 0.1, 0.25, 0.25]
    assert read_job([*given, "--steps", "50"]).stages()[0][0].steps == 50


def test_every_configuration_that_ships_can_be_read(tmp_path: Path) -> None:
    shipped = sorted((ROOT / "jobs").glob("train_*.yaml"))
    assert shipped
    for path in shipped:
        job = read_job(["--config", str(path), "--input", "videos", "--output", str(tmp_path)])
        stages, feeds = job.stages()
        assert len(stages) == len(feeds)
        job.trainer_config()


def test_every_flag_that_the_readme_and_the_configurations_name_is_known() -> None:
    known = {flag for action in argument_parser(PARTS)._actions for flag in action.option_strings}
    documents = [ROOT / "README.md", *sorted((ROOT / "jobs").glob("train_*.yaml"))]
    text = "\n".join(path.read_text(encoding="utf-8").replace("\n#", "\n") for path in documents)
    commands = re.findall(r"train_vae\.py((?:\\\n|[^\n`])*)", text)
    used = {flag for command in commands for flag in re.findall(r"--[a-z][a-z0-9-]*", command)}
    assert len(used) >= 5
    assert used <= known


def test_training_starts_from_an_image_vae_a_video_vae_or_a_configuration(tmp_path: Path) -> None:
    image_vae = narrow_image_vae(0, block_out_channels=[8, 8, 8, 8])
    image_vae.save_pretrained(tmp_path / "pipeline" / "vae")
    inflated = initial_vae(ModelConfig(init=str(tmp_path / "pipeline"), init_subfolder="vae"), seed=0)
    assert inflated.is_causal
    inflated.save_pretrained(tmp_path / "video")
    assert initial_vae(ModelConfig(init=str(tmp_path / "video")), seed=0).config == inflated.config
    (tmp_path / "model.json").write_text(json.dumps(MODEL), encoding="utf-8")
    ours, again, other = (
        initial_vae(ModelConfig(model_config=str(tmp_path / "model.json")), seed=seed).state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    assert not all(torch.equal(ours[name], other[name]) for name in ours)
    with pytest.raises(UsageError, match="either --init"):
        initial_vae(ModelConfig(), seed=0)


def test_a_model_that_starts_at_random_has_the_scale_of_its_teacher_unless_it_says_another(tmp_path: Path) -> None:
    image_vae = TinyImageVAE(4, width=8)
    image_vae.scaling_factor, image_vae.shift_factor = 0.25, 0.5
    teacher = FrozenTeacher(image_vae)
    path = tmp_path / "model.json"
    for said, wanted in (({}, (0.25, 0.5)), ({"scaling_factor": 2.0}, (2.0, 0.5))):
        fields = {"_class_name": "CVVAELightModel", "latent_channels": 4, "encoder_widths": [8, 8, 8], **said}
        path.write_text(json.dumps(fields), encoding="utf-8")
        vae = initial_vae(ModelConfig(model_config=str(path)), 0, teacher)
        assert (vae.scaling_factor, vae.shift_factor) == wanted


def test_settings_of_which_none_can_be_drawn_are_refused() -> None:
    stage = {"steps": 1, "settings": [{"kind": "image", "size": 64, "share": 0}]}
    given = OptimisationConfig(stages=[stage], settings=None, loss={}, trainer={})
    job = read_job(["--preset", "paper", "--input", "videos", "--output", "run"])
    with pytest.raises(UsageError, match="share of every setting is 0"):
        replace(job, optimisation=given).stages()


def test_stages_take_defaults_from_the_whole_and_must_have_settings(config: Path, tmp_path: Path) -> None:
    job = read_job(["--config", str(config), "--output", str(tmp_path)])
    first, second = job.stages()[0]
    assert first.loss.latent_matching_weight == 1
    assert first.loss.regularised_latents == second.loss.regularised_latents == 1
    given = yaml.safe_load(config.read_text(encoding="utf-8"))
    del given["settings"]
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    with pytest.raises(UsageError, match="stage encoder has no settings"):
        read_job(["--config", str(tmp_path / "bare.yaml"), "--output", str(tmp_path)])
