"""Measures encoders on this machine as an actor would run them: in a process of its own, with an actor's environment.

Not where anything is estimated (`estimate`, which calls this), and no benchmark: a few clips, within seconds. On a CPU
as many clips are encoded at once as actors will be, because neighbours share caches, memory and hyperthreads; for want
of memory fewer. Captions and first frames are embedded one after the other: their encoders take one caller at a time.

The process reads requests from its standard input and answers each with a line of JSON.
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch

from pipeline.codec import ClipEncoder, batch_size
from pipeline.config import CPU_ENVIRONMENT, EncodingConfig, ImageEncoderConfig, TextEncoderConfig
from pipeline.errors import UsageError, printable
from pipeline.records import Bucket, Clip, ModelFacts, VideoFacts
from pipeline.text import ImageEncoder, TextEncoder

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from pipeline.calibration import main; sys.exit(main())"
)
# Rounds of one bucket: the first warms up, and counts only where there is no time for a second.
_NUM_ROUNDS = 4
_MOST_AT_ONCE = 16
# Nanoseconds on a core, nanoseconds of waiting for one.
_SCHEDULED = Path("/proc/self/schedstat")
_LOG_TAIL_BYTES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderFacts:
    """What the measured encoder says of itself.

    Attributes:
        start_s: seconds from the start of its process until it could encode.
        slowdown: of a process here, by others that want the same cores: 2 where it waited as long as it ran.
    """

    model: ModelFacts
    device_name: str
    start_s: float
    slowdown: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingFacts:
    """What embeddings cost one actor; 0 of what is not embedded.

    Attributes:
        load_s: seconds until the encoders of captions and first frames could embed.
    """

    load_s: float
    s_per_text: float
    bytes_per_text: float
    s_per_frame: float
    bytes_per_frame: float


class Calibration:
    """An encoder in a process of its own, until `close`. It loads at once, while the caller does something else.

    Args:
        device_type: "cpu" or "cuda", as the actors' will be.
        num_at_once: actors that will share this machine.
    """

    def __init__(self, encoding: EncodingConfig, device_type: str, num_at_once: int) -> None:
        self._started = time.monotonic()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._answers = b""
        self._facts: EncoderFacts | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **(CPU_ENVIRONMENT if device_type == "cpu" else {})},
        )
        cores = encoding.cpus_on(device_type)
        at_once = min(num_at_once, _MOST_AT_ONCE) if device_type == "cpu" else 1
        self._send({"encoding": asdict(encoding), "device": device_type, "cores": cores, "num_at_once": at_once})

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def facts(self, deadline_s: float) -> EncoderFacts | None:
        """What the encoder says of itself once it is loaded; None where it is not by then (`time.monotonic`).

        Raises:
            UsageError: the model cannot be loaded.
        """
        if self._facts is None:
            answer = self._answer(deadline_s)
            if answer is None:
                return None
            if "error" in answer:
                raise UsageError(answer["error"])
            self._facts = EncoderFacts(
                model=ModelFacts(**answer["model"]),
                device_name=answer["device_name"],
                start_s=answer["start_s"],
                slowdown=answer["slowdown"],
            )
        return self._facts

    def seconds_per_clip(
        self, frames: Sequence[npt.NDArray[np.uint8]], folder: Path, patience_s: float, deadline_s: float
    ) -> float | None:
        """Seconds that an actor needs for a clip like these, of one shape `(T, H, W, 3)`; None where time ran out.

        Args:
            folder: for a temporary file.
            patience_s: after which no further clip is begun.
            deadline_s: by `time.monotonic`; an encoder that is not done by then is killed, and answers no more.
        """
        path = folder / "frames.npy"
        np.save(path, np.stack(frames))
        self._send({"frames": str(path), "patience_s": patience_s})
        answer = self._answer(deadline_s)
        return None if answer is None else float(answer["s_per_clip"])

    def embedding(
        self,
        text: TextEncoderConfig,
        image: ImageEncoderConfig,
        captions: Sequence[str],
        frames: Sequence[npt.NDArray[np.uint8]],
        folder: Path,
        patience_s: float,
        deadline_s: float,
    ) -> EmbeddingFacts | None:
        """What captions and first frames like these cost; None where time ran out, as of `seconds_per_clip`.

        Args:
            captions, frames: of each one at least; frames `(H, W, 3)` of one shape.

        Raises:
            UsageError: an encoder cannot be loaded.
        """
        path = folder / "first-frames.npy"
        np.save(path, np.stack(frames))
        asked = {"text": asdict(text), "image": asdict(image), "captions": list(captions), "first_frames": str(path)}
        self._send(asked | {"patience_s": patience_s})
        answer = self._answer(deadline_s)
        if answer is not None and "error" in answer:
            raise UsageError(answer["error"])
        return None if answer is None else EmbeddingFacts(**answer)

    def _send(self, message: Mapping[str, object]) -> None:
        assert self._process.stdin is not None, "it is a pipe"
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return  # it died; waiting for its answer says why

    def _answer(self, deadline_s: float) -> dict[str, Any] | None:
        assert self._process.stdout is not None, "it is a pipe"
        while b"\n" not in self._answers:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([self._process.stdout], [], [], left_s)[0]:
                self._process.kill()
                return None
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                raise UsageError(f"the encoder cannot be measured here, its process ended: {self._last_words()}")
            self._answers += data
        line, _, self._answers = self._answers.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _LOG_TAIL_BYTES))
        return printable(self._log.read().decode("utf-8", "backslashreplace").strip())

    def close(self) -> None:
        """Ends the process; safe to repeat."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()


# --- the process ----------------------------------------------------------------------------------------------------


def main() -> int:
    """Loads the encoder, then measures what it is asked for, until its standard input ends."""
    # What libraries print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)

    def answer(message: Mapping[str, object]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    order = json.loads(sys.stdin.readline())
    fields = order["encoding"] | {"buckets": tuple(Bucket(**bucket) for bucket in order["encoding"]["buckets"])}
    # Compiling takes longer than what is measured here.
    encoding = EncodingConfig(**fields | {"compile": False})
    device = torch.device(order["device"])
    torch.set_num_threads(order["cores"])
    try:
        encoder = ClipEncoder(encoding, device)
    except UsageError as error:
        answer({"error": str(error)})
        return 2
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    start_s = time.time() - psutil.Process().create_time()
    answer({"model": asdict(encoder.facts), "device_name": name, "start_s": start_s, "slowdown": _slowdown()})
    for line in sys.stdin:
        request = json.loads(line)
        if "captions" in request:
            try:
                answer(_embedding(request, device, encoding.compute_dtype_on(device.type), order["cores"]))
            except UsageError as error:
                answer({"error": str(error)})
            continue
        clips = [_clip(frames) for frames in np.load(request["frames"])]
        measure = _on_cpu if device.type == "cpu" else _on_gpu
        answer({"s_per_clip": measure(encoder, clips, order["num_at_once"], fields, request["patience_s"])})
    return 0


def _slowdown() -> float:
    """As in `EncoderFacts`, of this process until now; 1 where the kernel does not tell."""
    try:
        ran_ns, waited_ns, _ = map(int, _SCHEDULED.read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return 1.0
    return 1.0 + waited_ns / ran_ns if ran_ns else 1.0


def _clip(frames: npt.NDArray[np.uint8]) -> Clip:
    num_frames, height_px, width_px, _ = frames.shape
    facts = VideoFacts(
        width_px=width_px, height_px=height_px, num_frames=num_frames, fps=None, duration_s=None, codec="", decoder=""
    )
    return Clip(
        key="",
        clip_index=0,
        bucket=Bucket(width_px=width_px, height_px=height_px, num_frames=num_frames),
        frames=frames,
        frame_times_s=np.zeros(num_frames),
        start_s=0.0,
        end_s=0.0,
        fps=None,
        crop=(0, 0, width_px, height_px),
        facts=facts,
        caption="",
        fields={},
        source_uri="",
    )


def _on_cpu(
    encoder: ClipEncoder, clips: Sequence[Clip], num_at_once: int, _: Mapping[str, Any], patience_s: float
) -> float:
    def encode(number: int) -> None:
        for _ in encoder.encode([clips[number % len(clips)]]):
            continue

    began = time.perf_counter()
    encode(0)
    alone_s = time.perf_counter() - began
    # What one encoder call takes at its peak, every other one will take as well.
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    at_once = max(1, min(num_at_once, psutil.virtual_memory().available // (2 * peak_bytes)))
    rounds_s: list[float] = []
    with ThreadPoolExecutor(at_once) as pool:
        while len(rounds_s) < _NUM_ROUNDS:
            # Neighbours slow each other down, at worst to one after the other.
            expected_s = rounds_s[-1] if rounds_s else alone_s * at_once
            if time.perf_counter() - began + expected_s > patience_s:
                break
            started = time.perf_counter()
            list(pool.map(encode, range(at_once)))
            rounds_s.append(time.perf_counter() - started)
    return median(rounds_s) if rounds_s else alone_s


def _on_gpu(encoder: ClipEncoder, clips: Sequence[Clip], _: int, fields: Mapping[str, Any], patience_s: float) -> float:
    size = batch_size(clips[0].bucket, fields["batch_frames"], "cuda")
    began = time.perf_counter()
    measured_s = 0.0
    for num_batches in (1, _NUM_ROUNDS, 4 * _NUM_ROUNDS):
        started = time.perf_counter()
        # More than one batch, so that copies go beside the computing as they do in an actor.
        for _record in encoder.encode(clips[number % len(clips)] for number in range(num_batches * size)):
            continue
        measured_s = (time.perf_counter() - started) / (num_batches * size)
        if time.perf_counter() - began + 4 * _NUM_ROUNDS * size * measured_s > patience_s / 2:
            break
    return measured_s


def _embedding(request: Mapping[str, Any], device: torch.device, compute_dtype: str, cores: int) -> dict[str, float]:
    """The fields of `EmbeddingFacts`."""
    text, image = TextEncoderConfig(**request["text"]), ImageEncoderConfig(**request["image"])
    about = device, compute_dtype, cores
    began = time.perf_counter()
    texts = TextEncoder(text, *about) if text.text_encoder is not None else None
    frames = ImageEncoder(image, *about) if image.image_encoder is not None else None
    load_s = time.perf_counter() - began
    patience_s = request["patience_s"] / 2
    s_per_text = bytes_per_text = s_per_frame = bytes_per_frame = 0.0
    if texts is not None:
        captions = request["captions"]
        at_once = 1 if device.type == "cpu" else len(captions)
        s_per_text, bytes_per_text = _each(
            lambda some: (found.embedding for found in texts.embed(some)), captions, at_once, patience_s
        )
    if frames is not None:
        first_frames = list(np.load(request["first_frames"]))
        s_per_frame, bytes_per_frame = _each(frames.embed, first_frames, frames.batch_size, patience_s)
    return {
        "load_s": load_s,
        "s_per_text": s_per_text,
        "bytes_per_text": bytes_per_text,
        "s_per_frame": s_per_frame,
        "bytes_per_frame": bytes_per_frame,
    }


def _each(
    embed: Callable[[Sequence[Any]], Iterable[npt.NDArray[np.floating]]],
    rows: Sequence[Any],
    at_once: int,
    patience_s: float,
) -> tuple[float, float]:
    """Seconds and bytes of one embedding."""
    began = time.perf_counter()
    measured: list[tuple[float, int, int]] = []
    for some in (rows[:at_once], *(rows[start : start + at_once] for start in range(0, len(rows), at_once))):
        started = time.perf_counter()
        found = list(embed(some))
        measured.append((time.perf_counter() - started, len(found), sum(embedding.nbytes for embedding in found)))
        if time.perf_counter() - began > patience_s:
            break
    # The first warms up, and counts only where there was no time for a second.
    seconds, number, num_bytes = map(sum, zip(*(measured[1:] or measured), strict=True))
    return seconds / number, num_bytes / number
