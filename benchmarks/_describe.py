"""Print, as JSON, what the figures of a check depend on: versions, device, driver, memory.

In a process of its own: to ask for the memory of a GPU takes a context there, which would take
memory from all that is measured later.

    python benchmarks/_describe.py
"""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "torchdata", "triton", "cuda-bindings", "pytest", "hypothesis", "numpy", "spdl",
    "grain", "monai", "tensordict", "safetensors",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """The environment; "accelerator" is None if there is none."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found: dict[str, Any] = {
        "accelerator": None if accelerator is None else accelerator.type,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "versions": versions(),
        "cuda": torch.version.cuda,
        "tools": {name: shutil.which(name) for name in ("compute-sanitizer", "nvidia-smi", "gcc")},
        "variables": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("CUDA_", "PYTORCH_", "NCCL_", "OMP_"))
            and name != "CUDA_CACHE_PATH"  # gpu_check sets it
        },
    }
    with contextlib.suppress(AttributeError, ValueError, OSError):
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        found["memory_bytes"] = pages * size
    if found["accelerator"] == "cuda":
        found["driver"] = driver()
        found["devices"] = []
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            properties = torch.cuda.get_device_properties(number)
            found["devices"].append(
                {
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "free_bytes": free,
                    "total_bytes": total,
                }
            )
    return found


def versions() -> dict[str, str]:
    """The versions of the packages that are installed, or are on the path."""
    result = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            result[package] = metadata.version(package)
    if "torchdata" not in result:
        # On PYTHONPATH without the metadata of an installation.
        with contextlib.suppress(ImportError):
            import torchdata

            result["torchdata"] = getattr(torchdata, "__version__", "unknown")
    return result


def driver() -> str | None:
    """The version of the NVIDIA driver; None if nothing tells it."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
        return said.stdout.splitlines()[0].strip()
    with contextlib.suppress(OSError, IndexError):
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    return None


if __name__ == "__main__":
    # torch warns on stdout or stderr about drivers; the last line is the answer.
    print(json.dumps(describe()), file=sys.stdout, flush=True)
