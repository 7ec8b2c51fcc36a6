"""Faces of the nodes for what people already have."""

from gpucache_pipes.adapters.dataloader import GPUCachedPathDataLoader

__all__ = ["GPUCachedPathDataLoader"]
