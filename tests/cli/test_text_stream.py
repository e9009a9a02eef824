"""Streamed text is the text of all tokens, never with half a character."""

from hypothesis import given
from hypothesis import strategies as st

from swarm_cli.text_stream import UNFINISHED, TextStream


def decode_bytes(token_ids: list[int]) -> str:
    """A tokenizer of single bytes, as byte-level ones fall back to."""
    return bytes(token_ids).decode(errors="replace")


def decode_words(token_ids: list[int]) -> str:
    """A tokenizer whose words bring their space along, but for the first of a text."""
    return " ".join(f"w{token_id}" for token_id in token_ids)


@given(st.text())
def test_pieces_join_to_the_text_without_unfinished_characters(text: str) -> None:
    stream = TextStream(decode_bytes)
    pieces = [stream.push(byte) for byte in text.encode()]
    if UNFINISHED not in text:
        assert not any(UNFINISHED in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == text


@given(st.lists(st.integers(0, 99)))
def test_spaces_between_tokens_are_kept(token_ids: list[int]) -> None:
    stream = TextStream(decode_words)
    pieces = [stream.push(token_id) for token_id in token_ids]
    assert "".join(pieces) == decode_words(token_ids)
    assert stream.finish() == ""


def test_bytes_that_never_become_a_character_come_at_the_end() -> None:
    stream = TextStream(decode_bytes)
    assert [stream.push(byte) for byte in b"a\xe2\x82"] == ["a", "", ""]
    assert stream.finish() == UNFINISHED
