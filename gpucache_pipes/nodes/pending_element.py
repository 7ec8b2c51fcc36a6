"""What a GPUPrefetcher has drawn and not given out."""

from collections.abc import Sequence
from typing import Any

from gpucache_pipes.store import PendingBatch


class PendingElement:
    """An element that was drawn from the source and is not consumed yet."""

    __slots__ = (
        "divisible",
        "element",
        "error",
        "paths",
        "settled",
        "single",
        "state",
        "ticket",
    )  # fmt: skip

    def __init__(self, element: Any) -> None:
        self.element = element
        self.paths: Sequence[Any] = ()
        self.single = False
        # It is its paths and nothing else, so that some of them may be left out.
        self.divisible = False
        self.ticket: PendingBatch | None = None
        # The ticket of which it is known what to do about what failed.
        self.settled: PendingBatch | None = None
        # What drawing or requesting it raised; the consumer gets it in its turn.
        self.error: Exception | None = None
        # The source's state behind it, None if the source failed to give the element.
        self.state: dict[str, Any] | None = None
