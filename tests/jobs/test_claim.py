"""The claim at small scale runs, keeps what is finished, judges videos by what they show, and says what came out."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from cvvae.config import CVVAEConfig
from cvvae.model import CVVAE
from cvvae.teachers import FrozenTeacher, TinyImageVAE

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "tests" / "benchmarks" / "claim.py"
VAE = {"_class_name": "CVVAELightModel", "latent_channels": 4, "encoder_widths": [8] * 3, "decoder_widths": [8] * 3}


@pytest.fixture(scope="module")
def claim() -> ModuleType:
    if str(SCRIPT.parent) not in sys.path:
        sys.path.append(str(SCRIPT.parent))  # as Python does for a script
    spec = importlib.util.spec_from_file_location("claim", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses looks up the module of what it makes.
    sys.modules["claim"] = module
    spec.loader.exec_module(module)
    return module


def test_two_steps_of_every_run_give_a_table_and_a_sheet_and_are_not_run_again(
    claim: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(6)
    pixels = torch.from_numpy(claim.draw_clips(1, 16, 0)[0].frames).permute(3, 0, 1, 2).unsqueeze(0) / 127.5 - 1
    # Random weights make latents that vary little; of real VAEs the deviation is near 1, and the job checks it.
    teacher = TinyImageVAE(4, width=4).requires_grad_(False)
    teacher.encoder[-1].weight /= FrozenTeacher(teacher).encode_frames(pixels).std()
    for half in ("encoder", "decoder"):
        torch.save(getattr(teacher, half).state_dict(), tmp_path / f"tiny_{half}.pth")
    for name in ("compatible", "other"):
        vae = CVVAE(CVVAEConfig.from_published(VAE)).requires_grad_(False)
        deviation = float(vae.encode(pixels).latent_dist.mode().std())
        vae.config = dataclasses.replace(vae.config, scaling_factor=1 / deviation)
        vae.save_pretrained(tmp_path / name)
    flags = ["--teacher", tmp_path / "tiny_encoder.pth", "--output", tmp_path / "out", "--base-steps", "2"]
    flags += ["--compatible", tmp_path / "compatible", "--other", tmp_path / "other", "--steps", "2", "--batch", "2"]
    flags += ["--clips", "4", "--held-out", "2", "--size", "16", "--width", "16", "--videos", "2", "--shown", "2"]
    flags += ["--real-clips", "4", "--real-base-steps", "2"]
    given = [str(flag) for flag in [*flags, "--sample-steps", "1"]]
    assert claim.main(given) == 0
    said = capsys.readouterr().out
    document = json.loads((tmp_path / "out" / "claim.json").read_text())
    for subject in ("shapes", "real"):
        runs = document["subjects"][subject]["runs"]
        assert [run["run"] for run in runs][:3] == ["base", "compatible, not tuned", "compatible, output-layer"]
        # Both parts of a space are tuned from the same start.
        losses = {run["run"]: [row["loss"] for row in run["validation"]] for run in runs}
        for name in ("compatible", "other"):
            assert losses[f"{name}, output-layer"][0] == losses[f"{name}, all"][0] == losses[f"{name}, not tuned"][0]
        assert (tmp_path / "out" / subject / "claim.jpg").stat().st_size > 0
        facts = document["subjects"][subject]["latents"]
        assert facts["image"]["own_decoder_db"] == facts["image"]["image_decoder_db"]
    assert {"colour", "colour_and_motion"} <= document["subjects"]["shapes"]["runs"][0].keys()
    assert (tmp_path / "out" / "claim.md").read_text() in said
    assert document["time"]["cpu_s"] > 0
    assert set(document["time"]["parts"]) >= {"shapes: base", "real: videos"}
    assert claim.main(given) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [run["num_steps_of_run"] for run in again] == [0] * 10
    more = json.loads((tmp_path / "out" / "claim.json").read_text())["time"]
    assert more["wall_s"] > document["time"]["wall_s"], "what a command finds finished is added, not counted anew"


def test_a_drawn_clip_shows_its_colour_and_moves_as_its_caption_says(claim: ModuleType) -> None:
    clips = claim.draw_clips(72, 24, seed=5)
    assert len({clip.caption for clip in clips}) == 72
    assert claim.judge([clip.frames for clip in clips], clips) == {"colour": 1.0, "colour_and_motion": 1.0}
    mirrored = [clip.frames[::-1] for clip in clips]
    assert claim.judge(mirrored, clips) == {"colour": 1.0, "colour_and_motion": 0.0}
    grey = [np.full_like(clip.frames, 90) for clip in clips]
    assert claim.judge(grey, clips) == {"colour": 0.0, "colour_and_motion": 0.0}


def results(**starts_and_ends: tuple[float, float]) -> list[dict[str, Any]]:
    shares = {"colour": 1.0, "colour_and_motion": 0.5}
    found: list[dict[str, Any]] = [{"run": "base", "validation": [{"step": 9, "loss": 0.2}], **shares}]
    for name, (start, end) in starts_and_ends.items():
        rows = [{"step": 0, "loss": start}, {"step": 8, "loss": end}]
        found.append({"run": f"{name}, not tuned", "validation": rows[:1], **shares})
        found += [{"run": f"{name}, {tune}", "validation": rows, **shares} for tune in ("output-layer", "all")]
    through = {"image": shares, "compatible": shares, "other": shares}
    return [*found, {"run": "the clips through each VAE", "validation": [], "by_space": through}]


def rendered(claim: ModuleType, **starts_and_ends: tuple[float, float]) -> str:
    facts = {name: {"image_decoder_db": 20.0} for name in ("image", "compatible", "other")}
    text: str = claim.render(results(**starts_and_ends), facts, claim.Subject("shapes", [], [], [], 9, is_judged=True))
    return text


def test_real_clips_are_of_other_videos_than_those_that_are_validated_on(claim: ModuleType) -> None:
    train, held_out = (claim.cut_clips(10, 24, 1, is_held_out=is_held_out) for is_held_out in (False, True))
    assert not {clip.caption for clip in train} & {clip.caption for clip in held_out}
    assert len({clip.caption for clip in train}) == 8
    assert {clip.frames.shape for clip in (*train, *held_out)} == {(17, 24, 24, 3)}
    assert any((clip.frames[0] != clip.frames[-1]).any() for clip in train)


def test_the_table_says_whether_it_came_out_as_expected(claim: ModuleType) -> None:
    table = rendered(claim, compatible=(0.3, 0.25), other=(0.9, 0.6))
    assert "| compatible, output-layer | 0.300 | 0.250 | 100% | 50% |" in table
    assert "+0.100 from the base's in compatible latents and +0.700 in the other's: as expected." in table
    assert "other 0.600 and 0.600: as expected." in table
    table = rendered(claim, compatible=(0.8, 0.7), other=(0.9, 0.6))
    assert "+0.700 in the other's: NOT as expected." in table
    assert "other 0.600 and 0.600: NOT as expected." in table
