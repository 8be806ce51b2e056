"""Measures a video VAE on videos: reconstruction, compatibility with an image VAE, seams, steadiness, time.

    python jobs/evaluate_vae.py --model small --teacher FOLDER --input videos/ --output evaluation/ --timing

Inputs are read and cut as the encode job reads and cuts them. Written to --output, and the tables printed as well:

    evaluation.json   every figure, described below
    evaluation.md     the tables
    evaluation.html   the tables, the pictures and the curves on one page without outside parts

PSNR is taken on frames rounded to 0..255, as they would be stored; of a clip it is the mean of its frames' PSNRs, of a
group the mean of its clips'. Every clip weighs the same. Latents are posterior means. The image VAE (--teacher) is
measured beside the model, on every frame and on every fourth with linear interpolation between. A clip is "moving"
where interpolating its own frames 0, 4, 8, ... gives less than --moving-below-db between them, else "static".

Keys of evaluation.json (`null` where something was not measured or does not exist):

    schema      "latentmill-evaluation-1"
    settings    what was asked for, device, data type, threads, versions
    model       name, source, class, SHA-256 of the weights, is_trained, latent channels, scale, parameters
    teacher     path, class, latent channels, scale, parameters
    accounts    num_videos = num_videos_ok + num_videos_rejected; num_clips by kind; is_limited: --limit was reached
    rejected    key, clip_index, step, reason, message, source_uri of what could not be measured
    summary     all, moving, static, images: num_clips, and the means of the clips' figures (`all` leaves out images
                where there are videos)
    channels    latents against the image VAE's by channel: `cvvae.metrics.ChannelAgreement`
    timing      `cvvae.evaluation.Timing`
    clips       key, clip_index, bucket, source_uri, start_s, fps, figures: `cvvae.evaluation.ClipFigures`

Exit codes: 0 measured, 2 wrong use or nothing to measure, 4 the run broke off, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
if str(_ROOT) not in sys.path:
    sys.path.insert(0, str(_ROOT))

import torch

from cvvae import CVVAE
from cvvae.evaluation import (
    MOVING_BELOW_DB,
    ClipEvaluator,
    ClipFigures,
    NonfiniteError,
    Perceptual,
    mean_figures,
)
from cvvae.losses import load_perceptual
from cvvae.teachers import FrozenTeacher, load_teacher
from jobs.evaluation_report import PicturedClip, markdown, page
from pipeline.codec import load_model
from pipeline.config import (
    CPU_ENVIRONMENT,
    DecodeLimits,
    EncodingConfig,
    SourceConfig,
    local_folder,
    parse_buckets,
    parse_fps,
)
from pipeline.decode import DecodePool
from pipeline.errors import LatentmillError, StorageError, UsageError
from pipeline.plan import plan_shards
from pipeline.records import Clip, ClipFailure
from pipeline.scratch import Scratch
from pipeline.source import iterate_videos
from pipeline.storage import open_store

SCHEMA = "latentmill-evaluation-1"
_EXIT_USAGE, _EXIT_BROKEN, _EXIT_INTERRUPTED = 2, 4, 130


@dataclass(slots=True)
class _Measured:
    """What a run has gathered so far."""

    clips: list[dict[str, Any]]
    failures: list[ClipFailure]
    pictured: list[PicturedClip]
    first: Clip | None = None
    is_limited: bool = False


def main(argv: Sequence[str]) -> int:
    """Runs the evaluation; returns the exit code."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        arguments = _parser().parse_args(argv)
        document, pictured = evaluate(arguments)
        tables = markdown(document)
        output: Path = arguments.output
        output.mkdir(parents=True, exist_ok=True)
        (output / "evaluation.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        (output / "evaluation.md").write_text(tables, encoding="utf-8")
        (output / "evaluation.html").write_text(page(document, pictured), encoding="utf-8")
    except (UsageError, StorageError) as error:
        return _fail(_EXIT_USAGE, error)
    except OSError as error:
        return _fail(_EXIT_USAGE, UsageError(f"--output: {error}"))
    except LatentmillError as error:
        return _fail(_EXIT_BROKEN, error)
    except torch.OutOfMemoryError as error:
        advice = "give smaller --buckets, --probe-clips 0 (probes run whole clips in one piece), or --device cpu"
        return _fail(_EXIT_BROKEN, LatentmillError(f"the GPU ran out of memory: {advice} ({error})"))
    except KeyboardInterrupt:
        return _fail(_EXIT_INTERRUPTED, LatentmillError("interrupted; nothing was written"))
    print(tables)
    print(f"written: {output / 'evaluation.json'}, {output / 'evaluation.md'}, {output / 'evaluation.html'}")
    return 0


def evaluate(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[PicturedClip]]:
    """Everything but the writing: the document of evaluation.json, and the clips to draw.

    Raises:
        UsageError: model, teacher or input are not what they must be, or no clip could be measured.
        StorageError: the input could not be read.
        DecodeChildError: no decode child starts here.
    """
    threads = arguments.threads or (2 if arguments.timing else None)
    if threads is not None:
        torch.set_num_threads(threads)
    device = _device(arguments.device)
    encoding = EncodingConfig(
        model=arguments.model,
        subfolder=arguments.subfolder,
        revision=arguments.revision,
        buckets=arguments.buckets,
        fps=arguments.fps,
        clips_per_video=arguments.clips_per_video,
        clip_stride=arguments.clip_stride,
        upscale=arguments.upscale,
        compute_dtype=arguments.compute_dtype,
    )
    vae = load_model(encoding, device)
    teacher = _load_teacher(arguments.teacher, arguments.teacher_subfolder, device)
    evaluator = _evaluator(arguments, vae, teacher, device)
    source = SourceConfig(input=arguments.input, uri_column=arguments.uri_column)
    measured = _measure(arguments, evaluator, source, encoding)
    if measured.first is None:
        reasons = "; ".join(f"{failure.key}: {failure.reason}, {failure.message}" for failure in measured.failures[:3])
        raise UsageError(
            f"--input: no clip of {arguments.input} could be measured at --buckets "
            f"{';'.join(map(str, encoding.buckets))} and --fps {arguments.fps or 'native'}"
            + (f" ({len(measured.failures)} rejections: {reasons})" if reasons else "")
            + "; give longer videos, a smaller bucket, or a higher --fps"
        )
    timing = None
    if arguments.timing:
        _say("timing ...")
        timing = asdict(evaluator.time(measured.first.frames, num_rounds=arguments.timing_rounds))
    channels = evaluator.channels()
    document = {
        "schema": SCHEMA,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": _settings(arguments, device, encoding),
        "model": _model(arguments, vae),
        "teacher": _teacher(arguments, teacher),
        "accounts": _accounts(measured),
        "rejected": [asdict(failure) for failure in measured.failures],
        "summary": _summary([clip["figures"] for clip in measured.clips]),
        "channels": asdict(channels) if channels is not None else None,
        "timing": timing,
        "clips": measured.clips,
    }
    rounded: dict[str, Any] = _rounded(document)
    return rounded, measured.pictured


def _measure(
    arguments: argparse.Namespace, evaluator: ClipEvaluator, source: SourceConfig, encoding: EncodingConfig
) -> _Measured:
    measured = _Measured([], [], [])
    pictured_keys: set[tuple[str, str]] = set()
    num_probed = 0
    with closing(_clips(source, encoding, arguments.decode_processes)) as clips:
        for clip in clips:
            if isinstance(clip, ClipFailure):
                _say(f"rejected {clip.key}: {clip.reason}, {clip.message}")
                measured.failures.append(clip)
                continue
            is_video = clip.bucket.num_frames > 1
            probe = is_video and num_probed < arguments.probe_clips
            try:
                figures, pictures = evaluator.measure(clip.frames, probe=probe)
            except NonfiniteError as error:
                failure = _nonfinite(clip, str(error))
                _say(f"rejected {failure.key}: {failure.message}")
                measured.failures.append(failure)
                continue
            num_probed += probe
            # Frames of all clips would fill the memory: one clip is kept for the timing.
            measured.first = measured.first or clip
            if is_video and measured.first.bucket.num_frames == 1:
                measured.first = clip
            measured.clips.append(_clip(clip, figures))
            if (clip.source_uri, clip.key) not in pictured_keys and len(pictured_keys) < arguments.pictures:
                pictured_keys.add((clip.source_uri, clip.key))
                measured.pictured.append(PicturedClip(index=len(measured.clips) - 1, pictures=pictures))
            _say(_progress(len(measured.clips), clip, figures))
            if len(measured.clips) == arguments.limit:
                measured.is_limited = next(clips, None) is not None
                break
    return measured


def _clips(
    source: SourceConfig, encoding: EncodingConfig, num_processes: int
) -> Generator[Clip | ClipFailure, None, None]:
    """The clips of the input in its order, as the encode job would encode them."""
    limits = DecodeLimits()
    # The encode job writes its plan into its output; here nothing is kept of it.
    with Scratch("evaluation") as folder:
        store = open_store(str(folder))
        shards = plan_shards(source, store)
        pool = DecodePool(encoding, limits, num_processes)
        try:
            for shard in shards:
                yield from pool.decode(iterate_videos(shard, store, encoding, limits))
        finally:
            pool.close()


def _evaluator(
    arguments: argparse.Namespace, vae: CVVAE, teacher: FrozenTeacher | None, device: torch.device
) -> ClipEvaluator:
    perceptual: Perceptual | None = None
    if arguments.lpips:
        try:
            perceptual = load_perceptual("lpips")
        except (ImportError, OSError, ValueError) as error:
            raise UsageError(f"--lpips: {error}") from error
        if isinstance(perceptual, torch.nn.Module):
            perceptual.to(device)
    for name, value, step in (("chunk", arguments.seam_chunk_frames, 4), ("tile", arguments.seam_tile_px, 8)):
        if value is not None and value % step:
            raise UsageError(f"--seam-{name}-{'frames' if step == 4 else 'px'}: {value} is not a multiple of {step}")
    try:
        return ClipEvaluator(
            vae,
            teacher,
            perceptual=perceptual,
            chunk_frames=arguments.seam_chunk_frames,
            tile_px=arguments.seam_tile_px,
            moving_below_db=arguments.moving_below_db,
        )
    except ValueError as error:
        raise UsageError(f"--teacher {arguments.teacher}: {error}") from error


def _load_teacher(path: str | None, subfolder: str | None, device: torch.device) -> FrozenTeacher | None:
    if path is None:
        return None
    try:
        return load_teacher(path, subfolder).to(device)
    except (ImportError, OSError, ValueError) as error:
        raise UsageError(f"--teacher {path}: {error}") from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: cuda was asked for and torch finds no GPU here; give cpu or auto")
    return torch.device(name)


def _settings(arguments: argparse.Namespace, device: torch.device, encoding: EncodingConfig) -> dict[str, Any]:
    return {
        "input": arguments.input,
        "buckets": [str(bucket) for bucket in encoding.buckets],
        "fps": "native" if arguments.fps is None else arguments.fps,
        "clips_per_video": arguments.clips_per_video,
        "clip_stride": arguments.clip_stride,
        "upscale": arguments.upscale,
        "limit": arguments.limit,
        "moving_below_db": arguments.moving_below_db,
        "lpips": arguments.lpips,
        "probe_clips": arguments.probe_clips,
        "compute_dtype": encoding.compute_dtype_on(device.type),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}",
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _model(arguments: argparse.Namespace, vae: CVVAE) -> dict[str, Any]:
    return {
        "name": arguments.model if arguments.subfolder is None else f"{arguments.model}/{arguments.subfolder}",
        "source": vae.source,
        "revision": vae.revision,
        "class": vae.config.class_name,
        "weights_sha256": vae.weights_sha256,
        "is_trained": vae.is_trained,
        "latent_channels": vae.latent_channels,
        "scaling_factor": vae.scaling_factor,
        "shift_factor": vae.shift_factor,
        "num_parameters": _num_parameters(vae),
        "num_encoder_parameters": _num_parameters(vae.encoder),
    }


def _teacher(arguments: argparse.Namespace, teacher: FrozenTeacher | None) -> dict[str, Any] | None:
    if teacher is None:
        return None
    return {
        "path": arguments.teacher,
        "subfolder": arguments.teacher_subfolder,
        "class": type(teacher.teacher).__name__,
        "latent_channels": teacher.latent_channels,
        "scaling_factor": teacher.scaling_factor,
        "shift_factor": teacher.shift_factor,
        "num_parameters": _num_parameters(teacher),
    }


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _accounts(measured: _Measured) -> dict[str, Any]:
    seen = {(clip["source_uri"], clip["key"]) for clip in measured.clips}
    rejected = {(failure.source_uri, failure.key) for failure in measured.failures} - seen
    figures = [clip["figures"] for clip in measured.clips]
    num_images = sum(entry["num_frames"] == 1 for entry in figures)
    num_moving = sum(entry["is_moving"] for entry in figures)
    return {
        "num_videos": len(seen) + len(rejected),
        "num_videos_ok": len(seen),
        "num_videos_rejected": len(rejected),
        "num_clips": len(figures),
        "num_clips_moving": num_moving,
        "num_clips_static": len(figures) - num_images - num_moving,
        "num_images": num_images,
        "num_clips_rejected": sum(failure.clip_index is not None for failure in measured.failures),
        "is_limited": measured.is_limited,
    }


def _summary(clips: Sequence[dict[str, Any]]) -> dict[str, Any]:
    videos = [clip for clip in clips if clip["num_frames"] > 1]
    images = [clip for clip in clips if clip["num_frames"] == 1]
    groups = {
        "all": videos or images,
        "moving": [clip for clip in videos if clip["is_moving"]],
        "static": [clip for clip in videos if not clip["is_moving"]],
        "images": images,
    }
    return {
        name: {"num_clips": len(members), **mean_figures(members)} if members else None
        for name, members in groups.items()
    }


def _clip(clip: Clip, figures: ClipFigures) -> dict[str, Any]:
    return {
        "key": clip.key,
        "clip_index": clip.clip_index,
        "bucket": str(clip.bucket),
        "source_uri": clip.source_uri,
        "start_s": clip.start_s,
        "fps": clip.fps,
        "figures": asdict(figures),
    }


def _nonfinite(clip: Clip, message: str) -> ClipFailure:
    return ClipFailure(
        key=clip.key,
        clip_index=clip.clip_index,
        step="encode",
        reason="nonfinite_latent",
        message=message,
        source_uri=clip.source_uri,
    )


def _rounded(value: Any) -> Any:
    """Six digits of every float: more would be noise, and table, page and JSON then show the same number.

    What is not finite, such as a difference relative to latents that are all equal, is None: JSON has no name for it.
    """
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _progress(number: int, clip: Clip, figures: ClipFigures) -> str:
    kind = "image" if figures.num_frames == 1 else "moving" if figures.is_moving else "static"
    text = f"{number}: {clip.key} clip {clip.clip_index} ({clip.bucket}, {kind}): {figures.video_vae.psnr_db:.2f} dB"
    if figures.compatibility is not None:
        text += f", image decoder on its latents {figures.compatibility.image_decoder.psnr_db:.2f} dB"
    return text


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="evaluate_vae.py", description=__doc__.splitlines()[0] if __doc__ else None, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", required=True, help="name (small), folder or hub id of a CV-VAE")
    add("--subfolder", help="folder inside the model's folder or hub repository")
    add("--revision", help="hub revision of the model")
    add("--teacher", help="image VAE to compare with: a diffusers folder or hub id, or files of the TAESD family")
    add("--teacher-subfolder", help="folder inside the teacher's folder or hub repository")
    add("--input", required=True, help="videos: folder, glob, table or tars, as for the encode job")
    add("--uri-column", default="url", help="column of a table that holds the video URIs (default: url)")
    add("--output", required=True, type=_folder, help="local folder for evaluation.json, .md and .html")
    add("--buckets", type=parse_buckets, default="256x256x17", help="WIDTHxHEIGHTxFRAMES;... (default: 256x256x17)")
    add("--fps", type=parse_fps, default="8", help="frames per second of the clips, or native (default: 8)")
    add("--clips-per-video", type=_whole(1), help="at most this many clips of a video (default: all that fit)")
    add("--clip-stride", type=_whole(1), help="frames from one clip's start to the next (default: the bucket's length)")
    add("--upscale", action="store_true", help="enlarge pictures that are smaller than the bucket")
    add("--limit", type=_whole(1), help="measure at most this many clips")
    add("--lpips", action="store_true", help="measure LPIPS too; needs the package lpips and its weights")
    add(
        "--moving-below-db",
        type=float,
        default=MOVING_BELOW_DB,
        help="a clip moves where its own key frames, interpolated, give less (default: %(default)s)",
    )
    add("--probe-clips", type=_whole(0), default=4, help="clips on which seams and flicker are measured (default: 4)")
    add("--seam-chunk-frames", type=_whole(4), help="frames of a chunk for the seams (default: half a clip)")
    add("--seam-tile-px", type=_whole(8), help="side of a tile for the seams (default: 5/8 of the longer side)")
    add("--pictures", type=_whole(0), default=6, help="videos shown on the page, one clip of each (default: 6)")
    add("--timing", action="store_true", help="measure the time per frame, beside the teacher")
    add("--timing-rounds", type=_whole(1), default=5, help="rounds of which the median counts (default: 5)")
    add("--threads", type=_whole(1), help="threads of the computation (default: 2 with --timing, else torch's own)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU where there is one")
    add(
        "--compute-dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="data type of the model; the teacher computes in float32 (default: float32)",
    )
    add("--decode-processes", type=_whole(1), default=1, help="processes that decode videos (default: 1)")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; see --help")


def _folder(text: str) -> Path:
    folder = Path(local_folder("output")(text))
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output: {folder} is a file: a folder is needed")
    return folder


def _whole(lowest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise ValueError(text)
        return value

    parse.__name__ = f"whole number of {lowest} or more"
    return parse


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _fail(exit_code: int, error: Exception) -> int:
    _say(f"error: {error}")
    return exit_code


if __name__ == "__main__":
    if not torch.cuda.is_available() and not CPU_ENVIRONMENT.items() <= os.environ.items():
        # The allocator reads its settings when a process starts; with them encoders run here as in the encode job.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **CPU_ENVIRONMENT})
    sys.exit(main(sys.argv[1:]))
