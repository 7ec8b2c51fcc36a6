"""States of GPUCachedPathDataLoader: those of the loader, behind the last consumed batch."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchdata.nodes as tn
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from gpucache_pipes import FeaturePathDataset, GPUCachedPathDataLoader, GPUFeatureStore, PathLister

Files = Callable[..., list[str]]
FILES = 20
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("features")
    for number in range(FILES):
        torch.save({"label": torch.tensor([number])}, root / f"{number:02d}.pt")
    return FeaturePathDataset(root).paths


def stateful(paths: list[str], **options: Any) -> StatefulDataLoader:
    random = torch.Generator().manual_seed(3)
    dataset = FeaturePathDataset(paths)
    return StatefulDataLoader(dataset, batch_size=3, shuffle=True, generator=random, **options)


def lister(paths: list[str]) -> PathLister:
    return PathLister(paths, batch_size=3, shuffle=True)


def nodes_loader(paths: list[str]) -> "tn.Loader[Any]":
    return tn.Loader(lister(paths))


LOADERS = [stateful, lister, nodes_loader]


def labels(batch: Any) -> list[int]:
    return [int(label) for label in batch["label"].flatten()]


@given(
    make=st.sampled_from(LOADERS),
    depth=st.integers(1, 9),
    steps=st.integers(0, 6),
    epochs=st.integers(0, 2),
    leave=st.booleans(),
)
def test_resuming_is_exact_at_any_depth(
    paths: list[str], make: Any, depth: int, steps: int, epochs: int, leave: bool
) -> None:
    with GPUFeatureStore("cpu") as store:

        def cached() -> GPUCachedPathDataLoader:
            return GPUCachedPathDataLoader(make(paths), store=store, prefetch_batches=depth)

        whole = cached()
        for _ in range(epochs):
            assert sorted(n for batch in whole for n in labels(batch)) == list(range(FILES))
        iterator = iter(whole)
        seen = [labels(next(iterator)) for _ in range(steps)]
        state = whole.state_dict()
        if leave:
            del iterator  # its pending batches are dropped, and the state stays
            assert whole.state_dict() == state
            rest = None
        else:
            rest = [labels(batch) for batch in iterator]
        resumed = cached()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state or make is stateful
        got = [labels(batch) for batch in resumed]
        between = make is stateful and epochs and not steps  # torchdata decides what that resumes
        assert rest is None or between or got == rest
        assert sorted(n for batch in (*seen, *got) for n in batch) == list(range(FILES))
        if make is lister:
            json.dumps(state)
            # The next epoch is that of the uninterrupted run, too.
            if rest is not None:
                assert [labels(b) for b in resumed] == [labels(b) for b in whole]


@pytest.mark.parametrize("make", LOADERS)
def test_a_state_from_between_two_epochs_begins_the_next(paths: list[str], make: Any) -> None:
    with GPUFeatureStore("cpu") as store:
        whole = GPUCachedPathDataLoader(make(paths), store=store)
        first = [labels(batch) for batch in whole]
        state = whole.state_dict()
        second = [labels(batch) for batch in whole]
        resumed = GPUCachedPathDataLoader(make(paths), store=store)
        resumed.load_state_dict(state)
        got = [labels(batch) for batch in resumed]
        if make is stateful:  # torchdata decides which epoch that is
            plain = stateful(paths)
            plain.load_state_dict(state)
            assert got == [[int(path[-5:-3]) for path in batch] for batch in plain]
        else:
            assert got == second != first


def test_a_state_is_that_of_the_wrapped_loader(paths: list[str]) -> None:
    with GPUFeatureStore("cpu") as store:
        cached = GPUCachedPathDataLoader(stateful(paths), store=store, prefetch_batches=4)
        iterator = iter(cached)
        seen = [labels(next(iterator)) for _ in range(2)]
        plain = stateful(paths)
        plain.load_state_dict(cached.state_dict())
        rest = [[int(path[-5:-3]) for path in batch] for batch in plain]
        assert rest == [labels(batch) for batch in iterator]
        assert len(seen) + len(rest) == 7
        # A state of the plain loader resumes here.
        plain = stateful(paths)
        at = iter(plain)
        next(at)
        state = plain.state_dict()
        cached.load_state_dict(state)
        assert [labels(b) for b in cached] == [[int(p[-5:-3]) for p in batch] for batch in at]


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_with_worker_processes(paths: list[str], context: str) -> None:
    with GPUFeatureStore("cpu") as store:

        def cached() -> GPUCachedPathDataLoader:
            loader = stateful(paths, num_workers=2, multiprocessing_context=context)
            return GPUCachedPathDataLoader(loader, store=store, prefetch_batches=3)

        whole = cached()
        iterator = iter(whole)
        seen = [labels(next(iterator)) for _ in range(3)]
        state = whole.state_dict()
        rest = [labels(batch) for batch in iterator]
        resumed = cached()
        resumed.load_state_dict(state)
        assert [labels(batch) for batch in resumed] == rest
        assert len(seen) + len(rest) == 7


class Stream(IterableDataset[str]):
    """A stream whose state is not a copy, but a list that becomes shorter."""

    def __init__(self, paths: list[str]) -> None:
        self.left = list(paths)

    def __iter__(self) -> Iterator[str]:
        while self.left:
            yield self.left.pop(0)

    def state_dict(self) -> Any:
        return {"left": self.left}

    def load_state_dict(self, state: Any) -> None:
        self.left = list(state["left"])


@pytest.mark.parametrize("steps", range(7))
def test_a_state_that_changes_while_more_is_drawn(paths: list[str], steps: int) -> None:
    def cached() -> GPUCachedPathDataLoader:
        inner: Any = StatefulDataLoader(Stream(paths), batch_size=3)
        return GPUCachedPathDataLoader(inner, device="cpu", prefetch_batches=3)

    with cached() as whole, cached() as resumed:
        iterator = iter(whole)
        for _ in range(steps):
            next(iterator)
        resumed.load_state_dict(whole.state_dict())
        rest = [n for batch in resumed for n in labels(batch)]
        assert rest == list(range(FILES))[3 * steps :]


def test_an_iterator_has_one_pass(paths: list[str]) -> None:
    batches = (paths[at : at + 5] for at in range(0, FILES, 5))
    with GPUCachedPathDataLoader(batches, device="cpu") as cached:
        assert len(list(cached)) == 4 and cached
        with pytest.raises(RuntimeError, match="only once"):
            list(cached)
    nonsense: list[tuple[Any, str]] = [(3, "a node or an iterable"), ("abc", "is a path")]
    for wrong, message in nonsense:
        with pytest.raises(TypeError, match=message):
            GPUCachedPathDataLoader(wrong, device="cpu")
    with (
        GPUCachedPathDataLoader([paths], device="cpu", path_extractor=str) as cached,
        pytest.raises(TypeError, match="path_extractor must return a list"),
    ):
        list(cached)


def test_an_iteration_that_is_dropped_late_retracts_nothing_of_the_next(paths: list[str]) -> None:
    options: dict[str, Any] = {"device": "cpu", "max_cache_items": 10, "asynchronous": False}
    rates = []
    with GPUCachedPathDataLoader(lister(paths), **options) as cached:
        for _ in range(6):
            before = cached.store.stats()
            first = iter(cached)
            next(first)
            for _batch in first:
                pass
            rates.append(cached.store.stats().since(before).hit_rate)
            last = first  # the iteration before is dropped only now
        del last
    assert rates == [0] + [0.5] * 5


def test_a_loader_without_a_state_has_none(paths: list[str]) -> None:
    loader: Any = DataLoader(FeaturePathDataset(paths), batch_size=4)
    with GPUCachedPathDataLoader(loader, device="cpu") as cached:
        assert not hasattr(cached, "state_dict") and not hasattr(cached, "load_state_dict")
        assert not isinstance(cached, tn.Stateful)
        with pytest.raises(AttributeError, match="a DataLoader has no state_dict"):
            cached.state_dict()
    with GPUCachedPathDataLoader(lister(paths), device="cpu") as cached:
        assert isinstance(cached, tn.Stateful)
        with pytest.raises(
            ValueError, match="not a state of a GPUCachedPathDataLoader over a node"
        ):
            cached.load_state_dict(lister(paths).state_dict())


def test_an_error_does_not_end_the_pass(paths: list[str]) -> None:
    def load(path: str) -> Any:
        if path.endswith("04.pt"):
            raise OSError("bad")
        return {"label": torch.tensor([int(path[-5:-3])])}

    options: dict[str, Any] = {"device": "cpu", "load_fn": load}
    with GPUCachedPathDataLoader(PathLister(paths, batch_size=3), **options) as cached:
        iterator = iter(cached)
        assert labels(next(iterator)) == [0, 1, 2]
        with pytest.raises(RuntimeError, match=r"04\.pt"):
            next(iterator)
        state = cached.state_dict()
        assert labels(next(iterator)) == [6, 7, 8]
        assert len(list(iterator)) == 4 and list(iterator) == []
        cached.load_state_dict(state)
        assert labels(next(iter(cached))) == [6, 7, 8]
        # A state that does not fit is an error each time; no iteration begins from the start.
        other = GPUCachedPathDataLoader(PathLister(paths[1:], batch_size=3), store=cached.store)
        other.load_state_dict(state)
        for _ in range(2):
            with pytest.raises(ValueError, match="over 20 files, but there are 19"):
                next(iter(other))


@pytest.mark.parametrize("make", [lister, nodes_loader])
def test_two_at_once_over_one_node_are_an_error(paths: list[str], make: Any) -> None:
    with (
        GPUCachedPathDataLoader(make(paths), device="cpu") as cached,
        pytest.raises(RuntimeError, match="a later iteration over this node"),
    ):
        list(zip(cached, cached, strict=True))


def test_a_node_is_iterated_by_one_at_a_time(paths: list[str]) -> None:
    with GPUCachedPathDataLoader(lister(paths), device="cpu", max_cache_items=10) as cached:
        first = iter(cached)
        next(first)
        second = iter(cached)
        next(first)  # nothing has begun yet
        next(second)
        with pytest.raises(RuntimeError, match="a later iteration over this node"):
            next(first)
        del first
        assert len(list(second)) == 6
        assert cached.sampler is cached._loader and cached.batch_sampler is None
        cached.set_epoch(0)
        assert labels(next(iter(cached))) == [int(p[-5:-3]) for p in next(lister(paths))]
