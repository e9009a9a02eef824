"""Models from a hub over real sockets: by parts, redirected, cut, gated, shared between processes."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hub_server import COMMIT, MODEL, HubServer, serve_hub, use_hub
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from p2pswarm.blocks.span_model import load_span
from p2pswarm.checkpoint import hub_ranges
from p2pswarm.checkpoint.cache_directory import CACHE_VARIABLE
from p2pswarm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pswarm.checkpoint.progress import Progress, Work
from p2pswarm.core.errors import CheckpointError
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint

pytestmark = pytest.mark.real


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with a tiny model in one file; this process asks it, and keeps what it gets in a cache of its own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(hub_ranges, "PAUSE_S", 0.01)
    with serve_hub(save_tiny_checkpoint(tmp_path / "llama", "llama")) as server:
        use_hub(server, monkeypatch, tmp_path / "downloads")
        yield server
        close_session()


def same_tensors(got: Checkpoint, expected: Checkpoint) -> bool:
    names = expected.tensor_names
    tensors, truth = got.read(names), expected.read(names)
    return got.tensor_names == names and all(torch.equal(tensors[name], truth[name]) for name in names)


def test_all_tensors_come_over_the_hub_as_they_are_in_the_folder(hub: HubServer) -> None:
    remote, local = open_checkpoint(MODEL), open_checkpoint(str(hub.folder))

    assert same_tensors(remote, local)
    assert remote.model_id == local.model_id


def test_a_block_of_a_large_file_costs_a_block(hub: HubServer) -> None:
    whole_bytes = (hub.folder / "model.safetensors").stat().st_size
    checkpoint = open_checkpoint(MODEL)
    header_bytes = checkpoint.tensor_names and hub.large_bytes_asked()

    load_span(checkpoint, Span(2, 3))

    assert checkpoint.num_blocks == 8
    assert hub.large_bytes_asked() - header_bytes < whole_bytes / 8
    assert len(hub.large_requests()) == 2  # the header, and the block in one piece


def test_what_was_fetched_is_not_fetched_again(hub: HubServer) -> None:
    load_span(open_checkpoint(MODEL), Span(2, 3))
    num_requests = len(hub.large_requests())

    load_span(open_checkpoint(MODEL), Span(2, 3))

    assert len(hub.large_requests()) == num_requests


def test_a_cut_download_goes_on_where_it_was_cut(hub: HubServer) -> None:
    open_checkpoint(MODEL).tensor_names  # noqa: B018 - the header is here now
    hub.requests.clear()
    hub.cuts = [1000, 0, 5000]

    checkpoint = open_checkpoint(MODEL)
    tensors = checkpoint.read(["model.layers.0.mlp.up_proj.weight"])

    first, second, third, fourth = [request.range_bytes for request in hub.large_requests()]
    assert (first - second, second - third, third - fourth) == (1000, 0, 5000)
    expected = open_checkpoint(str(hub.folder)).read(list(tensors))
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


def test_a_hub_that_only_cuts_is_given_up_and_the_next_start_goes_on(hub: HubServer) -> None:
    open_checkpoint(MODEL).tensor_names  # noqa: B018 - the header is here now
    hub.requests.clear()
    hub.cuts = [3000] + [0] * hub_ranges.MAX_FRUITLESS_ATTEMPTS
    with pytest.raises(CheckpointError, match=r"cannot download model\.safetensors.*cannot be reached"):
        load_span(open_checkpoint(MODEL), Span(0, 1))

    load_span(open_checkpoint(MODEL), Span(0, 1))

    block_bytes = hub.large_requests()[0].range_bytes
    assert hub.large_requests()[-1].range_bytes == block_bytes - 3000


def start_loading_a_block(hub: HubServer, tmp_path: Path) -> "subprocess.Popen[bytes]":
    """In a process of its own, which knows the hub from its environment."""
    code = f"""
from p2pswarm.blocks.span_model import load_span
from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.core.span import Span
load_span(open_checkpoint({MODEL!r}), Span(0, 1))
"""
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "downloads")}
    return subprocess.Popen([sys.executable, "-c", code], env=environment)


def wait_until(condition: Callable[[], object], process: "subprocess.Popen[bytes]") -> None:
    while not condition():
        assert process.poll() is None
        time.sleep(0.02)


def test_a_process_killed_in_the_middle_leaves_what_the_next_one_goes_on_from(hub: HubServer, tmp_path: Path) -> None:
    open_checkpoint(MODEL).tensor_names  # noqa: B018 - the header is here now
    hub.requests.clear()
    hub.pace = threading.Event()
    cache = tmp_path / "cache"
    with start_loading_a_block(hub, tmp_path) as process:
        wait_until(lambda: any(path.stat().st_size for path in cache.rglob("*.partial")), process)
        process.kill()
    (partial,) = cache.rglob("*.partial")
    hub.pace.set()
    hub.pace = None

    load_span(open_checkpoint(MODEL), Span(0, 1))

    first, second = [request.range_bytes for request in hub.large_requests()]
    assert 0 < second < first
    assert not partial.exists()


def test_two_processes_that_need_the_same_block_download_it_once(hub: HubServer, tmp_path: Path) -> None:
    open_checkpoint(MODEL).tensor_names  # noqa: B018 - the header is here now
    hub.requests.clear()
    hub.pace = threading.Event()

    def let_it_finish(progress: Progress) -> None:
        if progress.work is Work.WAITING:
            assert hub.pace is not None
            hub.pace.set()

    with start_loading_a_block(hub, tmp_path) as process:
        wait_until(hub.large_requests, process)
        load_span(open_checkpoint(MODEL, listener=let_it_finish), Span(0, 1))

    assert process.returncode == 0
    assert len(hub.large_requests()) == 1


def test_the_token_goes_to_the_hub_but_not_to_where_it_redirects(hub: HubServer) -> None:
    hub.good_token = "hf_good"

    load_span(open_checkpoint(MODEL, token="hf_good"), Span(0, 1))

    assert {request.token for request in hub.requests if request.path.startswith(f"/{MODEL}/resolve")} == {"hf_good"}
    assert {request.token for request in hub.large_requests()} == {None}


def test_the_token_may_come_from_the_environment(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.good_token = "hf_good"
    monkeypatch.setenv("HF_TOKEN", "hf_good")

    assert load_span(open_checkpoint(MODEL), Span(0, 1)).span == Span(0, 1)


def test_a_gated_model_without_a_token_says_where_to_ask_and_what_to_give(hub: HubServer) -> None:
    hub.good_token = "hf_good"

    with pytest.raises(CheckpointError, match=rf"gated: ask for access at {hub.endpoint}/{MODEL}.*HF_TOKEN, --token"):
        open_checkpoint(MODEL)


def test_a_gated_model_with_a_token_without_access_says_so(hub: HubServer) -> None:
    hub.good_token = "hf_good"

    with pytest.raises(CheckpointError, match=rf"account of this token has no access.*{hub.endpoint}/{MODEL}"):
        open_checkpoint(MODEL, token="hf_other")


def test_a_token_that_no_account_has_is_told_from_a_missing_model(hub: HubServer) -> None:
    hub.unknown_token = "hf_typo"

    with pytest.raises(CheckpointError, match=rf"the hub refuses the token \(401\).*{hub.endpoint}/settings/tokens"):
        open_checkpoint(MODEL, token="hf_typo")


def test_a_hub_that_asks_for_patience_gets_it(hub: HubServer) -> None:
    hub.statuses = [503]

    assert open_checkpoint(MODEL).tensor_names
    assert len(hub.large_requests()) == 2


def test_a_revision_is_asked_for_by_its_name(hub: HubServer) -> None:
    hub.revisions = (*hub.revisions, "v2")

    assert open_checkpoint(MODEL, revision="v2").model_id == open_checkpoint(MODEL, revision=COMMIT).model_id
    with pytest.raises(CheckpointError, match="has no revision v3"):
        open_checkpoint(MODEL, revision="v3")


def test_an_unknown_model_is_named_with_what_it_may_be(hub: HubServer) -> None:
    with pytest.raises(CheckpointError, match=r"no folder tiny/other, and no such model on the hub, or it is private"):
        open_checkpoint("tiny/other")


def test_a_file_that_arrives_damaged_is_found_by_its_sha256_and_removed(hub: HubServer, tmp_path: Path) -> None:
    hub.damaged = True
    checkpoint = open_checkpoint(MODEL)
    true_sha256 = hashlib.sha256((hub.folder / "model.safetensors").read_bytes()).hexdigest()

    with pytest.raises(CheckpointError, match=rf"arrived damaged: its sha256 is .*, the hub states {true_sha256}"):
        checkpoint.read(checkpoint.tensor_names)

    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    hub.damaged = False
    assert same_tensors(open_checkpoint(MODEL), open_checkpoint(str(hub.folder)))


def test_a_mirror_without_ranges_is_refused_with_the_way_out(hub: HubServer) -> None:
    hub.knows_ranges = False

    with pytest.raises(CheckpointError, match=r"does not give parts of model\.safetensors.*to a folder"):
        open_checkpoint(MODEL).tensor_names  # noqa: B018


def test_a_machine_that_has_its_blocks_starts_without_the_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_checkpoint(MODEL)
    load_span(before, Span(0, 2))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:1/{repo_id}/{revision}/{filename}")

    again = open_checkpoint(MODEL)

    assert again.model_id == before.model_id
    assert load_span(again, Span(0, 2)).span == Span(0, 2)
    with pytest.raises(CheckpointError, match=r"cannot download model\.safetensors.*cannot be reached"):
        load_span(again, Span(2, 3))


def test_files_that_the_hub_s_own_library_downloaded_are_read_where_they_lie(hub: HubServer, tmp_path: Path) -> None:
    snapshot = tmp_path / "downloads" / "models--tiny--llama" / "snapshots" / COMMIT
    shutil.copytree(hub.folder, snapshot)

    assert same_tensors(open_checkpoint(MODEL), open_checkpoint(str(hub.folder)))
    assert not hub.large_requests()


def test_progress_is_told_in_bytes_of_the_whole_span(hub: HubServer) -> None:
    told: list[Progress] = []
    checkpoint = open_checkpoint(MODEL, listener=told.append)

    load_span(checkpoint, Span(0, 3))

    assert {(progress.work, progress.what) for progress in told} == {(Work.DOWNLOADING, MODEL)}
    done = [progress.done_bytes for progress in told]
    assert done == sorted(done)
    assert {progress.total_bytes for progress in told} == {done[-1]}


def swarmd_command(hub: HubServer, *flags: str) -> list[str]:
    return [sys.executable, "-m", "swarmd", "start", MODEL, "--host", "127.0.0.1", "--threads", "1", "--json", *flags]


def server_environment(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    places = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "XDG_DATA_HOME": str(tmp_path / "data")}
    return {**os.environ, **places}


def test_a_server_downloads_its_blocks_of_a_gated_model_and_serves_them(hub: HubServer, tmp_path: Path) -> None:
    hub.good_token = "hf_good"
    command = swarmd_command(hub, "--blocks", "2:4", "--max-disk-space", "1MB", "--kv-cache", "1024 tokens")
    environment = server_environment(hub, tmp_path) | {"HF_TOKEN": "hf_good"}

    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        events = map(json.loads, server.stdout)
        ready = next(event for event in events if event["event"] in ("ready", "error"))
        server.terminate()

    assert ready["event"] == "ready", ready
    assert ready["model_id"] == open_checkpoint(str(hub.folder)).model_id
    cached = {path.stem for path in (tmp_path / "cache" / "weights").rglob("*.safetensors")}
    assert cached == {"model.layers.2", "model.layers.3"}


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "the model is gated: ask for access at"),
        (["--token", "hf_good", "--max-disk-space", "100KB"], "no room for"),
    ],
)
def test_a_server_that_cannot_have_its_weights_says_why_in_a_line(
    hub: HubServer, tmp_path: Path, flags: list[str], complaint: str
) -> None:
    hub.good_token = "hf_good"

    done = subprocess.run(
        swarmd_command(hub, *flags), env=server_environment(hub, tmp_path), capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 1
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_client_interrupted_in_its_download_leaves_at_once_and_keeps_what_it_has(
    hub: HubServer, tmp_path: Path
) -> None:
    open_checkpoint(MODEL).tensor_names  # noqa: B018 - the header is here now
    environment = server_environment(hub, tmp_path)
    impatient = environment | {"HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    serve_folder = swarmd_command(hub, "--kv-cache", "1024 tokens")
    serve_folder[serve_folder.index(MODEL)] = str(hub.folder)
    with subprocess.Popen(serve_folder, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        ready = next(event for event in map(json.loads, server.stdout) if event["event"] == "ready")
        hub.pace = threading.Event()
        generate = ["generate", MODEL, "once", "--peers", ready["addresses"][-1]]
        with subprocess.Popen([sys.executable, "-m", "swarm_cli", *generate], env=impatient) as client:
            cache = tmp_path / "cache"
            wait_until(lambda: any(path.stat().st_size for path in cache.rglob("*.partial")), client)
            client.send_signal(signal.SIGINT)
            client.wait(60)
            hub.pace.set()
        server.terminate()

    assert client.returncode == 130
    assert list(cache.rglob("*.partial"))
    assert not list(cache.rglob("*.safetensors"))
