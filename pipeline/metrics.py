"""Every metric of a run: one table of names, units and labels, and the registry that the driver serves.

Not measured here: actors send plain numbers with their results and the driver, which outlives them, counts. Series
that a worker process owned would vanish with it and begin at their first value, so that a rate over them would be
wrong. Label values come from closed sets only (reason codes, stages, states, actor indices); no URI, key or message
is ever a label. Constant labels (job, run, cluster) name the run itself, so that dashboards can choose one.

A job ends, and with it what Prometheus can scrape. Its last values are therefore written to a file or pushed to a
gateway, as gauges under names of their own (`final_name`): beside the series of the next run, sums would count twice.
Called by `run` and `jobs/encode_laion.py`; dashboards and alerts in `infra/` are tested against `METRICS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    pushadd_to_gateway,
    start_http_server,
    write_to_textfile,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from pipeline.records import REASONS

STAGES = ("decode", "wait", "encode", "check", "embed", "write", "upload", "commit")
SHARD_STATES = ("pending", "running", "done", "undone")
COMMIT_OUTCOMES = ("committed", "lost_race", "already_done", "restored")
STORE_ERROR_OUTCOMES = ("repeated", "given_up")
QUALITY_ALARMS = ("nonfinite", "undecoded", "psnr", "channels")
_PREFIX = "latentmill_"
_PUSH_TIMEOUT_S = 10.0
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One row of the table. `labels` maps each label to its closed set; None stands for actor indices.

    Attributes:
        has_start: there from the beginning, at zero; otherwise from its first value on, and before that nothing.
    """

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Mapping[str, tuple[str, ...] | None]
    has_start: bool = True


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
    "latentmill_decode_backlog_clips": Metric(
        kind="gauge", help="clips that are decoded and wait for the encoder of an actor", labels={"actor": None}
    ),
    "latentmill_encoder_busy_ratio": Metric(
        kind="gauge",
        help="share of the last shard's time in which the encoder computed",
        labels={"actor": None},
    ),
    "latentmill_eta_seconds": Metric(kind="gauge", help="estimated seconds until every shard is decided", labels={}),
    "latentmill_store_errors_total": Metric(
        kind="counter",
        help="requests to the object store that failed, of all processes: repeated after a pause, or given up",
        labels={"outcome": STORE_ERROR_OUTCOMES},
    ),
    "latentmill_quality_clips_total": Metric(
        kind="counter", help="clips that were decoded back and compared with their pixels (--quality-share)", labels={}
    ),
    "latentmill_quality_nonfinite_values_total": Metric(
        kind="counter", help="values of clips that were decoded back which were NaN or infinite", labels={}
    ),
    "latentmill_quality_alarms_total": Metric(
        kind="counter", help="alarms about the quality of latents, by kind", labels={"kind": QUALITY_ALARMS}
    ),
    "latentmill_quality_psnr_mean_db": Metric(
        kind="gauge", help="mean PSNR of the clips that were decoded back in this run", labels={}, has_start=False
    ),
    "latentmill_quality_psnr_worst_db": Metric(
        kind="gauge", help="lowest PSNR of a clip that was decoded back in this run", labels={}, has_start=False
    ),
    "latentmill_quality_latent_deviation": Metric(
        kind="gauge",
        help="deviation of the scaled latents of these clips, all channels together (a diffusion model takes about 1)",
        labels={},
        has_start=False,
    ),
    "latentmill_quality_latent_mean": Metric(
        kind="gauge",
        help="mean of the channel of these scaled latents whose mean is farthest from 0, without its sign",
        labels={},
        has_start=False,
    ),
    "latentmill_run_start_timestamp_seconds": Metric(
        kind="gauge", help="Unix time at which the run began", labels={}, has_start=False
    ),
    "latentmill_run_deadline_timestamp_seconds": Metric(
        kind="gauge", help="Unix time after which the run is overdue (--deadline-s)", labels={}, has_start=False
    ),
    "latentmill_run_end_timestamp_seconds": Metric(
        kind="gauge", help="Unix time at which the run ended", labels={}, has_start=False
    ),
    "latentmill_run_success_timestamp_seconds": Metric(
        kind="gauge", help="Unix time at which the run ended with exit code 0", labels={}, has_start=False
    ),
    "latentmill_run_exit_code": Metric(
        kind="gauge", help="exit code of the run, once it has ended", labels={}, has_start=False
    ),
}


def final_name(name: str) -> str:
    """The name under which the last value of a sample outlives its run.

    `latentmill_videos_total` becomes `latentmill_last_run_videos`, `latentmill_run_exit_code` becomes
    `latentmill_last_run_exit_code`.
    """
    return f"{_PREFIX}last_run_" + name.removeprefix(_PREFIX).removeprefix("run_").removesuffix("_total")


class RunMetrics:
    """The live values of one run, in a registry of their own so that runs in one process do not mix.

    Args:
        constant_labels: labels that every series carries: job, run and cluster. `job` also names the group at a push
            gateway.
    """

    def __init__(self, constant_labels: Mapping[str, str] | None = None) -> None:
        self.registry = CollectorRegistry()
        self._constant = dict(constant_labels or {})
        self._late: set[Counter | Gauge | Histogram] = set()
        self._followed: dict[tuple[str, str, tuple[tuple[str, str], ...]], int] = {}
        kinds = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
        self._metrics: dict[str, Counter | Gauge | Histogram] = {}
        for name, row in METRICS.items():
            extra = {"buckets": _SECONDS} if row.kind == "histogram" else {}
            metric = kinds[row.kind](name, row.help, (*row.labels, *self._constant), registry=None, **extra)
            self._metrics[name] = metric
            if not row.has_start:
                continue
            self.registry.register(metric)
            # A counter that first appears at its first value has no rate; every closed label value starts at zero.
            if not row.labels:
                self._child(name, {})
            elif len(row.labels) == 1:
                ((label, values),) = row.labels.items()
                for value in values or ():
                    self._child(name, {label: value})

    def _child(self, name: str, labels: Mapping[str, str]) -> Counter | Gauge | Histogram:
        row = METRICS[name]
        for label, value in labels.items():
            allowed = row.labels[label]
            assert allowed is None or value in allowed, f"{name}: {label}={value!r} is not in the closed set"
        metric = self._metrics[name]
        labels = {**labels, **self._constant}
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
        if not METRICS[name].has_start and self._metrics[name] not in self._late:
            self._late.add(self._metrics[name])
            self.registry.register(self._metrics[name])

    def follow(self, name: str, source: str, total: int, **labels: str) -> None:
        """Adds to a counter what the count of another process has grown by; a smaller count is that of its successor.

        Args:
            source: the process, by a name that its successor takes over.
        """
        key = (name, source, tuple(sorted(labels.items())))
        before = self._followed.get(key, 0)
        self._followed[key] = total
        if total != before:
            self.add(name, total - before if total > before else total, **labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Adds one observation to a histogram."""
        child = self._child(name, labels)
        assert isinstance(child, Histogram)
        child.observe(value)

    def serve(self, address: str, port: int) -> tuple[int, WSGIServer]:
        """Serves the registry over HTTP from a daemon thread; returns the bound port and the server to close."""
        server, _thread = start_http_server(port, addr=address, registry=self.registry)
        return int(server.server_port), server

    def write_final(self, path: str) -> None:
        """Writes the last values as a text file for node_exporter's collector, whole or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        write_to_textfile(path, self._final_registry())

    def push_final(self, url: str) -> None:
        """Pushes the last values to a Prometheus push gateway; values that this run does not have stay there.

        Raises:
            OSError: the gateway does not answer, or refuses.
        """
        group = {name: value for name, value in self._constant.items() if name != "job"}
        job = self._constant.get("job", "latentmill")
        pushadd_to_gateway(url, job, self._final_registry(), grouping_key=group, timeout=_PUSH_TIMEOUT_S)

    def _final_registry(self) -> CollectorRegistry:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Final(self.registry))
        return registry


class _Final(Collector):
    """The last values of a registry: gauges, because nothing counts on from them; histograms as sum and count."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Family]:
        for family in self._registry.collect():
            gauges: dict[str, Family] = {}
            for sample in family.samples:
                if sample.name.endswith(("_bucket", "_created")):
                    continue
                name = final_name(sample.name)
                gauge = gauges.setdefault(name, Family(name, f"at the end of the run: {family.documentation}", "gauge"))
                gauge.add_sample(name, sample.labels, sample.value)
            yield from gauges.values()
