"""GPUFeatureStore: the bounded, shared cache, its reader threads and the one lock."""

from gpucache_pipes.store.pending_batch import PendingBatch
from gpucache_pipes.store.stats import StoreStats
from gpucache_pipes.store.store import GPUFeatureStore
from gpucache_pipes.store.store_options import StoreOptions
from gpucache_pipes.store.upcoming import Upcoming

Ticket = PendingBatch
"""The former name."""

__all__ = ["GPUFeatureStore", "PendingBatch", "StoreOptions", "StoreStats", "Ticket", "Upcoming"]
