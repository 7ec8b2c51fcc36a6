"""`--storage-option`: options of object storage on the command line."""

import argparse
import json
from collections.abc import Sequence
from typing import Any


def add_option(command: argparse.ArgumentParser) -> None:
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
        at[last] = value
    return options


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError("write NAME=VALUE, such as region=eu-west-1")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
