"""The tests of edges and growth, again, with other settings of torch's allocator."""

import pytest
from gpu_common import PYTEST, cuda, run

pytestmark = [pytest.mark.gpu, cuda]

FILES = ("tests/gpu/test_edges.py", "tests/gpu/test_growing.py")


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"},
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    ],
    ids=["expandable segments", "cudaMallocAsync", "no caching"],
)
def test_edges_and_growth(variables: dict[str, str]) -> None:
    """The edges hold. Without caching, memory is freed when it is dropped, so that an access after
    that is an error. "needed" is left out: an allocator may hide a race by waiting."""
    arguments = (*PYTEST, "-k", "not needed and not stress", *FILES)
    done = run(*arguments, timeout=100, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
