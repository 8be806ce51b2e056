"""What one worker of a training does, from its configuration to its last checkpoint; the same for one and for many.

Not an entry point: `jobs/train_vae.py` reads the command line and starts this in its own process or in the workers of
Ray Train. Not the arithmetic of a step either (`cvvae/training.py`), nor where clips come from
(`pipeline/training_clips.py`).

Every worker trains; the first one alone writes. A run that is killed and started again leaves the same files as one
that was not, `losses.jsonl` included: rows behind the checkpoint that it goes on from are cut off and made again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

import cvvae
from cvvae.config import CVVAEConfig
from cvvae.losses import Perceptual, load_perceptual
from cvvae.model import CVVAE
from cvvae.teachers import FrozenTeacher, load_teacher
from cvvae.training import Stage, StepReport, Trainer, TrainerConfig, from_mapping
from jobs.training_checkpoints import (
    Checkpoint,
    checkpoints_in,
    remove_old,
    remove_unfinished,
    write_checkpoint,
    write_folder,
)
from pipeline.config import DecodeLimits, auto_or, choice, local_folder, number, option, whole, yes_no
from pipeline.errors import UsageError
from pipeline.pictures import Frames, Row, grid, spread
from pipeline.training_clips import ClipsConfig, ClipSetting, TrainingBatch, TrainingClips

# The four settings of the paper, section 4.1, with its optimiser and number of steps.
_PAPER_SETTINGS = (
    {"kind": "image", "size": 256, "batch": 8, "share": 0.40},
    {"kind": "image", "size": 512, "batch": 2, "share": 0.10},
    {"kind": "video", "frames": 9, "size": 256, "batch": 1, "share": 0.25},
    {"kind": "video", "frames": 17, "size": 192, "batch": 1, "share": 0.25},
)
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {"name": "paper", "steps": 200_000, "lr": 1e-4, "settings": list(_PAPER_SETTINGS)},
}
# Clips of a batch and frames of a clip that a picture shows.
_PICTURED_CLIPS = 3
_PICTURED_FRAMES = 5
# Workers agree on stopping this often; a single one looks after every step.
_STEPS_BETWEEN_AGREEMENTS = 10
_SPEAKS_EVERY_S = 30.0


def _mapping(what: str) -> Callable[[object], Mapping[str, Any]]:
    def parse(given: object) -> Mapping[str, Any]:
        if not isinstance(given, Mapping):
            raise UsageError(f"{what} in --config is {given!r}: a mapping of names to values is needed")
        return dict(given)

    return parse


def _list(what: str) -> Callable[[object], Sequence[Any]]:
    def parse(given: object) -> Sequence[Any]:
        if not isinstance(given, list) or not given:
            raise UsageError(f"{what} in --config is {given!r}: a list is needed")
        return tuple(given)

    return parse


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What is trained, and towards whose latents."""

    teacher: str | None = option("folder, file or hub id of the frozen image VAE", str, None)
    teacher_subfolder: str | None = option("folder inside the teacher's folder or hub repository", str, None)
    init: str | None = option(
        "where to start: a CV-VAE (name, folder or hub id), or a diffusers AutoencoderKL (folder or hub id), which is "
        "inflated",
        str,
        None,
    )
    init_subfolder: str | None = option("folder inside --init", str, None)
    norm: str = option(
        "of an inflated model: frame (causal, exact at the start) or clip (published)",
        choice("norm", ("frame", "clip")),
        "frame",
    )
    model_config: str | None = option("instead of --init: config.json of a model to start at random", str, None)
    perceptual: str = option("perceptual distance: lpips or none", choice("perceptual", ("lpips", "none")), "lpips")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimisationConfig:
    """Stages, and what holds for all of them. YAML only: stages, and settings and loss as defaults of each stage."""

    preset: str | None = option("stages of a publication: paper", choice("preset", tuple(PRESETS)), None)
    steps: int | None = option("length of the preset's stage; auto: as published", auto_or(whole("steps", 1)), None)
    stages: Sequence[Any] | None = option("stages", _list("stages"), None, is_nested=True)
    settings: Sequence[Any] | None = option("settings", _list("settings"), None, is_nested=True)
    loss: Mapping[str, Any] = option("loss", _mapping("loss"), None, is_nested=True)
    trainer: Mapping[str, Any] = option("trainer", _mapping("trainer"), None, is_nested=True)
    seed: int = option("seed of everything that is drawn", whole("seed", 0), 0)
    precision: str | None = option(
        "float32 (as the paper) or bfloat16", choice("precision", ("float32", "bfloat16")), None
    )
    gradient_checkpointing: bool = option(
        "compute activations twice instead of keeping them", yes_no("gradient_checkpointing"), False, is_switch=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkConfig:
    """How training is carried out and what it leaves behind."""

    output: str = option(
        "local folder of checkpoints, losses, pictures and the final model; shared by all nodes", local_folder("output")
    )
    resume: str = option("auto: go on from the last checkpoint; never", choice("resume", ("auto", "never")), "auto")
    stop_at_step: int | None = option(
        "stop with a checkpoint after this many steps in all; auto: at the end of the stages",
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
    pictures_every: int = option("steps from one picture to the next; 0: none", whole("pictures-every", 0), 1000)
    ray_address: str | None = option("address of a running Ray cluster; default: an embedded one", str, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """A whole training, by concern."""

    model: ModelConfig
    clips: ClipsConfig
    decode: DecodeLimits
    optimisation: OptimisationConfig
    work: WorkConfig

    def stages(self) -> tuple[list[Stage], list[tuple[int, Sequence[ClipSetting]]]]:
        """What the trainer does and what it is fed with, stage by stage.

        Raises:
            UsageError: neither stages nor a preset, or a stage without settings.
            TrainingError, LossError: a value that a stage cannot have.
        """
        config = self.optimisation
        if (config.stages is None) == (config.preset is None):
            raise UsageError("give either --preset, or stages in --config")
        if config.steps is not None and config.preset is None:
            raise UsageError("--steps is the length of a --preset; stages have steps of their own (see --stop-at-step)")
        given = config.stages
        if config.preset is not None:
            preset = dict(PRESETS[config.preset])
            given = [preset if config.steps is None else {**preset, "steps": config.steps}]
        stages: list[Stage] = []
        feeds: list[tuple[int, Sequence[ClipSetting]]] = []
        for place, entry in enumerate(given or ()):
            fields = dict(_mapping(f"stage {place}")(entry))
            fields.setdefault("name", str(place))
            settings = fields.pop("settings", config.settings)
            if not settings:
                raise UsageError(f"stage {fields['name']} has no settings, and there are none for all stages")
            fields["loss"] = {**(config.loss or {}), **(fields.get("loss") or {})}
            stage = from_mapping(Stage, fields, f"stage {fields['name']}")
            stages.append(stage)
            feed = [ClipSetting.from_yaml(setting) for setting in settings]
            if not any(setting.share for setting in feed):
                raise UsageError(f"stage {fields['name']}: the share of every setting is 0, so that none can be drawn")
            feeds.append((stage.steps, feed))
        return stages, feeds

    def trainer_config(self) -> TrainerConfig:
        """What holds for all stages; a flag wins.

        Raises:
            TrainingError: a value that cannot be.
        """
        config = self.optimisation
        fields: dict[str, Any] = {**(config.trainer or {}), "seed": config.seed}
        if config.precision is not None:
            fields["precision"] = config.precision
        if config.gradient_checkpointing:
            fields["gradient_checkpointing"] = True
        return from_mapping(TrainerConfig, fields, "trainer")


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
        ended_by: "end" of the stages, "stop_at_step", "max_hours", or "interrupt".
        seconds: of this run's training steps, without the start.
    """

    ended_by: str
    step: int
    num_steps: int
    num_steps_of_run: int
    num_skipped: int
    num_rejected: Mapping[str, int]
    seconds: float
    losses: Mapping[str, float]


def train(job: TrainingJob, worker: Worker) -> TrainingSummary:
    """Trains until the stages end, the time is over or someone asks to stop; leaves a checkpoint in each case.

    Raises:
        UsageError: what was asked for cannot be: no such model or input, or an output that may not be gone on with.
        StorageError: an input could not be read or the output not written.
        TrainingError, LossError, TeacherError: as the trainer, the objective and the teacher say.
    """
    torch.set_num_threads(job.work.threads or job.work.cpus_per_worker)
    stages, feeds = job.stages()
    output = Path(job.work.output)
    found = checkpoints_in(output)
    checkpoint = found[-1] if found else None
    teacher = None
    if any(stage.loss.needs_teacher for stage in stages):
        teacher = _teacher(job.model).to(worker.device)
    perceptual = _perceptual(job.model, stages, worker.device)
    vae = checkpoint.load_vae() if checkpoint is not None else initial_vae(job.model, job.optimisation.seed, teacher)
    vae.config = replace(vae.config, untrained=False)
    trainer = Trainer(
        vae.to(worker.device),
        stages,
        job.trainer_config(),
        teacher=teacher,
        perceptual=perceptual,
        rank=worker.rank,
        is_distributed=worker.world_size > 1,
    )
    journal = _Journal(output, worker.device, is_writing=worker.rank == 0)
    cursor = None
    if checkpoint is not None:
        more = checkpoint.restore(trainer)
        of_workers = more["workers"]
        own = of_workers[worker.rank % len(of_workers)]
        journal.go_on(trainer.step, own["losses"])
        cursor = own["cursor"]
        if trainer.step > trainer.num_steps:
            raise UsageError(
                f"--output: {output} holds step {trainer.step}, and the stages have {trainer.num_steps} steps in all: "
                "give more steps, or another output"
            )
        if more["stages"] != _described(stages):
            worker.say(f"note: the stages are not those that {checkpoint.folder} was trained with")
        origin, before = _origin(job), more.get("origin", {})
        for name in sorted(origin.keys() & before.keys()):
            if origin[name] != before[name]:
                worker.say(
                    f"note: {name} is {origin[name]!r}, but {before[name]!r} was what {checkpoint.folder} was trained "
                    "with: is this the output of another training?"
                )
        worker.say(f"going on from {checkpoint.folder}")
    else:
        journal.begin()
    clips = TrainingClips(
        job.clips,
        job.decode,
        feeds,
        seed=job.optimisation.seed,
        rank=worker.rank,
        world_size=worker.world_size,
        cursor=cursor,
        num_ahead=2 if worker.device.type == "cuda" else 0,
    )
    with closing(clips):
        worker.say(f"{clips.num_cached} clips in memory; {trainer.num_steps} steps, {_size(trainer.vae)}")
        return _Loop(job, worker, trainer, clips, journal, checkpoint, teacher).run()


class _Loop:
    """The steps of one run."""

    def __init__(
        self,
        job: TrainingJob,
        worker: Worker,
        trainer: Trainer,
        clips: TrainingClips,
        journal: _Journal,
        checkpoint: Checkpoint | None,
        teacher: FrozenTeacher | None,
    ) -> None:
        self._job = job
        self._work = job.work
        self._output = Path(job.work.output)
        self._worker = worker
        self._trainer = trainer
        self._clips = clips
        self._journal = journal
        self._teacher = teacher
        self._is_first = worker.rank == 0
        self._saved_step = -1 if checkpoint is None else checkpoint.step
        self._cursor: Mapping[str, Any] | None = None
        self._started_s = time.monotonic()
        self._said_s = self._started_s
        self._said_step = trainer.step

    def run(self) -> TrainingSummary:
        trainer, work = self._trainer, self._work
        first_step = trainer.step
        ended_by = self._ending()
        while not ended_by:
            batch = next(self._clips)
            if batch.step != trainer.step:
                raise UsageError(f"the inputs stand at step {batch.step}, the model at {trainer.step}: start anew")
            report = trainer.train_step(batch.clips)
            self._cursor = batch.cursor
            self._journal.add(report)
            if trainer.step % work.log_every == 0 or trainer.is_done:
                self._journal.write_row(trainer.step, self._stage_name(report.step), report.lr)
            if work.pictures_every and trainer.step % work.pictures_every == 0:
                self._draw(batch)
            if trainer.step % work.checkpoint_every == 0:
                self._save()
            self._speak()
            ended_by = self._ending()
        seconds = time.monotonic() - self._started_s
        self._save()
        if self._is_first and ended_by == "end":
            write_folder(self._output / "final", trainer.ema.save_pretrained)
        return TrainingSummary(
            ended_by=ended_by,
            step=trainer.step,
            num_steps=trainer.num_steps,
            num_steps_of_run=trainer.step - first_step,
            num_skipped=trainer.num_skipped,
            num_rejected=dict(self._clips.num_rejected),
            seconds=round(seconds, 3),
            losses=self._journal.last,
        )

    def _ending(self) -> str:
        """Why training ends before the next step; "" where it does not. The same for all workers."""
        work, step = self._work, self._trainer.step
        if self._trainer.is_done:
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

    def _stage_name(self, step: int) -> str:
        for stage in self._trainer.stages:
            if step < stage.steps:
                return stage.name
            step -= stage.steps
        return self._trainer.stages[-1].name

    def _save(self) -> None:
        if self._trainer.step == self._saved_step or self._cursor is None:
            return
        own = {"cursor": self._cursor, "losses": self._journal.state()}
        of_workers: list[Any] = [own]
        if self._worker.world_size > 1:
            of_workers = [None] * self._worker.world_size
            dist.all_gather_object(of_workers, own)
        if self._is_first:
            more = {
                "workers": of_workers,
                "stages": _described(self._trainer.stages),
                "origin": _origin(self._job),
            }
            write_checkpoint(self._output, self._trainer, more)
            remove_old(self._output, self._work.keep_last, self._work.keep_every)
        self._saved_step = self._trainer.step
        if self._worker.world_size > 1:
            dist.barrier()

    def _draw(self, batch: TrainingBatch) -> None:
        if not self._is_first:
            return
        path = self._output / "pictures" / f"step-{self._trainer.step:010d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        title = f"step {self._trainer.step}, {batch.setting}"
        picture_of(self._trainer.ema, self._teacher, batch.clips[:_PICTURED_CLIPS], title).save(path, quality=90)

    def _speak(self) -> None:
        now = time.monotonic()
        if now - self._said_s < _SPEAKS_EVERY_S and not self._trainer.is_done:
            return
        step = self._trainer.step
        pace = (step - self._said_step) / max(1e-9, now - self._said_s)
        left_h = (self._trainer.num_steps - step) / max(1e-9, pace) / 3600
        losses = "  ".join(f"{name} {value:.4g}" for name, value in self._journal.last.items())
        self._worker.say(f"step {step}/{self._trainer.num_steps}  {pace:.2f} steps/s  {left_h:.2f} h left  {losses}")
        self._said_s, self._said_step = now, step


class _Journal:
    """`losses.jsonl`: the means of the losses since the row before, over all workers, and `skipped`, the share of steps
    with a gradient that was not finite, which count in no other mean."""

    def __init__(self, output: Path, device: torch.device, is_writing: bool) -> None:
        self.last: Mapping[str, float] = {}
        self._path = output / "losses.jsonl"
        # All sums are there: a row stacks them, and NCCL adds up nothing else.
        self._device = device
        self._is_writing = is_writing
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def begin(self) -> None:
        """Starts an empty file."""
        if self._is_writing:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self._path.parent)
            self._path.write_text("", encoding="utf-8")

    def go_on(self, step: int, state: Mapping[str, Any]) -> None:
        """Cuts off the rows behind a checkpoint and takes up the sums that it saved."""
        self._sums = {
            name: torch.tensor(total, dtype=torch.float64, device=self._device) for name, (total, _) in state.items()
        }
        self._counts = {name: int(count) for name, (_, count) in state.items()}
        if not self._is_writing:
            return
        remove_unfinished(self._path.parent)
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        shorter = self._path.with_name(".losses.jsonl")
        shorter.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        shorter.replace(self._path)

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

    def write_row(self, step: int, stage: str, lr: float) -> None:
        """Writes the means and forgets them. All workers must call it: they have computed the same terms."""
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        if dist.is_initialized():
            dist.all_reduce(sums)
            sums /= dist.get_world_size()
        means = {name: total / self._counts[name] for name, total in zip(names, sums.tolist(), strict=True)}
        self._sums, self._counts = {}, {}
        self.last = means
        if self._is_writing:
            row = {"step": step, "stage": stage, "lr": lr, **{n: _finite(value) for n, value in means.items()}}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def _finite(value: float) -> float | None:
    """None where JSON has no number."""
    return value if math.isfinite(value) else None


def _step_of(line: str) -> float:
    """The step of a row; infinite for the torn end of a file."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _described(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    described: list[dict[str, Any]] = json.loads(json.dumps([asdict(stage) for stage in stages]))
    return described


def _origin(job: TrainingJob) -> dict[str, Any]:
    """What a training is about, besides its stages: another value means another training."""
    return {**asdict(job.model), "input": job.clips.input, "seed": job.optimisation.seed}


def _size(vae: CVVAE) -> str:
    return f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters"


def _teacher(config: ModelConfig) -> FrozenTeacher:
    if config.teacher is None:
        raise UsageError(
            "--teacher must be given, or lambda_decoder, lambda_encoder, latent_matching_weight and "
            "latent_deviation_weight be 0"
        )
    return load_teacher(config.teacher, config.teacher_subfolder)


def _perceptual(config: ModelConfig, stages: Sequence[Stage], device: torch.device) -> Perceptual | None:
    if config.perceptual == "none" or all(stage.loss.perceptual_weight == 0 for stage in stages):
        return None
    perceptual = load_perceptual(config.perceptual)
    return perceptual.to(device) if isinstance(perceptual, torch.nn.Module) else perceptual


def initial_vae(config: ModelConfig, seed: int, teacher: FrozenTeacher | None = None) -> CVVAE:
    """The model before the first step; one that starts at random has the teacher's scale unless it says another.

    Raises:
        UsageError: neither or both of --init and --model-config, or the latter's file cannot be read.
        CheckpointError, ConfigError: there is no such model, or it cannot be built.
    """
    if (config.init is None) == (config.model_config is None):
        raise UsageError("give either --init (a CV-VAE or an image VAE) or --model-config (a config.json)")
    if config.model_config is not None:
        try:
            published = json.loads(Path(config.model_config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"--model-config: {config.model_config} cannot be read as JSON: {error}") from error
        if teacher is not None and isinstance(published, dict):
            published = {"scaling_factor": teacher.scaling_factor, "shift_factor": teacher.shift_factor, **published}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return CVVAE(CVVAEConfig.from_published(published))
    assert config.init is not None
    if _is_image_vae(config.init, config.init_subfolder):
        from cvvae.inflate import inflate, load_image_vae

        norm: Any = config.norm
        return inflate(load_image_vae(config.init, config.init_subfolder), norm=norm)
    return cvvae.load(config.init, config.init_subfolder)


def _is_image_vae(source: str, subfolder: str | None) -> bool:
    """Whether a local folder or hub repository holds a diffusers image VAE; the rest is for `cvvae.load` to judge."""
    path = Path(source) / (subfolder or "") / "config.json"
    if not path.is_file():
        if source.count("/") != 1 or source.startswith((".", "/")) or Path(source).exists():
            return False
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(source, f"{subfolder}/config.json" if subfolder else "config.json"))
        except (OSError, ValueError):
            return False
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("_class_name") == "AutoencoderKL")
    except (OSError, ValueError, AttributeError):
        return False


def picture_of(vae: CVVAE, teacher: FrozenTeacher | None, clips: Tensor, title: str) -> Any:
    """Rows of frames, their reconstruction, and what the image decoder makes of the video latents; a PIL image.

    Args:
        clips: uint8 (B, 3, T, H, W).
    """
    was_training = vae.training
    vae.eval()
    with torch.no_grad():
        x = clips.to(vae.device).float() / 127.5 - 1
        latents = vae.encode(x).latent_dist.mode()
        decoded = vae.decode(latents).sample
        images = None if teacher is None else teacher.decode_latents(latents)
    vae.train(was_training)
    rows = []
    for index, clip in enumerate(clips):
        shown = spread(clip.shape[1], _PICTURED_FRAMES)
        rows.append(Row(label=f"clip {index}: frames", pictures=_pictures(x[index], shown)))
        rows.append(Row(label="reconstruction", pictures=_pictures(decoded[index], shown)))
        if images is not None:
            shown = spread(images.shape[2], _PICTURED_FRAMES)
            rows.append(Row(label="image decoder on the video latents", pictures=_pictures(images[index], shown)))
    return grid(title, rows)


def _pictures(frames: Tensor, shown: Sequence[int]) -> list[Frames]:
    pixels = frames[:, list(shown)].add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return list(pixels.permute(1, 2, 3, 0).cpu().numpy())
