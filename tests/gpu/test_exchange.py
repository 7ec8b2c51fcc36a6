"""Messages of one rank to itself, by the collective operations of the device: NCCL on CUDA."""

import pytest
from gpu_common import ACCELERATOR, run_script

pytestmark = pytest.mark.gpu

WITH_ITSELF = """
import random
import sys

import numpy as np
import torch
import torch.distributed as dist
from gpu.gpu_common import keep_busy, own_stream, wait

from gpucache_pipes import GPUFeatureStore
from gpucache_pipes.peers import Exchange, PeerGroup, Schedule

device = torch.device(sys.argv[1])
backend = dist.get_default_backend_for_device(device)
options = {}
if device.type != "cpu":
    options["device_id"] = torch.device(device.type, device.index or 0)
dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)
files = {f"/f/{n}": {"x": torch.full((700 + n % 3 * 900,), float(n)), "n": n} for n in range(64)}
names = list(files)


class Served:
    def __init__(self, batch):
        self.batch = batch

    def look(self):
        return store.serving.look(self.batch)

    def pack(self):
        return store.serving.pack(self.batch)

    def abandon(self):
        self.batch.cancel()


def serve(step):
    asked = schedule.served(step)[0].tolist()
    return Served(store.request([names[n] for n in asked]))


with GPUFeatureStore(
    device, load_fn=files.__getitem__, max_cache_items=20, reader_threads=4
) as store:
    group = PeerGroup(dist.group.WORLD, 30, store.device)
    group.open()
    assert group.connection.sends_device_memory == (backend != "gloo")
    for seed in range(10):
        choose = random.Random(seed)
        orders = np.array([[choose.randrange(64) for _ in range(16 * 60)]])
        schedule = Schedule(orders, 16, np.zeros(64, np.int16), 0)
        schedule.crosses[:] = True  # as if other ranks owned the files
        messages = Exchange(group, schedule, 2, store.serving.backend, store.serving.stream, serve)
        held = []
        for step in range(schedule.steps + 2):
            messages.send(step, "a step")
            if messages.error is not None:
                raise messages.error
            if step < 2:
                continue
            numbers = schedule.own(step - 2).tolist()
            arrival = messages.arrival(step - 2, "a step")
            with own_stream():
                keep_busy(200_000)
                paths = [names[n] for n in numbers]
                batch = arrival.batch(store.serving.backend, paths, slice(0, 16))
                held.append((numbers, [(f["n"], f["x"].sum()) for f in batch]))
            messages.forget(step - 2)
            if len(held) > 3:
                numbers, found = held.pop(0)
                wait()
                for n, (number, total) in zip(numbers, found):
                    assert number == n and float(total) == n * (700 + n % 3 * 900), n
    store.check()
    assert store.stats().pending_batches == 0
dist.destroy_process_group()
print("600 messages")
"""


def test_rows_come_as_they_were_sent() -> None:
    assert "600 messages" in run_script(WITH_ITSELF, ACCELERATOR)
