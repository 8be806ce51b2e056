"""Who holds which task, without Ray: the actors of lost nodes are made up here. Whole runs are in tests/integration."""

from __future__ import annotations

from typing import Any

import pytest

from jobs import encode_text
from jobs.encode_text import _Hands
from pipeline.errors import LatentmillError
from pipeline.records import FileStat
from pipeline.text_actors import TextTask


class _Method:
    """A remote method: each call is a reference of its own."""

    def remote(self, *_: Any) -> object:
        return object()


class _Actor:
    def __init__(self) -> None:
        self.start = self.cover = _Method()


def _task(name: str) -> TextTask:
    base = FileStat(key=f"data/{name}", content="parquet", num_bytes=1, num_rows=1, sha256=name)
    return TextTask(record=name, shard_id=name, base=base)


def _started(num_actors: int, names: str) -> tuple[_Hands, list[_Actor], list[TextTask]]:
    actors, tasks = [_Actor() for _ in range(num_actors)], [_task(name) for name in names]
    hands = _Hands(actors, tasks)
    for reference in list(hands.calls):
        hands.ready.append(hands.calls.pop(reference).actor)
    return hands, actors, tasks


def _held(hands: _Hands, actor: _Actor) -> list[TextTask | None]:
    return [call.task for call in hands.calls.values() if call.actor is actor]


def test_each_actor_gets_its_first_task_before_any_its_second() -> None:
    hands, actors, (a, b, c) = _started(2, "abc")
    hands.hand_out()
    assert [_held(hands, actor) for actor in actors] == [[a, c], [b]]


def test_what_an_actor_holds_for_long_is_given_to_one_that_has_nothing_and_counts_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hands, (frozen, idle), (a, b) = _started(2, "ab")
    hands.hand_out()
    hands.calls = {reference: call for reference, call in hands.calls.items() if call.actor is frozen}
    assert hands.ends(b)
    hands.hand_out()
    assert _held(hands, idle) == []
    monkeypatch.setattr(encode_text, "_PATIENCE_S", -1.0)
    hands.hand_out()
    assert _held(hands, frozen) == _held(hands, idle) == [a]
    hands.hand_out()
    assert _held(hands, idle) == [a]
    assert hands.ends(a)
    assert not hands.has_work
    assert not hands.ends(a)


def test_a_task_whose_actors_are_lost_goes_to_others_and_ends_undone_after_three() -> None:
    hands, (first, *others), (a,) = _started(4, "a")
    hands.lose(first)
    assert [hands.gives_again(a) for _ in range(3)] == [True, True, False]
    assert hands.ready == others
    hands.ends(a)
    assert hands.gives_again(a), "what another one did meanwhile is no failure"


def test_the_last_actor_that_is_lost_ends_the_run() -> None:
    hands, (only,), _ = _started(1, "a")
    with pytest.raises(LatentmillError, match="the same command goes on"):
        hands.lose(only)


def test_without_a_task_one_actor_starts_so_that_another_encoder_is_refused() -> None:
    hands = _Hands([_Actor()], [])
    assert hands.has_work
    hands.ready.append(next(iter(hands.calls.values())).actor)
    assert not hands.has_work
