"""Adapters: the nodes behind the interfaces of DataLoader, IterDataPipe, Dataset and Lightning."""

from gpucache_pipes.adapters.dataloader import GPUCachedPathDataLoader
from gpucache_pipes.adapters.datasets import FeatureFileDataset, FeaturePathDataset
from gpucache_pipes.adapters.node_loader import NodeLoader

__all__ = ["FeatureFileDataset", "FeaturePathDataset", "GPUCachedPathDataLoader", "NodeLoader"]
