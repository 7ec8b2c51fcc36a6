"""The states of a file in the cache, and what leads from one to another.

This table is all there is: `Entries.move` changes states, and refuses what is not in it.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

ABSENT: Final = 0
LOADING: Final = 1
FILLING: Final = 2
FILLING_BYPASSED: Final = 3
BYPASSED: Final = 4
CACHED: Final = 5

READY: Final = BYPASSED
"""States from here on: the bytes are in pages, for every batch to gather."""


def counts_as_cached(states: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Of which of these states the pages count against the budget."""
    counted: NDArray[np.bool_] = (states == FILLING) | (states == CACHED)
    return counted


STATES: dict[int, tuple[str, str]] = {
    ABSENT: ("ABSENT", "nothing of it is held"),
    LOADING: ("LOADING", "a reader thread reads it, or will; it has no pages yet"),
    FILLING: ("FILLING", "its bytes are read into pages that count against the budget"),
    FILLING_BYPASSED: ("FILLING_BYPASSED", "its bytes are read into pages beyond the budget"),
    BYPASSED: ("BYPASSED", "ready; its pages are freed with the last batch that needs it"),
    CACHED: ("CACHED", "ready; stays until it is evicted, released or cleared"),
}
"""Name and meaning of each state."""

TRANSITIONS: tuple[tuple[int, int, str], ...] = (
    (ABSENT, LOADING, "a batch, or a call that reads ahead, requests it"),
    (LOADING, FILLING, "it has been opened; budget and policy admit it"),
    (LOADING, FILLING_BYPASSED, "it has been opened; they do not, and a batch needs it"),
    (LOADING, ABSENT, "it cannot be read, or it is not admitted and no batch needs it"),
    (FILLING, CACHED, "it has been read"),
    (FILLING, FILLING_BYPASSED, "it is released, or its reader hangs"),
    (FILLING, LOADING, "another reader reads it anew, in place of one that hangs"),
    (FILLING, ABSENT, "it cannot be read"),
    (FILLING_BYPASSED, BYPASSED, "it has been read"),
    (FILLING_BYPASSED, LOADING, "another reader reads it anew, in place of one that hangs"),
    (FILLING_BYPASSED, ABSENT, "it cannot be read, or its reader that hung has returned"),
    (CACHED, BYPASSED, "it is released while a batch needs it"),
    (CACHED, ABSENT, "it is evicted or released"),
    (BYPASSED, ABSENT, "no batch needs it any more"),
)
"""From one state to another, and when."""

ALLOWED = np.zeros((len(STATES), len(STATES)), bool)
"""[to, from]: whether that is in the table."""
for _from, _to, _ in TRANSITIONS:
    ALLOWED[_to, _from] = True
