"""Shows how a run goes: a live view on a terminal, plain lines elsewhere, or JSON lines for programs.

Not the metrics (those are `metrics`) and not the final result line (the job prints that). Called by `run`. Everything
goes to standard error, so that standard output carries the result alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from pipeline.errors import printable

_PLAIN_INTERVAL_S = 10.0
_RATE_WINDOW_S = 300.0
_RATE_STEP_S = 1.0
_MOST_REASONS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """The encoders of a run, at one moment.

    Attributes:
        num_encoders: started or starting.
        num_nodes: that encoders at work are on.
        encoder_busy_share: of the last shard of each encoder at work, on average; None before the first.
        num_clips_waiting: decoded, and not yet taken by an encoder. Few: decoding is too slow; many: encoding is.
    """

    num_encoders: int = 0
    num_encoders_ready: int = 0
    num_nodes: int = 0
    encoder_busy_share: float | None = None
    num_clips_waiting: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What the clips gave that were decoded back, up to one moment. None before the first of them.

    Attributes:
        latent_deviation: of all channels together, scaled.
        alarms: how often each kind rang.
    """

    num_clips: int
    psnr_mean_db: float | None
    psnr_worst_db: float | None
    latent_deviation: float | None
    alarms: Mapping[str, int]

    def text(self) -> str:
        """In a few words for people."""
        figures = ""
        if self.psnr_mean_db is not None and self.psnr_worst_db is not None and self.latent_deviation is not None:
            figures = (
                f", PSNR {self.psnr_mean_db:.1f} dB, worst {self.psnr_worst_db:.1f}, "
                f"latents' deviation {self.latent_deviation:.2f}"
            )
        alarms = ", ".join(f"{kind} {number:,}" for kind, number in self.alarms.items())
        return f"quality of {self.num_clips:,} clips{figures}, alarms: {alarms or 'none'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How far a run is, at one moment.

    Attributes:
        reasons: rejections by reason code.
        num_retries: attempts at a shard that failed.
        quality: None where no clip is decoded back.
    """

    num_shards: int
    num_shards_done: int
    num_shards_running: int
    num_shards_undone: int
    num_records: int
    num_rejected: int
    reasons: Mapping[str, int]
    num_retries: int
    clips_per_s: float
    eta_s: float | None
    elapsed_s: float
    crew: Crew
    quality: Quality | None = None

    def line(self) -> str:
        """One line for people."""
        busy = "" if self.crew.encoder_busy_share is None else f", busy {self.crew.encoder_busy_share:.0%}"
        quality = "" if self.quality is None else f"  {self.quality.text()}"
        return (
            f"shards {self.num_shards_done}/{self.num_shards} ({self.num_shards_running} running{self._undone()})  "
            f"clips {self.num_records} at {self.clips_per_s:.2f}/s  rejected {self.num_rejected}  "
            f"encoders {self.crew.num_encoders_ready}/{self.crew.num_encoders}{busy}  retries {self.num_retries}  "
            f"elapsed {duration_text(self.elapsed_s)}  ETA {self._eta()}{quality}"
        )

    def view(self) -> Group:
        """Some lines for a terminal: four, one about rejections, and one about quality where that is looked at."""
        crew = self.crew
        total = max(1, self.num_shards)
        shards = Table.grid(padding=(0, 2), expand=True)
        shards.add_column(no_wrap=True)
        shards.add_column(ratio=1)
        shards.add_column(no_wrap=True)
        shards.add_row(
            Text(f"shards {self.num_shards_done:,}/{self.num_shards:,}", style="bold"),
            ProgressBar(total=total, completed=min(self.num_shards_done, total)),
            Text(f"{self.num_shards_done / total:.0%}  ETA {self._eta()}"),
        )
        nodes = counted(crew.num_nodes, "node")
        busy = "--" if crew.encoder_busy_share is None else f"{crew.encoder_busy_share:.0%}"
        lines = [
            f"{self.num_shards_running} running{self._undone()}, {self.num_retries} retries, "
            f"elapsed {duration_text(self.elapsed_s)}",
            f"clips {self.num_records:,} at {self.clips_per_s:.2f}/s, {crew.num_clips_waiting} decoded and waiting",
            f"encoders {crew.num_encoders_ready} of {crew.num_encoders} on {nodes}, busy {busy}",
        ]
        if self.quality is not None:
            lines.append(self.quality.text())
        rejected = f"rejected {self.num_rejected:,}"
        most = sorted(self.reasons.items(), key=lambda reason: (-reason[1], reason[0]))
        if most:
            more = f", {len(most) - _MOST_REASONS} more reasons" if len(most) > _MOST_REASONS else ""
            rejected += ": " + ", ".join(f"{name} {number:,}" for name, number in most[:_MOST_REASONS]) + more
        # A line that wraps would be drawn again below itself.
        return Group(shards, *(Text(line, no_wrap=True, overflow="ellipsis") for line in (*lines, rejected)))

    def _undone(self) -> str:
        return f", {self.num_shards_undone} undone" if self.num_shards_undone else ""

    def _eta(self) -> str:
        return "--" if self.eta_s is None else duration_text(self.eta_s)


def size_text(num_bytes: float) -> str:
    """ "2.97 MB" of 2970692."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.0f} PB"


def counted(number: float, noun: str) -> str:
    """ "1 shard", "2,000 shards"."""
    return f"{number:,.10g} {noun}{'s' * (number != 1)}"


def crew_in_words(num_actors: int, num_cpus: int, num_gpus: float) -> str:
    """ "2 actors of 8 CPUs and 1 GPU"."""
    gpus = f" and {counted(num_gpus, 'GPU')}" if num_gpus else ""
    return f"{counted(num_actors, 'actor')} of {counted(num_cpus, 'CPU')}{gpus}"


def duration_text(seconds: float) -> str:
    """ "1:02:05" of 3725."""
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest_s:02d}"


class RateMeter:
    """Rates over the last minutes, so that an ETA follows the present speed and not the start-up."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int, int]] = deque([(time.monotonic(), 0, 0)])

    def add(self, num_shards_done: int, num_records: int) -> None:
        """Notes the totals of now; of those that come within a second the last is kept."""
        now = time.monotonic()
        if len(self._points) > 2 and now - self._points[-2][0] < _RATE_STEP_S:
            self._points.pop()
        self._points.append((now, num_shards_done, num_records))
        while len(self._points) > 2 and self._points[1][0] < now - _RATE_WINDOW_S:
            self._points.popleft()

    def rates(self) -> tuple[float, float]:
        """Shards and clips per second since the oldest point that is kept."""
        first, last = self._points[0], self._points[-1]
        seconds = max(1e-6, time.monotonic() - first[0])
        return (last[1] - first[1]) / seconds, (last[2] - first[2]) / seconds


class Progress:
    """Shows standings and messages; a context manager that leaves the terminal as it was.

    Args:
        mode: "auto" (live on a terminal, else plain), "plain" or "json".
    """

    def __init__(self, mode: str, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._mode = ("live" if self._stream.isatty() else "plain") if mode == "auto" else mode
        self._console = Console(file=self._stream, highlight=False)
        self._live: Live | None = None
        self._last_shown_s = -_PLAIN_INTERVAL_S

    def __enter__(self) -> Progress:
        if self._mode == "live":
            # Until there is a standing: planning, and the start of Ray and of the encoders, take some seconds.
            self._live = Live(Spinner("dots", "getting ready"), console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, standing: Standing, is_last: bool = False) -> None:
        """Shows a standing; plain and JSON lines appear every ten seconds and at the end."""
        if self._live is not None:
            self._live.update(standing.view())
            return
        now = time.monotonic()
        if now - self._last_shown_s < _PLAIN_INTERVAL_S and not is_last:
            return
        self._last_shown_s = now
        text = json.dumps({"event": "progress", **asdict(standing)}) if self._mode == "json" else standing.line()
        print(text, file=self._stream, flush=True)

    def lines(self, lines: Iterable[str]) -> None:
        """A text of several lines for people; programs have the result line of the job."""
        if self._mode == "json":
            return
        for line in lines:
            self.say("", line)

    def say(self, event: str, message: str) -> None:
        """One message for the log; control characters of hostile names are escaped."""
        safe = printable(message)
        if self._mode == "json":
            print(json.dumps({"event": event, "message": safe}), file=self._stream, flush=True)
        elif self._live is not None:
            self._console.print(Text(safe))
        else:
            print(safe, file=self._stream, flush=True)
