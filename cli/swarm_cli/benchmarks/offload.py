"""`swarm bench --baseline offload`: the swarm beside the same model on one machine whose memory does not hold the
blocks, which is what accelerate's disk offload is for.

The offloaded model is transformers' own with every block under `accelerate.disk_offload`: embeddings, norm and head
stay in memory, as they do at a swarm's client, and each block's weights are read from files when it runs. The system
would soon keep those files in memory, so after each token it is told to forget them (`POSIX_FADV_DONTNEED`), and what
was then read from the disk is counted (`/proc/self/io`): where it is not about the size of the blocks, nothing is
reported. What the disk itself or a hypervisor keeps is beyond our reach; the speed of reading is in the report.

The files are in the folder for temporary files (`TMPDIR` names another one). Swarm and offloaded model take turns; the
model wholly in memory is there for comparison.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
import trio
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

from p2pswarm.blocks.architecture import lay_out
from p2pswarm.core.errors import ConfigError
from swarm_cli.benchmarks.generating import (
    SHORT_PROMPT_TOKENS,
    Generate,
    Measured,
    generate_in_swarm,
    generate_locally,
    make_prompt,
)
from swarm_cli.benchmarks.setting import Setting, load_whole_model

LEAST_SHARE_READ = 0.9
"""Of the blocks' bytes, from the disk for each token, or the measurement is refused."""
PROCESS_READS = Path("/proc/self/io")


@dataclass(frozen=True, slots=True)
class OffloadReport:
    """What the benchmark says."""

    swarm_tokens_per_s: float
    offload_tokens_per_s: float
    local_tokens_per_s: float
    blocks_bytes: int
    read_bytes_per_token: float
    is_exact: bool
    rounds: int

    @property
    def ratio(self) -> float:
        return self.swarm_tokens_per_s / self.offload_tokens_per_s

    def as_json(self) -> dict[str, Any]:
        return {
            "swarm_tokens_per_s": round(self.swarm_tokens_per_s, 2),
            "offload_tokens_per_s": round(self.offload_tokens_per_s, 3),
            "swarm_over_offload": round(self.ratio, 2),
            "local_tokens_per_s": round(self.local_tokens_per_s, 2),
            "blocks_bytes": self.blocks_bytes,
            "read_bytes_per_token": round(self.read_bytes_per_token),
            "is_exact": self.is_exact,
            "rounds": self.rounds,
        }

    def as_table(self) -> Table:
        read_bytes_per_s = self.read_bytes_per_token * self.offload_tokens_per_s
        table = Table(
            caption=f"offloaded: {self.read_bytes_per_token / 1e6:.0f} MB read from the disk for each token, of "
            f"{self.blocks_bytes / 1e6:.0f} MB of blocks, at {read_bytes_per_s / 1e6:.0f} MB/s; "
            f"tokens equal to the local model's: {'yes' if self.is_exact else 'NO'}; medians of {self.rounds} rounds",
        )
        for column in ("", "tokens/s", "swarm : it"):
            table.add_column(column, justify="right" if column else "left")
        for name, tokens_per_s in (
            ("swarm", self.swarm_tokens_per_s),
            ("blocks offloaded to disk", self.offload_tokens_per_s),
            ("wholly in memory", self.local_tokens_per_s),
        ):
            table.add_row(name, f"{tokens_per_s:.2f}", f"{self.swarm_tokens_per_s / tokens_per_s:.2f}")
        return table


async def measure(setting: Setting, arguments: argparse.Namespace) -> OffloadReport:
    """Swarm, offloaded and local model in turn, from the same prompt."""
    prompt, num_tokens = make_prompt(SHORT_PROMPT_TOKENS), arguments.new_tokens
    with TemporaryDirectory(prefix="swarm-offload-") as folder:
        setting.console.print(f"Writing the blocks to {folder} …")
        offloaded = await trio.to_thread.run_sync(partial(OffloadedModel, setting, Path(folder)))
        runs: dict[str, Generate] = {
            "swarm": partial(generate_in_swarm, setting.model),
            "offload": partial(generate_locally, offloaded.generate),
            "local": partial(generate_locally, setting.local.generate),
        }
        decoded: dict[str, list[Measured]] = {name: [] for name in runs}
        for number in range(arguments.rounds + 1):
            setting.say_round(number, arguments.rounds)
            for name, generate in runs.items():
                decoded[name].append(await generate(prompt, num_tokens))
    offloaded.check_reads()
    tokens_per_s = {
        name: 1 / median(one.decode_s_per_token for one in decoded[name][1:]) for name in ("swarm", "offload", "local")
    }
    return OffloadReport(
        swarm_tokens_per_s=tokens_per_s["swarm"],
        offload_tokens_per_s=tokens_per_s["offload"],
        local_tokens_per_s=tokens_per_s["local"],
        blocks_bytes=offloaded.blocks_bytes,
        read_bytes_per_token=offloaded.read_bytes_per_token,
        is_exact=len({one.token_ids for measured in decoded.values() for one in measured}) == 1,
        rounds=arguments.rounds,
    )


class OffloadedModel:
    """The setting's model with its blocks in files of `folder`, which are read anew for each token."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        from accelerate import disk_offload  # takes a second

        if not hasattr(os, "posix_fadvise") or not PROCESS_READS.exists():
            raise ConfigError("whether blocks are really read from the disk can be seen on Linux only")
        layout = lay_out(setting.model.checkpoint.config, setting.model.shell.dtype)
        self._model = load_whole_model(setting.model)
        blocks = self._model.get_submodule(layout.blocks_path)
        disk_offload(blocks, folder, execution_device=torch.device("cpu"))
        self._files = sorted(folder.glob("*.dat"))
        self.blocks_bytes = sum(file.stat().st_size for file in self._files)
        self._num_tokens = self._read_bytes = 0
        for file in self._files:
            _write_through(file)

    @property
    def read_bytes_per_token(self) -> float:
        """From the disk, in all tokens so far."""
        return self._read_bytes / self._num_tokens if self._num_tokens else 0.0

    def generate(self, prompt: torch.Tensor, *, streamer: Any, **options: Any) -> Any:
        """transformers' `generate`, with nothing of the blocks in memory before each token."""
        self._forget_files()
        before_bytes = _bytes_read_from_disk()
        result = self._model.generate(prompt, streamer=_AfterEach(streamer, self._forget_files), **options)
        self._read_bytes += _bytes_read_from_disk() - before_bytes
        self._num_tokens += result.shape[1] - prompt.shape[1]
        return result

    def check_reads(self) -> None:
        """Raises `ConfigError` where blocks came out of memory after all."""
        if self.read_bytes_per_token < LEAST_SHARE_READ * self.blocks_bytes:
            raise ConfigError(
                f"for each token {self.read_bytes_per_token / 1e6:.0f} MB were read from a disk, not the "
                f"{self.blocks_bytes / 1e6:.0f} MB of the blocks: {gettempdir()} is kept in memory; "
                "set TMPDIR to a folder on a disk"
            )

    def _forget_files(self) -> None:
        for file in self._files:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


class _AfterEach(BaseStreamer):
    """Does something once a token has been handed on."""

    def __init__(self, streamer: Any, action: Callable[[], None]) -> None:
        self._streamer = streamer
        self._action = action

    def put(self, value: torch.Tensor) -> None:
        self._streamer.put(value)
        self._action()

    def end(self) -> None:
        self._streamer.end()


def _write_through(file: Path) -> None:
    """Only what is on the disk can be forgotten."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bytes_read_from_disk() -> int:
    lines = dict(line.split(": ") for line in PROCESS_READS.read_text().splitlines())
    return int(lines["read_bytes"])
