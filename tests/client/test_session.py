"""A session's hidden states are the local model's, wherever its position went; failures are told, not hidden."""

from copy import copy
from dataclasses import replace

import pytest
import torch
import trio
from tiny_swarm import CACHE_TOKENS

from p2pswarm.blocks.pages import PAGE_TOKENS
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.model_servers import dtype_of
from p2pswarm.client.step_input import StepInput
from p2pswarm.core.errors import ConfigError, ConnectionLost, MissingBlocksError, ServerBusy
from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerState
from p2pswarm.core.span import Span
from p2pswarm.routing.bans import BanReason
from p2pswarm.routing.planner import RouteRequest
from p2pswarm.wire.messages import Codec
from swarmd.memory import KVMemory, Tenant

FIRST, MIDDLE, LAST = Span(0, 3), Span(3, 4), Span(4, 8)
HIDDEN_SIZE = 64
WHOLE = RouteRequest(Span(0, 8))


def states(num_tokens: int, batch_size: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch_size, num_tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def local_blocks(local, hidden_states: torch.Tensor) -> torch.Tensor:
    """The local model's blocks over the whole sequence; the last block's output, before the final norm."""
    taken = []
    hook = local.model.norm.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    local(inputs_embeds=hidden_states, use_cache=False)
    hook.remove()
    return taken[0]


async def test_steps_and_going_back_agree_with_the_local_model(open_world, local) -> None:
    x = states(12)
    async with open_world() as world, world.model.session(max_length=20) as session:
        parts = [await session.step(StepInput(x[:, :8], 0)), await session.step(StepInput(x[:, 8:9], 8))]
        torch.testing.assert_close(torch.cat(parts, 1), local_blocks(local, x[:, :9]), rtol=1e-4, atol=1e-5)
        session.position = 5
        tail = await session.step(StepInput(x[:, 5:12], session.position))
        torch.testing.assert_close(tail, local_blocks(local, x)[:, 5:], rtol=1e-4, atol=1e-5)
        assert session.position == 12


async def test_long_steps_go_in_parts_with_their_masks_and_positions(open_world, local) -> None:
    x, mask = states(9, batch_size=2), torch.ones(2, 9, dtype=torch.bool)
    mask[1, :3] = False
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    step = StepInput(x, 0, mask, position_ids)
    answers = []
    for max_step_bytes in (1 << 20, 2 * 4 * HIDDEN_SIZE * 4, 1):
        config = ClientConfig(known_peers_path=None, max_step_bytes=max_step_bytes)
        async with open_world(config=config) as world, world.model.session(max_length=9) as session:
            answers.append(await session.step(step))
            assert session.position == 9
    for answer in answers[1:]:
        torch.testing.assert_close(answer[mask], answers[0][mask], rtol=1e-4, atol=1e-5)


async def test_room_is_taken_for_the_session_and_given_back(open_world) -> None:
    async with open_world() as world:
        async with world.model.session(max_length=20) as session:
            await session.step(StepInput(states(3, batch_size=2), 0))
            left = [service.memory.tokens_left for service in world.services.values()]
            assert left == [CACHE_TOKENS - 2 * PAGE_TOKENS] * 3
            assert [str(hop.span) for hop in session.route.hops] == ["0:3", "3:4", "4:8"]
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert world.all_room_is_free()


async def test_two_sessions_at_once_do_not_mix(open_world, local) -> None:
    async with (
        open_world() as world,
        world.model.session(max_length=9) as one,
        world.model.session(max_length=9) as two,
    ):
        x, y = states(4, seed=1), states(4, seed=2)
        for position in range(4):
            step = slice(position, position + 1)
            got_x = await one.step(StepInput(x[:, step], position))
            got_y = await two.step(StepInput(y[:, step], position))
        torch.testing.assert_close(got_x, local_blocks(local, x)[:, 3:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got_y, local_blocks(local, y)[:, 3:], rtol=1e-4, atol=1e-5)


async def test_starting_over_may_change_the_batch_size(open_world, local) -> None:
    async with open_world() as world, world.model.session(max_length=9) as session:
        await session.step(StepInput(states(3), 0))
        with pytest.raises(ConfigError, match="holds 1 sequences, the step has 2"):
            await session.step(StepInput(states(1, batch_size=2), 3))
        session.position = 0
        x = states(3, batch_size=2)
        got = await session.step(StepInput(x, 0))
        torch.testing.assert_close(got, local_blocks(local, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        (StepInput(torch.zeros(1, 3, 32), 0), r"a step takes hidden states \[batch, tokens, 64\], got \[1, 3, 32\]"),
        (StepInput(torch.zeros(1, 3, 64), 1), "at position 0, a step cannot start at 1"),
        (StepInput(torch.zeros(1, 21, 64), 0), "more than the session's max_length 20"),
    ],
)
async def test_wrong_steps_are_refused_here_and_harm_nothing(open_world, step: StepInput, complaint: str) -> None:
    async with open_world() as world, world.model.session(max_length=20) as session:
        with pytest.raises(ConfigError, match=complaint):
            await session.step(step)
        await session.step(StepInput(states(3), 0))


async def test_position_only_goes_back(open_world) -> None:
    async with open_world() as world, world.model.session(max_length=20) as session:
        await session.step(StepInput(states(3), 0))
        with pytest.raises(ConfigError, match="0 to 3, got 4"):
            session.position = 4


def slow_down(world, peer_id) -> None:
    """Makes the server the last choice."""
    world.view.servers[peer_id] = replace(world.view.servers[peer_id], inference_tokens_per_s=1.0)


async def test_lost_server_is_replaced_within_the_step(open_world, local) -> None:
    spare = Span(2, 8)
    async with open_world(spans=(FIRST, MIDDLE, LAST, spare)) as world:
        slow_down(world, world.peer_of(spare))
        async with world.model.session(max_length=20) as session:
            x = states(12)
            await session.step(StepInput(x[:, :5], 0))
            assert [str(hop.span) for hop in session.route.hops] == ["0:3", "3:4", "4:8"]
            world.memory.kill(world.peer_of(MIDDLE))
            tail = await session.step(StepInput(x[:, 5:12], 5))
            torch.testing.assert_close(tail, local_blocks(local, x)[:, 5:], rtol=1e-4, atol=1e-5)
            assert session.num_recoveries == 1
            assert [hop.peer_id for hop in session.route.hops] == [
                world.peer_of(FIRST),
                world.peer_of(spare),
                world.peer_of(LAST),
            ]


async def test_hung_server_costs_the_step_deadline_and_is_replaced(open_world, local) -> None:
    config = ClientConfig(known_peers_path=None, min_step_timeout_s=0.3, ping_timeout_s=0.2)
    opening = open_world(spans=(FIRST, MIDDLE, LAST, LAST), config=config)
    async with opening as world, world.model.session(max_length=20) as session:
        x = states(4)
        await session.step(StepInput(x[:, :3], 0))
        hung = session.route.hops[-1].peer_id
        world.memory.hang(hung)
        with trio.fail_after(5):
            last = await session.step(StepInput(x[:, 3:], 3))
        torch.testing.assert_close(last, local_blocks(local, x)[:, 3:], rtol=1e-4, atol=1e-5)
        assert session.route.hops[-1].peer_id != hung


async def test_blocks_that_nobody_serves_any_more_are_named_with_who_was_tried(open_world) -> None:
    config = ClientConfig(known_peers_path=None, recovery_timeout_s=0.5)
    async with open_world(config=config) as world, world.model.session(max_length=20) as session:
        await session.step(StepInput(states(3), 0))
        lost = world.peer_of(MIDDLE)
        world.memory.kill(lost)
        with pytest.raises(
            MissingBlocksError, match=f"no server for blocks 3:4 .*tried: …{lost[-6:]}; the last fail"
        ) as error:
            await session.step(StepInput(states(1), 3))
        assert isinstance(error.value.__cause__, ConnectionLost)
        assert session.position == 3


async def test_first_failure_is_the_last_where_no_retries_are_wanted(open_world) -> None:
    config = ClientConfig(known_peers_path=None, max_retries=0)
    opening = open_world(spans=(FIRST, MIDDLE, MIDDLE, LAST), config=config)
    async with opening as world, world.model.session(max_length=20) as session:
        await session.step(StepInput(states(3), 0))
        lost = session.route.hops[1].peer_id
        world.memory.kill(lost)
        with pytest.raises(ConnectionLost, match=f"blocks 3:4 at {lost}") as error:
            await session.step(StepInput(states(1), 3))
        assert error.value.peer_id == lost
        await session.step(StepInput(states(1), 3))


def fill(memory: KVMemory) -> list[Tenant]:
    """By two peers, none of whom has more than its part."""
    half = CACHE_TOKENS // 2
    return [memory.come(1, half, half, owner=PeerId(name)) for name in ("one", "two")]


async def test_server_without_room_is_gone_round_without_a_ban(open_world) -> None:
    async with open_world(spans=(FIRST, FIRST, MIDDLE, LAST)) as world:
        full, other = (peer_id for peer_id, info in world.view.servers.items() if info.span == FIRST)
        world.view.servers[other] = replace(world.view.servers[other], inference_tokens_per_s=50.0)
        memory = world.services[full].memory
        tenants = fill(memory)
        async with world.model.session(max_length=20) as session:
            await session.step(StepInput(states(3), 0))
            assert session.route.hops[0].peer_id == other
        for tenant in tenants:
            memory.leave(tenant)
        async with world.model.session(max_length=20) as session:
            await session.step(StepInput(states(3), 0))
            assert session.route.hops[0].peer_id == full


async def test_swarm_that_is_full_says_so(open_world) -> None:
    config = ClientConfig(known_peers_path=None, recovery_timeout_s=0.2)
    async with open_world(config=config) as world, world.model.session(max_length=20) as session:
        fill(world.services[world.peer_of(MIDDLE)].memory)
        with pytest.raises(MissingBlocksError, match=r"no server for blocks 3:4 .*no room for 3 tokens") as error:
            await session.step(StepInput(states(3), 0))
        assert isinstance(error.value.__cause__, ServerBusy)


async def test_missing_blocks_are_asked_for_once_more_and_then_named_with_who_was_asked(open_world) -> None:
    async with open_world(spans=(FIRST, LAST)) as world, world.model.session(max_length=20) as session:
        await world.model.servers.measure_round_trips()
        with pytest.raises(MissingBlocksError, match=r"no server for blocks 3:4 of 0:8; asked: …\w+, …\w+$") as error:
            await session.step(StepInput(states(3), 0))
        assert error.value.missing == ((3, 4),)
        assert world.view.num_refreshed == 1


async def test_session_waits_for_blocks_that_are_about_to_be_served(open_world) -> None:
    async with open_world() as world, world.model.session(max_length=20) as session:
        middle = world.peer_of(MIDDLE)
        ready = world.view.servers[middle]
        world.view.servers[middle] = replace(ready, state=ServerState.JOINING)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.step, StepInput(states(3), 0))
            await trio.sleep(0.1)
            assert session.position == 0
            world.view.servers[middle] = ready
        assert session.position == 3


async def test_answers_that_are_not_finite_are_the_servers_fault(open_world, local) -> None:
    async with open_world(spans=(FIRST, MIDDLE, MIDDLE, LAST)) as world, world.model.session(max_length=20) as session:
        liar, other = (peer_id for peer_id, info in world.view.servers.items() if info.span == MIDDLE)
        slow_down(world, other)
        service = world.services[liar]
        broken = copy(service._shared.model)
        broken.run = lambda hidden_states, *args, **options: hidden_states * float("nan")
        service._shared = replace(service._shared, model=broken)
        x = states(4)
        torch.testing.assert_close(await session.step(StepInput(x, 0)), local_blocks(local, x), rtol=1e-4, atol=1e-5)
        assert session.route.hops[1].peer_id == other
        assert world.model.servers.banned[liar].reason is BanReason.MISBEHAVED


async def test_step_cancelled_half_way_can_be_made_again(open_world, local) -> None:
    async with open_world(spans=(FIRST, MIDDLE, LAST, LAST)) as world, world.model.session(max_length=20) as session:
        x = states(4)
        await session.step(StepInput(x[:, :3], 0))
        world.memory.hang(session.route.hops[-1].peer_id)
        with trio.move_on_after(0.1) as scope:
            await session.step(StepInput(x[:, 3:], 3))
        assert scope.cancelled_caught
        assert session.position == 3
        world.memory.kill(session.route.hops[-1].peer_id)
        answer = await session.step(StepInput(x[:, 3:], 3))
        torch.testing.assert_close(answer, local_blocks(local, x)[:, 3:], rtol=1e-4, atol=1e-5)


async def test_step_of_a_cancelled_session_is_cancelled_though_its_links_closed_before_it(open_world) -> None:
    async with open_world() as world, trio.open_nursery() as nursery, world.model.session(max_length=20) as session:
        await session.step(StepInput(states(3), 0))
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.Cancelled):
            await session.step(StepInput(states(1), 3))


async def test_two_steps_at_once_are_refused(open_world) -> None:
    async with open_world() as world, world.model.session(max_length=20) as session:
        await session.step(StepInput(states(3), 0))
        world.memory.hang(world.peer_of(LAST))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.step, StepInput(states(1), 3))
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(ConfigError, match="two steps of one session at once"):
                await session.step(StepInput(states(1), 3))
            nursery.cancel_scope.cancel()


async def test_errors_in_the_users_own_code_come_out_as_they_are(open_world) -> None:
    async with open_world() as world:
        with pytest.raises(ZeroDivisionError):
            await divide_in_session(world)


async def divide_in_session(world) -> float:
    async with world.model.session(max_length=20) as session:
        await session.step(StepInput(states(3), 0))
        return 1 / 0


@pytest.mark.parametrize(
    ("codec", "largest_error"), [(Codec.NONE, 1e-5), (Codec.FLOAT16, 0.05), (Codec.BLOCKWISE_INT8, 0.5)]
)
async def test_hidden_states_travel_by_the_chosen_codec(open_world, local, codec: Codec, largest_error: float) -> None:
    x = states(6)
    async with open_world(config=ClientConfig(known_peers_path=None, codec=codec)) as world:
        async with world.model.session(max_length=20) as session:
            got = await session.step(StepInput(x, 0))
        error = (got - local_blocks(local, x)).abs().max().item()
        assert error < largest_error
        assert (error > 1e-5) is (codec is not Codec.NONE)


async def test_servers_of_other_dtypes_are_sent_their_own_and_unknown_ones_float32(open_world, local) -> None:
    x = states(4)
    async with open_world() as world:
        for span, dtype in ((FIRST, "bfloat16"), (MIDDLE, "load")):  # the second is a function of torch
            peer_id = world.peer_of(span)
            world.view.servers[peer_id] = replace(world.view.servers[peer_id], dtype=dtype)
        route = await world.model.servers.route(WHOLE)
        assert [dtype_of(world.model.servers.known[hop.peer_id]) for hop in route.hops] == [
            torch.bfloat16,
            torch.float32,
            torch.float32,
        ]
        expected = local_blocks(local, x.bfloat16().float())
        for got in (await world.model.forward(x), await one_step(world, x)):
            assert got.dtype == torch.float32
            assert 0 < (got - expected).abs().max() < 0.2


async def one_step(world, hidden_states: torch.Tensor) -> torch.Tensor:
    async with world.model.session(max_length=20) as session:
        return await session.step(StepInput(hidden_states, 0))


async def test_forward_without_a_session_takes_masks_and_goes_round_a_lost_server(open_world, local) -> None:
    async with open_world(spans=(FIRST, MIDDLE, MIDDLE, LAST)) as world:
        x = states(6, batch_size=3)
        torch.testing.assert_close(await world.model.forward(x), local_blocks(local, x), rtol=1e-4, atol=1e-5)
        world.memory.kill(world.peer_of(MIDDLE))
        torch.testing.assert_close(await world.model.forward(x), local_blocks(local, x), rtol=1e-4, atol=1e-5)
