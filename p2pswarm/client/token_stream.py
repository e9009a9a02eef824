"""Tokens on their way from the thread that generates them to the task that reads them.

`TokenFeed` is the thread's end, `TokenStream` the reader's. The reader may stop at any time, by `aclose`, by
cancellation, or by just forgetting the stream: the generation then finishes the step it is in and ends.
"""

import threading
from dataclasses import dataclass, field
from typing import Self

import torch
import trio
from transformers.generation.streamers import BaseStreamer

TOKENS_AHEAD = 16
"""Tokens that a generation may be ahead of its reader; then it waits."""


class GenerationStopped(Exception):
    """Raised in the generating thread when nobody wants more tokens."""


class TokenFeed(BaseStreamer):
    """What `generate` is given as its streamer."""

    def __init__(self, token: trio.lowlevel.TrioToken) -> None:
        self._token = token
        self._send, self.tokens = trio.open_memory_channel[int](TOKENS_AHEAD)
        self._room = threading.Semaphore(TOKENS_AHEAD)
        self._has_prompt = False
        self.is_stopped = False

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate`: first with the prompt, then with each new token. Waits for the reader."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        for token_id in value.flatten().tolist():
            self._room.acquire()
            if self.is_stopped:
                raise GenerationStopped
            self._token.run_sync_soon(self._send.send_nowait, token_id)

    def end(self) -> None:
        """Called by `generate`; the loop learns of the end when the thread returns."""

    def taken(self) -> None:
        """The reader has one token more."""
        self._room.release()

    def stop(self) -> None:
        """The generation ends at its next token. From any thread."""
        self.is_stopped = True
        self._room.release()

    def close(self) -> None:
        """No more tokens come; called in the loop."""
        self._send.close()


@dataclass(eq=False)
class Generation:
    """One generation, as its task and its reader share it."""

    feed: TokenFeed
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    taken: list[int] = field(default_factory=list)
    """What the reader has got."""
    failure: Exception | None = None
    finished: trio.Event = field(default_factory=trio.Event)

    @property
    def is_wanted(self) -> bool:
        """Whether somebody may still read its tokens."""
        return not (self.feed.is_stopped or self.finished.is_set())


class TokenStream:
    """The token ids of one sequence, for `async for`. Leave it early by `async with`, to know when it has stopped."""

    def __init__(self, generation: Generation, stop_grace_s: float) -> None:
        self._generation = generation
        self._stop_grace_s = stop_grace_s

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        generation = self._generation
        try:
            token_id = await generation.feed.tokens.receive()
        except trio.EndOfChannel:
            await generation.finished.wait()
            failure, generation.failure = generation.failure, None
            if failure is not None:
                raise failure from failure.__cause__
            raise StopAsyncIteration from None
        except trio.Cancelled:
            generation.feed.stop()
            raise
        generation.taken.append(token_id)
        generation.feed.taken()
        return token_id

    async def aclose(self) -> None:
        """Stops the generation and waits for it; a step that takes too long is cut off, which breaks the session."""
        generation = self._generation
        generation.feed.stop()
        with trio.CancelScope(shield=True):
            with trio.move_on_after(self._stop_grace_s):
                await generation.finished.wait()
            generation.scope.cancel()
            await generation.finished.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._generation.feed.stop()
