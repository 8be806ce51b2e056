"""The loop of a training, the same for one worker and for many: steps, rows of losses, checkpoints, a wish to stop.

Not what a step is: that is a `Course`, of which there is one per job (`vae_training`, `t2v_training`). Not how workers
are started either (`jobs/training_run.py`).

Every worker trains; the first one alone writes. A run that is killed and started again leaves the same files as one
that was not, `losses.jsonl` included: rows behind the checkpoint that it goes on from are cut off and made again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from cvvae.training import StepReport
from jobs.training_checkpoints import (
    Checkpoint,
    State,
    remove_old,
    remove_unfinished,
    write_checkpoint,
    write_folder,
)
from pipeline.config import auto_or, choice, local_folder, number, option, whole, yes_no

# Workers agree on stopping this often; a single one looks after every step.
_STEPS_BETWEEN_AGREEMENTS = 10
_SPEAKS_EVERY_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkConfig:
    """How training is carried out and what it leaves behind."""

    output: str = option(
        "local folder of checkpoints, losses, pictures and the final model; shared by all nodes", local_folder("output")
    )
    resume: str = option("auto: go on from the last checkpoint; never", choice("resume", ("auto", "never")), "auto")
    stop_at_step: int | None = option(
        "stop with a checkpoint after this many steps in all; auto: at the end",
        auto_or(whole("stop-at-step", 1)),
        None,
    )
    max_hours: float | None = option(
        "stop with a checkpoint after so many hours of this run", auto_or(number("max-hours", 0, 1e5)), None
    )
    local: bool = option("train in this process, without Ray", yes_no("local"), False, is_switch=True)
    num_workers: int = option("workers of Ray Train", whole("num-workers", 1), 1)
    gpus_per_worker: float | None = option(
        "GPUs of a worker, 0 or 1; auto: 1 where there are GPUs", auto_or(number("gpus-per-worker", 0, 1)), None
    )
    cpus_per_worker: int = option("CPU cores of a worker", whole("cpus-per-worker", 1), 1)
    threads: int | None = option(
        "threads of torch in a worker; auto: --cpus-per-worker", auto_or(whole("threads", 1)), None
    )
    max_failures: int = option("times that Ray replaces lost workers before giving up", whole("max-failures", 0), 3)
    log_every: int = option("steps from one row of losses.jsonl to the next", whole("log-every", 1), 20)
    checkpoint_every: int = option("steps from one checkpoint to the next", whole("checkpoint-every", 1), 1000)
    keep_last: int = option("checkpoints that stay", whole("keep-last", 1), 3)
    keep_every: int = option("and those at multiples of so many steps; 0: none", whole("keep-every", 0), 0)
    ray_address: str | None = option("address of a running Ray cluster; default: an embedded one", str, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One of the processes that train together.

    Attributes:
        wants_stop: whether someone asked to stop; asked of the first worker only.
        say: for people; of the first worker only.
    """

    rank: int
    world_size: int
    device: torch.device
    wants_stop: Callable[[], bool]
    say: Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSummary:
    """How a run ended, JSON-safe.

    Attributes:
        ended_by: "end" of the training, "stop_at_step", "max_hours", or "interrupt".
        seconds: of this run's training steps, without the start.
        more: what this kind of training says besides.
    """

    ended_by: str
    step: int
    num_steps: int
    num_steps_of_run: int
    num_skipped: int
    seconds: float
    losses: Mapping[str, float]
    more: Mapping[str, Any] = field(default_factory=dict)

    def as_result(self) -> dict[str, Any]:
        """For the result line: what is said besides stands beside the rest."""
        values = {name: getattr(self, name) for name in self.__slots__ if name != "more"}
        return {**values, **self.more}


class Course(Protocol):
    """A training as the loop sees it: its steps, the state between them, and what it shows of itself.

    Attributes:
        step: steps done.
        num_steps: steps in all.
        num_skipped: steps with a gradient that was not finite.
    """

    @property
    def step(self) -> int: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def num_skipped(self) -> int: ...

    def train_step(self) -> StepReport:
        """The next step on the next batch."""

    def labels(self, report: StepReport) -> Mapping[str, Any]:
        """What the row of a step says besides losses and learning rate."""

    def look(self) -> None:
        """What is due at this step: pictures, a validation. Called before the first and after every step, by every
        worker."""

    def cursor(self) -> Any:
        """Where this worker's inputs stand, JSON-safe; None before the first batch."""

    def state(self) -> State:
        """What all workers go on from, in `numbers` and `tensors`; `more` says what this training is about."""

    def write_models(self, folder: Path) -> None:
        """Adds models to a checkpoint."""

    def write_final(self, folder: Path) -> None:
        """Writes what the training was for."""

    def summary(self) -> Mapping[str, Any]:
        """What the result line says of this kind of training."""


class Loop:
    """The steps of one run.

    Args:
        checkpoint: the one that `course` stands at; None at the beginning.
    """

    def __init__(
        self, work: WorkConfig, worker: Worker, course: Course, journal: Journal, checkpoint: Checkpoint | None
    ) -> None:
        self._work = work
        self._output = Path(work.output)
        self._worker = worker
        self._course = course
        self._journal = journal
        self._is_first = worker.rank == 0
        self._saved_step = -1 if checkpoint is None else checkpoint.step
        self._started_s = time.monotonic()
        self._said_s = self._started_s
        self._said_step = course.step

    def run(self) -> TrainingSummary:
        """Trains until the end, or until time is over or someone asks to stop; leaves a checkpoint in each case."""
        course, work = self._course, self._work
        first_step = course.step
        if self._saved_step < 0:
            course.look()
        ended_by = self._ending()
        while not ended_by:
            report = course.train_step()
            self._journal.add(report)
            if course.step % work.log_every == 0 or self._is_done():
                self._journal.write_row(course.step, report.lr, course.labels(report))
            course.look()
            if course.step % work.checkpoint_every == 0:
                self._save()
            self._speak()
            ended_by = self._ending()
        seconds = time.monotonic() - self._started_s
        self._save()
        if self._is_first and ended_by == "end":
            write_folder(self._output / "final", course.write_final)
        return TrainingSummary(
            ended_by=ended_by,
            step=course.step,
            num_steps=course.num_steps,
            num_steps_of_run=course.step - first_step,
            num_skipped=course.num_skipped,
            seconds=round(seconds, 3),
            losses=self._journal.last,
            more=course.summary(),
        )

    def _is_done(self) -> bool:
        return self._course.step >= self._course.num_steps

    def _ending(self) -> str:
        """Why training ends before the next step; "" where it does not. The same for all workers."""
        work, step = self._work, self._course.step
        if self._is_done():
            return "end"
        if work.stop_at_step is not None and step >= work.stop_at_step:
            return "stop_at_step"
        is_together = self._worker.world_size > 1
        if is_together and step % _STEPS_BETWEEN_AGREEMENTS:
            return ""
        reasons = ("", "max_hours", "interrupt")
        reason = 0
        if self._is_first:
            is_over = work.max_hours is not None and time.monotonic() - self._started_s >= work.max_hours * 3600
            reason = 2 if self._worker.wants_stop() else int(is_over)
        if is_together:
            flag = torch.tensor([reason], device=self._worker.device)
            dist.broadcast(flag, 0)
            reason = int(flag.item())
        return reasons[reason]

    def _save(self) -> None:
        cursor = self._course.cursor()
        if self._course.step == self._saved_step or cursor is None:
            return
        own = {"cursor": cursor, "losses": self._journal.state()}
        of_workers: list[Any] = [own]
        if self._worker.world_size > 1:
            of_workers = [None] * self._worker.world_size
            dist.all_gather_object(of_workers, own)
        if self._is_first:
            state = self._course.state()
            state = State(tensors=state.tensors, numbers=state.numbers, more={**state.more, "workers": of_workers})
            write_checkpoint(self._output, self._course.step, state, self._course.write_models)
            remove_old(self._output, self._work.keep_last, self._work.keep_every)
        self._saved_step = self._course.step
        if self._worker.world_size > 1:
            dist.barrier()

    def _speak(self) -> None:
        now = time.monotonic()
        if now - self._said_s < _SPEAKS_EVERY_S and not self._is_done():
            return
        step, num_steps = self._course.step, self._course.num_steps
        pace = (step - self._said_step) / max(1e-9, now - self._said_s)
        left_h = (num_steps - step) / max(1e-9, pace) / 3600
        losses = "  ".join(f"{name} {value:.4g}" for name, value in self._journal.last.items())
        self._worker.say(f"step {step}/{num_steps}  {pace:.2f} steps/s  {left_h:.2f} h left  {losses}")
        self._said_s, self._said_step = now, step


def own_part(state: State, rank: int) -> Mapping[str, Any]:
    """What a checkpoint holds of a worker: its "cursor" and "losses". Of fewer workers than now some serve twice."""
    of_workers = state.more["workers"]
    part: Mapping[str, Any] = of_workers[rank % len(of_workers)]
    return part


def note_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Checkpoint, say: Callable[[str], None]
) -> None:
    """Says where a run asks for something else than the one that wrote the checkpoint."""
    for name in sorted(now.keys() & before.keys()):
        if now[name] != before[name]:
            say(
                f"note: {name} is {now[name]!r}, but {before[name]!r} was what {checkpoint.folder} was trained "
                "with: is this the output of another training?"
            )


class Rows:
    """A file of JSON rows with a "step" each, which a run that goes on cuts off behind its checkpoint."""

    def __init__(self, path: Path, is_writing: bool) -> None:
        self._path = path
        self._is_writing = is_writing

    def begin(self) -> None:
        """Starts an empty file."""
        if self._is_writing:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self._path.parent)
            self._path.write_text("", encoding="utf-8")

    def go_on(self, step: int) -> None:
        """Cuts off the rows behind a step."""
        if not self._is_writing:
            return
        remove_unfinished(self._path.parent)
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        shorter = self._path.with_name(f".{self._path.name}")
        shorter.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        shorter.replace(self._path)

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds a row; None where JSON has no number."""
        if self._is_writing:
            safe = {name: _finite(value) if isinstance(value, float) else value for name, value in row.items()}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(safe) + "\n")


class Journal:
    """`losses.jsonl`: the means of the losses since the row before, over all workers, and `skipped`, the share of steps
    with a gradient that was not finite, which count in no other mean."""

    def __init__(self, output: Path, device: torch.device, is_writing: bool) -> None:
        self.last: Mapping[str, float] = {}
        self._rows = Rows(output / "losses.jsonl", is_writing)
        # All sums are there: a row stacks them, and NCCL adds up nothing else.
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def begin(self) -> None:
        """Starts an empty file."""
        self._rows.begin()

    def go_on(self, step: int, state: Mapping[str, Any]) -> None:
        """Cuts off the rows behind a checkpoint and takes up the sums that it saved."""
        self._sums = {
            name: torch.tensor(total, dtype=torch.float64, device=self._device) for name, (total, _) in state.items()
        }
        self._counts = {name: int(count) for name, (_, count) in state.items()}
        self._rows.go_on(step)

    def state(self) -> dict[str, tuple[float, int]]:
        """What has been added since the last row."""
        return {name: (float(total), self._counts[name]) for name, total in self._sums.items()}

    def add(self, report: StepReport) -> None:
        """Adds a step; nothing is read back from a GPU."""
        losses: Mapping[str, Tensor] = {} if report.is_skipped else report.losses
        skipped = torch.full((), float(report.is_skipped))
        for name, value in {**losses, "skipped": skipped}.items():
            total = value.double().to(self._device)
            if name in self._sums:
                self._sums[name] = self._sums[name] + total
                self._counts[name] += 1
            else:
                self._sums[name], self._counts[name] = total, 1

    def write_row(self, step: int, lr: float, labels: Mapping[str, Any]) -> None:
        """Writes the means and forgets them. All workers must call it: they have computed the same terms."""
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        if dist.is_initialized():
            dist.all_reduce(sums)
            sums /= dist.get_world_size()
        means = {name: total / self._counts[name] for name, total in zip(names, sums.tolist(), strict=True)}
        self._sums, self._counts = {}, {}
        self.last = means
        self._rows.write({"step": step, **labels, "lr": lr, **means})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _step_of(line: str) -> float:
    """The step of a row; infinite for the torn end of a file."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
