"""What rows without a session bring, decoded and found fit. Read `forward_pass.py` and `backward_pass.py` next."""

from p2pswarm.blocks.span_model import SpanModel
from p2pswarm.wire.messages import Backward, Forward
from swarmd import checks
from swarmd.tunings import read_tuning


class BatchTensors:
    """Of either direction. Made on the device's thread; raises `BadRequest`."""

    def __init__(self, request: Forward | Backward, model: SpanModel, max_length: int) -> None:
        self.hidden_states = checks.read_hidden_states(request.hidden_states)
        self.mask = checks.read_mask(request.attention_mask)
        self.position_ids = checks.read_position_ids(request.position_ids, max_length)
        self.tuning = read_tuning(request.tuning, request.span, model)


class BackwardTensors(BatchTensors):
    """With the gradients that go back."""

    def __init__(self, request: Backward, model: SpanModel, max_length: int) -> None:
        super().__init__(request, model, max_length)
        self.grad_outputs = checks.read_hidden_states(request.grad_outputs, "grad_outputs")
