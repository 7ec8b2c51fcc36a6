"""DataLoader and IterDataPipe, for real."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdata.nodes as tn
from torch.utils.data import DataLoader
from torch.utils.data.datapipes.iter import IterableWrapper

import gpucache_pipes.adapters.datapipes
from gpucache_pipes import GPUCachedPathDataLoader, GPUFeatureStore

Files = Callable[..., list[str]]


def labels(batches: Any) -> list[Any]:
    return [batch["label"].flatten().tolist() for batch in batches]


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
