"""Videos from prompts and first frames, as users make them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from encoders import clip_text, clip_vision
from PIL import Image
from tuning import model_config

from cvvae.config import CVVAEConfig
from cvvae.model import CVVAE
from jobs.sample_t2v import PARTS, main
from jobs.t2v_models import new_model, write_model
from jobs.t2v_noise import scheduler_of
from pipeline.config import argument_parser

# diffusers' Euler scheduler asks numpy for an array in a way that torch's tensors do not know yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
ROOT = Path(__file__).resolve().parent.parent.parent
VAE = {"_class_name": "CVVAELightModel", "latent_channels": 4, "encoder_widths": [8] * 3, "decoder_widths": [8] * 3}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tuned models as the tuning job leaves them, with encoders and a video VAE of random weights."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    CVVAE(CVVAEConfig.from_published(VAE)).save_pretrained(root / "vae")
    encoders = {"text": clip_text(root / "clip_text"), "image": clip_vision(root / "clip_vision")}
    for kind, dim in (("text", 16), ("image", 12)):
        loaded = new_model(str(model_config(root / f"{kind}-config", kind, cross_attention_dim=dim)), seed=0)
        origin = {
            "latents": {"model": str(root / "vae"), "scaling_factor": 1.0, "shift_factor": 0.0},
            "conditions": {"encoder": str(encoders[kind])},
            "buckets": ["48x32x1", "48x32x9"],
        }
        scheduler = scheduler_of(loaded.scheduler_config, None)
        write_model(root / kind, loaded.model, loaded.adapter, scheduler, origin)
    Image.fromarray(np.full((90, 70, 3), 120, dtype=np.uint8)).save(root / "photo.png")
    return {name: root / name for name in ("text", "image", "vae", "photo.png", "clip_text")}


def result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def num_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_prompts_become_videos_of_four_times_the_latents_less_three(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog runs over a green field\n")
    how = ["--model", str(parts["text"]), "--prompts", str(tmp_path / "prompts.txt"), "--steps", "2"]
    assert main([*how, "--output", str(tmp_path / "videos")]) == 0
    said = result(capsys)
    assert (said["num_latents"], said["num_frames"]) == (3, 9)
    assert said["videos"] == ["video-0.mp4", "video-0.gif", "video-1.mp4", "video-1.gif"]
    for number in range(2):
        assert num_frames(tmp_path / "videos" / f"video-{number}.mp4") == 9
        with Image.open(tmp_path / "videos" / f"video-{number}.gif") as gif:
            assert gif.is_animated


def test_the_same_prompt_and_seed_make_the_same_video(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--model", str(parts["text"]), "--steps", "2", "--size", "32x32x5", "--prompt", "a cat"]
    frames = []
    for name in ("a", "b"):
        assert main([*how, "--output", str(tmp_path / name)]) == 0
        frames.append((tmp_path / name / "video-0.gif").read_bytes())
    assert frames[0] == frames[1]
    assert main([*how, "--output", str(tmp_path / "c"), "--seed", "1"]) == 0
    assert (tmp_path / "c" / "video-0.gif").read_bytes() != frames[0]


def test_a_picture_becomes_a_video_of_an_image_to_video_model(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--model", str(parts["image"]), "--first-frame", str(parts["photo.png"]), "--steps", "2"]
    assert main([*how, "--output", str(tmp_path / "videos")]) == 0
    assert result(capsys)["videos"] == ["video-0.mp4", "video-0.gif"]
    assert num_frames(tmp_path / "videos" / "video-0.mp4") == 9


@pytest.mark.parametrize(
    ("kind", "flags", "said"),
    [
        ("text", [], "either --prompt or --prompts"),
        ("text", ["--prompt", "a", "--first-frame", "x.jpg"], "no --first-frame"),
        ("image", ["--prompt", "a"], "give --first-frame"),
        ("image", ["--first-frame", "{tmp}/nowhere.jpg"], "nowhere.jpg"),
        ("text", ["--prompt", "a", "--size", "32x32"], "--size"),
        ("text", ["--prompt", "a", "--vae", "small"], "32 channels"),
        ("text", ["--prompt", "a", "--text-encoder", "{tmp}/nowhere"], "nowhere"),
        ("text", ["--prompts", "{tmp}/nowhere.txt"], "nowhere.txt"),
        ("text", ["--prompt", "a", "--output", "s3://bucket/videos"], "no folder of a disk"),
    ],
)
def test_wrong_use_is_exit_code_2_and_names_the_culprit(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, flags: list[str], said: str
) -> None:
    given = ["--model", str(parts[kind]), "--output", str(tmp_path), "--steps", "1"]
    assert main([*given, *(flag.format(tmp=tmp_path) for flag in flags)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert json.loads(captured.out)["exit_code"] == 2


def test_another_encoder_than_the_model_was_tuned_with_is_refused(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    for path in parts["text"].iterdir():
        (tuned / path.name).symlink_to(path)
    origin = json.loads((tuned / "latentmill.json").read_text())
    origin["conditions"]["weights_sha256"] = "12" * 32
    (tuned / "latentmill.json").unlink()
    (tuned / "latentmill.json").write_text(json.dumps(origin))
    assert main(["--model", str(tuned), "--prompt", "a", "--output", str(tmp_path / "out")]) == 2
    assert "the model was tuned with those of" in capsys.readouterr().err


def test_every_flag_that_the_readme_names_is_known() -> None:
    known = {flag for action in argument_parser(PARTS)._actions for flag in action.option_strings}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"sample_t2v\.py((?:\\\n|[^\n`])*)", text)
    used = {flag for found in commands for flag in re.findall(r"--[a-z][a-z0-9-]*", found)}
    assert len(used) >= 3
    assert used <= known
