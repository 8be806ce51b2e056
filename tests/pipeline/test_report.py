"""Reports of an output: figures that agree with its records, texts that do no harm, and a page that a browser shows."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import latents
import numpy as np
import pytest
import torch
from browser import CHROMIUM, Shown, chromium, show
from builders import CLIP_VIDEOS, CLIPS, pack_clips
from commits import make_commit
from PIL import Image, ImageSequence

from pipeline.cli import main
from pipeline.codec import ClipEncoder
from pipeline.commit import open_dataset, publish_snapshot
from pipeline.config import parse_arguments
from pipeline.decode import DecodePool
from pipeline.originals import Originals
from pipeline.pictures import side_by_side
from pipeline.plan import plan_shards
from pipeline.quality import psnr_db
from pipeline.records import Bucket, DatasetManifest, LatentRecord
from pipeline.report import Example, Report, report
from pipeline.report_page import page
from pipeline.source import iterate_videos
from pipeline.storage import open_store

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\u202e\x00\x1b[2J</figcaption>"
VIDEOS = ("bunny_yawn", "city_towers")
TALL = Bucket(width_px=16, height_px=32, num_frames=5)


def _drawn(folder: Path, seed: int) -> tuple[Example, ...]:
    return report(str(folder / "out"), num_examples=6, seed=seed, with_originals=False).examples


def _page(found: Report) -> str:
    return page(found.document, [(example.picture, example.still) for example in found.examples])


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real videos and a picture through the model that ships, committed as one shard; their folder is `in`."""
    folder = tmp_path_factory.mktemp("encoded")
    (folder / "in").mkdir()
    for source in (*(CLIPS / f"{name}.mp4" for name in VIDEOS), CLIPS / "city_still.jpg"):
        for path in CLIPS.glob(f"{source.stem}.*"):
            shutil.copy(path, folder / "in")
    flags = ["--input", str(folder / "in"), "--output", str(folder / "out"), "--model", "small", "--buckets", "64x64x5"]
    config = parse_arguments([*flags, "--clips-per-video", "1"])
    store = open_store(config.run.output)
    encoder = ClipEncoder(config.encoding, torch.device("cpu"))
    manifest = open_dataset(
        store,
        DatasetManifest(
            format_version=1,
            fingerprint="ef" * 32,
            fingerprint_fields=config.encoding.fingerprint_fields("cpu"),
            model=encoder.facts,
            kind="mean",
            latent_dtype="float16",
            passthrough={},
        ),
    )
    (spec,) = plan_shards(config.source, store)
    pool = DecodePool(config.encoding, config.decode, 1)
    try:
        clips = pool.decode(iterate_videos(spec, store, config.encoding, config.decode))
        records = [record for record in encoder.encode(clips) if isinstance(record, LatentRecord)]
    finally:
        pool.close()
    latents.commit_records(store, manifest, spec.shard_id, records)
    publish_snapshot(store)
    return folder


@pytest.fixture(scope="module")
def reported(encoded: Path) -> Report:
    return report(str(encoded / "out"))


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """An output without an encoder, whose every text means harm."""
    store = open_store(str(tmp_path / "out"))
    model = dataclasses.replace(latents.MODEL, model=HOSTILE)
    fields = {"fps": 8.0, "buckets": ["32x16x5", "64x16x9"], "caption_column": HOSTILE}
    manifest = open_dataset(store, dataclasses.replace(latents.manifest(), model=model, fingerprint_fields=fields))
    signed = f"https://user:hunter2@videos.example/{HOSTILE}.mp4?X-Amz-Signature=5ECRET&y=1"
    record = dataclasses.replace(latents.record("k" + HOSTILE, caption=HOSTILE * 9), source_uri=signed)
    rejected = dataclasses.replace(latents.rejection("r" + HOSTILE), message=HOSTILE, source_uri=signed)
    latents.commit_records(store, manifest, "s000", [record, latents.record("b", caption="")], [rejected])
    return tmp_path / "out"


def test_clips_are_compared_with_what_their_source_gives(encoded: Path, reported: Report) -> None:
    assert {example.key for example in reported.examples} == {*VIDEOS, "city_still"}
    assert all(example.panels == ("original", "reconstruction") for example in reported.examples)
    quality = reported.document["quality"]
    assert (quality["num_compared"], quality["why_no_original"]) == (3, {})
    assert 12 < quality["psnr_db"]["lowest"] <= quality["psnr_db"]["mean"] < 60
    for example in reported.examples:
        with Image.open(io.BytesIO(example.picture)) as picture:
            assert picture.size == (example.width_px, example.height_px)
            assert getattr(picture, "n_frames", 1) == (1 if example.key == "city_still" else 5)


def test_the_page_says_how_good_reconstructions_are_and_which_is_the_worst(reported: Report) -> None:
    text = _page(reported)
    compared = [example for example in reported.examples if example.psnr_db is not None]
    worst = min(compared, key=lambda example: example.psnr_db or 0)
    (card,) = re.findall(r"<h2>Quality of reconstructions</h2>(.*?)</section>", text)
    assert f"worst {worst.psnr_db:.1f} dB: {worst.key}, clip {worst.clip_index}." in card
    counts = [int(number) for number in re.findall(r'class="value">(\d+) ', card)]
    assert sum(counts) == len(compared)


def test_a_source_that_changed_or_went_is_not_compared_and_that_is_said(encoded: Path, tmp_path: Path) -> None:
    shutil.copytree(encoded, tmp_path / "copy", symlinks=True)
    original, other = (encoded / "in" / f"{name}.mp4" for name in VIDEOS)
    kept = original.read_bytes(), other.read_bytes()
    try:
        original.unlink()
        other.write_bytes(kept[0])
        found = report(str(tmp_path / "copy" / "out"))
    finally:
        original.write_bytes(kept[0])
        other.write_bytes(kept[1])
    compared = {example.key: example.psnr_db for example in found.examples}
    assert compared["city_still"] is not None
    assert compared[VIDEOS[0]] is None
    assert compared[VIDEOS[1]] is None
    assert found.document["quality"]["why_no_original"]
    assert "without an original" in _page(found)


def test_clips_of_a_tar_are_found_again_unless_the_tar_changed_or_the_time_is_over(tmp_path: Path) -> None:
    (tar,) = pack_clips(tmp_path / "in", 1, CLIP_VIDEOS[:3])
    flags = ["--input", str(tar), "--output", str(tmp_path / "out"), "--model", "small", "--buckets", "64x64x5"]
    config = parse_arguments([*flags, "--clips-per-video", "2"])
    store = open_store(config.run.output)
    (spec,) = plan_shards(config.source, store)
    stated = {"source_size_bytes": spec.source_size_bytes, "source_etag": spec.source_etag}
    commit = make_commit(spec.shard_id, source_uri=spec.source_uri, **stated)
    with Originals(store, config.encoding, {}, budget_s=600) as originals:
        wanted = {("000000001", 1), ("000000000", 0)}
        found = originals.find(commit, wanted)
        assert (found.clips.keys(), found.why_not) == (wanted, None)
        assert found.clips["000000001", 1].frames.shape == (5, 64, 64, 3)
        missing = originals.find(commit, {("000000001", 7)})
        assert not missing.clips
        assert missing.why_not is not None
        tar.write_bytes(tar.read_bytes() + bytes(512))
        assert "changed since" in str(originals.find(commit, wanted).why_not)
        tar.unlink()
        assert "is gone" in str(originals.find(commit, wanted).why_not)
    with Originals(store, config.encoding, {}, budget_s=-1) as originals:
        assert "time" in str(originals.find(commit, wanted).why_not)


def test_an_output_in_a_bucket_is_reported_like_one_in_a_folder(s3_env: Any) -> None:
    root = s3_env.root()
    latents.output(root, [[latents.record("a")], [latents.record("b")]])
    found = report(root, with_originals=False)
    assert found.document["sample"]["num_clips"] == 2
    assert {example.key for example in found.examples} == {"a", "b"}
    assert found.document["output"] == root


def test_accounts_rejections_and_buckets_are_those_of_the_records(tmp_path: Path) -> None:
    store = latents.output(tmp_path / "out", [[latents.record("a"), latents.record("b", 0, latents.WIDE)]])
    rejected = [latents.rejection("c"), latents.rejection("a", 1)]
    latents.commit_records(store, latents.manifest(), "s001", [latents.record("d", 0, TALL)], rejected)
    document = report(str(tmp_path / "out"), with_originals=False).document
    accounts = document["accounts"]
    assert (accounts["num_records"], accounts["num_videos_rejected"], accounts["num_clips_rejected"]) == (3, 2, 1)
    assert document["buckets"]["rows"] == {"16x32x5": 1, "32x16x5": 1, "64x16x9": 1}
    (reason,) = document["rejections"]
    assert (reason["reason"], reason["number"], len(reason["examples"])) == ("timeout", 2, 2)
    assert json.loads(json.dumps(document)) == document
    assert document["snapshot"] is None


def test_latents_are_summed_up_channel_by_channel_and_values_that_are_not_finite_counted(tmp_path: Path) -> None:
    broken = latents.record("b")
    mean = broken.mean.copy()
    mean[1, 0, 0, :2] = np.nan, np.inf
    latents.output(tmp_path / "out", [[latents.record("a"), dataclasses.replace(broken, mean=mean)]])
    found = report(str(tmp_path / "out"), with_originals=False)
    sample = found.document["sample"]
    assert (sample["num_clips"], sample["num_nonfinite"]) == (2, 2)
    values = np.concatenate([latents.record("a").mean[1].ravel(), mean[1].ravel()]).astype(np.float64)
    finite = values[np.isfinite(values)]
    assert sample["channels"][1]["mean"] == pytest.approx(finite.mean())
    assert sample["channels"][1]["deviation"] == pytest.approx(finite.std())
    assert sample["channels"][1]["high"] == finite.max()
    assert any("NaN" in warning for warning in found.document["warnings"])


def test_a_seed_draws_the_same_clips_again_and_every_bucket_is_among_them(tmp_path: Path) -> None:
    common = [[latents.record(f"{shard}-{n}") for n in range(20)] for shard in range(3)]
    latents.output(tmp_path / "out", [*common, [latents.record("rare", 0, TALL)]])
    drawn = [[(example.shard_id, example.key) for example in _drawn(tmp_path, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(("s003", "rare") in one and len(one) == 6 for one in drawn)


def test_a_damaged_or_missing_file_costs_its_part_of_the_sample_and_is_told(tmp_path: Path) -> None:
    store = latents.output(tmp_path / "out", [[latents.record("a")], [latents.record("b")]])
    first = next(info.key for info in store.list("data/") if "s000" in info.key)
    (tmp_path / "out" / first).write_bytes(b"damaged")
    found = report(str(tmp_path / "out"), with_originals=False)
    assert [example.key for example in found.examples] == ["b"]
    assert any("cannot be read" in note for note in found.document["notes"])
    assert found.document["accounts"]["num_records"] == 2


def test_records_tell_when_they_were_made_and_pauses_are_no_part_of_a_rate(tmp_path: Path) -> None:
    store = latents.output(tmp_path / "out", [[latents.record(f"{n}")] for n in range(30)])
    for path in sorted(Path(tmp_path / "out" / "commits").rglob("*.json")):
        number = int(path.stem[1:])
        hour, second = (4, number - 20) if number >= 20 else (0, number * 2)
        commit = json.loads(path.read_text()) | {"created_at": f"2026-01-01T0{hour}:00:{second:02d}+00:00"}
        path.write_text(json.dumps(commit))
    course = report(str(tmp_path / "out"), with_originals=False).document["time"]
    assert [(one["num_clips"], one["clips_per_s"]) for one in course["sittings"]] == [(20, 0.5), (10, 1.0)]
    assert sum(course["throughput"]["num_clips"]) == 19
    assert store.root_uri.endswith("out")


class _Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_no_text_of_an_output_becomes_markup_or_code_or_tells_a_secret(hostile: Path) -> None:
    found = report(str(hostile), with_originals=False)
    text = _page(found)
    elements = _Elements(text).found
    assert "script" not in {tag for tag, _ in elements}
    assert all(not name.startswith("on") for _, attributes in elements for name in attributes)
    addresses = [value or "" for _, a in elements for name, value in a.items() if name in ("src", "srcset", "href")]
    assert all(address.startswith("data:") for address in addresses)
    assert len([tag for tag, _ in elements if tag == "img"]) == 2
    assert "default-src 'none'" in text
    assert not set("\x00\x1b\u202e") & set(text)
    for secret in ("hunter2", "5ECRET"):
        assert secret not in text
        assert secret not in json.dumps(found.document)


def test_pictures_keep_to_their_bytes_whatever_they_show() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (17, 64, 96, 3), np.uint8)
    picture, still = side_by_side([noise, noise], 8.0, panel_px=96, max_frames=33, max_bytes=40_000)
    assert len(picture.data) <= 40_000
    with Image.open(io.BytesIO(picture.data)) as image, Image.open(io.BytesIO(still.data)) as first:
        assert image.size == first.size == (196, 64)
        assert image.n_frames > 1


def test_the_command_writes_the_page_and_prints_the_figures(
    hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "report.html"
    flags = ["--model", "none", "--examples", "1", "--no-originals"]
    assert main(["report", str(hostile), "-o", str(target), "--json", *flags]) == 0
    told = capsys.readouterr()
    assert len(json.loads(told.out)["examples"]) == 1
    assert "Nothing was decoded" in told.err
    assert target.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main(["report", str(hostile), "-o", str(tmp_path / "no" / "report.html")]) == 2
    assert main(["report", str(hostile), "-o", str(target), "--model", "small"]) == 2
    assert "the latents come from" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "-o", str(target)]) == 2


@pytest.mark.parametrize("ending", ["mp4", "gif"])
def test_one_clip_plays_by_itself(
    encoded: Path, tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / f"clip.{ending}"
    model = [] if ending == "mp4" else ["--model", "none"]
    assert main(["preview", str(encoded / "out"), VIDEOS[0], "-o", str(target), *model]) == 0
    assert ("decoded" if ending == "mp4" else "its latent") in capsys.readouterr().out
    if ending == "gif":
        with Image.open(target) as image:
            assert (image.size, image.info["loop"]) == ((64, 64), 0)
            # Equal frames are one that stays longer.
            times = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
            assert sum(times) == pytest.approx(5 * 125, abs=5 * 10)
        return
    import av

    with av.open(str(target)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 8
    assert len(frames) == 5
    assert psnr_db(np.stack(frames), _decoded(encoded)) > 25


def _decoded(encoded: Path) -> Any:
    from pipeline.codec import LatentDecoder
    from pipeline.dataset import LatentDataset

    wanted = [("key", "=", VIDEOS[0])]
    batch = next(iter(LatentDataset(str(encoded / "out"), batch_size=1, scaled=False, filter=wanted)))
    flags = ["--input", "-", "--output", "-", "--model", "small"]
    return LatentDecoder(parse_arguments(flags).encoding, torch.device("cpu")).decode(batch["latents"][0].numpy())


def test_a_clip_that_is_not_there_and_a_name_that_says_no_form_are_refused(
    encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preview", str(encoded / "out"), "nobody", "-o", str(tmp_path / "a.gif"), "--model", "none"]) == 2
    err = capsys.readouterr().err
    assert "no clip 0 of a video 'nobody'" in err
    assert any(f"such as '{name}'" in err for name in (*VIDEOS, "city_still"))
    assert main(["preview", str(encoded / "out"), VIDEOS[0], "-o", str(tmp_path / "a.avi")]) == 2
    assert ".mp4 or .gif" in capsys.readouterr().err


@pytest.fixture(scope="module")
def debugger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with chromium(tmp_path_factory.mktemp("chromium")) as address:
        yield address


_SEEN = """(() => { const box = document.documentElement;
  const images = [...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().right]);
  return {scroll: box.scrollWidth, width: box.clientWidth, images: images, scripts: document.scripts.length,
    ground: getComputedStyle(document.body).backgroundColor} })()"""


async def _all_opened(shown: Shown) -> dict[str, Any]:
    await shown.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    await shown.evaluate("Promise.all([...document.images].map(i => i.decode()))")
    return dict(await shown.evaluate(_SEEN))


@pytest.mark.parametrize("width_px", [390, 1440])
def test_a_browser_shows_all_of_it_without_a_complaint_and_nothing_runs_over_the_edge(
    debugger: str, reported: Report, hostile: Path, tmp_path: Path, width_px: int
) -> None:
    grounds = set()
    for number, found in enumerate((reported, report(str(hostile), with_originals=False))):
        path = tmp_path / f"{number}.html"
        path.write_text(_page(found), encoding="utf-8")
        for scheme in ("light", "dark"):
            media = {"prefers-color-scheme": scheme}
            shown, seen = show(debugger, path.as_uri(), _all_opened, width_px=width_px, media=media)
            assert shown.complaints == []
            assert seen["scroll"] <= seen["width"] <= width_px
            assert len(seen["images"]) == len(found.examples)
            assert all(natural > 0 and right <= width_px for natural, right in seen["images"])
            assert seen["scripts"] == 0
            grounds.add(seen["ground"])
    assert len(grounds) == 2


def test_the_gallery_plays_and_holds_still_for_those_who_asked_their_system_to(
    debugger: str, reported: Report, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    path.write_text(_page(reported), encoding="utf-8")
    find = "(() => { const i = [...document.images].find(i => i.alt.startsWith('bunny')); i.scrollIntoView(); "

    async def is_moving(shown: Shown) -> bool:
        await shown.evaluate("Promise.all([...document.images].map(i => i.decode()))")
        await shown.evaluate(find + "})()")
        first = await shown.picture()
        return any([await shown.picture() != first for _ in range(12)])

    async def source(shown: Shown) -> str:
        return str(await shown.evaluate(find + "return i.currentSrc })()"))

    assert show(debugger, path.as_uri(), is_moving, width_px=390)[1]
    reduced = {"prefers-reduced-motion": "reduce"}
    (_, playing), (_, still) = (
        show(debugger, path.as_uri(), source, width_px=390, media=media) for media in ({}, reduced)
    )
    assert len(still) < len(playing)
    assert re.match("data:image/webp;base64,", still)
