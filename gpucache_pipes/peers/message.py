"""What a rank tells another one about the rows that it sends: layouts, plain values, failures.

A message is rows and a tail. The tail begins with a head of fixed size, which says how long the
message of a later step will be, so that messages need no exchange of sizes before them. Where all
is as expected, the head is all of it: every row has the layout that the sender has told first.
"""

import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpucache_pipes.files import ALIGNMENT, Layout

HEAD = np.dtype(
    [("rows", np.int64), ("tail", np.int64), ("meta", np.int64), ("page", np.int32),
     ("void", np.int32)]
)  # fmt: skip
"""Sizes in bytes of the rows and the tail of the message that follows; bytes of what follows the
head in this tail; the size of a page of the sender; whether these rows could not be packed."""

_MOST_LAYOUTS = 1 << 16
"""Layouts that are remembered for each receiver. Then all are told anew."""


class Contents(NamedTuple):
    """What is known of some rows.

    Attributes:
        layouts: different layouts.
        which: [rows], which of them each row has; -1 for one that could not be loaded.
        values: the plain values of each row; empty if none has any.
    """

    layouts: list[Layout]
    which: NDArray[np.intp]
    values: list[tuple[Any, ...]]

    def part(self, start: int, stop: int) -> "Contents":
        """Those of some rows."""
        return Contents(self.layouts, self.which[start:stop], self.values[start:stop])

    def is_plain(self) -> bool:
        """Whether all rows have one layout, and there is nothing else to say of them."""
        return len(self.layouts) == 1 and not self.values and not self.which.any()

    def pages(self, page_bytes: int) -> NDArray[np.int64]:
        """How many pages each row takes."""
        if len(self.layouts) == 1 and not self.which.any():
            return np.full(len(self.which), -(-self.layouts[0].span // max(1, page_bytes)))
        spans = np.array([layout.span for layout in self.layouts] + [0], np.int64)
        return (-(-spans // max(1, page_bytes)))[self.which]


class Outbox:
    """Describes rows to one receiver, in the order in which they are sent."""

    def __init__(self) -> None:
        self._told: dict[Layout, int] = {}

    def describe(self, rows: Contents) -> bytes:
        """What the receiver does not know of these rows; empty if that is nothing."""
        told = self._told
        if rows.is_plain() and told.get(rows.layouts[0]) == 0:
            return b""
        used = np.unique(rows.which[rows.which >= 0]).tolist()
        if len(told) + len(used) > _MOST_LAYOUTS:
            told.clear()
        forget = not told
        new = [layout for n in used if (layout := rows.layouts[n]) not in told]
        for layout in new:
            told[layout] = len(told)
        numbers = np.full(len(rows.layouts) + 1, -1, np.int32)  # the last one is that of -1
        for n in used:
            numbers[n] = told[rows.layouts[n]]
        which = numbers[rows.which]
        values = rows.values if any(rows.values) else []
        if not new and not values and not which.any():
            return b""
        described = [
            (layout.tree, [(leaf.dtype, leaf.shape) for leaf in layout.leaves]) for layout in new
        ]
        packed = int(which[0]) if (which == which[0]).all() else which.tobytes()
        return pickle.dumps((forget, described, packed, values), pickle.HIGHEST_PROTOCOL)


class Inbox:
    """Reads the descriptions of one sender, in the order in which they were made."""

    def __init__(self) -> None:
        self._layouts: list[Layout] = []

    def read(self, meta: bytes, count: int) -> Contents:
        """What is known of `count` rows."""
        if not meta:
            return Contents(self._layouts[:1], np.zeros(count, np.intp), [])
        # From a process of the same job, as with all_gather_object of torch.
        forget, described, packed, values = pickle.loads(meta)
        if forget:
            self._layouts = []
        self._layouts = self._layouts + [Layout.of(tree, leaves) for tree, leaves in described]
        if isinstance(packed, int):
            layouts = [self._layouts[packed]] if packed >= 0 else []
            return Contents(layouts, np.full(count, min(packed, 0), np.intp), values)
        used, which = np.unique(np.frombuffer(packed, np.int32), return_inverse=True)
        failed = int(used[0] < 0)
        layouts = [self._layouts[n] for n in used[failed:].tolist()]
        return Contents(layouts, which - failed, values)


def tail_bytes(meta: bytes) -> int:
    """The size of a tail with this description: rows that follow it must be aligned."""
    return -(-(HEAD.itemsize + len(meta)) // ALIGNMENT) * ALIGNMENT


def make_tails(
    sizes: NDArray[np.int64], metas: Sequence[bytes], page_bytes: int, is_void: int
) -> list[NDArray[np.uint8]]:
    """The tails of the messages to all ranks.

    Args:
        sizes: [ranks, 2], of the messages that follow: see HEAD.
        metas: the descriptions.
        page_bytes: see HEAD.
        is_void: see HEAD.
    """
    heads = np.zeros(len(metas), HEAD)
    heads["rows"], heads["tail"] = sizes.T
    heads["meta"] = [*map(len, metas)]
    heads["page"], heads["void"] = page_bytes, is_void
    tails = [*heads.view(np.uint8).reshape(len(metas), -1)]
    for rank, meta in enumerate(metas):
        if meta:
            padding = bytes(tail_bytes(meta) - HEAD.itemsize - len(meta))
            tails[rank] = np.frombuffer(tails[rank].tobytes() + meta + padding, np.uint8).copy()
    return tails


def read_tail(tail: NDArray[np.uint8]) -> tuple[Any, bytes]:
    """Its head, and the description."""
    head = tail[: HEAD.itemsize].view(HEAD)[0]
    return head, tail[HEAD.itemsize : HEAD.itemsize + int(head["meta"])].tobytes()
