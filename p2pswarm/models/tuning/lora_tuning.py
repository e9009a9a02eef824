"""LoRA from the client (2106.09685): a low-rank pair is trained for each chosen linear layer of the blocks, and goes
along to the servers that hold these."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from p2pswarm.blocks.adapters import LowRank
from p2pswarm.client.local_adapter import LORA, TENSOR_PREFIXES, LoraPair
from p2pswarm.client.tuning import Place, Tuning
from p2pswarm.models.tuning.method import TuningMethod
from p2pswarm.models.tuning.target_modules import Target


class TrainedPair(nn.Module):
    """What is added to one layer."""

    def __init__(self, place: Place, pair: LoraPair) -> None:
        super().__init__()
        self.place = place
        self.down = nn.Parameter(pair.down.detach().clone())
        self.up = nn.Parameter(pair.up.detach().clone())
        self.scale = pair.scale

    def low_rank(self) -> LowRank:
        """With the scale in it, as servers take it."""
        return LowRank(self.down, self.up * self.scale)


class LoraTuning(TuningMethod):
    """peft's `LORA`, without dropout."""

    def __init__(self, adapter_config: Mapping[str, Any], pairs: Mapping[Place, LoraPair]) -> None:
        """The pairs are what training begins with."""
        super().__init__(adapter_config)
        self.pairs = nn.ModuleDict({_key(place): TrainedPair(place, pairs[place]) for place in sorted(pairs)})

    def tuning(self) -> Tuning | None:
        return Tuning(layers={pair.place: pair.low_rank() for pair in self._pairs()})

    def saved_tensors(self, blocks_path: str) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for pair in self._pairs():
            block, path = pair.place
            name = f"{TENSOR_PREFIXES[LORA]}{blocks_path}.{block}.{path}"
            tensors[f"{name}.lora_A.weight"] = pair.down
            tensors[f"{name}.lora_B.weight"] = pair.up
        return tensors

    def _pairs(self) -> list[TrainedPair]:
        return [pair for pair in self.pairs.values() if isinstance(pair, TrainedPair)]


def drawn_pairs(targets: list[Target], rank: int, scale: float, generator: torch.Generator) -> dict[Place, LoraPair]:
    """Where peft begins too: one side drawn as linear layers are, the other zero, so that nothing is changed yet."""
    pairs = {}
    for target in targets:
        bound = target.inputs**-0.5
        down = torch.rand(rank, target.inputs, generator=generator) * (2 * bound) - bound
        pairs[target.place] = LoraPair(down, torch.zeros(target.outputs, rank), scale)
    return pairs


def _key(place: Place) -> str:
    """Names of modules have no dots."""
    block, path = place
    return f"{block}-{path.replace('.', '-')}"
