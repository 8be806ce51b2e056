"""Every metric of a run: one table of names, units and labels, and the registry that the driver serves.

Not measured here: actors send plain numbers with their results and the driver, which outlives them, counts. Series
that a worker process owned would vanish with it and begin at their first value, so that a rate over them would be
wrong. Label values come from closed sets only (reason codes, stages, states, actor indices); no URI, key or message
is ever a label.
Called by `run`; dashboards and alerts in `infra/` are tested against `METRICS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from pipeline.records import REASONS

STAGES = ("decode", "wait", "encode", "embed", "write", "upload", "commit")
SHARD_STATES = ("pending", "running", "done", "undone")
COMMIT_OUTCOMES = ("committed", "lost_race", "already_done", "restored")
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One row of the table. `labels` maps each label to its closed set; None stands for actor indices."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Mapping[str, tuple[str, ...] | None]


METRICS: Mapping[str, Metric] = {
    "latentmill_videos_total": Metric(
        kind="counter",
        help="source videos and images decided, by outcome and, where rejected, reason",
        labels={"outcome": ("ok", "rejected")},
    ),
    "latentmill_clips_total": Metric(
        kind="counter", help="clips cut, by outcome", labels={"outcome": ("ok", "rejected")}
    ),
    "latentmill_rejections_total": Metric(
        kind="counter", help="rejected videos and clips, by reason code", labels={"reason": tuple(REASONS)}
    ),
    "latentmill_frames_total": Metric(kind="counter", help="pixel frames encoded", labels={}),
    "latentmill_bytes_total": Metric(
        kind="counter",
        help="bytes of source videos read and of data files written",
        labels={"direction": ("in", "out")},
    ),
    "latentmill_stage_seconds": Metric(
        kind="histogram", help="seconds that a shard spent in a stage", labels={"stage": STAGES}
    ),
    "latentmill_shards": Metric(kind="gauge", help="planned shards by state", labels={"state": SHARD_STATES}),
    "latentmill_shard_commit_total": Metric(
        kind="counter", help="commit attempts by outcome", labels={"outcome": COMMIT_OUTCOMES}
    ),
    "latentmill_shard_attempts_failed_total": Metric(
        kind="counter", help="attempts at a shard that ended in an error or a dead actor", labels={}
    ),
    "latentmill_actors_hanging_total": Metric(
        kind="counter", help="actors that were frozen or made no step, and were killed", labels={}
    ),
    "latentmill_queue_depth": Metric(
        kind="gauge", help="shards handed to an actor and not yet returned", labels={"actor": None}
    ),
    "latentmill_encoder_busy_ratio": Metric(
        kind="gauge",
        help="share of the last shard's time in which the encoder computed",
        labels={"actor": None},
    ),
    "latentmill_eta_seconds": Metric(kind="gauge", help="estimated seconds until every shard is decided", labels={}),
}


class RunMetrics:
    """The live values of one run, in a registry of their own so that runs in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kinds = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
        self._metrics: dict[str, Counter | Gauge | Histogram] = {}
        for name, row in METRICS.items():
            extra = {"buckets": _SECONDS} if row.kind == "histogram" else {}
            metric = kinds[row.kind](name, row.help, tuple(row.labels), registry=self.registry, **extra)
            self._metrics[name] = metric
            # A counter that first appears at its first value has no rate; every closed label value starts at zero.
            if len(row.labels) == 1:
                ((label, values),) = row.labels.items()
                for value in values or ():
                    metric.labels(**{label: value})

    def _child(self, name: str, labels: Mapping[str, str]) -> Counter | Gauge | Histogram:
        row = METRICS[name]
        for label, value in labels.items():
            allowed = row.labels[label]
            assert allowed is None or value in allowed, f"{name}: {label}={value!r} is not in the closed set"
        metric = self._metrics[name]
        return metric.labels(**labels) if labels else metric

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Adds to a counter."""
        child = self._child(name, labels)
        assert isinstance(child, Counter)
        child.inc(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Sets a gauge."""
        child = self._child(name, labels)
        assert isinstance(child, Gauge)
        child.set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Adds one observation to a histogram."""
        child = self._child(name, labels)
        assert isinstance(child, Histogram)
        child.observe(value)

    def serve(self, address: str, port: int) -> tuple[int, WSGIServer]:
        """Serves the registry over HTTP from a daemon thread; returns the bound port and the server to close."""
        server, _thread = start_http_server(port, addr=address, registry=self.registry)
        return int(server.server_port), server
