"""Which adapter a name means, and that routes for different adapters, kept side by side, do not mix."""

import pytest

from p2pswarm.core.errors import AdapterNotFound, ConfigError
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.routing.adapters import find_adapter
from p2pswarm.routing.dstar_planner import DStarLitePlanner
from p2pswarm.routing.planner import RouteRequest

MODEL = ModelId("tiny@0123456789abcdef")
WHOLE = Span(0, 4)
POET, OTHER_POET, CLERK = "poet@0000000000000001", "poet@0000000000000002", "clerk@0000000000000003"


def server(name: str, *adapters: str, speed: float = 100.0) -> ServerInfo:
    speeds = {f"{kind}_tokens_per_s": speed for kind in ("throughput", "inference", "forward", "network")}
    return ServerInfo(
        PeerId(name),
        MODEL,
        WHOLE,
        ServerState.ONLINE,
        (),
        WHOLE.end,
        dtype="float32",
        cache_tokens_left=1000,
        adapters=adapters,
        **speeds,
    )


SERVERS = [server("plain", speed=900.0), server("both", POET, CLERK), server("clerk", CLERK, speed=300.0)]


@pytest.mark.parametrize(("name", "found"), [("poet", POET), ("clerk", CLERK), (POET, POET)])
def test_a_name_or_an_id_means_the_one_adapter(name: str, found: str) -> None:
    assert find_adapter(name, SERVERS) == found


def test_a_name_of_several_adapters_means_none_but_its_ids_do() -> None:
    servers = [*SERVERS, server("stranger", OTHER_POET)]
    with pytest.raises(ConfigError, match=rf"{POET} \(1 servers\), {OTHER_POET} \(1 servers\)"):
        find_adapter("poet", servers)
    assert find_adapter(OTHER_POET, servers) == OTHER_POET


@pytest.mark.parametrize(
    ("servers", "others"), [(SERVERS, f"announced are {CLERK}, {POET}"), (SERVERS[:1], "none is announced")]
)
def test_a_name_that_nobody_announces_is_an_error(servers: list[ServerInfo], others: str) -> None:
    with pytest.raises(AdapterNotFound, match=f"no server announces the adapter bard; {others}"):
        find_adapter("bard", servers)


def test_each_adapter_is_routed_to_those_who_have_it() -> None:
    planner = DStarLitePlanner()
    planner.update(SERVERS, {info.peer_id: 0.01 for info in SERVERS})
    routes = [
        planner.plan(RouteRequest(WHOLE, 10, adapter=adapter), 0.0).hops[0].peer_id
        for adapter in (None, POET, CLERK, POET, None)
    ]
    assert routes == ["plain", "both", "clerk", "both", "plain"]


def test_left_out_servers_are_told_why() -> None:
    planner = DStarLitePlanner()
    planner.update(SERVERS, {})
    explanation = planner.explain(RouteRequest(WHOLE, 10, adapter=POET), 0.0)
    assert {one.peer_id: one.why for one in explanation.turned_down} == {
        "plain": f"does not have the adapter {POET}",
        "clerk": f"does not have the adapter {POET}",
    }
