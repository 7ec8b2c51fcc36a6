"""The types of the options of a store, for functions that pass them on."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict

import torch

from gpucache_pipes.cache import Policy
from gpucache_pipes.files import Key, PathLike, Source


class StoreOptions(TypedDict, total=False):
    """Arguments of GPUFeatureStore, but for the device and the budgets."""

    policy: str | Policy
    load_fn: Callable[[str], Any] | None
    weights_only: bool
    keys: Key | Iterable[Key] | None
    dtype: torch.dtype | Mapping[Key, torch.dtype] | None
    source: Source | None
    storage_options: Mapping[str, Any] | None
    asynchronous: bool
    reader_threads: int | None
    page_bytes: int | None
    staging_bytes: int | str | None
    revalidate: bool
    read_timeout: float | None
    host_cache_bytes: int | str | None
    disk_cache: PathLike | None
    disk_cache_bytes: int | str | None
    disk_cache_check: str
    disk_cache_key: str | None
    process_group: Any
    exchange_timeout: float
