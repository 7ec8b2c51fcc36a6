"""A LightningDataModule whose batches are served from GPU memory, with one store for all stages.

    python examples/lightning_datamodule.py /path/to/features --synthetic --epochs 3
    python examples/lightning_datamodule.py /path/to/features --epochs 5 --resume runs/last.ckpt

Each file holds {"feature": float32 [feature_dim], "label": int64 scalar}. Needs
Lightning: pip install lightning. On several GPUs (--devices 4) each rank has a store of its own,
and PathLister gives it its part of the files; with --share-caches the stores are one cache.
"""

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from train_with_gpu_cache import CLASSES, write_synthetic

from gpucache_pipes import (
    FeaturePathDataset,
    GPUCachedPathDataLoader,
    GPUFeatureStore,
    PathLister,
)
from gpucache_pipes.adapters.lightning import GPUCacheCallback

Batch = dict[str, torch.Tensor]


class FeatureDataModule(pl.LightningDataModule):
    """The files of a directory: a tenth for validation, a tenth for the test, the rest to train."""

    def __init__(
        self, directory: Path, batch_size: int, max_cache_bytes: str | None, share_caches: bool
    ) -> None:
        super().__init__()
        paths = FeaturePathDataset(directory).paths
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()
        shuffled = [paths[number] for number in order]
        kept = len(paths) // 10
        self.splits = {
            "train": shuffled[2 * kept :],
            "validate": shuffled[:kept],
            "test": shuffled[kept : 2 * kept],
        }
        self.batch_size = batch_size
        self.max_cache_bytes = max_cache_bytes
        self.share_caches = share_caches
        self.store: GPUFeatureStore | None = None

    def setup(self, stage: str) -> None:
        # Not in __init__, where the device of this process is not known yet. And only once, so that
        # test finds the files cached that fit has read.
        if self.store is None:
            group = dist.group.WORLD if self.share_caches and dist.is_initialized() else None
            self.store = GPUFeatureStore(
                self.trainer.strategy.root_device,
                max_cache_bytes=self.max_cache_bytes,
                process_group=group,
            )

    def loader(self, split: str) -> GPUCachedPathDataLoader:
        lister = PathLister(
            self.splits[split], batch_size=self.batch_size, shuffle=split == "train", seed=0
        )
        return GPUCachedPathDataLoader(lister, store=self.store)

    def train_dataloader(self) -> GPUCachedPathDataLoader:
        return self.loader("train")

    def val_dataloader(self) -> GPUCachedPathDataLoader:
        return self.loader("validate")

    def test_dataloader(self) -> GPUCachedPathDataLoader:
        return self.loader("test")


class Classifier(pl.LightningModule):
    """One linear layer; the example is about the data."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = torch.nn.Linear(width, CLASSES)
        self.loss_of = torch.nn.CrossEntropyLoss()

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.loss_of(self.model(batch["feature"]), batch["label"])
        self.log("loss", loss, prog_bar=True)
        return loss

    def accuracy(self, batch: Batch, name: str) -> None:
        right = self.model(batch["feature"]).argmax(dim=1) == batch["label"]
        size = len(batch["label"])
        self.log(name, right.float().mean(), batch_size=size, prog_bar=True, sync_dist=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.accuracy(batch, "validation_accuracy")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.accuracy(batch, "test_accuracy")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where the .pt files are")
    parser.add_argument("--synthetic", action="store_true", help="write sample files first")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-cache-bytes", help='budget, such as "8GiB"; default: no limit')
    parser.add_argument("--share-caches", action="store_true", help="one cache for all ranks")
    parser.add_argument("--devices", default="auto", help="how many, or auto")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="checkpoints and logs")
    parser.add_argument("--resume", type=Path, help="a checkpoint, also one from within an epoch")
    args = parser.parse_args()

    if args.synthetic:
        write_synthetic(args.directory, count=2000, width=256)
    data = FeatureDataModule(
        args.directory, args.batch_size, args.max_cache_bytes, args.share_caches
    )
    width = torch.load(data.splits["train"][0])["feature"].numel()
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        devices=args.devices,
        use_distributed_sampler=False,  # PathLister gives each rank its part
        logger=CSVLogger(args.runs, name="log"),
        log_every_n_steps=10,
        callbacks=[
            GPUCacheCallback(lambda: data.store),
            ModelCheckpoint(args.runs, filename="last", every_n_train_steps=10, save_last=False),
        ],
    )
    trainer.fit(model := Classifier(width), datamodule=data, ckpt_path=args.resume)
    metrics = dict(trainer.callback_metrics)
    [tested] = trainer.test(model, datamodule=data)
    print(f"test accuracy             {tested['test_accuracy']:.3f}")
    if "cache/hit_rate" in metrics:
        print(f"hit rate, last epoch      {metrics['cache/hit_rate']:.1%}")
        print(f"waited, last epoch        {metrics['cache/wait_seconds']:.2f} s")
        print(f"cached                    {metrics['cache/cached_bytes'] / 2**20:.1f} MiB")
    data.store.close()


if __name__ == "__main__":
    main()
