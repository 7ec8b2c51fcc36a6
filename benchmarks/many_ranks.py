"""Compare ranks that share their caches with ranks that do not: hits, files read, and time.

Each rank is a process, and gloo connects them. Contenders take turns in the same processes.

    python benchmarks/many_ranks.py [--only PART] [--rounds N] [--json FILE]

Parts:

- hits: second and later epochs under a global shuffle, for 2, 4 and 8 ranks, each of which has
  room for 10%, 25% or 50% of the files; and how often files were read by all ranks together.
- epoch: 4 ranks with room for 25% each, where each open of a file takes 3 ms (slow_storage.c), 8
  reader threads in each store. Linux only.
- overhead: batches without anything from other ranks (shard="static", all cached), compared with
  the same pipeline under Lockstep.
- sizes: epochs of which three quarters come from other ranks, by the size of a feature.
- nodes: 4 ranks on two hosts, which are network namespaces that a link of 1 Gb/s connects; 3 ms an
  open. Linux only, and root. Left out unless --only names it.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _common import save, temporary_directory, write_files

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, Lockstep, PathLister

DELAY = 3000
"""Microseconds of an open."""


def pipeline(directory: str, store: GPUFeatureStore, **options: Any) -> GPUCollator:
    lister = PathLister(directory, batch_size=64, shuffle=True, **options)
    return GPUCollator(GPUPrefetcher(lister, store))


def stores(**options: Any) -> tuple[GPUFeatureStore, GPUFeatureStore]:
    """One that shares its cache, and one that does not."""
    group = dist.group.WORLD
    return GPUFeatureStore("cpu", process_group=group, **options), GPUFeatureStore("cpu", **options)


def epoch_of(node: Any) -> float:
    """Seconds of an epoch on all ranks, from the first to the last."""
    dist.barrier()
    begin = time.perf_counter()
    node.reset()
    batches = sum(1 for _ in node)
    assert batches
    dist.barrier()
    return time.perf_counter() - begin


def total(*numbers: float) -> list[float]:
    """The sums over all ranks."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


# What the ranks do. Each function returns JSON.


def hits(directory: str, files: int, share: float, rounds: int) -> Any:
    shared, plain = stores(max_cache_items=round(files * share))
    found = {}
    for name, store in (("shared", shared), ("alone", plain)):
        node = pipeline(directory, store)
        epoch_of(node)
        first = store.stats()
        for _ in range(rounds):
            epoch_of(node)
        done = store.stats().since(first)
        served, asked, read = total(done.hits, done.hits + done.misses, store.stats().files_read)
        found[name] = {"hit_rate": served / asked, "reads_per_file": read / files}
        store.close()
    return found


def epoch(directory: str, files: int, share: float, rounds: int) -> Any:
    shared, plain = stores(max_cache_items=round(files * share), reader_threads=8)
    nodes = {"shared": pipeline(directory, shared), "alone": pipeline(directory, plain)}
    times: dict[str, list[float]] = {name: [] for name in nodes}
    for _ in range(rounds + 1):
        for name, node in nodes.items():
            times[name].append(epoch_of(node))
    shared.close()
    plain.close()
    return times


def overhead(directory: str, files: int, share: float, rounds: int) -> Any:
    shared, plain = stores()
    nodes: dict[str, Any] = {
        "shared": pipeline(directory, shared, shard="static"),
        "lockstep": Lockstep(pipeline(directory, plain, shard="static")),
    }
    times: dict[str, list[float]] = {name: [] for name in nodes}
    for number in range(rounds + 1):
        for name, node in nodes.items():
            seconds = epoch_of(node)
            if number:
                times[name].append(seconds / len(node))
    shared.close()
    plain.close()
    return times


def nodes(directory: str, files: int, share: float, rounds: int) -> Any:
    """One cache of all ranks, one of each node, and a cache for each rank."""
    here = [dist.new_group([first, first + 1]) for first in (0, 2)][dist.get_rank() // 2]
    groups = {"one cache": dist.group.WORLD, "one a node": here, "alone": None}
    options = {"max_cache_items": round(files * share), "reader_threads": 8}
    stores = {n: GPUFeatureStore("cpu", process_group=g, **options) for n, g in groups.items()}
    pipelines = {name: pipeline(directory, store) for name, store in stores.items()}
    times: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(rounds + 1):
        for name, node in pipelines.items():
            times[name].append(epoch_of(node))
    read = {name: total(store.stats().files_read)[0] / files for name, store in stores.items()}
    for store in stores.values():
        store.close()
    return {"seconds": times, "reads_per_file": read}


# The program that starts them


def run(
    function: Callable[..., Any], ranks: int, *arguments: Any, prefix: Any = None,
    **environment: str,
) -> Any:  # fmt: skip
    """What a function returns in rank 0. `prefix` of a rank is put in front of its command."""
    with temporary_directory() as meet:
        processes = [
            subprocess.Popen(
                [*(prefix(rank) if prefix else ()), sys.executable, __file__, "--rank", str(rank),
                 str(ranks), f"{meet}/meet", function.__name__, json.dumps(arguments)],
                stdout=subprocess.PIPE, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
            )
            for rank in range(ranks)
        ]  # fmt: skip
        printed = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("\n".join(printed))
    return json.loads(printed[0].splitlines()[-1])


def run_rank(rank: int, ranks: int, meet: str, name: str, arguments: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=ranks)
    found = globals()[name](*json.loads(arguments))
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(found))


def measure_hits(rounds: int) -> list[Any]:
    rows = []
    files = 3200
    with temporary_directory() as directory:
        write_files(directory, files, width=64)
        for ranks in (2, 4, 8):
            for share in (0.1, 0.25, 0.5):
                found = run(hits, ranks, directory, files, share, rounds)
                rows.append({"ranks": ranks, "share": share, **found})
                expected = min(1, ranks * share)
                print(
                    f"{ranks} ranks with {share:.0%} each: hits {found['shared']['hit_rate']:.1%} "
                    f"(min(1, W C / N) = {expected:.1%}), alone {found['alone']['hit_rate']:.1%}; "
                    f"reads of a file {found['shared']['reads_per_file']:.2f}, alone "
                    f"{found['alone']['reads_per_file']:.2f}"
                )
    return rows


def run_slowly(function: Callable[..., Any], files: int, rounds: int, **options: Any) -> Any:
    """What a function of 4 ranks returns over storage that is slow."""
    with temporary_directory() as found:
        library, directory = Path(found, "slow.so"), Path(found, "features")
        source = Path(__file__).with_name("slow_storage.c")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        directory.mkdir()
        write_files(directory, files, width=options.pop("width", 1024))
        share = options.pop("share", 0.25)
        return run(
            function, 4, str(directory), files, share, rounds, LD_PRELOAD=str(library),
            SLOW_DIRECTORY=str(directory), SLOW_MICROSECONDS=str(DELAY), **options,
        )  # fmt: skip


def measure_nodes(rounds: int) -> Any:
    rows = []
    for kib, files in ((4, 4096), (64, 1024)):
        for share in (0.25, 0.5):
            with two_hosts() as prefix:
                found = run_slowly(
                    nodes, files, rounds, width=kib * 256, share=share, prefix=prefix,
                    GLOO_SOCKET_IFNAME="shaped",
                )  # fmt: skip
            middle = {n: statistics.median(t[2:]) for n, t in found["seconds"].items()}
            rows.append({"KiB": kib, "share": share, **found})
            print(
                f"{kib} KiB, room for {share:.0%} each: "
                + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in middle.items())
            )
    return rows


@contextlib.contextmanager
def two_hosts() -> Iterator[Callable[[int], list[str]]]:
    """Two network namespaces that a shaped link connects; which command enters that of a rank."""
    names = [f"gpucache-{os.getpid()}-{n}" for n in range(2)]
    shape = "root tbf rate 1gbit burst 128kb latency 50ms"
    commands = [
        *(f"ip netns add {name}" for name in names),
        "ip link add name shaped netns {} type veth peer name shaped netns {}".format(*names),
    ]
    for n, name in enumerate(names):
        within = f"ip netns exec {name}"
        commands += [
            f"{within} ip addr add 10.201.0.{n + 1}/24 dev shaped",
            f"{within} ip link set shaped up", f"{within} ip link set lo up",
            f"{within} tc qdisc add dev shaped {shape}",
        ]  # fmt: skip
    try:
        for command in commands:
            subprocess.run(command.split(), check=True)
        yield lambda rank: ["ip", "netns", "exec", names[rank // 2]]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def measure_epoch(rounds: int) -> Any:
    times = run_slowly(epoch, 16384, rounds)
    ratios = [b / a for a, b in zip(times["shared"][1:], times["alone"][1:], strict=True)]
    print(
        f"first epoch {times['shared'][0]:.2f} s, alone {times['alone'][0]:.2f} s; later ones "
        f"{statistics.median(times['shared'][1:]):.3f} s, alone "
        f"{statistics.median(times['alone'][1:]):.3f} s: {statistics.median(ratios):.2f} times as "
        f"fast ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    return {"seconds": times, "ratios": ratios}


def measure_overhead(rounds: int) -> Any:
    rows = {}
    with temporary_directory() as directory:
        write_files(directory, 16384, width=1024)
        for ranks in (2, 4):
            times = run(overhead, ranks, directory, 16384, 1.0, rounds)
            ratios = [a / b for a, b in zip(times["shared"], times["lockstep"], strict=True)]
            rows[str(ranks)] = {"seconds": times, "ratios": ratios}
            print(
                f"{ranks} ranks: {statistics.median(times['shared']) * 1e6:.0f} us a batch, under "
                f"Lockstep {statistics.median(times['lockstep']) * 1e6:.0f} us: "
                f"{statistics.median(ratios):.3f} of it ({min(ratios):.3f} to {max(ratios):.3f})"
            )
    return rows


def measure_sizes(rounds: int) -> Any:
    rows = []
    for kib, files in ((4, 4096), (64, 1024), (1024, 256)):
        with temporary_directory() as directory:
            write_files(directory, files, width=kib * 256)
            times = run(epoch, 4, directory, files, 0.25, rounds)
        ratios = [b / a for a, b in zip(times["shared"][1:], times["alone"][1:], strict=True)]
        rows.append({"KiB": kib, "files": files, "seconds": times, "ratios": ratios})
        print(
            f"{kib} KiB a feature: {statistics.median(times['shared'][1:]):.3f} s an epoch, alone, "
            f"with files in the page cache, {statistics.median(times['alone'][1:]):.3f} s: "
            f"{statistics.median(ratios):.2f} times as fast"
        )
    return rows


MEASURES: dict[str, tuple[Callable[[int], Any], int]] = {
    "hits": (measure_hits, 2),
    "epoch": (measure_epoch, 5),
    "overhead": (measure_overhead, 40),
    "sizes": (measure_sizes, 5),
    "nodes": (measure_nodes, 6),
}


def main() -> None:
    if "--rank" in sys.argv:
        at = sys.argv.index("--rank")
        rank, ranks, meet, name, arguments = sys.argv[at + 1 :]
        run_rank(int(rank), int(ranks), meet, name, arguments)
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*MEASURES])
    parser.add_argument("--rounds", type=int, help="epochs of each contender")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    figures = {}
    for name, (measure, rounds) in MEASURES.items():
        if args.only == name or (args.only is None and name != "nodes"):
            print(f"{name}:")
            figures[name] = measure(args.rounds or rounds)
    save(args.json, figures)


if __name__ == "__main__":
    main()
