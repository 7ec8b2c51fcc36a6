"""The invariants of a cache, recomputed."""

import numpy as np

from gpucache_pipes.cache.cache import Cache
from gpucache_pipes.cache.entries import NOWHERE
from gpucache_pipes.cache.places import scattered_among
from gpucache_pipes.cache.states import ABSENT, BYPASSED, LOADING, READY, counts_as_cached


def check_cache(cache: Cache) -> None:
    """Recompute every total and look at every entry; raises AssertionError on a difference.

    The ground truth is the state and the place of each entry. Takes time in proportion to the
    number of known files.
    """
    entries, layouts = cache.entries, cache.layouts
    known = np.arange(entries.count)
    state, place = entries.state[: entries.count], entries.place[: entries.count]
    held = np.flatnonzero(place != NOWHERE)
    _require(np.array_equal(known[state > LOADING], held), "a state does not agree with its place")

    used = layouts.of_places(place[held])
    _require(bool((used < len(layouts)).all()), "a place has an unknown layout")
    counted = np.bincount(used, minlength=len(layouts))
    _require(np.array_equal(counted, layouts.uses[: len(layouts)]), "layouts are miscounted")
    known_layouts = {layouts.layouts[number] for number in set(used.tolist())}
    _require(None not in known_layouts, "a layout in use was forgotten")
    pages = cache.pages_of(held)
    _, scattered = scattered_among(pages, layouts.pages[used])
    expected = {int(held[at]): these.tolist() for at, these in scattered.items()}
    actual = {number: these.tolist() for number, these in entries.scattered.items()}
    _require(expected == actual, "scattered entries are not those that are")
    _require(expected.keys() == set(held[place[held] < 0].tolist()), "a place is the wrong kind")

    cached = counts_as_cached(state[held])
    sums = layouts.sums(used[cached])
    totals = {
        "cached_items": int(cached.sum()),
        "cached_pages": sums[0],
        "charged_bytes": sums[1],
        "cached_bytes": sums[2],
        "bypassed_pages": layouts.sums(used[~cached])[0],
    }
    cache.ledger.check(pages, totals)

    loading = int(((state > ABSENT) & (state < READY)).sum())
    _require(cache.loading == loading, f"{cache.loading} != {loading} entries are loading")
    bypassed = np.flatnonzero(state == BYPASSED)
    _require(cache.bypassed == len(bypassed), f"{cache.bypassed} != {len(bypassed)} are bypassed")
    unneeded = set(bypassed.tolist()) - cache.pins.numbers()
    _require(not unneeded, f"bypassed entries that no batch needs: {sorted(unneeded)[:5]}")
    ended = [number for number in cache.left_over() if not ABSENT < state[number] < READY]
    _require(not ended, f"remembered as loading: {ended[:5]}")
    for number in (*entries.values, *entries.versions):
        _require(state[number] >= READY, f"values of an entry that is {state[number]}")
    _require(not (place[state == LOADING] != NOWHERE).any(), "a LOADING entry has pages")

    _require(len(entries.paths) == entries.count, "paths are not one for each entry")
    for file, versions in entries.files_with_versions():
        newer = [number for number in versions if number in entries.newer]
        latest = entries.latest(file)
        _require({entries.newer[number] for number in newer} <= {latest}, "two latest versions")
        _require(sorted([*newer, latest]) == sorted(versions), f"versions of {file} are lost")
        _require({entries.file(number) for number in versions} == {file}, "a version of another")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(f"cache: {what}")
