"""What the Hugging Face hub has of a model: its files, small ones whole and large ones by parts, and their hashes.

What the hub says of a revision (its commit, its files, the sha256 of the large ones) is remembered, so that a machine
which has its blocks starts without the hub, and so that a server need not download what other servers hold to name
the model. Small files lie where the hub's own library keeps them. Which parts are needed is not known here:
`hub_store.py` asks for them.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from p2pswarm.checkpoint.cache_directory import cache_directory, write_atomically
from p2pswarm.checkpoint.fingerprint import file_sha256
from p2pswarm.checkpoint.hub_ranges import FilePart, read_part
from p2pswarm.checkpoint.local_folder import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    INDEX_NAME,
    PICKLE_REFUSAL,
    PICKLE_SUFFIXES,
    SINGLE_FILE_NAME,
)
from p2pswarm.checkpoint.safetensors_store import read_index
from p2pswarm.core.errors import CheckpointError

HUB_FAILURES = (errors.HfHubHTTPError, errors.HTTPError, OSError)  # type: ignore[attr-defined]
"""No answer, or not the one asked for."""
REFUSALS = (401, 403)

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
class HubFile:
    """What the hub says of one file."""

    size_bytes: int
    sha256: str | None
    """None for small files, of which the hub states none."""
    blob_id: str
    """Git's hash: two revisions of a file with the same id are equal."""


@dataclass(frozen=True, slots=True)
class HubRevision:
    """What the hub says of one commit."""

    commit: str
    files: Mapping[str, HubFile]


class HubModel:
    """One model at one revision. Raises `CheckpointError` for whatever goes wrong, with what can be done about it."""

    def __init__(self, name: str, *, revision: str | None, token: str | None, cache_dir: Path | None) -> None:
        self.name = name
        self._revision = revision
        self._token = token
        self._cache_dir = cache_dir

    def fetch(self, file_name: str) -> Path:
        """The whole file on this machine, downloaded if need be."""
        with self._explained(f"cannot download {file_name} of {self.name}"):
            return Path(
                huggingface_hub.hf_hub_download(
                    self.name,
                    file_name,
                    revision=self._at.commit,
                    token=self._token,
                    cache_dir=self._cache_dir,
                )
            )

    def local_copy(self, file_name: str) -> Path | None:
        """The whole file, if the hub's own library has downloaded it before."""
        path = huggingface_hub.try_to_load_from_cache(
            self.name, file_name, cache_dir=self._cache_dir, revision=self._at.commit
        )
        return Path(path) if isinstance(path, str) else None

    def read_part(self, file_name: str, start: int, end: int) -> Iterator[bytes]:
        """Bytes `[start, end)` of a file as they come from the hub."""
        url = huggingface_hub.hf_hub_url(self.name, file_name, revision=self._at.commit)
        part = FilePart(file_name, start, end, self.file(file_name).size_bytes)
        with self._explained(f"cannot download {file_name} of {self.name}"):
            yield from read_part(url, build_hf_headers(token=self._token), part)

    @property
    def file_names(self) -> Collection[str]:
        return self._at.files.keys()

    def file(self, file_name: str) -> HubFile:
        try:
            return self._at.files[file_name]
        except KeyError as error:
            raise CheckpointError(f"{self.name} has no {file_name} on the hub") from error

    @cached_property
    def index(self) -> Mapping[str, str] | None:
        """Which file holds which tensor; None: `SINGLE_FILE_NAME` holds them all."""
        names = self._at.files
        if INDEX_NAME in names:
            return read_index(self.fetch(INDEX_NAME))
        if SINGLE_FILE_NAME in names:
            return None
        pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
        if pickles:
            raise CheckpointError(f"{self.name} is refused: {PICKLE_REFUSAL.format(names=', '.join(pickles))}")
        raise CheckpointError(f"{self.name} has no safetensors on the hub")

    @property
    def weight_files(self) -> list[str]:
        """The files that hold tensors."""
        return [SINGLE_FILE_NAME] if self.index is None else sorted(set(self.index.values()))

    @cached_property
    def weights_key(self) -> str:
        """Names these weights among all that were ever cached: another commit with equal weights has the same."""
        digest = hashlib.sha256()
        for name in self.weight_files:
            file = self.file(name)
            digest.update(f"{name} {file.sha256 or file.blob_id}\n".encode())
        return f"{self.name.replace('/', '--')}-{digest.hexdigest()[:16]}"

    def weight_hashes(self) -> dict[str, str]:
        """The sha256 of each weight file, as the hub states it."""
        return {name: self.file(name).sha256 or file_sha256(self.fetch(name)) for name in self.weight_files}

    def config_folder(self) -> Path:
        """The folder of the snapshot, with the config in it and the author's settings for generation."""
        return self._folder_with(GENERATION_CONFIG_NAME)

    def tokenizer_folder(self) -> Path:
        """The folder of the snapshot, with the config and the tokenizer's files in it."""
        return self._folder_with(*TOKENIZER_FILES)

    def _folder_with(self, *names: str) -> Path:
        for name in names:
            if name in self._at.files:
                self.fetch(name)
        return self.fetch(CONFIG_NAME).parent

    @cached_property
    def _at(self) -> HubRevision:
        file_name = f"{self.name}@{self._revision or 'main'}.json".replace("/", "--")
        memory = (self._cache_dir or cache_directory()) / "revisions" / file_name
        try:
            with self._explained(f"there is no folder {self.name}, and cannot ask the hub for it"):
                found = self._ask()
        except HubUnreachable:
            if not memory.exists():
                raise
            return _revision_from_json(json.loads(memory.read_text()))
        write_atomically(memory, lambda temporary: temporary.write_text(json.dumps(asdict(found))))
        return found

    def _ask(self) -> HubRevision:
        info = huggingface_hub.HfApi(token=self._token).model_info(
            self.name, revision=self._revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        files = {
            file.rfilename: HubFile(file.size or 0, file.lfs.sha256 if file.lfs else None, file.blob_id or "")
            for file in info.siblings or ()
        }
        return HubRevision(str(info.sha), files)

    @contextmanager
    def _explained(self, what_failed: str) -> Iterator[None]:
        """Raises what goes wrong with the hub as a `CheckpointError` that says what to do."""
        try:
            yield
        except errors.GatedRepoError as error:
            raise CheckpointError(f"{what_failed}: {self._gated()}") from error
        except errors.RevisionNotFoundError as error:
            raise CheckpointError(f"{self.name} has no revision {self._revision} on the hub") from error
        except errors.RepositoryNotFoundError as error:
            raise CheckpointError(
                f"there is no folder {self.name}, and no such model on the hub, or it is private: then give the token "
                f"of an account that may see it (--token or HF_TOKEN)"
            ) from error
        except errors.HFValidationError as error:
            raise CheckpointError(f"there is no folder {self.name}, and no such model on the hub: {error}") from error
        except errors.LocalEntryNotFoundError as error:
            raise HubUnreachable(f"{what_failed}: {_unreachable(error)}") from error
        except errors.EntryNotFoundError as error:
            raise CheckpointError(f"{what_failed}: the hub does not have it") from error
        except HUB_FAILURES as error:
            if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in REFUSALS:
                raise CheckpointError(
                    f"{what_failed}: the hub refuses the token ({error.response.status_code}); give one that is valid "
                    f"and may read this model (--token or HF_TOKEN), from {constants.ENDPOINT}/settings/tokens"
                ) from error
            raise HubUnreachable(f"{what_failed}: {_unreachable(error)}") from error

    def _gated(self) -> str:
        has_token = (self._token or huggingface_hub.get_token()) is not None
        page = f"{constants.ENDPOINT}/{self.name}"
        if has_token:
            return f"the model is gated, and the account of this token has no access to it yet: ask for it at {page}"
        return (
            f"the model is gated: ask for access at {page}, then give a token of the account that got it "
            f"(HF_TOKEN, --token or `hf auth login`)"
        )


class HubUnreachable(CheckpointError):
    """The hub gives no answer: what is on this machine may do."""


def _revision_from_json(value: dict[str, Any]) -> HubRevision:
    return HubRevision(value["commit"], {name: HubFile(**file) for name, file in value["files"].items()})


def _unreachable(error: BaseException) -> str:
    reason = str(error).partition("\n")[0] or "no reason given"
    return f"the hub cannot be reached ({type(error).__name__}: {reason})"
