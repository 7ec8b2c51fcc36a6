"""Device memory: an arena of pages, uploads into them and gathers from them.

Only this folder knows about streams and events. To support another kind of device, implement
`Backend`, or only `Runtime` if the device has streams.
"""

import torch

from gpucache_pipes.device.accelerator import AcceleratorBackend
from gpucache_pipes.device.backend import Backend, Column, Upload
from gpucache_pipes.device.errors import (
    DeviceMemoryError,
    ends_the_device,
    is_device_error,
    is_out_of_memory,
)
from gpucache_pipes.device.host import HostBackend
from gpucache_pipes.device.memory import available_host_bytes
from gpucache_pipes.device.runtime import DeviceMemory, Reservation, Runtime
from gpucache_pipes.device.torch_runtime import InOrderRuntime, TorchRuntime

__all__ = [
    "AcceleratorBackend",
    "Backend",
    "Column",
    "DeviceMemory",
    "DeviceMemoryError",
    "HostBackend",
    "InOrderRuntime",
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
]


def resolve_device(device: str | torch.device | int | None) -> torch.device:
    """Resolve what the user wrote to one device, with an index if it is an accelerator.

    The index is resolved here, once. Later, "cuda" would name a different device in a thread whose
    current device differs.

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
            raise ValueError(f"device={device!r} is not a device: {error}") from error
    if chosen.type == "cpu":
        return torch.device("cpu")
    if accelerator is None or chosen.type != accelerator.type:
        has = f"has {accelerator.type}" if accelerator else "has no accelerator"
        raise ValueError(f'device={device!r} is not available: this machine {has}; use "cpu"')
    index = torch.accelerator.current_device_index() if chosen.index is None else chosen.index
    count = torch.accelerator.device_count()
    if index >= count:
        raise ValueError(f"device={device!r} is not available: there are {count} of that type")
    return torch.device(chosen.type, index)


def open_backend(device: torch.device) -> Backend:
    """A new backend for `device`, which is a result of `resolve_device`."""
    if device.type == "cpu":
        return HostBackend()
    if device.type == "mps":
        return AcceleratorBackend(InOrderRuntime(device))
    return AcceleratorBackend(TorchRuntime(device))
