"""Faces of the nodes for what people already have."""

from gpucache_pipes.adapters.dataloader import GPUCachedPathDataLoader
from gpucache_pipes.adapters.datasets import FeatureFileDataset, FeaturePathDataset

__all__ = ["FeatureFileDataset", "FeaturePathDataset", "GPUCachedPathDataLoader"]
