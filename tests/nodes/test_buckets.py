"""Batches of files of similar size: all files, still shuffled, and little padding."""

from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister

Files = Callable[..., list[str]]


def length_of(path: str) -> int:
    return int(Path(path).stem.split("-")[1])


def names(lengths: list[int]) -> list[str]:
    return [f"/f/{number:04d}-{length}.pt" for number, length in enumerate(lengths)]


def epoch(lister: PathLister) -> list[list[str]]:
    lister.reset()
    return list(lister)


def flat(batches: list[list[str]]) -> list[str]:
    return list(chain.from_iterable(batches))


def padding(batches: list[list[str]]) -> float:
    """Share of padded batches that is padding."""
    lengths = [[length_of(path) for path in batch] for batch in batches]
    return 1 - sum(map(sum, lengths)) / sum(max(batch) * len(batch) for batch in lengths)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=80),
    st.integers(1, 7),
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from(["epoch", "static"]),
)
def test_an_epoch_has_the_files_that_it_has_without(
    lengths: list[int], batch_size: int, shuffle: bool, ranks: int, shard: str
) -> None:
    paths = names(lengths)
    options: dict[str, Any] = {"shuffle": shuffle, "num_shards": ranks, "shard": shard}
    for rank in range(ranks):
        options |= {"batch_size": batch_size, "shard_index": rank}
        grouped = PathLister(paths, bucket_by=length_of, **options)
        plain = PathLister(paths, **options)
        for _ in range(2):
            got, expected = epoch(grouped), epoch(plain)
            assert sorted(flat(got)) == sorted(flat(expected))
            assert [len(batch) for batch in got] == [len(batch) for batch in expected]


def test_padding_is_small_and_epochs_differ() -> None:
    random = torch.Generator().manual_seed(0)
    lengths = (torch.randn(4000, generator=random).mul(0.6).exp() * 100).int().add(1).tolist()
    options: dict[str, Any] = {"batch_size": 32, "shuffle": True, "drop_last": True}
    plain = PathLister(names(lengths), **options)
    grouped = PathLister(names(lengths), bucket_by=length_of, **options)
    assert padding(epoch(plain)) > 0.6
    first, second = epoch(grouped), epoch(grouped)
    assert padding(first) < 0.15  # 0.13, most of it in the few longest
    # Each epoch has other batches, and they are not in the order of their lengths.
    assert not {frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}
    longest = [max(map(length_of, batch)) for batch in first]
    rising = sum(a < b for a, b in pairwise(longest)) / len(longest)
    assert 0.35 < rising < 0.65


def test_what_is_dropped_is_drawn() -> None:
    paths = names(list(range(1, 36)))
    lister = PathLister(paths, bucket_by=length_of, batch_size=8, shuffle=True, drop_last=True)
    dropped: list[int] = []
    for _ in range(40):
        dropped += map(length_of, {*paths} - {*flat(epoch(lister))})
    assert len(dropped) == 3 * 40
    assert 12 < sum(dropped) / len(dropped) < 24  # 18 if it is a matter of chance


def test_without_shuffling_lengths_rise() -> None:
    lister = PathLister(names([3, 1, 2, 5, 4]), bucket_by=length_of, batch_size=2)
    assert [[length_of(path) for path in batch] for batch in lister] == [[1, 2], [3, 4], [5]]


@given(st.integers(0, 12), st.booleans())
def test_resuming_is_exact(steps: int, shuffle: bool) -> None:
    def make(by: Callable[[str], float] = length_of) -> PathLister:
        paths = names([7, 3, 9, 1] * 6)
        return PathLister(paths, bucket_by=by, batch_size=2, shuffle=shuffle)

    whole = make()
    epoch(whole)
    whole.reset()
    for _ in range(steps):
        next(whole, None)
    resumed = make()
    resumed.reset(whole.state_dict())
    assert list(resumed.upcoming()) == list(whole.upcoming())
    assert list(resumed) == list(whole)
    assert epoch(resumed) == epoch(whole)
    with pytest.raises(ValueError, match="with bucket_by, sizes"):
        make(by=lambda path: 0).reset(whole.state_dict())


def test_by_the_size_of_files(make_files: Files) -> None:
    paths = make_files(48, lambda number: {"tokens": torch.zeros(100 * (1 + number % 2), 4)})
    lister = PathLister(paths, bucket_by="file_size", batch_size=3, shuffle=True)
    with GPUFeatureStore("cpu") as store:
        collator = GPUCollator(GPUPrefetcher(lister, store), ragged={"tokens": "pad"})
        padded = sum(not batch["tokens"].mask.all() for batch in collator)
    assert padded <= 4  # batches that have both lengths: one in each window


def test_another_batch_size_is_another_order() -> None:
    paths = names([5, 1, 4] * 8)
    state = PathLister(paths, bucket_by=length_of, batch_size=4).state_dict()
    with pytest.raises(ValueError, match=r"batch_size=4, and this lister has .*batch_size=8"):
        PathLister(paths, bucket_by=length_of, batch_size=8).reset(state)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bucket_by": "file_size"}, ValueError, "give a batch_size"),
        ({"bucket_by": "length", "batch_size": 2}, ValueError, "bucket_by='length'"),
        ({"bucket_by": str, "batch_size": 2}, TypeError, "for '/f/0000-1.pt', not a number"),
        ({"bucket_by": len, "batch_size": 2, "sampler": [0]}, ValueError, "both set the order"),
    ],
)
def test_wrong_buckets(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PathLister(names([1, 2]), **options)
    if "sampler" not in options and options.get("batch_size"):
        with pytest.raises(ValueError, match="known list"):
            PathLister(iter(names([1])), **options)
