"""The meeting place of pushes and steps: who waits, who is woken, and what is dropped."""

import pytest
import trio
from trio.testing import MockClock

from p2pswarm.core.errors import BadRequest
from p2pswarm.core.ids import PeerId, SessionId
from p2pswarm.rpc.push_exchange import PushExchange
from p2pswarm.testing.running_sum_service import wire_rows
from p2pswarm.wire.messages import Push, PushReply

PEER = PeerId("12D3KooWpusher")
SESSION = SessionId("s")


def push(step_id: int, session_id: SessionId = SESSION) -> Push:
    return Push(session_id, step_id, wire_rows([[float(step_id)]]))


async def deliver(exchange: PushExchange, step_id: int, answers: list[int]) -> None:
    assert await exchange.deliver(push(step_id), PEER) == PushReply()
    answers.append(step_id)


async def test_a_push_waits_until_its_step_asks_for_it(autojump_clock: MockClock) -> None:
    exchange, answers = PushExchange(10.0), list[int]()
    with exchange.session(SESSION, PEER) as slot:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(deliver, exchange, 3, answers)
            await trio.sleep(5)
            assert exchange.num_waiting == 1
            assert slot.take(2) is None
            assert answers == []
            assert slot.take(3) == push(3)
        assert answers == [3]
        assert exchange.num_waiting == 0
        assert slot.take(3) is None


async def test_a_step_that_asks_first_is_called(autojump_clock: MockClock) -> None:
    exchange, answers = PushExchange(10.0), list[int]()
    calls = []
    with exchange.session(SESSION, PEER) as slot:
        async with trio.open_nursery() as nursery:
            with slot.asking(3, lambda: calls.append(trio.current_time())):
                await trio.sleep(1)
                nursery.start_soon(deliver, exchange, 3, answers)
                await trio.sleep(1)
            assert len(calls) == 1
            assert slot.take(3) == push(3)


async def test_other_steps_pushes_do_not_call(autojump_clock: MockClock) -> None:
    exchange, answers = PushExchange(10.0), list[int]()
    calls: list[str] = []
    with exchange.session(SESSION, PEER) as slot:
        async with trio.open_nursery() as nursery:
            with slot.asking(3, lambda: calls.append("called")):
                nursery.start_soon(deliver, exchange, 4, answers)
                await trio.sleep(1)
            nursery.start_soon(deliver, exchange, 4, answers)
            await trio.sleep(1)
            slot.settle(4)
    assert calls == []
    assert answers == [4, 4]


async def test_a_newer_push_ends_the_wait_of_an_older_one_which_is_then_useless(autojump_clock: MockClock) -> None:
    exchange, answers = PushExchange(10.0), list[int]()
    with exchange.session(SESSION, PEER) as slot:
        async with trio.open_nursery() as nursery:
            for step_id in (3, 5, 4):
                nursery.start_soon(deliver, exchange, step_id, answers)
                await trio.sleep(1)
            assert answers == [3, 4]
            assert slot.take(4) is None
            assert slot.take(5) == push(5)


async def test_pushes_for_settled_steps_are_answered_at_once(autojump_clock: MockClock) -> None:
    exchange, answers = PushExchange(10.0), list[int]()
    with exchange.session(SESSION, PEER) as slot:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(deliver, exchange, 3, answers)
            await trio.sleep(1)
            slot.settle(3)
            await deliver(exchange, 2, answers)
        assert sorted(answers) == [2, 3]


async def test_nobody_waits_longer_than_allowed(autojump_clock: MockClock) -> None:
    exchange = PushExchange(10.0)
    with exchange.session(SESSION, PEER):
        before_s = trio.current_time()
        with pytest.raises(BadRequest, match="step 3 was not asked for within 10 s"):
            await exchange.deliver(push(3), PEER)
        assert trio.current_time() - before_s == 10
        assert exchange.num_waiting == 0


async def test_a_cancelled_delivery_does_not_stay(autojump_clock: MockClock) -> None:
    exchange = PushExchange(10.0)
    with exchange.session(SESSION, PEER) as slot:
        with trio.move_on_after(1):
            await exchange.deliver(push(3), PEER)
        assert slot.take(3) is None


async def test_the_end_of_a_session_ends_the_wait(autojump_clock: MockClock) -> None:
    exchange, answers = PushExchange(10.0), list[int]()
    async with trio.open_nursery() as nursery:
        with exchange.session(SESSION, PEER):
            nursery.start_soon(deliver, exchange, 3, answers)
            await trio.sleep(1)
        await trio.sleep(1)
        assert answers == [3]
    with pytest.raises(BadRequest, match="no session here has this id"):
        await exchange.deliver(push(4), PEER)


async def test_an_id_belongs_to_one_session() -> None:
    exchange = PushExchange(10.0)
    with exchange.session(SESSION, PEER):
        with pytest.raises(BadRequest, match="session id s is in use"), exchange.session(SESSION, PEER):
            pass
        with exchange.session(SessionId("t"), PEER):
            pass
    with exchange.session(SESSION, PEER):
        pass
