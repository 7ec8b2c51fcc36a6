"""Where a state goes on, over the files that are there now."""

import logging
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any

_log = logging.getLogger("gpucache_pipes")


def fingerprint(paths: Sequence[str], directory: str, seed: int) -> int:
    """A checksum of the names: relative to `directory`, so that the same files may lie elsewhere.

    Without a directory, relative to the one that has all of them.
    """
    if not directory:
        first, last = min(paths), max(paths)
        same = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
        directory = first[: first.rfind(os.sep, 0, same or None) + 1]
    start = len(directory)
    names = "\0".join([path[start:] for path in paths])
    try:
        encoded = names.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a name that no file has: its batch will say so
        encoded = names.encode("utf-8", "surrogatepass")
    return zlib.crc32(encoded, seed)


def place(
    state: dict[str, Any],
    now: dict[str, Any],
    end_of: Callable[[int], int],
    per_rank: bool,
    if_changed: str,
) -> int:
    """How many files of its epoch a rank has behind it when it resumes `state`.

    `now` is what the lister that resumes says of itself: order, shards, files and fingerprint;
    `end_of(shards)`, where an epoch ends on so many; `per_rank`, whether ranks have files or
    batches of their own, and do not take turns in one order.

    Raises ValueError if the epoch would be another one and `if_changed` is "raise".
    """
    if "order" not in state:
        raise ValueError("this state was taken over a stream of paths, and this is a list")
    if state["order"] != now["order"]:
        raise ValueError(
            f"this state was taken with {state['order']}, and this lister has {now['order']}; "
            "resume with the same, or begin a new epoch"
        )
    position: int = state["position"]
    changed = []
    if state["files"] != now["files"]:
        changed.append(f"over {state['files']} files, but there are {now['files']} now")
    elif state["fingerprint"] != now["fingerprint"]:
        changed.append("over files of other names or, with bucket_by, sizes")
    if state["shards"] != now["shards"]:
        # All ranks are at the same place of one order, in which they take turns: go on there.
        at_end = position >= end_of(state["shards"])
        position = position * state["shards"] // now["shards"]
        if at_end:
            position = end_of(now["shards"])
        if per_rank:
            changed.append(f"with {state['shards']} shards, but there are {now['shards']} now")
    if changed and if_changed == "raise":
        raise ValueError(
            f"this state was taken {' and '.join(changed)}; resume with the same files, "
            'begin a new epoch, or go on all the same with if_files_changed="continue"'
        )
    if changed:
        _log.warning(
            "resuming a state that was taken %s: until the next epoch, files may come twice or not "
            "at all", " and ".join(changed),
        )  # fmt: skip
    return position
