"""What caches one below the other serve, on the workloads of policies.py, in simulation.

A tenth of the files fits into the top tier, a fifth into the second, three tenths into the third.
For the default policy: hits of each tier, and what moves, as shares of the requests; in comparison
the top tier alone, and one tier as large as all of them. `--never` moves nothing up.

    python benchmarks/tiers.py [--policy clairvoyant] [--never] [--json FILE]
"""

from typing import Any

from _common import parser_for, save
from _workloads import FILES, workloads

from gpucache_pipes import simulate
from gpucache_pipes.cache.simulation import tiers

SHARES = (0.1, 0.2, 0.3)


def measure(policy: str) -> dict[str, Any]:
    figures = {}
    for name, workload in list(workloads().items())[:8]:
        trace = workload.trace(known=True)
        capacities = [round(share * FILES) for share in SHARES]
        below = simulate(trace, capacities, policy)
        requests = below.requests
        figures[name] = {
            "top alone": simulate(trace, capacities[0], policy).hits / requests,
            "tiers": [hits / requests for hits in below.tier_hits],
            "together": below.hits / requests,
            "one tier": simulate(trace, sum(capacities), policy).hits / requests,
            "moved down": sum(below.demoted) / requests,
        }
    return figures


def main() -> None:
    parser = parser_for(__doc__, rounds=1)
    parser.add_argument("--policy", default="clairvoyant")
    parser.add_argument("--never", action="store_true", help="nothing moves up")
    args = parser.parse_args()
    if args.never:
        tiers.Tiers._promote = lambda self, key, at: None  # type: ignore[method-assign]
    figures = measure(args.policy)
    heads = "top alone", "top", "second", "third", "together", "one tier", "moved down"
    print(f"{'':22}" + "".join(f"{head:>11}" for head in heads))
    for name, row in figures.items():
        cells = [row["top alone"], *row["tiers"], row["together"], row["one tier"]]
        cells.append(row["moved down"])
        print(f"{name:22}" + "".join(f"{cell:>11.1%}" for cell in cells))
    save(args.json, figures)


if __name__ == "__main__":
    main()
