"""Errors of a device, which are nobody's file's fault."""

import torch

_CAPTURE = range(900, 911)
"""The codes of cudaError_t that concern the capture of a graph."""


_OUT_OF_MEMORY = (
    "error: out of memory",
    "MPS backend out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class DeviceMemoryError(torch.OutOfMemoryError, MemoryError):
    """The device has no memory for what a batch needs.

    Both torch's exception and Python's: `except` clauses for either keep working.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device has no memory: torch has a class for most cases, and none for others."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def is_device_error(error: BaseException) -> bool:
    """Whether the device has failed, in any way but a lack of memory."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def ends_the_device(error: BaseException) -> bool:
    """Whether nothing works on the device any more, as after a device-side assert.

    An operation that another thread's capture of a graph forbids does no such harm.
    """
    if not is_device_error(error):
        return False
    code = getattr(error, "error_code", None)
    return code not in _CAPTURE and "captur" not in str(error)
