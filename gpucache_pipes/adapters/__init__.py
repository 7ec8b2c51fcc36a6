"""Adapters: the nodes behind the interfaces of DataLoader, IterDataPipe, Dataset and Lightning."""

from gpucache_pipes.adapters.dataloader import GPUCachedPathDataLoader
from gpucache_pipes.adapters.datasets import FeatureFileDataset, FeaturePathDataset

__all__ = ["FeatureFileDataset", "FeaturePathDataset", "GPUCachedPathDataLoader"]
