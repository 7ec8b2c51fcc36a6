"""PathLister: which files, in which order, and how it is resumed."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchdata.nodes as tn
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.datapipes.iter import IterableWrapper

from gpucache_pipes import FeaturePathDataset, PathLister

Files = Callable[..., list[str]]
NAMES = [f"/f/{n:03d}.pt" for n in range(10)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.pt", "a.pt", "c.txt", ".hidden.pt", "sub/d.pt", "sub/deep/e.pt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "empty.pt").mkdir()
    return tmp_path


def names(lister: PathLister, root: Path) -> list[str]:
    return [os.path.relpath(path, root) for path in lister]


def test_directories_and_globs(tree: Path) -> None:
    assert names(PathLister(tree), tree) == ["a.pt", "b.pt"]
    assert names(PathLister(str(tree), pattern="*.txt"), tree) == ["c.txt"]
    assert names(PathLister(tree, pattern=".*"), tree) == [".hidden.pt"]
    everything = ["a.pt", "b.pt", "sub/d.pt", "sub/deep/e.pt"]
    assert names(PathLister(tree, recursive=True), tree) == everything
    assert names(PathLister(f"{tree}/?.pt"), tree) == ["a.pt", "b.pt"]
    assert names(PathLister(f"{tree}/sub/d*/**/*.pt"), tree) == ["sub/deep/e.pt"]
    assert names(PathLister(tree / "a.pt"), tree) == ["a.pt"]


def test_no_files_names_directory_and_pattern(tree: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"\*\.npy.*recursive=True") as caught:
        PathLister(tree, pattern="*.npy")
    assert str(tree) in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no files for the glob"):
        PathLister(f"{tree}/*.none")
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        PathLister(tree / "nowhere")
    with pytest.raises(FileNotFoundError, match="empty"):
        PathLister([])


def test_batches() -> None:
    assert list(PathLister(NAMES, batch_size=4)) == [NAMES[:4], NAMES[4:8], NAMES[8:]]
    assert list(PathLister(NAMES, batch_size=4, drop_last=True)) == [NAMES[:4], NAMES[4:8]]
    assert len(PathLister(NAMES, batch_size=4)) == 3
    assert len(PathLister(NAMES, batch_size=4, drop_last=True)) == 2
    assert len(PathLister(NAMES)) == 10
    assert list(PathLister([Path(p) for p in NAMES])) == NAMES


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"drop_last": True},
        {"shuffle": True, "sampler": [0]},
    ],
)
def test_wrong_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        PathLister(NAMES, **options)


def epoch(lister: PathLister) -> list[Any]:
    lister.reset()
    return list(lister)


def test_epochs_are_those_of_distributed_sampler() -> None:
    lister = PathLister(NAMES, shuffle=True, seed=3)
    sampler = DistributedSampler(NAMES, num_replicas=1, rank=0, seed=3)  # type: ignore[arg-type]
    seen = []
    for number in range(4):
        sampler.set_epoch(number)
        seen.append(epoch(lister))
        assert seen[-1] == [NAMES[n] for n in sampler]
    assert len({tuple(order) for order in seen}) == 4
    lister.set_epoch(1)
    assert epoch(lister) == seen[1]
    assert epoch(lister) == seen[2]


@pytest.mark.parametrize("drop_last", [False, True])
def test_set_epoch_and_states(drop_last: bool) -> None:
    def make() -> PathLister:
        return PathLister(NAMES, shuffle=True, batch_size=4, drop_last=drop_last)

    whole = make()
    epochs = [epoch(whole) for _ in range(4)]
    lister = make()
    states = []
    for _ in epochs[0]:
        next(lister)
        states.append(lister.state_dict())
    for state, left in zip(states, range(len(epochs[0]) - 1, -1, -1), strict=True):
        for following in (0, 3):
            resumed = make()
            resumed.set_epoch(following)
            resumed.reset(state)
            expected = epochs[0][len(epochs[0]) - left :] if following == 0 else epochs[3]
            assert list(resumed) == expected
    later = make()
    for _ in epochs[0]:
        list(later)
        later.reset()
    next(later)
    # An earlier epoch does not move a state.
    resumed = make()
    resumed.set_epoch(0)
    resumed.reset(later.state_dict())
    assert list(resumed) == list(later)


def test_an_epoch_that_was_not_begun_is_not_skipped() -> None:
    lister = PathLister(NAMES, shuffle=True)
    lister.reset()
    lister.reset()
    first = list(lister)
    assert first == epoch(PathLister(NAMES, shuffle=True))


@given(st.booleans(), st.sampled_from([None, 1, 3, 10, 99]), st.integers(0, 3), st.integers(0, 12))
def test_resuming_is_exact_and_small(
    shuffle: bool, batch_size: int | None, epochs: int, steps: int
) -> None:
    def make() -> PathLister:
        return PathLister(NAMES, shuffle=shuffle, batch_size=batch_size, seed=7)

    whole = make()
    for _ in range(epochs):
        epoch(whole)
    whole.reset()
    for _ in range(steps):
        next(whole, None)
    state = whole.state_dict()
    assert len(json.dumps(state)) < 150
    resumed = make()
    resumed.reset(state)
    assert list(resumed.upcoming()) == list(whole.upcoming())
    assert list(resumed) == list(whole)
    assert epoch(resumed) == epoch(whole)


def test_resuming_elsewhere(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        for n in range(4):
            (tmp_path / place / f"{n}.pt").touch()
    here = PathLister(tmp_path / "here", shuffle=True)
    first = [Path(next(here)).name]
    there = PathLister(tmp_path / "there", shuffle=True)
    there.reset(here.state_dict())
    assert [Path(p).name for p in there] == [Path(p).name for p in here]
    assert len(first) == 1


def test_resuming_over_other_files_is_an_error() -> None:
    state = PathLister(NAMES).state_dict()
    with pytest.raises(ValueError, match="over 10 files, but there are 9"):
        PathLister(NAMES[1:]).reset(state)
    with pytest.raises(ValueError, match="other names"):
        PathLister([*NAMES[1:], "/f/new.pt"]).reset(state)
    with pytest.raises(ValueError, match="with shuffle=False, seed=0, and this"):
        PathLister(NAMES, shuffle=True).reset(state)
    with pytest.raises(ValueError, match="sampler=list, seed=0"):
        PathLister(NAMES, sampler=[0]).reset(state)
    with pytest.raises(ValueError, match="over a stream"):
        PathLister(NAMES).reset(PathLister(iter(NAMES)).state_dict())


def test_going_on_over_other_files(caplog: pytest.LogCaptureFixture) -> None:
    def make(files: list[str]) -> PathLister:
        return PathLister(files, shuffle=True, batch_size=2, if_files_changed="continue")

    before = make(NAMES)
    epoch(before)
    before.reset()
    next(before)
    more = [*NAMES, "/f/new.pt"]
    resumed = make(more)
    with caplog.at_level(logging.WARNING, "gpucache_pipes"):
        resumed.reset(before.state_dict())
    assert "over 10 files, but there are 11 now" in caplog.text
    whole = make(more)
    epoch(whole)
    second = epoch(whole)
    assert list(resumed) == second[1:]
    assert epoch(resumed) == epoch(whole)  # and from then on it is exact
    fewer = make(NAMES[:1])
    fewer.reset(before.state_dict())
    assert list(fewer) == [] and epoch(fewer) == [NAMES[:1]]
    with pytest.raises(ValueError, match="if_files_changed='never'"):
        PathLister(NAMES, if_files_changed="never")


@pytest.mark.parametrize("steps", [0, 2, 5])
@pytest.mark.parametrize(
    "make_sampler",
    [
        lambda: RandomSampler(NAMES, replacement=True),
        lambda: RandomSampler(NAMES, generator=torch.Generator().manual_seed(5)),
        lambda: WeightedRandomSampler(list(range(1, 11)), 7),
        lambda: SubsetRandomSampler([1, 3, 5, 7, 9]),
        lambda: DistributedSampler(NAMES, num_replicas=2, rank=1),  # type: ignore[arg-type]
        lambda: [9, 8, 7, 6, 5],
    ],
)
def test_samplers(make_sampler: Callable[[], Any], steps: int) -> None:
    lister = PathLister(NAMES, sampler=make_sampler(), seed=1)
    orders = []
    for _ in range(3):
        lister.reset()
        ahead = list(lister.upcoming())
        orders.append(list(lister))
        assert ahead[: len(orders[-1])] == orders[-1]  # the announced order is the order
        assert len(orders[-1]) == len(lister)
    if not isinstance(lister.sampler, list):
        assert len({tuple(order) for order in orders}) > 1
    again = PathLister(NAMES, sampler=make_sampler(), seed=1)
    assert [epoch(again) for _ in range(2)] == orders[:2]
    again.reset()
    first = [next(again) for _ in range(steps)]
    resumed = PathLister(NAMES, sampler=make_sampler(), seed=1)
    resumed.reset(again.state_dict())
    assert first + list(resumed) == orders[2]


def test_samplers_leave_global_random_numbers_alone() -> None:
    lister = PathLister(NAMES, sampler=RandomSampler(NAMES))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    lister.reset()
    assert torch.equal(torch.rand(1), expected)


def test_batch_samplers() -> None:
    batches = BatchSampler(range(10), 4, drop_last=False)
    lister = PathLister(NAMES, sampler=batches)
    assert epoch(lister) == [NAMES[:4], NAMES[4:8], NAMES[8:]]
    assert len(lister) == 3
    lister.reset()
    next(lister)
    assert list(lister.upcoming()) == NAMES[4:] + NAMES
    with pytest.raises(ValueError, match="batches already"):
        next(PathLister(NAMES, sampler=batches, batch_size=2))


def test_the_epoch_reaches_a_sampler_within_a_batch_sampler() -> None:
    inner: Any = DistributedSampler(NAMES, num_replicas=2, rank=0)  # type: ignore[arg-type]
    lister = PathLister(NAMES, sampler=BatchSampler(inner, 2, drop_last=False))
    orders = [[path for batch in epoch(lister) for path in batch] for _ in range(3)]
    for number, order in enumerate(orders):
        inner.set_epoch(number)
        assert order == [NAMES[at] for at in inner]
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("files", ["list", "glob"])
def test_the_same_names_in_other_directories(tmp_path: Path, files: str) -> None:
    def lister(*names: str) -> PathLister:
        for name in "abcde":
            path = tmp_path / name / "0.pt"
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            if name in names:
                path.touch()
        if files == "glob":
            return PathLister(str(tmp_path / "*" / "*.pt"))
        return PathLister([tmp_path / name / "0.pt" for name in names])

    before = lister("a", "b", "c", "d")
    next(before)
    with pytest.raises(ValueError, match="other names"):
        lister("b", "c", "d", "e").reset(before.state_dict())
    lister("a", "b", "c", "d").reset(before.state_dict())


def test_what_is_not_a_state() -> None:
    with pytest.raises(ValueError, match="not a state of a PathLister"):
        PathLister(NAMES).reset({})


def test_a_dataset_of_paths(tree: Path) -> None:
    dataset = FeaturePathDataset(tree)
    assert epoch(PathLister(dataset)) == dataset.paths  # type: ignore[arg-type]


def test_upcoming_is_the_rest_of_this_epoch_and_all_of_the_next() -> None:
    lister = PathLister(NAMES, batch_size=4, shuffle=True)
    lister.reset()
    head = next(lister)
    ahead = list(lister.upcoming())
    rest = [path for batch in lister for path in batch]
    assert head + rest == [p for p in ahead[: len(rest)] for _ in ()] + head + ahead[: len(rest)]
    assert [p for batch in epoch(lister) for p in batch] == ahead[len(rest) :]


class Anew:
    def __iter__(self) -> Iterator[Any]:
        return iter(map(Path, NAMES))


@pytest.mark.parametrize(
    "make",
    [Anew, lambda: IterableWrapper(NAMES), lambda: tn.IterableWrapper(NAMES), lambda: {*NAMES}],
)
def test_streams(make: Callable[[], Any]) -> None:
    for batch_size in (None, 3):
        lister = PathLister(make(), batch_size=batch_size)
        first = epoch(lister)
        assert epoch(lister) == first
        assert len(first) == (10 if batch_size is None else 4)
        lister.reset()
        head = next(lister)
        resumed = PathLister(make(), batch_size=batch_size)
        resumed.reset(lister.state_dict())
        assert [head, *resumed] == first
        assert list(lister.upcoming()) == []
        with pytest.raises(TypeError):
            len(lister)


def test_a_stream_that_can_be_read_once_says_so() -> None:
    lister = PathLister(iter(NAMES))
    assert epoch(lister) == NAMES
    with pytest.raises(RuntimeError, match="only once"):
        lister.reset()


def test_what_is_no_source() -> None:
    with pytest.raises(TypeError, match="a node or an iterable"):
        PathLister(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must yield paths"):
        next(PathLister(iter([1])))
    with pytest.raises(ValueError, match="known list"):
        PathLister(iter(NAMES), shuffle=True)


def test_many_files_cost_little() -> None:
    many = [f"/data/{n:07d}.pt" for n in range(200_000)]
    lister = PathLister(many, shuffle=True, batch_size=1000)
    assert sum(len(batch) for batch in lister) == len(many)
    assert len(json.dumps(lister.state_dict())) < 150
