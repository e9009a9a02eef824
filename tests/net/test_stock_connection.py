"""Streams over stock yamux, where that is not to be seen from outside."""

from typing import Any, cast

import pytest
import trio

from p2pswarm.core.errors import ConnectionLost
from p2pswarm.core.ids import PeerId
from p2pswarm.net.stock_connection import StockStream


async def test_a_stream_can_be_reset_after_its_connection_has_ended() -> None:
    async with trio.open_nursery() as nursery:
        stream = StockStream(cast("Any", None), PeerId("peer"), nursery, lambda _: None)
    stream.reset()
    with pytest.raises(ConnectionLost, match="reset here"):
        await stream.read()
