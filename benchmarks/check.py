"""Compare two reports of `scenarios.py`: has gpucache_pipes become slower?

The comparison uses the ratio of the time to that of the limit, measured in the same rounds: a slow
machine is slow for both. On another kind of machine, system calls and Python may differ in relative
speed. A case therefore counts as slower only if its ratio to DataLoader is worse, too.

    python benchmarks/check.py BASE HEAD [--tolerance 0.2]
    python benchmarks/check.py BASE             # measures the scenario of BASE, here and now

The exit status is 1 if a case is slower by more than the tolerance, and 2 if the reports cannot be
compared. Without HEAD, a slower case is measured again, at most three times in all.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from gpucache_pipes.cli import bench

TOLERANCE = 0.2
ATTEMPTS = 3
WORK = ("files", "feature_bytes", "batch_size", "epochs", "device")


def slower(base: bench.Report, head: bench.Report) -> dict[str, float]:
    """How many times as long gpucache_pipes takes in `head` as in `base`, by case.

    The smaller of the ratio to the limit and the ratio to DataLoader.

    Raises:
        ValueError: the reports are of different work, or incomplete.
        KeyError: they are not reports of `scenarios.py`.
    """
    for key in ("scenario", "complete", "share", *WORK):
        old, new = (r["work"][key] if key in WORK else r[key] for r in (base, head))
        if old != new:
            raise ValueError(f"{key} is {old!r} in BASE and {new!r} in HEAD")
    ratios = {}
    before = base["contenders"][bench.OURS.name]
    after = head["contenders"][bench.OURS.name]
    if after["problem"]:
        raise ValueError(f"gpucache_pipes was not measured: {after['problem']}")
    for case, was in before["cases"].items():
        if not was["to_limit"]:
            continue
        now = after["cases"][case]
        if not now["to_limit"]:
            raise ValueError(f"{case!r} is in BASE and was not measured in HEAD")
        ratios[case] = min(
            now["to_limit"][0] / was["to_limit"][0],
            was["times_as_fast"][0] / now["times_as_fast"][0],
        )
    if not ratios:
        raise ValueError("there is nothing to compare: BASE has no ratios to the limits")
    return ratios


def measure(name: str) -> bench.Report:
    """Measure a scenario on this machine. Raises KeyboardInterrupt after Ctrl-C."""
    from scenarios import SCENARIOS, run

    scenario = SCENARIOS[name]
    report = run(scenario, torch.device("cpu"), progress=False)
    if not report["complete"]:
        raise KeyboardInterrupt
    return {"scenario": name, **report}


def judge(base: bench.Report, head: bench.Report, tolerance: float) -> bool:
    """Print the ratios. True if all of them are within the tolerance."""
    fine = True
    for case, ratio in slower(base, head).items():
        verdict = "slower" if ratio > 1 + tolerance else "ok"
        fine &= verdict == "ok"
        print(f"{case:10} takes {ratio:.2f} times as long as in BASE: {verdict}")
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("head", metavar="HEAD", nargs="?")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    args = parser.parse_args()
    base: dict[str, Any] = json.loads(Path(args.base).read_text())
    try:
        if args.head:
            return not judge(base, json.loads(Path(args.head).read_text()), args.tolerance)
        return not any(
            judge(base, measure(base["scenario"]), args.tolerance) for _ in range(ATTEMPTS)
        )
    except KeyError as error:
        print(f"cannot compare: these are no reports of scenarios.py, which have {error}")
    except ValueError as error:
        print(f"cannot compare: {error}")
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
