"""The shape of the project: what imports what, what stays light, and that the README's map shows every file.

The arrows between modules are import contracts in pyproject.toml, checked by `make lint`; here is what they cannot say.
"""

from __future__ import annotations

import ast
import re
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


def test_the_map_in_the_readme_shows_every_module_once_and_nothing_else() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    chart = readme.partition("## Map of the code")[2].partition("\n## ")[0]
    named = re.findall(r"^\|[ a-z]*\| `([\w/]+\.py)` \|", chart, flags=re.MULTILINE)
    assert sorted(named) == sorted(str(path.relative_to(ROOT)) for path in MODULES)


def test_every_make_target_that_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"`make ([a-z]+)`", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {"demo", "test", "bench", "chaos"} <= named <= targets


def test_every_flag_that_the_readme_and_the_manifests_name_is_known_to_the_job() -> None:
    from pipeline.config import argument_parser

    documents = [ROOT / "README.md", *sorted((ROOT / "infra").glob("*.yaml"))]
    readme = "\n".join(path.read_text(encoding="utf-8").replace("\n    --", " --") for path in documents)
    known = {flag for action in argument_parser()._actions for flag in action.option_strings}
    commands = re.findall(r"encode_laion\.py((?:\\\n|[^\n`])*)", readme)
    used = {flag for command in commands for flag in re.findall(r"--[a-z][a-z0-9-]*", command)}
    assert len(used) >= 5
    assert used <= known
