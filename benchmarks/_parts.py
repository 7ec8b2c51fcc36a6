"""The parts of the check on an accelerator, and the steps of each.

Imports neither torch nor the package: what is checked runs in other processes.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from _steps import Result, Step, passed_or_failed

ROOT = Path(__file__).resolve().parent.parent

DEVICE_SCENARIOS = (
    "warm", "rows", "segments", "step", "cold", "cold_small", "cold_large", "overlap",
    "small_kernels", "small_copies", "host_tier", "peak", "largest_batch",
)  # fmt: skip
"""Those of accelerator.py, in which a test finds the same ones."""

SCENARIOS = ("small", "large", "ragged")
SCENARIO_CONTENDERS = (
    "DataLoader, 4", "DataLoader, 8", "dict", "preadv", "index_select",
)  # fmt: skip
"""All contenders would take longer than a part may. `peers` measures the others one by one."""

PEERS = (
    "DataLoader, 8 workers", "DataLoader, 16 workers", "pinned copies, 4 threads",
    "pinned copies, 16 threads", "SPDL", "torchdata ParallelMapper", "grain", "MONAI CacheDataset",
)  # fmt: skip
"""Those of peers.py, in which a test finds the same ones."""

_TIMEOUT = re.compile(r"Timeout \(\d+:\d\d:\d\d")
"""What faulthandler prints, after what pytest has printed on that line."""

_NO_TESTS = 5
"""Exit status of pytest if no test was selected."""

_FILE_SECONDS = 240.0
_SCENARIO_SECONDS = 200.0
_PEER_SECONDS = 100.0


@dataclass(frozen=True)
class Options:
    """What the caller has chosen.

    Attributes:
        device: as in torch.device; None is the accelerator.
        scale: of the amounts of data.
        test_seconds: the longest that one test may take.
        scratch: makes from a name the path of a report whose content goes into the record.
        beside: makes from a name the path of a report that is kept next to the record.
    """

    device: str | None
    scale: float
    test_seconds: float
    scratch: Callable[[str], Path]
    beside: Callable[[str], Path]

    def for_scripts(self) -> tuple[str, ...]:
        """The options that all measuring scripts have."""
        device = () if self.device is None else ("--device", self.device)
        return (*device, "--scale", str(self.scale))


def test_steps(options: Options) -> list[Step]:
    """One process of pytest for each file that has tests for a device."""
    gpu = ROOT / "tests" / "gpu"
    files = [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(r"\bmark\.gpu\b|\bBACKENDS\b", path.read_text())
    ]
    # What the proof rests on comes first, and what may use up the time last.
    files.sort(
        key=lambda path: (
            path.name == "test_sanitizers.py", path.name != "test_edges.py", path.parent != gpu,
        )
    )  # fmt: skip
    # Without the options of pyproject.toml, some of which an older pytest rejects. The limit of a
    # test is that of tests/time_limit.py.
    pytest = (
        "-m", "pytest", "-o", "addopts=", "-o", "faulthandler_timeout=0", "-W", "default",
        "-p", "no:cacheprovider", "-v", "-rsfE", "-m", "gpu",
    )  # fmt: skip
    seconds = max(_FILE_SECONDS, 1.5 * options.test_seconds)
    judge = _judge_of_tests(options.test_seconds)
    names = [path.relative_to(ROOT).as_posix() for path in files]
    return [
        Step(name, (*pytest, name), 2 * seconds if "sanitizers" in name else seconds, judge=judge)
        for name in names
    ]


def _judge_of_tests(test_seconds: float) -> Callable[[Result, list[str]], None]:
    def judge(result: Result, lines: list[str]) -> None:
        counts = {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", _last_count(lines))}
        kept = ("passed", "failed", "skipped", "xfailed", "error", "errors")
        result["tests"] = {word: counts[word] for word in kept if word in counts}
        reasons = [line for line in lines if line.startswith("SKIPPED ")]
        if reasons:
            result["skipped"] = reasons
        if result["exit"] == _NO_TESTS:
            result |= {"outcome": "skipped", "why": "no test was selected"}
            return
        passed_or_failed(result)
        if result["exit"] == 1 and any(_TIMEOUT.search(line) for line in lines):
            why = f"a test took longer than {test_seconds:.0f} s"
            result |= {"outcome": "timed out", "why": why}
        elif result["outcome"] == "passed" and not result["tests"].get("passed"):
            texts = {line.partition(": ")[2] for line in reasons}
            result |= {"outcome": "skipped", "why": "; ".join(sorted(texts)) or "no test has run"}
        elif result["outcome"] == "passed" and counts.get("skipped"):
            result["why"] = f"{counts['skipped']} of its tests were skipped"

    return judge


def _last_count(lines: list[str]) -> str:
    """The line with which pytest ends, such as "3 passed, 1 skipped in 0.1s"; "" without one."""
    return next((n for n in reversed(lines) if re.search(r"\d+ \w+.* in [\d.]+s", n)), "")


def device_steps(options: Options) -> list[Step]:
    """The figures of accelerator.py."""
    steps = []
    for name in DEVICE_SCENARIOS:
        report = options.scratch(f"device_{name}")
        command = ("benchmarks/accelerator.py", "--only", name, *options.for_scripts())
        steps.append(
            Step(name, (*command, "--json", str(report)), _SCENARIO_SECONDS, report)
        )  # fmt: skip
    return steps


def scenario_steps(options: Options) -> list[Step]:
    """The fixed scenarios on the device, compared with a few contenders."""
    steps = []
    for name in SCENARIOS:
        report = options.beside(name)
        # On the CPU, which only tests this, it is enough to start a few.
        contenders = SCENARIO_CONTENDERS[-2:] if options.device == "cpu" else SCENARIO_CONTENDERS
        chosen = [word for contender in contenders for word in ("--only", contender)]
        command = (
            "benchmarks/scenarios.py", name, "--rounds", "2", *chosen, *options.for_scripts(),
        )  # fmt: skip
        steps.append(
            Step(name, (*command, "--json", str(report)), _SCENARIO_SECONDS, report)
        )  # fmt: skip
    return steps


def peer_steps(options: Options) -> list[Step]:
    """Each peer compared with gpucache_pipes, on small and on large files."""
    steps = []
    for files in ("small", "large"):
        for peer in PEERS:
            name = f"{files} files, {peer}"
            report = options.scratch("peer_" + re.sub(r"\W+", "_", name))
            command = ("benchmarks/peers.py", files, peer, *options.for_scripts())
            steps.append(
                Step(name, (*command, "--json", str(report)), _PEER_SECONDS, report)
            )  # fmt: skip
    return steps


PARTS: dict[str, Callable[[Options], list[Step]]] = {
    "tests": test_steps,
    "device": device_steps,
    "scenarios": scenario_steps,
    "peers": peer_steps,
}
