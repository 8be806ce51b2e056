"""The evaluation job: figures that agree in JSON, tables and page, accounts that balance, wrong use that is named.

The models are made and tiny; what they are worth is the subject of tests/cvvae/test_evaluation.py.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from builders import CLIP_STILLS, CLIP_VIDEOS
from image_vaes import narrow_image_vae
from PIL import Image

from cvvae.inflate import inflate
from jobs.evaluate_vae import SCHEMA, main
from jobs.evaluation_report import facts

BUCKET = "64x64x9"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@dataclass(frozen=True)
class Outcome:
    """What one run left behind."""

    document: dict[str, Any]
    tables: str
    page: str
    said: str


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """image/: an image VAE with 4 channels; image16/: with 16; video/: the video VAE inflated from the first."""
    folder = tmp_path_factory.mktemp("models")
    image_vae = narrow_image_vae(0)
    image_vae.save_pretrained(folder / "image")
    narrow_image_vae(1, latent_channels=16).save_pretrained(folder / "image16")
    inflate(image_vae).save_pretrained(folder / "video")
    return folder


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos, a picture and a file that is no video."""
    folder = tmp_path_factory.mktemp("media")
    for path in (*CLIP_VIDEOS[:2], CLIP_STILLS[0]):
        shutil.copy(path, folder)
    (folder / "broken <b>&.mp4").write_bytes(b"this is no video" * 100)
    return folder


def _flags(models: Path, media: Path, output: Path) -> list[str]:
    named = {"model": models / "video", "input": media, "output": output, "buckets": BUCKET, "threads": 1}
    return [part for name, value in named.items() for part in (f"--{name}", str(value))] + ["--device", "cpu"]


@pytest.fixture(scope="module")
def outcome(models: Path, media: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run with everything that can be measured here."""
    folder = tmp_path_factory.mktemp("evaluation") / "new" / "folder"
    flags = [*_flags(models, media, folder), "--teacher", str(models / "image"), "--clips-per-video", "2"]
    flags += ["--probe-clips", "1", "--timing", "--timing-rounds", "1", "--pictures", "3"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(flags) == 0
    texts = [(folder / f"evaluation.{suffix}").read_text(encoding="utf-8") for suffix in ("json", "md", "html")]
    return Outcome(json.loads(texts[0]), texts[1], texts[2], said.getvalue())


class _Page(HTMLParser):
    """Pictures, tables, headings and addresses of a page; refuses tags that do not close in order."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.svgs: list[dict[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag == "img":
            self.images.append(named)
        elif tag == "svg":
            self.svgs.append(named)
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append("")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self._open and self._open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data


def _markdown_rows(tables: str) -> list[list[str]]:
    lines = [line for line in tables.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_accounts_balance_and_name_every_rejection(outcome: Outcome) -> None:
    accounts = outcome.document["accounts"]
    assert accounts["num_videos"] == 4
    assert accounts["num_videos_ok"] == 3
    assert accounts["num_videos_rejected"] == 1
    assert accounts["num_images"] == 1
    assert accounts["num_clips"] == len(outcome.document["clips"]) == 5
    assert accounts["num_clips_moving"] + accounts["num_clips_static"] + accounts["num_images"] == 5
    assert not accounts["is_limited"]
    (rejected,) = outcome.document["rejected"]
    assert (rejected["key"], rejected["step"], rejected["reason"]) == ("broken <b>&", "decode", "unreadable")
    for text in (outcome.tables, outcome.said):
        assert "broken <b>&" in text
    assert any(row[0] == "broken <b>&" for row in _Page(outcome.page).rows)


def test_the_document_has_every_part_and_means_that_follow_from_its_clips(outcome: Outcome) -> None:
    document = outcome.document
    assert document["schema"] == SCHEMA
    assert set(document) == {
        *("schema", "created_at", "settings", "model", "teacher", "accounts", "rejected", "summary", "channels"),
        *("timing", "clips"),
    }
    videos = [clip["figures"] for clip in document["clips"] if clip["figures"]["num_frames"] > 1]
    summary = document["summary"]
    assert summary["all"]["num_clips"] == len(videos)
    for name in ("video_vae", "image_vae", "image_vae_interpolated", "image_vae_held"):
        mean = sum(figures[name]["psnr_db"] for figures in videos) / len(videos)
        assert summary["all"][name]["psnr_db"] == pytest.approx(mean, rel=1e-5)
        assert all(len(figures[name]["frame_psnr_db"]) == 9 for figures in videos)
    assert summary["images"]["num_clips"] == 1
    assert summary["all"]["compatibility"]["image_decoder"]["psnr_db"] > 0
    assert len(document["channels"]["correlation"]) == document["teacher"]["latent_channels"] == 4
    assert sum(figures["probe"] is not None for figures in videos) == 1
    assert document["timing"]["num_rounds"] == 1
    assert document["timing"]["num_threads"] == document["settings"]["num_threads"] == 1
    assert document["model"]["is_trained"]
    assert document["settings"]["fps"] == 8


def test_page_table_and_document_show_the_same_numbers(outcome: Outcome) -> None:
    page_rows = [[" ".join(cell.split()) for cell in row] for row in _Page(outcome.page).rows]
    markdown_rows = _markdown_rows(outcome.tables)
    assert len(markdown_rows) > 15
    for row in markdown_rows:
        assert row in page_rows
    everything = outcome.document["summary"]["all"]
    shown = {(row[0], row[1]): row for row in markdown_rows}
    for method, label in (("video_vae", "video VAE"), ("image_vae_held", "image VAE, key frames held")):
        row, figures = shown[f"all ({everything['num_clips']})", label], everything[method]
        assert row[2:5] == [f"{figures[name]:.2f}" for name in ("psnr_db", "key_psnr_db", "between_psnr_db")]
        assert row[5] == f"{figures['ssim']:.4f}"
        assert row[6] == "-"
        assert row[7] == f"{figures['temporal_difference']:.3f}"
    crossed = f"{everything['compatibility']['image_decoder']['psnr_db']:.2f}"
    assert any(row[:2] == ["image decoder on video latents, PSNR", crossed] for row in markdown_rows)
    assert outcome.tables in outcome.said


def test_the_page_stands_alone_and_tells_every_picture_in_words(outcome: Outcome) -> None:
    page = _Page(outcome.page)
    # Three files are drawn, each in six strips; the two videos have curves, the one that was probed two more.
    assert len(page.images) == 18
    assert all(image["alt"] for image in page.images)
    assert len({image["alt"] for image in page.images}) == len(page.images)
    assert all(str(image["src"]).startswith("data:image/jpeg;base64,") for image in page.images)
    assert all(address.startswith("data:") for address in page.addresses)
    assert not page.tags & {"script", "link", "iframe", "object", "form"}
    assert len(page.svgs) == 2 * 2 + 2
    for svg in page.svgs:
        assert svg["role"] == "img"
        assert re.search(r" to -?[0-9]", str(svg["aria-label"]))
    assert "prefers-color-scheme: dark" in outcome.page
    assert page.headings[0].startswith("Evaluation of ")
    assert re.search(r'<html lang="en">', outcome.page)


def test_what_makes_figures_worthless_is_said_first(outcome: Outcome) -> None:
    assert not any("WARNING" in fact for fact in facts(outcome.document))
    untrained = {**outcome.document, "model": {**outcome.document["model"], "is_trained": False}}
    assert "untrained" in facts(untrained)[0]
    rescaled = {**outcome.document, "model": {**outcome.document["model"], "scaling_factor": 2.0}}
    assert any("WARNING" in fact and "(2.0, 0.0)" in fact for fact in facts(rescaled))


def test_names_of_files_are_text_on_the_page_and_stay_in_their_cell_of_the_table(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = 'a | b <img src="x" onerror="alert(1)"> "quoted" & more'
    (tmp_path / "in").mkdir()
    shutil.copy(CLIP_STILLS[0], tmp_path / "in" / f"{name}{CLIP_STILLS[0].suffix}")
    assert main(_flags(models, tmp_path / "in", tmp_path / "out")) == 0
    capsys.readouterr()
    page = _Page((tmp_path / "out" / "evaluation.html").read_text(encoding="utf-8"))
    assert f"{name}, clip 0" in page.headings
    assert all(set(image) == {"alt", "src", "width", "height"} for image in page.images)


def test_without_a_teacher_the_reconstruction_is_measured_and_the_limit_is_kept(
    models: Path, media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*_flags(models, media, tmp_path / "out"), "--limit", "1", "--probe-clips", "0", "--pictures", "0"]
    assert main(flags) == 0
    tables = capsys.readouterr().out
    document = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert document["accounts"]["num_clips"] == 1
    assert document["accounts"]["is_limited"]
    assert (document["teacher"], document["channels"], document["timing"]) == (None, None, None)
    assert document["summary"]["all"]["image_vae"] is None
    assert "No image VAE was given" in tables
    assert "Compatibility" not in tables
    assert not _Page((tmp_path / "out" / "evaluation.html").read_text()).images


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--teacher", "{models}/image16"], "have 4 channels and the image VAE's 16"),
        (["--teacher", "{tmp}/nowhere"], "--teacher {tmp}/nowhere"),
        (["--model", "{tmp}/nowhere"], "--model {tmp}/nowhere"),
        (["--input", "{tmp}/nowhere"], "{tmp}/nowhere"),
        (["--buckets", "64x64x8"], "1 + 4"),
        (["--buckets", "64x64x401"], "no clip of"),
        (["--fps", "fast"], "'fast'"),
        (["--limit", "0"], "--limit"),
        (["--seam-tile-px", "20"], "20 is not a multiple of 8"),
        (["--output", "s3://bucket/evaluation"], "no folder of a disk"),
        (["--output", "{models}/image16/config.json"], "is a file"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_wrong_use_is_exit_code_2_and_a_message_that_names_the_culprit(
    flags: list[str],
    said: str,
    models: Path,
    media: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(CLIP_VIDEOS[0], tmp_path)
    flags = [flag.format(models=models, tmp=tmp_path) for flag in flags]
    base = _flags(models, tmp_path if "64x64x401" in flags else media, tmp_path / "out")
    assert main([*base, *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said.format(models=models, tmp=tmp_path) in captured.err
    assert not (tmp_path / "out").exists()


def test_lpips_without_its_package_is_refused_before_any_video_is_read(
    models: Path, media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert main([*_flags(models, media, tmp_path / "out"), "--lpips"]) == 2
    assert "--lpips: " in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width_px", [400, 1400])
def test_a_browser_shows_every_picture_and_never_scrolls_the_page_sideways(
    outcome: Outcome, tmp_path: Path, width_px: int
) -> None:
    # The page forbids scripts, so that a copy without that rule is asked what it shows.
    probe = (
        "<script>addEventListener('load', () => { const box = document.documentElement; "
        "const images = [...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().width]); "
        "document.title = JSON.stringify({images: images, scroll: box.scrollWidth, width: box.clientWidth}) })"
        "</script></body>"
    )
    page = re.sub(r"<meta http-equiv=[^>]*>", "", outcome.page).replace("</body>", probe)
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path}/profile"]
    command += [f"--window-size={width_px},900", "--dump-dom", (tmp_path / "page.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found = json.loads(re.findall(r"<title>(\{.*?\})</title>", shown)[0].replace("&quot;", '"'))
    assert len(found["images"]) == len(_Page(outcome.page).images)
    assert all(natural > 0 and 0 < drawn <= width_px for natural, drawn in found["images"])
    assert found["scroll"] <= found["width"]


def test_the_strips_are_pictures_side_by_side(outcome: Outcome) -> None:
    for image in _Page(outcome.page).images:
        data = base64.b64decode(str(image["src"]).partition(",")[2])
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == (int(image["width"] or 0), int(image["height"] or 0))
            assert picture.height == 64
            assert picture.width % 64 == 0
