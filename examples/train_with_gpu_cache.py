"""Train on a directory of feature files, with an ordinary DataLoader of paths.

    python examples/train_with_gpu_cache.py /path/to/features --synthetic --device cuda --epochs 3

Each file holds {"feature": float32 [feature_dim], "label": int64 scalar}, as --synthetic writes
them. The model learns to tell the labels from the features.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from gpucache_pipes import FeaturePathDataset, GPUCachedPathDataLoader

CLASSES = 10
MARK = "synthetic-"


def write_synthetic(directory: Path, count: int, width: int) -> None:
    """Write `count` files of random features around one centre for each label.

    Overwrites nothing: exits if the directory has other .pt files.
    """
    if directory.exists() and not directory.is_dir():
        sys.exit(f"{directory} is not a directory")
    directory.mkdir(parents=True, exist_ok=True)
    foreign = [path.name for path in directory.glob("*.pt") if not path.name.startswith(MARK)]
    if foreign:
        sys.exit(
            f"{directory} holds files that --synthetic did not make ({foreign[0]}, ...); "
            "give an empty directory, or omit --synthetic to train on these files"
        )
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, width, generator=random)
    for number in tqdm(range(count), desc="writing", unit="file"):
        label = number % CLASSES
        feature = centres[label] + torch.randn(width, generator=random)
        path = directory / f"{MARK}{width}-{number:07d}.pt"
        if not path.exists():
            torch.save({"feature": feature, "label": torch.tensor(label)}, path)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where the .pt files are")
    parser.add_argument("--synthetic", action="store_true", help="write sample files first")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--epochs", type=positive, default=3)
    parser.add_argument("--batch-size", type=positive, default=256)
    parser.add_argument("--max-cache-bytes", help='budget, such as "8GiB"; default: no limit')
    parser.add_argument("--max-cache-items", type=positive)
    parser.add_argument("--feature-dim", type=positive, default=1024)
    parser.add_argument("--num-workers", type=int, default=0, help="of the DataLoader of paths")
    parser.add_argument("--prefetch-batches", type=positive, default=4)
    parser.add_argument("--num-samples", type=positive, default=4096, help="with --synthetic")
    args = parser.parse_args()

    pattern = "*.pt"
    if args.synthetic:
        write_synthetic(args.directory, args.num_samples, args.feature_dim)
        pattern = f"{MARK}{args.feature_dim}-*.pt"
    try:
        dataset = FeaturePathDataset(args.directory, pattern=pattern)
    except FileNotFoundError as error:
        sys.exit(f"{error}; --synthetic writes sample files")

    if args.synthetic:
        dataset.paths = dataset.paths[: args.num_samples]
    loader = DataLoader(
        dataset,
        batch_size=args.batch_size,
        shuffle=True,
        num_workers=args.num_workers,
    )
    try:
        batches = GPUCachedPathDataLoader(
            loader,
            device=None if args.device == "auto" else args.device,
            max_cache_bytes=args.max_cache_bytes,
            max_cache_items=args.max_cache_items,
            prefetch_batches=args.prefetch_batches,
        )
    except ValueError as error:
        sys.exit(f"{error}")
    with batches:
        device = batches.store.device
        width = batches.store.get(dataset[0])["feature"].numel()
        model = torch.nn.Linear(width, CLASSES, device=device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        loss_of = torch.nn.CrossEntropyLoss()
        for epoch in range(args.epochs):
            before, start = batches.store.stats(), time.perf_counter()
            for batch in tqdm(batches, desc=f"epoch {epoch}", unit="batch"):
                loss = loss_of(model(batch["feature"]), batch["label"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            seconds, done = time.perf_counter() - start, batches.store.stats().since(before)
            print(
                f"epoch {epoch}: loss {float(loss.detach()):.4f}, {seconds:.2f} s, "
                f"hit rate {done.hit_rate:.1%}, {done.items} features and "
                f"{done.cached_bytes / 2**20:.1f} MiB on {device}, "
                f"waited {done.wait_seconds:.2f} s"
            )


if __name__ == "__main__":
    main()
