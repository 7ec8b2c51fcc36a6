"""What a lister knows of the order to come."""

from array import array
from collections.abc import Iterable, Iterator, Sequence


class Upcoming:
    """Paths in the order in which they will be requested; iterates over them.

    Attributes:
        files: all files.
        order: for each request to come, the position of its file among them.
        left: how many of these requests belong to the epoch under way; the others are of the next.
    """

    def __init__(self, files: Sequence[str], order: Iterable[int], left: int) -> None:
        self.files = files
        self.order = array("i", order)
        self.left = left

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[str]:
        return map(self.files.__getitem__, self.order)
