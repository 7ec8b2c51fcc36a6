"""On a real device: no waiting by the host, no growth, and training as people do it.

`make gpu-check` runs these, together with the tests of the other files that take the device as a
parameter.
"""

import random
from collections.abc import Iterator

import pytest
import torch
from conftest import ACCELERATOR
from gpu_common import cuda, first_column, rows

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister
from gpucache_pipes.testing.contracts import in_threads

pytestmark = pytest.mark.gpu


@cuda
@pytest.mark.parametrize("max_cache_bytes", [None, "64MiB"])
def test_the_host_never_waits_in_a_warm_epoch(max_cache_bytes: str | None) -> None:
    files = rows(512)
    with GPUFeatureStore(
        "cuda", load_fn=files.__getitem__, max_cache_bytes=max_cache_bytes
    ) as store:
        node = GPUCollator(GPUPrefetcher(PathLister(list(files), batch_size=32), store))
        batches = list(node)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                node.reset()
                batches = list(node)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert [n for batch in batches for n in first_column(batch)] == list(range(512))


def test_ten_thousand_batches_from_a_tenth_of_the_memory() -> None:
    files = rows(400, width=64)
    names = list(files)
    choose = random.Random(0)
    expected = torch.stack(list(files.values())).to(ACCELERATOR)
    wrong = torch.zeros((), dtype=torch.int64, device=ACCELERATOR)
    with GPUFeatureStore(
        ACCELERATOR, load_fn=files.__getitem__, max_cache_items=40, reader_threads=2
    ) as store:
        for _ in range(10_000):
            wanted = [choose.randrange(400) for _ in range(16)]
            batch = store.get_batch([names[n] for n in wanted]).collate()
            wrong += (batch != expected[torch.tensor(wanted).to(ACCELERATOR)]).sum()
        store.check()
    assert int(wrong) == 0


@cuda
def test_memory_does_not_grow_over_epochs() -> None:
    files = rows(256)
    with GPUFeatureStore("cuda", load_fn=files.__getitem__, max_cache_items=64) as store:
        lister = PathLister(list(files), batch_size=32, shuffle=True)
        node = GPUCollator(GPUPrefetcher(lister, store))
        reserved = []
        for epoch in range(50):
            node.reset()
            for batch in node:
                del batch
            torch.cuda.synchronize()
            if epoch >= 5:
                reserved.append(torch.cuda.memory_reserved())
    assert len(set(reserved)) == 1, reserved


@cuda
def test_consumers_on_streams_of_their_own() -> None:
    files = rows(64)
    names = list(files)
    with GPUFeatureStore("cuda", load_fn=files.__getitem__, max_cache_items=16) as store:

        def consume(seed: int) -> None:
            choose = random.Random(seed)
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(300):
                    wanted = [choose.randrange(64) for _ in range(8)]
                    batch = store.get_batch([names[n] for n in wanted]).collate()
                    if choose.random() < 0.2:
                        torch.cuda._sleep(100_000)
                    assert first_column(batch) == wanted

        in_threads(consume, 3)
        store.check()


def test_training_under_torch_compile() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(32, generator=generator)
    inputs = torch.randn(256, 32, generator=generator)
    files = {f"/f/{n}": {"x": x, "y": x @ truth} for n, x in enumerate(inputs)}
    model = torch.nn.Linear(32, 1).to(ACCELERATOR)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    @torch.compile
    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(model(x)[:, 0], y)

    def losses() -> Iterator[float]:
        with GPUFeatureStore(ACCELERATOR, load_fn=files.__getitem__, max_cache_items=100) as store:
            lister = PathLister(list(files), batch_size=32, shuffle=True)
            node = GPUCollator(GPUPrefetcher(lister, store))
            for _ in range(10):
                node.reset()
                for batch in node:
                    loss = loss_of(batch["x"], batch["y"])
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                yield float(loss.detach())

    series = list(losses())
    assert series[-1] < series[0] / 20
