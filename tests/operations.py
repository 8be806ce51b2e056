"""What the tests of `infra/` share: tools of the operating system, the manifests as kustomize builds them, expressions.

Not fixtures and not checks. Tools that no package registry for Python has are looked for on the PATH: where one is
absent its tests are skipped, or fail with LATENTMILL_REQUIRE_TOOLS=1.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from servers import BIN

from pipeline.metrics import METRICS, final_name

INFRA = Path(__file__).parent.parent / "infra"
MONITORING = INFRA / "monitoring"
_NAME = re.compile(r"\blatentmill_[a-z_]+")


def debian_tool(name: str, package: str) -> str:
    """The path of a program that Debian packages; without it the test is skipped, or fails where tools are required."""
    path = shutil.which(name)
    if path is None:
        say = f"{name} is not installed (Debian: apt-get install {package})"
        if os.environ.get("LATENTMILL_REQUIRE_TOOLS") == "1":
            pytest.fail(say)
        pytest.skip(say)
    return path


def promtool(*arguments: str, cwd: Path | None = None) -> str:
    """What promtool says; fails the test where it is not content."""
    command = [debian_tool("promtool", "prometheus"), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kustomize(folder: Path) -> list[dict[str, Any]]:
    """The objects that `kubectl apply -k` would send."""
    done = subprocess.run([BIN / "kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def one(documents: list[dict[str, Any]], kind: str, name: str | None = None) -> dict[str, Any]:
    """The only object of a kind, or of a kind and name."""
    found = [d for d in documents if d["kind"] == kind and name in (None, d["metadata"]["name"])]
    assert len(found) == 1, (kind, name, [d["kind"] for d in documents])
    return found[0]


def samples_of_metrics() -> set[str]:
    """Every name that a query may use: live samples, and the last values of a run."""
    live = set()
    for name, row in METRICS.items():
        live |= {name + part for part in ("_bucket", "_sum", "_count")} if row.kind == "histogram" else {name}
    return live | {final_name(name) for name in live if not name.endswith("_bucket")}


def names_in(expression: str) -> set[str]:
    """The metrics that an expression asks for."""
    return set(_NAME.findall(expression))


def panels() -> Iterator[tuple[str, list[str]]]:
    """Title and expressions of each panel of the dashboard."""
    for panel in dashboard()["panels"]:
        if panel["type"] != "row":
            yield panel["title"], [target["expr"] for target in panel["targets"]]


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((MONITORING / "latentmill.json").read_text())
    return loaded


def filled(expression: str, variables: Mapping[str, str]) -> str:
    """An expression as Grafana sends it."""
    for name, value in variables.items():
        expression = expression.replace(f"${name}", value)
    return expression
