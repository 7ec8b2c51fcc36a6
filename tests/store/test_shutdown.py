"""Closing, forks, pickling, and the end of the interpreter."""

import gc
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Gate, sample

from gpucache_pipes import GPUFeatureStore
from gpucache_pipes.device import HostBackend
from gpucache_pipes.testing import assert_same

Files = Callable[..., list[str]]


def test_close_wakes_who_waits() -> None:
    gate = Gate({"/a": torch.tensor([1.0])})
    store = GPUFeatureStore("cpu", load_fn=gate)
    batch = store.request(["/a"])
    gate.wait_until_started("/a")
    errors: list[BaseException] = []

    def consume() -> None:
        try:
            batch.result()
        except BaseException as error:
            errors.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    closer = threading.Thread(target=store.close)
    closer.start()
    consumer.join(60)
    gate.open("/a")
    closer.join(60)
    assert [str(e) for e in errors] == ["this GPUFeatureStore is closed"]
    for call in (store.get, lambda p: store.prefetch([p]), lambda p: store.release([p])):
        with pytest.raises(RuntimeError, match="closed"):
            call("/a")
    store.close()


def test_a_store_is_collected_without_close(make_files: Files) -> None:
    paths = make_files(2)
    store = GPUFeatureStore("cpu")
    store.get_batch(paths)
    threads = [t for t in threading.enumerate() if t.name.startswith("gpucache-reader")]
    assert threads
    del store
    gc.collect()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_a_store_cannot_be_pickled() -> None:
    with GPUFeatureStore("cpu") as store, pytest.raises(TypeError, match="one process"):
        pickle.dumps(store)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_store_refuses_to_work_after_a_fork(make_files: Files) -> None:
    paths = make_files(1)
    with GPUFeatureStore("cpu") as store:
        store.get(paths[0])
        child = os.fork()
        if child == 0:
            try:
                store.get(paths[0])
            except RuntimeError as error:
                store.close()
                os._exit(7 if "before a fork" in str(error) else 1)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert_same(store.get(paths[0]), sample(0))


def test_the_interpreter_ends_in_the_middle_of_everything(make_files: Files) -> None:
    paths = make_files(50)
    code = f"""
import sys
from gpucache_pipes import GPUFeatureStore
store = GPUFeatureStore("cpu")
tickets = [store.request({paths!r}) for _ in range(3)]
store.get({paths[0]!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_closing_in_a_child_does_not_wait_for_gathers_of_the_parent() -> None:
    """A thread of the parent is in a gather, and has no counterpart in the child."""
    backend: Any = HostBackend()
    gather, gathering, go_on = backend.gather, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        gathering.set()
        assert go_on.wait(60)
        return gather(*arguments)

    def refuse_to_wait(*_: Any) -> None:
        os._exit(1)

    backend.gather = slow
    with GPUFeatureStore(backend, load_fn=lambda path: torch.ones(2)) as store:
        consumer = threading.Thread(target=lambda: store.get("/a"))
        consumer.start()
        assert gathering.wait(60)
        child = os.fork()
        if child == 0:
            threading.Condition.wait = refuse_to_wait  # type: ignore[assignment]
            store.close()
            os._exit(7)
        go_on.set()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        consumer.join(60)


def test_the_exit_waits_for_the_memory_of_a_store_that_was_dropped(tmp_path: Path) -> None:
    """A reader frees it: if the interpreter were torn down meanwhile, torch would abort."""
    script = tmp_path / "script.py"
    script.write_text(
        """
import time, torch
from gpucache_pipes import GPUFeatureStore
from gpucache_pipes.device.host import HostBackend

class Slow(HostBackend):
    def close(self):
        time.sleep(0.2)
        super().close()
        print("freed", flush=True)

torch.save(torch.ones(4), "x.pt")
store = GPUFeatureStore(Slow())
store.get("x.pt")
del store
"""
    )
    run = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (run.returncode, run.stdout) == (0, "freed\n"), run.stderr
