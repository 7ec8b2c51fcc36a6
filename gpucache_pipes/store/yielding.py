"""Calling what may run out of device memory, with the memory of the cache as a reserve."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from traceback import clear_frames
from typing import Any

import torch
from torch import distributed

from gpucache_pipes.device import is_out_of_memory


def require_no_collective(is_free_of_collectives: bool) -> None:
    """Raise RuntimeError where one rank alone would repeat a collective operation."""
    if (
        not is_free_of_collectives
        and distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    ):
        raise RuntimeError(
            "yield_memory_to may call its function twice in one rank and once in the others, which "
            "then wait for each other in the collective operations inside, as those of "
            "DistributedDataParallel: pass collective_free=True only if there are none"
        )


def call_twice(
    call: Callable[[], Any],
    quiesce: Callable[[], AbstractContextManager[None]],
    shed: Callable[[], int],
    zero_grad: Callable[[], object] | None,
    device: torch.device,
) -> Any:
    """Call `call`, and once more from the same random numbers if the device runs out of memory.

    Args:
        call: what may be called twice.
        quiesce: a context in which nothing else uses the device, for the second call.
        shed: frees memory; returns how many bytes. With 0, the error is raised.
        zero_grad: called in between, to undo what an unfinished backward pass has added.
        device: whose random numbers are restored, with those of the CPU.
    """
    random = _RandomState(device)
    try:
        return call()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failed = error
    _clear(failed)
    with quiesce():
        try:
            freed = shed()
        except Exception as error:
            raise failed from error
        if not freed:
            raise failed
        random.restore()
        if zero_grad is not None:
            zero_grad()
        return call()


def _clear(error: BaseException) -> None:
    """Free the tensors of a call: its frames hold them, and the tracebacks hold the frames."""
    seen: set[int] = set()
    errors: list[BaseException | None] = [error]
    while errors:
        one = errors.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            clear_frames(one.__traceback__)
            errors += [one.__cause__, one.__context__]


class _RandomState:
    """Torch's random numbers of the CPU and of a device."""

    def __init__(self, device: torch.device) -> None:
        self._on_host = torch.get_rng_state()
        self._module: Any = None if device.type == "cpu" else getattr(torch, device.type, None)
        if self._module is not None:
            self._device = device
            self._on_device = self._module.get_rng_state(device)

    def restore(self) -> None:
        torch.set_rng_state(self._on_host)
        if self._module is not None:
            self._module.set_rng_state(self._on_device, self._device)
