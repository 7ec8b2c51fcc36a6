"""Train on feature files at the speed of device memory: give file paths, get GPU tensors.

store = GPUFeatureStore("cuda", max_cache_bytes="8GiB")
paths = PathLister("features/", batch_size=256, shuffle=True, seed=0)
for batch in NodeLoader(GPUCollator(GPUPrefetcher(paths, store))):
    ...
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gpucache_pipes import former_names

if TYPE_CHECKING:
    from gpucache_pipes.adapters import (
        FeatureFileDataset,
        FeaturePathDataset,
        GPUCachedPathDataLoader,
        NodeLoader,
    )
    from gpucache_pipes.batches import FeatureBatch, Padded
    from gpucache_pipes.cache import Trace, simulate
    from gpucache_pipes.errors import FeatureLoadError, PolicyError, RankError
    from gpucache_pipes.files.packed.packing import pack
    from gpucache_pipes.nodes import GPUCollator, GPUPrefetcher, Lockstep, PathLister
    from gpucache_pipes.store import GPUFeatureStore, PendingBatch, StoreStats, Ticket

__version__ = "0.1.0"

__all__ = [
    "FeatureBatch",
    "FeatureFileDataset",
    "FeatureLoadError",
    "FeaturePathDataset",
    "GPUCachedPathDataLoader",
    "GPUCollator",
    "GPUFeatureStore",
    "GPUPrefetcher",
    "Lockstep",
    "NodeLoader",
    "Padded",
    "PathLister",
    "PendingBatch",
    "PolicyError",
    "RankError",
    "StoreStats",
    "Ticket",
    "Trace",
    "pack",
    "simulate",
]

_MODULES = {
    "FeatureBatch": "batches",
    "FeatureFileDataset": "adapters",
    "FeatureLoadError": "errors",
    "FeaturePathDataset": "adapters",
    "GPUCachedPathDataLoader": "adapters",
    "GPUCollator": "nodes",
    "GPUFeatureStore": "store",
    "GPUPrefetcher": "nodes",
    "Lockstep": "nodes",
    "NodeLoader": "adapters",
    "Padded": "batches",
    "PathLister": "nodes",
    "PolicyError": "errors",
    "RankError": "errors",
    "StoreStats": "store",
    "Ticket": "store",
    "PendingBatch": "store",
    "Trace": "cache",
    "pack": "files.packed.packing",
    "simulate": "cache",
}


former_names.install()


def __getattr__(name: str) -> Any:
    # On first use: `gpucache_pipes.cache` is for programs without torch, too.
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
