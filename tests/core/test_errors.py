import inspect
import re

from p2pswarm.core import errors


def test_the_tree_drawn_in_the_docstring_is_the_tree_of_the_classes() -> None:
    _, drawing = (errors.__doc__ or "").split("\n\n")
    drawn = {name: len(lines) // 4 for lines, name in re.findall(r"^([│ ├└─]*)(\w+)", drawing, re.MULTILINE)}
    classes = {
        name: error
        for name, error in inspect.getmembers(errors, inspect.isclass)
        if issubclass(error, errors.SwarmingError)
    }
    depth = {
        name: len([base for base in error.__mro__ if base in classes.values()]) - 1 for name, error in classes.items()
    }
    assert drawn == depth


def test_an_error_that_names_a_peer_keeps_it_for_whoever_bans() -> None:
    error = errors.ServerBusy("no room for 512 tokens", errors.PeerId("12D3KooWexample"))
    assert error.peer_id == "12D3KooWexample"
    assert str(error) == "no room for 512 tokens"
