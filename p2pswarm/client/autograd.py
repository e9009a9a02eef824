"""`run_differentiably`: blocks in the swarm as one node of torch's autograd graph.

The graph is blocking code, in any thread; calls to servers are made in a trio loop. What comes out is on the CPU, and
so torch goes back through it in the very thread that calls `backward`; `Call` finds the way into the loop from there,
or says that there is none. What the way back needs is saved as torch wants it: it is freed after `backward`, and what
was changed in place meanwhile is an error, not a wrong gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from p2pswarm.client.step_input import StepInput
from p2pswarm.client.training import Trail, TrainingPass
from p2pswarm.client.tuning import Tuning
from p2pswarm.core.span import Span

Call = Callable[..., Any]
"""`call(async_function, *args)` from a thread beside the loop: `Portal.call`, or what `dispatch.calls_into_loop`
gives."""


@dataclass(frozen=True, slots=True, eq=False)
class BlocksPass:
    """One pass of a batch through blocks, all of the model's where `blocks` is None."""

    batch: StepInput
    tuning: Tuning | None = None
    adapter: str | None = None
    blocks: Span | None = None

    @property
    def wants_gradients(self) -> bool:
        """Whether anybody may call `backward`."""
        tensors = (self.batch.hidden_states, *self.tuning_tensors)
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    @property
    def tuning_tensors(self) -> tuple[torch.Tensor, ...]:
        return () if self.tuning is None else self.tuning.tensors

    def detached(self) -> "BlocksPass":
        """The same tensors outside of any graph; the loop's thread would go on recording."""
        tuning = self.tuning
        return replace(
            self,
            batch=replace(self.batch, hidden_states=self.batch.hidden_states.detach()),
            tuning=None if tuning is None else tuning.with_tensors([tensor.detach() for tensor in tuning.tensors]),
        )


def run_differentiably(training: TrainingPass, call: Call, blocks_pass: BlocksPass) -> torch.Tensor:
    """The hidden states after the blocks [batch, tokens, hidden], differentiable by those of the batch and by the
    tuning's tensors. Blocks the thread, and so does `backward`; raises what `TrainingPass` does."""
    output: torch.Tensor = SwarmFunction.apply(  # type: ignore[no-untyped-call]
        training, call, blocks_pass, blocks_pass.batch.hidden_states, *blocks_pass.tuning_tensors
    )
    return output


class SwarmFunction(torch.autograd.Function):
    """Its tensors are the hidden states, then those of the tuning."""

    @staticmethod
    def forward(
        ctx: Any, training: TrainingPass, call: Call, blocks_pass: BlocksPass, *tensors: torch.Tensor
    ) -> torch.Tensor:
        plain = blocks_pass.detached()
        output, trail = call(training.forward, plain.batch, plain.tuning, plain.adapter, plain.blocks)
        ctx.training, ctx.call, ctx.device = training, call, tensors[0].device
        ctx.outline = trail.with_tensors([tensor.to("meta") for tensor in trail.tensors])
        ctx.save_for_backward(*trail.tensors)
        result: torch.Tensor = output
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        trail: Trail = ctx.outline.with_tensors(ctx.saved_tensors)
        gradients, of_tuning = ctx.call(ctx.training.backward, trail, grad_outputs)
        return None, None, None, gradients.to(ctx.device), *(() if of_tuning is None else of_tuning.tensors)
