"""A session gets what peft computes with its adapter, and only from servers that have it; whatever happens to them."""

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from tiny_adapters import save_adapter, with_adapter
from tiny_swarm import TinySwarm, open_tiny_swarm

from p2pswarm.blocks.adapters import Adapter, fit_adapter
from p2pswarm.blocks.architecture import lay_out
from p2pswarm.blocks.span_model import SpanModel, load_span
from p2pswarm.checkpoint.adapter_files import open_adapter
from p2pswarm.checkpoint.adapter_place import AdapterPlace
from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.generation import GeneratingSession
from p2pswarm.client.portal import Portal
from p2pswarm.client.step_input import StepInput
from p2pswarm.core.errors import AdapterNotFound, ConfigError, MissingBlocksError, RequestRefused
from p2pswarm.core.span import Span
from p2pswarm.models.distributed_causal_lm import Connection, distributed

PROMPT = [5, 17, 99, 3, 42]
GREEDY = {"do_sample": False, "max_new_tokens": 12}
LEFT, RIGHT, WHOLE = Span(0, 3), Span(3, 8), Span(0, 8)


@dataclass(frozen=True)
class World:
    """Two adapters of a tiny model, their references, and swarms of servers that have some of them."""

    checkpoint: Checkpoint
    references: dict[str, Any]
    """By the adapter's name, models that peft has merged; under "" the plain one."""
    adapters: dict[str, Adapter]

    def part(self, span: Span, *names: str) -> SpanModel:
        return load_span(self.checkpoint, span, adapters=[self.adapters[name] for name in names])

    def swarm(self, *parts: SpanModel, **options: Any) -> AbstractAsyncContextManager[TinySwarm]:
        left = iter(parts)
        return open_tiny_swarm(self.checkpoint, lambda span: next(left), [part.span for part in parts], **options)

    def tokens(self, name: str, num_tokens: int = 12) -> list[int]:
        output = self.references[name].generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=num_tokens)
        return list(output[0, len(PROMPT) :].tolist())

    @torch.inference_mode()
    def blocks(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """After the last block, before the final norm."""
        taken: list[torch.Tensor] = []
        norm = self.references[name].model.norm
        hook = norm.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
        self.references[name](inputs_embeds=states, use_cache=False)
        hook.remove()
        return taken[0]


@pytest.fixture(scope="module")
def world(tiny_llama: Checkpoint, local: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("adapters")
    folders = {
        "poet": save_adapter(home / "poet", local, seed=1),
        "clerk": save_adapter(home / "clerk", local, seed=2, r=2, target_modules=["k_proj", "o_proj", "gate_proj"]),
        "other": save_adapter(home / "other", local, seed=3),
    }
    layout = lay_out(tiny_llama.config, torch.float32)

    def fitted(folder: Path, name: str) -> Adapter:
        return fit_adapter(open_adapter(AdapterPlace(str(folder), name)), layout)

    adapters = {name: fitted(folder, name) for name, folder in folders.items()}
    adapters["other poet"] = fitted(folders["other"], "poet")
    references = {"": local, **{name: with_adapter(local, folder) for name, folder in folders.items()}}
    return World(tiny_llama, references, adapters)


async def generated(session: GeneratingSession, num_tokens: int = 12) -> list[int]:
    return [token async for token in session.generate(PROMPT, do_sample=False, max_new_tokens=num_tokens)]


async def test_sessions_with_different_adapters_and_without_get_their_own_tokens_at_once(world: World) -> None:
    got: dict[str, list[int]] = {}
    both = ("poet", "clerk")

    async def talk(swarm: TinySwarm, name: str) -> None:
        async with swarm.model.session(max_length=40, adapter=name or None) as session:
            got[name] = await generated(session)

    async with world.swarm(world.part(LEFT, *both), world.part(RIGHT, *both)) as swarm, trio.open_nursery() as nursery:
        for name in ("poet", "", "clerk"):
            nursery.start_soon(talk, swarm, name)
    assert got == {name: world.tokens(name) for name in ("poet", "", "clerk")}
    assert len({tuple(tokens) for tokens in got.values()}) == 3


async def test_hidden_states_are_pefts_in_a_session_and_in_a_forward_pass(world: World) -> None:
    states = torch.randn(2, 9, 64)
    async with world.swarm(world.part(LEFT, "poet"), world.part(RIGHT, "poet", "clerk")) as swarm:
        expected = world.blocks("poet", states)
        async with swarm.model.session(max_length=20, adapter="poet") as session:
            parts = [
                await session.step(StepInput(states[:, start:end], start)) for start, end in ((0, 6), (6, 7), (7, 9))
            ]
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)
        forwarded = await swarm.model.forward(states, adapter="poet")
        torch.testing.assert_close(forwarded, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(await swarm.model.forward(states), world.blocks("", states), rtol=1e-4, atol=1e-4)


async def test_servers_without_the_adapter_are_not_chosen(world: World) -> None:
    parts = world.part(WHOLE), world.part(LEFT, "poet"), world.part(RIGHT, "poet"), world.part(RIGHT, "clerk")
    async with world.swarm(*parts) as swarm:
        plain, left, right, _ = swarm.view.servers
        swarm.view.servers[plain] = replace(swarm.view.servers[plain], inference_tokens_per_s=1000.0)
        await swarm.model.servers.measure_round_trips()
        async with swarm.model.session(max_length=40, adapter="poet") as session:
            assert await generated(session) == world.tokens("poet")
            assert session.route is not None
            assert [hop.peer_id for hop in session.route.hops] == [left, right]
        async with swarm.model.session(max_length=40) as session:
            assert await generated(session) == world.tokens("")
            assert session.route is not None
            assert [hop.peer_id for hop in session.route.hops] == [plain]


async def test_a_lost_server_is_replaced_by_one_with_the_same_adapter(world: World) -> None:
    parts = [world.part(LEFT, "poet"), *(world.part(RIGHT, *names) for names in (["poet"], [], ["clerk"], ["poet"]))]
    async with world.swarm(*parts) as swarm, swarm.model.session(max_length=40, adapter="poet") as session:
        tokens: list[int] = []
        async for token in session.generate(PROMPT, **GREEDY):
            tokens.append(token)
            if len(tokens) == 5:
                assert session.route is not None
                swarm.memory.kill(session.route.hops[1].peer_id)
        assert tokens == world.tokens("poet")
        assert session.num_recoveries == 1


async def test_blocks_without_the_adapter_are_missing_and_say_why(world: World) -> None:
    async with (
        world.swarm(world.part(LEFT, "poet"), world.part(RIGHT)) as swarm,
        swarm.model.session(max_length=40, adapter="poet") as session,
    ):
        with pytest.raises(MissingBlocksError, match=r"3:8 .*does not have the adapter poet@[0-9a-f]{16}"):
            await session.step(StepInput(torch.randn(1, 2, 64), 0))


async def test_an_adapter_that_nobody_announces_is_named_beside_those_there_are(world: World) -> None:
    async with world.swarm(world.part(WHOLE, "poet")) as swarm:
        with pytest.raises(AdapterNotFound, match=r"no server announces the adapter clerk; announced are poet@"):
            async with swarm.model.session(max_length=40, adapter="clerk"):
                pass
        assert swarm.view.num_refreshed == 1


async def test_different_adapters_of_one_name_never_mix(world: World) -> None:
    parts = world.part(WHOLE, "other poet"), world.part(LEFT, "poet"), world.part(RIGHT, "poet")
    async with world.swarm(*parts) as swarm:
        with pytest.raises(ConfigError, match=r"may be any of poet@.*poet@.*give the whole id"):
            async with swarm.model.session(max_length=40, adapter="poet"):
                pass
        for name, reference in (("other poet", "other"), ("poet", "poet")):
            async with swarm.model.session(max_length=40, adapter=world.adapters[name].adapter_id) as session:
                assert await generated(session) == world.tokens(reference)


async def test_a_server_refuses_an_adapter_that_it_only_announces(world: World) -> None:
    async with world.swarm(world.part(WHOLE, "poet")) as swarm:
        (peer_id,) = swarm.view.servers
        swarm.view.servers[peer_id] = replace(swarm.view.servers[peer_id], adapters=("clerk@0123456789abcdef",))
        async with swarm.model.session(max_length=40, adapter="clerk") as session:
            with pytest.raises(RequestRefused, match=r"this server has the adapters poet@.*asked was clerk@"):
                await session.step(StepInput(torch.randn(1, 2, 64), 0))


def test_the_blocking_model_takes_an_adapter_for_all_or_for_a_session(world: World) -> None:
    with Portal() as portal:
        config = ClientConfig(known_peers_path=None, active_adapter="poet")
        part = world.part(WHOLE, "poet", "clerk")
        opened = portal.enter(world.swarm(part, config=config, call=portal.call)).value
        model: Any = distributed(opened.model.shell, Connection(portal, None, opened.model))  # type: ignore[arg-type]
        prompt = torch.tensor([PROMPT])
        assert model.generate(prompt, **GREEDY)[0, len(PROMPT) :].tolist() == world.tokens("poet")
        assert model.generate(prompt, use_cache=False, **GREEDY)[0, len(PROMPT) :].tolist() == world.tokens("poet")
        with model.inference_session(max_length=40, adapter="clerk"):
            assert model.generate(prompt, **GREEDY)[0, len(PROMPT) :].tolist() == world.tokens("clerk")
            logits = model(prompt, use_cache=False).logits
        with torch.inference_mode():
            torch.testing.assert_close(logits, world.references["clerk"](prompt).logits, rtol=1e-4, atol=1e-4)
