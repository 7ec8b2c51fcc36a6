"""Write the tables of docs/benchmarks.md from the reports of `scenarios.py`.

Each table is between two marks, and depends on benchmarks/results/<scenario>.json only. A test
verifies that the page matches the reports.

    python benchmarks/tables.py
"""

import json
import re
from pathlib import Path
from typing import Any

from gpucache_pipes.cli.bench import BASELINE, OURS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
MARKS = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
CASES = {
    "first": "first epoch",
    "later": "later, all cached",
    "partial": "5 epochs, half cached",
    "overlap": "first epoch beside training: total / compute",
}
KINDS = {"ours": "", "peer": "", "format": " (another format)", "limit": " (limit)"}


def table(report: dict[str, Any]) -> str:
    """A table of all contenders, and one of gpucache_pipes against the best peer and the limit."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    contenders = {n: e for n, e in report["contenders"].items() if not e["problem"]}
    left_out = {n: e["problem"] for n, e in report["contenders"].items() if e["problem"]}
    file = f"{report['scenario']}.json"
    source = f"[{file}](../benchmarks/results/{file})"
    lines = [
        f"`{report['command']}`, {report['date']}, {report['rounds']} rounds: {source}.",
        f"{report['system']}, {report['device']}, Python {report['python']}, {versions}.",
        "",
        f"| times as fast as {BASELINE.name} | {' | '.join(CASES.values())} |",
        "|---" * (len(CASES) + 1) + "|",
    ]
    for name, entry in sorted(contenders.items(), key=lambda item: order(item[1])):
        strong = "**" if name == OURS.name else ""
        cells = [cell(entry["cases"][case], case) for case in CASES]
        lines.append(
            f"| {strong}{name}{strong}{KINDS[entry['kind']]} | "
            + " | ".join(f"{strong}{text}{strong}" if text else "" for text in cells)
            + " |"
        )
    lines += ["", "| gpucache_pipes | beside the best that reads the same files | time / limit |"]
    lines.append("|---|---|---|")
    for case, title in CASES.items():
        lines.append(f"| {title} | {best(contenders, case)} | {to_limit(contenders, case)} |")
    lines += [f"\nNot measured: {name}, since {problem}." for name, problem in left_out.items()]
    return "\n".join(lines) + "\n"


def order(entry: dict[str, Any]) -> tuple[int, float]:
    values = entry["cases"]["first"]["times_as_fast"] or entry["cases"]["later"]["times_as_fast"]
    return list(KINDS).index(entry["kind"]), -values[0]


def cell(figures: dict[str, Any], case: str) -> str:
    """Median, least and greatest; for "overlap" the ratio of the time to the compute alone."""
    values = figures["to_limit" if case == "overlap" else "times_as_fast"]
    if values is None:
        return ""
    middle, least, most = (f"{value:.3g}" for value in values)
    return f"{middle} ({least} to {most})"


def best(contenders: dict[str, Any], case: str) -> str:
    """How many times as fast as the fastest peer, which reads the same files."""
    speed = {
        name: entry["cases"][case]["times_as_fast"][0]
        for name, entry in contenders.items()
        if entry["kind"] == "peer" and entry["cases"][case]["times_as_fast"]
    }
    winner = max(speed, key=lambda name: speed[name])
    ratio = contenders[OURS.name]["cases"][case]["times_as_fast"][0] / speed[winner]
    return f"{ratio:.3g} times as fast as {winner}"


def to_limit(contenders: dict[str, Any], case: str) -> str:
    values = contenders[OURS.name]["cases"][case]["to_limit"]
    return f"{values[0]:.2f} ({values[1]:.2f} to {values[2]:.2f})"


def render(page: str) -> str:
    """The page with all tables replaced by those of the reports."""

    def fill(match: re.Match[str]) -> str:
        file = ROOT / "benchmarks" / "results" / f"{match[2]}.json"
        return f"{match[1]}{table(json.loads(file.read_text()))}{match[3]}"

    return MARKS.sub(fill, page)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
