"""RowFiles: samples that lie many to a file."""

import os
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from gpucache_pipes import GPUCachedPathDataLoader, GPUFeatureStore, PathLister
from gpucache_pipes.files import RowFiles, Source
from gpucache_pipes.files.pt.reader import PtReader
from gpucache_pipes.testing import SourceContract, assert_same, features


class TestItems(SourceContract):
    """A list of features in one file."""

    _ages = 0

    def features(self) -> st.SearchStrategy[Any]:
        return features(max_leaves=4)

    def make_source(self, directory: Path, features: Sequence[Any]) -> tuple[Source, list[str]]:
        self.file = str(directory / "all#1.pt")
        self.held = list(features)
        torch.save(self.held, self.file)
        link = Path(f"{self.file}.link")
        link.unlink(missing_ok=True)
        link.symlink_to(self.file)
        return RowFiles(), [f"{self.file}#{number}" for number in range(len(features))]

    def missing(self, paths: Sequence[str]) -> str:
        return f"{self.file}.missing#0"

    def spellings(self, path: str) -> list[str]:
        file, _, number = path.rpartition("#")
        directory, name = os.path.split(file)
        return [
            f"{file}#0{number}",
            f"{directory}/./{name}#{number}",
            os.path.relpath(path),
            f"{file}.link#{number}",
        ]

    def change(self, source: Source, path: str, feature: Any) -> None:
        self.held[int(path.rpartition("#")[2])] = feature
        torch.save(self.held, self.file)

    def age(self, source: Source, path: str) -> None:
        TestItems._ages += 1
        os.utime(self.file, ns=(0, TestItems._ages))


Pair = namedtuple("Pair", ["x", "y"])

ROWS = 7


def table(kind: str) -> Any:
    x = torch.arange(ROWS * 6, dtype=torch.float32).view(ROWS, 2, 3)
    y = torch.arange(ROWS)
    match kind:
        case "tensor":
            return x
        case "dict":
            return {"x": x, "y": y, "scale": 3, "mean": torch.tensor(2.0), "empty": x[:, :0]}
        case "tuple":
            return x, y
        case "nested":
            return {"in": {"x": x, "y": (y, x.double())}, "names": [f"n{n}" for n in range(ROWS)]}
        case "strided":
            return {
                "t": x.permute(0, 2, 1),
                "last": x.permute(1, 2, 0).permute(2, 0, 1),
                "e": y[:, None].expand(ROWS, 4),
            }
        case "layers":
            return {"layers": [x, x + 1, x + 2], "y": y}
        case "lists":
            return {"items": [{"a": row} for row in x], "y": y}
    raise AssertionError(kind)


def row_of(held: Any, number: int) -> Any:
    """The same by torch."""
    if isinstance(held, torch.Tensor):
        return held[number].clone() if held.dim() else held
    if isinstance(held, dict):
        return {key: row_of(part, number) for key, part in held.items()}
    if isinstance(held, list) and len(held) == ROWS:
        return held[number]
    if isinstance(held, (list, tuple)):
        return type(held)(row_of(part, number) for part in held)
    return held


KINDS = ["tensor", "dict", "tuple", "nested", "strided", "layers", "lists"]


@pytest.mark.parametrize("aged", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_indexing(tmp_path: Path, kind: str, aged: bool) -> None:
    held = table(kind)
    file = str(tmp_path / "shard.pt")
    torch.save(held, file)
    if aged:  # else its plans are not remembered
        os.utime(file, (0, 0))
    source = RowFiles()
    paths = source.paths(tmp_path)
    assert paths == [f"{file}#{number}" for number in range(ROWS)]
    with GPUFeatureStore("cpu", source=source) as store:
        for _ in range(2):
            for number, feature in enumerate(store.get_batch(paths)):
                assert_same(feature, row_of(held, number))
            store.clear()


@given(data=st.data())
def test_only_the_bytes_of_the_sample_are_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.uint8, torch.bfloat16, torch.bool]))
    order = data.draw(st.permutations(range(len(shape))))
    held = torch.randint(0, 2, shape).to(dtype).permute(order)
    file = tmp_path_factory.mktemp("rows") / "x.pt"
    torch.save(held, file)
    os.utime(file, (0, 0))
    source = RowFiles()
    assert source.count(str(file)) == len(held)
    for number in range(len(held)):
        key = f"{file}#{number}"
        opened = source.open(key, key)
        try:
            buffer = bytearray(max(1, opened.layout.span))
            opened.read_into([memoryview(buffer)])
            if held[number].is_contiguous():
                assert opened.bytes_read == held[number].nbytes
            assert opened.bytes_read <= held.untyped_storage().nbytes()
            read = torch.frombuffer(buffer, dtype=dtype, count=held[number].numel())
            assert torch.equal(read.view(held[number].shape), held[number])
        finally:
            opened.close()


def test_other_formats(tmp_path: Path) -> None:
    x = torch.arange(12.0).view(4, 3)
    np.save(tmp_path / "x.npy", x.numpy())
    save_file({"x": x, "y": torch.arange(4)}, tmp_path / "x.safetensors")
    source = RowFiles()
    with GPUFeatureStore("cpu", source=source) as store:
        rows = store.get_batch(source.paths(tmp_path, pattern="*.npy"))
        assert torch.equal(rows.collate(), x)
        batch = store.get_batch(source.paths(tmp_path, "*.safetensors")).collate()
        assert torch.equal(batch["x"], x) and batch["y"].tolist() == [0, 1, 2, 3]


def test_a_pipeline_with_labels(tmp_path: Path) -> None:
    for shard in range(3):
        x = torch.arange(10.0) + 10 * shard
        torch.save(
            {"x": x[:, None].expand(10, 5).contiguous(), "id": x.long()}, tmp_path / f"{shard}.pt"
        )
    source = RowFiles(keys=["x"], dtype=torch.float64)
    lister = PathLister(source.paths(tmp_path), batch_size=8, shuffle=True, labels=np.arange(30))
    with GPUCachedPathDataLoader(lister, device="cpu", source=source) as loader:
        for _ in range(2):
            seen = []
            for batch, label in loader:
                assert batch.keys() == {"x"} and batch["x"].dtype == torch.float64
                assert batch["x"][:, 0].tolist() == label.tolist()
                seen += label.tolist()
            assert sorted(seen) == list(range(30))
        assert loader.stats().hits >= 30
        loader.store.check()


def test_selections_are_per_sample(tmp_path: Path) -> None:
    file = tmp_path / "list.pt"
    torch.save([{"x": torch.ones(2) * n, "y": n} for n in range(3)], file)
    with GPUFeatureStore("cpu", source=RowFiles(keys=["x"], dtype=torch.float16)) as store:
        [feature] = store.get_batch([f"{file}#2"])
        assert_same(feature, {"x": torch.full((2,), 2.0, dtype=torch.float16)})


def test_a_file_that_changes(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save(torch.zeros(3, 2), file)
    os.utime(file, (0, 0))
    with GPUFeatureStore("cpu", source=RowFiles(), revalidate=True) as store:
        assert store.get(f"{file}#1").tolist() == [0, 0]
        torch.save(torch.ones(5, 2, 2), file)
        os.utime(file, (0, 1))
        assert store.get(f"{file}#1").tolist() == [[1, 1], [1, 1]]
        assert store.get(f"{file}#4").tolist() == [[1, 1], [1, 1]]


def test_what_is_no_sample(tmp_path: Path) -> None:
    source = RowFiles()
    torch.save({"x": torch.zeros(3), "y": torch.zeros(4)}, tmp_path / "differ.pt")
    torch.save({"n": 3}, tmp_path / "none.pt")
    torch.save(torch.zeros(3), tmp_path / "x.pt")
    torch.save(torch.zeros(3), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with GPUFeatureStore("cpu", source=source) as store:
        for name, message in [
            ("differ.pt#0", r"\['x'\] has 3, \['y'\] has 4|\['y'\] has 4, \['x'\] has 3"),
            ("none.pt#0", "no tensor that has rows"),
            ("x.pt#3", "has 3 samples: there is no #3"),
            ("x.pt", r"names no sample: .* as in 'file\.pt#17'"),
            ("x.pt#-1", "names no sample"),
            ("x.pt#" + "9" * 5000, "names no sample|File name too long"),
            ("old.pt#0", "cannot be read by its bytes"),
            ("missing.pt#0", "No such file"),
        ]:
            with pytest.raises(Exception, match=message):
                store.get(tmp_path / name)
        assert store.get(tmp_path / "x.pt#2") == 0
    with pytest.raises(ValueError, match=r"differ\.pt' cannot be read by rows"):
        source.paths(tmp_path / "differ.pt")
    with pytest.raises(FileNotFoundError):
        source.paths(tmp_path / "nowhere")


def test_a_mark_in_an_ordinary_path(tmp_path: Path) -> None:
    """Only this source gives '#' a meaning."""
    file = tmp_path / "take#3"
    torch.save(torch.ones(2), file)
    with GPUFeatureStore("cpu") as store:
        assert store.get(file).tolist() == [1, 1]


def test_a_large_list_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plan is too large to be remembered by the reader of the format."""
    file = str(tmp_path / "list.pt")
    torch.save([{"x": torch.full((2,), float(n)), "n": n} for n in range(400)], file)
    os.utime(file, (0, 0))
    source = RowFiles()
    parsed = []
    plan = PtReader.plan

    def counting(self: PtReader, file: Any) -> Any:
        parsed.append(1)
        return plan(self, file)

    monkeypatch.setattr(PtReader, "plan", counting)
    with GPUFeatureStore("cpu", source=source, asynchronous=False) as store:
        batch = store.get_batch(source.paths(file)).collate()
        assert batch["x"][:, 0].tolist() == batch["n"].tolist() == list(range(400))
    assert len(parsed) == 1
