"""GPUPrefetcher(on_error=): what is left out, replaced, or raised."""

import logging
from typing import Any

import pytest
import torch
from conftest import device_for
from hypothesis import given
from hypothesis import strategies as st

import gpucache_pipes.nodes.prefetcher as prefetcher_module
from gpucache_pipes import (
    FeatureLoadError,
    GPUCachedPathDataLoader,
    GPUCollator,
    GPUFeatureStore,
    GPUPrefetcher,
    PathLister,
)

FILES = 12
PATHS = [f"/f/{number:02d}" for number in range(FILES)]


def number_of(path: str) -> int:
    return int(path[-2:])


def feature(number: int) -> Any:
    return {"x": torch.full((1 + number % 3, 2), float(number)), "label": torch.tensor(number)}


class Faulty:
    """A load_fn that fails for some files."""

    def __init__(self, bad: set[int], error: type[Exception] = OSError) -> None:
        self.bad, self.error = bad, error

    def __call__(self, path: str) -> Any:
        if number_of(path) in self.bad:
            raise self.error(f"bad {path}")
        return feature(number_of(path))


def labels(batches: Any) -> list[list[int]]:
    return [[int(label) for label in batch["label"]] for batch in batches]


def listed(batches: Any) -> list[list[int]]:
    """The labels in FeatureBatches."""
    return [[int(f["label"]) for f in batch] for batch in batches]


@given(
    bad=st.sets(st.integers(0, FILES - 1), max_size=FILES - 1),
    size=st.integers(1, 5),
    depth=st.integers(1, 4),
    items=st.sampled_from([None, 3]),
    kind=st.sampled_from(["host", "staged", "simulated"]),
    asynchronous=st.booleans(),
)
def test_skipping_is_as_if_the_files_were_not_there(
    bad: set[int], size: int, depth: int, items: int | None, kind: str, asynchronous: bool
) -> None:
    store = GPUFeatureStore(
        device_for(kind), load_fn=Faulty(bad), max_cache_items=items, asynchronous=asynchronous
    )
    with store:
        lister = PathLister(PATHS, batch_size=size, shuffle=True)
        node = GPUPrefetcher(lister, store, depth=depth, on_error="skip")
        good = [
            [n for path in batch if (n := number_of(path)) not in bad]
            for batch in PathLister(PATHS, batch_size=size, shuffle=True)
        ]
        good = [batch for batch in good if batch]
        states = [node.state_dict()]
        got = []
        for batch in node:
            got.append([int(f["label"]) for f in batch])
            states.append(node.state_dict())
        assert got == good
        # States from the middle are exact, too.
        for at, state in enumerate(states[:-1]):
            again = PathLister(PATHS, batch_size=size, shuffle=True)
            resumed = GPUPrefetcher(again, store, depth=depth, on_error="skip")
            resumed.reset(state)
            assert listed(resumed) == good[at:]
        # Batches of single features are filled up.
        singles = GPUPrefetcher(PathLister(PATHS), store, depth=depth, on_error="skip")
        flat = [n for n in range(FILES) if n not in bad]
        whole = [flat[at : at + size] for at in range(0, len(flat), size)]
        collated = GPUCollator(singles, batch_size=size, collate_fn=list)
        assert listed(collated) == whole
        assert store.stats().skipped >= len(bad)
        store.check()


@given(
    bad=st.sets(st.integers(0, FILES - 1), max_size=FILES),
    size=st.integers(1, 5),
    ragged=st.sampled_from(["pad", "list"]),
    kind=st.sampled_from(["host", "staged", "simulated"]),
)
def test_substitutes_are_as_if_they_had_been_in_the_files(
    bad: set[int], size: int, ragged: str, kind: str
) -> None:
    called = []

    def instead(path: str, error: Exception) -> Any:
        assert isinstance(error, FeatureLoadError) and error.path == path
        called.append(path)
        return feature(number_of(path) + 100)

    def load(path: str) -> Any:
        number = number_of(path)
        return feature(number + 100 if number in bad else number)

    options: dict[str, Any] = {"ragged": {"x": ragged}}
    with (
        GPUFeatureStore(device_for(kind), load_fn=Faulty(bad)) as faulty,
        GPUFeatureStore(device_for(kind), load_fn=load) as sound,
    ):
        mine = GPUPrefetcher(PathLister(PATHS, batch_size=size), faulty, on_error=instead)
        theirs = GPUPrefetcher(PathLister(PATHS, batch_size=size), sound)
        pairs = zip(GPUCollator(mine, **options), GPUCollator(theirs, **options), strict=True)
        for a, b in pairs:
            assert a["label"].tolist() == b["label"].tolist()
            # Values, lengths and mask, or each sequence.
            assert [t.tolist() for t in a["x"]] == [t.tolist() for t in b["x"]]
        assert called == [path for path in PATHS if number_of(path) in bad]
        assert faulty.stats().skipped == len(bad)


def test_features_that_are_alike_are_stacked_with_their_substitutes() -> None:
    def load(path: str) -> Any:
        if number_of(path) == 1:
            raise OSError
        return {"x": torch.full((3,), number_of(path)), "name": path}

    with GPUFeatureStore("cpu", load_fn=load) as store:
        zeros = {"x": torch.zeros(3).long(), "name": "?"}
        node = GPUPrefetcher([PATHS[:3]], store, on_error=lambda path, error: zeros)
        [batch] = GPUCollator(node)
        assert batch["x"].tolist() == [[0, 0, 0], [0, 0, 0], [2, 2, 2]]
        assert batch["name"] == ["/f/00", "?", "/f/02"]


def test_each_file_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    with GPUFeatureStore("cpu", load_fn=Faulty({2, 5})) as store:
        loader = GPUCachedPathDataLoader(
            PathLister(PATHS, batch_size=4), store=store, on_error="skip", collate_fn=list
        )
        with caplog.at_level(logging.WARNING, "gpucache_pipes"):
            for _ in range(3):
                assert listed(loader) == [[0, 1, 3], [4, 6, 7], [8, 9, 10, 11]]
        messages = [record.getMessage() for record in caplog.records]
        assert messages == [
            f"left out: cannot load '/f/{n:02d}': OSError: bad /f/{n:02d}" for n in (2, 5)
        ]
        assert store.stats().skipped == 6


def test_a_repaired_file_is_used_again() -> None:
    faulty = Faulty({1})
    with GPUFeatureStore("cpu", load_fn=faulty) as store:
        node = GPUPrefetcher(PathLister(PATHS[:3], batch_size=3), store, on_error="skip")
        assert listed(node) == [[0, 2]]
        faulty.bad.clear()
        node.reset()
        assert listed(node) == [[0, 1, 2]]


def test_too_many_failures() -> None:
    with GPUFeatureStore("cpu", load_fn=Faulty({1, 4, 7})) as store:
        node = GPUPrefetcher(
            PathLister(PATHS, batch_size=3), store, on_error="skip", max_failures=2
        )
        assert listed([next(node), next(node)]) == [[0, 2], [3, 5]]
        with pytest.raises(RuntimeError, match=r"3 files .* max_failures=2; the last one: .*07"):
            next(node)
        assert listed([next(node)]) == [[9, 10, 11]]
    with GPUFeatureStore("cpu", load_fn=Faulty({1, 4})) as store:
        node = GPUPrefetcher(
            PathLister(PATHS, batch_size=6), store, on_error="skip", max_failures=2
        )
        for _ in range(3):  # counts files, not failures
            node.reset()
            assert listed(node) == [[0, 2, 3, 5], [6, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize("size", [None, 4])
def test_an_epoch_of_which_nothing_is_left(size: int | None) -> None:
    with GPUFeatureStore("cpu", load_fn=Faulty({*range(FILES)})) as store:
        node = GPUPrefetcher(PathLister(PATHS, batch_size=size), store, on_error="skip")
        with pytest.raises(RuntimeError, match="nothing of this epoch could be loaded; the last"):
            next(node)
        with pytest.raises(StopIteration):
            next(node)
        node.reset()
        with pytest.raises(RuntimeError, match="nothing of this epoch"):
            node.take(3) if size is None else next(node)


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_epoch_of_which_nothing_is_left_is_an_error_when_resumed(wrapped: bool) -> None:
    with GPUFeatureStore("cpu", load_fn=Faulty(set(range(FILES)))) as store:

        def pipeline() -> Any:
            lister = PathLister(PATHS, batch_size=4)
            if wrapped:
                return GPUCachedPathDataLoader(lister, store=store, on_error="skip")
            return GPUPrefetcher(lister, store, on_error="skip")

        first, second = pipeline(), pipeline()
        state = first.state_dict()
        if wrapped:
            second.load_state_dict(state)
        else:
            second.reset(state)
        for node in (first, second):
            with pytest.raises(RuntimeError, match="nothing of this epoch"):
                list(node)


def test_of_an_element_with_more_than_paths_nothing_is_left_out() -> None:
    rows = [{"paths": PATHS[at : at + 3], "weights": [at, at + 1, at + 2]} for at in (0, 3, 6)]
    options: dict[str, Any] = {"path_extractor": lambda row: row["paths"], "on_error": "skip"}
    with GPUFeatureStore("cpu", load_fn=Faulty({4})) as store:
        loader = GPUCachedPathDataLoader(rows, store=store, collate_fn=list, **options)
        got = [([int(f["label"]) for f in features], row["weights"]) for features, row in loader]
        assert got == [([0, 1, 2], [0, 1, 2]), ([6, 7, 8], [6, 7, 8])]
        # Where the batch is its paths, the remaining ones belong to the remaining features.
        plain = GPUCachedPathDataLoader(
            [PATHS[3:6]],
            store=store,
            on_error="skip",
            collate_fn=list,
            build_batch_fn=lambda features, batch, paths: (len(features), batch, paths),
        )
        assert list(plain) == [(2, ["/f/03", "/f/05"], ["/f/03", "/f/05"])]


def test_ranks_have_as_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetcher_module, "find_rank", lambda: (2, 0))
    with GPUFeatureStore("cpu", load_fn=Faulty({3, 4, 5, 7})) as store:
        lister = PathLister(PATHS, batch_size=3, num_shards=1, shard_index=0)
        node = GPUPrefetcher(lister, store, on_error="skip")
        assert listed(node) == [[0, 1, 2], [6, 8], [6, 8], [9, 10, 11]]
        singles = GPUPrefetcher(PATHS, store, on_error="skip")
        got = [int(f["label"]) for f in singles]
        assert got == [0, 1, 2, 6, 6, 6, 6, 8, 8, 9, 10, 11]
        # Replaced features are replaced again where an element is repeated.
        sub = {3: feature(103), 7: feature(107)}
        mixed = GPUPrefetcher(
            PathLister(PATHS, batch_size=3, num_shards=1, shard_index=0),
            store,
            on_error=lambda path, error: sub.get(number_of(path)),
        )
        assert listed(mixed) == [[0, 1, 2], [103], [6, 107, 8], [9, 10, 11]]
        twice = GPUPrefetcher([PATHS[6:8], PATHS[4:6]], store, on_error=mixed.failures.on_error)
        assert listed(twice) == [[6, 107], [6, 107]]
        # Also in place of the first one: a rank that raises leaves the others waiting.
        first = GPUPrefetcher([PATHS[3:6], PATHS[:2]], store, on_error="skip")
        assert listed(first) == [[0, 1], [0, 1]]
        # Without any other element it is an error: the other ranks must not wait for ever.
        nothing = GPUPrefetcher([PATHS[3:5], PATHS[5:6]], store, on_error="skip")
        with pytest.raises(FeatureLoadError, match="/f/0"):
            next(nothing)


@given(
    bad=st.sets(st.integers(0, FILES - 1), max_size=FILES - 1),
    size=st.integers(1, 5),
    depth=st.integers(1, 4),
    wrapped=st.booleans(),
)
def test_ranks_resume_with_the_same_batches(
    bad: set[int], size: int, depth: int, wrapped: bool
) -> None:
    """From any state, also one in front of batches of which nothing is left."""
    with (
        pytest.MonkeyPatch.context() as patch,
        GPUFeatureStore("cpu", load_fn=Faulty(bad)) as store,
    ):
        patch.setattr(prefetcher_module, "find_rank", lambda: (2, 0))

        def pipeline() -> Any:
            lister = PathLister(PATHS, batch_size=size, shuffle=True, num_shards=1, shard_index=0)
            if wrapped:
                options: dict[str, Any] = {"prefetch_batches": depth, "on_error": "skip"}
                return GPUCachedPathDataLoader(lister, store=store, collate_fn=list, **options)
            return GPUPrefetcher(lister, store, depth=depth, on_error="skip")

        node = pipeline()
        states, whole = [node.state_dict()], []
        for batch in node:
            whole.append([int(f["label"]) for f in batch])
            states.append(node.state_dict())
        assert len(whole) == -(-FILES // size) and all(whole)
        for at, state in enumerate(states[:-1]):
            resumed = pipeline()
            if wrapped:
                resumed.load_state_dict(state)
            else:
                resumed.reset(state)
            assert listed(resumed) == whole[at:]


@pytest.mark.parametrize("on_error", ["skip", lambda path, error: None])
def test_lack_of_memory_is_raised(on_error: Any) -> None:
    options: dict[str, Any] = {"load_fn": Faulty({1}, MemoryError)}
    with GPUFeatureStore("cpu", **options) as store:
        node = GPUPrefetcher([PATHS[:3], PATHS[3:4]], store, on_error=on_error)
        with pytest.raises(MemoryError, match="/f/01"):
            next(node)
        assert listed(node) == [[3]]


def test_what_on_error_raises_is_raised_in_its_turn() -> None:
    def refuse(path: str, error: Exception) -> Any:
        raise LookupError(path) from error

    with GPUFeatureStore("cpu", load_fn=Faulty({1})) as store:
        node = GPUPrefetcher([PATHS[:1], PATHS[1:2], PATHS[2:3]], store, on_error=refuse)
        assert listed([next(node)]) == [[0]]
        with pytest.raises(LookupError, match="/f/01"):
            next(node)
        assert listed(node) == [[2]]
        garbage = GPUPrefetcher([PATHS[:2]], store, on_error=lambda path, error: {"x": {1, 2}.pop})
        next(garbage)  # a plain value
        odd = GPUPrefetcher(
            [PATHS[:2]], store, on_error=lambda path, error: torch.eye(2).to_sparse()
        )
        with pytest.raises(TypeError, match="sparse"):
            next(odd)


def test_a_pending_batch_knows_what_failed() -> None:
    with GPUFeatureStore("cpu", load_fn=Faulty({1, 2})) as store:
        pending = store.request(PATHS[:4])
        errors = pending.wait()
        assert list(errors) == [1, 2] and isinstance(errors[1], FeatureLoadError)
        with pytest.raises(ValueError, match="has not failed"):
            pending.replace(0)
        pending.replace(1)
        with pytest.raises(FeatureLoadError, match="/f/02"):
            store.collect([pending])
        pending = store.request(PATHS[:4])
        assert list(pending.wait()) == [1, 2]
        pending.replace(1)
        pending.replace(2, feature(7))
        assert listed([pending.result()]) == [[0, 7, 3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "ignore"}, "on_error='ignore'"),
        ({"max_failures": 3}, "is for on_error"),
        ({"on_error": "skip", "max_failures": -1}, "max_failures=-1"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with GPUFeatureStore("cpu") as store:
        with pytest.raises(ValueError, match=message):
            GPUPrefetcher([], store, **options)
        with pytest.raises(ValueError, match=message):
            GPUCachedPathDataLoader([], store=store, **options)


@pytest.mark.parametrize("calls", [1, 2, 3])
@pytest.mark.parametrize("divisible", [True, False])
def test_an_interrupt_in_on_error(calls: int, divisible: bool) -> None:
    seen = []

    def ask(path: str, error: Exception) -> Any:
        seen.append(path)
        if len(seen) == calls:
            raise KeyboardInterrupt
        return feature(100) if path == PATHS[2] else None

    with GPUFeatureStore("cpu", load_fn=Faulty({0, 2, 3})) as store:
        options: dict[str, Any] = {} if divisible else {"path_fn": lambda row: row[0]}
        batches: list[Any] = [PATHS[:4], PATHS[4:6]]
        rows = batches if divisible else [(batch, "row") for batch in batches]
        node = GPUPrefetcher(rows, store, on_error=ask, **options)
        with pytest.raises(KeyboardInterrupt):
            next(node)
        rest = list(node)
        if divisible:
            assert listed(rest) == [[1, 100], [4, 5]]
        else:
            assert [(listed([batch]), row[1]) for batch, row in rest] == [([[4, 5]], "row")]


def test_a_skip_after_a_substitute_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with GPUFeatureStore("cpu", load_fn=Faulty({0})) as store:
        list(GPUPrefetcher([PATHS[:2]], store, on_error=lambda path, error: feature(9)))
        assert not caplog.records
        list(GPUPrefetcher([PATHS[:2]], store, on_error="skip"))
        assert "left out" in caplog.text


def test_torchs_own_lack_of_memory() -> None:
    def of_cuda(text: str) -> Exception:
        return RuntimeError(f"CUDA error: out of memory {text}")

    kinds: list[Any] = [torch.OutOfMemoryError, of_cuda]
    for kind in kinds:
        with GPUFeatureStore("cpu", load_fn=Faulty({0}, kind)) as store:
            node = GPUPrefetcher([PATHS[:2]], store, on_error="skip")
            with pytest.raises(MemoryError, match="/f/00"):
                next(node)


def test_odd_things_to_do_in_on_error() -> None:
    with GPUFeatureStore("cpu", load_fn=Faulty({1})) as store:

        def stop(path: str, error: Exception) -> Any:
            node.shutdown()

        node = GPUPrefetcher([PATHS[1:2], PATHS[:1]], store, on_error=stop)
        with pytest.raises(RuntimeError, match="nothing of this epoch"):
            next(node)
        huge = torch.ones(1).expand(1 << 60)
        node = GPUPrefetcher([PATHS[:2]], store, on_error=lambda path, error: huge)
        with pytest.raises(MemoryError, match="the feature that replaces '/f/01' has"):
            next(node)
        pending = store.request(PATHS[:2])
        pending.wait()
        with pytest.raises(IndexError, match="no feature -1 among 2"):
            pending.replace(-1)
