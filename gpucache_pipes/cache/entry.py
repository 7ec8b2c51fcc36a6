"""The cache's record of one file."""

import enum
from collections.abc import Sequence
from typing import Any

NOT_READY = -2
SCATTERED = -1
"""Values in `Cache.rows` of entries that have no row there."""


class State(enum.Enum):
    """Where the bytes of a file are.

    ABSENT -> LOADING when a batch requests the file; LOADING -> READY when it has been read, or
    back to ABSENT when that failed; READY -> ABSENT when its pages are freed.
    """

    ABSENT = enum.auto()
    LOADING = enum.auto()
    READY = enum.auto()


class Entry:
    """One version of one file, and what the cache holds of it. Written in this folder only.

    An entry stays when its bytes are evicted: it is small.

    Attributes:
        key: the identity of the file in its source.
        path: its first spelling, absolute: for sources and messages.
        number: its position in the tables of the cache.
        file: the key that policies know it by: the number of the first version of the file.
        state: see State.
        cached: its pages count against the budget and stay when no batch needs them. A READY entry
            that is not cached is bypassed: its pages are freed with the last batch that needs it.
        may_cache: while LOADING, whether it may become cached; `release` clears it.
        may_evict: while LOADING, whether other entries may be evicted for it.
        pages: numbers of the pages that hold its bytes, in order; a range where they were never
            used before.
        nbytes: bytes of its tensors, while it has pages.
        charge: bytes that it counts against the budget; see Ledger.
        layout, values: how to read the pages, and the plain values; opaque to the cache.
        version: of the file when it was read, where the store revalidates.
        waiters: the pending batches to notify when LOADING ends.
    """

    __slots__ = (
        "cached",
        "charge",
        "file",
        "key",
        "layout",
        "may_cache",
        "may_evict",
        "nbytes",
        "number",
        "pages",
        "path",
        "state",
        "values",
        "version",
        "waiters",
    )  # fmt: skip

    def __init__(self, key: str, path: str, number: int, file: int) -> None:
        self.key = key
        self.path = path
        self.number = number
        self.file = file
        self.state = State.ABSENT
        self.cached = False
        self.may_cache = False
        self.may_evict = False
        self.pages: Sequence[int] = ()
        self.nbytes = 0
        self.charge = 0
        self.layout: Any = None
        self.values: tuple[Any, ...] = ()
        self.version: bytes | None = None
        # A tuple: a million empty lists would cost the garbage collector seconds.
        self.waiters: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return f"Entry({self.key!r}, {self.state.name}, pages={self.pages}, cached={self.cached})"
