"""Several GPUs: each store keeps to its own, and ranks train together."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gpu_common import ROOT, run, several_gpus

from gpucache_pipes import GPUFeatureStore
from gpucache_pipes.testing.contracts import in_threads

sys.path.insert(0, str(ROOT / "tests" / "peers"))
from ranks import run_ranks

pytestmark = [pytest.mark.gpu, several_gpus]


def test_a_store_on_the_second_gpu_makes_no_context_on_the_first(
    make_files: Callable[..., list[str]],
) -> None:
    directory = Path(make_files(64)[0]).parent
    script = str(Path(__file__).with_name("other_device.py"))
    done = run(script, str(directory))
    assert done.returncode == 0, done.stdout + done.stderr
    found = dict(re.findall(r"^(.*): (True|False)$", done.stdout, re.MULTILINE))
    assert len(found) == 7, done.stdout
    assert set(found.values()) == {"False"}, done.stdout


def test_stores_on_two_gpus_in_one_process() -> None:
    files = {f"/f/{n}": torch.full((1024,), float(n)) for n in range(64)}
    names = list(files)

    def use(device: int) -> None:
        with GPUFeatureStore(
            f"cuda:{device}", load_fn=files.__getitem__, max_cache_items=16
        ) as store:
            for turn in range(200):
                numbers = [(turn * 7 + n * 5) % 64 for n in range(8)]
                batch = store.get_batch([names[n] for n in numbers]).collate()
                assert batch.device == torch.device("cuda", device)
                assert [int(n) for n in batch[:, 17].tolist()] == numbers
            store.check()

    in_threads(use, 2)


@pytest.mark.parametrize("more", [[], ["--share-caches"]])
def test_two_ranks_train_with_nccl_and_ddp(more: list[str], tmp_path: Path) -> None:
    done = run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "examples/train_ddp.py", str(tmp_path / "features"), "--synthetic", "--epochs", "3",
        *more, TQDM_DISABLE="1", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        assert re.search(rf"rank {rank} is process \d+ on cuda:{rank}", done.stdout), done.stdout
    assert "finished at step" in done.stdout
    # Alone, each finds half of an epoch in its cache.
    assert ("epoch 1: loss" in done.stdout) and (("hit rate 100.0%" in done.stdout) == bool(more))


def test_batches_by_nccl_are_those_without_it(tmp_path: Path) -> None:
    """Rows from and to device memory, and all that `tests/peers` compares on the host."""
    for found in run_ranks(2, "equal_to_the_plain_one", str(tmp_path), [*range(40)], "cuda"):
        assert found["received"] > 30
