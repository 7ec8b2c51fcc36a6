"""Scenario of accelerator.py: batches that come from host memory below the device."""

from typing import Any

import torch
from _device import Device, Figures

from gpucache_pipes import GPUFeatureStore
from gpucache_pipes.device import AcceleratorBackend, InOrderRuntime


def host_tier(device: Device, scale: float) -> Figures:
    """Measure the bandwidth of batches from host memory, as a part of that of a pinned copy.

    One feature is kept on the device, so all others of a batch come from the host, in any order.
    """
    figures: Figures = {}
    # The CPU, which ignores such a tier, is taken for a device without streams.
    on: Any = AcceleratorBackend(InOrderRuntime(device.device)) if device.is_cpu else device.device
    for nbytes in (4 << 10, 64 << 10, 1 << 20):
        count = max(64, int((2 << 30) * scale) // nbytes)
        batch = max(16, min(count // 4, (64 << 20) // nbytes))
        features = {
            f"/{n}": torch.full((nbytes,), n % 251, dtype=torch.uint8) for n in range(count)
        }
        with GPUFeatureStore(
            on,
            max_cache_items=1,
            host_cache_bytes=2 * count * nbytes,
            load_fn=features.__getitem__,
            page_bytes=nbytes,
            policy="keep",
        ) as store:
            store.warm(list(features), progress=False)
            before = store.stats()
            turns = [[f"/{int(n)}" for n in torch.randperm(count)[:batch]] for _ in range(8)]
            number = 0

            def ours() -> torch.Tensor:
                nonlocal number
                number += 1
                gathered: torch.Tensor = store.get_batch(turns[number % 8]).collate()  # noqa: B023
                return gathered

            seconds = device.seconds(ours)
            since = store.stats().since(before)
            assert since.files_read == 0 and since.host_hits > 0
        source = device.pinned(batch * nbytes)
        target = torch.empty(batch * nbytes, dtype=torch.uint8, device=device.device)
        copy = device.seconds(lambda: target.copy_(source, non_blocking=True))  # noqa: B023
        figures[f"{nbytes >> 10} KiB"] = {
            "batch": batch,
            "tier_GBps": batch * nbytes / seconds / 1e9,
            "pinned_copy_GBps": batch * nbytes / copy / 1e9,
            "part_of_copy": copy / seconds,
        }
    return figures
