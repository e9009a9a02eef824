"""Is D* Lite worth it? Its work against Dijkstra's and plain dynamic programming's, over swarms under churn.

    python -m simulations.routing.run

Method. Servers with random spans of a model of 80 blocks, random distances and loads. Between two routes nothing
happens, or one change, or a percent of the servers changes: one joins, leaves, fails, or its distance or its load is
another one. All three ways are told the same and must find equally fast routes. Counted are the places that each takes
from its queue (dynamic programming has none: what it looks at) and the time from the news to the route.
"""

import argparse

from simulations.routing.measure import Scenario, Work, measure

SIZES = (10, 100, 1000, 10_000)
ROUTES = {10: 200, 100: 100, 1000: 20, 10_000: 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of servers")
    parser.add_argument("--routes", type=int, help="per row; by default fewer for larger swarms")
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args()
    print(__doc__.splitlines()[0])
    print(f"\nseed {flags.seed}; milliseconds are medians, places are means\n")
    print(HEADING)
    for num_servers in flags.sizes:
        num_routes = flags.routes or ROUTES.get(num_servers, 20)
        for num_changes, changed in ((0, 0.0), (1, 0.0), (0, 0.01)):
            scenario = Scenario(num_servers, changed, num_changes, num_routes, flags.seed)
            if changed and scenario.changes_per_route <= 1:
                continue
            print(row(scenario, measure(scenario)), flush=True)


HEADING = "\n".join(
    [
        f"{'':>7} {'changes':>7} | {'D* Lite':^22} | {'Dijkstra':^16} | {'plain DP':^16} | {'places':>6} {'':>8}",
        f"{'servers':>7} {'a route':>7} | {'first':>6} {'places':>7} {'ms':>7} | {'places':>7} {'ms':>8} |"
        f" {'places':>7} {'ms':>8} | {'saved':>6} {'fastest':>8}",
    ]
)


def row(scenario: Scenario, work: dict[str, Work]) -> str:
    """One line of the table; "places saved" is D* Lite's against Dijkstra's."""
    dstar, dijkstra, plain = work["D* Lite"], work["Dijkstra"], work["plain DP"]
    saved = 1 - dstar.mean_places / dijkstra.mean_places
    fastest = min(work, key=lambda name: work[name].median_ms)
    return (
        f"{scenario.num_servers:>7} {scenario.changes_per_route:>7} |"
        f" {1000 * dstar.first_s:>6.0f} {dstar.mean_places:>7.0f} {dstar.median_ms:>7.2f} |"
        f" {dijkstra.mean_places:>7.0f} {dijkstra.median_ms:>8.2f} |"
        f" {plain.mean_places:>7.0f} {plain.median_ms:>8.2f} | {saved:>6.0%} {fastest:>8}"
    )


if __name__ == "__main__":
    main()
