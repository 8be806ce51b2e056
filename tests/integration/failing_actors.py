"""A job whose actors misbehave: `python failing_actors.py HOW FLAGS...`, otherwise as jobs/encode_laion.py.

Started by test_failing_actors.py; the actors are the real ones but for the fault.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import pipeline.run
from jobs.encode_laion import main
from pipeline.actors import EncodeActor, ShardReport, WorkerFacts
from pipeline.config import JobConfig
from pipeline.records import Clip, ClipFailure, DatasetManifest, LatentRecord, ShardSpec

# The second video of the first shard, as tests.builders.pack_clips names it.
POISON_KEY = "000000001"


class NeverBuilt(EncodeActor):
    """Its constructor fails, as with a temporary folder that cannot be written."""

    def __init__(self, config: JobConfig, name: str, device_type: str) -> None:
        self._name = name  # Ray asks a failed actor for its repr
        raise OSError("no room for temporary files")


class FirstFailsAlways(EncodeActor):
    """Actor 0 fails at every shard at once, as after the loss of a GPU context."""

    def process(self, spec: ShardSpec, manifest: DatasetManifest, poison: frozenset[int] = frozenset()) -> ShardReport:
        if self._name == "0":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().process(spec, manifest, poison)


class SlowToReturn(EncodeActor):
    """Dies once in the middle of a shard and takes long to come back."""

    def __init__(self, config: JobConfig, name: str, device_type: str) -> None:
        super().__init__(config, name, device_type)
        if Path(config.run.output, "died").exists():
            time.sleep(8)

    def process(self, spec: ShardSpec, manifest: DatasetManifest, poison: frozenset[int] = frozenset()) -> ShardReport:
        marker = Path(self._config.run.output, "died")
        if not marker.exists():
            marker.touch()
            os._exit(9)
        return super().process(spec, manifest, poison)


class FirstNeverReturns(EncodeActor):
    """Actor 0 dies once in the middle of a shard and cannot start again, as on a node that lost its GPU."""

    def start(self) -> WorkerFacts:
        if Path(self._config.run.output, "died").exists() and self._name == "0":
            raise RuntimeError("CUDA error: no device is left")
        return super().start()

    def process(self, spec: ShardSpec, manifest: DatasetManifest, poison: frozenset[int] = frozenset()) -> ShardReport:
        if self._name == "0":
            Path(self._config.run.output, "died").touch()
            os._exit(9)
        return super().process(spec, manifest, poison)


class FirstIsOdd(EncodeActor):
    """Actor 0 has other decoders than its neighbours, and is up before them."""

    def start(self) -> WorkerFacts:
        if self._name != "0":
            time.sleep(3)
            return super().start()
        return replace(super().start(), decoders={"decord": "0.0"})


class FreezesOrHangs(EncodeActor):
    """With its first shard actor 0 freezes as a whole; actor 1 hangs, and still answers."""

    def process(self, spec: ShardSpec, manifest: DatasetManifest, poison: frozenset[int] = frozenset()) -> ShardReport:
        marker = Path(self._config.run.output, f"struck-{self._name}")
        if not marker.exists():
            marker.touch()
            if self._name == "0":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(10_000)
        return super().process(spec, manifest, poison)


class Paced(EncodeActor):
    """Rests before each shard, so that work is left when the last of many faults comes."""

    rest_s = 1.2

    def process(self, spec: ShardSpec, manifest: DatasetManifest, poison: frozenset[int] = frozenset()) -> ShardReport:
        time.sleep(self.rest_s)
        return super().process(spec, manifest, poison)


class Leisurely(Paced):
    """Leaves time for nodes to come and go."""

    rest_s = 4.0


class Poisoned(EncodeActor):
    """One video kills the process each time that it reaches the encoder."""

    def start(self) -> WorkerFacts:
        is_new = self._encoder is None
        facts = super().start()
        if is_new:
            encode = self._encoder.encode

            def deadly(clips: Iterable[Clip | ClipFailure]) -> Iterator[Clip | ClipFailure]:
                for clip in clips:
                    if isinstance(clip, Clip) and clip.key == POISON_KEY:
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield clip

            def encode_or_die(clips: Iterable[Clip | ClipFailure]) -> Iterator[LatentRecord | ClipFailure]:
                return encode(deadly(clips))

            self._encoder.encode = encode_or_die
        return facts


if __name__ == "__main__":
    classes = (
        NeverBuilt,
        FirstFailsAlways,
        SlowToReturn,
        FirstNeverReturns,
        FirstIsOdd,
        FreezesOrHangs,
        Paced,
        Leisurely,
        Poisoned,
    )
    faults = {cls.__name__: cls for cls in classes}
    pipeline.run.EncodeActor = faults[sys.argv[1]]
    sys.exit(main(sys.argv[2:]))
