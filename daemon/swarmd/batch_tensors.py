"""What rows without a session bring, found fit, and decoded as they are taken. `forward_pass.py` and `backward_pass.py`
take them.

Requests that wait stay as they came: decoded, int8 is four times as large.
"""

import torch

from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.wire.codecs import decode_tensor
from p2pswarm.wire.messages import Backward, Forward
from p2pswarm.wire.tensor_rows import rows_of
from swarmd import checks
from swarmd.tunings import read_tuning


class BatchTensors:
    """Of either direction. Used on the device's thread; raises `BadRequest` when it is made."""

    def __init__(self, request: Forward | Backward, model: SpanModel, max_length: int) -> None:
        checks.check_finite(request.hidden_states, "hidden_states")
        self._request = request
        self.mask = checks.read_mask(request.attention_mask)
        self.position_ids = checks.read_position_ids(request.position_ids, max_length)
        self.tuning = read_tuning(request.tuning, request.span, model)

    @property
    def dtype(self) -> torch.dtype:
        """Of what came, and of what goes back."""
        dtype: torch.dtype = getattr(torch, self._request.hidden_states.dtype)
        return dtype

    def hidden_states(self, rows: slice) -> torch.Tensor:
        return decode_tensor(rows_of(self._request.hidden_states, rows.start, rows.stop))


class BackwardTensors(BatchTensors):
    """With the gradients that go back."""

    def __init__(self, request: Backward, model: SpanModel, max_length: int) -> None:
        super().__init__(request, model, max_length)
        checks.check_finite(request.grad_outputs, "grad_outputs")
        self._grad_outputs = request.grad_outputs

    def grad_outputs(self, rows: slice) -> torch.Tensor:
        return decode_tensor(rows_of(self._grad_outputs, rows.start, rows.stop))
