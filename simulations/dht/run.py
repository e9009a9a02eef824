"""Does the DHT find everything, fast, with a third of its nodes dead or hung, and let nothing bad through?

    python -m simulations.dht.run --nodes 500 --dead 0.3 --hung 0.05 --seed 1

Method. All nodes join one after the other over links of `--latency-ms`; owners store signed records, each once more
with a higher sequence number; then, at one moment, some nodes are killed, some hang, and some begin to answer readers
with records that are forged, oversized, replayed or expired, which a stranger also asks the holders to store. Honest
nodes drawn at random then look up keys drawn at random. All times are simulated.
"""

import argparse
import time

from simulations.dht.scenario import Outcome, Scenario, simulate


def main() -> None:
    scenario = read_scenario()
    print(__doc__.splitlines()[0])
    print(f"\n{scenario}\n")
    began_s = time.perf_counter()
    outcome = simulate(scenario)
    print(report(outcome))
    print(f"{time.perf_counter() - began_s:.1f} s of real time")


def read_scenario() -> Scenario:
    """The scenario that the command line describes."""
    usual = Scenario()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=usual.num_nodes)
    parser.add_argument("--dead", type=float, default=usual.dead)
    parser.add_argument("--hung", type=float, default=usual.hung)
    parser.add_argument("--lying", type=float, default=usual.lying)
    parser.add_argument("--keys", type=int, default=usual.num_keys)
    parser.add_argument("--owners", type=int, default=usual.owners_per_key, help="per key")
    parser.add_argument("--lookups", type=int, default=usual.num_lookups)
    parser.add_argument("--latency-ms", type=float, default=1000 * usual.latency_s, help="one way")
    parser.add_argument("--seed", type=int, default=usual.seed)
    flags = parser.parse_args()
    return Scenario(
        num_nodes=flags.nodes,
        dead=flags.dead,
        hung=flags.hung,
        lying=flags.lying,
        num_keys=flags.keys,
        owners_per_key=flags.owners,
        num_lookups=flags.lookups,
        latency_s=flags.latency_ms / 1000,
        seed=flags.seed,
    )


def report(outcome: Outcome) -> str:
    """The answer."""
    times_s = sorted(outcome.lookup_times_s)
    bad = ", ".join(f"{count} {kind}" for kind, count in outcome.bad_records.items()) or "none"
    asked, known = f"{outcome.requests_per_join:.0f}", f"{outcome.contacts_per_node:.0f}"
    return "\n".join(
        [
            f"joining              {asked} requests a node, which then knows {known} others",
            f"records found        {outcome.num_expected - outcome.num_missing} of {outcome.num_expected}",
            f"bad records found    {bad}, of {outcome.num_lies} that were sent",
            f"lookup, simulated    median {outcome.median_lookup_s:.2f} s,"
            f" 90 % {times_s[len(times_s) * 9 // 10]:.2f} s, slowest {times_s[-1]:.2f} s",
        ]
    )


if __name__ == "__main__":
    main()
