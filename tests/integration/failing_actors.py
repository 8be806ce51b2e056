"""A job whose actors misbehave: `python failing_actors.py HOW FLAGS...`, otherwise as jobs/encode_laion.py.

Started by test_failing_actors.py; the actors are the real ones but for the fault.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import pipeline.run
from jobs.encode_laion import main
from pipeline.actors import EncodeActor, ShardReport
from pipeline.config import JobConfig
from pipeline.records import DatasetManifest, ShardSpec


class NeverBuilt(EncodeActor):
    """Its constructor fails, as with a temporary folder that cannot be written."""

    def __init__(self, config: JobConfig, name: str, device_type: str) -> None:
        self._name = name  # Ray asks a failed actor for its repr
        raise OSError("no room for temporary files")


class FirstFailsAlways(EncodeActor):
    """Actor 0 fails at every shard at once, as after the loss of a GPU context."""

    def process(self, spec: ShardSpec, manifest: DatasetManifest) -> ShardReport:
        if self._name == "0":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().process(spec, manifest)


class SlowToReturn(EncodeActor):
    """Dies once in the middle of a shard and takes long to come back."""

    def __init__(self, config: JobConfig, name: str, device_type: str) -> None:
        super().__init__(config, name, device_type)
        if Path(config.run.output, "died").exists():
            time.sleep(8)

    def process(self, spec: ShardSpec, manifest: DatasetManifest) -> ShardReport:
        marker = Path(self._config.run.output, "died")
        if not marker.exists():
            marker.touch()
            os._exit(9)
        return super().process(spec, manifest)


if __name__ == "__main__":
    faults = {cls.__name__: cls for cls in (NeverBuilt, FirstFailsAlways, SlowToReturn)}
    pipeline.run.EncodeActor = faults[sys.argv[1]]
    sys.exit(main(sys.argv[2:]))
