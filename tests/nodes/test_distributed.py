"""Several ranks, for real: torchrun, a rank that dies, a file that is bad on one of them."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpucache_pipes import Lockstep, PathLister

ROOT = Path(__file__).parents[2]
Files = Callable[..., list[str]]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = ""


def classified(number: int) -> dict[str, torch.Tensor]:
    return {"feature": torch.randn(16) + number % 10, "label": torch.tensor(number % 10)}


def command(*arguments: object, restarts: int = 0, ranks: int = 2) -> list[str]:
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        port = str(unused.getsockname()[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    script = str(ROOT / "examples" / "train_ddp.py")
    options = ["--master-port", port, "--max-restarts", str(restarts)]
    return [*torchrun, *options, script, *map(str, arguments)]


def run(
    arguments: list[str], environment: dict[str, str] = ENVIRONMENT
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=200, env=environment, check=False
    )


DIES_AT_STEP_40 = """
import os
if os.environ.get("RANK") == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    import torch
    step, taken = torch.optim.SGD.step, 0
    def last(*arguments, **options):
        global taken
        taken += 1
        if taken == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*arguments, **options)
    torch.optim.SGD.step = last
"""


def test_a_rank_is_killed_and_the_run_goes_on_as_if_nothing_had_happened(
    make_files: Files, tmp_path: Path
) -> None:
    """Rank 1 dies in step 40, in whose backward pass rank 0 takes part: it has saved step 39."""
    torch.manual_seed(0)
    directory = Path(make_files(50, classified)[0]).parent
    options = [directory, "--batch-size", 5, "--save-every", 3, "--epochs", 12]

    undisturbed = run(command(*options, "--checkpoint", tmp_path / "a.ckpt"))
    assert undisturbed.returncode == 0, undisturbed.stderr

    (tmp_path / "sitecustomize.py").write_text(DIES_AT_STEP_40)
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    killed = run(command(*options, "--checkpoint", tmp_path / "b.ckpt", restarts=1), environment)
    assert killed.returncode == 0, killed.stderr
    starts = [
        int(at) for at in re.findall(r"is process \d+ on cpu, from step (\d+)", killed.stdout)
    ]
    assert starts == [0, 0, 39, 39]
    [end] = re.findall("finished at step 60, weights .*", killed.stdout)
    assert end in undisturbed.stdout  # to the last digit


def weights_after(directory: Path, ranks: int, batch_size: int, epochs: int) -> float:
    """The sum of the weights that train_ddp.py prints, by one process that is all ranks."""
    listers = [
        PathLister(
            directory, batch_size=batch_size, shuffle=True, num_shards=ranks, shard_index=rank
        )
        for rank in range(ranks)
    ]
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(epochs):
        for lister in listers:
            lister.reset()
        for of_ranks in zip(*listers, strict=True):
            optimizer.zero_grad()
            for paths in of_ranks:
                batch = torch.utils.data.default_collate([torch.load(path) for path in paths])
                loss = torch.nn.functional.cross_entropy(model(batch["feature"]), batch["label"])
                (loss / ranks).backward()
            optimizer.step()
    return float(model.weight.detach().sum())


def test_ranks_that_share_their_caches_go_on_after_one_was_killed(
    make_files: Files, tmp_path: Path
) -> None:
    """Of four. Their sums of gradients are rounded otherwise than those of one process."""
    torch.manual_seed(0)
    directory = Path(make_files(50, classified)[0]).parent
    (tmp_path / "sitecustomize.py").write_text(DIES_AT_STEP_40)
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    options = [directory, "--batch-size", 5, "--save-every", 3, "--epochs", 20, "--share-caches"]
    killed = run(
        command(*options, "--checkpoint", tmp_path / "run.ckpt", restarts=1, ranks=4), environment
    )
    assert killed.returncode == 0, killed.stderr
    starts = re.findall(r"is process \d+ on cpu, from step (\d+)", killed.stdout)
    assert [*map(int, starts)] == [0] * 4 + [39] * 4
    assert len(re.findall(r"hit rate 100\.0%", killed.stdout)) >= 15
    [end] = re.findall("finished at step 60, weights (.*)", killed.stdout)
    assert float(end) == pytest.approx(weights_after(directory, 4, 5, 20), rel=1e-4)


def test_a_bad_file_on_one_rank_ends_all(make_files: Files) -> None:
    paths = make_files(40, classified)
    Path(paths[33]).write_bytes(b"not a feature")
    ended = run(command(Path(paths[0]).parent, "--batch-size", 5, "--epochs", 1000))
    assert ended.returncode != 0
    assert "FeatureLoadError" in ended.stderr and paths[33] in ended.stderr


LOCKSTEP = """
import sys
import torch
import torch.distributed as dist
from gpucache_pipes import *
from gpucache_pipes.nodes import lockstep

rank, place, default_device, *paths = sys.argv[1:]
torch.set_default_device(default_device)
dist.init_process_group("gloo", init_method=f"file://{place}", world_size=2, rank=int(rank))
lengths = {"0": 6, "1": 5}
store = GPUFeatureStore("cpu")
mine = paths[int(rank)::2][:lengths[rank]]
batches = Lockstep(GPUCollator(GPUPrefetcher(mine, store), batch_size=1))
for epoch in range(2):
    batches.reset()
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            break
        except Exception as error:
            print(type(error).__name__, error)
            continue
        together = batch["label"].clone()
        dist.all_reduce(together)  # would hang if the ranks were not at the same step
        print(int(batch["label"]), int(together))
store.close()
dist.barrier()
ours = lockstep._groups[1]
assert ours() is not None
dist.destroy_process_group()
# Nobody else keeps it: one that lives until the interpreter ends can abort the process.
assert ours() is None
"""


@pytest.mark.parametrize("default_device", ["cpu", "meta"])
def test_lockstep(make_files: Files, tmp_path: Path, default_device: str) -> None:
    paths = make_files(12)
    bad = paths[5]  # the third one of rank 1
    Path(bad).write_bytes(b"")
    ranks = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", LOCKSTEP, str(rank), str(tmp_path / "meet")),
                *(default_device, *paths),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        )
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=100)[0].splitlines() for rank in ranks]
    # Before torch 2.10, gloo says that it is connected.
    outputs = [[line for line in lines if not line.startswith("[Gloo]")] for lines in printed]
    assert [rank.returncode for rank in ranks] == [0, 0]
    failed = f"cannot load {bad!r}: ValueError: the file is empty"
    # The third step is left out on both, and the sixth, which rank 1 does not have.
    steps = [(0, 1), (2, 5), None, (6, 13), (8, 17)]
    epoch = [
        f"RankError rank 1 failed with FeatureLoadError: {failed}"
        if step is None
        else f"{step[0]} {step[1]}"
        for step in steps
    ]
    assert outputs[0] == epoch * 2
    epoch = [
        f"FeatureLoadError {failed}" if step is None else f"{step[1] - step[0]} {step[1]}"
        for step in steps
    ]
    assert outputs[1] == epoch * 2


def test_lockstep_alone_passes_on() -> None:
    node = Lockstep([1, 2, 3])
    assert [next(node), next(node)] == [1, 2]
    again = Lockstep([1, 2, 3])
    again.reset(node.state_dict())
    assert list(again) == [3]
    with pytest.raises(TypeError, match="a node or an iterable"):
        Lockstep(3)  # type: ignore[arg-type]
