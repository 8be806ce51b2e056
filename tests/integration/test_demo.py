"""The demo: what it draws, reports and says, and that it empties nobody's folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from html import escape
from pathlib import Path

import pytest
from PIL import Image

from jobs.demo import CLIPS, main

ROOT = Path(__file__).resolve().parent.parent.parent


def _demo(output: Path, env: Mapping[str, str], *flags: str) -> tuple[str, dict[str, object]]:
    command = [sys.executable, str(ROOT / "jobs" / "demo.py"), "--output", str(output), "--buckets", "64x64x17", *flags]
    done = subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, timeout=200, check=False, cwd=output.parent
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((output / "summary.json").read_text(encoding="utf-8"))


def test_the_demo_draws_every_clip_and_shows_no_quality_of_an_untrained_model(
    ray_home: Mapping[str, str], tmp_path: Path
) -> None:
    fields = {"_class_name": "CVVAELightModel", "encoder_widths": [8, 8, 8], "decoder_widths": [8, 8, 8]}
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**fields, "untrained": True}), encoding="utf-8")
    said, summary = _demo(tmp_path / "out", ray_home, "--model", str(model))
    assert "UNTRAINED" in said
    assert "PSNR" not in said
    assert (summary["is_trained"], summary["psnr_db"]) == (False, None)
    assert summary["encode"]["num_records"] == summary["read"]["num_records"] == 12  # type: ignore[index]
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.height > 12 * 96
    with Image.open(tmp_path / "out" / "clips.gif") as animation:
        assert animation.n_frames == 17


def test_the_model_that_ships_is_shown_with_its_psnr_and_a_report_tells_of_every_clip(
    ray_home: Mapping[str, str], tmp_path: Path
) -> None:
    said, summary = _demo(tmp_path / "out", ray_home)
    assert isinstance(summary["psnr_db"], float)
    assert 15 < summary["psnr_db"] < 50
    assert f"PSNR {summary['psnr_db']} dB" in said
    assert "UNTRAINED" not in said
    place = tmp_path / "out" / "report.html"
    assert len([line for line in said.splitlines() if line.startswith("open") and str(place) in line]) == 1
    page = place.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    for caption in sorted(CLIPS.glob("*.txt")):
        assert escape(caption.read_text(encoding="utf-8").strip()) in page, caption.name
    assert len(re.findall(r'<img [^>]*src="data:image/webp;base64,', page)) >= 12
    assert "from the latent" in page


def test_a_folder_that_is_no_demo_output_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path)])
    assert (tmp_path / "thesis.txt").exists()
