"""The configuration of a job: typed, checked, and the same keys as flags and as YAML.

Not where values are used, and not where the environment is read. `jobs/encode_laion.py` parses the command line here;
`run`, `actors`, `decode` and `codec` take the part that concerns them. Precedence: default < YAML file < flag. Other
jobs describe their parts with `option` and its parsers and read them with `read_parts`.
`EncodingConfig` is the part that changes output bytes: it goes into the fingerprint of the dataset, the rest does not.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.errors import UsageError
from pipeline.records import REASONS, Bucket

_DESCRIPTION = "Encodes a dataset of videos and images into latents. Where a flag can be auto, that is its default."
_BUCKET = re.compile(r"(\d+)x(\d+)x(\d+)")
FORMATS = ("parquet", "webdataset", "both")
STORES = ("mean", "moments")
STORE_DTYPES = ("float16", "float32")
TEXT_PADDINGS = ("none", "max")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")
PROGRESS = ("auto", "plain", "json")
# For processes that encode on a CPU, before they start. An encoder call allocates and frees activations of hundreds of
# megabytes; by default glibc maps each anew and the kernel clears every page of it: a third of the time. One arena,
# because the heaps of others hold 64 MiB at most and larger blocks would be mapped after all.
CPU_ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184"
    ":glibc.malloc.arena_max=1"
}


def parse_buckets(text: str) -> tuple[Bucket, ...]:
    """Buckets of "256x256x17;320x192x33;512x512x1", sorted, without repeats.

    Where no bucket of one frame is given, every WIDTHxHEIGHT also serves as WIDTHxHEIGHTx1 for images.

    Raises:
        UsageError: a part is not WIDTHxHEIGHTxFRAMES, a side is not a multiple of 8, frames are not 1 + 4k.
    """
    buckets: set[Bucket] = set()
    for part in (p.strip() for p in text.split(";")):
        if not part:
            continue
        match = _BUCKET.fullmatch(part)
        if match is None:
            raise UsageError(f"--buckets: {part!r} is not WIDTHxHEIGHTxFRAMES, for example 256x256x17")
        width, height, num_frames = (int(group) for group in match.groups())
        for name, side in (("width", width), ("height", height)):
            if side < 8 or side % 8:
                raise UsageError(
                    f"--buckets: {name} {side} of {part} is not a positive multiple of 8, which the encoder's 8x8 "
                    f"spatial compression needs; use {max(8, round(side / 8) * 8)}"
                )
        if num_frames < 1 or (num_frames - 1) % 4:
            lower = max(1, 1 + 4 * ((num_frames - 1) // 4))
            raise UsageError(
                f"--buckets: {num_frames} frames of {part} are not 1 + 4k, which the encoder's 4x temporal compression "
                f"needs; use {lower} or {lower + 4}"
            )
        buckets.add(Bucket(width_px=width, height_px=height, num_frames=num_frames))
    if not buckets:
        raise UsageError(f"--buckets: {text!r} names no bucket; give for example 256x256x17")
    if all(bucket.num_frames > 1 for bucket in buckets):
        buckets |= {Bucket(width_px=b.width_px, height_px=b.height_px, num_frames=1) for b in buckets}
    return tuple(sorted(buckets))


def parse_fps(text: str) -> float | None:
    """Frames per second of the clips, or None for "native" (every frame as it comes)."""
    if text == "native":
        return None
    try:
        fps = float(text)
    except ValueError:
        fps = math.nan
    if not 0 < fps <= 1000:
        raise UsageError(f"--fps: {text!r} is neither 'native' nor a number in (0, 1000]")
    return fps


def whole(name: str, lowest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if value < lowest:
            raise UsageError(f"--{name}: {text!r} is not a whole number of {lowest} or more")
        return value

    return parse


def number(name: str, low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise UsageError(f"--{name}: {text!r} is not a number from {low:g} to {high:g}")
        return value

    return parse


def auto_or(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text == "auto" else parse(text)


def choice(name: str, allowed: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise UsageError(f"--{name}: {text!r} is not one of {', '.join(allowed)}")
        return text

    return parse


def yes_no(name: str) -> Callable[[str], bool]:
    def parse(text: str) -> bool:
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{name}: {text!r} is neither true nor false")
        return text.lower() == "true"

    return parse


def local_folder(name: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if "://" in text:
            raise UsageError(f"--{name}: {text} is no folder of a disk, which this job needs; copy it there afterwards")
        return text

    return parse


def _reasons(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [name for name in names if name not in REASONS]
    if unknown or not names:
        raise UsageError(
            f"--retry-failed: {', '.join(unknown) or repr(text)} is no reason code; known: {', '.join(REASONS)}"
        )
    return names


def _digest(name: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if re.fullmatch(r"[0-9a-fA-F]{64}", text) is None:
            raise UsageError(f"--{name}: {text!r} is not 64 hex digits")
        return text.lower()

    return parse


def _label_value(name: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", text) is None:
            raise UsageError(f"--{name}: {text!r} is not 1 to 64 letters, digits and _ . : -")
        return text

    return parse


def _column_names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise UsageError(f"--text-columns: {text!r} names no column; give for example caption")
    return names


def option(
    help_text: str,
    parse: Callable[[Any], Any],
    default: Any = MISSING,
    is_switch: bool = False,
    is_nested: bool = False,
) -> Any:
    """A field that is a flag and a YAML key; a nested one is a YAML key only, parsed as YAML gives it, not as text."""
    metadata = {"help": help_text, "parse": parse, "is_switch": is_switch, "is_nested": is_nested}
    return field(default=default, metadata=metadata) if default is not MISSING else field(metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """What is read. The slices that it leads to are written down once and never cut again."""

    input: str = option("URI of a folder, glob, table (Parquet, CSV, JSONL) or of img2dataset tars", str)
    uri_column: str = option("column of a table that holds the video URIs", str, "url")
    samples_per_shard: int | None = option(
        "videos per slice of a table or folder; auto: 64 videos or 1000 images",
        auto_or(whole("samples-per-shard", 1)),
        None,
    )
    allow_http: bool = option(
        "also read http:// and https:// addresses, of public hosts", yes_no("allow_http"), False, is_switch=True
    )
    limit: int | None = option("decide at most this many shards in this run", whole("limit", 1), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingConfig:
    """Everything chosen by the user that changes the bytes of the output."""

    model: str = option("name (small), folder or hub id of a CV-VAE", str)
    subfolder: str | None = option("folder inside the model's folder or hub repository", str, None)
    revision: str | None = option("hub revision to pin", str, None)
    model_sha256: str | None = option(
        "SHA-256 that the model's weights must have, in hex", _digest("model-sha256"), None
    )
    format: str = option("parquet, webdataset or both", choice("format", FORMATS), "parquet")
    buckets: tuple[Bucket, ...] = option(
        "WIDTHxHEIGHTxFRAMES;... (sides multiples of 8, frames 1+4k)",
        parse_buckets,
        parse_buckets("256x256x17"),
    )
    fps: float | None = option("frames per second of the clips, or native", parse_fps, 8.0)
    clips_per_video: int | None = option(
        "at most this many clips of a video; auto: as many as fit", auto_or(whole("clips-per-video", 1)), None
    )
    clip_stride: int | None = option(
        "frames (at --fps) from one clip's start to the next; auto: the bucket's length",
        auto_or(whole("clip-stride", 1)),
        None,
    )
    caption_column: str = option("column or JSON field that holds the caption", str, "caption")
    upscale: bool = option(
        "enlarge pictures that are smaller than the bucket", yes_no("upscale"), False, is_switch=True
    )
    store: str = option("mean, or moments for mean and log-variance", choice("store", STORES), "mean")
    store_dtype: str = option("float16 or float32", choice("store-dtype", STORE_DTYPES), "float16")
    compute_dtype: str = option(
        "auto (float32 on CPU, bfloat16 on GPU), float32, bfloat16 or float16",
        choice("compute-dtype", COMPUTE_DTYPES),
        "auto",
    )
    batch_frames: int = option(
        "frames of one encoder call on a GPU at 256x256 (fewer at larger sizes); a CPU takes one clip a call",
        whole("batch-frames", 1),
        136,
    )
    chunk_frames: int | None = option(
        "frames of a temporal chunk inside the VAE, multiple of 4; auto: the model's own",
        auto_or(whole("chunk-frames", 0)),
        None,
    )
    tile_px: int | None = option(
        "side of a spatial tile inside the VAE, 0: never tile; auto: the model's own",
        auto_or(whole("tile-px", 0)),
        None,
    )
    compile: bool = option(
        "run the encoder through torch.compile, where it compiles; minutes more for an actor to start",
        yes_no("compile"),
        False,
        is_switch=True,
    )
    cpus_per_actor: int | None = option(
        "CPU cores of an actor and threads of its encoder; auto: 1 without a GPU, 4 with one",
        auto_or(whole("cpus-per-actor", 1)),
        None,
    )

    @property
    def kind(self) -> Literal["mean", "moments"]:
        """What the output keeps of a posterior."""
        return "mean" if self.store == "mean" else "moments"

    @property
    def latent_dtype(self) -> Literal["float16", "float32"]:
        """What the output keeps it in."""
        return "float16" if self.store_dtype == "float16" else "float32"

    def fingerprint_fields(self, device_type: str) -> dict[str, object]:
        """The JSON-safe part of the fingerprint that this configuration decides, resolved for "cpu" or "cuda".

        The model enters by the hash of its weights, which the caller adds, not by the name it was asked for.
        """
        resolved: dict[str, object] = {
            name: value
            for name, value in asdict(self).items()
            if name not in ("model", "subfolder", "revision", "model_sha256")
        }
        resolved["buckets"] = [str(bucket) for bucket in self.buckets]
        resolved["compute_dtype"] = self.compute_dtype_on(device_type)
        resolved["device_type"] = device_type
        # Threads change the order of float sums on a CPU; a batch does on a GPU. Each is inert on the other device.
        resolved["cpus_per_actor"] = self.cpus_on(device_type) if device_type == "cpu" else None
        resolved["batch_frames"] = self.batch_frames if device_type != "cpu" else None
        if not self.compile:  # as in outputs from before there was a choice
            del resolved["compile"]
        return resolved

    def compute_dtype_on(self, device_type: str) -> str:
        """The dtype that the encoder runs in: float32 on a CPU and bfloat16 on a GPU unless chosen."""
        if self.compute_dtype != "auto":
            return self.compute_dtype
        return "float32" if device_type == "cpu" else "bfloat16"

    def cpus_on(self, device_type: str) -> int:
        """CPU cores that an actor asks Ray for; on a CPU also the encoder's threads."""
        if self.cpus_per_actor is not None:
            return self.cpus_per_actor
        return 1 if device_type == "cpu" else 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderConfig:
    """What captions are embedded with; in no fingerprint while there is no encoder."""

    text_encoder: str | None = option("folder or hub id of a CLIP, T5 or sentence encoder: embed captions", str, None)
    text_encoder_revision: str | None = option("hub revision of the text encoder to pin", str, None)
    text_encoder_sha256: str | None = option(
        "SHA-256 that the text encoder's weights must have, in hex", _digest("text-encoder-sha256"), None
    )
    text_columns: tuple[str, ...] = option(
        "columns of the output whose texts are embedded, with commas between", _column_names, ("caption",)
    )
    text_dtype: str = option("float16 or float32", choice("text-dtype", STORE_DTYPES), "float16")
    text_max_tokens: int | None = option(
        "tokens of a text at most, special ones included; auto: what the encoder takes, else 512",
        auto_or(whole("text-max-tokens", 1)),
        None,
    )
    text_padding: str = option(
        "none: a text has its own tokens; max: it is padded to the most tokens and padding is embedded too, which "
        "diffusion models on CLIP were trained with (Stable Diffusion, ModelScope)",
        choice("text-padding", TEXT_PADDINGS),
        "none",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageEncoderConfig:
    """What first frames are embedded with; in no fingerprint while there is no encoder."""

    image_encoder: str | None = option(
        "folder or hub id of a CLIP vision tower with projection: embed each clip's first frame", str, None
    )
    image_encoder_revision: str | None = option("hub revision of the image encoder to pin", str, None)
    image_encoder_sha256: str | None = option(
        "SHA-256 that the image encoder's weights must have, in hex", _digest("image-encoder-sha256"), None
    )
    image_dtype: str = option("float16 or float32", choice("image-dtype", STORE_DTYPES), "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLimits:
    """What a decode child may cost. A video over a limit is rejected, never shortened."""

    max_picture_px: int = option("pixels of one frame", whole("max-picture-px", 64), 4096 * 4096)
    max_duration_s: float = option("seconds of a video", number("max-duration-s", 0.1, 1e7), 7200.0)
    max_frames: int = option("frames of a video", whole("max-frames", 1), 500_000)
    max_streams: int = option("streams of a file", whole("max-streams", 1), 8)
    max_file_bytes: int = option("bytes of a file", whole("max-file-bytes", 1), 20_000_000_000)
    decode_timeout_s: float = option(
        "seconds that a decode child may stay silent", number("decode-timeout-s", 0.5, 1e5), 60.0
    )
    max_decode_cpu_s: float = option(
        "seconds that decoding one file may compute", number("max-decode-cpu-s", 1, 1e6), 14_400.0
    )
    decode_memory_bytes: int = option("address space of a decode child", whole("decode-memory-bytes", 1 << 28), 4 << 30)
    videos_per_child: int = option("videos after which a decode child is replaced", whole("videos-per-child", 1), 200)
    decode_processes: int | None = option(
        "decode children per actor; auto: one per core of the actor",
        auto_or(whole("decode-processes", 1)),
        None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """How the run is carried out. Nothing here changes a byte of the output."""

    output: str = option("URI of the dataset to write: a local folder or s3://bucket/prefix", str)
    num_actors: int | None = option("actors; auto: as many as the cluster holds", auto_or(whole("num-actors", 1)), None)
    gpus_per_actor: float | None = option(
        "GPUs of an actor, a fraction shares one; auto: 1 where there are GPUs, else 0",
        auto_or(number("gpus-per-actor", 0, 64)),
        None,
    )
    cuda_graphs: bool = option(
        "on GPUs, record the kernels of an encoder call once and start them as one; they are checked to give the same "
        "latents, and the run says where it goes without",
        yes_no("cuda_graphs"),
        False,
        is_switch=True,
    )
    max_attempts: int = option("attempts at a shard before it is left undone", whole("max-attempts", 1), 3)
    silence_timeout_s: float = option(
        "seconds after which an actor that does not answer is taken for frozen and replaced",
        number("silence-timeout-s", 1, 1e5),
        60.0,
    )
    stall_timeout_s: float = option(
        "seconds without a clip, file or retry after which an actor is taken for hanging and replaced; above one "
        "encoder call, and above the 900 s for which a store is waited for",
        number("stall-timeout-s", 1, 1e6),
        1200.0,
    )
    grace_s: float = option(
        "seconds after SIGTERM or Ctrl-C in which running shards may still be finished", number("grace-s", 0, 1e5), 15.0
    )
    max_rejected_share: float = option(
        "share of rejected videos above which the exit code is 5", number("max-rejected-share", 0, 1), 0.5
    )
    quality_share: float = option(
        "share of the clips that are decoded back after they are encoded and compared with their pixels (0: none)",
        number("quality-share", 0, 1),
        0.0,
    )
    quality_min_psnr_db: float | None = option(
        "PSNR under which a clip that is decoded back rings an alarm; auto: 20, for clips that are hard to show less",
        auto_or(number("quality-min-psnr-db", 0, 100)),
        None,
    )
    single_writer: bool = option(
        "allow a store without conditional writes (then never run two jobs at once)",
        yes_no("single_writer"),
        False,
        is_switch=True,
    )
    dry_run: bool = option(
        "say what would be done, how long it would take and what it would cost, and stop; writes nothing",
        yes_no("dry_run"),
        False,
        is_switch=True,
    )
    dry_run_seconds: float = option(
        "seconds that --dry-run may spend on looking at videos and measuring the encoder, beside listing the input; 0: "
        "say which shards there are and nothing else",
        number("dry-run-seconds", 0, 3600),
        20.0,
    )
    gpu_hour_price: float | None = option(
        "price of an hour of one GPU, or of one actor where there is no GPU, in any money: --dry-run multiplies",
        number("gpu-hour-price", 0, 1e6),
        None,
    )
    retry_failed: tuple[str, ...] = option("encode rejections of these reasons again", _reasons, ())
    metrics_port: int | None = option(
        "serve Prometheus metrics on 127.0.0.1:PORT (0: any free one)", whole("metrics-port", 0), None
    )
    metrics_address: str = option("address that the metrics are served on", str, "127.0.0.1")
    metrics_job: str = option("constant label `job` of every metric", _label_value("metrics-job"), "latentmill")
    metrics_run: str | None = option(
        "constant label `run` of every metric; auto: the last part of --output",
        auto_or(_label_value("metrics-run")),
        None,
    )
    metrics_cluster: str = option(
        "constant label `cluster` of every metric", _label_value("metrics-cluster"), "default"
    )
    metrics_file: str | None = option(
        "write the metrics as they are at the end to this file (*.prom in a folder of node_exporter's textfile "
        "collector)",
        str,
        None,
    )
    metrics_push: str | None = option(
        "push the metrics as they are at the end to this Prometheus push gateway, such as http://pushgateway:9091",
        str,
        None,
    )
    deadline_s: float | None = option(
        "seconds after which the run counts as overdue in its metrics; auto: never. Nothing is stopped",
        auto_or(number("deadline-s", 1, 1e9)),
        None,
    )
    progress: str = option("auto, plain or json", choice("progress", PROGRESS), "auto")
    ray_address: str | None = option(
        "address of a running Ray cluster; default: the one of `ray job submit`, else an embedded one",
        str,
        None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """A whole job, by concern."""

    source: SourceConfig
    encoding: EncodingConfig
    text: TextEncoderConfig
    image: ImageEncoderConfig
    decode: DecodeLimits
    run: RunConfig

    @property
    def column_sets(self) -> tuple[str, ...]:
        """Names of the column sets that are made in the same pass."""
        asked = {"text": self.text.text_encoder, "image": self.image.image_encoder}
        return tuple(name for name, encoder in asked.items() if encoder is not None)

    @property
    def metric_labels(self) -> Mapping[str, str]:
        """The constant labels of this run's metrics."""
        last = self.run.output.rstrip("/").rpartition("/")[2]
        default = re.sub(r"[^A-Za-z0-9_.:-]", "-", last)[:64] or "default"
        return {
            "job": self.run.metrics_job,
            "run": self.run.metrics_run or default,
            "cluster": self.run.metrics_cluster,
        }


Parts = Mapping[str, type[Any]]
_PARTS: Parts = {
    "source": SourceConfig,
    "encoding": EncodingConfig,
    "text": TextEncoderConfig,
    "image": ImageEncoderConfig,
    "decode": DecodeLimits,
    "run": RunConfig,
}


def _options(parts: Parts) -> dict[str, tuple[str, Field[Any]]]:
    return {f.name: (part, f) for part, cls in parts.items() for f in fields(cls)}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        flags = [flag for action in self._actions for flag in action.option_strings]
        wrong = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(wrong[1], flags, 1) if wrong else []
        raise UsageError(f"{message}; {f'is {near[0]} meant? ' if near else ''}see --help")


def argument_parser(
    parts: Parts = _PARTS, prog: str = "encode_laion.py", description: str | None = None
) -> argparse.ArgumentParser:
    """The parser of the flags; values stay text and are checked by `read_parts`."""
    required = [f"{_flag(name)} VALUE" for name, (_, f) in _options(parts).items() if f.default is MISSING]
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, *required, "[--FLAG VALUE ...]"]),
        description=description or _DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default=None, metavar="FILE", help="YAML file with the same keys as the flags")
    for part, cls in parts.items():
        group = parser.add_argument_group(part, (cls.__doc__ or "").partition("\n")[0])
        for f in fields(cls):
            flag = _flag(f.name)
            help_text = f"{f.metadata['help']}{_default_text(f)}".replace("%", "%%")
            if f.metadata["is_switch"]:
                group.add_argument(flag, action="store_const", const="true", default=None, help=help_text)
            elif not f.metadata["is_nested"]:
                group.add_argument(flag, default=None, metavar="VALUE", help=help_text)
    return parser


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default_text(f: Field[Any]) -> str:
    """What a flag is without being given, where its text does not say so."""
    if f.default is MISSING:
        return " (required)"
    if f.metadata["is_switch"] or f.default is None or f.default == ():
        return ""
    if isinstance(f.default, tuple):
        shown = (";" if isinstance(f.default[0], Bucket) else ",").join(map(str, f.default))
    else:
        shown = f"{f.default:,.10g}".replace(",", "") if isinstance(f.default, float) else str(f.default)
    return f" (default: {shown})"


def _read_yaml(path: str, parts: Parts) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config: {path} cannot be read as YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"--config: {path} holds a {type(loaded).__name__}, not a mapping of keys to values")
    known = _options(parts)
    given: dict[str, Any] = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UsageError(f"--config: {path} has the unknown key {key!r}; known keys: {', '.join(sorted(known))}")
        if known[name][1].metadata["is_nested"]:
            given[name] = value
            continue
        if isinstance(value, list):
            value = (";" if name == "buckets" else ",").join(str(entry) for entry in value)
        if isinstance(value, dict) or value is None:
            raise UsageError(f"--config: {path}: the value of {key!r} is {value!r}, not a text, number or true/false")
        given[name] = str(value).lower() if isinstance(value, bool) else str(value)
    return given


def read_parts(
    argv: Sequence[str], parts: Parts, prog: str = "encode_laion.py", description: str | None = None
) -> dict[str, Any]:
    """The parts of a job's configuration, checked: the name of each part -> its dataclass, filled.

    Raises:
        UsageError: an unknown flag or key, a missing required one, or a value that is not allowed; the message says
            which value, what is allowed and why.
    """
    arguments = vars(argument_parser(parts, prog, description).parse_args(argv))
    path = arguments.pop("config")
    given = _read_yaml(path, parts) if path is not None else {}
    given |= {name: text for name, text in arguments.items() if text is not None}
    known = _options(parts)
    missing = [name for name, (_, f) in known.items() if f.default is MISSING and name not in given]
    if missing:
        flags = ", ".join(map(_flag, missing))
        raise UsageError(f"{flags} must be given, as a flag or in --config; see --help")
    values: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for name, value in given.items():
        part, f = known[name]
        values[part][name] = f.metadata["parse"](value)
    return {part: cls(**values[part]) for part, cls in parts.items()}


def parse_arguments(argv: Sequence[str]) -> JobConfig:
    """The checked configuration of a command line of the encode job.

    Raises:
        UsageError: as `read_parts`, or two values that do not go together.
    """
    config = JobConfig(**read_parts(argv, _PARTS))
    if config.encoding.chunk_frames is not None and config.encoding.chunk_frames % 4:
        raise UsageError(
            f"--chunk-frames: {config.encoding.chunk_frames} is not a multiple of 4 (0 switches chunks off)"
        )
    if config.encoding.tile_px is not None and config.encoding.tile_px % 8:
        raise UsageError(f"--tile-px: {config.encoding.tile_px} is not a multiple of 8 (0 switches tiles off)")
    return config
