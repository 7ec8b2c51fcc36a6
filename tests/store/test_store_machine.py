"""The store against a dict: whatever is asked in whatever order, the right bytes come out."""

import shutil
import tempfile
from typing import Any

import pytest
import torch
from conftest import device_for
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)
from torch.utils._pytree import tree_leaves

from gpucache_pipes.store import GPUFeatureStore, PendingBatch
from gpucache_pipes.testing import assert_same, features

PATHS = [f"/features/{n}.pt" for n in range(6)]
paths = st.lists(st.sampled_from(PATHS), max_size=8)


def size_of(feature: Any) -> int:
    tensors = (t for t in tree_leaves(feature) if isinstance(t, torch.Tensor))
    return sum(t.numel() * t.element_size() for t in tensors)


class StoreMachine(RuleBasedStateMachine):
    kind = "host"
    directory: str | None = None
    pending = Bundle("pending")

    @initialize(
        data=st.lists(features(named_tuples=True), min_size=len(PATHS), max_size=len(PATHS)),
        alike=st.booleans(),
        options=st.fixed_dictionaries(
            {
                "asynchronous": st.booleans(),
                "reader_threads": st.integers(1, 3),
                "policy": st.sampled_from(["clairvoyant", "lru", "fifo", "keep"]),
                "page_bytes": st.sampled_from([None, None, 16, 48, 4096]),
                # Ignored on the host.
                "host_cache_bytes": st.sampled_from([None, 1, 100, 500, "1MiB"]),
            }
        ),
        on_disk=st.sampled_from([False, False, True]),
        seed=st.integers(0, 1000),
        limits=st.data(),
    )
    def start(
        self,
        data: list[Any],
        alike: bool,
        options: dict[str, Any],
        on_disk: bool,
        seed: int,
        limits: Any,
    ) -> None:
        if alike:
            data = [{"x": torch.full((5,), n), "y": torch.tensor(n), "n": n} for n in range(6)]
        self.model = dict(zip(PATHS, data, strict=True))
        # Budgets from a single small tensor to more than all of it.
        total = max(1, sum(map(size_of, data)))
        self.options = options
        if on_disk:
            self.directory = tempfile.mkdtemp()
            options.update(disk_cache=self.directory, disk_cache_key="machine")
            options.update(disk_cache_check="never")  # there are no files
        self.seed = seed
        self.max_bytes = limits.draw(st.one_of(st.none(), st.integers(1, total + 1)))
        self.max_items = limits.draw(st.one_of(st.none(), st.integers(1, 7)))
        self.open_store()

    def open_store(self) -> None:
        self.loads = 0
        self.store = GPUFeatureStore(
            device_for(self.kind, self.seed),
            max_cache_bytes=self.max_bytes,
            max_cache_items=self.max_items,
            load_fn=self.load,
            **self.options,
        )

    def load(self, path: str) -> Any:
        self.loads += 1
        return self.model[path]

    def too_large(self, wanted: list[str]) -> bool:
        return self.max_bytes is not None and any(
            size_of(self.model[path]) > self.max_bytes for path in wanted
        )

    @rule(wanted=paths)
    def prefetch(self, wanted: list[str]) -> None:
        self.store.prefetch(wanted)

    @rule(wanted=paths, scribble=st.booleans(), collate=st.booleans())
    def get_batch(self, wanted: list[str], scribble: bool, collate: bool) -> None:
        collate_fn = list if collate else None
        if self.too_large(wanted):
            with pytest.raises(MemoryError, match=f"max_cache_bytes={self.max_bytes}") as caught:
                self.store.get_batch(wanted, collate_fn=collate_fn)
            assert any(path in str(caught.value) for path in wanted)
        else:
            self.compare(self.store.get_batch(wanted, collate_fn=collate_fn), wanted, scribble)

    @rule(wanted=st.sampled_from(PATHS), scribble=st.booleans())
    def get(self, wanted: str, scribble: bool) -> None:
        if not self.too_large([wanted]):
            self.compare([self.store.get(wanted)], [wanted], scribble)

    def compare(self, batch: Any, wanted: list[str], scribble: bool) -> None:
        assert len(batch) == len(wanted)
        for feature, path in zip(batch, wanted, strict=True):
            assert_same(feature, self.model[path])
        if scribble:
            for leaf in tree_leaves(list(batch)):
                if isinstance(leaf, torch.Tensor):
                    leaf.zero_()

    @rule(target=pending, wanted=paths)
    def request(self, wanted: list[str]) -> tuple[PendingBatch, list[str], GPUFeatureStore]:
        """A second consumer, who comes for it later."""
        return self.store.request(wanted), wanted, self.store

    @rule(held=consumes(pending), cancel=st.booleans(), scribble=st.booleans())
    def collect(self, held: Any, cancel: bool, scribble: bool) -> None:
        pending, wanted, store = held
        if cancel:
            pending.cancel()
        elif store is self.store and not self.too_large(wanted):
            self.compare(pending.result(), wanted, scribble)

    @rule(held=consumes(pending))
    def drop(self, held: Any) -> None:
        """Nobody ever comes: its finalizer lets go."""

    @rule(wanted=paths)
    def release(self, wanted: list[str]) -> None:
        self.store.release(wanted)

    @rule()
    def clear(self) -> None:
        self.store.clear()

    @rule()
    def begin_epoch(self) -> None:
        self.store.begin_epoch()

    @rule(order=paths)
    def announce(self, order: list[str]) -> None:
        self.store.announce("machine", order)

    @rule(part=st.floats(0.1, 1.0))
    def shrink(self, part: float) -> None:
        """Another store with a smaller budget takes its place."""
        self.store.check()
        self.store.close()
        if self.max_bytes is not None:
            self.max_bytes = max(1, int(self.max_bytes * part))
        self.open_store()

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "store"):
            self.store.check()
            # What is still on its way would come between the readings below.
            assert self.store.wait_idle(60)
            stats = self.store.stats()
            assert self.max_bytes is None or stats.cached_bytes <= self.max_bytes
            assert self.max_items is None or stats.items <= self.max_items
            assert stats.items == len(self.store)
            host = self.options["host_cache_bytes"]
            assert stats.host_cached_bytes <= (1 << 20 if isinstance(host, str) else host or 0)
            held = sum(path in self.store for path in PATHS)
            if self.directory is None:
                assert max(stats.items, stats.host_items) <= held
                assert held <= stats.items + stats.host_items

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
        if self.directory is not None:
            shutil.rmtree(self.directory)


def case(kind: str) -> Any:
    machine: Any = type(f"StoreMachineOn{kind.title()}", (StoreMachine,), {"kind": kind}).TestCase
    machine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
    return machine


TestOnHost = case("host")
TestStaged = case("staged")
TestSimulated = case("simulated")
TestOnAccelerator = pytest.mark.gpu(case("accelerator"))
