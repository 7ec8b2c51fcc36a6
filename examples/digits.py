"""Train a small classifier on real feature files, from the cache and by torch.load.

The data is scikit-learn's set of 1,797 handwritten digits. The program writes one `.pt` file for
each sample, like a feature extractor. It then trains a classifier on these files for some epochs,
with a training and a validation pipeline that share one store, and once more with a DataLoader
that reads every file by torch.load. With --directory and --disk-cache the files stay, and later
runs read them packed. (Files that are two seconds old or younger are not packed, since they may
still change.)

    python examples/digits.py [--epochs 20] [--device auto] [--directory DIR] [--disk-cache DIR]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset
from torchdata.nodes import Loader
from tqdm.auto import tqdm

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister

Batch = dict[str, torch.Tensor]
BATCH_SIZE = 64


def write_features(directory: Path) -> tuple[list[str], list[str], list[str]]:
    """Write one file for each digit; return the paths for training, validation and test."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    paths = []
    for number, (image, label) in enumerate(zip(images, digits.target, strict=True)):
        path = directory / f"digit-{number:04d}.pt"
        if not path.exists():
            torch.save({"image": image.clone(), "label": torch.tensor(int(label))}, path)
        paths.append(str(path))
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [paths[n] for n in order]
    return shuffled[:1300], shuffled[1300:1500], shuffled[1500:]


class TorchLoadDataset(Dataset[Batch]):
    """The usual data set of feature files: each access reads a file."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Batch:
        return torch.load(self.paths[index])


def accuracy(model: torch.nn.Module, batches: Iterable[Batch], device: torch.device) -> float:
    right = count = 0
    with torch.no_grad():
        for batch in batches:
            labels = batch["label"].to(device)
            right += int((model(batch["image"].to(device)).argmax(dim=1) == labels).sum())
            count += len(labels)
    return right / count


def train(
    name: str,
    batches: Iterable[Batch],
    validation: Iterable[Batch],
    device: torch.device,
    epochs: int,
) -> tuple[torch.nn.Module, list[float]]:
    """Train on either source of batches; return the model and the seconds of each epoch."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 8, 8)),
        torch.nn.Conv2d(1, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(32, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Dropout(0.3),
        torch.nn.Linear(512, 10),
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss_of = torch.nn.CrossEntropyLoss()
    seconds = []
    with tqdm(range(epochs), desc=f"{name:12}", unit="epoch") as bar:
        for _ in bar:
            start = time.perf_counter()
            model.train()
            for batch in batches:
                loss = loss_of(model(batch["image"].to(device)), batch["label"].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            model.eval()
            validated = accuracy(model, validation, device)
            seconds.append(time.perf_counter() - start)
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}", validation=f"{validated:.3f}")
    return model, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--directory", type=Path, help="keep the feature files here")
    parser.add_argument("--disk-cache", help="pack the features here, for later runs")
    args = parser.parse_args()
    if args.disk_cache is not None and args.directory is None:
        parser.error("--disk-cache is of use for files that stay: give --directory, too")

    with tempfile.TemporaryDirectory() as temporary:
        directory = args.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        training, validation, test = write_features(directory)
        print(f"wrote {len(training) + len(validation) + len(test)} feature files")

        # The pipelines: two listers, one store, one line each for prefetching and collating.
        store = GPUFeatureStore(
            None if args.device == "auto" else args.device,
            host_cache_bytes="50%",  # what does not fit on the GPU
            disk_cache=args.disk_cache,  # a second run reads no file
        )

        def pipeline(paths: list[str], shuffle: bool = False) -> Loader[Batch]:
            lister = PathLister(paths, batch_size=BATCH_SIZE, shuffle=shuffle, seed=0)
            return Loader(GPUCollator(GPUPrefetcher(lister, store)))

        with store:
            model, cached = train(
                "from cache",
                pipeline(training, shuffle=True),
                pipeline(validation),
                store.device,
                args.epochs,
            )
            result = accuracy(model, pipeline(test), store.device)
            stats = store.stats()
        _, loaded = train(
            "torch.load",
            DataLoader(TorchLoadDataset(training), batch_size=BATCH_SIZE, shuffle=True),
            DataLoader(TorchLoadDataset(validation), batch_size=BATCH_SIZE),
            store.device,
            args.epochs,
        )

    # The first epoch reads every file; the later ones read none.
    seconds = statistics.median(cached[1:] or cached)
    seconds_loaded = statistics.median(loaded[1:] or loaded)
    print(f"test accuracy      {result:.3f}")
    print(f"device             {store.device}, {stats.cached_bytes / 1e6:.2f} MB cached")
    print(f"hit rate           {stats.hit_rate:.1%} of {stats.hits + stats.misses} requests")
    files_read = stats.files_read - stats.disk_hits
    print(f"files read         {files_read} in {args.epochs} epochs")
    if args.disk_cache is not None:
        print(f"from the disk      {stats.disk_hits}, which an earlier run has packed")
    print(f"seconds per epoch  {seconds:.3f} from the cache, {cached[0]:.3f} for the first epoch")
    print(f"                   {seconds_loaded:.3f} by torch.load in a DataLoader")
    print(f"                   {seconds_loaded / seconds:.1f} times as long, training included")


if __name__ == "__main__":
    main()
