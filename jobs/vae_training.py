"""What one worker does to train a video VAE, from its configuration to the model that comes out.

Not an entry point: `jobs/train_vae.py` reads the command line and starts this in its own process or in the workers of
Ray Train. Not the arithmetic of a step either (`cvvae/training.py`), nor the loop around it (`jobs/training_loop.py`),
nor where clips come from (`pipeline/training_clips.py`).

Of a checkpoint, `model/` is the VAE as it is in training and `ema/` its moving average, both published folders.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cvvae
from cvvae.config import CVVAEConfig
from cvvae.losses import Perceptual, load_perceptual
from cvvae.model import CVVAE
from cvvae.teachers import FrozenTeacher, load_teacher
from cvvae.training import Stage, StepReport, Trainer, TrainerConfig, from_mapping
from jobs.training_checkpoints import Checkpoint, State, checkpoints_in
from jobs.training_loop import Journal, Loop, TrainingSummary, WorkConfig, Worker, note_changes, own_part
from pipeline.config import DecodeLimits, auto_or, choice, option, whole, yes_no
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
_STATES = ("optimizer", "discriminator", "discriminator_optimizer", "loss")
# Clips of a batch and frames of a clip that a picture shows.
_PICTURED_CLIPS = 3
_PICTURED_FRAMES = 5


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
class PicturesConfig:
    """What is shown on the way."""

    pictures_every: int = option("steps from one picture to the next; 0: none", whole("pictures-every", 0), 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """A whole training, by concern."""

    model: ModelConfig
    clips: ClipsConfig
    decode: DecodeLimits
    optimisation: OptimisationConfig
    pictures: PicturesConfig
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
    vae = _saved_vae(checkpoint) if checkpoint is not None else initial_vae(job.model, job.optimisation.seed, teacher)
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
    journal = Journal(output, worker.device, is_writing=worker.rank == 0)
    cursor = None
    if checkpoint is not None:
        state = _restore(trainer, checkpoint)
        own = own_part(state, worker.rank)
        journal.go_on(trainer.step, own["losses"])
        cursor = own["cursor"]
        if trainer.step > trainer.num_steps:
            raise UsageError(
                f"--output: {output} holds step {trainer.step}, and the stages have {trainer.num_steps} steps in all: "
                "give more steps, or another output"
            )
        if state.more["stages"] != _described(stages):
            worker.say(f"note: the stages are not those that {checkpoint.folder} was trained with")
        note_changes(state.more.get("origin", {}), _origin(job), checkpoint, worker.say)
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
        course = _VAECourse(job, trainer, clips, teacher, is_first=worker.rank == 0)
        return Loop(job.work, worker, course, journal, checkpoint).run()


class _VAECourse:
    """The training of a video VAE as the loop sees it."""

    def __init__(
        self, job: TrainingJob, trainer: Trainer, clips: TrainingClips, teacher: FrozenTeacher | None, is_first: bool
    ) -> None:
        self._job = job
        self._trainer = trainer
        self._clips = clips
        self._teacher = teacher
        self._is_first = is_first
        self._batch: TrainingBatch | None = None

    @property
    def step(self) -> int:
        return self._trainer.step

    @property
    def num_steps(self) -> int:
        return self._trainer.num_steps

    @property
    def num_skipped(self) -> int:
        return self._trainer.num_skipped

    def train_step(self) -> StepReport:
        batch = next(self._clips)
        if batch.step != self._trainer.step:
            raise UsageError(f"the inputs stand at step {batch.step}, the model at {self._trainer.step}: start anew")
        self._batch = batch
        return self._trainer.train_step(batch.clips)

    def labels(self, report: StepReport) -> Mapping[str, Any]:
        step = report.step
        for stage in self._trainer.stages:
            if step < stage.steps:
                return {"stage": stage.name}
            step -= stage.steps
        return {"stage": self._trainer.stages[-1].name}

    def look(self) -> None:
        every = self._job.pictures.pictures_every
        if not self._is_first or self._batch is None or not every or self.step % every:
            return
        path = Path(self._job.work.output) / "pictures" / f"step-{self.step:010d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        title = f"step {self.step}, {self._batch.setting}"
        picture_of(self._trainer.ema, self._teacher, self._batch.clips[:_PICTURED_CLIPS], title).save(path, quality=90)

    def cursor(self) -> Any:
        return None if self._batch is None else self._batch.cursor

    def state(self) -> State:
        state = self._trainer.state_dict()
        return State(
            tensors={name: state[name] for name in _STATES if name in state},
            numbers={name: value for name, value in state.items() if isinstance(value, int)},
            more={"stages": _described(self._trainer.stages), "origin": _origin(self._job)},
        )

    def write_models(self, folder: Path) -> None:
        self._trainer.vae.save_pretrained(folder / "model")
        if self._trainer.ema is not self._trainer.vae:
            self._trainer.ema.save_pretrained(folder / "ema")

    def write_final(self, folder: Path) -> None:
        self._trainer.ema.save_pretrained(folder)

    def summary(self) -> Mapping[str, Any]:
        return {"num_rejected": dict(self._clips.num_rejected)}


def _saved_vae(checkpoint: Checkpoint) -> CVVAE:
    """The VAE as it was in training."""
    with checkpoint.reading():
        return cvvae.load(checkpoint.folder / "model")


def _restore(trainer: Trainer, checkpoint: Checkpoint) -> State:
    """Puts a checkpoint into a trainer."""
    state = checkpoint.read()
    values: dict[str, Any] = {name: {} for name in ("optimizer", "loss")} | dict(state.tensors)
    with checkpoint.reading():
        values["vae"] = cvvae.load(checkpoint.folder / "model").state_dict()
        if (checkpoint.folder / "ema").is_dir():
            values["ema"] = cvvae.load(checkpoint.folder / "ema").state_dict()
    trainer.load_state_dict({**values, **state.numbers})
    return state


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
