"""Errors as the caller expects them: a lone one comes out of the exception groups of the nurseries it passed."""

from collections.abc import Iterator
from contextlib import contextmanager

import trio


@contextmanager
def single_error() -> Iterator[None]:
    """Raises a group's only error instead of the group. Cancellations beside it do not count: they followed from it."""
    try:
        yield
    except BaseExceptionGroup as group:
        errors = [error for error in _leaves(group) if not isinstance(error, trio.Cancelled)]
        if len(errors) != 1:
            raise
        raise errors[0] from errors[0].__cause__


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
