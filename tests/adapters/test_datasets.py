"""FeatureFileDataset and FeaturePathDataset: plain torch."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from torch.utils.data import DataLoader

from gpucache_pipes import FeatureFileDataset, FeatureLoadError, FeaturePathDataset
from gpucache_pipes.testing import assert_same, features

Files = Callable[..., list[str]]


def test_paths(make_files: Files, tmp_path: Path) -> None:
    paths = make_files(3)
    root = Path(paths[0]).parent
    for files in (root, str(root), str(root / "*.pt"), paths, [Path(p) for p in paths]):
        dataset = FeaturePathDataset(files)
        assert dataset.paths == paths and len(dataset) == 3
        assert dataset[1] == paths[1] and dataset.__getitems__([2, 0]) == [paths[2], paths[0]]
    batches: Any = DataLoader(FeaturePathDataset(root), batch_size=2)
    assert list(batches) == [paths[:2], paths[2:]]
    assert len(FeaturePathDataset(tmp_path, recursive=True)) == 3
    for dataset_type in (FeaturePathDataset, FeatureFileDataset):
        with pytest.raises(FileNotFoundError, match=r"no files in directory .* pattern '\*.npy'"):
            dataset_type(root, pattern="*.npy")


@given(feature=features())
def test_features_are_what_torch_load_gives(tmp_path: Path, feature: Any) -> None:
    path = str(tmp_path / "feature.pt")
    torch.save(feature, path)
    assert_same(FeatureFileDataset([path])[0], torch.load(path, weights_only=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_a_dataloader(make_files: Files, workers: int) -> None:
    paths = make_files(10)
    context = "spawn" if workers else None
    loader = DataLoader(
        FeatureFileDataset(paths),
        batch_size=4,
        num_workers=workers,
        multiprocessing_context=context,
    )
    got = [batch["label"].flatten().tolist() for batch in loader]
    assert got == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_each_tensor_has_memory_of_its_own(make_files: Files) -> None:
    [path] = make_files(1, lambda _: {"frames": torch.zeros(1000), "label": torch.tensor(1)})
    label = FeatureFileDataset([path])[0]["label"]
    assert label.untyped_storage().nbytes() == 8


def test_a_loader_of_ones_own_and_errors(make_files: Files) -> None:
    paths = make_files(2)
    assert FeatureFileDataset(paths, loader=len)[0] == len(paths[0])
    Path(paths[1]).write_bytes(b"no feature")
    dataset = pickle.loads(pickle.dumps(FeatureFileDataset([*paths, "missing.pt"])))
    assert int(dataset[0]["label"]) == 0
    with pytest.raises(FeatureLoadError, match=r"not a torch\.save file") as caught:
        dataset[1]
    assert caught.value.path == paths[1]
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        dataset[2]
