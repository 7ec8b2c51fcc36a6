"""The layouts of the features that hold pages, by number."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpucache_pipes.cache.entries import LAYOUT_SHIFT

_MANY = 1024
"""With more layouts than this, the numbers of those that nothing uses are given out again."""


class LayoutTable:
    """A number for each layout, and what a feature of that layout takes of the cache.

    Attributes:
        layouts: by number; opaque to the cache.
        pages, charge, nbytes: of a feature, by the number of its layout: pages that it takes, bytes
            that it counts against the budget, bytes of its tensors. See Ledger.
        uses: how many entries that hold pages have this layout.
    """

    def __init__(self) -> None:
        self.layouts: list[Any] = []
        self._sizes = np.zeros((4, 64), np.int64)
        self.pages, self.charge, self.nbytes, self.uses = self._sizes
        self._numbers: dict[Any, int] = {}
        self._free: list[int] = []
        self._many = _MANY

    def __len__(self) -> int:
        return len(self.layouts)

    def number(self, layout: Any, pages: int, charge: int, nbytes: int) -> int:
        """The number of a layout, and note its sizes."""
        number = self._numbers.get(layout)
        if number is None:
            number = self._free.pop() if self._free else len(self.layouts)
            if number == len(self.layouts):
                self.layouts.append(layout)
                if number == self._sizes.shape[1]:
                    self._sizes = np.concatenate([self._sizes, np.zeros_like(self._sizes)], 1)
                    self.pages, self.charge, self.nbytes, self.uses = self._sizes
            self.layouts[number] = layout
            self._numbers[layout] = number
            self._sizes[:, number] = pages, charge, nbytes, 0
        return number

    def of_places(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the layouts in these places, those of scattered entries included."""
        return np.where(places < 0, ~places, places) >> LAYOUT_SHIFT

    def use(self, numbers: NDArray[np.int64]) -> None:
        """Entries with these layouts have got pages."""
        np.add.at(self.uses, numbers, 1)

    def disuse(self, numbers: NDArray[np.int64]) -> None:
        """Entries with these layouts have given up their pages."""
        np.subtract.at(self.uses, numbers, 1)

    def sums(self, numbers: NDArray[np.int64]) -> Sequence[int]:
        """Pages, charge and bytes of features with these layouts, all together."""
        total: list[int] = self._sizes[:3, numbers].sum(axis=1).tolist()
        return total

    def tidy(self) -> None:
        """Forget unused layouts if there are many. Numbers that nothing uses yet become invalid."""
        if len(self._numbers) > self._many:
            self.forget_unused()
            self._many = max(_MANY, 2 * len(self._numbers))

    def forget_unused(self) -> None:
        """Forget layouts without uses, and their sizes in pages, which may be others from now on.

        Features without bytes may be in use while there are no pages.
        """
        for layout, number in list(self._numbers.items()):
            if not self.uses[number]:
                del self._numbers[layout]
                self.layouts[number] = None
                self._free.append(number)
        if not self._numbers:
            self.layouts.clear()
            self._free.clear()
