"""What the driver decides, without Ray: which actor hangs, which video is poison, when a run is hopeless.

Whole runs on real Ray are in tests/integration. The nodes of other machines are made up here: there is one machine.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import latents
import pytest
from commits import make_commit
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

import pipeline.run as run
from pipeline.actors import ShardReport, WorkerFacts, wanted_of_workers
from pipeline.config import parse_arguments
from pipeline.errors import StorageError, UsageError
from pipeline.metrics import STAGES, RunMetrics
from pipeline.packed import Names, Packed
from pipeline.progress import Crew, Progress
from pipeline.records import Redo, ShardSpec
from pipeline.redo import Retries
from pipeline.run import (
    _Again,
    _Dispatch,
    _HopelessError,
    _Interrupt,
    _Ledger,
    _NotFoundError,
    _Pool,
    _Search,
    _Slot,
    _Task,
    _Wanted,
)

FLAGS = ["--input", "in", "--output", "out", "--model", "small"]


@pytest.mark.parametrize("num_videos", [1, 2, 3, 7, 64, 1000])
def test_the_search_finds_the_one_video_that_kills_wherever_it_is(num_videos: int) -> None:
    for poison in {0, 1, num_videos // 2, num_videos - 1} & set(range(num_videos)):
        search, num_deaths = _Search(), 0
        while search.suspect is None:
            if poison in search.next_part():
                num_deaths += 1
                search.note_death()
            else:
                search.note_survival(num_videos)
        assert search.suspect == poison
        assert num_deaths <= num_videos.bit_length() + 2


@pytest.mark.parametrize("deaths", [set(), {1}, {1, 2, 3}, {4, 6}, {2, 7}])
def test_deaths_of_other_causes_make_no_video_a_poison(deaths: set[int]) -> None:
    search = _Search()

    def go_on(step: int) -> int | None:
        search.note_death() if step in deaths else search.note_survival(16)
        return search.suspect

    with pytest.raises(_NotFoundError):
        assert not any(go_on(step) is not None for step in range(100))


def _spec(number: int) -> ShardSpec:
    return ShardSpec(
        shard_id=f"s{number}",
        source_uri=f"{number}.tar",
        kind="tar",
        plan_key=None,
        source_size_bytes=1,
        source_etag=None,
        num_videos=None,
    )


def _report(spec: ShardSpec) -> ShardReport:
    return ShardReport(
        shard_id=spec.shard_id,
        outcome="committed",
        counts=make_commit().counts,
        num_bytes_in=1,
        num_bytes_out=1,
        timings_s=dict.fromkeys(STAGES, 1.0),
        busy_share=0.5,
    )


def _dispatch(num_shards: int, said: io.StringIO) -> _Dispatch:
    specs = [_spec(number) for number in range(num_shards)]
    retried = Retries(specs=(), num_videos=0, num_spent=0, refused={})
    again = _Again(num_videos_ok={}, changes=(), retried=retried, repaired=())
    planned = Names(spec.shard_id for spec in specs)
    ledger = _Ledger(planned, specs, again, time.monotonic(), parse_arguments(FLAGS), RunMetrics())
    nothing: Any = None
    return _Dispatch(nothing, nothing, ledger, _Interrupt(), Progress("plain", said), nothing, 1.0)


def _hand_out(dispatch: _Dispatch, slot: _Slot) -> _Task:
    """What the next call to an actor would be."""
    spec = dispatch._waiting.first()[0]
    dispatch._waiting.take(spec)
    search = dispatch._searches.get(spec.shard_id)
    return _Task(spec, slot, None if search is None else search.next_part())


def test_shards_are_handed_out_under_the_names_of_the_methods_as_ray_keeps_metrics_of_every_name_for_ever() -> None:
    class Method:
        """A method of an actor that cannot be called under another name: it has no `options`."""

        def __init__(self) -> None:
            self.called_with: list[tuple[Any, ...]] = []

        def remote(self, *arguments: Any) -> object:
            self.called_with.append(arguments)
            return object()

    said = io.StringIO()
    dispatch, actor = _dispatch(2, said), SimpleNamespace(process=Method(), probe=Method())
    slot = _Slot(0, actor, is_ready=True)
    dispatch._pool = SimpleNamespace(slots=[slot])  # type: ignore[assignment]
    first, second = dispatch._ledger.todo
    dispatch._searches[second.shard_id] = run._Search()
    dispatch._hand_to(slot)
    dispatch._hand_to(slot)
    assert [spec for spec, *_ in actor.process.called_with] == [first]
    assert [spec for spec, *_ in actor.probe.called_with] == [second]


def test_of_a_shard_with_two_poisons_both_are_found_and_none_else_within_a_bounded_number_of_deaths() -> None:
    said = io.StringIO()
    dispatch, slot = _dispatch(1, said), _Slot(0, None)
    num_videos, poisons = 40, {7, 33}
    num_deaths = 0
    while True:
        task = _hand_out(dispatch, slot)
        known = dispatch._poison.get("s0", frozenset())
        touched = set(range(num_videos) if task.part is None else task.part) - known
        if touched & poisons:
            num_deaths += 1
            dispatch._note_death(task, "it died")
        elif task.part is None:
            break
        else:
            dispatch._note_survival(task, num_videos)
    assert dispatch._poison["s0"] == poisons
    # Of each poison: the attempts at the whole shard, the halves, and the video alone.
    assert num_deaths <= 2 * (3 + 6 + 2)
    assert "video 7 (from 0) kills the worker every time" in said.getvalue()


def test_a_shard_that_kills_and_has_no_single_video_that_does_is_left_undone() -> None:
    dispatch, slot = _dispatch(1, io.StringIO()), _Slot(0, None)
    while dispatch._ledger.num_left:
        task = _hand_out(dispatch, slot)
        if task.part is None:
            dispatch._note_death(task, "it died")
        else:
            dispatch._note_survival(task, 8)
    assert "not certain that a single video of the shard does it" in dispatch._ledger.undone["s0"]


@pytest.mark.parametrize("num_videos", [1, 2, 9])
@pytest.mark.parametrize("others_work", [False, True])
def test_where_every_video_kills_none_is_poison_unless_workers_encode_other_shards(
    num_videos: int, others_work: bool
) -> None:
    dispatch, slot = _dispatch(1, io.StringIO()), _Slot(0, None)
    while dispatch._ledger.num_left and not dispatch._poison:
        task = _hand_out(dispatch, slot)
        if task.part == range(0):
            dispatch._note_survival(task, num_videos)
        else:
            dispatch._note_death(task, "the driver crashed")
        dispatch._num_encoded = int(others_work)
    assert dispatch._poison == ({"s0": {0}} if others_work else {})
    assert ("s0" in dispatch._ledger.undone) != others_work


@pytest.mark.parametrize("rest_kills", [False, True])
def test_the_first_video_is_poison_only_when_the_rest_of_its_shard_survives(rest_kills: bool) -> None:
    dispatch, slot = _dispatch(1, io.StringIO()), _Slot(0, None)
    parts = []
    while dispatch._ledger.num_left and not dispatch._poison:
        task = _hand_out(dispatch, slot)
        parts.append(task.part)
        if task.part is None or 0 in task.part or (rest_kills and task.part):
            dispatch._note_death(task, "it died")
        else:
            dispatch._note_survival(task, 8)
    assert parts[-1] == range(1, 8)
    assert dispatch._poison == ({} if rest_kills else {"s0": {0}})


def test_videos_that_are_poison_already_do_not_speak_for_a_worker() -> None:
    search = _Search()
    search.note_survival(2)
    search.note_survival(2, frozenset({0}))
    assert not search.has_survived
    search.note_death()
    search.note_death()
    assert (search.suspect, list(search.next_part())) == (1, [])


def test_a_shard_that_only_ever_hangs_is_left_undone_and_no_video_of_it_is_poison() -> None:
    said = io.StringIO()
    dispatch, slot = _dispatch(1, said), _Slot(0, None)
    dispatch._pool = _pool(10, 30)
    num_hangs = 0
    while dispatch._ledger.num_left:
        task = _hand_out(dispatch, slot)
        slot.held.add("s0")
        dispatch._running[object()] = task
        dispatch._end_hanging(slot, "made no step for 31 s")
        num_hangs += 1
    assert (num_hangs, dispatch._searches, dispatch._poison) == (3, {}, {})
    assert dispatch._suspects == {"s0"}
    assert "made no step for 31 s and was killed" in dispatch._ledger.undone["s0"]


def test_a_deadline_in_a_search_is_no_death() -> None:
    dispatch, slot = _dispatch(1, io.StringIO()), _Slot(0, None)
    dispatch._pool, dispatch._num_encoded = _pool(10, 30), 0
    while dispatch._ledger.num_left:
        task = _hand_out(dispatch, slot)
        if task.part is None:
            dispatch._note_death(task, "it died")
        elif task.part:
            dispatch._running[object()] = task
            dispatch._end_hanging(slot, "made no step for 31 s")
        else:
            dispatch._note_survival(task, 8)
    assert not dispatch._poison
    assert "made no step for 31 s" in dispatch._ledger.undone["s0"]


def test_a_retry_of_rejections_that_kills_its_worker_is_not_searched_and_changes_nothing() -> None:
    dispatch, slot = _dispatch(1, io.StringIO()), _Slot(0, None)
    redo = Redo(shard_id="s0", generation=1, replaces=None, keys=("a",))
    while dispatch._ledger.num_left:
        task = _hand_out(dispatch, slot)
        dispatch._note_death(replace(task, spec=replace(task.spec, redo=redo)), "it died")
    assert not dispatch._searches
    assert "attempt 3 of 3 failed" in dispatch._ledger.undone["s0"]


def test_a_run_in_which_nothing_succeeds_any_more_stops_with_the_last_error() -> None:
    dispatch, slot = _dispatch(100, io.StringIO()), _Slot(0, None)
    dispatch._pool = _pool(10, 30)
    for _ in range(12):
        assert dispatch._why_hopeless() is None
        dispatch._note_error(_hand_out(dispatch, slot), "no space left")
    why = str(dispatch._why_hopeless())
    assert re.match(r"12 shards in a row failed.*the same command goes on.*no space left", why)
    dispatch._running[object()] = _hand_out(dispatch, slot)
    dispatch._take_back = lambda _: dispatch._running.clear()  # type: ignore[method-assign]
    with pytest.raises(_HopelessError, match="12 shards"):
        dispatch._work()
    assert not dispatch._running, "what was running was not waited for"
    dispatch._ledger.give_up(why)
    assert (dispatch._ledger.num_left, dispatch._ledger.num_undone) == (0, 100)


def test_attempts_at_the_same_few_shards_and_bad_shards_side_by_side_end_no_run() -> None:
    dispatch, slot = _dispatch(100, io.StringIO()), _Slot(0, None)
    dispatch._pool = _pool(10, 30)
    for _ in range(3):
        for number in range(5):
            dispatch._note_error(_Task(_spec(number), slot, None), "damaged")
    assert dispatch._why_hopeless() is None
    dispatch._note_error(_Task(_spec(5), slot, None), "damaged")
    assert int(dispatch._waiting.first()[0].shard_id[1:]) > 40, "the next shard stands beside the bad ones"


def test_shards_that_nobody_holds_wait_in_their_order_and_those_that_came_back_behind_all_others() -> None:
    specs = [_spec(number) for number in range(1000)]
    waiting = run._Waiting(specs)
    assert waiting.first()[0] == specs[0]
    for number in (1, 0, 2):
        waiting.take(specs[number])
    waiting.put_back(specs[1])
    assert (len(waiting), waiting.first()[0], len(waiting.first())) == (998, specs[3], 100)
    waiting.turn()
    # Half of those that were never looked at, 103 to 999, are passed over.
    assert waiting.first()[0] == specs[103 + 448]
    order = []
    while waiting:
        order.append(waiting.first()[0])
        waiting.take(order[-1])
    numbers = [*range(551, 1000), *range(103, 551), *range(3, 103), 1]
    assert order == [specs[number] for number in numbers]


def test_what_a_run_holds_of_shards_that_are_done_is_tens_of_bytes_of_each() -> None:
    number = 8000
    again = _Again(
        num_videos_ok={}, changes=(), retried=Retries(specs=(), num_videos=0, num_spent=0, refused={}), repaired=()
    )
    specs = Packed(map(_spec, range(number)))
    tracemalloc.start()
    try:
        planned = Names(spec.shard_id for spec in specs)
        ledger = _Ledger(planned, specs, again, time.monotonic(), parse_arguments(FLAGS), RunMetrics())
        waiting = run._Waiting(specs)
        before = tracemalloc.get_traced_memory()[0]
        while waiting:
            spec = waiting.first()[0]
            waiting.take(spec)
            ledger.add(spec, _report(spec), 0)
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert (ledger.num_done, ledger.num_left) == (number, 0)
    # A name alone takes 100 bytes in a set of Python's, the accounts of a shard 1,500.
    assert held < 100 * number
    assert ledger.unseen(spec.shard_id for spec in specs if spec.shard_id != "s7") == ["s7"]


def test_readers_see_a_run_after_a_hundred_shards_and_then_as_it_grows_by_a_tenth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dispatch = _dispatch(2500, io.StringIO())
    dispatch._pool = _pool(10, 30)
    todo, published, trimmed = iter(dispatch._ledger.todo), [], []

    def one_is_done(_: float) -> None:
        spec = next(todo)
        dispatch._ledger.add(spec, _report(spec), 0)

    ledger = dispatch._ledger
    monkeypatch.setattr(run, "_publish", lambda *_: published.append(ledger.num_done))
    monkeypatch.setattr(run, "give_memory_back", lambda: trimmed.append(("published", ledger.num_done)))
    dispatch._trimmer.trim_if_due = lambda: trimmed.append(("looked", ledger.num_done))  # type: ignore[method-assign]
    dispatch._hand_out = lambda: None  # type: ignore[method-assign]
    dispatch._take_back = one_is_done  # type: ignore[method-assign]
    dispatch._work()
    assert published == [*range(100, 1100, 100), 1112, 1236, 1374, 1527, 1697, 1886, 2096, 2329]
    assert [number for what, number in trimmed if what == "published"] == published
    assert [number for what, number in trimmed if what == "looked"] == list(range(1, 2501))


def test_a_run_that_gives_up_names_the_first_shards_that_are_undone_and_counts_all() -> None:
    ledger = _dispatch(1000, io.StringIO())._ledger
    ledger.add(_spec(1), _report(_spec(1)), 0)
    ledger.undone["s10"] = "it is damaged"
    ledger.give_up("the disk is full")
    found = ledger.summary(4, ledger.accounts(tuple), None, True)
    assert (ledger.num_undone, ledger.num_left, found.num_shards_done) == (999, 0, 1)
    assert list(found.undone) == sorted(f"s{number}" for number in range(1000) if number != 1)[:20]
    assert (found.undone["s0"], found.undone["s10"]) == ("the disk is full", "it is damaged")


def test_a_run_in_which_every_attempt_kills_its_worker_stops() -> None:
    dispatch, slot = _dispatch(100, io.StringIO()), _Slot(0, None)
    dispatch._pool = _pool(10, 30)
    num_deaths = 0
    while dispatch._why_hopeless() is None:
        task = _hand_out(dispatch, slot)
        if task.part == range(0):
            dispatch._note_survival(task, 64)
        else:
            dispatch._note_death(task, "out of memory")
            num_deaths += 1
    assert num_deaths == 30
    assert not dispatch._poison
    assert "killed their worker" in str(dispatch._why_hopeless())


def _pool(silence_s: float, stall_s: float) -> _Pool:
    pool = object.__new__(_Pool)  # without actors: only the judgement is looked at
    flags = ["--silence-timeout-s", str(silence_s), "--stall-timeout-s", str(stall_s)]
    pool._looked_s, pool._fitted_s, pool.slots, pool.starting = time.monotonic(), float("inf"), [], {}
    pool._run, pool._awake_s, pool._num_unusable = parse_arguments([*FLAGS, *flags]).run, 100.0, 0
    pool.end_hanging = lambda slot: None  # type: ignore[method-assign]
    return pool


@pytest.mark.parametrize(
    ("slot", "why"),
    [
        ({"has_been_heard": True, "heard_s": 89.0, "stepped_s": 100.0}, "did not answer for 11 s"),
        ({"has_been_heard": True, "heard_s": 99.0, "stepped_s": 69.0, "held": {"s"}}, "made no step for 31 s"),
        ({"has_been_heard": True, "heard_s": 91.0, "stepped_s": 71.0, "held": {"s"}}, None),
        ({"has_been_heard": True, "heard_s": 99.0, "stepped_s": 0.0}, None),  # it has nothing to do
        ({"has_been_heard": False, "heard_s": 71.0}, None),  # it may wait for a place on a node
        ({"has_been_heard": False, "heard_s": 69.0}, "did not answer for 31 s"),
    ],
)
def test_an_actor_hangs_when_it_is_silent_or_holds_shards_and_makes_no_step(
    slot: dict[str, Any], why: str | None
) -> None:
    found = _pool(10, 30)._why_hanging(_Slot(0, None, **slot))
    assert found is None if why is None else why in str(found)


def test_the_pool_follows_the_cluster_where_the_number_of_actors_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said, killed, made = io.StringIO(), [], []
    pool = _pool(10, 30)
    pool._progress, pool._place = Progress("plain", said), (1, 0.0)
    pool._metrics = RunMetrics()

    def add() -> _Slot:
        made.append(slot := _Slot(len(made), f"actor {len(made)}", is_ready=True, has_been_ready=True))
        pool.slots.append(slot)
        return slot

    monkeypatch.setattr(pool, "_add", add)
    monkeypatch.setattr(run.ray, "kill", killed.append)
    room = 3
    monkeypatch.setattr(run, "num_places", lambda *_: room)

    def fit(num_waiting: int) -> list[int]:
        pool._fitted_s = -100.0
        pool.fit(num_waiting)
        return [slot.index for slot in pool.slots]

    assert fit(2) == [0, 1], "no more actors than shards that wait"
    assert fit(9) == [0, 1, 2]
    room = 1
    assert fit(9) == [0, 1, 2], "an actor at work is not taken away"
    made[0].is_ready = made[2].is_ready = False
    pool.starting = {"start of 0": made[0], "start of 2": made[2]}
    assert fit(9) == [1], "what was on a lost node is given up"
    assert (killed, pool.starting) == (["actor 0", "actor 2"], {})
    room = 2
    assert fit(9) == [1, 3]
    assert said.getvalue().count("joins") == 4
    assert said.getvalue().count("its node is gone") == 2
    pool._run = parse_arguments([*FLAGS, "--num-actors", "5"]).run
    room = 9
    assert fit(9) == [1, 3], "a number that was asked for stays"


class _Actor:
    """Stands for an actor that can neither be reached nor started: only what the driver makes of it is looked at."""

    def __init__(self) -> None:
        self.start = self
        self.num_kills = 0

    def remote(self) -> object:
        return object()


def _failing_pool(monkeypatch: pytest.MonkeyPatch, error: Exception) -> _Pool:
    def fail(_: object) -> None:
        raise error

    def kill(actor: _Actor, *, no_restart: bool = True) -> None:
        actor.num_kills += 1

    monkeypatch.setattr(run.ray, "get", fail)
    monkeypatch.setattr(run.ray, "kill", kill)
    pool = _pool(10, 30)
    pool._progress, pool._has_been_ready, pool._odd = Progress("plain", io.StringIO()), False, []
    pool._wanted = _Wanted("the driver", {}, is_binding=False)
    pool.slots, pool.starting = [_Slot(0, _Actor()), _Slot(1, _Actor(), is_ready=True)], {}
    pool._start(pool.slots[0])
    return pool


def test_the_first_start_of_a_run_ends_it_with_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = _failing_pool(monkeypatch, RayTaskError("start", "", UsageError("no such model")))
    with pytest.raises(UsageError, match="no such model"):
        pool.admit(next(iter(pool.starting)))


def test_a_failed_start_in_a_run_that_works_costs_that_actor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = _failing_pool(monkeypatch, RayTaskError("start", "", RuntimeError("no device is left")))
    pool._has_been_ready = True
    broken, healthy = pool.slots
    for _ in range(3):
        assert broken in pool.slots
        assert pool.admit(next(iter(pool.starting))) is None
    assert (pool.slots, pool.starting) == ([healthy], {})
    assert broken.handle.num_kills == 3
    pool._start(healthy)
    for _ in range(2):
        pool.admit(next(iter(pool.starting)))
    with pytest.raises(_HopelessError, match=r"no device is left.*No encoder is left"):
        pool.admit(next(iter(pool.starting)))


def _facts(node: str, decord: str, weights_sha256: str = latents.MODEL.weights_sha256) -> WorkerFacts:
    return WorkerFacts(
        model=replace(latents.MODEL, weights_sha256=weights_sha256),
        columns={},
        device_type="cpu",
        device_name="cpu",
        decoders={"decord": decord},
        sandbox={},
        versions={},
        node=node,
        pid=1,
    )


def test_an_output_is_compiled_for_as_far_as_its_first_actor_was() -> None:
    """Who could not compile differs from who could, and an output that knows nothing of it was made without."""
    compiled = replace(_facts("one", "0.6.0"), is_compiled=True)
    fallen_back = replace(_facts("two", "0.6.0"), compile_error="no compiler")
    wanted = _Wanted("node one", compiled.decides_bytes, is_binding=True)
    assert wanted.differing(fallen_back) == ["torch.compile"]
    config = parse_arguments([*FLAGS, "--compile"])
    asked_for = {}
    for facts in (compiled, fallen_back):
        held = replace(config.encoding, compile=facts.is_compiled).fingerprint_fields("cpu")
        manifest = replace(latents.manifest(), fingerprint_fields=held)
        asked_for[facts.node] = wanted_of_workers(manifest)["torch.compile"]
    assert asked_for == {"one": True, "two": False}


def test_an_actor_on_a_node_with_another_installation_is_not_used_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = _failing_pool(monkeypatch, RayActorError())
    first, other = pool.slots
    facts = _facts("one", "0.6")
    monkeypatch.setattr(run.ray, "get", lambda _: facts)
    assert pool.admit(next(iter(pool.starting))) == facts
    pool._awake_s += 11
    assert "did not answer for 11 s" in str(pool._why_hanging(first)), "that it started was its last sign of life"
    monkeypatch.setattr(run.ray, "get", lambda _: _facts("two", "0.7"))
    said = io.StringIO()
    pool._progress = Progress("plain", said)
    pool._start(other)
    assert pool.admit(next(iter(pool.starting))) is None
    assert pool.slots == [first]
    assert other.handle.num_kills == 1
    assert "on node two is not used: its decoders differ from those of node one" in said.getvalue()

    monkeypatch.setattr(run, "num_places", lambda *_: 2)
    monkeypatch.setattr(pool, "_add", lambda: pytest.fail("an actor joins where one was given up"))
    pool._place, pool._fitted_s = (1, 0.0), -run._FIT_S
    pool.fit(9)
    assert pool.slots == [first]


def _started(
    monkeypatch: pytest.MonkeyPatch, wanted: _Wanted, *nodes: WorkerFacts
) -> tuple[WorkerFacts | None, list[int], str]:
    """What a pool begins with whose actors come up in this order: facts, the actors that stay, what was said."""
    pool, said = _failing_pool(monkeypatch, RayActorError()), io.StringIO()
    pool._progress, pool._crew, pool.slots, pool.starting = Progress("plain", said), "actors", [], {}
    pool.slots = [_Slot(number, _Actor()) for number in range(len(nodes))]
    for slot in pool.slots:
        pool._start(slot)
    found = dict(zip(pool.starting, nodes, strict=True))
    monkeypatch.setattr(run.ray, "get", found.__getitem__)
    monkeypatch.setattr(run.ray, "wait", lambda pending, **_: (pending[:1], pending[1:]))
    facts = pool.start(_Interrupt(), wanted)
    while pool.starting:
        pool.admit(next(iter(pool.starting)))
    assert all(slot.is_ready for slot in pool.slots) or len(pool.slots) == 1
    return facts, [slot.index for slot in pool.slots], said.getvalue()


@pytest.mark.parametrize(
    ("first", "what"), [(_facts("odd", "0.7"), "decoders"), (_facts("odd", "0.6", "0" * 64), "model weights")]
)
@pytest.mark.parametrize("whose", ["the output", "the driver"])
def test_a_first_actor_that_is_the_odd_one_is_left_out_and_the_others_go_on(
    whose: str, first: WorkerFacts, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [_facts("one", "0.6"), _facts("two", "0.6")]
    wanted = _Wanted(whose, good[0].decides_bytes, is_binding=whose == "the output")
    facts, used, said = _started(monkeypatch, wanted, first, *good)
    assert (facts, used) == (good[0], [1, 2])
    assert f"encoder 0 on node odd is not used: its {what} differ from those of" in said


def test_where_no_actor_is_as_the_driver_those_that_most_are_like_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = _Wanted("the driver", {"decoders": {"decord": "0.5"}}, is_binding=False)
    facts, used, said = _started(monkeypatch, wanted, _facts("odd", "0.7"), _facts("one", "0.6"), _facts("two", "0.6"))
    assert facts == _facts("one", "0.6")
    assert used == [1, 2]
    assert "no encoder has the decoders of the driver; used are those of node one" in said
    assert "encoder 0 on node odd is not used: its decoders differ from those of node one" in said


def test_where_no_actor_is_as_the_output_opening_it_is_left_to_say_what_differs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = _Wanted("the output", {"decoders": {"decord": "0.5"}}, is_binding=True)
    facts, used, said = _started(monkeypatch, wanted, _facts("one", "0.6"), _facts("two", "0.6"))
    assert (facts, used) == (_facts("two", "0.6"), [1])
    assert "encoder 0 on node one is not used: its decoders differ from those of the output" in said


def test_an_actor_that_was_killed_while_it_started_is_waited_for_as_one_that_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = _failing_pool(monkeypatch, ActorUnavailableError("The actor is restarting", None))
    late = pool.slots[0]
    _Pool.end_hanging(pool, late)
    for _ in range(run._MAX_FAILED_RETURNS - 1):
        pool.admit(next(iter(pool.starting)))
    assert late in pool.slots
    pool.admit(next(iter(pool.starting)))
    assert late not in pool.slots


@pytest.mark.parametrize(("error", "num_kills"), [(ActorUnavailableError("gone", None), 1), (RayActorError(), 0)])
def test_an_actor_that_is_only_out_of_reach_is_ended_before_its_shards_go_elsewhere(
    error: RayActorError, num_kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch, reference = _dispatch(1, io.StringIO()), object()
    dispatch._pool = _failing_pool(monkeypatch, error)
    slot = dispatch._pool.slots[1]
    dispatch._running[reference] = _hand_out(dispatch, slot)
    dispatch._take(reference)
    assert (slot.is_ready, slot.handle.num_kills) == (False, num_kills)


def test_a_driver_that_was_frozen_itself_blames_no_actor() -> None:
    pool = _pool(10, 30)
    pool.slots, pool._looked_s = [], time.monotonic() - 3600
    assert pool.hanging() == []
    assert pool._awake_s <= 100 + run._LONGEST_LOOK_S


def test_a_storage_error_names_itself_and_a_foreign_error_its_type() -> None:
    assert run._message(StorageError("no space left")) == "no space left"
    assert run._message(OSError("gone")) == "OSError: gone"


def test_the_driver_does_not_wait_for_torch() -> None:
    code = "import sys, pipeline.run; sys.exit('torch' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_workers_are_made_for_the_gpu_that_is_asked_for_and_for_none_where_none_is() -> None:
    asked = parse_arguments([*FLAGS, "--gpus-per-actor", "0.5"])
    assert not run._will_encode_on_cpu(asked)
    assert run._will_encode_on_cpu(parse_arguments([*FLAGS, "--gpus-per-actor", "0"]))


def test_the_start_of_ray_and_of_the_encoders_is_no_part_of_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("pipeline.progress.time.monotonic", lambda: now_s)
    dispatch = _dispatch(4, io.StringIO())
    now_s = 60.0

    def work() -> None:
        nonlocal now_s
        now_s = 70.0
        dispatch._ledger._rate.add(2, 20)
        raise run._HopelessError("seen enough")

    monkeypatch.setattr(dispatch, "_work", work)
    monkeypatch.setattr(dispatch, "_pool", SimpleNamespace(crew=Crew))
    monkeypatch.setattr(run, "record_names", lambda _: ())
    dispatch.until_decided()
    assert dispatch._ledger._rate.rates() == (0.2, 2.0)


def test_an_encoder_whose_node_goes_before_it_is_ready_leaves_its_place_to_the_next_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, said = _failing_pool(monkeypatch, ActorUnavailableError("Socket closed", None)), io.StringIO()
    pool._progress, pool._has_been_ready, pool._place = Progress("plain", said), True, (1, 0.0)
    starting, at_work = pool.slots
    for _ in range(2 * run._MAX_FAILED_STARTS):
        pool.admit(next(iter(pool.starting)))
    assert starting in pool.slots, "it is not known yet that its node is gone"
    joined = _Slot(2, _Actor())
    monkeypatch.setattr(pool, "_add", lambda: joined)
    for fitting in (1, 2):
        monkeypatch.setattr(run, "num_places", lambda *_, fitting=fitting: fitting)
        pool._fitted_s = -run._FIT_S
        pool.fit(9)
        assert pool.slots == [at_work]
    assert "encoder 0 has no place any more: its node is gone" in said.getvalue()
    assert "encoder 2 joins: the cluster has room for 2" in said.getvalue()
