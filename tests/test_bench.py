"""`python -m gpucache_pipes bench`, and what judges its figures."""

import copy
import json
import os
import signal
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
from gpucache_pipes.cli.bench.collation import Collation, checksum
from gpucache_pipes.cli.bench.contender import Contender, NotApplicableError, Run
from gpucache_pipes.cli.bench.figures import as_json, limit_seconds, spread
from gpucache_pipes.cli.bench.measuring import Measurement, Series
from gpucache_pipes.cli.main import main
from gpucache_pipes.testing import assert_same, features

Files = Callable[..., list[str]]

CPU = torch.device("cpu")
BY_NAME = {contender.name: contender for contender in bench.CONTENDERS}
FAST = ["gpucache_pipes", "DataLoader, 0 workers", "preadv of the bytes",
        "index_select of resident tensors"]  # fmt: skip

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


@pytest.mark.parametrize("kind", KINDS)
def test_all_make_the_same_batches(tmp_path: Path, kind: str) -> None:
    names = [name for name in BY_NAME if not name.endswith(("4 workers", "8 workers"))]
    with bench.Work(write(tmp_path, kind), 4, CPU, epochs=3) as work:
        modes = {"ragged": "pad", "unlike": "list"}
        assert work.collation.mode == modes.get(kind, "stack")
        report = bench.bench(
            work, contenders=[BY_NAME[n] for n in names], rounds=1, overlap=True, progress=False
        )
    problems = {name: entry["problem"] for name, entry in report["contenders"].items()}
    left_out = {name: problem for name, problem in problems.items() if problem}
    formats = ("safetensors files", "one tensordict memory map")
    assert set(left_out) <= {*formats, "index_select of resident tensors"}
    assert all("features" in problem for problem in left_out.values())
    if kind in ("flat", "nested"):
        assert not left_out
    cases = report["contenders"]["gpucache_pipes"]["cases"]
    assert all(cases[case]["times_as_fast"][0] > 0 for case in cases)
    assert 0.3 < report["contenders"]["gpucache_pipes"]["hit_rate"] < 0.7
    assert bench.as_text(report) and bench.advice(report)


def one_more(make: Callable[[Any], Iterator[Any]], name: str = "mine") -> Contender:
    """A contender of which an epoch is `make(its batches)`."""

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
        (swapped, "gives another batch 1 in epoch 0"),
        (one_bit, "gives another batch 1 in epoch 0"),
        (lambda batches: iter(batches[:-1]), "gives another batch 3 in epoch 0"),
        (lambda batches: iter([*batches, batches[0]]), "gives another batch 4 in epoch 0"),
        (lambda batches: iter(1 // len(batches[4:]) for _ in "a"), "ZeroDivisionError"),
    ],
)
def test_who_gives_other_batches_is_not_measured(
    tmp_path: Path, make: Callable[[Any], Iterator[Any]], problem: str
) -> None:
    with bench.Work(write(tmp_path, "flat"), 4, CPU, epochs=2) as work:
        report = bench.bench(
            work, contenders=[one_more(make), bench.BASELINE, bench.OURS], rounds=1, progress=False
        )
    entry = report["contenders"]["mine"]
    assert problem in entry["problem"] and not any(entry["seconds"].values())
    assert f"mine: not measured: {entry['problem']}" in bench.as_text(report)
    assert report["contenders"]["gpucache_pipes"]["cases"]["first"]["times_as_fast"]


def test_who_fails_in_a_round_is_left_out_of_the_others(tmp_path: Path) -> None:
    turns = iter(range(100))

    def make(batches: list[Any]) -> Iterator[Any]:
        if next(turns) == 4:
            raise OSError("the disk is full")
        yield from batches

    with bench.Work(write(tmp_path, "flat"), 4, CPU, epochs=2) as work:
        report = bench.bench(
            work, contenders=[one_more(make), bench.BASELINE], rounds=3, progress=False
        )
    assert report["contenders"]["mine"]["problem"] == "OSError: the disk is full"
    assert len(report["contenders"][bench.BASELINE.name]["seconds"]["first"]) == 3


def test_the_files_are_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").mkdir()
    paths = write(tmp_path / "data", "flat")
    before = {p: (Path(p).read_bytes(), os.stat(p).st_mtime_ns) for p in paths}
    with bench.Work(paths, 4, CPU, epochs=2, cold_storage=True) as work:
        chosen = [*map(BY_NAME.__getitem__, FAST), BY_NAME["one tensordict memory map"]]
        bench.bench(work, contenders=chosen, rounds=1, progress=False)
    assert {p: (Path(p).read_bytes(), os.stat(p).st_mtime_ns) for p in paths} == before
    assert sorted(os.listdir(tmp_path / "data")) == sorted(map(os.path.basename, paths))
    assert not list(
        (tmp_path / "elsewhere").glob("gpucache*")
    )  # what torch leaves there is its own


def test_a_contender_that_is_not_installed(tmp_path: Path) -> None:
    absent = Contender("absent", "peer", bench.BASELINE.run, needs="no_such_package.at_all")
    assert not absent.installed and bench.BASELINE.installed
    with bench.Work(write(tmp_path, "flat"), 4, CPU, epochs=2) as work:
        report = bench.bench(work, contenders=[bench.BASELINE, absent], rounds=1, progress=False)
    assert report["not_installed"] == ["absent"]
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
        # A first epoch that reads all, then four of which half is read and half is gathered.
        expected = [0.5 + 4 * (0.25 + 0.025), 4 + 4 * (2 + 0.25), 0.25 + 4 * (0.125 + 0.05)]
        assert limit_seconds(work, measured, "partial") == pytest.approx(expected)
    cases = report["contenders"][bench.OURS.name]["cases"]
    assert cases["first"]["times_as_fast"] == [9.0, 8.0, 10.0]
    assert cases["first"]["to_limit"] == [2.0, 2.0, 4.0]
    assert cases["later"]["to_limit"] == [2.0, 1.0, 2.0]
    assert cases["first"]["median_seconds"] == 1.0
    assert cases["overlap"] == {"median_seconds": None, "times_as_fast": None, "to_limit": None}
    assert report["rounds"] == 3
    assert spread([], [1.0]) is None
    advice = bench.advice(report, room=1 << 40)
    assert "9 times as fast in a first epoch and 80 times as fast once everything" in advice
    assert "which fit into the 1 TiB" in advice
    assert "would take about 10.9 seconds instead of 15.0 minutes" in advice  # 1 + 99 * 0.1
    assert "--cache" not in advice
    advice = bench.advice(report, room=84)  # of 336
    assert "over 5 epochs with room for 50% of the data" in advice
    assert "There is room for 25% only: see --cache 0.25." in advice
    assert "would take about 100.0 seconds" in advice  # 1 + 99 * (5 - 1) / 4
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
        advice = bench.advice(as_json(work, measured))
    assert "other is faster in a first epoch, 2 times" in advice
    assert "1 times as fast as the best of the others once everything is cached" in advice
    measured.series[bench.OURS.name].problem = "it rained"
    with bench.Work(write(tmp_path, "flat"), 4, CPU) as work:
        assert "gpucache_pipes: it rained" in bench.advice(as_json(work, measured))


@given(st.lists(features(max_leaves=4), min_size=1, max_size=1), st.integers(1, 4))
def test_by_hand_is_what_torch_makes(made: list[Any], count: int) -> None:
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
    """What a checksum is of."""
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


def test_a_sample_is_as_large_as_it_may_be(make_files: Files) -> None:
    paths = make_files(20)
    size = os.stat(paths[0]).st_size
    assert bench.sample(paths, 50, 1 << 30, 0) == paths
    few = bench.sample(paths, 5, 1 << 30, 0)
    assert len(few) == 5 and sorted(few) == few and set(few) < set(paths)
    assert len(bench.sample(paths, 50, 7 * size, 0)) == 7
    assert len(bench.sample(paths, 50, 1, 0)) == 2


# The command


def command(paths: list[str], *options: str) -> list[str]:
    where = str(Path(paths[0]).parent)
    only = [part for name in FAST for part in ("--only", name)]
    sizes = ["--batch-size", "4", "--rounds", "1", "--epochs", "2"]
    return ["bench", where, "--device", "cpu", *sizes, *only, *options]


def test_the_command(make_files: Files, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paths = make_files(12)
    picture = tmp_path / "bars.png"
    assert main(command(paths, "--plot", str(picture), "--overlap", "--cache", "0.25")) == 0
    out = capsys.readouterr().out
    assert out.startswith("12 files") and "2 epochs, 25% cached" in out
    assert "gpucache_pipes is " in out and "preadv of the bytes" in out
    assert picture.read_bytes().startswith(b"\x89PNG")

    assert main(command(paths, "--json", "--files", "8", "--cold-storage")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["complete"] and set(report["contenders"]) == set(FAST)
    assert report["work"]["files"] == 8 and report["work"]["known_files"] == 12
    assert report["command"].startswith("python ") and report["versions"]["torch"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--cache", "0"], "--cache=0.0: a part of the data"),
        (["--rounds", "0"], "--rounds=0"),
        (["--batch-size", "0"], "--batch-size=0"),
        (["--bytes", "many"], "--bytes='many'"),
        (["--only", "grian"], "'grian' is none of the contenders: gpucache_pipes, DataLoader"),
        (["--device", "nothing"], "nothing"),
        (["--plot", "no/such/place.png"], "no such directory"),
        (["--plot", "picture.zzz"], "the name must end in one of"),
    ],
)
def test_bad_options(
    make_files: Files, capsys: pytest.CaptureFixture[str], options: list[str], error: str
) -> None:
    assert main(command(make_files(4), *options)) == 1
    assert error in capsys.readouterr().err


def test_a_file_that_cannot_be_read(make_files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    paths = make_files(4)
    Path(paths[2]).write_bytes(b"")
    assert main(command(paths)) == 1
    error = capsys.readouterr().err
    assert paths[2] in error and "the file is empty" in error and "`inspect`" in error


@pytest.mark.parametrize("options", [["--cache", "0.01"], ["--files", "2", "--bytes", "1"]])
def test_a_cache_of_less_than_a_file(
    make_files: Files, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert main(command(make_files(5), *options)) == 0
    assert "not measured" not in capsys.readouterr().out


def test_one_file(make_files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(make_files(1))) == 0
    assert "batches in an epoch: only 1" in capsys.readouterr().out


def test_a_value_that_is_odd(tmp_path: Path) -> None:
    paths = write(tmp_path, "plain values")
    torch.save({"x": torch.ones(2), "name": "odd", "n": None}, paths[-1])
    with bench.Work(paths, 4, CPU, epochs=2) as work:
        assert work.collation.mode == "list"
        assert work.collation.reason == "values beside tensors are NoneType and int"
        report = bench.bench(
            work, contenders=[bench.OURS, bench.BASELINE], rounds=1, progress=False
        )
    assert not any(entry["problem"] for entry in report["contenders"].values())


def test_an_interrupt_before_there_is_anything(
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
        if next(turns) == 4:  # two to compare, two in the first round
            os.kill(os.getpid(), number)
        yield from batches

    mine = one_more(make)
    monkeypatch.setattr(bench, "choose", lambda names: [bench.OURS, bench.BASELINE, mine])
    assert main([*command(make_files(12)), "--rounds", "5"]) == 130
    out = capsys.readouterr().out
    assert "interrupted: these are the figures so far" in out
    assert "mine" in out and "All 12 files are" in out
    assert signal.getsignal(signal.SIGTERM) is before


# The judge


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))


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
        (judged(5.0, 8.0), 0),  # another machine: the limit is faster there, and nothing else
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


def test_what_is_slower_is_measured_again(
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


def test_the_tables_of_the_page_are_those_of_the_reports(scripts: None) -> None:
    import tables

    page = tables.PAGE.read_text()
    assert page.count("<!-- table: ") == 3
    assert tables.render(page) == page


def test_the_scenarios(scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import scenarios

    short = {
        "quick": scenarios.Scenario(
            lambda where: scenarios.write_ragged(where, 12), 4, 1, scenarios.LIMITS
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
    assert not any(entry["problem"] for entry in report["contenders"].values())


def test_a_limit_that_cannot_be_had_says_why(tmp_path: Path) -> None:
    with (
        bench.Work(write(tmp_path, "unlike"), 4, CPU, epochs=2) as work,
        pytest.raises(NotApplicableError, match="cannot be stacked"),
        BY_NAME["index_select of resident tensors"].open(work, 1.0),
    ):
        pass
