"""Rows that have arrived from other ranks, and the batch that they are."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpucache_pipes.batches import FeatureBatch, PageBatch
from gpucache_pipes.device import Backend, ExchangeStream
from gpucache_pipes.files import Layout, LoadedFeature, PathLike
from gpucache_pipes.peers.message import Contents

Upload = Callable[[LoadedFeature, str], torch.Tensor]
"""The bytes of a feature on the device, uint8, a multiple of ALIGNMENT; its path is for errors."""


class Arrival:
    """The rows of one batch of this rank.

    Args:
        block: uint8, [bytes]; holds the rows of all senders.
        mark: when it had arrived, on the stream.
        stream: on which it arrived.
        starts: [rows], where each begins in the block, in bytes, in the order of the batch.
        sizes: [rows], how many bytes of the block each takes.
        contents: of the rows, in the order of the batch.
    """

    def __init__(
        self, block: torch.Tensor, mark: Any, stream: ExchangeStream, starts: NDArray[np.int64],
        sizes: NDArray[np.int64], contents: Contents,
    ) -> None:  # fmt: skip
        self._block = block
        self._mark = mark
        self._stream = stream
        self._starts = starts
        self._sizes = sizes
        self._contents = contents

    @property
    def failed(self) -> list[int]:
        """The positions of rows that their owners could not send."""
        failed: list[int] = np.flatnonzero(self._contents.which < 0).tolist()
        return failed

    def batch(self, backend: Backend, paths: Sequence[PathLike], rows: slice) -> FeatureBatch:
        """The batch of some rows, all of which have come, with these paths.

        On a device, the rows are copied to a new block, by one operation on the current stream. On
        the host they stay where they have arrived.
        """
        layouts, which, values = self._contents
        which, starts, sizes = which[rows], self._starts[rows], self._sizes[rows]
        values = values[rows] if values else []
        used = set(which.tolist())
        of_rows = [layouts[n] for n in (used if len(used) == 1 else which.tolist())]
        if backend.memory_is_host():
            return PageBatch(backend.device, paths, of_rows, values, self._block, starts)
        with self._stream.taking(self._block, self._mark):
            block = _selected(self._block, starts, sizes, backend)
        return PageBatch(
            backend.device, paths, of_rows, values, block, [*accumulate(sizes.tolist(), initial=0)]
        )

    def mended(
        self, backend: Backend, paths: Sequence[PathLike], positions: Sequence[int],
        others: Mapping[int, LoadedFeature], upload: Upload,
    ) -> FeatureBatch:  # fmt: skip
        """The batch of the rows at these positions, some of which are replaced. One by one.

        Args:
            backend: has the device.
            paths: of the features at `positions`.
            positions: of the rows, in order.
            others: by position, the features that replace rows.
            upload: see Upload.
        """
        layouts: list[Layout] = []
        values: list[tuple[Any, ...]] = []
        pieces: list[torch.Tensor] = []
        with self._stream.taking(self._block, self._mark):
            for at, path in zip(positions, paths, strict=True):
                if at in others:
                    feature = others[at]
                    layouts.append(feature.layout)
                    values.append(feature.values)
                    pieces.append(upload(feature, str(path)))
                    continue
                start = int(self._starts[at])
                layouts.append(self._contents.layouts[int(self._contents.which[at])])
                values.append(self._contents.values[at] if self._contents.values else ())
                pieces.append(self._block[start : start + int(self._sizes[at])])
            block = torch.cat(pieces) if pieces else self._block[:0].clone()
        starts = [*accumulate(map(len, pieces), initial=0)]
        return PageBatch(backend.device, paths, layouts, values, block, starts)


def _selected(
    block: torch.Tensor, starts: NDArray[np.int64], sizes: NDArray[np.int64], backend: Backend
) -> torch.Tensor:
    """Stretches of a block end to end, by one operation."""
    unit = math.gcd(int(np.gcd.reduce(starts, initial=0)), int(np.gcd.reduce(sizes, initial=0)))
    if not unit or not sizes.any():
        return block.new_empty(0)
    unit = math.gcd(unit, len(block))
    counts = sizes // unit
    ends = np.cumsum(counts)
    rows = np.arange(ends[-1]) + np.repeat(starts // unit - ends + counts, counts)
    # By the widest elements: copying is by element, and rows are aligned to them.
    words = block.view(torch.complex128).view(-1, unit // torch.complex128.itemsize)
    chosen = words.index_select(0, backend.index(rows))
    return chosen.view(-1).view(torch.uint8)
