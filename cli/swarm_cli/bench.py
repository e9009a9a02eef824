"""`swarm bench`: measurements of a swarm, each beside what it is held against, in one run.

Each is a file of `swarm_cli/benchmarks/`, which says what is measured and how; here the command line picks one.
"""

import argparse
import importlib
import json
from functools import partial

from rich.console import Console

from swarm_cli.benchmarks.setting import Report, open_setting
from swarm_cli.run_async import run_async


def run(arguments: argparse.Namespace) -> int:
    """The whole command; its exit status."""
    return run_async(partial(_bench, arguments, Console(stderr=True, highlight=False, soft_wrap=True)))


def chosen_measurement(arguments: argparse.Namespace) -> str:
    """The name of its file."""
    if arguments.clients is not None:
        return "many_clients"
    if arguments.stall:
        return "stall"
    if arguments.greedy:
        return "greedy"
    if arguments.training:
        return "training"
    return "one_client" if arguments.baseline is None else arguments.baseline


async def _bench(arguments: argparse.Namespace, console: Console) -> int:
    measurement = importlib.import_module(f"swarm_cli.benchmarks.{chosen_measurement(arguments)}")
    async with open_setting(arguments, console) as setting:
        report: Report = await measurement.measure(setting, arguments)
        if arguments.json:
            print(json.dumps({**setting.as_json(), **report.as_json()}))
        else:
            table = report.as_table()
            table.title = setting.title
            Console().print(table)
    return 0
