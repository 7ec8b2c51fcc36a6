"""Sequences of different lengths in one batch, against torch's own functions."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from conftest import device_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, Padded

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


class Numbered:
    """Loads feature n of a list."""

    def __init__(self, features: Sequence[Any]) -> None:
        self.features = features

    def __call__(self, path: str) -> Any:
        return self.features[int(path.rpartition("/")[2])]

    @property
    def paths(self) -> list[str]:
        return [f"/features/{number}" for number in range(len(self.features))]


WHERE = {"kind": "host"}
"""The kind of device that `collated` makes."""


@pytest.fixture(autouse=True, params=["on the host", "as on a device", "simulated"])
def place(request: pytest.FixtureRequest) -> Iterator[None]:
    """On the host, bytes are copied one sequence after the other; elsewhere by an index."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WHERE, "kind", "simulated" if request.param == "simulated" else "host")
        if request.param == "as on a device":
            for module in ("ragged", "feature_batch"):
                patch.setattr(f"gpucache_pipes.batches.{module}.is_on_host", lambda block: False)
        yield


def collated(features: Sequence[Any], page_bytes: int | None = None, **options: Any) -> Any:
    load = Numbered(features)
    with GPUFeatureStore(
        device_for(WHERE["kind"]), load_fn=load, asynchronous=False, page_bytes=page_bytes
    ) as store:
        node = GPUCollator(GPUPrefetcher([load.paths], store), **options)
        [batch] = list(node)
        return batch


@st.composite
def sequences(draw: st.DrawFn) -> list[torch.Tensor]:
    dtype = draw(st.sampled_from(DTYPES))
    rest = draw(st.lists(st.integers(0, 4), max_size=2))
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
    made = []
    for number, length in enumerate(lengths):
        values = torch.arange(length * max(1, torch.Size(rest).numel())) % 7 + number
        made.append(values[: torch.Size([length, *rest]).numel()].view(length, *rest).to(dtype))
    return made


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.numel() else tensor.new_empty(0)


def assert_equal(one: torch.Tensor, other: torch.Tensor) -> None:
    one, other = one.cpu(), other.cpu()
    assert one.dtype == other.dtype and one.shape == other.shape
    assert torch.equal(bits(one), bits(other))


@settings(deadline=None, max_examples=80)
@given(
    sequences(), st.sampled_from([None, 16, 48, 256]), st.integers(1, 4), st.sampled_from([0, 1])
)
def test_padded_equals_pad_sequence(
    parts: list[torch.Tensor], page_bytes: int | None, multiple: int, value: int
) -> None:
    features = [
        {"n": torch.tensor([n]), "x": part, "y": torch.ones(3)} for n, part in enumerate(parts)
    ]
    batch = collated(
        features, page_bytes, ragged={"x": "pad"}, padding_value=value, pad_to_multiple=multiple
    )
    padded = batch["x"]
    assert isinstance(padded, Padded)
    longest = max(len(part) for part in parts)
    total = -(-longest // multiple) * multiple
    shape = [len(parts), total, *parts[0].shape[1:]]
    expected = torch.tensor([value]).to(parts[0].dtype).expand(torch.Size(shape).numel())
    expected = expected.clone().view(shape)
    for row, part in zip(expected, parts, strict=True):
        row[: len(part)] = part
    if parts[0].dtype.itemsize > 1 or not parts[0].is_floating_point():  # which torch cannot pad
        theirs = pad_sequence(parts, batch_first=True, padding_value=value)
        assert_equal(expected[:, :longest], theirs)
    assert_equal(padded.values, expected)
    assert padded.lengths.tolist() == [len(part) for part in parts]
    assert padded.lengths.dtype == torch.int64
    assert padded.mask.tolist() == [[at < len(part) for at in range(total)] for part in parts]
    assert batch["n"].tolist() == [[n] for n in range(len(parts))]
    assert_equal(batch["y"], torch.ones(len(parts), 3))


@settings(deadline=None, max_examples=80)
@given(sequences(), st.sampled_from([None, 16, 48, 256]))
def test_jagged_equals_torch_nested(parts: list[torch.Tensor], page_bytes: int | None) -> None:
    batch = collated([{"x": part} for part in parts], page_bytes, ragged={"x": "jagged"})
    assert batch["x"].is_nested and batch["x"].layout == torch.jagged
    assert_equal(batch["x"].values(), torch.cat(parts))
    for one, other in zip(batch["x"].unbind(), parts, strict=True):
        assert_equal(one, other)


@settings(deadline=None, max_examples=50)
@given(st.data(), st.sampled_from(["pad", "jagged", "list"]), st.sampled_from([16, 48, 256]))
def test_pages_that_were_others_before(data: st.DataObject, mode: str, page_bytes: int) -> None:
    """A feature that takes the place of several lies in pages that are no neighbours."""
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=6, max_size=6))
    features = [{"x": torch.full((n, 3), float(at))} for at, n in enumerate(lengths)]
    order = st.permutations(range(6)).map(lambda at: at[:3])
    load = Numbered(features)
    batches = [[load.paths[at] for at in batch] for batch in data.draw(st.lists(order, max_size=8))]
    with GPUFeatureStore(
        "cpu", load_fn=load, asynchronous=False, page_bytes=page_bytes, max_cache_items=2,
        policy="lru",
    ) as store:  # fmt: skip
        node = GPUCollator(GPUPrefetcher(batches, store, depth=1), ragged={"x": mode})
        for paths, batch in zip(batches, node, strict=True):
            parts = [features[load.paths.index(path)]["x"] for path in paths]
            if mode == "pad":
                assert_equal(batch["x"].values, pad_sequence(parts, batch_first=True))
            elif mode == "jagged":
                assert_equal(batch["x"].values(), torch.cat(parts))
            else:
                for one, other in zip(batch["x"], parts, strict=True):
                    assert_equal(one, other)
                    one.fill_(9.0)  # changes nothing but this batch
        store.check()


@settings(deadline=None, max_examples=40)
@given(sequences(), st.sampled_from([None, 16]))
def test_lists(parts: list[torch.Tensor], page_bytes: int | None) -> None:
    batch = collated([{"x": part} for part in parts], page_bytes, ragged={"x": "list"})
    assert isinstance(batch["x"], list)
    for one, other in zip(batch["x"], parts, strict=True):
        assert_equal(one, other)


@settings(deadline=None, max_examples=50)
@given(
    st.data(),
    sequences(),
    st.sampled_from(["pad", "jagged", "list"]),
    st.sampled_from(["start", "center", "random"]),
    st.integers(1, 5),
    st.sampled_from([None, 16, 48]),
    st.booleans(),
)
def test_crops_equal_slices(
    data: st.DataObject,
    parts: list[torch.Tensor],
    mode: str,
    crop: str,
    most: int,
    page_bytes: int | None,
    alike: bool,
) -> None:
    """Sequences of one length in a feature are cut at one place, and never beyond their end."""
    if data.draw(st.booleans()):  # all are cut
        longer = [torch.cat([part, part, part]) for part in parts if len(part) > 2]
        parts = [part[: most + 2] for part in longer] or parts
    features = [{"x": part, "y": torch.arange(len(part))} for part in parts]
    if not alike:  # another order of keys, which takes another way
        features[-1] = dict(reversed(features[-1].items()))
    seed = data.draw(st.integers(0, 1000))
    torch.manual_seed(seed)
    batch = collated(features, page_bytes, ragged=mode, max_length=most, crop=crop)
    torch.manual_seed(seed)
    cuts = torch.rand(len(parts), dtype=torch.float64).tolist()
    for number, part in enumerate(parts):
        left = max(0, len(part) - most)
        at = {"start": 0, "center": (left + 1) // 2, "random": int(cuts[number] * (left + 1))}[crop]
        found = {}
        for key in ("x", "y"):
            value = batch[key]
            if mode == "pad":
                found[key] = value.values[number][: int(value.lengths[number])]
            elif mode == "list":
                found[key] = value[number]
            else:
                begin, end = value.offsets()[number : number + 2].tolist()
                found[key] = value.values()[begin:end]
        assert_equal(found["x"], part[at : at + most])
        assert found["y"].tolist() == list(range(len(part)))[at : at + most]


def test_a_crop_needs_a_length() -> None:
    with pytest.raises(ValueError, match="needs a max_length="):
        GPUCollator([], ragged="pad", crop="random")
    with pytest.raises(ValueError, match=r"crop='end' must be one of start, center, random"):
        GPUCollator([], ragged="pad", crop="end", max_length=3)


# By torch's own attention, on the CPU.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_attention_takes_it() -> None:
    if WHERE["kind"] == "simulated":
        pytest.skip(
            "torch's attention makes nested tensors of another kind, which are not simulated"
        )
    parts = [torch.randn(length, 2, 8) for length in (3, 5, 1)]
    batch = collated([{"x": part} for part in parts], ragged="jagged")
    x = batch["x"].transpose(1, 2)
    out = torch.nn.functional.scaled_dot_product_attention(x, x, x).transpose(1, 2)
    for one, part in zip(out.unbind(), parts, strict=True):
        heads = part.transpose(0, 1)
        expected = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        torch.testing.assert_close(one, expected.transpose(0, 1))


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["pad", "jagged"])
def test_operations_do_not_grow_with_the_batch(mode: str) -> None:
    counts = []
    for size in (4, 64):
        features = [{"x": torch.randn(1 + n % 5, 3), "y": torch.ones(2)} for n in range(size)]
        load = Numbered(features)
        with GPUFeatureStore("cpu", load_fn=load, asynchronous=False) as store:
            node = GPUCollator(GPUPrefetcher([load.paths], store), ragged={"x": mode})
            store.warm(load.paths, progress=False)
            node.reset()
            with Counted() as counted:
                next(node)
            counts.append(counted.operations)
    assert counts[1] <= counts[0] + 3 < 50


def kinds_of(batch: Any) -> Any:
    """The types of the parts of a batch, and of what is in lists."""
    if isinstance(batch, dict):
        return {name: kinds_of(part) for name, part in batch.items()}
    if isinstance(batch, list):
        return [list, *sorted({repr(kinds_of(part)) for part in batch})]
    if isinstance(batch, torch.Tensor):  # also a simulated one
        return "jagged" if batch.is_nested else "tensor"
    return type(batch)


def test_types_follow_from_the_options_alone() -> None:
    load = Numbered([torch.ones(n) for n in (2, 2, 3, 2, 2)])
    with GPUFeatureStore("cpu", load_fn=load) as store:
        batches = [load.paths[:2], load.paths[1:3], load.paths[3:]]
        got = list(GPUCollator(GPUPrefetcher(batches, store), ragged="pad"))
    assert [type(batch) for batch in got] == [Padded, Padded, Padded]
    named = collated([{"x": torch.ones(2)}] * 2, ragged={"['x']": "pad"})
    assert isinstance(named["x"], Padded)


@pytest.mark.parametrize("page_bytes", [None, 16])
def test_one_mode_is_for_every_leaf_that_has_a_dimension(page_bytes: int | None) -> None:
    features = [{"x": torch.ones(2, 3), "y": torch.tensor(n), "name": str(n)} for n in range(3)]
    padded = collated(features, page_bytes, ragged="pad", pad_to_multiple=4)
    assert padded["x"].values.shape == (3, 4, 3) and padded["x"].lengths.tolist() == [2, 2, 2]
    jagged = collated(features, page_bytes, ragged="jagged")
    assert jagged["x"].is_nested and jagged["x"].offsets().tolist() == [0, 2, 4, 6]
    listed = collated(features, page_bytes, ragged="list")
    assert [part.shape for part in listed["x"]] == [(2, 3)] * 3
    for batch in (padded, jagged, listed):
        assert kinds_of(batch["y"]) == "tensor"
        assert batch["y"].tolist() == [0, 1, 2] and batch["name"] == ["0", "1", "2"]
    # A single feature, too.
    assert isinstance(collated(features[:1], page_bytes, ragged="pad")["x"], Padded)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=8),
    st.integers(1, 4),
    st.sampled_from(["pad", "jagged", "list", {"x": "pad", "y": "list"}]),
    st.sampled_from([None, 16]),
    st.data(),
)
def test_the_type_of_a_batch_is_the_same_in_any_order(
    lengths: list[int], size: int, ragged: Any, page_bytes: int | None, data: st.DataObject
) -> None:
    load = Numbered(
        [{"x": torch.ones(n, 2), "y": torch.ones(3), "label": torch.tensor(n)} for n in lengths]
    )
    options: dict[str, Any] = {"load_fn": load, "page_bytes": page_bytes, "asynchronous": False}
    seen = []
    with GPUFeatureStore(device_for(WHERE["kind"]), **options) as store:
        for _ in range(3):
            order = data.draw(st.permutations(load.paths))
            batches = [order[at : at + size] for at in range(0, len(order), size)]
            node = GPUCollator(GPUPrefetcher(batches, store), ragged=ragged)
            seen += [kinds_of(batch) for batch in node]
    assert all(kinds == seen[0] for kinds in seen)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 4), min_size=2, max_size=5),
    st.sampled_from(["pad", "jagged", "list"]),
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from([None, 16]),
)
def test_types_are_the_same_where_dtypes_and_keys_differ(
    lengths: list[int], mode: str, named: bool, multiple: int, page_bytes: int | None
) -> None:
    """As where on_error gives a feature that is not quite like those in files."""

    def feature(number: int, length: int, odd: bool) -> Any:
        x = torch.full((length, 2), float(number)).to(torch.float64 if odd else torch.float32)
        parts = {"x": x, "label": torch.tensor(number), "rest": [str(number), torch.ones(2)]}
        return dict(reversed(parts.items())) if odd else parts

    alike = [feature(at, length, False) for at, length in enumerate(lengths)]
    unlike = [feature(at, length, bool(at % 2)) for at, length in enumerate(lengths)]
    ragged: Any = {"x": mode} if named else mode
    options: dict[str, Any] = {"ragged": ragged, "padding_value": 7, "pad_to_multiple": multiple}
    one, other = (collated(features, page_bytes, **options) for features in (alike, unlike))
    assert kinds_of(one) == kinds_of(other)
    assert one["label"].tolist() == other["label"].tolist() and one["rest"][0] == other["rest"][0]
    if mode == "pad":
        assert other["x"].values.dtype == torch.float64
        for mine, theirs in zip(one["x"], other["x"], strict=True):
            assert mine.tolist() == theirs.tolist()
    elif mode == "jagged":
        assert other["x"].values().dtype == torch.float64
        assert one["x"].values().tolist() == other["x"].values().tolist()
        assert one["x"].offsets().tolist() == other["x"].offsets().tolist()
    else:
        assert [part.tolist() for part in one["x"]] == [part.tolist() for part in other["x"]]


@pytest.mark.parametrize("mode", ["pad", "jagged", "list"])
def test_a_resumed_run_gives_the_types_of_an_uninterrupted_one(mode: str) -> None:
    # The batches before the interruption have two lengths, those behind it have one.
    load = Numbered([{"x": torch.ones(n)} for n in (1, 2, 2, 2, 2, 2, 2, 2)])
    batches = [load.paths[at : at + 2] for at in range(0, 8, 2)]

    def pipeline(store: GPUFeatureStore) -> GPUCollator:
        return GPUCollator(GPUPrefetcher(batches, store), ragged=mode)

    with GPUFeatureStore(device_for(WHERE["kind"]), load_fn=load) as store:
        whole = pipeline(store)
        states, kinds = [], []
        for batch in whole:
            kinds.append(kinds_of(batch))
            states.append(whole.state_dict())
        assert len(kinds) == 4
        for done, state in enumerate(states, 1):
            resumed = pipeline(store)
            resumed.reset(state)
            assert [kinds_of(batch) for batch in resumed] == kinds[done:]


@pytest.mark.parametrize("batch_size", [None, 2])
def test_batches_of_single_features(batch_size: int | None) -> None:
    load = Numbered([{"x": torch.ones(n)} for n in (1, 2, 3)])
    with GPUFeatureStore("cpu", load_fn=load) as store:
        source: Any = load.paths if batch_size else [load.paths[:2], load.paths[2:]]
        node = GPUCollator(GPUPrefetcher(source, store), batch_size=batch_size, ragged="pad")
        assert [len(batch["x"].lengths) if isinstance(batch["x"], Padded) else 0
                for batch in node] == [2, 1]  # fmt: skip


def test_errors_name_the_leaf_and_the_way_out() -> None:
    parts = [{"x": torch.ones(2, 3)}, {"x": torch.ones(4, 3)}]
    with pytest.raises(RuntimeError, match=r"stack \['x'\].*\[2, 3\].*/0'.*\[4, 3\].*/1'.*ragged="):
        collated(parts)
    with pytest.raises(RuntimeError, match=r"stack \['x'\].*ragged="):
        collated(parts, ragged={"y": "pad"})
    other = [{"x": torch.ones(2, 3)}, {"x": torch.ones(4, 5)}]
    with pytest.raises(RuntimeError, match=r"pad \['x'\]: shape \[2, 3\]"):
        collated(other, ragged="pad")
    unlike = [{"x": torch.ones(2, 3)}, {"x": torch.ones(4, 5).double()}]
    with pytest.raises(RuntimeError, match=r"pad \['x'\]: shapes \[2, 3\], \[4, 5\]"):
        collated(unlike, ragged="pad")
    with pytest.raises(RuntimeError, match="cannot collate the features of"):
        collated(unlike, ragged={"y": "pad"})
    with pytest.raises(RuntimeError, match=r"pad \['x'\]: shape \[\]"):
        collated([{"x": torch.tensor(1.0)}] * 2, ragged={"x": "pad"})
    for wrong in ("padded", {"x": "stack"}):
        with pytest.raises(ValueError, match="is not known"):
            GPUCollator((), ragged=wrong)
    with pytest.raises(ValueError, match="pad_to_multiple=0"):
        GPUCollator((), ragged="pad", pad_to_multiple=0)
    with pytest.raises(ValueError, match="collate_fn"):
        GPUCollator((), ragged="pad", collate_fn=list)
    with pytest.raises(TypeError, match="GPUPrefetcher"):
        list(GPUCollator([[{"x": torch.ones(1)}]], ragged="pad"))
