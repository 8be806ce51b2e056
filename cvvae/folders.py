"""Where the files of a model lie on this machine, and the digest of its weights.

Not where they are read or fetched: that is `cvvae.checkpoint`. Without torch, so that the driver of a run can say which
weights it means while its actors load them.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
SHIPPED = Path(__file__).parent / "weights"


def weights_sha256_here(model: str, subfolder: str | None = None) -> str | None:
    """SHA-256 of the weights' file of a model that is on this machine by name or folder; None of any other."""
    folder = folder_here(model, subfolder)
    path = None if folder is None else folder / WEIGHTS_NAME
    return None if path is None or not path.is_file() else sha256_of_file(path)


def folder_here(model: str, subfolder: str | None) -> Path | None:
    """The folder of a model that ships or is given by its folder; None of any other, such as one on a hub."""
    if is_shipped(model) or os.path.isdir(model):
        return (SHIPPED if is_shipped(model) else Path()) / model / (subfolder or "")
    return None


def is_shipped(model: str) -> bool:
    """Whether this is the name of a model that comes with the package."""
    return re.fullmatch(r"[\w.-]+", model) is not None and (SHIPPED / model / CONFIG_NAME).is_file()


def sha256_of_file(path: Path) -> str:
    """In hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
