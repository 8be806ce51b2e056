"""The ablation of the latent regularisation runs, keeps what is finished, and says whether the paper is confirmed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import cvvae
from cvvae.teachers import TinyImageVAE

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "tests" / "benchmarks" / "ablation.py"
CLIP = ROOT / "tests" / "data" / "clips" / "meadow_rocks.mp4"
MODEL = {
    "_class_name": "CVVAESD3Model",
    "out_channels": 4,
    "block_out_channels": [8, 8, 8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablation", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_steps_of_two_arms_give_a_table_and_are_not_run_again(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    torch.manual_seed(6)
    teacher = TinyImageVAE(4, width=4)
    for half in ("encoder", "decoder"):
        torch.save(getattr(teacher, half).state_dict(), tmp_path / f"tiny_{half}.pth")
    flags = ["--teacher", tmp_path / "tiny_encoder.pth", "--model", tmp_path / "model", "--output", tmp_path / "out"]
    flags += ["--input", CLIP, "--held-out", CLIP, "--arms", "none,decoder", "--seeds", "3", "--steps", "2"]
    flags += ["--batch", "1", "--size-px", "32", "--held-out-size-px", "32", "--held-out-clips", "1"]

    def run() -> str:
        command = [sys.executable, str(SCRIPT), *map(str, flags)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        logs = "\n".join(path.read_text() for path in (tmp_path / "out").glob("*.log"))
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
        return done.stdout

    first = run()
    assert "2 runs of 2 steps, 0 finished before" in first
    document = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert [(result["arm"], result["seed"]) for result in document["runs"]] == [("none", 3), ("decoder", 3)]
    for result in document["runs"]:
        assert all(0 < result[name] < 60 for name in ("video", "image_decoder", "image_encoder", "teacher"))
    # Only the objective differs: the same start and the same batches.
    assert document["runs"][0]["teacher"] == document["runs"][1]["teacher"]
    assert cvvae.load(tmp_path / "out" / "none-seed3").latent_channels == 4
    table = (tmp_path / "out" / "ablation.md").read_text()
    assert table in first
    second = run()
    assert "2 runs of 2 steps, 2 finished before" in second
    assert table in second


def results(ablation: ModuleType, **figures: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "arm": arm.replace("_", "-"),
            "seed": seed,
            "teacher": 32.0,
            "seconds": 60,
            **dict.fromkeys(ablation.FIGURES, v),
        }
        for arm, values in figures.items()
        for seed, v in enumerate(values)
    ]


def test_the_table_says_when_the_papers_picture_holds(ablation: ModuleType) -> None:
    table = ablation.render(
        results(ablation, none=[8.0, 9.0], decoder=[20.0, 21.0], decoder_slice=[20.5, 20.9], decoder_first=[15, 15])
    )
    assert "| decoder | 20.50 (±0.50) |" in table
    assert "12.00 dB worse than with it: as expected" in table
    assert "(decoder-slice): -0.20 dB, noise 1.00 dB: best or within noise, as expected" in table


def test_the_table_says_when_it_does_not(ablation: ModuleType) -> None:
    table = ablation.render(results(ablation, none=[19.0, 19.0], decoder=[20.0, 20.1], decoder_average=[22.0, 22.0]))
    assert "worse than with it: NOT the 3.0 dB that were expected" in table
    assert "(decoder-average): -1.95 dB, noise 0.10 dB: NOT as expected" in table


def test_one_arm_alone_has_a_table_and_no_verdict(ablation: ModuleType) -> None:
    table = ablation.render(results(ablation, encoder=[18.0]))
    assert "| encoder | 18.00 |" in table
    assert "expected" not in table


def test_the_arms_are_those_of_the_papers_tables(ablation: ModuleType) -> None:
    weights = {name: (arm.lambda_decoder, arm.lambda_encoder, arm.mapping) for name, arm in ablation.ARMS.items()}
    assert weights == {
        "none": (0, 0, "random"),
        "encoder": (0, 1, "random"),
        "decoder": (1, 0, "random"),
        "both": (1, 1, "random"),
        "decoder-first": (1, 0, "first"),
        "decoder-slice": (1, 0, "slice"),
        "decoder-average": (1, 0, "average"),
    }
    assert {arm.regularisation for arm in ablation.ARMS.values()} == {"l2"}
