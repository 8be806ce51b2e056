"""What a dry run says, against what a run then does: real clips, real decoders, a real S3 store, a real job on Ray."""

from __future__ import annotations

import io
import json
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from builders import CLIP_STILLS, CLIP_VIDEOS, clip_members, pack_clips, tar_bytes
from conftest import SeaweedFS
from integration.jobs_under_test import commits_of, run_job
from latents import manifest
from servers import FaultProxy

import pipeline.calibration as calibration
import pipeline.estimate as estimate
import pipeline.s3
from pipeline.calibration import EncoderFacts
from pipeline.config import JobConfig, parse_arguments
from pipeline.estimate import (
    Estimate,
    _advice_on_buckets,
    _advice_on_regions,
    _advice_on_shards,
    _advice_on_speed,
    _Crew,
    _Speeds,
    _Times,
)
from pipeline.estimate_text import lines_of
from pipeline.look import Look, ShardLook, look_at
from pipeline.metrics import RunMetrics
from pipeline.plan import UnwrittenSlices, plan_shards
from pipeline.progress import Progress
from pipeline.records import Bucket, Redo, ShardSpec
from pipeline.run import run
from pipeline.scaling import Scale
from pipeline.storage import open_store
from pipeline.traffic import KINDS, Work, requests_to_output

BUCKETS = "64x64x17;64x32x9"
FLAGS = ["--model", "small", "--buckets", BUCKETS, "--format", "both", "--num-actors", "2", "--gpu-hour-price", "3"]


def _dry_run(flags: list[str], said: io.StringIO | None = None, mode: str = "plain") -> dict[str, Any]:
    """The estimate as it comes out of the job, through JSON."""
    summary = run(parse_arguments([*flags, "--dry-run"]), Progress(mode, said or io.StringIO()), RunMetrics({}))
    assert summary.exit_code == 0
    found: dict[str, Any] = json.loads(json.dumps(summary.estimate))
    return found


@dataclass(frozen=True, kw_only=True)
class BothWays:
    """An input on S3 that was estimated and then encoded, with the requests that the job sent."""

    estimate: dict[str, Any]
    said: str
    result: dict[str, Any]
    output: str
    requests: Mapping[str, Mapping[str, int]]


def _kind(method: str, path: str) -> str:
    return "list" if method == "GET" and "list-type=2" in path else {"POST": "put"}.get(method, method.lower())


@pytest.fixture(scope="module")
def both_ways(
    seaweedfs: SeaweedFS, ray_home: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BothWays]:
    """Three tars: clips and stills, one that is no video, and one that is cut short."""
    folder = tmp_path_factory.mktemp("tars")
    tars = pack_clips(folder, 2, (*CLIP_VIDEOS, *CLIP_STILLS))
    members = [*clip_members(CLIP_VIDEOS[0], "000020000"), ("000020001.mp4", b"no video"), ("000020001.txt", b"x")]
    (folder / "00002.tar").write_bytes(tar_bytes(members))
    client = seaweedfs.client()
    for tar in [*tars, folder / "00002.tar"]:
        client.put_object(Bucket="shards", Key=f"estimated/{tar.name}", Body=tar.read_bytes())
    output = seaweedfs.root()
    proxy = FaultProxy(seaweedfs.endpoint)
    env = {**seaweedfs.env, "AWS_ENDPOINT_URL": proxy.endpoint}
    flags = ["--input", "s3://shards/estimated", "--output", output, *FLAGS]
    said = io.StringIO()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            patch.setattr(pipeline.s3, "_answered", {proxy.endpoint})
            found = _dry_run(flags, said)
            assert {method for method, _ in proxy.requests} <= {"GET", "HEAD"}, "a dry run wrote something"
            assert not list(open_store(output).list("")), "a dry run wrote something"
            proxy.requests.clear()
            outcome = run_job(flags, {**ray_home, **env})
            assert outcome.code == 0, outcome.said
            sent: dict[str, Counter[str]] = {"input": Counter(), "output": Counter()}
            for method, path in proxy.requests:
                sent["input" if path.startswith("/shards") else "output"][_kind(method, path)] += 1
            yield BothWays(estimate=found, said=said.getvalue(), result=outcome.result, output=output, requests=sent)
    finally:
        proxy.close()


def test_an_input_that_is_seen_whole_gives_the_clips_frames_and_rejections_of_the_run(both_ways: BothWays) -> None:
    found, done = both_ways.estimate, both_ways.result
    assert found["is_whole"]
    for name in ("num_videos", "num_videos_rejected", "num_frames"):
        assert found[name] == done[name], name
    assert found["num_clips"] == done["num_records"]
    assert found["num_clips_range"] == [found["num_clips"], found["num_clips"]]
    files = [file for commit in commits_of(both_ways.output).values() for file in commit.files]
    rows: Counter[str] = Counter()
    for file in files:
        if file.content == "parquet":
            rows.update(file.bucket_rows)
    assert found["clips"] == rows
    assert {reason: entry["num"] for reason, entry in found["rejections"].items()} == done["reasons"] != {}
    assert found["num_files_out"] == len(files)


def test_the_estimated_bytes_are_those_of_the_run_within_two_percent(both_ways: BothWays) -> None:
    files = [file for commit in commits_of(both_ways.output).values() for file in commit.files]
    num_bytes = sum(file.num_bytes for file in files)
    assert both_ways.estimate["num_bytes_out"] == pytest.approx(num_bytes, rel=0.02)


def test_the_estimated_requests_are_those_of_the_run_to_one_of_each_kind(both_ways: BothWays) -> None:
    for place in ("input", "output"):
        sent, foreseen = both_ways.requests[place], both_ways.estimate["requests"][place]
        assert sent.keys() <= set(KINDS)
        for kind in KINDS:
            assert abs(sent.get(kind, 0) - foreseen[kind]) <= 1, (place, kind, sent, foreseen)


def test_a_price_is_that_of_the_hours_and_the_time_is_not_less_than_what_was_measured(both_ways: BothWays) -> None:
    found = both_ways.estimate
    assert found["device"] == "cpu"
    assert found["actor_hours"] == pytest.approx(found["duration_s"] * found["num_actors"] / 3600, abs=1e-3)
    assert found["price"] == pytest.approx(3 * found["actor_hours"], abs=0.01)
    assert set(found["measured"]) >= set(found["clips"]) == set(found["encode_s_per_clip"])
    encode_s = sum(found["clips"][bucket] * seconds for bucket, seconds in found["encode_s_per_clip"].items())
    assert found["encode_s"] == pytest.approx(encode_s, abs=0.1)
    assert found["duration_s"] >= found["start_s"] + encode_s / found["num_actors"] - 0.1


def test_people_read_a_line_for_each_thing_that_the_estimate_says(both_ways: BothWays) -> None:
    lines = both_ways.said.splitlines()
    assert [line for line in lines if line.startswith("to do")] == ["to do     3 shards"]
    for beginning in ("seen", "input", "clips", "rejected", "output", "requests", "time", "cost"):
        assert any(line.startswith(beginning) for line in lines), beginning
    assert "price" in both_ways.said
    assert "unreadable" in both_ways.said


def test_an_output_that_holds_part_is_estimated_for_what_is_left(both_ways: BothWays, s3_env: SeaweedFS) -> None:
    members = clip_members(CLIP_STILLS[0], "000030000")
    s3_env.client().put_object(Bucket="shards", Key="estimated/00003.tar", Body=tar_bytes(members))
    said = io.StringIO()
    flags = ["--input", "s3://shards/estimated", "--output", both_ways.output, *FLAGS]
    found = _dry_run(flags, said, "json")
    assert (found["num_shards"], found["num_shards_done_before"], found["num_videos"]) == (1, 3, 1)
    assert found["clips"] == {"64x32x1": 1} or found["clips"] == {"64x64x1": 1}
    # One record and one of each format, the snapshot with its one segment, and what is tried of the store.
    assert found["requests"]["output"]["put"] == 3 + 2 + 10
    assert "3 are decided and not counted" in "\n".join(lines_of(Estimate(**found)))
    # Programs have the result line: no text for people.
    assert [json.loads(line)["event"] for line in said.getvalue().splitlines()] == ["plan"]
    nothing = _dry_run([*flags, "--input", "s3://shards/estimated/0000[0-2].tar"])
    assert (nothing["num_shards"], nothing["num_clips"], nothing["requests"]) == (0, 0, {})


# --- scaling --------------------------------------------------------------------------------------------------------


def _config(source: Path, *flags: str) -> JobConfig:
    required = ["--input", str(source), "--output", str(source.parent / "out"), "--model", "small"]
    return parse_arguments([*required, "--buckets", "64x64x9", *flags])


def _look(config: JobConfig, folder: Path, seconds: float = 60) -> tuple[Look, Scale]:
    store, unwritten = open_store(config.run.output), UnwrittenSlices()
    specs = plan_shards(config.source, store, write=False, unwritten=unwritten)
    lost = set(unwritten.keys) - unwritten.kept.keys()
    seeable = [spec for spec in specs if spec.plan_key not in lost]
    look = look_at(config, seeable, store, unwritten.kept, folder, seconds, other_child=0)
    assert not Path(config.run.output).exists(), "looking wrote something"
    return look, Scale(specs, look)


def test_counts_of_some_tars_are_scaled_to_all_by_their_bytes(tmp_path: Path) -> None:
    source, still = tmp_path / "in", CLIP_STILLS[0]
    source.mkdir()
    num_samples = num_broken = 0
    for number in range(40):
        members = []
        for n in range(4 + number % 9):
            is_broken = (n + number) % 5 == 0
            content = bytes(still.stat().st_size) if is_broken else still.read_bytes()
            members += [(f"{number:05d}{n:04d}.jpg", content), (f"{number:05d}{n:04d}.txt", b"a caption")]
            num_samples, num_broken = num_samples + 1, num_broken + is_broken
        (source / f"{number:05d}.tar").write_bytes(tar_bytes(members))
    look, scale = _look(_config(source), tmp_path / "looked")
    assert len(look.shards) == 32
    assert any(not shard.is_whole for shard in look.shards), "tars of more than eight samples are not read to their end"
    assert look.num_bytes < sum(path.stat().st_size for path in source.iterdir())
    assert not scale.is_whole
    # The zeros at the end of a tar belong to no sample: with tars as small as these they show.
    assert scale.num_videos == pytest.approx(num_samples, rel=0.02)
    limits = scale.range_of(lambda shard: shard.reasons["unreadable"])
    assert limits is not None
    assert limits[0] <= num_broken <= limits[1] < 1.5 * num_broken
    (number,) = scale.clips.values()
    assert number + scale.total(lambda shard: shard.reasons["unreadable"]) == pytest.approx(scale.num_videos)


def test_slices_that_a_dry_run_did_not_write_are_seen_and_scaled_by_their_videos(tmp_path: Path) -> None:
    # Every tenth row of a table names a file that is not there.
    rows = [CLIP_STILLS[n % 2] if n % 10 else tmp_path / "gone.jpg" for n in range(2000)]
    table = tmp_path / "table.csv"
    table.write_text("url\n" + "".join(f"{path}\n" for path in rows))
    look, scale = _look(_config(table, "--samples-per-shard", "20"), tmp_path / "looked")
    assert len(look.shards) == 32
    assert all(shard.num_videos == 8 for shard in look.shards)
    assert scale.num_videos == 2000
    limits = scale.range_of(lambda shard: shard.reasons["not_found"])
    assert limits is not None
    # Which rows are looked at follows from the folder's name, so that one range in twenty does not hold the number.
    middle, half = sum(limits) / 2, (limits[1] - limits[0]) / 2
    assert abs(200 - middle) <= 2.5 * half
    assert str(tmp_path / "gone.jpg") in look.examples["not_found"]


def test_a_tar_is_read_no_further_than_is_looked_at(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    members = [m for n in range(300) for m in clip_members(CLIP_STILLS[0], f"{n:09d}")]
    (source / "00000.tar").write_bytes(tar_bytes(members))
    look, scale = _look(_config(source), tmp_path / "looked")
    assert (scale.num_videos_seen, scale.is_whole) == (256, False)
    assert look.num_bytes < 0.9 * (source / "00000.tar").stat().st_size
    assert scale.num_videos == pytest.approx(300, abs=3)
    assert scale.range_of(lambda shard: shard.num_videos) is None, "of one shard nobody knows how others differ"


def test_a_look_whose_time_is_up_ends_and_says_so(tmp_path: Path) -> None:
    # What is in work when time is up has as long again; these need longer, and are killed.
    media = CLIP_VIDEOS * 6
    pack_clips(tmp_path / "in", 2, media)
    look, scale = _look(_config(tmp_path / "in", "--buckets", "256x256x9"), tmp_path / "looked", seconds=0.1)
    assert look.ran_out
    assert scale.num_videos_seen < len(media)
    assert not scale.is_whole


def test_a_file_that_is_too_large_for_the_job_is_a_rejection_of_the_estimate_too(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for number, still in enumerate(CLIP_STILLS):
        (source / f"{number}.jpg").write_bytes(still.read_bytes())
    limit = min(still.stat().st_size for still in CLIP_STILLS)
    look, scale = _look(_config(source, "--max-file-bytes", str(limit)), tmp_path / "looked")
    assert (look.num_passed_over, scale.num_videos) == (0, 2)
    assert scale.total(lambda shard: shard.reasons["too_large"]) == 1


def test_a_retry_is_scaled_by_its_videos(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    members = [m for n in range(20) for m in clip_members(CLIP_STILLS[0], f"{n:09d}")]
    (source / "00000.tar").write_bytes(tar_bytes(members))
    config = _config(source)
    store = open_store(config.run.output)
    (spec,) = plan_shards(config.source, store, write=False)
    retry = replace(spec, redo=Redo(shard_id=spec.shard_id, generation=1, replaces=None, keys=(f"{3:09d}", f"{9:09d}")))
    look = look_at(config, [retry], store, {}, tmp_path, 60, other_child=0)
    other = replace(retry, shard_id="other", redo=replace(retry.redo, keys=tuple(map(str, range(6)))))
    assert Scale([retry, other], look).num_videos == 8
    # Beside a tar that is encoded for the first time a retried video weighs as much as one of that.
    first = look_at(config, [spec], store, {}, tmp_path, 60, other_child=0)
    assert Scale([spec, retry], first).num_videos == pytest.approx(22)


def test_what_others_take_of_the_cores_makes_the_start_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, scale = _whole_tars(3, 10)
    look = _look_at_nothing(scale)
    starts = []
    for said, slowdown in (("500 0 7", 1.0), ("500 1500 7", 4.0), ("nonsense", 1.0)):
        (tmp_path / "schedstat").write_text(said, encoding="ascii")
        monkeypatch.setattr(calibration, "_SCHEDULED", tmp_path / "schedstat")
        assert calibration._slowdown() == slowdown
        facts = EncoderFacts(model=manifest().model, device_name="cpu", start_s=2.0, slowdown=slowdown)
        speeds = _Speeds(facts=facts, s_per_clip=dict.fromkeys(scale.clips, 1.0), measured=())
        config = parse_arguments(["--input", "in", "--output", "out", "--model", "small"])
        starts.append(estimate._times(config, CREW, look, scale, speeds).start_s)
    assert starts[0] == starts[2] == starts[1] - 3 * estimate._RAY_START_S


# --- advice ---------------------------------------------------------------------------------------------------------


CREW = _Crew(
    device_type="cuda", num_wanted=2, num_actors=2, num_here=2, cpus=4, gpus=1.0, decode_processes=4, num_cores=8
)


def _times(encoding: float, decoding: float) -> _Times:
    """Of two actors with a GPU and four cores each: seconds of encoding and of decoding."""
    busy_s = {"encoding": encoding, "decoding": decoding, "cores": decoding}
    return _Times(encode_s=2 * encoding, decode_cpu_s=8 * decoding, start_s=10.0, busy_s=busy_s)


def _look_at_nothing(scale: Scale) -> Look:
    return _look_of(scale.shards, num_bytes=1)


def _look_of(shards: Sequence[ShardLook], num_bytes: int) -> Look:
    return Look(
        shards=shards,
        cpu_s=1.0,
        start_s=1.0,
        num_bytes=num_bytes,
        frames={},
        examples={},
        kinds=frozenset({"video"}),
        source_uris=(),
        file_requests={},
        num_passed_over=0,
        ran_out=False,
    )


def _whole_tars(num_shards: int, num_videos: int) -> tuple[list[ShardSpec], Scale]:
    specs = [
        ShardSpec(
            shard_id=f"s{number}",
            source_uri=f"/in/{number}.tar",
            kind="tar",
            plan_key=None,
            source_size_bytes=1000,
            source_etag=None,
            num_videos=None,
        )
        for number in range(num_shards)
    ]
    bucket = Bucket(width_px=64, height_px=64, num_frames=9)
    shards = [
        ShardLook(spec=spec, weight=1000.0, is_whole=True, num_videos=num_videos, buckets=Counter({bucket: num_videos}))
        for spec in specs
    ]
    return specs, Scale(specs, _look_of(shards, num_bytes=1000 * num_shards))


def test_encoders_that_wait_for_decoding_are_advised_more_cores_and_others_are_not() -> None:
    (advice,) = _advice_on_speed(CREW, _times(1000.0, 3000.0), cores=12.0)
    assert "each actor's takes 12.0 cores and it has 4" in advice
    assert "wait 67% of the time" in advice
    assert "--cpus-per-actor 12" in advice
    assert not list(_advice_on_speed(CREW, _times(1000.0, 900.0), cores=3.6))
    on_cpu = replace(CREW, device_type="cpu", gpus=0.0, cpus=1, decode_processes=1)
    assert not list(_advice_on_speed(on_cpu, _times(1000.0, 100.0), cores=0.1))
    (advice,) = _advice_on_speed(on_cpu, _times(1000.0, 3000.0), cores=3.0)
    assert "smaller sources" in advice


@pytest.mark.parametrize(
    ("num_shards", "num_videos", "busy_s", "part"),
    [
        (10, 100, 10 * 300.0, None),
        (10, 100, 10 * 3000.0, "lost with each machine that goes: pack the tars anew with about 5 samples each"),
        (1000, 2, 1000 * 0.5, "a shard takes an actor 1.0 s"),
        (50, 2, 50 * 0.5, None),  # a short run, whatever its shards
        (1, 100, 1000.0, "there are 1 shards for 2 encoders"),
    ],
)
def test_shards_that_are_too_large_too_small_or_too_few_are_named_with_a_size_that_is_not(
    num_shards: int, num_videos: int, busy_s: float, part: str | None
) -> None:
    specs, scale = _whole_tars(num_shards, num_videos)
    advice = list(_advice_on_shards(CREW, specs, scale, _times(busy_s, 0.0)))
    assert len(advice) == (part is not None)
    assert part is None or part in advice[0]


def test_a_bucket_that_nothing_fits_is_named_and_those_for_images_of_an_input_of_videos_are_not() -> None:
    _, scale = _whole_tars(3, 10)
    required = ["--input", "in", "--output", "out", "--model", "small"]
    look = _look_at_nothing(scale)
    named = parse_arguments([*required, "--buckets", "64x64x9;512x512x9;64x64x1"])
    (advice,) = _advice_on_buckets(named, look, scale)
    assert "none went into 512x512x9;" in advice
    assert not list(_advice_on_buckets(parse_arguments([*required, "--buckets", "64x64x9"]), look, scale))


class _Region(BaseHTTPRequestHandler):
    """Stands for AWS, which states regions; the store of the other tests does not."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        bucket = self.path.strip("/").partition("/")[0]
        if bucket != "silent":
            self.send_header("x-amz-bucket-region", bucket)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("source", "output", "is_told"),
    [
        ("us-east-1", "eu-west-1", True),
        ("us-east-1", "us-east-1", False),
        ("silent", "us-east-1", False),
        ("us-east-1", "silent", False),
    ],
)
def test_an_output_in_another_region_is_named_where_the_store_states_regions(
    source: str, output: str, is_told: bool, s3_env: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs, _ = _whole_tars(1, 1)
    specs = [replace(specs[0], source_uri=f"s3://{source}/shards/0.tar")]
    config = parse_arguments(["--input", "s3://in", "--output", f"s3://{output}/latents", "--model", "small"])
    with HTTPServer(("127.0.0.1", 0), _Region) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        advice = list(_advice_on_regions(config, specs, ()))
        server.shutdown()
        thread.join()
    assert len(advice) == is_told
    assert not is_told or "lies in us-east-1 and the output in eu-west-1" in advice[0]


# --- requests -------------------------------------------------------------------------------------------------------

# A tar for each shard, into an empty output.
WORK = Work(
    num_shards=10_000,
    num_records=0,
    num_published=None,
    is_begun=False,
    num_files=10_000,
    num_sets=0,
    num_plans=0,
    num_new_slices=0,
    num_input_files=10_000,
    snapshot_every=1000,
    snapshot_growth=0.1,
)


def test_requests_grow_with_shards_as_the_readme_says() -> None:
    few, many = requests_to_output(replace(WORK, num_shards=10, num_files=10)), requests_to_output(WORK)
    # Two writes and three reads of a shard, and snapshots that do not grow with the square of the shards.
    assert many["put"] - few["put"] == pytest.approx(2 * 9_990, rel=0.01)
    assert many["get"] - few["get"] == pytest.approx(3 * 9_990, rel=0.01)
    assert many["list"] < 200


def test_requests_for_the_files_and_the_slices_of_a_folder_are_those_that_are_sent(
    proxy: FaultProxy, s3_env: SeaweedFS, tmp_path: Path
) -> None:
    folder = f"files-{uuid.uuid4().hex[:8]}"
    members = [member for still in CLIP_STILLS for member in clip_members(still, still.stem)]
    assert len(members) == 6, "two pictures, each with its .txt and .json"
    for name, content in members:
        s3_env.client().put_object(Bucket="shards", Key=f"{folder}/{name}", Body=content)
    flags = ["--input", f"s3://shards/{folder}", "--output", s3_env.root(), "--model", "small", "--buckets", "64x64x9"]
    config = parse_arguments([*flags, "--samples-per-shard", "1"])
    store = open_store(config.run.output)
    specs = plan_shards(config.source, store)
    sent = Counter(_kind(method, path) for method, path in proxy.requests if path.startswith("/latents"))
    work = replace(WORK, num_shards=2, num_files=2, num_plans=1, num_new_slices=2, num_input_files=6)
    with_plan, without = requests_to_output(work), requests_to_output(replace(work, num_plans=0, num_new_slices=0))
    # Beside planning, an actor reads the slice of its shard, and the driver the first one.
    assert Counter({kind: with_plan[kind] - without[kind] for kind in KINDS}) == sent + Counter(get=3)
    proxy.requests.clear()
    look = look_at(config, specs, store, {}, tmp_path, 60, other_child=0)
    read = Counter(_kind(method, path) for method, path in proxy.requests if path.startswith("/shards"))
    assert Scale(specs, look).is_whole
    assert look.file_requests == read == Counter(head=2 * 6, get=2 * 3)


@pytest.mark.parametrize(
    ("limit", "num_cores"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("nonsense", 8)]
)
def test_a_container_has_the_cores_that_it_is_limited_to(
    limit: str, num_cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(estimate, "_CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert estimate._cores_here() == num_cores
