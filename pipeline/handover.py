"""Tensors of a DataLoader worker on their way to the training process, in memory that is used again.

Not where batches are made (`batches`): here is how they travel. PyTorch gives every tensor new shared memory, which the
kernel has to clear and both processes to map, and sends its file descriptor through a socket of its own: more than a
hundred microseconds for a sample that takes ten to read. A buffer from here is sent once. After that only its name
travels, and the training process says by a byte in it that it dropped what was there.

A tensor in a buffer is an ordinary tensor in every other respect: what is made of it, copies and pickles of it know
nothing of the buffer. Where all buffers are in use, and outside of workers, ordinary memory serves.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import get_worker_info

Bytes = npt.NDArray[np.uint8]

# Of a size. DataLoader has two batches of a worker on their way unless it is told otherwise; one is being made, and one
# trained on.
_MAX_BUFFERS = 16
_SMALLEST_BYTES = 1 << 12


class _Loan:
    """One use of a buffer by the worker that it belongs to."""

    def __init__(self) -> None:
        self.is_sent = False
        self.is_over = False


class _Buffer:
    """Shared memory of a worker: the bytes, and one that is 1 while a process uses them.

    Attributes:
        is_known: the training process has it.
    """

    def __init__(self, num_bytes: int) -> None:
        self.name = uuid4().hex
        self.memory = torch.empty(num_bytes + 1, dtype=torch.uint8).share_memory_()
        self.num_bytes = num_bytes
        self.is_known = False
        self._bytes: Bytes = self.memory.numpy()
        self._loan: _Loan | None = None

    @property
    def is_free(self) -> bool:
        """Neither process holds what was in it."""
        return self._loan is None or (self._loan.is_over and not self._bytes[-1])

    def lend(self, num_bytes: int) -> tuple[Bytes, _Loan]:
        """That many of its bytes, for as long as they are held here, or there once they are sent."""
        loan = self._loan = _Loan()
        self._bytes[-1] = 1
        lent = self._bytes[:num_bytes]
        weakref.finalize(lent, _end, loan, self._bytes).atexit = False
        return lent, loan


def _end(loan: _Loan, memory: Bytes) -> None:
    if not loan.is_sent:
        memory[-1] = 0
    loan.is_over = True


class _Lent(torch.Tensor):
    """A tensor in a buffer. What torch makes of it is a plain tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    buffer: _Buffer
    loan: _Loan

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.clone()


# Of this process, by their size.
_buffers: dict[int, list[_Buffer]] = {}


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """As `torch.empty`; in a DataLoader worker in memory that it shares with the training process."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if get_worker_info() is None or not num_bytes:
        return torch.empty(shape, dtype=dtype)
    # Powers of two, so that batches of like size take each other's place; pages that nobody touches cost nothing.
    size = max(_SMALLEST_BYTES, 1 << (num_bytes - 1).bit_length())
    buffers = _buffers.setdefault(size, [])
    buffer = next((buffer for buffer in buffers if buffer.is_free), None)
    if buffer is None:
        if len(buffers) == _MAX_BUFFERS:
            return torch.empty(shape, dtype=dtype)
        buffer = _Buffer(size)
        buffers.append(buffer)
    memory, loan = buffer.lend(num_bytes)
    lent = torch.from_numpy(memory).view(dtype).view(tuple(shape)).as_subclass(_Lent)
    lent.buffer, lent.loan = buffer, loan
    return lent


# In the training process: what workers sent, by name, with the id of the worker.
_received: dict[str, tuple[int, Bytes]] = {}


def _reduced(lent: _Lent) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
    buffer, loan = lent.buffer, lent.loan
    if loan.is_sent:
        # Whoever gets it first may be done with it first.
        found: tuple[Callable[..., torch.Tensor], tuple[Any, ...]] = reduce_tensor(lent.clone())
        return found
    memory = None if buffer.is_known else buffer.memory
    buffer.is_known = loan.is_sent = True
    return _rebuilt, (buffer.name, os.getpid(), memory, tuple(lent.shape), lent.dtype)


ForkingPickler.register(_Lent, _reduced)


def _rebuilt(
    name: str, worker: int, memory: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    if memory is not None:
        for gone in [name for name, (pid, _) in _received.items() if not psutil.pid_exists(pid)]:
            del _received[gone]
        _received[name] = worker, memory.numpy()
    _, buffer = _received[name]
    received = buffer[: math.prod(shape) * dtype.itemsize]
    weakref.finalize(received, _give_back, buffer, os.getpid()).atexit = False
    return torch.from_numpy(received).view(dtype).view(shape)


def _give_back(buffer: Bytes, pid: int) -> None:
    # A process that was forked meanwhile has the tensor too, and has nothing to say of it.
    if os.getpid() == pid:
        buffer[-1] = 0
