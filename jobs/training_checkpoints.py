"""Checkpoints of a training on a disk: whole or not there, and only the ones worth keeping.

    OUTPUT/checkpoints/step-0000001000/training.safetensors   what a training goes on from: optimisers, averages, ...
                                       training.json      step, places in the inputs, sums of the losses not yet logged
                                       ...                folders that the training adds, such as models

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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import StorageError, UsageError

_NAME = re.compile(r"step-(\d{10})")
_UNFINISHED = ".unfinished-"


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a training can go on from.

    Attributes:
        tensors: name -> tensors by key, or by two keys; no key holds a slash.
        numbers: of the trainer, JSON-safe.
        more: of the loop around it, JSON-safe.
    """

    tensors: Mapping[str, Mapping[str, Any]]
    numbers: Mapping[str, Any]
    more: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint: after how many steps, and where."""

    step: int
    folder: Path

    def read(self) -> State:
        """The state that `write_checkpoint` was given; names without a tensor are left out.

        Raises:
            UsageError: the folder is damaged.
        """
        with self.reading():
            document = json.loads((self.folder / "training.json").read_text(encoding="utf-8"))
            tensors = load_file(self.folder / "training.safetensors")
            return State(tensors=_unfolded(tensors), numbers=document["trainer"], more=document["more"])

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within it, whatever cannot be read of the folder is a UsageError that says what to do."""
        try:
            yield
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UsageError(
                f"the checkpoint {self.folder} cannot be read: {error}; remove the folder to go on from the one before "
                "it"
            ) from error


def checkpoints_in(output: Path) -> list[Checkpoint]:
    """The complete checkpoints of an output, oldest first."""
    folder = output / "checkpoints"
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    found = [(match, name) for name in names if (match := _NAME.fullmatch(name))]
    return [Checkpoint(step=int(match[1]), folder=folder / name) for match, name in found]


def write_checkpoint(
    output: Path, step: int, state: State, write_more: Callable[[Path], None] | None = None
) -> Checkpoint:
    """Writes the state of a training after a step; `write_more` adds folders of its own.

    Raises:
        StorageError: the folder cannot be written.
    """
    place = output / "checkpoints" / f"step-{step:010d}"
    tensors = {key: value for name, tree in state.tensors.items() for key, value in _folded(name, tree)}
    values = {"version": 1, "trainer": dict(state.numbers), "more": dict(state.more)}
    document = json.dumps(values, indent=1, sort_keys=True)

    def write(folder: Path) -> None:
        if write_more is not None:
            write_more(folder)
        save_file(tensors, folder / "training.safetensors")
        (folder / "training.json").write_text(document + "\n", encoding="utf-8")

    write_folder(place, write)
    return Checkpoint(step=step, folder=place)


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


def _unfolded(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    state: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, first, *second = key.split("/")
        if second:
            state.setdefault(name, {}).setdefault(first, {})[second[0]] = value
        else:
            state.setdefault(name, {})[first] = value
    return state
