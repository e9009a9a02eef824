"""`Fields`: reads a map that a peer sent, one checked field at a time.

Every refusal says what was wanted, what was got and from whom. Fields that are never asked for are never looked at:
that is how newer peers may add some.
"""

import math
import reprlib
from collections.abc import Mapping
from typing import Any, Never

from p2pswarm.core.errors import ConfigError, MalformedMessage
from p2pswarm.core.ids import PeerId
from p2pswarm.core.span import Span

MAX_INTEGER = (1 << 63) - 1
MAX_TEXT_CHARACTERS = 1024
MAX_ID_CHARACTERS = 256


class Fields:
    """The fields of one map; `what` names it in errors ("step", "server info")."""

    def __init__(self, values: object, what: str, peer_id: PeerId | None = None) -> None:
        self.what = what
        self.peer_id = peer_id
        if not isinstance(values, dict):
            self.refuse(f"a map, not {reprlib.repr(values)}")
        self._values: Mapping[str, Any] = values

    def refuse(self, wanted: str) -> Never:
        """Raises `MalformedMessage` that says what should have come."""
        raise MalformedMessage(f"{self.what} from {self.peer_id or 'the peer'}: wanted {wanted}", self.peer_id)

    def has(self, name: str) -> bool:
        """Whether the field was sent, and not as nil."""
        return self._values.get(name) is not None

    def integer(self, name: str, minimum: int = 0, maximum: int = MAX_INTEGER, default: int | None = None) -> int:
        value = self._values.get(name, default)
        if type(value) is not int or not minimum <= value <= maximum:
            self._refuse_field(name, f"a whole number from {minimum} to {maximum}", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number that is not negative."""
        value = self._values.get(name, default)
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            self._refuse_field(name, "a finite number, 0 or more", value)
        return float(value)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            self._refuse_field(name, "true or false", value)
        return value

    def text(self, name: str, max_characters: int = MAX_TEXT_CHARACTERS, default: str | None = None) -> str:
        value = self._values.get(name, default)
        if not isinstance(value, str) or len(value) > max_characters:
            self._refuse_field(name, f"text of at most {max_characters} characters", value)
        return value

    def identifier(self, name: str) -> str:
        """Text that can be shown and compared safely: not empty, printable, without spaces."""
        value = self._values.get(name)
        if not is_identifier(value):
            self._refuse_field(name, f"1 to {MAX_ID_CHARACTERS} printable ASCII characters without spaces", value)
        return str(value)

    def texts(self, name: str, max_items: int, max_characters: int) -> tuple[str, ...]:
        """A list of texts; empty where the field is missing."""
        values = self._values.get(name, ())
        if not _is_list_of_text(values, max_items, max_characters):
            self._refuse_field(name, f"at most {max_items} texts of at most {max_characters} characters", values)
        return tuple(values)

    def items(self, name: str, max_items: int) -> list[Any]:
        """A list of anything; empty where the field is missing."""
        values = self._values.get(name, [])
        if not isinstance(values, list) or len(values) > max_items:
            self._refuse_field(name, f"a list of at most {max_items} entries", values)
        return values

    def mapping(self, name: str, max_items: int) -> Mapping[str, Any]:
        """A map from identifiers to anything; empty where the field is missing."""
        values = self._values.get(name, {})
        if not isinstance(values, dict) or len(values) > max_items or not all(map(is_identifier, values)):
            self._refuse_field(name, f"a map of at most {max_items} entries with ids for keys", values)
        return values

    def nested(self, name: str) -> "Fields":
        """The map in the field, to be read in the same way."""
        return Fields(self._values.get(name), f"{name} of {self.what}", self.peer_id)

    def span(self, name: str) -> Span:
        """A block range, `[start, end]` on the wire."""
        value = self._values.get(name)
        if not isinstance(value, list) or len(value) != 2 or not all(type(number) is int for number in value):
            self._refuse_field(name, "a block range [start, end]", value)
        try:
            return Span(value[0], value[1])
        except ConfigError as error:
            self._refuse_field(name, str(error), value)

    def _refuse_field(self, name: str, wanted: str, got: object) -> Never:
        self.refuse(f"{name} to be {wanted}, got {'nothing' if got is None else reprlib.repr(got)}")


def is_identifier(value: object) -> bool:
    """Whether the value may be an id: short printable ASCII text without spaces."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= MAX_ID_CHARACTERS
        and value.isascii()
        and value.isprintable()
        and " " not in value
    )


def _is_list_of_text(values: object, max_items: int, max_characters: int) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) <= max_items
        and all(isinstance(value, str) and len(value) <= max_characters for value in values)
    )
