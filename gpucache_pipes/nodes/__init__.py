"""Nodes of a torchdata pipeline: PathLister -> GPUPrefetcher -> GPUCollator (-> Lockstep)."""

from gpucache_pipes.nodes.collator import GPUCollator
from gpucache_pipes.nodes.lockstep import Lockstep
from gpucache_pipes.nodes.path_lister import PathLister
from gpucache_pipes.nodes.prefetcher import GPUPrefetcher

__all__ = ["GPUCollator", "GPUPrefetcher", "Lockstep", "PathLister"]
