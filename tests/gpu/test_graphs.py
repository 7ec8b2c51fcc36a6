"""CUDA graphs are captured while readers run."""

import importlib.util

import pytest
import torch
from gpu_common import cuda, first_column, rows

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister

pytestmark = [pytest.mark.gpu, cuda]

triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def test_a_graph_is_captured_while_the_readers_are_quiet() -> None:
    """A capture in the mode "global", the default, fails if another thread asks for an event or
    allocates. `quiesce` keeps the readers from doing so, which otherwise load all the time."""
    files = rows(4000)
    names = list(files)
    model = torch.nn.Linear(1024, 64).cuda()
    static = torch.randn(32, 1024, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        model(static)
    torch.cuda.current_stream().wait_stream(side)
    with GPUFeatureStore(
        "cuda", load_fn=files.__getitem__, max_cache_items=500, reader_threads=4
    ) as store:
        for turn in range(20):
            mine = names[200 * turn : 200 * (turn + 1)]
            store.prefetch(mine)
            graph = torch.cuda.CUDAGraph()
            with torch.no_grad(), store.quiesce(), torch.cuda.graph(graph):
                result = model(static)
            batch = store.get_batch(mine[:32]).collate()  # the readers go on
            assert first_column(batch) == list(range(200 * turn, 200 * turn + 32))
            static.copy_(batch)
            graph.replay()
            with torch.no_grad():
                torch.testing.assert_close(result, model(batch), rtol=1e-3, atol=1e-1)
        store.check()


def test_readers_go_on_after_a_capture_that_failed() -> None:
    files = rows(64)
    names = list(files)
    with GPUFeatureStore("cuda", load_fn=files.__getitem__, reader_threads=2) as store:
        with pytest.raises(ZeroDivisionError), store.quiesce():
            raise ZeroDivisionError
        assert first_column(store.get_batch(names).collate()) == list(range(64))


@triton
def test_reduce_overhead_while_readers_run() -> None:
    """torch.compile captures graphs of its own, thread-locally, in the first steps."""
    files = rows(2048, width=256)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(256, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)
    ).cuda()
    compiled = torch.compile(model, mode="reduce-overhead")
    with GPUFeatureStore(
        "cuda", load_fn=files.__getitem__, max_cache_items=100, reader_threads=4
    ) as store:
        lister = PathLister(list(files), batch_size=32, shuffle=True)
        node = GPUCollator(GPUPrefetcher(lister, store, depth=4))
        for _ in range(2):
            node.reset()
            for batch in node:
                scaled = batch / 2048
                with torch.no_grad():
                    torch.testing.assert_close(
                        compiled(scaled).clone(), model(scaled), rtol=1e-3, atol=1e-3
                    )
        store.check()
