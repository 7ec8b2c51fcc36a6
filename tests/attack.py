"""Attacks the package for as long as you let it; every failure comes with the line to repeat it.

    make attack MINUTES=10
    python tests/attack.py --minutes 10 [--way NAME ...] [--jobs 2] [--json FILE]
    python tests/attack.py --way stores --seed 17          # one seed again

Ways: random pipelines resumed at every position; a store under threads, faults and readers that
hang; damaged files against the libraries that define their formats; signals of every kind; and a
simulated device on several streams. Each seed runs with a time limit, in a process that runs
several of them: one that crashes or hangs is found, and the others go on. Afterwards no thread and
no descriptor may be left.
"""

import argparse
import contextlib
import faulthandler
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

AT_A_TIME = 25
"""Seeds of a process."""

PATIENCE = 120
"""Seconds for a seed."""


def run_seed(way: str, seed: int) -> Counter[str]:
    """One seed, and what must be true behind it. Raises what is wrong."""
    import torch
    from attacks import WAYS
    from attacks.common import open_descriptors

    torch.set_num_threads(1)
    gc.collect()
    before = open_descriptors()
    with tempfile.TemporaryDirectory(prefix="gpucache-attack-") as directory:
        counts = WAYS[way](seed, Path(directory))
    gc.collect()
    readers = [t for t in threading.enumerate() if t.name.startswith("gpucache")]
    for reader in readers:
        reader.join(10)
    left = [reader.name for reader in readers if reader.is_alive()]
    assert not left, f"threads left behind: {left}"
    assert open_descriptors() <= before, "descriptors left behind"
    counts["seeds"] += 1
    return counts


def work(way: str, first: int, count: int) -> None:
    """Seeds, one after the other; says on stdout which one begins and what was done in all."""
    # Not faulthandler.enable(): Python's handlers would run on its small stack, which a handful of
    # signals at one time uses up. The status says that a process has crashed.
    done: Counter[str] = Counter()
    for seed in range(first, first + count):
        print(json.dumps({"seed": seed}), flush=True)
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        try:
            done += run_seed(way, seed)
        except BaseException:
            traceback.print_exc()
            print(json.dumps({"failed": seed}), flush=True)
        faulthandler.cancel_dump_traceback_later()
    print(json.dumps({"done": done}), flush=True)


class Attack:
    """All ways in turns, in processes of their own, until the time is over."""

    def __init__(self, ways: list[str], first: int, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.ways = ways
        self.lock = threading.Lock()
        self.turn = 0
        self.next_seed = dict.fromkeys(ways, first)
        self.counts: dict[str, Counter[str]] = {way: Counter() for way in ways}
        self.failures: list[str] = []

    def run(self, jobs: int) -> None:
        threads = [threading.Thread(target=self.run_processes) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def run_processes(self) -> None:
        while time.monotonic() < self.end:
            with self.lock:
                way = self.ways[self.turn % len(self.ways)]
                self.turn += 1
                first = self.next_seed[way]
                self.next_seed[way] += AT_A_TIME
            self.run_process(way, first)

    def run_process(self, way: str, first: int) -> None:
        command = [sys.executable, __file__, "--way", way, "--seed", str(first)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        with tempfile.TemporaryFile("w+") as said:
            done = subprocess.run(
                [*command, "--worker", str(AT_A_TIME)],
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env=environment,
                check=False,
                timeout=AT_A_TIME * PATIENCE,
            )
            said.seek(0)
            text = said.read()
        seed, finished, failed = first, False, []
        for line in done.stdout.splitlines():
            with contextlib.suppress(ValueError, AttributeError):
                news: dict[str, Any] = json.loads(line)
                seed = news.get("seed", seed)
                if "failed" in news:
                    failed.append(news["failed"])
                if "done" in news:
                    finished = True
                    with self.lock:
                        self.counts[way] += Counter(news["done"])
        if not finished:
            failed.append(seed)
        for number in failed:
            line = f"python tests/attack.py --way {way} --seed {number}"
            how = "" if finished or number != seed else f" (status {done.returncode})"
            with self.lock:
                self.failures.append(line + how)
                print(f"FAILED{how}: {line}\n{text[-4000:]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--way", action="append", help="by default all")
    parser.add_argument("--seed", type=int, help="this one alone, in this process")
    parser.add_argument("--first-seed", type=int, default=int(time.time()) % 1_000_000 * 1000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    ways = args.way or ["pipelines", "stores", "reading", "signals", "devices"]
    if args.worker is not None:
        work(ways[0], args.seed, args.worker)
        return
    if args.seed is not None:
        for way in ways:
            print(way, dict(run_seed(way, args.seed)))
        return
    print(f"seeds from {args.first_seed}", flush=True)
    attack = Attack(ways, args.first_seed, 60 * args.minutes)
    attack.run(args.jobs)
    figures = {
        "minutes": args.minutes,
        "first seed": args.first_seed,
        "failures": attack.failures,
        **{way: dict(sorted(counts.items())) for way, counts in attack.counts.items()},
    }
    print(json.dumps(figures, indent=1))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(bool(attack.failures))


if __name__ == "__main__":
    main()
