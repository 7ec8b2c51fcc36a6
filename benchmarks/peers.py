"""Measure one other loader beside gpucache_pipes, on small or on large files.

    python benchmarks/peers.py small|large PEER [--device cuda] [--scale 1.0] [--json FILE]

The files are those of scenarios.py, the measurement is that of `python -m gpucache_pipes bench`,
with one line a contender. gpu_check.py calls this once for each peer, so that one that fails or
hangs takes only its own figures with it. A peer that is not installed is named, and that is all.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from _common import temporary_directory
from _contenders import PEERS, with_readers
from scenarios import SCENARIOS

from gpucache_pipes.cli import bench

READERS = 4


def measure(files: str, peer: str, device: str, scale: float, rounds: int) -> dict[str, Any]:
    """Median seconds by contender and case, and how many times as fast as the peer we are."""
    contender = PEERS[peer]
    if not contender.installed:
        return {"not_installed": [peer], "skipped": f"{contender.needs} is not installed"}
    scenario = SCENARIOS[files]
    contenders = [bench.OURS, with_readers(READERS), contender]
    with temporary_directory() as directory:
        paths = scenario.write(directory, scale)
        batch_size = min(scenario.batch_size, len(paths) // 2)
        with bench.Work(paths, batch_size, bench.find_device(device)) as work:
            report = bench.bench(work, contenders=contenders, rounds=rounds, progress=False)
    figures: dict[str, Any] = {"device": report["device"], "work": report["work"]}
    for name, entry in report["contenders"].items():
        cases = entry["cases"].items()
        medians = {case: value["median_seconds"] for case, value in cases}
        figures[name] = {"problem": entry["problem"], **{c: s for c, s in medians.items() if s}}
    theirs = figures[peer]
    for name in (bench.OURS.name, with_readers(READERS).name):
        figures[name]["times_as_fast"] = {
            case: theirs[case] / seconds
            for case, seconds in figures[name].items()
            if case in theirs and case != "problem"
        }
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", choices=["small", "large"])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of files")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    figures = measure(args.files, args.peer, args.device, args.scale, args.rounds)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")
    for name, entry in figures.items():
        print(f"{name}: {entry}")
    problems = [e["problem"] for e in figures.values() if isinstance(e, dict) and e.get("problem")]
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
