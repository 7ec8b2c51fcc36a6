"""Draw the ranges of a trace, thread by thread, as an SVG.

To make the picture in docs/tracing.md:

    python examples/profile_pipeline.py features/ trace.json
    python benchmarks/draw_trace.py trace.json docs/trace.svg
"""

import argparse
import json
from pathlib import Path
from typing import Any

COLOURS = {
    "gpucache::read": "#5b8def",
    "gpucache::upload": "#8f6fd6",
    "gpucache::wait": "#d9534f",
    "gpucache::gather": "#2e9e6b",
    "training step": "#e0a030",
}
WIDTH, LEFT, LANE = 900, 110, 46


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace")
    parser.add_argument("svg")
    args = parser.parse_args()
    events = json.loads(Path(args.trace).read_text())["traceEvents"]
    ranges = [e for e in events if e.get("ph") == "X" and e["name"] in COLOURS]
    Path(args.svg).write_text(draw(ranges))


def draw(ranges: list[dict[str, Any]]) -> str:
    """The picture as SVG, with a lane for the training thread and one for each reader thread."""
    begin = min(e["ts"] for e in ranges)
    end = max(e["ts"] + e["dur"] for e in ranges)
    trains = next(e["tid"] for e in ranges if e["name"] == "gpucache::gather")
    threads = sorted({e["tid"] for e in ranges}, key=lambda tid: (tid != trains, tid))
    scale = (WIDTH - LEFT - 20) / (end - begin)
    height = 60 + LANE * len(threads) + 40
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            'font-family="sans-serif" font-size="13">'
        ),
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for number, (name, colour) in enumerate(COLOURS.items()):
        x = LEFT + number * 155
        parts.append(f'<rect x="{x}" y="14" width="14" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="26">{name}</text>')
    for lane, thread in enumerate(threads):
        y = 50 + LANE * lane
        label = "training" if thread == trains else "reader"
        parts.append(f'<text x="10" y="{y + 20}">{label}</text>')
        for e in ranges:
            if e["tid"] == thread:
                x, width = LEFT + (e["ts"] - begin) * scale, max(e["dur"] * scale, 0.6)
                parts.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{LANE - 14}" '
                    f'fill="{COLOURS[e["name"]]}"/>'
                )
    parts.append(
        f'<text x="{LEFT}" y="{height - 18}">0</text>'
        f'<text x="{WIDTH - 20}" y="{height - 18}" text-anchor="end">'
        f"{(end - begin) / 1000:.0f} ms</text></svg>"
    )
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
