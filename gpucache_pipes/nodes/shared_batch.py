"""SharedBatch: a pending batch whose features come from the caches of several ranks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gpucache_pipes.batches import RaggedOptions, SampleBatch, collate_parts
from gpucache_pipes.files import LoadedFeature, Samples, chosen, with_their_samples
from gpucache_pipes.store import PendingBatch

if TYPE_CHECKING:
    from gpucache_pipes.nodes.shared_epoch import SharedEpoch


class SharedBatch:
    """One step of an epoch whose ranks share their caches; used as a PendingBatch is.

    What its owner could not send is read here, from storage: so the errors of files are those that
    they would be otherwise, and on_error is asked by the rank whose batch it is. So is everything
    if the batch is looked at before its step, as a stand-in for another one is found.

    Args:
        epoch: which it is of.
        step: which of its steps this is.
        asked: the paths, or samples of several files.
    """

    def __init__(self, epoch: "SharedEpoch", step: int, asked: Sequence[Any] | Samples) -> None:
        self._epoch = epoch
        self._step = step
        self._asked = asked
        samples = asked if isinstance(asked, Samples) else None
        self._paths: Sequence[Any] = asked if samples is None else samples.paths
        self._parts = () if samples is None else samples.parts
        # What is read here, at which positions; None for all of them.
        self._local: PendingBatch | None = None
        self._positions: list[int] | None = []
        self._looked = False
        self._open = True

    @property
    def used(self) -> bool:
        """See PendingBatch."""
        return not self._open

    def wait(self) -> dict[int, Exception]:
        """See PendingBatch."""
        self._look()
        if self._local is None:
            return {}
        errors = self._local.wait()
        if self._positions is None:
            return errors
        return {self._positions[at]: error for at, error in errors.items()}

    def _look(self) -> None:
        """Have read here what is to be read here."""
        if self._looked:
            return
        if not self._epoch.has_sent(self._step):
            self._local = self._epoch.read_here(self._asked)
            self._positions = None
        elif failed := self._epoch.arrival(self._step).failed:
            self._local = self._epoch.read_here(chosen(self._paths, failed))
            self._positions = failed
        self._looked = True

    def replace(self, position: int, feature: Any = None) -> None:
        """See PendingBatch."""
        at = position if self._positions is None else self._positions.index(position)
        assert self._local is not None
        self._local.replace(at, feature)

    @property
    def substitutes(self) -> dict[int, Any]:
        """See PendingBatch."""
        if self._local is None:
            return {}
        found: dict[int, Any] = self._local.substitutes
        if self._positions is None:
            return found
        return {self._positions[at]: feature for at, feature in found.items()}

    @property
    def left_out(self) -> set[int]:
        """See PendingBatch."""
        if self._local is None:
            return set()
        if self._positions is None:
            return self._local.left_out
        left_out = {self._positions[at] for at in self._local.left_out}
        return with_their_samples(left_out, len(self._paths), self._parts)

    def result(self, ragged: RaggedOptions | None = None) -> Any:
        """What `GPUFeatureStore.collect` gives of a pending batch; consumes this one."""
        self._look()
        self._open = False
        try:
            if self._positions is None:
                assert self._local is not None
                return self._epoch.store.collect([self._local], ragged)
            batches = self._batches()
            if not self._parts:
                return batches[0] if ragged is None else batches[0].collate(ragged)
            if ragged is None:
                return SampleBatch(self._parts, batches)
            options = ragged.drawn(len(batches[0]))
            return collate_parts(self._parts, [batch.collate for batch in batches], options)
        finally:
            self.cancel()

    def _batches(self) -> list[Any]:
        """The batch of each part of the samples, or the only one."""
        arrival, serving = self._epoch.arrival(self._step), self._epoch.store.serving
        count = len(self._paths) // max(1, len(self._parts))
        parts = [slice(at, at + count) for at in range(0, len(self._paths), max(1, count))]
        if self._local is None:
            return [arrival.batch(serving.backend, self._paths[part], part) for part in parts]
        for _, error in sorted(self.wait().items()):
            raise error
        left_out, left_out_here = self.left_out, self._local.left_out
        read_here = [at for n, at in enumerate(self._positions or ()) if n not in left_out_here]
        features = self._epoch.store.collect([self._local])
        others = {
            at: LoadedFeature(feature) for at, feature in zip(read_here, features, strict=True)
        }
        made = []
        for part in parts:
            kept = [at for at in range(part.start, part.stop) if at not in left_out]
            paths = chosen(self._paths, kept)
            made.append(arrival.mended(serving.backend, paths, kept, others, serving.upload))
        return made

    def cancel(self) -> None:
        """See PendingBatch."""
        self._open = False
        if self._local is not None:
            self._local.cancel()

    def abandon(self) -> None:
        """See PendingBatch. Takes no lock."""
        self._open = False
        if self._local is not None:
            self._local.abandon()
