"""Tunes a text-to-video or image-to-video diffusion model on stored latents: the job that users start.

    python jobs/finetune_t2v.py --latents s3://bucket/latents --model FOLDER_OR_HUB_ID --tune output-layer \\
        --output tuned --num-workers 8
    python jobs/finetune_t2v.py ... --local                                 one worker in this process, without Ray

Wiring only: flags and YAML become a TuningJob, which `t2v_training` carries out in this process or in the workers of
Ray Train. Exit codes and the result line are those of every training (`jobs/training_run.py`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

_ROOT = str(Path(__file__).resolve().parent.parent)
if _ROOT not in sys.path:
    # Started by its path, the interpreter knows jobs/ only; Ray's workers inherit the environment, not sys.path.
    sys.path.insert(0, _ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))

from jobs.t2v_data import DataConfig
from jobs.t2v_models import VideoSettings
from jobs.t2v_training import LookConfig, ModelConfig, OptimisationConfig, TuningJob, tune
from jobs.training_loop import WorkConfig
from jobs.training_run import checked_work, run_job
from pipeline.config import read_parts
from pipeline.errors import UsageError

PARTS = {
    "model": ModelConfig,
    "data": DataConfig,
    "video": VideoSettings,
    "optimisation": OptimisationConfig,
    "look": LookConfig,
    "work": WorkConfig,
}


def read_job(argv: Sequence[str]) -> TuningJob:
    """The checked configuration of a command line.

    Raises:
        UsageError: as `read_parts`, or two values that do not go together.
    """
    description = (__doc__ or "").partition("\n")[0]
    job = TuningJob(**read_parts(argv, PARTS, "finetune_t2v.py", description))
    if (job.model.model is None) == (job.model.model_config is None):
        raise UsageError("give either --model (a diffusers folder or hub id) or --model-config (a config.json)")
    if job.model.model_config is not None and job.model.tune != "all":
        raise UsageError(
            f"--tune {job.model.tune}: a model that starts at random (--model-config) learns as a whole, --tune all"
        )
    # Workers of Ray Train have working directories of their own.
    data = replace(job.data, latents=_whole(job.data.latents), validation=_whole(job.data.validation))
    model = replace(job.model, model=_whole(job.model.model), model_config=_whole(job.model.model_config))
    look = replace(job.look, vae=_whole(job.look.vae))
    return replace(job, data=data, model=model, look=look, work=checked_work(job.work))


def _whole(place: Any) -> Any:
    """The absolute path of what lies on this machine; anything else, such as a hub id, as it is."""
    if place is None or not Path(place).expanduser().exists():
        return place
    return os.path.abspath(Path(place).expanduser())


def main(argv: Sequence[str]) -> int:
    """Runs the job; returns the exit code."""
    return run_job(argv, read_job, tune, is_program=__name__ == "__main__")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
