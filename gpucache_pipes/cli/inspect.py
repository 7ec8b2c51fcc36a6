"""`python -m gpucache_pipes inspect`: the content of feature files, and a budget that fits them."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from gpucache_pipes.batches import key_of
from gpucache_pipes.files import (
    AnyFiles,
    Layout,
    OpenFeature,
    leaf_names,
    native_problem,
    value_names,
)
from gpucache_pipes.store.page_size import choose_page_bytes
from gpucache_pipes.store.progress import progress_bar
from gpucache_pipes.units import counted, format_bytes

StorageOptions = Mapping[str, Any] | None

_SHOWN = 5
"""Kinds in a report, and failures in its text."""


def inspect_file(
    path: str, weights_only: bool = True, storage_options: StorageOptions = None
) -> dict[str, Any]:
    """Describe one file.

    Args:
        path: a feature file, or the URL of one.
        weights_only: as in `torch.load`.
        storage_options: see GPUFeatureStore.

    Returns:
        A report that `json.dumps` accepts. `fast` says whether the file is read without
        `torch.load`, and `reason` says why not.

    Raises:
        Exception: what opening the file raises.
    """
    files = AnyFiles(weights_only=weights_only, storage_options=storage_options)
    feature, reason = files.probe(path)
    feature.close()
    return {
        "path": path,
        "file_bytes": files.size(path),
        "feature_bytes": feature.layout.nbytes,
        "fast": reason is None,
        "reason": reason,
        "leaves": _leaves(feature.layout),
        "values": _values(feature),
    }


def inspect_files(
    paths: Sequence[str],
    weights_only: bool = True,
    progress: bool = True,
    storage_options: StorageOptions = None,
) -> dict[str, Any]:
    """Describe a data set.

    Args:
        paths: feature files.
        weights_only: as in `torch.load`.
        progress: show a progress bar on stderr.
        storage_options: see GPUFeatureStore.

    Returns:
        A report that `json.dumps` accepts: sizes, the most frequent kinds of features with the
        ranges of their shapes, the files that cannot be opened with their errors, and the
        recommended page size and budget.
    """
    source = AnyFiles(weights_only=weights_only, storage_options=storage_options)
    layouts: Counter[Layout] = Counter()
    values: dict[Layout, list[dict[str, str]]] = {}
    reasons: Counter[str] = Counter()
    failures: list[dict[str, str]] = []
    file_bytes = 0
    spans: list[int] = []
    for path in progress_bar(paths, desc="inspecting", unit="file", shown=progress):
        try:
            feature, reason = source.probe(path)
            feature.close()
            file_bytes += source.size(path)
        except Exception as error:
            failures.append({"path": path, "error": f"{type(error).__name__}: {error}"})
            continue
        layouts[feature.layout] += 1
        _merge(values.setdefault(feature.layout, []), _values(feature))
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
        "kinds": _kinds(layouts, values),
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


def _values(feature: OpenFeature) -> list[dict[str, str]]:
    names = value_names(feature.layout.tree)
    return [
        {"name": name, "type": type(value).__name__}
        for name, value in zip(names, feature.values, strict=True)
    ]


def _merge(known: list[dict[str, str]], more: list[dict[str, str]]) -> None:
    """Add the types of the values of another file."""
    if not known:
        known += more
    for one, other in zip(known, more, strict=True):
        if other["type"] not in one["type"].split(" or "):
            one["type"] += f" or {other['type']}"


def _merged(alike: list[list[dict[str, str]]]) -> list[dict[str, str]]:
    merged: list[dict[str, str]] = []
    for values in alike:
        _merge(merged, [dict(value) for value in values])
    return merged


def _kinds(
    layouts: Counter[Layout], values: dict[Layout, list[dict[str, str]]]
) -> list[dict[str, Any]]:
    """Layouts that differ in nothing but shapes together, the most frequent ones first."""
    groups: dict[Any, Counter[Layout]] = {}
    for layout, count in layouts.items():
        dimensions = tuple(len(leaf.shape) for leaf in layout.leaves)
        groups.setdefault((layout.kind, dimensions), Counter())[layout] = count
    most = sorted(groups.values(), key=Counter.total, reverse=True)[:_SHOWN]
    return [
        {
            "files": group.total(),
            "layouts": len(group),
            "leaves": _ranges([_leaves(layout) for layout in group]),
            "values": _merged([values[layout] for layout in group]),
        }
        for group in most
    ]


def _ranges(alike: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each leaf with the least and the largest of each dimension, where these differ."""
    merged = []
    for leaves in zip(*alike, strict=True):
        sizes = zip(*(leaf["shape"] for leaf in leaves), strict=True)
        shape = [min(size) if len(set(size)) == 1 else [min(size), max(size)] for size in sizes]
        largest = max(leaf["bytes"] for leaf in leaves)
        merged.append({**leaves[0], "shape": shape, "bytes": largest})
    return merged


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
    return "\n".join(
        [f"{report['path']}: {format_bytes(report['file_bytes'])}, {how}", *_part_lines(report)]
    )


def files_as_text(report: dict[str, Any]) -> str:
    """A report of `inspect_files` as text."""
    total, tensors = format_bytes(report["file_bytes"]), format_bytes(report["feature_bytes"])
    lines = [f"{counted(report['files'], 'file')}, {total}; {tensors} of tensors"]
    if report["sizes"]:
        spread = ", ".join(f"{name} {format_bytes(n)}" for name, n in report["sizes"].items())
        lines.append(f"a feature: {spread}")
    lines.append(f"read by their bytes: {report['fast']:,}, {reader_as_text()}")
    lines += [f"read by torch.load: {n:,}: {why}" for why, n in report["reasons"].items()]
    for kind in report["kinds"]:
        shapes = f" of {kind['layouts']:,} different shapes" if kind["layouts"] > 1 else ""
        lines += [f"{counted(kind['files'], 'file')}{shapes}:", *_part_lines(kind)]
        lines += _hint(kind["leaves"])
    failures = report["failures"]
    if failures:
        lines.append(f"cannot be loaded: {counted(len(failures), 'file')}")
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


def _part_lines(report: dict[str, Any]) -> list[str]:
    lines = []
    for leaf in report["leaves"]:
        sizes = [n if isinstance(n, int) else f"{n[0]}..{n[1]}" for n in leaf["shape"]]
        varies = any(not isinstance(n, int) for n in leaf["shape"])
        shape = ", ".join(map(str, sizes))
        size = f"{'up to ' if varies else ''}{format_bytes(leaf['bytes'])}"
        lines.append(f"  {leaf['name']}: {leaf['dtype']} [{shape}], {size}")
    return lines + [f"  {value['name']}: {value['type']}" for value in report["values"]]


def _hint(leaves: Sequence[dict[str, Any]]) -> list[str]:
    """What to do about leaves whose shapes differ from file to file."""
    differ = [leaf for leaf in leaves if any(not isinstance(n, int) for n in leaf["shape"])]
    if not differ:
        return []
    if any(not isinstance(n, int) for leaf in differ for n in leaf["shape"][1:]):
        return ["  these differ in more than their first dimension: collate_fn= joins them"]
    if differ[0]["name"] == "the feature":
        return ['  sequences of different lengths: ragged="pad", or "jagged", or "list"']
    keys = ", ".join(f'{key_of(leaf["name"])!r}: "pad"' for leaf in differ)
    return [f'  sequences of different lengths: ragged={{{keys}}}, or "jagged", or "list"']
