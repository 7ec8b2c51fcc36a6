"""The tests of edges under NVIDIA's compute-sanitizer, which finds wrong accesses of kernels.

memcheck finds accesses outside allocations, for which PYTORCH_NO_CUDA_MEMORY_CACHING makes each
tensor an allocation of its own. racecheck finds hazards in shared memory.
"""

import os
import shutil
import subprocess
import sys

import pytest
from gpu_common import PYTEST, ROOT, cuda

SANITIZER = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path="/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
)
pytestmark = [
    pytest.mark.gpu,
    cuda,
    pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed"),
]

ERRORS = 9
"""Exit status for errors of kernels: none of pytest's."""


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no caching"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_kernel_makes_a_wrong_access(tool: str, caching: bool) -> None:
    assert SANITIZER is not None
    environment = {**os.environ}
    if not caching:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    done = subprocess.run(
        [
            # Calls that fail without harm, as torch makes some, are not what this is about.
            SANITIZER, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", str(ERRORS),
            sys.executable, *PYTEST, "-k", "holds", "tests/gpu/test_edges.py",
        ],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode != ERRORS, f"{tool} found errors\n{said}"
    assert done.returncode == 0, said
    assert "passed" in done.stdout
