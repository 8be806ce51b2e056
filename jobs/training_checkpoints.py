"""Checkpoints of a training on a disk: whole or not there, and only the ones worth keeping.

    OUTPUT/checkpoints/step-0000001000/model/             the VAE, as it is in training (a published folder)
                                       ema/               its moving average (a published folder)
                                       training.safetensors   optimisers, discriminator, learned scalars
                                       training.json      step, places in the inputs, sums of the losses not yet logged

Not an entry point and not where training happens: `jobs/training_loop.py` asks for these. A folder is written under
another name, synced and renamed, so that one with a step in its name is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import cvvae
from cvvae.model import CVVAE
from cvvae.training import Trainer
from pipeline.errors import StorageError, UsageError

_NAME = re.compile(r"step-(\d{10})")
_UNFINISHED = ".unfinished-"
_STATES = ("optimizer", "discriminator", "discriminator_optimizer", "loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint: after how many steps, and where."""

    step: int
    folder: Path

    def load_vae(self) -> CVVAE:
        """The VAE as it was in training.

        Raises:
            UsageError: the folder is damaged.
        """
        try:
            return cvvae.load(self.folder / "model")
        except ValueError as error:
            raise UsageError(f"the checkpoint {self.folder} cannot be read: {error}; {_REMEDY}") from error

    def restore(self, trainer: Trainer) -> Mapping[str, Any]:
        """Puts the state into a trainer; gives what `write_checkpoint` was given besides.

        Raises:
            UsageError: the folder is damaged.
            TrainingError: it holds another model.
        """
        try:
            document = json.loads((self.folder / "training.json").read_text(encoding="utf-8"))
            tensors = load_file(self.folder / "training.safetensors")
            state: dict[str, Any] = {name: _unfolded(name, tensors) for name in _STATES}
            state["vae"] = cvvae.load(self.folder / "model").state_dict()
            if (self.folder / "ema").is_dir():
                state["ema"] = cvvae.load(self.folder / "ema").state_dict()
        except (OSError, ValueError, SafetensorError) as error:
            raise UsageError(f"the checkpoint {self.folder} cannot be read: {error}; {_REMEDY}") from error
        for name in ("discriminator", "discriminator_optimizer"):
            if not state[name]:
                del state[name]
        trainer.load_state_dict({**state, **document["trainer"]})
        return dict(document["more"])


_REMEDY = "remove the folder to go on from the one before it"


def checkpoints_in(output: Path) -> list[Checkpoint]:
    """The complete checkpoints of an output, oldest first."""
    folder = output / "checkpoints"
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    found = [(match, name) for name in names if (match := _NAME.fullmatch(name))]
    return [Checkpoint(step=int(match[1]), folder=folder / name) for match, name in found]


def write_checkpoint(output: Path, trainer: Trainer, more: Mapping[str, Any]) -> Checkpoint:
    """Writes the state of a trainer after its last step, with more JSON-safe values beside it.

    Raises:
        StorageError: the folder cannot be written.
    """
    place = output / "checkpoints" / f"step-{trainer.step:010d}"
    state = trainer.state_dict()
    numbers = {name: value for name, value in state.items() if isinstance(value, int)}
    tensors = {key: value for name in _STATES if name in state for key, value in _folded(name, state[name])}
    document = json.dumps({"version": 1, "trainer": numbers, "more": dict(more)}, indent=1, sort_keys=True)

    def write(folder: Path) -> None:
        trainer.vae.save_pretrained(folder / "model")
        if trainer.ema is not trainer.vae:
            trainer.ema.save_pretrained(folder / "ema")
        save_file(tensors, folder / "training.safetensors")
        (folder / "training.json").write_text(document + "\n", encoding="utf-8")

    write_folder(place, write)
    return Checkpoint(step=trainer.step, folder=place)


def write_folder(place: Path, write: Callable[[Path], None]) -> None:
    """Makes a folder that is complete or not there; one that stands in its place is replaced.

    Raises:
        StorageError: it cannot be written.
    """
    unfinished = place.parent / f"{_UNFINISHED}{uuid.uuid4().hex}"
    try:
        unfinished.mkdir(parents=True)
        write(unfinished)
        for path in [*unfinished.rglob("*"), unfinished]:
            _sync(path)
        if place.exists():
            replaced = place.parent / f"{_UNFINISHED}{uuid.uuid4().hex}"
            place.rename(replaced)
            shutil.rmtree(replaced)
        unfinished.rename(place)
        _sync(place.parent)
    except (OSError, SafetensorError) as error:
        # A full disk is the latter where safetensors notices it.
        raise StorageError(f"{place} cannot be written: {error}; make room or choose another --output") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def remove_old(output: Path, keep_last: int, keep_every: int) -> None:
    """Removes all checkpoints but the last ones and those at multiples of `keep_every` (0: none of these)."""
    for checkpoint in checkpoints_in(output)[:-keep_last]:
        if not keep_every or checkpoint.step % keep_every:
            # Renamed first: what is half removed must not look complete.
            doomed = checkpoint.folder.with_name(f"{_UNFINISHED}{uuid.uuid4().hex}")
            checkpoint.folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def remove_unfinished(output: Path) -> None:
    """Removes what a killed training left half written. Nobody else may be training into this output."""
    for folder in (output, output / "checkpoints"):
        for path in folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _folded(name: str, state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested state by one key each; parameter names hold no slashes."""
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield f"{name}/{key}", value.detach().cpu().contiguous()
        else:
            yield from _folded(f"{name}/{key}", value)


def _unfolded(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for key, value in tensors.items():
        first, *inner = key.split("/")
        if first != name:
            continue
        if len(inner) == 1:
            state[inner[0]] = value
        else:
            state.setdefault(inner[0], {})[inner[1]] = value
    return state
