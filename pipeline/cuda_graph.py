"""A call on a GPU whose kernels are recorded once and started again as one: a CUDA graph.

Not where it is decided whether that helps: `codec` does it for every bucket where it is asked to, and benchmarks
compare. A GPU starts a recorded call as a whole, where the host needs some microseconds for each kernel: that is what
bounds small models in small batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class RecordedCall:
    """A function of one tensor of a fixed shape, without host work but that of starting one graph.

    The result lies in memory that the next call writes again. Work that reads it and is put on the stream of the caller
    before the next call is safe, as the next call waits for it there.

    Args:
        call: from a tensor like `example` to one tensor; every kernel on the current stream, and nothing in it waits
            for the GPU or depends on values that the host would have to read.
        example: the values that the recording is checked with; any but zeros.
        pool: memory that other recordings use too (`torch.cuda.graph_pool_handle`); none of them may run at once.

    Raises:
        RuntimeError: the call cannot be recorded, or gives other values than when it is not (to the bit).
    """

    def __init__(self, call: Callable[[Tensor], Tensor], example: Tensor, pool: Any) -> None:
        self._input = torch.zeros_like(example)
        # Beforehand and on another stream, as torch asks for: libraries choose kernels then and take their workspaces.
        beside, stream = torch.cuda.Stream(example.device), torch.cuda.current_stream(example.device)
        beside.wait_stream(stream)
        with torch.cuda.stream(beside):
            wanted = call(example)
        stream.wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        # Of this thread alone: others may wait for the GPU meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._output = call(self._input)
        found = self(example)
        if not torch.equal(found, wanted):
            differing = int((found != wanted).sum())
            raise RuntimeError(f"{differing} of {wanted.numel()} values of the recorded call are others than without")

    def __call__(self, x: Tensor) -> Tensor:
        """What `call` gives for x, of the shape and dtype of the example; valid until the next call."""
        self._input.copy_(x, non_blocking=True)
        self._graph.replay()
        return self._output
