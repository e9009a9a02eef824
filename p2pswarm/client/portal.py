"""The way from blocking code into one trio loop that runs in a thread of its own.

Whoever writes async code does not need this. A blocking program opens one portal, enters async context managers through
it and calls async functions by it; typed errors come back as they are. A call costs about 0.1 ms.
"""

import threading
import weakref
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, Self, TypeVar, TypeVarTuple

import trio

from p2pswarm.client.single_error import single_error
from p2pswarm.core.errors import SessionClosed

T = TypeVar("T")
Args = TypeVarTuple("Args")

JOIN_TIMEOUT_S = 10.0
"""How long closing waits for what is open to be left in order; a hung clean-up never holds up the interpreter's end."""


class Entered(Generic[T]):
    """An async context manager that a task of the loop is inside of."""

    def __init__(self, loop: "_Loop", manager: AbstractAsyncContextManager[T]) -> None:
        self._loop = loop
        self._manager = manager
        self._leave = trio.Event()
        self._left = trio.Event()
        self._failure: BaseException | None = None
        self.value: T

    @property
    def has_left(self) -> bool:
        return self._left.is_set()

    def leave(self) -> None:
        """Leaves the context manager and waits for it; raises what its end raises. A second call does nothing."""
        self._loop.call(self.leave_in_loop)

    async def leave_in_loop(self) -> None:
        self._leave.set()
        await self._left.wait()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Enters, reports, and leaves when told to. What fails before the report is raised, later failures are kept."""
        is_inside = False
        try:
            with single_error():
                async with self._manager as self.value:
                    is_inside = True
                    task_status.started()
                    await self._leave.wait()
        except Exception as error:  # isolation border: one manager's failure must not end the loop the others live in
            if not is_inside:
                raise
            self._failure = error
        finally:
            self._left.set()


class Portal:
    """A running trio loop. Ends by `close`, by leaving `with`, when nobody holds it, or with the interpreter."""

    def __init__(self) -> None:
        self._loop = _Loop()
        # Finalizers run at the interpreter's end too, while daemon threads live: what is open is left in order.
        self._finalizer = weakref.finalize(self, self._loop.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves what was entered, newest first, and ends the loop. A second call does nothing."""
        self._finalizer()

    def call(self, function: Callable[[*Args], Awaitable[T]], *args: *Args) -> T:
        """What `await function(*args)` gives in the loop. An interrupt of the waiting thread cancels the call."""
        return self._loop.call(function, *args)

    def enter(self, manager: AbstractAsyncContextManager[T]) -> Entered[T]:
        """Enters `manager` in a task of its own, in which it will also be left."""
        return self._loop.call(self._loop.enter, manager)


class _Loop:
    """The thread, and trio in it; kept apart from `Portal` so that the thread does not keep the portal alive."""

    def __init__(self) -> None:
        self._is_ready = threading.Event()
        self._entered: list[Entered[Any]] = []
        self._token: trio.lowlevel.TrioToken
        self._nursery: trio.Nursery
        self._stop: trio.Event
        # A daemon: the interpreter joins other threads before it calls finalizers, so that one would wait for ever.
        self._thread = threading.Thread(target=trio.run, args=(self._main,), name="p2pswarm-loop", daemon=True)
        self._thread.start()
        self._is_ready.wait()

    async def _main(self) -> None:
        self._stop = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self._nursery:
            self._is_ready.set()
            await self._stop.wait()
            for entered in reversed(self._entered):
                await entered.leave_in_loop()

    def call(self, function: Callable[[*Args], Awaitable[T]], *args: *Args) -> T:
        scope = trio.CancelScope()

        async def run() -> T:
            with scope:
                return await function(*args)
            raise SessionClosed("the call was cancelled")

        try:
            return trio.from_thread.run(run, trio_token=self._token)
        except (trio.RunFinishedError, trio.Cancelled) as error:
            raise SessionClosed("the connection to the swarm is closed: load the model again") from error
        except KeyboardInterrupt:
            self._token.run_sync_soon(scope.cancel)
            raise

    async def enter(self, manager: AbstractAsyncContextManager[T]) -> Entered[T]:
        entered = Entered(self, manager)
        with single_error():
            await self._nursery.start(entered.run)
        self._entered = [*(other for other in self._entered if not other.has_left), entered]
        return entered

    def stop(self) -> None:
        try:
            self._token.run_sync_soon(self._stop.set)
        except trio.RunFinishedError:
            return
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_TIMEOUT_S)
