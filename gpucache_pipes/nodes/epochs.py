"""EpochNode: a node over which each `for` loop is an epoch."""

from typing import Any, Self

from torchdata.nodes import BaseNode

from gpucache_pipes.nodes.batch_type import Batch


class EpochNode(BaseNode[Batch]):
    """A node that begins the next epoch when it is iterated over after the end of one.

    torchdata leaves that to its Loader: a second `for` loop over one of its nodes ends at once,
    without a word. A loop that was left goes on in the next one, as in torchdata.
    """

    _ended = False

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """See BaseNode."""
        super().reset(initial_state)
        self._ended = False

    def __iter__(self) -> Self:
        """The node itself, reset if its epoch has ended."""
        if self._ended:
            self.reset()
        return self

    def __next__(self) -> Batch:
        """The next element; see `next`."""
        try:
            element: Batch = super().__next__()
        except StopIteration:
            self._ended = True
            raise
        return element
