"""benchmarks/gpu_check.py, with the CPU in the device's place, and what it survives."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import _parts
    import _steps
    from _steps import Record, Result, Step, Surroundings
finally:
    sys.path.remove(str(BENCHMARKS))


linux = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="needs /proc to find processes"
)


def command(*arguments: object, **variables: str) -> "subprocess.CompletedProcess[str]":
    script = str(BENCHMARKS / "gpu_check.py")
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=200,
    )


def steps_in(path: Path, part: str) -> dict[str, Result]:
    steps: dict[str, Result] = json.loads(path.read_text())["parts"][part]["steps"]
    return steps


# What a step can do


@pytest.fixture
def around(tmp_path: Path) -> Surroundings:
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    return Surroundings(tmp_path, environment, lambda line: None)


def script(code: str, seconds: float = 60, **options: Any) -> Step:
    return Step("one", ("-c", code), seconds, **options)


def test_a_step_that_succeeds(around: Surroundings) -> None:
    result = _steps.run_step(script("print('done')"), 60, around)
    assert result["outcome"] == "passed" and result["exit"] == 0
    assert result["last_lines"] == ["done"]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise SystemExit(3)", "exit status 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
    ],
)
def test_a_step_that_fails(around: Surroundings, code: str, why: str) -> None:
    result = _steps.run_step(script(code), 60, around)
    assert (result["outcome"], result["why"]) == ("failed", why)


def has_ended(pid: int) -> bool:
    """Whether a process has ended. One that init has not collected yet is a zombie."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


HANGS = """
import os, subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-c", "import os; os.read(os.pipe()[0], 1)"], start_new_session=True
)
print(child.pid, flush=True)
os.read(os.pipe()[0], 1)
"""
"""Waits for what never comes, as does a child in a session of its own."""


@linux
def test_a_step_that_hangs_is_ended_with_all_its_processes_and_says_where(
    around: Surroundings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time is up as soon as it has printed, however long that takes."""
    printed = threading.Event()
    wait = subprocess.Popen.wait

    def until_it_has_printed(process: Any, timeout: float | None = None) -> int:
        if timeout == 1000:
            assert printed.wait(100)
            raise subprocess.TimeoutExpired("", timeout)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", until_it_has_printed)
    around = Surroundings(around.directory, around.environment, lambda line: printed.set())
    result = _steps.run_step(script(HANGS), 1000, around)
    assert result["outcome"] == "timed out" and result["why"] == "timed out after 1000 s"
    assert any("most recent call first" in line for line in result["last_lines"])
    assert has_ended(int(result["last_lines"][0]))


@linux
def test_a_process_that_a_step_leaves_behind_is_ended(around: Surroundings) -> None:
    code = (
        "import os\nif child := os.fork():\n    print(child)\nelse:\n    os.read(os.pipe()[0], 1)"
    )
    result = _steps.run_step(script(code), 60, around)
    assert result["outcome"] == "passed" and has_ended(int(result["last_lines"][0]))


def test_a_step_gets_a_directory_for_temporary_files_which_is_removed(
    around: Surroundings,
) -> None:
    code = "import os, tempfile; print(tempfile.mkstemp()[1]); os.kill(os.getpid(), 9)"
    result = _steps.run_step(script(code), 60, around)
    written = Path(result["last_lines"][0])
    assert not written.parent.exists()


def test_the_report_of_a_step_is_kept_also_when_it_fails(
    around: Surroundings, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    code = f"open({str(report)!r}, 'w').write('{{\"a\": 1}}'); raise SystemExit(1)"
    result = _steps.run_step(script(code, report=report), 60, around)
    assert result["outcome"] == "failed" and result["figures"] == {"a": 1}


# The record


def run_stubs(record: Record, around: Surroundings, codes: dict[str, str], **options: Any) -> Any:
    steps = [Step(name, ("-c", code), 60) for name, code in codes.items()]
    record.begin("stubs", {}, codes)
    return _steps.run_part("stubs", steps, record, budget=options.get("budget", 60), around=around)


READ = "import json, sys; print(json.dumps(json.load(open('record.json'))))"


def test_the_record_is_complete_after_each_step(around: Surroundings, tmp_path: Path) -> None:
    record = Record(tmp_path / "record.json")
    codes = {"first": "print(1)", "second": READ, "third": "print(3)"}
    results = run_stubs(record, around, codes)
    seen = json.loads(results["second"]["last_lines"][0])["parts"]["stubs"]["steps"]
    assert [entry["outcome"] for entry in seen.values()] == ["passed", "not run", "not run"]
    found = steps_in(record.path, "stubs")
    assert [entry["outcome"] for entry in found.values()] == ["passed"] * 3
    assert sorted(tmp_path.iterdir()) == [record.path]


def test_the_next_step_runs_after_one_that_hangs(around: Surroundings, tmp_path: Path) -> None:
    record = Record(tmp_path / "record.json")
    hangs = Step("hangs", ("-c", "import os; os.read(os.pipe()[0], 1)"), 1)
    follows = Step("follows", ("-c", "print('here')"), 60)
    record.begin("stubs", {}, ["hangs", "follows"])
    _steps.run_part("stubs", [hangs, follows], record, budget=100, around=around)
    found = steps_in(record.path, "stubs")
    assert [entry["outcome"] for entry in found.values()] == ["timed out", "passed"]


def test_steps_that_no_longer_fit_are_not_run(
    around: Surroundings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the check stands still but for 50 s that the first step takes."""
    now = iter([0.0, 0.0, 50.0])

    def taken(step: Step, limit: float, around: Surroundings) -> Result:
        return {"outcome": "passed", "why": "", "seconds": 50, "limit": limit}

    monkeypatch.setattr(_steps, "run_step", taken)
    monkeypatch.setattr(_steps.time, "monotonic", lambda: next(now))
    record = Record(tmp_path / "record.json")
    run_stubs(record, around, {"long": "", "late": ""}, budget=53)
    found = steps_in(record.path, "stubs")
    assert found["long"]["limit"] == 53
    assert found["late"] == {"outcome": "not run", "why": "out of time"}


def test_a_later_run_replaces_its_own_steps_and_keeps_the_others(
    around: Surroundings, tmp_path: Path
) -> None:
    path = tmp_path / "record.json"
    run_stubs(Record(path), around, {"a": "print(1)", "b": "print(1)"})
    record = Record(path)
    record.begin("others", {}, ["c"])
    record.put("others", "c", {"outcome": "passed", "why": ""})
    run_stubs(Record(path), around, {"b": "raise SystemExit(1)"})
    assert [e["outcome"] for e in steps_in(path, "stubs").values()] == ["passed", "failed"]
    assert steps_in(path, "others")["c"]["outcome"] == "passed"


def test_a_file_that_is_no_record_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"mine": 1}')
    done = command("--device", "cpu", "--part", "tests", "--only", "nothing", "--json", path)
    assert done.returncode == 1 and "no record" in done.stdout
    assert path.read_text() == '{"mine": 1}'


# The tests as steps


TESTS = """
import os
import pytest

pytestmark = pytest.mark.gpu

def test_short():
    pass

def test_long():
    os.read(os.pipe()[0], 1)

@pytest.mark.skip(reason="it rains")
def test_left_out():
    pass
"""


def options(**changes: Any) -> Any:
    chosen: dict[str, Any] = {"device": "cpu", "scale": 0.01, "test_seconds": 2.0}
    paths: dict[str, Callable[[str], Path]] = {"scratch": Path, "beside": Path}
    return _parts.Options(**(chosen | paths | changes))


@pytest.mark.parametrize(
    ("only", "outcome", "why"),
    [
        ("short or left", "passed", "1 of its tests were skipped"),
        ("long", "timed out", "a test took longer than 2 s"),
        ("left", "skipped", "it rains"),
        ("nothing", "skipped", "no test was selected"),
    ],
)
def test_a_file_of_tests_is_a_step(
    around: Surroundings, tmp_path: Path, only: str, outcome: str, why: str
) -> None:
    """With the hooks of this repository's conftest, which end a test that takes too long."""
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text(
        "from time_limit import pytest_configure, pytest_runtest_protocol\n"
    )
    [step] = [s for s in _parts.test_steps(options()) if s.name == "tests/gpu/test_edges.py"]
    arguments = (*step.command[:-1], "-k", only, str(tmp_path / "test_some.py"))
    tests, seconds = str(Path(__file__).parent), "2" if only == "long" else "60"
    limited = {**around.environment, "TEST_SECONDS": seconds, "PYTHONPATH": tests}
    around = Surroundings(tmp_path, limited, around.say)
    result = _steps.run_step(Step("some", arguments, 60, judge=step.judge), 60, around)
    assert (result["outcome"], result["why"]) == (outcome, why), result["last_lines"]
    if only == "long":
        assert any("test_long" in line for line in result["last_lines"])


def test_all_files_with_tests_for_a_device_are_steps() -> None:
    names = [step.name for step in _parts.test_steps(options())]
    assert names[0] == "tests/gpu/test_edges.py" and len(names) == len(set(names))
    gpu = Path(__file__).parent / "gpu"
    assert {f"tests/gpu/{path.name}" for path in gpu.glob("test_*.py")} < set(names)
    assert "tests/nodes/test_nodes.py" in names and "tests/testing/test_contracts.py" in names


# The command


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_steps_are_what_the_scripts_offer(scripts: None) -> None:
    import _contenders
    import accelerator
    import scenarios

    assert set(_parts.DEVICE_SCENARIOS) == set(accelerator.SCENARIOS)
    assert set(_parts.PEERS) == set(_contenders.PEERS)
    assert set(_parts.SCENARIOS) <= set(scenarios.SCENARIOS)


def test_without_a_device_there_is_nothing_to_check(tmp_path: Path) -> None:
    done = command("--json", tmp_path / "out.json", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stdout == "there is no accelerator here: nothing to check\n"
    assert list(tmp_path.iterdir()) == []


NO_GRAIN = """
import importlib.util as u
found = u.find_spec
u.find_spec = lambda name, *rest: None if name == "grain" else found(name, *rest)
"""


def test_every_part_with_the_cpu_in_place_of_the_device(tmp_path: Path) -> None:
    """A step of each part. One peer is not installed."""
    path = tmp_path / "out.json"
    given = ("--device", "cpu", "--scale", 0.002, "--json", path)
    steps = ("several", "segments", "small files, grain", "small files, pinned copies, 4", "ragged")
    only = [word for name in steps for word in ("--only", name)]
    (tmp_path / "sitecustomize.py").write_text(NO_GRAIN)
    done = command(*given, *only, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert "skipped: needs two CUDA devices" in done.stdout
    assert "3 passed, 2 skipped" in done.stdout
    content = json.loads(path.read_text())
    assert list(content["parts"]) == ["tests", "device", "scenarios", "peers"]
    for part in content["parts"].values():
        assert part["environment"]["versions"]["torch"].startswith(torch.__version__[:4])
    device = steps_in(path, "device")["segments"]
    assert device["figures"]["figures"]["segments"]["8 segments"]["ratio_to_one"] > 0
    assert steps_in(path, "scenarios")["ragged"]["figures"]["complete"]
    measured, missing = sorted(steps_in(path, "peers").values(), key=lambda r: r["outcome"])
    assert measured["figures"]["gpucache_pipes"]["times_as_fast"]["first"] > 0
    assert missing["why"] == "grain is not installed"
    assert content["parts"]["peers"]["not_installed"] == ["grain"]


@linux
def test_a_kill_of_the_check_ends_its_step_and_keeps_the_record(tmp_path: Path) -> None:
    """SIGTERM, as `timeout` sends it, while a step runs."""
    path = tmp_path / "out.json"
    arguments = ["--device", "cpu", "--part", "device", "--only", "warm", "--json", str(path)]
    process = subprocess.Popen(
        [sys.executable, str(BENCHMARKS / "gpu_check.py"), *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = next(line for line in process.stdout if line.startswith("==="))
    assert line == "=== device: warm\n"
    [child] = wait_for_children(process.pid)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert steps_in(path, "device")["warm"] == {
        "outcome": "not run",
        "why": "the check ended before",
    }
    assert has_ended(child)


def wait_for_children(parent: int) -> list[int]:
    while not (found := _steps._descendants(parent)):
        time.sleep(0)
    return found
