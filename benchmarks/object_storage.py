"""First epochs over object storage: a server of objects on this machine, and what it costs.

SeaweedFS serves the objects from another process on the same cores, so rates are those of both.
All contenders take turns. `obstore alone` gets the same objects in threads, as many as requests
that the pipeline may have in flight, and makes no batches. DataLoaders have workers that were
started, and have read a batch, before the clock runs. Of all batches the sums of every 64th number
are compared.

The cache has room for 1 GiB: all of the small objects, a quarter of the large ones. With more, this
measures how fast a virtual machine gets memory from its host.

With --latency a relay before the server holds each request for that time.

    python benchmarks/object_storage.py [--only small|large] [--objects N] [--rounds 3]
        [--latency 50] [--readers N] [--json FILE]
"""

import argparse
import asyncio
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from remote.servers import KEY, SECRET, SeaweedFS, free_port, options

from gpucache_pipes import GPUCachedPathDataLoader, GPUFeatureStore, PathLister

SIZES = {"small": (10_000, 1500, 256), "large": (64, 16 << 20, 2)}
"""Objects, floats of each, and batch size."""


def relay(port: int, upstream: int, seconds: float) -> None:
    """Pass requests on after a while, and answers at once. Runs in a process of its own."""

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", upstream)
        loop = asyncio.get_running_loop()

        async def answers() -> None:
            while data := await up_reader.read(1 << 18):
                writer.write(data)
                await writer.drain()
            writer.close()

        task = asyncio.ensure_future(answers())
        while data := await reader.read(1 << 16):
            loop.call_later(seconds, up_writer.write, data)
        up_writer.close()
        await task

    async def serve() -> None:
        server = await asyncio.start_server(connect, "127.0.0.1", port)
        await server.serve_forever()

    asyncio.run(serve())


class Objects(Dataset[Any]):
    """The data set that people write: get an object, and torch.load it."""

    def __init__(self, given: dict[str, Any], library: str) -> None:
        self.given, self.library = given, library
        self._get: Callable[[str], Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_get": None}

    def __getitem__(self, url: str) -> Any:
        if self._get is None:
            self._get = self._open()
        return torch.load(io.BytesIO(self._get(url)), weights_only=True)["feature"]

    def _open(self) -> Callable[[str], Any]:
        if self.library == "obstore":
            import obstore
            from obstore.store import S3Store

            store = S3Store("tests", **self.given)
            return lambda url: bytes(obstore.get(store, url.removeprefix("s3://tests/")).bytes())
        import s3fs

        files = s3fs.S3FileSystem(
            key=KEY, secret=SECRET, client_kwargs={"endpoint_url": self.given["endpoint"]}
        )
        return lambda url: files.cat_file(url)


class Sampler:
    """A batch sampler whose batches can be replaced."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Peer:
    """A DataLoader with workers that are running."""

    def __init__(self, given: dict[str, Any], library: str, workers: int, first: list[str]) -> None:
        self.name = f"DataLoader, {workers} workers, {library}"
        self._sampler = Sampler()
        self._loader = DataLoader(
            Objects(given, library), batch_sampler=self._sampler, num_workers=workers,
            persistent_workers=True, multiprocessing_context="forkserver",
        )  # fmt: skip
        self._sampler.batches = [first[:4] for _ in range(workers)]
        list(self._loader)

    def epoch(self, batches: list[list[str]]) -> Iterable[torch.Tensor]:
        """The tensors of these batches."""
        self._sampler.batches = batches
        return self._loader


def alone(given: dict[str, Any], urls: list[str], threads: int) -> None:
    """Get all objects, and do nothing with them."""
    import obstore
    from obstore.store import S3Store

    store = S3Store("tests", **given)
    names = iter([url.removeprefix("s3://tests/") for url in urls])
    lock = threading.Lock()

    def run() -> None:
        while True:
            with lock:
                some = list(itertools.islice(names, 16 if len(urls) > 1000 else 1))
            if not some:
                return
            for name in some:
                obstore.get(store, name).bytes()

    crew = [threading.Thread(target=run) for _ in range(threads)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()


def fill(weed: SeaweedFS, kind: str, count: int) -> str:
    """Put the objects; returns their prefix."""
    import obstore
    from obstore.store import S3Store

    store = S3Store("tests", **options(weed.port))
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        buffer = io.BytesIO()
        torch.save({"feature": torch.randn(SIZES[kind][1], generator=generator)}, buffer)
        obstore.put(store, f"{kind}/{number:06}.pt", buffer.getvalue())
    return f"s3://tests/{kind}/"


def timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    cpu, wall = time.process_time(), time.perf_counter()
    result = run()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SIZES, action="append")
    parser.add_argument("--objects", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.0, help="milliseconds")
    parser.add_argument("--readers", type=int)
    parser.add_argument("--peers", default="8:s3fs,8:obstore", help="workers:library,...")
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    reports = {}
    with tempfile.TemporaryDirectory() as directory:
        weed = SeaweedFS(Path(directory))
        try:
            for kind in args.only or SIZES:
                reports[kind] = measure(weed, kind, args)
        finally:
            weed.kill()
    if args.json:
        report = {"arguments": vars(args), "cores": os.cpu_count(), "cases": reports}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


def measure(weed: SeaweedFS, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    count = args.objects or SIZES[kind][0]
    prefix = fill(weed, kind, count)
    given = options(weed.port)
    if args.latency:
        port = free_port()
        process = get_context("spawn").Process(
            target=relay, args=(port, weed.port, args.latency / 1000), daemon=True
        )
        process.start()
        time.sleep(2)
        given = options(port)
    urls = list(PathLister(prefix, storage_options=given).paths)
    batch = SIZES[kind][2]
    rows: dict[str, list[tuple[float, float]]] = {}
    sums: dict[int, float] = {}

    def note(name: str, seconds: float, cpu: float) -> None:
        rows.setdefault(name, []).append((seconds, cpu))
        each = f"{1e6 * seconds / count:9.0f} us, {1e6 * cpu / count:6.0f} us of CPU an object"
        print(f"{kind} {name:40} {seconds:7.2f} s {each}", flush=True)

    def total(number: int, batches: Iterable[Any]) -> None:
        # Of every 64th number: more would take longer than getting the large ones.
        found = sum(float(b.flatten(1)[:, ::64].double().sum()) for b in batches)
        assert abs(found - sums.setdefault(number, found)) < 1e-6 * max(1, abs(found)), "other data"

    store_options: dict[str, Any] = {
        "storage_options": given, "reader_threads": args.readers, "max_cache_bytes": "1GiB"
    }  # fmt: skip
    peers = [
        Peer(given, library, int(workers), urls)
        for workers, _, library in (p.partition(":") for p in args.peers.split(",") if p)
    ]
    for number in range(args.rounds):
        for threads in (16, 32, 128) if kind == "small" else (4, 16):
            seconds, cpu, _ = timed(lambda threads=threads: alone(given, urls, threads))
            note(f"obstore alone, {threads} at once", seconds, cpu)
        with GPUFeatureStore("cpu", **store_options) as store:
            lister = PathLister(
                prefix, batch_size=batch, shuffle=True, seed=number, storage_options=given
            )
            loader = GPUCachedPathDataLoader(lister, store=store)
            seconds, cpu, _ = timed(
                lambda loader=loader, number=number: total(number, (b["feature"] for b in loader))
            )
            note("gpucache_pipes, a first epoch", seconds, cpu)
            rows.setdefault("readers", []).append((store.stats().reader_threads, 0))
        for peer in peers:
            lister.set_epoch(0)
            lister.reset()
            batches = [list(paths) for paths in lister]
            seconds, cpu, _ = timed(
                lambda peer=peer, b=batches, number=number: total(number, peer.epoch(b))
            )
            note(peer.name, seconds, cpu)
    ours = statistics.median(s for s, _ in rows["gpucache_pipes, a first epoch"])
    report: dict[str, Any] = {"objects": count, "readers": rows.pop("readers")}
    for name, found in rows.items():
        seconds = statistics.median(s for s, _ in found)
        report[name] = {
            "seconds": [s for s, _ in found],
            "cpu_us": statistics.median(1e6 * c / count for _, c in found),
            "times_as_long_as_ours": seconds / ours,
        }
        print(f"{kind} {name:40} takes {seconds / ours:6.2f} times as long as ours")
    return report


if __name__ == "__main__":
    main()
