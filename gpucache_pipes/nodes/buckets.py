"""Buckets: batches of files of similar size, so that padding them to one length costs little."""

import logging
import zlib
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpucache_pipes.files import Samples, file_size

_log = logging.getLogger("gpucache_pipes")

_MOST_BATCHES = 50
"""Batches in a window. More make the lengths in a batch more similar, and the batches of different
epochs too."""


class Buckets:
    """Groups the order of an epoch into batches of files of similar size.

    A shuffled order is cut into windows of up to 50 batches, at least two windows where there are
    two batches. The files of each window are sorted by size and cut into batches, and then all
    batches are shuffled. So any two files may meet in a batch, while the lengths in it are
    similar. The remainder that is too small for a batch stays at the end of the order, and is as
    random as it was. An order that is not shuffled is sorted by size as a whole.

    Args:
        sizes: of the files: any numbers, such as bytes or lengths.
        batch_size: files per batch.

    Attributes:
        checksum: of all sizes; with other sizes, batches are others.

    >>> Buckets([30, 10, 20, 40], batch_size=2).group(np.arange(4), None)
    array([1, 2, 0, 3])
    """

    def __init__(self, sizes: Sequence[float], batch_size: int) -> None:
        held = array("d", sizes)
        self._sizes = torch.frombuffer(held, dtype=torch.float64)
        self._batch_size = batch_size
        self.checksum = zlib.crc32(held)

    @classmethod
    def of(
        cls,
        paths: Sequence[Any],
        by: str | Callable[[Any], float],
        batch_size: int,
        size_of: Callable[[str], int] = file_size,
    ) -> "Buckets":
        """Buckets by the sizes of files.

        Args:
            paths: of all files; or samples of several files.
            by: "file_size", of a sample that of all its files; or a function path or sample ->
                number. A file whose size cannot be read counts as empty, which is logged; the
                request of its batch will raise the error.
            batch_size: files per batch.
            size_of: the size of a file in bytes. Raises OSError or ValueError.

        Raises:
            ValueError: any other `by`.
            TypeError: if the function returns something that is not a number.
        """
        if by == "file_size":
            if isinstance(paths, Samples):
                sizes = np.array(_file_sizes(paths.paths, size_of)).reshape(len(paths.parts), -1)
                return cls(sizes.sum(0).tolist(), batch_size)
            return cls(_file_sizes(paths, size_of), batch_size)
        if not callable(by):
            raise ValueError(f'bucket_by={by!r} must be "file_size" or a function of the path')
        given = []
        for path in paths:
            size = by(path)
            try:
                given.append(float(size))
            except (TypeError, ValueError) as error:
                raise TypeError(f"bucket_by gave {size!r} for {path!r}, not a number") from error
        return cls(given, batch_size)

    def __str__(self) -> str:
        return f"batch_size={self._batch_size}"

    def group(self, order: NDArray[np.intp], random: torch.Generator | None) -> NDArray[np.intp]:
        """The same positions in a new order, in which every `batch_size` of them are a batch.

        Args:
            order: positions in the list of files.
            random: shuffles the batches; None if the order is not shuffled.
        """
        positions = torch.from_numpy(order)
        if random is None:
            return self._by_size(positions).numpy()
        whole = len(positions) // self._batch_size
        window = max(1, min(_MOST_BATCHES, whole // 2)) * self._batch_size
        full = whole * self._batch_size
        grouped, rest = positions[:full], positions[full:]
        batches = torch.cat([self._by_size(part) for part in grouped.split(window)])
        drawn = torch.randperm(whole, generator=random, device="cpu")
        return torch.cat([batches.view(-1, self._batch_size)[drawn].flatten(), rest]).numpy()

    def _by_size(self, positions: torch.Tensor) -> torch.Tensor:
        return positions[self._sizes[positions].argsort(stable=True)]


def _file_sizes(paths: Sequence[str], size_of: Callable[[str], int]) -> list[int]:
    sizes, failed = [], []
    for path in paths:
        try:
            sizes.append(size_of(path))
        except (OSError, ValueError) as error:  # ValueError: no name that the system could have
            sizes.append(0)
            failed.append(error)
    if failed:
        _log.warning(
            "the sizes of %d of %d files are not known to bucket_by: %s",
            len(failed), len(paths), failed[0],
        )  # fmt: skip
    return sizes
