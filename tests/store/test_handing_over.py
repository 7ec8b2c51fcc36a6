"""Interrupts while files are handed to reader threads, or read."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpucache_pipes import GPUFeatureStore
from gpucache_pipes.store.reader_pool import ReaderPool

Files = Callable[..., list[str]]


def test_an_interrupt_while_reading_leaves_nothing_behind(make_files: Files) -> None:
    paths = make_files(3)
    interrupts = [KeyboardInterrupt()]

    def load(path: str) -> Any:
        if path.endswith("1.pt") and interrupts:
            raise interrupts.pop()
        return torch.load(path)

    with GPUFeatureStore("cpu", asynchronous=False, load_fn=load) as store:
        with pytest.raises(KeyboardInterrupt):
            store.get_batch(paths)
        store.check()
        assert [int(f["label"]) for f in store.get_batch(paths)] == [0, 1, 2]


def test_an_interrupt_before_the_readers_know(
    make_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_files(2)
    with GPUFeatureStore("cpu") as store:
        with monkeypatch.context() as patch:

            def interrupted(*arguments: Any) -> None:
                raise KeyboardInterrupt

            patch.setattr(ReaderPool, "submit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.get_batch(paths)
        assert [int(f["label"]) for f in store.get_batch(paths)] == [0, 1]


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_while_files_are_handed_to_readers(
    make_files: Files, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    paths = make_files(100)
    with GPUFeatureStore("cpu", reader_threads=2) as store:
        submit, calls = ReaderPool.submit, 0

        def interrupted(self: ReaderPool, task: Any, argument: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 2 and when == "before":
                raise KeyboardInterrupt
            submit(self, task, argument)
            if calls == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(ReaderPool, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.request(paths)
        monkeypatch.undo()
        for _ in range(2):
            batch = store.get_batch(paths)
            assert [int(feature["label"]) for feature in batch] == list(range(100))
            store.check()
        assert store.stats().files_read <= 200
