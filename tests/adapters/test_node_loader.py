"""NodeLoader: torchdata's Loader with what training loops ask for."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from torchdata.nodes import (
    Batcher,
    IterableWrapper,
    Loader,
    Mapper,
    MultiNodeWeightedSampler,
    Prefetcher,
)

from gpucache_pipes import (
    GPUCachedPathDataLoader,
    GPUCollator,
    GPUFeatureStore,
    GPUPrefetcher,
    Lockstep,
    NodeLoader,
    PathLister,
)

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
    streamed = NodeLoader(IterableWrapper(iter(range(3))))
    for loader in (grouped, streamed):
        with pytest.raises(TypeError, match=r"is not known in advance.*has __len__"):
            len(loader)
    assert len(NodeLoader(IterableWrapper(range(3)))) == 3
    with pytest.raises(TypeError, match="no PathLister"):
        streamed.set_epoch(3)
    with pytest.raises(TypeError, match="0 stores are found"):
        streamed.stats()


def test_over_several_pipelines(paths: list[str], store: GPUFeatureStore) -> None:
    parts = {"a": pipeline(paths[:5], store), "b": pipeline(paths[5:], store)}
    mixed = NodeLoader(MultiNodeWeightedSampler(parts, {"a": 1.0, "b": 1.0}))
    mixed.set_epoch(2)
    list(mixed)
    assert mixed.stats().files_read == 10
    with GPUFeatureStore("cpu") as other:
        parts["b"] = pipeline(paths[5:], other)
        two = NodeLoader(MultiNodeWeightedSampler(parts, {"a": 1.0, "b": 1.0}))
        with pytest.raises(TypeError, match="2 stores are found"):
            two.stats()


def test_over_a_loader_in_lockstep(paths: list[str], store: GPUFeatureStore) -> None:
    lister = PathLister(paths, batch_size=3, shuffle=True, seed=1)
    loader = NodeLoader(Lockstep(GPUCachedPathDataLoader(lister, store=store)))
    assert len(loader) == 4
    first = numbers(loader)
    loader.set_epoch(0)
    assert numbers(loader) == first
    assert loader.stats().hits == 10


def test_what_is_no_node(paths: list[str], store: GPUFeatureStore) -> None:
    gpu_loader = GPUCachedPathDataLoader(PathLister(paths, batch_size=3), store=store)
    for wrong in (gpu_loader, NodeLoader(pipeline(paths, store))):
        with pytest.raises(TypeError, match="is a loader itself: use it as it is"):
            NodeLoader(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the root must be a node, not list"):
        NodeLoader([1])  # type: ignore[arg-type]
