"""Device memory: pages, uploads and gathers. The only room that knows streams."""

import torch

from gpucache_pipes.device.accelerator import AcceleratorBackend
from gpucache_pipes.device.backend import Backend, Column, Upload
from gpucache_pipes.device.host import HostBackend
from gpucache_pipes.device.memory import available_host_bytes
from gpucache_pipes.device.runtime import InOrderRuntime, Runtime, TorchRuntime

__all__ = [
    "AcceleratorBackend",
    "Backend",
    "Column",
    "HostBackend",
    "InOrderRuntime",
    "Runtime",
    "TorchRuntime",
    "Upload",
    "available_host_bytes",
    "open_backend",
    "resolve_device",
]


def resolve_device(device: str | torch.device | int | None) -> torch.device:
    """The device meant: None is the accelerator if there is one, else the CPU.

    An index is filled in here, once: later "cuda" would mean another device in a thread that
    has another current one. Raises ValueError for what is no device or is not there.
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
    """The backend for a resolved device."""
    if device.type == "cpu":
        return HostBackend()
    if device.type == "mps":
        return AcceleratorBackend(InOrderRuntime(device))
    return AcceleratorBackend(TorchRuntime(device))
