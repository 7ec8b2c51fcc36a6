"""A report of a measurement as a table, a picture and a summary in sentences."""

from collections.abc import Sequence

from gpucache_pipes.cli.bench.contender import KINDS
from gpucache_pipes.cli.bench.figures import Report, spread
from gpucache_pipes.cli.bench.loaders import BASELINE, OURS
from gpucache_pipes.cli.charts import COLORS, require_matplotlib
from gpucache_pipes.units import format_bytes

_FEW = 4
"""With fewer batches in an epoch, the text says that the times mean little."""


def headings(report: Report) -> dict[str, str]:
    """The cases that were measured, with their column titles."""
    named = {
        "first": "first epoch",
        "later": "later, all cached",
        "partial": f"{report['work']['epochs']} epochs, {report['share'] or 0:.0%} cached",
        "overlap": "first, with compute",
        "busy": f"later, {report['busy']} busy processes",
    }
    measured = [e["cases"] for e in report["contenders"].values()]
    return {c: name for c, name in named.items() if any(e[c]["times_as_fast"] for e in measured)}


def as_text(report: Report) -> str:
    """A table of ratios, followed by remarks: hit rates, and what was not measured and why."""
    cases = headings(report)
    contenders = report["contenders"]
    lines = [f"times as fast as {BASELINE.name}: median, least and most of the rounds", ""]
    if not cases:
        return "nothing was measured"
    lines.append(f"{'':34}" + "".join(f"{name:>24}" for name in cases.values()))
    for kind, title in KINDS.items():
        rows = {n: e for n, e in contenders.items() if e["kind"] == kind and not e["problem"]}
        if not rows:
            continue
        if kind != "ours":
            lines.append(f"{title}:")
        for name, entry in sorted(rows.items(), key=lambda row: _order(row[1], cases)):
            cells = [_cell(entry["cases"][case]["times_as_fast"]) for case in cases]
            indent = "" if kind == "ours" else "  "
            lines.append(f"{indent + name:34}" + "".join(f"{cell:>24}" for cell in cells))
    if OURS.name in contenders:
        to_limit = [_cell(contenders[OURS.name]["cases"][case]["to_limit"]) for case in cases]
        lines += [
            "",
            f"{'time of gpucache_pipes / limit':34}" + "".join(f"{c:>24}" for c in to_limit),
        ]
    base = contenders.get(BASELINE.name, {"cases": {}})["cases"]
    seconds = [f"{base[c]['median_seconds']:.3g} s" if base.get(c) else "" for c in cases]
    lines.append(f"{BASELINE.name:34}" + "".join(f"{cell:>24}" for cell in seconds))
    lines += _remarks(report)
    return "\n".join(lines)


def _cell(values: Sequence[float] | None) -> str:
    if values is None:
        return "-"
    middle, least, most = map(three_digits, values)
    return f"{middle} ({least} - {most})"


def three_digits(value: float) -> str:
    """A number with at least three significant digits, and without an exponent if it is large.

    >>> three_digits(0.12345), three_digits(2360.4)
    ('0.123', '2360')
    """
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _order(entry: Report, cases: dict[str, str]) -> float:
    values = [entry["cases"][case]["times_as_fast"] for case in cases]
    return -max((value[0] for value in values if value), default=0.0)


def _remarks(report: Report) -> list[str]:
    lines = []
    for name, entry in report["contenders"].items():
        if entry["problem"]:
            lines.append(f"{name}: not measured: {entry['problem']}")
        if entry["hit_rate"] is not None and not entry["problem"]:
            lines.append(
                f"{name}: with room for {report['share']:.0%} of the data, "
                f"{entry['hit_rate']:.1%} came from memory after the first epoch"
            )
    if report["not_installed"]:
        lines.append(f"not installed: {', '.join(report['not_installed'])}")
    if report["work"]["collation"] == "list":
        lines.append(f"batches are lists of features: {report['work']['reason']}")
    if report["work"]["batches"] < _FEW:
        lines.append(
            f"batches in an epoch: only {report['work']['batches']}. A smaller --batch-size, or "
            "more --files and --bytes, say more"
        )
    if not report["complete"]:
        lines.append("interrupted: these are the figures so far")
    return ["", *lines] if lines else []


def advice(report: Report, room: int | None = None) -> str:
    """A summary in sentences, including where another loader is faster.

    Args:
        report: of `bench`.
        room: bytes of the device that a cache could use; None means enough for all files.
    """
    ours = report["contenders"].get(OURS.name, {"problem": "it was left out"})
    if ours["problem"]:
        return f"Nothing can be said of gpucache_pipes: {ours['problem']}."
    work, share = report["work"], report["share"]
    data = work["feature_bytes"] * work["known_files"] // work["files"]
    fits = room is None or data <= room
    later = "later" if fits else "partial"
    named = {
        "first": "in a first epoch",
        "later": "once everything is cached",
        "partial": f"over {work['epochs']} epochs with room for {share:.0%} of the data",
    }
    told = {case: named[case] for case in ("first", later) if ours["cases"][case]["times_as_fast"]}
    if len(told) < 2:
        return f"Too little was measured to compare gpucache_pipes with {BASELINE.name}."
    lines = [f"All {work['known_files']} files are {format_bytes(data)} of tensors"]
    if room is not None:
        there = f"{format_bytes(room)} that are free on {work['device']}"
        lines[0] += f", which fit into the {there}" if fits else f", more than the {there}"
    speeds = (f"{three_digits(ours['cases'][c]['times_as_fast'][0])} times as fast {n}"
              for c, n in told.items())  # fmt: skip
    lines[0] += "."
    lines.append(f"gpucache_pipes is {' and '.join(speeds)} as {BASELINE.name}.")
    lines += [_against_the_best(report, case, name) for case, name in told.items()]
    if room is not None and not fits and room < 0.95 * share * data:
        lines.append(f"There is room for {room / data:.0%} only: see --cache {room / data:.2g}.")
    return " ".join(line for line in lines if line)


def _against_the_best(report: Report, case: str, when: str) -> str:
    """A sentence that compares gpucache_pipes with the fastest other loader, even if that wins."""
    others = {
        name: entry["cases"][case]["times_as_fast"][0]
        for name, entry in report["contenders"].items()
        if entry["kind"] in ("peer", "format") and entry["cases"][case]["times_as_fast"]
    }
    if not others:
        return ""
    best = max(others, key=lambda name: others[name])
    ratio = report["contenders"][OURS.name]["cases"][case]["times_as_fast"][0] / others[best]
    if ratio >= 1:
        return f"That is {ratio:.2g} times as fast as the best of the others {when}, {best}."
    return f"{best} is faster {when}, {1 / ratio:.2g} times: if that is what you need, take it."


def draw(report: Report, path: str) -> None:
    """Draw a bar for each contender and case, with the limits.

    Args:
        report: of `bench`.
        path: where to write the picture. Its suffix selects the format.

    Raises:
        ImportError: matplotlib is missing.
    """
    plt = require_matplotlib()
    cases = headings(report)
    colors = {"ours": COLORS[0], "peer": COLORS[7], "format": COLORS[5]}
    shown = {n: e for n, e in report["contenders"].items() if e["kind"] in colors}
    shown = {n: e for n, e in shown.items() if not e["problem"]}
    names = list(reversed(shown))
    figure, panels = plt.subplots(
        1, len(cases), figsize=(2.5 + 3.2 * len(cases), 0.8 + 0.32 * len(names)),
        sharey=True, layout="constrained", squeeze=False,
    )  # fmt: skip
    for axes, (case, title) in zip(panels[0], cases.items(), strict=True):
        for row, name in enumerate(names):
            values = shown[name]["cases"][case]["times_as_fast"]
            if values is None:
                continue
            middle, least, most = values
            # From the baseline on, to the left where it is faster.
            axes.barh(row, middle - 1, left=1, color=colors[shown[name]["kind"]],
                      xerr=[[middle - least], [most - middle]])  # fmt: skip
            # In a column of their own, away from bars and limit.
            axes.annotate(three_digits(middle), (1.01, row), xycoords=("axes fraction", "data"),
                          va="center", fontsize=8)  # fmt: skip
        axes.axvline(1, color="black", linewidth=0.8)
        limit = _limit(report, case)
        if limit is not None:
            axes.axvline(limit, color=COLORS[1], linestyle="--")
            title += f"\n(dashed: the limit, {three_digits(limit)})"
        axes.set(xscale="log", yticks=range(len(names)), yticklabels=names)
        axes.set_title(title, fontsize=10)
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(axis="x", alpha=0.3)
    figure.supxlabel(f"times as fast as {BASELINE.name} (logarithmic)", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _limit(report: Report, case: str) -> float | None:
    """How many times as fast as the baseline the limit is; None if the limit is unknown."""
    base = report["contenders"][BASELINE.name]["seconds"][case]
    found = spread(base, report["limit_seconds"][case])
    return None if found is None else found[0]
