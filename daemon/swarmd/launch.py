"""From flags to a running node and back to an exit code: config, logging, identity, the trio loop, errors in one line.

`swarmd/__main__.py` imports this only once the command line makes sense, so that `--help` is quick.
"""

import logging
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from random import Random, SystemRandom
from typing import TypeVar

import trio

from p2pswarm.core.clock import SystemClock
from p2pswarm.core.errors import ConfigError, SwarmingError
from swarmd.bootstrap import run_bootstrap
from swarmd.config import NodeConfig, ServerConfig, read_config
from swarmd.dry_run import dry_run
from swarmd.events import Events, JsonEvents, PlainEvents
from swarmd.identity_file import held_identity
from swarmd.open_files import allow_enough_files
from swarmd.serve import serve
from swarmd.stopping import stop_when_told, unless
from swarmd.throughput import ThroughputSource

EXIT_FINE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2

Config = TypeVar("Config", bound=NodeConfig)
Node = Callable[[Config, Path, Events, trio.Event], Awaitable[None]]
"""Runs until the event is set, then stops in order."""


def start(flags: Mapping[str, object], config_path: Path | None, started_unix_s: float) -> int:
    """Serves blocks of a model until told to stop; the exit code. The program was started at `started_unix_s`."""

    async def node(config: ServerConfig, identity_path: Path, events: Events, stop: trio.Event) -> None:
        if config.throughput is ThroughputSource.DRY_RUN:
            await unless(stop, partial(trio.to_thread.run_sync, dry_run, config, events, abandon_on_cancel=True))
            return
        await serve(
            config, identity_path, events, stop, clock=SystemClock(), random=Random(), started_unix_s=started_unix_s
        )

    return _run_node(partial(read_config, ServerConfig, flags, config_path), "server", node)


def bootstrap(flags: Mapping[str, object], config_path: Path | None) -> int:
    """Runs a node of the DHT without a model until told to stop; the exit code."""
    return _run_node(partial(read_config, NodeConfig, flags, config_path), "bootstrap", _bootstrap)


async def _bootstrap(config: NodeConfig, identity_path: Path, events: Events, stop: trio.Event) -> None:
    await run_bootstrap(config, identity_path, events, stop, clock=SystemClock(), random=SystemRandom())


def _run_node(read: Callable[[], Config], kind: str, node: Node[Config]) -> int:
    try:
        config = read()
    except ConfigError as error:
        _say_error(error)
        return EXIT_USAGE
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    events: Events = JsonEvents(sys.stdout, SystemClock()) if config.json else PlainEvents(sys.stdout)
    allow_enough_files()
    failures: list[BaseException] = []
    try:
        with held_identity(config.identity, kind) as identity_path:
            trio.run(_until_told, node, config, identity_path, events)
    except* SwarmingError as group:
        failures = leaves(group)
    except* KeyboardInterrupt:  # before the first signal could be received in order
        pass
    for failure in failures:
        _say_error(failure)
        if config.json:
            events("error", message=str(failure), kind=type(failure).__name__)
    exit_code = EXIT_FAILED if failures else EXIT_FINE
    _leave_running_thread(exit_code)
    return exit_code


async def _until_told(node: Node[Config], config: Config, identity_path: Path, events: Events) -> None:
    async with stop_when_told(with_stdin=config.stop_with_stdin) as stop:
        await node(config, identity_path, events, stop)


def leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The exceptions in a group of groups, the same message once."""
    found: dict[str, BaseException] = {}
    for exception in group.exceptions:
        for leaf in leaves(exception) if isinstance(exception, BaseExceptionGroup) else [exception]:
            found.setdefault(str(leaf), leaf)
    return list(found.values())


def _say_error(error: BaseException) -> None:
    sys.stderr.write(f"swarmd: {error}\n")


def _leave_running_thread(exit_code: int) -> None:
    """Ends the process although a thread still computes or loads: in an ordinary exit that could crash."""
    if any(thread.daemon and thread.name == "device" for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        os._exit(exit_code)
