"""`python -m gpucache_pipes`: what is in feature files, and what a cache would make of them."""

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
    inspect.set_defaults(run=_inspect)
    plan = commands.add_parser("plan", help="hit rates for sizes of a cache, by simulation")
    plan.set_defaults(run=_plan)
    plan.add_argument("--gpu-memory", metavar="SIZE", help='for features, such as "24GiB"')
    plan.add_argument("--epochs", type=int, default=5, help="to simulate")
    plan.add_argument("--shuffle", action=argparse.BooleanOptionalAction, default=True)
    plan.add_argument("--seed", type=int, default=0)
    plan.add_argument("--plot", metavar="FILE", help="draw it, as .png, .svg or .pdf")
    for command in (inspect, plan):
        command.add_argument("path", help="a feature file, a directory or a glob")
        command.add_argument("--pattern", default="*.pt", help="which files of a directory")
        command.add_argument("--recursive", action="store_true", help="subdirectories too")
        command.add_argument("--unsafe", action="store_true", help="weights_only=False")
        command.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(arguments)
    try:
        status: int = args.run(args)
    except ImportError as error:
        print(error, file=sys.stderr)
        return 1
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        print(f"{args.path}: {error}", file=sys.stderr)
        return 1
    return status


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
    _print(json.dumps(report, indent=1) if args.json else text)
    return 1 if report.get("failures") else 0


def _plan(args: argparse.Namespace) -> int:
    from gpucache_pipes import charts, planning
    from gpucache_pipes.nodes import PathLister
    from gpucache_pipes.units import parse_bytes

    memory = None if args.gpu_memory is None else parse_bytes("--gpu-memory", args.gpu_memory)
    if args.plot is not None:
        charts.require_matplotlib()  # now, and not after the simulation
    report = planning.plan(
        PathLister(args.path, pattern=args.pattern, recursive=args.recursive).paths,
        memory=memory,
        epochs=args.epochs,
        shuffle=args.shuffle,
        seed=args.seed,
        weights_only=not args.unsafe,
        progress=not args.json,
    )
    if args.plot is not None:
        charts.draw_plan(report, args.plot)
    text = f"{charts.plan_as_text(report)}\n\n{planning.advice(report)}"
    _print(json.dumps(report, indent=1) if args.json else text)
    return 0


def _print(text: str) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file may have a name that is no text, and a terminal no place for a mark.
        sys.stdout.reconfigure(errors="backslashreplace")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
