"""Canaries in the places where secrets stand are found nowhere that a job writes; what it writes holds no code."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from builders import CLIP_VIDEOS
from integration.jobs_under_test import SMALL, Outcome, RunningJob, commits_of

from pipeline.storage import open_store
from pipeline.stored import read_records, read_rejections

CANARY = "c4n4ry"
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}-aws-secret",
    "AWS_SESSION_TOKEN": f"{CANARY}-aws-token",
    "HF_TOKEN": f"{CANARY}-hub",
    "DATABASE_PASSWORD": f"{CANARY}-other",
}
# As an attacker would write them: to forge lines and to colour terminals.
FORGED = "x\r\n2026-01-01 INFO all is well\x1b[2J"


@pytest.fixture(scope="module")
def finished(ray_home: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "noise.mp4").write_bytes(b"\x1b[31mno video\r\n" * 100)
    rows = [
        {"key": "good", "url": str(CLIP_VIDEOS[0]), "caption": "caf\u00e9"},
        {"key": "signed", "url": f"https://host.example/a.mp4?X-Amz-Signature={CANARY}-signature"},
        {"key": "password", "url": f"https://user:{CANARY}-password@host.example/a.mp4"},
        {"key": "keys", "url": f"s3://AKIA:{CANARY}-key@bucket/a.mp4"},
        {"key": "azure", "url": f"abfs://box/a.mp4?sig={CANARY}-sas&se=2030"},
        {"key": FORGED, "url": str(CLIP_VIDEOS[0])},
        {"key": "noise", "url": str(folder / "noise.mp4"), "caption": FORGED},
        {"key": "gone", "url": f"/no/{FORGED}.mp4"},
    ]
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = ["--input", str(folder / "table.jsonl"), "--output", str(folder / "out"), *SMALL]
    with RunningJob([*flags, "--max-rejected-share", "0.95"], {**ray_home, **SECRETS}) as job:
        return folder, job.end(timeout_s=280)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def test_no_canary_is_in_the_output_the_messages_or_the_logs_of_ray(
    finished: tuple[Path, Outcome], ray_home: Mapping[str, str]
) -> None:
    folder, outcome = finished
    assert outcome.code == 0, outcome.said
    assert (outcome.result["num_videos"], outcome.result["num_videos_ok"]) == (8, 1)
    session = Path(ray_home["RAY_TMPDIR"])
    places = [*_files(folder / "out"), *_files(session)]
    assert sum("worker" in path.name for path in places) > 0, "the logs of Ray's workers are not where they are sought"
    # A plan keeps the one address that can be fetched as it is, because that is what is fetched.
    kept = {path: f"{CANARY}-sas".encode() if "plans" in path.parts else b"" for path in places}
    found = [
        str(path) for path, own in kept.items() if CANARY.encode() in path.read_bytes().replace(own or b"\0\0", b"")
    ]
    assert found == []
    assert CANARY not in outcome.said + json.dumps(outcome.result)
    # Compressed columns hide what a search for bytes would find.
    output = open_store(str(folder / "out"))
    for commit in commits_of(str(folder / "out")).values():
        for file in commit.files:
            data = output.get(file.key)
            rows = read_rejections(data) if file.content == "rejected" else read_records(data, file.content)
            assert CANARY not in "".join(map(str, rows)), file.key


def test_nothing_that_stands_in_the_input_forges_a_line_or_reaches_a_terminal(
    finished: tuple[Path, Outcome], ray_home: Mapping[str, str]
) -> None:
    _, outcome = finished
    logs = [path for path in _files(Path(ray_home["RAY_TMPDIR"])) if path.suffix in (".log", ".out", ".err")]
    assert logs
    said = [outcome.said, *(path.read_text(errors="replace") for path in logs)]
    assert not any("\x1b[2J" in text or "\n2026-01-01 INFO all is well" in text for text in said)


def test_the_result_says_what_keeps_decode_children_in(finished: tuple[Path, Outcome]) -> None:
    _, outcome = finished
    assert "seccomp" in outcome.result["sandbox"]
    assert f"kept in by: {outcome.result['sandbox']}" in outcome.said


def test_outputs_hold_no_code(finished: tuple[Path, Outcome]) -> None:
    folder, _ = finished
    suffixes = {path.suffix for path in _files(folder / "out")}
    assert suffixes <= {".parquet", ".tar", ".json", ".zst", ".gz"}
    assert {".parquet", ".tar"} <= suffixes
    for path in _files(folder / "out"):
        if path.suffix == ".parquet":
            schema = pq.read_schema(path)
            # Extension types are where readers have unpickled what a stranger wrote.
            assert b"ARROW:extension:name" not in str(schema.metadata).encode()
            assert not any("extension" in str(f.type) or b"ARROW:extension:name" in (f.metadata or {}) for f in schema)
        elif path.suffix == ".tar":
            with tarfile.open(path) as tar:
                for member in tar:
                    extension = member.name.partition(".")[2]
                    assert extension in ("latent.npy", "mean.npy", "logvar.npy", "json", "txt"), member.name
                    if extension.endswith("npy"):
                        content = tar.extractfile(member)
                        assert content is not None
                        assert np.load(io.BytesIO(content.read()), allow_pickle=False).dtype.kind == "f"


def test_nothing_temporary_is_left(finished: tuple[Path, Outcome], ray_home: Mapping[str, str]) -> None:
    folder, _ = finished
    assert not list((folder / "out").rglob(".tmp/*"))
    assert not [path for path in Path(os.environ.get("TMPDIR", "/tmp")).glob("core*") if path.stat().st_size > 1 << 20]
