"""What one worker does to tune a diffusion model on stored latents, from its configuration to the folder at the end.

Not an entry point: `jobs/finetune_t2v.py` reads the command line and starts this in its own process or in the workers
of Ray Train. Not the loop around the steps (`jobs/training_loop.py`), the models (`jobs/t2v_models.py`), the noise
(`jobs/t2v_noise.py`) or the data (`jobs/t2v_data.py`).

Every step seeds its own random numbers from the seed, the worker and the step, so that a run that goes on from a
checkpoint repeats the undisturbed one to the bit on a CPU. A checkpoint holds what is tuned and nothing else: the rest
is read from --model again.

Tensor letters: B batch, C channels, t h w latents.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from cvvae.training import DivergedError, StepReport, clip_gradient, load_optimizer_state, optimizer_state
from jobs.t2v_data import (
    DataConfig,
    TuningBatch,
    TuningBatches,
    checked_buckets,
    condition_set,
    first_batches,
)
from jobs.t2v_models import (
    Adapter,
    Loaded,
    VideoSettings,
    check_fit,
    enable_gradient_checkpointing,
    load_model,
    new_model,
    write_model,
)
from jobs.t2v_noise import PREDICTIONS, Process, process_of, scheduler_of
from jobs.t2v_sampling import decode, load_video_vae, sample_latents, write_videos
from jobs.training_checkpoints import State, checkpoints_in
from jobs.training_loop import Journal, Loop, Rows, TrainingSummary, WorkConfig, Worker, note_changes, own_part
from pipeline.commit import latest_snapshot
from pipeline.config import auto_or, choice, number, option, whole, yes_no
from pipeline.errors import UsageError
from pipeline.storage import open_store

TUNE = ("output-layer", "first-last", "lora", "all")
_MOST_SKIPPED_IN_A_ROW = 20
# Divides the unit interval evenly whatever the number of draws; R. Kronecker's sequence.
_GOLDEN = (math.sqrt(5) - 1) / 2
_SAMPLE_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What is tuned, and which part of it."""

    model: str | None = option(
        "diffusers folder or hub id: a pipeline, or a model of UNet3DConditionModel, UNetSpatioTemporalConditionModel "
        "or LatteTransformer3DModel",
        str,
        None,
    )
    model_subfolder: str | None = option("folder of the model inside --model; default: as the pipeline says", str, None)
    model_config: str | None = option("instead of --model: config.json of a model to start at random", str, None)
    prediction: str | None = option(
        f"what the model is to say: {', '.join(PREDICTIONS)} (edm: SVD's); auto: as its scheduler says",
        auto_or(choice("prediction", PREDICTIONS)),
        None,
    )
    tune: str = option(f"which part learns: {', '.join(TUNE)}", choice("tune", TUNE), "output-layer")
    lora_rank: int = option("rank of --tune lora", whole("lora-rank", 1), 16)
    lora_alpha: float | None = option(
        "scale of --tune lora; auto: its rank", auto_or(number("lora-alpha", 1e-3, 1e5)), None
    )
    lora_layers: tuple[str, ...] = option(
        "ends of the names of the layers that --tune lora changes",
        lambda text: tuple(part.strip() for part in text.split(",") if part.strip()),
        ("to_q", "to_k", "to_v", "to_out.0"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimisationConfig:
    """Steps and losses. The defaults are those of CV-VAE's tuning of SVD (arXiv 2405.20279) where it gives any."""

    steps: int = option("optimiser steps in all", whole("steps", 1), 5000)
    lr: float = option("learning rate of AdamW", number("lr", 1e-9, 10), 1e-5)
    warmup_steps: int = option("steps in which the rate rises from 0", whole("warmup-steps", 0), 0)
    schedule: str = option(
        "of the rate: constant, or cosine to 0", choice("schedule", ("constant", "cosine")), "constant"
    )
    accumulate: int = option("passes whose gradients make one step", whole("accumulate", 1), 1)
    min_snr_gamma: float | None = option(
        "weights of min-SNR with this gamma (5 in its paper), for epsilon and v; auto: none",
        auto_or(number("min-snr-gamma", 1e-3, 1e3)),
        None,
    )
    log_sigma_mean: float = option("edm: mean of log(sigma)", number("log-sigma-mean", -10, 10), 0.7)
    log_sigma_deviation: float = option("edm: deviation of log(sigma)", number("log-sigma-deviation", 1e-3, 10), 1.6)
    flow_levels: str = option(
        "flow: how levels are drawn", choice("flow-levels", ("logit-normal", "uniform")), "logit-normal"
    )
    weight_decay: float = option("of AdamW", number("weight-decay", 0, 1), 0.01)
    clip_norm: float = option("longest gradient", number("clip-norm", 1e-6, 1e6), 1.0)
    ema_decay: float = option(
        "of the moving average, which is what comes out; 0: none",
        number("ema-decay", 0, 0.999999),
        0.0,
    )
    precision: str = option(
        "float32, or bfloat16 (autocast; what is tuned stays float32)",
        choice("precision", ("float32", "bfloat16")),
        "float32",
    )
    gradient_checkpointing: bool = option(
        "compute activations twice instead of keeping them", yes_no("gradient_checkpointing"), False, is_switch=True
    )
    seed: int = option("seed of everything that is drawn", whole("seed", 0), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LookConfig:
    """What is looked at on the way: a validation loss, and videos."""

    validate_every: int = option(
        "steps from one validation to the next, the first before any step; 0: none", whole("validate-every", 0), 500
    )
    validation_levels: int = option("levels of noise on each validation clip", whole("validation-levels", 1), 4)
    samples_every: int = option("steps between sets of sample videos; 0: none", whole("samples-every", 0), 0)
    sample_clips: int = option(
        "videos of a set, told what the first clips of the validation (else training) data are told",
        whole("sample-clips", 1),
        2,
    )
    sample_steps: int = option("steps of the sampler", whole("sample-steps", 1), 25)
    guidance: float = option("guidance of sample videos; 1: none", number("guidance", 0, 100), 6.0)
    vae: str | None = option("video VAE that decodes sample videos; default: the one that made the latents", str, None)
    vae_subfolder: str | None = option("folder inside --vae", str, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningJob:
    """A whole tuning, by concern."""

    model: ModelConfig
    data: DataConfig
    video: VideoSettings
    optimisation: OptimisationConfig
    look: LookConfig
    work: WorkConfig


def tune(job: TuningJob, worker: Worker) -> TrainingSummary:
    """Tunes until the steps are done, the time is over or someone asks to stop; leaves a checkpoint in each case.

    Raises:
        UsageError: what was asked for cannot be; what does not fit is said before the first step.
        StorageError: latents could not be read or the output not written.
        DivergedError: gradients were not finite 20 times in a row.
    """
    torch.set_num_threads(job.work.threads or job.work.cpus_per_worker)
    output = Path(job.work.output)
    found = checkpoints_in(output)
    checkpoint = found[-1] if found else None
    state = None if checkpoint is None else checkpoint.read()
    own = None if state is None else own_part(state, worker.rank)
    loaded = _load(job)
    adapter = loaded.adapter
    scheduler = scheduler_of(loaded.scheduler_config, job.model.prediction)
    process = _process(scheduler, job.optimisation)
    batches = TuningBatches(
        job.data,
        adapter,
        snapshot=_agreed_snapshot(job.data, worker) if own is None else own["cursor"]["snapshot"],
        seed=job.optimisation.seed,
        rank=worker.rank,
        world_size=worker.world_size,
        cursor=None if own is None else own["cursor"],
    )
    facts = batches.dataset.manifest.model
    conditions = condition_set(job.data.latents, job.data, adapter)
    buckets = checked_buckets(batches.dataset)
    check_fit(loaded, facts, buckets, conditions.embedding_dim)
    looks = first_batches(job.data.validation or job.data.latents, job.data, adapter, job.data.validation_clips)
    origin = {
        **{name: value for name, value in asdict(job.model).items() if name != "lora_layers"},
        "latents": job.data.latents,
        "seed": job.optimisation.seed,
    }
    made_with = {
        "latents": asdict(facts),
        "conditions": {
            "kind": conditions.manifest.name,
            "encoder": conditions.encoder,
            "revision": conditions.manifest.revision,
            "weights_sha256": conditions.manifest.weights_sha256,
            "padding": conditions.manifest.fingerprint_fields.get("padding", "none"),
            "max_length": conditions.max_length,
        },
        "buckets": [str(bucket) for bucket in buckets],
        "tuning": origin,
    }
    tuner = Tuner(loaded, process, job, batches, worker)
    sampler = None
    if job.look.samples_every and worker.rank == 0:
        empty = conditions.caption(looks[0].names[0][0], "") if adapter.needs_text else None
        sampler = _Sampler(job, tuner, scheduler, looks[0], empty, batches.dataset.manifest.model)
    course = _Tuning(job, worker, tuner, looks, scheduler, sampler, origin, made_with)
    journal = Journal(output, worker.device, is_writing=worker.rank == 0)
    if checkpoint is not None and state is not None and own is not None:
        tuner.load_state(state)
        if tuner.step > tuner.num_steps:
            raise UsageError(
                f"--output: {output} holds step {tuner.step}, and --steps is {tuner.num_steps}: give more steps, or "
                "another output"
            )
        journal.go_on(tuner.step, own["losses"])
        course.rows.go_on(tuner.step)
        note_changes(state.more["origin"], origin, checkpoint, worker.say)
        worker.say(f"going on from {checkpoint.folder}")
    else:
        journal.begin()
        course.rows.begin()
    worker.say(
        f"{batches.dataset.num_records} clips; {tuner.num_steps} steps; "
        f"{tuner.num_tuned:,} of {tuner.num_parameters:,} parameters learn, {process.prediction}"
    )
    return Loop(job.work, worker, course, journal, checkpoint).run()


class Tuner:
    """A diffusion model in tuning: the arithmetic of a step.

    Attributes:
        model: what is tuned; with --tune lora its layers are changed in place.
        step, num_skipped: so far.
        num_tuned, num_parameters: how many numbers learn, of how many.
    """

    def __init__(
        self, loaded: Loaded, process: Process, job: TuningJob, batches: Iterator[TuningBatch], worker: Worker
    ) -> None:
        config = job.optimisation
        self.model: nn.Module = loaded.model.to(worker.device)
        self.adapter: Adapter = loaded.adapter
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self._peft = _with_lora(self.model, job.model, config.seed) if job.model.tune == "lora" else None
        self._tuned = tuned_parameters(self.model, self.adapter, job.model.tune)
        # What is frozen works as in sampling, without dropout.
        self.model.train(job.model.tune == "all")
        for parameter in self._tuned.values():
            parameter.data = parameter.data.contiguous()
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(self.adapter, self.model)
        self.step = 0
        self.num_steps = config.steps
        self.num_skipped = 0
        self.num_tuned = sum(parameter.numel() for parameter in self._tuned.values())
        self._num_skipped_in_a_row = 0
        self._job = job
        self._config = config
        self._process = process
        self._batches = batches
        self._worker = worker
        self._average = {name: p.detach().clone() for name, p in self._tuned.items()} if config.ema_decay else None
        self._optimizer = torch.optim.AdamW(
            list(self._tuned.values()), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self._network: Any = self.model
        if worker.world_size > 1:
            self._network = nn.parallel.DistributedDataParallel(
                self.model,
                device_ids=[worker.device] if worker.device.type == "cuda" else None,
                # A model may have layers for videos that images do not pass.
                find_unused_parameters=job.model.tune in ("all", "lora"),
            )
        self.cursor: Mapping[str, Any] | None = None

    def train_step(self) -> StepReport:
        """One optimiser step on the next batches.

        Raises:
            DivergedError: gradients were not finite 20 times in a row.
        """
        config = self._config
        rng = self._seed_step()
        losses: list[Tensor] = []
        for index in range(config.accumulate):
            batch = next(self._batches)
            conditions = self.adapter.augment(batch.conditions, self._job.data.condition_dropout, rng)
            noise = torch.randn(batch.latents.shape, generator=rng)
            levels = torch.rand(len(noise), generator=rng)
            with self._without_sync(index + 1 < config.accumulate):
                errors, snr = self._errors(self._network, batch.latents, conditions, noise, levels)
                loss = (errors * self._process.weights(snr, config.min_snr_gamma)).mean()
                (loss / config.accumulate).backward()
            losses.append(loss.detach())
            self.cursor = batch.cursor
        norm, is_finite = clip_gradient(self._tuned.values(), config.clip_norm)
        lr = self._lr()
        if is_finite:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self._update_average()
        for parameter in self._tuned.values():
            parameter.grad = None
        self._count_skipped(not is_finite)
        report = StepReport(
            step=self.step,
            losses={"loss": torch.stack(losses).mean(), "gradient_norm": norm},
            lr=lr,
            is_skipped=not is_finite,
        )
        self.step += 1
        return report

    @torch.no_grad()
    def validate(self, batches: Sequence[TuningBatch], num_levels: int) -> list[float]:
        """The mean squared error of the moving average (else the model) by level of noise, least noise first.

        Noise and levels are those of the clips' places, whatever the step; each level is one of `num_levels` equal
        shares of what is trained. Workers share the batches.
        """
        sums = torch.zeros(num_levels, dtype=torch.float64)
        count = 0
        num_before = 0
        was_training = self.model.training
        self.model.eval()
        with self.averaged():
            for index, batch in enumerate(batches):
                places = torch.arange(num_before, num_before + len(batch.latents), dtype=torch.float64)
                num_before += len(batch.latents)
                if index % self._worker.world_size != self._worker.rank:
                    continue
                rng = torch.Generator().manual_seed(index)
                for level in range(num_levels):
                    noise = torch.randn(batch.latents.shape, generator=rng)
                    levels = ((level + (places * _GOLDEN) % 1) / num_levels).float()
                    errors, _ = self._errors(self.model, batch.latents, batch.conditions, noise, levels)
                    sums[level] += errors.double().sum().cpu()
                count += len(batch.latents)
        self.model.train(was_training)
        totals = torch.cat([sums, torch.tensor([float(count)], dtype=torch.float64)])
        if self._worker.world_size > 1:
            on_device = totals.to(self._worker.device)
            dist.all_reduce(on_device)
            totals = on_device.cpu()
        values: list[float] = (totals[:-1] / totals[-1]).tolist()
        return values

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model has its moving average, if there is one."""
        if self._average is None:
            yield
            return
        own = {name: parameter.detach().clone() for name, parameter in self._tuned.items()}
        with torch.no_grad():
            for name, parameter in self._tuned.items():
                parameter.copy_(self._average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._tuned.items():
                    parameter.copy_(own[name])

    def write(self, folder: Path, scheduler: Any, origin: Mapping[str, Any]) -> None:
        """The folder that diffusers loads; with --tune lora the adapter is merged into it, and beside it in `lora/`."""
        with self.averaged():
            model: Any = self.model
            if self._peft is not None:
                self._peft.save_pretrained(folder / "lora")
                model = copy.deepcopy(self._peft).merge_and_unload()
            write_model(folder, model, self.adapter, scheduler, {**origin, "step": self.step})

    def state(self) -> tuple[dict[str, Mapping[str, Any]], dict[str, int]]:
        """Tensors and numbers to go on from."""
        names = {id(parameter): name for name, parameter in self._tuned.items()}
        tensors: dict[str, Mapping[str, Any]] = {
            "model": {name: parameter.detach() for name, parameter in self._tuned.items()},
            "optimizer": optimizer_state(self._optimizer, names),
        }
        if self._average is not None:
            tensors["average"] = self._average
        return tensors, {"step": self.step, "num_skipped": self.num_skipped}

    def load_state(self, state: State) -> None:
        """Goes on from a state.

        Raises:
            UsageError: it is that of another model, or of another part of it.
        """
        saved = state.tensors.get("model", {})
        if saved.keys() != self._tuned.keys() or any(saved[n].shape != p.shape for n, p in self._tuned.items()):
            raise UsageError(
                f"the checkpoint holds {len(saved)} tuned parameters, which are not the {len(self._tuned)} that "
                f"--model and --tune {self._job.model.tune} mean: give what it was made with, or another --output"
            )
        with torch.no_grad():
            for name, parameter in self._tuned.items():
                parameter.copy_(saved[name])
            if self._average is not None:
                for name, value in state.tensors.get("average", saved).items():
                    self._average[name].copy_(value)
        names = {id(parameter): name for name, parameter in self._tuned.items()}
        load_optimizer_state(self._optimizer, names, state.tensors.get("optimizer", {}))
        self.step = int(state.numbers["step"])
        self.num_skipped = int(state.numbers["num_skipped"])

    def _errors(
        self, network: Any, latents: Tensor, conditions: Any, noise: Tensor, levels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Squared errors (B,) of what the model says, and signal-to-noise ratios (B,)."""
        device = self._worker.device
        noisy = self._process.apply(latents.to(device), noise.to(device), levels.to(device))
        with self._autocast():
            said = self.adapter.predict(network, noisy.latents, noisy.timesteps, conditions.to(device))
        return (said.float() - noisy.target).square().flatten(1).mean(1), noisy.snr

    def _autocast(self) -> AbstractContextManager[object]:
        if self._config.precision == "float32":
            return nullcontext()
        return torch.autocast(self._worker.device.type, dtype=torch.bfloat16)

    def _without_sync(self, is_wanted: bool) -> AbstractContextManager[object]:
        no_sync: Callable[[], AbstractContextManager[object]] | None = getattr(self._network, "no_sync", None)
        return no_sync() if is_wanted and no_sync is not None else nullcontext()

    def _seed_step(self) -> torch.Generator:
        words = [self._config.seed, self._worker.rank, self.step]
        seeds = np.random.SeedSequence(words).generate_state(2, np.uint64)
        # For whoever draws without a generator, such as dropout.
        torch.manual_seed(int(seeds[0]))
        return torch.Generator().manual_seed(int(seeds[1]))

    def _lr(self) -> float:
        config, step = self._config, self.step
        if step < config.warmup_steps:
            return config.lr * (step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return config.lr
        share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return config.lr * 0.5 * (1 + math.cos(math.pi * share))

    def _update_average(self) -> None:
        if self._average is None:
            return
        # In the first steps the average would be of the start.
        decay = min(self._config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self._average.values()), list(self._tuned.values()), 1 - decay)

    def _count_skipped(self, is_skipped: bool) -> None:
        self.num_skipped += is_skipped
        self._num_skipped_in_a_row = self._num_skipped_in_a_row + 1 if is_skipped else 0
        if self._num_skipped_in_a_row >= _MOST_SKIPPED_IN_A_ROW:
            raise DivergedError(
                f"the gradient was not finite in {self._num_skipped_in_a_row} steps in a row, up to step {self.step}: "
                "tuning has diverged; go back to an earlier checkpoint with a lower --lr, a longer --warmup-steps or "
                "--precision float32"
            )


class _Sampler:
    """Videos on the way: the same noise and conditions each time."""

    def __init__(
        self,
        job: TuningJob,
        tuner: Tuner,
        scheduler: Any,
        like: TuningBatch,
        empty: np.ndarray[Any, Any] | None,
        facts: Any,
    ) -> None:
        vae = job.look.vae or facts.model
        device = next(tuner.model.parameters()).device
        self._vae = load_video_vae(vae, job.look.vae_subfolder, facts.latent_channels, device)
        self._facts = facts
        self._job = job
        self._tuner = tuner
        self._scheduler = scheduler
        self._like = like
        self._empty = None if empty is None else torch.from_numpy(np.asarray(empty, dtype=np.float32).copy())

    def write(self, folder: Path, step: int) -> None:
        look, tuner, like = self._job.look, self._tuner, self._like
        count = min(look.sample_clips, len(like.latents))
        conditions = like.conditions.first(count).to(next(tuner.model.parameters()).device)
        was_training = tuner.model.training
        tuner.model.eval()
        with tuner.averaged():
            channels, num, height, width = like.latents.shape[1:]
            latents = sample_latents(
                tuner.model,
                tuner.adapter,
                self._scheduler,
                (channels, num, height, width),
                conditions,
                tuner.adapter.unconditional(conditions, self._empty),
                num_steps=look.sample_steps,
                guidance=look.guidance,
                seed=_SAMPLE_SEED,
            )
        tuner.model.train(was_training)
        videos = decode(self._vae, latents, self._facts.scaling_factor, self._facts.shift_factor)
        rates = conditions.fps
        fps = float(rates[0]) * self._facts.temporal_compression if rates is not None else 0.0
        write_videos(folder, f"step-{step:010d}", videos, like.captions[:count], fps or 8.0)


class _Tuning:
    """The tuning as the loop sees it.

    Attributes:
        rows: `validation.jsonl`.
    """

    def __init__(
        self,
        job: TuningJob,
        worker: Worker,
        tuner: Tuner,
        looks: Sequence[TuningBatch],
        scheduler: Any,
        sampler: _Sampler | None,
        origin: Mapping[str, Any],
        made_with: Mapping[str, Any],
    ) -> None:
        self.rows = Rows(Path(job.work.output) / "validation.jsonl", worker.rank == 0)
        self._job = job
        self._tuner = tuner
        self._looks = looks
        self._scheduler = scheduler
        self._sampler = sampler
        self._origin = origin
        self._made_with = made_with
        self._last: dict[str, float] = {}

    @property
    def step(self) -> int:
        return self._tuner.step

    @property
    def num_steps(self) -> int:
        return self._tuner.num_steps

    @property
    def num_skipped(self) -> int:
        return self._tuner.num_skipped

    def train_step(self) -> StepReport:
        return self._tuner.train_step()

    def labels(self, report: StepReport) -> Mapping[str, Any]:
        return {}

    def look(self) -> None:
        look = self._job.look
        if self._job.data.validation is not None and _is_due(look.validate_every, self.step, self.num_steps):
            by_level = self._tuner.validate(self._looks, look.validation_levels)
            self._last = {"validation": sum(by_level) / len(by_level)}
            self.rows.write({"step": self.step, "loss": self._last["validation"], "by_level": by_level})
        if self._sampler is not None and _is_due(look.samples_every, self.step, self.num_steps):
            self._sampler.write(Path(self._job.work.output) / "samples", self.step)

    def cursor(self) -> Any:
        return self._tuner.cursor

    def state(self) -> State:
        tensors, numbers = self._tuner.state()
        return State(tensors=tensors, numbers=numbers, more={"origin": self._origin})

    def write_models(self, folder: Path) -> None:
        pass

    def write_final(self, folder: Path) -> None:
        self._tuner.write(folder, self._scheduler, self._made_with)

    def summary(self) -> Mapping[str, Any]:
        return self._last


def tuned_parameters(model: nn.Module, adapter: Adapter, tune: str) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name; the others are frozen.

    Raises:
        UsageError: the model has no such layer.
    """
    layers = {"output-layer": (adapter.last,), "first-last": (adapter.first, adapter.last)}.get(tune)
    chosen: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if layers is not None:
            learns = name.startswith(tuple(f"{layer}." for layer in layers))
        else:
            learns = tune == "all" or "lora_" in name
        parameter.requires_grad_(learns)
        if learns:
            chosen[name] = parameter
    if not chosen:
        raise UsageError(f"--tune {tune}: the model has no such parameters")
    return chosen


def _is_due(every: int, step: int, num_steps: int) -> bool:
    return every > 0 and (step % every == 0 or step == num_steps)


def _load(job: TuningJob) -> Loaded:
    config = job.model
    if (config.model is None) == (config.model_config is None):
        raise UsageError("give either --model (a diffusers folder or hub id) or --model-config (a config.json)")
    if config.model is not None:
        return load_model(config.model, config.model_subfolder, job.video)
    assert config.model_config is not None
    return new_model(config.model_config, job.optimisation.seed, job.video)


def _agreed_snapshot(config: DataConfig, worker: Worker) -> int | None:
    """The snapshot that all workers read, also while a job publishes a newer one."""
    if config.snapshot is not None or worker.world_size == 1:
        return config.snapshot
    latest = latest_snapshot(open_store(config.latents)) if worker.rank == 0 else None
    agreed: list[int | None] = [None if latest is None else latest.number]
    dist.broadcast_object_list(agreed, 0)
    return agreed[0]


def _process(scheduler: Any, config: OptimisationConfig) -> Process:
    process = process_of(scheduler, config.log_sigma_mean, config.log_sigma_deviation, config.flow_levels)
    # Refused before the first step where the process has no such weights.
    process.weights(torch.ones(1), config.min_snr_gamma)
    return process


def _with_lora(model: nn.Module, config: ModelConfig, seed: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UsageError(f"--tune lora: peft could not be imported ({error}): pip install '.[train]'") from error
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or config.lora_rank,  # type: ignore[arg-type]
        target_modules=list(config.lora_layers),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, lora)
        except ValueError as error:
            raise UsageError(f"--lora-layers: {error}") from error
