"""The job's command line: wrong use is exit code 2 and a message that names the culprit, before anything is started."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from builders import CLIP_VIDEOS, clip_members, tar_bytes
from conftest import SeaweedFS
from servers import FaultProxy

from jobs.encode_laion import _told, main
from pipeline.run import RunSummary


def _run(flags: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, object], str]:
    """Exit code, the JSON object of the last line, and all that was said; Ray is not started by wrong use."""
    (folder / "in").mkdir()
    (folder / "in" / "00000.tar").write_bytes(tar_bytes(clip_members(CLIP_VIDEOS[0], "a")))
    base = ["--input", str(folder / "in"), "--output", str(folder / "out"), "--model", "small"]
    code = main([*base, "--progress", "plain", *flags])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]), captured.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--input", "{tmp}/nowhere"], "nowhere"),
        (["--input", "{tmp}/empty"], "{tmp}/empty"),
        (["--input", "s3://no-such-bucket-here/shards"], "no-such-bucket-here"),
        (["--output", "s3://no-such-bucket-here/latents"], "no-such-bucket-here"),
        (["--output", "{tmp}/file/latents"], "{tmp}/file"),
        (["--output", "ftp://host/latents"], "ftp"),
        (["--buckets", "100x100x16"], "multiple of 8"),
        (["--config", "{tmp}/job.yaml"], "colour"),
        (["--config", "{tmp}/nowhere.yaml"], "nowhere.yaml"),
        (["--retry-failed", "too_late"], "too_late"),
        (["--text-columns", ","], "--text-columns"),
        (["--image-encoder-sha256", "12"], "--image-encoder-sha256"),
    ],
)
def test_wrong_use_is_exit_code_2_with_a_message_that_names_the_culprit(
    flags: list[str], said: str, s3_env: SeaweedFS, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    (tmp_path / "job.yaml").write_text("colour: red\n", encoding="utf-8")
    code, result, err = _run([flag.replace("{tmp}", str(tmp_path)) for flag in flags], tmp_path, capsys)
    assert (code, result["exit_code"]) == (2, 2)
    assert said.replace("{tmp}", str(tmp_path)) in str(result["message"])
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("commits/*"))


def test_a_hostile_name_stays_one_line_of_the_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result, err = _run(["--input", f"{tmp_path}/no\r\nall is well\x1b[2J"], tmp_path, capsys)
    assert (code, result["exit_code"]) == (2, 2)
    assert "no\\r\\nall is well\\x1b[2J" in err
    assert not set("\x1b\r") & set(err)
    assert "all is well" not in [line[:11] for line in err.splitlines()]


def test_credentials_that_expire_leave_the_work_undone(
    s3_env: SeaweedFS, proxy: FaultProxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.fault = lambda method, path: "400"
    code, result, _err = _run(["--output", s3_env.root()], tmp_path, capsys)
    assert (code, result["error"]) == (4, "CredentialsExpiredError")
    assert "AWS_SESSION_TOKEN" in str(result["message"])


def test_wrong_credentials_are_named_without_being_shown(
    s3_env: SeaweedFS, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "swordfish-secret")
    code, result, err = _run(["--output", s3_env.root()], tmp_path, capsys)
    assert code == 2
    assert s3_env.bucket in str(result["message"])
    assert "swordfish" not in err + json.dumps(result)


def test_a_store_that_cannot_be_reached_leaves_the_work_undone(
    s3_env: SeaweedFS, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("pipeline.s3.FIRST_CONTACT_BUDGET_S", 1.0)
    code, result, _err = _run(["--output", s3_env.root()], tmp_path, capsys)
    assert (code, result["error"]) == (4, "StorageUnavailableError")
    assert "127.0.0.1:9" in str(result["message"])


def test_a_terminal_gets_lines_for_people_instead_of_the_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    base = ["--input", str(CLIP_VIDEOS[0].parent), "--output", str(tmp_path / "out"), "--model", "small"]
    assert main([*base, "--dry-run", "--dry-run-seconds", "0"]) == 0
    assert main([*base, "--fps", "fast"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1 shard planned" in captured.err
    assert "'fast' is neither" in captured.err
    summary = RunSummary(
        exit_code=4,
        num_shards=8,
        num_shards_done_before=2,
        num_shards_done=5,
        num_shards_undone=1,
        num_videos=75,
        num_videos_ok=70,
        num_videos_rejected=5,
        num_clips=1306,
        num_records=1300,
        num_clips_rejected=6,
        num_frames=22100,
        reasons={"unreadable": 5, "frames_missing": 1},
        snapshot=1,
        elapsed_s=61.2,
        clips_per_s=20.0,
        undone={"00007": "the store was away"},
    )
    assert list(_told(summary, "my latents")) == [
        "done      1,300 clips of 70 videos and images, in 7 shards; 5 of them in this run, in 0:01:01",
        "rejected  5 videos and images; by reason, with single clips: unreadable 5, frames_missing 1",
        "undone    1 shard; the same command goes on",
        "          00007: the store was away",
        "next      latentmill report 'my latents' -o report.html",
    ]
