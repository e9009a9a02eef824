"""A command imports what it needs: those of a model all but torch's compiler, the others nothing of torch."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from swarm_cli.__main__ import run
assert run(sys.argv[1:]) == 1
print(*{"torch", "torch._dynamo", "sympy", "scipy.optimize"} & sys.modules.keys())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "imported"),
    [(("generate", "MODEL", " "), ["torch"]), (("status", "--peers", "nonsense"), [])],
    ids=["generate", "status"],
)
def test_a_command_starts_without_what_it_does_not_need(arguments: tuple[str, ...], imported: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == imported
