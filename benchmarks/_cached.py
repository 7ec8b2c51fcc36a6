"""Scenarios of accelerator.py in which everything is cached: what a gather and a step cost."""

import contextlib
import cProfile
import itertools
import pstats
import statistics
from collections.abc import Callable
from typing import Any

import torch
from _device import Device, Figures, spread_us

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister
from gpucache_pipes.device import InOrderRuntime, TorchRuntime
from gpucache_pipes.device.arena import Arena


def warm(device: Device, scale: float) -> Figures:
    """Measure a batch of small rows, all cached."""
    files = max(600, int(20_000 * scale))
    data = torch.randn(files, 1024)
    features = {f"/{n}": row for n, row in enumerate(data)}
    resident = data.to(device.device)
    with GPUFeatureStore(device.device, load_fn=features.__getitem__) as store:
        store.warm(list(features), progress=False)
        choices = [torch.randperm(files)[:256] for _ in range(64)]
        on_device = [choice.to(device.device) for choice in choices]
        paths = [[f"/{int(n)}" for n in choice] for choice in choices]
        turn = itertools.count()

        def ours() -> torch.Tensor:
            batch: torch.Tensor = store.get_batch(paths[next(turn) % 64]).collate()
            return batch

        assert torch.equal(store.get_batch(paths[0]).collate(), resident[on_device[0]])
        host = statistics.median(device.times(ours, 200, host=True))
        whole = device.seconds(ours, 200)
        limit = device.seconds(
            lambda: torch.index_select(resident, 0, on_device[next(turn) % 64]), 200
        )
    return {
        "host_us": host * 1e6,
        "whole_us": whole * 1e6,
        "index_select_us": limit * 1e6,
        "ratio_to_index_select": whole / limit,
    }


def rows(device: Device, scale: float) -> Figures:
    """Measure the bandwidth of gathers of long rows, as a fraction of that of a device copy."""
    figures = {}
    for nbytes in (256 << 10, 4 << 20):
        count = max(16, int((4 << 30) * scale) // nbytes)
        batch = min(256, count // 2)
        features = {f"/{n}": torch.full((nbytes,), n % 251, dtype=torch.uint8)
                    for n in range(count)}  # fmt: skip
        with GPUFeatureStore(device.device, load_fn=features.__getitem__) as store:
            store.warm(list(features), progress=False)
            chosen = [f"/{int(n)}" for n in torch.randperm(count)[:batch]]
            ours = device.seconds(lambda: store.get_batch(chosen).collate())  # noqa: B023
            source = torch.empty(batch * nbytes, dtype=torch.uint8, device=device.device)
            target = torch.empty_like(source)
            copy = device.seconds(lambda: target.copy_(source))  # noqa: B023
        figures[f"{nbytes >> 10} KiB"] = {
            "gather_GBps": batch * nbytes / ours / 1e9,
            "copy_GBps": batch * nbytes / copy / 1e9,
            "part_of_copy": copy / ours,
        }
    return figures


def segments(device: Device, scale: float) -> Figures:
    """Measure a gather of 256 rows of 4 KiB from an arena of 1, 2 and 8 segments."""
    pages = max(1024, int(65_536 * scale)) // 8 * 8
    page_bytes = 4096
    content = torch.randint(0, 256, (pages, page_bytes), dtype=torch.uint8)
    runtime = InOrderRuntime(device.device) if device.is_cpu else TorchRuntime(device.device)
    choices = [torch.randperm(pages)[:256].numpy() for _ in range(64)]
    figures: Figures = {}
    for count in (1, 2, 8):
        arena = Arena(page_bytes, device.device)
        for part in content.chunk(count):
            arena.add_segment(part.reshape(-1).to(device.device))
        turn = itertools.count()

        def gather(arena: Arena = arena, turn: Any = turn) -> torch.Tensor:
            columns = [(0, page_bytes)]
            return arena.gather(choices[next(turn) % 64], columns, runtime.index)[0]

        found = gather().view(torch.uint8).view(256, page_bytes).cpu()
        assert torch.equal(found, content[choices[0]])
        figures[f"{count} segments"] = {
            "host_us": statistics.median(device.times(gather, 200, host=True)) * 1e6,
            "whole_us": device.seconds(gather, 200) * 1e6,
        }
    one = figures["1 segments"]["whole_us"]
    for entry in figures.values():
        entry["ratio_to_one"] = entry["whole_us"] / one
    return figures


def step(device: Device, scale: float) -> Figures:
    """Measure the host's time for a step of the whole pipeline, and for each part of it.

    The parts are measured one by one, on the same batches. "rest" is what a step takes beyond
    them: mostly the prefetcher's bookkeeping. "functions" are those of one profile, in which
    everything takes longer, by the time spent in themselves.
    """
    files = max(512, int(8192 * scale))
    features = {
        f"/{n}": {"feature": torch.full((1024,), float(n)), "label": torch.tensor([n])}
        for n in range(files)
    }
    figures = {}
    with GPUFeatureStore(device.device, load_fn=features.__getitem__) as store:
        store.warm(list(features), progress=False)
        for batch_size in (16, 256):
            lister = PathLister(list(features), batch_size=batch_size, shuffle=True)
            node = GPUCollator(GPUPrefetcher(lister, store, depth=4))
            steps = min(200, files // batch_size)

            def take(count: int, node: Any = node) -> None:
                done = 0
                while done < count:
                    node.reset()
                    for batch in itertools.islice(node, count - done):
                        done += 1
                        del batch

            take(2 * steps)
            whole = per_step(device, node, steps)
            parts = parts_of(device, store, lister, steps)
            profile = cProfile.Profile()
            profile.runcall(take, steps)
            device.wait()
            figures[f"batch {batch_size}"] = {
                "step": spread_us(whole),
                **{f"{name}_us": seconds * 1e6 for name, seconds in parts.items()},
                "rest_us": (statistics.median(whole) - sum(parts.values())) * 1e6,
                "functions": longest_functions(profile, steps),
            }
    return figures


def per_step(device: Device, node: Any, steps: int) -> list[float]:
    """Host seconds of each `next()` of a pipeline, the first of an epoch left out."""
    times: list[float] = []
    while len(times) < steps:
        node.reset()
        next(node)
        with contextlib.suppress(StopIteration):
            while True:
                times.append(device.once(lambda: next(node), host=True))
    return times


def parts_of(
    device: Device, store: GPUFeatureStore, lister: PathLister, steps: int
) -> dict[str, float]:
    """Median host seconds of the lister, the request, the gather and the collation of a batch."""

    def endless() -> Any:
        while True:
            lister.reset()
            yield from lister

    elements = endless()
    listing = device.times(lambda: next(elements), steps, host=True)
    batches = itertools.cycle([next(elements) for _ in range(16)])
    pending: list[Any] = []
    gathered: list[Any] = []

    def gather() -> None:
        gathered[:] = [store.collect([pending.pop()])]

    calls: dict[str, Callable[[], Any]] = {
        "request": lambda: pending.append(store.request(next(batches))),
        "gather": gather,
        "collate": lambda: gathered[0].collate(),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(steps + 3):
        for name, call in calls.items():
            seconds = device.once(call, host=True)
            if number >= 3:
                times[name].append(seconds)
    return {
        "lister": statistics.median(listing),
        **{name: statistics.median(series) for name, series in times.items()},
    }


def longest_functions(profile: cProfile.Profile, steps: int) -> dict[str, float]:
    """Microseconds a step that the ten longest functions take themselves."""
    table: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    found = sorted(((entry[2], key) for key, entry in table.items()), reverse=True)[:10]
    return {
        f"{'/'.join(file.split('/')[-2:])}:{name}": round(own / steps * 1e6, 2)
        for own, (file, _, name) in found
    }
