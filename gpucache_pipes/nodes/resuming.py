"""Resuming a PathLister: whether a state fits its files, and from which position to continue."""

import logging
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any

_log = logging.getLogger("gpucache_pipes")


def fingerprint(paths: Sequence[str], directory: str, seed: int) -> int:
    """A checksum of the names of files, by which a state recognises its list.

    Args:
        paths: at least one.
        directory: what all paths begin with; only what follows counts, so that a state can be
            resumed over the same files elsewhere. If empty, the deepest common directory.
        seed: what else the checksum is to cover, such as a checksum of sizes.
    """
    if not directory:
        first, last = min(paths), max(paths)
        same = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
        directory = first[: first.rfind(os.sep, 0, same or None) + 1]
    start = len(directory)
    names = "\0".join([path[start:] for path in paths])
    try:
        encoded = names.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a name that no file can have: requesting it raises the error
        encoded = names.encode("utf-8", "surrogatepass")
    return zlib.crc32(encoded, seed)


def resumed_position(
    state: dict[str, Any],
    now: dict[str, Any],
    end_of: Callable[[int], int],
    per_rank: bool,
    if_changed: str,
) -> int:
    """How many files of its epoch a rank has consumed when it resumes `state`.

    Args:
        state: of a PathLister, perhaps on another number of ranks.
        now: the identity of the lister that resumes: its order, shards, files and fingerprint.
        end_of: number of shards -> how many files each has of an epoch.
        per_rank: whether each rank has files or batches of its own. Else all ranks take turns in
            one order, which another number of ranks can continue.
        if_changed: "raise" or "continue".

    Raises:
        ValueError: if the state is not one over a list of files, or is of another order; with
            "raise" also if it is over other files, or if its shards cannot be continued.
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
        # All old ranks had come equally far in one order, in which they take turns. The new ranks
        # go on where that leaves the first gap: some files are read again, and none is missed.
        at_end = position >= end_of(state["shards"])
        position = position * state["shards"] // now["shards"]
        if at_end:
            position = end_of(now["shards"])
        if per_rank:
            changed.append(f"with {state['shards']} shards, but there are {now['shards']} now")
    if changed and if_changed == "raise":
        raise ValueError(
            f"this state was taken {' and '.join(changed)}; resume with the same files, "
            'begin a new epoch, or continue all the same with if_files_changed="continue"'
        )
    if changed:
        _log.warning(
            "resuming a state that was taken %s: until the next epoch, files may be read twice or "
            "not at all", " and ".join(changed),
        )  # fmt: skip
    return position
