"""Lockstep: an error or the end of the epoch on one rank is one on all ranks."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
from torchdata.nodes import BaseNode

from gpucache_pipes.nodes.upstream import as_node, length_of, shown
from gpucache_pipes.peers import ENDS, FAILS, GOES_ON, agree, error_of_all


class Lockstep(BaseNode[Any]):
    """Passes elements on, at the same step on all ranks of torch.distributed.

        batches = Lockstep(GPUCollator(GPUPrefetcher(paths, store)))

    A rank that raises, or that runs out of batches first, leaves the other ranks waiting in their
    next collective operation: until its process has ended, or for ever if it catches the error.
    So the ranks agree in each `next()`, by one all_reduce of a number on the host:

    - if a rank has an error, all raise: that rank its own, the others a RankError with its text.
      The elements of this step are dropped on all ranks, and all may go on with the next step;
    - if a rank has no more elements, the epoch ends on all ranks.

    All ranks must call `next()` equally often. The source may be a GPUCachedPathDataLoader:
    `torchdata.nodes.Loader(Lockstep(loader))`. Where torch.distributed is not initialised, or has
    one rank, elements are passed on as they are.

    Args:
        source: a node or an iterable, usually the last one of a pipeline.

    Raises:
        RankError: in `next()`, if another rank had an error and this one had none.
        Exception: in `next()`, what the source of this rank raises.
    """

    def __init__(self, source: BaseNode[Any] | Iterable[Any]) -> None:
        super().__init__()
        self.source = as_node(source)

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Reset the source. This is no collective operation."""
        super().reset(initial_state)
        self.source.reset(None if initial_state is None else initial_state["source"])

    def __len__(self) -> int:
        """Elements of an epoch of this rank, if none has fewer. Raises TypeError if unknown."""
        return length_of(self.source)

    def __bool__(self) -> bool:
        return True  # also without a length

    def __repr__(self) -> str:
        return f"Lockstep({shown(self.source)})"

    def get_state(self) -> dict[str, Any]:
        """{"source": the state of the source}, which is that of this rank."""
        return {"source": self.source.state_dict()}

    def next(self) -> Any:
        """The next element. A collective operation of all ranks."""
        group = _host_group()
        if group is None:
            return next(self.source)
        mine, element, error = GOES_ON, None, None
        try:
            element = next(self.source)
        except StopIteration:
            mine = ENDS
        except Exception as raised:
            mine, error = FAILS, raised
        worst = agree(mine, group)
        if worst == ENDS:
            raise StopIteration
        if worst != FAILS:
            return element
        error = error_of_all(error, group)
        try:
            raise error
        finally:
            # An error holds the frame that raised it. With these variables the frame would hold
            # the error and the group: a reference cycle, which keeps the group alive until the
            # garbage collector runs.
            del error, group


_groups: list[Callable[[], Any]] = [lambda: None, lambda: None]
"""Weak references to the default process group, and to the group on the host made for it.

Weak, because torch joins the threads of a group with the last reference to it. If that is only
when the interpreter ends, the process may abort."""


def _host_group() -> Any:
    """A group of all ranks on the host, where an all_reduce waits for no device.

    None if there is one rank only. Making the group is a collective operation, done once for each
    default process group; torch holds it until destroy_process_group.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    if _groups[0]() is not dist.group.WORLD:
        group = dist.new_group(backend="gloo")
        _groups[:] = [weakref.ref(dist.group.WORLD), weakref.ref(group)]
    return _groups[1]()
