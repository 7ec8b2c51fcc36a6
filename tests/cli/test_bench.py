"""`python -m gpucache_pipes bench`, and the scripts that compare its reports."""

import copy
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import statistics
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import default_collate

from gpucache_pipes import Padded
from gpucache_pipes.cli import bench
from gpucache_pipes.cli.bench import limits, measuring
from gpucache_pipes.cli.bench.beside import busy_processes
from gpucache_pipes.cli.bench.collation import Collation, checksum
from gpucache_pipes.cli.bench.contender import Contender, NotApplicableError, Run
from gpucache_pipes.cli.bench.figures import as_json, limit_seconds, spread
from gpucache_pipes.cli.bench.measuring import CASES, Measurement, Series
from gpucache_pipes.cli.main import main
from gpucache_pipes.testing import assert_same, features

Files = Callable[..., list[str]]

CPU = torch.device("cpu")
BY_NAME = {contender.name: contender for contender in bench.CONTENDERS}
FAST = ["gpucache_pipes", "DataLoader, 0 workers", "preadv of the bytes",
        "index_select of resident tensors"]  # fmt: skip

USUAL = {"first": 1, "later": 1, "partial": 1}
"""The times of a round without options."""

BUILT_IN = [contender for contender in bench.CONTENDERS if contender.needs is None]
OPTIONAL = [contender for contender in bench.CONTENDERS if contender.needs is not None]

KINDS: dict[str, Callable[[int], Any]] = {
    "flat": lambda n: {"x": torch.full((3,), float(n)), "y": torch.tensor(n)},
    "nested": lambda n: {"a": [torch.full((2, 2), n), (torch.ones(1) * n,)], "b": torch.ones(1)},
    "plain values": lambda n: {"x": torch.ones(2) * n, "name": f"file {n}", "n": n},
    "ragged": lambda n: {"x": torch.full((1 + n % 4, 2), float(n)), "y": torch.tensor(n)},
    "unlike": lambda n: {"x": torch.ones(1 + n % 3, 1 + n % 2), f"y{n % 2}": torch.ones(1)},
}


def write(tmp_path: Path, kind: str, count: int = 14) -> list[str]:
    paths = [str(tmp_path / f"{number:02d}.pt") for number in range(count)]
    for number, path in enumerate(paths):
        torch.save(KINDS[kind](number), path)
        os.utime(path, (1, 1))
    return paths


# Why a contender cannot be measured, by the kind of features. All others must be.
NOT_APPLICABLE = {
    ("plain values", "safetensors files"): "the features hold plain values",
    ("plain values", "one tensordict memory map"): "the features hold plain values",
    ("ragged", "one tensordict memory map"): "the features do not have one shape",
    ("unlike", "safetensors files"): "the features do not have one structure",
    ("unlike", "one tensordict memory map"): "the features do not have one shape",
    ("unlike", "index_select of resident tensors"): "the features cannot be stacked",
    ("unlike", "index_select in one thread"): "the features cannot be stacked",
}


def problems_of(report: bench.Report) -> dict[str, str]:
    """The contenders that were not measured, with the reasons."""
    entries = report["contenders"].items()
    return {name: entry["problem"] for name, entry in entries if entry["problem"] is not None}


def rounds_of(report: bench.Report, name: str) -> dict[str, int]:
    """How many times were measured of a contender, by case."""
    measured = report["contenders"][name]["seconds"].items()
    return {case: len(times) for case, times in measured if times}


def check_report(report: bench.Report) -> None:
    """Recompute the ratios of a report from its times, and compare its table with them."""
    text = bench.as_text(report)
    base = report["contenders"][bench.BASELINE.name]["seconds"]
    for name, entry in report["contenders"].items():
        for case, figures in entry["cases"].items():
            times = entry["seconds"][case]
            assert all(time > 0 for time in times)
            ratios = [b / t for b, t in zip(base[case], times, strict=False)]
            limit = [t / n for t, n in zip(times, report["limit_seconds"][case], strict=False)]
            for found, values in ((figures["times_as_fast"], ratios), (figures["to_limit"], limit)):
                if values:
                    expected = [statistics.median(values), min(values), max(values)]
                    assert found == pytest.approx(expected)
                else:
                    assert found is None
        if entry["problem"] is None:
            cases = [entry["cases"][case]["times_as_fast"] for case in bench.headings(report)]
            assert printed(text, name) == [pytest.approx(case, rel=6e-3) for case in cases if case]


def printed(text: str, name: str) -> list[list[float]]:
    """The cells of a row of the table: median, least and greatest."""
    row = re.search(rf"^ *{re.escape(name)} +[\d-].*$", text, re.MULTILINE)
    assert row is not None, f"no row {name!r} in\n{text}"
    number = r"(\d+(?:\.\d+)?(?:e[+-]\d+)?)"
    cells = re.findall(rf"{number} \({number} - {number}\)", row[0])
    return [list(map(float, cell)) for cell in cells]


@pytest.mark.parametrize("kind", KINDS)
def test_all_contenders_make_the_same_batches(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "BUSY_SECONDS", 0)
    contenders = [c for c in BUILT_IN if not c.name.endswith(("4 workers", "8 workers"))]
    with bench.Work(write(tmp_path, kind), 4, CPU, epochs=3) as work:
        modes = {"ragged": "pad", "unlike": "list"}
        assert work.collation.mode == modes.get(kind, "stack")
        report = bench.bench(
            work, contenders=contenders, rounds=1, overlap=True, busy=1, progress=False
        )
    assert problems_of(report) == {n: why for (k, n), why in NOT_APPLICABLE.items()
                                   if k == kind and n in {c.name for c in contenders}}  # fmt: skip
    check_report(report)
    assert list(bench.headings(report)) == list(CASES)
    for contender in contenders:
        if contender.kind != "limit":
            assert rounds_of(report, contender.name) == dict.fromkeys(CASES, 1)
    assert rounds_of(report, "preadv of the bytes") == {"first": 1, "overlap": 1}
    ours = report["contenders"]["gpucache_pipes"]
    assert 0.3 < ours["hit_rate"] < 0.7
    faster = f"{ours['cases']['first']['times_as_fast'][0]:.3g} times as fast in a first epoch"
    assert faster in bench.advice(report)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("contender", OPTIONAL, ids=lambda contender: contender.name)
def test_an_optional_contender_makes_the_same_batches(
    tmp_path: Path, kind: str, contender: Contender
) -> None:
    if not contender.installed:
        pytest.skip(f"{contender.needs} is not installed: pip install '.[bench]'")
    with bench.Work(write(tmp_path, kind), 4, CPU, epochs=3) as work:
        report = bench.bench(
            work, contenders=[bench.BASELINE, contender], rounds=1, overlap=True, progress=False
        )
    reason = NOT_APPLICABLE.get((kind, contender.name))
    assert problems_of(report) == ({} if reason is None else {contender.name: reason})
    assert rounds_of(report, contender.name) == (USUAL | {"overlap": 1} if reason is None else {})
    check_report(report)


@pytest.mark.parametrize("kind", ["nested", "plain values", "ragged"])
def test_the_limit_does_nothing_but_gather(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strings in features made the limit collate them, and 13 times slower than a loader."""
    limit = BY_NAME["index_select of resident tensors"]
    with bench.Work(write(tmp_path, kind), 4, CPU, epochs=2) as work, limit.open(work, 1.0) as run:
        expected = work.expected(1)
        monkeypatch.setattr(Collation, "by_hand", None)
        monkeypatch.setattr(limits, "build", None)
        called = []
        select = torch.index_select
        monkeypatch.setattr(
            torch, "index_select", lambda *args, **out: called.append(select(*args, **out))
        )
        assert [checksum(batch) for batch in run.epoch(1)] == expected
        leaves = len(work.layouts[0].leaves)
    assert len(called) == leaves * len(expected)


def test_the_limit_is_the_faster_one_of_a_round(tmp_path: Path) -> None:
    measured = measurement(
        limit={"later": [3.0, 1.0]}, limit2={"later": [2.0, 4.0]}, limit3={"first": [9.0, 9.0]},
        ours={"later": [4.0, 4.0]},
    )  # fmt: skip
    with bench.Work(write(tmp_path, "flat"), 4, CPU) as work:
        report = as_json(work, measured)
    assert report["limit_seconds"] == {
        "first": [9.0, 9.0], "later": [2.0, 1.0], "busy": [], "overlap": [],
        "partial": limit_seconds(work, measured, "partial"),
    }  # fmt: skip
    assert report["contenders"][bench.OURS.name]["cases"]["later"]["to_limit"] == [3.0, 2.0, 4.0]


def runs(process: int) -> bool:
    """Whether a process exists and has not ended."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat")
        return sys.platform != "linux" or state.read_text().rpartition(") ")[2][0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def ticks(process: int) -> int:
    """Processor time that a process has used."""
    user, system = Path(f"/proc/{process}/stat").read_text().split()[13:15]
    return int(user) + int(system)


def test_busy_processes_are_busy_until_an_interrupt() -> None:
    processes = []

    def interrupted() -> None:
        with busy_processes(2) as started:
            processes.extend(started)
            assert len(set(started)) == 2 and all(map(runs, started))
            for process in started if sys.platform == "linux" else ():
                began = ticks(process)
                while ticks(process) == began:
                    os.sched_yield()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(processes) == 2 and not any(map(runs, processes))


def test_busy_processes_end_with_the_process_that_started_them() -> None:
    script = (
        "import os, signal\n"
        "from gpucache_pipes.cli.bench.beside import busy_processes\n"
        "with busy_processes(2) as processes:\n"
        "    print(*processes, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as killed:
        assert killed.stdout is not None
        processes = [int(word) for word in killed.stdout.readline().split()]
    assert killed.returncode == -signal.SIGKILL and len(processes) == 2
    while any(map(runs, processes)):
        os.sched_yield()


def one_more(make: Callable[[Any], Iterator[Any]], name: str = "mine") -> Contender:
    """A contender whose epochs are `make(batches)`."""

    def run(work: Any, share: float) -> Iterator[Run]:
        yield Run(lambda number: make([work.load_batch(b) for b in work.batches[number]]))

    return Contender(name, "peer", run)


def swapped(batches: list[Any]) -> Iterator[Any]:
    yield from (batches[0], batches[2], batches[1], *batches[3:])


def one_bit(batches: list[Any]) -> Iterator[Any]:
    batches[1]["x"].view(torch.int32)[-1, -1] ^= 1
    yield from batches


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (swapped, "batch 1 of epoch 0 differs from that of torch.load"),
        (one_bit, "batch 1 of epoch 0 differs from that of torch.load"),
        (lambda batches: iter(batches[:-1]), "batch 3 of epoch 0 differs from that of torch.load"),
        (
            lambda batches: iter([*batches, batches[0]]),
            "batch 4 of epoch 0 differs from that of torch.load",
        ),
        (lambda batches: iter({}[number] for number in batches[0]["y"].shape), "KeyError: 4"),
    ],
)
def test_a_contender_with_other_batches_is_not_measured(
    tmp_path: Path, make: Callable[[Any], Iterator[Any]], problem: str
) -> None:
    with bench.Work(write(tmp_path, "flat"), 4, CPU, epochs=2) as work:
        report = bench.bench(
            work, contenders=[one_more(make), bench.BASELINE, bench.OURS], rounds=1, progress=False
        )
    assert problems_of(report) == {"mine": problem}
    assert rounds_of(report, "mine") == {}
    assert f"mine: not measured: {problem}" in bench.as_text(report)
    for name in (bench.BASELINE.name, bench.OURS.name):
        assert rounds_of(report, name) == USUAL
    check_report(report)


def test_a_contender_that_fails_is_left_out_of_later_rounds(tmp_path: Path) -> None:
    turns = iter(range(100))

    def make(batches: list[Any]) -> Iterator[Any]:
        if next(turns) == 4:
            raise OSError("the disk is full")
        yield from batches

    with bench.Work(write(tmp_path, "flat"), 4, CPU, epochs=2) as work:
        report = bench.bench(
            work, contenders=[one_more(make), bench.BASELINE], rounds=3, progress=False
        )
    assert problems_of(report) == {"mine": "OSError: the disk is full"}
    # It made two epochs to be compared and two in the first round, and failed in the second.
    assert rounds_of(report, "mine") == USUAL
    assert rounds_of(report, bench.BASELINE.name)["first"] == report["rounds"] == 3


def test_the_files_are_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensordict", reason="it makes a contender that converts the data")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").mkdir()
    paths = write(tmp_path / "data", "flat")
    before = {p: (Path(p).read_bytes(), os.stat(p).st_mtime_ns) for p in paths}
    with bench.Work(paths, 4, CPU, epochs=2, cold_storage=True) as work:
        chosen = [*map(BY_NAME.__getitem__, FAST), BY_NAME["one tensordict memory map"]]
        report = bench.bench(work, contenders=chosen, rounds=1, progress=False)
    assert problems_of(report) == {} and len(report["contenders"]) == len(chosen)
    assert {p: (Path(p).read_bytes(), os.stat(p).st_mtime_ns) for p in paths} == before
    assert sorted(os.listdir(tmp_path / "data")) == sorted(map(os.path.basename, paths))
    assert not list((tmp_path / "elsewhere").glob("gpucache*"))  # torch may leave files of its own


def test_a_contender_that_is_not_installed(tmp_path: Path) -> None:
    absent = Contender("absent", "peer", bench.BASELINE.run, needs="no_such_package.at_all")
    assert not absent.installed and bench.BASELINE.installed
    with bench.Work(write(tmp_path, "flat"), 4, CPU, epochs=2) as work:
        report = bench.bench(work, contenders=[bench.BASELINE, absent], rounds=1, progress=False)
    assert report["not_installed"] == ["absent"]
    assert list(report["contenders"]) == [bench.BASELINE.name]
    assert "not installed: absent" in bench.as_text(report)


def measurement(**seconds: dict[str, list[float]]) -> Measurement:
    kinds = {"ours": bench.OURS.name, "base": bench.BASELINE.name}
    series = {}
    for name, cases in seconds.items():
        kind = "limit" if name.startswith("limit") else "peer"
        found = Series("ours" if name == "ours" else kind, False)
        found.seconds.update(cases)
        series[kinds.get(name, name)] = found
    return Measurement(series, 0.5)


def test_ratios_are_those_within_a_round(tmp_path: Path) -> None:
    measured = measurement(
        base={"first": [8.0, 80.0, 9.0], "later": [8.0, 80.0, 9.0], "partial": [40.0, 400.0, 45.0]},
        ours={"first": [1.0, 8.0, 1.0], "later": [0.1, 1.0, 0.1], "partial": [4.0, 50.0, 5.0]},
        limit={"first": [0.5, 4.0, 0.25]},
        limit2={"later": [0.05, 0.5, 0.1]},
    )
    with bench.Work(write(tmp_path, "flat"), 4, CPU, epochs=5) as work:
        report = as_json(work, measured)
        # A first epoch that reads everything, then four that read half and gather half.
        expected = [0.5 + 4 * (0.25 + 0.025), 4 + 4 * (2 + 0.25), 0.25 + 4 * (0.125 + 0.05)]
        assert limit_seconds(work, measured, "partial") == pytest.approx(expected)
    cases = report["contenders"][bench.OURS.name]["cases"]
    assert cases["first"]["times_as_fast"] == [9.0, 8.0, 10.0]
    assert cases["first"]["to_limit"] == [2.0, 2.0, 4.0]
    assert cases["later"]["to_limit"] == [2.0, 1.0, 2.0]
    assert cases["first"]["median_seconds"] == 1.0
    assert cases["overlap"] == {"median_seconds": None, "times_as_fast": None, "to_limit": None}
    assert report["rounds"] == 3
    check_report(report)
    assert printed(bench.as_text(report), bench.OURS.name) == [
        [9.0, 8.0, 10.0], [80.0, 80.0, 90.0], [9.0, 8.0, 10.0],
    ]  # fmt: skip
    assert spread([], [1.0]) is None
    advice = bench.advice(report, room=1 << 40)
    assert "9 times as fast in a first epoch and 80 times as fast once everything" in advice
    assert "which fit into the 1 TiB" in advice
    assert "--cache" not in advice
    advice = bench.advice(report, room=84)  # of 336
    assert "over 5 epochs with room for 50% of the data" in advice
    assert "There is room for 25% only: see --cache 0.25." in advice
    for part in report["contenders"].values():
        part["cases"]["partial"]["times_as_fast"] = None
    assert "Too little was measured" in bench.advice(report, room=84)


def test_advice_says_where_another_is_faster(tmp_path: Path) -> None:
    slow = {"first": [2.0], "later": [2.0], "partial": [9.0]}
    measured = measurement(
        base={"first": [2.0], "later": [2.0], "partial": [8.0]},
        ours=slow,
        other={"first": [1.0], "later": [4.0], "partial": [9.0]},
    )
    with bench.Work(write(tmp_path, "flat"), 4, CPU) as work:
        report = as_json(work, measured)
    speeds = {
        name: [entry["cases"][case]["times_as_fast"][0] for case in ("first", "later", "partial")]
        for name, entry in report["contenders"].items()
    }
    assert speeds["other"] == [2.0, 0.5, pytest.approx(8 / 9)]
    assert speeds[bench.OURS.name] == [1.0, 1.0, pytest.approx(8 / 9)]
    advice = bench.advice(report)
    assert "other is faster in a first epoch, 2 times" in advice
    assert "1 times as fast as the best of the others once everything is cached" in advice
    measured.series[bench.OURS.name].problem = "it rained"
    with bench.Work(write(tmp_path, "flat"), 4, CPU) as work:
        assert "gpucache_pipes: it rained" in bench.advice(as_json(work, measured))


@given(st.lists(features(max_leaves=4), min_size=1, max_size=1), st.integers(1, 4))
def test_collation_by_hand_equals_that_of_torch(made: list[Any], count: int) -> None:
    batch = made * count
    hand = Collation("stack")
    try:
        expected = default_collate(batch)
    except (TypeError, RuntimeError):
        return
    got = hand.by_hand(batch)
    assert checksum(got) == checksum(expected)


def test_padding_by_hand() -> None:
    padded = Collation("pad", frozenset({"the feature"})).by_hand(
        [torch.ones(2, 3), torch.ones(1, 3)]
    )
    assert isinstance(padded, Padded)
    assert_same(padded.values, torch.tensor([[[1.0] * 3] * 2, [[1.0] * 3, [0.0] * 3]]))
    assert padded.lengths.tolist() == [2, 1] and padded.mask.tolist() == [[True] * 2, [True, False]]


def normal(item: Any) -> Any:
    """What a checksum covers, as plain values."""
    if isinstance(item, torch.Tensor):
        # Not view(-1): a tensor of one element is contiguous whatever its stride.
        flat = item.contiguous().as_strided((item.numel(),), (1,))
        return (str(item.dtype), tuple(item.shape), flat.view(torch.uint8).tolist())
    if isinstance(item, dict):
        return {"dict": [(repr(key), normal(value)) for key, value in item.items()]}
    return list(map(normal, item)) if isinstance(item, (list, tuple)) else repr(item)


@given(st.data(), features(max_leaves=4))
def test_checksums_tell_batches_apart(data: st.DataObject, one: Any) -> None:
    other = data.draw(st.one_of(features(max_leaves=4), st.just(copy.deepcopy(one))))
    assert (checksum(one) == checksum(other)) == (normal(one) == normal(other))


def test_a_sample_is_as_large_as_the_limits_allow(make_files: Files) -> None:
    paths = make_files(20)
    size = os.stat(paths[0]).st_size
    assert bench.sample(paths, 50, 1 << 30, 0) == paths
    few = bench.sample(paths, 5, 1 << 30, 0)
    assert len(few) == 5 and sorted(few) == few and set(few) < set(paths)
    assert len(bench.sample(paths, 50, 7 * size, 0)) == 7
    assert len(bench.sample(paths, 50, 1, 0)) == 2


# The command

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="--plot needs matplotlib"
)


def command(paths: list[str], *options: str) -> list[str]:
    where = str(Path(paths[0]).parent)
    only = [part for name in FAST for part in ("--only", name)]
    sizes = ["--batch-size", "4", "--rounds", "1", "--epochs", "2"]
    return ["bench", where, "--device", "cpu", *sizes, *only, *options]


def test_the_command_prints_a_table(make_files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(make_files(12), "--overlap", "--cache", "0.25")) == 0
    out = capsys.readouterr().out
    assert out.startswith("12 files, 480 B of tensors")
    assert "2 epochs, 25% cached" in out
    assert f"batches in an epoch: only {12 // 4}" in out
    cells = {name: len(printed(out, name)) for name in FAST}
    assert cells == {
        "gpucache_pipes": 4, "DataLoader, 0 workers": 4, "preadv of the bytes": 2,
        "index_select of resident tensors": 1,
    }  # fmt: skip
    [(first, *_), (later, *_), *_] = printed(out, "gpucache_pipes")
    speeds = f"{first:.3g} times as fast in a first epoch and {later:.3g} times as fast once"
    assert f"gpucache_pipes is {speeds} everything is cached" in out
    assert {row[0] for row in printed(out, bench.BASELINE.name)} == {1.0}


@pytest.mark.parametrize(
    ("options", "share", "files", "more"),
    [
        (["--overlap", "--cache", "0.25", "--busy", "1"], 0.25, 12, {"overlap": 1, "busy": 1}),
        (["--files", "8", "--cold-storage"], 0.5, 8, {}),
        (["--files", "8", "--readers", "2"], 0.5, 8, {}),
    ],
)
def test_the_command_prints_json(
    make_files: Files,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    share: float,
    files: int,
    more: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measuring, "BUSY_SECONDS", 0)
    assert main(command(make_files(12), "--json", *options)) == 0
    report = json.loads(capsys.readouterr().out)
    check_report(report)
    report_readers = (2,) if "--readers" in options else (1, 4, 16) if len(options) == 3 else ()
    assert report["complete"] is True and report["share"] == share and report["rounds"] == 1
    readers = {f"gpucache_pipes, reader_threads={n}" for n in report_readers}
    assert set(report["contenders"]) == set(FAST) | readers and problems_of(report) == {}
    assert rounds_of(report, "gpucache_pipes") == USUAL | more
    for name in readers:
        assert rounds_of(report, name) == {"first": 1, "partial": 1}
    limit = rounds_of(report, "index_select of resident tensors")
    assert limit == {case: 1 for case in ("later", "busy") if case in USUAL | more}
    work = report["work"]
    assert (work["files"], work["known_files"], work["batches"]) == (files, 12, files // 4)
    assert (work["batch_size"], work["epochs"], work["device"]) == (4, 2, "cpu")
    assert work["cold_storage"] is ("--cold-storage" in options)
    assert work["example"] == {"['feature']": "float32[8]", "['label']": "int64[1]"}
    assert report["command"].startswith("python ")
    assert report["versions"]["torch"] == importlib.metadata.version("torch")


def test_several_batch_sizes(
    make_files: Files, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    paths = make_files(12)
    several = command(paths, "--batch-size", "3,6")  # and 4
    assert main([*several, "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [report["work"]["batch_size"] for report in reports] == [4, 3, 6]
    assert [report["work"]["batches"] for report in reports] == [3, 4, 2]
    for report in reports:
        check_report(report)
    pictures = []
    if importlib.util.find_spec("matplotlib") is not None:
        pictures = ["--plot", str(tmp_path / "bars.svg")]
    assert main([*several, *pictures]) == 0
    out = capsys.readouterr().out
    for size in (4, 3, 6):
        assert f"batches of {size}, on cpu" in out
        assert not pictures or (tmp_path / f"bars-{size}.svg").stat().st_size
    assert len(re.findall(r"^gpucache_pipes +\d", out, re.MULTILINE)) == 3


def test_the_command_draws_a_picture(
    make_files: Files, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    picture = tmp_path / "bars.png"
    assert main(command(make_files(12), "--plot", str(picture), "--overlap")) == 0
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    # Four panels of 3.2 inches and two bars of 0.32, with margins, at 150 dots per inch.
    assert struct.unpack(">II", content[16:24]) == (2295, 216)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--cache", "0"], "--cache=0.0: a part of the data"),
        (["--rounds", "0"], "--rounds=0 must be a positive whole number"),
        (["--batch-size", "8,0"], "--batch-size=0 must be a positive whole number"),
        (["--busy", "-1"], "--busy=-1 must be a whole number of at least 0"),
        (["--files", "1"], "--files=1 must be a whole number of at least 2"),
        (["--bytes", "many"], "--bytes='many' is not a size in bytes"),
        (["--only", "grian"], "'grian' is none of the contenders: gpucache_pipes, GPUCollator"),
        (["--device", "nothing"], "--device 'nothing' is not a device"),
        pytest.param(["--plot", "no/such/place.png"], "no such directory", marks=needs_matplotlib),
        pytest.param(
            ["--plot", "picture.zzz"], "the name must end in one of", marks=needs_matplotlib
        ),
    ],
)
def test_bad_options(
    make_files: Files, capsys: pytest.CaptureFixture[str], options: list[str], error: str
) -> None:
    paths = make_files(4)
    assert main(command(paths, *options)) == 1
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith(f"{Path(paths[0]).parent}: ") and error in captured.err


def test_a_file_that_cannot_be_read(make_files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    paths = make_files(4)
    Path(paths[2]).write_bytes(b"")
    assert main(command(paths)) == 1
    captured = capsys.readouterr()
    assert not captured.out
    for part in (paths[2], "the file is empty", "`inspect`"):
        assert part in captured.err


@pytest.mark.parametrize(
    ("options", "files", "share"),
    [(["--cache", "0.01"], 5, 0.01), (["--files", "2", "--bytes", "1"], 2, 0.5)],
)
def test_a_cache_of_less_than_a_file(
    make_files: Files,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    files: int,
    share: float,
) -> None:
    assert main(command(make_files(5), "--json", *options)) == 0
    report = json.loads(capsys.readouterr().out)
    assert problems_of(report) == {}
    assert report["work"]["files"] == files and report["share"] == share
    assert rounds_of(report, "gpucache_pipes")["partial"] == 1
    check_report(report)


def test_one_file(make_files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(make_files(1), "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["work"]["files"] == report["work"]["batches"] == 1
    assert problems_of(report) == {}
    check_report(report)
    assert "batches in an epoch: only 1" in bench.as_text(report)


def test_plain_values_of_different_types(tmp_path: Path) -> None:
    paths = write(tmp_path, "plain values")
    torch.save({"x": torch.ones(2), "name": "odd", "n": None}, paths[-1])
    with bench.Work(paths, 4, CPU, epochs=2) as work:
        assert work.collation.mode == "list"
        assert work.collation.reason == "plain values are NoneType and int"
        report = bench.bench(
            work, contenders=[bench.OURS, bench.BASELINE], rounds=1, progress=False
        )
    assert problems_of(report) == {}
    assert report["work"]["reason"] == work.collation.reason
    assert f"batches are lists of features: {work.collation.reason}" in bench.as_text(report)


def test_an_interrupt_before_the_measurement(
    make_files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "Work", interrupted)
    assert main(command(make_files(2))) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_partial_table(
    make_files: Files,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    turns = iter(range(100))

    def make(batches: list[Any]) -> Iterator[Any]:
        if next(turns) == 4:  # two epochs to compare, two in the first round
            os.kill(os.getpid(), number)
        yield from batches

    mine = one_more(make)
    monkeypatch.setattr(bench, "choose", lambda names: [bench.OURS, bench.BASELINE, mine])
    run = [*command(make_files(12)), "--rounds", "5"]
    assert main(run) == 130
    out = capsys.readouterr().out
    assert "interrupted: these are the figures so far" in out
    assert len(printed(out, "mine")) == 3 and "All 12 files are" in out
    assert signal.getsignal(signal.SIGTERM) is before

    turns = iter(range(100))
    assert main([*run, "--json"]) == 130
    report = json.loads(capsys.readouterr().out)
    assert report["complete"] is False and problems_of(report) == {}
    assert rounds_of(report, "mine") == USUAL
    for name in (bench.OURS.name, bench.BASELINE.name):
        assert 1 <= rounds_of(report, name)["first"] <= 2
    check_report(report)
    assert signal.getsignal(signal.SIGTERM) is before


# The comparison of reports


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def judged(to_limit: float, times_as_fast: float, problem: str | None = None) -> dict[str, Any]:
    nothing = {"to_limit": None, "times_as_fast": None}
    case = {"to_limit": [to_limit, 0, 9], "times_as_fast": [times_as_fast, 0, 9]}
    cases = {"first": case, "overlap": nothing}
    work = {"files": 4, "feature_bytes": 9, "batch_size": 2, "epochs": 5, "device": "cpu"}
    return {
        "scenario": "quick", "complete": True, "share": 0.5, "work": work,
        "contenders": {bench.OURS.name: {"problem": problem, "cases": cases}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (judged(4.0, 8.0), 0),
        (judged(4.7, 7.0), 0),
        (judged(5.0, 6.0), 1),
        (judged(5.0, 8.0), 0),  # another machine, where only the limit is faster
        (judged(4.0, 6.0), 0),
        (judged(1.0, 80.0), 0),
        (judged(4.0, 8.0, problem="it rained"), 2),
        ({"contenders": {}}, 2),
        ({**judged(4.0, 8.0), "scenario": "large"}, 2),
        ({**judged(4.0, 8.0), "complete": False}, 2),
        ({**judged(4.0, 8.0), "work": {**judged(4.0, 8.0)["work"], "batch_size": 3}}, 2),
    ],
)
def test_the_check(scripts: None, tmp_path: Path, head: dict[str, Any], status: int,
                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    import check

    files = [tmp_path / "base.json", tmp_path / "head.json"]
    for file, report in zip(files, (judged(4.0, 8.0), head), strict=True):
        file.write_text(json.dumps(report))
    monkeypatch.setattr(sys, "argv", ["check.py", *map(str, files)])
    assert check.main() == status


def test_a_slower_case_is_measured_again(
    scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import check

    base = tmp_path / "base.json"
    base.write_text(json.dumps(judged(4.0, 8.0)))
    monkeypatch.setattr(sys, "argv", ["check.py", str(base)])
    for slow, status in ((2, 0), (3, 1)):
        reports = iter([*[judged(8.0, 4.0)] * slow, judged(4.0, 8.0)])
        monkeypatch.setattr(check, "measure", lambda name, reports=reports: next(reports))
        assert check.main() == status
        assert len(list(reports)) == (1 if status else 0)


def test_the_tables_of_the_pages_match_the_reports(scripts: None) -> None:
    import scenarios
    import tables

    found = []
    for path in tables.PAGES:
        page = path.read_text()
        found += [match[2] for match in tables.MARKS.finditer(page)]
        assert tables.render(page) == page
    made = {"aims", "gains", "many_ranks", "packed", "remote", "sharding"}
    assert set(found) == {*scenarios.SCENARIOS, *made} - {"quick"}


def test_two_thousand_files_as_if_they_were_a_million(
    scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import million

    out = tmp_path / "out.json"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["million.py", "--files", "2000", "--json", str(out)])
    million.main()
    assert list(tmp_path.iterdir()) == [out]  # the links are removed
    figures = json.loads(out.read_text())["figures"]
    times = ("listing_seconds", "first_batch_seconds", "first_epoch_us", "warm_epoch_us")
    assert all(figures[name] > 0 for name in times)
    for policy in ("clairvoyant", "keep"):
        # Each file once an epoch: of two epochs at most what fits is a hit.
        served = figures[f"room for 40%, {policy}"]
        assert 0.9 * 1600 < served["hits"] <= 1600
    assert served["evictions"] == 0
    nbytes = figures["bytes_a_file"]
    assert len("0000000.pt") < nbytes["paths"] < 1000
    assert nbytes["store"] > 0 and nbytes["link"] > 0


def test_a_million_files_must_all_be_cached(
    scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import million

    links = million.link_files(tmp_path, 600, width=1024)  # 4 KB, where 1 KB is expected
    monkeypatch.setattr(million, "WARM_EPOCHS", 1)
    with pytest.raises(RuntimeError, match="not all of 600 files were cached"):
        million.speed(links, 600)


def test_the_python_of_a_batch(scripts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import overhead

    monkeypatch.setattr(overhead, "FILES", 2048)
    figures = overhead.measure(rounds=3)
    for size in overhead.SIZES:
        part = figures[f"batch {size}"]
        assert part["next"] - part["gather"] == pytest.approx(part["ours"])
    # A straight line through three points passes through their middle.
    middle = statistics.mean(figures[f"batch {size}"]["ours"] for size in overhead.SIZES)
    line = figures["batch"] + figures["file"] * statistics.mean(overhead.SIZES)
    assert line == pytest.approx(middle)
    assert figures["epoch, a file"] * 2048 > figures["batch 256"]["ours"]


def test_the_aims(
    scripts: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import aims

    tiny = aims.Options(scale=0.004, rounds=1)  # of 16 files
    monkeypatch.setattr(aims, "Options", lambda *options: tiny)
    monkeypatch.setattr(measuring, "BUSY_SECONDS", 0)
    monkeypatch.setattr(aims.overhead, "measure", lambda rounds: {"batch": 10.0, "file": 0.5})
    room = {"hits": 9, "evictions": 3}
    many = {
        "listing_seconds": 1.0, "first_batch_seconds": 2.0, "warm_epoch_us": 0.5,
        "room for 40%, clairvoyant": room, "room for 40%, keep": {**room, "hits": 5},
        "bytes_a_file": {"store": 130.0, "plan": 20.0, "link": 50.0},
    }  # fmt: skip
    monkeypatch.setattr(aims.million, "measure", lambda count: many)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["aims.py", "--json", str(out)])
    aims.main()
    rows = json.loads(out.read_text())["figures"]["rows"]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == len(rows) + 1 == 26
    by_title = {row["title"]: row for row in rows}
    assert len(by_title) >= len(rows) - 3  # the batches of 32, 256 and 1,024 are of 8 files here
    for row in [*rows[:9], *rows[10:16]]:
        least, most = row["spread"]
        assert 0 < least <= row["value"] <= most and not row["unit"]
        assert row["reached"] is (row["value"] >= row["aim"])
    assert by_title["Python of a cached batch"]["reached"] is True
    assert by_title["and of each of its files"]["reached"] is False
    assert by_title["1,000,000 files: listing"]["reached"] is False  # it has no aim
    # Each eviction should bring a hit more than "keep" has: 3 evictions, 4 hits more.
    assert rows[-1]["reached"] is True and rows[-1]["aim"] == 4
    assert rows[9]["unit"] == "times" and rows[9]["value"] > 0
    assert table[17] == "| Python of a cached batch | at most 15 us | **10 us** |"
    assert table[18] == "| and of each of its files | at most 0.02 us | 0.5 us |"


def test_the_scenarios(scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import scenarios

    short = {
        "quick": scenarios.Scenario(
            lambda where, scale: scenarios.write_ragged(where, scenarios.log_normal(12)),
            4,
            1,
            scenarios.LIMITS,
        )
    }
    monkeypatch.setattr(scenarios, "SCENARIOS", short)
    out = tmp_path / "out.json"
    monkeypatch.setattr(
        sys, "argv", ["scenarios.py", "quick", "--device", "cpu", "--json", str(out)]
    )
    assert scenarios.main() == 0
    report = json.loads(out.read_text())
    assert report["scenario"] == "quick" and report["work"]["collation"] == "pad"
    assert report["work"]["files"] == 12 and report["rounds"] == 1
    assert problems_of(report) == {}
    assert len(report["contenders"]) == 5  # two limits begin with "index_select"
    check_report(report)


def test_a_limit_that_does_not_apply_says_why(tmp_path: Path) -> None:
    with (
        bench.Work(write(tmp_path, "unlike"), 4, CPU, epochs=2) as work,
        pytest.raises(NotApplicableError, match="cannot be stacked"),
        BY_NAME["index_select of resident tensors"].open(work, 1.0),
    ):
        pass
