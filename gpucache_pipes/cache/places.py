"""Places of features in the arena, by arrays: first pages, runs of pages, all pages."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from gpucache_pipes.cache.entries import PAGE_MASK, Numbers, Pages


def first_pages(places: NDArray[np.int64]) -> Pages:
    """The first page of the feature in each place."""
    return np.where(places < 0, ~places, places) & PAGE_MASK


def scattered_among(pages: Pages, counts: NDArray[np.int64]) -> tuple[Pages, dict[int, Pages]]:
    """The first page of each feature, and the pages of features that do not lie in a row.

    Args:
        pages: of all features, end to end.
        counts: how many of them each feature has.

        >>> scattered_among(np.array([4, 5, 9, 8]), np.array([2, 0, 2]))
        (array([4, 0, 9]), {2: array([9, 8])})
    """
    if len(pages) == len(counts) and counts.all():  # a page each
        return pages, {}
    ends = np.cumsum(counts)
    starts = ends - counts
    first = np.zeros(len(counts), np.int64)
    some = np.flatnonzero(counts)
    first[some] = pages[starts[some]]
    breaks = np.cumsum(np.diff(pages, prepend=pages[:1]) != 1)
    broken = some[breaks[starts[some]] != breaks[ends[some] - 1]]
    return first, {at: pages[starts[at] : ends[at]] for at in broken.tolist()}


def pages_in(
    places: NDArray[np.int64],
    counts: NDArray[np.int64],
    numbers: Numbers,
    scattered: Mapping[int, Pages],
) -> Pages:
    """All pages of the features in these places, end to end.

    Args:
        places: of the features.
        counts: how many pages each of them has.
        numbers: of their entries.
        scattered: the pages of entries that do not lie in a row.
    """
    ends = np.cumsum(counts)
    starts = ends - counts
    total = int(ends[-1]) if len(ends) else 0
    pages: Pages = np.repeat(first_pages(places) - starts, counts) + np.arange(total)
    for at in np.flatnonzero(places < 0).tolist():
        pages[starts[at] : ends[at]] = scattered[int(numbers[at])]
    return pages


def runs_of(
    places: NDArray[np.int64],
    counts: NDArray[np.int64],
    numbers: Numbers,
    scattered: Mapping[int, Pages],
) -> tuple[Pages, NDArray[np.int64]]:
    """The first page and the length of each run of pages of these features, end to end.

    Arguments as for `pages_in`. A feature without pages has no run; one that lies in a row has one.
    """
    if places.min(initial=0) >= 0:
        some = counts > 0
        return (places & PAGE_MASK)[some], counts[some]
    pages = pages_in(places, counts, numbers, scattered)
    begins = np.zeros(len(pages), bool)
    ends = np.cumsum(counts)
    begins[(ends - counts)[counts > 0]] = True
    begins |= np.diff(pages, prepend=-2) != 1
    at = np.flatnonzero(begins)
    return pages[at], np.diff(at, append=len(pages))
