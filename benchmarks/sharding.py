"""Simulate the hit rate of one rank: with a new shard in each epoch, with a static shard, and with
the caches of all ranks as one.

6,400 files, 20 shuffled epochs, the default policy, which knows this epoch and the next. Each rank
has a cache for the given share of all files. The first epoch is excluded.
"""

from typing import Any

import numpy as np
from _common import parser_for, save

from gpucache_pipes import PathLister, Trace, simulate
from gpucache_pipes.peers import Owners, Schedule

FILES = 6400
EPOCHS = 20
RANKS = (1, 2, 4, 8, 16, 32, 64)
SHARES = (0.02, 0.05, 0.125, 0.25)


def hit_rate(ranks: int, share: float, shard: str) -> float:
    lister = PathLister(
        [str(number) for number in range(FILES)],
        shuffle=True,
        num_shards=ranks,
        shard_index=0,
        shard=shard,
    )
    epochs = []
    for _ in range(EPOCHS):
        lister.reset()
        epochs.append(list(lister))
    served = simulate(Trace.epochs(epochs), int(share * FILES)).epochs[1:]
    return sum(epoch.hits for epoch in served) / sum(epoch.requests for epoch in served)


def hit_rate_shared(ranks: int, share: float) -> float:
    """Of what the first rank serves, to itself and to others."""
    names = [str(number) for number in range(FILES)]
    listers = [
        PathLister(names, shuffle=True, num_shards=ranks, shard_index=rank) for rank in range(ranks)
    ]
    owners, epochs = Owners(names), []
    for _ in range(EPOCHS):
        for lister in listers:
            lister.reset()
        orders = np.array([[*map(int, lister)] for lister in listers])
        owners.ranks = owners.assigned(orders, 1)
        epochs.append(Schedule(orders, 1, owners.ranks, 0).all_served().tolist())
    served = simulate(Trace.epochs(epochs), int(share * FILES)).epochs[1:]
    return sum(epoch.hits for epoch in served) / sum(epoch.requests for epoch in served)


def main() -> None:
    args = parser_for(__doc__).parse_args()
    figures: dict[str, Any] = {}
    for shard in ("epoch", "static", "shared"):
        print(f"\n{shard}\n{'cache of each rank':>18}" + "".join(f"{n:7}" for n in RANKS))
        for share in SHARES:
            rates = {
                str(ranks): hit_rate_shared(ranks, share)
                if shard == "shared"
                else hit_rate(ranks, share, shard)
                for ranks in RANKS
            }
            figures[f"{shard}, {share:.1%}"] = rates
            print(f"{share:18.1%}" + "".join(f"{rate:7.0%}" for rate in rates.values()))
    save(args.json, figures)


if __name__ == "__main__":
    main()
