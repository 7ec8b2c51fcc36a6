"""Where the bytes of features are in host memory, as copies for native code."""

import numpy as np

from gpucache_pipes.cache import Cache, Numbers, runs_of
from gpucache_pipes.store.columns import FeatureColumns


def moves_of(cache: Cache, features: FeatureColumns, page_bytes: int, offsets: Numbers) -> Numbers:
    """Copies of features that have pages to where they go, int64 [n, 3].

    Takes no lock: the features are pinned.

    Args:
        cache: has their entries.
        features: what is copied.
        page_bytes: the size of a page.
        offsets: where each goes.

    Returns:
        For each copy its first byte among the pages, where it goes, and how many bytes it has. Runs
        of pages are copied whole, but for the end of the last page of a feature.
    """
    entries, layouts = cache.entries, cache.layouts
    numbers = np.array(features.numbers, np.intp)
    places = entries.place[numbers]
    counts = layouts.pages[layouts.of_places(places)]
    first, lengths = runs_of(places, counts, numbers, entries.scattered)
    feature = np.repeat(np.arange(len(numbers)), _runs_each(counts, lengths))
    begins = np.cumsum(lengths) - lengths
    before = np.concatenate([[0], np.cumsum(counts)])[:-1][feature]
    within = (begins - before) * page_bytes
    nbytes = np.minimum(lengths * page_bytes, features.spans[feature] - within)
    return np.stack([first * page_bytes, offsets[feature] + within, nbytes], axis=1)


def _runs_each(counts: Numbers, lengths: Numbers) -> Numbers:
    """How many runs of pages each feature has, whose runs have these lengths, end to end."""
    ends = np.cumsum(counts)
    of_runs = np.cumsum(lengths)
    before = np.searchsorted(of_runs, ends - counts, side="right")
    after = np.searchsorted(of_runs, ends, side="right")
    return after - before
