"""Trains a video VAE towards the latents of a frozen image VAE: the job that users start.

    python jobs/train_vae.py --config jobs/train_paper.yaml --input videos/ --teacher sd21/vae --init sd21/vae \\
        --output run1 --num-workers 8
    python jobs/train_vae.py ... --local                                    one worker in this process, without Ray

Wiring only: flags and YAML become a TrainingJob, which `vae_training` carries out in this process or in the workers of
Ray Train. Exit codes and the result line are those of every training (`jobs/training_run.py`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parent.parent)
if _ROOT not in sys.path:
    # Started by its path, the interpreter knows jobs/ only; Ray's workers inherit the environment, not sys.path.
    sys.path.insert(0, _ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))

from jobs.training_loop import WorkConfig
from jobs.training_run import checked_work, run_job
from jobs.vae_training import ModelConfig, OptimisationConfig, PicturesConfig, TrainingJob, train
from pipeline.config import DecodeLimits, read_parts
from pipeline.training_clips import ClipsConfig

PARTS = {
    "model": ModelConfig,
    "clips": ClipsConfig,
    "decode": DecodeLimits,
    "optimisation": OptimisationConfig,
    "pictures": PicturesConfig,
    "work": WorkConfig,
}


def read_job(argv: Sequence[str]) -> TrainingJob:
    """The checked configuration of a command line.

    Raises:
        UsageError: as `read_parts`, or two values that do not go together.
        ValueError: a stage or the trainer cannot be as the YAML says.
    """
    description = (__doc__ or "").partition("\n")[0]
    job = TrainingJob(**read_parts(argv, PARTS, "train_vae.py", description))
    job.stages()
    job.trainer_config()
    return replace(job, work=checked_work(job.work))


def main(argv: Sequence[str]) -> int:
    """Runs the job; returns the exit code."""
    return run_job(argv, read_job, train, is_program=__name__ == "__main__")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
