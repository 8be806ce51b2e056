"""Tensors that come from DataLoader workers through memory that is used again: nobody sees another batch in his own."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.handover import _MAX_BUFFERS, empty

SHAPE = (2, 3, 5)


class Made(IterableDataset[Any]):
    """Whatever a function gives, one after the other, in a worker."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        return self._make()


def from_workers(make: Callable[[], Iterator[Any]], num_workers: int = 1, **options: Any) -> DataLoader[Any]:
    return DataLoader(Made(make), batch_size=None, num_workers=num_workers, multiprocessing_context="fork", **options)


def filled(value: float, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return empty(shape, dtype).fill_(value)


def counted(num: int) -> Iterator[torch.Tensor]:
    return (filled(number) for number in range(num))


def test_outside_of_a_worker_a_tensor_is_an_ordinary_one() -> None:
    tensor = empty(SHAPE, torch.float16)
    assert type(tensor) is torch.Tensor
    assert (tensor.shape, tensor.dtype, tensor.is_shared()) == (SHAPE, torch.float16, False)


def test_batches_that_are_kept_keep_their_values_however_many_there_are() -> None:
    num = 2 * _MAX_BUFFERS + 5
    kept = list(from_workers(lambda: counted(num)))
    assert all(type(tensor) is torch.Tensor for tensor in kept)
    assert [tensor.unique().tolist() for tensor in kept] == [[number] for number in range(num)]


def test_batches_that_are_dropped_give_their_memory_to_later_ones() -> None:
    places = set()
    for number, tensor in enumerate(from_workers(lambda: counted(100))):
        assert tensor.unique().tolist() == [number]
        places.add(tensor.data_ptr())
    assert len(places) <= _MAX_BUFFERS


def test_any_part_of_a_batch_that_is_kept_keeps_its_memory() -> None:
    parts = [tensor[1, 2] for tensor in from_workers(lambda: counted(50))]
    gc.collect()
    assert [part.unique().tolist() for part in parts] == [[number] for number in range(50)]


def test_several_workers_and_epochs_share_no_memory() -> None:
    loader = from_workers(lambda: counted(20), num_workers=2, persistent_workers=True)
    for _ in range(3):
        last: list[torch.Tensor] = []
        for turn, tensor in enumerate(loader):
            last = [*last[-3:], tensor]
            numbers = [of_turn // 2 for of_turn in range(turn - len(last) + 1, turn + 1)]
            assert [kept.unique().tolist() for kept in last] == [[number] for number in numbers]


def test_two_loaders_at_once_share_no_memory() -> None:
    both = zip(from_workers(lambda: counted(30)), from_workers(lambda: (-t for t in counted(30))), strict=True)
    for number, (one, other) in enumerate(both):
        assert (one.unique().tolist(), other.unique().tolist()) == ([number], [-number])


def test_shapes_and_types_of_all_sizes_arrive() -> None:
    expected = [(1.5, (4, 5, 6), torch.float32), (3, (7,), torch.int64), (1, (3, 2), torch.bool), (2.5, (), torch.half)]
    expected.append((0.5, (3, 40_000), torch.float64))

    def made() -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(10):
            yield {str(number): filled(*entry) for number, entry in enumerate(expected)} | {
                "none": empty((0, 4), torch.half)
            }

    for batch in from_workers(made):
        for number, (value, shape, dtype) in enumerate(expected):
            assert torch.equal(batch[str(number)], torch.full(shape, value, dtype=dtype))
        assert batch["none"].shape == (0, 4)


def test_what_a_worker_makes_and_never_sends_leaves_its_memory_for_others() -> None:
    def made() -> Iterator[torch.Tensor]:
        for number in range(3 * _MAX_BUFFERS):
            filled(-1)
            yield filled(number)

    places = {tensor.data_ptr() for tensor in from_workers(made)}
    assert len(places) <= _MAX_BUFFERS


def test_what_a_worker_keeps_for_itself_is_not_overwritten() -> None:
    def made() -> Iterator[torch.Tensor]:
        kept = []
        for number in range(3 * _MAX_BUFFERS):
            tensor = filled(number)
            kept.append(tensor[0])
            yield tensor
        yield torch.stack(kept)

    *_, last = from_workers(made)
    assert [row.unique().tolist() for row in last] == [[number] for number in range(3 * _MAX_BUFFERS)]


def test_a_tensor_may_be_sent_again() -> None:
    def made() -> Iterator[torch.Tensor]:
        tensor = filled(7)
        for _ in range(4):
            yield tensor
            yield filled(8)

    assert [tensor.unique().tolist() for tensor in from_workers(made)] == [[7.0], [8.0]] * 4


def test_what_is_made_of_it_in_the_worker_is_an_ordinary_tensor() -> None:
    def made() -> Iterator[list[str]]:
        assert get_worker_info() is not None
        tensor = filled(3)
        assert type(tensor) is not torch.Tensor
        saved = io.BytesIO()
        torch.save(tensor, saved)
        saved.seek(0)
        others = [tensor + 1, tensor[0], tensor.clone(), copy.deepcopy(tensor), copy.copy(tensor)]
        others += [pickle.loads(pickle.dumps(tensor)), torch.load(saved), tensor.half(), torch.stack([tensor, tensor])]
        yield [f"{type(other) is torch.Tensor} {other.unique().tolist()}" for other in others]

    (found,) = from_workers(made)
    assert found == ["True [4.0]"] + ["True [3.0]"] * 8


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_was_forked_meanwhile_gives_nothing_back() -> None:
    batches = iter(from_workers(lambda: counted(40)))
    held = next(batches)
    child = os.fork()
    if child == 0:
        del held
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert [tensor.unique().tolist() for tensor in batches] == [[number] for number in range(1, 40)]
    assert held.unique().tolist() == [0]
