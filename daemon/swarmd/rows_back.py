"""Some rows on their way through the blocks of a span and back, one block at a time.

On the way there each block's inputs are kept; on the way back the block runs once more, and gives its gradients. After
any of these stages the device may do something else for a while. Knows nothing of requests or of the scheduler.
"""

from dataclasses import dataclass, replace

import torch

from p2pswarm.blocks.adapters import LowRank
from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.blocks.tuning import SpanTuning
from p2pswarm.core.span import Span


def num_stages(blocks: Span) -> int:
    """Of rows through these blocks: what the last of them answers is not needed."""
    return 2 * blocks.num_blocks - 1


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What goes through the blocks, and how."""

    hidden_states: torch.Tensor
    """[rows, tokens, hidden]: what entered the first block."""
    grad_outputs: torch.Tensor
    """The same shape: the gradients of what the last block answered."""
    mask: torch.Tensor | None
    """bool [rows, tokens]"""
    position_ids: torch.Tensor | None
    """int64 [rows, tokens]"""
    adapter: str | None
    tuning: SpanTuning | None


class RowsBack:
    """Rows under way. `go_on` on the device, until `is_done`."""

    def __init__(self, model: SpanModel, blocks: Span, rows: Rows) -> None:
        self._model = model
        self._blocks = blocks
        self._rows = rows
        self._entered = [rows.hidden_states.to(model.device, model.dtype)]
        """What came to each block that the rows have reached and not come back through."""
        self._is_returning = blocks.num_blocks == 1
        self._gradients = rows.grad_outputs.to(model.device, model.dtype)
        self._of_tuning: list[SpanTuning] = []
        """The gradients of its parts, the last block's first."""

    @property
    def is_done(self) -> bool:
        return not self._entered

    @property
    def grad_inputs(self) -> torch.Tensor:
        """[rows, tokens, hidden], once it is done."""
        return self._gradients

    @property
    def grad_tuning(self) -> SpanTuning | None:
        """Once it is done."""
        tuning = self._rows.tuning
        return None if tuning is None else _joined(tuning, self._of_tuning[::-1])

    def go_on(self, stages: int) -> None:
        """Takes the next stages."""
        for _ in range(stages):
            if self._is_returning:
                self._go_back()
            else:
                self._go_there()

    def _go_there(self) -> None:
        """Through the block that the rows have reached."""
        index = self._blocks.start + len(self._entered) - 1
        block, rows = Span(index, index + 1), self._rows
        states = self._model.run(
            self._entered[-1],
            None,
            position=0,
            attention_mask=rows.mask,
            position_ids=rows.position_ids,
            blocks=block,
            adapter=rows.adapter,
            tuning=_part(rows.tuning, block),
        )
        self._entered.append(states)
        self._is_returning = len(self._entered) == self._blocks.num_blocks

    def _go_back(self) -> None:
        index = self._blocks.start + len(self._entered) - 1
        block, rows = Span(index, index + 1), self._rows
        gradients = self._model.run_backward(
            self._entered.pop(),
            self._gradients,
            attention_mask=rows.mask,
            position_ids=rows.position_ids,
            blocks=block,
            adapter=rows.adapter,
            tuning=_part(rows.tuning, block),
        )
        self._gradients = gradients.inputs
        if gradients.tuning is not None:
            self._of_tuning.append(gradients.tuning)


def _part(tuning: SpanTuning | None, block: Span) -> SpanTuning | None:
    """What of a tuning is for this one block."""
    if tuning is None:
        return None
    place = block.start - tuning.blocks.start
    prompts = None if tuning.prompts is None else tuning.prompts[place : place + 1]
    layers = {block.start: tuning.layers[block.start]} if block.start in tuning.layers else {}
    return SpanTuning(block, prompts, layers)


def _joined(tuning: SpanTuning, parts: list[SpanTuning]) -> SpanTuning:
    """The parts of all blocks, in order."""
    prompts = [part.prompts for part in parts if part.prompts is not None]
    layers: dict[int, dict[str, LowRank]] = {}
    for part in parts:
        layers |= {index: dict(pairs) for index, pairs in part.layers.items()}
    return replace(tuning, prompts=torch.cat(prompts) if prompts else None, layers=layers)
