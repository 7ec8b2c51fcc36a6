"""Requests that a pipeline can announce."""

from array import array
from collections.abc import Iterable, Iterator, Sequence

from gpucache_pipes.units import positive_int


class Upcoming:
    """Paths in the order in which a pipeline will request them. Iterates over the paths.

        >>> upcoming = Upcoming(["a.pt", "b.pt"], order=[1, 0, 1], left=2)
        >>> list(upcoming), len(upcoming)
        (['b.pt', 'a.pt', 'b.pt'], 3)

    Attributes:
        files: all files.
        order: for each request to come, the position of its file in `files`.
        left: how many of these requests belong to the current epoch; the others are of the next.

    Raises:
        ValueError: a position beyond the files, or `left` beyond the order.
    """

    def __init__(self, files: Sequence[str], order: Iterable[int], left: int) -> None:
        self.files = files
        self.order = array("i", order)
        self.left = left
        if self.order and not 0 <= min(self.order) <= max(self.order) < len(files):
            raise ValueError(
                f"order has positions from {min(self.order)} to {max(self.order)}, but there are "
                f"{len(files)} files"
            )
        if positive_int("left", left, least=0) > len(self.order):
            raise ValueError(f"left={left} must be from 0 to {len(self.order)}, all requests")

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[str]:
        return map(self.files.__getitem__, self.order)
