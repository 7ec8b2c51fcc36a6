"""`python -m gpucache_pipes inspect`: the content of feature files, and a budget that fits them."""

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm

from gpucache_pipes.files import FileOpener, Layout, file_size, leaf_names, native_problem
from gpucache_pipes.store.page_size import choose_page_bytes
from gpucache_pipes.units import format_bytes

_SHOWN = 5
"""Layouts in a report, and failures in its text."""


def inspect_file(path: str, weights_only: bool = True) -> dict[str, Any]:
    """Describe one file.

    Args:
        path: a feature file.
        weights_only: as in `torch.load`.

    Returns:
        A report that `json.dumps` accepts. `fast` says whether the file is read without
        `torch.load`, and `reason` says why not.

    Raises:
        Exception: what opening the file raises.
    """
    feature, reason = FileOpener(weights_only).probe(path)
    feature.close()
    return {
        "path": path,
        "file_bytes": file_size(path),
        "feature_bytes": feature.layout.nbytes,
        "fast": reason is None,
        "reason": reason,
        "leaves": _leaves(feature.layout),
        "values": [type(value).__name__ for value in feature.values],
    }


def inspect_files(
    paths: Sequence[str], weights_only: bool = True, progress: bool = True
) -> dict[str, Any]:
    """Describe a data set.

    Args:
        paths: feature files.
        weights_only: as in `torch.load`.
        progress: show a progress bar on stderr.

    Returns:
        A report that `json.dumps` accepts: sizes, the most frequent layouts, the files that cannot
        be opened with their errors, and the recommended page size and budget.
    """
    opener = FileOpener(weights_only)
    layouts: Counter[Layout] = Counter()
    reasons: Counter[str] = Counter()
    failures: list[dict[str, str]] = []
    file_bytes = 0
    spans: list[int] = []
    for path in tqdm(paths, desc="inspecting", unit="file", disable=not progress):
        try:
            feature, reason = opener.probe(path)
            feature.close()
            file_bytes += file_size(path)
        except Exception as error:
            failures.append({"path": path, "error": f"{type(error).__name__}: {error}"})
            continue
        layouts[feature.layout] += 1
        spans.append(feature.layout.span)
        if reason is not None:
            reasons[reason] += 1
    sizes = sorted(layout.nbytes for layout in layouts.elements())
    page = choose_page_bytes(spans) if any(spans) else 0
    return {
        "files": len(paths),
        "file_bytes": file_bytes,
        "feature_bytes": sum(sizes),
        "sizes": _distribution(sizes),
        "fast": len(spans) - reasons.total(),
        "reasons": dict(reasons.most_common()),
        "failures": failures,
        "layouts": [
            {"files": count, "leaves": _leaves(layout)}
            for layout, count in layouts.most_common(_SHOWN)
        ],
        "number_of_layouts": len(layouts),
        "recommended": {
            "page_bytes": page,
            "max_cache_bytes": sum(-(-span // page) * page for span in spans) if page else 0,
        },
    }


def _leaves(layout: Layout) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "dtype": str(leaf.dtype).removeprefix("torch."),
            "shape": list(leaf.shape),
            "bytes": leaf.nbytes,
        }
        for name, leaf in zip(leaf_names(layout.tree), layout.leaves, strict=True)
    ]


def _distribution(sizes: Sequence[int]) -> dict[str, float]:
    """Quantiles of sorted `sizes`; empty if there are none."""
    if not sizes:
        return {}
    return {
        "least": sizes[0],
        "median": statistics.median(sizes),
        "90%": sizes[len(sizes) * 9 // 10],
        "largest": sizes[-1],
    }


def file_as_text(report: dict[str, Any]) -> str:
    """A report of `inspect_file` as text."""
    how = "read by its bytes" if report["fast"] else f"read by torch.load: {report['reason']}"
    lines = [
        f"{report['path']}: {format_bytes(report['file_bytes'])}, {how}",
        *_leaf_lines(report["leaves"]),
    ]
    if report["values"]:
        lines.append(f"  plain values: {', '.join(report['values'])}")
    return "\n".join(lines)


def files_as_text(report: dict[str, Any]) -> str:
    """A report of `inspect_files` as text."""
    total, tensors = format_bytes(report["file_bytes"]), format_bytes(report["feature_bytes"])
    lines = [f"{report['files']} files, {total}; {tensors} of tensors"]
    if report["sizes"]:
        spread = ", ".join(f"{name} {format_bytes(n)}" for name, n in report["sizes"].items())
        lines.append(f"a feature: {spread}")
    lines.append(f"{report['fast']} are read by their bytes, {reader_as_text()}")
    lines += [f"{n} by torch.load: {why}" for why, n in report["reasons"].items()]
    lines.append(f"{report['number_of_layouts']} layouts")
    for layout in report["layouts"]:
        lines += [f"  {layout['files']} files:", *_leaf_lines(layout["leaves"], "    ")]
    failures = report["failures"]
    if failures:
        lines.append(f"{len(failures)} cannot be loaded:")
        lines += [f"  {item['path']}: {item['error']}" for item in failures[:_SHOWN]]
    best = report["recommended"]
    if best["page_bytes"]:
        lines.append(
            f"to cache all of it: max_cache_bytes={best['max_cache_bytes']} "
            f"({format_bytes(best['max_cache_bytes'])}); page_bytes={best['page_bytes']} suits it"
        )
    return "\n".join(lines)


def reader_as_text() -> str:
    """Whether small files are read natively, and if not, why not."""
    if native_problem is None:
        return "small ones of like form by the native reader"
    return f"in Python: the native reader is not in use ({native_problem})"


def _leaf_lines(leaves: Sequence[dict[str, Any]], indent: str = "  ") -> list[str]:
    return [
        f"{indent}{leaf['name']}: {leaf['dtype']} {leaf['shape']}, {format_bytes(leaf['bytes'])}"
        for leaf in leaves
    ]
