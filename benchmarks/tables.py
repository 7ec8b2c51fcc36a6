"""Write the tables of docs/benchmarks.md and README.md from the reports in benchmarks/results.

Each table is between two marks, and depends on the reports of `scenarios.py` and `aims.py` only. A
test verifies that the pages match the reports. The picture of docs/benchmarks.md is drawn as well.

    python benchmarks/tables.py
"""

import json
import re
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from gpucache_pipes.cli.bench import BASELINE, OURS, Report, draw, headings
from gpucache_pipes.cli.bench.figures import spread
from gpucache_pipes.cli.bench.report import three_digits

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    ROOT / "docs" / "benchmarks.md",
    ROOT / "docs" / "many_gpus.md",
    ROOT / "docs" / "remote.md",
    ROOT / "docs" / "tiers.md",
    ROOT / "README.md",
)
MARKS = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
CASES = {
    "first": "first epoch",
    "later": "later, all cached",
    "partial": "5 epochs, half cached",
    "overlap": "first epoch during training: total / compute",
    "busy": "later, with two busy processes running",
}
KINDS = {"ours": "", "peer": "", "format": " (another format)", "limit": " (limit)"}
GAINS = [
    ("small", "first", "4,000 files of 6 KB: a first epoch"),
    ("small", "later", "later, everything cached"),
    ("busy", "busy", "the same with two busy processes running"),
    ("small", "partial", "five epochs, room for half"),
    ("small", "overlap", "during training: total time / training alone"),
    ("large", "first", "64 files of 4 MB: a first epoch"),
    ("large", "later", "later, everything cached"),
    ("ragged", "later", "4,000 sequences of 8 KB, padded, everything cached"),
    ("ragged-large", "later", "600 sequences of 16 to 260 KB, padded, everything cached"),
]
"""The rows of the README: scenario, case and title."""


def load(name: str) -> Report:
    report: Report = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return report


def source(name: str, report: Report) -> str:
    """Where the figures of a table come from."""
    file = f"[{name}.json](../benchmarks/results/{name}.json)"
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    rounds = f", {report['rounds']} rounds" if "rounds" in report else ""
    return (
        f"`{report['command']}`, {report['date']}{rounds}: {file}.\n"
        f"{report['system']}, {report['device']}, Python {report['python']}, {versions}.\n"
    )


def scenario(name: str) -> str:
    """A table of all contenders, and one of gpucache_pipes against the best peer and the limit."""
    report = load(name)
    contenders = {n: e for n, e in report["contenders"].items() if not e["problem"]}
    cases = {case: CASES[case] for case in headings(report)}
    lines = [
        source(name, report),
        f"| times as fast as {BASELINE.name} | {' | '.join(cases.values())} |",
        "|---" * (len(cases) + 1) + "|",
    ]
    for name, entry in sorted(contenders.items(), key=lambda item: order(item[1])):
        strong = "**" if entry["kind"] == "ours" else ""
        cells = [cell(entry["cases"][case], case) for case in cases]
        lines.append(
            f"| {strong}{name}{strong}{KINDS[entry['kind']]} | "
            + " | ".join(f"{strong}{text}{strong}" if text else "" for text in cells)
            + " |"
        )
    lines += [
        "",
        "| gpucache_pipes | compared with the best that reads the same files | time / limit |",
    ]
    lines.append("|---|---|---|")
    for case, title in cases.items():
        winner, speed = best(report, case)
        ratio = contenders[OURS.name]["cases"][case]["times_as_fast"][0] / speed
        limit = contenders[OURS.name]["cases"][case]["to_limit"]
        compared = f"{three_digits(ratio)} times as fast as {winner}"
        lines.append(f"| {title} | {compared} | {as_spread(limit)} |")
    left_out = {n: e["problem"] for n, e in report["contenders"].items() if e["problem"]}
    lines += [f"\nNot measured: {name}, since {problem}." for name, problem in left_out.items()]
    return "\n".join(lines)


def order(entry: dict[str, Any]) -> tuple[int, float]:
    values = entry["cases"]["first"]["times_as_fast"] or entry["cases"]["later"]["times_as_fast"]
    return list(KINDS).index(entry["kind"]), -values[0]


def as_spread(values: list[float] | None) -> str:
    """Median, least and greatest."""
    if values is None:
        return ""
    middle, least, most = map(three_digits, values)
    return f"{middle} ({least} to {most})"


def cell(figures: dict[str, Any], case: str) -> str:
    """How many times as fast; for "overlap" the ratio of the time to the compute alone."""
    return as_spread(figures["to_limit" if case == "overlap" else "times_as_fast"])


def best(report: Report, case: str) -> tuple[str, float]:
    """The fastest peer, which reads the same files, and how many times as fast it is."""
    speed = {
        name: entry["cases"][case]["times_as_fast"][0]
        for name, entry in report["contenders"].items()
        if entry["kind"] == "peer" and entry["cases"][case]["times_as_fast"]
    }
    winner = max(speed, key=lambda name: speed[name])
    return winner, speed[winner]


def gains() -> str:
    """The table of the README, and a row of ratios to a dict by batch size."""
    titles = (f"times as fast as {BASELINE.name}", "gpucache_pipes",
              "best that reads the same files", "limit")  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|---|---|---|---|"]
    for name, case, title in GAINS:
        report = load(name)
        entries = report["contenders"]
        winner, speed = best(report, case)
        if case == "overlap":
            ours, theirs = (entries[n]["cases"][case]["to_limit"][0] for n in (OURS.name, winner))
            limit: float | None = 1.0
        else:
            ours, theirs = entries[OURS.name]["cases"][case]["times_as_fast"][0], speed
            found = spread(entries[BASELINE.name]["seconds"][case], report["limit_seconds"][case])
            limit = found[0] if found else None
        cells = [three_digits(ours), three_digits(theirs), "" if limit is None else
                 three_digits(limit)]  # fmt: skip
        strong = "**" if (ours < theirs if case == "overlap" else ours > theirs) else ""
        lines.append(
            f"| {title} | {strong}{cells[0]}{strong} | {cells[1]} ({winner}) | {cells[2]} |"
        )
    rows = load("aims")["figures"]["rows"]
    sizes = {
        match[1]: row["value"]
        for row in rows
        if (match := re.fullmatch(r"small, cached, batch (\d+), against a dict", row["title"]))
    }
    lines += ["", f"| batch size | {' | '.join(sizes)} |", "|---" * (len(sizes) + 1) + "|"]
    lines.append("| times as fast as a dict and `torch.stack`, small files, everything cached | "
                 + " | ".join(map(three_digits, sizes.values())) + " |")  # fmt: skip
    return "\n".join(lines)


PACKED = {
    "small": "4,000 files of 6 KB",
    "ragged": "4,000 sequences of 8 KB, padded",
    "large": "64 files of 4 MB",
}


def packed() -> str:
    """First epochs over packed features, of `packed.py`."""
    warm, cold, packing = load("packed"), load("packed-cold"), load("packed-packing")
    names = ["files", "disk cache, stat", "disk cache, never", "packed directory"]
    titles = ["`.pt` files", "disk cache", 'disk cache, check="never"', "packed directory"]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for report, state in ((warm, ""), (cold, ", page cache dropped")):
        for key, title in PACKED.items():
            figures = report["figures"][key]
            cells = [three_digits(figures[name]["ratio"]) for name in names]
            lines.append(f"| {title}{state} | {' | '.join(cells)} |")
    lines.append("\nA first epoch that also fills a disk cache takes this many times as long:\n")
    lines += [f"| | {' | '.join(PACKED.values())} |", "|---" * (len(PACKED) + 1) + "|"]
    for plain, packing_too, title in (
        ("files", "files, packing", "`.pt` files in the page cache"),
        ("load_fn=torch.load", "the same, packing", "`load_fn=torch.load`, 350 us a small file"),
    ):
        found = [packing["figures"][key] for key in PACKED]
        cells = [three_digits(f[packing_too]["seconds"] / f[plain]["seconds"]) for f in found]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", source("packed", warm)])


def remote() -> str:
    """First epochs over object storage, of `object_storage.py`."""
    cases = {
        "10,000 objects of 6 KB": ("small", "small"),
        "5,000 of them, 50 ms a request": ("latency", "small"),
        "64 objects of 64 MB, room for 16": ("large", "large"),
    }
    contenders = {
        "obstore alone, the best number at once": "obstore alone",
        "DataLoader, 8 workers, obstore": "DataLoader, 8 workers, obstore",
        "DataLoader, 8 workers, s3fs": "DataLoader, 8 workers, s3fs",
    }
    lines = [
        f"| takes as many times as long as ours | {' | '.join(contenders)} | ours, CPU an object |"
    ]
    lines.append("|---" * (len(contenders) + 2) + "|")
    for title, (file, kind) in cases.items():
        found = load(f"object_storage-{file}")["cases"][kind]
        cells = []
        for beginning in contenders.values():
            times = [
                entry["times_as_long_as_ours"]
                for name, entry in found.items()
                if name.startswith(beginning)
            ]
            cells.append(three_digits(min(times)) if times else "")
        cpu = found["gpucache_pipes, a first epoch"]["cpu_us"]
        cells.append(f"{cpu:,.0f} us" if cpu < 1e4 else f"{cpu / 1000:,.0f} ms")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sharding() -> str:
    """Hit rates of `sharding.py`, for two sizes of a cache."""
    figures = load("sharding")["figures"]
    ways = {
        "epoch": '"epoch", a cache each',
        "static": '"static", a cache each',
        "shared": '"epoch" and `process_group=`',
    }
    ranks = [*figures["epoch, 5.0%"]]
    lines = [f"| ranks | {' | '.join(ranks)} |", "|---" * (len(ranks) + 1) + "|"]
    for share in ("5.0%", "25.0%"):
        for way, title in ways.items():
            room = f", room for {share.replace('.0', '')} of the data" if way == "epoch" else ""
            rates = [f"{rate:.0%}" for rate in figures[f"{way}, {share}"].values()]
            lines.append(f"| {title}{room} | {' | '.join(rates)} |")
    return "\n".join(lines)


def many_ranks() -> str:
    """What `many_ranks.py` has measured."""
    figures = load("many_ranks")["figures"]
    lines = ["| later epochs | hits | reads of a file in 3 epochs |", "|---|---|---|"]
    for row in figures["hits"]:
        cells = [
            f"**{shared}**, alone {alone}"
            for shared, alone in (
                (f"{row['shared']['hit_rate']:.1%}", f"{row['alone']['hit_rate']:.0%}"),
                (f"{row['shared']['reads_per_file']:.2f}", f"{row['alone']['reads_per_file']:.2f}"),
            )
        ]
        lines.append(
            f"| {row['ranks']} ranks, room for {row['share']:.0%} each | {' | '.join(cells)} |"
        )
    lines += ["", "| | shared / alone |", "|---|---|"]

    def times(title: str, ratios: list[float], what: str) -> None:
        ends = f"{three_digits(min(ratios))} to {three_digits(max(ratios))}"
        middle = three_digits(statistics.median(ratios))
        lines.append(f"| {title} | **{middle}** {what} ({ends}) |")

    times(
        "4 ranks, room for 25% each, files of 4 KiB, 3 ms an open, 8 readers: a later epoch",
        figures["epoch"]["ratios"], "times as fast",
    )  # fmt: skip
    for row in figures["sizes"]:
        title = f"the same with features of {row['KiB']} KiB, files in the page cache"
        times(title, row["ratios"], "times as fast")
    for ranks, row in figures["overhead"].items():
        title = f"{ranks} ranks, everything local and cached, under Lockstep: time of a batch"
        times(title, row["ratios"], "times as long")
    what = "two hosts of 2 ranks, a link of 1 Gb/s, 3 ms an open: seconds of a later epoch"
    lines += ["", f"| {what} | one cache of all | one of each host | alone |", "|---|---|---|---|"]
    for row in load("many_ranks-nodes")["figures"]["nodes"]:
        seconds = [three_digits(statistics.median(t[2:])) for t in row["seconds"].values()]
        lines.append(
            f"| features of {row['KiB']} KiB, room for {row['share']:.0%} each | "
            f"{' | '.join(seconds)} |"
        )
    return "\n".join(lines)


def aims() -> str:
    """The table of `aims.py`; what reaches its aim is bold."""
    report = load("aims")
    return source("aims", report) + "\n" + rows_as_table(report["figures"]["rows"])


def rows_as_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | aim | measured |", "|---|---|---|"]
    for row in rows:
        unit = f" {row['unit']}" if row["unit"] else ""
        aim = ""
        if row["aim"] is not None:
            aim = f"{'at most' if unit else 'at least'} {three_digits(row['aim'])}{unit}"
        strong = "**" if row["reached"] else ""
        value = f"{strong}{three_digits(row['value'])}{unit}{strong}"
        ends = f" ({' to '.join(map(three_digits, row['spread']))})" if row["spread"] else ""
        lines.append(f"| {row['title']} | {aim} | {value}{ends} |")
    return "\n".join(lines)


def render(page: str) -> str:
    """The page with all tables replaced by those of the reports."""
    made = {
        "gains": gains, "aims": aims, "packed": packed, "remote": remote, "sharding": sharding,
        "many_ranks": many_ranks,
    }  # fmt: skip
    return MARKS.sub(lambda m: f"{m[1]}{made.get(m[2], partial(scenario, m[2]))()}\n{m[3]}", page)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(render(page.read_text()))
    draw(load("small"), str(ROOT / "docs" / "bench-small.svg"))
