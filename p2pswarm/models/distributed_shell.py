"""What any model of transformers can do in addition when its blocks are in a swarm: sessions, and leaving the swarm."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.portal import Portal
from p2pswarm.client.swarm import Swarm
from p2pswarm.models.inference_session import InferenceSession
from p2pswarm.models.remote_sequential import RemoteSequential
from p2pswarm.models.tuned_shell import TunedShell

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Connection:
    """The model's place in the swarm."""

    portal: Portal
    swarm: Swarm
    model: DistributedModel


class DistributedShell(TunedShell):
    """Mixed in front of the model's own class."""

    connection: Connection

    def inference_session(self, *, max_length: int, adapter: str | Path | None = None) -> InferenceSession:
        """A session for up to `max_length` tokens, prompts and answers together.

            with model.inference_session(max_length=1024) as session:
                model.generate(first_prompt, max_new_tokens=50)
                model.generate(more_text, max_new_tokens=50)  # goes on from there

        `session.position` tells and sets how many tokens count. Room at the servers is asked for at the first step.
        `adapter`: the name or id of a LoRA adapter that servers have, or a folder here with what was tuned; by default
        that which `from_pretrained` was given, and what is being tuned, as it is now.
        """
        name = None if adapter is None else str(adapter)
        return InferenceSession(self.connection.portal, self.connection.model, max_length, name)

    @property
    def remote_blocks(self) -> RemoteSequential:
        """All blocks, as a module of its own that can be sliced: hidden states in, hidden states out."""
        return RemoteSequential(self.connection.model)

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The checkpoint's own."""
        return self.connection.model.tokenizer

    def close(self) -> None:
        """Leaves the swarm. Happens by itself when the model is collected and when the program ends."""
        self.connection.portal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
