"""`pack`: a directory of feature files as a directory of few large files."""

import argparse
from typing import Any

from gpucache_pipes.cli.conversion import parse_dtype
from gpucache_pipes.files.packed.packing import PackReport, pack, verify
from gpucache_pipes.store.progress import progress_bar
from gpucache_pipes.units import counted, format_bytes, positive_int

_REPORTED = 10
"""Files that are named where several are wrong."""


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Pack, and verify if that is asked for.

    Returns:
        The report, whose "failures" is not empty if anything is wrong, and the same as text.

    Raises:
        ValueError, OSError: see `pack`.
    """
    dtype = None if args.dtype is None else parse_dtype(args.dtype)
    keys = None if args.keys is None else [key for key in args.keys.split(",") if key]
    with progress_bar(total=0, desc="packing", unit="file", shown=not args.json) as bar:
        report = pack(
            args.path, args.target, pattern=args.pattern, recursive=args.recursive, keys=keys,
            dtype=dtype, weights_only=not args.unsafe,
            readers=positive_int("--readers", args.readers),
            progress=lambda done, total: _advance(bar, done, total),
        )  # fmt: skip
    wrong: dict[str, str] = {path: str(error) for path, error in report.failed.items()}
    verified = 0
    if args.verify and not wrong:
        with progress_bar(total=0, desc="verifying", unit="file", shown=not args.json) as bar:
            wrong = verify(
                args.path, args.target, keys=keys, dtype=dtype, weights_only=not args.unsafe,
                progress=lambda done, total: _advance(bar, done, total),
            )  # fmt: skip
        verified = report.files
    about = {
        "files": report.files, "read": report.read, "segments": report.segments,
        "bytes": report.nbytes, "verified": verified, "failures": wrong,
    }  # fmt: skip
    return about, _as_text(args.target, report, verified, wrong)


def _advance(bar: Any, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def _as_text(target: str, report: PackReport, verified: int, wrong: dict[str, str]) -> str:
    there = report.files - report.read
    lines = [
        f"{target}: {counted(report.files - len(report.failed), 'feature')} in "
        f"{counted(report.segments, 'file')}, {format_bytes(report.nbytes)}"
        + (f" ({there:,} of them from before)" if there else "")
    ]
    for path, text in list(wrong.items())[:_REPORTED]:
        lines.append(f"  {path}: {text}")
    if len(wrong) > _REPORTED:
        lines.append(f"  and {len(wrong) - _REPORTED:,} more")
    if report.failed:
        lines.append(
            f"{counted(len(report.failed), 'file')} could not be packed, so {target} cannot be "
            "used yet. Mend or remove them, and run the same command again: it reads only what is "
            "missing"
        )
    elif wrong:
        lines.append(f"{counted(len(wrong), 'feature')} are wrong: remove {target}, and pack again")
    elif verified:
        lines.append(f"verified: all {counted(verified, 'feature')} are as in their files")
    if not wrong:
        lines.append(f"use it in place of the directory: PathLister({target!r})")
    return "\n".join(lines)
