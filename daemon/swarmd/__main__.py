"""The `swarmd` command: `start` serves blocks of a model, `bootstrap` only helps others to find each other.

Nothing heavy is imported before the command line has been understood, so that `--help` takes a tenth of a second.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path

from p2pswarm.core.clock import SystemClock

START_HELP = """\
examples:
  swarmd start HuggingFaceTB/SmolLM2-135M-Instruct                    a new swarm, all blocks here
  swarmd start ./model --blocks 0:10 --peers /ip4/192.0.2.7/tcp/4001/p2p/12D3KooW...
  swarmd start model.gguf --num-blocks 8 --peers ...                  the 8 blocks that the swarm needs most
  swarmd start --config server.toml                                   every flag can be a key of the file
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; its exit code: 0 stopped as told, 1 failed, 2 wrong usage."""
    started_unix_s = SystemClock().unix_time_s()
    flags = vars(make_parser().parse_args(arguments))
    command = flags.pop("command")
    config_path: Path | None = flags.pop("config", None)
    gc.disable()  # until ready (`swarmd/serve.py`): a start makes a million objects, and hardly any garbage
    from swarmd import launch  # imports trio and the network: not for --help

    match command:
        case "start":
            return launch.start(flags, config_path, started_unix_s)
        case _:
            return launch.bootstrap(flags, config_path)


def make_parser() -> argparse.ArgumentParser:
    """The flags; a flag that is not given is absent from the result, so that the config file can speak."""
    parser = argparse.ArgumentParser(prog="swarmd", description="Serve a part of a language model to a swarm of peers.")
    parser.add_argument(
        "--version", action=PrintVersion, nargs=0, default=argparse.SUPPRESS, help="print the version and exit"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_start(commands)
    _add_bootstrap(commands)
    return parser


def _add_start(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    start = commands.add_parser(
        "start",
        help="serve blocks of a model",
        description="Serve blocks of a model. Without --peers this starts a new swarm and prints how others join it.",
        epilog=START_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    start.add_argument("model", metavar="MODEL", nargs="?", help="a Hugging Face folder, a hub id, or a .gguf file")
    _add_node_flags(start)
    blocks = start.add_argument_group("what to serve")
    blocks.add_argument("--blocks", metavar="A:B", help="serve blocks A up to but not including B")
    blocks.add_argument("--num-blocks", metavar="N", help="serve N blocks, those that the swarm needs most")
    blocks.add_argument("--max-length", metavar="TOKENS", help="longest session (default: the model's own limit)")
    blocks.add_argument(
        "--kv-cache", metavar="SIZE", help="of all sessions: 4GiB, 16384 tokens or 25%% (default: by free memory)"
    )
    blocks.add_argument(
        "--training-memory", metavar="SIZE", help="for gradients that clients train by (default: for 2048 tokens)"
    )
    blocks.add_argument(
        "--max-tuning", metavar="SIZE", help="of what a client brings along with a call or session (default: 64MiB)"
    )
    blocks.add_argument("--name", help="shown to people beside the peer id")
    compute = start.add_argument_group("how to compute")
    compute.add_argument("--device", help="auto (default), cpu, cuda, cuda:N or mps")
    compute.add_argument("--dtype", help="auto (default: the checkpoint's), float32, bfloat16 or float16")
    compute.add_argument("--quant", help="none, int8 or nf4: bits of a weight (default: nf4 on CUDA, else none)")
    compute.add_argument(
        "--adapters", metavar="PATH[=NAME]", nargs="+", help="LoRA adapters (folders or hub ids) that sessions may pick"
    )
    compute.add_argument("--threads", metavar="N", help="of torch (default: one per physical core)")
    compute.add_argument(
        "--throughput",
        metavar="HOW",
        help="auto (default: measured once and remembered), eval (measured anew), dry-run (shown, nothing is served), "
        "or the tokens per second to announce",
    )
    source = start.add_argument_group("where the model comes from")
    source.add_argument("--revision", help="branch, tag or commit on the hub")
    source.add_argument("--token", help="for gated models of the hub (better: the HF_TOKEN variable)")
    source.add_argument("--cache-dir", metavar="DIR", help="of downloaded and converted weights")
    source.add_argument(
        "--max-disk-space",
        metavar="SIZE",
        help="that they may take, such as 50GiB (default: no limit, but 1 GiB of the disk stays free)",
    )
    start.add_argument(
        "--grace-period",
        metavar="S",
        dest="grace_period_s",
        help="seconds that running sessions have to end after a signal, or before a move (default: 10)",
    )
    balance = start.add_argument_group("when to move to other blocks (never with --blocks)")
    balance.add_argument(
        "--balance-quality",
        metavar="PART",
        help="move where the swarm has less than this part of the throughput it would have then (default: 0.75)",
    )
    balance.add_argument(
        "--balance-check-period",
        metavar="S",
        dest="balance_check_period_s",
        help="seconds between looks whether to move, on average (default: 30)",
    )
    watching = start.add_argument_group("how to watch it")
    watching.add_argument(
        "--stats-period", metavar="S", dest="stats_period_s", help="seconds between lines of statistics (default: none)"
    )
    watching.add_argument(
        "--metrics", metavar="[IP:]PORT", help="serve them to Prometheus, on this machine unless an IP says otherwise"
    )


def _add_bootstrap(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    bootstrap = commands.add_parser(
        "bootstrap",
        help="help others to find each other, without a model",
        description="Run a node of the swarm's DHT without a model: an address that others can join by.",
        argument_default=argparse.SUPPRESS,
    )
    _add_node_flags(bootstrap)


def _add_node_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peers", metavar="MULTIADDR", nargs="+", help="nodes of the swarm to join, or an invitation to a private one"
    )
    parser.add_argument("--swarm-key", metavar="FILE", help="key of a private swarm (`swarm keygen`): no others get in")
    parser.add_argument(
        "--members", metavar="FILE", help="who is in it (`swarm members`; default: whoever has the key)"
    )
    parser.add_argument("--host", help="IP address to listen on (default: all, IPv4 and IPv6)")
    parser.add_argument("--port", help="TCP port to listen on (default: any free one)")
    parser.add_argument(
        "--announce", metavar="MULTIADDR", nargs="+", help="addresses for others to dial (default: found out)"
    )
    parser.add_argument(
        "--public-ip", metavar="IP", help="where others reach the port listened on (default: found out)"
    )
    parser.add_argument("--no-upnp", action="store_true", help="never ask the router to forward a port")
    parser.add_argument("--no-relay", action="store_true", help="never pass on what others send each other")
    parser.add_argument("--relay-rate", metavar="SIZE", help="of that, in all, per second (default: 8MiB)")
    parser.add_argument(
        "--identity", metavar="FILE", help="key of this node (default: one that no other node is using)"
    )
    parser.add_argument("--config", metavar="FILE.toml", type=Path, help="settings; flags win over them")
    parser.add_argument("--json", action="store_true", help="events as JSON lines on stdout")
    parser.add_argument(
        "--stop-with-stdin", action="store_true", help="stop when stdin ends: with the program that started it"
    )
    parser.add_argument("--log-level", help="debug, info, warning (default) or error; the log goes to stderr")


class PrintVersion(argparse.Action):
    """Looks the version up only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version  # takes a third of the time of --help

        print(f"swarmd {version('p2pswarm')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
