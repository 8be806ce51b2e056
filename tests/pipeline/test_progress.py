"""The progress line: plain lines, JSON lines, and names that cannot forge a line."""

from __future__ import annotations

import io
import json
import os
import pty
import re
from contextlib import suppress
from dataclasses import replace

import pytest
from rich.console import Console

from pipeline.progress import Crew, Progress, Quality, RateMeter, Standing

_STANDING = Standing(
    num_shards=10,
    num_shards_done=3,
    num_shards_running=2,
    num_shards_undone=1,
    num_records=51,
    num_rejected=4,
    reasons={"too_short": 1, "unreadable": 3},
    num_retries=7,
    clips_per_s=2.5,
    eta_s=3725.0,
    elapsed_s=60.0,
    crew=Crew(num_encoders=4, num_encoders_ready=3, num_nodes=2, encoder_busy_share=0.934, num_clips_waiting=17),
)
_QUALITY = Quality(
    num_clips=1234, psnr_mean_db=31.26, psnr_worst_db=18.9, latent_deviation=0.841, alarms={"psnr": 2, "channels": 1}
)


def test_a_plain_line_says_shards_speed_rejections_and_time_left() -> None:
    stream = io.StringIO()
    with Progress("auto", stream) as progress:
        progress.show(_STANDING, is_last=True)
    line = stream.getvalue().strip()
    for part in (
        "3/10",
        "1 undone",
        "51 at 2.50/s",
        "rejected 4",
        "encoders 3/4, busy 93%",
        "retries 7",
        "ETA 1:02:05",
    ):
        assert part in line


@pytest.mark.parametrize("width", [40, 100])
def test_a_terminal_shows_five_lines_that_never_wrap(width: int) -> None:
    many = replace(_STANDING, reasons={f"reason_{number}": number for number in range(1, 9)})
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=True, highlight=False).print(many.view())
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in stream.getvalue().splitlines()]
    assert len(lines) == 5
    assert all(len(line.rstrip()) <= width for line in lines)
    if width == 100:
        text = "\n".join(lines)
        for part in ("shards 3/10", "30%", "ETA 1:02:05", "2 running, 1 undone, 7 retries", "clips 51 at 2.50/s"):
            assert part in text
        assert "17 decoded and waiting" in text
        assert "encoders 3 of 4 on 2 nodes, busy 93%" in text
        assert "rejected 4: reason_8 8, reason_7 7, reason_6 6, reason_5 5, 4 more reasons" in text


def test_a_run_whose_clips_are_decoded_back_shows_their_quality_and_its_alarms_on_the_way() -> None:
    standing = replace(_STANDING, quality=_QUALITY)
    text = "quality of 1,234 clips, PSNR 31.3 dB, worst 18.9, latents' deviation 0.84, alarms: psnr 2, channels 1"
    assert text in standing.line()
    stream = io.StringIO()
    Console(file=stream, width=120, highlight=False).print(standing.view())
    assert len(stream.getvalue().splitlines()) == 6
    assert text in stream.getvalue()
    stream = io.StringIO()
    with Progress("json", stream) as progress:
        progress.show(standing)
    shown = json.loads(stream.getvalue())["quality"]
    assert (shown["num_clips"], shown["psnr_worst_db"], shown["alarms"]) == (1234, 18.9, {"psnr": 2, "channels": 1})
    none_yet = Quality(num_clips=0, psnr_mean_db=None, psnr_worst_db=None, latent_deviation=None, alarms={})
    assert none_yet.text() == "quality of 0 clips, alarms: none"


def test_a_live_view_is_drawn_on_a_terminal_and_messages_stay_above_it() -> None:
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as stream, Progress("auto", stream) as progress:
        progress.show(_STANDING)
        progress.say("retry", "shard 1: again")
        progress.show(replace(_STANDING, num_shards_done=10), is_last=True)
    drawn = b""
    with suppress(OSError):  # the other end is closed
        while block := os.read(leader, 1 << 16):
            drawn += block
    os.close(leader)
    assert drawn.index(b"shard 1: again") < drawn.rindex(b"shards 10/10")


def test_json_lines_can_be_read_by_a_program() -> None:
    stream = io.StringIO()
    with Progress("json", stream) as progress:
        progress.show(_STANDING, is_last=True)
        progress.say("retry", "shard 1: again")
    shown, said = map(json.loads, stream.getvalue().splitlines())
    assert (shown["event"], shown["num_shards_done"], shown["eta_s"]) == ("progress", 3, 3725.0)
    assert (shown["reasons"], shown["crew"]["num_clips_waiting"]) == ({"too_short": 1, "unreadable": 3}, 17)
    assert said == {"event": "retry", "message": "shard 1: again"}


def test_a_name_with_control_characters_stays_one_line() -> None:
    stream = io.StringIO()
    with Progress("plain", stream) as progress:
        progress.say("retry", "shard a\r\nshards 10/10 \x1b[2J done")
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()


def test_the_rate_is_that_of_what_was_added() -> None:
    meter = RateMeter()
    assert meter.rates() == (0.0, 0.0)
    meter.add(2, 20)
    shards_per_s, clips_per_s = meter.rates()
    assert shards_per_s > 0
    assert abs(clips_per_s / shards_per_s - 10) < 0.5


def test_the_rate_keeps_a_point_a_second_and_not_one_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("pipeline.progress.time.monotonic", lambda: now_s)
    meter = RateMeter()
    for number in range(1, 5001):
        now_s = number / 100
        meter.add(number, 10 * number)
    assert len(meter._points) <= 60
    assert meter.rates() == pytest.approx((100.0, 1000.0))
