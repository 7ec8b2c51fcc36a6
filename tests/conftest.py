"""Fixtures, and what is checked after every test."""

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from time_limit import pytest_configure, pytest_runtest_protocol  # noqa: F401

from gpucache_pipes.cache import make_policy
from gpucache_pipes.device import AcceleratorBackend, InOrderRuntime
from gpucache_pipes.files import batch_reader
from gpucache_pipes.store import GPUFeatureStore, process_hooks
from gpucache_pipes.testing import SimulatedRuntime

pytest_plugins = ["remote.fixtures"]

LONG_COLLECTION = 0.03
"""Seconds for the garbage of one test. It takes longer only if modules have been imported."""

torch.set_num_threads(1)
# A shell that starts a job in the background has it ignore SIGINT, which tests send themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)
if "SWITCH_INTERVAL" in os.environ:  # seconds; see `make stress`
    sys.setswitchinterval(float(os.environ["SWITCH_INTERVAL"]))
ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)
if "TEST_DEVICE" in os.environ:  # another one, or "cpu" to try the tests for a device without one
    ACCELERATOR = torch.device(os.environ["TEST_DEVICE"])
BACKENDS = ["host", "staged", "simulated", pytest.param("accelerator", marks=pytest.mark.gpu)]


def device_for(kind: str, seed: int = 0) -> Any:
    """What to make a store on: one of BACKENDS."""
    if kind == "staged":
        return AcceleratorBackend(InOrderRuntime(torch.device("cpu")))
    if kind == "simulated":
        return AcceleratorBackend(SimulatedRuntime(seed))
    return "cpu" if kind == "host" else ACCELERATOR


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need an accelerator say why they are left out."""
    if ACCELERATOR is None:
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="there is no accelerator"))


@pytest.fixture
def python_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the native reader, as where there was no compiler."""
    monkeypatch.setattr(batch_reader, "_native", None)


settings.register_profile(
    "default",
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("long", parent=settings.get_profile("default"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True, scope="session")
def do_not_look_at_modules() -> None:
    """What imports have made is not looked at by the thousands of collections to come."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def check_every_store() -> Iterator[None]:
    """After each test every store is consistent, and closing it leaves no reader behind."""
    yield
    start = time.perf_counter()
    gc.collect()  # pipelines with threads of their own end before their store does
    if time.perf_counter() - start > LONG_COLLECTION:
        # Tests import large parts of torch. Those were looked at hundreds of times.
        gc.freeze()
    for store in list(process_hooks.registered()):
        assert isinstance(store, GPUFeatureStore)
        store.check()
        store.close()
    readers = [t for t in threading.enumerate() if t.name.startswith("gpucache")]
    for reader in readers:
        reader.join(10)  # of a store that was dropped: nobody waits for these
    assert not [reader.name for reader in readers if reader.is_alive()]


@pytest.fixture
def make_files(tmp_path: Path) -> Callable[..., list[str]]:
    """make_files(n, feature_of=...) -> paths of n new files."""

    def make(
        count: int, feature_of: Callable[[int], Any] | None = None, directory: str = "features"
    ) -> list[str]:
        root = tmp_path / directory
        root.mkdir(exist_ok=True)
        paths = []
        for number in range(count):
            path = str(root / f"{number:04d}.pt")
            torch.save(sample(number) if feature_of is None else feature_of(number), path)
            paths.append(path)
        return paths

    return make


def wait_for_readers(store: GPUFeatureStore) -> None:
    """Also those that read for pipelines that are gone, or that have been replaced."""
    assert store.wait_idle(60)


def sample(number: int, width: int = 8) -> dict[str, Any]:
    """The feature that make_files writes by default."""
    return {
        "feature": torch.arange(width, dtype=torch.float32) + number,
        "label": torch.tensor([number]),
    }


class Acting:
    """A policy that does something when a victim is to be chosen: so with the store's lock held."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._policy, self._action = make_policy("lru"), action

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def victims(self, key: int) -> Iterator[int]:
        self._action()
        return self._policy.victims(key)


for _name in ("on_access", "on_insert", "on_remove", "begin_epoch", "announce", "retract"):
    # isinstance with a protocol looks at the class.
    setattr(Acting, _name, lambda self, *args, _name=_name: getattr(self._policy, _name)(*args))


class Gate:
    """A load_fn that lets each file through only when told to: interleavings are forced."""

    def __init__(self, features: dict[str, Any]) -> None:
        self.features = features
        self.started: dict[str, threading.Event] = {}
        self.opened: dict[str, threading.Event] = {}
        self.loads: list[str] = []
        self._lock = threading.Lock()

    def _event(self, table: dict[str, threading.Event], path: str) -> threading.Event:
        with self._lock:
            return table.setdefault(path, threading.Event())

    def __call__(self, path: str) -> Any:
        self.loads.append(path)
        self._event(self.started, path).set()
        assert self._event(self.opened, path).wait(60), f"nobody opened the gate for {path}"
        feature = self.features[path]
        if isinstance(feature, BaseException):
            raise feature
        return feature

    def wait_until_started(self, path: str) -> None:
        assert self._event(self.started, path).wait(60)

    def open(self, *paths: str) -> None:
        for path in paths:
            self._event(self.opened, path).set()
