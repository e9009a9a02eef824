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
