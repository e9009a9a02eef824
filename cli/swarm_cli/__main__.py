"""The `swarm` command: parses, hands over to the sub-command's file, and turns errors into one line and an exit status.

0: done; 1: an error, told in one line with what to do next; 2: a mistake on the command line; 130: interrupted.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from p2pswarm.core.errors import MissingBlocksError, ModelNotFound, NoPeersError, SwarmingError
from swarm_cli.arguments import parse_arguments

INTERRUPTED = 130
"""As shells report a program that was stopped by Ctrl-C."""
BROKEN_PIPE = 141
"""As shells report a program whose reader has gone."""

MODEL_COMMANDS = frozenset({"generate", "finetune", "demo", "bench"})
"""Those that hold the client's part of a model."""

WHAT_NEXT: tuple[tuple[type[SwarmingError], str], ...] = (
    (
        NoPeersError,
        "give the address of a live node with --peers (of a private swarm, with --swarm-key too), "
        "or start a swarm: swarmd start MODEL",
    ),
    (
        ModelNotFound,
        "start a server for it: swarmd start MODEL --peers ...; see what there is: swarm status --peers ...",
    ),
    (MissingBlocksError, "start servers for these blocks: swarmd start MODEL --blocks START:END --peers ..."),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `swarm` command."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; its exit status."""
    parsed = parse_arguments(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns when a process is started after tokenizing
    try:
        if parsed.command in MODEL_COMMANDS:
            importlib.import_module("p2pswarm.blocks.light_imports").import_transformers_lightly()
        status: int = importlib.import_module(f"swarm_cli.{parsed.command}").run(parsed)
        sys.stdout.flush()
        return status
    except SwarmingError as error:
        print(f"swarm: error: {error}", file=sys.stderr)
        for kind, advice in WHAT_NEXT:
            if isinstance(error, kind):
                print(f"  {advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # What is still buffered must not fail once more when the interpreter flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


if __name__ == "__main__":
    main()
