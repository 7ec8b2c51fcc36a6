"""Errors of the device are not errors of files: raised as they are, never skipped."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister
from gpucache_pipes.device import (
    AcceleratorBackend,
    DeviceMemoryError,
    InOrderRuntime,
    ends_the_device,
    is_device_error,
    is_out_of_memory,
)

FILES = {f"/f/{n}.pt": torch.full((8,), float(n)) for n in range(12)}
PATHS = list(FILES)


def accelerator_error(text: str, code: int) -> RuntimeError:
    error = torch.AcceleratorError(text)
    error.error_code = code  # type: ignore[attr-defined]
    return error


def an_assert() -> RuntimeError:
    return accelerator_error("CUDA error: device-side assert triggered", 710)


def a_capture() -> RuntimeError:
    return accelerator_error("CUDA error: operation not permitted when stream is capturing", 900)


class FailingBackend(AcceleratorBackend):
    """Raises `error`, once it is set, where a method with this name is called."""

    def __init__(self, method: str) -> None:
        super().__init__(InOrderRuntime(torch.device("cpu")))
        self.method = method
        self.error: Exception | None = None

    def _fail(self, method: str) -> None:
        if method == self.method and self.error is not None:
            raise self.error

    def upload(self, placements: Any) -> Any:
        self._fail("upload")
        return super().upload(placements)

    def submit(self, staging: Any, pages: Any) -> Any:
        self._fail("submit")
        return super().submit(staging, pages)

    def grow(self, needed: int, useful: int | None, known: int | None = None) -> int:
        self._fail("grow")
        return super().grow(needed, useful, known)

    def gather(self, pages: Any, columns: Any) -> Any:
        self._fail("gather")
        return super().gather(pages, columns)


METHODS = ["upload", "submit", "gather"]


@pytest.mark.parametrize("on_error", ["raise", "skip", lambda path, error: torch.zeros(8)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reader_threads", [0, 2])
def test_a_failed_device_ends_the_store_with_its_error(
    method: str, on_error: Any, reader_threads: int
) -> None:
    backend = FailingBackend(method)
    with GPUFeatureStore(
        backend,
        load_fn=FILES.__getitem__,
        asynchronous=reader_threads > 0,
        reader_threads=reader_threads or None,
    ) as store:
        features = GPUPrefetcher(PathLister(PATHS, batch_size=3), store, depth=1, on_error=on_error)
        node = GPUCollator(features)
        next(node)
        backend.error = an_assert()
        with pytest.raises(torch.AcceleratorError, match="device-side assert") as caught:
            list(node)
        assert caught.value is backend.error
        for call in (lambda: store.get(PATHS[0]), lambda: store.request(PATHS), lambda: next(node)):
            with pytest.raises(torch.AcceleratorError):
                call()
        assert store.stats().skipped == 0
        store.check()


def test_a_failed_device_in_a_load_fn_is_no_error_of_that_file() -> None:
    error = an_assert()

    def load(path: str) -> Any:
        if path == PATHS[1]:
            raise error
        return FILES[path]

    with GPUFeatureStore("cpu", load_fn=load) as store:
        node = GPUPrefetcher(PathLister(PATHS, batch_size=4), store, on_error="skip")
        with pytest.raises(torch.AcceleratorError) as caught:
            next(node)
        assert caught.value is error


@pytest.mark.parametrize("method", ["upload", "submit"])
def test_a_capture_in_another_thread_drops_no_file(method: str) -> None:
    backend = FailingBackend(method)
    with GPUFeatureStore(backend, load_fn=FILES.__getitem__) as store:
        features = GPUPrefetcher(PathLister(PATHS, batch_size=3), store, on_error="skip")
        backend.error = a_capture()
        with pytest.raises(torch.AcceleratorError, match="capturing"):
            next(features)
        backend.error = None
        # Nothing is lost: the files are read when they are requested next.
        assert [int(f[0]) for f in store.get_batch(PATHS)] == list(range(12))
        assert store.stats().skipped == 0
        store.check()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        lambda: accelerator_error("CUDA error: out of memory", 2),
    ],
)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_lack_of_device_memory_is_both_exceptions_for_it(
    make: Callable[[], Exception], on_error: Any
) -> None:
    lacking = [make()]

    def load(path: str) -> Any:
        if lacking:
            raise lacking[0]
        return FILES[path]

    with GPUFeatureStore("cpu", load_fn=load) as store:
        node = GPUPrefetcher(PathLister(PATHS, batch_size=4), store, on_error=on_error)
        with pytest.raises(DeviceMemoryError, match=r"0\.pt.*out of memory") as caught:
            next(node)
        assert isinstance(caught.value, torch.OutOfMemoryError)
        assert isinstance(caught.value, MemoryError)
        assert store.wait_idle(60)  # a request that joins a read under way gets what that gives
        lacking.clear()
        node.reset()
        assert len(list(node)) == 3


def test_a_lack_of_memory_while_collating_stays_what_it_is() -> None:
    backend = FailingBackend("gather")
    with GPUFeatureStore(backend, load_fn=FILES.__getitem__) as store:
        node = GPUCollator(GPUPrefetcher(PathLister(PATHS, batch_size=3), store))
        backend.error = torch.OutOfMemoryError("CUDA out of memory")
        with pytest.raises(torch.OutOfMemoryError) as caught:
            next(node)
        assert caught.value is backend.error
        backend.error = None
        assert next(node).shape == (3, 8)


class Sticky(InOrderRuntime):
    """A device on which every call fails once it has failed."""

    failed = False

    def new_stream(self) -> Any:
        runtime, stream = self, super().new_stream()

        class Stream(type(stream)):  # type: ignore[misc]
            def synchronize(self) -> None:
                if runtime.failed:
                    raise an_assert()

        return Stream(self.device)

    current_stream = new_stream
    new_event = new_stream


def test_closing_after_the_device_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    runtime = Sticky(torch.device("cpu"))
    store = GPUFeatureStore(AcceleratorBackend(runtime), load_fn=FILES.__getitem__)
    batch = store.get_batch(PATHS)
    runtime.failed = True
    with caplog.at_level(logging.ERROR, "gpucache_pipes"):
        store.close()
    assert "has failed" in caplog.text
    stats = store.stats()
    assert (stats.reserved_bytes, stats.staging_bytes) == (0, 0)
    assert len(batch) == 12
    store.close()


def test_which_errors_are_the_devices() -> None:
    assert is_device_error(an_assert()) and ends_the_device(an_assert())
    assert is_device_error(a_capture()) and not ends_the_device(a_capture())
    for text in (
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling",
    ):
        full = RuntimeError(text)
        assert is_out_of_memory(full) and not is_device_error(full)
    # Of cuBLAS, in a load_fn: the device goes on working.
    assert not is_device_error(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))
    for other in (RuntimeError("shapes differ"), ValueError("CUDA error"), OSError(5, "I/O error")):
        assert not is_device_error(other) and not is_out_of_memory(other)
