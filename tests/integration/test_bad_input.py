"""Bad input is a clear message with the right exit code, or a recorded rejection; the rest of the data is done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import media
from builders import CLIP_VIDEOS, clip_members, tar_bytes
from integration.jobs_under_test import SMALL, commits_of, run_job

import cvvae
from pipeline import LatentDataset
from pipeline.storage import open_store
from pipeline.stored import read_rejections

GOOD = CLIP_VIDEOS[0]


def _rejections(uri: str) -> dict[str, str]:
    """Reason by key, of all committed shards."""
    store = open_store(uri)
    return {
        failure.key: failure.reason
        for commit in commits_of(uri).values()
        for file in commit.files
        if file.content == "rejected"
        for failure in read_rejections(store.get(file.key))
    }


def test_every_kind_of_bad_sample_is_a_recorded_rejection_and_the_rest_is_done(
    ray_home: Mapping[str, str], tmp_path: Path
) -> None:
    good = GOOD.read_bytes()
    garbage = bytes(range(256)) * 64
    shards = tmp_path / "shards"
    shards.mkdir()
    members = [
        *clip_members(GOOD, "a_good"),
        ("b_empty.mp4", b""),
        ("c_truncated.mp4", good[: len(good) // 3]),
        ("d_garbage.mp4", garbage),
        ("e_audio.mp4", media.audio_only()),
        ("f_two_frames.mp4", media.two_frames()),
        ("g_huge.png", media.png_header_of_16384_px()),
        ("h_hour.mp4", media.one_hour_of_16_px()),
        ("i_latin1.mp4", good),
        ("i_latin1.txt", "caf\xe9".encode("latin-1")),
        ("j_good.mp4", good),
        ("j_good.txt", "second \u732b".encode()),
        ("a_good.mp4", good),
    ]
    (shards / "00000.tar").write_bytes(tar_bytes(members))
    # Of the sample before a damage nobody knows whether it is whole: its caption may be what was lost.
    media_of = [("l_open.mp4", good), ("m_lost.mp4", good), ("n_lost.mp4", good)]
    damaged = bytearray(tar_bytes([*clip_members(GOOD, "k_good"), *media_of]))
    damaged[damaged.rindex(b"m_lost.mp4")] ^= 0xFF
    (shards / "00001.tar").write_bytes(damaged)
    (shards / "00002.tar").write_bytes(tar_bytes([(f"n{i}.mp4", garbage[i:]) for i in range(3)]))
    output = str(tmp_path / "latents")

    outcome = run_job(["--input", str(shards), "--output", output, *SMALL, "--max-rejected-share", "0.95"], ray_home)

    assert outcome.code == 0, outcome.said
    reasons = _rejections(output)
    expected = {
        "b_empty": {"empty_file"},
        "c_truncated": {"unreadable", "frames_missing", "decode_error"},
        "d_garbage": {"unreadable"},
        "e_audio": {"no_video"},
        "f_two_frames": {"too_short"},
        "g_huge": {"too_large"},
        "h_hour": {"too_small"},
        "i_latin1": {"bad_caption"},
        "*": {"damaged_shard"},
        "n0": {"unreadable"},
        "n1": {"unreadable"},
        "n2": {"unreadable"},
    }
    assert {key: reason for key, reason in reasons.items() if reason not in expected.get(key, ())} == {
        "a_good": "duplicate_key"
    }
    assert reasons.keys() == {*expected, "a_good"}
    result = outcome.result
    assert result["num_videos"] == result["num_videos_ok"] + result["num_videos_rejected"]
    assert result["num_videos_ok"] >= 2
    assert sum(result["reasons"].values()) == len(reasons)
    read = {key: text for b in LatentDataset(output) for key, text in zip(b["key"], b["caption"], strict=True)}
    assert {"j_good", "k_good"} <= read.keys() <= {"a_good", "j_good", "k_good"}
    assert read["j_good"] == "second \u732b"


def test_too_many_rejections_are_an_exit_code_of_their_own(ray_home: Mapping[str, str], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "00000.tar").write_bytes(tar_bytes([(f"n{i}.mp4", b"rubbish") for i in range(3)]))
    output = str(tmp_path / "latents")
    outcome = run_job(["--input", str(tmp_path / "in"), "--output", output, *SMALL], ray_home)
    assert outcome.code == 5, outcome.said
    assert (outcome.result["num_videos_rejected"], outcome.result["num_shards_undone"]) == (3, 0)
    assert set(_rejections(output).values()) == {"unreadable"}


def test_a_checkpoint_with_missing_keys_is_wrong_use_and_nothing_is_written(
    ray_home: Mapping[str, str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    cvvae.load("small").save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    missing = sorted(tensors)[0]
    del tensors[missing]
    save_file(tensors, weights)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "00000.tar").write_bytes(tar_bytes(clip_members(GOOD, "a")))
    flags = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), *SMALL]
    outcome = run_job([*flags, "--model", str(tmp_path / "model")], ray_home)
    assert outcome.code == 2, outcome.said
    assert missing in outcome.result["message"]
    assert not (tmp_path / "out" / "_dataset.json").exists()
