"""Modes of torch that change what tensors are, where they land, or what may wait."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import ACCELERATOR
from edges import new_backend
from gpu_common import cuda, first_column, rows, wait

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, Padded, PathLister

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("asynchronous", [True, False])
def test_training_goes_on_after_a_consumer_under_inference_mode(asynchronous: bool) -> None:
    """Its first batch makes the arena, and must not make it of inference tensors."""
    files = rows(64)
    names = list(files)
    with GPUFeatureStore(
        new_backend(), load_fn=files.__getitem__, asynchronous=asynchronous, max_cache_items=24
    ) as store:
        with torch.inference_mode():
            assert first_column(store.get_batch(names[:8]).collate()) == list(range(8))
        weight = torch.ones((), device=ACCELERATOR, requires_grad=True)
        for _ in range(2):
            for start in range(0, 64, 8):
                batch = store.get_batch(names[start : start + 8]).collate()
                assert first_column(batch) == list(range(start, start + 8))
                (batch * weight).sum().backward()
        assert weight.grad is not None
        assert float(weight.grad) == 2 * sum(range(64)) * 1024
        store.check()


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device(ACCELERATOR)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    "options",
    [{}, {"shuffle": True}, {"shuffle": True, "bucket_by": lambda path: int(path[3:]) % 7}],
    ids=["in order", "shuffled", "by size"],
)
@pytest.mark.parametrize("ragged", ["error", "pad", "jagged", "list"])
def test_a_default_device_changes_no_batch(options: dict[str, Any], ragged: str) -> None:
    files = {
        f"/f/{n}": {
            "x": torch.full((4 if ragged == "error" else 1 + n % 5, 3), float(n)),
            "n": n,
            "label": torch.tensor(n),
        }
        for n in range(60)
    }

    def epochs() -> list[Any]:
        with GPUFeatureStore(new_backend(), load_fn=files.__getitem__, max_cache_items=30) as store:
            lister = PathLister(list(files), batch_size=8, **options)
            mode = "error" if ragged == "error" else {"x": ragged}
            node = GPUCollator(GPUPrefetcher(lister, store), ragged=mode)
            found = []
            for _ in range(2):
                node.reset()
                found += [on_host(batch) for batch in node]
            store.check()
            return found

    expected = epochs()
    with default_device():
        found = epochs()
    assert len(found) == 16
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == theirs


def on_host(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch as lists of numbers; a jagged tensor as a list for each feature."""
    x = batch["x"]
    if isinstance(x, Padded):
        numbers = [part.tolist() for part in x]
    else:
        numbers = [row.tolist() for row in (x.unbind() if isinstance(x, torch.Tensor) else x)]
    return {"x": numbers, "n": batch["n"].tolist(), "label": batch["label"].tolist()}


@cuda
@pytest.mark.parametrize("mode", ["pad", "jagged"])
@pytest.mark.parametrize("plain", [False, True], ids=["tensors", "with plain numbers"])
def test_the_host_never_waits_for_warm_ragged_batches(mode: str, plain: bool) -> None:
    files: dict[str, Any] = {}
    for n in range(256):
        files[f"/f/{n}"] = {"x": torch.full((1 + n % 9, 4), float(n)), "id": torch.tensor(n)}
        if plain:
            files[f"/f/{n}"] |= {"weight": n / 2, "count": n}
    with GPUFeatureStore("cuda", load_fn=files.__getitem__) as store:
        lister = PathLister(list(files), batch_size=32)
        node = GPUCollator(GPUPrefetcher(lister, store), ragged={"x": mode})
        batches = list(node)
        wait()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                node.reset()
                batches = list(node)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert [n for batch in batches for n in batch["id"].tolist()] == list(range(256))
        if plain:
            assert [n for batch in batches for n in batch["count"].tolist()] == list(range(256))
