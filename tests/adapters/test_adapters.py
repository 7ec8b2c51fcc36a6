"""DataLoader and IterDataPipe, for real."""

import gc
import importlib
import inspect
import threading
import weakref
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torchdata.nodes as tn
from torch.utils.data import DataLoader
from torch.utils.data.datapipes.iter import FileLister, IterableWrapper

import gpucache_pipes.adapters.datapipes
from gpucache_pipes import (
    FeaturePathDataset,
    GPUCachedPathDataLoader,
    GPUCollator,
    GPUFeatureStore,
    GPUPrefetcher,
    PathLister,
)
from gpucache_pipes.store import StoreOptions

Files = Callable[..., list[str]]


def labels(batches: Any) -> list[Any]:
    return [batch["label"].flatten().tolist() for batch in batches]


def is_not_the_fourth(path: str) -> bool:
    return "0003" not in path


def sum_of_labels(batch: Any) -> Any:
    return batch["label"].sum()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_dataloader_in_one_line(make_files: Files, workers: int) -> None:
    paths = make_files(10)
    loader = DataLoader(paths, batch_size=4, num_workers=workers)  # type: ignore[arg-type]
    with GPUCachedPathDataLoader(loader, device="cpu", max_cache_bytes="1MiB") as batches:
        for _ in range(2):
            assert labels(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert len(batches) == 3
        assert batches.batch_size == 4 and batches.dataset is paths
        assert batches.store.stats().hit_rate == 0.5
        with pytest.raises(AttributeError):
            _ = batches.no_such_thing
    with pytest.raises(RuntimeError, match="closed"):
        batches.store.get(paths[0])


class Witness(FeaturePathDataset):
    """Says in the name of a path what it saw in the worker process that handled it."""

    def __getitem__(self, index: int) -> str:
        assert torch.utils.data.get_worker_info() is not None
        assert not torch.cuda.is_initialized()
        readers = [t.name for t in threading.enumerate() if t.name.startswith("gpucache")]
        assert not readers
        return super().__getitem__(index)

    __getitems__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_never_see_the_device(make_files: Files, context: str) -> None:
    loader: Any = DataLoader(
        Witness(make_files(8)),
        batch_size=3,
        num_workers=2,
        multiprocessing_context=context,
        persistent_workers=True,
    )
    with GPUCachedPathDataLoader(loader, device="cpu") as batches:
        batches.store.get(batches.dataset.paths[0])  # readers run before workers start
        for _ in range(2):
            assert labels(batches) == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_structured_batches(make_files: Files) -> None:
    paths = make_files(4)
    rows = [{"file": path, "weight": n} for n, path in enumerate(paths)]
    loader = DataLoader(rows, batch_size=2)  # type: ignore[arg-type]
    options: dict[str, Any] = {"device": "cpu", "path_extractor": lambda batch: batch["file"]}
    with GPUCachedPathDataLoader(loader, **options) as batches:
        features, batch = next(iter(batches))
        assert labels([features]) == [[0, 1]] and batch["weight"].tolist() == [0, 1]
    built = GPUCachedPathDataLoader(
        loader,
        **options,
        collate_fn=lambda features: [int(f["label"]) for f in features],
        build_batch_fn=lambda gpu, batch, paths: (gpu, batch["weight"].tolist(), len(paths)),
    )
    with built:
        assert list(built) == [([0, 1], [0, 1], 2), ([2, 3], [2, 3], 2)]


def test_two_iterations_at_once(make_files: Files) -> None:
    paths = make_files(6)
    with GPUFeatureStore("cpu") as store:
        batches = GPUCachedPathDataLoader(DataLoader(paths, batch_size=2), store=store)  # type: ignore[arg-type]
        pairs = list(zip(batches, batches, strict=True))
        assert (
            labels(a for a, _ in pairs) == labels(b for _, b in pairs) == [[0, 1], [2, 3], [4, 5]]
        )
        batches.close()
        assert int(store.get(paths[0])["label"]) == 0  # the store was not this loader's to close
        for _ in batches:
            break
        store.check()


def test_clear_errors(make_files: Files) -> None:
    paths = make_files(2)
    with pytest.raises(ValueError, match="prefetch_batches=0"):
        GPUCachedPathDataLoader([paths], device="cpu", prefetch_batches=0)
    with (
        GPUFeatureStore("cpu") as store,
        pytest.raises(ValueError, match="device, max_cache_bytes"),
    ):
        GPUCachedPathDataLoader([paths], store=store, device="cpu", max_cache_bytes=1)
    with (
        GPUCachedPathDataLoader(DataLoader(paths, batch_size=None), device="cpu") as batches,  # type: ignore[arg-type]
        pytest.raises(TypeError, match="batch_size"),
    ):
        list(batches)


def test_datapipes(make_files: Files) -> None:
    paths = make_files(7)
    importlib.reload(gpucache_pipes.adapters.datapipes)  # registering twice does no harm
    with GPUFeatureStore("cpu") as store:
        pipe = IterableWrapper(paths).batch(3).gpu_prefetch(store, depth=2).gpu_collate()
        for _ in range(2):
            assert labels(pipe) == [[0, 1, 2], [3, 4, 5], [6]]
        chained = pipe.map(sum_of_labels)
        assert [int(s) for s in chained] == [3, 12, 6]
        assert len(pipe) == 3
        singles = IterableWrapper(paths).gpu_prefetch(store, 4).gpu_collate(batch_size=4)
        assert labels(singles) == [[0, 1, 2, 3], [4, 5, 6]]
        assert len(singles) == 2
        assert labels(tn.Loader(tn.IterableWrapper(pipe))) == [[0, 1, 2], [3, 4, 5], [6]]
        with pytest.raises(ValueError, match="depth=0"):
            IterableWrapper(paths).gpu_prefetch(store, 0)
        with pytest.raises(ValueError, match="batch_size=0"):
            IterableWrapper(paths).gpu_collate(batch_size=0)


def test_datapipes_and_nodes_behind_each_other(make_files: Files, tmp_path: Path) -> None:
    paths = make_files(7)
    with GPUFeatureStore("cpu") as store:
        # As in the README: a directory, shuffled, in batches.
        files = FileLister(str(Path(paths[0]).parent), "*.pt").shuffle().batch(3)
        pipe = files.gpu_prefetch(store).gpu_collate()
        assert sorted(chain.from_iterable(labels(pipe))) == list(range(7))
        # Nodes in front of a pipe, and behind one.
        nodes = PathLister(paths, batch_size=3)
        assert labels(IterableWrapper(nodes).gpu_prefetch(store).gpu_collate())[0] == [0, 1, 2]
        behind = tn.Mapper(tn.IterableWrapper(pipe), sum_of_labels)
        assert sum(int(total) for total in tn.Loader(behind)) == 21
        listed = PathLister(IterableWrapper(paths).filter(is_not_the_fourth))
        singles = GPUPrefetcher(listed, store)
        assert labels(GPUCollator(singles, batch_size=4)) == [[0, 1, 2, 4], [5, 6]]


def test_ragged_through_the_adapters(make_files: Files) -> None:
    paths = make_files(2, lambda n: {"x": torch.ones(2 + n)})
    with GPUFeatureStore("cpu") as store:
        [batch] = GPUCachedPathDataLoader([paths], store=store, ragged="pad", padding_value=7)
        assert batch["x"].values.tolist() == [[1, 1, 7], [1, 1, 1]]
        with pytest.raises(ValueError, match="ragged"):
            GPUCachedPathDataLoader([paths], store=store, ragged="cut")


@pytest.mark.parametrize("given", [RuntimeError, StopIteration])
def test_what_build_batch_fn_raises(make_files: Files, given: type[Exception]) -> None:
    def build(*_: Any) -> Any:
        raise given

    with GPUCachedPathDataLoader([make_files(1)], device="cpu", build_batch_fn=build) as batches:
        for _ in range(2):
            with pytest.raises(RuntimeError):
                next(iter(batches))


def test_functions_as_arguments_reach_the_nodes(make_files: Files) -> None:
    paths = make_files(2)
    rows = [(path, n) for n, path in enumerate(paths)]
    with GPUFeatureStore("cpu") as store:
        pipe = IterableWrapper(rows).gpu_prefetch(
            store, path_fn=lambda row: row[0], join_fn=lambda feature, row: (feature, row[1])
        )
        assert [(int(f["label"]), n) for f, n in pipe] == [(0, 0), (1, 1)]
        lists = IterableWrapper([paths]).gpu_prefetch(store)
        assert list(lists.gpu_collate(collate_fn=len)) == [2]
        assert isinstance(next(iter(lists))[0]["label"], torch.Tensor)


def test_a_loader_that_is_dropped_gives_its_store_back(make_files: Files) -> None:
    """At once, and not when the garbage collector runs."""
    gc.collect()
    gc.disable()
    try:
        batches = GPUCachedPathDataLoader([make_files(2)], device="cpu")
        assert labels(batches) == [[0, 1]]
        gone = weakref.ref(batches), weakref.ref(batches.store)
        del batches
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


def test_options_are_checked_without_touching_anything(make_files: Files) -> None:
    """Wrong ones are an error when a pipeline is made, and not in the middle of a run."""
    pipe = IterableWrapper([make_files(2)])
    with GPUFeatureStore("cpu") as store:
        for options in ({"join_fn": max}, {"on_error": "ignore"}, {"max_failures": 1}):
            with pytest.raises(ValueError, match=next(iter(options))):
                pipe.gpu_prefetch(store, **options)
        with pytest.raises(TypeError, match="must be a GPUFeatureStore, not str"):
            pipe.gpu_prefetch("store")
        with pytest.raises(TypeError, match="no_such_option"):
            pipe.gpu_prefetch(store).gpu_collate(no_such_option=1)
        with pytest.raises(ValueError, match="ragged='cut'"):
            pipe.gpu_prefetch(store).gpu_collate(ragged="cut")


def test_options_of_the_store_are_typed() -> None:
    """As GPUFeatureStore has them."""
    parameters = set(inspect.signature(GPUFeatureStore.__init__).parameters)
    own = {"self", "device", "max_cache_bytes", "max_cache_items"}
    assert set(StoreOptions.__annotations__) == parameters - own
