"""NodeLoader: torchdata's Loader with what training loops ask for."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from torchdata.nodes import Batcher, IterableWrapper, Loader, Mapper, Prefetcher

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, NodeLoader, PathLister

Files = Callable[[int], list[str]]


@pytest.fixture
def store() -> Any:
    with GPUFeatureStore("cpu") as made:
        yield made


def numbers(loader: Any) -> list[list[int]]:
    return [batch["n"].tolist() for batch in loader]


def pipeline(paths: list[str], store: GPUFeatureStore) -> GPUCollator:
    lister = PathLister(paths, batch_size=3, shuffle=True, seed=1)
    return GPUCollator(GPUPrefetcher(lister, store))


@pytest.fixture
def paths(make_files: Any) -> list[str]:
    made: list[str] = make_files(10, lambda n: {"n": n})
    return made


def test_it_is_the_loader(paths: list[str], store: GPUFeatureStore) -> None:
    """Batches, epochs and states are those of torchdata's."""
    ours, theirs = NodeLoader(pipeline(paths, store)), Loader(pipeline(paths, store))
    for _ in range(2):
        assert numbers(ours) == numbers(theirs)
    for _ in zip(ours, range(2), strict=False):
        pass
    state = json.loads(json.dumps(ours.state_dict()))
    again, torchs = NodeLoader(pipeline(paths, store)), Loader(pipeline(paths, store))
    again.load_state_dict(state)
    torchs.load_state_dict(state)
    assert numbers(again) == numbers(torchs)


def test_length_epoch_and_figures(paths: list[str], store: GPUFeatureStore) -> None:
    loader = NodeLoader(Prefetcher(Mapper(pipeline(paths, store), dict), 2))
    assert len(loader) == len(numbers(loader)) == 4
    second = numbers(loader)
    loader.set_epoch(1)
    assert numbers(loader) == second
    assert loader.stats().hits == 20
    assert repr(loader) == "NodeLoader(Prefetcher)"
    assert repr(NodeLoader(pipeline(paths, store))).startswith("NodeLoader(GPUCollator(GPUPref")


def test_what_is_not_known(paths: list[str], store: GPUFeatureStore) -> None:
    grouped = NodeLoader(Batcher(pipeline(paths, store), 2))
    assert grouped and len(list(grouped)) == 2
    streamed = NodeLoader(IterableWrapper(range(3)))
    for loader in (grouped, streamed):
        with pytest.raises(TypeError, match="is not known in advance"):
            len(loader)
    with pytest.raises(TypeError, match="no PathLister"):
        streamed.set_epoch(3)
    with pytest.raises(TypeError, match="no GPUPrefetcher"):
        streamed.stats()
