"""Signals that end a training: at once while nothing is changed, else as soon as the change is whole.

Without it, an interrupt could fall into the middle of an optimizer's step, and what is then saved would be of no step.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopping:
    """Made by `stopping()`; only in the main thread."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The first signal that came."""
        self._is_held = False

    def on_signal(self, number: int, frame: FrameType | None = None) -> None:
        """Raises `KeyboardInterrupt`, now or at the end of `held`."""
        self.received = self.received or number
        if not self._is_held:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, nothing is interrupted: for what takes milliseconds."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self.received is not None:
            raise KeyboardInterrupt

    @property
    def exit_status(self) -> int:
        """As shells report a program that the signal ended."""
        return 128 + (self.received or signal.SIGINT)


@contextmanager
def stopping() -> Iterator[Stopping]:
    """Within, these signals go to what is given."""
    stopper = Stopping()
    before = {number: signal.signal(number, stopper.on_signal) for number in ENDING_SIGNALS}
    try:
        yield stopper
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
