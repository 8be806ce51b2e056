"""The progress line: plain lines, JSON lines, and names that cannot forge a line."""

from __future__ import annotations

import io
import json

from pipeline.progress import Progress, RateMeter, Standing

_STANDING = Standing(
    num_shards=10,
    num_shards_done=3,
    num_shards_running=2,
    num_shards_undone=1,
    num_records=51,
    num_rejected=4,
    clips_per_s=2.5,
    eta_s=3725.0,
    elapsed_s=60.0,
)


def test_a_plain_line_says_shards_speed_rejections_and_time_left() -> None:
    stream = io.StringIO()
    with Progress("auto", stream) as progress:
        progress.show(_STANDING, is_last=True)
    line = stream.getvalue().strip()
    for part in ("3/10", "1 undone", "51 at 2.50/s", "rejected 4", "ETA 1:02:05"):
        assert part in line


def test_json_lines_can_be_read_by_a_program() -> None:
    stream = io.StringIO()
    with Progress("json", stream) as progress:
        progress.show(_STANDING, is_last=True)
        progress.say("retry", "shard 1: again")
    shown, said = map(json.loads, stream.getvalue().splitlines())
    assert (shown["event"], shown["num_shards_done"], shown["eta_s"]) == ("progress", 3, 3725.0)
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
