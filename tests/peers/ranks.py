"""Runs a function in several processes that torch.distributed connects."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = ""
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])


def start_ranks(world: int, name: str, *arguments: Any) -> "subprocess.Popen[str]":
    """Begin `<name>(rank, *arguments)` of a scenario in `world` processes. Arguments are JSON."""
    environment = dict(ENVIRONMENT)
    if "cuda" in arguments:
        del environment["CUDA_VISIBLE_DEVICES"]
    return subprocess.Popen(
        [sys.executable, __file__, str(world), name, json.dumps(arguments)],
        stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


def results_of(ranks: "subprocess.Popen[str]", seconds: float = 100) -> list[Any]:
    """What the function has returned in each process; a str is what a process that failed wrote."""
    try:
        printed, _ = ranks.communicate(timeout=seconds)
    finally:
        if ranks.poll() is None:
            os.killpg(ranks.pid, signal.SIGKILL)
    found: list[Any] = json.loads(printed.splitlines()[-1])
    return found


def run_ranks(world: int, name: str, *arguments: Any, seconds: float = 100) -> list[Any]:
    """What `<name>(rank, *arguments)` of a scenario returns in each of `world` processes."""
    found = results_of(start_ranks(world, name, *arguments), seconds)
    for result in found:
        assert not isinstance(result, str), result
    return found


def main(world: int, name: str, arguments: list[Any]) -> None:
    """Fork the ranks, which takes less than that each of them imports torch."""
    import losses
    import scenarios
    import uses

    [function] = [
        found
        for module in (losses, scenarios, uses)
        if (found := vars(module).get(name)) is not None and found.__module__ == module.__name__
    ]
    with tempfile.TemporaryDirectory() as directory:
        children = []
        for rank in range(world):
            child = os.fork()
            if not child:
                be_rank(rank, world, directory, function, arguments)
            children.append(child)
        found = []
        for rank, child in enumerate(children):
            _, status = os.waitpid(child, 0)
            result, printed = (Path(directory, f"{rank}.{kind}") for kind in ("json", "text"))
            if status or not result.exists():
                text = f"exit {os.waitstatus_to_exitcode(status)}: {printed.read_text()}"
                found.append(text)
            else:
                found.append(json.loads(result.read_text()))
    print(json.dumps(found), flush=True)


def be_rank(rank: int, world: int, directory: str, function: Any, arguments: list[Any]) -> None:
    """Run the function in this process, and end it."""
    import faulthandler
    import gc

    import losses
    import torch
    import torch.distributed as dist

    status = 1
    text = os.open(f"{directory}/{rank}.text", os.O_CREAT | os.O_WRONLY)
    os.dup2(text, 1)
    os.dup2(text, 2)
    try:
        faulthandler.dump_traceback_later(90)
        torch.set_num_threads(1)
        meet = f"file://{directory}/meet"
        dist.init_process_group("gloo", init_method=meet, world_size=world, rank=rank)
        result = function(rank, *arguments)
        gc.collect()
        Path(directory, f"{rank}.json").write_text(json.dumps(result))
        if function.__name__ not in losses.BROKEN:  # else the connections are broken
            dist.barrier()
            dist.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
