"""Numbers in features: as default_collate collates them, in one copy to the device."""

from typing import Any

import pytest
import torch
from conftest import device_for
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate

from gpucache_pipes import GPUFeatureStore
from gpucache_pipes.batches import ColumnBatch, numbers
from gpucache_pipes.device import AcceleratorBackend
from gpucache_pipes.files import LoadedFeature
from gpucache_pipes.testing import SimulatedRuntime, assert_same

INT64 = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=True, allow_infinity=True)
COLUMNS = [
    INT64,
    FLOATS,
    st.booleans(),
    st.sampled_from([0, -1, 2**63 - 1, -(2**63), 2**63, 2**64, -(2**63) - 1]),
    st.one_of(INT64, FLOATS),
    st.one_of(st.booleans(), st.integers(-3, 3)),
    st.one_of(st.booleans(), FLOATS),
    st.text(max_size=3),
]


@pytest.fixture(params=["host", "as on a device", "staged", "simulated"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where batches are. "as on a device": by the table that is copied to devices, on the host."""
    if request.param == "as on a device":
        monkeypatch.setattr(numbers, "_is_host", lambda device: False)
        return "host"
    return str(request.param)


@given(st.data(), st.integers(1, 5), st.booleans(), st.sampled_from([None, 16]))
def test_numbers_are_collated_as_by_default_collate(
    kind: str, data: st.DataObject, count: int, ragged: bool, page_bytes: int | None
) -> None:
    kinds = data.draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=5))
    columns = [data.draw(st.lists(k, min_size=count, max_size=count)) for k in kinds]
    items: dict[str, Any] = {}
    for n in range(count):
        first, *rest = [column[n] for column in columns]
        items[f"/{n}"] = {"x": torch.tensor([n, 7]), "first": first, "rest": [rest, (first,)]}
    try:
        expected = default_collate(list(items.values()))
    except (RuntimeError, TypeError, ValueError) as error:
        expected = error
    with GPUFeatureStore(
        device_for(kind), load_fn=items.__getitem__, asynchronous=False, page_bytes=page_bytes
    ) as store:
        batch = store.get_batch(list(items))
        if isinstance(expected, Exception):
            with pytest.raises((RuntimeError, TypeError)) as caught:
                batch.collate()
            assert str(expected) in str(caught.value)
            return
        result = batch.collate()
    assert_same(result, expected)
    for feature, item in zip(batch, items.values(), strict=True):
        assert_same(feature, item)
    tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)][1:]
    assert all(tensor.is_contiguous() for tensor in tensors)
    # They do not overlap.
    for number, tensor in enumerate(tensors):
        tensor.fill_(number % 2)
    for number, tensor in enumerate(tensors):
        assert tensor.tolist() == [number % 2] * count


def test_a_number_that_is_the_whole_feature(kind: str) -> None:
    items = {"/a": 3, "/b": 4}
    with GPUFeatureStore(device_for(kind), load_fn=items.__getitem__) as store:
        assert_same(store.get_batch(list(items)).collate(), torch.tensor([3, 4]))


def test_columns_on_the_host_can_be_resized() -> None:
    items: dict[str, Any] = {"/a": 3, "/b": 4}
    with GPUFeatureStore("cpu", load_fn=items.__getitem__) as store:
        column = store.get_batch(list(items)).collate()
    assert column.resize_(3)[:2].tolist() == [3, 4]


def test_writing_to_one_column_is_no_writing_to_another_for_autograd(kind: str) -> None:
    items = {f"/{n}": {"label": n, "weight": n / 2} for n in range(3)}
    with GPUFeatureStore(device_for(kind), load_fn=items.__getitem__) as store:
        batch = store.get_batch(list(items)).collate()
    factor = torch.ones(3, dtype=torch.float64, requires_grad=True)
    loss = (factor * batch["weight"].cpu()).sum()
    scaled = factor * batch["weight"]  # keeps `weight` for the backward pass
    batch["label"] += 1
    (loss + scaled.cpu().sum()).backward()
    assert factor.grad is not None and factor.grad.tolist() == [0, 1, 2]


def warm_batch(store: GPUFeatureStore, items: dict[str, Any]) -> Any:
    store.warm(list(items), progress=False)
    store.get_batch(list(items)).collate()
    return store.get_batch(list(items))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_all_numbers_take_one_operation_and_no_waiting(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    runtime = SimulatedRuntime(0)

    def upload(table: torch.Tensor, device: torch.device) -> torch.Tensor:
        # Simulated tensors say that they are on the CPU, to which there is nothing to copy.
        return runtime.index(table.flatten().tolist()).view(table.shape)

    monkeypatch.setattr(numbers, "_is_host", lambda device: False)
    monkeypatch.setattr(numbers, "upload", upload)
    makers: list[Any] = [int, float, lambda n: n % 2 == 0, lambda n: -n, lambda n: n / 7]
    plain = {str(k): makers[k] for k in range(count)}
    items = {
        f"/{n}": {"x": torch.tensor([n]), **{key: make(n) for key, make in plain.items()}}
        for n in range(12)
    }
    with GPUFeatureStore(AcceleratorBackend(runtime), load_fn=items.__getitem__) as store:
        batch = warm_batch(store, items)
        runtime.waits, before = 0, runtime.operations
        collated = batch.collate()
        assert runtime.operations - before == 1
        before = runtime.operations
        store.get_batch(list(items)).collate()
        # As for features without numbers, the index and the gather of one leaf; and this one.
        assert runtime.operations - before == 2 + 1
        # Python values: nothing is fetched from the device.
        assert [batch[n]["0"] for n in range(12)] == list(range(12))
        assert runtime.waits == 0
        assert_same(collated, default_collate(list(items.values())))
        assert runtime.waits > 0


class Recorder(TorchDispatchMode):
    """The operations that touch a device, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        if any(tensor.is_meta for tensor in tensors) and not func.is_view:
            self.operations.append(func.name())
        return result


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What is pinned; without an accelerator torch cannot."""
    tensors: list[torch.Tensor] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor.clone())
        return tensors[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    return tensors


def test_the_table_is_pinned_and_copied_once(pinned: list[torch.Tensor]) -> None:
    """On a device that has no data, but for which torch does everything as for a GPU."""
    device = torch.device("meta")
    features = [LoadedFeature({"n": n, "good": True, "part": n / 4}) for n in range(6)]
    values = [feature.values for feature in features]
    paths = [f"/{n}" for n in range(6)]
    batch = ColumnBatch(device, paths, features[0].layout, values, [])
    with Recorder() as recorder:
        collated = batch.collate()
        assert batch[2] == {"n": 2, "good": True, "part": 0.5}
    assert recorder.operations == ["aten::_to_copy"]
    [table] = pinned
    assert table.dtype == torch.int64 and table.shape == (3, 6)
    assert table[0].tolist() == list(range(6))
    assert table[2].view(torch.float64).tolist() == [n / 4 for n in range(6)]
    dtypes = {"n": torch.int64, "good": torch.bool, "part": torch.float64}
    for name, dtype in dtypes.items():
        column = collated[name]
        assert column.device == device and column.dtype == dtype and column.shape == (6,)
