"""Device memory: an arena of pages, uploads into them and gathers from them.

Only this folder knows about streams and events. To support another kind of device, implement
`Backend`, or only `Runtime` if the device has streams.
"""

import functools
import logging
import os

import torch

from gpucache_pipes.device.accelerator import AcceleratorBackend
from gpucache_pipes.device.backend import Backend, Column, Pages, Upload
from gpucache_pipes.device.errors import (
    DeviceMemoryError,
    ends_the_device,
    is_device_error,
    is_out_of_memory,
)
from gpucache_pipes.device.exchange_stream import ExchangeStream
from gpucache_pipes.device.host import HostBackend
from gpucache_pipes.device.memory import available_host_bytes, total_host_bytes
from gpucache_pipes.device.runtime import DeviceMemory, Reservation, Runtime
from gpucache_pipes.device.torch_runtime import InOrderRuntime, TorchRuntime

__all__ = [
    "AcceleratorBackend",
    "Backend",
    "Column",
    "DeviceMemory",
    "DeviceMemoryError",
    "ExchangeStream",
    "HostBackend",
    "InOrderRuntime",
    "Pages",
    "Reservation",
    "Runtime",
    "TorchRuntime",
    "Upload",
    "available_host_bytes",
    "ends_the_device",
    "is_device_error",
    "is_out_of_memory",
    "open_backend",
    "resolve_device",
    "total_host_bytes",
]

_log = logging.getLogger("gpucache_pipes")


def resolve_device(device: str | torch.device | int | None) -> torch.device:
    """Resolve what the user wrote to one device, with an index if it is an accelerator.

    The index is resolved here, once. Later, "cuda" would name a different device in a thread whose
    current device differs. Without an index the current device is meant; but in a process of
    torchrun whose current device is still the first one, the device number LOCAL_RANK, which is
    logged: otherwise all ranks would share the first device.

    Args:
        device: as in `torch.device`; None means the accelerator if there is one, else the CPU.

    Raises:
        ValueError: `device` does not name a device, or this machine does not have it.

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        chosen = accelerator or torch.device("cpu")
    else:
        try:
            chosen = torch.device(device)
        except (RuntimeError, TypeError) as error:
            hint = " (a size is for max_cache_bytes=)" if str(device)[:1].isdigit() else ""
            raise ValueError(f"device={device!r} is not a device{hint}: {error}") from error
    if chosen.type == "cpu":
        return torch.device("cpu")
    if accelerator is None or chosen.type != accelerator.type:
        has = f"has {accelerator.type}" if accelerator else "has no accelerator"
        raise ValueError(f'device={device!r} is not available: this machine {has}; use "cpu"')
    index = _index_of_this_process(chosen.type) if chosen.index is None else chosen.index
    count = torch.accelerator.device_count()
    if index >= count:
        raise ValueError(f"device={device!r} is not available: there are {count} of that type")
    return torch.device(chosen.type, index)


def _index_of_this_process(kind: str) -> int:
    """The index that a device without one means; see `resolve_device`."""
    current = torch.accelerator.current_device_index()
    written = os.environ.get("LOCAL_RANK", "")
    rank = int(written) if written.isdecimal() and len(written) < 10 else 0
    # With fewer devices than ranks, several ranks share one, and which one is theirs to say.
    if current != 0 or not 0 < rank < torch.accelerator.device_count():
        return current
    _warn_of_the_rank(kind, rank)
    return rank


@functools.cache  # one warning, however many stores there are
def _warn_of_the_rank(kind: str, rank: int) -> None:
    _log.warning(
        "LOCAL_RANK is %d, but the current device of this process is %s:0: the store takes %s:%d, "
        "since with the current device all ranks would share the first one. Call "
        "torch.accelerator.set_device_index(%d)%s before making models and stores, otherwise "
        "batches are on another device than the model",
        rank, kind, kind, rank, rank, " or torch.cuda.set_device" if kind == "cuda" else "",
    )  # fmt: skip


def open_backend(device: torch.device) -> Backend:
    """A new backend for `device`, which is a result of `resolve_device`."""
    if device.type == "cpu":
        return HostBackend()
    if device.type == "mps":
        return AcceleratorBackend(InOrderRuntime(device))
    return AcceleratorBackend(TorchRuntime(device))
