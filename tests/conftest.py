"""Fixtures that several test folders share: a real S3 store on this machine, and a home of its own for Ray."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from servers import FaultProxy, ray_folders, s3_client, seaweed

import pipeline.s3
from pipeline.storage import ObjectStore, open_store


@dataclass(frozen=True)
class SeaweedFS:
    """A running store; `env` is what a process needs to reach it, `root()` a place in it that nobody else uses."""

    endpoint: str
    bucket: str
    env: Mapping[str, str]

    def root(self) -> str:
        return f"s3://{self.bucket}/{uuid.uuid4().hex[:12]}"

    def client(self) -> Any:
        """A plain botocore client, for looking at the store from outside."""
        return s3_client(self.env)


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[SeaweedFS]:
    """One SeaweedFS for the session; it refuses what AWS refuses: second creates, wrong checksums, wrong secrets."""
    with seaweed(("shards", "latents")) as (endpoint, env):
        yield SeaweedFS(endpoint=endpoint, bucket="latents", env=env)


@pytest.fixture
def s3_env(seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> SeaweedFS:
    """The store, with this process's environment set to reach it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in seaweedfs.env.items():
        monkeypatch.setenv(name, value)
    return seaweedfs


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """An empty output, once as a folder and once on S3."""
    if request.param == "local":
        return open_store(str(tmp_path / "output"))
    environment: SeaweedFS = request.getfixturevalue("s3_env")
    return open_store(environment.root())


@pytest.fixture
def proxy(s3_env: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A way to the store that a test can spoil; this process's environment points at it."""
    proxy = FaultProxy(s3_env.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setattr(pipeline.s3, "_answered", {proxy.endpoint})
    yield proxy
    proxy.close()


@pytest.fixture
def far_store(proxy: FaultProxy, s3_env: SeaweedFS) -> ObjectStore:
    """An S3 store behind the proxy."""
    return open_store(s3_env.root())


@pytest.fixture(scope="session")
def ray_home() -> Iterator[dict[str, str]]:
    """Environment of a process that starts Ray, one for the session."""
    with ray_folders() as env:
        yield env
