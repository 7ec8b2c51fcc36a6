"""`python -m gpucache_pipes inspect PATH`: what is in feature files."""

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gpucache_pipes")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="what is in a file, or in those of a directory")
    inspect.add_argument("path", help="a feature file, a directory or a glob")
    inspect.add_argument("--pattern", default="*.pt", help="which files of a directory")
    inspect.add_argument("--recursive", action="store_true", help="subdirectories too")
    inspect.add_argument("--unsafe", action="store_true", help="weights_only=False")
    inspect.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(arguments)
    try:
        return _inspect(args)
    except (OSError, ValueError, TypeError) as error:
        print(f"{args.path}: {error}", file=sys.stderr)
        return 1


def _inspect(args: argparse.Namespace) -> int:
    # Here: --help should not have to wait for torch.
    from gpucache_pipes import inspection
    from gpucache_pipes.nodes import PathLister

    if os.path.isfile(args.path):
        report = inspection.inspect_file(args.path, not args.unsafe)
        text = inspection.file_as_text(report)
    else:
        paths = PathLister(args.path, pattern=args.pattern, recursive=args.recursive).paths
        report = inspection.inspect_files(paths, not args.unsafe, progress=not args.json)
        text = inspection.files_as_text(report)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file may have a name that is no text.
        sys.stdout.reconfigure(errors="backslashreplace")
    print(json.dumps(report, indent=1) if args.json else text)
    return 1 if report.get("failures") else 0


if __name__ == "__main__":
    sys.exit(main())
