"""Requests that a pipeline can announce."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from gpucache_pipes.cache import Numbers
from gpucache_pipes.files import PathList
from gpucache_pipes.units import positive_int


class Upcoming:
    """Paths in the order in which a pipeline will request them. Iterates over the paths.

        >>> upcoming = Upcoming(["a.pt", "b.pt"], order=[1, 0, 1], left=2)
        >>> list(upcoming), len(upcoming)
        (['b.pt', 'a.pt', 'b.pt'], 3)

    Args:
        files: all files.
        order: for each request to come, the position of its file in `files`; or a function that
            returns this, which is called in any thread, when it is needed first.
        left: how many of these requests belong to the current epoch; the others are of the next.

    Raises:
        ValueError: a position beyond the files, or `left` beyond the order.
    """

    def __init__(
        self,
        files: Sequence[str] | PathList,
        order: Iterable[int] | Callable[[], Iterable[int]],
        left: int,
    ) -> None:
        self.files = files if isinstance(files, PathList) else PathList.here(list(files))
        self.left = positive_int("left", left, least=0)
        self._draw: Callable[[], Iterable[int]] | None = None
        if callable(order):
            self._draw = order
        else:
            self._set_order(order)

    @property
    def order(self) -> Numbers:
        """For each request to come, the position of its file."""
        if self._draw is not None:
            self._set_order(self._draw())
            self._draw = None
        return self._order

    def _set_order(self, order: Iterable[int]) -> None:
        if not isinstance(order, np.ndarray):
            order = np.fromiter(order, np.intp)
        self._order: Numbers = order
        count = len(self.files.paths)
        if len(order) and not 0 <= order.min() <= order.max() < count:
            raise ValueError(
                f"order has positions from {order.min()} to {order.max()}, but there are "
                f"{count} files"
            )
        if self.left > len(order):
            raise ValueError(f"left={self.left} must be from 0 to {len(order)}, all requests")

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[str]:
        return map(self.files.paths.__getitem__, self.order.tolist())
