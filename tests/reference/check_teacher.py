"""A real image VAE of the TAESD family on real frames; needs the folder named by LATENTMILL_DATA.

Not part of the normal suite, as neither weights nor video are in the repository:
`pytest tests/reference/check_teacher.py`.
The folder holds taef2_encoder.pth, taef2_decoder.pth (MIT, Ollin Boer Bohan) and coffee_1280x720_30fps.mp4.
"""

import os
from pathlib import Path

import av
import pytest
import torch
import torch.nn.functional as F

from cvvae.teachers import load_teacher

FOLDER = os.environ.get("LATENTMILL_DATA", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="LATENTMILL_DATA names no folder with TAEF2 and a video")

NUM_FRAMES, EVERY = 4, 100
SIDE_PX = 256


@pytest.fixture(scope="module")
def frames():
    """(4, 3, 256, 256) in [-1, 1], from the middle of frames over the whole video."""
    with av.open(str(Path(FOLDER) / "coffee_1280x720_30fps.mp4")) as video:
        images = [frame.to_ndarray(format="rgb24") for i, frame in enumerate(video.decode(video=0)) if i % EVERY == 0]
    x = torch.stack([torch.from_numpy(image) for image in images[:NUM_FRAMES]]).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, size=(SIDE_PX, SIDE_PX * 16 // 9), mode="bicubic", antialias=True)
    left = (x.shape[3] - SIDE_PX) // 2
    return x[..., left : left + SIDE_PX].clamp(0, 255) / 127.5 - 1


@pytest.mark.parametrize("name", ["", "taef2_encoder.pth"])
def test_taef2_rebuilds_real_frames_as_well_as_its_author_says(frames, name):
    teacher = load_teacher(str(Path(FOLDER) / name))
    with torch.no_grad():
        latents = teacher.encode_frames(frames)
        rebuilt = teacher.decode_latents(latents).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (rebuilt - frames).square().mean(dim=(1, 2, 3)))
    print("PSNR", [round(value, 2) for value in psnr.tolist()])
    assert latents.shape == (NUM_FRAMES, 32, SIDE_PX // 8, SIDE_PX // 8)
    assert abs(latents.mean().item()) < 0.1
    assert 0.8 < latents.std().item() < 1.0
    assert 31 < psnr.mean().item() < 33.5
