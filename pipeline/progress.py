"""Shows how a run goes: a live line on a terminal, plain lines elsewhere, or JSON lines for programs.

Not the metrics (those are `metrics`) and not the final result line (the job prints that). Called by `run`. Everything
goes to standard error, so that standard output carries the result alone.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipeline.errors import printable

_PLAIN_INTERVAL_S = 10.0
_RATE_WINDOW_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How far a run is, at one moment."""

    num_shards: int
    num_shards_done: int
    num_shards_running: int
    num_shards_undone: int
    num_records: int
    num_rejected: int
    clips_per_s: float
    eta_s: float | None
    elapsed_s: float

    def line(self) -> str:
        """One line for people."""
        eta = "--" if self.eta_s is None else _duration(self.eta_s)
        undone = f", {self.num_shards_undone} undone" if self.num_shards_undone else ""
        return (
            f"shards {self.num_shards_done}/{self.num_shards} ({self.num_shards_running} running{undone})  "
            f"clips {self.num_records} at {self.clips_per_s:.2f}/s  rejected {self.num_rejected}  "
            f"elapsed {_duration(self.elapsed_s)}  ETA {eta}"
        )


def _duration(seconds: float) -> str:
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest_s:02d}"


class RateMeter:
    """Rates over the last minutes, so that an ETA follows the present speed and not the start-up."""

    def __init__(self) -> None:
        self._points: list[tuple[float, int, int]] = [(time.monotonic(), 0, 0)]

    def add(self, num_shards_done: int, num_records: int) -> None:
        """Notes the totals of now."""
        now = time.monotonic()
        self._points.append((now, num_shards_done, num_records))
        while len(self._points) > 2 and self._points[1][0] < now - _RATE_WINDOW_S:
            self._points.pop(0)

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
            self._live = Live(Text(""), console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, standing: Standing, is_last: bool = False) -> None:
        """Shows a standing; plain and JSON lines appear every ten seconds and at the end."""
        if self._live is not None:
            # A line that wraps would be drawn again below itself.
            self._live.update(Text(standing.line(), no_wrap=True, overflow="ellipsis"))
            return
        now = time.monotonic()
        if now - self._last_shown_s < _PLAIN_INTERVAL_S and not is_last:
            return
        self._last_shown_s = now
        text = json.dumps({"event": "progress", **asdict(standing)}) if self._mode == "json" else standing.line()
        print(text, file=self._stream, flush=True)

    def say(self, event: str, message: str) -> None:
        """One message for the log; control characters of hostile names are escaped."""
        safe = printable(message)
        if self._mode == "json":
            print(json.dumps({"event": event, "message": safe}), file=self._stream, flush=True)
        elif self._live is not None:
            self._console.print(Text(safe))
        else:
            print(safe, file=self._stream, flush=True)
