import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.span import Span, uncovered

spans = st.tuples(st.integers(0, 30), st.integers(1, 10)).map(lambda pair: Span(pair[0], pair[0] + pair[1]))


def test_a_span_is_read_from_the_text_it_prints() -> None:
    assert Span.parse("3:10") == Span(3, 10)
    assert str(Span(3, 10)) == "3:10"


@pytest.mark.parametrize("text", ["", "3", "3-5", "a:b", "5:", ":5", "-1:4", "4:4", "5:3"])
def test_a_span_that_cannot_be_is_refused_with_what_was_got(text: str) -> None:
    with pytest.raises(ConfigError, match="START:END"):
        Span.parse(text)


def test_a_span_knows_which_blocks_it_holds() -> None:
    span = Span(2, 5)
    assert [block for block in range(8) if span.covers(block)] == [2, 3, 4]
    assert span.num_blocks == 3
    assert span.contains(Span(3, 5))
    assert not span.contains(Span(1, 3))


@given(st.lists(spans, max_size=8), spans)
def test_the_uncovered_parts_are_exactly_the_blocks_that_no_span_holds(held: list[Span], within: Span) -> None:
    gaps = uncovered(held, within)
    missing = [block for gap in gaps for block in range(gap.start, gap.end)]
    assert missing == [
        block for block in range(within.start, within.end) if not any(span.covers(block) for span in held)
    ]
    assert all(left.end < right.start for left, right in itertools.pairwise(gaps))


def test_spans_that_share_a_block_overlap() -> None:
    span = Span(3, 6)
    assert [span.overlaps(Span(*ends)) for ends in [(0, 3), (0, 4), (4, 5), (5, 9), (6, 9)]] == [
        False,
        True,
        True,
        True,
        False,
    ]
