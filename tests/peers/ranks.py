"""Runs a function in several processes that torch.distributed connects."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = ""
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])


def start_ranks(world: int, name: str, *arguments: Any) -> "list[subprocess.Popen[str]]":
    """Begin `scenarios.<name>(rank, *arguments)` in `world` processes. Arguments are JSON."""
    meet = tempfile.mktemp(prefix="ranks-")
    environment = dict(ENVIRONMENT)
    if "cuda" in arguments:
        del environment["CUDA_VISIBLE_DEVICES"]
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(world), meet, name, json.dumps(arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for rank in range(world)
    ]  # fmt: skip


def results_of(ranks: "list[subprocess.Popen[str]]", seconds: float = 100) -> list[Any]:
    """What the function has returned in each process; a str is what a process that failed wrote."""
    found: list[Any] = []
    try:
        for rank in ranks:
            printed, _ = rank.communicate(timeout=seconds)
            lines = printed.splitlines()
            if rank.returncode or not lines:
                found.append(f"exit {rank.returncode}: {printed}")
            else:
                found.append(json.loads(lines[-1]))
    finally:
        for rank in ranks:
            rank.kill()
    return found


def run_ranks(world: int, name: str, *arguments: Any, seconds: float = 100) -> list[Any]:
    """What `scenarios.<name>(rank, *arguments)` returns in each of `world` processes."""
    found = results_of(start_ranks(world, name, *arguments), seconds)
    for result in found:
        assert not isinstance(result, str), result
    return found


def main() -> None:
    rank, world, meet, name, arguments = sys.argv[1:]
    import faulthandler
    import gc

    import scenarios
    import torch
    import torch.distributed as dist

    faulthandler.dump_traceback_later(90)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meet}", world_size=int(world), rank=int(rank)
    )
    result = getattr(scenarios, name)(int(rank), *json.loads(arguments))
    gc.collect()
    print(json.dumps(result), flush=True)
    if (
        os.environ.get("RANKS_EXIT") == "hard"
        or getattr(scenarios, name).__name__ in scenarios.BROKEN
    ):
        os._exit(0)  # the connections are broken
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
