"""Ranks that share their caches, for real: processes that gloo connects."""

import re
import sys
from pathlib import Path

import pytest
import torch

from gpucache_pipes import GPUCachedPathDataLoader, GPUFeatureStore

sys.path.insert(0, str(Path(__file__).parent))

from ranks import results_of, run_ranks, start_ranks


@pytest.mark.parametrize(("world", "seeds"), [(2, (0, 25)), (3, (1000, 1020))])
def test_batches_are_those_without_it(world: int, seeds: tuple[int, int], tmp_path: Path) -> None:
    found = run_ranks(world, "equal_to_the_plain_one", str(tmp_path), [*range(*seeds)])
    for seen in found:
        assert seen["received"] > 30 and seen["resumed"] > 2 and seen["read once"] > 1


def test_a_state_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    begun = run_ranks(2, "begin_an_epoch", str(tmp_path / "f"), 3)
    assert begun[0]["state"] == begun[1]["state"]
    done = [set(rank["labels"]) for rank in begun]
    ended = run_ranks(3, "end_an_epoch", str(tmp_path / "f"), begun[0]["state"])
    rest = [label for rank in ended for label in rank["labels"]]
    assert done[0].isdisjoint(done[1]) and (done[0] | done[1]).isdisjoint(rest)
    assert len(rest) == 48 - 2 * 3 * 3  # no file is repeated
    assert sorted([*done[0], *done[1], *rest]) == list(range(48))
    for rank in ended:  # and the next epochs are those of three ranks
        assert rank["then"] == rank["alone"]


def test_what_one_rank_cannot_read_another_does(tmp_path: Path) -> None:
    owner, other = run_ranks(2, "one_cannot_read", str(tmp_path / "f"))
    assert owner == other == ["4 epochs"]


def test_errors_are_heard_by_all_at_the_same_batch(tmp_path: Path) -> None:
    mine, other = run_ranks(2, "bad_file", str(tmp_path / "f"))
    assert len(mine) == len(other) == 12
    for one, two in zip(mine, other, strict=True):
        assert (one == "batch") == (two == "batch")
    assert mine.count("batch") == 9
    assert sorted([one.split(":")[0] for one in mine + other if one != "batch"]) == [
        *["FeatureLoadError"] * 3, *["RankError"] * 3,
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["dies", "breaks", "late"])
def test_a_rank_that_is_lost_is_named(how: str, tmp_path: Path) -> None:
    found = results_of(start_ranks(3, "one_is_lost", str(tmp_path / "f"), how))
    what = "RankError: rank 1 is "
    what += r"at the beginning of pass 3, " if how == "breaks" else r"not at batch 2 of epoch 1"
    for rank in (0, 2):
        told = found[rank]
        assert len(told) == 2, told
        assert re.match(what, told[0]), told
        assert "batch 2 of" in told[0]
        if how == "breaks":
            assert "batch 2 of pass 2: all ranks must begin epochs and take batches" in told[0]
        assert "can no longer share its cache" in told[1]
    if how == "dies":
        assert found[1].startswith("exit -9")


def test_groups_of_ranks(tmp_path: Path) -> None:
    for found in run_ranks(4, "two_groups", str(tmp_path / "f")):
        assert found["most"] == 1 and found["files"] == 40  # once in each node
        assert found["came"] > 20 and found["came for halves"] > 10


def test_several_pipelines_on_one_store(tmp_path: Path) -> None:
    for found in run_ranks(2, "train_and_validate", str(tmp_path / "f")):
        assert found["pending"] == found["bypassed"] == 0
        assert 0 < found["items"] <= 25


def test_where_caches_are_not_shared(tmp_path: Path) -> None:
    for told in run_ranks(2, "not_shared", str(tmp_path / "f")):
        assert {name: text.split(";")[0].split(":")[0] for name, text in told.items()} == {
            "a stream": "the order of a sampler or a stream is known to its own rank only",
            "a sampler": "the order of a sampler or a stream is known to its own rank only",
            "single paths": "the PathLister has no batch_size",
            "a list": "the source of the GPUPrefetcher is a IterableWrapper",
            "all files": "the PathLister yields shard 0 of 1 in rank",
            "path_fn": "for batches that path_fn changes",
        }


def test_wrong_settings(tmp_path: Path) -> None:
    first, second = run_ranks(2, "other_settings", str(tmp_path / "f"))
    assert "rank 1 has order " in first["another seed"] and "seed=1" in first["another seed"]
    assert "rank 0 has order " in second["another seed"]
    assert first["another size"] == "rank 1 has batch_size 4, and this rank 3"
    assert second["drop_last"] == "rank 0 has requests left 10, and this rank 12"
    for told in (first, second):
        assert "is no group" in told["no group"]
        assert "exchange_timeout=0 must be a positive number" in told["timeout"]
        assert "must be called in the thread" in told["thread"]
        assert "was shut down: reset it first" in told["shut down"]
        assert told["batches"] == "4"


def test_rare_uses(tmp_path: Path) -> None:
    for found in run_ranks(2, "odd_uses", str(tmp_path / "f")):
        assert found.pop("opened") == 48  # of three lists that have files in common
        assert found["came 3"] > 10 and found["from disk"] > 10
        assert found["came 0"] > 10 and found["came 1"] > 4 and found["came 2"] > 10, found


def test_an_interrupt_loses_no_batch(tmp_path: Path) -> None:
    first, second = results_of(start_ranks(2, "interrupted", str(tmp_path / "f")))
    assert second["error"].startswith("KeyboardInterrupt")
    told = "RankError: rank 1 has given up: it was interrupted at batch . of epoch 1"
    assert re.match(told, first["error"]), first["error"]
    every = [*first["given"], *first["rest"], *second["given"], *second["rest"]]
    assert len(second["given"]) == 9 and sorted(every) == list(range(48))


def test_a_group_that_was_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """group.WORLD is None before torch.distributed is initialised."""
    for make in (
        lambda: GPUFeatureStore("cpu", process_group=torch.distributed.group.WORLD),
        lambda: GPUCachedPathDataLoader([["a.pt"]], device="cpu", process_group=None),
    ):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        with make():  # one process needs no group
            pass
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="init_process_group\\(\\) before the store is made"):
            make()
    with GPUFeatureStore("cpu") as store:
        assert store.peers is None


def test_a_rank_that_cannot_say_what_it_needs_fails_one_step(tmp_path: Path) -> None:
    first, second = run_ranks(2, "request_fails", str(tmp_path / "f"))
    assert first[11] == "RankError: rank 1 failed with OSError: no such table"
    assert second[11] == "OSError: no such table"
    for told in (first, second):
        assert told[:11] + told[12:] == ["batch"] * 23
