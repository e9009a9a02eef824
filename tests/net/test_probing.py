"""Asking peers whether they can dial us, over a simulated network."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest
import trio

from p2pswarm.core.errors import ConnectionLost, DeadlineExceeded, ProtocolViolation
from p2pswarm.core.ids import PeerId
from p2pswarm.net.nat.probing import (
    ANSWER_TIMEOUT_S,
    DIAL_TIMEOUT_S,
    MAX_QUESTIONS_PER_PEER,
    PROBE_PROTOCOL,
    QUESTIONS_PERIOD_S,
    Probing,
    ask_peer,
    ask_peers,
    whom_to_ask,
)
from p2pswarm.net.network import Stream
from p2pswarm.testing.memory_network import MemoryNetwork
from p2pswarm.testing.memory_node import MemoryNode

PORT = 4001
"""That simulated nodes listen on."""


@asynccontextmanager
async def asker_and_prober() -> AsyncIterator[tuple[MemoryNetwork, MemoryNode, MemoryNode]]:
    memory = MemoryNetwork(Random(7))
    async with memory.node(1) as asker, memory.node(2) as prober:
        Probing(prober).serve()
        await asker.connect(prober.addresses[0])
        yield memory, asker, prober


async def test_a_peer_tells_which_ports_it_reached_and_where_it_sees_us(autojump_clock):
    async with asker_and_prober() as (_, asker, prober):
        report = await ask_peer(asker, prober.peer_id, [PORT, 4002])
        assert report.prober == prober.peer_id
        assert report.reached_ports == {PORT}
        assert [f"{address}/p2p/{asker.peer_id}" for address in report.reached] == list(asker.addresses)


async def test_a_question_without_ports_is_answered_at_once_with_where_we_are_seen(autojump_clock):
    async with asker_and_prober() as (_, asker, prober):
        prober.dial_fresh = never
        began_s = trio.current_time()
        report = await ask_peer(asker, prober.peer_id, [])
        assert f"/ip4/{report.seen_at.host}/" in asker.addresses[0]
        assert trio.current_time() - began_s < 1


async def test_a_port_at_which_somebody_else_answers_is_not_reached(autojump_clock):
    async with asker_and_prober() as (_, asker, prober):
        assert (await ask_peer(asker, prober.peer_id, [4002])).reached_ports == set()


async def test_dials_that_nobody_answers_end_in_time(autojump_clock):
    async with asker_and_prober() as (_, asker, prober):
        prober.dial_fresh = never
        began_s = trio.current_time()
        assert (await ask_peer(asker, prober.peer_id, [PORT])).reached_ports == set()
        assert trio.current_time() - began_s < DIAL_TIMEOUT_S + 1


async def test_a_prober_that_hangs_costs_one_deadline_and_the_others_count(autojump_clock):
    async with asker_and_prober() as (memory, asker, prober), memory.node(3) as hung:
        Probing(hung).serve()
        await asker.connect(hung.addresses[0])
        memory.hang(hung.peer_id)
        began_s = trio.current_time()
        with pytest.raises(DeadlineExceeded):
            await ask_peer(asker, hung.peer_id, [PORT])
        assert [report.prober for report in await ask_peers(asker, [hung.peer_id, prober.peer_id], [PORT])] == [
            prober.peer_id
        ]
        assert trio.current_time() - began_s <= 2 * ANSWER_TIMEOUT_S + 0.1


async def test_nobody_is_dialled_for_whom_no_address_is_seen(autojump_clock):
    async with asker_and_prober() as (_, asker, prober):
        prober.path = lambda peer_id: None
        with pytest.raises(ConnectionLost):
            await ask_peer(asker, prober.peer_id, [PORT])


async def test_who_asks_too_often_is_turned_away_for_a_while(autojump_clock):
    async with asker_and_prober() as (_, asker, prober):
        for _ in range(MAX_QUESTIONS_PER_PEER):
            await ask_peer(asker, prober.peer_id, [PORT])
        with pytest.raises(ConnectionLost):
            await ask_peer(asker, prober.peer_id, [PORT])
        await trio.sleep(QUESTIONS_PERIOD_S)
        assert (await ask_peer(asker, prober.peer_id, [PORT])).reached_ports == {PORT}


@pytest.mark.parametrize(
    "question",
    [
        b"",
        b"{}",
        b'{"ports": [0]}',
        b'{"ports": [65536]}',
        b'{"ports": [true]}',
        b'{"ports": ["22"]}',
        b'{"ports": [1, 2, 3, 4, 5]}',
        b"[" * 1000,
        b"\xff",
        b" " * 2000,
    ],
)
async def test_a_question_that_makes_no_sense_is_answered_by_a_reset_and_no_dial(autojump_clock, question: bytes):
    async with asker_and_prober() as (_, asker, prober):
        prober.dial_fresh = fail
        stream = await asker.open_stream(prober.peer_id, PROBE_PROTOCOL)
        await stream.write(question)
        await stream.close_write()
        with pytest.raises(ConnectionLost):
            await stream.read()


async def test_an_asker_that_never_ends_its_question_is_let_go(autojump_clock):
    async with asker_and_prober() as (_, asker, prober):
        stream = await asker.open_stream(prober.peer_id, PROBE_PROTOCOL)
        await stream.write(b'{"ports"')
        with trio.fail_after(ANSWER_TIMEOUT_S + 1), pytest.raises(ConnectionLost):
            await stream.read()


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"seen_at": "/ip4/1.2.3.4/tcp/5", "reached": [22]},
        {"seen_at": "nowhere", "reached": [PORT]},
        {"seen_at": "/dns/example.org/tcp/5", "reached": [PORT]},
        {"seen_at": "/ip4/0.0.0.0/tcp/5", "reached": [PORT]},
        {"seen_at": "/ip4/1.2.3.4/tcp/5", "reached": [[PORT]]},
        {"seen_at": 7, "reached": [PORT]},
    ],
)
async def test_an_answer_that_makes_no_sense_is_no_report(autojump_clock, answer: object):
    async def lie(stream: Stream) -> None:
        assert await stream.read()
        await stream.write(json.dumps(answer).encode())

    async with asker_and_prober() as (_, asker, prober):
        prober.serve(PROBE_PROTOCOL, lie)
        with pytest.raises(ProtocolViolation):
            await ask_peer(asker, prober.peer_id, [PORT])
        assert await ask_peers(asker, [prober.peer_id], [PORT]) == []


async def test_a_peer_that_does_not_probe_is_no_report(autojump_clock):
    async with asker_and_prober() as (memory, asker, prober), memory.node(3) as other:
        await asker.connect(other.addresses[0])
        assert len(await ask_peers(asker, [other.peer_id, prober.peer_id], [PORT])) == 1


def test_one_peer_on_each_machine_is_asked_first():
    hosts = {PeerId(name): host for name, host in zip("abcdef", ["beside us"] * 4 + ["far", "farther"], strict=True)}
    for seed in range(20):
        order = whom_to_ask(hosts, Random(seed))
        assert sorted(order) == list("abcdef")
        assert {hosts[peer_id] for peer_id in order[:3]} == {"beside us", "far", "farther"}
    assert whom_to_ask({}, Random(1)) == []


async def never(*_: object) -> None:
    await trio.sleep_forever()


async def fail(*_: object) -> None:
    raise AssertionError("nobody is to be dialled")
