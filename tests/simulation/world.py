"""A simulated machine room: one object store, one clock, and actors that take turns as a seed says.

Not the protocol: the actors run `pipeline.commit`, `pipeline.collect`, `pipeline.s3` and `pipeline.store` as they
are. What is simulated is below it: the botocore client, the clock, randomness and threads. Every request is a point
where any other actor may go on, where the request or its answer may be lost, where the write may land much later, and
where the actor may be killed or sleep for hours. Everything follows from the seed.
"""

from __future__ import annotations

import base64
import hashlib
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import botocore.exceptions
from greenlet import getcurrent, greenlet

import pipeline.commit
import pipeline.s3
import pipeline.store
from pipeline.s3 import S3Store
from pipeline.store import Pace

ENDPOINT = "http://simulated"
MAX_STEPS = 20_000
_PAUSES_S = (1.0, 30.0, 600.0, 7200.0)
_OUTAGES_S = (20.0, 150.0)
# Shorter than the real one, so that giving up in the middle of an outage is common and costs few requests.
_RETRY_BUDGET_S = 60.0
_T = TypeVar("_T")


class Killed(BaseException):
    """The process of an actor is gone: from here on it can do nothing."""


@dataclass(slots=True)
class Task:
    """An actor's process."""

    name: str
    body: greenlet
    speed: float
    can_be_killed: bool
    wake_at: float = 0.0
    is_killed: bool = False


@dataclass(frozen=True, slots=True)
class Faults:
    """How often what goes wrong, per request."""

    lost: float = 0.0  # request or answer lost, error answers, late writes
    outage: float = 0.0  # for a while no request ends well
    paused: float = 0.0
    killed: float = 0.0


NO_FAULTS = Faults()


@dataclass(slots=True)
class Stored:
    """An object with the moment of its last write."""

    data: bytes
    written_at: float


@dataclass
class World:
    """The state of a schedule.

    Attributes:
        objects: what the store holds, by key.
        written: keys under `commits/`, `snapshots/` and `manifests/` that were written more than once.
        rotten: keys that the world itself damaged or removed.
        violations: promises that were seen broken while the actors ran.
        claims: what actors were told: (kind, name, ...), for the checker.
        trace: one line per request, only when `is_traced`.
    """

    seed: int
    is_traced: bool = False
    objects: dict[str, Stored] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)
    rotten: set[str] = field(default_factory=set)
    violations: list[str] = field(default_factory=list)
    claims: list[tuple[Any, ...]] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)
    faults: Faults = NO_FAULTS
    now: float = 0.0
    outage_until: float = 0.0
    page_keys: int = 1000  # of a listing; what happens between two pages is the interesting part
    num_steps: int = 0
    num_faults: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.store = S3Store("bucket", "")
        self.client = Client(self)
        self.tasks: list[Task] = []
        self.late: list[tuple[float, Callable[[], object]]] = []
        self._main = getcurrent()
        self._current: Task | None = None

    @property
    def current_name(self) -> str:
        return "-" if self._current is None else self._current.name

    def nonce(self) -> str:
        return f"{self.random.getrandbits(64):016x}"

    def spawn(self, name: str, run: Callable[[], object], can_be_killed: bool = True) -> None:
        """Adds an actor; it starts when the scheduler first picks it."""

        def body() -> None:
            try:
                run()
            except Killed:
                pass
            except Exception as error:
                self.violations.append(f"{name} ended by {type(error).__name__}: {error}")

        self.tasks.append(Task(name, greenlet(body), self.random.choice((5.0, 1.0, 1.0, 0.2, 0.03)), can_be_killed))

    def run(self) -> None:
        """Lets the actors take turns until all have ended and nothing is in flight."""
        draw = self.random
        while self.tasks or self.late:
            self.num_steps += 1
            if self.num_steps > MAX_STEPS:
                self.violations.append(f"not at rest after {MAX_STEPS} requests; left: {[t.name for t in self.tasks]}")
                return
            self.now += 0.01
            if self.late:
                self._land()
            ready = [task for task in self.tasks if task.wake_at <= self.now]
            if not ready:
                moments = [task.wake_at for task in self.tasks] + [moment for moment, _ in self.late]
                self.now = max(self.now, min(moments, default=self.now))
                continue
            task = ready[0] if len(ready) == 1 else draw.choices(ready, [task.speed for task in ready])[0]
            self._current = task
            if task.can_be_killed and task.body and draw.random() < self.faults.killed:
                task.is_killed = True
                self.note("killed")
                task.body.throw(Killed)
            else:
                task.body.switch()
            self._current = None
            if task.body.dead:
                self.tasks.remove(task)

    def _land(self) -> None:
        due = [entry for entry in self.late if entry[0] <= self.now]
        if due:
            self.late = [entry for entry in self.late if entry[0] > self.now]
            for _, land in due:
                land()

    def sleep(self, seconds: float) -> None:
        task = self._current
        assert task is not None, "only actors sleep"
        if task.is_killed:
            raise Killed
        task.wake_at = self.now + seconds
        self._main.switch()

    def step(self) -> None:
        """A scheduling point: any other actor may go on here, and this one may sleep for long."""
        paused = self.faults.paused
        self.sleep(self.random.choice(_PAUSES_S) if paused and self.random.random() < paused else 0.0)

    def note(self, text: str) -> None:
        if self.is_traced:
            self.trace.append(f"{self.num_steps:5d} {self.now:10.2f} {self.current_name:14} {text}")

    def write(self, key: str, data: bytes) -> None:
        if key in self.objects and not key.startswith("data/"):
            self.written.append(key)
        self.objects[key] = Stored(data, self.now)

    def rot(self, key: str) -> None:
        """Flips a bit of a file, or loses it."""
        self.rotten.add(key)
        if self.random.random() < 0.5:
            del self.objects[key]
        else:
            data = self.objects[key].data
            self.objects[key].data = data[:-1] + bytes([data[-1] ^ 1])
        self.note(f"rot of {key}")


def _refusal(status: int, code: str, operation: str) -> botocore.exceptions.ClientError:
    answer = {"Error": {"Code": code, "Message": ""}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(answer, operation)


def _no_answer() -> botocore.exceptions.ReadTimeoutError:
    return botocore.exceptions.ReadTimeoutError(endpoint_url=ENDPOINT)


class Client:
    """The requests of botocore that `S3Store` makes, answered by the world."""

    meta = SimpleNamespace(endpoint_url=ENDPOINT)

    def __init__(self, world: World) -> None:
        self._world = world
        self._flipped: set[tuple[str, str]] = set()

    def _fault(self, request: str, key: str, kinds: tuple[str, ...]) -> str | None:
        world = self._world
        world.step()
        fault = None
        if world.faults.outage and world.random.random() < world.faults.outage:
            world.outage_until = world.now + world.random.choice(_OUTAGES_S)
        if world.now < world.outage_until or (world.faults.lost and world.random.random() < world.faults.lost):
            fault = world.random.choice(kinds)
            world.num_faults += 1
        if world.is_traced:
            world.note(f"{request} {key}{'' if fault is None else f' [{fault}]'}")
        return fault

    def get_object(self, *, Bucket: str, Key: str) -> dict[str, Any]:  # noqa: N803
        fault = self._fault("get", Key, ("lost", "lost", "503", "500", "expired", "flip"))
        self._refuse(fault, "GetObject")
        stored = self._world.objects.get(Key)
        if stored is None:
            raise _refusal(404, "NoSuchKey", "GetObject")
        data = stored.data
        # Two damaged answers in a row count as damage at rest; on the way it passes.
        reader = (self._world.current_name, Key)
        if fault == "flip" and Key.startswith("data/") and reader not in self._flipped:
            self._flipped.add(reader)
            data = data[:-1] + bytes([data[-1] ^ 1])
        else:
            self._flipped.discard(reader)
        return {"Body": SimpleNamespace(read=lambda: data)}

    def head_object(self, *, Bucket: str, Key: str) -> dict[str, Any]:  # noqa: N803
        self._refuse(self._fault("head", Key, ("lost", "503", "500")), "HeadObject")
        stored = self._world.objects.get(Key)
        if stored is None:
            raise _refusal(404, "404", "HeadObject")
        return {"ContentLength": len(stored.data), "ETag": ""}

    def list_objects_v2(self, *, Bucket: str, Prefix: str, ContinuationToken: str = "") -> dict[str, Any]:  # noqa: N803
        self._refuse(self._fault("list", f"{Prefix} after {ContinuationToken!r}", ("lost", "503", "500")), "List")
        objects = self._world.objects
        keys = sorted(key for key in objects if key.startswith(Prefix) and key > ContinuationToken)
        page = keys[: self._world.page_keys]
        return {
            "Contents": [{"Key": key, "Size": len(objects[key].data)} for key in page],
            "IsTruncated": len(keys) > len(page),
            "NextContinuationToken": page[-1] if page else "",
        }

    def delete_object(self, *, Bucket: str, Key: str) -> dict[str, Any]:  # noqa: N803
        world = self._world
        fault = self._fault("delete", Key, ("lost", "answer lost", "late", "503", "500"))

        def land() -> None:
            world.objects.pop(Key, None)

        self._carry_out(fault, "DeleteObject", land)
        return {}

    def put_object(
        self,
        *,
        Bucket: str,  # noqa: N803
        Key: str,  # noqa: N803
        Body: Any,  # noqa: N803
        ChecksumSHA256: str,  # noqa: N803
        ContentLength: int | None = None,  # noqa: N803
        IfNoneMatch: str | None = None,  # noqa: N803
    ) -> dict[str, Any]:
        world = self._world
        data = Body if isinstance(Body, bytes) else Body.read()
        is_conditional = IfNoneMatch == "*"
        kinds = ("lost", "answer lost", "late", "503", "500", "500 after", "expired")
        fault = self._fault("create" if is_conditional else "put", Key, (*kinds, *("repeated", "409") * is_conditional))
        if base64.b64encode(hashlib.sha256(data).digest()).decode() != ChecksumSHA256:
            raise _refusal(400, "BadDigest", "PutObject")

        def land() -> None:
            if not is_conditional or Key not in world.objects:
                world.write(Key, data)

        stood = is_conditional and Key in world.objects
        self._carry_out(fault, "PutObject", land)
        # A library between that repeats a create whose answer was lost is told that the object exists.
        if stood or fault == "repeated":
            raise _refusal(412, "PreconditionFailed", "PutObject")
        return {}

    def _carry_out(self, fault: str | None, operation: str, land: Callable[[], None]) -> None:
        world = self._world
        if fault == "late":
            # The client gives up; what it sent is still on its way.
            world.late.append((world.now + world.random.choice(_PAUSES_S), land))
            raise _no_answer()
        self._refuse(fault, operation)
        land()
        if fault == "answer lost":
            raise _no_answer()
        if fault == "500 after":
            raise _refusal(500, "InternalError", operation)

    def _refuse(self, fault: str | None, operation: str) -> None:
        if fault == "lost":
            raise _no_answer()
        if fault == "503":
            raise _refusal(503, "SlowDown", operation)
        if fault == "500":
            raise _refusal(500, "InternalError", operation)
        if fault == "409":
            raise _refusal(409, "ConditionalRequestConflict", operation)
        if fault == "expired":
            raise _refusal(400, "ExpiredToken", operation)


class _OneThread:
    """Takes the place of a thread pool: the simulation has its own idea of who runs when."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> _OneThread:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, function: Callable[..., _T], *arguments: Iterable[Any]) -> Iterator[_T]:
        return map(function, *arguments)


@contextmanager
def simulated(world: World) -> Iterator[None]:
    """Puts the world below the protocol: client, clock, randomness and threads."""
    clock = SimpleNamespace(monotonic=lambda: world.now, sleep=world.sleep)
    pipeline.s3._client = lambda: world.client  # type: ignore[assignment]
    pipeline.s3._answered.add(ENDPOINT)
    pipeline.s3._pace = Pace()
    pipeline.store.time = clock  # type: ignore[assignment]
    pipeline.store.RETRY_BUDGET_S = _RETRY_BUDGET_S
    pipeline.store.random = world.random  # type: ignore[assignment]
    pipeline.commit.ThreadPoolExecutor = _OneThread  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        pipeline.s3._client = _REAL_CLIENT
        pipeline.s3._answered.discard(ENDPOINT)
        pipeline.s3._pace = Pace()
        pipeline.store.time = _REAL_TIME
        pipeline.store.RETRY_BUDGET_S = _REAL_RETRY_BUDGET_S
        pipeline.store.random = random  # type: ignore[assignment]
        pipeline.commit.ThreadPoolExecutor = ThreadPoolExecutor  # type: ignore[misc]


_REAL_CLIENT = pipeline.s3._client
_REAL_TIME = pipeline.store.time
_REAL_RETRY_BUDGET_S = pipeline.store.RETRY_BUDGET_S

_folder = tempfile.TemporaryDirectory(prefix="latentmill-simulation-")
_paths: dict[bytes, Path] = {}


def local_file(data: bytes) -> Path:
    """A local file with these bytes; equal bytes share one, because schedules write the same few again and again."""
    path = _paths.get(data)
    if path is None:
        path = _paths[data] = Path(_folder.name) / str(len(_paths))
        path.write_bytes(data)
    return path
