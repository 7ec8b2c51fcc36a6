"""Check on an accelerator what cannot be checked without one: tests first, then figures.

    make gpu-check        or        python3 benchmarks/gpu_check.py [--part PART] [--json FILE]

Runs with the Python that runs it, which needs torch, torchdata, pytest and hypothesis, installed
or on PYTHONPATH. Needs no network. There are four parts, all of them by default:

- tests: tests/gpu, and the tests of other files that take the device as a parameter.
- device: the figures of accelerator.py.
- scenarios: the fixed scenarios of scenarios.py.
- peers: other loaders beside gpucache_pipes. One that is not installed is named as skipped.

Each file of tests and each measurement is a step, in a process of its own. A step that crashes or
hangs is recorded, and the next one runs. The JSON file is replaced after each step, and an
existing one is continued, so the parts may be run by separate calls, and a call may be killed. A
part ends within --budget seconds; steps for which no time is left are recorded as not run.

Writes the file of --json, its log, and the reports of the steps beside it; temporary files are
below the directory for temporary files.

The exit status is 0 if every step has passed or was skipped for a reason, else 1. Without an
accelerator it is 1 as well. With `--device cpu --scale 0.02` the CPU takes its place, which tests
this script and not the package.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _parts import PARTS, ROOT, Options
from _steps import BAD, OUTCOMES, Record, Result, Surroundings, end_all, run_part, text_of

BUDGET = 480.0
TEST_SECONDS = 120.0


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    signal.signal(signal.SIGTERM, end)
    path = Path(args.json).resolve()
    try:
        record = Record(path)
    except ValueError as error:
        print(error)
        return 1
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as scratch:
        environment = environment_of_steps(args, scratch)
        found = describe(environment)
        if found.get("accelerator") is None and args.device is None:
            print(found.get("error") or "there is no accelerator here: nothing to check")
            return 1
        found = {**found, "device": args.device or found["accelerator"], "scale": args.scale}
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".log").open("a") as log:

            def say(line: str) -> None:
                print(line, flush=True)
                print(line, file=log, flush=True)

            results = check(args, record, Surroundings(ROOT, environment, say), found)
            say(summary(results))
    print(f"written to {args.json}")
    bad = [r for steps in results.values() for r in steps.values() if r["outcome"] in BAD]
    return 1 if bad or not any(results.values()) else 0


def end(number: int, frame: object) -> None:
    """Handle SIGTERM: end the step that is running, and then this process."""
    end_all()
    sys.exit(128 + number)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="may be given repeatedly")
    parser.add_argument("--only", action="append", help="steps whose names contain this text")
    parser.add_argument("--json", default=str(ROOT / "benchmarks/results/gpu_check.json"))
    parser.add_argument("--scale", type=float, default=1.0, help="of the amounts of data")
    parser.add_argument("--device", help='such as "cuda:1", or "cpu" to test this script')
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for each part")
    parser.add_argument(
        "--test-seconds", type=float, default=TEST_SECONDS, help="the longest a test may take"
    )
    return parser.parse_args(arguments)


def environment_of_steps(args: argparse.Namespace, scratch: str) -> dict[str, str]:
    """The variables of the caller, with the repository in front on PYTHONPATH."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    given = [str(Path(path).resolve()) for path in paths if path]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *given]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",
        "TEST_SECONDS": str(longest_test(args)),
        # Caches that are written elsewhere by default.
        "HYPOTHESIS_STORAGE_DIRECTORY": f"{scratch}/hypothesis",
        "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
        "TRITON_CACHE_DIR": f"{scratch}/triton",
        "CUDA_CACHE_PATH": f"{scratch}/cuda",
        "XDG_CACHE_HOME": f"{scratch}/cache",
        "MPLCONFIGDIR": f"{scratch}/matplotlib",
    }
    if args.device is not None:
        variables["TEST_DEVICE"] = args.device
    return variables


def longest_test(args: argparse.Namespace) -> float:
    """Seconds for a test, and what the caller has chosen for the stress test of tests/gpu."""
    seconds: float = args.test_seconds
    return seconds + float(os.environ.get("GPU_STRESS_SECONDS", 0))


def describe(environment: dict[str, str]) -> dict[str, Any]:
    """What _describe.py prints. "error" is why it could not."""
    try:
        asked = subprocess.run(
            [sys.executable, str(ROOT / "benchmarks/_describe.py")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        found: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": "the device did not answer within 120 s: see nvidia-smi"}
    except (ValueError, IndexError):
        last = "\n".join(asked.stderr.splitlines()[-5:])
        return {"error": f"cannot ask for the device (exit status {asked.returncode}):\n{last}"}
    return found


def check(
    args: argparse.Namespace, record: Record, around: Surroundings, found: dict[str, Any]
) -> dict[str, dict[str, Result]]:
    """Run the chosen parts; returns the results by part and step."""
    scratch = Path(around.environment["XDG_CACHE_HOME"]).parent
    path = record.path
    options = Options(
        args.device,
        args.scale,
        longest_test(args),
        lambda name: scratch / f"{name}.json",
        lambda name: path.with_name(f"{path.stem}_{name}.json"),
    )
    results = {}
    for part in args.part or PARTS:
        steps = PARTS[part](options)
        if args.only:
            steps = [step for step in steps if any(text in step.name for text in args.only)]
        record.begin(part, found, [step.name for step in steps])
        start = time.monotonic()
        results[part] = run_part(part, steps, record, budget=args.budget, around=around)
        record.note(part, seconds=round(time.monotonic() - start, 1))
        if part == "peers":
            record.note(part, not_installed=not_installed(results[part]))
    return results


def not_installed(results: dict[str, Result]) -> list[str]:
    """The peers that could not be measured, since they are not installed."""
    figures = [result.get("figures", {}) for result in results.values()]
    return sorted({name for measured in figures for name in measured.get("not_installed", ())})


def summary(results: dict[str, dict[str, Result]]) -> str:
    """A table of the steps with what became of them, and totals."""
    lines = [""]
    for part, steps in results.items():
        lines.append(part)
        for name, result in steps.items():
            seconds = f"{result['seconds']:6.1f} s" if "seconds" in result else " " * 8
            lines.append(f"  {seconds}  {name:44} {text_of(result)}")
    outcomes = [result["outcome"] for steps in results.values() for result in steps.values()]
    totals = [f"{outcomes.count(word)} {word}" for word in OUTCOMES if word in outcomes]
    return "\n".join([*lines, ", ".join(totals) or "no step has that name"])


if __name__ == "__main__":
    sys.exit(main())
