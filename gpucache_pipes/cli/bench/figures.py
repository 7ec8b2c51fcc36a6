"""The report of a measurement: times, and their ratios to the baseline and to the limits."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

from gpucache_pipes.cli.bench.loaders import BASELINE
from gpucache_pipes.cli.bench.measuring import CASES, Measurement
from gpucache_pipes.cli.bench.work import Work

_PACKAGES = ("torch", "torchdata", "spdl", "grain", "monai", "tensordict", "safetensors")


def as_json(work: Work, measurement: Measurement, missing: Sequence[str] = ()) -> dict[str, Any]:
    """Build the report of a measurement, which `json.dumps` accepts.

    For each contender and case, `times_as_fast` is the time of the baseline divided by that of the
    contender, and `to_limit` is the time of the contender divided by that of the limit. Both are
    computed within each round, and given as median, least and greatest over the rounds.

    Args:
        work: what was measured.
        measurement: result of `measure`.
        missing: names of contenders that are not installed.
    """
    rounds = {name: series.seconds for name, series in measurement.series.items()}
    limits = {case: limit_seconds(work, measurement, case) for case in CASES}
    entries: dict[str, Any] = {}
    for name, series in measurement.series.items():
        ratios: dict[str, Any] = {}
        for case in CASES:
            mine = series.seconds[case]
            base = rounds.get(BASELINE.name, {}).get(case, [])
            ratios[case] = {
                "median_seconds": statistics.median(mine) if mine else None,
                "times_as_fast": spread(base, mine),
                "to_limit": spread(mine, limits[case]),
            }
        entries[name] = {
            "kind": series.kind,
            "caches": series.caches,
            "problem": series.problem,
            "hit_rate": series.hit_rate,
            "seconds": series.seconds,
            "cases": ratios,
        }
    return {
        **environment(),
        "complete": measurement.complete,
        "work": work.as_json(),
        "share": measurement.share,
        "rounds": max((len(s["first"]) for s in rounds.values()), default=0),
        "limit_seconds": limits,
        "not_installed": list(missing),
        "contenders": entries,
    }


def limit_seconds(work: Work, measurement: Measurement, case: str) -> list[float]:
    """Seconds that no contender can beat, one for each round; empty if they are unknown.

    The limit of "partial" is derived: a first epoch that reads everything, then epochs that read
    the fraction that is not cached and gather the rest. The limit of "overlap" is the compute
    alone.

    Args:
        work: what was measured.
        measurement: result of `measure`.
        case: one of CASES.
    """
    if case == "overlap":
        return measurement.compute
    of_limits = [s for s in measurement.series.values() if s.kind == "limit"]
    times = {case: [t for s in of_limits for t in s.seconds[case]] for case in ("first", "later")}
    if case != "partial":
        return times[case]
    share, later = measurement.share, work.epochs - 1
    return [
        first + later * ((1 - share) * first + share * gather)
        for first, gather in zip(times["first"], times["later"], strict=False)
    ]


def spread(above: Sequence[float], below: Sequence[float]) -> list[float] | None:
    """Median, least and greatest of the ratios `above / below` within a round.

    None if there is no round.

    >>> spread([4.0, 9.0, 8.0], [2.0, 3.0, 2.0])
    [3.0, 2.0, 4.0]
    """
    ratios = [a / b for a, b in zip(above, below, strict=False)]
    return [statistics.median(ratios), min(ratios), max(ratios)] if ratios else None


def environment() -> dict[str, Any]:
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
    return {
        "command": " ".join(["python", *_program(), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "device": device,
        "versions": versions,
    }


def _program() -> list[str]:
    """The program as a user types it after `python`."""
    module = sys.argv[0].endswith("__main__.py")
    return ["-m", "gpucache_pipes"] if module else [sys.argv[0]]
