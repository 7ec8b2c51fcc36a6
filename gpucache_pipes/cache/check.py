"""The invariants of a cache, recomputed."""

from gpucache_pipes.cache.cache import LAYOUT_SHIFT, Cache
from gpucache_pipes.cache.entry import NOT_READY, SCATTERED, Entry, State


def check_cache(cache: Cache) -> None:
    """Recompute every total and look at every entry; raises AssertionError on a difference.

    Takes time in proportion to the number of known files.
    """
    entries = list(cache.entries.values())
    cache.ledger.check(entries)
    loading = sum(entry.state is State.LOADING for entry in entries)
    if cache.loading != loading:
        raise AssertionError(f"cache: {cache.loading} != {loading} entries are loading")
    for number, entry in cache.entries.items():
        is_latest = cache.entries.latest(entry.file) is entry
        if (
            entry.number != number
            or not _agrees_with_its_state(cache, entry)
            or (entry.waiters and entry.state is not State.LOADING)
            or is_latest == (number in cache.entries.newer)
            or cache.rows[number] != _row(cache, entry)
        ):
            raise AssertionError(f"cache: inconsistent {entry!r}")


def _agrees_with_its_state(cache: Cache, entry: Entry) -> bool:
    if entry.state is State.ABSENT:
        return not entry.pages and not entry.cached and entry.layout is None
    if entry.state is State.LOADING:
        return entry.layout is None and entry not in cache.bypassed
    needed = entry.cached or entry.number in cache.pins.numbers()
    return entry.layout is not None and needed and entry.cached != (entry in cache.bypassed)


def _row(cache: Cache, entry: Entry) -> int:
    if entry.state is not State.READY:
        return NOT_READY
    layout = cache.layout_numbers.get(entry.layout)
    if layout is None or len(entry.pages) != 1:
        return SCATTERED
    return (layout << LAYOUT_SHIFT) + entry.pages[0]
