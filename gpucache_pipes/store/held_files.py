"""Features that are pinned in another tier while a reader thread copies them."""

from typing import Any

import numpy as np

from gpucache_pipes.cache import Numbers
from gpucache_pipes.files import Layout


class HeldFiles:
    """Features that are pinned in host memory, in columns. See OpenFiles for the methods.

    Attributes:
        numbers: of their entries.
        batch: what pins them.
        versions: of their files, where the store revalidates.
    """

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.batch: int | None = None
        self.versions: list[bytes | None] = []
        self._layouts: list[Layout] = []
        self._which: Numbers = np.empty(0, np.intp)
        self._values: list[tuple[Any, ...]] = []

    def fill(
        self,
        numbers: Numbers,
        layouts: list[Layout],
        which: Numbers,
        values: list[tuple[Any, ...]],
        versions: list[bytes | None],
    ) -> None:
        """Set all columns; values and versions are empty if there are none."""
        self.numbers = numbers.tolist()
        self._layouts, self._which = layouts, which
        self._values, self.versions = values, versions

    def layouts(self) -> tuple[list[Layout], Numbers]:
        """Different layouts, and which of them each feature has."""
        return self._layouts, self._which

    def values(self) -> list[tuple[Any, ...]]:
        """The plain values of each feature; empty if none has any."""
        return self._values

    def bytes_read(self) -> int:
        """Bytes that were read from storage for them."""
        return 0

    def only(self, kept: np.ndarray[Any, Any]) -> "HeldFiles":
        """Those that are marked."""
        some = HeldFiles()
        at = np.flatnonzero(kept).tolist()
        some.fill(
            np.array(self.numbers, np.intp)[kept], self._layouts, self._which[kept],
            [self._values[n] for n in at] if self._values else [],
            [self.versions[n] for n in at] if self.versions else [],
        )  # fmt: skip
        return some

    def without(self, numbers: Any) -> "HeldFiles":
        """Those that do not have these numbers."""
        return self.only(np.array([number not in numbers for number in self.numbers], np.bool_))


def distinct_of(numbers: Numbers) -> tuple[Numbers, Numbers]:
    """The different ones of these numbers, and which of them each is. See cache.distinct."""
    ordered = np.sort(numbers)
    known = ordered[np.diff(ordered, prepend=-1) > 0]
    return known, np.searchsorted(known, numbers)
