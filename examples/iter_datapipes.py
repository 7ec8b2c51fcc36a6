"""Chain IterDataPipes: files are listed, shuffled and batched by torch, and read by the store.

    python examples/iter_datapipes.py                        # makes 1,000 files to begin with
    python examples/iter_datapipes.py /path/to/features --epochs 3

Each file holds {"feature": float32 [width], "label": int64 scalar}.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data.datapipes.iter import FileLister

import gpucache_pipes.adapters.datapipes  # noqa: F401  (adds gpu_prefetch and gpu_collate to all datapipes)
from gpucache_pipes import GPUFeatureStore


def write_features(directory: str, count: int = 1000, width: int = 256) -> None:
    for number in range(count):
        sample = {"feature": torch.randn(width), "label": torch.tensor(number % 10)}
        torch.save(sample, Path(directory) / f"{number:04d}.pt")


def normalized(batch: dict[str, Any]) -> dict[str, Any]:
    """A step of your own, on the device."""
    feature = batch["feature"]
    return {**batch, "feature": torch.nn.functional.normalize(feature, dim=1)}


def run(directory: str, epochs: int, batch_size: int, store: GPUFeatureStore) -> None:
    pipe = (
        FileLister(directory, "*.pt")
        .shuffle(buffer_size=1_000_000)
        .batch(batch_size)
        .gpu_prefetch(store, depth=2)  # lists of paths become lists of features on the device
        .gpu_collate()  # and these batches
        .map(normalized)
    )
    for epoch in range(epochs):
        before, count = store.stats(), 0
        for batch in pipe:
            count += len(batch["label"])
        hits = store.stats().since(before).hit_rate
        print(f"epoch {epoch}: {count} samples on {store.device}, {hits:.0%} from memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", help="of .pt files")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--max-cache-bytes", default="1GiB")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as made,
        GPUFeatureStore(max_cache_bytes=args.max_cache_bytes) as store,
    ):
        if args.directory is None:
            write_features(made)
        run(args.directory or made, args.epochs, args.batch_size, store)


if __name__ == "__main__":
    main()
