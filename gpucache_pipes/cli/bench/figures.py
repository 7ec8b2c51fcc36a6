"""Runs a benchmark, and computes its report: times, and ratios to the baseline and the limits."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

from gpucache_pipes.cli.bench.contender import Contender
from gpucache_pipes.cli.bench.libraries import LIBRARIES
from gpucache_pipes.cli.bench.limits import LIMITS
from gpucache_pipes.cli.bench.loaders import BASELINE, LOADERS, OURS
from gpucache_pipes.cli.bench.measuring import CASES, Measurement, measure
from gpucache_pipes.cli.bench.work import Work
from gpucache_pipes.device import available_host_bytes, resolve_device

Report = dict[str, Any]
"""Result of `bench`, which `json.dumps` accepts."""

CONTENDERS: list[Contender] = [*LOADERS, *LIBRARIES, *LIMITS]
"""All contenders. To measure another loader, add a `Contender` of your own."""

_PACKAGES = ("torch", "torchdata", "spdl", "grain", "monai", "tensordict", "safetensors")
_FREE_SHARE = 0.9
"""Fraction of the free memory that a cache may use."""


def bench(work: Work, *, contenders: Sequence[Contender] = (), **options: Any) -> Report:
    """Measure the contenders that are installed.

    Args:
        work: the files and their batches.
        contenders: some of CONTENDERS, or your own; empty means all of CONTENDERS.
        options: of `measure`.

    Raises:
        ValueError: as `measure`.
    """
    wanted = list(contenders) or CONTENDERS
    installed = [contender for contender in wanted if contender.installed]
    missing = [contender.name for contender in wanted if not contender.installed]
    return as_json(work, measure(work, installed, **options), missing)


def choose(
    names: Sequence[str] | None, contenders: Sequence[Contender] = CONTENDERS
) -> list[Contender]:
    """The contenders whose names begin with one of `names`, with OURS and BASELINE.

    Args:
        names: beginnings of names; None or empty means all contenders.
        contenders: all of them.

    Raises:
        ValueError: a name matches no contender.

    >>> [contender.name for contender in choose(["preadv"])]
    ['gpucache_pipes', 'DataLoader, 0 workers', 'preadv of the bytes']
    """
    if not names:
        return list(contenders)
    for name in names:
        if not any(contender.name.startswith(name) for contender in contenders):
            known = ", ".join(contender.name for contender in contenders)
            raise ValueError(f"--only: {name!r} is none of the contenders: {known}")
    always = (OURS.name, BASELINE.name)
    return [c for c in contenders if c.name.startswith(tuple(names)) or c.name in always]


def find_device(name: str) -> torch.device:
    """Resolve the name of a device.

    Args:
        name: as in `torch.device`, or "auto" for the accelerator, or the CPU if there is none.

    Raises:
        ValueError: this machine has no such device.
    """
    return resolve_device(None if name == "auto" else name)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a cache could use on `device`; None if that is unknown."""
    if device.type == "cpu":
        return int(available_host_bytes() * _FREE_SHARE)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _FREE_SHARE)
    return None


def as_json(work: Work, measurement: Measurement, missing: Sequence[str] = ()) -> Report:
    """Build the report of a measurement.

    For each contender and case, `times_as_fast` is the time of the baseline divided by that of the
    contender, and `to_limit` is the time of the contender divided by that of the limit. Both are
    computed within each round, and given as median, least and greatest over the rounds.

    Args:
        work: what was measured.
        measurement: result of `measure`.
        missing: names of contenders that are not installed.
    """
    series = measurement.series
    limits = {case: limit_seconds(work, measurement, case) for case in CASES}
    entries: dict[str, Any] = {}
    for name, mine in series.items():
        ratios: dict[str, Any] = {}
        for case, seconds in mine.seconds.items():
            base = series[BASELINE.name].seconds[case] if BASELINE.name in series else []
            ratios[case] = {
                "median_seconds": statistics.median(seconds) if seconds else None,
                "times_as_fast": spread(base, seconds),
                "to_limit": spread(seconds, limits[case]),
            }
        entries[name] = {**vars(mine), "cases": ratios}
    return {
        **environment(),
        "complete": measurement.complete,
        "work": work.as_json(),
        "share": measurement.share,
        "busy": measurement.busy,
        "rounds": max((len(mine.seconds["first"]) for mine in series.values()), default=0),
        "limit_seconds": limits,
        "not_installed": list(missing),
        "contenders": entries,
    }


def limit_seconds(work: Work, measurement: Measurement, case: str) -> list[float]:
    """Seconds that no contender can beat, one for each round; empty if they are unknown.

    Of several limits, the fastest of the round. The limit of "partial" is derived: a first epoch
    that reads everything, then epochs that read the fraction that is not cached and gather the
    rest. The limit of "overlap" is the compute alone.

    Args:
        work: what was measured.
        measurement: result of `measure`.
        case: one of CASES.
    """
    if case == "overlap":
        return measurement.compute
    if case != "partial":
        limits = [s.seconds[case] for s in measurement.series.values() if s.kind == "limit"]
        return [min(times) for times in zip(*filter(None, limits), strict=False)]
    if measurement.share is None:
        return []
    share, later = measurement.share, work.epochs - 1
    first, gather = (limit_seconds(work, measurement, case) for case in ("first", "later"))
    return [
        read + later * ((1 - share) * read + share * picked)
        for read, picked in zip(first, gather, strict=False)
    ]


def spread(above: Sequence[float], below: Sequence[float]) -> list[float] | None:
    """Median, least and greatest of the ratios `above / below` within a round.

    None if there is no round.

    >>> spread([4.0, 9.0, 8.0], [2.0, 3.0, 2.0])
    [3.0, 2.0, 4.0]
    """
    ratios = [a / b for a, b in zip(above, below, strict=False)]
    return [statistics.median(ratios), min(ratios), max(ratios)] if ratios else None


def environment() -> Report:
    """What the figures depend on: command, date, machine and versions."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = "cpu" if accelerator is None else str(accelerator)
    if device.startswith("cuda"):
        device = torch.cuda.get_device_name()
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    # The program as a user types it after `python`.
    module = sys.argv[0].endswith("__main__.py")
    program = ["-m", "gpucache_pipes"] if module else [sys.argv[0]]
    return {
        "command": " ".join(["python", *program, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "device": device,
        "versions": versions,
    }
