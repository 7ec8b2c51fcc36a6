"""Tensors in the memory of the simulated device; see `testing.simulated`."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_flatten

from gpucache_pipes.testing.ordering import Interval
from gpucache_pipes.testing.simulated_memory import Allocation


class Dispatcher(Protocol):
    """What a simulated tensor needs from the runtime that queues its operations."""

    def dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Issue an operation; as `torch.Tensor.__torch_dispatch__`."""

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host, after the host has waited for the current stream."""


class SimulatedTensor(torch.Tensor):
    """A tensor in simulated device memory: operations on it are queued on the current stream.

    Operations that return values to the host (`item`, `tolist`, `cpu`, `torch.equal`) wait for the
    current stream.

    Attributes:
        content: a real tensor, which holds the results of the operations that have run so far.
        runtime: queues the operations.
        memory: the allocation that the tensor lies in.
        numbers: of an index that the host has written, its values. They tell which rows an
            operation touches before it has run.
    """

    content: torch.Tensor
    runtime: Dispatcher
    memory: Allocation
    numbers: Sequence[int] | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, content: torch.Tensor, runtime: Dispatcher, memory: Allocation
    ) -> "SimulatedTensor":
        """Wrap `content`, which is a part of the allocation `memory`."""
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
            # Another subclass, for example a nested tensor, holds tensors of this class. It splits
            # the operation and dispatches the parts to them.
            return NotImplemented
        runtime = next(
            leaf.runtime
            for leaf in tree_flatten((args, kwargs))[0]
            if isinstance(leaf, SimulatedTensor)
        )
        return runtime.dispatch(func, args, kwargs or {})

    def tolist(self) -> Any:
        """The values, after waiting for the current stream."""
        return self.runtime.to_host(self).tolist()

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A copy in host memory, after waiting for the current stream."""
        return self.runtime.to_host(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SimulatedTensor(shape={list(self.shape)}, dtype={self.dtype})"


def intervals_of(tensor: SimulatedTensor, rows: Sequence[int] | None = None) -> list[Interval]:
    """The bytes of `tensor`, or of some `rows` of it, as byte ranges of its allocation."""
    real, size, memory = tensor.content, tensor.content.itemsize, tensor.memory.number
    if not real.numel():
        return []
    start = int(real.storage_offset()) * size
    if rows is None and real.is_contiguous():
        return [(memory, start, start + real.numel() * size)]
    if not real.ndim:
        return [(memory, start, start + size)]
    sides = zip(real.shape[1:], real.stride()[1:], strict=True)
    length = size * (1 + sum((side - 1) * stride for side, stride in sides))
    step = int(real.stride(0)) * size
    return [
        (memory, start + row * step, start + row * step + length)
        for row in (range(real.shape[0]) if rows is None else rows)
    ]
