"""Kills ranks that share their caches, at random moments, and looks at all that they have served.

Each run goes on from the last state that rank 0 has saved, with 2 to 4 ranks. In each, one rank is
killed within moments. The others must end with an error that names it, within the time that ranks
wait for each other. Every batch must have the files that a plain PathLister says, and their bytes.

    python tests/peers/kill_ranks.py [--kills 30] [--seed 0]
"""

import argparse
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from ranks import results_of, start_ranks

TIMEOUT = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    choose = random.Random(args.seed)
    seen: Counter[str] = Counter()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        reached = 0
        while seen["kills"] < args.kills:
            world = choose.randint(2, 4)
            victim, delay = choose.randrange(world), choose.uniform(0, 0.6)
            # Now and then a run ends before, and all ranks end well.
            last = reached + choose.choice([2, 1000, 1000])
            work = (f"{directory}/files", victim, delay, last, TIMEOUT)
            ranks = start_ranks(world, "train_until_killed", *work)
            found = results_of(ranks, seconds=60)
            seen["runs"] += 1
            lived = [one for rank, one in enumerate(found) if rank != victim]
            for one in lived:
                if isinstance(one, str):
                    raise SystemExit(f"a rank has failed: {one}")
                assert not one["wrong"], one["wrong"]
                seen["batches"] += one["batches"]
                seen["received"] += one["received"]
            if isinstance(found[victim], str):
                assert found[victim].startswith("exit -9"), found[victim]
                seen["kills"] += 1
                for one in lived:
                    if one["error"] is None:
                        assert one["epoch"] == last
                        continue  # it had ended before
                    seen["errors"] += 1
                    names = re.findall(r"rank (\d+) is", one["error"])
                    seen["errors that name the one"] += names == [str(victim)]
                    if names != [str(victim)]:
                        print(f"rank {victim} of {world} was killed: {one['error']}")
            reached = max(one["epoch"] for one in lived)
            seen["epochs"] = reached
            print(f"\r{seen['kills']} kills, {reached} epochs", end="", flush=True, file=sys.stderr)
    print(dict(seen), f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
