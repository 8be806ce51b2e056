"""The shape of the project: what imports what, and what stays light.

The arrows between modules are import contracts in pyproject.toml, checked by `make lint`; here is what they cannot say.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path for folder in ("pipeline", "cvvae", "jobs") for path in (ROOT / folder).rglob("*.py"))


def _loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_importing_the_pipeline_is_light() -> None:
    assert not _loaded_after("import pipeline, cvvae") & {"torch", "ray", "decord", "av", "pyarrow", "botocore"}


def test_a_training_machine_needs_neither_ray_nor_a_video_decoder() -> None:
    loaded = _loaded_after("from pipeline import LatentDataset")
    assert "torch" in loaded
    assert not loaded & {"ray", "decord", "av", "cvvae", "s3fs"}


def test_a_decode_child_loads_neither_torch_nor_ray_nor_a_store() -> None:
    loaded = _loaded_after("import pipeline.decode_child")
    assert not loaded & {"torch", "ray", "botocore", "fsspec", "s3fs", "pyarrow"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_opens_with_what_it_is(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert text is not None
    assert len(text) > 40
