"""`python -m gpucache_pipes`: argument parsing and the exit status of all commands."""

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpucache_pipes import __version__
from gpucache_pipes.cli.arguments import (
    add_storage_options,
    as_flags,
    storage_options,
    whole_numbers,
)

if TYPE_CHECKING:
    import torch

    from gpucache_pipes.cli import bench

_COMMANDS = {
    "inspect": """examples:
  gpucache-pipes inspect features/
  gpucache-pipes inspect features/clip_1.pt
  gpucache-pipes inspect features/ --dtype bfloat16""",
    "plan": """examples:
  gpucache-pipes plan features/ --gpu-memory 12GiB --plot plan.png
  gpucache-pipes plan features/ --gpu-memory 12GiB --host-memory 100GiB --disk 1TiB""",
    "pack": """examples:
  gpucache-pipes pack features/ packed/
  gpucache-pipes pack features/ packed/ --dtype bfloat16 --keys video,audio
  gpucache-pipes pack features/ packed/ --recursive --verify""",
    "bench": """examples:
  gpucache-pipes bench features/ --batch-size 32,256 --only DataLoader
  gpucache-pipes bench features/ --cold-storage --readers 1,4,16
  gpucache-pipes bench s3://bucket/features/ --storage-option region=eu-west-1""",
}

_EXAMPLES = """examples:
  gpucache-pipes inspect features/
  gpucache-pipes plan features/ --gpu-memory 12GiB --plot plan.png
  gpucache-pipes bench features/ --batch-size 32,256 --only DataLoader

`python -m gpucache_pipes` is the same. Each command has a --help of its own."""


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, those that say something, and leaves the lines of examples as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False):
            return action.help
        return super()._get_help_string(action)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: of the command line, without the program; None means `sys.argv[1:]`.

    Returns:
        The exit status: 0; 1 for an error, which is printed to stderr; 130 after an interrupt.

    Raises:
        SystemExit: the arguments are malformed, or `--help` or `--version` was given.
    """
    parser = argparse.ArgumentParser(
        prog="gpucache-pipes",
        description="What feature files hold, how large a cache they need, and what it gains.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gpucache_pipes {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{inspect,plan,pack,bench}")
    inspecting = commands.add_parser(
        "inspect", help="what is in a file, or in those of a directory"
    )
    inspecting.set_defaults(run=_inspect)
    inspecting.add_argument("--dtype", help="the error that this dtype= would make: bfloat16, ...")
    planning = commands.add_parser("plan", help="hit rates for sizes of a cache, by simulation")
    planning.set_defaults(run=_plan)
    planning.add_argument("--gpu-memory", metavar="SIZE", help='for features, such as "24GiB"')
    planning.add_argument("--host-memory", metavar="SIZE", help="for a tier below the GPU")
    planning.add_argument("--disk", metavar="SIZE", help="for a tier on a local disk below that")
    planning.add_argument(
        "--ranks", type=int, default=1, help="with a cache of --gpu-memory each, shared or not"
    )
    planning.add_argument("--epochs", type=int, default=5, help="to simulate")
    planning.add_argument(
        "--shuffle",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a new order in each epoch",
    )
    planning.add_argument("--seed", type=int, default=0, help="of the orders")
    planning.add_argument("--plot", metavar="FILE", help="draw it, as .png, .svg or .pdf")
    packing = commands.add_parser("pack", help="a directory of few large files, used as it was")
    packing.set_defaults(run=_pack)
    packing.add_argument("--keys", metavar="KEY[,KEY...]", help="the parts of features to keep")
    packing.add_argument("--dtype", help="floating tensors are converted to it: bfloat16, ...")
    packing.add_argument("--readers", type=int, default=8, metavar="N", help="threads that read")
    packing.add_argument("--verify", action="store_true", help="compare all with the files at last")
    bench = commands.add_parser("bench", help="compare with other loaders on your files")
    bench.set_defaults(run=_bench)
    bench.add_argument("--device", default="auto", help='"cuda", "cpu"; by default the GPU')
    bench.add_argument(
        "--batch-size",
        type=whole_numbers,
        action="extend",
        metavar="N[,N...]",
        help="256; or several",
    )
    bench.add_argument(
        "--cache", type=float, default=0.5, metavar="PART", help="of the data, where not all fits"
    )
    bench.add_argument("--epochs", type=int, default=5, help="of a run with --cache")
    bench.add_argument("--rounds", type=int, default=3, help="how often each takes its turn")
    bench.add_argument("--files", type=int, default=2000, help="how many to read at most")
    bench.add_argument("--bytes", default="512MiB", metavar="SIZE", help="how much, at most")
    bench.add_argument(
        "--overlap", action="store_true", help="also with training steps, which takes longer"
    )
    bench.add_argument(
        "--busy",
        type=int,
        default=0,
        metavar="N",
        help="also while N other processes keep a core busy each",
    )
    bench.add_argument(
        "--cold-storage", action="store_true", help="read from the disk, not from the page cache"
    )
    bench.add_argument(
        "--readers",
        type=whole_numbers,
        action="extend",
        metavar="N[,N...]",
        help="also with these numbers of reader threads; 1,4,16 with --cold-storage",
    )
    bench.add_argument("--only", action="append", metavar="NAME", help="some of the contenders")
    bench.add_argument("--plot", metavar="FILE", help="draw it, as .png, .svg or .pdf")
    for name, command in (
        ("inspect", inspecting), ("plan", planning), ("pack", packing), ("bench", bench)
    ):  # fmt: skip
        command.epilog, command.formatter_class = _COMMANDS[name], _Help
        if command is packing:
            command.add_argument("path", metavar="source", help="a directory of feature files")
            command.add_argument("target", help="the directory to make of it")
        else:
            command.add_argument("path", help="a feature file, a directory or a glob, or a URL")
        command.add_argument("--pattern", default="*.pt", help="which files of a directory")
        command.add_argument("--recursive", action="store_true", help="subdirectories too")
        command.add_argument("--unsafe", action="store_true", help="weights_only=False")
        command.add_argument("--json", action="store_true", help="for programs")
        if command is not packing:
            add_storage_options(command)
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        status: int = args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ImportError as error:
        print(error, file=sys.stderr)
        return 1
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        text = as_flags(str(error))
        from gpucache_pipes.files.remote.urls import redacted

        named = redacted(args.path)
        print(text if repr(named) in text else f"{named}: {text}", file=sys.stderr)
        return 1
    return status


def _bench(args: argparse.Namespace) -> int:
    # SIGTERM acts like Ctrl-C: temporary files are removed, and a partial table is printed.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _measure(args)
    finally:
        signal.signal(signal.SIGTERM, before)


def _measure(args: argparse.Namespace) -> int:
    from gpucache_pipes.cli import bench, charts
    from gpucache_pipes.files import AnyFiles
    from gpucache_pipes.files.packed.packed_directory import is_packed_file
    from gpucache_pipes.files.remote.urls import is_url
    from gpucache_pipes.units import parse_bytes, positive_int

    if not 0 < args.cache <= 1:
        raise ValueError(f"--cache={args.cache}: a part of the data, above 0 and at most 1")
    for name, least in (("rounds", 1), ("files", 2), ("epochs", 2), ("busy", 0)):
        positive_int(f"--{name}", getattr(args, name), least)
    sizes = [positive_int("--batch-size", size) for size in args.batch_size or [256]]
    most_bytes = parse_bytes("--bytes", args.bytes)
    readers = args.readers or ([1, 4, 16] if args.cold_storage else [])
    remote = is_url(args.path)
    if remote and args.cold_storage:
        raise ValueError("--cold-storage is for local files: nothing of an object is in memory")
    known = (bench.objects_contenders(),) if remote else ()
    contenders = bench.choose(args.only, *known)
    contenders += [bench.with_readers(positive_int("--readers", number)) for number in readers]
    if args.plot is not None:
        charts.require_plot(args.plot)  # before the measurement, which takes long
    device = bench.find_device(args.device)
    paths = _paths(args)
    size_of = AnyFiles(storage_options=storage_options(args.storage_option)).size
    sample = bench.sample(paths, args.files, most_bytes, 0, size_of)
    if remote or not is_packed_file(sample[0]):
        return _compare(args, sample, len(paths), sizes, contenders, device)
    with bench.unpacked(sample, not args.unsafe) as files:
        contenders.append(bench.packed_contender(sample))
        return _compare(args, files, len(paths), sizes, contenders, device)


def _compare(
    args: argparse.Namespace,
    sample: Sequence[str],
    known: int,
    sizes: Sequence[int],
    contenders: "Sequence[bench.Contender]",
    device: "torch.device",
) -> int:
    """Measure and print; the exit status."""
    from gpucache_pipes.cli import bench

    reports = []
    for size in sizes:
        with bench.Work(
            sample, size, device, known=known, epochs=args.epochs,
            weights_only=not args.unsafe, cold_storage=args.cold_storage,
            storage_options=storage_options(args.storage_option),
        ) as work:  # fmt: skip
            if not args.json:
                _print(f"{work}\n")
            report = bench.bench(
                work, contenders=contenders, rounds=args.rounds, share=args.cache,
                overlap=args.overlap, busy=args.busy, progress=not args.json,
            )  # fmt: skip
        reports.append(report)
        if not args.json:
            _print(f"{bench.as_text(report)}\n\n{bench.advice(report, bench.free_bytes(device))}\n")
        if args.plot is not None and bench.headings(report):
            name, suffix = os.path.splitext(args.plot)
            bench.draw(report, f"{name}-{size}{suffix}" if len(sizes) > 1 else args.plot)
        if not report["complete"]:
            break
    if args.json:
        _print(json.dumps(reports if len(sizes) > 1 else report, indent=1))
    if not report["complete"]:
        return 130
    return int(any(report["contenders"][bench.OURS.name]["problem"] for report in reports))


def _paths(args: argparse.Namespace) -> Sequence[str]:
    """All files that the arguments of a command name."""
    from gpucache_pipes.nodes import PathLister

    options = storage_options(args.storage_option)
    lister = PathLister(
        args.path, pattern=args.pattern, recursive=args.recursive, storage_options=options
    )
    return lister.paths


def _inspect(args: argparse.Namespace) -> int:
    # Imported here, so that --help does not wait for the import of torch.
    from gpucache_pipes.cli import conversion, inspect
    from gpucache_pipes.files.listing import is_feature_file

    dtype = None if args.dtype is None else conversion.parse_dtype(args.dtype)
    options = storage_options(args.storage_option)
    paths: Sequence[str] = [args.path]
    if not is_feature_file(args.path):
        paths = _paths(args)
    if list(paths) == [args.path]:
        report = inspect.inspect_file(args.path, not args.unsafe, options)
        text = inspect.file_as_text(report)
    else:
        report = inspect.inspect_files(paths, not args.unsafe, not args.json, options)
        text = inspect.files_as_text(report)
    if dtype is not None and not report.get("failures"):
        report["conversion"] = conversion.conversion_errors(paths, dtype, not args.unsafe, options)
        text += "\n" + conversion.as_text(report["conversion"])
    _print(json.dumps(report, indent=1) if args.json else text)
    return 1 if report.get("failures") else 0


def _plan(args: argparse.Namespace) -> int:
    from gpucache_pipes.cli import charts, plan
    from gpucache_pipes.units import parse_bytes

    memory = None if args.gpu_memory is None else parse_bytes("--gpu-memory", args.gpu_memory)
    below = [
        (name, parse_bytes(flag, size))
        for name, flag, size in (
            ("host", "--host-memory", args.host_memory),
            ("disk", "--disk", args.disk),
        )
        if size is not None
    ]
    if args.plot is not None:
        charts.require_plot(args.plot)  # before the simulation, which takes long
    report = plan.plan(
        _paths(args),
        memory=memory,
        below=below,
        epochs=args.epochs,
        shuffle=args.shuffle,
        seed=args.seed,
        weights_only=not args.unsafe,
        progress=not args.json,
        storage_options=storage_options(args.storage_option),
        ranks=args.ranks,
    )
    if args.plot is not None:
        charts.draw_plan(report, args.plot)
    text = f"{charts.plan_as_text(report)}\n\n{plan.advice(report)}"
    _print(json.dumps(report, indent=1) if args.json else text)
    return 0


def _pack(args: argparse.Namespace) -> int:
    from gpucache_pipes.cli import pack

    report, text = pack.run(args)
    _print(json.dumps(report, indent=1) if args.json else text)
    return 1 if report["failures"] else 0


def _print(text: str) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file name may hold undecodable bytes, and a terminal may not support the marks.
        sys.stdout.reconfigure(errors="backslashreplace")
    print(text)
