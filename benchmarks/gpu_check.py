"""Run everything that needs an accelerator: tests, benchmarks and scenarios.

Uses the Python that runs it, which needs torch, torchdata, pytest and hypothesis. Needs no network.
Writes the device, versions, commands, exit statuses and figures to a JSON file.

    make gpu-check        or        python3 benchmarks/gpu_check.py [--json FILE]
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gpucache_pipes.cli.bench.figures import environment

ROOT = Path(__file__).resolve().parent.parent
SCENARIOS = ("small", "large", "ragged")
TESTS = ["tests/gpu", "tests/nodes/test_nodes.py", "tests/store/test_store_machine.py"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default=str(ROOT / "benchmarks/results/gpu_check.json"))
    parser.add_argument("--scale", type=float, default=1.0, help="of the amounts of data")
    args = parser.parse_args()
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        print("there is no accelerator here: nothing to check")
        return 1
    figures_file = Path(args.json).with_suffix(".figures")
    # Without the options of pyproject.toml, some of which an older pytest rejects.
    pytest = [sys.executable, "-m", "pytest", "-o", "addopts=", "-W", "default", "-q", "-rA"]
    tests = run([*pytest, "-m", "gpu", *TESTS])
    bench = run(
        [sys.executable, "benchmarks/accelerator.py", "--scale", str(args.scale),
         "--json", str(figures_file)]
    )  # fmt: skip
    scenarios = {}
    for name in SCENARIOS:
        # Each scenario writes a report of its own, next to those of the CPU.
        report = Path(args.json).with_name(f"gpu_{name}.json")
        scenarios[name] = run(
            [sys.executable, "benchmarks/scenarios.py", name, "--rounds", "3",
             "--json", str(report)]
        )  # fmt: skip
    measured = json.loads(figures_file.read_text()) if figures_file.exists() else {}
    figures_file.unlink(missing_ok=True)
    result = {
        **environment(),
        "device": measured.get("figures", {}).get("device", str(found)),
        "date": time.strftime("%Y-%m-%d"),
        "tests": tests,
        "benchmark": bench,
        "scenarios": scenarios,
        "figures": measured.get("figures", {}),
    }
    Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.json}")
    return max(part["exit"] for part in (tests, bench, *scenarios.values()))


def run(command: list[str]) -> dict[str, Any]:
    """Run a command, print its output, and return its exit status, duration and last lines."""
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    return {
        "command": " ".join(["python3", *command[1:]]),
        "exit": process.wait(),
        "seconds": round(time.monotonic() - start, 1),
        "last_lines": lines[-15:],
    }


if __name__ == "__main__":
    sys.exit(main())
