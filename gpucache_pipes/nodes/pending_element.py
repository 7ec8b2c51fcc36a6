"""PendingElement: what a GPUPrefetcher has drawn from its source and not given out."""

from collections.abc import Sequence
from typing import Any

from gpucache_pipes.files import Samples, paths_without
from gpucache_pipes.nodes.shared_batch import SharedBatch
from gpucache_pipes.store import PendingBatch


class PendingElement:
    """One element of the source, from the moment it is drawn until the consumer gets it.

    Only the thread that iterates over the prefetcher writes its attributes.

    Attributes:
        value: what the source yielded; with on_error, what is left of it, or what replaces it.
        paths: the files that it needs.
        samples: the same, where each sample is several files; else None.
        single: whether it is one path, so that it becomes a feature and not a FeatureBatch.
        divisible: whether it is a sequence of paths and nothing else, so that some of them may be
            left out.
        batch: the request of its files; None before that.
        resolved: the request whose failed features have all been replaced or left out. If it is
            not `batch`, that is still to be done.
        error: what drawing or requesting it raised; the consumer gets it in its turn.
        step: of a shared epoch, which it is until it was requested; else None.
        state: the source's state after it; None if the source failed to yield it, or if an
            interrupt came first. Then the state of the element before it stays in force.
    """

    __slots__ = (
        "batch",
        "divisible",
        "error",
        "paths",
        "resolved",
        "samples",
        "single",
        "state",
        "step",
        "value",
    )

    def __init__(self, value: Any) -> None:
        self.value = value
        self.paths: Sequence[Any] = ()
        self.samples: Samples | None = None
        self.single = False
        self.divisible = False
        self.batch: PendingBatch | SharedBatch | None = None
        self.resolved: PendingBatch | SharedBatch | None = None
        self.error: Exception | None = None
        self.state: dict[str, Any] | None = None
        self.step: int | None = None

    def kept(self) -> Sequence[Any]:
        """Its paths, or its samples, without those that were left out."""
        if self.batch is None or not self.batch.substitutes:
            return self.paths if self.samples is None else self.samples
        left_out = self.batch.left_out
        if self.samples is not None:
            return self.samples.without(left_out)
        return paths_without(self.paths, left_out)
