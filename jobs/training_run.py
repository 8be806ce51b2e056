"""How a training is started and ended: this process or Ray Train, signals, exit codes, the result line.

Not what is trained: a job gives a function that trains as one worker (`vae_training.train`, `t2v_training.tune`) and
one that reads its command line. The last line on standard output is one JSON object; the exit codes are

    0 trained as far as asked      2 wrong use      4 failed, checkpoints stay      130 interrupted, with a checkpoint

Messages go to standard error. The same command again goes on from the last checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from cvvae.training import DivergedError
from jobs.training_checkpoints import checkpoints_in
from jobs.training_loop import TrainingSummary, WorkConfig, Worker
from pipeline.config import CPU_ENVIRONMENT
from pipeline.errors import LatentmillError, StorageError, StorageUnavailableError, UsageError
from pipeline.progress import Progress

EXIT_DONE, EXIT_USAGE, EXIT_FAILED, EXIT_INTERRUPTED = 0, 2, 4, 130
_POLL_S = 0.2
_WISH, _SAID, _SUMMARY, _FAILURE = "stop", "said.txt", "summary.json", "failure.json"


class Job(Protocol):
    """What is asked of a training; picklable, as workers get it."""

    @property
    def work(self) -> WorkConfig: ...


Train = Callable[[Any, Worker], TrainingSummary]
"""Trains as one worker. Ray pickles it by the name of its module, which therefore must not be the started program."""


def checked_work(work: WorkConfig) -> WorkConfig:
    """The configuration with the output's absolute path, as workers of Ray Train have folders of their own.

    Raises:
        UsageError: values that do not go together, or an output that may not be gone on with.
    """
    if work.local and work.num_workers > 1:
        raise UsageError(f"--local is one worker in this process, not {work.num_workers}; leave one of them out")
    if work.gpus_per_worker not in (None, 0, 1):
        raise UsageError(f"--gpus-per-worker: {work.gpus_per_worker:g} is neither 0 nor 1")
    found = checkpoints_in(Path(work.output).expanduser())
    if found and work.resume == "never":
        # Here and not in the workers, because one that replaces a lost one has to go on.
        raise UsageError(f"--output: {work.output} holds step {found[-1].step}: --resume auto, or another output")
    return replace(work, output=os.path.abspath(os.path.expanduser(work.output)))


def run_job(argv: Sequence[str], read_job: Callable[[Sequence[str]], Job], train: Train, is_program: bool) -> int:
    """Runs a job to its result line; returns the exit code.

    Args:
        is_program: the job is this process's program, which may start itself again with another environment.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    interrupt = _Interrupt()
    try:
        job = read_job(argv)
        interrupt.install()
        if job.work.local:
            summary = _train_here(job, train, interrupt, is_program)
        else:
            summary = _train_on_ray(job, train, interrupt)
    except StorageUnavailableError as error:
        return _fail(EXIT_FAILED, error)
    except (UsageError, StorageError) as error:
        return _fail(EXIT_USAGE, error)
    except KeyboardInterrupt:
        return _fail(EXIT_INTERRUPTED, LatentmillError("interrupted and stopped at once; the same command goes on"))
    except LatentmillError as error:
        return _fail(EXIT_FAILED, error)
    except DivergedError as error:
        return _fail(EXIT_FAILED, error)
    except ValueError as error:
        # Of cvvae: a configuration, checkpoint, teacher or objective that cannot be.
        is_known = type(error) is not ValueError
        if not is_known:
            traceback.print_exc()
        return _fail(EXIT_USAGE if is_known else EXIT_FAILED, error)
    except Exception as error:
        traceback.print_exc()
        return _fail(EXIT_FAILED, error)
    finally:
        interrupt.uninstall()
    code = EXIT_INTERRUPTED if summary.ended_by == "interrupt" else EXIT_DONE
    _result({"exit_code": code, **summary.as_result(), "output": job.work.output})
    return code


class _Interrupt:
    """The first Ctrl-C or SIGTERM is a wish to stop with a checkpoint, the second one stops at once."""

    def __init__(self) -> None:
        self.is_wished = False
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Takes the signals; once more after whoever else took them."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before.setdefault(number, signal.getsignal(number))
                signal.signal(number, self._handle)

    def uninstall(self) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: object) -> None:
        if self.is_wished:
            raise KeyboardInterrupt
        self.is_wished = True
        _say("interrupted: writing a checkpoint; once more stops at once")


def _train_here(job: Job, train: Train, interrupt: _Interrupt, is_program: bool) -> TrainingSummary:
    uses_gpu = torch.cuda.is_available() and job.work.gpus_per_worker != 0
    if job.work.gpus_per_worker and not uses_gpu:
        raise UsageError(
            f"--gpus-per-worker is {job.work.gpus_per_worker:g}, but torch {torch.__version__} sees no GPU"
        )
    if not uses_gpu and is_program and "GLIBC_TUNABLES" not in os.environ:
        # glibc reads its settings when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **CPU_ENVIRONMENT})
    device = torch.device("cuda" if uses_gpu else "cpu")
    return train(job, Worker(rank=0, world_size=1, device=device, wants_stop=lambda: interrupt.is_wished, say=_say))


def _train_on_ray(job: Job, train: Train, interrupt: _Interrupt) -> TrainingSummary:
    import ray

    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise UsageError(
            f"Ray Train could not be imported ({error}): pip install '.[train]', or give --local to train in this "
            "process"
        ) from error

    from pipeline.cluster import connected

    with connected(job.work.ray_address, {}, Progress("plain")), _exchange(job) as exchange:
        interrupt.install()  # ray.init puts a handler of its own in the place of ours
        uses_gpu = _uses_gpu(job, ray.cluster_resources())
        run_options: dict[str, Any] = {
            "name": exchange.name,
            "storage_path": str(exchange),
            "failure_config": FailureConfig(max_failures=job.work.max_failures),
            "worker_runtime_env": {} if uses_gpu else {"env_vars": CPU_ENVIRONMENT},
        }
        trainer = TorchTrainer(
            _train_in_worker,
            train_loop_config={"job": job, "train": train, "exchange": str(exchange)},
            scaling_config=ScalingConfig(
                num_workers=job.work.num_workers,
                use_gpu=uses_gpu,
                resources_per_worker={"CPU": job.work.cpus_per_worker, **({"GPU": 1} if uses_gpu else {})},
            ),
            run_config=RunConfig(**run_options),
        )
        try:
            _fit(trainer, interrupt, exchange)
        except TrainingFailedError as failed:
            raise _cause_of(failed, exchange) from failed
        return TrainingSummary(**json.loads((exchange / _SUMMARY).read_text(encoding="utf-8")))


@contextmanager
def _exchange(job: Job) -> Iterator[Path]:
    """Where the first worker and this process tell each other things, and Ray Train keeps its own."""
    exchange = Path(job.work.output) / ".ray" / uuid.uuid4().hex
    exchange.mkdir(parents=True)
    try:
        yield exchange
    finally:
        shutil.rmtree(exchange, ignore_errors=True)
        with suppress(OSError):
            exchange.parent.rmdir()


def _uses_gpu(job: Job, resources: Mapping[str, float]) -> bool:
    """Whether workers get a GPU each; refuses more workers than would ever be placed."""
    num_workers, gpus = job.work.num_workers, job.work.gpus_per_worker
    uses_gpu = resources.get("GPU", 0) > 0 if gpus is None else gpus > 0
    for name, needed in (("CPU", num_workers * job.work.cpus_per_worker), ("GPU", num_workers * uses_gpu)):
        if resources.get(name, 0) < needed:
            raise UsageError(
                f"{num_workers} workers need {needed} {name}s, the Ray cluster has {resources.get(name, 0):g}: lower "
                "--num-workers, --cpus-per-worker or --gpus-per-worker"
            )
    return uses_gpu


def _fit(trainer: Any, interrupt: _Interrupt, exchange: Path) -> None:
    """Waits for the workers in a thread, because Ray would put a handler of its own in the place of ours."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    thread.start()
    num_said = 0
    is_running = True
    while is_running:
        is_running = thread.is_alive()
        thread.join(_POLL_S)
        if interrupt.is_wished:
            (exchange / _WISH).touch()
        said = (exchange / _SAID).read_text(encoding="utf-8") if (exchange / _SAID).exists() else ""
        sys.stderr.write(said[num_said:])
        sys.stderr.flush()
        num_said = len(said)
    if failures:
        raise failures[0]


def _train_in_worker(config: Mapping[str, Any]) -> None:
    """The training function of a worker of Ray Train."""
    import ray.train
    import ray.train.torch

    job, exchange = config["job"], Path(config["exchange"])
    context = ray.train.get_context()
    is_first = context.get_world_rank() == 0

    def say(message: str) -> None:
        if is_first:
            with (exchange / _SAID).open("a", encoding="utf-8") as file:
                file.write(message + "\n")

    worker = Worker(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=ray.train.torch.get_device(),
        wants_stop=(exchange / _WISH).exists,
        say=say,
    )
    failure = exchange / _FAILURE
    if failure.exists():
        # Ray replaces whatever fails; what is wrong for good need not be found out again.
        raise UsageError(f"an earlier worker failed: {failure.read_text(encoding='utf-8')}")
    try:
        summary = config["train"](job, worker)
    except (LatentmillError, DivergedError, ValueError) as error:
        if type(error) is ValueError or isinstance(error, StorageUnavailableError):
            # A mistake of ours, whose traceback Ray shows, or something that may pass.
            raise
        with suppress(FileExistsError), failure.open("x", encoding="utf-8") as file:
            json.dump({"has_diverged": isinstance(error, DivergedError), "message": str(error)}, file)
        raise
    if is_first:
        (exchange / _SUMMARY).write_text(json.dumps(asdict(summary)), encoding="utf-8")


def _cause_of(failed: Exception, exchange: Path) -> Exception:
    """The error of the first worker that failed for good, if one did."""
    if (exchange / _FAILURE).exists():
        failure = json.loads((exchange / _FAILURE).read_text(encoding="utf-8"))
        return DivergedError(failure["message"]) if failure["has_diverged"] else UsageError(failure["message"])
    return LatentmillError(f"the workers failed: {failed}")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _fail(exit_code: int, error: Exception) -> int:
    _say(f"error: {error}")
    _result({"exit_code": exit_code, "error": type(error).__name__, "message": str(error)})
    return exit_code


def _result(fields: Mapping[str, object]) -> None:
    print(json.dumps(fields), flush=True)
