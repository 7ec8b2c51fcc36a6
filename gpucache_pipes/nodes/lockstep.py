"""Lockstep: what happens to one rank happens to all."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torchdata.nodes import BaseNode

from gpucache_pipes.errors import RankError
from gpucache_pipes.nodes.upstream import as_node

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

    All ranks must iterate. A GPUCachedPathDataLoader may be the source:
    `torchdata.nodes.Loader(Lockstep(loader))`. Where torch.distributed is not initialised, elements
    are passed on.

    Args:
        source: a node or an iterable, usually the last one of a pipeline.

    Raises:
        RankError: in `next()`, if another rank had an error.
    """

    def __init__(self, source: BaseNode[Any] | Iterable[Any]) -> None:
        super().__init__()
        self.source = as_node(source)

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """See BaseNode."""
        super().reset(initial_state)
        self.source.reset(None if initial_state is None else initial_state["source"])

    def get_state(self) -> dict[str, Any]:
        """See BaseNode."""
        return {"source": self.source.state_dict()}

    def next(self) -> Any:
        """See BaseNode."""
        group = _host_group()
        if group is None:
            return next(self.source)
        mine, element, error = _ELEMENT, None, None
        try:
            element = next(self.source)
        except StopIteration:
            mine = _END
        except Exception as raised:
            mine, error = _ERROR, raised
        worst = torch.tensor(mine)
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=group)
        if worst == _END:
            raise StopIteration
        if worst != _ERROR:
            return element
        error = _agree_on(error, group)
        try:
            raise error
        finally:
            # An error holds the frame that it comes from, and this one would hold the error and
            # with it the group: a circle, which lives until the garbage collector runs.
            del error, group


def _agree_on(error: Exception | None, group: Any) -> Exception:
    texts: list[str | None] = [None] * dist.get_world_size()
    text = None if error is None else f"{type(error).__name__}: {error}"
    dist.all_gather_object(texts, text, group=group)
    if error is not None:
        return error
    return RankError({rank: text for rank, text in enumerate(texts) if text is not None})


_groups: list[Callable[[], Any]] = [lambda: None, lambda: None]
"""All ranks, and the group of ours that has them. By weak references: torch ends the threads of a
group with the last reference to it, and where that comes with the end of the interpreter, the
process may abort."""


def _host_group() -> Any:
    """All ranks, on the host: no device has to be waited for. None if there is one only.

    Making it is a collective operation, and done once in a process.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    if _groups[0]() is not dist.group.WORLD:
        # torch holds it until destroy_process_group.
        group = dist.new_group(backend="gloo")
        _groups[:] = [weakref.ref(dist.group.WORLD), weakref.ref(group)]
    return _groups[1]()
