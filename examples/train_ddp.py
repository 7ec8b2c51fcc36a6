r"""Train on several GPUs, or in several processes on one CPU, and resume after a failure.

    torchrun --nproc-per-node 2 examples/train_ddp.py /path/to/features --synthetic
    torchrun --nproc-per-node 8 --max-restarts 3 examples/train_ddp.py /path/to/features \
        --share-caches --max-cache-bytes 40GiB --checkpoint run.ckpt

Each rank has a store on its own device, and PathLister gives it its part of the files. With
--share-caches the stores are one cache: each file is read once by all of them together. Every
--save-every steps rank 0 writes a checkpoint: the weights, and the state of the loader, which is a
few numbers. A run that finds a checkpoint continues with the batch after it, also in the middle of
an epoch.
"""

import argparse
import gc
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from train_with_gpu_cache import CLASSES, positive, write_synthetic

from gpucache_pipes import GPUCachedPathDataLoader, PathLister


def choose_device() -> torch.device:
    """A GPU for each process of this machine, if there are enough of them; else the CPU."""
    rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        torch.cuda.set_device(rank)
        return torch.device("cuda", rank)
    return torch.device("cpu")


def join_the_others(device: torch.device) -> None:
    """Initialise torch.distributed, also after a restart.

    The store in which torchrun keeps the addresses of all ranks survives a restart of the ranks,
    and some versions of torch confuse the addresses of one attempt with those of the attempt
    before. So each attempt has its own prefix of names.
    """
    store, rank, ranks = next(dist.rendezvous("env://"))
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=ranks,
        device_id=device if on_gpu else None,
    )


def save(checkpoint: Path, **parts: Any) -> None:
    """Replace the checkpoint in one step, since the process may be killed at any moment."""
    unfinished = checkpoint.with_suffix(".unfinished")
    torch.save(parts, unfinished)
    unfinished.replace(checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where the .pt files are")
    parser.add_argument("--synthetic", action="store_true", help="write sample files first")
    parser.add_argument("--epochs", type=positive, default=3)
    parser.add_argument("--batch-size", type=positive, default=64, help="of each rank")
    parser.add_argument("--shard", choices=["epoch", "static"], default="epoch")
    parser.add_argument("--share-caches", action="store_true", help="one cache for all ranks")
    parser.add_argument("--max-cache-bytes", help='budget of each rank, such as "8GiB"')
    parser.add_argument("--checkpoint", type=Path, help="the file to save to and to resume from")
    parser.add_argument("--save-every", type=positive, default=10, help="steps")
    args = parser.parse_args()

    device = choose_device()
    join_the_others(device)
    train(args, device)
    # Collect models that are left in reference cycles and have threads of their own before the
    # group is destroyed: otherwise torch may abort the process at exit.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def train(args: argparse.Namespace, device: torch.device) -> None:
    rank = dist.get_rank()
    if args.synthetic and rank == 0:
        write_synthetic(args.directory, count=2000, width=256)
    dist.barrier()

    lister = PathLister(
        args.directory, batch_size=args.batch_size, shuffle=True, seed=0, shard=args.shard
    )
    loader = GPUCachedPathDataLoader(
        lister,
        device=device,
        max_cache_bytes=args.max_cache_bytes,
        process_group=dist.group.WORLD if args.share_caches else None,
    )
    torch.manual_seed(0)
    width = loader.store.get(lister.paths[0])["feature"].numel()
    model = DistributedDataParallel(torch.nn.Linear(width, CLASSES, device=device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss_of = torch.nn.CrossEntropyLoss()

    first_epoch = step = 0
    if args.checkpoint is not None and args.checkpoint.exists():
        saved = torch.load(args.checkpoint, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
        first_epoch, step = saved["epoch"], saved["step"]
    print(f"rank {rank} is process {os.getpid()} on {device}, from step {step}", flush=True)

    with loader:
        for epoch in range(first_epoch, args.epochs):
            loader.set_epoch(epoch)  # all ranks in one epoch, however often each has iterated
            before = loader.store.stats()
            loss = torch.zeros((), device=device)
            for batch in loader:
                loss = loss_of(model(batch["feature"]), batch["label"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                if args.checkpoint is not None and rank == 0 and step % args.save_every == 0:
                    save(
                        args.checkpoint,
                        model=model.state_dict(),
                        optimizer=optimizer.state_dict(),
                        loader=loader.state_dict(),
                        epoch=epoch,
                        step=step,
                    )
            done = loader.store.stats().since(before)
            if rank == 0 and done.hits + done.misses:
                print(
                    f"epoch {epoch}: loss {float(loss.detach()):.4f}, "
                    f"hit rate {done.hit_rate:.1%}, {done.cached_bytes / 2**20:.1f} MiB",
                    flush=True,
                )
    if rank == 0:
        print(f"finished at step {step}, weights {float(model.module.weight.detach().sum()):.8f}")


if __name__ == "__main__":
    main()
