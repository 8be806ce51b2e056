"""Sequences and sets of millions of small things, in some tens of bytes each where Python's own take hundreds.

Not a database, and nothing is on a disk: the driver of a run holds its plan, the names of what is done and the lines
of a snapshot here. `storage`, `commit`, `plan` and `run` use it. What is alike in neighbours (addresses, sizes) costs
next to nothing once it is compressed; what is random in them (hashes, etags) stays.
"""

from __future__ import annotations

import hashlib
import heapq
import pickle
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

# 29 bytes for a listed file and 39 for a shard's spec at 64, 256 and 1,024 alike, 2 to 4 us to put in or take out.
_BLOCK_ITEMS = 256
# Below that of a list that is sorted in one go.
_RUN_ITEMS = 20_000
_DIGEST_BYTES = 16
_T = TypeVar("_T")


class Packed(Sequence[_T]):
    """A list that only grows, of things that pickle. Going through it in order is cheap, jumping about is not."""

    def __init__(self, items: Iterable[_T] = ()) -> None:
        self._blocks: list[bytes] = []
        self._last: list[_T] = []
        self._open: tuple[int, list[_T]] = (-1, [])  # the block that was read last
        self.extend(items)

    def append(self, item: _T) -> None:
        """Puts one more behind the others."""
        self._last.append(item)
        if len(self._last) == _BLOCK_ITEMS:
            self._blocks.append(zlib.compress(pickle.dumps(self._last, pickle.HIGHEST_PROTOCOL), 1))
            self._last = []

    def extend(self, items: Iterable[_T]) -> None:
        """Puts more behind the others."""
        for item in items:
            self.append(item)

    def __len__(self) -> int:
        return len(self._blocks) * _BLOCK_ITEMS + len(self._last)

    @overload
    def __getitem__(self, place: int) -> _T: ...
    @overload
    def __getitem__(self, place: slice) -> list[_T]: ...
    def __getitem__(self, place: int | slice) -> _T | list[_T]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        return self._block(number // _BLOCK_ITEMS)[number % _BLOCK_ITEMS]

    def __iter__(self) -> Iterator[_T]:
        for number in range(len(self._blocks) + 1):
            yield from self._block(number)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Packed | list | tuple):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def _block(self, number: int) -> list[_T]:
        if number == len(self._blocks):
            return self._last
        if self._open[0] != number:
            self._open = number, pickle.loads(zlib.decompress(self._blocks[number]))
        return self._open[1]


class PackedSort(Generic[_T]):
    """Takes things in any order and gives them sorted, as often as asked."""

    def __init__(self, items: Iterable[_T] = (), *, key: Callable[[_T], Any] | None = None) -> None:
        self._key: Any = key
        self._runs: list[Packed[_T]] = []
        self._new: list[_T] = []
        self._num = 0
        for item in items:
            self.add(item)

    def add(self, item: _T) -> None:
        """Takes one more."""
        self._num += 1
        self._new.append(item)
        if len(self._new) == _RUN_ITEMS:
            self._end_run()

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[_T]:
        self._end_run()
        runs: list[Any] = self._runs
        return iter(runs[0]) if len(runs) == 1 else heapq.merge(*runs, key=self._key)

    def packed(self) -> Packed[_T]:
        """All of them, sorted; call it last."""
        self._end_run()
        return self._runs[0] if len(self._runs) == 1 else Packed(self)

    def _end_run(self) -> None:
        if not self._new:
            return
        self._new.sort(key=self._key)
        before: list[Any] = self._runs[-1][-1:] if self._runs else []
        # What came in order stays one run: object stores list by name.
        if before and sorted([*before, self._new[0]], key=self._key)[0] is before[0]:
            self._runs[-1].extend(self._new)
        else:
            self._runs.append(Packed(self._new))
        self._new = []


class Names(Container[str]):
    """A set of strings of which 128 bits are kept (BLAKE2b): 21 bytes each. It cannot say which ones they are."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._buckets: dict[int, bytearray] = {}
        self._num = 0
        for name in names:
            self.add(name)

    def add(self, name: str) -> bool:
        """Takes one more; False where it is there already."""
        digest = _digest(name)
        bucket = self._buckets.setdefault(_bucket_of(digest), bytearray())
        if digest in bucket:
            return False
        bucket += digest
        self._num += 1
        return True

    def __contains__(self, name: object) -> bool:
        assert isinstance(name, str)
        digest = _digest(name)
        return digest in self._buckets.get(_bucket_of(digest), b"")

    def __len__(self) -> int:
        return self._num


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES).digest()


def _bucket_of(digest: bytes) -> int:
    # 4,096 buckets: few enough to cost nothing, and a search through one of 4 kB takes 0.3 us.
    return digest[0] << 4 | digest[1] >> 4
