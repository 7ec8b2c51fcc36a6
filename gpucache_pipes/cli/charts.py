"""Reports of `cli.plan` as tables, as a text chart and as a picture."""

import os
from collections.abc import Sequence
from typing import Any

from gpucache_pipes.cli.ranks import ranks_as_text
from gpucache_pipes.units import format_bytes, parse_bytes

_MARKS = "●○▲△■□◆◇"
_HEIGHT = 11
"""Lines of the text chart, from 0% to 100%."""


def plan_as_text(report: dict[str, Any]) -> str:
    """A report of `plan` as two tables and a text chart."""
    total = report["feature_bytes"]
    names = list(report["rows"][0]["policies"])
    order = "shuffled" if report["shuffle"] else "in order"
    what = f"{report['files']} files, {format_bytes(total)} of tensors, {order}"
    lines = [f"{what}, {report['epochs']} epochs of which the first is left out"]
    if report["simulated_files"] < report["files"]:
        lines.append(f"(simulated on a sample of {report['simulated_files']} files)")
    lines += ["", "hit rate", *_table(report, names, lambda served: f"{served['hit_rate']:.0%}")]
    lines += ["", "read from files in an epoch"]
    lines += _table(report, names, lambda s: format_bytes(int(s["read_fraction"] * total)))
    lines += ["", *_chart(report, names)]
    if report["tiers"] is not None:
        lines += ["", *_tier_table(report["tiers"])]
    if report["ranks"] is not None:
        lines += ["", ranks_as_text(report["ranks"], total)]
    return "\n".join(lines)


def _tier_table(tiers: dict[str, Any]) -> list[str]:
    """A line for each policy: what each tier serves, and what moves in an epoch."""
    names = tiers["names"]
    sizes = zip(names, tiers["bytes"], strict=True)
    what = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes)
    heads = [*(f"hits {name}" for name in names), *(f"from {name}" for name in names[1:]),
             "from files", "moved down"]  # fmt: skip
    lines = [f"tiers: {what}; bytes of an epoch after the first"]
    lines.append(" ".join([f"{'':>11}", *(f"{head:>11}" for head in heads)]))
    for policy, figures in tiers["policies"].items():
        moved = [*figures["served"][1:], figures["read"], sum(figures["demoted"])]
        cells = [f"{rate:.0%}" for rate in figures["hit_rates"]] + list(map(format_bytes, moved))
        lines.append(" ".join([f"{policy:>11}", *(f"{cell:>11}" for cell in cells)]))
    return lines


def _table(report: dict[str, Any], names: Sequence[str], cell: Any) -> list[str]:
    """A line for each size of the cache, with `cell(figures)` for each policy."""
    lines = [" ".join([f"{'cache':>18}", *(f"{name:>11}" for name in names)])]
    for row in report["rows"]:
        share = row["cache_bytes"] / report["feature_bytes"]
        cells = (f"{cell(row['policies'][name]):>11}" for name in names)
        lines.append(" ".join([f"{format_bytes(row['cache_bytes']):>11} {share:6.0%}", *cells]))
    return lines


def _chart(report: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Hit rate over cache size. Where marks of policies coincide, the first policy is shown."""
    columns = [[" "] * _HEIGHT for _ in report["rows"]]
    for mark, name in reversed(list(zip(_MARKS, names, strict=True))):
        for column, row in zip(columns, report["rows"], strict=True):
            column[round(row["policies"][name]["hit_rate"] * (_HEIGHT - 1))] = mark
    lines = []
    for level in reversed(range(_HEIGHT)):
        points = "".join(f"{column[level]:^6}" for column in columns)
        lines.append(f"{level / (_HEIGHT - 1):5.0%} ┤{points}".rstrip())
    total = report["feature_bytes"]
    shares = "".join(f"{row['cache_bytes'] / total:^6.0%}" for row in report["rows"])
    lines.append("      └" + "─" * len(shares))
    lines.append(f"       {shares}  of the data in the cache")
    lines.append("       " + "  ".join(f"{m} {n}" for m, n in zip(_MARKS, names, strict=True)))
    return lines


def require_matplotlib() -> Any:
    """matplotlib.pyplot, on a backend without a display.

    Raises ImportError, which says what to install, if matplotlib is missing.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError(
            "--plot needs matplotlib: pip install matplotlib; the chart in the terminal needs "
            "nothing"
        ) from error
    mpl.use("agg")
    import matplotlib.pyplot as plt

    return plt


def require_plot(path: str) -> None:
    """Check that a picture can be written to `path`.

    Raises:
        ImportError: matplotlib is missing.
        FileNotFoundError: the directory does not exist.
        ValueError: the name does not end in a format that matplotlib writes.
    """
    kinds = require_matplotlib().figure().canvas.get_supported_filetypes()
    kind = os.path.splitext(path)[1].removeprefix(".")
    if kind not in kinds:
        raise ValueError(f"--plot {path!r}: the name must end in one of {', '.join(sorted(kinds))}")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise FileNotFoundError(f"--plot {path!r}: there is no such directory")


COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
"""Those of Okabe and Ito (2008), which people with any colour vision can tell apart."""

_LINES = ("-", "--", "-.", ":")
_MARKERS = "os^Dv<>P"


def line_style(number: int) -> dict[str, Any]:
    """Colour, dashes and marker of a line, for `Axes.plot`. Eight differ in colour and marker."""
    at = number % len(COLORS)
    return {
        "color": COLORS[at],
        "linestyle": _LINES[at % len(_LINES)],
        "marker": _MARKERS[at],
        "markersize": 4,
        "linewidth": 1.2,
    }


def draw_plan(report: dict[str, Any], path: str) -> None:
    """Draw hit rates and bytes read over cache size.

    Args:
        report: of `plan`.
        path: where to write the picture. Its suffix selects the format.

    Raises:
        ImportError: matplotlib is missing.
    """
    plt = require_matplotlib()
    _, unit = format_bytes(report["feature_bytes"]).split()
    one = parse_bytes("unit", f"1 {unit}")
    sizes = [row["cache_bytes"] / one for row in report["rows"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    total = report["feature_bytes"] / one
    for at, name in enumerate(report["rows"][0]["policies"]):
        served = [row["policies"][name] for row in report["rows"]]
        style: dict[str, Any] = {"label": name, **line_style(at)}
        if name == "clairvoyant":  # the default: on top of those that are level with it
            style |= {"linewidth": 2.5, "zorder": 3}
        left.plot(sizes, [100 * s["hit_rate"] for s in served], **style)
        right.plot(sizes, [s["read_fraction"] * total for s in served], **style)
    left.set(xlabel=f"cache, {unit}", ylabel="hit rate after the first epoch, %", ylim=(0, 100))
    right.set(
        xlabel=f"cache, {unit}", ylabel=f"read from files in an epoch, {unit}", ylim=(0, None)
    )
    for axes in (left, right):
        if report["memory"] <= report["feature_bytes"]:
            axes.axvline(report["memory"] / one, color="grey", linestyle=":")
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=150)
    plt.close(figure)
