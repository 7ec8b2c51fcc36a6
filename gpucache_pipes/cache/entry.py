"""One known file, as the cache sees it."""

import enum
from collections.abc import Sequence
from typing import Any

NOT_READY = -2
SCATTERED = -1
"""What `Cache.rows` has for entries of which there is no row to tell."""


class State(enum.Enum):
    """Where the bytes of a file are.

    ABSENT -> LOADING when somebody asks; LOADING -> READY when they have come, or back to
    ABSENT when they could not; READY -> ABSENT when the pages are given to others.
    """

    ABSENT = enum.auto()
    LOADING = enum.auto()
    READY = enum.auto()


class Entry:
    """A file and what is held of it. Entries stay when their bytes go: they are small.

    Attributes:
        key: the file.
        path: the file as it was first spelled, absolute: for readers and messages.
        number: its name in the tables of the cache.
        file: what policies know it by: the number of the first version of the file.
        state: see State.
        cached: its pages count against the budget, and stay when no ticket needs them. A READY
            entry that is not cached is transient: it goes with the last ticket that needs it.
        keep: while LOADING, whether it may become cached; release() says no.
        evict: while LOADING, whether others may go for it.
        pages: ids of the arena rows that hold its bytes, in order; a range where they are fresh.
        nbytes: bytes of its tensors, while it has pages.
        charge: what it counts against the budget in bytes; see Ledger.
        layout, values: how to read the pages and the plain values; opaque to the cache.
        version: what the file was when it was read, if the store looks whether it changes.
        waiters: the tickets to tell when LOADING ends.
    """

    __slots__ = (
        "cached",
        "charge",
        "evict",
        "file",
        "keep",
        "key",
        "layout",
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
        self.keep = False
        self.evict = False
        self.pages: Sequence[int] = ()
        self.nbytes = 0
        self.charge = 0
        self.layout: Any = None
        self.values: tuple[Any, ...] = ()
        self.version: bytes | None = None
        # No list of its own: a million of those would cost the garbage collector seconds.
        self.waiters: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return f"Entry({self.key!r}, {self.state.name}, pages={self.pages}, cached={self.cached})"
