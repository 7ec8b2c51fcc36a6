"""With torch.set_default_device everything works, and gives the same as without.

The default device is "meta" here, where every machine can make tensors. A tensor that lands there
by mistake has no data, so it cannot give equal results.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import device_for
from torch.utils.data import BatchSampler, RandomSampler

from gpucache_pipes import (
    FeatureFileDataset,
    FeatureLoadError,
    GPUCachedPathDataLoader,
    GPUCollator,
    GPUFeatureStore,
    GPUPrefetcher,
    Lockstep,
    PathLister,
)
from gpucache_pipes.testing import assert_same

MODES: list[Any] = ["error", "pad", "jagged", "list", {"frames": "pad"}]


@pytest.fixture(autouse=True)
def restore_the_default_device() -> Iterator[None]:
    yield
    torch.set_default_device(None)


@contextmanager
def default_device(name: str | None) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


KINDS = ["host", "staged", "simulated"]


def some_feature(number: int) -> dict[str, Any]:
    """Everything that a batch may be made of; every fifth feature has its keys in another order."""
    feature = {
        "frames": torch.arange((number % 4) * 3, dtype=torch.float32).view(-1, 3) + number,
        "label": torch.tensor(number),
        "empty": torch.empty(0, 2),
        "pair": (number, float(number) / 3),
        "good": number % 2 == 0,
        "name": f"number {number}",
    }
    return dict(reversed(feature.items())) if number % 5 == 4 else feature


def of_one_shape(number: int) -> dict[str, Any]:
    return {**some_feature(number), "frames": torch.full((4, 3), float(number))}


def alike(number: int) -> dict[str, Any]:
    """Of one tree, so that batches are gathered by column."""
    return {"x": torch.full((40,), float(number)), "n": number, "score": number / 7, "good": True}


@pytest.fixture
def paths(make_files: Callable[..., list[str]]) -> Callable[[Callable[[int], Any]], list[str]]:
    """17 files of features; some in a format that is left to torch.load."""

    def make(feature_of: Callable[[int], Any]) -> list[str]:
        files = make_files(17, feature_of, feature_of.__name__)
        for number in (3, 8, 13):
            torch.save(feature_of(number), files[number], _use_new_zipfile_serialization=False)
        return files

    return make


def comparable(item: Any) -> Any:
    """`item` with its nested tensors in parts, everything on the host."""
    if isinstance(item, dict):
        return {key: comparable(part) for key, part in item.items()}
    if isinstance(item, (list, tuple)):
        parts = [comparable(part) for part in item]
        return type(item)(*parts) if hasattr(item, "_fields") else parts
    if isinstance(item, torch.Tensor) and item.is_nested:
        least = item._min_seqlen_tensor
        return [item.values().cpu(), item.offsets().cpu(), [*least.shape], least.device.type]
    if isinstance(item, torch.Tensor):
        assert item.device.type == "cpu"
        return item.cpu()
    return item


def batches_of(files: list[str], kind: str, resume_after: int | None = None, **options: Any) -> Any:
    """All batches of two epochs, or of what is left of the first one after a state."""
    shape = {"ragged": options.pop("ragged", "error")}
    with GPUFeatureStore(device_for(kind), **options) as store:

        def pipeline() -> Lockstep:
            lister = PathLister(files, batch_size=4, shuffle=True, seed=3, bucket_by="file_size")
            return Lockstep(GPUCollator(GPUPrefetcher(lister, store), **shape))

        node = pipeline()
        if resume_after is None:
            found = [comparable(batch) for batch in node]
            node.reset()
            return found + [comparable(batch) for batch in node]
        for _ in range(resume_after):
            next(node)
        resumed = pipeline()
        resumed.reset(node.state_dict())
        return [comparable(batch) for batch in resumed]


def same_as_without(work: Callable[[], Any]) -> None:
    expected = work()
    with default_device("meta"):
        assert torch.empty(1).is_meta  # the other device is in effect
        found = work()
    assert_same(found, expected)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("ragged", MODES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_pipelines(paths: Any, kind: str, ragged: Any, asynchronous: bool) -> None:
    files = paths(of_one_shape if ragged == "error" else some_feature)
    same_as_without(
        lambda: batches_of(files, kind, ragged=ragged, asynchronous=asynchronous, page_bytes=64)
    )


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_features_of_one_layout(paths: Any, kind: str, asynchronous: bool) -> None:
    files = paths(alike)
    same_as_without(lambda: batches_of(files, kind, asynchronous=asynchronous))
    same_as_without(lambda: batches_of(files, kind, 2, asynchronous=asynchronous))


@pytest.mark.parametrize("mode", ["pad", "jagged"])
def test_sequences_that_are_joined_from_the_pages(paths: Any, mode: str) -> None:
    """On the host, without a copy of the pages."""

    def frames(number: int) -> Any:
        return {"frames": torch.full((number % 4 + 1, 3), float(number)), "n": number}

    files = paths(frames)
    same_as_without(lambda: batches_of(files, "host", ragged=mode, page_bytes=64))


def test_features_that_are_collated_one_by_one(paths: Any) -> None:
    files = paths(alike)

    def work() -> Any:
        with GPUFeatureStore(device_for("staged")) as store:
            node = GPUCollator(GPUPrefetcher(files, store), batch_size=4)
            singles = [feature for path in files for feature in [store.get(path)]]
            return [comparable(batch) for batch in node] + [
                comparable(batch) for batch in GPUCollator([singles[:3], singles[3:]])
            ]

    same_as_without(work)


def test_a_dataset_of_files(paths: Any) -> None:
    files = paths(some_feature)
    same_as_without(lambda: [comparable(feature) for feature in FeatureFileDataset(files)])


def test_what_is_read_by_torch_load(tmp_path: Path) -> None:
    """Objects that make tensors while they are unpickled."""
    path = str(tmp_path / "object.pt")
    torch.save({"made": Maker(), "x": torch.ones(2)}, path)

    def work() -> Any:
        options = {"weights_only": False, "asynchronous": False}
        with GPUFeatureStore(device_for("staged"), **options) as store:
            return comparable(store.get(path))

    same_as_without(work)


class Maker:
    """Is a tensor once it is unpickled."""

    def __reduce__(self) -> Any:
        return torch.full, ((3,), 2.5)


class Remembering(RandomSampler):
    """A sampler with a generator of its own."""

    def __init__(self, count: int) -> None:
        super().__init__(range(count), generator=torch.Generator())


@pytest.mark.parametrize("sampler", [RandomSampler, Remembering])
def test_samplers(paths: Any, sampler: Any) -> None:
    files = paths(alike)

    def work() -> Any:
        order = sampler(range(len(files))) if sampler is RandomSampler else sampler(len(files))
        lister = PathLister(files, sampler=BatchSampler(order, 4, drop_last=False), seed=5)
        with GPUFeatureStore(device_for("staged")) as store:
            return [comparable(batch) for batch in GPUCachedPathDataLoader(lister, store=store)]

    same_as_without(work)


def test_a_load_fn_whose_tensors_have_no_data_is_told_so() -> None:
    """Threads have their own default device: only with asynchronous=False is load_fn affected."""

    def load(path: str) -> Any:
        return torch.ones(3)

    with default_device("meta"):
        with GPUFeatureStore("cpu", load_fn=load) as store:
            assert store.get("/a").tolist() == [1, 1, 1]
        with GPUFeatureStore("cpu", load_fn=load, asynchronous=False) as store:
            with pytest.raises(FeatureLoadError, match="meta tensor") as caught:
                store.get("/a")
            assert isinstance(caught.value.__cause__, TypeError)
