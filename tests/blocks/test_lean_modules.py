import torch
from torch import nn

from p2pswarm.blocks.lean_modules import make_lean


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Sequential(nn.LayerNorm(16), nn.GELU()), nn.Linear(16, 8)).eval()


def test_a_lean_model_gives_the_same_bits_and_keeps_its_kinds() -> None:
    model, inputs = small_model(), torch.randn(3, 8)
    expected = model(inputs)
    make_lean(model)
    assert torch.equal(model(inputs), expected)
    assert isinstance(model[0], nn.Linear)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in small_model().named_parameters()]


def test_modules_with_hooks_or_a_forward_of_their_own_are_called_as_before() -> None:
    model, inputs = small_model(), torch.randn(3, 8)
    seen = []
    model[0].register_forward_hook(lambda module, arguments, output: seen.append(output))
    model[2].forward = lambda hidden_states: hidden_states * 0  # type: ignore[method-assign]
    make_lean(model)
    assert not model(inputs).any()
    assert len(seen) == 1


def test_a_buffer_that_is_registered_anew_is_used() -> None:
    """Unlike text of the model's usual length, longer text has other rotary embeddings in some models."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("factor", torch.ones(1), persistent=False)

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            self.register_buffer("factor", self.factor + 1, persistent=False)
            return states * self.factor

    model = nn.Sequential(Scale())
    make_lean(model)
    assert [float(model(torch.ones(1))) for _ in range(3)] == [2, 3, 4]
    assert float(dict(model.named_buffers())["0.factor"]) == 4
