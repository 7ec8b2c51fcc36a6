"""How far the arena grows, and how much of a device a cache without a budget may take.

With a budget the arena is one allocation: of what the known files need, up to the budget and the
batches in flight. Where the files are not known in advance it is moved a few times while it is
small, and then gets one more segment. It never takes more than the budget, the batches in flight
and a twentieth of both.

Without a budget the arena grows by segments, and never moves, so that pages can be returned to the
device segment by segment. The rest of the device belongs to the model: see `ModelMemory`.
"""

from typing import NamedTuple

from gpucache_pipes.device.runtime import SMALLEST_RESERVATION, DeviceMemory

FIRST_BYTES = 64 << 20
"""Bytes of the first segment, where it is not known that more are needed."""

_BEYOND = 24
"""Batches in flight that need pages beyond the budget get at least this part of the arena at once:
so they need few segments, and waste less than a twentieth."""

_MARGIN = 16
"""The part of the device that stays free for what no allocator counts: NCCL, cuBLAS, fragments."""

_SMALL_SEGMENT = 16
"""Without a budget, a segment takes half of what is spare at most, unless it is less than this part
of the device: so there are few, and the last ones, which are returned first, are small."""

LEAST_BYTES = SMALLEST_RESERVATION
"""Bytes of the smallest segment beyond the first."""

SHARES = ((1000, 1), (100, 2), (10, 4), (0, 8))
"""How far the peak of the model is trusted: after so many batches in which it has not risen, the
cache may take the whole of what is spare, a half of what is free, and so on. The first batches may
be those of statistics, of a validation, or of an optimizer that has not made its state."""

STEPS = 10
"""Batches after which the peak of a training step is taken to be known."""


class Step(NamedTuple):
    """How to grow.

    Attributes:
        pages: how many to add.
        moves: whether to move the arena into one larger segment, and not to add a segment.
    """

    pages: int
    moves: bool


def step_within_budget(
    needed: int,
    useful: int,
    known: int | None,
    *,
    pages: int,
    left: int | None,
    first: int,
    least: int,
) -> Step:
    """How to grow an arena that has a budget. Everything is a number of pages.

    Args:
        needed: what a batch needs now.
        useful: how many more the budget and batches in flight can use; negative if there are more.
        known: how many more are needed for all files that are known; None if nothing is known.
        pages: in the arena.
        left: in segments that it has moved out of, if the allocator keeps them; None if they go
            back to the driver.
        first: how many the first segment has, where it is not known that more are needed.
        least: how many the smallest segment has.

    >>> step_within_budget(1, 1000, 500, pages=0, left=None, first=100, least=1)
    Step(pages=500, moves=False)
    >>> step_within_budget(1, 900, None, pages=100, left=None, first=100, least=1)
    Step(pages=100, moves=True)
    >>> step_within_budget(1, 500, None, pages=400, left=None, first=100, least=1)
    Step(pages=500, moves=False)
    >>> step_within_budget(1, 0, None, pages=2400, left=None, first=100, least=1)
    Step(pages=100, moves=False)
    """
    smallest = max(needed, pages // _BEYOND, least) if pages else needed
    if needed > useful or useful <= smallest:
        return Step(max(smallest, useful), False)
    wanted = max(smallest, min(useful, max(known or 0, pages, first)))
    # The old and the new segment exist at the same time.
    moves = pages > 0 and pages + wanted <= useful
    if left is not None and left + pages > (pages + useful) // _BEYOND:
        moves = False
    if pages and not moves and useful - wanted <= pages:
        wanted = useful
    return Step(wanted, moves)


class ModelMemory:
    """What the model beside the cache has needed, so that the cache leaves it there.

    The allocator counts the peak of all tensors. It is looked at before and after each change of
    the cache, so that in between it is the peak of the model and a known constant.

    Attributes:
        peak: the most bytes that all tensors but the cache have taken at one time.
        short: whether the model has run short, and nothing has been returned for it.
        full: whether the cache must not grow any more, since the model has run short once.
    """

    def __init__(self) -> None:
        self.peak = 0
        self.short = False
        self.full = False
        self._risen = 0
        self._last_peak = 0
        self._shortages: int | None = None

    def look(self, memory: DeviceMemory, ours: int, batches: int) -> None:
        """Note the model's peak, and whether it has run short since the last look.

        Args:
            memory: of the device.
            ours: bytes of the cache since the last look.
            batches: that have been gathered.
        """
        # After the cache has been larger, a peak of the model alone does not raise the counter. But
        # what the allocator has reserved for the model tells it as well.
        peak = min(memory.peak, memory.reserved) - ours
        if memory.peak != self._last_peak:
            peak = max(peak, memory.peak - ours)
            self._last_peak = memory.peak
        if peak > self.peak + self.peak // 100:
            self._risen = batches
        self.peak = max(self.peak, peak)
        if self._shortages is not None and memory.shortages > self._shortages:
            self.short = self.full = True
        self._shortages = memory.shortages

    def absorb(self, memory: DeviceMemory) -> None:
        """The cache has grown: what this did to the counters is not the model's doing."""
        self._last_peak = memory.peak
        self._shortages = memory.shortages

    def missing(self, memory: DeviceMemory, ours: int) -> int:
        """Bytes that the model may need in addition to those that it has reserved.

        Its peak so far and a tenth are kept for it. What it has reserved and does not use between
        two steps is its own.
        """
        return max(0, self.peak + self.peak // 10 - max(0, memory.reserved - ours))

    def spare(self, memory: DeviceMemory, ours: int, batches: int) -> int:
        """Bytes that the cache may take now: little before the peak of a training step is known.

        See SHARES.

        Args:
            memory: of the device.
            ours: bytes of the cache.
            batches: that have been gathered.
        """
        stable = batches - self._risen
        share = next(share for least, share in SHARES if stable >= least)
        most = memory.free - self.missing(memory, ours) - memory.total // _MARGIN
        return most if share == 1 else min(most, (memory.free + ours) // share - ours)


def segment_beside_model(
    needed: int, known: int | None, spare: int, *, pages: int, first: int, least: int, total: int
) -> int:
    """How many pages to add to an arena without a budget; 0 if the model needs the rest.

    Args:
        needed: what a batch needs now.
        known: how many more are needed for all files that are known; None if nothing is known.
        spare: how many the cache may take.
        pages: in the arena.
        first: how many the first segment has.
        least: how many the smallest segment has.
        total: how many the whole device could hold.

    >>> segment_beside_model(1, None, 1000, pages=100, first=50, least=1, total=10_000)
    100
    >>> segment_beside_model(1, 5000, 8000, pages=100, first=50, least=1, total=10_000)
    4000
    >>> segment_beside_model(1, 5000, 600, pages=100, first=50, least=1, total=10_000)
    600
    """
    # The first segment is not returned to the device, so it is small.
    wanted = first
    if pages:
        wanted = max(pages, first) if known is None else max(known, pages // _BEYOND, least)
    wanted = min(wanted, spare, max(first, spare // 2, total // _SMALL_SEGMENT))
    return wanted if wanted >= needed else needed if spare >= needed else 0
