"""Videos and images to clips: a pool of decode children that are watched, killed and replaced.

Not where a file is opened: decoders run in `decode_child` processes only, never in this one, which holds the GPU. A
child that stays silent is killed, a child that dies takes one file with it at most, and both are tried once more in a
fresh child before the file is rejected. Called by `actors`.

A clip's frames are copied out of the memory file that a child shares with its parent, so that a killed child leaves
nothing behind, a clip in use pins nothing of a child, and no child can change a clip of an earlier video. The copy is
one to three hundredths of the time that decoding takes; memory mapped anew for every clip costs five times as much.
"""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.metadata
import json
import logging
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from pipeline import sandbox
from pipeline.config import DecodeLimits, EncodingConfig
from pipeline.cutting import choose_bucket, clip_spans
from pipeline.decode_child import MAX_MESSAGE_BYTES
from pipeline.errors import DecodeChildError, printable
from pipeline.records import REASONS, Bucket, Clip, ClipFailure, SourceVideo, VideoFacts
from pipeline.store import Steps

__all__ = ["DecodePool", "choose_bucket", "clip_spans", "decoder_versions"]

_log = logging.getLogger(__name__)

# Clips of one decode() call that wait to be taken, whatever the bucket.
_WAITING_BYTES = 128 << 20
# Files handed out ahead of the one whose clips are being taken, per child: short ones hide behind a long one.
_FILES_AHEAD_PER_CHILD = 4
_START_TIMEOUT_S = 120.0
_START_ATTEMPTS = 3
# Children lost at one place of a file before what is left of it is rejected. SIGKILL comes from outside (from an
# operator, or from the kernel where memory is short), so that it says little of the file.
_MOST_LOSSES = 2
_MOST_KILLS = 6
# Opening reads the whole file, some of it inside decord without a sign of life.
_SLOWEST_READ_BYTES_PER_S = 20e6
_POLL_S = 0.2
_LOG_TAIL_BYTES = 4096
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from pipeline.decode_child import main; main(sys.argv[2:])"
)


def decoder_versions() -> dict[str, str]:
    """Versions of the decoders that children load, by package, without loading them here."""
    versions = {}
    for package in ("decord", "decord2", "av", "pillow"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


class _StoppedError(Exception):
    """The caller wants no more clips."""


class _ChildLostError(Exception):
    """A child died, stayed silent or broke its protocol; it has been killed.

    Args:
        reason: one of `records.REASONS`.
        message: what happened, the same for the same file every time.
        details: for the log: with the process and its last words.
        is_killed: somebody else sent it SIGKILL.
    """

    def __init__(self, reason: str, message: str, details: str, *, is_killed: bool = False) -> None:
        super().__init__(reason, message, details)
        self.reason = reason
        self.message = message
        self.details = details
        self.is_killed = is_killed


class _Child:
    """One decode child and the parent's end of everything shared with it.

    Starting one must happen in a thread that lives as long as the child: the kernel sends the death signal that a
    child asks for when the thread that started it ends.
    """

    def __init__(self, encoding: EncodingConfig, limits: DecodeLimits) -> None:
        self.num_videos = 0
        self._limits = limits
        self._buckets = encoding.buckets
        memory_bytes = max(_times_offset(bucket) + 8 * bucket.num_frames for bucket in encoding.buckets)
        self._memory_fd = os.memfd_create("latentmill-clip", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._log_fd = os.memfd_create("latentmill-decode-log", os.MFD_CLOEXEC)
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            os.ftruncate(self._memory_fd, memory_bytes)
            # A child that shrank the file could make reads of it fail; one that grew it could take memory.
            fcntl.fcntl(self._memory_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            fcntl.fcntl(self._log_fd, fcntl.F_SETFL, os.O_APPEND)
            handed = (theirs.fileno(), self._memory_fd, os.getpid(), limits.decode_memory_bytes)
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _START, json.dumps(sys.path), *map(str, handed)],
                stdin=subprocess.DEVNULL,
                stdout=self._log_fd,
                stderr=self._log_fd,
                pass_fds=handed[:2],
                env=_child_environment(),
            )
        except BaseException:
            self._close_files()
            raise
        finally:
            theirs.close()
        self._poll = select.poll()
        self._poll.register(self._connection, select.POLLIN)
        try:
            answer = self.ask(_configuration(encoding, limits), _START_TIMEOUT_S)
        except _ChildLostError as lost:
            self._close_files()
            raise DecodeChildError(f"a decode child did not start: {lost.details}") from lost
        self.sandbox: Mapping[str, object] = answer["sandbox"]

    def open(self, video: SourceVideo, first_clip: int, stop: Callable[[], bool]) -> dict[str, Any]:
        """The child's first answer to a file: "opened" or "rejected"."""
        self.num_videos += 1
        request = {"op": "open", "media_kind": video.media_kind, "first_clip": first_clip}
        patience_s = self._limits.decode_timeout_s + video.num_bytes / _SLOWEST_READ_BYTES_PER_S
        return self.ask(request, patience_s, stop, video.media_fd)

    def next(self, stop: Callable[[], bool]) -> dict[str, Any]:
        """The next answer: "clip", "rejected" or "end"."""
        return self.ask({"op": "next"}, self._limits.decode_timeout_s, stop)

    def ask(
        self,
        request: Mapping[str, object],
        patience_s: float,
        stop: Callable[[], bool] = lambda: False,
        descriptor: int | None = None,
    ) -> dict[str, Any]:
        """Sends a request and waits for its answer, as long as the child shows signs of life.

        Raises:
            _ChildLostError: it died, was silent for `patience_s`, ran out of memory, or said something else.
            DecodeChildError: its decoders are not those that it was written for.
            _StoppedError: `stop` became true.
        """
        asked_s = time.monotonic()
        try:
            descriptors = [] if descriptor is None else [descriptor]
            socket.send_fds(self._connection, [json.dumps(request).encode("ascii")], descriptors)
            while True:
                answer = self._receive(patience_s, stop)
                if answer["type"] == "out_of_memory":
                    self.kill()
                    raise self._lost("out_of_memory", "no memory was left", str(answer["message"]))
                if answer["type"] == "incomplete":
                    self.kill()
                    said = printable(str(answer["message"]))
                    raise DecodeChildError(f"a decoder is incomplete ({said}); install the versions of constraints.txt")
                if answer["type"] != "alive":
                    return answer
                # A child says so between frames. One that was taken over may say it for ever.
                if time.monotonic() - asked_s < self._limits.max_decode_cpu_s:
                    Steps.note()
        except ConnectionError as error:
            raise self._death() from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self.broken("the conversation broke off", str(error)) from error

    def broken(self, what: str, why: str = "") -> _ChildLostError:
        """Ends the child because it does not keep to the protocol; returns the error to raise."""
        self.kill()
        return self._lost("decoder_crash", what, why)

    def _receive(self, patience_s: float, stop: Callable[[], bool]) -> dict[str, Any]:
        silent_until_s = time.monotonic() + patience_s
        while not self._poll.poll(_POLL_S * 1000):
            if stop():
                raise _StoppedError
            if time.monotonic() > silent_until_s:
                self.kill()
                raise self._lost("timeout", f"silent for {patience_s:.1f} s, killed")
        data = self._connection.recv(MAX_MESSAGE_BYTES)
        if not data:
            raise self._death()
        answer = json.loads(data)
        if not isinstance(answer, dict):
            raise ValueError(f"answer {data[:40]!r}")
        return answer

    def _death(self) -> _ChildLostError:
        try:
            status = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            status = None
        self.kill()
        log = self._log_tail()
        if status == -signal.SIGXCPU:
            return self._lost(
                "timeout", f"it computed for longer than --max-decode-cpu-s {self._limits.max_decode_cpu_s:g}"
            )
        if status is not None and status < 0:
            how = f"ended by {signal.Signals(-status).name}"
        else:
            how = f"ended with exit status {status}"
        # C++ code has no other way to say that an allocation failed.
        is_memory = any(name in log for name in ("bad_alloc", "MemoryError", "Cannot allocate memory"))
        is_killed = status == -signal.SIGKILL
        return self._lost("out_of_memory" if is_memory else "decoder_crash", how, is_killed=is_killed)

    def read_clip(self, answer: Mapping[str, Any], video: SourceVideo) -> Clip:
        """The clip of an answer, its frames copied out of the shared memory.

        Raises:
            _ChildLostError: the answer does not describe a clip; a taken-over child may say anything.
        """
        try:
            bucket = self._buckets[int(answer["bucket"])]
            frames = np.empty((bucket.num_frames, bucket.height_px, bucket.width_px, 3), dtype=np.uint8)
            times_s = np.empty(bucket.num_frames, dtype=np.float64)
            self._copy(frames, 0)
            self._copy(times_s, _times_offset(bucket))
            x, y, width, height = map(int, answer["crop"])
            return Clip(
                key=video.key,
                clip_index=int(answer["clip_index"]),
                bucket=bucket,
                frames=frames,
                frame_times_s=times_s,
                start_s=float(answer["start_s"]),
                end_s=float(answer["end_s"]),
                fps=None if answer["fps"] is None else float(answer["fps"]),
                crop=(x, y, width, height),
                facts=VideoFacts(**answer["facts"]),
                caption=video.caption,
                fields=video.fields,
                source_uri=video.source_uri,
            )
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise self.broken("its clip makes no sense", str(error)) from error

    def _copy(self, target: np.ndarray[Any, Any], offset: int) -> None:
        rest = target.reshape(-1).data.cast("B")
        while rest:
            num_read = os.preadv(self._memory_fd, [rest], offset)
            rest, offset = rest[num_read:], offset + num_read

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends the child at once and waits for it; safe to repeat. Its log stays readable until `close`."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Ends the child and gives back everything shared with it; safe to repeat."""
        self.kill()
        self._close_files()

    def _close_files(self) -> None:
        self._connection.close()
        for descriptor in (self._memory_fd, self._log_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self._memory_fd = self._log_fd = -1

    def _log_tail(self) -> str:
        size = os.fstat(self._log_fd).st_size
        tail = os.pread(self._log_fd, _LOG_TAIL_BYTES, max(0, size - _LOG_TAIL_BYTES))
        return printable(tail.decode("utf-8", "backslashreplace"))

    def _lost(self, reason: str, what: str, why: str = "", *, is_killed: bool = False) -> _ChildLostError:
        """The error of a lost child; `what` is the same for the same file every time, and goes into the output."""
        details = f"decode child {self._process.pid}: {what}"
        if why:
            details += f": {printable(why)}"
        if log := self._log_tail().strip():
            details += f"; its log ends: {log}"
        _log.warning("%s", details)
        return _ChildLostError(reason, what, details, is_killed=is_killed)


def _times_offset(bucket: Bucket) -> int:
    """Where the frame times of a clip begin in the shared memory, behind its frames."""
    return -(-bucket.num_bytes // 8) * 8


def _child_environment() -> dict[str, str]:
    """All that a child sees of the environment: no credentials, one thread a library, what Python needs to start."""
    needed = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    # decord appends to PATH when it is imported and fails where there is none.
    return {"PATH": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LC_ALL": "C.UTF-8", **needed}


def _configuration(encoding: EncodingConfig, limits: DecodeLimits) -> dict[str, object]:
    return {
        "cut": {
            "buckets": [(b.width_px, b.height_px, b.num_frames) for b in encoding.buckets],
            "fps": encoding.fps,
            "clips_per_video": encoding.clips_per_video,
            "clip_stride": encoding.clip_stride,
            "upscale": encoding.upscale,
        },
        "limits": dataclasses.asdict(limits),
    }


class _File:
    """One entry of the input on its way through the pool, and the clips of it that wait to be taken.

    Attributes:
        entries: clips and failures in order, then None; or an exception to raise in the caller.
    """

    def __init__(self, most_waiting: int) -> None:
        self.entries: queue.Queue[Clip | ClipFailure | BaseException | None] = queue.Queue(most_waiting)
        self.work: Future[None] | None = None
        self.media_fd: int | None = None


class DecodePool:
    """Decode children shared by the calls of `decode`, which may run in several threads at once.

    Each call has up to `num_processes` children of its own, so that a call whose clips nobody takes cannot keep
    another from going on; over all calls no more than `num_processes` of them compute at any moment.

    Raises:
        DecodeChildError: a child does not start here.
    """

    def __init__(self, encoding: EncodingConfig, limits: DecodeLimits, num_processes: int) -> None:
        self._encoding = encoding
        self._limits = limits
        self._num_processes = num_processes
        self._closed = False
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._busy: set[_Child] = set()
        self._permits = threading.BoundedSemaphore(num_processes)
        # Children are started by a thread that lives as long as the pool, see _Child.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="decode-starter")
        first = self.take_child()
        self._sandbox = dict(first.sandbox)
        self.give_back(first)
        tell = _log.info if sandbox.is_tight(self._sandbox) else _log.warning
        tell("decode children are kept in by: %s", sandbox.in_words(self._sandbox))

    def sandbox_report(self) -> dict[str, object]:
        """What a child could not do when it started, as `sandbox.enter` says it, and its memory limit."""
        return dict(self._sandbox)

    def decode(self, videos: Iterable[SourceVideo | ClipFailure]) -> Iterator[Clip | ClipFailure]:
        """The clips of each video in order, videos in the order of the input; failures in the input pass through.

        Owns and closes `media_fd` of every video that it takes from the iterator, also when it is closed early. A
        bounded number of videos is taken ahead and a bounded number of bytes of clips waits.

        Yields:
            a Clip, or a ClipFailure with a reason of `records.REASONS`; clip_index None only when nothing else came
            of the video.

        Raises:
            DecodeChildError: children cannot be started any more, or the pool is closed.
        """
        stop = threading.Event()
        most_files = _FILES_AHEAD_PER_CHILD * self._num_processes
        largest = max(bucket.num_bytes for bucket in self._encoding.buckets)
        most_waiting = max(1, _WAITING_BYTES // most_files // largest)
        window: deque[_File] = deque()
        source = iter(videos)
        at_end = False
        workers = ThreadPoolExecutor(self._num_processes, thread_name_prefix="decode")
        try:
            while True:
                # One more for each entry given away; more only while there is nothing to give.
                room = 1
                while not at_end and room > 0 and len(window) < most_files:
                    video = next(source, None)
                    if video is None:
                        at_end = True
                    else:
                        window.append(self._enter(video, most_waiting, workers, stop))
                        room = 1 if window[0].entries.empty() else 0
                if not window:
                    return
                entry = window[0].entries.get()
                if entry is None:
                    window.popleft()
                elif isinstance(entry, BaseException):
                    raise entry
                else:
                    yield entry
        finally:
            stop.set()
            workers.shutdown(wait=True, cancel_futures=True)
            for file in window:
                if file.media_fd is not None and file.work is not None and file.work.cancelled():
                    os.close(file.media_fd)

    def close(self) -> None:
        """Ends every child. Calls of `decode` that still run raise DecodeChildError."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for child in self._busy:
                child.kill()
        for child in idle:
            child.close()
        self._starter.shutdown(wait=True)

    def take_child(self) -> _Child:
        """An idle child, or a fresh one. It is the caller's until `give_back` or `discard`.

        Raises:
            DecodeChildError: none can be started, or the pool is closed.
        """
        while True:
            with self._lock:
                if self._closed:
                    raise DecodeChildError("the decode pool is closed")
                child = self._idle.pop() if self._idle else None
                if child is not None:
                    self._busy.add(child)
            if child is None:
                return self._starter.submit(self._start_child).result()
            if child.is_alive():
                return child
            self.discard(child)

    def refuse_if_closed(self) -> None:
        """Tells a child that was lost by itself from one that `close` has killed.

        Raises:
            DecodeChildError: the pool is closed.
        """
        with self._lock:
            if self._closed:
                raise DecodeChildError("the decode pool is closed")

    def _start_child(self) -> _Child:
        try:
            child = self._new_child()
        except OSError as error:
            raise DecodeChildError(f"a decode child cannot be started with {sys.executable}: {error}") from error
        with self._lock:
            self._busy.add(child)
            if self._closed:
                child.kill()
        return child

    def _new_child(self) -> _Child:
        for _ in range(_START_ATTEMPTS - 1):
            # What kills a child may as well strike while it starts; only what strikes every time is a broken set-up.
            with suppress(DecodeChildError):
                return _Child(self._encoding, self._limits)
        return _Child(self._encoding, self._limits)

    def give_back(self, child: _Child) -> None:
        """Makes a child idle, or ends it when it has decoded its share of files."""
        with self._lock:
            keeps = not self._closed and child.num_videos < self._limits.videos_per_child
            if keeps:
                self._busy.discard(child)
                self._idle.append(child)
        if not keeps:
            self.discard(child)

    def discard(self, child: _Child) -> None:
        """Ends a child."""
        with self._lock:
            self._busy.discard(child)
        child.close()

    @contextmanager
    def permit(self, stop: Callable[[], bool]) -> Iterator[None]:
        """Held while a child computes, and never while its clips wait to be taken."""
        while not self._permits.acquire(timeout=_POLL_S):
            if stop():
                raise _StoppedError
        try:
            yield
        finally:
            self._permits.release()

    def _enter(
        self, video: SourceVideo | ClipFailure, most_waiting: int, workers: ThreadPoolExecutor, stop: threading.Event
    ) -> _File:
        if isinstance(video, ClipFailure):
            file = _File(2)
            file.entries.put(video)
            file.entries.put(None)
            return file
        file = _File(most_waiting)
        file.media_fd = video.media_fd
        try:
            file.work = workers.submit(self._work, video, file, stop)
        except BaseException:
            os.close(video.media_fd)
            raise
        return file

    def _work(self, video: SourceVideo, file: _File, stop: threading.Event) -> None:
        """Runs in a worker thread: decodes one file to its end and closes it."""

        def put(entry: Clip | ClipFailure | BaseException | None) -> None:
            while True:
                if stop.is_set():
                    raise _StoppedError
                try:
                    return file.entries.put(entry, timeout=_POLL_S)
                except queue.Full:
                    continue

        try:
            try:
                _FileInWork(self, video, put, stop.is_set).run()
                put(None)
            except _StoppedError:
                raise
            except BaseException as error:
                put(error)
        except _StoppedError:
            pass
        finally:
            os.close(video.media_fd)


class _FileInWork:
    """One file being decoded, by one child after another if need be."""

    def __init__(
        self,
        pool: DecodePool,
        video: SourceVideo,
        put: Callable[[Clip | ClipFailure], None],
        stop: Callable[[], bool],
    ) -> None:
        self._pool = pool
        self._video = video
        self._put = put
        self._stop = stop
        self._next_clip = 0
        self._num_clips = 0
        self._num_losses = self._num_kills = 0  # since the last clip

    def run(self) -> None:
        """Puts every clip and failure of the file. Children lost again and again at one place end the file there."""
        while True:
            child = self._pool.take_child()
            try:
                self._go_on(child)
            except _ChildLostError as lost:
                self._pool.discard(child)
                self._pool.refuse_if_closed()
                self._num_kills += lost.is_killed
                self._num_losses += not lost.is_killed
                if self._num_losses == _MOST_LOSSES or self._num_kills == _MOST_KILLS:
                    number = self._num_kills if lost.is_killed else self._num_losses
                    return self._give_up(lost.reason, f"{number} times, the last time: {lost.message}")
            except BaseException:
                self._pool.discard(child)
                raise
            else:
                return self._pool.give_back(child)

    def _go_on(self, child: _Child) -> None:
        with self._pool.permit(self._stop):
            answer = child.open(self._video, self._next_clip, self._stop)
        if answer["type"] == "rejected":
            return self._give_up(*_rejection(child, answer))
        num_clips = answer.get("num_clips")
        if answer["type"] != "opened" or not isinstance(num_clips, int):
            raise child.broken("it was asked to open a file and answered otherwise", str(answer))
        self._num_clips = num_clips
        while self._next_clip < self._num_clips:
            with self._pool.permit(self._stop):
                answer = child.next(self._stop)
            if answer.get("clip_index") != self._next_clip:
                raise child.broken(f"it was asked for clip {self._next_clip} and answered otherwise", str(answer))
            if answer["type"] == "clip":
                entry: Clip | ClipFailure = child.read_clip(answer, self._video)
            else:
                entry = self._failure(self._next_clip, *_rejection(child, answer))
            self._put(entry)
            self._next_clip += 1
            self._num_losses = self._num_kills = 0

    def _give_up(self, reason: str, message: str) -> None:
        """Rejects the file, or what is left of it when some of its clips have been given away."""
        if self._next_clip == 0:
            return self._put(self._failure(None, reason, message))
        for clip_index in range(self._next_clip, self._num_clips):
            self._put(self._failure(clip_index, reason, message))

    def _failure(self, clip_index: int | None, reason: str, message: str) -> ClipFailure:
        return ClipFailure(
            key=self._video.key,
            clip_index=clip_index,
            step="decode",
            reason=reason,
            message=message,
            source_uri=self._video.source_uri,
        )


def _rejection(child: _Child, answer: Mapping[str, Any]) -> tuple[str, str]:
    """Reason and message of a rejection; a taken-over child may say anything."""
    reason, message = answer.get("reason"), answer.get("message")
    if reason not in REASONS or not isinstance(message, str):
        raise child.broken("its rejection makes no sense", str(answer))
    return str(reason), printable(message)
