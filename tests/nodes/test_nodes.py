"""GPUPrefetcher and GPUCollator: order, states, errors, and nodes of torchdata around them."""

import dataclasses
import gc
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchdata.nodes as tn
from conftest import BACKENDS, Acting, Gate, device_for, sample
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import RandomSampler

from gpucache_pipes import (
    FeatureBatch,
    FeatureLoadError,
    GPUCachedPathDataLoader,
    GPUCollator,
    GPUFeatureStore,
    GPUPrefetcher,
    Lockstep,
    PathLister,
)
from gpucache_pipes.device import HostBackend
from gpucache_pipes.nodes.identity import PipelineIdentity
from gpucache_pipes.nodes.upstream import find_upstream, single_upstream, upstream_nodes
from gpucache_pipes.store import PendingBatch
from gpucache_pipes.store.lock import StoreLock
from gpucache_pipes.testing import assert_same

Files = Callable[..., list[str]]
FEATURES = {f"/f/{n:02d}.pt": {**sample(n), "n": n} for n in range(10)}
PATHS = list(FEATURES)


@pytest.fixture(autouse=True)
def collect_in_the_main_thread() -> Iterator[None]:
    """torchdata's Prefetcher joins its threads when it is collected: not to be in one of these."""
    gc.disable()
    yield
    gc.collect()
    gc.enable()


@pytest.fixture(params=BACKENDS)
def store(request: pytest.FixtureRequest) -> GPUFeatureStore:
    device = device_for(request.param)
    # The cache has room for half of the files, so that evictions happen all the time.
    return GPUFeatureStore(device, load_fn=FEATURES.__getitem__, max_cache_items=5)


def numbers(item: Any) -> Any:
    """The labels or numbers of an element, as plain numbers."""
    if isinstance(item, torch.Tensor):
        return item.flatten().tolist()
    if isinstance(item, str):
        return PATHS.index(item)
    if isinstance(item, dict):
        return numbers(item["label"])
    return [numbers(part) for part in item]


MAKERS: dict[str, Callable[[GPUFeatureStore], tn.BaseNode[Any]]] = {
    "lister": lambda s: PathLister(PATHS, shuffle=True),
    "single": lambda s: GPUPrefetcher(PathLister(PATHS, shuffle=True), s),
    "batched": lambda s: GPUPrefetcher(PathLister(PATHS, batch_size=3, shuffle=True), s, depth=3),
    "collated": lambda s: GPUCollator(GPUPrefetcher(PathLister(PATHS, batch_size=3), s, depth=1)),
    "regrouped": lambda s: GPUCollator(
        GPUPrefetcher(PathLister(PATHS, shuffle=True), s, depth=5), batch_size=4
    ),
    "slow regrouped": lambda s: GPUCollator(
        tn.Mapper(GPUPrefetcher(PathLister(PATHS), s), lambda x: x), batch_size=4, drop_last=True
    ),
    "sampled": lambda s: GPUPrefetcher(
        PathLister(PATHS, sampler=RandomSampler(PATHS, replacement=True), batch_size=4), s
    ),
    "batcher": lambda s: GPUCollator(GPUPrefetcher(tn.Batcher(PathLister(PATHS), 4, False), s)),
    "mapper": lambda s: GPUPrefetcher(tn.Mapper(PathLister(PATHS), Path), s),
    "parallel mapper": lambda s: GPUPrefetcher(
        tn.ParallelMapper(PathLister(PATHS, batch_size=2), list, num_workers=2), s
    ),
    "prefetcher before": lambda s: GPUCollator(
        GPUPrefetcher(tn.Prefetcher(PathLister(PATHS, batch_size=3), 2), s)
    ),
    "prefetcher behind": lambda s: tn.Prefetcher(
        GPUCollator(GPUPrefetcher(PathLister(PATHS, batch_size=3), s)), 2
    ),
    "batcher behind": lambda s: GPUCollator(
        tn.Batcher(GPUPrefetcher(PathLister(PATHS), s), 3, False)
    ),
    "iterable": lambda s: GPUPrefetcher(PATHS, s),
    "weighted": lambda s: GPUPrefetcher(
        tn.MultiNodeWeightedSampler(
            {"a": PathLister(PATHS[:5]), "b": PathLister(PATHS[5:])},
            {"a": 0.5, "b": 0.5},
            seed=0,
        ),
        s,
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_torchdata_contract(name: str, store: GPUFeatureStore) -> None:
    """States from the start, the middle and the end resume exactly; then the next epoch follows."""
    make = MAKERS[name]

    def run(node: tn.BaseNode[Any], count: int | None = None) -> list[Any]:
        items = []
        while count is None or len(items) < count:
            try:
                items.append(numbers(next(node)))
            except StopIteration:
                break
        return items

    node = make(store)
    node.reset()
    initial = node.state_dict()
    first = run(node)
    end = node.state_dict()
    node.reset()
    second = run(node)
    assert len(first) > 1 and initial and end

    node = make(store)
    node.reset(initial)
    assert run(node) == first

    for half in range(len(first) + 1):
        node = make(store)
        node.reset()
        assert run(node, half) == first[:half]
        state = node.state_dict()
        assert run(node) == first[half:]
        node = make(store)
        node.reset(state)
        assert run(node) == first[half:]
        node.reset()
        assert run(node) == second

    node = make(store)
    node.reset(end)
    assert run(node) == []
    node.reset()
    assert run(node) == second


@pytest.mark.parametrize("name", MAKERS)
def test_behind_a_loader(name: str, store: GPUFeatureStore) -> None:
    loader = tn.Loader(MAKERS[name](store))
    first, second = (list(map(numbers, loader)) for _ in range(2))
    resumed = tn.Loader(MAKERS[name](store))
    iterator = iter(resumed)
    assert numbers(next(iterator)) == first[0]
    state = resumed.state_dict()
    del iterator, resumed
    again = tn.Loader(MAKERS[name](store))
    again.load_state_dict(state)
    assert list(map(numbers, again)) == first[1:]
    assert list(map(numbers, again)) == second


@given(
    count=st.integers(1, 10),
    depth=st.integers(1, 12),
    batch_size=st.integers(1, 4),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
)
def test_gathered_at_once_equals_one_by_one(
    count: int, depth: int, batch_size: int, drop_last: bool, shuffle: bool
) -> None:
    with GPUFeatureStore("cpu", load_fn=FEATURES.__getitem__, max_cache_items=3) as store:

        def make(wrap: Callable[[Any], Any]) -> list[Any]:
            features = GPUPrefetcher(PathLister(PATHS[:count], shuffle=shuffle), store, depth=depth)
            return list(GPUCollator(wrap(features), batch_size=batch_size, drop_last=drop_last))

        fast, slow = make(lambda node: node), make(lambda node: tn.Mapper(node, lambda x: x))
        assert_same(fast, slow)


def test_what_elements_become(store: GPUFeatureStore) -> None:
    assert_same(next(GPUPrefetcher([PATHS[2]], store)), FEATURES[PATHS[2]])
    assert_same(next(GPUPrefetcher([Path(PATHS[2])], store)), FEATURES[PATHS[2]])
    batch = next(GPUPrefetcher([tuple(PATHS[:2])], store))
    assert isinstance(batch, FeatureBatch) and numbers(batch) == [[0], [1]]
    rows = [{"file": PATHS[n], "weight": n} for n in (3, 4)]
    feature, element = next(GPUPrefetcher(rows, store, path_fn=lambda row: row["file"]))
    assert numbers(feature) == [3] and element is rows[0]
    joined = GPUPrefetcher(
        [rows],
        store,
        path_fn=lambda rows: [row["file"] for row in rows],
        join_fn=lambda features, rows: (numbers(features), [row["weight"] for row in rows]),
    )
    assert next(joined) == ([[3], [4]], [3, 4])
    collated, element = next(
        GPUCollator(
            GPUPrefetcher([rows], store, path_fn=lambda rows: [row["file"] for row in rows])
        )
    )
    assert collated["n"].tolist() == [3, 4] and element is rows


def test_what_the_collator_makes(store: GPUFeatureStore) -> None:
    def batches() -> GPUPrefetcher:
        return GPUPrefetcher(PathLister(PATHS, batch_size=5), store)

    made = next(GPUCollator(batches()))
    assert made["feature"].shape == (5, 8) and made["feature"].is_contiguous()
    assert_same(made["n"], torch.arange(5))
    assert next(GPUCollator(batches(), collate_fn=lambda fs: [f["n"] for f in fs])) == [*range(5)]
    listed = GPUCollator([[{"n": 1}, {"n": 2}]])
    assert_same(next(listed), {"n": torch.tensor([1, 2])})
    with pytest.raises(TypeError, match="omit batch_size"):
        next(GPUCollator(batches(), batch_size=2))
    with pytest.raises(TypeError, match="omit batch_size"):
        next(GPUCollator(tn.Mapper(batches(), lambda x: x), batch_size=2))
    with pytest.raises(TypeError, match="not dict"):
        next(GPUCollator(GPUPrefetcher(PATHS, store)))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda s: GPUPrefetcher(PATHS, s, depth=0), "depth=0"),
        (lambda s: GPUPrefetcher(PATHS, s, join_fn=max), "join_fn needs a path_fn"),
        (lambda s: GPUCollator(PATHS, batch_size=0), "batch_size=0"),
        (lambda s: GPUCollator(PATHS, drop_last=True), "drop_last=True"),
    ],
)
def test_wrong_arguments(make: Callable[[Any], Any], says: str, store: GPUFeatureStore) -> None:
    with pytest.raises(ValueError, match=says):
        make(store)


def test_depth_elements_are_ahead() -> None:
    gate = Gate(FEATURES)
    with GPUFeatureStore("cpu", load_fn=gate, reader_threads=8) as store:
        node = GPUPrefetcher(PATHS, store, depth=3)
        gate.open(PATHS[0])
        next(node)
        for path in PATHS[1:4]:
            gate.wait_until_started(path)
        assert sorted(gate.loads) == PATHS[:4]
        gate.open(*PATHS)


def test_an_error_comes_in_its_turn_and_the_rest_is_served(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{n}.pt") for n in range(5)]
    for n, path in enumerate(paths):
        torch.save(sample(n), path)
    Path(paths[2]).write_bytes(b"broken")
    with GPUFeatureStore("cpu") as store:
        node = GPUPrefetcher(paths, store, depth=4)
        seen: list[Any] = []
        while True:
            try:
                seen.append(int(next(node)["label"]))
            except StopIteration:
                break
            except FeatureLoadError as error:
                seen.append(Path(error.path).name)
        assert seen == [0, 1, "2.pt", 3, 4]


def test_errors_of_the_source_and_of_path_fn_come_in_their_turn(store: GPUFeatureStore) -> None:
    def source() -> Any:
        yield PATHS[0]
        yield PATHS[1]
        raise OSError("listing failed")

    node = GPUPrefetcher(source(), store, depth=4)
    assert [numbers(next(node)) for _ in range(2)] == [[0], [1]]
    with pytest.raises(OSError, match="listing failed"):
        next(node)
    with pytest.raises(StopIteration):
        next(node)

    def path_fn(n: int) -> str:
        return PATHS[n]

    node = GPUPrefetcher([0, 99, 1], store, path_fn=path_fn, join_fn=lambda f, n: f["n"])
    assert next(node) == 0
    with pytest.raises(IndexError):
        next(node)
    assert next(node) == 1
    for wrong in ([3], [b"/x"], [{1: 2}]):
        with pytest.raises(TypeError, match="neither a path nor a sequence"):
            next(GPUPrefetcher(wrong, store))


def test_an_interrupt_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one, while `next()` waits for a file that is being read."""
    gate = Gate(FEATURES)
    waiting, plain_wait = threading.Event(), StoreLock.wait
    main = threading.main_thread().ident
    assert main is not None

    def noted(self: StoreLock, seconds: float | None = None) -> None:
        waiting.set()
        plain_wait(self, seconds)

    def interrupt() -> None:
        assert waiting.wait(60)
        signal.pthread_kill(main, signal.SIGINT)

    with GPUFeatureStore("cpu", load_fn=gate) as store:
        node = GPUPrefetcher(PATHS, store)
        gate.open(PATHS[0])
        assert numbers(next(node)) == [0]
        thread = threading.Thread(target=interrupt)
        with monkeypatch.context() as patch:
            patch.setattr(StoreLock, "wait", noted)
            thread.start()
            with pytest.raises(KeyboardInterrupt):
                next(node)
        thread.join()
        gate.open(*PATHS)
        assert [numbers(item) for item in node] == [[n] for n in range(1, 10)]
        assert store.stats().pending_batches == 0


def test_an_interrupt_in_the_gather_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pending batch has been used up, and must be requested again."""
    backend: Any = HostBackend()
    with GPUFeatureStore(backend, load_fn=FEATURES.__getitem__) as store:
        node = GPUPrefetcher(PATHS, store)
        next(node)
        with monkeypatch.context() as patch:

            def interrupted(*arguments: Any) -> Any:
                raise KeyboardInterrupt

            patch.setattr(backend, "gather", interrupted)
            for _ in range(2):
                with pytest.raises(KeyboardInterrupt):
                    next(node)
        assert [numbers(item) for item in node] == [[n] for n in range(1, 10)]
        assert store.stats().pending_batches == 0


def test_nothing_is_held_for_a_pipeline_that_is_gone(store: GPUFeatureStore) -> None:
    node = GPUPrefetcher(PathLister(PATHS), store, depth=8)
    next(node)
    node.shutdown()
    store.check()
    assert store.stats().pending_batches == 0
    node.reset()
    next(node)
    del node
    store.get_batch(PATHS)  # waits for pending reads
    gc.collect()
    store.check()
    assert store.stats().pending_batches == 0


def test_train_and_validation_share_a_store() -> None:
    with GPUFeatureStore("cpu", load_fn=FEATURES.__getitem__, max_cache_items=8) as store:
        train = tn.Loader(
            GPUCollator(GPUPrefetcher(PathLister(PATHS[:7], batch_size=2, shuffle=True), store))
        )
        validate = tn.Loader(GPUCollator(GPUPrefetcher(PathLister(PATHS[7:], batch_size=2), store)))
        for _ in range(6):
            assert sorted(n for b in train for n in b["n"].tolist()) == list(range(7))
            assert [n for b in validate for n in b["n"].tolist()] == [7, 8, 9]
        # A cache of eight of ten files can serve eight requests of each later epoch.
        assert store.stats().hits >= 5 * (8 - 1)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_half_a_cache_serves_half_of_the_requests(shuffle: bool, known: bool) -> None:
    features = {f"/g/{n:03d}.pt": sample(n) for n in range(100)}
    with GPUFeatureStore("cpu", load_fn=features.__getitem__, max_cache_items=50) as store:
        lister = PathLister(list(features), batch_size=5, shuffle=shuffle)
        # Behind a generator, no order is announced.
        source = lister if known else _Anew(lister)
        loader = tn.Loader(GPUPrefetcher(source, store, depth=1))
        for _ in loader:
            pass
        start = store.stats()
        for _ in range(5):
            for _ in loader:
                pass
        hits = store.stats().hits - start.hits
        assert hits >= 5 * (50 - 10)  # less the pending ones
        assert hits <= 5 * 50 + 10


class _Anew:
    def __init__(self, lister: PathLister) -> None:
        self.lister = lister

    def __iter__(self) -> Any:
        self.lister.reset()
        yield from self.lister


def test_shutting_down_takes_no_lock() -> None:
    """It happens in finalizers, which the collector may run inside the lock."""
    nodes: list[Any] = []

    def drop() -> None:
        while nodes:
            nodes.pop().shutdown()
            gc.collect()

    policy: Any = Acting(drop)  # whose actions run with the lock held
    options: dict[str, Any] = {"load_fn": FEATURES.__getitem__, "max_cache_items": 1}
    with GPUFeatureStore("cpu", policy=policy, **options) as store:
        node = GPUPrefetcher(PathLister(PATHS), store)
        next(node)
        assert store.wait_idle(60)
        nodes.append(node)
        del node
        store.get_batch(PATHS)
        assert not nodes
        store.check()


@pytest.mark.parametrize(
    "make",
    [
        lambda s, source: GPUPrefetcher(source, s),
        lambda s, source: GPUCollator(GPUPrefetcher(source, s), batch_size=2),
    ],
)
def test_an_iterator_that_can_be_read_once_says_so(make: Any, store: GPUFeatureStore) -> None:
    loader = tn.Loader(make(store, iter(PATHS)))
    assert len(list(loader)) in (10, 5)
    with pytest.raises(RuntimeError, match="only once"):
        iter(loader)


def test_what_a_pipeline_cannot_carry_is_an_error() -> None:
    def stop(*arguments: Any) -> Any:
        raise StopIteration

    with GPUFeatureStore("cpu", load_fn=lambda path: None) as store:
        with pytest.raises(TypeError, match="holds None"):
            next(GPUPrefetcher(["/x"], store))
        with pytest.raises(RuntimeError, match="path_fn raised StopIteration"):
            next(GPUPrefetcher([1], store, path_fn=stop))
        for join_fn, error in ((stop, RuntimeError), (lambda f, e: None, TypeError)):
            with pytest.raises(error, match="join_fn"):
                next(GPUPrefetcher([1], store, path_fn=lambda n: "/x", join_fn=join_fn))
        with pytest.raises(TypeError, match="collate_fn returned None"):
            next(GPUCollator(GPUPrefetcher([["/x"]], store), collate_fn=lambda features: None))


def test_mistakes_are_named(store: GPUFeatureStore) -> None:
    with pytest.raises(TypeError, match="GPUFeatureStore, not PathLister"):
        GPUPrefetcher(store, PathLister(PATHS))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="PathLister"):
        GPUPrefetcher("features", store)
    with pytest.raises(TypeError, match="put a GPUPrefetcher in front"):
        next(GPUCollator(PathLister(PATHS, batch_size=2)))


def test_many_elements_with_path_fn_are_gathered_at_once() -> None:
    backend: Any = HostBackend()
    store = GPUFeatureStore(backend, load_fn=FEATURES.__getitem__)
    gathers = []
    gather = backend.gather
    backend.gather = lambda *a: gathers.append(a) or gather(*a)
    rows = [(path, n) for n, path in enumerate(PATHS)]
    node = GPUCollator(
        GPUPrefetcher(
            rows, store, path_fn=lambda row: row[0], join_fn=lambda f, row: {**f, "r": row[1]}
        ),
        batch_size=4,
    )
    assert [batch["r"].tolist() for batch in node] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(gathers) == 3


@pytest.mark.parametrize("batch_size", [None, 3])
def test_an_interrupt_while_an_element_is_requested_loses_nothing(
    store: GPUFeatureStore, batch_size: int | None
) -> None:
    interrupts = [KeyboardInterrupt()]

    def path_fn(number: int) -> str:
        if number == 4 and interrupts:
            raise interrupts.pop()
        return PATHS[number]

    features = GPUPrefetcher(range(10), store, path_fn=path_fn, join_fn=lambda f, n: f["n"])
    node = GPUCollator(features, batch_size=batch_size) if batch_size else features
    seen: list[Any] = []
    while True:
        try:
            item = next(node)
        except KeyboardInterrupt:
            continue
        except StopIteration:
            break
        seen += [item] if batch_size is None else item.tolist()
    assert seen == list(range(10))


class Joined:
    """What `upstream_nodes` follows, without a pipeline."""

    def __init__(self, source: Any = None, **source_nodes: Any) -> None:
        self.source = source
        if source_nodes:
            self.source_nodes = source_nodes


def test_upstream_nodes_come_nearest_first_and_once() -> None:
    shared = Joined()
    left, right = Joined(shared), Joined(Joined(shared))
    mixed = Joined(a=left, b=right)
    first = Joined(mixed)
    assert list(upstream_nodes(first)) == [first, mixed, left, right, shared, right.source]
    assert list(single_upstream(first)) == [first, mixed]
    assert list(upstream_nodes(first, beyond=lambda node: node is first)) == [first, mixed]
    shared.source = first  # a cycle
    assert len(list(upstream_nodes(first))) == 6
    assert list(single_upstream(right))[-1] is mixed


def test_an_order_is_not_known_behind_a_node_that_mixes(store: GPUFeatureStore) -> None:
    lister = PathLister(PATHS)
    mapped = tn.Mapper(lister, Path)
    assert find_upstream(mapped, "upcoming") == lister.upcoming
    mixing = tn.MultiNodeWeightedSampler({"a": mapped}, {"a": 1.0})
    assert find_upstream(mixing, "upcoming") is None
    assert find_upstream(mixing, "source_nodes") == {"a": mapped}
    assert find_upstream(PATHS, "upcoming") is None
    # But pipelines behind it are shut down with the collator.
    features = {name: GPUPrefetcher(PATHS, store) for name in "ab"}
    node = GPUCollator(tn.MultiNodeWeightedSampler(features, {"a": 1.0, "b": 1.0}), batch_size=4)
    next(node)
    node.shutdown()
    assert store.stats().pending_batches == 0
    store.check()


class Referable:
    """May be referred to weakly."""


@pytest.mark.parametrize("make", [Referable, list, lambda: PathLister(PATHS)])
def test_identities_of_one_source_are_equal(make: Callable[[], Any]) -> None:
    source, other = make(), make()
    first, second = PipelineIdentity(source), PipelineIdentity(source)
    assert first == second and hash(first) == hash(second) and {first: 1}[second] == 1
    assert first != PipelineIdentity(other) and first != id(source) and first != source
    assert type(source).__name__ in repr(first)


def test_identities_outlive_their_source_and_do_not_hold_it() -> None:
    source = Referable()
    gone = weakref.ref(source)
    first, second = PipelineIdentity(source), PipelineIdentity(source)
    del source
    assert gone() is None
    assert first == first and first == second and repr(first) == "PipelineIdentity(collected)"
    held = [1]
    assert PipelineIdentity(held) != first


def test_a_new_source_with_the_id_of_an_old_one_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpucache_pipes.nodes.identity.id", lambda source: 7, raising=False)
    old = Referable()
    before = PipelineIdentity(old)
    del old
    new = Referable()
    after = PipelineIdentity(new)
    assert hash(before) == hash(after) and before != after and after != before
    lists = [PipelineIdentity(["a"]), PipelineIdentity(["a"])]
    assert hash(lists[0]) == hash(after) and len({*lists, before, after}) == 4


def test_a_new_pipeline_over_the_same_source_is_the_same_to_the_policy(
    store: GPUFeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners = []
    begin_epoch = store.begin_epoch
    monkeypatch.setattr(store, "begin_epoch", lambda owner: owners.append(owner))
    batches = [PATHS[:3], PATHS[3:6]]
    for source in (batches, batches, list(batches)):
        list(GPUPrefetcher(source, store))
    begin_epoch(owners[0])
    assert owners[0] == owners[1] != owners[2]


def test_a_pipeline_takes_back_what_another_one_over_its_source_is_filed_under() -> None:
    """The source is collected together with the second pipeline, and before the store hears it."""
    with GPUFeatureStore("cpu", load_fn=FEATURES.__getitem__) as store:
        retracted: list[Any] = []
        lister = PathLister(PATHS, batch_size=5)
        first = GPUPrefetcher(lister, store)
        list(first)
        second = GPUPrefetcher(lister, store)
        next(second)
        filed = first._owner
        store.retract = retracted.append  # type: ignore[method-assign]
        gone = weakref.ref(lister)
        del first, second, lister
        gc.collect()
        assert gone() is None
        assert retracted[-1] == filed and retracted[-1] is not filed


def test_a_state_covers_all_elements_of_a_batch_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal handler sees it that asks for the state while elements are taken out."""
    with GPUFeatureStore("cpu", load_fn=FEATURES.__getitem__) as store:
        node = GPUPrefetcher(PathLister(PATHS), store)
        before = node.state_dict()
        seen = []
        cancel = PendingBatch.cancel

        def seen_and_cancelled(batch: PendingBatch) -> None:
            seen.append(node.state_dict())
            cancel(batch)

        with monkeypatch.context() as patch:
            patch.setattr(PendingBatch, "cancel", seen_and_cancelled)
            node.take(3)
        assert seen == [before] * 3 and node.state_dict()["source"]["position"] == 3


def test_sources_that_are_asked_for_some_elements_at_a_time(make_files: Any) -> None:
    """`iter(node)` is no new epoch: nodes call it for each batch."""
    paths = make_files(5)
    with GPUFeatureStore("cpu") as store:
        assert [len(b) for b in PathLister(PathLister(paths), batch_size=4)] == [4, 1]
        features = Lockstep(GPUPrefetcher(PathLister(paths), store))
        batches = GPUCollator(features, batch_size=4)
        assert [len(batch["label"]) for batch in batches] == [4, 1]


def test_pipelines_over_one_lister_are_told(make_files: Any) -> None:
    """It has one position: each of them would get a part of the batches."""
    paths = make_files(6)
    with GPUFeatureStore("cpu") as store:
        lister = PathLister(paths, batch_size=2)
        first, second = (GPUCachedPathDataLoader(lister, store=store) for _ in range(2))
        iterator = iter(first)
        next(iterator)
        assert len(list(second)) == 3
        with pytest.raises(RuntimeError, match="another pipeline over the same PathLister"):
            next(iterator)
        assert len(list(first)) == 3  # one after the other is right
        nodes = [GPUPrefetcher(tn.Mapper(lister, list), store) for _ in range(2)]
        next(nodes[0])
        next(nodes[1])
        with pytest.raises(RuntimeError, match="make a PathLister for each"):
            next(nodes[0])

        @dataclasses.dataclass  # compared by value, and so without a hash
        class Same(tn.BaseNode[Any]):
            def __post_init__(self) -> None:
                super().__init__()
                self.lister = PathLister(paths, batch_size=2)

            def reset(self, initial_state: Any = None) -> None:
                super().reset(initial_state)
                self.lister.reset(initial_state)

            def next(self) -> Any:
                return next(self.lister)

            def get_state(self) -> Any:
                return self.lister.state_dict()

        for one, other in zip(
            GPUPrefetcher(Same(), store), GPUPrefetcher(Same(), store), strict=True
        ):
            assert len(one) == len(other) == 2
        plain = [GPUPrefetcher([paths[:2], paths[2:]], store) for _ in range(2)]
        for _ in range(2):
            for node in plain:
                next(node)
