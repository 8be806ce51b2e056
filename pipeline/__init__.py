"""Latentmill's pipeline: from video shards to committed latents, and back into a training loop.

Not a place for code: importing this package is cheap, and a training machine needs neither Ray nor decord.
`LatentDataset` is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.dataset import LatentDataset

__all__ = ["LatentDataset", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LatentDataset":
        from pipeline.dataset import LatentDataset

        return LatentDataset
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
