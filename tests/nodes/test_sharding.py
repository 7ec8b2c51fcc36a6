"""Each rank its part."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from gpucache_pipes import GPUFeatureStore, GPUPrefetcher, PathLister


def names(files: int) -> list[str]:
    return [f"/features/{number:04d}" for number in range(files)]


def epochs_of(lister: PathLister, count: int) -> list[list[Any]]:
    epochs = []
    for _ in range(count):
        lister.reset()
        ahead = lister.upcoming()
        elements = list(lister)
        flat = [p for e in elements for p in ([e] if isinstance(e, str) else e)]
        assert list(ahead)[: ahead.left] == flat
        assert len(elements) == len(lister)
        epochs.append(flat)
    return epochs


@settings(deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3),
    st.data(),
)
def test_by_epoch_is_what_a_distributed_sampler_does(
    files: int, ranks: int, shuffle: bool, drop_last: bool, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, ranks - 1))
    if drop_last and files < ranks:
        with pytest.raises(ValueError, match="too few"):
            PathLister(
                names(files), batch_size=1, drop_last=True, num_shards=ranks, shard_index=rank
            )
        return
    lister = PathLister(
        names(files), batch_size=1, shuffle=shuffle, seed=seed, drop_last=drop_last,
        num_shards=ranks, shard_index=rank,
    )  # fmt: skip
    sampler = DistributedSampler(
        range(files),
        ranks,
        rank,
        shuffle=shuffle,
        seed=seed,
        drop_last=drop_last,  # type: ignore[arg-type]
    )
    for number, epoch in enumerate(epochs_of(lister, 3)):
        sampler.set_epoch(number)
        assert epoch == [names(files)[at] for at in sampler]


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.booleans(), st.integers(1, 4))
def test_static_parts_stay_and_add_up(files: int, ranks: int, drop_last: bool, size: int) -> None:
    if drop_last and files < ranks:
        return
    every: Counter[str] = Counter()
    lengths = set()
    for rank in range(ranks):
        lister = PathLister(
            names(files), batch_size=size, shuffle=True, drop_last=drop_last,
            num_shards=ranks, shard_index=rank, shard="static",
        )  # fmt: skip
        lengths.add(len(lister))
        first, *others = epochs_of(lister, 3)
        if not drop_last:
            assert all(Counter(other) == Counter(first) for other in others)
            every.update(set(first))
    assert len(lengths) == 1
    if not drop_last:
        assert set(every) == set(names(files))
        assert files < ranks or set(every.values()) == {1}


def test_static_parts_fill_the_caches_of_all_ranks() -> None:
    for rank in range(4):
        lister = PathLister(
            names(80), shuffle=True, batch_size=5, num_shards=4, shard_index=rank, shard="static"
        )
        with GPUFeatureStore("cpu", max_cache_items=20, load_fn=lambda _: torch.ones(1)) as store:
            node = GPUPrefetcher(lister, store)
            for _ in range(3):
                node.reset()
                list(node)
            assert store.stats().misses == 20


def test_ranks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PathLister(names(8)).shards.count == 1
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("TORCHELASTIC_RUN_ID", "x")):
        monkeypatch.setenv(name, value)
    assert list(PathLister(names(8))) == [names(8)[3], names(8)[7]]
    # Nothing is sharded twice.
    assert list(PathLister(names(8), sampler=[0, 1])) == names(8)[:2]
    assert list(PathLister(iter(names(8)))) == names(8)
    assert list(PathLister(names(8), num_shards=1, shard_index=0)) == names(8)


def test_an_initialised_process_group_comes_first(tmp_path: Path) -> None:
    code = f"""
import torch.distributed as dist
from gpucache_pipes import PathLister
dist.init_process_group("gloo", init_method="file://{tmp_path}/group", world_size=1, rank=0)
assert list(PathLister(["a", "b"])) == ["a", "b"]
dist.destroy_process_group()
"""
    environment = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100, env=environment)


def test_a_state_resumes_the_same_part_only() -> None:
    def lister(rank: int, ranks: int = 2, **options: Any) -> PathLister:
        return PathLister(names(20), shuffle=True, num_shards=ranks, shard_index=rank, **options)

    whole = epochs_of(lister(1), 1)[0]
    half = lister(1)
    half.reset()
    first = [next(half) for _ in range(4)]
    resumed = lister(1)
    resumed.reset(half.state_dict())
    assert first + list(resumed) == whole
    state = half.state_dict()
    with pytest.raises(ValueError, match='shuffle=True, seed=0, shard="static"'):
        lister(1, shard="static").reset(state)
    kept = lister(1, shard="static")
    next(kept)
    with pytest.raises(ValueError, match="with 2 shards, but there are 4 now"):
        lister(1, 4, shard="static").reset(kept.state_dict())
    lister(1, 4, shard="static", if_files_changed="continue").reset(kept.state_dict())


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10), st.booleans())
def test_another_number_of_ranks_goes_on_where_the_others_were(
    before: int, after: int, steps: int, shuffle: bool
) -> None:
    def listers(ranks: int) -> list[PathLister]:
        return [
            PathLister(names(60), shuffle=shuffle, num_shards=ranks, shard_index=rank)
            for rank in range(ranks)
        ]

    if steps * before >= 60:  # the end of an epoch stays that
        done = listers(before)[0]
        list(done)
        for lister in listers(after):
            lister.set_epoch(1)
            lister.reset(done.state_dict())
            assert len(list(lister)) == len(lister)
    old = listers(before)
    seen = [next(lister) for lister in old for _ in range(steps)]
    new = listers(after)
    for lister in new:
        lister.reset(old[0].state_dict())
    rest = [path for lister in new for path in lister]
    assert {*seen, *rest} == {*names(60)}
    # No file is missed, and less than a step of all ranks is repeated.
    assert len(seen) + len(rest) - 60 < after


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_shards": 2}, "go together"),
        ({"num_shards": 2, "shard_index": 2}, "shard_index=2 must be from 0 to 1"),
        ({"num_shards": 0, "shard_index": 0}, "num_shards=0"),
        ({"shard": "always"}, "shard='always'"),
        ({"num_shards": 2, "shard_index": 0, "sampler": [0]}, "sharded already"),
    ],
)
def test_wrong_shards(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PathLister(names(4), **options)
