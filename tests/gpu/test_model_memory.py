"""What a cache leaves to the model beside it, and to the host."""

from pathlib import Path

import pytest
from edges import new_backend
from gpu_common import MiB, cuda, run

from gpucache_pipes import GPUFeatureStore

pytestmark = pytest.mark.gpu


def train(kind: str) -> None:
    script = str(Path(__file__).with_name("growing_model.py"))
    done = run(script, kind, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exact" in done.stdout


def test_steps_that_grow_by_a_tenth_never_run_out_of_memory_beside_a_store_without_a_budget() -> (
    None
):
    train("growing")


@cuda
def test_a_much_larger_step_is_repeated_after_the_cache_has_yielded_memory() -> None:
    train("yielding")


@cuda
def test_a_step_that_can_never_fit_fails_and_the_store_goes_on() -> None:
    train("hopeless")


@cuda
def test_pinned_memory_stays_within_staging_bytes() -> None:
    import torch

    files = {f"/f/{n}": torch.full((1024,), float(n)) for n in range(4096)}
    with GPUFeatureStore(
        new_backend(), load_fn=files.__getitem__, reader_threads=4, staging_bytes=8 * MiB
    ) as store:
        for start in range(0, 4096, 256):
            store.get_batch(list(files)[start : start + 256])
        assert 0 < store.stats().staging_bytes <= 8 * MiB
