"""release() and clear()."""

import os
from collections.abc import Callable

import torch
from conftest import Gate

from gpucache_pipes import GPUFeatureStore

Files = Callable[..., list[str]]


def test_release_and_clear(make_files: Files) -> None:
    paths = make_files(4)
    with GPUFeatureStore("cpu") as store:
        held = store.request(paths)
        store.get_batch(paths)
        store.release([paths[0], "/never/seen"])
        assert paths[0] not in store and len(store) == 3
        store.clear()
        assert len(store) == 0 and store.stats().bypassed_items == 4
        assert store.stats().reserved_bytes > 0
        assert [int(f["label"]) for f in held.result()] == [0, 1, 2, 3]
        assert store.stats().bypassed_items == 0
        store.clear()
        assert store.stats().reserved_bytes == 0 and store.stats().page_bytes == 0
        assert int(store.get(paths[1])["label"]) == 1


def test_release_while_loading() -> None:
    gate = Gate({"/a": torch.tensor([1.0])})
    with GPUFeatureStore("cpu", load_fn=gate) as store:
        batch = store.request(["/a"])
        gate.wait_until_started("/a")
        store.release(["/a"])
        gate.open("/a")
        assert float(batch.result()[0]) == 1
        assert "/a" not in store


def test_clear_while_a_request_is_being_made(make_files: Files) -> None:
    paths = make_files(3)
    with GPUFeatureStore("cpu") as store:
        store.get_batch(paths[:2])

        class Clears(os.PathLike[str]):
            def __fspath__(self) -> str:
                store.clear()
                store.get_batch(paths[1:])
                return paths[2]

        assert [int(f["label"]) for f in store.get_batch([paths[0], Clears()])] == [0, 2]


def test_clear_gives_memory_back_with_the_last_batch(make_files: Files) -> None:
    paths = make_files(3)
    with GPUFeatureStore("cpu") as store:
        batch = store.request(paths)
        store.get_batch(paths)
        store.clear()
        assert store.stats().reserved_bytes > 0
        batch.result()
        assert store.stats().reserved_bytes == 0
