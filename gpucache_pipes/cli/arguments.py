"""Values on the command line, and errors in its words."""

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any


def add_storage_options(command: argparse.ArgumentParser) -> None:
    """Let a command take `--storage-option NAME=VALUE`, any number of times."""
    command.add_argument(
        "--storage-option",
        type=_pair,
        action="append",
        metavar="NAME=VALUE",
        help="for URLs, as in storage_options=; client_options.timeout=60s for a part of a part",
    )


def storage_options(pairs: Sequence[tuple[str, Any]] | None) -> dict[str, Any] | None:
    """The options that were given; None if none were.

    >>> storage_options([("endpoint", "http://host"), ("client_options.allow_http", True)])
    {'endpoint': 'http://host', 'client_options': {'allow_http': True}}
    """
    if not pairs:
        return None
    options: dict[str, Any] = {}
    for name, value in pairs:
        at = options
        *parents, last = name.split(".")
        for parent in parents:
            at = at.setdefault(parent, {})
            if not isinstance(at, dict):
                raise ValueError(f"--storage-option {name}: {parent} has a value of its own")
        at[last] = value
    return options


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError("write NAME=VALUE, such as region=eu-west-1")
    # Not numbers: the client libraries take text for them, and the id of a key may look like one.
    if value in ("true", "false", "null") or value.startswith(("{", "[")):
        try:
            return name, json.loads(value)
        except ValueError:
            pass
    return name, value


def whole_numbers(text: str) -> list[int]:
    """The numbers of a list such as "8,32". Raises ArgumentTypeError for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of whole numbers, such as 8,32,256"
        ) from None


def as_flags(text: str) -> str:
    """An error of the package in the words of the command line.

    >>> as_flags("epochs=1: too few (recursive=True looks deeper)")
    '--epochs 1: too few (--recursive looks deeper)'
    """
    for name in ("device", "epochs", "pattern", "recursive", "seed"):
        text = text.replace(f"{name}=True", f"--{name}")
        text = re.sub(rf"(?<![\w-]){name}=", f"--{name} ", text)
    text = text.replace("storage_options=", "--storage-option")
    return text.replace("weights_only=False", "--unsafe (weights_only=False)")
