"""Features in columns: those of another tier, which are read without Python for each of them."""

from collections.abc import Container
from typing import Any

import numpy as np
import numpy.typing as npt

from gpucache_pipes.cache import Numbers, distinct
from gpucache_pipes.files import Layout


class FeatureColumns:
    """Features of another tier. A `FileGroup`.

    Args:
        numbers: of their entries.
        layouts: different layouts.
        which: which of them each feature has.
        values: the plain values of each feature; empty if none has any.
        versions: of their files, where the store revalidates; else empty.
        at: where the tier has each of them; None is 0, 1, ...
    """

    def __init__(
        self,
        numbers: Numbers,
        layouts: list[Layout],
        which: Numbers,
        values: list[tuple[Any, ...]],
        versions: list[bytes | None],
        at: Numbers | None = None,
    ) -> None:
        self.numbers: list[int] = numbers.tolist()
        self.versions = versions
        self.at = np.arange(len(numbers)) if at is None else at
        self.spans = np.array([layout.span for layout in layouts], np.int64)[which]
        self._layouts = layouts
        self._which = which
        self._values = values

    def layouts(self) -> tuple[list[Layout], Numbers]:
        """See FileGroup."""
        return self._layouts, self._which

    def values(self) -> list[tuple[Any, ...]]:
        """See FileGroup."""
        return self._values

    def bytes_read(self) -> int:
        """See FileGroup."""
        return int(self.spans.sum())

    def only(self, kept: npt.NDArray[np.bool_]) -> "FeatureColumns":
        """Those that are marked."""
        if kept.all():
            return self
        some = np.flatnonzero(kept).tolist()
        return FeatureColumns(
            np.array(self.numbers, np.intp)[kept], self._layouts, self._which[kept],
            [self._values[n] for n in some] if self._values else [],
            [self.versions[n] for n in some] if self.versions else [], self.at[kept],
        )  # fmt: skip

    def without(self, numbers: Container[int]) -> "FeatureColumns":
        """See FileGroup."""
        return self.only(np.array([number not in numbers for number in self.numbers], np.bool_))


class Held:
    """What of a tier is pinned for a reader thread.

    Attributes:
        batch: what pins it; None if nothing is.
        columns: the features.
    """

    def __init__(self) -> None:
        self.batch: int | None = None
        self.columns: FeatureColumns | None = None


def distinct_of(numbers: Numbers) -> tuple[Numbers, Numbers]:
    """The different ones of these numbers, and which of them each is."""
    known = distinct(numbers)
    return known, np.searchsorted(known, numbers)
