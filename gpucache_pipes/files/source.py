"""What the store knows of a file: how to open it, and how its bytes reach their place."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from gpucache_pipes.files.layout import Layout, flatten


class OpenFeature(Protocol):
    """A feature whose layout is known and whose bytes can be asked for, once.

    Attributes:
        layout: how the bytes will lie.
        values: the plain values of the feature, in the order of the layout's tree.
    """

    layout: Layout
    values: tuple[Any, ...]

    @property
    def bytes_read(self) -> int:
        """Bytes that were or will be read from storage for it."""

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers`, which together hold at least `layout.span` writable bytes.

        Called at most once, in the thread that opened the feature, with no lock held. May
        raise what reading raises; the buffers then hold nothing of worth.
        """

    def close(self) -> None:
        """Give back what opening took. Always called, in the same thread."""


Opener = Callable[[str], OpenFeature]
"""Opens the file at an absolute path. Called from reader threads, several at a time."""


class LoadedFeature:
    """A feature that is already in host memory, as `torch.load` or a `load_fn` returns it."""

    def __init__(self, feature: Any, bytes_read: int | None = None) -> None:
        tree, tensors, values = flatten(feature)
        self._tensors = tensors
        self.layout = Layout.of(tree, [(t.dtype, tuple(t.shape)) for t in tensors])
        self.values = tuple(values)
        self.bytes_read = self.layout.nbytes if bytes_read is None else bytes_read

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """See OpenFeature."""
        for tensor, leaf in zip(self._tensors, self.layout.leaves, strict=True):
            if leaf.nbytes:
                dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
                # Not reshape: a tensor of one element is contiguous whatever its stride.
                flat = dense.as_strided((dense.numel(),), (1,))
                spread(flat.view(torch.uint8), leaf.offset, buffers)

    def close(self) -> None:
        """See OpenFeature."""
        self._tensors = []


def spread(source: torch.Tensor, offset: int, buffers: Sequence[memoryview]) -> None:
    """Copy the bytes of `source` to `offset` of the buffers taken as one."""
    done, total = 0, source.numel()
    for buffer in buffers:
        size = len(buffer)
        if offset < size:
            count = min(size - offset, total - done)
            target = torch.frombuffer(buffer, dtype=torch.uint8, count=count, offset=offset)
            target.copy_(source[done : done + count])
            done += count
            if done == total:
                return
            offset = size
        offset -= size
