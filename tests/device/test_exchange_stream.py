"""The two edges of `device.exchange_stream`, by exchanges of one rank with itself."""

import contextlib
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gpucache_pipes import GPUFeatureStore
from gpucache_pipes.device import AcceleratorBackend
from gpucache_pipes.device.exchange_stream import OwnExchangeStream
from gpucache_pipes.peers import Contents, Exchange, PeerGroup, Schedule, exchange
from gpucache_pipes.store import PendingBatch
from gpucache_pipes.testing import SimulatedRuntime, UnorderedAccessError

FILES = {
    f"/f/{n}.pt": {"feature": torch.full((40 + n % 2 * 9,), float(n)), "label": torch.tensor([n])}
    for n in range(12)
}
PATHS = list(FILES)


class Alone:
    """A group of one rank, whose messages come back to it."""

    ranks = (0,)
    index = 0
    files_received = bytes_received = 0

    def __init__(self, sends_device_memory: bool) -> None:
        self.sends_device_memory = sends_device_memory
        self.connection = self
        self.left: deque[Any] = deque()

    def __len__(self) -> int:
        return 1

    def host(self) -> None:
        """No process group."""

    data = host

    @contextlib.contextmanager
    def waiting(self, where: str) -> Any:
        yield


class Work:
    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait


def transport(runtime: SimulatedRuntime) -> Callable[..., Work]:
    """Sends as NCCL does: on a stream of its own, which the current one waits for in `wait`."""
    stream = runtime.new_stream()

    def start(landed: Any, sent: Any, incoming: Any, outgoing: Any, group: Any) -> Work:
        assert incoming.tolist() == outgoing.tolist() == [len(sent)] == [len(landed)]
        if not hasattr(sent, "content"):
            landed.copy_(sent)
            return Work(lambda: None)
        begin, end = runtime.new_event(), runtime.new_event()
        begin.record(runtime.current_stream())
        with runtime.on(stream):
            stream.wait_event(begin)
            landed.copy_(sent)
            end.record(stream)
        # It holds what is sent until then.
        return Work(lambda held=sent: runtime.current_stream().wait_event(end))  # type: ignore[misc]

    return start


class Served:
    def __init__(self, store: GPUFeatureStore, batch: PendingBatch) -> None:
        self.store, self.batch = store, batch

    def look(self) -> Contents:
        return self.store.serving.look(self.batch)

    def pack(self) -> torch.Tensor:
        return self.store.serving.pack(self.batch)

    def abandon(self) -> None:
        self.batch.cancel()


def exchange_with_itself(
    runtime: SimulatedRuntime, seed: int, by_device: bool, settles: bool = True
) -> None:
    """Three epochs of messages, of which the first ones are broken off."""
    choose = random.Random(seed)
    streams = [runtime.new_stream() for _ in range(2)]
    held: list[tuple[Any, Any, list[int]]] = []
    group: Any = Alone(by_device)
    with GPUFeatureStore(
        AcceleratorBackend(runtime), load_fn=FILES.__getitem__, max_cache_items=5, policy="lru",
        asynchronous=False, page_bytes=64,
    ) as store:  # fmt: skip
        backend, stream = store.serving.backend, store.serving.stream
        for steps in (choose.randint(3, 9), choose.randint(3, 9), 40):
            orders = np.array([[choose.randrange(12) for _ in range(3 * 40)]])
            schedule = Schedule(orders, 3, np.zeros(12, np.int16), 0)
            schedule.crosses[:] = True

            def serve(step: int, schedule: Schedule = schedule) -> Served:
                files, _ = schedule.served(step)
                return Served(store, store.request([PATHS[n] for n in files]))

            with stream.issuing() if settles else contextlib.nullcontext():
                PeerGroup.settle(group, "")
            messages = Exchange(group, schedule, 2, backend, stream, serve)
            for step in range(steps + 2):
                messages.send(step, "")
                if messages.error is not None:
                    raise messages.error
                if step < 2:
                    continue
                files = schedule.own(step - 2).tolist()
                paths = [PATHS[n] for n in files]
                arrival = messages.arrival(step - 2, "")
                consumer = choose.choice(streams)
                with runtime.on(consumer):
                    batch = arrival.batch(backend, paths, slice(0, 3))
                held.append((batch, consumer, files))
                messages.forget(step - 2)
                del arrival
                while len(held) > 6:
                    look_at(runtime, *held.pop(0))
            group.left.extend(messages.release())
            del messages
        store.check()


def look_at(runtime: SimulatedRuntime, batch: Any, stream: Any, files: list[int]) -> None:
    with runtime.on(stream):
        for number, feature in zip(files, batch, strict=True):
            assert feature["label"].tolist() == [number]
            expected = FILES[PATHS[number]]["feature"]
            assert feature["feature"].cpu().tolist() == expected.tolist()


@pytest.mark.parametrize("by_device", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_every_access_is_in_order(
    seed: int, by_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = SimulatedRuntime(seed, haste=(0, 0.3, 0.7)[seed % 3])
    monkeypatch.setattr(exchange, "_start", transport(runtime))
    exchange_with_itself(runtime, seed, by_device)


def forget_the_arrival(stream: OwnExchangeStream, consumer: Any, mark: Any) -> None:
    """A consumer does not wait."""


def forget_the_reading(stream: OwnExchangeStream) -> None:
    """Memory is used again whoever reads it."""
    stream._taken = []


@pytest.mark.parametrize("by_device", [True, False])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("name", "without"),
    [("_wait_for", forget_the_arrival), ("_reuse_memory", forget_the_reading)],
)
def test_no_edge_can_be_left_out(
    name: str,
    without: Callable[..., None],
    seed: int,
    by_device: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = SimulatedRuntime(seed, haste=(0, 0.02)[seed % 2])
    monkeypatch.setattr(exchange, "_start", transport(runtime))
    monkeypatch.setattr(OwnExchangeStream, name, without)
    with pytest.raises(UnorderedAccessError):
        exchange_with_itself(runtime, seed, by_device)


def test_what_is_left_of_an_epoch_is_waited_for_on_the_stream_of_the_exchange(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its memory may not be used again at once, so that not every seed finds that it was not."""
    found = 0
    for seed in range(8):
        runtime = SimulatedRuntime(seed, haste=0)
        monkeypatch.setattr(exchange, "_start", transport(runtime))
        try:
            exchange_with_itself(runtime, seed, by_device=True, settles=False)
        except UnorderedAccessError:
            found += 1
    assert found >= 4
