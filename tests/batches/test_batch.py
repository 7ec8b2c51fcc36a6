"""Collating: the fast ways equal torch's default_collate."""

import sys
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import default_collate

from gpucache_pipes import GPUFeatureStore
from gpucache_pipes.batches import RaggedOptions
from gpucache_pipes.testing import assert_same, features
from gpucache_pipes.testing.features import tensors, values


def alike(template: Any, data: st.DataObject) -> Any:
    """Another feature with the layout of `template`."""
    if isinstance(template, torch.Tensor):
        return torch.randint(0, 2, template.shape).to(template.dtype)
    if isinstance(template, dict):
        return type(template)((k, alike(v, data)) for k, v in template.items())
    if isinstance(template, (list, tuple)):
        parts = [alike(v, data) for v in template]
        return type(template)(*parts) if hasattr(template, "_fields") else type(template)(parts)
    return data.draw(st.sampled_from([template, template]))


numbers = values().filter(lambda v: v is not None)


@given(
    features(leaf=st.one_of(tensors(), numbers), named_tuples=True),
    st.integers(1, 4),
    st.sampled_from([None, 16, 64]),
    st.data(),
)
def test_collate_equals_default_collate(
    template: Any, count: int, page_bytes: int | None, data: st.DataObject
) -> None:
    items = {f"/{n}": alike(template, data) for n in range(count)}
    with GPUFeatureStore("cpu", load_fn=items.__getitem__, page_bytes=page_bytes) as store:
        batch = store.get_batch(list(items))
        result = batch.collate()
        assert_same(result, default_collate(list(items.values())))
        for leaf in torch.utils._pytree.tree_leaves(result):
            assert not isinstance(leaf, torch.Tensor) or leaf.is_contiguous()
        for feature, expected in zip(batch, items.values(), strict=True):
            assert_same(feature, expected)


def test_a_different_order_of_keys_is_no_obstacle() -> None:
    items: dict[str, Any] = {
        "/a": {"x": torch.tensor([1.0]), "y": 1},
        "/b": {"y": 2, "x": torch.tensor([2.0])},
    }
    with GPUFeatureStore("cpu", load_fn=items.__getitem__) as store:
        assert_same(
            store.get_batch(list(items)).collate(),
            {"x": torch.tensor([[1.0], [2.0]]), "y": torch.tensor([1, 2])},
        )


@given(st.lists(features(max_leaves=3), min_size=1, max_size=4), st.sampled_from([None, 16, 64]))
def test_a_batch_is_iterated_as_it_is_indexed(files: list[Any], page_bytes: int | None) -> None:
    """By features of one kind, dicts of tensors among them, and of several."""
    shorter = [tree_map(lambda leaf: leaf[:1] if _has_rows(leaf) else leaf, f) for f in files]
    items = {f"/{n}": feature for n, feature in enumerate(files + shorter)}
    with GPUFeatureStore("cpu", load_fn=items.__getitem__, page_bytes=page_bytes) as store:
        for paths in (list(items), ["/0", f"/{len(files)}", "/0"], ["/0", "/0"], []):
            batch = store.get_batch(paths)
            found = list(batch)
            assert len(found) == len(paths)
            for number, (feature, path) in enumerate(zip(found, paths, strict=True)):
                assert_same(feature, items[path])
                assert_same(batch[number], items[path])
                one, other = tree_leaves(feature), tree_leaves(batch[number])
                for leaf, again in zip(one, other, strict=True):
                    if isinstance(leaf, torch.Tensor):  # the same memory, laid out alike
                        assert leaf.data_ptr() == again.data_ptr()
                        assert leaf.stride() == again.stride() == torch.empty(leaf.shape).stride()


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.numel() > 0


def test_different_shapes_name_leaf_shapes_and_files() -> None:
    items = {"/a": {"x": torch.zeros(2, 3)}, "/b": {"x": torch.zeros(4, 3)}}
    with (
        GPUFeatureStore("cpu", load_fn=items.__getitem__) as store,
        pytest.raises(RuntimeError, match=r"\['x'\].*\[2, 3\].*'/a'.*\[4, 3\].*'/b'.*collate_fn"),
    ):
        store.get_batch(list(items)).collate()


def test_what_default_collate_refuses_is_refused() -> None:
    items = {"/a": {"x": None}, "/b": {"x": None}}
    with GPUFeatureStore("cpu", load_fn=items.__getitem__) as store:
        with pytest.raises(TypeError, match="NoneType"):
            store.get_batch(list(items)).collate()
        with pytest.raises(ValueError, match="empty"):
            store.get_batch([]).collate()


MACHINE_ERRORS = [
    MemoryError("no memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    *([torch.AcceleratorError("device-side assert")] if hasattr(torch, "AcceleratorError") else []),
]


@pytest.mark.parametrize("ragged", ["error", "pad"])
@pytest.mark.parametrize("error", MACHINE_ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_of_the_machine_is_raised_as_it_is(
    monkeypatch: pytest.MonkeyPatch, error: Exception, ragged: str
) -> None:
    items = {f"/{n}": {"x": torch.full((64 + n, 2), n)} for n in range(3)}
    if ragged == "error":
        items = {path: {"x": feature["x"][:64]} for path, feature in items.items()}

    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    with GPUFeatureStore("cpu", load_fn=items.__getitem__, page_bytes=64) as store:
        batch = store.get_batch(list(items))
        monkeypatch.setattr("gpucache_pipes.batches.ragged.move", fail)
        with pytest.raises(type(error)) as caught:
            batch.collate(RaggedOptions(ragged))
        monkeypatch.undo()
        assert caught.value is error
        batch.collate(RaggedOptions(ragged))  # nothing else was wrong


@pytest.mark.parametrize("max_items", [None, 2])
def test_numbers_of_layouts_are_used_again(
    monkeypatch: pytest.MonkeyPatch, max_items: int | None
) -> None:
    from gpucache_pipes.cache import layouts

    monkeypatch.setattr(layouts, "_MANY", 2)
    items = {f"/{n}": torch.arange(n + 1) for n in range(8)}
    options: Any = {"load_fn": items.__getitem__, "page_bytes": 64, "policy": "lru"}
    with GPUFeatureStore("cpu", max_cache_items=max_items, **options) as store:
        for path, expected in [*items.items()] * 2:
            assert_same(store.get_batch([path, path]).collate(), torch.stack([expected] * 2))
            store.check()
        known = len(store._shared.cache.layouts)
        assert known == 8 if max_items is None else known < 8
        for feature, expected in zip(store.get_batch(list(items)), items.values(), strict=True):
            assert_same(feature, expected)
        store.check()


def test_joining_on_the_host_starts_no_threads_of_torch() -> None:
    """Threads of torch spin while they wait for each other, and stumble over other processes."""
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    run([sys.executable, "-c", _ALL_JOINS], check=True, timeout=120)


_ALL_JOINS = """
import os
import numpy as np, torch
from gpucache_pipes.batches import PageBatch, RaggedOptions
from gpucache_pipes.device import host_copies
from gpucache_pipes.files import Layout
torch.set_num_threads(4)
host_copies._MANY = 1 << 60
before = len(os.listdir("/proc/self/task"))
block = torch.empty(64 << 20, dtype=torch.uint8, device="cpu")
for longest, row, count in ((4, 1, 4096), (255, 1, 1024), (999, 16, 300), (50_000, 16, 20)):
    for shortest in (longest, 1):
        lengths = [shortest, *[longest] * (count - 1)]
        layouts = [Layout.of(0, [(torch.float32, (n, row))]) for n in lengths]
        starts = np.arange(count) * ((len(block) // count) & ~15)
        for mode in ("pad", "jagged"):
            for value in (0.0, 1.5):
                batch = PageBatch(block.device, ["/f"] * count, layouts, (), block, starts)
                batch.collate(RaggedOptions(mode, padding_value=value))
        if shortest == longest:
            batch.collate()
assert len(os.listdir("/proc/self/task")) == before
a = torch.ones(1 << 22, device="cpu")
a += 1
assert len(os.listdir("/proc/self/task")) > before  # else the test shows nothing
"""
