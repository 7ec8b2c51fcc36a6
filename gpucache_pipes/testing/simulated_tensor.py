"""Tensors in the memory of the simulated device; see `testing.simulated`."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_flatten

from gpucache_pipes.testing.ordering import Interval


class Dispatcher(Protocol):
    """Who queues the operations on tensors."""

    def dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Issue an operation."""

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host, after waiting for it."""


class SimulatedTensor(torch.Tensor):
    """A tensor in simulated device memory: operations on it are queued on the current stream.

    What gives values to the host (`item`, `tolist`, `cpu`, `torch.equal`) waits for the stream.
    """

    content: torch.Tensor
    runtime: Dispatcher
    # The piece of memory that it lies in; a number is never used twice.
    memory: int
    # The numbers in an index, which the host has written: so the rows that it names are known.
    numbers: Sequence[int] | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, content: torch.Tensor, runtime: Dispatcher, memory: int) -> "SimulatedTensor":
        """A view of `content`, which holds what the device has done so far."""
        tensor: SimulatedTensor = torch.Tensor._make_wrapper_subclass(
            cls, content.shape, content.stride(), content.storage_offset(), dtype=content.dtype,
            device=content.device,
        )  # fmt: skip
        tensor.content = content
        tensor.runtime = runtime
        tensor.memory = memory
        tensor.numbers = None
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(kind not in (cls, torch.Tensor, torch.nn.Parameter) for kind in types):
            # Another subclass holds tensors like this one, as a nested tensor does: it takes the
            # operation apart, and comes back with what is to be done to these.
            return NotImplemented
        runtime = next(
            leaf.runtime
            for leaf in tree_flatten((args, kwargs))[0]
            if isinstance(leaf, SimulatedTensor)
        )
        return runtime.dispatch(func, args, kwargs or {})

    def tolist(self) -> Any:
        """The values, after waiting for them."""
        return self.runtime.to_host(self).tolist()

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The values in host memory, after waiting for them."""
        return self.runtime.to_host(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SimulatedTensor(shape={list(self.shape)}, dtype={self.dtype})"


def intervals_of(tensor: SimulatedTensor, rows: Sequence[int] | None = None) -> list[Interval]:
    """The bytes of a tensor, or of some of its rows."""
    real, size = tensor.content, tensor.content.itemsize
    if not real.numel():
        return []
    start = int(real.storage_offset()) * size
    if rows is None and real.is_contiguous():
        return [(tensor.memory, start, start + real.numel() * size)]
    if not real.ndim:
        return [(tensor.memory, start, start + size)]
    sides = zip(real.shape[1:], real.stride()[1:], strict=True)
    length = size * (1 + sum((side - 1) * stride for side, stride in sides))
    step = int(real.stride(0)) * size
    return [
        (tensor.memory, start + row * step, start + row * step + length)
        for row in (range(real.shape[0]) if rows is None else rows)
    ]
