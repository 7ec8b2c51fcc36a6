"""The only module of these tests that knows the inside of AcceleratorBackend.

It makes backends, keeps their copy stream busy, and leaves out one of the edges between streams.
"""

from typing import Any

import pytest
import torch
from conftest import ACCELERATOR

from gpucache_pipes.device import (
    AcceleratorBackend,
    InOrderRuntime,
    TorchRuntime,
    resolve_device,
)
from gpucache_pipes.device.staging import StagingLane

LONG = 50_000_000
"""Cycles for which a stream is kept busy: some 30 ms, much longer than anything else here."""


def new_backend(device: Any = None) -> AcceleratorBackend:
    """The backend for accelerators, on the device of the tests, or with the CPU in its place."""
    found = resolve_device(ACCELERATOR if device is None else device)
    if found.type == "cpu":
        return AcceleratorBackend(InOrderRuntime(found))
    return AcceleratorBackend(TorchRuntime(found))


def keep_copy_stream_busy(backend: AcceleratorBackend) -> None:
    with backend._runtime.on(backend._copy_stream):
        torch.cuda._sleep(LONG)


def without_uploaded(backend: AcceleratorBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathers do not wait for uploads."""
    monkeypatch.setattr(backend._uploads, "hold_back", _do_not_wait)


def without_read_done(backend: AcceleratorBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads do not wait for gathers."""
    monkeypatch.setattr(backend._gathers, "hold_back", _do_not_wait)


def without_staging_free(backend: AcceleratorBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host does not wait for uploads before it writes to staging again."""
    monkeypatch.setattr(StagingLane, "busy_until", lambda self, upload: None)


def _do_not_wait(stream: Any, pages: Any) -> None:
    pass
