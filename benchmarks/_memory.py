"""Scenarios of accelerator.py about memory: what the cache takes, and what it leaves the model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from _device import Device, Figures

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister

_ROW = 1 << 20


def peak(device: Device, scale: float) -> Figures:
    """Measure the peak of reserved device memory against the budget, over two epochs.

    There is twice as much data as budget, in features of 1 MiB. "in_flight_bytes" is what the
    batches that are requested and not yet collated take at most: a budget comes without it.
    "staging_bytes" is pinned host memory, where the store says it.
    """
    budget = max(16, int(4096 * scale)) * _ROW
    batch_size, depth = 8, 4
    figures = {}
    for limit in (budget, budget // 4):
        device.empty_cache()
        device.forget_peak()
        before = device.reserved_bytes()
        # One tensor on the host is enough: the store reads it under many names.
        row = torch.zeros(_ROW, dtype=torch.uint8)
        names = [f"/{n}" for n in range(2 * limit // _ROW)]
        with GPUFeatureStore(
            device.device, load_fn=lambda path, row=row: row, max_cache_bytes=limit
        ) as store:
            lister = PathLister(names, batch_size=batch_size, shuffle=True)
            node = GPUCollator(GPUPrefetcher(lister, store, depth=depth))
            for _ in range(2):
                node.reset()
                for batch in node:
                    del batch
            device.wait()
            stats = store.stats()
            reserved = device.peak_reserved_bytes() - before
            figures[f"budget {limit >> 20} MiB"] = {
                "budget_bytes": limit,
                "in_flight_bytes": (depth + 2) * batch_size * _ROW,
                "peak_reserved_bytes": reserved,
                "ratio_to_budget": reserved / limit,
                "reserved_at_end_bytes": device.reserved_bytes() - before,
                "arena_bytes": stats.reserved_bytes,
                "cached_bytes": stats.cached_bytes,
                "staging_bytes": getattr(stats, "staging_bytes", None),
            }
    return figures


def largest_batch(device: Device, scale: float) -> Figures:
    """Find the largest batch with which a small model trains, with and without a cache.

    Each search runs in a process of its own: see _largest_batch.py.
    """
    figures: Figures = {}
    script = str(Path(__file__).with_name("_largest_batch.py"))
    for cache in ("off", "on", "yielding"):
        command = [sys.executable, script, cache, "--scale", str(scale)]
        done = subprocess.run(
            [*command, "--device", str(device.device)], stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise RuntimeError(f"the search with the cache {cache} ended with {done.returncode}")
        figures[cache] = json.loads(done.stdout.splitlines()[-1])
    sizes: dict[str, Any] = {name: entry.get("largest_batch") for name, entry in figures.items()}
    for name in ("on", "yielding"):
        if sizes[name] and sizes["off"]:
            figures[name]["ratio_to_off"] = sizes[name] / sizes["off"]
    return figures
