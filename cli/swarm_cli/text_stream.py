"""Text from token ids as they come: a character can be several tokens, and their text depends on their neighbours."""

from collections.abc import Callable

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoding gives for the bytes of a character that is not whole yet."""


class TextStream:
    """Gives each piece of text once, as soon as later tokens cannot change it. Decodes only the last few tokens."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._token_ids: list[int] = []
        self._context_start = 0
        self._given_end = 0
        """Tokens before this are given out; those from `_context_start` on are decoded again, as context."""

    def push(self, token_id: int) -> str:
        """The text that is certain now; often empty."""
        self._token_ids.append(token_id)
        text = self._new_text()
        if not text or text.endswith(UNFINISHED):
            return ""
        self._context_start, self._given_end = self._given_end, len(self._token_ids)
        return text

    def finish(self) -> str:
        """What was held back."""
        return self._new_text()

    def _new_text(self) -> str:
        given = self._decode(self._token_ids[self._context_start : self._given_end])
        return self._decode(self._token_ids[self._context_start :])[len(given) :]
