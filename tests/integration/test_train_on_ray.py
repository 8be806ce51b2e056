"""Training on Ray Train with two CPU workers: they share one model, its checkpoints, and a wish to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from builders import CLIPS
from integration.jobs_under_test import ROOT

import cvvae
from jobs.training_checkpoints import checkpoints_in

MODEL = {
    "_class_name": "CVVAEModel",
    "z_channels": 4,
    "ch": 8,
    "ch_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "norm_num_groups": 4,
    "norm": "frame",
}


def _start(folder: Path, env: Mapping[str, str], steps: int) -> psutil.Popen:
    (folder / "model.json").write_text(json.dumps(MODEL), encoding="utf-8")
    config: dict[str, Any] = {
        "input": str(CLIPS),
        "model_config": str(folder / "model.json"),
        "perceptual": "none",
        "source_px": 40,
        "source_frames": 17,
        "log_every": 1,
        "checkpoint_every": 4,
        "settings": [{"kind": "video", "size": 32, "frames": 5, "batch": 1}, {"kind": "image", "size": 32}],
        "loss": {"perceptual_weight": 0, "lambda_decoder": 0},
        "trainer": {"discriminator_channels": 8},
        "stages": [{"steps": 2, "freeze": "encoder", "lr": 1e-3}, {"steps": steps - 2, "lr": 1e-3}],
        "num_workers": 2,
        "gpus_per_worker": 0,
    }
    (folder / "training.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, str(ROOT / "jobs" / "train_vae.py"), "--config", str(folder / "training.yaml")]
    return psutil.Popen(
        [*command, "--output", str(folder / "out")],
        env={**os.environ, **env, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _end(process: psutil.Popen) -> tuple[int, dict[str, Any], str]:
    """Exit code, result line and messages; whatever the job started is gone afterwards."""
    children = []
    try:
        children = process.children(recursive=True)
        said, messages = process.communicate(timeout=280)
    finally:
        for child in [process, *children]:
            if child.is_running():
                child.kill()
    lines = said.splitlines()
    return process.returncode, json.loads(lines[-1]) if lines else {}, messages


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_train_one_model_and_go_on_from_a_wish_to_stop(ray_home: Mapping[str, str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = _start(tmp_path, ray_home, steps=2000)
    deadline = time.monotonic() + 250
    while not checkpoints_in(output) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, result, messages = _end(process)
    assert (code, result.get("ended_by")) == (130, "interrupt"), messages
    step = int(result["step"])
    assert checkpoints_in(output)[-1].step == step
    assert "2000 steps" in messages
    code, result, messages = _end(_start(tmp_path, ray_home, steps=step + 3))
    assert code == 0, messages
    assert (result["step"], result["num_steps_of_run"]) == (step + 3, 3)
    rows = [json.loads(line) for line in (output / "losses.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == list(range(1, step + 4))
    assert "discriminator" in rows[-1]
    more = json.loads((checkpoints_in(output)[-1].folder / "training.json").read_text(encoding="utf-8"))["more"]
    digests = [worker["cursor"]["inputs"][0]["digest"] for worker in more["workers"]]
    assert len(set(digests)) == 2
    assert cvvae.load(output / "final").is_trained
    assert not (output / ".ray").exists()
