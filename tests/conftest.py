"""Fixtures that several test folders share: a real S3 store on this machine, and a home of its own for Ray."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from servers import BIN, FaultProxy, free_ports, s3_variables, stop, wait_for_http

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
        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
        )


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[SeaweedFS]:
    """One SeaweedFS for the session; it refuses what AWS refuses: second creates, wrong checksums, wrong secrets."""
    folder = Path(tempfile.mkdtemp(prefix="weed-"))
    log = folder / "log"
    port = free_ports(5)
    env = s3_variables(f"http://127.0.0.1:{port}", "test", "testtest")
    names = ("s3", "master", "volume", "filer", "admin")
    command = [
        str(BIN / "weed"),
        "mini",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *(f"-{name}.port={port + number}" for number, name in enumerate(names)),
        "-webdav=false",
        "-admin.ui=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.autoCreateBucket=false",
        "-bucket=shards,latents",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **env, "GOMEMLIMIT": "200MiB"}
        )
    try:
        wait_for_http(f"http://127.0.0.1:{port}", process, log)
        store = SeaweedFS(endpoint=f"http://127.0.0.1:{port}", bucket="latents", env=env)
        _wait_for_bucket(store)
        yield store
    finally:
        stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_bucket(store: SeaweedFS) -> None:
    client = store.client()
    for _ in range(200):
        if store.bucket in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            return
        time.sleep(0.1)
    raise RuntimeError(f"the bucket {store.bucket} was not made")


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
    """Environment of a process that starts Ray: its own HOME and temporary folder.

    The folder's name is short because the paths of Ray's sockets below it may have 107 characters at most.
    """
    folder = Path(tempfile.mkdtemp(prefix="lm", dir="/tmp"))
    (folder / "home").mkdir()
    yield {"HOME": str(folder / "home"), "RAY_TMPDIR": str(folder)}
    shutil.rmtree(folder, ignore_errors=True)
