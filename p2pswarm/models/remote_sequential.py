"""`RemoteSequential`: blocks of a model in the swarm as a torch module, for whoever wants to see or change what goes in
between.

    blocks = model.remote_blocks
    middle = blocks[:12](hidden_states)
    output = blocks[12:](middle + adapter(middle))
    output.sum().backward()

Blocking, as torch is; in trio programs it runs in threads. Knows nothing of sessions: each call runs whole rows, and
servers remember nothing.
"""

from collections.abc import Iterator

import torch
from torch import nn

from p2pswarm.client.autograd import BlocksPass
from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.step_input import StepInput
from p2pswarm.client.tuning import Tuning
from p2pswarm.core.errors import ConfigError
from p2pswarm.core.span import Span


class RemoteSequential(nn.Module):
    """All blocks of a model, or those of a slice. It has no parameters: what servers hold is frozen."""

    def __init__(self, model: DistributedModel, span: Span | None = None) -> None:
        super().__init__()
        self.span = span or model.servers.facts.span
        self._model = model

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        adapter: str | None = None,
        tuning: Tuning | None = None,
    ) -> torch.Tensor:
        """`hidden_states` [batch, tokens, hidden] after the blocks; differentiable by them and by the tuning.

        `attention_mask`: [batch, tokens], 0 or False for padding. `position_ids`: [batch, tokens]. `adapter`: the name
        or id of one that servers have. `tuning`: by default what the model carries along. Raises `MissingBlocksError`
        where blocks stay without a server, and what else `TrainingPass.forward` does; so does `backward`.
        """
        batch = StepInput(
            hidden_states,
            0,
            attention_mask=None if attention_mask is None else attention_mask.to(torch.bool),
            position_ids=None if position_ids is None else position_ids.to(torch.int64),
        )
        carried = tuning if tuning is not None else self._model.carried().tuning
        output = self._model.dispatch.run(BlocksPass(batch, carried, adapter, self.span))
        return output.to(hidden_states.device)

    def __len__(self) -> int:
        return self.span.num_blocks

    def __getitem__(self, index: int | slice) -> "RemoteSequential":
        """One block, or several that follow one another. Raises `IndexError` for blocks that are not here."""
        if isinstance(index, slice):
            start, end, step = index.indices(len(self))
            if step != 1 or start >= end:
                raise ConfigError(f"a slice of blocks holds some that follow one another, got {index} of {len(self)}")
            return self._part(start, end)
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} blocks here, asked was number {index}")
        return self._part(number, number + 1)

    def __iter__(self) -> Iterator["RemoteSequential"]:
        return (self[number] for number in range(len(self)))

    def extra_repr(self) -> str:
        return f"blocks {self.span} of {self._model.model_id}"

    def _part(self, start: int, end: int) -> "RemoteSequential":
        return RemoteSequential(self._model, Span(self.span.start + start, self.span.start + end))
