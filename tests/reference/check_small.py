"""The model that ships, on a video that it never saw and beside the image VAE that it follows.

Needs the folder named by LATENTMILL_DATA, as `check_teacher`; not part of the normal suite. Run it with
`pytest tests/reference/check_small.py`. The limits are somewhat below what the model card says.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = os.environ.get("LATENTMILL_DATA", "")
VIDEO_DB, READABLE_DB, DEVIATION_RATIO = 30.8, 31.7, 0.88
pytestmark = pytest.mark.skipif(not FOLDER, reason="LATENTMILL_DATA names no folder with TAEF2 and a video")


def evaluated(model, num_clips, output):
    command = [sys.executable, str(ROOT / "jobs" / "evaluate_vae.py"), "--model", str(model), "--teacher", FOLDER]
    command += ["--input", str(Path(FOLDER) / "coffee_1280x720_30fps.mp4"), "--clips-per-video", str(num_clips)]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "evaluation.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    return evaluated("small", 2, tmp_path_factory.mktemp("evaluation"))


def test_small_reconstructs_a_video_that_it_never_saw(evaluation):
    figures = evaluation["summary"]["all"]
    print("video", figures["video_vae"]["psnr_db"], "image VAE", figures["image_vae"]["psnr_db"])
    assert figures["video_vae"]["psnr_db"] > VIDEO_DB


def test_the_image_decoder_reads_the_latents_of_small(evaluation):
    compatibility = evaluation["summary"]["all"]["compatibility"]["image_decoder"]
    print("image decoder on video latents", compatibility["psnr_db"], "of", compatibility["ceiling_psnr_db"])
    assert compatibility["psnr_db"] > READABLE_DB


def test_the_latents_of_small_have_the_spread_of_the_image_vae(evaluation):
    ratio = evaluation["channels"]["deviation_ratio"]
    print("deviation ratio", ratio)
    assert ratio["median"] > DEVIATION_RATIO


def test_small_leaves_no_seam_in_time(evaluation):
    probes = [clip["figures"]["probe"] for clip in evaluation["clips"] if clip["figures"].get("probe")]
    assert probes
    assert max(probe["chunked"]["latent_rms"] for probe in probes) < 1e-5


def test_the_image_decoder_cannot_read_latents_that_were_never_regularised(evaluation, tmp_path):
    unregularised = evaluated(ROOT / "tests" / "data" / "unregularised", 1, tmp_path)
    figures = unregularised["summary"]["all"]
    readable = figures["compatibility"]["image_decoder"]["psnr_db"]
    print("without regularisation: video", figures["video_vae"]["psnr_db"], "image decoder on its latents", readable)
    assert figures["video_vae"]["psnr_db"] > 20
    assert readable < evaluation["summary"]["all"]["compatibility"]["image_decoder"]["psnr_db"] - 10
