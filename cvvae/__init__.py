"""CV-VAE in PyTorch: video to latents that live in the space of an image VAE, and back.

Reads the published checkpoints unchanged. Knows nothing of the pipeline; `pipeline/codec` and the jobs enter here.
Source: CV-VAE, arXiv 2405.20279.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cvvae.config import ConfigError, CVVAEConfig

if TYPE_CHECKING:
    from cvvae.checkpoint import CheckpointError, load
    from cvvae.folders import weights_sha256_here
    from cvvae.model import CVVAE, DecoderOutput, EncoderOutput, LatentDistribution

__all__ = [
    "CVVAE",
    "CVVAEConfig",
    "CheckpointError",
    "ConfigError",
    "DecoderOutput",
    "EncoderOutput",
    "LatentDistribution",
    "load",
    "weights_sha256_here",
]

_MODULES = {
    "CVVAE": "cvvae.model",
    "CheckpointError": "cvvae.checkpoint",
    "DecoderOutput": "cvvae.model",
    "EncoderOutput": "cvvae.model",
    "LatentDistribution": "cvvae.model",
    "load": "cvvae.checkpoint",
    "weights_sha256_here": "cvvae.folders",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; a command that only reads a configuration need not wait for it.
    if name not in _MODULES:
        raise AttributeError(f"module 'cvvae' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)
