"""The command line is understood, refused clearly, and explained fast."""

import resource
import subprocess
import sys

import pytest

from swarm_cli.arguments import parse_arguments

COMMANDS = ("generate", "status", "route", "demo", "bench")
HELP_S = 0.3


def test_peers_can_be_given_together_or_one_by_one() -> None:
    arguments = parse_arguments(["generate", "M", "hello", "--peers", "a", "b", "--peers", "c", "--temperature", "0"])
    assert (arguments.model, arguments.prompt, arguments.peers) == ("M", "hello", ["a", "b", "c"])
    assert (arguments.temperature, arguments.top_p, arguments.max_new_tokens) == (0.0, None, 128)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--temperature", "-1"], "a number from 0, not -1"),
        (["--temperature", "nan"], "a number from 0, not nan"),
        (["--top-p", "1.5"], "a number above 0 and up to 1, not 1.5"),
        (["--max-new-tokens", "0"], "a whole number from 1, not 0"),
        (["--max-new", "3"], "unrecognized arguments: --max-new"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_mistakes_are_named_and_end_with_status_2(flags, complaint, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        parse_arguments(["generate", "M", "hello", *flags])
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err


def test_benchmark_takes_numbers_of_clients() -> None:
    assert parse_arguments(["bench", "--clients", "1,2,8"]).clients == (1, 2, 8)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--clients", "1,0"], "a whole number from 1, not 0"),
        (["--clients", "1,many"], "invalid"),
        (["--clients", "2", "--stall"], "not allowed with argument"),
        (["--baseline", "nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_benchmark_measures_one_thing_at_a_time(flags, complaint, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        parse_arguments(["bench", *flags])
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err


def processor_s_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_answers_at_once_without_torch(command) -> None:
    """In processor time, and the best of three, for the machine may be busy."""
    took_s = []
    for _ in range(3):
        before_s = processor_s_of_children()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "swarm_cli", *command, "--help"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        took_s.append(processor_s_of_children() - before_s)
        assert "usage: swarm" in done.stdout
        for heavy in ("torch", "transformers", "libp2p", "rich", "trio"):
            assert f" {heavy}\n" not in done.stderr
    assert min(took_s) < HELP_S
