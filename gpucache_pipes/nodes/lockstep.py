"""Lockstep: what happens to one rank happens to all."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torchdata.nodes import BaseNode

from gpucache_pipes.errors import RankError
from gpucache_pipes.nodes.sources import as_node

_ELEMENT, _END, _ERROR = 0, 1, 2


class Lockstep(BaseNode[Any]):
    """Passes elements on, at the same time on all ranks of torch.distributed.

        batches = Lockstep(GPUCollator(GPUPrefetcher(paths, store)))

    A rank that raises, or has no more batches, while the others wait for it in a collective
    operation leaves them waiting: for ever, if it catches the error, else until its process has
    ended. So here the ranks agree in each `next()`, by one all_reduce of a number on the host:

    - if a rank has an error, all raise: that rank its own, the others a RankError with its text.
      The elements of that step are left out on all ranks, and all may go on with the next;
    - if a rank has no more elements, the epoch ends for all.

    All ranks must iterate. Where torch.distributed is not initialised, elements are passed on.

    Args:
        source: a node or an iterable, usually the last one of a pipeline.

    Raises:
        RankError: in `next()`, if another rank had an error.
    """

    def __init__(self, source: BaseNode[Any] | Iterable[Any]) -> None:
        super().__init__()
        self.source = as_node(source)
        self._group: Any = None

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """See BaseNode. The first one is a collective operation."""
        super().reset(initial_state)
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several and self._group is None:
            # Of its own, and on the host: no device has to be waited for.
            self._group = dist.new_group(backend="gloo")
        self.source.reset(None if initial_state is None else initial_state["source"])

    def get_state(self) -> dict[str, Any]:
        """See BaseNode."""
        return {"source": self.source.state_dict()}

    def next(self) -> Any:
        """See BaseNode."""
        if self._group is None:
            return next(self.source)
        mine, element, error = _ELEMENT, None, None
        try:
            element = next(self.source)
        except StopIteration:
            mine = _END
        except Exception as raised:
            mine, error = _ERROR, raised
        worst = torch.tensor(mine)
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=self._group)
        if worst == _ERROR:
            raise self._agree_on(error)
        if worst == _END:
            raise StopIteration
        return element

    def _agree_on(self, error: Exception | None) -> Exception:
        texts: list[str | None] = [None] * dist.get_world_size()
        text = None if error is None else f"{type(error).__name__}: {error}"
        dist.all_gather_object(texts, text, group=self._group)
        if error is not None:
            return error
        return RankError({rank: text for rank, text in enumerate(texts) if text is not None})
