"""The files of a model on the Hugging Face hub, each downloaded when it is first needed.

What the hub says of a revision (its commit, its files, the sha256 of the large ones) is remembered, so that a machine
which has its shards starts without the hub, and so that a server need not download what other servers hold to name
the model.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors

from p2pswarm.checkpoint.cache_directory import cache_directory, write_atomically
from p2pswarm.checkpoint.fingerprint import file_sha256
from p2pswarm.checkpoint.local_folder import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    INDEX_NAME,
    PICKLE_REFUSAL,
    PICKLE_SUFFIXES,
    SINGLE_FILE_NAME,
)
from p2pswarm.checkpoint.safetensors_store import open_safetensors, read_index
from p2pswarm.core.errors import CheckpointError

HUB_FAILURES = (errors.HfHubHTTPError, errors.HTTPError, OSError)  # type: ignore[attr-defined]
"""No answer, or not the one asked for."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True)
class HubRevision:
    """What the hub says of one commit."""

    commit: str
    sha256_of: Mapping[str, str | None]
    """Every file by name; None for small files, of which the hub states no sha256."""


class HubModel:
    """One model at one revision. Raises `CheckpointError` for whatever goes wrong, with what can be done about it."""

    def __init__(self, name: str, *, revision: str | None, token: str | None, cache_dir: Path | None) -> None:
        self.name = name
        self._revision = revision
        self._token = token
        self._cache_dir = cache_dir

    def fetch(self, file_name: str) -> Path:
        """The file on this machine, downloaded if need be."""
        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    self.name,
                    file_name,
                    revision=self._at.commit,
                    token=self._token,
                    cache_dir=self._cache_dir,
                )
            )
        except errors.LocalEntryNotFoundError as error:
            raise CheckpointError(
                f"{file_name} of {self.name} is not on this machine: {_unreachable(error)}"
            ) from error
        except errors.EntryNotFoundError as error:
            raise CheckpointError(f"{self.name} has no {file_name} on the hub") from error
        except HUB_FAILURES as error:
            raise CheckpointError(f"cannot download {file_name} of {self.name}: {_unreachable(error)}") from error

    def weight_files(self) -> dict[str, str]:
        """Which file holds which tensor."""
        names = self._at.sha256_of
        if INDEX_NAME in names:
            return read_index(self.fetch(INDEX_NAME))
        if SINGLE_FILE_NAME in names:
            return dict.fromkeys(open_safetensors(self.fetch(SINGLE_FILE_NAME)).keys(), SINGLE_FILE_NAME)
        pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
        if pickles:
            raise CheckpointError(f"{self.name} is refused: {PICKLE_REFUSAL.format(names=', '.join(pickles))}")
        raise CheckpointError(f"{self.name} has no safetensors on the hub")

    def weight_hashes(self) -> dict[str, str]:
        """The sha256 of each weight file, as the hub states it."""
        hashes = {}
        for name in sorted(set(self.weight_files().values())):
            hashes[name] = self._at.sha256_of.get(name) or file_sha256(self.fetch(name))
        return hashes

    def config_folder(self) -> Path:
        """The folder of the snapshot, with the config in it and the author's settings for generation."""
        return self._folder_with(GENERATION_CONFIG_NAME)

    def tokenizer_folder(self) -> Path:
        """The folder of the snapshot, with the config and the tokenizer's files in it."""
        return self._folder_with(*TOKENIZER_FILES)

    def _folder_with(self, *names: str) -> Path:
        for name in names:
            if name in self._at.sha256_of:
                self.fetch(name)
        return self.fetch(CONFIG_NAME).parent

    @cached_property
    def _at(self) -> HubRevision:
        file_name = f"{self.name}@{self._revision or 'main'}.json".replace("/", "--")
        memory = cache_directory() / "hub" / file_name
        try:
            info = huggingface_hub.HfApi(token=self._token).model_info(
                self.name, revision=self._revision, files_metadata=True
            )
        except errors.GatedRepoError as error:
            raise CheckpointError(
                f"{self.name} is gated: ask for access on the hub, then log in or pass a token"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise CheckpointError(f"{self.name} has no revision {self._revision} on the hub") from error
        except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
            raise CheckpointError(f"there is no folder {self.name}, and no such model on the hub") from error
        except HUB_FAILURES as error:
            if memory.exists():
                return _revision_from_json(json.loads(memory.read_text()))
            raise CheckpointError(f"there is no folder {self.name}, and {_unreachable(error)}") from error
        found = HubRevision(
            commit=str(info.sha),
            sha256_of={file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or ()},
        )
        text = json.dumps({"commit": found.commit, "sha256_of": found.sha256_of})
        write_atomically(memory, lambda temporary: temporary.write_text(text))
        return found


def _revision_from_json(value: dict[str, Any]) -> HubRevision:
    return HubRevision(commit=value["commit"], sha256_of=value["sha256_of"])


def _unreachable(error: BaseException) -> str:
    reason = str(error).partition("\n")[0] or "no reason given"
    return f"the hub cannot be reached ({type(error).__name__}: {reason})"
