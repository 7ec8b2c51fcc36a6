"""Runs the steps of a check, each in a process of its own, whatever becomes of that process.

A step that crashes, hangs or leaves processes behind is recorded, and the next one runs. The
record is a JSON file that is replaced in one operation after each step, so that a kill of the
whole check loses at most the step that was running.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Result = dict[str, Any]
"""What became of a step: "outcome" (one of OUTCOMES), "why", and what the step measured."""

OUTCOMES = ("passed", "failed", "timed out", "skipped", "not run")
BAD = ("failed", "timed out", "not run")
"""Outcomes after which the check as a whole has not succeeded."""

_LEAST_SECONDS = 5.0
"""With less time left, a step is not started."""

_TRACEBACK_SECONDS = 3.0
"""For a Python process that has reached its limit, to print where its threads are."""


@dataclass(frozen=True)
class Step:
    """A command to run.

    Attributes:
        name: unique in its part.
        command: the arguments of Python.
        seconds: the longest it may take.
        report: a JSON file that the command writes. Its content is recorded as "figures". If it
            has the key "skipped", the command has done nothing, for the reason given there.
        judge: completes the result of a command that has ended: see `passed_or_failed`.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    report: Path | None = None
    judge: Callable[[Result, list[str]], None] = field(
        default=lambda result, lines: passed_or_failed(result)
    )


@dataclass(frozen=True)
class Surroundings:
    """What all steps have in common.

    Attributes:
        directory: where the commands run.
        environment: their environment variables.
        say: called with each line that they print.
    """

    directory: Path
    environment: Mapping[str, str]
    say: Callable[[str], None] = print


class Record:
    """The results of all parts, in a JSON file that is complete after each step.

    An existing file is continued: a part that runs again replaces its steps one by one, and other
    parts stay.

    Args:
        path: the file.

    Raises:
        ValueError: the file exists and is no record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"parts": {}}
        if path.exists():
            try:
                self.content = json.loads(path.read_text())
                self.content["parts"].items()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path} is no record of gpu_check, and is not overwritten"
                ) from error

    def begin(self, part: str, environment: dict[str, Any], names: Iterable[str]) -> None:
        """Enter the steps of a part that are still missing as not run."""
        entry = self.content["parts"].setdefault(part, {})
        entry["environment"] = environment
        steps = entry.setdefault("steps", {})
        for name in names:
            steps.setdefault(name, {"outcome": "not run", "why": "the check ended before"})
        self.save()

    def put(self, part: str, name: str, result: Result) -> None:
        """Enter the result of a step, and write the file."""
        self.content["parts"][part]["steps"][name] = result
        self.save()

    def note(self, part: str, **notes: Any) -> None:
        """Enter something about a part as a whole, and write the file."""
        self.content["parts"][part].update(notes)
        self.save()

    def save(self) -> None:
        """Replace the file in one operation."""
        handle, unfinished = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(json.dumps(self.content, indent=1) + "\n")
            Path(unfinished).replace(self.path)
        except BaseException:
            Path(unfinished).unlink(missing_ok=True)
            raise


def run_part(
    part: str,
    steps: Iterable[Step],
    record: Record,
    *,
    budget: float,
    around: Surroundings,
) -> dict[str, Result]:
    """Run the steps of a part one after another until its time is used up.

    Args:
        part: its name in the record, where it has begun.
        steps: what to run.
        record: gets each result as soon as it is known.
        budget: seconds for all steps together.
        around: of the commands.

    Returns:
        The result of each step, by name.
    """
    results = {}
    end = time.monotonic() + budget
    for step in steps:
        left = end - time.monotonic()
        if left < min(_LEAST_SECONDS, step.seconds):
            result: Result = {"outcome": "not run", "why": "out of time"}
        else:
            around.say(f"=== {part}: {step.name}")
            result = run_step(step, min(step.seconds, left), around)
            around.say(f"=== {part}: {step.name}: {text_of(result)}, {result['seconds']} s")
        results[step.name] = result
        record.put(part, step.name, result)
    return results


def run_step(step: Step, limit: float, around: Surroundings) -> Result:
    """Run one step for at most `limit` seconds, and end all processes that it has started.

    Each step has its own directory for temporary files, so that one that is killed leaves none.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        return _run(step, limit, around, {**around.environment, "TMPDIR": scratch})


def _run(step: Step, limit: float, around: Surroundings, environment: Mapping[str, str]) -> Result:
    if step.report is not None:
        step.report.unlink(missing_ok=True)
    start = time.monotonic()
    lines: deque[str] = deque(maxlen=2000)
    process = subprocess.Popen(
        [sys.executable, *step.command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=around.directory,
        env=dict(environment),
        text=True,
        errors="replace",
        start_new_session=True,
    )
    # A thread, since a process that the command leaves behind can hold the pipe open for ever.
    reader = threading.Thread(target=_read, args=(process, lines, around.say), daemon=True)
    reader.start()
    timed_out = False
    below: list[int] = []
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        timed_out = True
        below = _descendants(process.pid)
        # PYTHONFAULTHANDLER makes Python print the stacks of all threads, and end.
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_TRACEBACK_SECONDS)
    finally:
        _end(process, below)
    reader.join(_TRACEBACK_SECONDS)
    if not reader.is_alive():
        assert process.stdout is not None
        process.stdout.close()
    said = list(lines)
    command = " ".join(["python", *step.command])
    if step.report is not None:
        command = command.replace(str(step.report), step.report.name)
    result: Result = {
        "outcome": "passed",
        "why": "",
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": command,
        "exit": process.returncode,
        "seconds": round(time.monotonic() - start, 1),
    }
    if step.report is not None and step.report.exists():
        with contextlib.suppress(ValueError):
            result["figures"] = json.loads(step.report.read_text())
    if timed_out:
        result |= {"outcome": "timed out", "why": f"timed out after {limit:.0f} s"}
    else:
        step.judge(result, said)
    result["last_lines"] = said[-15:] if result["outcome"] not in BAD else said[-100:]
    return result


def passed_or_failed(result: Result) -> None:
    """Derive outcome and reason from the exit status and the report of a command.

    A negative exit status is the number of the signal that has ended the process: a failure.
    """
    code = result["exit"]
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        result |= {"outcome": "failed", "why": f"killed by {name}"}
    elif code:
        result |= {"outcome": "failed", "why": f"exit status {code}"}
    else:
        reason = result.get("figures", {}).get("skipped")
        if reason:
            result |= {"outcome": "skipped", "why": reason}


def text_of(result: Result) -> str:
    """Outcome and reason in a line."""
    return result["outcome"] + (f": {result['why']}" if result["why"] else "")


def _read(
    process: "subprocess.Popen[str]", lines: "deque[str]", say: Callable[[str], None]
) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip())
        say(lines[-1])


def _end(process: "subprocess.Popen[str]", below: list[int]) -> None:
    """Kill what is left of a step: its process, its group, and descendants with their own.

    Args:
        process: of the step.
        below: descendants that were found before the process ended.
    """
    # torchrun starts its workers in sessions of their own, which a signal to the group misses.
    # They must be looked up before the parent dies, when they become children of init.
    others = {*below, *_descendants(process.pid)}
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    _kill(others)
    process.wait()


def end_all() -> None:
    """Kill all processes below this one. For handlers of signals.

    A handler that only raises would leave a step behind whose Popen has not returned yet.
    """
    _kill(_descendants(os.getpid()))


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _descendants(ancestor: int) -> list[int]:
    """The processes below one, where /proc tells; else none."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name, which is in parentheses and may hold anything: state and parent.
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue  # it has ended
        children.setdefault(parent, []).append(int(entry.parent.name))
    found: list[int] = []
    unseen = [ancestor]
    while unseen:
        below = children.get(unseen.pop(), [])
        found += below
        unseen += below
    return found
