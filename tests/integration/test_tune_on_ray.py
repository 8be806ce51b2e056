"""Tuning on Ray Train with two CPU workers: one model, each clip once an epoch, and a checkpoint that goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
from integration.jobs_under_test import ROOT
from tuning import model_config, output_with_embeddings

from jobs.training_checkpoints import checkpoints_in


@pytest.mark.slow
@pytest.mark.timeout(1700)
def test_two_workers_tune_one_model_and_go_on(ray_home: Mapping[str, str], tmp_path: Path) -> None:
    output_with_embeddings(tmp_path / "latents", num_clips=8)
    config = model_config(tmp_path, "text")
    base = [sys.executable, str(ROOT / "jobs" / "finetune_t2v.py"), "--latents", str(tmp_path / "latents")]
    base += ["--validation", str(tmp_path / "latents"), "--model-config", str(config), "--tune", "all", "--lr", "1e-3"]
    base += ["--output", str(tmp_path / "out"), "--batch-size", "2", "--accumulate", "2", "--log-every", "1"]
    base += ["--steps", "6", "--validate-every", "2", "--num-workers", "2", "--gpus-per-worker", "0"]

    def run(*more: str) -> dict[str, Any]:
        env = {**os.environ, **ray_home, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*base, *more], env=env, capture_output=True, text=True, check=False, timeout=800)
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    assert run("--stop-at-step", "3")["ended_by"] == "stop_at_step"
    checkpoint = checkpoints_in(tmp_path / "out")[-1]
    assert checkpoint.step == 3
    # Two epochs of four clips a worker and half of the third: where one stands the other stands.
    cursors = [worker["cursor"] for worker in checkpoint.read().more["workers"]]
    assert cursors[0] == cursors[1]
    assert (cursors[0]["epoch"], cursors[0]["num_global_batches"]) == (2, 2)
    result = run()
    assert (result["ended_by"], result["num_steps_of_run"]) == ("end", 3)
    for name, steps in (("losses.jsonl", [1, 2, 3, 4, 5, 6]), ("validation.jsonl", [0, 2, 4, 6])):
        lines = (tmp_path / "out" / name).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["step"] for line in lines] == steps
    diffusers.UNet3DConditionModel.from_pretrained(tmp_path / "out" / "final" / "unet")
