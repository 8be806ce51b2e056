"""What is packed is what was put in, in a small part of the memory."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator

import pytest

from pipeline.packed import Names, Packed, PackedSort


def _held_bytes(make: object) -> int:
    """What the thing that `make` gives takes, as Python counts it."""
    assert callable(make)
    tracemalloc.start()
    try:
        kept = make()
        assert len(kept)
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def _addresses(number: int) -> Iterator[str]:
    return (f"s3://bucket/folder/{place:09d}.tar" for place in range(number))


@pytest.mark.parametrize("number", [0, 1, 255, 256, 257, 1000])
def test_a_packed_list_is_the_list(number: int) -> None:
    items = list(range(number))
    packed = Packed(items)
    assert list(packed) == items
    assert packed == items
    assert (len(packed), bool(packed)) == (number, bool(number))
    assert packed[-3:] == items[-3:]
    assert packed[5:600:7] == items[5:600:7]
    assert [packed[place] for place in range(-number, number)] == [*items, *items]
    with pytest.raises(IndexError):
        packed[number]
    packed.append(-1)
    assert packed != items
    assert packed == [*items, -1]


def test_a_list_that_is_read_while_it_grows_gives_what_was_there() -> None:
    packed = Packed(range(300))
    assert packed[256] == 256
    packed.extend(range(300, 600))
    assert (packed[256], packed[511], packed[599]) == (256, 511, 599)


@pytest.mark.parametrize("number", [0, 3, 20_000, 45_000])
@pytest.mark.parametrize("order", ["sorted", "shuffled", "reversed"])
def test_what_is_sorted_in_packed_runs_is_sorted(number: int, order: str) -> None:
    items = [f"{place % 9973} {place}" for place in range(number)]
    items.sort(reverse=order == "reversed")
    if order == "shuffled":
        random.Random(0).shuffle(items)
    taken = PackedSort(items)
    assert list(taken) == sorted(items)
    taken.add("!")
    assert list(taken) == ["!", *sorted(items)], "it takes more after it was read"
    assert taken.packed() == ["!", *sorted(items)]
    assert len(taken) == number + 1
    assert list(PackedSort(items, key=len)) == sorted(items, key=len)


def test_a_set_of_names_has_what_was_put_in_and_nothing_else() -> None:
    names = Names(_addresses(5000))
    assert len(names) == 5000
    assert all(name in names for name in _addresses(5000))
    assert not any(f"{name}.gz" in names for name in _addresses(5000))
    assert not names.add("s3://bucket/folder/000000000.tar")
    assert names.add("no\udcff text")
    assert "no\udcff text" in names
    assert len(names) == 5001


def test_packed_things_take_tens_of_bytes() -> None:
    number = 100_000
    assert _held_bytes(lambda: list(_addresses(number))) > 80 * number
    assert _held_bytes(lambda: Packed(_addresses(number))) < 12 * number
    # 16 bytes of each name, and 4,096 buckets.
    assert _held_bytes(lambda: Names(_addresses(number))) < 30 * number
