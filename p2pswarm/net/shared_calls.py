"""One call at a time per key, shared by all who want its result: ten tasks that need a peer dial it once."""

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import trio

from p2pswarm.core.errors import ConnectionLost, SwarmingError

Key = TypeVar("Key")
Result = TypeVar("Result")


class _Call(Generic[Result]):
    def __init__(self) -> None:
        self.done = trio.Event()
        self.result: Result | None = None
        self.error: SwarmingError = ConnectionLost("this node was shut down in the middle")


class SharedCalls(Generic[Key, Result]):
    """Calls run in `nursery`, so that a caller who is cancelled takes nothing away from the others."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._calls: dict[Key, _Call[Result]] = {}

    async def get(self, key: Key, function: Callable[[], Awaitable[Result]]) -> Result:
        """What `function` returns or the `SwarmingError` it raises; joins the call under way for `key`, if any."""
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = _Call()
            self._nursery.start_soon(self._run, key, call, function)
        await call.done.wait()
        if call.result is None:
            raise call.error
        return call.result

    async def _run(self, key: Key, call: _Call[Result], function: Callable[[], Awaitable[Result]]) -> None:
        try:
            call.result = await function()
        except SwarmingError as error:
            call.error = error
        finally:
            del self._calls[key]
            call.done.set()
