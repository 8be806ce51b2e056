"""The rules for buckets under infra/ allow what Latentmill does, and nothing that would break its promises."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import latents
import pytest
from botocore.exceptions import ClientError
from builders import CLIP_VIDEOS, pack_clips
from chaos.policy import BucketPolicy
from chaos.store_faults import Driver, proxy_process, put_inputs, report_of
from conftest import SeaweedFS
from integration.jobs_under_test import SMALL, run_job
from servers import FaultProxy, s3_client

from pipeline.audit import audit
from pipeline.cli import main
from pipeline.commit import load_commits, open_dataset, put_data_file
from pipeline.storage import open_store

INFRA = Path(__file__).resolve().parent.parent.parent / "infra"
POLICY = INFRA / "bucket-policy.json"
CREATED_ONCE = ("_dataset.json", "plans/a", "commits/aa/a.json", "manifests/a", "snapshots/a.json", "repairs/a/1.json")


def _may(role: str, method: str, key: str, headers: Mapping[str, str] | None = None, **query: str) -> bool:
    return BucketPolicy(POLICY, "latents").is_allowed(role, method, f"/latents/{key}", query, headers or {})


@pytest.mark.parametrize("root", ["run1/", "team/run1/columns/text/"])
@pytest.mark.parametrize("key", CREATED_ONCE)
def test_what_is_created_once_is_neither_overwritten_nor_removed_by_anyone(root: str, key: str) -> None:
    for role in ("latentmill-writer", "latentmill-collector", "latentmill-reader", "stranger"):
        assert not _may(role, "PUT", root + key)
        assert not _may(role, "POST", root + key, uploadId="1")
        assert not _may(role, "DELETE", root + key)
    assert _may("latentmill-writer", "PUT", root + key, {"If-None-Match": "*"})
    assert not _may("latentmill-reader", "PUT", root + key, {"If-None-Match": "*"})
    assert _may("latentmill-reader", "GET", root + key)


def test_data_is_written_by_writers_removed_by_the_collector_and_read_by_all() -> None:
    key = "run1/data/aa/commits-00000000.parquet"
    may = {
        role: "".join(
            method[0] for method in ("GET", "HEAD", "PUT", "DELETE") if _may(f"latentmill-{role}", method, key)
        )
        for role in ("writer", "collector", "reader")
    }
    assert may == {"writer": "GHP", "collector": "GHD", "reader": "GH"}
    assert not _may("stranger", "GET", key)


def test_a_driver_asks_for_nothing_that_the_policy_denies_a_writer(seaweedfs: SeaweedFS) -> None:
    source, output = put_inputs(seaweedfs.env), seaweedfs.root()
    with proxy_process(seaweedfs.endpoint, "--policy", str(POLICY), "--role", "latentmill-writer") as proxy:
        Driver(source, output, "writer", {**seaweedfs.env, "AWS_ENDPOINT_URL": proxy}).end()
        report = report_of(proxy)
    assert report["requests"] > 50
    assert report["denied"] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_run_asks_for_nothing_that_the_policy_denies_a_writer(
    seaweedfs: SeaweedFS, ray_home: Mapping[str, str], tmp_path: Path
) -> None:
    pack_clips(tmp_path / "in", 3, CLIP_VIDEOS[:3])
    output = seaweedfs.root()
    flags = ["--input", str(tmp_path / "in"), "--output", output, *SMALL, "--num-actors", "1"]
    with proxy_process(seaweedfs.endpoint, "--policy", str(POLICY), "--role", "latentmill-writer") as proxy:
        env = {**ray_home, **seaweedfs.env, "AWS_ENDPOINT_URL": proxy}
        assert [run_job(flags, env).code for _ in range(2)] == [0, 0]
        report = report_of(proxy)
        assert report["requests"] > 20
        assert report["denied"] == []
        # The proxy does enforce it.
        client = s3_client({**seaweedfs.env, "AWS_ENDPOINT_URL": proxy})
        key = next(info.removeprefix("s3://latents/") for info in _urls(output, seaweedfs))
        with pytest.raises(ClientError, match="AccessDenied"):
            client.delete_object(Bucket="latents", Key=key)
        assert len(report_of(proxy)["denied"]) == 1


def _urls(output: str, store: SeaweedFS) -> list[str]:
    pages = s3_client(store.env).list_objects_v2(Bucket="latents", Prefix=output.removeprefix("s3://latents/"))
    return [f"s3://latents/{entry['Key']}" for entry in pages["Contents"] if "/commits/" in entry["Key"]]


def test_collection_verification_and_orders_of_repairs_keep_to_their_roles(
    s3_env: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = s3_env.root()
    store = open_store(root)
    manifest = open_dataset(store, latents.manifest())
    latents.commit_records(store, manifest, "s000", [latents.record("a")])
    (tmp_path / "orphan").write_bytes(b"of an attempt that lost")
    orphan = put_data_file(store, tmp_path / "orphan", shard_id="s000", content="parquet", num_rows=1)
    for role, command, code in (
        ("latentmill-reader", ["verify", root], 0),
        ("latentmill-collector", ["gc", root, "--delete"], 0),
        ("latentmill-collector", ["verify", root], 0),
    ):
        with proxy_process(s3_env.endpoint, "--policy", str(POLICY), "--role", role) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
            assert main(command) == code, capsys.readouterr()
            assert report_of(proxy)["denied"] == []
            monkeypatch.setenv("AWS_ENDPOINT_URL", s3_env.endpoint)
    assert store.head(orphan.key) is None
    assert audit(store, is_quick=False, with_inputs=False).damage == ()
    (commit,) = load_commits(store)
    store.delete(commit.files[0].key)
    with proxy_process(s3_env.endpoint, "--policy", str(POLICY), "--role", "latentmill-writer") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        assert main(["verify", root, "--requeue"]) == 1
        assert report_of(proxy)["denied"] == []


_UPLOAD = """
import sys
from pathlib import Path
import pipeline.s3
from pipeline.storage import open_store, sha256_of_file
pipeline.s3.SINGLE_PUT_BYTES, pipeline.s3.PART_BYTES = 1, 5 << 20
path = Path(sys.argv[2])
open_store(sys.argv[1]).put_file("data/aa/large.tar", path, sha256_of_file(path))
"""


def test_an_upload_that_a_kill_leaves_open_shows_nothing_and_is_ended_by_the_rule_of_the_bucket(
    s3_env: SeaweedFS, proxy: FaultProxy, tmp_path: Path
) -> None:
    at_second_part, killed = threading.Event(), threading.Event()

    def fault(method: str, path: str) -> str | None:
        if method == "PUT" and "partNumber=2" in path:
            at_second_part.set()
            killed.wait(60)
            return "drop"
        return None

    proxy.fault = fault
    root = s3_env.root()
    path = tmp_path / "large.tar"
    path.write_bytes(os.urandom(11 << 20))
    writer = subprocess.Popen([sys.executable, "-c", _UPLOAD, root, str(path)], cwd=INFRA.parent)
    try:
        assert at_second_part.wait(60)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        killed.set()
    store, client = open_store(root), s3_client(s3_env.env)
    key = f"{root.removeprefix('s3://latents/')}/data/aa/large.tar"
    assert store.head("data/aa/large.tar") is None
    assert list(store.list("")) == []
    left = client.list_multipart_uploads(Bucket="latents").get("Uploads", [])
    assert key in [upload["Key"] for upload in left], "a kill does leave an upload open"
    rules = json.loads((INFRA / "bucket-lifecycle.json").read_text(encoding="utf-8"))
    client.put_bucket_lifecycle_configuration(Bucket="latents", LifecycleConfiguration=rules)
    (rule,) = rules["Rules"]
    assert rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] == 7
    proxy.fault = lambda method, path: None
    # The next attempt stores the same bytes under the same name.
    subprocess.run([sys.executable, "-c", _UPLOAD, root, str(path)], cwd=INFRA.parent, check=True, timeout=120)
    assert store.get("data/aa/large.tar") == path.read_bytes()
